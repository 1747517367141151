"""What ``clipad doctor`` says beside ``torch.utils.collect_env``: faults of an installation, each with its fix."""

import subprocess
import sys
from collections.abc import Iterator

PIP = [sys.executable, "-m", "pip"]


def diagnose() -> Iterator[tuple[str, str]]:
    """Faults that keep the notebooks from running, as (fault, fix); nothing where there are none."""
    install = f"{' '.join(PIP)} install"
    checked = subprocess.run([*PIP, "check"], capture_output=True, text=True, check=False)
    if checked.returncode:
        yield checked.stdout or checked.stderr, f"make install, or {install} -e '.[dev]'"
    fix = f"{install} --upgrade torch torchvision open_clip_torch"
    try:
        import torchvision  # noqa: F401  (one for another torch cannot be imported)

        from clipad import load_backbone, load_dataset

        fix = "git restore data/demo, in a clone that is installed with `pip install -e .`"
        load_backbone("demo", device="cpu")
        load_dataset("demo")
    except Exception as error:  # of a wrong CUDA library, of another torch's torchvision, ...
        yield f"{type(error).__name__}: {' '.join(str(error).split())}", fix
