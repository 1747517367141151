"""Data sets: which image belongs to which category, label and mask, and how image and mask are read.

METHOD.md section 1 gives the rules for pixels, data/README.md the layouts.
Only test images are listed: the method is zero-shot. The rules that the layouts leave open:

* Listings are sorted by name; hidden files, ``__MACOSX`` and files without an image suffix are ignored.
* A file is decoded by its content, whatever its suffix says. Of several frames the first counts.
* Pixels are taken as stored: EXIF orientation is ignored, for image and mask alike, as in the released program.
  (A TIFF's own orientation field says how its rows are stored; the decoder applies it.)
* Every file must lie inside the root once links are followed. The root itself may be a link.
* Byte-identical images are kept; `check_dataset` reports them.
"""

import csv
import difflib
import hashlib
import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from clipad.published import data_dir

ORIENTATION = 0x0112  # EXIF tag
PIXEL_LIMIT = 64_000_000  # of one image: 8000 x 8000
SUFFIXES_OF = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "MPO": (".jpg", ".jpeg"),  # Pillow's name of a JPEG with further frames, as phones write them
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
IMAGE_SUFFIXES = tuple(suffix for suffixes in SUFFIXES_OF.values() for suffix in suffixes)
IMAGE_FORMATS = (
    "PNG",
    "JPEG",
    "BMP",
    "TIFF",
    "WEBP",
)  # all others (EPS runs a program) stay closed
NORMAL_NAMES = (
    "good",
    "normal",
    "no",
    "ok",
)  # sub-folders of dataset "folder" that hold normal images

# Test images per category, (normal, anomalous), of the published data sets (data/README.md says where each is from).
EXPECTED = {
    "mvtec": {
        "bottle": (20, 63),
        "cable": (58, 92),
        "capsule": (23, 109),
        "carpet": (28, 89),
        "grid": (21, 57),
        "hazelnut": (40, 70),
        "leather": (32, 92),
        "metal_nut": (22, 93),
        "pill": (26, 141),
        "screw": (41, 119),
        "tile": (33, 84),
        "toothbrush": (12, 30),
        "transistor": (60, 40),
        "wood": (19, 60),
        "zipper": (32, 119),
    },
    "visa": {
        "candle": (100, 100),
        "capsules": (60, 100),
        "cashew": (50, 100),
        "chewinggum": (50, 100),
        "fryum": (50, 100),
        "macaroni1": (100, 100),
        "macaroni2": (100, 100),
        "pcb1": (100, 100),
        "pcb2": (100, 100),
        "pcb3": (101, 100),
        "pcb4": (101, 100),
        "pipe_fryum": (50, 100),
    },
    # The medical sets have one category; its name is the object's name in the prompts (METHOD.md section 2).
    "isic": {"skin": (0, 379)},
    "clinicdb": {"colon": (0, 612)},
    "headct": {"head ct": (100, 100)},
    "brainmri": {"brain ct": (98, 155)},
}


class LayoutError(ValueError):
    """The root does not have the layout of the data set that was asked for."""


class OutsideRootError(ValueError):
    """A path or link of the data set leads outside its root."""


class UnreadableImageError(OSError):
    """The file is no image that can be decoded: another format, truncated, or of an unsupported pixel type."""


class ImageTooLargeError(UnreadableImageError):
    """The image has more than `PIXEL_LIMIT` pixels and was not decoded."""


class MaskSizeError(ValueError):
    """A mask has another size than its image."""


# ---------------------------------------------------------------------------------------------- pixels


def read_image(path: str | Path) -> Image.Image:
    """Decode an image into mode L or RGB, 8 bits a channel, at its stored size and orientation.

    L and RGB stay as they are. Palette, 1-bit, LA, RGBA and CMYK images become RGB here, before any resize
    (METHOD.md section 1); an alpha channel is dropped, not blended. 16-bit grey is scaled by 255/65535 and
    rounded, without stretching its contrast; 16-bit RGB PNGs are cut to their upper 8 bits by Pillow.

    Raises `UnreadableImageError` (naming the file) for anything that is not a complete PNG, JPEG, BMP, TIFF or
    WebP image, or has floating-point or 32-bit pixels; `ImageTooLargeError` above `PIXEL_LIMIT` pixels.
    """
    return _readable(path, _decode(path))


def read_photograph(path: str | Path) -> tuple[Image.Image, bool]:
    """As `read_image`, but turned as the EXIF orientation says, as viewers do; and whether it was.

    Not for data sets: there masks lie on the pixels as stored.
    """
    image = _decode(path)
    turned = image.format != "TIFF" and image.getexif().get(ORIENTATION, 1) != 1
    return _readable(path, ImageOps.exif_transpose(image) if turned else image), turned


def _readable(path, image: Image.Image) -> Image.Image:
    try:
        return _eight_bit(image)
    except ValueError as error:
        raise UnreadableImageError(f"cannot read image {path}: {error}") from error


def read_mask(
    path: str | Path, image_size: int, expected_size: tuple[int, int] | None = None
) -> np.ndarray:
    """Read a ground-truth mask as an S x S bool array, S = `image_size` (METHOD.md section 1).

    A pixel is anomalous where any colour channel is > 0 (alpha is ignored), decided at native size; then bilinear
    resize to S x S and threshold at 0.5. On the 8-bit result 127 is out and 128 is in, so no value ties.

    `expected_size` is the image's (width, height), see `native_size`; another size raises `MaskSizeError`.
    Other errors as `read_image`.
    """
    return resize_mask(_native_mask(path, expected_size), image_size)


