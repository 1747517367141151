"""Results on disk: a stop at any moment leaves the old file or the new one, and what is there is not computed again."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write beside the target, flush to disk, then rename: a killed run or a full disk never leaves half a file.

    Raises OSError (no space, not writable) that names the file, and leaves no partial file behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            message = f"{path} cannot be written ({error.strerror}): free space there, or choose another folder"
            raise OSError(error.errno, message) from error
        raise


def cached(path: Path | None, compute: Callable[[], Arrays], required: bool = True) -> Arrays:
    """The arrays in the file ``path``; where there is none, those that ``compute`` gives, which are written there.

    The name has to say all that decides the arrays (:func:`address`). A damaged file, which its checksums tell, is
    computed again; one that may not be read or written raises OSError, unless it is not ``required``: then it costs
    time only. Without a path nothing is kept.
    """
    try:
        if path is not None:
            with np.load(path, allow_pickle=False) as stored:
                return dict(stored)
    except FileNotFoundError:
        pass
    except OSError:
        if required:
            raise
    except (ValueError, EOFError, KeyError, NotImplementedError, zipfile.BadZipFile):
        pass  # damaged
    arrays = compute()
    if path is not None:
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        try:
            write_atomically(path, buffer.getvalue())
        except OSError:
            if required:
                raise
    return arrays


def address(key: Any) -> str:
    """Twenty hex digits that stand for a key of JSON's types: equal keys have equal ones."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]


def require_writable(folder: Path) -> None:
    """Make the folder and see that it takes files: before the work whose results shall go there.

    Raises OSError that names the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        message = f"the output folder {folder} cannot be written ({error.strerror}): choose another output_dir"
        raise OSError(error.errno, message) from error


@cache
def code_version() -> str:
    """Twelve hex digits over every module of the package: results of other code are never taken for this one's.

    All of them, because a list of those that decide numbers would go out of date without a word when a file moves.
    """
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(
            path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0"
        )
    return digest.hexdigest()[:12]


def content_hash(path: Path) -> str:
    """SHA-256 of a file's bytes; read again only when its size or time of change is another."""
    status = path.stat()
    return _content_hash(path, status.st_size, status.st_mtime_ns, status.st_ino)


@lru_cache(maxsize=100_000)
def _content_hash(path: Path, *status: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_name(name: str, taken: Iterable[str] = ()) -> str:
    """Any name, such as a category's or a path's, as one file name: unique, short, of printable characters.

    A name that is no such file name already, or is ``taken`` by something else, gets six digits of its hash.

    >>> file_name("a_b c.png"), file_name("a/b c.png"), file_name("table", taken=["table"])
    ('a_b c.png', 'a_b c.png-65036e', 'table-0d4fc4')
    """
    raw = os.fsencode(name)
    shown = raw.decode("utf-8", "replace")
    safe = "".join(c if c.isprintable() and c not in '/\\:*?"<>|%#[]' else "_" for c in shown)
    short = safe.encode()[:140].decode("utf-8", "ignore")
    if short == name and name not in taken and not name.startswith("."):
        return name
    return f"{short}-{hashlib.sha256(raw).hexdigest()[:6]}"
