"""What ``clipad detect`` draws and writes: regions, overlays, the HTML report, the tables."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import contourpy
import jinja2
import matplotlib
import numpy as np
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw
from scipy import ndimage

from clipad.files import write_atomically
from clipad.studies.inspection import without_specks

MAP = "inferno"
MOST_REGIONS = 20
"""regions that are listed of one image, the highest first"""
NO_REGION = {"bad": "bad by score, no region", "check": "too small to outline"}


@dataclass(frozen=True)
class Region:
    """A connected part of a map above its threshold, in pixels of the image."""

    box: tuple[int, int, int, int]
    """left, top, right, bottom; right and bottom exclusive"""
    peak: float
    outline: list[list[tuple[float, float]]]
    """closed lines of (x, y): the border, and those of holes"""


def find_regions(heat: np.ndarray, threshold: float, size: tuple[int, int]) -> list[Region]:
    """Regions of a map (R x R) above a threshold for an image of ``size`` (width, height), highest first; no specks."""
    heat = without_specks(heat, threshold)
    # Two frames: the border's own values, so that a region there reaches the edge; low ones, which close its line.
    low = float(heat.min()) - 1
    framed = np.pad(np.pad(heat, 1, mode="edge"), 1, constant_values=low)
    labels, _ = ndimage.label(framed > threshold, structure=np.ones((3, 3)))
    scale = np.array(size) / heat.shape[::-1]
    regions = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        start = np.array([columns.start, rows.start])
        stop = np.array([columns.stop, rows.stop])
        around = slice(start[1] - 1, stop[1] + 1), slice(start[0] - 1, stop[0] + 1)
        mine = np.isin(labels[around], (0, number))
        lines = contourpy.contour_generator(z=np.where(mine, framed[around], low)).lines(threshold)
        outline = [
            np.clip((line + start - 2.5) * scale, 0, size).round(1).tolist() for line in lines
        ]
        corners = np.clip(np.array([start, stop]) - 2, 0, heat.shape[::-1]) * scale
        box = (*np.floor(corners[0]).astype(int), *np.ceil(corners[1]).astype(int))
        peak = float(framed[labels == number].max())
        regions.append(Region(tuple(map(int, box)), peak, outline))
    return sorted(regions, key=lambda region: -region.peak)[:MOST_REGIONS]


def region_mask(heat: np.ndarray, threshold: float, size: tuple[int, int]) -> Image.Image:
    """Where the map has regions, as a black and white image of ``size`` (width, height)."""
    heat = without_specks(heat, threshold).astype(np.float32)
    large = Image.fromarray(heat).resize(size, Image.Resampling.BILINEAR)
    return Image.fromarray(np.asarray(large) > threshold)


def _strength(heat, scale) -> np.ndarray:
    return np.clip((heat - scale[0]) / (scale[1] - scale[0]), 0, 1).astype(np.float32)


def heat_layer(heat: np.ndarray, scale: tuple[float, float]) -> Image.Image:
    """The map as a layer to lay over the image: colour by value, transparent where it is low."""
    strength = _strength(heat, scale)
    colours = matplotlib.colormaps[MAP](strength)
    colours[..., 3] = np.sqrt(strength)
    return Image.fromarray((255 * colours).round().astype(np.uint8), "RGBA")


def draw(picture: Path, heat, scale, regions: list[Region], size: tuple[int, int]) -> Image.Image:
    """The image in a file with its map and the outlines of its regions, 384 to 768 pixels along its longer side."""
    with Image.open(picture) as image:
        image.thumbnail((768, 768))
        factor = max(1.0, 384 / max(image.size))
        width, height = (max(1, round(side * factor)) for side in image.size)
        shown = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    layer = heat_layer(heat, scale).resize((width, height), Image.Resampling.BILINEAR)
    layer.putalpha(layer.getchannel("A").point(lambda value: round(0.6 * value)))
    shown.paste(layer, mask=layer.getchannel("A"))
    pen = ImageDraw.Draw(shown)
    factors = (width / size[0], height / size[1])
    for line in (line for region in regions for line in region.outline):
        points = [(x * factors[0], y * factors[1]) for x, y in line]
        pen.line(points, fill="black", width=4)
        pen.line(points, fill="white", width=2)
    return shown


def write_picture(path: Path, picture: Image.Image) -> None:
    """As the name's ending says, .png or .jpg."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG" if path.suffix == ".png" else "JPEG", quality=88)
    write_atomically(path, buffer.getvalue())


# ------------------------------------------------------------------------------------------- files


