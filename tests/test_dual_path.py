import open_clip
import pytest
import torch
from conftest import tiny_clip

from clipad.dual_path import (
    attention_weights,
    default_stages,
    embed_patches,
    project,
    staged_features,
)


def test_equals_the_released_program(golden):
    found = staged_features(golden.visual(), golden["image"], golden.config["stages"])
    for stage, ordinary, surgery in zip(found.stages, found.ordinary, found.surgery, strict=True):
        torch.testing.assert_close(ordinary, golden[f"original_{stage}"], atol=1e-4, rtol=0)
        torch.testing.assert_close(surgery, golden[f"surgery_{stage}"], atol=1e-4, rtol=0)


def reference(visual, images, stages, as_released):
    """The two paths spelled out with torch's own attention module, path tokens changed in place as the program does."""
    x = visual.ln_pre(embed_patches(visual, images))
    layers = len(visual.transformer.resblocks)
    path, kept = None, {}
    for i, block in enumerate(visual.transformer.resblocks):
        h = block.ln_1(x)
        d = h.shape[-1]
        v = h @ block.attn.in_proj_weight[2 * d :].T + block.attn.in_proj_bias[2 * d :]
        s = torch.stack([vv_attention(v[b], block.attn.num_heads) for b in range(len(v))])
        s = block.ls_1(block.attn.out_proj(s))
        a = block.ls_1(block.attn(h, h, h, need_weights=False)[0])
        if path is None or i % (layers // 4) == 0:
            path = s.clone()
        else:
            path += s
        x += a
        x = x + block.ls_2(block.mlp(block.ln_2(x)))
        if i + 1 in stages:
            kept[i + 1] = (x, path) if as_released else (x.clone(), path.clone())
    return kept


def vv_attention(v, heads):
    parts = [
        (head @ head.T / head.shape[-1] ** 0.5).softmax(-1) @ head
        for head in v.chunk(heads, dim=-1)
    ]
    return torch.cat(parts, dim=-1)


@pytest.mark.parametrize("as_released", [True, False])
@pytest.mark.parametrize("stages", [(2, 4, 6, 8), (1, 3, 8), (5,), (8,)])
@pytest.mark.parametrize("layer_scale", [None, 0.5])
def test_equals_a_plain_reference_for_any_stages(stages, as_released, layer_scale):
    visual = tiny_clip(layers=8, ls_init_value=layer_scale).visual
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        kept = reference(visual, images, stages, as_released)
        found = staged_features(visual, images, stages, as_released)
        for stage, ordinary, surgery in zip(stages, found.ordinary, found.surgery, strict=True):
            x, path = kept[stage]
            torch.testing.assert_close(ordinary, x, atol=1e-5, rtol=1e-5)
            expected = project(visual, torch.cat([x[:, :1], path[:, 1:]], dim=1))
            torch.testing.assert_close(surgery, expected, atol=1e-5, rtol=1e-5)


def test_the_in_place_side_effect_changes_all_but_the_last_ordinary_stage():
    visual = tiny_clip(layers=8).visual
    images = torch.randn(2, 3, 32, 32)
    released, written = (
        staged_features(visual, images, as_released=flag) for flag in (True, False)
    )
    same = [torch.equal(a, b) for a, b in zip(released.ordinary, written.ordinary, strict=True)]
    assert same == [False, False, False, True]


def test_the_ordinary_path_is_plain_clip():
    visual = tiny_clip(layers=8).visual
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            staged_features(visual, images).image_embedding, visual(images), atol=1e-5, rtol=1e-5
        )
        early = staged_features(visual, images, stages=[2])
        torch.testing.assert_close(early.image_embedding, visual(images), atol=1e-5, rtol=1e-5)


def test_no_parameter_and_no_image_is_changed():
    visual = tiny_clip().visual
    before = {k: v.clone() for k, v in visual.state_dict().items()}
    images = torch.randn(1, 3, 32, 32)
    kept = images.clone()
    staged_features(visual, images)
    assert torch.equal(images, kept)
    assert all(torch.equal(before[k], v) for k, v in visual.state_dict().items())


@pytest.mark.parametrize("stages", [[], [0], [9], [4, 2], [2, 2]])
def test_impossible_stages_are_refused(stages):
    with pytest.raises(ValueError, match=r"1\.\.8"):
        staged_features(tiny_clip(layers=8).visual, torch.zeros(1, 3, 32, 32), stages)


def test_depth_without_quarters_is_refused():
    with pytest.raises(ValueError, match="by 4"):
        default_stages(6)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"32 x 32.*\(1, 3, 48, 48\)"):
        staged_features(tiny_clip().visual, torch.zeros(1, 3, 48, 48))


def test_attention_weights_are_those_of_the_block():
    visual = tiny_clip().visual
    block = visual.transformer.resblocks[0]
    with torch.no_grad():
        x = visual.ln_pre(embed_patches(visual, torch.randn(2, 3, 32, 32)))
        h = block.ln_1(x)
        _, expected = block.attn(h, h, h, need_weights=True)
        qk, vv = attention_weights(block, x)
    torch.testing.assert_close(qk, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(vv.sum(-1), torch.ones(2, 17))


@pytest.mark.parametrize(
    "name", ["ViT-B-32", "ViT-B-16", "ViT-B-16-plus-240", "ViT-L-14", "ViT-L-14-336"]
)
def test_the_models_of_the_field_are_covered(name):
    """Their true depth and layout at a small width: what the dual path reads off them is the structure."""
    config = open_clip.get_model_config(name)
    vision = config["vision_cfg"] | {"width": 64, "head_width": 32}
    text = config["text_cfg"] | {"width": 32, "heads": 2, "layers": 1}
    visual = open_clip.CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text).visual.eval()
    side = visual.image_size[0]
    found = staged_features(visual, torch.zeros(1, 3, side, side))
    layers = vision["layers"]
    assert found.stages == (layers // 4, layers // 2, 3 * layers // 4, layers)
    assert found.surgery[0].shape == (1, (side // vision["patch_size"]) ** 2 + 1, 32)
