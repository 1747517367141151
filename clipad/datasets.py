"""Data sets: which image belongs to which category, label and mask, and how image and mask are read.

METHOD.md section 1 gives the rules for pixels, data/README.md the layouts.
Only test images are listed: the method is zero-shot. The rules that the layouts leave open:

* Listings are sorted by name; hidden files, ``__MACOSX`` and files without an image suffix are ignored. So are masks
  that lie beside their image, as ``x_mask.png`` or as ``x.png`` of ``x.jpg``.
* A file is decoded by its content, whatever its suffix says. Of several frames the first counts.
* Pixels are taken as stored: EXIF orientation is ignored, for image and mask alike, as in the released program.
  (A TIFF's own orientation field says how its rows are stored; the decoder applies it.)
* Every file must lie inside the root once links are followed. The root itself may be a link.
* Byte-identical images are kept; `clipad data check` reports them, and every file that is left out.
"""

import csv
import difflib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from clipad.files import (
    IMAGE_SUFFIXES,
    MASK_FOLDERS,
    masks_beside,
    nfc,
    plain,
    printable,
    scan,
)
from clipad.published import data_dir

ORIENTATION = 0x0112  # EXIF tag
PIXEL_LIMIT = 64_000_000  # of one image: 8000 x 8000
IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")  # others (EPS runs a program) stay closed
NORMAL_NAMES = ("good", "normal", "ok")  # sub-folders of data set "folder" that hold normal images
# Words that say a state, not a product, and not surely which one: labels are asked for.
STATES = ("yes", "no", "pass", "passed", "fail", "failed", "reject", "nok", "ng", "ko", "bad")
STATES += ("def", "defect", "defects", "defective", "anomaly", "anomalous", "abnormal")
STATES += ("nominal", "healthy", "clean", "free", "okay")
NO_TEST_IMAGES = ("train", "validation", "test_private", "test_private_mixed", "object")

# Test images per category, (normal, anomalous), of the published data sets (data/README.md says where each is from).
# fmt: off
EXPECTED = {
    "mvtec": {
        "bottle": (20, 63), "cable": (58, 92), "capsule": (23, 109), "carpet": (28, 89),
        "grid": (21, 57), "hazelnut": (40, 70), "leather": (32, 92), "metal_nut": (22, 93),
        "pill": (26, 141), "screw": (41, 119), "tile": (33, 84), "toothbrush": (12, 30),
        "transistor": (60, 40), "wood": (19, 60), "zipper": (32, 119),
    },
    "visa": {
        "candle": (100, 100), "capsules": (60, 100), "cashew": (50, 100), "chewinggum": (50, 100),
        "fryum": (50, 100), "macaroni1": (100, 100), "macaroni2": (100, 100), "pcb1": (100, 100),
        "pcb2": (100, 100), "pcb3": (101, 100), "pcb4": (101, 100), "pipe_fryum": (50, 100),
    },
    # The medical sets have one category; its name is the object's name in the prompts (METHOD.md section 2).
    "isic": {"skin": (0, 379)},
    "clinicdb": {"colon": (0, 612)},
    "headct": {"head ct": (100, 100)},
    "brainmri": {"brain ct": (98, 155)},
}
# fmt: on


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
    return _readable(path, decode(path))


def read_photograph(path: str | Path) -> tuple[Image.Image, set[str]]:
    """As `read_image`, but turned as the EXIF orientation says, as viewers do; and its `remarks`.

    Not for data sets: there masks lie on the pixels as stored.
    """
    image = decode(path)
    found = remarks(image)
    return _readable(path, ImageOps.exif_transpose(image) if "turned" in found else image), found


def remarks(image: Image.Image) -> set[str]:
    """What a reader of a decoded image has to know: "turned" (by EXIF), "twelve bit" (16-bit values below 4096)."""
    found = set()
    if image.format != "TIFF" and image.getexif().get(ORIENTATION, 1) != 1:
        found.add("turned")
    if image.mode.startswith("I") and 255 < np.asarray(image).max() < 4096:
        found.add("twelve bit")
    return found


