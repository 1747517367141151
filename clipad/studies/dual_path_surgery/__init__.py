"""Notebook 03: variants of the dual path on a whole data set, and what a map reaches that knows nothing (controls).

The method itself, and each change to it, is written in the notebook. Here is what runs it over all images and scores
it. Shapes: B images, N patch tokens, C joint width, S the image's side.
"""

import inspect
import textwrap
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pandas as pd
import torch
from IPython.display import Markdown, display
from tqdm import tqdm

from clipad.datasets import Dataset
from clipad.detectors import class_probability
from clipad.evaluation import batches
from clipad.studies.common import METRICS, Scores, labelled, scores_of, thinned
from clipad.studies.opposite_predictions import shuffled_states, untrained
from clipad.surgery import similarity_map

Variant = tuple[Callable, slice, Callable]
"""(path, which of its stage features, score): ``path(visual, images)`` makes of images B x 3 x S x S a list of stage
features B x (N+1) x C, ``score(features, text)`` of some of these, and text C x 2, patch values B x N"""


def with_line(function: Callable, old: str, new: str) -> Callable:
    """The same function with one line of its source replaced; shows both.

    Raises ValueError unless ``old`` is there exactly once.
    """
    source, name = textwrap.dedent(inspect.getsource(function)), function.__name__
    if source.count(old) != 1:
        raise ValueError(f"{old!r} is {source.count(old)} times in {name}, expected once")
    changed = dict(function.__globals__)
    exec(source.replace(old, new), changed)
    display(Markdown(f"```diff\n- {old}\n+ {new}\n```"))
    return changed[name]


@torch.no_grad()
def run_variants(
    backbone, dataset: Dataset, variants: Mapping[Any, tuple]
) -> tuple[dict[Any, torch.Tensor], torch.Tensor]:
    """Patch values of every variant (images x N) and the class probabilities, in the data set's order.

    ``variants``: name -> :data:`Variant` and its texts (category -> C x 2). A path that several share runs once. The
    last class token of the first path, under the first texts, gives the class probability.
    """
    paths = dict.fromkeys(path for path, *_ in variants.values())
    first, *_, first_text = next(iter(variants.values()))
    values, probabilities = {name: [] for name in variants}, []
    found = batches(backbone, list(dataset))
    for category, images in tqdm(found, f"{len(paths)} paths", unit="batch"):
        with backbone.autocast():
            features = {path: path(backbone.tower, images) for path in paths}
        features = {path: [f.float() for f in stages] for path, stages in features.items()}
        for name, (path, which, scored, texts) in variants.items():
            text = texts[category].to(images.device)
            values[name].append(scored(features[path][which], text).cpu())
        text = first_text[category].to(images.device)
        probabilities.append(class_probability(features[first][-1][:, 0], text).cpu())
    return {name: torch.cat(parts) for name, parts in values.items()}, torch.cat(probabilities)


def smooth_maps(values: torch.Tensor, image_size: int) -> np.ndarray:
    """Patch values B x N -> maps B x S x S with SDP's smoothing, 8 pixels per 240."""
    return similarity_map(values, image_size, 8 / 240 * image_size).numpy()


def score_variants(
    run, values: Mapping[str, torch.Tensor], probabilities: torch.Tensor, resamples: int
) -> Scores:
    """All metrics of every variant on the same draws, of maps smoothed like SDP's."""
    size, p = run.backbone.image_size, probabilities.numpy()
    data = labelled(run.dataset, size)

    def scored(own: torch.Tensor) -> dict:  # one variant at a time: the maps of all fill the memory
        maps = smooth_maps(own, size)
        return data.metrics_by_category(maps, p, resamples=resamples, seed=run.seed)

    with ThreadPoolExecutor(2) as pool:
        found = list(tqdm(pool.map(scored, values.values()), "metrics", len(values)))
    return scores_of(dict(zip(values, found, strict=True)), METRICS, resamples, run.seed)


def control_aurocs(
    run, variants: Mapping[str, Variant], texts: Mapping, draws: int = 50, per_category: int = 10
) -> pd.DataFrame:
    """What variants reach that know nothing: a row per draw, ``control``, and pixel AUROC (mean) per variant.

    ``found``: the model and the texts at hand, on ``per_category`` images of each category, as all rows. ``shuffled
    states``: the sentences dealt to the two states at random. ``untrained``: an image encoder with random weights.
    """
    size = run.backbone.image_size
    data = labelled(thinned(run.dataset, per_category), size)
    rvs, seeds = (run.protocol.rvs, run.protocol.rvs_options), range(run.seed, run.seed + draws)
    dealt = shuffled_states(run.backbone, run.prompts, data.dataset.categories, *rvs, seeds)
    compared = [
        ("found", run.backbone, [texts]),
        ("shuffled states", run.backbone, dealt),
        *(("untrained", untrained(run.backbone, run.seed + i), [texts]) for i in range(3)),
    ]
    tables = []
    for control, backbone, several in compared:
        tries = {
            (number, name): (*variant, text)
            for name, variant in variants.items()
            for number, text in enumerate(several)
        }
        values, p = run_variants(backbone, data.dataset, tries)
        aurocs = {
            place: data.mean_metrics(smooth_maps(own, size), p.numpy())["pixel_auroc"]
            for place, own in values.items()
        }
        tables.append(pd.Series(aurocs).unstack().assign(control=control))
    return pd.concat(tables, ignore_index=True)
