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
ONLY_DRAWN = ["outlines", "remark"]  # columns of the table that no file holds


@dataclass(frozen=True)
class Report:
    """What ``detect`` found.

    ``scores``: a row per image that was read, highest score first: image, verdict (good, check, bad; "" without
    flawless images), score, p_value, logit, map_max, regions, boxes (left, top, right, bottom in pixels), width,
    height, label (1 or 0; no column where not known), file (the stem of its files).
    """

    scores: pd.DataFrame
    scale: tuple[float, float]  # the colours of maps
    unread: dict[str, str]  # image -> why
    notes: list[str]  # what was left out or changed
    settings: dict  # all that decides the numbers
    rule: Rule | None
    warning: str
    observed: dict[str, str]  # what the labels say, in percent

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
    labels, count = ndimage.label(heat > threshold, structure=np.ones((3, 3)))
    boxes = []
    for rows, columns in ndimage.find_objects(labels):
        start = np.floor((columns.start, rows.start) * scale)
        stop = np.ceil((columns.stop, rows.stop) * scale)
        boxes.append((*start.astype(int).tolist(), *stop.astype(int).tolist()))
    highest = ndimage.maximum(heat, labels, range(1, count + 1))
    return [boxes[i] for i in np.argsort(highest)[::-1]], outlines


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
    content = vars(report) | {
        "scores": json.loads(rows.to_json(orient="records")),
        "counts": report.counts,
        "rule": rule and rule.words(),
        "thresholds": rule and {"score": rule.threshold, "map": rule.map_threshold},
    }
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_atomically(folder / "scores.csv", _csv(rows.drop(columns="file"), report.warning))
    write_atomically(folder / "scores.json", text)
    write_atomically(folder / "report.html", _html(report, backbone))


def _csv(rows: pd.DataFrame, warning: str) -> str:
    """A row per image. A text that a spreadsheet would take for a formula gets an apostrophe before it."""
    boxes = ["; ".join(" ".join(map(str, box)) for box in boxes) for boxes in rows["boxes"]]
    names = rows["image"].str.replace(r"^(?=\s*[=+\-@])", "'", regex=True)
    rows = rows.assign(image=names, boxes=boxes)
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
    return environment.get_template("report.html.j2").render(
        report=report,
        backbone=backbone,
        rows=report.scores.to_dict(orient="records"),
        ticks=MaxNLocator(8, steps=[1, 2, 5, 10]).tick_values(low, high),
        colours=[matplotlib.colors.to_hex(colour) for colour in colours],
    )


def summary(report: Report, output_dir: Path) -> list[str]:
    """What a terminal shows: what was left out, the rule, the images that score highest, counts."""
    lines = [f"note: {line}" for line in report.notes]
    lines += [f"not readable: {name}: {why}" for name, why in report.unread.items()]
    said = report.observed | (report.rule.words() if report.rule else {})
    lines += [f"{name}: {text}" for name, text in said.items()]
    for row in report.scores.head(10).itertuples():
        region = "  no region" if row.verdict == "bad" and not row.regions else ""
        lines.append(f"{row.score:8.2f}  {row.verdict:6}{row.image}{region}")
    counts = ", ".join(f"{n} {verdict}" for verdict, n in report.counts.items() if report.rule)
    said = f"{len(report.scores)} images  {counts}".rstrip()
    return [*lines, said, f"see {output_dir / 'report.html'}"]
