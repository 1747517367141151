"""An open_clip model with its tokenizer and pre-processing, frozen: a published tag, a file, or the shipped demo."""

import contextlib
import copy
import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import open_clip
import torch
from open_clip.model import convert_weights_to_lp
from PIL import Image

from clipad.io.checkpoints import download, load_weights
from clipad.io.files import address, cached, did_you_mean
from clipad.io.images import eight_bit
from clipad.prompts import words
from clipad.published import data_dir

TEXT_BATCH = 512
"""sentences that are encoded at once"""


class Backbone:
    """A frozen CLIP: ``visual`` (open_clip's ViT), pre-processing and the text encoder.

    Made by :func:`load_backbone`, which refuses image towers that the dual path does not cover.

    Attributes: ``name``, ``pretrained`` (what a reader should know about the weights), ``image_size`` (S, pixels),
    ``mean`` and ``std`` of the pre-processing, ``device``.
    """

    def __init__(self, model, tokenizer, *, name, pretrained, mean, std, known_words=None):
        self.model = model.eval().requires_grad_(False)
        self.visual = model.visual
        self.tokenizer = tokenizer
        self.name, self.pretrained = name, pretrained
        self.image_size = model.visual.image_size[0]
        self.mean, self.std = tuple(mean), tuple(std)
        self.known_words = known_words
        self.told: set[str] = set()
        """words it never saw, of which a reader has been told"""

    @property
    def device(self) -> torch.device:
        return self.visual.proj.device

    def __repr__(self):
        return f"Backbone({self.name!r}, {self.pretrained}, {self.image_size} px, {self.device})"

    @property
    def activation(self) -> str:
        """``"GELU"`` or ``"QuickGELU"`` (OpenAI's): equal weights give other features with the other one."""
        return type(self.visual.transformer.resblocks[0].mlp.gelu).__name__

    @cached_property
    def weights_hash(self) -> str:
        """16 hex digits of the SHA-256 of what an image's features depend on: weights, activation, pre-processing."""
        digest = hashlib.sha256(json.dumps([self.activation, self.mean, self.std]).encode())
        for key, value in sorted(self.model.state_dict().items()):
            digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
            content = value.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(content.numpy().tobytes())
        return digest.hexdigest()[:16]

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        """PIL image of any size -> 3 x S x S float32 (METHOD.md section 1).

        Both sides are squashed to S with bicubic interpolation (no crop), then RGB, [0, 1], (x - mean) / std.
        """
        squashed = eight_bit(image).resize([self.image_size] * 2, Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(squashed.convert("RGB"))).permute(2, 0, 1).float() / 255
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in (self.mean, self.std))
        return (pixels - mean) / std

    def autocast(self):
        """Mixed precision on a GPU, as the released program uses (on CUDA float16); on the CPU float32: it is faster.

        Normalisations stay float32; maps are computed outside.
        """
        if self.device.type == "cpu":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.get_autocast_dtype(self.device.type))

    @cached_property
    def tower(self):
        """``visual``; on a GPU a copy with the weights as ``autocast`` would cast them, there in every call."""
        if self.device.type == "cpu":
            return self.visual
        tower = copy.deepcopy(self.visual)
        convert_weights_to_lp(tower, torch.get_autocast_dtype(self.device.type))
        return tower

    def encode_text(self, sentences: Sequence[str]) -> torch.Tensor:
        """Sentences -> M x C float32 embeddings on the CPU, not normalised.

        They are kept in ``$CLIPAD_CACHE``, else ``~/.cache/clipad``, where that can be written.
        """
        texts = [] if isinstance(sentences, str) else list(sentences)
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(
                f"encode_text takes a list of sentences, none empty; found {sentences!r}"
            )
        if unknown := self.unknown_words(texts) - self.told:
            self.told |= unknown
            warnings.warn(
                f"the model {self.name!r} never saw the words {', '.join(sorted(unknown))} in training: what it makes "
                "of them is noise",
                stacklevel=2,
            )
        key = address([self.weights_hash, self.device.type, "float32", texts])
        folder = Path(os.environ.get("CLIPAD_CACHE") or Path.home() / ".cache" / "clipad") / "text"
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{key}.npz" if os.access(folder, os.W_OK) else None
        found = cached(path, lambda: {"embeddings": self._encode(texts)})
        return torch.from_numpy(found["embeddings"])

    def unknown_words(self, sentences: Iterable[str]) -> set[str]:
        """Words that the model never saw in training; known for the small demo model only, else empty."""
        seen = {word for sentence in sentences for word in words(sentence)}
        return seen - self.known_words if self.known_words else set()

    def _encode(self, sentences: list[str]) -> np.ndarray:
        tokens = self.tokenizer(sentences)
        full = [s for s, row in zip(sentences, tokens, strict=True) if row[-1] != 0]
        if full:  # open_clip cuts them without a word
            warnings.warn(
                f"{len(full)} sentences fill the {tokens.shape[1]} tokens that {self.name!r} reads, and what is "
                f"beyond is cut off; the first is {full[0][:80]!r}",
                stacklevel=5,
            )
        with torch.inference_mode():
            parts = [self._encode_tokens(part.to(self.device)) for part in tokens.split(TEXT_BATCH)]
        return torch.cat(parts).float().cpu().numpy()

    def _encode_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """The text tower on no more positions than the longest sentence needs: its mask is causal, so what stands
        behind the end token cannot change it, and 77 positions become about 18."""
        model = self.model
        length = int(tokens.argmax(dim=-1).max()) + 1
        tokens = tokens[:, :length]
        x = model.token_embedding(tokens) + model.positional_embedding[:length]
        x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
        return x[torch.arange(len(x)), tokens.argmax(dim=-1)] @ model.text_projection


