"""Weights of a CLIP: downloaded by tag, or from a file as people have it (safetensors under any suffix, what
``torch.save`` wrote in the course of a training, OpenAI's own TorchScript archives). Nothing in it is ever executed.

What cannot be used is refused with what was found in it and what to do.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import open_clip
import torch
from huggingface_hub import file_exists, hf_hub_download, try_to_load_from_cache
from open_clip.model import resize_pos_embed
from safetensors.torch import load_file

from clipad.files import content_hash

FIRST = "visual.conv1.weight"
"""the weights every plain CLIP vision transformer starts with: what stands before this name is a wrapper's prefix"""
POSITIONS = "visual.positional_embedding"
OPENAI_ONLY = ("input_resolution", "context_length", "vocab_size")
"""three numbers that stand beside the weights in OpenAI's own files"""
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""what DataParallel, torch.compile and FSDP put into the names of weights"""
UNUSED = ("attn_mask", "logit_bias", "text.transformer.embeddings.position_ids")
"""what some versions store and no feature depends on"""


@dataclass
class Checkpoint:
    """Weights by open_clip's names, floating ones as float32, and whether the file is in OpenAI's own form."""

    state: dict[str, torch.Tensor]
    openai: bool


def download(name: str, tag: str, published: Mapping) -> Path:
    """The file of one of open_clip's tags, from the cache of an earlier start or from where open_clip publishes it.

    ``published``: open_clip's ``get_pretrained_cfg``. Raises OSError where it cannot be had, with the way round.
    """
    repository, _, given = published.get("hf_hub", "").rpartition("/")
    files = [given] if given else ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
    for file in files if repository else ():
        cached = try_to_load_from_cache(repository, file)
        if isinstance(cached, str):
            return _whole(Path(cached))
    try:
        if not repository:
            return Path(open_clip.download_pretrained(published))
        # One question first: the download itself asks again and again for half a minute where nobody answers.
        file = files[0] if file_exists(repository, files[0]) else files[-1]
        path = hf_hub_download(repository, file)
    except Exception as error:  # of the network, of the server's answer, of the disk
        where = repository or published.get("url", "")
        raise OSError(
            f"the weights {tag!r} of {name} cannot be downloaded ({type(error).__name__}: {_first_line(error)}). "
            f"Without a network, fetch {files[0]} of {where} on another machine and give its path as pretrained"
        ) from error
    return _whole(Path(path))


def _whole(path: Path) -> Path:
    """The file, if it holds what its name in the hub's cache, a SHA-256, promises."""
    blob = path.resolve()
    if re.fullmatch("[0-9a-f]{64}", blob.name) and content_hash(blob) != blob.name:
        raise OSError(
            f"{blob} is damaged: its SHA-256 is not the one in its name. Remove it and start again"
        )
    return path


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def read_checkpoint(path: Path) -> Checkpoint:
    """The weights in a file. ValueError for one that holds no CLIP with a vision transformer, or several."""
    flat = dict(_flat(read_content(path)))
    models = _models(flat)
    if len(models) > 1:
        # A training's running mean of its weights stands beside them; the weights themselves are meant.
        models = {name: own for name, own in models.items() if "ema" not in name.lower()} or models
    if not models:
        raise ValueError(_what_else(list(flat)))
    if len(models) > 1:
        raise ValueError(
            f"it holds several models ({', '.join(map(repr, models))}): save the one you mean, "
            "torch.save(its_state_dict, 'weights.pt')"
        )
    state = next(iter(models.values()))
    openai = any(key in state for key in OPENAI_ONLY)
    for key in OPENAI_ONLY:
        state.pop(key, None)
    for key, value in state.items():
        if value.is_meta or not value.is_floating_point():
            raise ValueError(
                f"{key} holds no floating-point numbers ({value.dtype} on {value.device}): "
                "save the model before it is quantised or emptied"
            )
    return Checkpoint({k: v.float() for k, v in state.items()}, openai)