def _readable(path, image: Image.Image) -> Image.Image:
    try:
        return eight_bit(image)
    except ValueError as error:
        raise UnreadableImageError(f"cannot read image {path}: {error}") from error


def read_mask(
    path: str | Path, image_size: int, expected_size: tuple[int, int] | None = None
) -> np.ndarray:
    """Read a ground-truth mask as an S x S bool array, S = `image_size` (METHOD.md section 1).

    A pixel is anomalous where any colour channel is > 0 (of a palette the index; alpha is ignored), decided at native
    size; then bilinear resize to S x S and threshold at 0.5. On the 8-bit result 127 is out and 128 is in, so that no
    value ties.

    `expected_size` is the image's (width, height), see `native_size`; another size raises `MaskSizeError`.
    Other errors as `read_image`.
    """
    return resize_mask(native_mask(path, expected_size), image_size)


def native_size(path: str | Path) -> tuple[int, int]:
    """(width, height) of an image as `read_image` would return it, from its header. Errors as `read_image`."""
    return decode(path, header_only=True).size


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


def two_levels(image: Image.Image) -> bool:
    """Whether a decoded image has at most two colours: a mask or an empty picture, no photograph."""
    return image.getcolors(2) is not None


def image_tensor(image: Image.Image, image_size: int, mean: Iterable[float], std: Iterable[float]):
    """Pre-process a PIL image for a CLIP model: 3 x S x S float32 tensor, S = `image_size`.

    Both sides are squashed to S with bicubic interpolation (no crop), then RGB, [0, 1], (x - mean) / std
    (METHOD.md section 1). Modes other than L and RGB are converted first, as in `read_image`.

    >>> image_tensor(Image.new("L", (40, 30), 255), 24, mean=[0.5] * 3, std=[0.25] * 3)[:, 0, 0].tolist()
    [2.0, 2.0, 2.0]
    """
    import torch  # on first use: listing and checking data sets does not need it

    image = (
        eight_bit(image).resize((image_size, image_size), Image.Resampling.BICUBIC).convert("RGB")
    )
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def decode(path: str | Path, header_only: bool = False) -> Image.Image:
    """The image as its file has it, or only its header; errors as `read_image`."""
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


def eight_bit(image: Image.Image) -> Image.Image:
    """Mode L or RGB (see `read_image`); ValueError for pixels without a defined range."""
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


def native_mask(path: str | Path, expected_size: tuple[int, int] | None = None) -> np.ndarray:
    """H x W bool at native size."""
    image = decode(path)
    if expected_size is not None and image.size != tuple(expected_size):
        raise MaskSizeError(
            f"mask {path} has {image.width} x {image.height} pixels, its image {expected_size[0]} x "
            f"{expected_size[1]}. Both are taken as stored (EXIF orientation is ignored); save them in one size"
        )
    if image.mode in ("1", "L", "F", "P") or image.mode.startswith("I"):
        return np.asarray(image) > 0  # a palette's index counts, not its colour
    return np.asarray(eight_bit(image)).any(axis=-1)


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
        names = list(dict.fromkeys(nfc(name) for name in names))
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
    name: str,
    root: str | Path | None = None,
    categories: str | Iterable[str] | None = None,
    normal_folder: str = "",
) -> Dataset:
    """List the test images of a data set. Nothing is decoded here.

    name : "mvtec", "visa", "isic", "clinicdb", "headct", "brainmri", "folder", or, shipped with clipad and without
        a root, "demo" and "demo_aux". The layout of each is in data/README.md and in the error for a wrong one.
    root : the data set's folder. The folder just above it, or one inside it, is understood where only one data set
        is meant.
    categories : None or empty for all that are present.
    normal_folder : for data set "folder", the name of the sub-folders that hold normal images, or "none".

    Data set "folder" takes images of any origin, by what the root contains:

    * ``meta.json``, a list as many programs of the field write it: its test images.
    * ``test/<defect>/...`` (MVTec AD's layout, one category, named after the root); masks are optional:
      ``ground_truth/<defect>/<stem>_mask.png`` or ``<stem>.png``. Where a category has a folder ``ground_truth``,
      every anomalous image needs its mask. MVTec AD 2's ``test_public/`` is read, too.
    * sub-folders of images, one of them with normal images: one category, the other sub-folders are anomalous.
    * images: one category of unlabelled images (label -1).
    * anything else: each sub-folder is a category by these same rules.

    Labels are never guessed: normal are the images in ``normal_folder``, or, without it, in the one sub-folder called
    good, normal or ok. Where there is none, or two, the sub-folders are named and the answer is asked for.

    Raises ValueError (unknown name or category, with the nearest one), FileNotFoundError (root, image, mask or list
    missing), `LayoutError`, `OutsideRootError`.
    """

    def stop(kind: type[Exception], message: str) -> None:
        raise kind(message)

    dataset = list_dataset(name, root, stop, normal_folder)
    return dataset.select(categories) if categories else dataset


