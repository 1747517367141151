"""Figures of notebook 02: what the direct map does wrong, counted, and what may explain it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from sklearn.decomposition import PCA

from clipad.studies import opposite_predictions as phenomena
from clipad.studies.figures import ANOMALOUS, COLOURS, MAP, NORMAL, contour, heatmap

NAMES = {
    "opposite": "opposite prediction",
    "opposite_regions": "opposite, per region",
    "opposite_on_object": "opposite, on the object",
    "off_object": "highlight off the object",
    "off_defect": "highlight off the defect",
}
DIVERGING = "PuOr_r"
"""purple: less of it, orange: more"""


def steps(
    image: np.ndarray, cosines: np.ndarray, values: np.ndarray, mask: np.ndarray | None = None
) -> Figure:
    """The direct map in steps: image, cosine with either state and their difference on the patch grid, map.

    ``image`` S x S x 3, ``cosines`` N x 2, ``values`` S x S.
    """
    grid = round(len(cosines) ** 0.5)
    normal, anomalous = cosines.T.reshape(2, grid, grid)
    size = values.shape[0]
    limits = {"vmin": cosines.min(), "vmax": cosines.max()}
    reach = np.abs(anomalous - normal).max()
    figure, axes = plt.subplots(1, 5, figsize=(8.8, 2.45), layout="constrained")
    panels = [
        ("image", image, {}),
        ("cos with 'normal'", normal, {"cmap": "cividis", **limits}),
        ("cos with 'anomalous'", anomalous, {"cmap": "cividis", **limits}),
        ("difference", anomalous - normal, {"cmap": DIVERGING, "vmin": -reach, "vmax": reach}),
        ("direct map", values, {"cmap": MAP, "vmin": 0, "vmax": 1}),
    ]
    for ax, (name, panel, options) in zip(axes, panels, strict=True):
        shown = ax.imshow(panel, extent=(0, size, size, 0), interpolation="nearest", **options)
        if mask is not None:
            contour(ax, mask)
        ax.set_title(name, fontsize=9)
        _bare(ax)
        if options:
            bar = figure.colorbar(shown, ax=ax, location="bottom", shrink=0.85, aspect=14, pad=0.02)
            bar.ax.tick_params(labelsize=7)
            bar.locator = plt.MaxNLocator(3)
            bar.update_ticks()
        else:
            # An empty bar keeps the panels at one size.
            figure.colorbar(
                plt.cm.ScalarMappable(), ax=ax, location="bottom", shrink=0.85, aspect=14, pad=0.02
            ).ax.set_visible(False)
    return figure


def two_scales(
    rows: Mapping[str, Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]], columns: Sequence[str]
) -> Figure:
    """Per category (row) and choice (group of columns): image, its map on one shared scale 0-1, and the map scaled
    to the image's own minimum and maximum, as the released program draws it.

    ``rows``: per category a triple (image S x S x 3, map S x S, mask S x S) for each of ``columns``.
    """
    count = len(columns)
    figure = plt.figure(figsize=(2.5 * count + 0.3, 0.82 * len(rows) + 0.9))
    height = figure.get_figheight()
    grid = figure.add_gridspec(
        len(rows),
        4 * count,
        width_ratios=[1, 1, 1, 0.16] * count,
        wspace=0.04,
        hspace=0.05,
        left=0.03,
        right=0.995,
        top=1 - 0.55 / height,
        bottom=0.35 / height,
    )
    for row, (category, cells) in enumerate(rows.items()):
        for column, (image, values, mask) in enumerate(cells):
            shared, own = {"cmap": MAP, "vmin": 0, "vmax": 1}, {"cmap": MAP}
            panels = [(image, {}), (values, shared), (values, own)]
            for place, (panel, options) in enumerate(panels):
                ax = figure.add_subplot(grid[row, 4 * column + place])
                ax.imshow(panel, **options)
                contour(ax, mask)
                _bare(ax)
                if row == 0:
                    ax.set_title(("image", "shared", "released")[place], fontsize=7, pad=2)
                    if place == 1:
                        ax.annotate(
                            columns[column],
                            (0.5, 1.38),
                            xycoords="axes fraction",
                            ha="center",
                            fontsize=9,
                            weight="bold",
                        )
                if column == place == 0:
                    ax.set_ylabel(category, fontsize=8)
    bar = figure.add_axes([0.36, 0.16 / height, 0.28, 0.07 / height])
    figure.colorbar(
        plt.cm.ScalarMappable(cmap=MAP), cax=bar, orientation="horizontal", ticks=[0, 0.5, 1]
    )
    bar.tick_params(labelsize=7, pad=1)
    return figure


def flawless(
    images: Sequence[np.ndarray],
    maps: Mapping[str, tuple[np.ndarray, tuple[float, float]]],
    titles: Sequence[str],
) -> Figure:
    """Normal images (columns), and below each the map of each method on its shared scale and as released.

    ``maps``: per method maps N x S x S and the limits (low, high) of the shared scale.
    """
    rows = 1 + 2 * len(maps)
    figure, axes = plt.subplots(
        rows,
        len(images),
        figsize=(0.78 * len(images) + 1.1, 0.78 * rows + 0.3),
        squeeze=False,
        layout="constrained",
    )
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    for column, (image, title) in enumerate(zip(images, titles, strict=True)):
        axes[0, column].imshow(image)
        axes[0, column].set_title(title, fontsize=8.5)
        for row, (values, (low, high)) in enumerate(maps.values()):
            axes[1 + 2 * row, column].imshow(
                values[column], MAP, interpolation="nearest", vmin=low, vmax=high
            )
            axes[2 + 2 * row, column].imshow(values[column], MAP)
    names = [
        "image",
        *(f"{name},\n{scale}" for name in maps for scale in ("shared scale", "as released")),
    ]
    for ax, name in zip(axes[:, 0], names, strict=True):
        ax.set_ylabel(name, fontsize=8.5, rotation=0, ha="right", va="center")
    for ax in axes.flat:
        _bare(ax)
    return figure


def signature(frames: Mapping[str, pd.DataFrame]) -> Figure:
    """Every anomalous image as a point, a column of panels per method; shaded is where the phenomenon is.

    Above: mean of the map outside the defect against inside; below the diagonal are the opposite predictions. Below:
    share of the image off the object against share of its highlights there; above the diagonal is more than chance.
    Where no object is known, the second row is about the defect.
    """
    place = "object" if any(f["off_object"].notna().any() for f in frames.values()) else "defect"
    figure, axes = plt.subplots(
        2, len(frames), figsize=(3.15 * len(frames) + 1.6, 6.2), squeeze=False, layout="constrained"
    )
    for (top, bottom), (name, frame) in zip(axes.T, frames.items(), strict=True):
        wrong = frame["opposite"] > 0.5
        _halves(
            top,
            frame["outside"],
            frame["inside"],
            wrong,
            ("defect higher", "opposite"),
            shade="below",
        )
        top.set(xlabel="mean outside the defect", ylabel="mean inside the defect")
        top.set_title(f"{name}: {frame['opposite'].mean():.0%} opposite predictions", fontsize=10)

        found = frame.dropna(subset=[f"off_{place}"])
        x, y = found[f"off_{place}_chance"], found[f"off_{place}"]
        _halves(
            bottom,
            x,
            y,
            y > x,
            ("chance or less", "more than chance"),
            shade="above",
            limits=(0, 1),
        )
        bottom.set(
            xlabel=f"share of the image off the {place} (= chance)",
            ylabel=f"share of top 5 % off the {place}",
        )
        bottom.set_title(
            f"{name}: {y.mean():.0%} off the {place}, chance {x.mean():.0%}", fontsize=10
        )
    for ax in axes.flat:
        ax.tick_params(labelsize=8)
        sns.despine(ax=ax)
    for ax in axes[:, -1]:
        ax.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _halves(
    ax, x: pd.Series, y: pd.Series, wrong: pd.Series, names, shade: str, limits=None
) -> None:
    """Points on equal axes with their diagonal, the side of the phenomenon shaded."""
    low, high = limits or (min(x.min(), y.min()), max(x.max(), y.max()))
    margin = 0.05 * (high - low or 1)
    ends = np.array([low - margin, high + margin])
    ax.fill_between(
        ends,
        ends,
        ends[0] if shade == "below" else ends[1],
        color=ANOMALOUS,
        alpha=0.1,
        linewidth=0,
    )
    ax.plot(ends, ends, color="0.5", linewidth=1)
    ax.scatter(x[~wrong], y[~wrong], s=20, color=NORMAL, alpha=0.7, linewidth=0, label=names[0])
    ax.scatter(
        x[wrong],
        y[wrong],
        s=24,
        color=ANOMALOUS,
        marker="X",
        alpha=0.8,
        linewidth=0,
        label=names[1],
    )
    ax.set(xlim=ends, ylim=ends)
    ax.set_box_aspect(1)


def before_after(
    before: pd.DataFrame,
    after: pd.DataFrame,
    difference: pd.DataFrame,
    columns: Sequence[str],
    names=("Direct", "SDP"),
) -> Figure:
    """Rates per category before and after, and on a diverging colour the signed change with its interval, in percent.

    All three from :func:`rates`, the last of :func:`change`.
    """
    columns = [c for c in columns if difference[c, "rate"].notna().any()]
    values = 100 * difference[[(c, "rate") for c in columns]].to_numpy(float)
    words = [
        [_cell(before, after, difference, c, row) for c in columns] for row in difference.index
    ]
    figure, ax = plt.subplots(
        figsize=(1.5 + 2.0 * len(columns), 0.46 * len(difference) + 1.5), layout="constrained"
    )
    heatmap(
        pd.DataFrame(values, difference.index, [NAMES[c] for c in columns]),
        ax,
        cmap=DIVERGING,
        vmin=-100,
        annot=np.array(words),
        fmt="",
        linewidths=1,
        cbar=True,
        cbar_kws={"label": "change, percentage points", "shrink": 0.8},
    )
    ax.axhline(len(difference) - 1, color="black", linewidth=1.5)
    ax.set_title(f"{names[0]} → {names[1]}, percent; change with 95 % interval", fontsize=10)
    ax.tick_params(labelsize=8.5, length=0, labelrotation=0)
    return figure


def _cell(before, after, difference, column, row) -> str:
    rate, low, high = (
        100 * difference.loc[row, (column, part)] for part in ("rate", "low", "high")
    )
    if np.isnan(rate):
        return "–"
    first, last = (100 * table.loc[row, (column, "rate")] for table in (before, after))
    return f"{first:.0f} → {last:.0f}\n{rate:+.0f} [{low:+.0f}, {high:+.0f}]".replace("-", "−")


def joint_projection(
    panels: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]],
    kinds=("patch", "sentence"),
) -> Figure:
    """PCA of patches and sentences together, one panel each, fitted for itself.

    A panel is (patches P x C, their labels, sentences M x C, their labels), unit rows, labels 0 and 1.
    """
    figure, axes = plt.subplots(
        1, len(panels), figsize=(3.2 * len(panels), 3.55), squeeze=False, layout="constrained"
    )
    for ax, (name, (patches, labels, sentences, states)) in zip(
        axes[0], panels.items(), strict=True
    ):
        pca = PCA(2, svd_solver="full").fit(np.concatenate([patches, sentences]))
        groups = [
            (patches[labels == 0], NORMAL, "o", 12, f"{kinds[0]}, normal"),
            (patches[labels == 1], ANOMALOUS, "X", 18, f"{kinds[0]}, anomalous"),
            (sentences[states == 0], COLOURS["green"], "^", 20, f"{kinds[1]}, normal"),
            (sentences[states == 1], COLOURS["red"], "v", 20, f"{kinds[1]}, anomalous"),
        ]
        for points, colour, marker, size, label in groups:
            if len(points):
                ax.scatter(
                    *pca.transform(points).T,
                    s=size,
                    color=colour,
                    marker=marker,
                    alpha=0.55,
                    linewidth=0,
                    label=label,
                )
        ax.set_title(name, fontsize=10)
        first, second = 100 * pca.explained_variance_ratio_
        ax.set(xlabel=f"PC 1 ({first:.0f} % of variance)", ylabel=f"PC 2 ({second:.0f} %)")
        ax.tick_params(labelsize=8)
        ax.set_aspect("equal", adjustable="datalim")
        sns.despine(ax=ax)
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=4,
        fontsize=8,
        markerscale=1.4,
    )
    return figure


def by_layer(
    cosines: Mapping,
    labels: np.ndarray | None,
    gaps: pd.Series,
    tables: Mapping[tuple, pd.DataFrame],
) -> Figure:
    """Layer by layer, and for v-v attention over the last k blocks: cosine difference of the patches (median and
    middle half), modality gap, and the two phenomena with their intervals (rows as far as they are known)."""
    keys = list(cosines)
    places = np.array([i + (0.8 if kind == "v-v" else 0) for i, (kind, _) in enumerate(keys)])
    ordinary = np.array([kind == "q-k" for kind, _ in keys])
    figure, axes = plt.subplots(
        3 if tables else 2, 1, figsize=(8.6, 7.6 if tables else 5), sharex=True, layout="constrained",
        height_ratios=[1.3, 0.8, 1.3] if tables else [1.3, 0.8],
    )  # fmt: skip
    groups = (
        [("all patches", COLOURS["grey"], "o", None)]
        if labels is None
        else [("normal patches", NORMAL, "o", 0), ("defect patches", ANOMALOUS, "X", 1)]
    )
    for offset, (name, colour, marker, label) in zip((-0.1, 0.1), groups, strict=False):
        sets = [(c[..., 1] - c[..., 0]).numpy() for c in cosines.values()]
        sets = [s.ravel() if label is None else s[labels == label] for s in sets]
        low, middle, high = np.array([np.percentile(s, [25, 50, 75]) for s in sets]).T
        _lines(axes[0], places + offset, ordinary, middle, low, high, colour, marker, name)
    axes[0].axhline(0, color="0.6", linewidth=0.8)
    axes[0].set_ylabel("cos(anomalous) − cos(normal)\nmedian and middle half", fontsize=9)
    _lines(
        axes[1],
        places,
        ordinary,
        gaps.to_numpy(),
        None,
        None,
        COLOURS["purple"],
        "D",
        "distance of the two means",
    )
    axes[1].set_ylabel("modality gap", fontsize=9)
    axes[1].set_ylim(0, 1.15 * gaps.max())
    if tables:
        place = (
            "off_object"
            if any(t.loc["mean", ("off_object", "n")] for t in tables.values())
            else "off_defect"
        )
        for column, colour, marker, offset in (
            ("opposite", COLOURS["red"], "X", -0.1),
            (place, COLOURS["green"], "o", 0.1),
        ):
            rate, low, high = np.array(
                [
                    t.loc["mean", [(column, p) for p in ("rate", "low", "high")]]
                    for t in tables.values()
                ]
            ).T
            _lines(
                axes[2], places + offset, ordinary, rate, low, high, colour, marker, NAMES[column]
            )
        chance = next(iter(tables.values())).loc["mean", (f"{place}_chance", "rate")]
        axes[2].axhline(
            0.5, color=COLOURS["red"], linestyle=":", label="chance: opposite prediction"
        )
        axes[2].axhline(chance, color=COLOURS["green"], linestyle=":", label="chance: highlight")
        axes[2].set_ylim(0, 1)
        axes[2].yaxis.set_major_formatter(plt.matplotlib.ticker.PercentFormatter(1))
        axes[2].set_ylabel("rate, 95 % interval", fontsize=9)
    for ax in axes:
        ax.axvline(places[~ordinary][0] - 0.9, color="0.8", linewidth=1)
        ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
        ax.tick_params(labelsize=8)
        sns.despine(ax=ax)
    axes[-1].set_xticks(places, [str(number) for _, number in keys])
    below = axes[-1].get_xaxis_transform()
    for part, words in (
        (ordinary, "ordinary path (q-k), after block …"),
        (~ordinary, "v-v attention,\nlast … blocks"),
    ):
        axes[-1].text(
            places[part].mean(), -0.12, words, transform=below, ha="center", va="top", fontsize=9
        )
    return figure


def _lines(ax, x, ordinary, middle, low, high, colour, marker, label) -> None:
    """A line over the layers and another over the v-v paths, with intervals where given."""
    for part, name in ((ordinary, label), (~ordinary, None)):
        ax.plot(
            x[part],
            middle[part],
            color=colour,
            marker=marker,
            markersize=5,
            linewidth=1.2,
            label=name,
        )
        if low is not None:
            ax.vlines(x[part], low[part], high[part], color=colour, linewidth=2, alpha=0.45)


def attention(
    image: np.ndarray,
    queries: Mapping[str, int],
    weights: Sequence[np.ndarray],
    mask: np.ndarray | None,
    block: int,
) -> Figure:
    """What chosen patches attend to by q-k and by v-v: a row per query patch, ``weights`` two matrices T x T.

    The weight on the class token is left out of the pictures and stands in their titles.
    """
    size = image.shape[0]
    grid = round((weights[0].shape[0] - 1) ** 0.5)
    step = size / grid
    figure, axes = plt.subplots(
        len(queries), 3, figsize=(6.2, 2.05 * len(queries)), squeeze=False, layout="constrained"
    )
    for row, (name, patch) in enumerate(queries.items()):
        corner = (patch % grid * step, patch // grid * step)
        panels = [image, *(w[1 + patch, 1:].reshape(grid, grid) for w in weights)]
        for ax, panel in zip(axes[row], panels, strict=True):
            shown = ax.imshow(
                panel, extent=(0, size, size, 0), cmap=MAP, vmin=0, interpolation="nearest"
            )
            if mask is not None:
                contour(ax, mask)
            ax.add_patch(Rectangle(corner, step, step, fill=False, edgecolor="cyan", linewidth=1.6))
            _bare(ax)
            if panel.ndim == 2:
                bar = figure.colorbar(shown, ax=ax, shrink=0.8, aspect=14, pad=0.02)
                bar.ax.tick_params(labelsize=7)
        axes[row, 0].set_ylabel(name, fontsize=9)
        for ax, kind, w in zip(axes[row, 1:], ("q-k", "v-v"), weights, strict=True):
            ax.set_title(
                f"{kind}, block {block} (class token: {w[1 + patch, 0]:.0%})", fontsize=8.5
            )
    return figure


def attention_by_layer(frame: pd.DataFrame) -> Figure:
    """Per block: how much of a defect patch's attention goes to other defect patches, by q-k, v-v, and if even."""
    means, errors = frame.groupby("layer").mean(), frame.groupby("layer").sem()
    figure, ax = plt.subplots(figsize=(6.4, 2.9), layout="constrained")
    for offset, name, colour, marker in (
        (-0.05, "q-k", COLOURS["grey"], "s"),
        (0.05, "v-v", COLOURS["green"], "o"),
    ):
        ax.errorbar(
            means.index + offset,
            means[name],
            1.96 * errors[name],
            color=colour,
            marker=marker,
            markersize=5,
            label=f"{name} attention",
        )
    ax.plot(
        means.index, means["chance"], color="0.3", linestyle=":", label="even attention (chance)"
    )
    ax.set(
        xlabel="block",
        ylabel="attention of defect patches\nto other defect patches",
        ylim=(0, None),
        xticks=means.index,
    )
    ax.yaxis.set_major_formatter(plt.matplotlib.ticker.PercentFormatter(1))
    ax.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    ax.tick_params(labelsize=8)
    sns.despine(ax=ax)
    return figure


