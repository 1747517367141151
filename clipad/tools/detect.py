"""A user's own images: heat maps, overlays, scores that do not depend on the other images, a small report.

The published image score scales by minimum and maximum over a test set (METHOD.md section 5), so it needs one. Here a
score is counted in standard deviations of *normal reference images* instead: the user's own flawless images, or, for
the shipped model, the normal images of the auxiliary demo collection.
"""

from __future__ import annotations

import html
import io
import json
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import matplotlib
import numpy as np
import pandas as pd
import torch
from PIL import Image
from tqdm import tqdm

from clipad.datasets import IMAGE_SUFFIXES, LayoutError, Sample, load_dataset, read_image
from clipad.evaluation import predict_halving, read_masks
from clipad.files import write_atomically
from clipad.metrics import image_metrics, pixel_metrics

OVERLAY_SIDE = 768
"""longest side of an overlay in pixels"""


@dataclass(frozen=True)
class Calibration:
    """What normal images look like to a detector: mean and deviation of both scores, and the scale of the maps."""

    source: str
    probability: tuple[float, float]
    map_max: tuple[float, float]
    scale: tuple[float, float]
    """map values drawn as nothing and as bright: median of the reference maps, twice as far up as their 99.9 %"""
    scores: tuple[float, ...]
    """of the reference images themselves, sorted"""

    def score(self, probability: float, map_max: float) -> float:
        """Standard deviations above the normal mean, of class probability and map maximum, added."""
        return _deviations(probability, self.probability) + _deviations(map_max, self.map_max)

    def percentile(self, score: float) -> float:
        """Share of the reference images with a lower score."""
        return float(np.searchsorted(self.scores, score) / len(self.scores))


def _deviations(value, mean_and_deviation):
    mean, deviation = mean_and_deviation
    return (value - mean) / max(deviation, 1e-6)


def calibrate(
    detector, samples: Sequence[Sample], source: str, progress: bool = True
) -> Calibration:
    """From normal images; each sample's category is the object's name. ValueError for fewer than 8 images."""
    if len(samples) < 8:
        raise ValueError(f"calibration needs at least 8 normal images, {source} has {len(samples)}")
    probabilities, maxima, pixels = [], [], []
    for sample, item, prediction in _predictions(detector, samples, "calibrating", progress):
        if isinstance(item, Exception):
            raise ValueError(f"{sample.image_path} of {source} cannot be read: {item}")
        heat, probability = prediction
        probabilities.append(probability)
        maxima.append(heat.max())
        pixels.append(heat[::4, ::4].ravel())
    moments = [(float(np.mean(v)), float(np.std(v))) for v in (probabilities, maxima)]
    middle, high = (float(v) for v in np.percentile(np.concatenate(pixels), [50, 99.9]))
    partial = Calibration(source, *moments, (middle, middle + 2 * max(high - middle, 1e-6)), ())
    scores = sorted(partial.score(p, m) for p, m in zip(probabilities, maxima, strict=True))
    return Calibration(source, *moments, partial.scale, tuple(map(float, scores)))


def shipped_calibration(detector, progress: bool = True) -> Calibration:
    """From the normal images of the auxiliary demo collection; for the demo model only."""
    normal = [s for s in load_dataset("demo_aux") if s.label == 0]
    return calibrate(
        detector, normal, "the normal images of the shipped collection demo_aux", progress
    )


@dataclass(frozen=True)
class Report:
    """What ``detect`` found: ``scores`` (a row per readable image), ``broken`` (path -> why), ``metrics`` or None."""

    scores: pd.DataFrame
    broken: dict[str, str]
    metrics: dict[str, float] | None
    calibration: Calibration | None