Problem = Callable[[type[Exception], str], None]  # raises (load_dataset) or collects (data check)


def list_dataset(
    name: str, root: str | Path | None, problem: Problem, normal_folder: str = ""
) -> Dataset:
    """`load_dataset` of all categories, with every fault of the files handed to ``problem``."""
    if name not in LAYOUTS:
        raise ValueError(
            f"unknown data set {name!r}{_nearest(name, LAYOUTS)}. Known: {', '.join(LAYOUTS)}"
        )
    if normal_folder and name != "folder":
        raise ValueError(f"normal_folder is for data set 'folder'; {name!r} says what is normal")
    shipped = data_dir() / "demo" / "collections"
    given = root is not None and str(root) != ""
    if not given and name not in ("demo", "demo_aux"):
        raise ValueError(
            f"data set {name!r} is not shipped and needs root=<its folder> (data_root on the command line); "
            "data/README.md says where it comes from"
        )
    root = Path(root).expanduser() if given else shipped / name
    root = _locate(name, root.resolve() if ".." in root.parts else root.absolute())
    if given and name in ("demo", "demo_aux"):
        own = {path.name for path in shipped.glob("*/*")}
        strange = [folder.name for folder in _folders(root) if folder.name not in own]
        if strange:
            raise LayoutError(f"{strange[0]!r} is not of the demo: did you mean dataset='folder'?")
    listing = LAYOUTS[name].samples
    listed = listing(root, problem, *([normal_folder] if name == "folder" else []))
    samples = [kept for sample in listed if (kept := _sound(sample, root, problem)) is not None]
    if not samples:
        problem(
            LayoutError,
            f"{root} holds no test images of data set {name!r}. {_expected_and_found(name, root)}",
        )
    if name == "folder":
        _require_most_used(root, samples, problem)
    categories = tuple(dict.fromkeys(s.category for s in samples))
    return Dataset(name, root, categories, tuple(samples))


def left_over(root: Path, samples: Iterable[Sample]) -> list[Path]:
    """Photographs below a root that belong to no sample and lie in no folder that is not for testing."""
    used = {path for s in samples for path in (s.image_path, s.mask_path, s.object_mask_path)}
    return [
        path
        for path in scan(root, used).photographs
        if not set(path.relative_to(root).parts) & set(NO_TEST_IMAGES)
    ]


def _require_most_used(root: Path, samples: list[Sample], problem: Problem) -> None:
    rest = left_over(root, samples)
    if len(rest) > len(samples):
        problem(
            LayoutError,
            f"{len(samples)} images of {root} fit a layout and {len(rest)} do not, such as "
            f"{rest[0].relative_to(root)}: give the folder that holds them. Expected {LAYOUTS['folder'].text}",
        )


# ---------------------------------------------------------------------------------------------- layouts


@dataclass(frozen=True)
class Layout:
    """How a data set lies on disk."""

    text: str  # for error messages
    fits: Callable[[Path], bool]  # a cheap look at a root
    samples: Callable[..., list[Sample]]  # (root, problem)
    inner: tuple[str, ...] = ()  # its own sub-folders, which people give as root by mistake


def _mvtec_fits(root: Path) -> bool:
    return any((root / name / "test").is_dir() for name in EXPECTED["mvtec"])


