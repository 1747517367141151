"""Small data sets that tests write, and how to compare folders of results."""

import numpy as np
from PIL import Image

from clipad.datasets import load_dataset

TRAINING = {"rvs": "mean", "batch_size": 4, "learning_rate": 1e-2, "progress": False}
"""of SDP+'s layers, small"""


def make_folder(root, categories=("bolt", "câble noir"), normal=3, anomalous=4, side=40):
    """A small data set in MVTec layout, non-square, with a name that has a space and an accent."""
    rng = np.random.default_rng(0)
    for category in categories:
        for defect, count in (("good", normal), ("dent", anomalous)):
            for i in range(count):
                path = root / category / "test" / defect / f"{i:03d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 256, (side, side + 8, 3), dtype=np.uint8)).save(
                    path
                )
                if defect != "good":
                    mask = np.zeros((side, side + 8), np.uint8)
                    mask[5 : 15 + i, 8:20] = 255
                    where = root / category / "ground_truth" / defect / f"{i:03d}_mask.png"
                    where.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(mask).save(where)
    return load_dataset("folder", root, normal_folder="" if normal else "none")


def make_collection(root, categories=("bolt", "nail"), per_kind=3, size=40):
    """Grey pictures, the anomalous ones with a bright square and its mask, in MVTec-AD's layout."""
    rng = np.random.default_rng(0)
    for category in categories:
        for kind in ("good", "square"):
            for number in range(per_kind):
                pixels = rng.integers(60, 120, (size, size, 3), dtype=np.uint8)
                path = root / category / "test" / kind / f"{number:03d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                if kind == "square":
                    mask = np.zeros((size, size), np.uint8)
                    x, y = rng.integers(0, size // 2, 2)
                    mask[y : y + size // 3, x : x + size // 3] = 255
                    pixels[mask > 0] = 230
                    mask_path = root / category / "ground_truth" / kind / f"{number:03d}_mask.png"
                    mask_path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(mask).save(mask_path)
                Image.fromarray(pixels).save(path)
    return load_dataset("folder", root)


def files_of(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }
