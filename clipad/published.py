"""Published numbers and published hyper-parameters, each with its source."""

import os
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from clipad.io.files import did_you_mean

# On whose test split the layers of SDP+ were trained (METHOD.md section 6); for the demo and for own images what
# comes closest.
TRAINED_ON = {
    "mvtec": "visa",
    "visa": "mvtec",
    "headct": "visa",
    "brainmri": "visa",
    "isic": "mvtec",
    "clinicdb": "mvtec",
    "demo": "demo_aux",
    "demo_aux": "demo",
    "folder": "visa",
}


@dataclass(frozen=True)
class Protocol:
    """The hyper-parameters with which results on one data set were published (METHOD.md sections 1, 2, 5, 6)."""

    dataset: str
    trained_on: str  # the data set whose test split trained the layers of SDP+
    rvs_options: dict
    smoothing_240_sdp_plus: float
    learning_rate: float
    model: str  # open_clip's name, or "demo"
    pretrained: str | None  # open_clip's tag; the demo brings its weights
    rvs: str = "dbscan"
    smoothing_240: float = 8.0  # sigma in pixels of a 240-pixel side; scale it with the side
    stages: tuple[int, ...] = (3, 6, 9, 12)  # 1-based blocks after which a stage is read
    epochs: int = 5
    shuffle: bool = False  # in training


def protocol(dataset: str) -> Protocol:
    """The published hyper-parameters for a data set; for ``demo``, ``demo_aux`` and ``folder`` what comes closest.
    ValueError for any other name.

    >>> protocol("visa").rvs_options, protocol("visa").trained_on
    ({'eps': 1.5, 'min_samples': 25}, 'mvtec')
    """
    if dataset not in TRAINED_ON:
        hint = did_you_mean(dataset, TRAINED_ON)
        raise ValueError(f"unknown data set {dataset!r}{hint}. Known: {', '.join(TRAINED_ON)}")
    visa, demo = dataset == "visa", dataset in ("demo", "demo_aux")
    return Protocol(
        dataset=dataset,
        trained_on=TRAINED_ON[dataset],
        # VisA's is nearly always the mean: unit vectors are at most 2 apart.
        rvs_options={"eps": 1.5, "min_samples": 25} if visa else {"eps": 0.5, "min_samples": 15},
        smoothing_240_sdp_plus=2.0 if visa else 8.0,
        # Nothing is published for the demo: with the released program's 5 epochs in its fixed order this and 1e-2 had
        # the highest pixel AUROC on the validation rendering. ``python -m demo_world.sdp_plus`` repeats the search.
        learning_rate=3e-3 if demo else 1e-4,
        model="demo" if demo else "ViT-B-16-plus-240",
        pretrained=None if demo else "laion400m_e31",
    )


def published_results(dataset: str | None = None) -> pd.DataFrame:
    """The published numbers that could be found, from ``data/published_results.csv``; one row for each number.

    ``dataset``: only this one. Columns: method, dataset, category (or "mean"), level ("image", "pixel"), metric
    ("auroc", "f1_max", "ap", "pro"), value (a fraction), kind ("published" by the authors, "derived" from what they
    state, "run by others") and source. Raises ValueError for an unknown data set.
    """
    table = pd.read_csv(data_dir() / "published_results.csv").rename(columns={"percent": "value"})
    table["value"] = (table["value"] / 100).round(6)  # rounded: 0.918, not 0.9179999999999999
    if dataset is not None:
        table = table[table["dataset"] == protocol(dataset).dataset]
    return table.reset_index(drop=True)


def data_dir() -> Path:
    """The folder ``data/`` with the demo collections and the published results: ``$CLIPAD_DATA``, else the folder
    beside the package (an editable install has it). Raises FileNotFoundError with what to do."""
    named = os.environ.get("CLIPAD_DATA")
    folder = Path(named).expanduser() if named else Path(__file__).resolve().parents[1] / "data"
    # A folder that merely happens to be called data must not be taken for ours.
    if not folder.is_dir() or not (named or (folder / "published_results.csv").is_file()):
        raise FileNotFoundError(
            f"there is no clipad data folder at {folder}: install from a checkout with `pip install -e .`, or set the "
            "environment variable CLIPAD_DATA to the folder `data` of a checkout"
        )
    return folder
