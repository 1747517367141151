import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN

from clipad.prompts import CLIP_AD, WINCLIP, load_prompts
from clipad.text import representative_vector, representative_vectors

RVS = np.load(GOLDEN / "rvs.npz")


@pytest.mark.parametrize(
    ("name", "method", "options"),
    [
        ("mean", "mean", {}),
        ("pca", "pca", {}),
        ("kde", "kde", {"bandwidth": 0.3}),
        ("dbscan_mvtec", "dbscan", {"eps": 0.5, "min_samples": 15}),
        ("dbscan_visa", "dbscan", {"eps": 1.5, "min_samples": 25}),
        ("mean_shift", "mean_shift", {"bandwidth": 2.0}),
    ],
)
def test_equals_the_released_program(name, method, options):
    for column, state in enumerate(("normal", "abnormal")):
        found = representative_vector(torch.from_numpy(RVS[state]).float(), method, **options)
        expected = F.normalize(torch.from_numpy(RVS[name][:, column]), dim=0)
        assert 1 - float(found @ expected) < 1e-6
        assert float(found.norm()) == pytest.approx(1, abs=1e-6)


def test_published_options_are_the_defaults():
    e = torch.from_numpy(RVS["normal"]).float()
    assert torch.equal(
        representative_vector(e), representative_vector(e, "dbscan", eps=0.5, min_samples=15)
    )
    assert torch.equal(
        representative_vector(e, "kde"), representative_vector(e, "kde", bandwidth=0.3)
    )


@pytest.mark.parametrize(
    ("method", "options"), [("dbscan", {"eps": 1.5, "min_samples": 25}), ("mean_shift", {})]
)
def test_wide_clusters_are_the_mean(method, options):
    # A cloud as CLIP's text tower makes it: all sentences within a cone, so no pair is further than 1.5 apart.
    torch.manual_seed(0)
    e = F.normalize(torch.ones(200, 32) + torch.randn(200, 32), dim=-1)
    torch.testing.assert_close(
        representative_vector(e, method, **options), representative_vector(e, "mean")
    )


def test_all_noise_falls_back_to_the_mean_and_says_where():
    e = torch.eye(20)
    with pytest.warns(UserWarning, match=r"'nut' \(normal\)"):
        found = representative_vector(e, "dbscan", what="'nut' (normal)")
    torch.testing.assert_close(found, representative_vector(e, "mean"))


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("median", {}, "median"),
        ("kde", {"eps": 1}, "eps"),
        ("dbscan", {"eps": -1}, "eps.*-1"),
    ],
)
def test_wrong_methods_are_refused(method, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        representative_vector(torch.randn(5, 4), method, **options)


def test_bad_embeddings_are_refused():
    with pytest.raises(ValueError, match="M x C"):
        representative_vector(torch.zeros(0, 4), "mean")
    with pytest.raises(ValueError, match="finite"):
        representative_vector(torch.full((3, 4), torch.nan), "mean")


def test_sentences_are_the_papers_in_its_order():
    normal, anomalous = CLIP_AD.sentences("bottle")
    assert normal == RVS["prompts_normal"].tolist()
    assert anomalous == RVS["prompts_abnormal"].tolist()


def test_winclip_counts():
    normal, anomalous = WINCLIP.sentences("bottle")
    assert (len(normal), len(anomalous)) == (7 * 21, 4 * 21)
    assert WINCLIP.templates.count("a jpeg corrupted photo of the {}.") == 2


def test_an_empty_object_is_refused():
    with pytest.raises(ValueError, match="no name"):
        CLIP_AD.sentences("  ")


def test_own_prompts(tmp_path):
    path = tmp_path / "prompts.yaml"
    path.write_text(
        'normal: ["healthy {}"]\nanomalous: ["{} with tumour"]\nobject_names: {brain: "brain scan"}\n'
    )
    normal, anomalous = load_prompts(path).sentences("brain")
    assert normal[0] == "a cropped photo of the healthy brain scan."
    assert len(anomalous) == 22


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("normal: [healthy]", "healthy"),
        ('normal: ["{} {}"]', "{} {}"),
        ("normal: [{}]", "normal"),
        ("normal: []", "normal"),
        ("object_names: {screw: [metal screw]}", "object_names"),
        ("object_names: metal screw", "object_names"),
        ('normal: ["{} a", "{} a"]', "{} a"),
        ('normal: ["{} a"]\nanomalous: ["{} a"]', "{} a"),
        ('abnormal: ["{}"]', "abnormal"),
        ("[1, 2", "YAML"),
    ],
)
def test_wrong_prompt_files_are_refused(tmp_path, text, message):
    path = tmp_path / "prompts.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_prompts(path)


def test_representative_vectors_have_a_column_per_state(tiny_backbone):
    found = representative_vectors(tiny_backbone, "screw", method="mean")
    assert found.shape == (24, 2)
    torch.testing.assert_close(found.norm(dim=0), torch.ones(2))
