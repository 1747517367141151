import numpy as np
import pandas as pd
import pytest
import torch
from conftest import GOLDEN
from sklearn.linear_model import LogisticRegression

from clipad.datasets import load_dataset
from clipad.detectors import SDP, Direct
from clipad.evaluation import evaluate
from clipad.prompts import CLIP_AD, Prompts
from clipad.studies import text_distribution as D
from clipad.text import representative_vector, representative_vectors

METHODS = {
    "mean": ("mean", {}),
    "pca": ("pca", {}),
    "kde": ("kde", {"bandwidth": 0.3}),
    "dbscan": ("dbscan", {"eps": 0.5, "min_samples": 15}),
    "mean_shift": ("mean_shift", {"bandwidth": 2.0}),
}
SMALL = Prompts(
    normal=("flawless {}", "{} without crack", "perfect {}"),
    anomalous=("{} with crack", "broken {}", "damaged {}", "{} with flaw"),
    templates=(
        "a photo of a {}.",
        "a photo of the {}.",
        "a dark photo of the {}.",
        "a bright photo of a {}.",
    ),
)


def made(effect=("state",), noise=0.02, categories=("nut", "cup"), prompts=SMALL, c=32):
    """Sentences whose embeddings are a sum of one random vector per level of the named columns, plus noise."""
    rng = np.random.default_rng(0)
    rows = [
        (category, state, word, template, f"{category} {word} {template}")
        for category in categories
        for state, words in zip(D.STATES, (prompts.normal, prompts.anomalous), strict=True)
        for word in words
        for template in prompts.templates
    ]
    table = pd.DataFrame(rows, columns=["category", "state", "word", "template", "sentence"])
    e = noise * rng.normal(size=(len(table), c))
    for column in effect:
        levels = table[column].unique()
        e += (
            pd.DataFrame(rng.normal(size=(len(levels), c)), index=levels)
            .loc[table[column]]
            .to_numpy()
        )
    return D.Sentences(table, e / np.linalg.norm(e, axis=1, keepdims=True))


def test_sentences_keep_the_order_of_the_released_program(tiny_backbone):
    found = D.embed_sentences(tiny_backbone, CLIP_AD, ["bottle", "nut"])
    golden = np.load(GOLDEN / "rvs.npz")
    bottle = found.of("bottle")
    assert list(bottle.of("bottle", "normal").table["sentence"]) == list(golden["prompts_normal"])
    assert list(bottle.of("bottle", "anomalous").table["sentence"]) == list(
        golden["prompts_abnormal"]
    )
    row = bottle.table.iloc[22 * 9 + 22 + 3]
    assert row["sentence"] == row["template"].format(row["word"].format("bottle"))
    assert np.allclose(np.linalg.norm(found.embeddings, axis=1), 1)
    with pytest.raises(ValueError, match="screw"):
        found.of("screw")


def test_cosines_count_every_pair_once():
    cosines = D.pairwise_cosines(made().of("nut"))
    assert [len(v) for v in cosines.values()] == [12 * 11 / 2, 16 * 15 / 2, 12 * 16]
    assert cosines["within normal"].mean() > cosines["between"].mean()


@pytest.mark.parametrize(
    ("effect", "factor"),
    [("state", "state"), ("word", "state word"), ("template", "template"), ("category", "object")],
)
def test_explained_variance_finds_the_factor_that_was_put_in(effect, factor):
    found = D.explained_variance(made((effect,)))
    assert found["share"].sum() == pytest.approx(1)
    assert found["df"].sum() == 2 * 28 - 1
    assert (found["share"] > -1e-9).all()
    if factor == "state word":  # words of a state share no vector, but their means differ by chance
        assert found.loc[["state", "state word"], "share"].sum() > 0.97
    else:
        assert found.loc[factor, "share"] > 0.97
    assert found.loc["rest", "chance"] > 0.5


def test_explained_variance_equals_a_regression_on_dummies():
    sentences = made(("state", "word", "template"), noise=0.3).of("nut")
    e = sentences.embeddings - sentences.embeddings.mean(axis=0)
    found = D.explained_variance(sentences)["share"]
    for columns, names in (
        (["word"], ["state", "state word"]),
        (["word", "template"], ["state", "state word", "template"]),
    ):
        x = pd.get_dummies(sentences.table[columns]).to_numpy(float)
        fitted = x @ np.linalg.lstsq(x, e, rcond=None)[0]
        assert (fitted**2).sum() / (e**2).sum() == pytest.approx(found[names].sum())
    assert "object" not in found.index