def detect(
    detector,
    path: str | Path,
    object_name: str,
    output_dir: str | Path,
    calibration: Calibration | None = None,
    progress: bool = True,
) -> Report:
    """Score an image or all images of a folder, and write what was found.

    ``output_dir`` gets ``scores.csv``, ``scores.json``, ``report.html``, ``overlays/*.jpg`` and ``maps/*.npy`` (S x S
    float16). A broken image is listed and the rest goes on. Where the folder says what is normal, or holds masks in
    MVTec-AD's layout, metrics are computed too. Without a calibration the score is the class probability.

    Raises FileNotFoundError or ValueError if there is nothing to do, an empty object name, or a folder that cannot
    be written: all before the first image.
    """
    # Samples have absolute paths (links kept, unless `..` leads through one), so their root has to be absolute, too.
    path, output_dir = Path(path), Path(output_dir)
    path = path.resolve() if ".." in path.parts else path.absolute()
    samples = find_images(path, object_name)
    detector.text_vectors(object_name)
    root = path if path.is_dir() else path.parent
    for folder in ("maps", "overlays"):
        (output_dir / folder).mkdir(parents=True, exist_ok=True)
    scale = calibration.scale if calibration else _scale_of(detector, samples)

    rows, broken = [], {}
    with ThreadPoolExecutor(4) as writers:
        pending: deque = deque()
        for sample, item, prediction in _predictions(detector, samples, "detecting", progress):
            name = sample.image_path.relative_to(root).as_posix()
            if isinstance(item, Exception):
                broken[name] = str(item).replace(str(root), "").strip("/")
                continue
            heat, probability = prediction
            highest = float(heat.max())
            score = calibration.score(probability, highest) if calibration else probability
            rows.append(
                {
                    "image": name,
                    "score": float(score),
                    "percentile": calibration.percentile(score) if calibration else None,
                    "probability": probability,
                    "map_max": highest,
                    "label": sample.label,
                }
            )
            pending.append(writers.submit(_write_image, output_dir, name, item, heat, scale))
            while len(pending) > 16:
                pending.popleft().result()
        for future in pending:
            future.result()

    frame = pd.DataFrame(
        rows, columns=["image", "score", "percentile", "probability", "map_max", "label"]
    )
    metrics = _metrics(
        frame,
        [s for s in samples if s.image_path.relative_to(root).as_posix() not in broken],
        output_dir,
    )
    report = Report(frame, broken, metrics, calibration)
    _write_report(report, detector, object_name, output_dir)
    return report


