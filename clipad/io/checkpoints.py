"""Weights of a CLIP: downloaded by tag, or from a file of safetensors or of ``torch.save``, whatever its suffix.

Nothing in a file is ever executed. What cannot be used is refused with what was found in it.
"""

import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from huggingface_hub import file_exists, hf_hub_download, try_to_load_from_cache
from open_clip.model import resize_pos_embed
from safetensors.torch import load_file

from clipad.io.files import content_hash

FIRST = "visual.conv1.weight"
"""the weights every plain CLIP vision transformer starts with: what stands before this name is a wrapper's prefix"""
WRAPPERS = {"module", "_orig_mod"}
"""what DataParallel and torch.compile put into the names of weights"""
UNUSED = {"attn_mask", "logit_bias", "input_resolution", "context_length", "vocab_size"}
"""what some store beside the weights, and no feature depends on"""


def download(name: str, tag: str, published: Mapping) -> Path:
    """The file of one of open_clip's tags, from the cache of an earlier start or from where open_clip publishes it.

    ``published``: open_clip's ``get_pretrained_cfg``. Raises OSError where it cannot be had, with the way round.
    """
    repository = published["hf_hub"].rstrip("/")
    files = ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
    kept = (try_to_load_from_cache(repository, file) for file in files)
    path = next((path for path in kept if isinstance(path, str)), None)
    if path is None:
        try:
            # One question first: the download itself asks for half a minute where nobody answers.
            file = files[0] if file_exists(repository, files[0]) else files[1]
            path = hf_hub_download(repository, file)
        except Exception as error:  # of the network, of the server's answer, of the disk
            raise OSError(
                f"the weights {tag!r} of {name} cannot be downloaded ({_short(error)}). Without a network, fetch "
                f"{files[0]} of {repository} on another machine and give its path as pretrained"
            ) from error
    blob = Path(path).resolve()  # named by its SHA-256
    if re.fullmatch("[0-9a-f]{64}", blob.name) and content_hash(blob) != blob.name:
        raise OSError(f"{blob} is damaged: its SHA-256 is not its name. Remove it and start again")
    return Path(path)


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def load_weights(model, path: Path, resize: bool = False) -> None:
    """Fill a CLIP with the weights in a file, by open_clip's names, as float32.

    ``resize`` interpolates the position embeddings to the model's image size. ValueError for a file that holds no CLIP
    with a vision transformer, or several, and for weights that do not fit or are not finite.
    """
    flat = dict(_flat(read_content(path)))
    found = (name for name in flat if f"/{name}".endswith((f"/{FIRST}", f".{FIRST}")))
    prefixes = [name.removesuffix(FIRST) for name in found]
    if len(prefixes) != 1:
        held = ", ".join(prefixes or list(flat)[:4]) or "nothing"
        raise ValueError(
            f"it has to hold one CLIP with a vision transformer, by open_clip's names ({FIRST!r}, ...), but "
            f"{'holds several' if prefixes else 'holds'}: {held}. Save its weights alone, torch.save(state_dict, "
            "'weights.pt'); for a published model, name its tag"
        )
    gelu = type(model.visual.transformer.resblocks[0].mlp.gelu).__name__
    if f"{prefixes[0]}input_resolution" in flat and gelu != "QuickGELU":
        raise ValueError(
            "they are OpenAI's, which need QuickGELU: name the model so, as in ViT-B-32-quickgelu"
        )
    state = {}
    for key, value in flat.items():
        name = key.removeprefix(prefixes[0])
        if key.startswith(prefixes[0]) and "/" not in name and name not in UNUSED:
            name = name.removeprefix("text.")  # of towers apart
            state[name] = value.float() if value.is_floating_point() else value
    if "logit_scale" in state:
        state["logit_scale"] = state["logit_scale"].reshape(model.logit_scale.shape)
    if resize:
        resize_pos_embed(state, model)
    fill(model, state)


def _flat(content: Mapping, place: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors in nested dictionaries by paths such as ``state_dict/visual.proj``, without wrappers' prefixes."""
    for key, value in content.items():
        name = ".".join(part for part in str(key).split(".") if part not in WRAPPERS)
        if isinstance(value, Mapping):
            yield from _flat(value, f"{place}{name}/")
        elif isinstance(value, torch.Tensor):
            yield place + name, value


def fill(module: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Load weights. ValueError for what is missing, unexpected, of another shape or type, or not finite."""
    for key, value in state.items():
        if value.is_meta or not value.is_floating_point() or not torch.isfinite(value).all():
            raise ValueError(
                f"{key} holds no finite floating-point numbers (its type is {value.dtype})"
            )
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(" ".join(str(error).split())[:500]) from error


def read_content(path: Path) -> Mapping:
    """Tensors by name, maybe nested, of a file by what it is, not by its suffix. ValueError says why there are none."""
    with open(path, "rb") as file:
        head = file.read(40)
    try:
        if head[8:9] != b"{" and head.startswith((b"PK", b"\x80")):  # a zip file, or the older form
            with open(path, "rb") as file:
                content = torch.load(file, map_location="cpu", weights_only=True)
        else:
            content = load_file(path)
        if not isinstance(content, Mapping):
            raise TypeError(f"a {type(content).__name__}, not weights by name")
    except Exception as error:  # zip, torch and safetensors each have their own
        why = "" if isinstance(error, pickle.UnpicklingError) else f" ({_short(error)})"
        raise ValueError(
            f"it is damaged, no file of weights, or holds objects of Python, which are never executed{why}; it begins "
            f"with {head!r}. If you trust its source, save the weights alone: found = torch.load(path, "
            "weights_only=False), or torch.jit.load(path) for OpenAI's archives, then torch.save(found.state_dict(), "
            "'weights.pt'), or of found['state_dict']"
        ) from error
    return content