def native_size(path: str | Path) -> tuple[int, int]:
    """(width, height) of an image as `read_image` would return it, from its header. Errors as `read_image`."""
    return _decode(path, header_only=True).size


def resize_mask(mask: np.ndarray, image_size: int) -> np.ndarray:
    """Resize an H x W bool mask to S x S bilinearly (antialiased) and threshold it at 0.5.

    Thin regions can vanish:

    >>> mask = np.zeros((96, 96), bool); mask[:, 10] = True
    >>> int(resize_mask(mask, 96).sum()), int(resize_mask(mask, 24).sum())
    (96, 0)
    """
    resized = Image.fromarray(mask.astype(np.uint8) * 255).resize(
        (image_size, image_size), Image.Resampling.BILINEAR
    )
    return np.asarray(resized) >= 128


def image_tensor(image: Image.Image, image_size: int, mean: Iterable[float], std: Iterable[float]):
    """Pre-process a PIL image for a CLIP model: 3 x S x S float32 tensor, S = `image_size`.

    Both sides are squashed to S with bicubic interpolation (no crop), then RGB, [0, 1], (x - mean) / std
    (METHOD.md section 1). Modes other than L and RGB are converted first, as in `read_image`.

    >>> image_tensor(Image.new("L", (40, 30), 255), 24, mean=[0.5] * 3, std=[0.25] * 3)[:, 0, 0].tolist()
    [2.0, 2.0, 2.0]
    """
    import torch  # on first use: listing and checking data sets does not need it

    image = (
        _eight_bit(image).resize((image_size, image_size), Image.Resampling.BICUBIC).convert("RGB")
    )
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def _decode(path: str | Path, header_only: bool = False) -> Image.Image:
    if not Path(path).is_file() and Path(path).exists() and not Path(path).is_dir():
        raise UnreadableImageError(
            f"{path} is a pipe or device, no image file"
        )  # opening it would wait for ever
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if (
                image.width * image.height > PIXEL_LIMIT
            ):  # known from the header, before any pixel is decoded
                raise ImageTooLargeError(
                    f"{path} has {image.width} x {image.height} pixels; the limit is {PIXEL_LIMIT:,} "
                    "(clipad.datasets.PIXEL_LIMIT). Scale the image down, or raise the limit if you trust the file"
                )
            if not header_only:
                image.load()
            return image
    except (FileNotFoundError, PermissionError, IsADirectoryError, ImageTooLargeError):
        raise
    except MemoryError as error:
        raise ImageTooLargeError(
            f"there is not enough memory to decode {path}: close other programs, or scale the image down"
        ) from error
    except Image.DecompressionBombError as error:
        raise ImageTooLargeError(f"{path}: {error}; the limit is {PIXEL_LIMIT:,} pixels") from error
    except Exception as error:  # a decoder meets broken data with whatever it happens to raise
        raise UnreadableImageError(
            f"cannot read image {path}: {error}. Expected a complete {', '.join(IMAGE_FORMATS)} file; "
            "fetch it again or remove it"
        ) from error


def _eight_bit(image: Image.Image) -> Image.Image:
    if image.mode in ("L", "RGB"):
        return image
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.size and (values.min() < 0 or values.max() > 65535):
            raise ValueError("the pixels are 32-bit integers; save it with 8 or 16 bits")
        grey = np.round(values / 257).astype(np.uint8)  # 65535 / 257 = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode == "F":
        raise ValueError(
            "the pixels are floating-point numbers without a defined range; save it with 8 or 16 bits"
        )
    if "transparency" in image.info:  # Pillow wants palettes with transparency to pass through RGBA
        image = image.convert("RGBA")
    return image.convert("RGB")


def _native_mask(path: str | Path, expected_size: tuple[int, int] | None = None) -> np.ndarray:
    """H x W bool at native size."""
    image = _decode(path)
    if expected_size is not None and image.size != tuple(expected_size):
        raise MaskSizeError(
            f"mask {path} has {image.width} x {image.height} pixels, its image {expected_size[0]} x "
            f"{expected_size[1]}. Both are taken as stored (EXIF orientation is ignored); save them in one size"
        )
    if image.mode in ("1", "L", "F") or image.mode.startswith("I"):
        return np.asarray(image) > 0
    return np.asarray(_eight_bit(image)).any(axis=-1)


# --------------------------------------------------------------------------------------------- samples


@dataclass(frozen=True)
class Sample:
    """One test image.

    `category` is the text put into the prompts' ``{}``. `label` is 0 (normal), 1 (anomalous) or -1 (not known:
    only in data set "folder"). `defect` is "good" for normal images and "unknown" for label -1.
    """

    image_path: Path
    mask_path: Path | None
    category: str
    label: int
    defect: str
    object_mask_path: Path | None = None


