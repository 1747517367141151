"""Which files below a folder are photographs to judge, which are flawless, what their labels are, how one is read."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from clipad.datasets import normal_name
from clipad.io.files import PHOTOGRAPH, content_hash, nfc, printable, scan, skipped_lines
from clipad.io.images import decode, eight_bit

ORIENTATION = 0x0112  # EXIF tag


def read_photograph(path: Path) -> tuple[Image.Image, str]:
    """As :func:`clipad.read_image`, but turned as the EXIF orientation says, as viewers do: there are no masks. Also
    remarks on what a reader has to know, with "; " between. ValueError for a mask or an empty image."""
    image, remarks = decode(path), []
    if image.format != "TIFF" and image.getexif().get(ORIENTATION, 1) != 1:
        remarks.append("were turned as their EXIF orientation says")
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") and 255 < np.asarray(image).max() < 4096:
        remarks.append("are 16-bit files with 12-bit values, nearly black as read: multiply by 16")
    image = eight_bit(image)
    if image.getcolors(2):  # None if there are more
        raise ValueError("at most two grey levels, so a mask or empty")
    return image, "; ".join(remarks)


@dataclass(frozen=True)
class Images:
    """What `detect` is given."""

    root: Path  # from which names count
    labels: dict[Path, int]  # photograph -> 1, 0 (flawless), or -1 if not known
    flawless: list[Path]  # photographs that set scale and threshold
    notes: list[str]  # lines on what was left out


def collect(path, normal=None, normal_folder: str = "") -> Images:
    """The photographs below a folder (or the one image) and the flawless ones of ``normal``. Nothing is decoded.

    ``normal_folder``: sub-folders of this name hold flawless images, in ``path`` (for labels, which are never guessed)
    and in ``normal``. Results of clipad are no photographs.

    Raises FileNotFoundError or ValueError for a folder without photographs, for images that are in both, and where it
    is not clear which are flawless.
    """
    root, photographs, notes = _photographs(path)
    flawless, more = _flawless(normal, normal_folder) if normal else ([], [])
    labels = dict.fromkeys(photographs, -1)
    if normal_folder not in ("", "."):
        named = {path: int(not _below(path, normal_folder, root)) for path in labels}
        if 0 in named.values():
            labels = named
        elif not any(_below(path, normal_folder) for path in flawless):
            raise ValueError(f"no folder is called {normal_folder!r}; found {_folders(labels)}")
    known = set(map(content_hash, flawless))
    shared = [path for path in labels if content_hash(path) in known]
    if shared:
        raise ValueError(
            f"{len(shared)} images are among the flawless ones as well ({printable(shared[0].name)}, ...): their "
            "scores would look better than those of new images. Take them out of one of the two folders"
        )
    return Images(root, labels, flawless, notes + more)


def _photographs(path) -> tuple[Path, list[Path], list[str]]:
    """The folder from which names count, the photographs in it (or the one image), and lines on the rest."""
    path = Path(path).expanduser()
    path = path.resolve() if ".." in path.parts else path.absolute()  # links keep their names
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: expected an image or a folder of images")
    if path.is_file():
        return path.parent, [path], []
    found = scan(path)
    notes = [f"left out of {printable(path.name)}: {line}" for line in skipped_lines(found, path)]
    if not found[PHOTOGRAPH]:
        raise ValueError(f"{path} holds no images; {'; '.join(notes) or 'it is empty'}")
    return path, found[PHOTOGRAPH], notes


def _flawless(folder, normal_folder: str) -> tuple[list[Path], list[str]]:
    """The flawless images of a folder, each content once, and notes on what was left out.

    Images directly in the folder all count. With sub-folders those do that :func:`clipad.datasets.normal_name` names;
    "." for all.
    """
    root, photographs, notes = _photographs(folder)
    chosen, name = photographs, "any folder"
    folders = {part for path in photographs for part in path.relative_to(root).parts[:-1]}
    if folders and normal_folder != ".":
        name = normal_name(folders, normal_folder)
        chosen = [path for path in photographs if name and _below(path, name, root)]
    if not chosen:
        raise ValueError(
            f"{root} has images in the sub-folders {_folders(photographs)}: which of them are flawless? "
            "Give the folder that holds only these, or its name (--normal-folder NAME; . for all)"
        )
    once = list({content_hash(path): path for path in chosen}.values())
    if len(once) < len(photographs):
        notes.append(
            f"flawless: {len(once)} of {len(photographs)} images: those in {name}, each content once"
        )
    return once, notes


def _below(path: Path, name: str, root: Path = Path("/")) -> bool:
    """Whether a folder of this name lies between a root and a file."""
    return nfc(name).lower() in nfc(str(path.relative_to(root).parent)).lower().split("/")


def _folders(paths) -> str:
    return ", ".join(sorted({printable(path.parent.name) for path in paths})[:20])
