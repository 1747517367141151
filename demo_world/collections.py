"""The demo's collections: `demo` (test) and `demo_aux` (auxiliary, other categories), in MVTec-AD's layout.

``python -m demo_world.collections`` renders both again into ``data/demo/collections``: the same pixels from the
same seeds (and with the same version of Pillow the same bytes). Besides MVTec-AD's folders ``test`` and
``ground_truth`` each category has ``object``, with the object's mask for every picture. There is no ``train``.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from clipad.datasets import expected_counts
from clipad.published import data_dir
from demo_world.renderer import CATEGORIES, DEFECTS, Rendering, draw_attribute, render

# Two disjoint groups of 8 categories: the test collection holds all those that the model never saw defective
# (`renderer.NEVER_DEFECTIVE`), so that every test on it is zero-shot; the auxiliary one those that it did.
GROUPS = {name: tuple(expected_counts(name)) for name in ("demo", "demo_aux")}
NORMAL_PER_CATEGORY = ANOMALOUS_PER_CATEGORY = 20

# A picture's generator is seeded by (seed, category, number), so no picture depends on another.
SHIPPED_SEED = 5000
VALIDATION_SEED = 6000  # chooses the checkpoint in training; not shipped


def render_category(category: str, seed: int) -> Iterator[tuple[str, int, Rendering]]:
    """20 pictures without and 20 with a defect, the 8 defects in turn: (folder name, number in it, rendering)."""
    names = list(DEFECTS)
    numbers = dict.fromkeys(["good", *names], 0)
    for index in range(NORMAL_PER_CATEGORY + ANOMALOUS_PER_CATEGORY):
        rng = np.random.default_rng([seed, list(CATEGORIES).index(category), index])
        defect = (
            None
            if index < NORMAL_PER_CATEGORY
            else names[(index - NORMAL_PER_CATEGORY) % len(names)]
        )
        folder = defect or "good"
        yield folder, numbers[folder], render(rng, category, defect, draw_attribute(rng))
        numbers[folder] += 1


def write_category(root: Path, category: str, seed: int = SHIPPED_SEED) -> None:
    """Write `render_category` below ``root/category`` as optimised PNG files, masks with one bit a pixel."""
    for folder, number, rendering in render_category(category, seed):
        files = {
            f"test/{folder}/{number:03d}.png": rendering.image,
            f"object/{folder}/{number:03d}_object.png": rendering.object_mask,
        }
        if folder != "good":
            files[f"ground_truth/{folder}/{number:03d}_mask.png"] = rendering.mask
        for name, pixels in files.items():
            path = root / category / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m demo_world.collections", description=__doc__.split("\n\n")[0]
    )
    default = data_dir() / "demo" / "collections"
    parser.add_argument(
        "--output", type=Path, default=default, help="folder to write to (default: %(default)s)"
    )
    parser.add_argument(
        "--validation",
        action="store_true",
        help="render the validation pictures, which choose the checkpoint and are not shipped; needs --output",
    )
    arguments = parser.parse_args()
    if arguments.validation and arguments.output == default:
        parser.error(
            "--validation would overwrite the shipped collections: say where with --output"
        )
    seed = VALIDATION_SEED if arguments.validation else SHIPPED_SEED
    for name, categories in GROUPS.items():
        for category in tqdm(categories, desc=name):
            write_category(arguments.output / name, category, seed)


if __name__ == "__main__":
    main()
