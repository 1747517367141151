"""What ``clipad doctor`` says beside ``torch.utils.collect_env``: faults of an installation, each with its fix."""

import importlib
import subprocess
import sys
from collections.abc import Iterator

PIP = f"{sys.executable} -m pip"


def diagnose() -> Iterator[tuple[str, str]]:
    """Faults that keep the notebooks from running, as (fault, fix); nothing where there are none."""
    checks = {
        "packages": (_packages, f"make install, or {PIP} install -c constraints.txt -e '.[dev]'"),
        "torch": (_torch, f"{PIP} install --upgrade torch torchvision open_clip_torch"),
        "demo": (
            _demo,
            "git restore data/demo, in a clone that is installed with `pip install -e .`",
        ),
    }
    for name, (check, fix) in checks.items():
        try:
            check()
        except Exception as error:  # also a wrong CUDA library, another torch's torchvision
            yield f"{name}: {type(error).__name__}: {' '.join(str(error).split())}", fix


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


def environment() -> str:
    """What a report of a fault should contain: PyTorch's own account of system, devices and packages."""
    command = [sys.executable, "-m", "torch.utils.collect_env"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout or done.stderr).strip()
