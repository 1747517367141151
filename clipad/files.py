"""Writing results so that a stop at any moment leaves either the old file or the new one."""

from __future__ import annotations

import hashlib
import os
import tempfile
from functools import cache
from pathlib import Path


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write beside the target, flush to disk, then rename: a killed run or a full disk never leaves half a file.

    Raises OSError (no space, not writable) and leaves no partial file behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def require_writable(folder: Path) -> None:
    """Make the folder and see that it takes files: before the work whose results shall go there.

    Raises OSError that names the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        message = (
            f"the output folder {folder} cannot be written ({error.strerror}): choose another output_dir"
        )
        raise OSError(error.errno, message) from error


# What decides numbers; figures, notebooks and the command line do not.
_COMPUTES = (
    "prompts published datasets metrics backbone dual_path text surgery fine_tuning detectors winclip bootstrap "
    "evaluation benchmark phenomena distribution ablation transfer"
)


@cache
def code_version() -> str:
    """Twelve hex digits over the modules that decide numbers: results of other code are never taken for this one's."""
    digest = hashlib.sha256()
    for name in _COMPUTES.split():
        path = Path(__file__).with_name(f"{name}.py")
        digest.update(name.encode() + (path.read_bytes() if path.is_file() else b""))
    return digest.hexdigest()[:12]