def find_images(path: Path, object_name: str) -> list[Sample]:
    """The images below a path, all called ``object_name``; with labels and masks where the layout tells them."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: expected an image or a folder of images")
    if path.is_file():
        return [Sample(path, None, object_name, -1, "unknown")]
    try:
        found = load_dataset("folder", path).samples
    except LayoutError:  # images here and there: no labels then
        files = sorted(
            p
            for p in path.rglob("*")
            if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")
        )
        found = [Sample(p, None, object_name, -1, "unknown") for p in files if p.is_file()]
    if not found:
        raise ValueError(f"{path} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return [Sample(s.image_path, s.mask_path, object_name, s.label, s.defect) for s in found]


def _predictions(detector, samples, what: str, progress: bool, batch_size: int = 16) -> Iterator:
    """(sample, thumbnail or the exception that reading raised, (map, probability)) in order, read ahead by threads."""

    def load(sample):
        try:
            image = read_image(sample.image_path)
            tensor = detector.backbone.preprocess(image)
            thumbnail = image.convert("RGB")
            thumbnail.thumbnail((OVERLAY_SIDE, OVERLAY_SIDE))
            return tensor, thumbnail
        except (OSError, ValueError) as error:
            return error

    groups = [samples[i : i + batch_size] for i in range(0, len(samples), batch_size)]
    with (
        ThreadPoolExecutor(4) as readers,
        tqdm(total=len(samples), desc=what, unit="image", disable=not progress) as bar,
    ):
        ahead: deque = deque()
        for number, group in enumerate(groups):
            for later in groups[number + len(ahead) : number + 2]:
                ahead.append([readers.submit(load, sample) for sample in later])
            items = [future.result() for future in ahead.popleft()]
            good = [i for i, item in enumerate(items) if not isinstance(item, Exception)]
            names = {group[i].category for i in good}
            results = {}
            for name in names:  # one object per call of the detector
                of_name = [i for i in good if group[i].category == name]
                maps, probabilities = predict_halving(
                    detector, torch.stack([items[i][0] for i in of_name]), name
                )
                results |= {
                    i: (maps[k].numpy(), float(probabilities[k])) for k, i in enumerate(of_name)
                }
            for i, sample in enumerate(group):
                failed = isinstance(items[i], Exception)
                yield sample, items[i] if failed else items[i][1], results.get(i)
            bar.update(len(group))


def _scale_of(detector, samples) -> tuple[float, float]:
    """Without calibration: 1st to 99.9th percentile over up to 32 images spread over the folder."""
    chosen = samples[:: max(1, len(samples) // 32)][:32]
    found = [p[0] for _, _, p in _predictions(detector, chosen, "scaling", False) if p is not None]
    if not found:
        return 0.0, 1.0
    low, high = np.percentile(np.stack(found), [1, 99.9])
    return float(low), float(max(high, low + 1e-6))


def _write_image(
    output_dir: Path, name: str, picture: Image.Image, heat: np.ndarray, scale
) -> None:
    buffer = io.BytesIO()
    np.save(buffer, heat.astype(np.float16))
    write_atomically(output_dir / "maps" / f"{name}.npy", buffer.getvalue())
    buffer = io.BytesIO()
    overlay(picture, heat, scale).save(buffer, "JPEG", quality=88)
    write_atomically(output_dir / "overlays" / f"{name}.jpg", buffer.getvalue())


def overlay(picture: Image.Image, heat: np.ndarray, scale: tuple[float, float]) -> Image.Image:
    """The map over the image: what is dark on the scale stays see-through."""
    strength = np.clip((heat - scale[0]) / (scale[1] - scale[0]), 0, 1).astype(np.float32)
    strength = np.asarray(Image.fromarray(strength).resize(picture.size, Image.Resampling.BILINEAR))
    colour = matplotlib.colormaps["inferno"](strength)[..., :3]
    share = (0.75 * strength)[..., None]
    mixed = np.asarray(picture) / 255 * (1 - share) + colour * share
    return Image.fromarray((255 * mixed).round().astype(np.uint8))


def _metrics(
    frame: pd.DataFrame, samples: list[Sample], output_dir: Path
) -> dict[str, float] | None:
    if len(frame) == 0 or (frame["label"] < 0).any():
        return None
    found = {f"image_{k}": v for k, v in image_metrics(frame["score"], frame["label"]).items()}
    if any(s.mask_path for s in samples):
        maps = np.stack(
            [np.load(output_dir / "maps" / f"{name}.npy") for name in frame["image"]]
        ).astype(np.float32)
        masks = read_masks(samples, maps.shape[-1])
        found |= {f"pixel_{k}": v for k, v in pixel_metrics(maps, masks).items()}
    return {k: float(v) for k, v in found.items() if not np.isnan(v)} or None


def _write_report(report: Report, detector, object_name: str, output_dir: Path) -> None:
    calibration = report.calibration
    how = (
        f"score: standard deviations above {calibration.source} ({len(calibration.scores)} images), class probability "
        "and map maximum added; percentile: share of those images that score lower"
        if calibration
        else "score: class probability, not calibrated (give normal images for that)"
    )
    columns = (
        report.scores.drop(columns="label") if (report.scores["label"] < 0).all() else report.scores
    )
    write_atomically(output_dir / "scores.csv", columns.to_csv(index=False))
    content = {
        "detector": repr(detector),
        "object": object_name,
        "score": how,
        "images": json.loads(columns.to_json(orient="records")),
        "broken": report.broken,
        "metrics": report.metrics,
    }
    write_atomically(
        output_dir / "scores.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    )

    rows = []
    for row in report.scores.sort_values("score", ascending=False).itertuples():
        name, source = html.escape(row.image), quote(f"overlays/{row.image}.jpg")
        alt = f"{name} with its anomaly map, score {row.score:.2f}"
        share = "" if row.percentile is None else f"{100 * row.percentile:.0f} %"
        rows.append(
            f'<tr><td><a href="{source}"><img src="{source}" alt="{alt}" loading="lazy"></a></td><td>{name}</td>'
            f"<td>{row.score:.2f}</td><td>{share}</td><td>{row.probability:.3f}</td><td>{row.map_max:.3f}</td></tr>"
        )
    broken = "".join(
        f"<li>{html.escape(n)}: {html.escape(w)}</li>" for n, w in report.broken.items()
    )
    metrics = ", ".join(f"{k} {v:.3f}" for k, v in (report.metrics or {}).items())
    page = _PAGE.format(
        title=html.escape(f"{object_name}: {len(rows)} images"),
        detector=html.escape(repr(detector)),
        how=html.escape(how),
        metrics=f"<p>Against the labels in the folder: {metrics}.</p>" if metrics else "",
        broken=f"<h2>Not readable</h2><ul>{broken}</ul>" if broken else "",
        rows="\n".join(rows),
    )
    write_atomically(output_dir / "report.html", page)


_PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; width: 100% }}
th, td {{ text-align: left; padding: .4rem .6rem; border-bottom: 1px solid #ccc; overflow-wrap: anywhere }}
img {{ width: 160px; height: auto; display: block }}
</style></head>
<body><main>
<h1>{title}</h1>
<p>{detector}. {how}.</p>
{metrics}
{broken}
<table>
<thead><tr><th>overlay</th><th>image</th><th>score</th><th>percentile</th><th>class probability</th>
<th>map maximum</th></tr></thead>
<tbody>
{rows}
</tbody>
</table>
</main></body>
</html>
"""