@dataclass(frozen=True)
class Dataset:
    """The test images of a data set, ordered by category and file name.

    Examples
    --------
    >>> samples = [Sample(Path("a.png"), None, "nut", 0, "good"), Sample(Path("b.png"), None, "cap", 1, "dent")]
    >>> dataset = Dataset("folder", Path("."), ("nut", "cap"), tuple(samples))
    >>> len(dataset), dataset[0].defect, dataset.has_image_labels, dataset.select(["nut"]).has_image_labels
    (2, 'good', True, False)
    """

    name: str
    root: Path
    categories: tuple[str, ...]
    samples: tuple[Sample, ...]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    def __iter__(self):
        return iter(self.samples)

    def select(self, categories: str | Iterable[str]) -> "Dataset":
        """The same data set with these categories only, in the order given. ValueError for an unknown one."""
        names = [categories] if isinstance(categories, str) else list(categories)
        names = list(dict.fromkeys(_nfc(name) for name in names))
        for name in names:
            if name not in self.categories:
                raise ValueError(
                    f"unknown category {name!r} of data set {self.name!r} at {self.root}"
                    f"{_nearest(name, self.categories)}. It has: {', '.join(self.categories)}"
                )
        samples = tuple(s for name in names for s in self.samples if s.category == name)
        return Dataset(self.name, self.root, tuple(names), samples)

    @property
    def has_masks(self) -> bool:
        """Whether there are anomalous images and every one of them has a ground-truth mask."""
        anomalous = [s for s in self.samples if s.label == 1]
        return bool(anomalous) and all(s.mask_path for s in anomalous)

    @property
    def has_object_masks(self) -> bool:
        """Whether every image has a mask of the object."""
        return bool(self.samples) and all(s.object_mask_path for s in self.samples)

    @property
    def has_image_labels(self) -> bool:
        """Whether every image is labelled and both classes are present, so that image-level metrics exist."""
        return {s.label for s in self.samples} == {0, 1}


def load_dataset(
    name: str, root: str | Path | None = None, categories: str | Iterable[str] | None = None
) -> Dataset:
    """List the test images of a data set. Nothing is decoded here.

    name : "mvtec", "visa", "isic", "clinicdb", "headct", "brainmri", "folder", or, shipped with clipad and without
        a root, "demo" and "demo_aux". The layout of each is in data/README.md and in the error for a wrong one.
    root : the data set's folder. The folder just above it, or one inside it, is understood where only one data set
        is meant.
    categories : None or empty for all that are present.

    Data set "folder" takes images of any origin, by what the root contains:

    * ``test/<defect>/...`` (MVTec AD's layout, one category, named after the root); masks are optional:
      ``ground_truth/<defect>/<stem>_mask.png`` or ``<stem>.png``. Where a category has a folder ``ground_truth``,
      every anomalous image needs its mask.
    * sub-folders of images of which one is called good, normal, no or ok: one category; those images are normal,
      the other sub-folders anomalous.
    * images: one category of unlabelled images (label -1). Labels are never guessed.
    * anything else: each sub-folder is a category by these same rules.

    Raises ValueError (unknown name or category, with the nearest one), FileNotFoundError (root, image, mask or list
    missing), `LayoutError`, `OutsideRootError`.
    """

    def stop(kind: type[Exception], message: str) -> None:
        raise kind(message)

    dataset = _list_dataset(name, root, stop)
    return dataset.select(categories) if categories else dataset


Problem = Callable[
    [type[Exception], str], None
]  # raises (load_dataset) or collects (check_dataset)


def _list_dataset(name: str, root: str | Path | None, problem: Problem) -> Dataset:
    if name not in LAYOUTS:
        raise ValueError(
            f"unknown data set {name!r}{_nearest(name, LAYOUTS)}. Known: {', '.join(LAYOUTS)}"
        )
    if root is None or str(root) == "":
        if name not in ("demo", "demo_aux"):
            raise ValueError(
                f"data set {name!r} is not shipped and needs root=<its folder> (data_root on the command line); "
                "data/README.md says where it comes from"
            )
        root = data_dir() / "demo" / "collections" / name
    root = Path(root).expanduser()
    root = _locate(name, root.resolve() if ".." in root.parts else root.absolute())
    listed = LAYOUTS[name].samples(root, problem)
    samples = [kept for sample in listed if (kept := _inside(sample, root, problem)) is not None]
    if not samples:
        problem(
            LayoutError,
            f"{root} holds no test images of data set {name!r}. {_expected_and_found(name, root)}",
        )
    categories = tuple(dict.fromkeys(s.category for s in samples))
    return Dataset(name, root, categories, tuple(samples))


# --------------------------------------------------------------------------------------- files of a folder


MASK_FOLDERS = (
    "mask",
    "masks",
    "gt",
    "groundtruth",
    "label",
    "labels",
    "annotation",
    "annotations",
)
MASK_FOLDERS += ("segmentation", "segmentations")
MASK_ENDINGS = ("_mask", "_masks", "_label", "_gt", "_seg", "_segmentation", "_annotation")
SYSTEM_FILES = ("thumbs.db", "desktop.ini", "__macosx")
OTHER_IMAGES = (".gif", ".heic", ".heif", ".avif", ".svg", ".jp2", ".jxl", ".ppm", ".pgm", ".pbm")
OTHER_IMAGES += (".tga", ".psd", ".exr", ".hdr", ".dcm", ".nii", ".eps", ".ico")
OTHER_IMAGES += (".raw", ".dng", ".nef", ".cr2", ".cr3", ".arw")  # cameras
RESULT_MARK = "clipad-results"
"""an empty file that `clipad` leaves in a folder of its own pictures: they are not scored again"""


