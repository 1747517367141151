"""Results on disk: a stop at any moment leaves the old file or the new one, and what is there is not computed again."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import io
import json
import os
import tempfile
import unicodedata
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
REPOSITORY = Path(__file__).resolve().parents[1]
"""the clone, if the package is installed from one with ``pip install -e``"""


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
    if path is None:
        return compute()
    tolerated = () if required else (OSError,)
    damaged = (ValueError, EOFError, KeyError, NotImplementedError, zipfile.BadZipFile)
    with (
        contextlib.suppress(FileNotFoundError, *damaged, *tolerated),
        np.load(path, allow_pickle=False) as stored,
    ):
        return dict(stored)
    arrays = compute()
    with contextlib.suppress(*tolerated):
        write_arrays(path, arrays)
    return arrays


def write_arrays(path: Path, arrays: Arrays) -> None:
    """Write arrays as one .npz file, by :func:`write_atomically`."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_atomically(path, buffer.getvalue())


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


def claim(folder: Path, settings: dict, results: Iterable[str], option: str = "output_dir") -> None:
    """Make a folder for results of these settings, or see that it holds such: its ``settings.json`` says so.

    ``results``: patterns of their names. Raises ValueError that names the settings which are others, or for results
    whose settings are not known; OSError where the folder cannot be written.
    """
    require_writable(folder)
    path = folder / "settings.json"
    text = json.dumps(settings, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    if not path.is_file() and not any(list(folder.glob(pattern)) for pattern in results):
        write_atomically(path, text)
        return
    try:
        found, wanted = dict(json.loads(path.read_text(encoding="utf-8"))), json.loads(text)
    except (FileNotFoundError, ValueError, TypeError):
        raise ValueError(
            f"{path}, which says how the results beside it were made, is missing or damaged: choose another {option} "
            f"or remove {folder}"
        ) from None
    different = sorted(k for k in found.keys() | wanted.keys() if found.get(k) != wanted.get(k))
    if different:
        raise ValueError(
            f"{folder} holds results of other settings (different: {', '.join(different)}): "
            f"choose another {option} or remove this one"
        )


@cache
def code_version() -> str:
    """Twelve hex digits over every module of the package: results of other code are never taken for this one's.

    All of them, because a list of those that decide numbers would go out of date without a word when a file moves.
    """
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def content_hash(path: Path) -> str:
    """SHA-256 of a file's bytes; read again only when its size or time of change is another."""
    status = path.stat()
    return _content_hash(path, status.st_size, status.st_mtime_ns, status.st_ino)


@lru_cache(maxsize=100_000)
def _content_hash(path: Path, *status: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_name(name: str) -> str:
    """Any name, such as a category's or a path's, as one file name: unique, short, of printable characters.

    A name that is no such file name already gets six digits of its hash.

    >>> file_name("a_b c.png"), file_name("a/b c.png")
    ('a_b c.png', 'a_b c.png-65036e')
    """
    raw = os.fsencode(name)
    shown = raw.decode("utf-8", "replace")
    safe = "".join(c if c.isprintable() and c not in '/\\:*?"<>|%#[]' else "_" for c in shown)
    short = safe.encode()[:140].decode("utf-8", "ignore")
    if short == name and not name.startswith("."):
        return name
    return f"{short}-{hashlib.sha256(raw).hexdigest()[:6]}"


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".png")
"""the first ones are more surely photographs: see `_masks_beside`"""
MASK_FOLDERS = ("mask", "masks", "gt", "groundtruth", "label", "labels")
MASK_FOLDERS += ("annotation", "annotations", "segmentation", "segmentations")
MASK_ENDINGS = ("_mask", "_masks", "_label", "_gt", "_seg", "_segmentation", "_annotation")
SYSTEM_FILES = ("thumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin", "lost+found")
BROKEN_LINK = "broken link"
BESIDE = "beside a photograph of the same name, so a mask or copy"
RESULT_MARK = "clipad-results"
"""an empty file that `clipad` leaves in a folder of its own pictures: they are not scored again"""


@dataclass(frozen=True)
class Scan:
    """What lies below a folder: photographs, sorted, and every other file under the reason why it is none."""

    photographs: tuple[Path, ...]
    skipped: dict[str, list[Path]]

    def skipped_lines(self, root: Path) -> list[str]:
        """A line per reason: how many, and the first three of them."""
        lines = []
        for reason, paths in sorted(self.skipped.items()):
            names = ", ".join(printable(os.path.relpath(path, root)) for path in paths[:3])
            lines.append(f"{len(paths)} {reason} ({names}{', ...' if len(paths) > 3 else ''})")
        return lines


def scan(root: Path, used: Iterable[Path | None] = (), without: Path | None = None) -> Scan:
    """Every file below a folder, at any depth; nothing is decoded, no file is opened.

    Photographs are files with an image's suffix. None are: masks (in a folder called masks, gt, labels, ..., or
    beside their photograph as ``x_mask.png`` or as ``x.png`` of ``x.jpg``), results of clipad (folders with its mark,
    and ``without``), pipes and devices, broken links, other formats, and hidden files and folders, which are not
    looked into. Files in ``used`` are neither.
    """
    reasons: dict[Path, str] = {}

    def visit(folder: Path, reason: str, above: frozenset) -> None:
        """Why each file is no photograph, empty for one; ``reason``: that of the whole folder."""
        here = folder.resolve()
        if here in above:
            return  # a link that leads back
        paths = sorted(folder.iterdir())
        if folder == without or folder / RESULT_MARK in paths:
            reason = reason or "results of clipad"
        found = {path: reason or _no_image(path) for path in paths}
        images = [path for path, why in found.items() if why in ("", BROKEN_LINK)]
        found |= dict.fromkeys(_masks_beside(images), BESIDE)
        for path in paths:
            if path.is_dir() and found[path] != "hidden":
                plain = "".join(c for c in path.name.lower() if c.isalnum())
                masks = plain in MASK_FOLDERS and not (path / "test").is_dir()  # that is a product
                visit(path, reason or ("in a folder of masks" if masks else ""), above | {here})
            else:
                reasons[path] = found[path]

    visit(root, "", frozenset())
    used, skipped = set(used), defaultdict(list)
    for path, why in sorted(reasons.items()):
        if path not in used:
            skipped[why].append(path)
    return Scan(tuple(skipped.pop("", ())), dict(skipped))


def _masks_beside(images: Iterable[Path]) -> set[Path]:
    """Of the images of one folder those that belong to another: ``x_mask.png`` to ``x.*``, ``x.png`` to ``x.jpg``.

    Of equal stems the first suffix of `IMAGE_SUFFIXES` is the photograph.
    """
    of_stem: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(images, key=lambda path: IMAGE_SUFFIXES.index(path.suffix.lower())):
        of_stem[path.stem].append(path)
    found = set()
    for stem, paths in of_stem.items():
        owner = next((stem.removesuffix(e) for e in MASK_ENDINGS if stem.lower().endswith(e)), stem)
        found.update(paths if owner != stem and owner in of_stem else paths[1:])
    return found


def printable(name: str) -> str:
    """A file name for people: bytes that are not UTF-8 become question marks."""
    return os.fsencode(name).decode("utf-8", "replace")


def _no_image(path: Path) -> str:
    """Why this file is no photograph, from its name and kind; empty if it may be one."""
    if path.name.startswith(".") or path.name.lower() in SYSTEM_FILES:
        return "hidden"
    suffix = path.suffix.lower() or "no suffix"
    if suffix not in IMAGE_SUFFIXES:
        return f"in a format that is not read ({suffix})"
    if not path.exists():
        return BROKEN_LINK
    return "" if path.is_file() else "no file but a pipe or device"


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
