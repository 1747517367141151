"""Notebook 03: variants of the dual path on a whole data set, where patches look, and what knows nothing (controls).

The method itself, and each change to it, is written in the notebook. Here is what runs it over all images and scores
it. Shapes: B images, N patch tokens, C joint width, S the image's side.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from IPython.display import Markdown, display
from tqdm import tqdm

from clipad.datasets import Dataset
from clipad.detectors import class_probability
from clipad.evaluation import batches, read_masks
from clipad.metrics import pixel_metrics, within_image
from clipad.studies.common import (
    METRIC_NAMES,
    METRICS,
    Scores,
    chosen_by_rule,
    groups,
    keep,
    labelled,
    scores_of,
    thinned,
    worst_median_best,
)
from clipad.studies.opposite_predictions import (
    Example,
    Truth,
    attention_on_defect,
    encoded,
    example_of,
    shuffled_states,
    untrained,
)
from clipad.surgery import similarity_map

Variant = tuple[Callable, slice, Callable]
"""(path, which of its stage features, score): ``path(visual, images)`` makes of images B x 3 x S x S a list of stage
features B x (N+1) x C, ``score(features, text)`` of some of these, and text C x 2, patch values B x N"""


def with_line(function: Callable, old: str, new: str) -> Callable:
    """The same function with one line of its source replaced; shows both lines.

    Raises ValueError unless exactly one line of the source is ``old`` (spaces and comments at its ends do not count).
    """
    lines = textwrap.dedent(inspect.getsource(function)).splitlines()
    at = [i for i, line in enumerate(lines) if line.split("  #")[0].strip() == old]
    if len(at) != 1:
        raise ValueError(f"{len(at)} lines of {function.__name__} are {old!r}, expected 1")
    indent = lines[at[0]][: -len(lines[at[0]].lstrip())]
    lines[at[0]] = indent + new
    found = dict(function.__globals__)
    exec(compile("\n".join(lines), f"<{function.__name__}, changed>", "exec"), found)
    display(Markdown(f"```diff\n- {old}\n+ {new}\n```"))
    return found[function.__name__]


def median_example(run, detector, category: str) -> Example:
    """By rule: the anomalous image of a category that a detector maps with median quality.

    Quality: pixel AUROC inside the image, or without masks the map's maximum. The first category where the data set
    does not have this one.
    """
    category = category if category in run.dataset.categories else run.dataset.categories[0]
    kept = keep(detector, run.dataset.select(category))
    chosen = list(chosen_by_rule(kept, kept.maps(detector)).values())
    return example_of(run, kept.dataset[chosen[min(1, len(chosen) - 1)]])


@torch.no_grad()
def run_variants(
    backbone, dataset: Dataset, variants: Mapping[Any, tuple], batch_size: int = 16
) -> tuple[dict[Any, torch.Tensor], torch.Tensor]:
    """Patch values of every variant (N images x N patches) and the class probabilities, in the data set's order.

    ``variants``: name -> :data:`Variant` and its texts (category -> C x 2). A path that several share runs once. The
    last class token of the first path, under the first texts, gives the class probability.
    """
    paths = dict.fromkeys(path for path, *_ in variants.values())
    first, *_, first_text = next(iter(variants.values()))
    values, probabilities = {name: [] for name in variants}, []
    found = batches(backbone, list(dataset), batch_size)
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
    size = run.backbone.image_size
    data = labelled(run.dataset, size)

    # One variant at a time: maps of all would fill the memory.
    def scored(patch_values: torch.Tensor):
        maps = smooth_maps(patch_values, size)
        return data.metrics_by_category(
            maps, probabilities.numpy(), resamples=resamples, seed=run.seed
        )

    with ThreadPoolExecutor(2) as pool:
        found = pool.map(scored, values.values())
        found = list(tqdm(found, "metrics", len(values), unit="variant"))
    return scores_of(dict(zip(values, found, strict=True)), METRICS, resamples, run.seed)


def by_group(scores: Scores, metric: str) -> pd.DataFrame:
    """A row per variant, in percent and points with one decimal.

    ``mean``, then the difference to *as written* for ``textures``, ``objects`` and ``all``, and that of the ``worst``
    and the ``best`` category.
    """
    values = 100 * pd.DataFrame({m: scores.table(m)[metric][:-1] for m in scores.methods})
    gain = values.sub(values["as written"], axis=0)
    columns = {"mean": values.mean()}
    columns |= {name: gain.loc[own].mean() for name, own in groups(scores.categories).items()}
    columns |= {"all": gain.mean(), "worst": gain.min(), "best": gain.max()}
    table = pd.DataFrame(columns).rename_axis(METRIC_NAMES[metric])
    return table.round(1) + 0.0  # no -0.0


# Where patches look ---------------------------------------------------------------------------------------------


def defect_attention(backbone, dataset: Dataset, per_category: int = 8) -> pd.DataFrame:
    """:func:`attention_on_defect` for some anomalous images of each category.

    Here a patch is of the defect when the mask covers more than half of it.
    """
    few = thinned(dataset, 2 * per_category)
    few = replace(few, samples=tuple(s for s in few if s.label == 1))
    truth = Truth(few, read_masks(list(few), backbone.image_size), None)
    labels = (truth.shares(backbone.visual.grid_size[0]) > 0.5).astype(int)
    return attention_on_defect(backbone, truth, labels)


def attention_frames(trained: pd.DataFrame, untrained: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """One frame per kind of attention for :func:`clipad.studies.common.scores_of_images`: mean over blocks, per image.

    ``trained``: the table of the model at hand, ``untrained``: that of the same architecture with random weights.
    """
    frames = {}
    for table, ending in ((trained, ""), (untrained, ", untrained")):
        by_image = table.groupby(["category", "image"], sort=False)
        for kind in ("q-k", "v-v"):
            frames[kind + ending] = by_image[kind].mean().rename("share").reset_index()
    return frames


# Controls -------------------------------------------------------------------------------------------------------


def control_aurocs(
    run,
    variants: Mapping[str, Variant],
    texts: Mapping[str, torch.Tensor],
    draws: int = 50,
    per_category: int = 10,
) -> pd.DataFrame:
    """What variants reach that know nothing: a row per draw, ``control``, and pixel AUROC (mean) per variant.

    ``found``: the model and the texts at hand, on ``per_category`` images of each category, as all rows. ``shuffled
    states``: the sentences dealt to the two states at random. ``untrained``: an image encoder with random weights.
    """
    dataset = thinned(run.dataset, per_category)
    masks = read_masks(list(dataset), run.backbone.image_size)
    sentences = encoded(run.backbone, run.prompts, dataset.categories)
    rvs = (run.protocol.rvs, run.protocol.rvs_options)
    dealt = [shuffled_states(sentences, *rvs, run.seed + draw) for draw in range(draws)]
    tables = [_aurocs(run.backbone, dataset, masks, variants, [texts, *dealt])]
    for seed in range(run.seed, run.seed + 3):
        tables.append(_aurocs(untrained(run.backbone, seed), dataset, masks, variants, [texts]))
    table = pd.concat(tables, ignore_index=True)
    table.insert(0, "control", ["found", *["shuffled states"] * draws, *["untrained"] * 3])
    return table


def _aurocs(backbone, dataset, masks, variants, texts) -> pd.DataFrame:
    """Pixel AUROC, mean over categories: a row per text, all tried on the features of one pass."""
    tries = {
        (number, name): (*variant, text)
        for name, variant in variants.items()
        for number, text in enumerate(texts)
    }
    category = np.array([s.category for s in dataset])
    own, found = [category == c for c in dataset.categories], {}
    for place, values in run_variants(backbone, dataset, tries)[0].items():
        maps = smooth_maps(values, backbone.image_size)
        found[place] = np.nanmean([pixel_metrics(maps[at], masks[at])["auroc"] for at in own])
    return pd.Series(found).unstack()[list(variants)]


def by_difference(run, values: torch.Tensor, others: torch.Tensor) -> list[int]:
    """Positions of the anomalous images where a variant loses most, gains as the median, and gains most.

    ``values``, ``others``: patch values, images x patches; the measure is the pixel AUROC inside the image.
    """
    size, samples = run.backbone.image_size, list(run.dataset)
    at = np.array([i for i, s in enumerate(samples) if s.label == 1])
    masks = read_masks([samples[i] for i in at], size)
    inside = [within_image(smooth_maps(v[at], size), masks) for v in (values, others)]
    return [int(at[i]) for i in worst_median_best(inside[0] - inside[1])]