@dataclass(frozen=True)
class Scan:
    """What lies below a folder: photographs, sorted, and every other file under the reason why it is none."""

    photographs: tuple[Path, ...]
    skipped: dict[str, list[Path]]

    def skipped_lines(self, root: Path, shown: int = 3) -> list[str]:
        """A line per reason: how many, and the first of them."""
        lines = []
        for reason, paths in sorted(self.skipped.items()):
            names = ", ".join(printable(os.path.relpath(path, root)) for path in paths[:shown])
            lines.append(f"{len(paths)} {reason} ({names}{', ...' if len(paths) > shown else ''})")
        return lines


def scan(root: Path, without: Path | None = None) -> Scan:
    """Every file below a folder, at any depth; nothing is decoded, no file is opened.

    Photographs are files with an image's suffix. None are: masks (in a folder called masks, gt, labels, ..., or
    beside their photograph as ``x_mask.png`` or as ``x.png`` of ``x.jpg``), hidden files, results of clipad (folders
    with its mark, and ``without``), pipes and devices, broken links, what cannot be opened, other formats.
    """
    skipped: dict[str, list[Path]] = defaultdict(list)
    photographs: list[Path] = []
    seen: set[tuple[int, int]] = set()

    def visit(folder: Path, reason: str = "") -> None:
        try:
            status = folder.stat()
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            skipped[f"cannot be opened: {error.strerror}"].append(folder)
            return
        if (status.st_dev, status.st_ino) in seen:
            return  # a link that leads back
        seen.add((status.st_dev, status.st_ino))
        if any(entry.name == RESULT_MARK for entry in entries) or folder == without:
            reason = reason or "results of clipad"
        images = []
        for entry in entries:
            path = Path(entry.path)
            if entry.is_dir():
                inner = "hidden" if _hidden(entry.name) else ""
                if _plain(entry.name) in MASK_FOLDERS:
                    inner = "in a folder of masks"
                visit(path, reason or inner)
            elif why := reason or _no_image(path):
                skipped[why].append(path)
            else:
                images.append(path)
        masks = masks_beside(images)
        for path in images:
            if path in masks:
                skipped["beside a photograph of the same name, so a mask or copy"].append(path)
            else:
                photographs.append(path)

    visit(root)
    return Scan(tuple(sorted(photographs)), {why: sorted(paths) for why, paths in skipped.items()})


def masks_beside(images: Iterable[Path]) -> set[Path]:
    """Of the images of one folder those that belong to another: ``x_mask.png`` to ``x.*``, ``x.png`` to ``x.jpg``.

    Of equal stems the JPEG is the photograph, else the first of webp, bmp, tif and png.
    """
    order = (*SUFFIXES_OF["JPEG"], ".webp", ".bmp", ".tif", ".tiff", ".png")
    of_stem: dict[str, list[Path]] = defaultdict(list)
    for path in images:
        of_stem[_nfc(path.stem)].append(path)
    found = set()
    for stem, paths in of_stem.items():
        paths.sort(key=lambda path: order.index(path.suffix.lower()))
        owner = next((stem.removesuffix(e) for e in MASK_ENDINGS if stem.lower().endswith(e)), stem)
        found.update(paths if owner != stem and owner in of_stem else paths[1:])
    return found


def two_levels(image: Image.Image) -> bool:
    """Whether a decoded image has at most two colours: a mask or an empty picture, no photograph."""
    return image.getcolors(2) is not None


def printable(name: str) -> str:
    """A file name for people: bytes that are not UTF-8 become question marks."""
    return os.fsencode(name).decode("utf-8", "replace")


def _no_image(path: Path) -> str:
    """Why this file is no photograph, from its name and kind; empty if it may be one."""
    if _hidden(path.name):
        return "hidden"
    if not path.exists():
        return "broken link"
    if not path.is_file():
        return "no file but a pipe or device"
    suffix = path.suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return ""
    return f"in a format that is not read ({suffix})" if suffix in OTHER_IMAGES else "no image"


def _hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM_FILES


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


# ---------------------------------------------------------------------------------------------- layouts


@dataclass(frozen=True)
class Layout:
    """How a data set lies on disk."""

    text: str  # for error messages
    fits: Callable[[Path], bool]  # a cheap look at a root
    samples: Callable[[Path, Problem], list[Sample]]
    inner: tuple[str, ...] = ()  # its own sub-folders, which people give as root by mistake


def _mvtec_fits(root: Path) -> bool:
    return any((root / name / "test").is_dir() for name in EXPECTED["mvtec"])


def _mvtec(root: Path, problem: Problem) -> list[Sample]:
    samples = []
    for folder in _folders(root):
        if not (folder / "test").is_dir():
            continue
        category = _nfc(folder.name)
        if category not in EXPECTED["mvtec"]:
            problem(
                LayoutError,
                f"{folder} is no category of MVTec AD{_nearest(category, EXPECTED['mvtec'])}. "
                "Use dataset='folder' for other data in this layout",
            )
        samples += _labelled(folder / "test", folder, category, ("good",), True, problem)
    return samples


