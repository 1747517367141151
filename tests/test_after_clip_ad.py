"""Notebook 08's ideas against plain double loops on toys, and who is a reference, tested or remembered."""

import numpy as np
import pytest
import torch

import clipad
from clipad.studies import after_clip_ad as study
from clipad.studies.after_clip_ad import ideas
from clipad.studies.common import keep, thinned
from clipad.studies.sdp_plus_fine_tuning import LayersAlone
from clipad.surgery import similarity_map


@pytest.fixture
def toy():
    """Tokens of five images with 3 x 3 patches of width 4, and of three references."""
    generator = torch.manual_seed(0)
    return torch.randn(5, 9, 4, generator=generator), torch.randn(3, 9, 4, generator=generator)


def standardised(image):
    return (image - image.mean()) / (image.var(correction=0) + 1e-5).sqrt()


SCALED = {
    ideas.standardised: standardised,
    ideas.unit_length: lambda image: image / image.norm(dim=-1, keepdim=True),
}


@pytest.mark.parametrize("scaled", SCALED, ids=lambda f: f.__name__)
def test_nearest_distance_is_a_double_loop(toy, scaled):
    tokens, known = (torch.stack([SCALED[scaled](image) for image in x]) for x in toy)
    expected = torch.empty(5, 9)
    for i in range(5):
        for n in range(9):
            expected[i, n] = min((tokens[i, n] - p).norm() for image in known for p in image)
    found = ideas.nearest_patch(*toy, scaled)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_batch_distance_is_a_double_loop(toy):
    tokens, _ = toy
    expected = torch.empty(5, 9)
    for i in range(5):
        for n in range(9):
            others = [min((tokens[i, n] - p).norm() for p in tokens[j]) for j in range(5) if j != i]
            lowest = sorted(others)[:2]  # half of four
            expected[i, n] = sum(lowest) / 2
    found = ideas.batch_distance(tokens, share=0.5)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_copy_in_the_batch_is_no_distance(toy):
    tokens = toy[0].clone()
    tokens[1] = tokens[0]
    found = ideas.batch_distance(tokens, share=0.3)
    assert found[:2].max() < 1e-2 < found[2:].min()


def test_neighbourhoods_are_means_with_zeros_outside(toy):
    image = toy[0][:1]
    found = ideas.neighbourhood_means(image, 3)
    torch.testing.assert_close(found[0, 4], image[0].mean(dim=0))  # the middle one sees all nine
    torch.testing.assert_close(found[0, 0], image[0][[0, 1, 3, 4]].sum(dim=0) / 9)
    torch.testing.assert_close(ideas.neighbourhood_means(image, 1), image)


def test_subspace_residual_is_pca(toy):
    from sklearn.decomposition import PCA

    tokens, bank = (torch.stack([standardised(i) for i in x]).double() for x in toy)
    fitted = PCA(n_components=0.8, svd_solver="full").fit(bank.flatten(0, 1).numpy())
    flat = tokens.flatten(0, 1).numpy()
    rest = flat - fitted.inverse_transform(fitted.transform(flat))
    expected = torch.from_numpy((rest**2).sum(axis=1)).reshape(5, 9).float()
    found = ideas.subspace_residual(*toy, variance=0.8)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def test_retrieved_is_a_double_loop(toy):
    tokens, keys = toy[0], toy[1].flatten(0, 1)
    labels = (torch.arange(27) % 3 == 0).float()
    expected = torch.empty(5, 9)
    for i in range(5):
        for n in range(9):
            weights = [
                torch.exp(torch.cosine_similarity(tokens[i, n], k, dim=0) / 0.1) for k in keys
            ]
            expected[i, n] = sum(w * y for w, y in zip(weights, labels, strict=True)) / sum(weights)
    torch.testing.assert_close(ideas.retrieved(tokens, keys, labels, 0.1), expected)


def test_learned_directions_find_what_separates():
    generator = torch.manual_seed(0)
    keys = torch.randn(200, 4, generator=generator)
    labels = (keys[:, 0] > 0).float()
    found = ideas.learned_directions(keys, labels)(keys[None])[0]
    assert ((found > 0.5) == labels.bool()).float().mean() > 0.95


def smooth_maps(values, size):
    return similarity_map(values, size, 8 / 240 * size).numpy()


