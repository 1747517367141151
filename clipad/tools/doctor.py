"""What this machine has, what the notebooks need, and the exact fix for each difference."""

import importlib.metadata
import os
import platform
import shutil
import sys
from dataclasses import dataclass

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from clipad.tools.runner import REPOSITORY, notebook_paths, require_own_kernel

GIB = 2**30


@dataclass(frozen=True)
class Check:
    """``status``: "ok", "note" (works, but worth knowing) or "broken" (the notebooks cannot run)."""

    name: str
    status: str
    found: str
    fix: str = ""


def diagnose() -> list[Check]:
    """All checks, each independent of the others; takes some seconds, needs no network."""
    checks = [_python(), *_packages(), _torchvision(), _device(), _memory(), _disk()]
    return [*checks, _demo_model(), _demo_images(), _notebooks(), _kernel(), _matplotlib_backend()]


def _python() -> Check:
    wanted = importlib.metadata.metadata("clipad")["Requires-Python"]
    found = f"{platform.python_version()} in {sys.prefix}"
    if platform.python_version() in SpecifierSet(wanted, prereleases=True):
        return Check("python", "ok", found)
    return Check(
        "python", "broken", found, f"install Python {wanted} and clipad in an environment of it"
    )


def _packages() -> list[Check]:
    """Each dependency of the package metadata, extras left out."""
    checks = []
    for requirement in map(Requirement, importlib.metadata.requires("clipad") or []):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            found = "not installed"
        fits = found != "not installed" and requirement.specifier.contains(found, prereleases=True)
        said = found if fits else f"{found}, expected {requirement.specifier}"
        fix = "" if fits else f"{_pip()} install '{requirement.name}{requirement.specifier}'"
        checks.append(Check(requirement.name, "ok" if fits else "broken", said, fix))
    return checks


def _torchvision() -> Check:
    """torchvision is compiled against one torch; with another one its import fails or its operators are missing."""
    name = "torchvision fits torch"
    try:
        import torch
        import torchvision

        torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except (ImportError, RuntimeError, AttributeError) as error:
        return Check(name, "broken", _line(error), f"{_pip()} install --upgrade torch torchvision")
    return Check(name, "ok", f"torch {torch.__version__}, torchvision {torchvision.__version__}")


def _device() -> Check:
    try:
        import torch
    except ImportError as error:
        return Check("device", "broken", _line(error), f"{_pip()} install torch torchvision")
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        found = f"{torch.cuda.get_device_name()}, {free / GIB:.0f} of {total / GIB:.0f} GiB free"
        return Check("device", "ok", found)
    found = f"CPU, {torch.get_num_threads()} threads"
    if shutil.which("nvidia-smi"):
        return Check(
            "device",
            "note",
            f"{found}; there is an NVIDIA GPU that torch cannot use",
            _cuda_fix(torch),
        )
    return Check("device", "ok", f"{found} (enough for the demo; the paper's protocol wants a GPU)")


def _cuda_fix(torch) -> str:
    if torch.version.cuda is None:
        return "install a CUDA build of torch and torchvision (pytorch.org, Get Started)"
    return f"install an NVIDIA driver that supports CUDA {torch.version.cuda}, or a torch for an older CUDA"


def _memory() -> Check:
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    except (AttributeError, ValueError, OSError):  # no such call on Windows
        return Check("memory", "note", "cannot be read on this system")
    fix = (
        ""
        if total >= 4
        else "close other programs; set a smaller batch_size where a notebook has it"
    )
    return Check("memory", "note" if fix else "ok", f"{total:.1f} GiB", fix)


def _disk() -> Check:
    free = shutil.disk_usage(REPOSITORY).free / GIB
    fix = "" if free >= 2 else f"free at least 2 GiB where {REPOSITORY} lies"
    return Check("disk", "note" if fix else "ok", f"{free:.1f} GiB free", fix)


def _demo_model() -> Check:
    try:
        from clipad.backbone import load_backbone

        backbone = load_backbone("demo", device="cpu")
    except Exception as error:  # whatever is wrong with it, the other checks still matter
        return Check("demo model", "broken", _line(error), _restore("data/demo/model"))
    return Check(
        "demo model", "ok", f"weights {backbone.weights_hash}, {backbone.image_size} pixels"
    )


def _demo_images() -> Check:
    found = []
    for name in ("demo", "demo_aux"):
        try:
            from clipad.datasets import check_dataset

            report = check_dataset(name)
        except Exception as error:
            return Check("demo images", "broken", _line(error), _restore("data/demo/collections"))
        if not report.ok:
            said = f"{name}: {len(report.problems)} problems, first: {report.problems[0]}"
            return Check("demo images", "broken", said, _restore("data/demo/collections"))
        images = int(report.table[["normal", "anomalous"]].to_numpy().sum())
        found.append(f"{name} {images} images in {len(report.table)} categories")
    return Check("demo images", "ok", ", ".join(found))


def _notebooks() -> Check:
    try:
        found = [path.stem for path in notebook_paths()]
    except ValueError as error:
        return Check("notebooks", "broken", "not found", str(error))
    if not found:
        return Check("notebooks", "broken", "the folder notebooks/ is empty", _restore("notebooks"))
    return Check("notebooks", "ok", ", ".join(found))


def _kernel() -> Check:
    try:
        require_own_kernel()
    except ValueError as error:
        found, _, fix = str(error).partition("; fix: ")
        return Check("kernel python3", "broken", found, fix)
    return Check("kernel python3", "ok", "runs this Python")


def _matplotlib_backend() -> Check:
    found = os.environ.get("MPLBACKEND")
    if found and "inline" not in found:
        # `clipad run` takes it out of the kernel's environment, JupyterLab and plain papermill do not
        return Check(
            "MPLBACKEND", "note", f"{found}: JupyterLab will show no figures", "unset MPLBACKEND"
        )
    return Check("MPLBACKEND", "ok", found or "not set")


def _pip() -> str:
    return f"{sys.executable} -m pip"


def _restore(folder: str) -> str:
    return f"git -C {REPOSITORY} restore {folder}"


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