def test_spectrum_is_that_of_the_covariance():
    e = made().embeddings
    values = np.linalg.eigvalsh(np.cov(e.T))[::-1]
    assert np.allclose(D.spectrum(e)[:5], (values / values.sum())[:5])
    assert D.effective_dimension(np.full(8, 1 / 8)) == pytest.approx(8)


def test_the_probe_never_sees_the_group_it_judges(monkeypatch):
    seen = []
    fit = LogisticRegression.fit

    def spy(self, x, y):
        seen.append(x)
        return fit(self, x, y)

    monkeypatch.setattr(LogisticRegression, "fit", spy)
    e = np.repeat(np.arange(8.0)[:, None], 5, axis=0)  # a row's value is its group
    D.probe_accuracy(e, np.repeat(np.arange(8) % 2, 5), np.repeat(np.arange(8), 5))
    left_out = [set(range(8)) - set(np.unique(x)) for x in seen]
    assert sorted(map(tuple, left_out)) == [(k,) for k in range(8)]


def test_separability_tells_a_state_from_mere_words():
    true, words = D.separability(made(("state", "word"))), D.separability(made(("word",), c=64))
    assert true.loc["probe, held-out state words", "state"] > 0.95
    assert true.loc["silhouette", "state"] > true.loc["silhouette", "control_high"]
    # Random words without a common state: a template held out is easy, whatever the labels; a word held out is not.
    assert words.loc["probe, held-out templates", "control"] > 0.95
    assert words.loc["probe, held-out state words", "state"] < 0.7
    # One vector for all of "with" and one for all of "without": form, not meaning, and another phrasing shows it.
    form = {
        w: "without" if "without" in w else "with" if "with" in w.split() else w
        for w in CLIP_AD.normal + CLIP_AD.anomalous
    }
    sentences = made(
        ("word",), prompts=Prompts(CLIP_AD.normal, CLIP_AD.anomalous, SMALL.templates), c=256
    )
    same = sentences.table["word"].map(form)
    e = sentences.embeddings[
        [same.eq(f).idxmax() for f in same]
    ]  # a word's vector is that of its form
    noise = np.random.default_rng(0).normal(scale=1e-3, size=e.shape)
    shared = D.separability(D.Sentences(sentences.table, e + noise), draws=1)
    assert (
        shared.loc["probe, held-out state words", "state"]
        > 0.6
        > shared.loc["probe, held-out state words", "control"]
    )
    assert shared.loc["probe, held-out phrasing", "state"] < 0.6
    assert true.loc["probe, held-out phrasing", "state"] > 0.9
    assert "probe, held-out objects" not in D.separability(made().of("nut")).index
    single = Prompts(("fine {}",), ("bad {}",), SMALL.templates)
    assert np.isnan(
        D.separability(made(prompts=single)).loc["probe, held-out state words", "state"]
    )


def test_word_cosines_and_negation():
    sentences = made(("state",), noise=0.01)
    words = D.word_cosines(sentences.of("nut"))
    assert words.shape == (7, 7)
    assert np.allclose(np.diag(words), 1)
    pairs = D.negation_pairs(words)
    assert list(pairs.index) == ["crack"]
    assert pairs.loc["crack", "negation"] < pairs.loc["crack", "same_state"]
    none = D.negation_pairs(
        D.word_cosines(made(prompts=Prompts(("fine {}", "good {}"), ("bad {}",), SMALL.templates)))
    )
    assert list(none.columns) == ["negation", "same_state"]
    assert none.empty


def test_extremes_and_silhouettes():
    sentences = made(("state", "template"), noise=0.1)
    found = D.extremes(sentences.of("nut"), 2)
    assert len(found) == 8
    normal = found[found["state"] == "normal"]["cosine"].to_numpy()
    assert (np.diff(normal) <= 0).all()
    values = D.silhouettes(sentences.of("nut"))
    assert np.isnan(values["object"])
    assert -1 <= values["state"] <= 1


# --- what each method picks


@pytest.mark.parametrize("key", ["normal", "abnormal"])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        *METHODS.values(),
        ("dbscan", {"eps": 1.5, "min_samples": 25}),
        ("kde", {"bandwidth": 0.1}),
        ("mean_shift", {"bandwidth": 0.9}),
    ],
)
def test_choose_is_the_representative_vector_taken_apart(key, method, options):
    raw = torch.from_numpy(np.load(GOLDEN / "rvs.npz")[key]).double()
    e = torch.nn.functional.normalize(raw, dim=-1)
    choice = D.choose(e.numpy(), method, **options)
    assert np.allclose(
        choice.vector, representative_vector(e, method, **options).numpy(), atol=1e-9
    )
    assert choice.weights.sum() == pytest.approx(1)
    assert 0 < choice.used <= len(e) + 1e-6
    if method != "pca":
        mixed = choice.weights @ e.numpy()
        assert np.allclose(mixed / np.linalg.norm(mixed), choice.vector)


