"""P5-P9 and P11: the parts of the method, on a model of the paper's shape with random weights."""

from __future__ import annotations

import contextlib
import os
import tempfile
import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from benchmarks import references
from benchmarks.measure import (
    REPEATS,
    Row,
    Timing,
    clocked,
    interleaved,
    largest_difference,
    ratio,
    seconds,
    times_note,
    torch_peak,
)
from clipad.backbone import Backbone, load_backbone
from clipad.detectors import SDP
from clipad.dual_path import staged_features
from clipad.prompts import CLIP_AD
from clipad.surgery import feature_surgery, similarity_map
from tests.conftest import Golden

BATCH = 4
SURGERY_BATCH = 16


def rows(quick: bool) -> Iterator[Row]:
    torch.manual_seed(0)
    model = (
        load_backbone("demo", device="cpu")
        if quick
        else load_backbone("ViT-B-16-plus-240", device="cpu")
    )
    with torch.no_grad():
        yield from _dual_path(model)
        yield _golden()
        yield from _surgery(quick)
        yield from _maps(quick)
        yield from _text(model)


def _dual_path(model: Backbone) -> Iterator[Row]:
    images = torch.randn(BATCH, 3, model.image_size, model.image_size)
    detector = SDP(model, rvs="mean")
    text = F.normalize(torch.randn(model.visual.proj.shape[1], 2), dim=0)
    times = interleaved(
        {
            "plain": lambda: model.model.encode_image(images) is None,
            "staged": lambda: staged_features(model.visual, images) is None,
            "maps": lambda: detector.score_with(detector.features(images), text) is None,
        }
    )
    yield Row(
        "P5", f"staged_features / open_clip's encode_image, {model.name}, {BATCH} images, float32",
        ratio(times["staged"], times["plain"]), "x", 1.25, note=times_note(times["staged"], times["plain"]),
    )  # fmt: skip
    yield Row(
        "P11", "SDP from decoded images to smoothed maps, text cached",
        BATCH / sorted(times["maps"].judged)[REPEATS // 2], " images/s",
    )  # fmt: skip


def _golden() -> Row:
    golden = Golden("dual_path_12")
    stages = golden.config["stages"]
    found = staged_features(golden.visual(), golden["image"], stages)
    expected = [golden[f"{path}_{stage}"] for path in ("original", "surgery") for stage in stages]
    difference = largest_difference(found.ordinary + found.surgery, expected)
    what = "largest difference of the stage features from the released program's (tests/golden)"
    return Row("P6", what, difference, "", 1e-4, agreement=True)


@contextlib.contextmanager
def _empty_cache():
    """No text of an earlier run is found, and none of this one is left behind."""
    before = os.environ.get("CLIPAD_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CLIPAD_CACHE"] = folder
        try:
            yield
        finally:
            del os.environ["CLIPAD_CACHE"]
            if before is not None:
                os.environ["CLIPAD_CACHE"] = before


def _surgery(quick: bool) -> Iterator[Row]:
    tokens, width = (26, 32) if quick else (226, 640)
    stages = [torch.randn(SURGERY_BATCH, tokens, width) for _ in range(4)]
    text = F.normalize(torch.randn(width, 2), dim=0)
    times = interleaved(
        {
            "ours": lambda: feature_surgery(stages, text) is None,
            "long": lambda: references.feature_surgery_long(stages, text) is None,
        },
        calls=10,
    )
    yield Row(
        "P7", f"feature surgery, {SURGERY_BATCH} images: the B x N x 2 x C form / ours",
        ratio(times["long"], times["ours"]), "x", 10, at_least=True, note=times_note(times["long"], times["ours"]),
    )  # fmt: skip
    yield Row(
        "P7", "largest difference of the two forms",
        largest_difference([feature_surgery(stages, text)], [references.feature_surgery_long(stages, text)]),
        "", 1e-5, agreement=True,
    )  # fmt: skip
    yield Row(
        "P7", f"tensors that feature surgery holds at {SURGERY_BATCH} images, its result included",
        torch_peak(lambda: feature_surgery(stages, text)) / 2**20, " MiB", 1,
        note=f"the long form {torch_peak(lambda: references.feature_surgery_long(stages, text)) / 2**20:.3g} MiB",
    )  # fmt: skip


def _maps(quick: bool) -> Iterator[Row]:
    images, grid, side, sigma = (4, 6, 48, 2.0) if quick else (16, 15, 240, 8.0)
    values = torch.rand(images, grid * grid)
    times = interleaved(
        {
            "ours": lambda: similarity_map(values, side, sigma) is None,
            "plain": lambda: references.similarity_map_plain(values, side, sigma) is None,
        },
        calls=10,
    )
    yield Row(
        "P8", f"{images} maps of {side} x {side}, sigma {sigma:g}: bilinear + SciPy's Gaussian image by image / ours",
        ratio(times["plain"], times["ours"]), "x", 20, at_least=True, note=times_note(times["plain"], times["ours"]),
    )  # fmt: skip
    ours, plain = (
        similarity_map(values, side, sigma),
        references.similarity_map_plain(values, side, sigma),
    )
    yield Row(
        "P8",
        "largest difference of the maps (values 0 to 1)",
        largest_difference(ours, plain),
        "",
        1e-6,
        agreement=True,
    )


def _text(model: Backbone) -> Iterator[Row]:
    """Each repeat takes every fifth sentence: together they are all sentences of the category, once."""
    normal, anomalous = CLIP_AD.sentences("metal nut")
    sentences = normal + anomalous
    ours, plain, timing = {}, {}, {"ours": Timing([], []), "plain": Timing([], [])}
    warnings.filterwarnings("ignore", "the model .* never saw")
    tokenizer = model.tokenizer
    model.weights_hash  # noqa: B018  (computed once per model, not per sentence)
    with _empty_cache():
        model.encode_text(sentences[:2])
        model.model.encode_text(tokenizer(sentences[:2]))
        for start in range(REPEATS):
            part = sentences[start::REPEATS]
            forms = {
                "ours": lambda part=part: ours.update(
                    zip(part, model.encode_text(part), strict=True)
                ),
                "plain": lambda part=part: plain.update(
                    zip(part, model.model.encode_text(tokenizer(part)), strict=True)
                ),
            }
            for name, form in forms.items():
                wall, cpu = clocked(form)
                timing[name].wall.append(wall)
                timing[name].cpu.append(cpu)
        again = interleaved(
            {"cached": lambda: model.encode_text(sentences[::REPEATS]) is None}, calls=10
        )["cached"]
    yield Row(
        "P9", f"text of a category, {len(sentences)} sentences: open_clip's encode_text / ours, nothing cached",
        ratio(timing["plain"], timing["ours"]), "x", 4, at_least=True, note=times_note(timing["plain"], timing["ours"]),
    )  # fmt: skip
    yield Row(
        "P9", "largest difference of the sentence embeddings",
        largest_difference([ours[s] for s in sentences], [plain[s] for s in sentences]), "", 1e-5, agreement=True,
    )  # fmt: skip
    yield Row(
        "P9", "the same sentences from the cache: ours, first time / ours, again",
        ratio(timing["ours"], again), "x", note=f"{seconds(sorted(again.judged)[REPEATS // 2])} again",
    )  # fmt: skip
