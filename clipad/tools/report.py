"""What ``clipad detect`` draws, writes and says: regions, overlays, the HTML report, the tables, the terminal."""

import io
import json
from dataclasses import dataclass
from pathlib import Path

import contourpy
import jinja2
import matplotlib
import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageOps
from scipy import ndimage

from clipad.io.files import write_atomically
from clipad.studies.inspection import Rule

MAP = "inferno"
MOST_REGIONS = 20  # that get a box in one image, the highest ones
NO_REGION = {"bad": "bad by score, no region", "check": "too small to outline"}
ONLY_DRAWN = ["outlines", "remarks", "no_region"]  # columns of the table that no file holds


@dataclass(frozen=True)
class Report:
    """What ``detect`` found.

    ``scores``: a row per image that was read, highest score first: image, verdict (good, check, bad; "" without
    flawless images), score, p_value, logit, map_max, regions, area (share of the image), boxes (left, top, right,
    bottom in pixels), width, height, label (1 or 0; no column where not known), file (the stem of its files).
    """

    scores: pd.DataFrame
    scale: tuple[float, float]  # the colours of maps
    unread: dict[str, str]  # image -> why
    skipped: list[str]  # a line per kind of file that is no photograph
    notes: list[str]
    settings: dict  # all that decides the numbers
    rule: Rule | None
    warning: str
    observed: dict[str, float] | None  # what the labels say

    @property
    def counts(self) -> dict[str, int]:
        """How many images are bad, check and good."""
        return {v: int((self.scores["verdict"] == v).sum()) for v in ("bad", "check", "good")}


def find_regions(heat: np.ndarray, threshold: float, size: tuple[int, int]) -> tuple[list, list]:
    """Where a map (R x R, without specks) is above a threshold, in pixels of an image of ``size`` (width, height).

    Boxes of connected parts, highest first: left, top, right, bottom, the last two exclusive. Outlines: closed lines
    of (x, y), also those of holes.
    """
    scale = np.array(size) / heat.shape[::-1]
    # Two frames: the border's own values, so that a region there reaches the edge; low ones, which close its line.
    framed = np.pad(np.pad(heat, 1, mode="edge"), 1, constant_values=heat.min() - 1)
    lines = contourpy.contour_generator(z=framed).lines(threshold)
    outlines = [np.clip((line - 1.5) * scale, 0, size).round(1).tolist() for line in lines]
    labels, _ = ndimage.label(heat > threshold, structure=np.ones((3, 3)))
    boxes = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        left, top = np.floor((columns.start, rows.start) * scale).astype(int).tolist()
        right, below = np.ceil((columns.stop, rows.stop) * scale).astype(int).tolist()
        boxes.append((heat[labels == number].max(), (left, top, right, below)))
    boxes.sort(key=lambda pair: -pair[0])
    return [box for _, box in boxes[:MOST_REGIONS]], outlines


def region_mask(heat: np.ndarray, threshold: float, size: tuple[int, int]) -> Image.Image:
    """Where the map (without specks) is above the threshold, as a black and white image of ``size`` (width, height)."""
    large = Image.fromarray(heat.astype(np.float32)).resize(size, Image.Resampling.BILINEAR)
    return Image.fromarray(np.asarray(large) > threshold)


def heat_layer(heat: np.ndarray, scale: tuple[float, float]) -> Image.Image:
    """The map as a layer to lay over the image: colour by value, transparent where it is low."""
    strength = np.clip((heat - scale[0]) / (scale[1] - scale[0]), 0, 1).astype(np.float32)
    colours = matplotlib.colormaps[MAP](strength)
    colours[..., 3] = np.sqrt(strength)
    return Image.fromarray((255 * colours).round().astype(np.uint8), "RGBA")