@pytest.fixture(scope="module")
def kept():
    """SDP+'s features of two demo products, untrained layers."""
    backbone = clipad.load_backbone("demo")
    dataset = clipad.load_dataset("demo_aux", categories=["carpet", "pill"])
    layers = clipad.linear_layers.LinearLayers(*backbone.visual.proj.shape, 4, 0)
    plus = clipad.SDPPlus(backbone, layers, rvs="mean")
    return clipad.SDP(backbone, rvs="mean"), keep(plus, thinned(dataset, 24))


def test_references_are_flawless_and_never_tested(kept):
    _, features = kept
    test = study.split(features, seed=3)
    assert [len(bank[0]) for bank in test.bank.values()] == [6, 6]
    assert len(test.tested.dataset) == len(features.dataset) - 12
    for category, bank in test.bank.items():
        tested = test.tokens[category][0][:, 0]
        for token in bank[0][:, 0]:
            assert not (tested == token).all(dim=1).any(), category
    assert (test.tested.labels == 1).sum() == (features.labels == 1).sum()
    again = study.split(features, seed=3)
    assert torch.equal(again.bank["pill"][0], test.bank["pill"][0])


def test_memory_is_balanced_and_forgets_a_category(kept):
    memory = study.remember(kept[1])
    assert memory.labels.mean() == 0.5
    keys, labels = memory.others("pill", 2)
    assert torch.equal(keys, memory.keys[2][torch.from_numpy(memory.categories == "carpet")])
    assert len(keys) == len(labels) < len(memory.labels)


def test_values_are_sums_over_stages_in_the_order_of_the_data_set(kept):
    test = study.split(kept[1])
    shown = test.values(lambda tokens, bank: tokens[..., 0])
    features = test.tested.features.ordinary
    torch.testing.assert_close(shown, sum(tokens[:, 1:, 0] for tokens in features))
    pairs = zip(test.tokens["pill"], test.bank["pill"], strict=True)
    expected = sum(ideas.subspace_residual(x, bank[:4], 0.9) for x, bank in pairs)
    found = test.maps("one PCA of 4", 0.9)[test.tested.where("pill")]
    size = test.tested.masks.shape[-1]
    np.testing.assert_allclose(found, smooth_maps(expected, size), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_free_choices_come_from_what_was_tried(kept):
    sdp, features = kept
    memory = study.remember(features)
    settings, tried = study.choose(sdp, study.split(features), memory)
    best = tried.loc[tried.groupby("what")["pro"].idxmax()].set_index("what")["value"]
    assert best.to_dict() == settings
    assert len(tried) == 2 + 4 + 3 + 4 + 7 + 7


@pytest.mark.slow
def test_an_idea_stands_there_as_chosen_and_as_published(kept):
    sdp, features = kept
    test, memory = study.split(features), study.remember(features)
    layers = clipad.linear_layers.LinearLayers(*sdp.backbone.visual.proj.shape, 4, 0)
    trained = [kind(sdp.backbone, layers, rvs="mean") for kind in (clipad.SDPPlus, LayersAlone)]
    settings = {"lengths": "kept", "variance": 0.7, "largest neighbourhood": 1, "temperature": 0.1}
    settings |= {"weight of nearest": 0.03, "weight of the batch": 0.1}
    maps, spent = study.every_map((sdp, *trained), test, memory, settings)
    published = [f"{name}, published" for name in study.OF_THE_PRODUCT]
    assert list(maps) == [*study.USES, *published]
    assert set(spent) == set(ideas.IDEAS)
    pill = test.tested.where("pill")
    pairs = list(zip(test.tokens["pill"], test.bank["pill"], strict=True))
    near, pca = ideas.nearest_patch, ideas.subspace_residual
    expected = {
        "nearest of 4": sum(near(x, bank[:4], ideas.standardised) for x, bank in pairs),
        "nearest of 4, published": sum(near(x, bank[:4], ideas.unit_length) for x, bank in pairs),
        "one PCA of 4": sum(pca(x, bank[:4], 0.7) for x, bank in pairs),
        "one PCA of 4, published": sum(pca(x, bank[:4], 0.99) for x, bank in pairs),
        "the batch": sum(ideas.batch_scores(x, (1,)) for x, _ in pairs),
        "the batch, published": sum(ideas.batch_scores(x, (1, 3, 5)) for x, _ in pairs),
    }
    for name, values in expected.items():
        found = smooth_maps(values, sdp.backbone.image_size)
        np.testing.assert_allclose(maps[name][pill], found, rtol=1e-4, atol=1e-5, err_msg=name)
    added = maps["SDP"] + 0.1 * maps["the batch"]
    np.testing.assert_allclose(maps["SDP + the batch"], added)