def _mvtec(root: Path, problem: Problem) -> list[Sample]:
    samples = []
    for folder in _folders(root):
        if not (folder / "test").is_dir():
            continue
        category = nfc(folder.name)
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
    for defect_folder in _class_folders(parent):
        defect = defect_folder.name
        label = int(nfc(defect).lower() not in normal)
        masks = _by_stem(folder / "ground_truth" / defect, "_mask", problem) if label else {}
        objects = _by_stem(folder / "object" / defect, "_object", problem)
        for image in _photographs(defect_folder):
            mask = masks.get(nfc(image.stem))
            if label and mask is None and masks_needed:
                problem(
                    FileNotFoundError,
                    f"no mask for {image}: expected {folder / 'ground_truth' / defect / image.stem}_mask.png",
                )
            kind = defect if label else "good"
            samples.append(Sample(image, mask, category, label, kind, objects.get(nfc(image.stem))))
    return samples


def _demo_fits(root: Path) -> bool:
    return any((folder / "test").is_dir() for folder in _folders(root))


def _demo(root: Path, problem: Problem) -> list[Sample]:
    samples = []
    for folder in _folders(root):
        samples += _labelled(folder / "test", folder, folder.name, ("good",), True, problem)
    return samples


def _visa_fits(root: Path) -> bool:
    return (root / "split_csv" / "1cls.csv").is_file() or bool(_visa_converted(root))


def _visa_converted(root: Path) -> list[Path]:
    """Categories as the data set's own script converts them: <category>/test/{good,bad}, ground_truth/bad."""
    return [root / name for name in EXPECTED["visa"] if (root / name / "test" / "good").is_dir()]


def _visa(root: Path, problem: Problem) -> list[Sample]:
    path = root / "split_csv" / "1cls.csv"
    samples = []
    if not path.is_file():
        for folder in _visa_converted(root):
            samples += _labelled(folder / "test", folder, folder.name, ("good",), True, problem)
        return samples
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
        category = nfc(row["object"])
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
        mask = pairs.get(nfc(image.stem))
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


def _folder(root: Path, problem: Problem, normal_folder: str = "") -> list[Sample]:
    if (root / "meta.json").is_file():
        return _meta_json(root, problem)
    samples = _folder_category(root, problem, normal_folder)
    if samples is None:
        samples = []
        for folder in _class_folders(root):
            samples += _folder_category(folder, problem, normal_folder) or []
    if normal_folder.lower() not in ("", "none") and all(s.label != 0 for s in samples):
        names = ", ".join(sorted({s.image_path.parent.name for s in samples})[:20])
        problem(LayoutError, f"{root} has no folder {normal_folder!r} with images; found {names}")
    return samples


def _folder_category(folder: Path, problem: Problem, normal_folder: str) -> list[Sample] | None:
    """The samples of one category, or None if `folder` is not one (see load_dataset)."""
    category = nfc(folder.name)
    public = folder / "test_public"  # MVTec AD 2; its masks lie beside the defects
    parent = public if public.is_dir() else folder / "test"
    truth = public if public.is_dir() else folder
    if not parent.is_dir():
        parent = truth = folder
    flat = _photographs(parent)
    classes = [
        f for f in _class_folders(parent) if _photographs(f) and f.name not in NO_TEST_IMAGES
    ]
    if flat and classes:
        problem(
            LayoutError,
            f"{parent} holds images ({flat[0].name}, ...) beside sub-folders of images "
            f"({', '.join(f.name for f in classes)}): move them into a sub-folder, so that they have a label",
        )
    if flat:
        return [Sample(image, None, category, -1, "unknown") for image in flat]
    normal = _normal_name([f.name for f in classes], normal_folder, parent, problem)
    if normal is None and parent == folder:
        return None
    _refuse_loco(truth / "ground_truth", problem)
    masks_needed = (truth / "ground_truth").is_dir()
    return _labelled(parent, truth, category, (normal or "",), masks_needed, problem)


