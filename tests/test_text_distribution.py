import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from small_data import make_folder

from clipad.detectors import SDP
from clipad.evaluation import evaluate
from clipad.prompts import CLIP_AD, Prompts
from clipad.studies import common
from clipad.studies import text_distribution as study
from clipad.text import representative_vector, representative_vectors

PROMPTS = Prompts(
    normal=("flawless {}", "{} without flaw", "perfect {}", "{} without crack"),
    anomalous=("damaged {}", "{} with flaw", "broken {}", "{} with crack"),
    templates=("a photo of a {}.", "a photo of the {}.", "a dark photo of a {}.", "a small {}."),
)


@pytest.fixture
def sentences(tiny_backbone):
    return study.embed_sentences(tiny_backbone, PROMPTS, ["bolt", "leather"])


@pytest.fixture
def two_clouds():
    """One category whose rows depend on the state and, more, on the template; words do nothing."""
    rng = np.random.default_rng(0)
    rows = [
        ("bolt", state, word, template, f"{word} {template}")
        for state, words in zip(study.STATES, (PROMPTS.normal, PROMPTS.anomalous), strict=True)
        for word in words
        for template in PROMPTS.templates
    ]
    index = pd.MultiIndex.from_tuples(
        rows, names=["category", "state", "word", "template", "sentence"]
    )
    state, template = rng.normal(size=24), rng.normal(size=(4, 24))
    e = np.array(
        [(1 if s == "normal" else -1) * state + 2 * template[PROMPTS.templates.index(t)]
         for _, s, _, t, _ in rows]
    )  # fmt: skip
    return pd.DataFrame(e / np.linalg.norm(e, axis=1, keepdims=True), index)


def test_sentences_are_those_of_the_prompts_in_their_order(sentences):
    normal, anomalous = PROMPTS.sentences("leather")
    assert list(sentences.loc["leather"].index.get_level_values("sentence")) == [
        *normal, *anomalous,
    ]  # fmt: skip
    np.testing.assert_allclose(np.linalg.norm(sentences, axis=1), 1)


@pytest.mark.parametrize(("eps", "share"), [(1e-4, 0), (2.0, 1)])
def test_dbscan_finds_nothing_or_is_the_mean_at_the_ends(sentences, eps, share):
    found = study.what_dbscan_keeps(sentences, [eps], min_samples=3)
    assert set(found["share"]) == set(found["words"]) == {share}
    chosen = study.vectors(sentences, "dbscan", eps=eps, min_samples=3)
    for category, mean in study.vectors(sentences).items():
        torch.testing.assert_close(chosen[category], mean)


def test_what_is_kept_is_what_the_vector_averages(two_clouds):
    own = two_clouds.loc["bolt"].loc["normal"]
    options = {"eps": 0.1, "min_samples": 3}
    kept = study.largest_cluster(own, **options)
    assert 0 < kept.sum() < len(own)
    vector = own[kept].mean().to_numpy()
    e = torch.tensor(own.to_numpy())
    expected = representative_vector(e, "dbscan", **options).numpy()
    np.testing.assert_allclose(vector / np.linalg.norm(vector), expected)
    row = study.what_dbscan_keeps(two_clouds, [0.1], 3).loc[0]
    assert row["share"] == kept.mean()
    assert row["words"] == 1
    assert row["templates"] == tuple(own[kept].index.unique("template"))


@pytest.mark.parametrize("method", ["mean", "pca", "kde", "mean_shift"])
def test_vectors_of_all_sentences_are_those_of_the_detectors(tiny_backbone, sentences, method):
    found = study.vectors(sentences, method)
    expected = representative_vectors(tiny_backbone, "bolt", PROMPTS, method)
    torch.testing.assert_close(found["bolt"], expected, atol=1e-5, rtol=0)


def test_measured_metrics_are_those_of_evaluate(tiny_backbone, sentences, tmp_path):
    data = make_folder(tmp_path, categories=("bolt", "leather"))
    detector = SDP(tiny_backbone, PROMPTS, rvs="mean")
    kept = common.keep(detector, data)
    found = study.measure(detector, kept, {"mean": study.vectors(sentences)})
    expected = evaluate(detector, data, progress=False).table.loc["mean"]
    for metric in ("class_auroc", "image_auroc", "pixel_pro"):
        assert found.loc["mean", metric] == pytest.approx(expected[metric], abs=1e-4)


@pytest.mark.slow
def test_layouts_are_equal_for_a_seed(two_clouds):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first, again = (study.umap_layout(two_clouds, 3) for _ in range(2))
    np.testing.assert_array_equal(first, again)


def test_every_mark_says_its_sentence(two_clouds):
    layout = np.random.default_rng(0).normal(size=(len(two_clouds), 2))
    found = study.find_a_sentence(layout, two_clouds, "the sentences").data
    assert found.count("<title>") == len(two_clouds)
    assert 'aria-label="the sentences"' in found
    assert all(f"<title>{text}</title>" in found for text in two_clouds.index.unique("sentence"))
    assert "script" not in found


def test_the_papers_sentences_are_418(tiny_backbone):
    assert len(study.embed_sentences(tiny_backbone, CLIP_AD, ["bolt"])) == 418
