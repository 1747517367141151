"""The ideas of notebook 08, one stage each; a method is the sum over stages. The table ``IDEAS`` is at the end.

Shapes: B images, M images of a category's test set, n flawless images, P remembered patches, N patches of an image,
D width of the image tower.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

from clipad.studies.inspection import nearest_patch, standardised


def unit_length(tokens: torch.Tensor) -> torch.Tensor:
    """B x N x D -> the same with tokens of length 1: their distances rank like the cosine of WinCLIP+, AnomalyDINO."""
    return F.normalize(tokens, dim=-1)


def subspace_residual(tokens: torch.Tensor, bank: torch.Tensor, variance: float) -> torch.Tensor:
    """B x N x D and a bank n x N x D -> B x N: squared distance from the bank's principal subspace (SubspaceAD).

    Of the principal axes as many as hold ``variance`` of the bank's variance.
    """
    patches = standardised(bank).flatten(0, 1)
    mean = patches.mean(dim=0)
    _, spread, axes = torch.linalg.svd(patches - mean, full_matrices=False)
    held = spread.square().cumsum(dim=0) / spread.square().sum()
    axes = axes[: int((held < variance).sum()) + 1]
    centred = standardised(tokens) - mean
    return (centred - centred @ axes.T @ axes).square().sum(dim=-1)


def neighbourhood_means(tokens: torch.Tensor, size: int) -> torch.Tensor:
    """B x N x D -> the mean of the size x size tokens around each patch; outside of the image are zeros (MuSc)."""
    grid = math.isqrt(tokens.shape[1])
    image = tokens.transpose(1, 2).unflatten(2, (grid, grid))
    return F.avg_pool2d(image, size, 1, size // 2).flatten(2).transpose(1, 2)


def batch_distance(tokens: torch.Tensor, share: float = 0.3) -> torch.Tensor:
    """Tokens of a whole test set, M x N x D, M > 1 -> M x N: how far each patch is from the other images.

    Per other image the Euclidean distance to its nearest patch, then the mean of the lowest ``share`` of the M - 1
    (MuSc, mutual scoring). Time is quadratic in M; memory is N x M N numbers at once.
    """
    found, lowest = [], max(1, int(share * (len(tokens) - 1)))
    for i, image in enumerate(tokens):
        nearest = torch.cdist(image[None], tokens).amin(dim=2)  # M x N
        nearest[i] = math.inf
        found.append(nearest.topk(lowest, dim=0, largest=False).values.mean(dim=0))
    return torch.stack(found)


def batch_scores(tokens: torch.Tensor, sizes: Iterable[int] = (1, 3, 5)) -> torch.Tensor:
    """The batch as its own reference: M x N x D -> M x N, summed over neighbourhoods of these sides, in patches."""
    tokens = standardised(tokens)
    return sum(batch_distance(neighbourhood_means(tokens, size)) for size in sizes)


def retrieved(
    tokens: torch.Tensor, keys: torch.Tensor, labels: torch.Tensor, temperature: float
) -> torch.Tensor:
    """B x N x D, remembered patches P x D with labels P (0 or 1) -> B x N: the mean label, weighted by similarity.

    The weights are a softmax of cosines over the temperature (MRAD-TF; there on another path's tokens).
    """
    keys = F.normalize(keys, dim=-1)
    found = [F.normalize(image, dim=-1) @ keys.T / temperature for image in tokens]
    return torch.stack([cosines.softmax(dim=-1) @ labels.to(keys) for cosines in found])


def learned_directions(keys: torch.Tensor, labels: torch.Tensor) -> Callable:
    """Two learned directions instead of text: tokens B x N x D -> anomalous probability B x N.

    softmax of (x w_n, x w_a) is the sigmoid of x (w_a - w_n): a logistic regression of the patches' labels.
    """
    mean, spread = keys.mean(dim=0), keys.std(dim=0)
    model = LogisticRegression(C=0.1, max_iter=300)
    model.fit(((keys - mean) / spread).cpu().numpy(), labels.cpu().numpy())
    direction, offset = torch.as_tensor(model.coef_[0]).to(keys), float(model.intercept_[0])
    return lambda tokens: ((tokens - mean) / spread @ direction + offset).sigmoid()


@dataclass(frozen=True)
class Idea:
    """``compute``: (tokens B x N x D, what is known at this stage, value of the free choice) -> B x N."""

    compute: Callable[[torch.Tensor, Any, Any], torch.Tensor]
    choice: str = ""  # what is free
    tried: tuple = ()
    published: Any = None  # the value that the idea's authors take


LENGTHS = {"kept": standardised, "divided out": unit_length}
IDEAS = {
    "nearest of 4": Idea(  # published: WinCLIP+, AnomalyDINO
        lambda tokens, bank, lengths: nearest_patch(tokens, bank, LENGTHS[lengths]),
        "lengths", tuple(LENGTHS), "divided out",
    ),
    "one PCA of 4": Idea(subspace_residual, "variance", (0.5, 0.7, 0.9, 0.99), 0.99),  # SubspaceAD
    "the batch": Idea(  # MuSc
        lambda tokens, _, size: batch_scores(tokens, range(1, size + 1, 2)),
        "largest neighbourhood", (1, 3, 5), 5,
    ),
    "retrieval": Idea(  # MRAD's temperature could not be read
        lambda tokens, memory, temperature: retrieved(tokens, *memory, temperature),
        "temperature", (0.02, 0.05, 0.1, 0.2),
    ),
    "learned directions": Idea(lambda tokens, directions, _: directions(tokens)),
}  # fmt: skip
"""Known are n x N x D flawless tokens, nothing, P x D keys with P labels, and what :func:`learned_directions` gave."""
