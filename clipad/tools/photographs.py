"""Which files below a folder are photographs to judge, which are flawless, and what their labels are."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path

from clipad.datasets import NORMAL_NAMES
from clipad.files import Scan, content_hash, printable, scan
from clipad.studies.inspection import images_needed, require_enough


def check_input(
    path, object_name, output_dir, normal=None, false_alarms=0.05, normal_folder="", **_
) -> None:
    """All of ``detect``'s refusals that need no model."""
    if not object_name.strip():
        raise ValueError("the object has no name: a prompt needs one, such as 'metal nut'")
    images_needed(false_alarms)
    root, found = find_photographs(path, output_dir)
    flawless, _ = find_flawless(normal, normal_folder, output_dir) if normal else ([], [])
    labels_of(found.photographs, root, normal_folder, flawless)
    if normal:
        refuse_shared(found.photographs, flawless)
        require_enough(len(flawless), false_alarms)


def find_photographs(path: str | Path, output_dir: str | Path | None = None) -> tuple[Path, Scan]:
    """The folder that names are relative to, and what lies in it (or the one image). Results of clipad are left out.

    Raises FileNotFoundError or ValueError if there is no photograph.
    """
    path = Path(path).expanduser()
    path = path.resolve() if ".." in path.parts else path.absolute()
    out = Path(output_dir).expanduser().resolve() if output_dir is not None else None
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


def find_flawless(
    folder: str | Path, normal_folder: str = "", output_dir: str | Path | None = None
) -> tuple[list[Path], list[str]]:
    """The flawless images of a folder, each content once, and notes on what was left out.

    Images directly in the folder all count. With sub-folders, those called ``normal_folder`` do ("." for all), or, if
    none is given, those called good, normal or ok, if only one of these names occurs. Anything else is a ValueError.
    """
    root, found = find_photographs(folder, output_dir)
    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is one image: flawless images are given as a folder")
    photographs = found.photographs
    names = sorted({_folded(p.parent.name) for p in photographs if p.parent != root})
    if normal_folder and normal_folder != ".":
        within = [p for p in photographs if _below(p, root, normal_folder)]
        photographs = within or ([] if names else photographs)
    elif names and not normal_folder:
        known = [name for name in names if name.lower() in NORMAL_NAMES]
        flat = any(p.parent == root for p in photographs)
        photographs = (
            [p for p in photographs if _folded(p.parent.name) == known[0]]
            if len(known) == 1 and not flat
            else []
        )
    if not photographs:
        raise ValueError(
            f"{root} has images in the sub-folders {', '.join(names)}: which of them are flawless? "
            "Give the folder that holds only these, or its name (--normal-folder NAME; . for all)"
        )
    once = list({content_hash(path): path for path in reversed(photographs)}.values())[::-1]
    notes = [f"beside the flawless images: {line}" for line in found.skipped_lines(root)]
    if len(photographs) < len(found.photographs):
        notes.append(
            f"flawless: the {len(photographs)} images in folders called {printable(photographs[0].parent.name)}; "
            f"{len(found.photographs) - len(photographs)} others not"
        )
    if len(once) < len(photographs):
        notes.append(
            f"flawless: {len(photographs) - len(once)} copies of another flawless image count once"
        )
    return once, notes


def labels_of(
    photographs: Sequence[Path], root: Path, normal_folder: str, flawless: Sequence[Path]
) -> dict[Path, int]:
    """0 and 1 by the sub-folder that the user named; -1 where none was."""
    if not normal_folder or normal_folder == ".":
        return dict.fromkeys(photographs, -1)
    labels = {path: int(not _below(path, root, normal_folder)) for path in photographs}
    if 0 in labels.values():
        return labels
    if not any(_folded(normal_folder) in map(_folded, path.parts) for path in flawless):
        names = sorted({printable(p.parent.name) for p in photographs})
        raise ValueError(f"no folder is called {normal_folder!r}; found {', '.join(names[:20])}")
    return dict.fromkeys(photographs, -1)


def _below(path: Path, root: Path, name: str) -> bool:
    return _folded(name) in map(_folded, path.relative_to(root).parts[:-1])


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", printable(name)).casefold()


def refuse_shared(photographs: Sequence[Path], flawless: Sequence[Path]) -> None:
    """ValueError if an image is in both, by content."""
    known = {content_hash(path): path for path in flawless}
    shared = [path for path in photographs if content_hash(path) in known]
    if shared:
        raise ValueError(
            f"{len(shared)} images are among the flawless ones as well ({printable(shared[0].name)}, ...): their "
            "scores would look better than those of new images. Take them out of one of the two folders"
        )
