"""Checkpoints as they lie around: each loads into the model they came from, or says what it is and what to do."""

import argparse
import collections
import contextlib
import gzip
import json
import os
import pickle
import warnings

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from clipad.backbone import load_backbone

EXTRAS = {"input_resolution": 240, "context_length": 77, "vocab_size": 49408}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A stand-in of the published model, the same structure and a fraction of its size, under two names."""
    folder = tmp_path_factory.mktemp("configs")
    config = open_clip.get_model_config("ViT-B-16-plus-240")
    config["embed_dim"] = 32
    config["vision_cfg"] |= {"width": 64, "head_width": 32, "layers": 4}
    config["text_cfg"] |= {"width": 32, "heads": 2, "layers": 1}
    for name in ("small-ViT", "small-ViT-quickgelu"):
        own = config | ({"quick_gelu": True} if "quick" in name else {})
        (folder / f"{name}.json").write_text(json.dumps(own))
        open_clip.add_model_config(folder / f"{name}.json")
    torch.manual_seed(3)
    return open_clip.CLIP(**config)


@pytest.fixture
def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def load(path, name="small-ViT", **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the activation: below
        return load_backbone(name, pretrained=path, device="cpu", **options)


def under(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def saved(content, path):
    if path.suffix == ".safetensors":
        save_file({key: value.contiguous().clone() for key, value in content.items()}, path)
    else:
        torch.save(content, path)
    return path


LOADED = {
    "plain": lambda s: s,
    "ordered": collections.OrderedDict,
    "parameters": lambda s: {k: torch.nn.Parameter(v) for k, v in s.items()},
    "float64": lambda s: {k: v.double() for k, v in s.items()},
    "DataParallel": lambda s: under("module.", s),
    "compiled": lambda s: under("_orig_mod.", s),
    "compiled within DataParallel": lambda s: under("module._orig_mod.", s),
    "compiled tower": lambda s: {k.replace("visual.", "visual._orig_mod.", 1): v for k, v in s.items()},
    "open_clip's training": lambda s: {
        "epoch": 3,
        "name": "run",
        "state_dict": under("module.", s),
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]},
    },
    "model": lambda s: {"model": s, "step": 5},
    "model_state_dict": lambda s: {"model_state_dict": s, "loss": 0.5},
    "nested": lambda s: {"checkpoint": {"model": {"state_dict": s}}},
    "Lightning": lambda s: {
        "pytorch-lightning_version": "2.1",
        "callbacks": {"ModelCheckpoint": {"best": 0.5}},
        "state_dict": under("model.", s) | {"loss.scale": torch.zeros(1)},
    },
    "Lightning, other attribute": lambda s: {"state_dict": under("net.clip.", s)},
    "towers apart": lambda s: {
        k if k.startswith("visual.") or k == "logit_scale" else f"text.{k}": v for k, v in s.items()
    },
    "logit scale as a vector": lambda s: s | {"logit_scale": s["logit_scale"].reshape(1)},
    "mask and bias": lambda s: s | {"attn_mask": torch.zeros(77, 77), "logit_bias": torch.tensor(-10.0)},
}  # fmt: skip


@pytest.mark.parametrize("form", LOADED)
def test_forms_that_load(form, state, tmp_path):
    backbone = load(saved(LOADED[form](state), tmp_path / "weights.pt"))
    found = backbone.model.state_dict()
    assert all(torch.equal(found[key], value) for key, value in state.items())


def test_openai_s_weights_are_refused_under_a_name_that_means_gelu(state, tmp_path):
    found = state | {k: torch.tensor(v) for k, v in EXTRAS.items()}
    with pytest.raises(ValueError, match="QuickGELU"):
        load(saved(found, tmp_path / "weights.pt"))


@pytest.mark.parametrize("content", ["safetensors", "torch", "older torch"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin", ".ckpt", ""])
def test_the_content_decides_not_the_suffix(content, suffix, state, tmp_path):
    path = tmp_path / f"weights{suffix}"
    if content == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=content == "torch")
    torch.testing.assert_close(load(path).visual.proj, state["visual.proj"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_half_precision_becomes_float32(dtype, suffix, state, tmp_path):
    halves = {key: value.to(dtype) for key, value in state.items()}
    found = load(saved(halves, tmp_path / f"w{suffix}")).model.state_dict()
    assert all(torch.equal(found[key], value.float()) for key, value in halves.items())


def test_a_torchscript_archive_is_refused_with_what_to_do(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "ViT.pt"))
    with pytest.raises(ValueError, match=r"torch\.jit\.load"):
        load(tmp_path / "ViT.pt")


class Code:
    """Runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


