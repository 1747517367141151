"""Stand-ins of the paper's six data sets: small synthetic trees in their exact layouts, with their traps.

Nobody can ship the real data sets; everything that reads them is exercised on these. Folder names, category names,
file names, formats, modes and counts are those of the published archives (data/README.md); the pictures are an
ellipse on noise, and a bright rectangle marks an anomaly, so a mask can be checked against its image.
MVTec AD's defect names are not listed there: here they are `first` and `second`.

    python tests/stand_ins.py mvtec outputs/stand_ins/mvtec --fraction 0.1 --width 1024
"""

import argparse
import csv
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from clipad.datasets import expected_counts

ASPECT = {
    "mvtec": 1.0,
    "visa": 2 / 3,
    "isic": 3 / 4,
    "clinicdb": 3 / 4,
    "headct": 0.9,
    "brainmri": 1.2,
}  # height / width
BRAINMRI_COPIES = 25


def make_stand_in(
    name: str, root: Path, fraction: float = 1.0, width: int = 48, seed: int = 0
) -> Path:
    """Write a stand-in of data set `name` under `root` and return it.

    `fraction` of the real counts is written, at least one image per category and label that exists; `width` is the
    images' width in pixels.
    """
    root = Path(root)
    picture = Pictures(width, round(width * ASPECT[name]), seed)
    WRITERS[name](root, counts_of(name, fraction), picture)
    litter(root)
    return root


def counts_of(name: str, fraction: float) -> dict[str, tuple[int, int]]:
    """(normal, anomalous) per category that `make_stand_in` writes."""
    return {
        category: tuple(max(1, round(fraction * n)) if n else 0 for n in pair)
        for category, pair in expected_counts(name).items()
    }


class Pictures:
    """Draws (H x W x 3 image, H x W bool mask) pairs."""

    def __init__(self, width: int, height: int, seed: int):
        self.width, self.height = width, height
        self.random = np.random.default_rng(seed)

    def draw(self, anomalous: bool) -> tuple[np.ndarray, np.ndarray]:
        height, width = self.height, self.width
        y, x = np.mgrid[:height, :width]
        image = self.random.integers(0, 40, (height, width, 3), dtype=np.uint8)
        image[((x / width - 0.5) ** 2 + (y / height - 0.5) ** 2) < 0.2] += 80
        mask = np.zeros((height, width), bool)
        if anomalous:
            h, w = height // 4, width // 4
            top, left = self.random.integers(0, height - h), self.random.integers(0, width - w)
            mask[top : top + h, left : left + w] = True
            image[mask] = 250
        return image, mask


def save(array: np.ndarray, path: Path, mode: str | None = None, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **options)


def litter(root: Path) -> None:
    """What operating systems leave behind, in every folder of the tree."""
    for folder in [root, *(path for path in root.rglob("*") if path.is_dir())]:
        for name in (".DS_Store", "Thumbs.db", "._000.png"):
            (folder / name).write_bytes(b"\x00litter")
    (root / "__MACOSX").mkdir(exist_ok=True)
    (root / "__MACOSX" / "000.png").write_bytes(b"\x00litter")


def _mvtec(root: Path, counts: dict, picture: Pictures) -> None:
    for category, (normal, anomalous) in counts.items():
        folder = root / category
        save(picture.draw(False)[0], folder / "train" / "good" / "000.png")
        for i in range(normal):
            save(picture.draw(False)[0], folder / "test" / "good" / f"{i:03d}.png")
        for i in range(anomalous):
            defect, number = ("first", "second")[i % 2], f"{i // 2:03d}"
            image, mask = picture.draw(True)
            save(image, folder / "test" / defect / f"{number}.png")
            save(
                mask.astype(np.uint8) * 255, folder / "ground_truth" / defect / f"{number}_mask.png"
            )


