"""Data sets: which image belongs to which category, label and mask; data/README.md has the layouts.

Only test images are listed: the method is zero-shot.
"""

import contextlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

import pandas as pd

from clipad.io.files import (
    BROKEN_LINK,
    IMAGE_SUFFIXES,
    PHOTOGRAPH,
    did_you_mean,
    nfc,
    printable,
    scan,
)
from clipad.published import data_dir

NORMAL_NAMES = ("good", "normal", "ok")  # sub-folders of data set "folder" that hold normal images
# Words that say a state, not a product, and not surely which one: labels are asked for.
STATES = {
    *NORMAL_NAMES, "yes", "no", "pass", "passed", "fail", "failed", "reject", "nok", "ng", "ko", "bad", "def", "defect",
    "defects", "defective", "anomaly", "anomalous", "abnormal", "nominal", "healthy", "clean", "free", "okay",
}  # fmt: skip
NO_TEST_IMAGES = {"train", "validation", "test_private", "test_private_mixed", "object"}


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

    def select(self, categories: str | Iterable[str]) -> Self:
        """The same data set with these categories only, in the order given. ValueError for an unknown one."""
        names = [categories] if isinstance(categories, str) else list(categories)
        names = list(dict.fromkeys(nfc(name) for name in names))
        for name in names:
            if name not in self.categories:
                raise ValueError(
                    f"unknown category {name!r} of data set {self.name!r} at {self.root}"
                    f"{did_you_mean(name, self.categories)}. It has: {', '.join(self.categories)}"
                )
        samples = tuple(s for name in names for s in self.samples if s.category == name)
        return Dataset(self.name, self.root, tuple(names), samples)

    @property
    def has_masks(self) -> bool:
        """Whether there are anomalous images and every one of them has a ground-truth mask."""
        anomalous = [s for s in self.samples if s.label == 1]
        return bool(anomalous) and all(s.mask_path for s in anomalous)

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

    ``name``: "mvtec", "visa", "isic", "clinicdb", "headct", "brainmri", "folder", or, shipped with clipad and without a
    root, "demo" and "demo_aux". ``root``: its folder, or the one just above, in the layout of data/README.md.
    ``categories``: None or empty for all that are present. ``normal_folder``: of data set "folder", the name of the
    sub-folders that hold normal images, or "none".

    Data set "folder" takes images of any origin. Labels are never guessed: normal are the images in ``normal_folder``,
    or else in the one sub-folder called good, normal or ok; where there is none, or two, the answer is asked for.

    Raises ValueError (unknown name or category, with the nearest one; another layout; a file that lies outside the
    root), FileNotFoundError (root, image or mask missing).
    """
    dataset = list_dataset(name, root, normal_folder)
    for sample in dataset:
        require_usable(sample.image_path, dataset.root)
        for mask in filter(None, (sample.mask_path, sample.object_mask_path)):
            require_usable(mask, dataset.root, f", the mask of {sample.image_path},")
    return dataset.select(categories) if categories else dataset


def list_dataset(name: str, root: str | Path | None = None, normal_folder: str = "") -> Dataset:
    """`load_dataset` of all categories, without a look at whether the files can be used."""
    if name not in LAYOUTS:
        raise ValueError(
            f"unknown data set {name!r}{did_you_mean(name, LAYOUTS)}. Known: {', '.join(LAYOUTS)}"
        )
    if normal_folder and name != "folder":
        raise ValueError(f"normal_folder is for data set 'folder'; {name!r} says what is normal")
    if not root and name not in ("demo", "demo_aux"):
        raise ValueError(
            f"data set {name!r} is not shipped and needs root=<its folder> (data_root on the command line); "
            "data/README.md says where it comes from"
        )
    root = Path(root).expanduser() if root else data_dir() / "demo" / "collections" / name
    root = root.resolve() if ".." in root.parts else root.absolute()
    if not root.is_dir():
        kind = "is no folder (unpack an archive first)" if root.exists() else "does not exist"
        raise FileNotFoundError(f"the root of data set {name!r} {kind}: {root}")
    samples = _find(name, root, normal_folder)
    if not samples and name != "folder":  # which has looked into sub-folders itself
        inside = {place: _find(name, place) for place in _folders(root)}
        inside = {place: found for place, found in inside.items() if found}
        if len(inside) > 1:
            raise ValueError(f"{root} holds {name!r} more than once: {', '.join(map(str, inside))}")
        if inside:
            [(root, samples)] = inside.items()
    if not samples:
        raise ValueError(f"{root} holds no test images of {name!r}. {_expected(name, root)}")
    categories = tuple(dict.fromkeys(s.category for s in samples))
    if "mean" in categories:
        raise ValueError("a category cannot be called 'mean', as a table's last row is")
    return Dataset(name, root, categories, samples)


def _find(name: str, root: Path, normal_folder: str = "") -> tuple[Sample, ...]:
    """The samples of a data set below a root; none where another layout is."""
    layout, find = LAYOUTS[name]
    try:
        return tuple(find(root, normal_folder) if name == "folder" else find(root))
    except LISTS as error:
        expected, why = META if name == "folder" else layout, f"{type(error).__name__}: {error}"
        raise ValueError(f"a list in {root} is not as expected, {expected} ({why})") from error


def _expected(name: str, root: Path) -> str:
    """What was expected at a root, what is there, and for which data set that would do."""
    found = ", ".join(path.name for path in _visible(root)[:8]) or "an empty folder"
    hint = "" if name == "folder" else "; images of your own are dataset='folder'"
    with contextlib.suppress(ValueError, StopIteration):
        others = (o for o in LAYOUTS if o not in (name, "folder") and _find(o, root))
        hint = f"; this is a layout for dataset={next(others)!r}"
    return f"Expected {LAYOUTS[name][0]}; found {found}{hint}"


def expected_counts(name: str) -> dict[str, tuple[int, int]]:
    """Category -> numbers of (normal, anomalous) test images that a data set has; empty for "folder"."""
    table = pd.read_csv(data_dir() / "test_images.csv").query("dataset == @name")
    counts = zip(table["normal"], table["anomalous"], strict=True)
    return dict(zip(table["category"], counts, strict=True))


def require_usable(path: Path, root: Path, of: str = "") -> None:
    """FileNotFoundError for a missing file; ValueError for one outside the root once links are followed, or with a name
    that is not UTF-8. ``of``: what it belongs to, for the message."""
    if printable(str(path)) != str(path):
        raise ValueError(f"{printable(str(path))}: the name is not UTF-8, rename it")
    try:
        real = os.path.realpath(path, strict=True)
    except OSError as error:
        kind = "a broken link" if path.is_symlink() else "missing"
        raise FileNotFoundError(f"{path}{of} is {kind} ({error.strerror})") from None
    if not Path(real).is_relative_to(os.path.realpath(root)):
        raise ValueError(f"{path} leads to {real}, outside the root {root}: copy it into the root")


def _samples(images, category, label, defect, masks=None, ending="_mask", objects=None):
    """Images of one label. In ``masks`` each has one, with or without ``ending``; in ``objects`` each may have one."""
    masks_of, objects_of = _by_stem(masks, ending), _by_stem(objects, "_object")
    for image in images:
        stem = nfc(image.stem)
        missing = masks and masks / f"{image.stem}{ending}.png"  # and will be called so
        mask = masks_of.get(stem, missing)
        yield Sample(image, mask, category, label, defect, objects_of.get(stem))


def _by_stem(folder: Path | None, ending: str) -> dict[str, Path]:
    """Masks by the stem of their image: they pair by name, never by position."""
    masks = {}
    for path in _images(folder) if folder else []:
        other = masks.setdefault(nfc(path.stem).removesuffix(ending), path)
        if other != path:
            raise ValueError(f"two masks for one image: {other} and {path}. Remove one")
    return masks


def _by_defect(images, category, truth, normal="good", masked=True) -> Iterator[Sample]:
    """Images by their folder. ``normal``: that of normal ones in lower case; ``masked``: the others have masks."""
    for folder, found in images.items():
        label = int(nfc(folder.name).lower() != normal)
        defect = folder.name if label else "good"
        masks = truth / "ground_truth" / folder.name if label and masked else None
        objects = truth / "object" / folder.name
        yield from _samples(found, category, label, defect, masks, objects=objects)


def _mvtec(root: Path, name: str = "mvtec") -> Iterator[Sample]:
    known, folders = expected_counts(name), _folders(root)
    found = {nfc(f.name): f for f in folders if (f / "test").is_dir()}
    unknown = sorted(found.keys() - known)
    if unknown and found.keys() & known:  # misspelt: its images would be missing without a word
        hint = f"{did_you_mean(unknown[0], known)}. Other data are dataset='folder'"
        raise ValueError(f"{found[unknown[0]]} is no category of {name!r}{hint}")
    for category in sorted(found.keys() & known):
        images = {path: _images(path) for path in _folders(found[category] / "test")}
        yield from _by_defect(images, category, found[category])


def _visa(root: Path) -> Iterable[Sample]:
    path = root / "split_csv" / "1cls.csv"
    if not path.is_file():  # as the data set's own script converts it
        return _mvtec(root, "visa")
    samples, table = [], pd.read_csv(path)
    for row in table[table["split"] == "test"].itertuples():
        # A category whose folder is absent was not unpacked; one that is there must be complete.
        if (root / row.object).is_dir():
            label = {"normal": 0, "anomaly": 1}[row.label]
            mask = root / row.mask if label else None
            kind = "anomaly" if label else "good"
            samples.append(Sample(root / row.image, mask, nfc(row.object), label, kind))
    return sorted(samples, key=lambda s: (s.category, s.label, s.image_path.name))


def _isic(root: Path) -> Iterator[Sample]:
    images, masks = (root / f"ISBI2016_ISIC_Part1_Test_{part}" for part in ("Data", "GroundTruth"))
    return _samples(_images(images), "skin", 1, "lesion", masks, "_Segmentation")


def _clinicdb(root: Path) -> Iterator[Sample]:
    return _samples(_images(root / "Original"), "colon", 1, "polyp", root / "Ground Truth", "")


def _headct(root: Path) -> list[Sample]:
    table, folder = root / "labels.csv", root / "head_ct" / "head_ct"
    folder = folder if folder.is_dir() else folder.parent
    if not table.is_file():
        return []
    samples = []
    for row in pd.read_csv(table, dtype=str, skipinitialspace=True).itertuples():
        label = {"0": 0, "1": 1}[row.hemorrhage]
        kind = "hemorrhage" if label else "good"
        samples.append(Sample(folder / f"{row.id.zfill(3)}.png", None, "head ct", label, kind))
    return sorted(samples, key=lambda s: s.image_path.name)


def _brainmri(root: Path) -> Iterator[Sample]:
    # The archive holds every image twice: inside this folder and beside it.
    inside = root / "brain_tumor_dataset"
    root = inside if (inside / "yes").is_dir() else root
    yield from _samples(_images(root / "no"), "brain ct", 0, "good")
    yield from _samples(_images(root / "yes"), "brain ct", 1, "tumour")


def _meta_json(path: Path) -> list[Sample]:
    """The list that AdaCLIP, AnomalyCLIP and others write, see ``META``."""
    samples, root = [], path.parent
    for category, rows in json.loads(path.read_text(encoding="utf-8"))["test"].items():
        for row in rows:
            label = {0: 0, 1: 1, "0": 0, "1": 1}[row["anomaly"]]
            mask = root / row["mask_path"] if label and row.get("mask_path") else None
            kind = str(row.get("specie_name") or "anomaly") if label else "good"
            samples.append(Sample(root / row["img_path"], mask, nfc(category), label, kind))
    return sorted(samples, key=lambda s: (s.category, s.image_path))


def _folder(root: Path, normal_folder: str = "") -> list[Sample]:
    """Data set "folder", see `load_dataset`: one category, or else one in each sub-folder."""
    if (root / "meta.json").is_file():
        return _meta_json(root / "meta.json")
    found = scan(root)
    images = for_testing([*found[PHOTOGRAPH], *found.get(BROKEN_LINK, [])], root)
    by_folder = defaultdict(list)
    for path in images:
        by_folder[path.parent].append(path)
    samples = _folder_category(root, by_folder, normal_folder)
    if samples is None:
        folders = dict.fromkeys(root / path.relative_to(root).parts[0] for path in by_folder)
        found = [_folder_category(path, by_folder, normal_folder) for path in folders]
        samples = [sample for category in found if category for sample in category]
    if normal_folder.lower() not in ("", "none") and all(sample.label for sample in samples):
        names = ", ".join(sorted({folder.name for folder in by_folder})[:20])
        raise ValueError(f"{root} has no folder {normal_folder!r}; found {names}")
    if len(images) > 2 * len(samples):
        raise ValueError(
            f"only {len(samples)} of the {len(images)} images of {root} fit a layout: give the folder that holds "
            f"them. {_expected('folder', root)}"
        )
    return samples


def for_testing(photographs: Iterable[Path], root: Path) -> list[Path]:
    """Those that lie in no folder of other images (for training, of objects, ...), sorted."""
    return sorted(p for p in photographs if not NO_TEST_IMAGES & set(p.relative_to(root).parts))


def _folder_category(folder: Path, photographs, normal_folder: str) -> list[Sample] | None:
    """One category, or None if `folder` is not one (see `load_dataset`); ``photographs`` by their folder."""
    tests = [folder / name for name in ("test_public", "test") if (folder / name).is_dir()]
    images = tests[0] if tests else folder
    truth = images if images.name == "test_public" else folder  # MVTec AD 2 has its masks there
    category, flat = nfc(folder.name), photographs.get(images, [])
    classes = {path: found for path, found in photographs.items() if path.parent == images}
    names = [path.name for path in classes]
    if flat and classes:
        raise ValueError(
            f"{images} holds images ({flat[0].name}, ...) beside sub-folders of images: move them into one of these"
        )
    if flat:
        return list(_samples(flat, category, -1, "unknown"))
    normal = normal_name(names, normal_folder)
    words = {word for name in names for word in re.split("[-_ ]", nfc(name).lower())}
    if classes and normal is None and not normal_folder and (tests or words & STATES):
        raise ValueError(
            f"{images} has the sub-folders {', '.join(names[:20])}: which one holds flawless images? Labels are not "
            "guessed: give normal_folder=NAME (--normal-folder on the command line), or none if no image is flawless"
        )
    if normal is None and not tests:
        return None
    masked = (truth / "ground_truth").is_dir()
    return list(_by_defect(classes, category, truth, normal or "", masked))


def normal_name(names: Iterable[str], given: str) -> str | None:
    """Which sub-folder holds normal images, in lower case: "" for none of them, None if that is not known."""
    lower, wanted = [nfc(name).lower() for name in names], nfc(given).lower()
    if wanted == "none" and lower:
        return ""
    known = [name for name in lower if name in ([wanted] if wanted else NORMAL_NAMES)]
    return known[0] if len(known) == 1 or wanted in known else None


# What reading a list that is none, or another one, ends in.
LISTS = (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError)
LISTS += (pd.errors.ParserError, pd.errors.EmptyDataError)
META = 'meta.json: {"test": {category: [{"img_path", "mask_path", "anomaly": 0 or 1}, ...]}}'
# Data set -> its layout in words, and a function that gives the samples below a root.
_BY_DEFECT = "<category>/test/<defect>/NNN.png and <category>/ground_truth/<defect>/NNN_mask.png"
LAYOUTS: dict[str, tuple[str, Callable[[Path], Iterable[Sample]]]] = {
    "mvtec": (_BY_DEFECT, _mvtec),
    "visa": ("split_csv/1cls.csv and <category>/Data/{Images,Masks}/{Anomaly,Normal}/NNN.*", _visa),
    "isic": ("ISBI2016_ISIC_Part1_Test_{Data/*.jpg,GroundTruth/*_Segmentation.png}", _isic),
    "clinicdb": ("Original/N.tif and 'Ground Truth'/N.tif", _clinicdb),
    "headct": ("labels.csv (id, hemorrhage) and head_ct/head_ct/NNN.png", _headct),
    "brainmri": ("brain_tumor_dataset/{no,yes}/", _brainmri),
    "demo": (_BY_DEFECT, partial(_mvtec, name="demo")),
    "demo_aux": (_BY_DEFECT, partial(_mvtec, name="demo_aux")),
    "folder": ("images, {good,<defect>}/, test/<defect>/, or sub-folders of these kinds", _folder),
}


def _folders(folder: Path) -> list[Path]:
    return [path for path in _visible(folder) if path.is_dir()]


def _images(folder: Path) -> list[Path]:
    return [path for path in _visible(folder) if path.suffix.lower() in IMAGE_SUFFIXES]


def _visible(folder: Path) -> list[Path]:
    """Entries sorted by name, without hidden ones (.DS_Store, ._x.png) and archive left-overs."""
    found = folder.iterdir() if folder.is_dir() else []
    kept = [path for path in found if not path.name.startswith((".", "__MACOSX"))]
    return sorted(kept, key=lambda path: path.name)
