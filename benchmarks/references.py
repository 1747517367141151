"""Plain forms of what the package computes in a faster way. Own code, written to be obviously right."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score


def scikit_learn_three(scores: np.ndarray, masks: np.ndarray) -> dict[str, float]:
    """AUROC, F1-max and AP of all pixels by scikit-learn."""
    scores, masks = scores.ravel(), masks.ravel()
    precision, recall, _ = precision_recall_curve(masks, scores)
    return {
        "auroc": float(roc_auc_score(masks, scores)),
        "f1_max": float(np.max(2 * precision * recall / np.maximum(precision + recall, 1e-300))),
        "ap": float(average_precision_score(masks, scores)),
    }


def exact_pro(scores: np.ndarray, masks: np.ndarray, limit: float = 0.3) -> float:
    """PRO with every distinct score as a threshold: all pixels sorted, then two running sums."""
    weights, regions = np.zeros(scores.shape), 0
    for i, mask in enumerate(masks):
        labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
        sizes = np.bincount(labels.ravel())
        weights[i] = np.where(mask, 1 / sizes[labels], 0)
        regions += count
    order = np.argsort(scores, axis=None)[::-1]
    sorted_scores = scores.ravel()[order]
    rate = np.cumsum(~masks.ravel()[order]) / (~masks).sum()
    overlap = np.cumsum(weights.ravel()[order]) / regions
    distinct = np.append(sorted_scores[1:] != sorted_scores[:-1], True)
    rate, overlap = np.append(0, rate[distinct]), np.append(0, overlap[distinct])
    end = np.searchsorted(rate, limit, side="right")
    at_limit = np.interp(limit, rate[end - 1 : end + 1], overlap[end - 1 : end + 1])
    return float(
        np.trapezoid(np.append(overlap[:end], at_limit), np.append(rate[:end], limit)) / limit
    )


def feature_surgery_long(stage_features, text: torch.Tensor) -> torch.Tensor:
    """Feature surgery as the paper writes it, with element-wise products of size B x N x 2 x C."""
    total = 0
    for tokens in stage_features:
        tokens = F.normalize(tokens, dim=-1)
        p = (tokens[:, :1] @ text).softmax(dim=-1)
        w = p / p.mean(dim=-1, keepdim=True)
        products = tokens[:, :, None, :] * text.T[None, None] * w[..., None]
        total = total + (products - products.mean(dim=2, keepdim=True)).sum(dim=-1)
    return total


def similarity_map_plain(values: torch.Tensor, image_size: int, sigma: float) -> torch.Tensor:
    """Bilinear up-sampling by torch, then SciPy's Gaussian image by image."""
    grid = round(values.shape[1] ** 0.5)
    maps = F.interpolate(values.view(-1, 1, grid, grid), size=image_size, mode="bilinear")[:, 0]
    return torch.stack([torch.from_numpy(ndimage.gaussian_filter(m, sigma)) for m in maps.numpy()])