def load_weights(model, state: dict[str, torch.Tensor], resize: bool = False) -> None:
    """Fill a CLIP with weights; ``resize`` interpolates the position embeddings to the model's image size.

    Raises ValueError for weights that do not fit or are not finite, see :func:`fill`.
    """
    state, wanted = dict(state), model.state_dict()
    for key in UNUSED:
        if key not in wanted:
            state.pop(key, None)
    if not any(key.startswith("text.") for key in wanted):
        state = {key.removeprefix("text."): value for key, value in state.items()}
    if "logit_scale" in state and state["logit_scale"].numel() == 1:
        state["logit_scale"] = state["logit_scale"].reshape(wanted["logit_scale"].shape)
    patches = max(0, len(state.get(POSITIONS, ())) - 1)
    side = math.isqrt(patches)
    if resize and side and side * side == patches:
        resize_pos_embed(state, model)
    try:
        fill(model, state)
    except ValueError as error:
        given, own = (weights.get(POSITIONS, torch.empty(0)).shape for weights in (state, wanted))
        if side and given[1:] == own[1:] and given != own:
            pixels = side * model.visual.patch_size[0]
            hint = f"Weights of images of {pixels} pixels: load them with image_size={pixels}"
            raise ValueError(f"{error}. {hint}") from error
        raise


