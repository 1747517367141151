"""``python -m clipad.demo.model_card`` prints the results table of ``data/demo/README.md`` (about a minute).

Image AUROC of the class probability, mean vector, of the shipped model: on the shipped pictures with a bootstrap
interval, and on the same categories rendered from five other seeds.
"""

import json

import numpy as np
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

from clipad import load_backbone
from clipad.demo.collections import GROUPS, SHIPPED_SEED
from clipad.demo.training import anomaly_scores, image_aurocs, rendered
from clipad.published import data_dir

OTHER_SEEDS = (7001, 7002, 7003, 7004, 7005)
RESAMPLINGS = 2000


def bootstrap_aurocs(scores: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """AUROCs of resampled images, normal and anomalous ones drawn apart: RESAMPLINGS."""
    anomalous, normal = scores[labels == 1], scores[labels == 0]
    # AUROC: share of the pairs in which the anomalous image scores higher, ties counting half
    higher = (np.sign(anomalous[:, None] - normal) + 1) / 2
    counts = [rng.multinomial(n, np.full(n, 1 / n), RESAMPLINGS) / n for n in higher.shape]
    return np.einsum("ra,an,rn->r", counts[0], higher, counts[1])


def main() -> None:
    backbone = load_backbone("demo")
    model, tokenizer = backbone.model, backbone.tokenizer
    training = json.loads((data_dir() / "demo" / "model" / "training.json").read_text(encoding="utf-8"))
    hidden = training["never_defective"]

    rng = np.random.default_rng(0)
    shipped, resampled = {}, {}
    for category, (images, labels) in tqdm(rendered(SHIPPED_SEED).items(), desc="shipped"):
        scores = anomaly_scores(model, tokenizer, images, category)
        shipped[category] = roc_auc_score(labels, scores)
        resampled[category] = bootstrap_aurocs(scores, labels, rng)
    others = [
        image_aurocs(model, tokenizer, rendered(seed)) for seed in tqdm(OTHER_SEEDS, desc="other seeds")
    ]

    def row(name: str, categories) -> str:
        low, high = np.quantile(np.mean([resampled[c] for c in categories], axis=0), [0.025, 0.975])
        elsewhere = [np.mean([aurocs[c] for c in categories]) for aurocs in others]
        value = np.mean([shipped[c] for c in categories])
        spread = f"{np.mean(elsewhere):.3f} ± {np.std(elsewhere, ddof=1):.3f}"
        return f"| {name} | {value:.3f} | {low:.3f} to {high:.3f} | {spread} |"

    for name, group in GROUPS.items():
        print(
            f"\n| `{name}` | image AUROC | 95 % interval | five other seeds: mean ± deviation |\n|---|---|---|---|"
        )
        for category in group:
            print(row(category + (" (never defective)" if category in hidden else ""), [category]))
        print(row("**mean**", group))
        print(row("mean, never defective", [c for c in group if c in hidden]))
        print(row("mean, the others", [c for c in group if c not in hidden]))


if __name__ == "__main__":
    main()
