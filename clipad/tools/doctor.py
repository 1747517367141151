"""What ``clipad doctor`` says beside ``torch.utils.collect_env``: the faults that people meet here, each with its
fix. Nothing heavy is imported before it is asked for, so that it answers where torch is broken.
"""

import importlib
import re
import subprocess
import sys
from collections.abc import Iterator

from clipad.tools.notebooks import REPOSITORY, notebook_paths

PIP = f"{sys.executable} -m pip"
RESTORE = f"git -C {REPOSITORY} restore"


def diagnose() -> Iterator[tuple[str, str]]:
    """Faults that keep the notebooks from running, as (fault, fix); nothing where there are none."""
    checks = (
        (_packages, f"make install, or {PIP} install -c constraints.txt -e '{REPOSITORY}[dev]'"),
        (_torch, f"{PIP} install --upgrade torch torchvision open_clip_torch"),
        (_demo_model, f"{RESTORE} data/demo/model"),
        (_demo_images, f"{RESTORE} data/demo/collections"),
        (notebook_paths, f"{RESTORE} notebooks"),
        (_kernel, f"{sys.executable} -m ipykernel install --sys-prefix"),
    )
    for check, fix in checks:
        try:
            check()
        except Exception as error:  # also a wrong CUDA library, another torch's torchvision
            name = check.__name__.replace("_", " ").strip()
            yield f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}", fix


def _packages() -> None:
    pip = [sys.executable, "-m", "pip", "check"]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(done.stdout or done.stderr)


def _torch() -> None:
    for name in ("torch", "torchvision", "open_clip"):
        importlib.import_module(name)


def _demo_model() -> None:
    from clipad.backbone import load_backbone

    load_backbone("demo", device="cpu")


def _demo_images() -> None:
    from clipad.tools.check_data import check_dataset

    for name in ("demo", "demo_aux"):
        if problems := check_dataset(name).problems:
            raise ValueError(f"{name}: {problems[0]}")


def _kernel() -> None:
    """JupyterLab's kernel may be another Python (`clipad run` starts its own)."""
    from jupyter_client.kernelspec import KernelSpecManager

    found = KernelSpecManager().get_kernel_spec("python3").argv[0]
    # jupyter_client replaces a bare "python3" by the running interpreter
    if found != sys.executable and not re.fullmatch(r"python[\d.]*", found):
        raise ValueError(f"the kernel `python3` runs {found}, not {sys.executable}")


def environment() -> str:
    """What a report of a fault should contain: PyTorch's own account of system, devices and packages."""
    command = [sys.executable, "-m", "torch.utils.collect_env"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout or done.stderr).strip()
