from types import SimpleNamespace

import pytest
from small_data import make_collection

from clipad.linear_layers import LinearLayers
from clipad.prompts import CLIP_AD
from clipad.published import protocol
from clipad.studies import sdp_plus_fine_tuning as study
from clipad.training import load_layers


@pytest.fixture
def dataset(tmp_path):
    return make_collection(tmp_path / "data", per_kind=4)


@pytest.fixture
def layers():
    return LinearLayers(32, 24, 4, seed=3)


@pytest.fixture
def run(tiny_backbone, dataset, tmp_path):
    rule = protocol("mvtec")
    return SimpleNamespace(
        backbone=tiny_backbone, prompts=CLIP_AD, output_dir=tmp_path / "out", seed=3, protocol=rule,
        dataset=dataset, rvs={"prompts": CLIP_AD, "rvs": rule.rvs, "rvs_options": rule.rvs_options},
    )  # fmt: skip


def test_without_training_data_there_are_no_layers_and_a_checkpoint_wins(run, layers, tmp_path):
    assert study.training_set(run) is None
    assert study.layers_for(run) is None
    trained = study.train_for(run, run.dataset, 1)
    assert study.layers_for(run, trained.checkpoints[-1]).hash == trained.layers.hash


def test_the_demo_model_learns_from_the_other_collection(run):
    run.backbone.name = "demo"
    assert study.training_set(run).name == "demo_aux"
    run.dataset = SimpleNamespace(name="demo_aux")
    assert study.training_set(run).name == "demo"


def test_trainings_are_kept_by_all_that_decides_them(run):
    first = study.train_for(run, run.dataset, 2)
    again = study.train_for(run, run.dataset, 3)  # an epoch more of the same training
    assert load_layers(again.checkpoints[1]).hash == first.layers.hash
    other = study.train_for(run, run.dataset, 2, seed=4)
    assert other.layers.hash != first.layers.hash