REFUSED = {
    "training with objects": (lambda s: {"state_dict": s, "args": argparse.Namespace(lr=1)}, "weights_only=False"),
    "whole module": (lambda s: torch.nn.Linear(2, 2), "state_dict()"),
    "two models": (lambda s: under("teacher.", s) | under("student.", s), "several: teacher., student."),
    "list": (lambda s: list(s.values()), "a list, not weights by name"),
    "nothing": (lambda s: {}, "holds: nothing"),
    "optimizer": (lambda s: {"state": {0: {"exp_avg": torch.zeros(2)}}}, "exp_avg"),
    "image tower alone": (
        lambda s: {k.removeprefix("visual."): v for k, v in s.items() if "visual." in k},
        "visual.conv1.weight",
    ),
    "quantised": (lambda s: s | {"visual.proj": s["visual.proj"].to(torch.int8)}, "torch.int8"),
    "missing": (lambda s: {k: v for k, v in s.items() if "ln_post" not in k}, 'Missing key(s) in state_dict: "visual.'),
    "unexpected": (lambda s: s | {"visual.more": torch.zeros(2)}, 'Unexpected key(s) in state_dict: "visual.more"'),
    "shape": (
        lambda s: s | {"visual.proj": torch.zeros(3, 3)},
        "size mismatch for visual.proj",
    ),
    "not finite": (lambda s: s | {"visual.proj": s["visual.proj"] * torch.nan}, "visual.proj"),
}  # fmt: skip


@pytest.mark.parametrize("form", REFUSED)
def test_forms_that_say_what_they_are(form, state, tmp_path):
    content, expected = REFUSED[form]
    with pytest.raises(ValueError, match=r"weights\.pt") as refused:
        load(saved(content(state), tmp_path / "weights.pt"))
    assert expected in str(refused.value)


FILES = {
    "text": (lambda s: b"version https://git-lfs.github.com/spec/v1", "begins with b'version https://git-lfs"),
    "compressed": (gzip.compress, "no file of weights"),
    "half": (lambda s: s[: len(s) // 2], "damaged"),
    "without its end": (lambda s: s[:-100], "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kind", FILES)
def test_broken_files_say_what_they_are(kind, suffix, state, tmp_path):
    path = saved(state, tmp_path / f"weights{suffix}")
    content, expected = FILES[kind]
    path.write_bytes(content(path.read_bytes()))
    with pytest.raises(ValueError, match=r"weights\.") as refused:
        load(path)
    assert expected in str(refused.value)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("container", ["torch", "older torch", "pickle"])
def test_pickled_code_is_never_executed(container, suffix, state, tmp_path):
    content = {"state_dict": state, "more": Code(tmp_path / "executed")}
    path = tmp_path / f"weights{suffix}"
    if container == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=container != "older torch")
    with contextlib.suppress(ValueError):
        load(path)
    assert not (tmp_path / "executed").exists()


def test_a_file_gets_a_word_where_a_quickgelu_model_exists(state, tmp_path):
    path = saved(state, tmp_path / "w.safetensors")
    with pytest.warns(UserWarning, match="small-ViT-quickgelu"):
        assert load_backbone("small-ViT", pretrained=path, device="cpu").activation == "GELU"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        named = load_backbone("small-ViT-quickgelu", pretrained=path, device="cpu")
    assert named.activation == "QuickGELU"


def test_the_configuration_beside_a_file_decides(state, tmp_path):
    path = saved(state, tmp_path / "open_clip_model.safetensors")
    config = {
        "model_cfg": {"quick_gelu": True},
        "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backbone = load_backbone("small-ViT", pretrained=path, device="cpu")
    assert backbone.activation == "QuickGELU"
    assert backbone.mean == (0.5, 0.5, 0.5)
    assert backbone.std == (0.25, 0.25, 0.25)
