"""The demo world: renderer, captions, shipped collections, shipped model, training."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score

from clipad.backbone import load_backbone
from clipad.datasets import load_dataset
from clipad.detectors import SDP, Direct
from clipad.io.files import content_hash
from clipad.prompts import CLIP_AD, words
from clipad.published import data_dir
from clipad.studies.trainings import read_trainings
from clipad.surgery import feature_surgery
from demo_world import captions, collections, renderer, training, trainings
from demo_world.captions import Caption, caption, seen_words, truth_matrix
from demo_world.renderer import ATTRIBUTES, CATEGORIES, DEFECTS, Facts, render

DEMO = data_dir() / "demo"
GROUPS = collections.GROUPS
IN_GROUP = [(group, category) for group, categories in GROUPS.items() for category in categories]


def read(path):
    return np.asarray(Image.open(path))


def shipped(group, category):
    """(folder, number, image, object mask, defect mask or None) of the shipped files of a category."""
    root = DEMO / "collections" / group / category
    for path in sorted(root.glob("test/*/*.png")):
        folder, number = path.parent.name, path.stem
        object_mask = read(root / "object" / folder / f"{number}_object.png")
        mask = None
        if folder != "good":
            mask = read(root / "ground_truth" / folder / f"{number}_mask.png")
        yield folder, int(number), read(path), object_mask, mask


# The world --------------------------------------------------------------------------------------------------------


def test_the_test_collection_holds_only_what_was_never_shown_defective():
    record = json.loads((DEMO / "model" / "training.json").read_text())
    assert set(load_dataset("demo").categories) <= set(record["never_defective"])
    assert not set(load_dataset("demo_aux").categories) & set(record["never_defective"])


def test_groups_share_out_the_categories_and_name_the_shipped_ones():
    assert sorted(GROUPS["demo"] + GROUPS["demo_aux"]) == sorted(CATEGORIES)
    for name, categories in GROUPS.items():
        assert sorted(load_dataset(name).categories) == sorted(categories)


@pytest.mark.parametrize("category", CATEGORIES)
def test_every_defect_and_attribute_can_be_rendered(category):
    for k, defect in enumerate(DEFECTS):
        picture = render(np.random.default_rng([3, k]), category, defect, ATTRIBUTES[k])
        assert picture.image.shape == (96, 96, 3)
        assert picture.image.dtype == np.uint8
        assert picture.mask.dtype == picture.object_mask.dtype == bool
        assert picture.mask.any()
        assert not (picture.mask & ~picture.object_mask).any()
        assert picture.object_mask.all() == CATEGORIES[category].is_texture
        assert picture.facts.attribute == ATTRIBUTES[k]


def test_a_defect_changes_the_picture_inside_its_mask_only():
    for k, defect in enumerate(DEFECTS):
        for category in ("leather", "gear"):
            whole = render(np.random.default_rng(k), category)
            damaged = render(np.random.default_rng(k), category, defect)
            # exposure and sensor noise are drawn after the defect and differ: compare relative brightness
            ratio = (damaged.image.sum(2) + 30.0) / (whole.image.sum(2) + 30.0)
            outside = ratio[~damaged.mask]
            changed = np.abs(ratio / np.median(outside) - 1)
            assert np.median(changed[damaged.mask]) > 4 * np.median(changed[~damaged.mask]), (
                category,
                defect,
            )


def test_rendering_is_determined_by_the_generator():
    one, same, other = (
        render(np.random.default_rng(seed), "screw", "dent", "jpeg") for seed in (4, 4, 5)
    )
    assert np.array_equal(one.image, same.image)
    assert np.array_equal(one.mask, same.mask)
    assert one.facts == same.facts
    assert not np.array_equal(one.image, other.image)


@pytest.mark.parametrize(
    ("name", "value"), [("category", "spoon"), ("defect", "rust"), ("attribute", "huge")]
)
def test_unknown_names_are_refused_by_name(name, value):
    arguments = {"category": "gear"} | {name: value}
    with pytest.raises(ValueError, match=f"no {name} '{value}'; it has .*"):
        render(np.random.default_rng(0), **arguments)


# Captions ---------------------------------------------------------------------------------------------------------


def facts_of(rng):
    names = list(CATEGORIES)
    return render(
        rng,
        names[rng.integers(16)],
        (None, *DEFECTS)[rng.integers(9)],
        renderer.draw_attribute(rng),
    ).facts


def test_captions_are_true_of_their_picture_and_say_what_they_claim():
    rng = np.random.default_rng(0)
    for _ in range(300):
        facts = facts_of(rng)
        said = caption(rng, facts)
        assert truth_matrix([facts], [said]).item(), (facts, said)
        spoken = set(words(said.text))
        assert facts.category in spoken
        assert (facts.colour in spoken) or said.colour is None
        # whatever the sentence says of the state must fit: read from the words, not from the claim
        if facts.defect is None:
            assert not spoken & {"with", "broken", "damaged", "imperfect", "blemished"}
        else:
            assert not spoken & {"without", "flawless", "perfect", "unblemished"}
        for attribute in set(ATTRIBUTES) & spoken:
            assert facts.attribute == attribute


def test_truth_table():
    gear = Facts("gear", "blue", "white", "dark", "cut")
    assert truth_matrix([gear], [Caption("", "gear")]).item()
    cases = {
        Caption("", "nut"): False,
        Caption("", "gear", state="normal"): False,
        Caption("", "gear", state="broken {}"): True,
        Caption("", "gear", state="imperfect {}"): True,
        Caption("", "gear", state="{} with scratch"): False,
        Caption("", "gear", colour="red"): False,
        Caption("", "gear", colour="blue", background="white", attribute="dark"): True,
        Caption("", "gear", background="black"): False,
        Caption("", "gear", attribute="bright"): False,
    }
    assert truth_matrix([gear], list(cases)).tolist() == [list(cases.values())]
    carpet = Facts("carpet", "red", None, None, None)
    assert truth_matrix([carpet, gear], [Caption("", "carpet", state="normal")]).tolist() == [
        [True],
        [False],
    ]


def test_grammar_covers_the_papers_prompts():
    assert set(captions.ANOMALOUS_STATES) == set(CLIP_AD.anomalous)
    said = [
        *captions.PLAIN_TEMPLATES,
        *(t for ts in captions.ATTRIBUTE_TEMPLATES.values() for t in ts),
    ]
    assert sorted(said) == sorted(CLIP_AD.templates)
    assert all(len(templates) == 2 for templates in captions.ATTRIBUTE_TEMPLATES.values())
    for sentences in CLIP_AD.sentences("screw"):
        assert {word for sentence in sentences for word in words(sentence)} <= seen_words()


def test_seen_words_are_those_of_captions_and_need_no_torch():
    rng = np.random.default_rng(1)
    assert {
        word for _ in range(300) for word in words(caption(rng, facts_of(rng)).text)
    } <= seen_words()
    assert not seen_words() & {"anomalous", "metal", "wonderful"}
    shipped = (data_dir() / "demo" / "model" / "words.txt").read_text(encoding="utf-8").split()
    assert shipped == sorted(seen_words())
    code = "import sys; from demo_world.captions import seen_words; seen_words(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# The shipped collections ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("group", "category"), IN_GROUP)
def test_layout_counts_and_masks(group, category):
    files = list(shipped(group, category))
    counts = {name: sum(folder == name for folder, *_ in files) for name in ("good", *DEFECTS)}
    assert counts["good"] == 20
    assert sum(counts.values()) == 40
    assert set(counts.values()) == {20, 2, 3}
    masks = list((DEMO / "collections" / group / category).glob("ground_truth/*/*_mask.png"))
    assert len(masks) == 20
    for folder, number, image, object_mask, mask in files:
        where = (category, folder, number)
        assert image.shape == (96, 96, 3), where
        assert object_mask.shape == (96, 96), where
        assert object_mask.any(), where
        assert object_mask.all() == CATEGORIES[category].is_texture, where
        if mask is not None:
            assert mask.sum() >= 9, where
            assert not (mask & ~object_mask).any(), where


@pytest.mark.parametrize(("group", "category"), [("demo", "gear"), ("demo_aux", "wood")])
def test_shipped_pictures_come_from_the_shipped_code(group, category, tmp_path):
    collections.write_category(tmp_path, category)
    root = DEMO / "collections" / group / category
    files = sorted(path.relative_to(root) for path in root.rglob("*.png"))
    assert files == sorted(
        path.relative_to(tmp_path / category) for path in tmp_path.rglob("*.png")
    )
    for name in files:
        # The bytes of a PNG depend on the version of zlib, and a sine's last bit on the processor: a few pixels of
        # 9216 may round the other way elsewhere.
        differing = (read(root / name) != read(tmp_path / category / name)).mean()
        assert differing < 1e-3, name


def test_validation_and_test_pictures_differ():
    one, other = (
        next(collections.render_category("wood", seed))[2].image
        for seed in (collections.SHIPPED_SEED, collections.VALIDATION_SEED)
    )
    assert not np.array_equal(one, other)


def test_validation_never_overwrites_the_shipped_collections(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["collections", "--validation"])
    with pytest.raises(SystemExit):
        collections.main()
    assert "--output" in capsys.readouterr().err


def test_size_of_what_is_shipped():
    assert sum(path.stat().st_size for path in DEMO.rglob("*.png")) < 12e6
    assert (DEMO / "model" / "model.safetensors").stat().st_size < training.FILE_LIMIT


# The shipped model ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    config = json.loads((DEMO / "model" / "open_clip_config.json").read_text())
    model = open_clip.CLIP(**config["model_cfg"])
    model.load_state_dict(load_file(DEMO / "model" / "model.safetensors"), strict=True)
    assert tuple(config["preprocess_cfg"]["mean"]) == training.MEAN
    assert tuple(config["preprocess_cfg"]["std"]) == training.STD
    return model.eval()


@pytest.mark.slow
def test_model_card_states_what_the_model_reaches(model):
    """The image AUROCs in data/demo/README.md, recomputed from the shipped files of the test collection."""
    tokenizer = open_clip.SimpleTokenizer(context_length=training.CONTEXT_LENGTH)
    card = (DEMO / "README.md").read_text(encoding="utf-8")
    stated = {
        name.strip("*"): float(value)
        for name, value in re.findall(r"^\| (\S+).*? \| (\d\.\d{3}) \|", card, re.M)
    }
    for category in GROUPS["demo"]:
        folders, _, images, _, _ = zip(*shipped("demo", category), strict=True)
        images = torch.from_numpy(np.stack(images))
        scores = training.anomaly_scores(model, tokenizer, images, category)
        labels = [folder != "good" for folder in folders]
        assert roc_auc_score(labels, scores) == pytest.approx(stated[category], abs=0.006), category


# Training ---------------------------------------------------------------------------------------------------------

TINY = training.Settings(steps=(3,), batch_size=8, categories_per_batch=2, width=32)


@pytest.fixture
def small_validation(monkeypatch):
    """Two categories with four pictures each: validation is most of the time of a training of three steps."""
    rng = np.random.default_rng(0)
    labels = np.array([0, 0, 1, 1])
    pictures = {
        name: (
            torch.from_numpy(
                np.stack([render(rng, name, "cut" if x else None).image for x in labels])
            ),
            labels,
        )
        for name in ("gear", "wood")
    }
    monkeypatch.setattr(training, "rendered", lambda seed: pictures)


@pytest.mark.slow
def test_a_resumed_training_ends_with_the_weights_of_an_unbroken_one(tmp_path, small_validation):
    unbroken = training.train(TINY, tmp_path / "unbroken", validate_every=1)
    training.train(TINY, tmp_path / "broken", validate_every=1, stop_after=1e-9)
    assert torch.load(tmp_path / "broken" / "state.pt", weights_only=True)["step"] == 1
    resumed = training.train(TINY, tmp_path / "broken", validate_every=1, workers=1)

    assert list(resumed["step"]) == [1, 2, 3]
    assert resumed.drop(columns="seconds").equals(unbroken.drop(columns="seconds"))
    one, other = (
        torch.load(tmp_path / name / "state.pt", weights_only=True)["model"]
        for name in ("unbroken", "broken")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (tmp_path / "broken" / "log.csv").read_text().count("\n") == 4
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.slow
def test_a_finished_training_goes_on_with_another_cycle(tmp_path, small_validation):
    two_cycles = replace(TINY, steps=(3, 2))
    at_once = training.train(two_cycles, tmp_path / "at_once", validate_every=3)
    training.train(TINY, tmp_path / "later", validate_every=3)
    later = training.train(two_cycles, tmp_path / "later", validate_every=3)

    assert list(later["step"]) == [3, 5]
    assert later.drop(columns="seconds").equals(at_once.drop(columns="seconds"))
    with pytest.raises(ValueError, match=r"steps \(3, 2\) \(now \(3,\)\)"):
        training.train(TINY, tmp_path / "later")


def test_each_cycle_warms_up_and_ends_with_whole_images():
    settings = training.Settings(steps=(100, 50))
    rates = [training.learning_rate(step, settings) for step in range(150)]
    assert rates[3] == rates[101] == settings.learning_rate
    assert rates[99] == rates[149] == pytest.approx(0.02 * settings.learning_rate)
    assert rates[100] == settings.learning_rate / 2
    whole = [training.cycle_done(step, settings) > 1 - training.WHOLE_IMAGES for step in range(150)]
    assert (whole.index(True), sum(whole[:100]), sum(whole[100:])) == (88, 12, 6)


@pytest.mark.slow
def test_a_training_exports_its_best_validation(tmp_path, small_validation):
    log = training.train(TINY, tmp_path, validate_every=1)
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["chosen"]["image_auroc"] == log["image_auroc"].max()
    config = json.loads((tmp_path / "open_clip_config.json").read_text())
    weights = load_file(tmp_path / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float16}
    open_clip.CLIP(**config["model_cfg"]).load_state_dict(weights, strict=True)


def test_training_with_other_settings_is_not_continued(tmp_path, small_validation):
    training.train(TINY, tmp_path, stop_after=1e-9)
    with pytest.raises(ValueError, match=r"seed 1 \(now 2\)"):
        training.train(replace(TINY, seed=2), tmp_path)


def test_never_defective_categories_are_shown_whole_only(monkeypatch):
    seen = []
    draw = training.render
    monkeypatch.setattr(training, "render", lambda *a: seen.append(draw(*a).facts) or draw(*a))
    batches = training.Batches(training.Settings(batch_size=32, categories_per_batch=16))
    images, tokens, true = batches[0]
    assert images.shape == (32, 96, 96, 3)
    assert tokens.shape == (32, training.CONTEXT_LENGTH)
    assert true.diagonal().all()
    defective = {facts.category for facts in seen if facts.defect}
    assert defective == set(CATEGORIES) - set(renderer.NEVER_DEFECTIVE)


def test_twins_are_alike_but_for_the_defect(monkeypatch):
    seen = []
    draw = training.render
    monkeypatch.setattr(training, "render", lambda *a: seen.append(draw(*a)) or seen[-1])
    training.Batches(training.Settings(batch_size=32, categories_per_batch=16))[0]
    for whole, other in zip(seen[::2], seen[1::2], strict=True):
        assert whole.facts.defect is None
        if other.facts.defect:
            difference = np.abs(whole.image[~other.mask].astype(float) - other.image[~other.mask])
            assert (
                np.median(difference) < 20
            )  # of 255: the noise of the camera and shading of a dent


def test_true_captions_of_other_images_are_no_negatives():
    generator = torch.Generator().manual_seed(0)
    images, texts = (F.normalize(torch.randn(3, 4, generator=generator), dim=-1) for _ in range(2))
    none, other = torch.eye(3, dtype=torch.bool), torch.eye(3, dtype=torch.bool)
    other[0, 1] = True
    logits = 10 * images @ texts.T
    plain = (
        F.cross_entropy(logits, torch.arange(3)) + F.cross_entropy(logits.T, torch.arange(3))
    ) / 2
    assert training.contrastive_loss(images, texts, 10, none) == pytest.approx(
        plain.item(), rel=1e-5
    )
    moved = texts.clone()
    moved[1] = images[0]  # caption 1 fits image 0 perfectly; that must cost image 0 nothing
    with_mask = training.contrastive_loss(images, moved, 10, other)
    assert with_mask < training.contrastive_loss(images, moved, 10, none)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 10, "categories_per_batch": 4}, "cannot hold twins of 4 categories"),
        ({"width": 100}, "no multiple of 32"),
        ({"patch_dropout": 1.0}, "share from 0"),
        ({"steps": (0,)}, "must be positive"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        training.Settings(**change)


def test_a_model_too_large_to_ship_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match=r"17\.6 MB, more than 15"):
        training.train(training.Settings(width=192), tmp_path / "model")
    assert not (tmp_path / "model").exists()


# Results of several trainings -------------------------------------------------------------------------------------


def test_alterations_of_sdp_change_what_they_name_and_nothing_else():
    backbone = load_backbone("demo", device="cpu")
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))

    def maps(detector):
        return detector.predict(images, "gear").maps

    def altered(**options):
        return maps(trainings.Altered(backbone, "x", rvs="mean", **options))

    sdp = maps(SDP(backbone, rvs="mean"))
    assert torch.equal(altered(), sdp)
    written = maps(SDP(backbone, rvs="mean", as_released=False))
    assert not torch.allclose(altered(restart=False, as_released=False), written, atol=1e-3)
    assert not torch.allclose(altered(weights=False), sdp, atol=1e-4)
    # the weights are 2p of the class token: with a class token halfway between the states they are 1
    tokens, text = torch.randn(1, 5, 4), F.normalize(torch.randn(4, 2), dim=0)
    tokens[:, 0] = text[:, 0] + text[:, 1]
    assert torch.allclose(
        trainings.difference([tokens], text), feature_surgery([tokens], text)[:, 1:, 1], atol=1e-6
    )


def test_results_are_added_once_per_weights_and_method(tmp_path, monkeypatch):
    weights, file = DEMO / "model" / "model.safetensors", tmp_path / "trainings.csv"
    made = []

    def detectors(backbone):
        return {"Direct": lambda: made.append(1) or Direct(backbone, rvs="mean")}

    monkeypatch.setattr(trainings, "detectors", detectors)
    monkeypatch.setattr(
        trainings, "load_dataset", lambda name: load_dataset(name, categories=["gear"])
    )
    rows = pd.DataFrame([{"method": "SDP", "category": "gear", "pixel_pro": 0.5}])
    monkeypatch.setattr(trainings, "measured_after", lambda backbone: made.append(2) or rows)
    after = tmp_path / "after.csv"
    for seed in (1, 2):  # the same weights under another name are the same weights
        trainings.append_rows(weights, seed, 12_000, file, after)
    found = read_trainings(file)
    assert made == [1, 2]
    assert read_trainings(after)["pixel_pro"].tolist() == [0.5]
    assert found[["seed", "steps", "weights", "method", "category"]].to_numpy().tolist() == [
        [1, 12_000, content_hash(weights)[:16], "Direct", "gear"]
    ]
    assert 0 <= found["pixel_auroc"][0] <= 1
    assert found["opposite_on_object"].notna().all()


@pytest.mark.slow
def test_weights_of_a_running_training_are_read_from_its_state(tmp_path, small_validation):
    training.train(replace(TINY, seed=7), tmp_path / "run", validate_every=2)
    (tmp_path / "out").mkdir()
    file, seed, steps = trainings.exported(tmp_path / "run" / "state.pt", tmp_path / "out")
    assert (seed, steps) == (7, 3)
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)["model"]
    assert all(torch.equal(value, state[name].half()) for name, value in load_file(file).items())
    chosen = trainings.exported(tmp_path / "run" / "model.safetensors", tmp_path)
    assert chosen[1] == 7
    (tmp_path / "run" / "training.json").unlink()
    with pytest.raises(ValueError, match=r"no training\.json beside it"):
        trainings.exported(tmp_path / "run" / "model.safetensors", tmp_path)
