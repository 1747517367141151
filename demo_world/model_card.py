"""``python -m demo_world.model_card`` prints the results table of ``data/demo/README.md`` (some minutes on a CPU).

Image AUROC of the class probability and pixel AUROC of SDP, mean vector, of the shipped model: on the shipped
pictures with a bootstrap interval, and on the same categories rendered from five other seeds.
"""

import numpy as np
import torch
from tqdm import tqdm

from clipad import SDP, load_backbone
from clipad.metrics import draw_counts, resampled_metrics
from demo_world.collections import GROUPS, SHIPPED_SEED, render_category
from demo_world.renderer import CATEGORIES
from demo_world.training import normalised

OTHER_SEEDS = (7001, 7002, 7003, 7004, 7005)
RESAMPLINGS = 1000
HEAD = """
| `{}` | image AUROC | 95 % interval | five other seeds | SDP, pixel AUROC | 95 % interval | five other seeds |
|---|---|---|---|---|---|---|"""


def measured(sdp: SDP, category: str, seed: int, resamplings: int = 0) -> np.ndarray:
    """(1 + R) x 2: image AUROC of the class probability and pixel AUROC of the map, of the pictures and of R
    resamplings of them."""
    renderings = [rendering for _, _, rendering in render_category(category, seed)]
    found = sdp.predict(
        normalised(torch.from_numpy(np.stack([r.image for r in renderings]))), category
    )
    masks = np.stack([r.mask for r in renderings])
    labels = masks.any(axis=(1, 2))
    # Drawn anew in each category: shared draws would add up their errors in the mean.
    rng = np.random.default_rng([seed, list(CATEGORIES).index(category)])
    counts = draw_counts(labels, resamplings, rng)
    image = resampled_metrics(found.probabilities.numpy(), labels, counts)["auroc"]
    return np.stack([image, resampled_metrics(found.maps.numpy(), masks, counts)["auroc"]], axis=1)


def main() -> None:
    sdp = SDP(load_backbone("demo", device="cpu"), rvs="mean")
    categories = [category for group in GROUPS.values() for category in group]
    shipped = {
        c: measured(sdp, c, SHIPPED_SEED, RESAMPLINGS) for c in tqdm(categories, desc="shipped")
    }
    others = {
        c: np.stack([measured(sdp, c, seed)[0] for seed in OTHER_SEEDS])
        for c in tqdm(categories, desc="other seeds")
    }

    def row(name: str, chosen) -> str:
        here = np.mean([shipped[c] for c in chosen], axis=0)
        elsewhere = np.mean([others[c] for c in chosen], axis=0)
        cells = []
        for i in range(2):
            low, high = np.quantile(here[1:, i], [0.025, 0.975])
            spread = f"{elsewhere[:, i].mean():.3f} ± {elsewhere[:, i].std(ddof=1):.3f}"
            cells += [f"{here[0, i]:.3f}", f"{low:.3f} to {high:.3f}", spread]
        return f"| {name} | {' | '.join(cells)} |"

    for name, group in GROUPS.items():
        textures = [category for category in group if CATEGORIES[category].is_texture]
        print(HEAD.format(name))
        for category in group:
            print(row(category, [category]))
        print(row("**mean**", group))
        print(row("mean of textures", textures))
        print(row("mean of objects", [c for c in group if c not in textures]))


if __name__ == "__main__":
    main()
