"""Hyper-parameters of SDP+ for the demo, chosen on the validation rendering, which is not shipped.

``python -m demo_world.sdp_plus`` trains on each of its two collections, tests on the other, and prints the pixel
metrics of SDP+ (mean over categories) for each choice, the best first: by pixel AUROC, mean over both directions.
What it found stands in ``clipad/published.py``. Five minutes on two cores.
"""

import itertools
import tempfile
from pathlib import Path

import pandas as pd

from clipad.backbone import load_backbone
from clipad.datasets import load_dataset
from clipad.detectors import SDP, SDPPlus
from clipad.studies.sdp_plus_fine_tuning import hold, mean_metrics
from clipad.training import load_layers, train
from demo_world.collections import GROUPS, VALIDATION_SEED, write_category

LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
EPOCHS = (2, 5, 10)


def search(folder: Path) -> pd.DataFrame:
    """A row per direction, learning rate, order and number of epochs."""
    for name, categories in GROUPS.items():
        for category in categories:
            write_category(folder / name, category, VALIDATION_SEED)
    backbone = load_backbone("demo")
    data = {name: load_dataset(name, folder / name) for name in GROUPS}
    rows = []
    for tested, trained in itertools.permutations(GROUPS):
        held = hold(SDP(backbone), data[tested])
        for rate, shuffle in itertools.product(LEARNING_RATES, (False, True)):
            out = folder / f"{trained}-{rate}-{shuffle}"
            options = {"learning_rate": rate, "shuffle": shuffle, "progress": False}
            found = train(backbone, data[trained], out, epochs=max(EPOCHS), **options)
            for epochs in EPOCHS:
                layers = load_layers(found.checkpoints[epochs - 1])
                row = {
                    "tested": tested,
                    "learning_rate": rate,
                    "shuffle": shuffle,
                    "epochs": epochs,
                }
                rows.append(row | mean_metrics(SDPPlus(backbone, layers), held))
    return pd.DataFrame(rows)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        table = search(Path(temporary))
    means = table.groupby(["learning_rate", "shuffle", "epochs"]).mean(numeric_only=True)
    print(
        means.filter(like="pixel").sort_values("pixel_auroc", ascending=False).round(4).to_string()
    )