def write_report(report, folder: Path, scale: tuple[float, float], inspector) -> None:
    """report.html, scores.csv and scores.json; the report opens offline and can be moved with its folder."""
    write_atomically(folder / "scores.csv", scores_csv(report))
    rows = report.scores.drop(columns=hidden(report), errors="ignore")
    content = {
        "warning": report.warning,
        "rule": report.rule.words() if report.rule else None,
        "thresholds": {"score": report.rule.threshold, "map": report.rule.map_threshold}
        if report.rule
        else None,
        "counts": report.counts,
        "observed": report.observed,
        "images": json.loads(rows.to_json(orient="records")),
        "unread": report.unread,
        "skipped": report.skipped,
        "notes": report.notes,
        "settings": report.settings,
    }
    write_atomically(
        folder / "scores.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    )
    write_atomically(folder / "report.html", report_html(report, scale, inspector))


def hidden(report) -> list[str]:
    """Columns that only the page needs, and labels that nobody gave."""
    return ["outlines", "remarks"] + ([] if has_labels(report) else ["label"])


def has_labels(report) -> bool:
    """Whether the user said which images are flawless."""
    return bool(len(report.scores)) and bool((report.scores["label"] >= 0).all())


def scores_csv(report) -> str:
    """A row per image. A text that a spreadsheet would take for a formula gets an apostrophe before it."""
    scores = report.scores.drop(columns=["file", *hidden(report)], errors="ignore")
    if len(scores):
        boxes = ["; ".join(" ".join(map(str, box)) for box in boxes) for boxes in scores["boxes"]]
        scores = scores.assign(image=scores["image"].map(harmless), boxes=boxes)
    if report.warning:
        scores = scores.assign(warning=report.warning)
    return scores.to_csv(index=False)


def harmless(text: str) -> str:
    """
    >>> harmless("=1+2.png"), harmless("a.png")
    ("'=1+2.png", 'a.png')
    """
    return f"'{text}" if text.lstrip().startswith(("=", "+", "-", "@")) else text


def report_html(report, scale: tuple[float, float], inspector) -> str:
    """The page, from ``report.html.j2``."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True
    )
    rows = report.scores.to_dict(orient="records")
    for row in rows:
        row["url"] = quote(row["file"])
        row["no_region"] = no_region(row["verdict"], row.get("regions", 0))
        row["path"] = " ".join(_svg_path(line) for lines in row["outlines"] for line in lines)
    colours = matplotlib.colormaps[MAP](np.linspace(0, 1, 9))
    return environment.get_template("report.html.j2").render(
        report=report,
        rows=rows,
        rows_json=[_viewed(row, report) for row in rows],
        has_labels=has_labels(report),
        histogram=histogram(report),
        method=method_in_words(report, inspector),
        colours=[matplotlib.colors.to_hex(colour) for colour in colours],
        scale=scale,
        map_threshold=report.rule.map_threshold if report.rule else None,
        score_name="score" if report.rule else "logit",
    )


def no_region(verdict: str, regions: int) -> str:
    """What to say of an image with this verdict and this many regions: empty, or why nothing is outlined."""
    return "" if regions else NO_REGION.get(verdict, "")


def _viewed(row, report) -> dict:
    """What the page's script needs of an image."""
    verdict = f"{row['verdict']}, score" if report.rule else "logit"
    title = f"{row['image']}: {verdict} {row['score']:.2f}, {row['width']} x {row['height']} pixels"
    return {
        "title": ", ".join(filter(None, (title, row["no_region"]))),
        **{key: row[key] for key in ("url", "path", "boxes", "width", "height")},
    }


def _svg_path(line) -> str:
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in line) + "Z"


def method_in_words(report, inspector) -> dict[str, str]:
    """The settings of a report, each with what it was."""
    backbone, settings = inspector.detector.backbone, report.settings
    distance = "distance of each patch to the nearest patch of the flawless images"
    near = {
        "no": "the detector's own",
        "alone": distance,
        "added": f"the detector's, plus the {distance}, each on the robust scale of the flawless images",
    }
    score = (
        "(z(logit) + z(map maximum)) / √2, z = distance from the median of the flawless images in units of 1.4826 MAD"
        if report.rule
        else "the logit, 100 × (cosine with the anomalous text − cosine with the normal text); no flawless images were "
        "given, so there is no verdict (--normal)"
    )
    return {
        "object": settings["object"],
        "model": f"{backbone.name}, {backbone.pretrained}, reads {backbone.image_size} × {backbone.image_size} pixels",
        "detector": settings["detector"],
        "map": near[inspector.neighbours],
        "tiles": "none" if inspector.tiles == 1 else f"{inspector.tiles} × {inspector.tiles}",
        "score": score,
        "flawless images": str(len(report.rule.logits)) if report.rule else "none",
        "weights and sources": f"{settings['weights']}, clipad {settings['code']}",
    }


def histogram(report) -> dict | None:
    """Flawless and new scores on one axis, which is 100 long, for the page's drawing; None without scores.

    ``bars``: name -> (left, width, count); ``highest`` count; ``ticks``: (place, text); place of the ``threshold``, or
    None; the same in ``words``.
    """
    new = report.scores["score"].to_numpy(dtype=float)
    if not len(new):
        return None
    flawless = report.rule.scores if report.rule else np.array([])
    both = np.concatenate([new, flawless])
    low, high = float(both.min()), float(both.max())
    words = f"{len(new)} new images between {new.min():.2f} and {new.max():.2f}"
    threshold = report.rule.threshold if report.rule else None
    if threshold is not None:
        # A range in which the threshold can be seen; what is beyond goes into the last bar.
        above = np.clip(high - threshold, 0.05 * (threshold - low), 4 * (threshold - low))
        high = threshold + above
        words += (
            f", {int((new > threshold).sum())} of them above the threshold {threshold:.2f}; {len(flawless)} flawless "
            f"images between {flawless.min():.2f} and {flawless.max():.2f}"
        )
    if beyond := int((new > high).sum()):
        words += f"; {beyond} scores beyond the axis are in its last bar"
    high = high if high > low else low + 1
    counts = {
        name: np.histogram(np.clip(values, low, high), 30, (low, high))[0]
        for name, values in (("flawless", flawless), ("new", new))
    }

    def place(value):
        return 100 * (value - low) / (high - low)

    ticks = MaxNLocator(8, steps=[1, 2, 5, 10]).tick_values(low, high)
    return {
        "bars": {
            name: [(100 * i / 30, 100 / 30, int(n)) for i, n in enumerate(found) if n]
            for name, found in counts.items()
        },
        "highest": max(1, *(int(found.max()) for found in counts.values())),
        "ticks": [(place(tick), f"{tick:g}") for tick in ticks if low <= tick <= high],
        "threshold": None if threshold is None else place(threshold),
        "words": words,
    }