def _labelled(
    parent: Path,
    folder: Path,
    category: str,
    normal: tuple[str, ...],
    masks_needed: bool,
    problem: Problem,
) -> list[Sample]:
    """Images in parent/<defect>/, masks in folder/ground_truth/<defect>/, object masks in folder/object/<defect>/."""
    samples = []
    for defect_folder in _folders(parent, without=("ground_truth", "object", "train")):
        defect = defect_folder.name
        label = int(defect.lower() not in normal)
        masks = _by_stem(folder / "ground_truth" / defect, "_mask", problem) if label else {}
        objects = _by_stem(folder / "object" / defect, "_object", problem)
        for image in _images(defect_folder):
            mask = masks.get(_nfc(image.stem))
            if label and mask is None and masks_needed:
                problem(
                    FileNotFoundError,
                    f"no mask for {image}: expected {folder / 'ground_truth' / defect / image.stem}_mask.png",
                )
            kind = defect if label else "good"
            samples.append(
                Sample(image, mask, category, label, kind, objects.get(_nfc(image.stem)))
            )
    return samples


def _demo_fits(root: Path) -> bool:
    return any((folder / "test").is_dir() for folder in _folders(root))


def _demo(root: Path, problem: Problem) -> list[Sample]:
    samples = []
    for folder in _folders(root):
        samples += _labelled(folder / "test", folder, folder.name, ("good",), True, problem)
    return samples


def _visa_fits(root: Path) -> bool:
    return (root / "split_csv" / "1cls.csv").is_file()


def _visa(root: Path, problem: Problem) -> list[Sample]:
    path = root / "split_csv" / "1cls.csv"
    samples = []
    for line, row in _rows(path, ("object", "split", "label", "image", "mask"), root):
        # A category whose folder is absent was not unpacked; one that is there must be complete.
        if row["split"] != "test" or not (root / row["object"]).is_dir():
            continue
        if row["label"] not in ("normal", "anomaly"):
            problem(
                ValueError,
                f"{path}, line {line}: label {row['label']!r}, expected normal or anomaly",
            )
            continue
        label = int(row["label"] == "anomaly")
        if label and not row["mask"]:
            problem(
                FileNotFoundError,
                f"no mask for {root / row['image']}: {path}, line {line} names none",
            )
        mask = root / row["mask"] if label and row["mask"] else None
        category = _nfc(row["object"])
        samples.append(
            Sample(root / row["image"], mask, category, label, "anomaly" if label else "good")
        )
    return sorted(samples, key=lambda s: (s.category, s.label, s.image_path.name))


ISIC_IMAGES, ISIC_MASKS = "ISBI2016_ISIC_Part1_Test_Data", "ISBI2016_ISIC_Part1_Test_GroundTruth"


def _isic_fits(root: Path) -> bool:
    return (root / ISIC_IMAGES).is_dir() and (root / ISIC_MASKS).is_dir()


def _isic(root: Path, problem: Problem) -> list[Sample]:
    return _all_anomalous(
        root / ISIC_IMAGES, root / ISIC_MASKS, "_Segmentation", "skin", "lesion", problem
    )


def _clinicdb_fits(root: Path) -> bool:
    return (root / "Original").is_dir() and (root / "Ground Truth").is_dir()


def _clinicdb(root: Path, problem: Problem) -> list[Sample]:
    return _all_anomalous(root / "Original", root / "Ground Truth", "", "colon", "polyp", problem)


def _all_anomalous(
    images: Path, masks: Path, suffix: str, category: str, defect: str, problem: Problem
) -> list[Sample]:
    pairs = _by_stem(masks, suffix, problem)
    samples = []
    for image in _images(images):
        mask = pairs.get(_nfc(image.stem))
        if mask is None:
            problem(
                FileNotFoundError,
                f"no mask for {image}: expected {masks / (image.stem + suffix)}.*",
            )
        samples.append(Sample(image, mask, category, 1, defect))
    return samples


def _headct_fits(root: Path) -> bool:
    return (root / "labels.csv").is_file() and (root / "head_ct").is_dir()


def _headct(root: Path, problem: Problem) -> list[Sample]:
    folder = root / "head_ct" / "head_ct"
    folder = folder if folder.is_dir() else root / "head_ct"
    images = {image.stem: image for image in _images(folder)}
    samples = []
    for line, row in _rows(root / "labels.csv", ("id", "hemorrhage"), root):
        where = f"{root / 'labels.csv'}, line {line}"
        if row["hemorrhage"] not in ("0", "1"):
            problem(ValueError, f"{where}: hemorrhage is {row['hemorrhage']!r}, expected 0 or 1")
            continue
        image = images.pop(row["id"].zfill(3), None)
        if image is None:
            problem(
                FileNotFoundError,
                f"{where}: no image {folder / row['id'].zfill(3)}.png, or listed twice",
            )
            continue
        label = int(row["hemorrhage"])
        samples.append(Sample(image, None, "head ct", label, "hemorrhage" if label else "good"))
    for image in images.values():
        problem(ValueError, f"{image} has no row in {root / 'labels.csv'}")
    return sorted(samples, key=lambda s: s.image_path.name)


