"""Notebook 03: one line of a function changed, where patches look, variants of the dual path on a whole data set.

The method itself, and each change to it, is written in the notebook.
"""

import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from IPython.display import Markdown, display
from tqdm import tqdm

from clipad.backbone import Backbone
from clipad.datasets import Dataset
from clipad.detectors import class_probability
from clipad.dual_path import attention_weights, embed_patches
from clipad.evaluation import batches


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
def attention_by_block(visual, images: torch.Tensor) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Per block q-k and v-v attention weights on the ordinary path, mean over heads, B x (N+1) x (N+1) each."""
    x = visual.ln_pre(embed_patches(visual, images))
    for block in visual.transformer.resblocks:
        q_k, v_v = attention_weights(block, x)
        yield q_k.float().cpu().numpy(), v_v.float().cpu().numpy()
        x = block(x)


@torch.no_grad()
def run_variants(
    backbone: Backbone, dataset: Dataset, variants: Mapping[Any, tuple]
) -> tuple[dict[Any, torch.Tensor], torch.Tensor]:
    """Patch values of every variant, images x N, and class probabilities, in the data set's order.

    ``variants``: name -> (path, which, score, texts). ``path(visual, images)`` makes of images B x 3 x S x S a list of
    stage features B x (N+1) x C; ``score(features, text)`` of the ``which`` of these (a slice), and of the category's
    text C x 2, patch values B x N. A path that several share runs once. The last class token of the first path, under
    the first texts, gives the class probability.
    """
    paths = dict.fromkeys(path for path, *_ in variants.values())
    first, *_, first_texts = next(iter(variants.values()))
    values, probabilities = {name: [] for name in variants}, []
    found = batches(backbone, list(dataset))
    for category, images in tqdm(found, f"{len(paths)} paths", unit="batch"):
        with backbone.autocast():
            features = {path: path(backbone.tower, images) for path in paths}
        features = {path: [f.float() for f in stages] for path, stages in features.items()}
        for name, (path, which, score, texts) in variants.items():
            text = texts[category].to(images.device)
            values[name].append(score(features[path][which], text).cpu())
        text = first_texts[category].to(images.device)
        probabilities.append(class_probability(features[first][-1][:, 0], text).cpu())
    return {name: torch.cat(parts) for name, parts in values.items()}, torch.cat(probabilities)
