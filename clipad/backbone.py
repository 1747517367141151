"""An open_clip model with its tokenizer and pre-processing, frozen.

Three sources: a published tag (downloaded by open_clip itself, only when a user names the tag), a local
checkpoint file, or the small model that is shipped with the project (``load_backbone("demo")``).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import warnings
from collections.abc import Sequence
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path

import open_clip
import torch
from open_clip.transformer import VisionTransformer, text_global_pool
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from clipad.datasets import image_tensor
from clipad.prompts import words
from clipad.published import data_dir


class Backbone:
    """A frozen CLIP: ``visual`` (open_clip's ViT), pre-processing and the text encoder.

    Attributes: ``name``, ``pretrained`` (what a reader should know about the weights), ``image_size`` (S, pixels),
    ``mean`` and ``std`` of the pre-processing, ``device``.
    """

    def __init__(self, model, tokenizer, *, name, pretrained, mean, std, known_words=None):
        _require_plain_vit(model.visual, name)
        self.model = model.eval().requires_grad_(False)
        self.visual = model.visual
        self.tokenizer = tokenizer
        self.name, self.pretrained = name, pretrained
        self.image_size = model.visual.image_size[0]
        self.mean, self.std = tuple(mean), tuple(std)
        self.known_words = known_words
        self._warned: set[str] = set()

    @property
    def device(self) -> torch.device:
        return self.visual.proj.device

    def __repr__(self):
        return f"Backbone({self.name!r}, {self.pretrained}, {self.image_size} px, {self.device})"

    @cached_property
    def weights_hash(self) -> str:
        """First 16 hex digits of the SHA-256 of all weights: two runs with equal hashes used equal weights."""
        digest = hashlib.sha256()
        for key, value in sorted(self.model.state_dict().items()):
            digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(
                value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            )
        return digest.hexdigest()[:16]

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        """PIL image of any size -> 3 x S x S float32: squashed bicubically, scaled, normalised (METHOD.md 1)."""
        return image_tensor(image, self.image_size, self.mean, self.std)

    def autocast(self):
        """Mixed precision on a GPU, as the released program uses; float32 on the CPU, where it is faster."""
        if self.device.type == "cuda":
            return torch.autocast("cuda", dtype=torch.float16)
        return contextlib.nullcontext()

    def encode_text(self, sentences: Sequence[str], batch_size: int = 512) -> torch.Tensor:
        """Sentences -> M x C float32 embeddings on the CPU, not normalised.

        They are kept on disk under the hash of the weights and of the sentences, so that a category is encoded
        once per model; a damaged file is noticed by its checksum and made again.
        """
        if isinstance(sentences, str):
            raise ValueError(f"encode_text takes a list of sentences, found the text {sentences!r}")
        sentences = list(sentences)
        if not sentences or not all(isinstance(s, str) and s.strip() for s in sentences):
            raise ValueError("encode_text needs at least one sentence, and none may be empty")
        self._warn_of_unknown_words(sentences)
        key = json.dumps([self.weights_hash, self.device.type, "float32", sentences]).encode()
        path = cache_dir() / "text" / f"{hashlib.sha256(key).hexdigest()[:32]}.safetensors"
        cached = _read_cached(path)
        if cached is None:
            tokens = self.tokenizer(sentences)
            self._warn_of_cut_sentences(sentences, tokens)
            with torch.inference_mode():
                parts = [
                    self._encode_tokens(part.to(self.device)).float().cpu()
                    for part in tokens.split(batch_size)
                ]
            cached = torch.cat(parts).clone()
            _write_cached(path, cached)
        return cached

    def _encode_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """The text tower on no more positions than the longest sentence needs.

        The text mask is causal, so what stands behind the end token cannot change it: 77 positions become about 18.
        """
        model = self.model
        if (
            getattr(model, "attn_mask", None) is None
            or getattr(model, "text_pool_type", "") != "argmax"
        ):
            return model.encode_text(tokens)
        length = int(tokens.argmax(dim=-1).max()) + 1
        tokens = tokens[:, :length]
        x = model.token_embedding(tokens) + model.positional_embedding[:length]
        x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
        x = text_global_pool(x, tokens, "argmax")
        if isinstance(model.text_projection, torch.nn.Linear):
            return model.text_projection(x)
        return x @ model.text_projection

    def _warn_of_unknown_words(self, sentences):
        """Once per word: the small demo model was trained on few words, and answers to others as well."""
        unknown = self.unknown_words(sentences) - self._warned
        if unknown:
            self.expect_words(unknown)
            warnings.warn(
                f"the model {self.name!r} never saw the words {', '.join(sorted(unknown)[:8])} in training: "
                "what it makes of them is noise",
                stacklevel=3,
            )

    def _warn_of_cut_sentences(self, sentences, tokens):
        """open_clip cuts what is too long for the model, without a word."""
        full = [sentence for sentence, row in zip(sentences, tokens, strict=True) if row[-1] != 0]
        if full:
            warnings.warn(
                f"{len(full)} sentences fill the {tokens.shape[1]} tokens that {self.name!r} reads, and what is beyond "
                f"is cut off; the first is {full[0][:80]!r}",
                stacklevel=3,
            )

    def unknown_words(self, sentences: Sequence[str]) -> set[str]:
        """Words that the model never saw in training; known for the small demo model only, else empty."""
        if self.known_words is None:
            return set()
        return {word for sentence in sentences for word in words(sentence)} - self.known_words

    def expect_words(self, unknown: set[str]) -> None:
        """Do not warn of these words again: whoever calls this has told the reader."""
        self._warned |= unknown


def load_backbone(
    name: str = "demo",
    pretrained: str | Path | None = None,
    device: str | None = None,
    image_size: int | None = None,
    seed: int = 0,
) -> Backbone:
    """A frozen CLIP from open_clip.

    ``name``: ``"demo"`` (shipped, works offline) or an open_clip model name such as ``"ViT-B-16-plus-240"``.
    ``pretrained``: one of open_clip's tags (open_clip downloads it), the path of a checkpoint, or None for random
    weights (drawn from ``seed``; the result says so). ``image_size``: None for the model's own; another multiple of the
    patch size makes open_clip interpolate the position embeddings. ``device``: None for a GPU where there is one.

    Raises ValueError for an unknown name, tag or device, an image size that patches do not fill, a checkpoint that
    does not fit or holds non-finite values, or a model whose image tower is not a plain CLIP vision transformer.
    Pickles are never executed (``weights_only``).
    """
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(
            f"unknown device {device!r}: 'cpu', 'cuda', or empty for a GPU where there is one"
        ) from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device='cuda' was asked for, but torch sees no GPU: leave the device empty or use 'cpu'"
        )
    if name == "demo":
        return _load_demo(pretrained, device, image_size)
    if name not in open_clip.list_models():
        near = get_close_matches(name, ["demo", *open_clip.list_models()], n=3)
        raise ValueError(
            f"unknown model {name!r}" + (f"; did you mean {' or '.join(near)}?" if near else "")
        )

    tags = open_clip.list_pretrained_tags_by_model(name)
    path = Path(pretrained) if pretrained else None
    if path is not None and not path.is_file() and str(pretrained) not in tags:
        raise ValueError(
            f"pretrained={str(pretrained)!r} is neither a file nor a tag of {name}; "
            f"its tags are {', '.join(tags) or 'none'}"
        )
    _require_whole_patches(
        image_size, open_clip.get_model_config(name)["vision_cfg"].get("patch_size")
    )
    with torch.random.fork_rng(devices=[]), _quiet_open_clip():
        torch.manual_seed(seed)
        try:
            model = open_clip.create_model(
                name,
                pretrained=str(pretrained) if pretrained else None,
                device=device,
                force_image_size=image_size,
            )
        except (RuntimeError, SafetensorError, OSError, EOFError, ValueError, KeyError) as error:
            raise ValueError(_why_not_loaded(name, pretrained, error)) from error
        except (
            Exception
        ) as error:  # pickle.UnpicklingError and what an archive of another kind raises
            raise ValueError(_why_not_loaded(name, pretrained, error)) from error
    if path is not None:
        source = f"checkpoint file {path.name}" if path.is_file() else f"open_clip tag {pretrained}"
    else:
        source = f"random weights (seed {seed})"
    _require_plain_vit(
        model.visual, name
    )  # before the tokenizer: those of other models need other packages
    preprocess = open_clip.get_model_preprocess_cfg(model)
    return Backbone(
        _finite(model, pretrained),
        open_clip.get_tokenizer(name),
        name=name,
        pretrained=source,
        mean=preprocess["mean"],
        std=preprocess["std"],
    )


def _load_demo(pretrained, device, image_size) -> Backbone:
    folder = data_dir() / "demo" / "model"
    config = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
    model_cfg = config["model_cfg"]
    _require_whole_patches(image_size, model_cfg["vision_cfg"]["patch_size"])
    tokenizer = open_clip.SimpleTokenizer(context_length=model_cfg["text_cfg"]["context_length"])
    with _quiet_open_clip():
        model = open_clip.CLIP(**model_cfg)
    weights = Path(pretrained) if pretrained else folder / "model.safetensors"
    if not weights.is_file():
        raise ValueError(
            f"{weights} is not a file: the demo model takes the shipped weights (pretrained empty) or a file"
        )
    try:
        state = {key: value.float() for key, value in load_file(weights).items()}
        if image_size and image_size != model_cfg["vision_cfg"]["image_size"]:
            model_cfg["vision_cfg"]["image_size"] = image_size
            model = open_clip.CLIP(**model_cfg)
            open_clip.model.resize_pos_embed(state, model)
        model.load_state_dict(state, strict=True)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(_why_not_loaded("demo", weights, error)) from error
    shipped = "shipped weights" if not pretrained else f"checkpoint file {weights.name}"
    pre = config["preprocess_cfg"]
    return Backbone(
        _finite(model, weights).to(device),
        tokenizer,
        name="demo",
        pretrained=shipped,
        mean=pre["mean"],
        std=pre["std"],
        known_words=frozenset((folder / "words.txt").read_text(encoding="utf-8").split()),
    )


def cache_dir() -> Path:
    """Where text embeddings are kept: ``$CLIPAD_CACHE``, else ``~/.cache/clipad``."""
    return Path(os.environ.get("CLIPAD_CACHE") or Path.home() / ".cache" / "clipad")


def _checksum(values: torch.Tensor) -> str:
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()


def _read_cached(path: Path) -> torch.Tensor | None:
    try:
        found = load_file(path)
        values = found["embeddings"]
        return values if bytes(found["sha256"].tolist()).hex() == _checksum(values) else None
    except (OSError, SafetensorError, KeyError):
        return None


def _write_cached(path: Path, values: torch.Tensor) -> None:
    digest = torch.tensor(list(bytes.fromhex(_checksum(values))), dtype=torch.uint8)
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"embeddings": values, "sha256": digest}, part)
        os.replace(part, path)
    except (OSError, SafetensorError):  # a cache that cannot be written costs time only
        with contextlib.suppress(OSError):
            part.unlink()


def _require_plain_vit(visual, name: str) -> None:
    """Refuse what the dual path does not cover, before anything is computed with it."""
    reason = None
    if not isinstance(visual, VisionTransformer):
        reason = f"its image tower is a {type(visual).__name__}"
    elif getattr(visual, "attn_pool", None) is not None:
        reason = "it pools by attention"
    elif visual.pool_type != "tok" or visual.final_ln_after_pool or visual.proj is None:
        reason = f"it pools by {visual.pool_type!r} with another projection"
    elif not all(
        type(block).__name__ == "ResidualAttentionBlock" for block in visual.transformer.resblocks
    ):
        reason = f"its blocks are {type(visual.transformer.resblocks[0]).__name__}"
    elif (
        visual.image_size[0] != visual.image_size[1] or visual.patch_size[0] != visual.patch_size[1]
    ):
        reason = (
            f"its images are {visual.image_size} and its patches {visual.patch_size}, not square"
        )
    if reason:
        raise ValueError(
            f"{name} is not a plain CLIP vision transformer ({reason}): the staged dual path needs one, "
            "such as ViT-B-16-plus-240, ViT-B-32, ViT-B-16, ViT-L-14 or ViT-L-14-336"
        )


def _require_whole_patches(image_size: int | None, patch_size: int | None) -> None:
    if image_size and patch_size and (image_size < patch_size or image_size % patch_size):
        near = max(1, round(image_size / patch_size)) * patch_size
        raise ValueError(
            f"image_size={image_size} is no multiple of the model's patches of {patch_size} pixels; {near} is one"
        )


def _finite(model, source):
    for key, value in model.state_dict().items():
        if not torch.isfinite(value).all() and not key.endswith("attn_mask"):
            raise ValueError(
                f"the weights {source} hold non-finite values in {key}: the file is damaged"
            )
    return model


def _why_not_loaded(name, pretrained, error) -> str:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if "weights_only" in str(error) or "Unpickling" in type(error).__name__:
        first = "it is a pickle with code, or no checkpoint at all; pickled code is never executed"
    return f"the weights {str(pretrained)!r} cannot be loaded into {name}: {first[:300]}"


@contextlib.contextmanager
def _quiet_open_clip():
    """open_clip warns through the root logger that no weights were given; we say that ourselves, in the result."""
    logger = logging.getLogger()
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