def _brainmri_folder(root: Path) -> Path:
    nested = (
        root / "brain_tumor_dataset"
    )  # the archive holds every image twice: here and in root/{no,yes}
    return nested if (nested / "yes").is_dir() else root


def _brainmri_fits(root: Path) -> bool:
    return all((_brainmri_folder(root) / name).is_dir() for name in ("no", "yes"))


def _brainmri(root: Path, problem: Problem) -> list[Sample]:
    folder = _brainmri_folder(root)
    samples = [Sample(image, None, "brain ct", 0, "good") for image in _images(folder / "no")]
    return samples + [
        Sample(image, None, "brain ct", 1, "tumour") for image in _images(folder / "yes")
    ]


def _folder_fits(root: Path) -> bool:
    return True  # whether there are images is found by listing them


def _folder(root: Path, problem: Problem) -> list[Sample]:
    samples = _folder_category(root, problem)
    if samples is None:
        samples = []
        for folder in _folders(root):
            samples += _folder_category(folder, problem) or []
    return samples


def _folder_category(folder: Path, problem: Problem) -> list[Sample] | None:
    """The samples of one category, or None if `folder` is not one (see load_dataset)."""
    category = _nfc(folder.name)
    parent = folder / "test" if (folder / "test").is_dir() else folder
    subfolders = _folders(parent)
    flat = _images(parent)
    labelled = parent != folder or any(
        f.name.lower() in NORMAL_NAMES and _images(f) for f in subfolders
    )
    if flat and any(_images(f) for f in subfolders):
        problem(
            LayoutError,
            f"{parent} holds images ({flat[0].name}, ...) beside sub-folders of images "
            f"({', '.join(f.name for f in subfolders)}): move them into a sub-folder, so that they have a label",
        )
    if flat:
        return [Sample(image, None, category, -1, "unknown") for image in flat]
    if labelled:
        masks_needed = (folder / "ground_truth").is_dir()
        return _labelled(parent, folder, category, NORMAL_NAMES, masks_needed, problem)
    return None


LAYOUTS = {
    "mvtec": Layout(
        "<category>/test/<defect>/NNN.png and <category>/ground_truth/<defect>/NNN_mask.png",
        _mvtec_fits,
        _mvtec,
    ),
    "visa": Layout(
        "split_csv/1cls.csv and <category>/Data/{Images/{Anomaly,Normal}/NNN.JPG,Masks/Anomaly/NNN.png}",
        _visa_fits,
        _visa,
        ("split_csv", *EXPECTED["visa"]),
    ),
    "isic": Layout(
        f"{ISIC_IMAGES}/ISIC_*.jpg and {ISIC_MASKS}/ISIC_*_Segmentation.png",
        _isic_fits,
        _isic,
        (ISIC_IMAGES, ISIC_MASKS),
    ),
    "clinicdb": Layout(
        "Original/N.tif and 'Ground Truth'/N.tif",
        _clinicdb_fits,
        _clinicdb,
        ("Original", "Ground Truth"),
    ),
    "headct": Layout("labels.csv and head_ct/head_ct/NNN.png", _headct_fits, _headct, ("head_ct",)),
    "brainmri": Layout(
        "brain_tumor_dataset/{no,yes}/",
        _brainmri_fits,
        _brainmri,
        ("brain_tumor_dataset", "no", "yes"),
    ),
    "demo": Layout("<category>/{test,ground_truth,object}/<defect>/", _demo_fits, _demo),
    "demo_aux": Layout("<category>/{test,ground_truth,object}/<defect>/", _demo_fits, _demo),
    "folder": Layout(
        "images; or {good,<defect>}/ with images; or test/<defect>/; or sub-folders (categories) of these kinds",
        _folder_fits,
        _folder,
    ),
}


def _locate(name: str, root: Path) -> Path:
    """The folder that has the layout: root itself, one folder below it, or one above."""
    if not root.exists():
        raise FileNotFoundError(f"the root of data set {name!r} does not exist: {root}")
    if not root.is_dir():
        raise NotADirectoryError(
            f"the root of data set {name!r} is no folder: {root}. Unpack it first if it is an archive"
        )
    layout = LAYOUTS[name]
    if layout.fits(root):
        return root
    below = [folder for folder in _folders(root) if layout.fits(folder)]
    if len(below) == 1:
        return below[0]
    if len(below) > 1:
        raise LayoutError(
            f"{root} holds data set {name!r} more than once: {', '.join(map(str, below))}. Give one of them"
        )
    if root.name in layout.inner and layout.fits(root.parent):
        return root.parent
    raise LayoutError(
        f"{root} does not have the layout of data set {name!r}. {_expected_and_found(name, root)}"
    )


def _expected_and_found(name: str, root: Path) -> str:
    folders, images = _folders(root), _images(root)
    if not any(root.iterdir()):
        found = "an empty folder"
    else:
        shown = ", ".join(folder.name for folder in folders[:8]) + (
            ", ..." if len(folders) > 8 else ""
        )
        found = (
            f"{len(folders)} sub-folders{f' ({shown})' if folders else ''} and {len(images)} images"
        )
    fitting = [other for other in EXPECTED if other != name and LAYOUTS[other].fits(root)]
    if not fitting and name != "folder" and any(_folder(root, lambda *problem: None)):
        fitting = ["folder"]
    hint = f" This is a layout for dataset={fitting[0]!r}." if fitting else ""
    return f"Expected {LAYOUTS[name].text}; found {found}.{hint}"


