"""Hyper-parameters of SDP+ for the demo, chosen on the validation rendering, which is not shipped.

``python -m demo_world.sdp_plus`` trains on the categories of ``demo_aux``, tests on those of ``demo`` (as the notebooks
do), and prints the pixel metrics of SDP+ (mean over categories) for each choice, the best pixel AUROC first. What was
chosen stands in ``clipad/published.py``. Five minutes on one core.
"""

import itertools
import tempfile
from pathlib import Path

import pandas as pd

from clipad.backbone import load_backbone
from clipad.datasets import load_dataset
from clipad.detectors import SDPPlus
from clipad.evaluation import evaluate
from clipad.training import load_layers, train
from demo_world.collections import GROUPS, VALIDATION_SEED, write_category

LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
EPOCHS = (2, 5, 10)


def search(folder: Path) -> pd.DataFrame:
    """A row per learning rate, order and number of epochs; `folder` takes pictures and checkpoints."""
    for name, categories in GROUPS.items():
        for category in categories:
            write_category(folder / name, category, VALIDATION_SEED)
    backbone = load_backbone("demo", device="cpu")
    data = {name: load_dataset(name, folder / name) for name in GROUPS}
    rows = []
    for rate, shuffle in itertools.product(LEARNING_RATES, (False, True)):
        options = {"learning_rate": rate, "shuffle": shuffle, "epochs": max(EPOCHS)}
        found = train(backbone, data["demo_aux"], folder / f"{rate}-{shuffle}", **options)
        for epochs in EPOCHS:
            detector = SDPPlus(backbone, load_layers(found.checkpoints[epochs - 1]))
            mean = evaluate(detector, data["demo"], progress=False).table.loc["mean"]
            rows.append(options | {"epochs": epochs} | mean.filter(like="pixel").to_dict())
    return pd.DataFrame(rows)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        table = search(Path(temporary))
    table = table.sort_values("pixel_auroc", ascending=False).round(4)
    print(table.to_string(index=False))