def _normal_name(names: list[str], given: str, parent: Path, problem: Problem) -> str | None:
    """The sub-folder of normal images in lower case; "" if none is normal, None if these are no states at all."""
    lower = [nfc(name).lower() for name in names]
    if given.lower() == "none":
        return "" if names else None
    if given:
        return nfc(given).lower() if nfc(given).lower() in lower else None
    known = [name for name in lower if name in NORMAL_NAMES]
    if len(known) == 1:
        return known[0]
    words = {word for name in lower for word in name.replace("-", "_").replace(" ", "_").split("_")}
    if names and (
        known or parent.name in ("test", "test_public") or words & {*STATES, *NORMAL_NAMES}
    ):
        problem(
            LayoutError,
            f"{parent} has the sub-folders {', '.join(names[:20])}: which one holds flawless images? Labels are not "
            "guessed: give normal_folder=NAME (--normal-folder on the command line), or none if no image is flawless",
        )
    return None


def _refuse_loco(truth: Path, problem: Problem) -> None:
    """MVTec LOCO AD has several masks an image and a metric of its own."""
    for defect in _folders(truth):
        if not _images(defect) and any(_images(folder) for folder in _folders(defect)):
            problem(
                LayoutError,
                f"{defect} holds a folder of masks per image, as MVTec LOCO AD does; its metric (sPRO) is not ours. "
                "Put one mask an image there (<stem>_mask.png), or take ground_truth away to work with labels only",
            )


def _meta_json(root: Path, problem: Problem) -> list[Sample]:
    """The list that AdaCLIP, AnomalyCLIP and others write: {"test": {category: [{"img_path", "mask_path", ...}]}}."""
    path = root / "meta.json"
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["test"]
        rows = [(nfc(category), row) for category, group in listed.items() for row in group]
        samples = []
        for category, row in rows:
            label, mask = int(row["anomaly"]), row.get("mask_path") or None
            kind = str(row.get("specie_name") or "anomaly") if label else "good"
            mask = root / mask if label and mask else None
            samples.append(Sample(root / row["img_path"], mask, category, label, kind))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem(
            LayoutError,
            f"{path} is not the expected list, {{'test': {{category: [{{'img_path', 'mask_path', 'anomaly'}}]}}}} "
            f"({type(error).__name__}: {error}): mend it or take it away",
        )
        return []
    return sorted(samples, key=lambda s: (s.category, s.image_path))


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
    if not fitting and name != "folder" and _folder(root, lambda *problem: None):
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


def _folders(folder: Path) -> list[Path]:
    return [path for path in _visible(folder) if path.is_dir()]


def _class_folders(folder: Path) -> list[Path]:
    """Sub-folders that may be categories or kinds of defect: no masks, no training images."""
    return [
        path
        for path in _folders(folder)
        if path.name not in NO_TEST_IMAGES
        and (plain(path.name) not in MASK_FOLDERS or (path / "test").is_dir())
    ]


def _images(folder: Path) -> list[Path]:
    """Files with an image's suffix, broken links among them; no pipes, whose opening would wait for ever."""
    return [
        path
        for path in _visible(folder)
        if path.suffix.lower() in IMAGE_SUFFIXES and (path.is_file() or not path.exists())
    ]


def _photographs(folder: Path) -> list[Path]:
    images = _images(folder)
    masks = masks_beside(images)
    return [path for path in images if path not in masks]


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
        stem = nfc(path.stem).removesuffix(suffix)
        if stem in pairs:
            problem(ValueError, f"two masks for one image: {pairs[stem]} and {path}. Remove one")
        pairs[stem] = path
    return pairs


def _sound(sample: Sample, root: Path, problem: Problem) -> Sample | None:
    """The sample without those of its files that are missing or, once links are followed, outside the root.

    None for one that cannot be used: its image is such a file, or its name cannot be written to a table.
    """
    if sample.category == "mean":
        problem(
            ValueError,
            "a category cannot be called 'mean', the last row of every table: rename its folder",
        )
        return None
    name = os.path.relpath(sample.image_path, root)
    if printable(name) != name:
        problem(
            ValueError,
            f"{printable(name)}: the name is not UTF-8, rename it (convmv does all of a folder)",
        )
        return None
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


def _nearest(name: str, known: Iterable[str]) -> str:
    lower = {other.lower(): other for other in known}
    close = difflib.get_close_matches(str(name).lower(), lower, n=1, cutoff=0.5)
    return f" (did you mean {lower[close[0]]!r}?)" if close else ""
