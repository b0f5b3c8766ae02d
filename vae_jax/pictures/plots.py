"""Grids of images with labels, scatters of latent points, and the curves of a run, drawn by matplotlib.

Imports neither jax nor torch. matplotlib is used without pyplot, so that the figures of a notebook are left alone.
Pictures have 200 dots per inch and are about 1,800 dots wide: sharp and readable at half that width on a high-density
screen.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Integer, UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle
from matplotlib.patheffects import Normal, Stroke
from matplotlib.textpath import TextPath
from matplotlib.ticker import MaxNLocator
from PIL import Image

from vae_jax.runs.metrics import EpochMetrics
from vae_jax.system.files import replacing

DPI = 200
GAP = 2  # between the images of a grid, in pixels of the images
SHEET_WIDTH, SHEET_HEIGHT = 1600, 1440  # of all images of a grid, about, in pixels of the picture
MARGIN, LINE = 24, 36  # around a grid, and for a line of text beside it, in pixels of the picture
LABEL, TITLE = 9, 11  # sizes of text, in points
INK = "#333333"
BLUE, ORANGE = "#0072b2", "#d55e00"  # colour-blind eyes tell them apart (Okabe and Ito)
# For labels, which colour-blind eyes tell apart too (Petroff, https://arxiv.org/abs/2107.02270); two have changed
# places, so that the greys do not fall to the digits 3 and 8, which often lie side by side.
TEN = ("#3f90da", "#717581", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#ffa90e", "#92dadd")
MARKERS = "o^sDvPX"  # each serves ten labels


def grid(
    images: Float[np.ndarray, "rows columns height width"] | Float[np.ndarray, "rows columns height width channels"],
    *,
    title: str = "",
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    row_axis: str = "",
    column_axis: str = "",
    marks: Sequence[float] = (),
) -> Figure:
    """Images side by side; each of their pixels is a square of whole pixels of the picture.

    Args:
      images: Pixels in [0, 1], grey or with channels: three are red, green and blue; any other number of them are drawn
        as grey images side by side. Places that are NaN stay empty.
      title: Above the grid.
      row_labels: To the left of each row; none, or one for each. Labels that would overlap are left out.
      column_labels: Under each column; none, or one for each.
      row_axis: The name of what the row labels measure.
      column_axis: The name of what the column labels measure.
      marks: The column to mark under each row, fractions included; NaN marks nothing.
    """
    rows, columns, height = images.shape[:3]
    if images.shape[4:] not in ((), (3,)):
        images = np.moveaxis(images, 4, 3).reshape(rows, columns, height, -1)
    width = images.shape[3]
    sheet = _sheet(images)
    scale = max(1, round(min(SHEET_WIDTH / sheet.shape[1], SHEET_HEIGHT / sheet.shape[0])))
    size = np.array([sheet.shape[1], sheet.shape[0]]) * scale

    # All lengths are whole pixels of the picture: that keeps the images sharp.
    labels_width = max((_text_width(label, LABEL) for label in row_labels), default=0)
    left = MARGIN + (labels_width + MARGIN // 2 if row_labels else 0)
    left += _text_width(row_axis, LABEL) + MARGIN if row_axis else 0
    right = max(0, _text_width(title, TITLE) - size[0], _text_width(column_axis, LABEL) - size[0]) + MARGIN
    bottom = MARGIN + LINE * (bool(column_labels) + bool(column_axis))
    top = MARGIN + (LINE if title else 0)
    full = (size[0] + left + right, size[1] + bottom + top)
    figure = Figure(figsize=(full[0] / DPI, full[1] / DPI), dpi=DPI, facecolor="white")
    axes = figure.add_axes((left / full[0], bottom / full[1], size[0] / full[0], size[1] / full[1]))
    axes.imshow(sheet, cmap="gray", vmin=0, vmax=1, interpolation="nearest", aspect="auto")

    across = np.arange(columns) * (width + GAP) + (width - 1) / 2  # the middle of each column
    down = np.arange(rows) * (height + GAP) + (height - 1) / 2
    widest = max((_text_width(label, LABEL) for label in column_labels), default=0) + MARGIN // 2
    axes.set_xticks(across, _thin(column_labels, widest, (width + GAP) * scale) or [""] * columns)
    axes.set_yticks(down, _thin(row_labels, LINE, (height + GAP) * scale) or [""] * rows)
    axes.tick_params(length=0, labelsize=LABEL, labelcolor=INK, pad=4)
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=TITLE, color=INK, loc="left", pad=7)
    axes.set_xlabel(column_axis, fontsize=LABEL, color=INK, loc="left" if marks else "center")
    axes.set_ylabel(row_axis, fontsize=LABEL, color=INK, rotation=0, ha="right", va="center")
    if marks:
        axes.autoscale(False)
        style = {"marker": "^", "markersize": 9, "color": ORANGE, "markeredgecolor": "white", "linestyle": "none"}
        axes.plot(np.array(marks) * (width + GAP) + (width - 1) / 2, down + (height + GAP) / 2, **style, clip_on=False)
    return figure


def _sheet(images: np.ndarray) -> np.ndarray:
    """The images of a grid as a single image, with white between them."""
    rows, columns, height, width, *channels = images.shape
    cells = np.ones((rows, columns, height + GAP, width + GAP, *channels), np.float32)
    cells[:, :, :height, :width] = np.nan_to_num(images, nan=1)
    sheet = np.moveaxis(cells, 2, 1).reshape(rows * (height + GAP), columns * (width + GAP), *channels)
    return sheet[:-GAP, :-GAP]


def _text_width(text: str, points: int) -> int:
    """Width of a line of text, in pixels of the picture."""
    return math.ceil(TextPath((0, 0), text, size=points).get_extents().width * DPI / 72) if text else 0


def _thin(labels: Sequence[str], extent: int, room: int) -> list[str]:
    """Empties labels so that the others have room, symmetrically about the middle of the axis."""
    last = len(labels) - 1
    every = next((n for n in range(max(1, math.ceil(extent / room)), last + 1) if last % n % 2 == 0), len(labels))
    return [label if place % every == last % every // 2 else "" for place, label in enumerate(labels)]


def scatter(
    points: Float[np.ndarray, "images 2"],
    label: Integer[np.ndarray, " images"] | None,
    *,
    title: str,
    axis_names: tuple[str, str],
) -> Figure:
    """Points coloured by label, under circles at 1, 2 and 3 standard deviations of the prior.

    The label stands at the median of its points too, so that nobody depends on the colours. Beyond ten labels, the
    colours come again with other markers; more labels than colours and markers together are not told apart.

    Args:
      points: The points.
      label: Of each point, if there are any.
      title: Above the scatter.
      axis_names: Of the horizontal and the vertical axis.
    """
    kinds, rank = np.unique(np.zeros(len(points), int) if label is None else label, return_inverse=True)
    told_apart = label is not None and len(kinds) <= len(TEN) * len(MARKERS)
    if not told_apart:
        title += "; no labels" if label is None else f"; {len(kinds):,} labels, too many for colours"
        rank = np.zeros(len(points), int)
    columns = math.ceil(len(kinds) / 30) if told_apart else 0  # of the legend
    figure = Figure(figsize=(8.2 + 0.7 * columns, 8), dpi=DPI, facecolor="white", layout="constrained")
    axes = figure.subplots()
    for radius in (1, 2, 3):
        axes.add_patch(Circle((0, 0), radius, fill=False, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=3))
        name = axes.annotate(f"{radius}\u03c3", (0, -radius), fontsize=LABEL, color=INK, ha="center", va="center")
        name.set(zorder=4, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
    size = float(np.clip(40_000 / len(points), 3, 40))
    colours = np.array(TEN)
    for number in range(math.ceil((rank.max() + 1) / len(TEN))):
        # All labels of a marker at once: in the order of the images, so that no label covers another.
        chosen, marker = rank // len(TEN) == number, MARKERS[number]
        axes.scatter(*points[chosen].T, s=size, c=colours[rank[chosen] % len(TEN)], marker=marker, alpha=0.7, lw=0)
    if told_apart:
        entries = _name_labels(axes, points, kinds, rank)
        place = {"loc": "outside right upper", "ncols": columns, "columnspacing": 1.0}
        legend = figure.legend(handles=entries, title="label", frameon=False, labelcolor=INK, fontsize=LABEL, **place)
        legend.get_title().set(fontsize=LABEL, color=INK)
    reach = 1.05 * max(3, float(np.abs(points).max()))
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xlabel=axis_names[0], ylabel=axis_names[1])
    axes.text(1, 0.005, "\u03c3: standard deviation of the prior", transform=axes.transAxes, ha="right", va="bottom")
    axes.texts[-1].set(fontsize=LABEL, color=INK)
    tidy(axes)
    axes.set_title(title, fontsize=TITLE, color=INK, loc="left")
    return figure


def _name_labels(axes: Axes, points: np.ndarray, kinds: np.ndarray, rank: np.ndarray) -> list[Line2D]:
    """Writes each label at the median of its points; returns the entries of a legend."""
    halo = [Stroke(linewidth=2.5, foreground="white"), Normal()]
    entries = []
    for number, kind in enumerate(kinds.tolist()):
        across, up = np.median(points[rank == number], axis=0).tolist()
        text = axes.annotate(str(kind), (across, up), color=INK, fontweight="bold", ha="center", va="center")
        text.set(fontsize=TITLE if len(kinds) <= len(TEN) else LABEL, path_effects=halo, zorder=5)
        color, marker = TEN[number % len(TEN)], MARKERS[number // len(TEN)]
        entries.append(Line2D([], [], label=str(kind), color=color, marker=marker, markersize=6, linestyle="none"))
    return entries


def curves(history: Sequence[EpochMetrics]) -> Figure:
    """Loss, BCE and KLD over the epochs, in nats per image.

    The first epoch lies far from the others and would flatten them. From the third epoch on, the axes show the others,
    and a note gives what lies outside.
    """
    epochs = [metrics.epoch for metrics in history]
    figure = Figure(figsize=(9, 3.4), dpi=DPI, facecolor="white", layout="constrained")
    title = f"Averages of each epoch, on {history[-1].pixels} pixels"
    figure.suptitle(title, fontsize=TITLE, color=INK, x=0.01, ha="left")
    panels = figure.subplots(1, 3)
    for axes, name, title in zip(panels, ("loss", "bce", "kld"), ("loss", "BCE", "KLD"), strict=True):
        parts = {part: [getattr(metrics, f"{part}_{name}") for metrics in history] for part in ("train", "test")}
        for (part, values), color in zip(parts.items(), (BLUE, ORANGE), strict=True):
            axes.plot(epochs, values, color=color, label=part, linewidth=1.5, marker=".", markersize=7)
        tidy(axes)
        axes.grid(alpha=0.25)
        axes.set_title(title, fontsize=TITLE, color=INK, loc="left")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        if len(history) > 2:
            _leave_first_out(axes, parts, epochs[0])
    panels[0].set_ylabel("nats per image")
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside upper right",
        ncols=2,
        fontsize=LABEL,
        frameon=False,
        labelcolor=INK,
    )
    return figure


def _leave_first_out(axes: Axes, parts: dict[str, list[float]], epoch: int) -> None:
    """Fits the axis to all values but the first ones, and notes those outside in the corner that they left empty."""
    others = [value for values in parts.values() for value in values[1:]]
    margin = max(others) - min(others) or 1
    low, high = min(others) - 0.08 * margin, max(others) + 0.08 * margin
    outside = {part: values[0] for part, values in parts.items() if not low <= values[0] <= high}
    if outside:
        axes.set_ylim(low, high)
        above = max(outside.values()) > high
        note = "\n".join([f"epoch {epoch}, not shown:", *(f"{part} {value:.1f}" for part, value in outside.items())])
        axes.annotate(
            note,
            (0.98, 0.98 if above else 0.03),
            xycoords="axes fraction",
            ha="right",
            va="top" if above else "bottom",
            fontsize=LABEL,
            color=INK,
        )


def tidy(axes: Axes) -> None:
    """Gives axes the sizes and colours of all pictures, and takes away the frame."""
    axes.tick_params(labelsize=LABEL, color=INK, labelcolor=INK)
    axes.xaxis.label.set(fontsize=LABEL, color=INK)
    axes.yaxis.label.set(fontsize=LABEL, color=INK)
    axes.spines[["top", "right"]].set_visible(False)


def pixels(figure: Figure) -> UInt8[np.ndarray, "height width 3"]:
    """The figure as an image."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[:, :, :3]


def save(rgb: UInt8[np.ndarray, "height width 3"], path: Path) -> None:
    """Writes a PNG; an image that is all grey gets one channel, which halves the file.

    Raises:
      OSError: The file cannot be written; an older file there is still whole.
    """
    grey = (rgb == rgb[:, :, :1]).all()
    with replacing(path) as part:
        Image.fromarray(rgb[:, :, 0] if grey else rgb).save(part, format="PNG", dpi=(DPI, DPI))
