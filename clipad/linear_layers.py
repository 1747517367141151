"""SDP+'s linear layers: one per stage maps the patch tokens x_j of the ordinary path (width D) into the joint space
(width C), where they are compared with the two text vectors; and the losses that train them (paper section 3.3,
METHOD.md section 6). Shapes: B images, N patch tokens (a G x G grid), J stages, S image side in pixels.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from clipad.surgery import cosine


class LinearLayers(nn.Module):
    """``fc[i]``: one linear layer with bias, D -> C, per stage.

    ``settings`` says how they were trained; the released program's checkpoints say nothing.
    """

    def __init__(self, width: int, joint_width: int, stages: int, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.fc = nn.ModuleList(nn.Linear(width, joint_width) for _ in range(stages))
        self.settings: dict[str, Any] = {}

    def forward(self, tokens: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Per stage B x N x D -> B x N x C, not normalised."""
        return [layer(x) for layer, x in zip(self.fc, tokens, strict=True)]

    @property
    def hash(self) -> str:
        """First 16 hex digits of the SHA-256 of the weights."""
        digest = hashlib.sha256()
        for key, value in sorted(self.state_dict().items()):
            digest.update(f"{key} {tuple(value.shape)}".encode() + value.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def require_fit(self, backbone, stages: Sequence[int], as_released: bool) -> None:
        """ValueError if these layers cannot belong to that backbone, those stages or that way of reading them."""
        # The size before the weights: another one also has other position embeddings, so other weights.
        used = {"layers (number, from, to)": [len(stages), *backbone.visual.proj.shape]}
        used |= {"image_size": backbone.image_size, "weights": backbone.weights_hash}
        used |= {"stages": list(stages), "as_released": as_released}
        shape = [len(self.fc), *self.fc[0].weight.T.shape]
        trained = self.settings | {"layers (number, from, to)": shape}
        for key, value in used.items():
            if trained.get(key, value) != value:
                raise ValueError(
                    f"the layers were trained with {key}={trained[key]!r}, but are used with {value!r}"
                )


def linear_logits(
    layers: LinearLayers, tokens: Sequence[torch.Tensor], text: torch.Tensor
) -> torch.Tensor:
    """Logit of "anomalous" per stage and patch, B x J x N: 100 (cos(f, t_1) - cos(f, t_0)), f = W_j x_j + b_j.

    ``tokens``: per stage B x N x D, patches only; ``text``: unit columns C x 2 or B x C x 2.
    """
    cosines = torch.stack([cosine(mapped, text) for mapped in layers(tokens)], dim=1)
    return 100 * (cosines[..., 1] - cosines[..., 0])


def linear_maps(
    layers: LinearLayers, tokens: Sequence[torch.Tensor], text: torch.Tensor, image_size: int
) -> torch.Tensor:
    """The anomalous probability of every pixel according to each stage's layer, B x J x S x S, not smoothed.

    Arguments as for :func:`linear_logits`. As released, logits are interpolated to S x S (bilinear, corners aligned)
    before the softmax, which with two states is the sigmoid of their difference.
    """
    logits = linear_logits(layers, tokens, text)
    grid = math.isqrt(logits.shape[-1])
    logits = logits.unflatten(-1, (grid, grid))
    return F.interpolate(logits, size=image_size, mode="bilinear", align_corners=True).sigmoid()


def focal_loss(probability: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over pixels of -(1 - p)^2 log p, p = probability of the true state. Both arguments B x S x S.

    As released: the one-hot target is clamped to [1e-5, 1 - 1e-5] and 1e-5 added to p.
    """
    target = mask.to(probability).clamp(1e-5, 1 - 1e-5)
    p = target * probability + (1 - target) * (1 - probability) + 1e-5
    return -((1 - p) ** 2 * p.log()).mean()


def dice_loss(probability: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """1 - (2 sum(p m) + 1) / (sum p + sum m + 1), averaged over images. Both arguments B x S x S."""
    p, m = probability.flatten(1), mask.to(probability).flatten(1)
    overlap = 2 * (p * m).sum(dim=1) + 1
    return (1 - overlap / (p.sum(dim=1) + m.sum(dim=1) + 1)).mean()


def stage_losses(maps: torch.Tensor, masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Focal and Dice loss per stage, J each, of maps B x J x S x S and masks B x S x S."""
    stages, losses = maps.unbind(dim=1), (focal_loss, dice_loss)
    return tuple(torch.stack([loss(p, masks) for p in stages]) for loss in losses)


def require_separate(
    trained_on: Iterable[str], tested_on: Iterable[str], allow_overlap: bool = False
) -> None:
    """The cross-data-set protocol: ValueError that names the tested categories which trained the layers."""
    both = sorted(set(trained_on) & set(tested_on))
    if both and not allow_overlap:
        raise ValueError(
            f"the layers were trained on {', '.join(both)}, which is also tested: train on another data set, or say "
            "allow_overlap=True; the results then carry it"
        )