def controls(
    draws: Mapping[str, pd.DataFrame], observed: Mapping[str, pd.Series], columns: Sequence[str]
) -> Figure:
    """Mean rates of every draw of every control as points, beside what the detectors have as lines."""
    columns = [c for c in columns if not any(np.isnan(o[c]) for o in observed.values())]
    figure, axes = plt.subplots(
        1,
        len(columns),
        figsize=(4.4 * len(columns), 3.3),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    generator = np.random.default_rng(0)
    for ax, column in zip(axes[0], columns, strict=True):
        for row, frame in enumerate(draws.values()):
            height = row + generator.uniform(-0.24, 0.24, len(frame))
            ax.scatter(frame[column], height, s=13, color="0.45", alpha=0.6, linewidth=0)
            ax.vlines(frame[column].mean(), row - 0.36, row + 0.36, color="black", linewidth=2)
        for (name, values), colour, style in zip(
            observed.items(), (COLOURS["red"], COLOURS["blue"]), ("-", "--"), strict=False
        ):
            ax.axvline(values[column], color=colour, linestyle=style, linewidth=2, label=name)
        chance = (
            0.5
            if column.startswith("opposite")
            else next(iter(observed.values()))[f"{column}_chance"]
        )
        ax.axvline(chance, color="0.3", linestyle=":", linewidth=1.5, label="chance")
        ax.set(xlim=(0, 1), xlabel=f"{NAMES[column]}, mean over categories")
        ax.xaxis.set_major_formatter(plt.matplotlib.ticker.PercentFormatter(1))
        ax.tick_params(labelsize=8)
        sns.despine(ax=ax)
    axes[0, 0].set_yticks(
        range(len(draws)),
        [f"{name}\n({len(frame)} draws)" for name, frame in draws.items()],
        fontsize=8.5,
    )
    axes[0, 0].invert_yaxis()
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8
    )
    return figure


