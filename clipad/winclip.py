"""WinCLIP (Jeong et al., CVPR 2023), zero-shot: the baseline of the paper (METHOD.md section 8).

A window of k x k patches is encoded as if it were an image: class token and the window's tokens go through the frozen
transformer on their own. So every window gets an embedding in the joint space, and a score; a patch takes the harmonic
mean of the scores of all windows that cover it.

Shapes: B images, N patches (a G x G grid), W = (G - k + 1)^2 windows of size k, C joint width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from clipad.detectors import Detector, Features
from clipad.dual_path import embed_patches, join_heads, queries_keys_values
from clipad.prompts import WINCLIP
from clipad.surgery import cosine, similarity_map

TEMPERATURE = 0.07
SIZES = (2, 3)
"""sides of the windows, in patches; the third scale of the paper is the whole image"""
_TOKENS = 2048
"""that go through the transformer at once on a CPU, whose malloc keeps arrays below 32 MB; on a GPU 32 times as many"""


class WinCLIP(Detector):
    """Scores of windows of 2 x 2 and 3 x 3 patches and of the whole image, combined by harmonic means.

    ``prompts``: None for WinCLIP's own; their embeddings are averaged per state *before* they are normalised. There is
    no smoothing, and the image score is the class probability alone, softmax(cos / 0.07).
    """

    name = "WinCLIP"
    map_in_image_score = False

    def __init__(self, backbone, prompts=None):
        super().__init__(backbone, prompts or WINCLIP, rvs="mean", smoothing=0)

    def text_vectors(self, category):
        if category not in self._text:
            sentences = self.prompts.sentences(category)
            states = [self.backbone.encode_text(state).mean(dim=0) for state in sentences]
            self._text[category] = F.normalize(torch.stack(states, dim=1), dim=0)
        return self._text[category]

    def encode(self, images):
        """``image_embedding`` B x C, and as ``tokens`` the embeddings of the windows, per size B x W x C."""
        visual = self.backbone.tower
        grid = visual.grid_size[0]
        sets = [windows(grid, k) for k in (grid, *SIZES)]  # the first holds all patches
        whole, *per_size = window_embeddings(visual, embed_patches(visual, images), sets)
        return Features(whole[:, 0], per_size)

    def maps(self, features, text):
        grid = self.backbone.visual.grid_size[0]
        inverse = 1 / self.probabilities(features, text)[:, None]
        for found, k in zip(features.tokens, SIZES, strict=True):
            inverse = inverse + 1 / harmonic_mean(anomalous_share(found, text), grid, k)
        return similarity_map((1 + len(SIZES)) / inverse, self.backbone.image_size, 0)

    def probabilities(self, features, text):
        return anomalous_share(features.image_embedding[:, None], text)[:, 0]


def anomalous_share(embeddings: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """B x W x C -> B x W: softmax over the two states of cos / 0.07, anomalous column."""
    return (cosine(embeddings, text) / TEMPERATURE).softmax(dim=-1)[..., 1]


def windows(grid: int, size: int) -> torch.Tensor:
    """W x size^2: the patches (row by row) of each size x size window of a grid x grid image, stride 1.

    >>> windows(3, 2)[0].tolist(), len(windows(15, 2)), len(windows(15, 3))
    ([0, 1, 3, 4], 196, 169)
    """
    patches = torch.arange(grid * grid).view(grid, grid)
    return patches.unfold(0, size, 1).unfold(1, size, 1).reshape(-1, size * size)


def harmonic_mean(scores: torch.Tensor, grid: int, size: int) -> torch.Tensor:
    """Scores of windows B x W -> B x N: for each patch the harmonic mean of the windows that cover it."""
    cover = coverage(grid, size).to(scores)
    return cover.sum(dim=0) / ((1 / scores) @ cover)


def coverage(grid: int, size: int) -> torch.Tensor:
    """W x N: 1 where a window covers a patch."""
    members = windows(grid, size)
    return torch.zeros(len(members), grid * grid).scatter_(1, members, 1)


def window_embeddings(
    visual, tokens: torch.Tensor, sets: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Embedding of each window, for each set of windows B x W x C.

    ``tokens``: B x (1 + N) x D from :func:`clipad.dual_path.embed_patches`; each of ``sets``: W x M patch indices.
    Before its first attention a token is the same in every window, so the first block's q, k, v are computed once.
    """
    first, *blocks, last = visual.transformer.resblocks
    x = visual.ln_pre(tokens)
    qkv = queries_keys_values(first, x)
    found = []
    for members in sets:
        index = F.pad(1 + members, (1, 0)).to(x.device)  # 0, the class token, first
        at_once = max(1, _TOKENS * (32 if x.is_cuda else 1) // (len(x) * index.shape[1]))
        parts = []
        for part in index.split(at_once):
            q, k, v = qkv[:, :, :, part].transpose(2, 3).flatten(1, 2)
            sequences = _block(first, x[:, part].flatten(0, 1), q, k, v)
            for block in blocks:
                sequences = _block(block, sequences, *queries_keys_values(block, sequences))
            pooled = visual.ln_post(_class_token(last, sequences)) @ visual.proj
            parts.append(pooled.unflatten(0, (len(x), -1)))
        found.append(torch.cat(parts, dim=1))
    return found


def _block(block, x, q, k, v):
    """One block on tokens B x T x D, given the inputs of its attention, B x heads x T x d each; faster than torch's
    attention module on sequences as short as windows."""
    return _feed_forward(block, x + join_heads(block, F.scaled_dot_product_attention(q, k, v)))


def _class_token(block, x: torch.Tensor) -> torch.Tensor:
    """What the last block makes of the class token, B x T x D -> B x D; nothing else is read in the end.

    One query meets T keys and values, so it goes to the tokens n instead: q (W_k n + b_k) is (W_k^T q) n plus a
    constant, which softmax drops; and as the weights sum to 1, W_v can project the weighted mean of the tokens.
    """
    n, attention = block.ln_1(x), block.attn
    of_heads = (3, attention.num_heads, -1)
    w_q, w_k, w_v = attention.in_proj_weight.unflatten(0, of_heads)  # heads x d x D each
    b_q, _, b_v = attention.in_proj_bias.unflatten(0, of_heads)
    q = torch.einsum("bn,hdn->bhd", n[:, 0], w_q) + b_q
    q = torch.einsum("bhd,hdn->bhn", q, w_k)
    means = F.scaled_dot_product_attention(q, n, n, scale=w_k.shape[1] ** -0.5)
    heads = torch.einsum("bhn,hdn->bhd", means, w_v) + b_v
    return _feed_forward(block, x[:, :1] + join_heads(block, heads[:, :, None]))[:, 0]


def _feed_forward(block, x):
    return x + block.ls_2(block.mlp(block.ln_2(x)))