def test_nothing_found_is_the_mean_and_says_so():
    e = made(noise=1.0).of("nut", "normal").embeddings
    choice = D.choose(e, "dbscan", eps=1e-3)
    assert choice.used == 0
    assert D.angle(choice.vector, e.mean(axis=0)) < 1e-6
    with pytest.raises(ValueError, match="eps"):
        D.choose(e, "dbscan", epsilon=1)


def test_regimes_of_dbscan():
    sentences = made(("state", "template"), noise=0.05)
    methods = {eps: ("dbscan", {"eps": eps, "min_samples": 2}) for eps in (1e-4, 0.5, 2.0)} | {
        "mean": ("mean", {})
    }
    choices = D.choose_all(sentences, methods)
    found = D.describe_choices(sentences, choices).set_index("method")
    assert set(found.loc[1e-4, "regime"]) == {"finds nothing"}
    assert set(found.loc[0.5, "regime"]) == {"selects"}
    assert set(found.loc[2.0, "regime"]) == {"is the mean"}
    assert np.allclose(found.loc[2.0, "share"], 1)
    angles = D.angles_between(choices)
    assert np.allclose(angles, angles.T)
    assert angles.loc["mean", 2.0] < 1e-6 < angles.loc["mean", 0.5]


def test_kept_names_words_and_templates_of_the_cluster():
    sentences = made(("template",), noise=0.01, categories=("nut",))
    choices = D.choose_all(
        sentences, {"db": ("dbscan", {"eps": 0.3, "min_samples": 2}), "mean": ("mean", {})}
    )
    row = D.kept(sentences, choices, "db").loc[("nut", "normal")]
    assert (row["sentences"], row["state words"], row["templates"]) == (
        "3 of 12",
        "3 of 3",
        "1 of 3",
    )
    assert row["names"] in {D.without_articles(t).rstrip(".") for t in SMALL.templates}
    assert D.kept(sentences, choices, "mean").loc[("nut", "anomalous"), "sentences"] == "16 of 16"
    assert len(sentences.one_article()) == 3 * 7  # "a photo of a" and "a photo of the" are one


def test_beyond_band_counts_only_where_the_method_selects():
    described = pd.DataFrame(
        {
            "method": [0.1, 0.1, 0.5, 0.5, 0.9],
            "regime": ["selects", "is the mean", "selects", "selects", "is the mean"],
        }
    )
    curve = pd.DataFrame({"value": [0.1, 0.5, 0.9], "auroc": [0.9, 0.4, 0.2]})
    bands = pd.DataFrame({"full": [0.7], "low": [0.6], "high": [0.8]}, index=["auroc"])
    row = D.beyond_band(described, curve, bands, ["auroc"]).loc["auroc"]
    assert list(row[["values", "from", "to", "above", "below"]]) == [2, 0.1, 0.5, 1, 1]
    none = D.beyond_band(described.assign(regime="is the mean"), curve, bands, ["auroc"])
    assert none.loc["auroc", "values"] == 0


# --- selections and their metrics


def test_subsets_draw_whole_templates_and_words():
    sentences = made()
    table = sentences.of("nut").table
    for selection in D.subsets(sentences, "template", (1, 3, 4, 99), draws=3):
        for state, rows in zip(D.STATES, selection.rows, strict=True):
            picked = table[table["state"] == state].iloc[rows]
            assert picked["template"].nunique() == selection.value
            assert len(rows) == selection.value * picked["word"].nunique()
    sizes = [s.value for s in D.subsets(sentences, "template", (1, 4, 99), draws=3)]
    assert sizes == [1, 1, 1, 4]  # the full set once, nothing beyond it
    assert [s.value for s in D.subsets(sentences, "word", (3,), draws=2)] == [
        3,
        3,
    ]  # three of four anomalous words


def test_leaving_a_word_out_takes_all_its_sentences_and_no_other():
    sentences = made()
    found = D.leave_one_word_out(sentences, "dbscan", eps=0.5)
    assert len(found) == 7
    for selection in found:
        state, word = selection.value.split(": ", 1)
        kept = [
            sentences.of("cup", s).table.iloc[rows]["word"].unique()
            for s, rows in zip(D.STATES, selection.rows, strict=True)
        ]
        assert word not in kept[D.STATES.index(state)]
        assert sum(map(len, kept)) == 6
        assert selection.options == {"eps": 0.5}


@pytest.fixture
def demo():
    return load_dataset("demo", categories=["gear", "tile"])