def draw(picture: Path, layer: Image.Image, outlines) -> Image.Image:
    """The image in a file under its map and outlines, 768 pixels along its longer side."""
    with Image.open(picture) as image:
        native = image.size
        image.draft("RGB", (768, 768))
        shown = ImageOps.contain(image.convert("RGB"), (768, 768))
    layer = layer.resize(shown.size, Image.Resampling.BILINEAR)
    shown.paste(layer, mask=layer.getchannel("A").point(lambda value: round(0.6 * value)))
    pen, factors = ImageDraw.Draw(shown), np.divide(shown.size, native)
    for line in outlines:
        points = [tuple(point) for point in np.multiply(line, factors)]
        pen.line(points, fill="black", width=4)
        pen.line(points, fill="white", width=2)
    return shown


def write_picture(path: Path, picture: Image.Image) -> None:
    """As the name's ending says, .png or .jpg."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG" if path.suffix == ".png" else "JPEG", quality=88)
    write_atomically(path, buffer.getvalue())


def write_report(report: Report, folder: Path, backbone) -> None:
    """report.html, scores.csv and scores.json; the report opens offline and can be moved with its folder."""
    rule, rows = report.rule, report.scores.drop(columns=ONLY_DRAWN)
    content = {
        "warning": report.warning,
        "rule": rule and rule.words(),
        "thresholds": rule and {"score": rule.threshold, "map": rule.map_threshold},
        "counts": report.counts,
        "observed": report.observed,
        "images": json.loads(rows.to_json(orient="records")),
        "unread": report.unread,
        "skipped": report.skipped,
        "notes": report.notes,
        "settings": report.settings,
    }
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_atomically(folder / "scores.csv", _csv(rows.drop(columns="file"), report.warning))
    write_atomically(folder / "scores.json", text)
    write_atomically(folder / "report.html", _html(report, backbone))


def _csv(rows: pd.DataFrame, warning: str) -> str:
    """A row per image. A text that a spreadsheet would take for a formula gets an apostrophe before it."""
    boxes = ["; ".join(" ".join(map(str, box)) for box in boxes) for boxes in rows["boxes"]]
    formula = rows["image"].str.match(r"\s*[=+\-@]")
    rows = rows.assign(image=rows["image"].mask(formula, "'" + rows["image"]), boxes=boxes)
    return (rows.assign(warning=warning) if warning else rows).to_csv(index=False)


def _html(report: Report, backbone) -> str:
    """The page, from ``report.html.j2``."""
    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=folder, autoescape=True, trim_blocks=True)
    colours = matplotlib.colormaps[MAP](np.linspace(0, 1, 9))
    low, high = report.scores["score"].min(), report.scores["score"].max()
    if rule := report.rule:  # the threshold can be seen; what is far above it lies at the end
        low = min(low, rule.scores.min())
        below = rule.threshold - low
        high = rule.threshold + np.clip(high - rule.threshold, 0.05 * below, 4 * below)
    ticks = MaxNLocator(8, steps=[1, 2, 5, 10]).tick_values(low, high)
    return environment.get_template("report.html.j2").render(
        report=report,
        backbone=backbone,
        rows=report.scores.to_dict(orient="records"),
        ticks=ticks,
        colours=[matplotlib.colors.to_hex(colour) for colour in colours],
    )


def summary(report: Report, output_dir: Path, shown: int = 10) -> list[str]:
    """What a terminal shows: counts, the images that score highest, what was left out, where the report is."""
    lines = [f"left out: {line}" for line in report.skipped]
    lines += [f"note: {line}" for line in report.notes]
    lines += [f"not readable: {name}: {why}" for name, why in report.unread.items()]
    if report.rule:
        lines += [f"{name}: {text}" for name, text in report.rule.words().items()]
    if report.observed:
        lines.append("  ".join(f"{k} {v:.3f}" for k, v in report.observed.items()))
    for row in report.scores.head(shown).itertuples():
        lines.append(f"{row.score:8.2f}  {row.verdict:6}{row.image}  {row.no_region}".rstrip())
    counts = ", ".join(f"{n} {verdict}" for verdict, n in report.counts.items())
    said = f"{len(report.scores)} images{f': {counts}' if report.rule else ''}"
    return [*lines, f"{said}; see {output_dir / 'report.html'}"]
