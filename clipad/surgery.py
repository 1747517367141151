"""Feature surgery and the way from similarities to a map (paper section 3.2, METHOD.md section 5)."""

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter


def feature_surgery(stage_features: Sequence[torch.Tensor], text: torch.Tensor) -> torch.Tensor:
    """Remove what both states have in common from the token-text similarities, summed over stages.

    ``stage_features``: per stage B x (N+1) x C (normalised inside), class token first; ``text``: unit columns
    (normal, anomalous), C x 2 or B x C x 2. Returns B x (N+1) x 2.

    Per stage z = F T; p = softmax(z of the class token); w = p / mean(p) = 2 p; z <- z w; z <- z - mean over the two
    states, which is (z_1 w_1 - z_0 w_0) / 2 for the anomalous column and its negative for the normal one.
    """
    if text.shape[-1] != 2:
        raise ValueError(f"text has to end with two states, found {tuple(text.shape)}")
    anomalous = 0
    for tokens in stage_features:
        z = cosine(tokens, text)
        w = 2 * z[:, :1].softmax(dim=-1)
        z = z * w
        anomalous = anomalous + (z[..., 1] - z[..., 0]) / 2
    return torch.stack([-anomalous, anomalous], dim=-1)


def cosine(tokens: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Cosine of tokens B x T x C (normalised inside, without a normalised copy) with unit text columns: B x T x 2."""
    length = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True).clamp_min(1e-12)
    # Each text vector in one piece of memory: with the usual order this product takes five times as long on a CPU.
    return (tokens @ text.to(tokens).mT.contiguous().mT) / length


def similarity_map(values: torch.Tensor, image_size: int, sigma: float) -> torch.Tensor:
    """Patch values B x N -> maps B x S x S: G x G, bilinear (corners not aligned), SciPy's Gaussian of ``sigma`` pixels
    (0: none). Both steps are linear and separable, so they are one S x G matrix M: out = M map M^T."""
    grid = round(values.shape[1] ** 0.5)
    m = _matrix(grid, image_size, float(sigma)).to(values.device)
    return m @ values.float().unflatten(1, (grid, grid)) @ m.T


def smooth(maps: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian filter of maps B x S x S with ``sigma`` pixels, as SciPy's ``gaussian_filter``."""
    m = _matrix(maps.shape[-1], maps.shape[-1], float(sigma)).to(maps.device)
    return m @ maps.float() @ m.T


@lru_cache(maxsize=32)
def _matrix(grid: int, image_size: int, sigma: float) -> torch.Tensor:
    """S x G: bilinear interpolation of a row of G values to S pixels, followed by the Gaussian."""
    one = torch.eye(grid, dtype=torch.float64)[None]
    matrix = F.interpolate(one, size=image_size, mode="linear", align_corners=False)[0].T.numpy()
    return torch.from_numpy(gaussian_filter(matrix, (sigma, 0))).float()