def _rows(path: Path, columns: tuple[str, ...], root: Path):
    """(line number, row) of a CSV file with these columns; blanks around names and values do not count."""
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)):
        raise OutsideRootError(_outside(path, root))
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        header = [cell.strip() for cell in next(reader, [])]
        if not set(columns) <= set(header):
            raise LayoutError(
                f"{path}: expected the columns {', '.join(columns)}; found {', '.join(header) or 'none'}"
            )
        for cells in reader:
            if any(cell.strip() for cell in cells):
                cells = [cell.strip() for cell in cells] + [""] * (len(header) - len(cells))
                yield reader.line_num, dict(zip(header, cells, strict=False))


def _folders(folder: Path, without: tuple[str, ...] = ()) -> list[Path]:
    return [path for path in _visible(folder) if path.is_dir() and path.name not in without]


def _images(folder: Path) -> list[Path]:
    return [
        path
        for path in _visible(folder)
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.is_dir()
    ]


def _visible(folder: Path) -> list[Path]:
    """Entries sorted by name, without hidden ones (.DS_Store, ._x.png) and archive left-overs."""
    if not folder.is_dir():
        return []
    return sorted(
        (path for path in folder.iterdir() if not path.name.startswith((".", "__MACOSX"))),
        key=lambda p: p.name,
    )


def _by_stem(folder: Path, suffix: str, problem: Problem) -> dict[str, Path]:
    """Masks by the stem of their image: masks pair by name, never by position."""
    pairs = {}
    for path in _images(folder):
        stem = _nfc(path.stem).removesuffix(suffix)
        if stem in pairs:
            problem(ValueError, f"two masks for one image: {pairs[stem]} and {path}. Remove one")
        pairs[stem] = path
    return pairs


def _inside(sample: Sample, root: Path, problem: Problem) -> Sample | None:
    """The sample without those of its files that are missing or, once links are followed, outside the root."""
    for part in ("image_path", "mask_path", "object_mask_path"):
        path = getattr(sample, part)
        if path is None:
            continue
        try:
            if Path(os.path.realpath(path, strict=True)).is_relative_to(os.path.realpath(root)):
                continue
            problem(OutsideRootError, _outside(path, root))
        except OSError as error:
            kind = "a broken link" if path.is_symlink() else "missing"
            problem(FileNotFoundError, f"{path} is {kind} ({error.strerror})")
        if part == "image_path":
            return None
        sample = replace(sample, **{part: None})
    return sample


def _outside(path: Path, root: Path) -> str:
    return (
        f"{path} leads to {os.path.realpath(path)}, outside the root {root}. "
        "Copy the file into the root, or give a root that holds everything (the root itself may be a link)"
    )


def _nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)  # archives made on macOS hold decomposed letters


def _nearest(name: str, known: Iterable[str]) -> str:
    lower = {other.lower(): other for other in known}
    close = difflib.get_close_matches(str(name).lower(), lower, n=1, cutoff=0.5)
    return f" (did you mean {lower[close[0]]!r}?)" if close else ""


# ------------------------------------------------------------------------------------------------ check


