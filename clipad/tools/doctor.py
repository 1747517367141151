"""What ``clipad doctor`` says beside ``torch.utils.collect_env``: faults of an installation, each with its fix."""

import importlib
import subprocess
import sys
from collections.abc import Iterator

PIP = f"{sys.executable} -m pip"


def diagnose() -> Iterator[tuple[str, str]]:
    """Faults that keep the notebooks from running, as (fault, fix); nothing where there are none."""
    checks = {
        _packages: f"make install, or {PIP} install -c constraints.txt -e '.[dev]'",
        _torch: f"{PIP} install --upgrade torch torchvision open_clip_torch",
        _demo: "git restore data/demo, in a clone that is installed with `pip install -e .`",
    }
    for check, fix in checks.items():
        try:
            check()
        except Exception as error:  # also a wrong CUDA library, another torch's torchvision
            yield f"{type(error).__name__}: {' '.join(str(error).split())}", fix


def _packages() -> None:
    pip = [sys.executable, "-m", "pip", "check"]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(done.stdout or done.stderr)


def _torch() -> None:
    for name in ("torch", "torchvision", "open_clip"):
        importlib.import_module(name)


def _demo() -> None:
    from clipad import load_backbone, load_dataset

    load_backbone("demo", device="cpu")
    load_dataset("demo")
