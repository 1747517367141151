"""What ``clipad doctor`` says beside ``torch.utils.collect_env``: the faults that people meet here, each with its
fix. Nothing heavy is imported before it is asked for, so that it answers where torch is broken.
"""

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator

from clipad.tools.runner import REPOSITORY, notebook_paths, require_own_kernel


def diagnose() -> Iterator[tuple[str, str]]:
    """Faults that keep the notebooks from running, as (fault, fix); nothing where there are none."""
    pip = [sys.executable, "-m", "pip"]
    checked = subprocess.run([*pip, "check"], capture_output=True, text=True, check=False)
    if checked.returncode:
        fix = f"make install, or {' '.join(pip)} install -c constraints.txt -e '{REPOSITORY}[dev]'"
        yield checked.stdout.strip() or checked.stderr.strip(), fix
    for name in ("torch", "torchvision", "open_clip"):
        try:
            importlib.import_module(name)
        except Exception as error:  # a wrong CUDA library, another torch's torchvision
            fix = f"{' '.join(pip)} install --upgrade torch torchvision open_clip_torch"
            yield f"{name}: {_line(error)}", fix
            return  # what follows needs it
    yield from _files()
    try:
        require_own_kernel()
    except ValueError as error:
        fault, _, fix = str(error).partition("; fix: ")
        yield fault, fix


def _files() -> Iterator[tuple[str, str]]:
    from clipad.backbone import load_backbone
    from clipad.tools.check_data import check_dataset

    restore = f"git -C {REPOSITORY} restore"
    try:
        load_backbone("demo", device="cpu")
    except Exception as error:
        yield f"demo model: {_line(error)}", f"{restore} data/demo/model"
    for name in ("demo", "demo_aux"):
        try:
            problems = check_dataset(name).problems
        except Exception as error:
            problems = [_line(error)]
        if problems:
            yield f"{name}: {problems[0]}", f"{restore} data/demo/collections"
    try:
        if not notebook_paths():
            raise ValueError("the folder notebooks/ is empty")
    except ValueError as error:
        yield str(error), f"{restore} notebooks"


def environment() -> str:
    """What a report of a fault should contain: PyTorch's own account of system, devices and packages."""
    command = [sys.executable, "-m", "torch.utils.collect_env"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    shown = os.environ.get("MPLBACKEND")
    hidden = f"\nMPLBACKEND={shown}: JupyterLab shows no figures; unset it" if shown else ""
    return (done.stdout or done.stderr).strip() + hidden


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
