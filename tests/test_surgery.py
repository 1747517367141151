import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter

from clipad.surgery import feature_surgery, similarity_map, smooth


def long_form(stage_features, text):
    """Feature surgery as the paper writes it, with the B x N x 2 x C tensor."""
    total = 0
    for tokens in stage_features:
        f = F.normalize(tokens, dim=-1)
        t = text if text.ndim == 3 else text.expand(len(tokens), *text.shape)
        z = f @ t
        p = z[:, :1].softmax(-1)
        w = p / p.mean(-1, keepdim=True)
        features = f.unsqueeze(2) * t.mT.unsqueeze(1) * w.unsqueeze(-1)
        features = features - features.mean(dim=2, keepdim=True)
        total = total + features.sum(-1)
    return total


def test_equals_the_released_program(golden):
    stages = [golden[f"surgery_{j}"] for j in golden.config["stages"]]
    similarity = feature_surgery(stages, golden["text"])
    torch.testing.assert_close(similarity, golden["similarity"], atol=1e-5, rtol=0)
    side = golden.config["vision_cfg"]["image_size"]
    for sigma, name in ((0, "sdp_map_raw"), (golden.config["smoothing"], "sdp_map")):
        maps = similarity_map(similarity[:, 1:, 1], side, sigma)
        torch.testing.assert_close(maps, golden[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("per_image", [True, False])
def test_closed_form_equals_the_long_form(per_image):
    torch.manual_seed(1)
    stages = [torch.randn(3, 17, 24, dtype=torch.float64) * 7 for _ in range(4)]
    shape = (3, 24, 2) if per_image else (24, 2)
    text = F.normalize(torch.randn(shape, dtype=torch.float64), dim=-2)
    torch.testing.assert_close(
        feature_surgery(stages, text), long_form(stages, text), atol=1e-12, rtol=0
    )


def test_the_two_columns_are_opposite():
    similarity = feature_surgery([torch.randn(2, 5, 8)], F.normalize(torch.randn(8, 2), dim=0))
    assert torch.equal(similarity[..., 0], -similarity[..., 1])


def test_more_than_two_states_are_refused():
    with pytest.raises(ValueError, match="two"):
        feature_surgery([torch.randn(1, 5, 8)], torch.randn(8, 3))


@pytest.mark.parametrize(("grid", "side"), [(15, 240), (12, 96), (7, 224), (15, 100)])
@pytest.mark.parametrize("sigma", [0, 2.0, 8.0])
def test_one_matrix_equals_bilinear_and_scipy(grid, side, sigma):
    values = torch.randn(2, grid * grid)
    # In double: with float32 torch rounds the sample positions where side / grid is not a short binary fraction.
    square = values.double().view(2, 1, grid, grid)
    up = F.interpolate(square, size=side, mode="bilinear", align_corners=False)[:, 0]
    expected = up if not sigma else torch.from_numpy(gaussian_filter(up.numpy(), (0, sigma, sigma)))
    torch.testing.assert_close(
        similarity_map(values, side, sigma), expected.float(), atol=1e-6, rtol=1e-5
    )
    if sigma:
        torch.testing.assert_close(smooth(up, sigma), expected.float(), atol=1e-6, rtol=1e-5)


def test_a_grid_that_is_not_square_is_refused():
    with pytest.raises(RuntimeError, match="17"):
        similarity_map(torch.randn(1, 17), 32, 0)