def load_backbone(
    name: str = "demo",
    pretrained: str | Path | None = None,
    device: str | None = None,
    image_size: int | None = None,
    seed: int = 0,
) -> Backbone:
    """A frozen CLIP from open_clip.

    ``name``: ``"demo"`` (shipped, works offline) or an open_clip model name such as ``"ViT-B-16-plus-240"``.
    ``pretrained``: one of open_clip's tags (downloaded once), the path of a checkpoint (:mod:`clipad.io.checkpoints`),
    or None for random weights (drawn from ``seed``; the result says so). ``image_size``: None for the model's own;
    another multiple of the patch size interpolates the position embeddings. ``device``: see :func:`find_device`.

    The activation belongs to the weights: OpenAI's were trained with QuickGELU, also under the name ``ViT-B-32``. The
    configuration of a tag decides it, or the ``open_clip_config.json`` beside a file, else the model's name.

    Raises ValueError for names that are not known, an image size that patches do not fill, a checkpoint that does not
    fit, or an image tower that is not a plain CLIP vision transformer; OSError where weights cannot be downloaded.
    """
    device = find_device(device)
    config, source, own = require_model(name, pretrained, image_size)
    said, path = f"random weights (seed {seed})", source
    if isinstance(source, dict):
        said, path = f"open_clip tag {pretrained}", download(name, str(pretrained), source)
    elif source:
        said = f"checkpoint file {source.name}" if pretrained else "shipped weights"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = open_clip.CLIP(**config)
    if path:
        try:
            load_weights(model, path, resize=bool(image_size))
        except ValueError as error:
            message = f"the weights {str(path)!r} cannot be loaded into {name}: {error}"
            raise ValueError(message) from error
    known_words = None
    if name == "demo":
        words_file = data_dir() / "demo" / "model" / "words.txt"
        known_words = frozenset(words_file.read_text(encoding="utf-8").split())
    return Backbone(
        model.to(device),
        open_clip.SimpleTokenizer(context_length=config["text_cfg"]["context_length"]),
        name=name,
        pretrained=said,
        mean=own.get("mean", open_clip.OPENAI_DATASET_MEAN),
        std=own.get("std", open_clip.OPENAI_DATASET_STD),
        known_words=known_words,
    )