@dataclass(frozen=True)
class DatasetReport:
    """What `check_dataset` found. `problems` must be mended; `notes` are facts worth knowing.

    `table` has a row per category (columns as in `check_dataset`); `str()` prints everything.
    """

    name: str
    root: Path
    image_size: int
    table: pd.DataFrame
    problems: list[str]
    notes: list[str]

    @property
    def ok(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        shown = self.table
        if len(shown) > 1:
            total = shown.drop(columns="category").sum(min_count=1)
            shown = pd.concat([shown, pd.DataFrame([{"category": "total", **total}])])
        said = [
            c for c in shown if c in ("category", "normal", "anomalous") or shown[c].fillna(0).any()
        ]
        parts = [
            f"data set {self.name!r} at {self.root}",
            shown[said].to_string(index=False, na_rep="-", float_format="{:.0f}".format),
            *(f"PROBLEM: {text}" for text in self.problems[:50]),
        ]
        if len(self.problems) > 50:
            parts.append(
                f"... and {len(self.problems) - 50} more problems (report.problems has all)"
            )
        parts += [f"note: {text}" for text in self.notes]
        parts.append("ok" if self.ok else f"{len(self.problems)} problems")
        return "\n".join(parts)


COUNTS = ("normal", "anomalous", "unlabelled", "unreadable", "missing_masks", "wrong_size_masks")
COUNTS += ("empty_masks", "vanished_masks", "converted", "duplicates")


@dataclass
class Findings:
    """What reading the files of one sample showed; `mode` and `digest` stay empty for an unreadable image."""

    mode: str = ""
    digest: str = ""
    misnamed: bool = False
    rotated: bool = False
    counts: Counter = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def add(self, column: str, problem: object) -> None:
        self.counts[column] += 1
        self.problems.append(str(problem))


def check_dataset(
    name: str, root: str | Path | None = None, image_size: int = 240
) -> DatasetReport:
    """Read every test image and mask of a data set and report what is wrong with them.

    The table's columns per category: `category`, `normal`, `anomalous`, `unlabelled`, `unreadable` (images and masks),
    `missing_masks` (0 where the data set has none at all), `wrong_size_masks`, `empty_masks` (no pixel > 0),
    `vanished_masks` (all pixels disappear at `image_size`: thin defects), `converted` (images that are neither L nor
    RGB), `duplicates` (images byte-identical to an earlier one), `expected_normal` and `expected_anomalous` (NaN where
    nothing is expected).

    Raises what `load_dataset` raises when there is nothing to check (root missing, another layout).
    """
    problems: list[str] = []
    dataset = _list_dataset(name, root, lambda kind, message: problems.append(message))
    with ThreadPoolExecutor() as pool:  # decoding releases the interpreter lock
        inspected = list(
            tqdm(
                pool.map(lambda sample: _inspect(sample, image_size), dataset.samples),
                total=len(dataset),
                desc=f"checking {name}",
                unit="image",
            )
        )

    masked = any(s.mask_path for s in dataset.samples)
    counts: dict[str, Counter] = defaultdict(Counter)
    first_with: dict[str, Path] = {}
    copies = []
    for sample, found in zip(dataset, inspected, strict=True):
        row = counts[sample.category]
        row.update(found.counts)
        row[{0: "normal", 1: "anomalous", -1: "unlabelled"}[sample.label]] += 1
        row["missing_masks"] += masked and sample.label == 1 and sample.mask_path is None
        problems += found.problems
        if found.digest:
            original = first_with.setdefault(found.digest, sample.image_path)
            if original != sample.image_path:
                row["duplicates"] += 1
                copies.append(sample.image_path)

    expected = EXPECTED.get(name, {})
    columns = ["category", *COUNTS, "expected_normal", "expected_anomalous"]
    rows = []
    for category in dict.fromkeys([*expected, *dataset.categories]):
        row = counts[category]
        normal, anomalous = expected.get(category, (np.nan, np.nan))
        rows.append([category, *(row[column] for column in COUNTS), normal, anomalous])
        if category in expected and (row["normal"], row["anomalous"]) != expected[category]:
            problems.append(
                f"{category}: found {row['normal']} normal + {row['anomalous']} anomalous images, "
                f"expected {normal} + {anomalous}"
            )

    modes = Counter(found.mode for found in inspected if found.mode)
    notes = (
        ["image modes: " + ", ".join(f"{mode} {n}" for mode, n in modes.most_common())]
        if modes
        else []
    )
    pairs = list(zip(dataset, inspected, strict=True))
    lossy = [
        s.mask_path
        for s in dataset
        if s.mask_path and s.mask_path.suffix.lower() in SUFFIXES_OF["JPEG"]
    ]
    for text, paths in [
        ("byte-identical to an earlier image, kept", copies),
        (
            "content of another type than the suffix says, read by content",
            [s.image_path for s, f in pairs if f.misnamed],
        ),
        (
            "EXIF orientation set, ignored: pixels are taken as stored",
            [s.image_path for s, f in pairs if f.rotated],
        ),
        ("JPEG masks: compression noise above 0 counts as anomalous", lossy),
        ("image files that belong to no sample", _left_over(dataset) if name == "folder" else []),
    ]:
        if paths:
            shown = ", ".join(str(path.relative_to(dataset.root)) for path in paths[:5])
            notes.append(f"{text}: {len(paths)} ({shown}{', ...' if len(paths) > 5 else ''})")
    return DatasetReport(
        name, dataset.root, image_size, pd.DataFrame(rows, columns=columns), problems, notes
    )


def _inspect(sample: Sample, image_size: int) -> Findings:
    found = Findings()
    size = None
    try:
        image = _decode(sample.image_path)
        _eight_bit(image)
        size, found.mode = image.size, image.mode
        found.digest = hashlib.sha256(sample.image_path.read_bytes()).hexdigest()
        found.misnamed = sample.image_path.suffix.lower() not in SUFFIXES_OF[image.format]
        found.rotated = image.format != "TIFF" and image.getexif().get(ORIENTATION, 1) != 1
        found.counts["converted"] += image.mode not in ("L", "RGB")
    except (OSError, ValueError) as error:
        found.add(
            "unreadable", error if isinstance(error, OSError) else f"{sample.image_path}: {error}"
        )
    for path in filter(None, (sample.mask_path, sample.object_mask_path)):
        try:
            mask = _native_mask(path, size)
        except MaskSizeError as error:
            found.add("wrong_size_masks", error)
        except OSError as error:
            found.add("unreadable", error)
        else:
            if not mask.any():
                found.add("empty_masks", f"mask {path} has no pixel > 0")
            elif path == sample.mask_path and not resize_mask(mask, image_size).any():
                found.counts["vanished_masks"] += 1
    return found


def _left_over(dataset: Dataset) -> list[Path]:
    """Image files under the root that no sample uses: deeper folders, train, masks without an image."""
    used = {p for s in dataset.samples for p in (s.image_path, s.mask_path, s.object_mask_path)}
    found = (path for path in dataset.root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    return sorted(
        path
        for path in found
        if path not in used
        and not any(
            part.startswith((".", "__MACOSX")) for part in path.relative_to(dataset.root).parts
        )
    )
