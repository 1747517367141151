"""Which files below a folder are photographs to judge, which are flawless, and what their labels are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from clipad.datasets import NORMAL_NAMES
from clipad.files import Scan, content_hash, nfc, printable, scan


@dataclass(frozen=True)
class Images:
    """What `detect` is given. ``labels``: photograph -> 1, 0 (flawless), or -1 if not known; names count from
    ``root``. ``flawless``: photographs that set scale and threshold. ``skipped``: lines on files that are no
    photographs. ``notes``: lines on what was left out of the flawless ones."""

    root: Path
    labels: dict[Path, int]
    flawless: list[Path]
    skipped: list[str]
    notes: list[str]


def collect(path, output_dir, normal=None, normal_folder: str = "") -> Images:
    """The photographs below a folder (or the one image) and the flawless ones of ``normal``. Nothing is decoded.

    ``normal_folder``: sub-folders of this name hold flawless images, in ``path`` (for labels, which are never guessed)
    and in ``normal``. Results of clipad are no photographs.

    Raises FileNotFoundError or ValueError for a folder without photographs, for images that are in both, and where it
    is not clear which are flawless.
    """
    root, found = _photographs(path, output_dir)
    flawless, notes = _flawless(normal, output_dir, normal_folder) if normal else ([], [])
    labels = dict.fromkeys(found.photographs, -1)
    if normal_folder not in ("", "."):
        named = {p: int(not _below(p, root, normal_folder)) for p in found.photographs}
        if 0 in named.values():
            labels = named
        elif not any(_below(p, Path(p.anchor), normal_folder) for p in flawless):
            raise ValueError(f"no folder is called {normal_folder!r}; found {_folders(labels)}")
    known = set(map(content_hash, flawless))
    shared = [path for path in labels if content_hash(path) in known]
    if shared:
        raise ValueError(
            f"{len(shared)} images are among the flawless ones as well ({printable(shared[0].name)}, ...): their "
            "scores would look better than those of new images. Take them out of one of the two folders"
        )
    return Images(root, labels, flawless, found.skipped_lines(root), notes)


def _photographs(path, output_dir) -> tuple[Path, Scan]:
    """The folder that names are relative to, and what lies in it (or the one image)."""
    path = Path(path).expanduser()
    path = path.resolve() if ".." in path.parts else path.absolute()
    out = Path(output_dir).expanduser().resolve()
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: expected an image or a folder of images")
    if path.is_file():
        return path.parent, Scan((path,), {})
    if out == path.resolve():
        raise ValueError(f"--out {out} is the folder of the images itself: choose another one")
    found = scan(path, without=out)
    if not found.photographs:
        skipped = "; ".join(found.skipped_lines(path))
        raise ValueError(f"{path} holds no images" + (f". It holds {skipped}" if skipped else ""))
    return path, found


def _flawless(folder, output_dir, normal_folder: str) -> tuple[list[Path], list[str]]:
    """The flawless images of a folder, each content once, and notes on what was left out.

    Images directly in the folder all count. With sub-folders, those called ``normal_folder`` do ("." for all), or, if
    none is given, those called good, normal or ok, if only one of these names occurs. Anything else is a ValueError.
    """
    root, found = _photographs(folder, output_dir)
    chosen = found.photographs
    deep = [path for path in chosen if path.parent != root]
    if deep and normal_folder != ".":
        usual = {path.parent.name for path in deep if path.parent.name.lower() in NORMAL_NAMES}
        if not normal_folder and len(usual) == 1 and len(deep) == len(chosen):
            normal_folder = usual.pop()
        chosen = [path for path in deep if normal_folder and _below(path, root, normal_folder)]
    if not chosen:
        raise ValueError(
            f"{root} has images in the sub-folders {_folders(deep)}: which of them are flawless? "
            "Give the folder that holds only these, or its name (--normal-folder NAME; . for all)"
        )
    once = list({content_hash(path): path for path in reversed(chosen)}.values())[::-1]
    notes = [f"beside the flawless images: {line}" for line in found.skipped_lines(root)]
    others = len(found.photographs) - len(chosen)
    if others:
        notes.append(f"flawless: the {len(chosen)} images in {normal_folder}; {others} others not")
    if len(once) < len(chosen):
        copies = len(chosen) - len(once)
        notes.append(f"flawless: {copies} copies of another flawless image count once")
    return once, notes


def _below(path: Path, root: Path, name: str) -> bool:
    return _folded(name) in map(_folded, path.relative_to(root).parts[:-1])


def _folded(name: str) -> str:
    return nfc(printable(name)).casefold()


def _folders(paths) -> str:
    return ", ".join(sorted({printable(path.parent.name) for path in paths})[:20])
