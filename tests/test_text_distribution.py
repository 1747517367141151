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
from clipad.studies.text_distribution import figures
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
    table = pd.DataFrame(rows, columns=["category", "state", "word", "template", "sentence"])
    state, template = rng.normal(size=24), rng.normal(size=(4, 24))
    e = np.array(
        [(1 if s == "normal" else -1) * state + 2 * template[PROMPTS.templates.index(t)]
         for s, t in zip(table["state"], table["template"], strict=True)]
    )  # fmt: skip
    return study.Sentences(table, e / np.linalg.norm(e, axis=1, keepdims=True))


def test_sentences_are_those_of_the_prompts_in_their_order(sentences):
    normal, anomalous = PROMPTS.sentences("leather")
    assert list(sentences.of("leather").table["sentence"]) == [*normal, *anomalous]
    np.testing.assert_allclose(np.linalg.norm(sentences.embeddings, axis=1), 1)


def test_shares_of_the_spread_add_up_and_follow_the_construction(sentences, two_clouds):
    for found in (sentences.of("bolt"), two_clouds):
        shares = study.explained_variance(found)
        np.testing.assert_allclose(shares.sum(), 1)
        assert (shares["share"] >= -1e-9).all()
    built = study.explained_variance(two_clouds)["share"]
    assert built["template"] > built["state"] > 10 * built["state word"]


def test_the_probe_finds_a_state_that_is_there_and_not_one_that_is_not(two_clouds):
    found = study.separability(two_clouds, draws=6)
    assert found.loc[["templates", "state words"], "state"].min() > 0.95
    assert found.loc["state words", "control"] < 0.8
    rng = np.random.default_rng(1)
    noise = study.Sentences(two_clouds.table, rng.normal(size=two_clouds.embeddings.shape))
    assert study.separability(noise, draws=2)["state"].max() < 0.85


def test_negations_are_compared_with_the_other_words_of_their_state(sentences):
    words = study.word_cosines(sentences.of("bolt"))
    pairs = study.negation_pairs(words)
    assert list(pairs.index) == ["flaw", "crack"]
    flaw = words.loc[("normal", "{} without flaw")]
    assert pairs.loc["flaw", "negation"] == flaw["anomalous", "{} with flaw"]
    np.testing.assert_allclose(np.diag(words), 1)


@pytest.mark.parametrize(("eps", "regime"), [(1e-4, "finds nothing"), (2.0, "is the mean")])
def test_dbscan_finds_nothing_or_is_the_mean_at_the_ends(sentences, eps, regime):
    found = study.what_dbscan_does(sentences, [eps], min_samples=3)
    assert set(found["regime"]) == {regime}
    np.testing.assert_allclose(found["angle"], 0, atol=1e-3)


def test_what_is_kept_is_what_the_vector_averages(two_clouds):
    e = two_clouds.of("bolt", "normal").embeddings
    options = {"eps": 0.1, "min_samples": 3}
    kept = study.largest_cluster(e, **options)
    assert 0 < kept.sum() < len(e)
    vector = e[kept].mean(axis=0)
    expected = representative_vector(torch.from_numpy(e), "dbscan", **options).numpy()
    np.testing.assert_allclose(vector / np.linalg.norm(vector), expected)
    table = study.what_dbscan_does(two_clouds, [0.1], 3)
    assert table.loc[0, "share"] == kept.mean()
    mean = e.mean(axis=0) / np.linalg.norm(e.mean(axis=0))
    angle = np.degrees(np.arccos(expected @ mean))
    assert angle > 1
    assert table.loc[0, "angle"] == pytest.approx(angle)
    counts = study.kept_by_dbscan(two_clouds, **options).loc[("bolt", "normal")]
    assert counts["sentences"] == f"{kept.sum()} of {len(e)}"
    templates = two_clouds.of("bolt", "normal").table["template"][kept]
    assert set(table.loc[0, "templates"]) == set(templates)
    both = [set(names) for names in table["templates"]]
    assert study.shared_templates(table)[0.1] == len(both[0] & both[1]) / len(both[0] | both[1])


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


def test_subsets_hold_what_they_say(sentences):
    table = sentences.table
    for column in ("template", "word"):
        found = study.subsets(sentences, column, (1, 2, 4, 99), draws=3)
        assert {size for size, _ in found} == {1, 2, 4}
        assert sum(size == 4 for size, _ in found) == 1  # all of them: once
        for (size, _), rows in found.items():
            kinds = table.iloc[rows].groupby(["state", "category"])[column].agg(set)
            assert [len(kind) for kind in kinds] == [size] * 4
            assert kinds["normal", "bolt"] == kinds["normal", "leather"]
            if column == "template":
                assert kinds["normal", "bolt"] == kinds["anomalous", "bolt"]
    for rows in study.resampled(sentences, 3):
        drawn = table.iloc[rows].groupby(["state", "category"])["sentence"].size()
        assert (drawn == table.groupby(["state", "category"])["sentence"].size()).all()


def test_one_word_is_left_out_at_a_time(sentences):
    found = study.leave_one_word_out(sentences)
    assert len(found) == len(PROMPTS.normal) + len(PROMPTS.anomalous)
    left = sentences.table.iloc[found["normal: perfect {}"]]
    assert "perfect {}" not in set(left["word"])
    assert len(left) == len(sentences) - 2 * len(PROMPTS.templates)


@pytest.mark.slow
def test_layouts_are_equal_for_a_seed_and_too_few_rows_are_refused(two_clouds):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first, again = (study.umap_layout(two_clouds.embeddings, 3) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    with pytest.raises(ValueError, match="at least 10"):
        study.umap_layout(two_clouds.embeddings[:9])


def test_every_mark_says_its_sentence(two_clouds):
    layout = np.random.default_rng(0).normal(size=(len(two_clouds), 2))
    found = figures.find_a_sentence(layout, two_clouds, "the sentences").data
    assert found.count("<title>") == len(two_clouds)
    assert 'aria-label="the sentences"' in found
    assert all(f"<title>{text}</title>" in found for text in two_clouds.table["sentence"])
    assert "script" not in found


def test_the_papers_sentences_are_418(tiny_backbone):
    assert len(study.embed_sentences(tiny_backbone, CLIP_AD, ["bolt"])) == 418
