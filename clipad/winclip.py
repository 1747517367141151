"""WinCLIP (Jeong et al., CVPR 2023), zero-shot: the baseline of the paper (METHOD.md section 8).

A window of k x k patches is encoded as if it were an image: class token and the window's tokens go through the frozen
transformer on their own. So every window gets an embedding in the joint space that was trained for whole images, and a
score; a patch takes the harmonic mean of the scores of all windows that cover it.

Shapes: B images, N patches (a G x G grid), W = (G - k + 1)^2 windows of size k, C joint width.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F

from clipad.detectors import Detector, Features, Prediction
from clipad.dual_path import embed_patches, join_heads, queries_keys_values
from clipad.prompts import WINCLIP
from clipad.surgery import cosine, similarity_map

TEMPERATURE = 0.07
SIZES = (2, 3)
"""sides of the windows, in patches; the third scale of the paper is the whole image"""
_TOKENS = 4096
"""tokens that go through the transformer at once on a CPU, where memory is what counts; on a GPU 16 times as many"""


class WinCLIP(Detector):
    """Scores of windows of 2 x 2 and 3 x 3 patches and of the whole image, combined by harmonic means.

    ``prompts``: None for WinCLIP's own ensemble, whose sentence embeddings are averaged per state *before* they are
    normalised. There is no smoothing, and the image score is the class probability alone, softmax(cos / 0.07).
    """

    name = "WinCLIP"
    map_in_image_score = False

    def __init__(self, backbone, prompts=None):
        super().__init__(backbone, prompts or WINCLIP, rvs="mean", smoothing=0)

    def text_vectors(self, category):
        if category not in self._text:
            states = [self.backbone.encode_text(s).mean(dim=0) for s in self.prompts.sentences(category)]
            self._text[category] = F.normalize(torch.stack(states, dim=1), dim=0)
        return self._text[category]

    def _features(self, images):
        """``image_embedding`` B x C, and as ``tokens`` the embeddings of the windows, per size B x W x C."""
        visual = self.backbone.visual
        tokens = embed_patches(visual, images)
        return Features(
            encode(visual, tokens),
            [window_embeddings(visual, tokens, windows(visual.grid_size[0], k)) for k in SIZES],
        )

    def score_with(self, features, text):
        text = text.to(features.image_embedding)
        grid = self.backbone.visual.grid_size[0]
        with torch.no_grad():
            image = _anomalous(features.image_embedding[:, None], text)
            per_size = [
                harmonic_mean(_anomalous(found, text), grid, k)
                for found, k in zip(features.tokens, SIZES, strict=True)
            ]
            values = (1 + len(SIZES)) / sum(1 / scores for scores in (image, *per_size))
            maps = similarity_map(values, self.backbone.image_size, 0)
        return Prediction(maps.cpu(), image[:, 0].cpu())

    @property
    def settings(self):
        return super().settings | {"rvs": "mean of sentences that are not normalised", "windows": list(SIZES)}


def _anomalous(embeddings: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """B x W x C -> B x W: softmax over the two states of cos / 0.07, anomalous column."""
    return (cosine(embeddings, text) / TEMPERATURE).softmax(dim=-1)[..., 1]


@lru_cache(maxsize=8)
def windows(grid: int, size: int) -> torch.Tensor:
    """W x size^2: the patches (row by row) of each size x size window of a grid x grid image, stride 1.

    Raises ValueError for a window that is larger than the grid.

    >>> windows(3, 2)[0].tolist(), len(windows(15, 2)), len(windows(15, 3))
    ([0, 1, 3, 4], 196, 169)
    """
    if not 1 <= size <= grid:
        raise ValueError(f"a window of {size} x {size} patches does not fit into {grid} x {grid}")
    patches = torch.arange(grid * grid).view(grid, grid)
    return patches.unfold(0, size, 1).unfold(1, size, 1).reshape(-1, size * size)


def harmonic_mean(scores: torch.Tensor, grid: int, size: int) -> torch.Tensor:
    """Scores of windows B x W -> B x N: for each patch the harmonic mean of the windows that cover it.

    With the constant matrix A (W x N, 1 where a window covers a patch): number of windows / ((1 / score) A).
    """
    cover = _coverage(grid, size).to(scores)
    return cover.sum(dim=0) / ((1 / scores) @ cover)


@lru_cache(maxsize=8)
def _coverage(grid: int, size: int) -> torch.Tensor:
    members = windows(grid, size)
    return torch.zeros(len(members), grid * grid).scatter_(1, members, 1)


def window_embeddings(visual, tokens: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
    """Embedding of each window, B x W x C.

    ``tokens``: B x (1 + N) x D from :func:`clipad.dual_path.embed_patches`, class token first; ``members``: W x M,
    patch indices of each window. Before its first attention a token is the same in every window, so queries, keys and
    values of the first block are computed once per patch.
    """
    class_token = torch.zeros(len(members), 1, dtype=torch.long)
    index = torch.cat([class_token, 1 + members], dim=1).to(tokens.device)
    first, *blocks = visual.transformer.resblocks
    x = visual.ln_pre(tokens)
    qkv = queries_keys_values(first, x)
    at_once = max(1, _TOKENS * (16 if tokens.is_cuda else 1) // (len(tokens) * index.shape[1]))
    found = []
    for part in index.split(at_once):
        sequences = x[:, part].flatten(0, 1)
        q, k, v = qkv[:, :, :, part].transpose(2, 3).flatten(1, 2)
        found.append(_run(visual, blocks, _block(first, sequences, q, k, v)).unflatten(0, (len(x), -1)))
    return torch.cat(found, dim=1)


def encode(visual, tokens: torch.Tensor) -> torch.Tensor:
    """Tokens B x T x D before ``ln_pre``, class token first -> embeddings B x C, as CLIP encodes an image."""
    return _run(visual, visual.transformer.resblocks, visual.ln_pre(tokens))


def _run(visual, blocks, x: torch.Tensor) -> torch.Tensor:
    """Tokens B x T x D through the given blocks, the last ones of the network -> embeddings B x C.

    The blocks run from their parts: on sequences as short as windows that is faster than torch's attention module.
    Only the class token is read in the end, so the last block attends and feeds forward for nothing else.
    """
    *blocks, last = blocks
    for block in blocks:
        x = _block(block, x, *queries_keys_values(block, x))
    q, k, v = queries_keys_values(last, x)
    x = _block(last, x[:, :1], q[:, :, :1], k, v)
    return visual.ln_post(x[:, 0]) @ visual.proj


def _block(block, x, q, k, v):
    """One transformer block on tokens B x T x D, given the inputs of its attention, B x heads x T x d each."""
    x = x + join_heads(block, F.scaled_dot_product_attention(q, k, v))
    return x + block.ls_2(block.mlp(block.ln_2(x)))
