"""Results on disk: a stop at any moment leaves the old file or the new one, and what is there is not computed again."""

import contextlib
import difflib
import hashlib
import io
import json
import os
import re
import tempfile
import unicodedata
import zipfile
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
REPOSITORY = Path(__file__).resolve().parents[2]
"""the clone, if the package is installed from one with ``pip install -e``"""


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write beside the target, flush to disk, then rename: a killed run or a full disk never leaves half a file.

    Raises OSError (no space, not writable) that names the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        message = f"{path} cannot be written ({error.strerror}): free space there, or choose another folder"
        raise OSError(error.errno, message) from error
    finally:
        part.unlink(missing_ok=True)


def cached(path: Path | None, compute: Callable[[], Arrays]) -> Arrays:
    """The arrays in the file ``path``; where there is none, those that ``compute`` gives, which are written there.

    The name has to say all that decides the arrays (:func:`address`). A damaged file, which its checksums tell, is
    computed again; one that may not be read or written raises OSError. Without a path nothing is kept.
    """
    if path and path.exists():
        damaged = (ValueError, EOFError, KeyError, NotImplementedError, zipfile.BadZipFile)
        with contextlib.suppress(*damaged), np.load(path, allow_pickle=False) as stored:
            return dict(stored)
    arrays = compute()
    if path:
        write_arrays(path, arrays)
    return arrays


def write_arrays(path: Path, arrays: Arrays) -> None:
    """Write one .npz file by :func:`write_atomically`."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_atomically(path, buffer.getvalue())


def address(key: Any) -> str:
    """Twenty hex digits that stand for a key of JSON's types: equal keys have equal ones."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]


def require_writable(folder: Path) -> None:
    """Make the folder and see that it takes files, before the work; OSError that names it if not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        message = f"the output folder {folder} cannot be written ({error.strerror}): choose another output_dir"
        raise OSError(error.errno, message) from error


def claim(folder: Path, settings: dict, results: Iterable[str], option: str = "output_dir") -> None:
    """Make a folder for results of these settings, or see by its ``settings.json`` that it holds such.

    ``results``: patterns of their names. Raises ValueError for results of other or unknown settings; OSError where the
    folder cannot be written.
    """
    require_writable(folder)
    path = folder / "settings.json"
    text = json.dumps(settings, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    if not path.is_file() and not any(list(folder.glob(pattern)) for pattern in results):
        write_atomically(path, text)
    found, wanted = {}, json.loads(text)
    with contextlib.suppress(FileNotFoundError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
    different = sorted(k for k in found.keys() | wanted.keys() if found.get(k) != wanted.get(k))
    if different:
        said = f"different: {', '.join(different)}" if found else f"{path} is missing or damaged"
        raise ValueError(
            f"{folder} holds results of other settings ({said}): choose another {option} or remove this one"
        )


@cache
def code_version() -> str:
    """Twelve hex digits over every module of the package: results of other code are never taken for this one's."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def content_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_name(name: str) -> str:
    """Any name as one file name: short, of printable characters, unique by six digits of the name's hash if need be.

    >>> file_name("a_b c.png"), file_name("a/b c.png")
    ('a_b c.png', 'a_b c.png-65036e')
    """
    short = re.sub(r"[^\w .,()+=@-]", "_", name)[:45]  # of four bytes each, at most
    if short == name and not name.startswith("."):
        return name
    return f"{short}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:6]}"


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".png")
"""of two images of one name that with the first of these is the photograph"""
SYSTEM_FILES = ("thumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin", "lost+found")
MASK_FOLDER = re.compile("masks?|gt|groundtruth|labels?|annotations?|segmentations?")
MASK_ENDING = re.compile("_(masks?|gt|label|seg|segmentation|annotation)$", re.IGNORECASE)
RESULT_MARK = "clipad-results"
"""an empty file that `clipad` leaves in a folder of its own pictures: they are not scored again"""
PHOTOGRAPH, HIDDEN, BROKEN_LINK = "", "hidden", "broken link"


def scan(root: Path) -> dict[str, list[Path]]:
    """Every file below a folder, at any depth, sorted, under `PHOTOGRAPH` or the reason why it is none.

    No photographs are masks (in a folder called masks, gt, labels, ..., or beside their photograph as ``x_mask.png`` or
    as ``x.png`` of ``x.jpg``) and results of clipad (folders with its mark). No file is opened.
    """
    found: dict[str, list[Path]] = {PHOTOGRAPH: []}

    def visit(folder: Path, reason: str) -> None:
        paths = sorted(folder.iterdir())
        if folder / RESULT_MARK in paths:
            reason = reason or "results of clipad"
        images = [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES]
        images.sort(key=lambda path: IMAGE_SUFFIXES.index(path.suffix.lower()), reverse=True)
        by_stem = {path.stem: path for path in images}
        for path in paths:
            why = reason or _no_photograph(path, by_stem)
            if why == HIDDEN or not path.is_dir():
                found.setdefault(why, []).append(path)
            elif not folder.resolve().is_relative_to(path.resolve()):  # no link that leads back
                visit(path, why)

    visit(root, PHOTOGRAPH)
    return {why: sorted(paths) for why, paths in sorted(found.items())}


def _no_photograph(path: Path, by_stem: dict[str, Path]) -> str:
    """Why this file, or what is below this folder, is no photograph; ``by_stem``: of its folder, masks or not."""
    if path.name.startswith(".") or path.name.lower() in SYSTEM_FILES:
        return HIDDEN
    if path.is_dir():
        plain = "".join(c for c in path.name.lower() if c.isalnum())
        product = (path / "test").is_dir()
        return "in a folder of masks" if MASK_FOLDER.fullmatch(plain) and not product else ""
    suffix = path.suffix.lower() or "no suffix"
    if suffix not in IMAGE_SUFFIXES:
        return f"in a format that is not read ({suffix})"
    if not path.is_file():
        return "no file but a pipe or device" if path.exists() else BROKEN_LINK
    owner = MASK_ENDING.sub("", path.stem)
    if by_stem[path.stem] != path or (owner != path.stem and owner in by_stem):
        return "beside a photograph of the same name, so a mask or copy"
    return PHOTOGRAPH


def skipped_lines(found: dict[str, list[Path]], root: Path) -> list[str]:
    """A line for each reason in what :func:`scan` found: how many files, and the first three of them."""
    lines = []
    for why, paths in found.items():
        if why and paths:
            names = [printable(os.path.relpath(path, root)) for path in paths[:3]]
            more = ", ..." if len(paths) > 3 else ""
            lines.append(f"{why}: {len(paths)} ({', '.join(names)}{more})")
    return lines


def printable(name: str) -> str:
    """A file name for people: bytes that are not UTF-8 become question marks."""
    return os.fsencode(name).decode("utf-8", "replace")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The nearest known name in brackets, or nothing.

    >>> did_you_mean("botle", ["bottle", "nut"]), did_you_mean("zzz", ["nut"])
    (" (did you mean 'bottle'?)", '')
    """
    lower = {other.lower(): other for other in known}
    near = difflib.get_close_matches(str(name).lower(), lower, n=1, cutoff=0.5)
    return f" (did you mean {lower[near[0]]!r}?)" if near else ""


def nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)  # archives made on macOS hold decomposed letters