def find_device(device: str | None = None) -> torch.device:
    """What was asked for (``"cpu"``, ``"cuda:1"``, ``"mps"``, ...); empty: a GPU where there is one.

    Raises ValueError for a device that torch does not see on this machine.
    """
    seen = ["cpu"]
    if torch.accelerator.is_available():
        gpu = torch.accelerator.current_accelerator().type
        seen = [gpu, *(f"{gpu}:{i}" for i in range(torch.accelerator.device_count())), *seen]
    if (device or seen[0]) not in seen:
        raise ValueError(
            f"unknown device {device!r}: torch sees {', '.join(seen)} on this machine; leave it empty for {seen[0]}"
        )
    return torch.device(device or seen[0])


SIZES = {"layers", "width", "ls_init_value"}
PLAIN = {
    "vision_cfg": SIZES | {"image_size", "patch_size", "head_width", "mlp_ratio"},
    "text_cfg": SIZES | {"context_length", "vocab_size", "heads"},
}
"""all that the configuration of a plain CLIP says; anything else changes what it computes"""


def require_model(
    name: str, pretrained: str | Path | None = None, image_size: int | None = None
) -> tuple[dict, dict | Path | None, dict]:
    """What the names mean, before anything is loaded: the arguments of open_clip's CLIP; open_clip's entry of a tag, a
    file, or None for random weights; and ``mean`` and ``std`` of the weights' pre-processing, if known.

    Raises ValueError for a model, weights or an image size that :func:`load_backbone` refuses without looking inside.
    """
    demo = data_dir() / "demo" / "model" if name == "demo" else None
    config = _beside(demo)["model_cfg"] if demo else _published_model(name)
    vision = config["vision_cfg"]
    side, patch = image_size or vision["image_size"], vision["patch_size"]
    if side < patch or side % patch:
        raise ValueError(
            f"image_size={side} is no multiple of the model's patches of {patch} pixels"
        )
    vision["image_size"] = side
    if not pretrained and not demo:
        return config, None, {}
    tags = [] if demo else open_clip.list_pretrained_tags_by_model(name)
    if str(pretrained) in tags:
        entry = open_clip.get_pretrained_cfg(name, str(pretrained))
        config["quick_gelu"] = entry.get("quick_gelu", False)
        return config, entry, entry
    path = Path(pretrained or demo / "model.safetensors").expanduser()
    if not path.is_file():
        raise ValueError(
            f"pretrained={str(pretrained)!r} is neither a file nor a tag of {name}; its tags are "
            f"{', '.join(tags) or 'none'}"
        )
    beside = _beside(path.parent)
    if "model_cfg" in beside:
        config["quick_gelu"] = beside["model_cfg"].get("quick_gelu", False)
    elif f"{name}-quickgelu" in open_clip.list_models():
        warnings.warn(
            "the file is run with GELU; weights of OpenAI, MetaCLIP and DFN need QuickGELU, which is the model "
            f"{name}-quickgelu",
            stacklevel=3,
        )
    return config, path, beside.get("preprocess_cfg", {})


def _published_model(name: str) -> dict:
    """The arguments of open_clip's CLIP, or ValueError for a model that the staged dual path does not cover."""
    known = open_clip.list_models()
    if name not in known:
        raise ValueError(f"unknown model {name!r}{did_you_mean(name, ['demo', *known])}")
    config = open_clip.get_model_config(name)
    plain = all(config[tower].keys() <= parts for tower, parts in PLAIN.items())
    resnet = isinstance(config["vision_cfg"].get("layers"), list)
    if not plain or resnet or config.get("custom_text"):
        raise ValueError(
            f"{name} is not a plain CLIP vision transformer: the staged dual path needs one, such as "
            "ViT-B-16-plus-240, ViT-B-32, ViT-B-16 or ViT-L-14"
        )
    return config


def _beside(folder: Path) -> dict:
    """The configuration that open_clip keeps beside weights; empty where there is none."""
    path = folder / "open_clip_config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