def fill(module: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Load weights. ValueError that says what is missing, unexpected, of another shape or not finite."""
    for key, value in state.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"non-finite values in {key}: the file is damaged")
    wanted = module.state_dict()
    kinds = {
        "missing": wanted.keys() - state.keys(),
        "unexpected": state.keys() - wanted.keys(),
        "of another shape": [
            f"{key} ({_shape(state[key])} in the file, {_shape(wanted[key])} in the model)"
            for key in wanted.keys() & state.keys()
            if state[key].shape != wanted[key].shape
        ],
    }
    if any(kinds.values()):
        told = {kind: sorted(names) for kind, names in kinds.items() if names}
        raise ValueError(
            "; ".join(
                f"{len(names)} {kind}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
                for kind, names in told.items()
            )
        )
    module.load_state_dict(state)


def _shape(value: torch.Tensor) -> str:
    return " x ".join(map(str, value.shape)) or "a single number"


def _flat(content: Mapping, place: str = "") -> Iterator[tuple[str, object]]:
    """What nested dictionaries hold, by its path such as ``state_dict/visual.proj``, without wrappers' prefixes."""
    for key, value in content.items():
        name = ".".join(part for part in str(key).split(".") if part not in WRAPPERS)
        if isinstance(value, Mapping):
            yield from _flat(value, f"{place}{name}/")
        else:
            yield place + name, value


def _models(flat: Mapping) -> dict[str, dict[str, torch.Tensor]]:
    """Every CLIP by the name it stands under: the tensors that stand beside its first weights."""
    found = {}
    for name in flat:
        prefix = name.removesuffix(FIRST)
        if prefix != name and prefix[-1:] in ("", ".", "/"):
            own = {k.removeprefix(prefix): v for k, v in flat.items() if k.startswith(prefix)}
            own = {k: v for k, v in own.items() if "/" not in k and isinstance(v, torch.Tensor)}
            found[prefix.strip("./")] = own
    return found


OTHER_FILES = {
    "vision_model.embeddings": "the names are those of Hugging Face transformers: open_clip publishes the same weights "
    "in its own form, name a tag of the model instead of the file",
    "lora_A.weight": "it is an adapter: merge it into its model first",
    "linears.0.weight": "it is an adapter: merge it into its model first",
    "patch_embed.proj.weight": "it is an image tower without a text tower, or one of another kind",
    "conv1.weight": "it is an image tower without a text tower, or one of another kind",
}
"""part of a name in the file -> what it tells"""


def _what_else(names: list[str]) -> str:
    """What a file without a CLIP holds, in one sentence."""
    told = [said for sign, said in OTHER_FILES.items() if any(sign in name for name in names)]
    held = f"{', '.join(names[:4]) or 'nothing'}{' ...' if len(names) > 4 else ''}"
    reason = told[0] if told else f"no name ends in {FIRST!r}"
    return f"it holds no CLIP with a vision transformer but {held}; {reason}"


STARTS = {
    b"version https://git-lfs": "it is a pointer of Git LFS, not the weights: fetch them with `git lfs pull`",
    b"<": "it is a web page, not the weights: download the file itself",
}


def read_content(path: Path) -> Mapping:
    """Tensors by name, maybe nested, of a file by what it is, not by its suffix. ValueError says why there are none."""
    with open(path, "rb") as file:
        head = file.read(64)
    if not head:
        raise ValueError("the file is empty")
    for start, said in STARTS.items():
        if head.lstrip().startswith(start):
            raise ValueError(said)
    if head[8:9] != b"{" and not head.startswith((b"PK", b"\x80")):
        raise ValueError(
            "it is neither safetensors nor a file of torch.save nor a TorchScript archive: "
            f"it begins with {head[:8]!r}"
        )
    try:
        content = load_file(path) if head[8:9] == b"{" else _unpickled(path)
    except ValueError:
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(
            "beside weights it holds objects of Python, and pickled code is never executed. If you trust its source, "
            "save the weights alone: found = torch.load(path, weights_only=False); torch.save(found['state_dict'], "
            "'weights.pt'), or found.state_dict() where a whole model was saved"
        ) from error
    except Exception as error:  # zip, torch and safetensors each have their own for a broken file
        raise ValueError(f"the file is damaged or incomplete ({_first_line(error)})") from error
    if not isinstance(content, Mapping):
        kind = type(content).__name__
        raise ValueError(f"it holds a {kind}, not weights by name: save model.state_dict()")
    return content


def _unpickled(path: Path):
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            roots = [name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl")]
            if not roots:
                held = ", ".join(names[:3])
                raise ValueError(f"it is an archive of {held} ...: unpack it, name the file inside")
            if any(name.startswith(f"{roots[0]}code/") for name in names):
                return dict(_Script(archive, roots[0]).load().tensors())
    with (
        warnings.catch_warnings(),
        open(path, "rb") as file,
    ):  # by its path torch goes by the suffix
        warnings.simplefilter("ignore", UserWarning)  # of the version of pickle in the file
        return torch.load(file, map_location="cpu", weights_only=True)


class _Inert:
    """Stands for any class or function that a pickle names; takes what it is given and does nothing."""

    def __init__(self, *args, **kwargs):
        self.state = {}

    def __setstate__(self, state):
        self.state = state if isinstance(state, dict) else {}

    def tensors(self, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
        for key, value in self.state.items():
            if isinstance(value, torch.Tensor):
                yield prefix + key, value
            elif isinstance(value, _Inert):
                yield from value.tensors(f"{prefix}{key}.")


class _Script(pickle.Unpickler):
    """The tensors of a TorchScript archive (OpenAI's form), without torch.jit: none of its code is loaded."""

    DTYPES: ClassVar = {
        "HalfStorage": torch.float16,
        "FloatStorage": torch.float32,
        "LongStorage": torch.int64,
    }

    def __init__(self, archive: zipfile.ZipFile, root: str):
        super().__init__(io.BytesIO(archive.read(f"{root}data.pkl")))
        self.archive, self.root = archive, root

    def find_class(self, module, name):
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: storage.as_strided(
                size, stride, offset
            )
        return self.DTYPES.get(name, _Inert) if module == "torch" else _Inert

    def persistent_load(self, pid):
        _, dtype, key, *_ = pid
        content = self.archive.read(f"{self.root}data/{key}")
        return torch.frombuffer(bytearray(content), dtype=dtype)
