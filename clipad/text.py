"""From sentences to one vector per state: Representative Vector Selection (paper section 3.1, METHOD.md section 2).

The sentence embeddings e_i of a state are unit vectors. WinCLIP and most others take their mean; the paper reads the
cloud as a distribution and picks a vector by PCA, KDE, DBSCAN or mean shift.
"""

import warnings

import torch
import torch.nn.functional as F
from sklearn.cluster import DBSCAN, MeanShift
from sklearn.neighbors import KernelDensity

from clipad.prompts import CLIP_AD, Prompts


def _pca(e):
    """Leading eigenvector u of the M x M scatter matrix of the e_i, each centred by its own scalar mean."""
    centred = e - e.mean(dim=1, keepdim=True)
    u = torch.linalg.eigh(centred @ centred.T).eigenvectors[:, -1]
    vector = u @ centred  # up to its sign
    return vector if vector @ e.mean(dim=0) >= 0 else -vector


def _kde(e, bandwidth: float = 0.3):
    density = KernelDensity(bandwidth=bandwidth).fit(e.numpy()).score_samples(e.numpy())
    # Only ratios of the weights count; subtracting the maximum keeps exp() from overflowing.
    weights = torch.from_numpy(density - density.max()).exp()
    return weights @ e / weights.sum()


def _largest_cluster(e, labels):
    labels = torch.as_tensor(labels)
    found = labels[labels >= 0]
    return e[labels == found.bincount().argmax()].mean(dim=0) if len(found) else None


def _dbscan(e, eps: float = 0.5, min_samples: int = 15):
    return _largest_cluster(e, DBSCAN(eps=eps, min_samples=min_samples).fit_predict(e.numpy()))


def _mean_shift(e, bandwidth: float = 2.0):
    return _largest_cluster(e, MeanShift(bandwidth=bandwidth).fit_predict(e.numpy()))


METHODS = {"mean": lambda e: e.mean(dim=0), "pca": _pca, "kde": _kde}
METHODS |= {"dbscan": _dbscan, "mean_shift": _mean_shift}


def check_method(method: str) -> None:
    """ValueError for an unknown method."""
    if method not in METHODS:
        raise ValueError(f"unknown representative vector {method!r}: one of {', '.join(METHODS)}")


def representative_vector(
    embeddings: torch.Tensor, method: str = "dbscan", *, what: str = "the state", **options
) -> torch.Tensor:
    """One unit vector (C) for a state's M x C sentence embeddings (normalised inside).

    ``method`` and its ``options`` (defaults are the published ones): ``mean``; ``pca``; ``kde`` (bandwidth 0.3);
    ``dbscan`` (eps 0.5, min_samples 15); ``mean_shift`` (bandwidth 2). Where DBSCAN calls every sentence noise the
    mean is taken, with a warning that names ``what``. Raises ValueError for what cannot be read, and TypeError for an
    option that the method does not have.

    >>> e = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    >>> representative_vector(e, "mean")
    tensor([0.7071, 0.7071])
    """
    check_method(method)
    if embeddings.ndim != 2 or not len(embeddings) or not torch.isfinite(embeddings).all():
        raise ValueError(
            f"the embeddings of {what} have to be finite and M x C with M >= 1, found {tuple(embeddings.shape)}"
        )
    e = F.normalize(embeddings.detach().cpu().double(), dim=-1)
    vector = METHODS[method](e, **options)
    if vector is None:
        message = f"{method} calls every sentence of {what} noise: their mean is used instead"
        warnings.warn(message, stacklevel=2)
        vector = e.mean(dim=0)
    return F.normalize(vector, dim=0).to(embeddings.dtype)


def representative_vectors(
    backbone, category: str, prompts: Prompts = CLIP_AD, method: str = "dbscan", **options
) -> torch.Tensor:
    """The text side of every detector: C x 2 unit columns, normal and anomalous, for one category."""
    columns = []
    for state, sentences in zip(("normal", "anomalous"), prompts.sentences(category), strict=True):
        embeddings, what = backbone.encode_text(sentences), f"{category!r} ({state})"
        columns.append(representative_vector(embeddings, method, what=what, **options))
    return torch.stack(columns, dim=1)