def test_measure_equals_evaluate(tiny_backbone, demo):
    rvs = {"prompts": SMALL, "rvs": "kde", "rvs_options": {"bandwidth": 0.3}}
    detectors = [Direct(tiny_backbone, **rvs), SDP(tiny_backbone, **rvs)]
    sentences = D.embed_sentences(tiny_backbone, SMALL, demo.categories)
    methods = {"mean": ("mean", {}), "kde": ("kde", {"bandwidth": 0.3})}
    measured = D.measure(
        sentences, D.bootstrap(sentences, methods, 2), detectors, demo, progress=False
    )
    text, _ = D.text_vectors(
        [sentences.of("gear", s).embeddings for s in D.STATES],
        D.Selection("x", 0, 0, "kde", {"bandwidth": 0.3}),
    )
    assert torch.allclose(
        text, representative_vectors(tiny_backbone, "gear", SMALL, "kde", bandwidth=0.3), atol=1e-5
    )
    full = measured[(measured["draw"] == 0) & (measured["value"] == "kde")].set_index("category")
    for detector in detectors:
        table = evaluate(detector, demo, progress=False).table
        for metric in ("image_auroc", "pixel_auroc", "pixel_pro"):
            assert full[f"{detector.name} {metric}"].to_numpy() == pytest.approx(
                table.loc[full.index, metric].to_numpy(), abs=1e-3
            )
        assert full["class_auroc"].to_numpy() == pytest.approx(
            table.loc[full.index, "class_auroc"].to_numpy(), abs=1e-3
        )

    # two methods x (full + 2 draws x 2 kinds of images) x 2 categories
    assert len(measured) == 2 * (1 + 2 * 2) * 2
    gaps = D.differences(measured)
    assert set(gaps["method"]) == {"kde"}
    row = gaps.set_index("metric").loc["class_auroc"]
    means = (
        measured[measured["images"] == "all"]
        .groupby(["draw", "value"])["class_auroc"]
        .mean()
        .unstack()
    )
    gap = means["kde"] - means["mean"]
    assert row["difference"] == pytest.approx(gap[0])
    assert row["sentences_low"] == pytest.approx(gap[1:].quantile(0.025))
    band = D.bands(measured, "kde").loc["class_auroc"]
    assert band["full"] == pytest.approx(means["kde"][0])
    assert band["low"] <= means["kde"][1:].mean() <= band["high"]
    assert row["verdict"] == (
        "no difference shown" if row["both_low"] <= 0 <= row["both_high"] else row["verdict"]
    )
    again = D.measure(
        sentences, D.bootstrap(sentences, methods, 2), detectors, demo, progress=False
    )
    pd.testing.assert_frame_equal(measured, again)


def test_a_bootstrap_resamples_images_within_their_label_and_alike_for_all_methods(
    tiny_backbone, demo
):
    labels = np.array([0, 0, 0, 1, 1, 0])
    picked = D._resample(labels, np.random.default_rng(0))
    assert sorted(labels[picked]) == sorted(labels)
    sentences = D.embed_sentences(tiny_backbone, SMALL, demo.categories)
    twice = {"one": ("mean", {}), "mean": ("mean", {})}
    measured = D.measure(
        sentences, D.bootstrap(sentences, twice, 3), [SDP(tiny_backbone)], demo, progress=False
    )
    assert (D.differences(measured).drop(columns=["method", "metric", "verdict"]) == 0).all(
        axis=None
    )


def test_without_masks_there_are_image_metrics_only(tiny_backbone, tmp_path):
    from PIL import Image

    rng = np.random.default_rng(0)
    for folder in ("good", "broken"):
        path = tmp_path / "cup" / "test" / folder
        path.mkdir(parents=True)
        for i in range(3):
            Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(
                path / f"{i}.png"
            )
    data = load_dataset("folder", tmp_path)
    sentences = D.embed_sentences(tiny_backbone, SMALL, data.categories)
    measured = D.measure(
        sentences, D.curve("dbscan", "eps", (0.01, 2.0), min_samples=2), [SDP(tiny_backbone)], data
    )
    assert D.metric_columns(measured) == ["class_auroc", "SDP image_auroc"]
    assert list(measured["fallback"]) == [True, False]


def test_layout_disparity_ignores_rotation_and_a_layout_needs_rows():
    xy = np.random.default_rng(0).normal(size=(20, 2))
    turned = xy @ np.array([[0.0, -1.0], [1.0, 0.0]]) * 3 + 5
    assert D.layout_disparity(xy, turned) < 1e-12
    assert D.layout_disparity(xy, np.random.default_rng(1).normal(size=(20, 2))) > 0.5
    with pytest.raises(ValueError, match="at least 10"):
        D.umap_layout(np.eye(5))
