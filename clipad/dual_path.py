"""The staged dual path (paper section 3.2, METHOD.md section 4) over open_clip's own blocks.

Every block runs two paths from the same weights. The *ordinary* path is plain CLIP. The *surgery* path adds up
v-v attention, has no feed-forward part, and restarts at every quarter of the network.

Shapes: B images, T = 1 + N tokens (class token first), D vision width, C joint width, L blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.functional import scaled_dot_product_attention as attend

from clipad.released import changed_in_place


@dataclass
class StagedFeatures:
    """What the dual path hands on, not normalised. ``stages``: 1-based blocks that were read. Per stage ``ordinary``:
    the ordinary path's tokens B x (N+1) x D (input of SDP+), and ``surgery``: the surgery path with the ordinary class
    token, after ``ln_post`` and projection, B x (N+1) x C. ``image_embedding``: the ordinary one, B x C."""

    stages: tuple[int, ...]
    ordinary: list[torch.Tensor]
    surgery: list[torch.Tensor]
    image_embedding: torch.Tensor


def default_stages(layers: int) -> tuple[int, ...]:
    """Ends of the four quarters of the network: (3, 6, 9, 12) for the twelve blocks of the paper.

    >>> default_stages(24)
    (6, 12, 18, 24)
    """
    if layers % 4:
        raise ValueError(f"four stages need blocks divisible by 4, this model has {layers}")
    return tuple(layers * quarter // 4 for quarter in (1, 2, 3, 4))


@torch.no_grad()
def staged_features(
    visual,
    images: torch.Tensor,
    stages: Sequence[int] | None = None,
    as_released: bool = True,
    first_block: int = 0,
    restart: bool = True,
) -> StagedFeatures:
    """Run both paths of ``visual`` (open_clip's VisionTransformer) on images, B x 3 x S x S.

    ``stages``: 1-based blocks to read, None for the four quarters. ``as_released``: as the released program, whose
    stored tokens are changed in place by the next block (METHOD.md section 4), else as the paper writes.
    ``first_block`` (0-based) is where the surgery path starts and ``restart`` whether it starts anew at each quarter:
    CLIP Surgery is ``first_block=L // 2, restart=False`` read after block L.

    Raises ValueError for stages that do not rise within 1..L, for images of another size, and for a network whose
    depth has no quarters where these are needed.
    """
    blocks = visual.transformer.resblocks
    layers = len(blocks)
    restarts = {first_block, 0, *default_stages(layers)} if restart else {first_block}
    stages = default_stages(layers) if stages is None else tuple(stages)
    rising = list(stages) == sorted(set(stages))
    if not stages or not rising or not first_block < stages[0] <= stages[-1] <= layers:
        raise ValueError(f"stages have to rise within {first_block + 1}..{layers}, found {stages}")

    x = visual.ln_pre(embed_patches(visual, images))
    for block in blocks[:first_block]:
        x = block(x)
    path, ordinary, paths, following = None, [], [], []
    for i, block in enumerate(blocks[first_block:], start=first_block):
        q, k, v = queries_keys_values(block, x)
        a, s = join_heads(block, torch.stack([attend(q, k, v), attend(v, v, v)]))
        path = s if i in restarts else path + s
        x = x + a
        x = x + block.ls_2(block.mlp(block.ln_2(x)))
        if i in stages:  # the block behind a stage
            following.append((a, s, i in restarts))
        if i + 1 in stages:
            ordinary.append(x)
            paths.append(path)

    if as_released:
        ordinary, paths = changed_in_place(ordinary, paths, following)
    surgery = [
        project(visual, torch.cat([tokens[:, :1], path[:, 1:]], dim=1))
        for tokens, path in zip(ordinary, paths, strict=True)
    ]
    image_embedding = surgery[-1][:, 0] if stages[-1] == layers else project(visual, x[:, 0])
    return StagedFeatures(stages, ordinary, surgery, image_embedding)


def queries_keys_values(block, x: torch.Tensor) -> torch.Tensor:
    """The inputs of one block's attention: B x T x D -> 3 x B x heads x T x d."""
    attention = block.attn
    qkv = F.linear(block.ln_1(x), attention.in_proj_weight, attention.in_proj_bias)
    return qkv.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)


def join_heads(block, heads: torch.Tensor) -> torch.Tensor:
    """What the heads of one block found, ... x heads x T x d -> what is added to the tokens, ... x T x D."""
    return block.ls_1(block.attn.out_proj(heads.transpose(-3, -2).flatten(-2)))


def attention_weights(block, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The q-k and v-v attention of one block as weights, mean over heads: two tensors B x T x T (for pictures only)."""
    q, k, v = queries_keys_values(block, x)
    scale = q.shape[-1] ** -0.5  # before the product, which float16 might not hold
    scores = ((left * scale) @ right.mT for left, right in ((q, k), (v, v)))
    return tuple(each.softmax(dim=-1).mean(dim=1) for each in scores)


def embed_patches(visual, images: torch.Tensor) -> torch.Tensor:
    """Images B x 3 x S x S -> tokens B x (N+1) x D after the position embedding, before ``ln_pre``."""
    size = visual.image_size
    if images.ndim != 4 or tuple(images.shape[1:]) != (3, *size) or not len(images):
        wanted = f"B x 3 x {size[0]} x {size[1]} with B >= 1"
        raise ValueError(f"images have to be {wanted}, found {tuple(images.shape)}")
    patches = visual.conv1(images).flatten(2).transpose(1, 2)
    class_token = visual.class_embedding.to(patches.dtype).expand(len(images), 1, -1)
    return torch.cat([class_token, patches], dim=1) + visual.positional_embedding.to(patches.dtype)


def project(visual, tokens: torch.Tensor) -> torch.Tensor:
    """``ln_post`` and the projection into the joint space: ... x D -> ... x C."""
    return visual.ln_post(tokens) @ visual.proj