def _bare(ax) -> None:
    ax.set(xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set_visible(False)


# ------------------------------------------------------------------------------- what the figures say, in words


def percent(row: pd.Series) -> str:
    """A rate with its interval: "79% [72%, 84%]"."""
    return f"{row['rate']:.0%} [{row['low']:.0%}, {row['high']:.0%}]"


def words_of_rates(
    frames: Mapping[str, pd.DataFrame],
    tables: Mapping[str, pd.DataFrame],
    place: str,
    seed: int = 0,
) -> list[str]:
    """Per method: both means with their intervals, and on which side of chance they lie."""
    lines = []
    for name, frame in frames.items():
        mean = tables[name].loc["mean"]
        excess = frame.assign(excess=frame[place] - frame[f"{place}_chance"])
        excess = phenomena.rates(excess, ["excess"], seed=seed).loc["mean", "excess"]
        lines.append(
            f"{name}: opposite predictions {percent(mean['opposite'])}, {phenomena.against(mean['opposite'], 0.5)} "
            f"chance (50%); {NAMES[place]} {percent(mean[place])}, {phenomena.against(excess, 0)} chance "
            f"({mean[place + '_chance', 'rate']:.0%})."
        )
    return lines


def words_of_change(difference: pd.DataFrame) -> str:
    mean, fell = difference.loc["mean", "opposite"], difference["opposite"].drop("mean")["high"] < 0
    return (
        f"Opposite predictions change by {100 * mean['rate']:+.0f} points on average "
        f"[{100 * mean['low']:+.0f}, {100 * mean['high']:+.0f}]; "
        f"the interval lies below 0 in {fell.sum()} of {len(fell)} categories."
    )


def words_of_scales(effects: Mapping[str, Mapping[str, float]]) -> str:
    """From :func:`clipad.studies.opposite_predictions.scale_effect` per method."""
    return "Pixels of flawless images drawn in the top tenth of the scale: " + "; ".join(
        f"{name} {e['shared']:.0%} shared, {e['released']:.0%} as released "
        f"(AUROC of the brightest spot {e['auroc']:.0%} shared, 50% as released)"
        for name, e in effects.items()
    ) + "."  # fmt: skip


def words_of_knowledge(knows: pd.DataFrame, before: pd.Series, closed: float) -> str:
    """Whether the features know more than the text reads, and what closing the gap does to opposite predictions.

    ``knows``: :func:`clipad.studies.opposite_predictions.what_patches_know`; ``before``: the direct map's row of rates.
    """
    asked, known, blind = knows["q-k"].iloc[:3]
    if known > max(asked, blind) + 0.05:
        told = "the patches know more of defects than the text reads from them: they are informed, but not aligned."
    elif known > asked + 0.05:
        told = "the probe beats the text, but finds as much in an untrained encoder: this says nothing of training."
    else:
        told = "the probe finds no more than the text reads: misalignment is not the reason here."
    rest = f"With the gap closed, opposite predictions go from {before['rate']:.0%} to {closed:.0%}"
    if phenomena.against(before, 0.5) != "above":
        rest += "; there was no excess over chance (50%) to explain."
    else:
        share = min(1, max(0, (before["rate"] - closed) / (before["rate"] - 0.5)))
        rest += f": the offset between the modalities accounts for {share:.0%} of the excess over chance (50%)."
    return f"Linear probe {known:.1%}, text {asked:.1%}, probe of an untrained encoder {blind:.1%}: {told} {rest}"


def words_of_layers(gaps: pd.Series, tables: Mapping[tuple, pd.DataFrame]) -> str:
    """The gap and, where it is known, the rate of opposite predictions: first block, last block, v-v throughout."""
    last = max(number for _, number in gaps.index)
    first, end, vv = (gaps[key] for key in (("q-k", 1), ("q-k", last), ("v-v", last)))
    told = f"The gap is {first:.2f} after block 1, {end:.2f} after block {last} and {vv:.2f} with v-v throughout."
    if tables:
        over = {key: t.loc["mean", ("opposite", "rate")] for key, t in tables.items()}
        kind, number = min(over, key=over.get)
        told += (
            f" Opposite predictions: {over['q-k', 1]:.0%}, {over['q-k', last]:.0%} and {over['v-v', last]:.0%}; "
            f"fewest, {over[kind, number]:.0%}, "
            f"{'after block' if kind == 'q-k' else 'with v-v attention in the last'} {number}."
        )
        if over["v-v", last] < over["q-k", last] and vv >= end:
            told += " They fall although the gap does not."
    return told


def words_of_attention(frame: pd.DataFrame) -> str:
    mean = frame.groupby("layer").mean()
    ratio = mean[["q-k", "v-v"]].div(mean["chance"], axis=0)
    return (
        f"A defect patch gives other defect patches {ratio['q-k'].mean():.1f} times their even share by q-k and "
        f"{ratio['v-v'].mean():.1f} times by v-v (mean over blocks); {ratio['q-k'].iloc[-1]:.1f} and "
        f"{ratio['v-v'].iloc[-1]:.1f} times in the last block."
    )


def words_of_controls(
    drawn: Mapping[str, pd.DataFrame], observed: Mapping[str, pd.Series], columns: Sequence[str]
) -> list[str]:
    """Per phenomenon, whether the first of ``observed`` goes beyond what the controls reach."""
    name, values = next(iter(observed.items()))
    lines = []
    for column in columns:
        shares = phenomena.reached(drawn, values[column], column)
        highest = max(shares["shuffled states"], shares["random text"])
        verdict = (
            "more than the controls show"
            if highest <= 0.05
            else "at the edge of what the controls show"
            if highest <= 0.1
            else "the controls show it as well"
        )
        blind = drawn["untrained image encoder"][column]
        lines.append(
            f"{NAMES[column]}, {name} {values[column]:.0%}: {verdict}. At least as high: "
            f"{shares['shuffled states']:.0%} of shuffled states, {shares['random text']:.0%} of random texts; "
            f"the highest of {len(blind)} untrained encoders has {blind.max():.0%}."
        )
    return lines