def _visa(root: Path, counts: dict, picture: Pictures) -> None:
    rows = []
    for category, (normal, anomalous) in counts.items():
        images = Path(category) / "Data" / "Images"
        for i in range(normal + 1):  # the last one belongs to the training split
            name = images / "Normal" / f"{i:04d}.JPG"
            save(picture.draw(False)[0], root / name, quality=95)
            rows.append(
                [category, "train" if i == normal else "test", "normal", name.as_posix(), ""]
            )
        for i in range(anomalous):
            image, mask = picture.draw(True)
            name = images / "Anomaly" / f"{i:03d}.JPG"
            mask_name = Path(category) / "Data" / "Masks" / "Anomaly" / f"{i:03d}.png"
            save(image, root / name, quality=95)
            save(
                mask.astype(np.uint8) * (1 + i % 3), root / mask_name
            )  # class indices, nearly black to the eye
            rows.append([category, "test", "anomaly", name.as_posix(), mask_name.as_posix()])
    (root / "split_csv").mkdir()
    with open(root / "split_csv" / "1cls.csv", "w", newline="") as file:
        csv.writer(file).writerows([["object", "split", "label", "image", "mask"], *rows])


def _isic(root: Path, counts: dict, picture: Pictures) -> None:
    for i in range(counts["skin"][1]):
        image, mask = picture.draw(True)
        save(image, root / "ISBI2016_ISIC_Part1_Test_Data" / f"ISIC_{3 * i:07d}.jpg", quality=95)
        name = f"ISIC_{3 * i:07d}_Segmentation.png"
        save(mask.astype(np.uint8) * 255, root / "ISBI2016_ISIC_Part1_Test_GroundTruth" / name)


def _clinicdb(root: Path, counts: dict, picture: Pictures) -> None:
    for i in range(1, counts["colon"][1] + 1):
        image, mask = picture.draw(True)
        save(image, root / "Original" / f"{i}.tif")
        grey = mask.astype(np.uint8) * 255
        grey[mask] -= picture.random.integers(
            0, 250, int(mask.sum()), dtype=np.uint8
        )  # grey, not only 0 and 255
        save(grey, root / "Ground Truth" / f"{i}.tif")


def _headct(root: Path, counts: dict, picture: Pictures) -> None:
    normal, anomalous = counts["head ct"]
    lines = ["id, hemorrhage"]
    for i in range(anomalous + normal):
        label = int(i < anomalous)
        mode = "RGBA" if i % 17 == 0 else "RGB"
        save(picture.draw(bool(label))[0], root / "head_ct" / "head_ct" / f"{i:03d}.png", mode)
        lines.append(f"{i},{label}")
    (root / "labels.csv").write_text("\n".join(lines) + "\n")


def _brainmri(root: Path, counts: dict, picture: Pictures) -> None:
    # (suffix, mode, format by content): the real archive's mix; most files are plain RGB JPEGs
    kinds = [
        ("jpg", "RGB", "JPEG"),
        ("JPG", "RGB", "JPEG"),
        ("jpeg", "L", "JPEG"),
        ("png", "L", "PNG"),
    ]
    kinds += [("jpg", "RGBA", "PNG"), ("jpg", "P", "PNG")]
    folder = root / "brain_tumor_dataset"
    for label, (kind, count) in enumerate(zip(("no", "yes"), counts["brain ct"], strict=True)):
        stem = "{} no" if kind == "no" else "Y{}"
        copies = round(BRAINMRI_COPIES * count / sum(expected_counts("brainmri")["brain ct"]))
        written = []
        for i in range(count - copies):
            suffix, mode, content = kinds[i if i < len(kinds) else i % 2]
            path = folder / kind / f"{stem.format(i)}.{suffix}"
            save(picture.draw(bool(label))[0], path, mode, format=content)
            written.append(path)
        for i, original in zip(range(count - copies, count), written, strict=False):
            shutil.copy(original, folder / kind / f"{stem.format(i)}{original.suffix}")
    for kind in ("no", "yes"):  # the archive holds everything twice
        shutil.copytree(folder / kind, root / kind)


WRITERS = {
    "mvtec": _mvtec,
    "visa": _visa,
    "isic": _isic,
    "clinicdb": _clinicdb,
    "headct": _headct,
    "brainmri": _brainmri,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=WRITERS)
    parser.add_argument("root", type=Path)
    parser.add_argument("--fraction", type=float, default=1.0)
    parser.add_argument("--width", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(make_stand_in(**vars(arguments)))
