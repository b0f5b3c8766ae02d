"""Pictures: grids of images with labels, and the curves of a run. Imports matplotlib, and neither jax nor torch.

The figures are drawn by matplotlib's objects alone; what a notebook has set up in pyplot is neither read nor changed.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from vae_jax.files import replacing
from vae_jax.log import EpochMetrics

DPI = 100
GAP = 2  # between the images of a grid, in pixels of the images
SHEET_WIDTH = 640  # of a grid in pixels of the picture, as near as whole multiples come
INK = "#333333"
COLORS = {"train": "#1f77b4", "test": "#d62728"}


def grid(
    images: Float[np.ndarray, "rows columns height width"] | Float[np.ndarray, "rows columns height width channels"],
    *,
    title: str = "",
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
) -> Figure:
    """Images side by side, each of their pixels a square of whole pixels of the picture.

    Args:
      images: Pixels in [0, 1], grey or with channels: three are red, green and blue, another number of them grey images
        side by side. Places that are NaN stay empty.
      title: Over the grid.
      row_labels: To the left of each row; none, or one for each.
      column_labels: Under each column; none, or one for each.
    """
    rows, columns, height = images.shape[:3]
    if images.shape[4:] not in ((), (3,)):
        images = np.moveaxis(images, 4, 3).reshape(rows, columns, height, -1)
    sheet = _sheet(images)
    width = images.shape[3]
    scale = max(1, round(SHEET_WIDTH / sheet.shape[1]))
    size = np.array([sheet.shape[1], sheet.shape[0]]) * scale
    # In pixels of the picture, as everything here: that is what keeps the images sharp.
    left, bottom = 12 + 7 * max(map(len, row_labels), default=0), 26 if column_labels else 12
    right, top = 12, 36 if title else 12
    full = (size[0] + left + right, size[1] + bottom + top)
    figure = Figure(figsize=(full[0] / DPI, full[1] / DPI), dpi=DPI, facecolor="white")
    axes = figure.add_axes((left / full[0], bottom / full[1], size[0] / full[0], size[1] / full[1]))
    axes.imshow(sheet, cmap="gray", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    axes.set_xticks((np.arange(columns) + 0.5) * (width + GAP) - GAP / 2 - 0.5, column_labels or [""] * columns)
    axes.set_yticks((np.arange(rows) + 0.5) * (height + GAP) - GAP / 2 - 0.5, row_labels or [""] * rows)
    axes.tick_params(length=0, labelsize=8, labelcolor=INK, pad=5)
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=10, color=INK, loc="left", pad=9)
    return figure


def _sheet(images: np.ndarray) -> np.ndarray:
    """The images of a grid as one, with white between them."""
    rows, columns, height, width, *channels = images.shape
    cells = np.ones((rows, columns, height + GAP, width + GAP, *channels), np.float32)
    cells[:, :, :height, :width] = np.nan_to_num(images, nan=1)
    sheet = np.moveaxis(cells, 2, 1).reshape(rows * (height + GAP), columns * (width + GAP), *channels)
    return sheet[:-GAP, :-GAP]


def curves(history: Sequence[EpochMetrics]) -> Figure:
    """Loss, BCE and KLD over the epochs, in nats per image."""
    epochs = [metrics.epoch for metrics in history]
    figure = Figure(figsize=(7.6, 3.2), dpi=DPI, facecolor="white", layout="constrained")
    panels = figure.subplots(1, 3)
    for axes, name, title in zip(panels, ("loss", "bce", "kld"), ("loss", "BCE", "KLD"), strict=True):
        for part in ("train", "test"):
            values = [getattr(metrics, f"{part}_{name}") for metrics in history]
            axes.plot(epochs, values, color=COLORS[part], label=part, linewidth=1.5, marker=".", markersize=5)
        axes.set_title(title, fontsize=10, color=INK, loc="left")
        axes.set_xlabel("epoch", fontsize=9, color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        axes.tick_params(labelsize=8, color=INK, labelcolor=INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("nats per image", fontsize=9, color=INK)
    panels[0].legend(fontsize=8, frameon=False, labelcolor=INK)
    return figure


def pixels(figure: Figure) -> UInt8[np.ndarray, "height width 3"]:
    """The figure as an image."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[:, :, :3]


def save(rgb: UInt8[np.ndarray, "height width 3"], path: Path) -> None:
    """Writes a PNG, with one channel where the image is all grey: half the size.

    Raises:
      OSError: It cannot be written; a file that stood there is still whole.
    """
    grey = (rgb == rgb[:, :, :1]).all()
    with replacing(path) as part:
        Image.fromarray(rgb[:, :, 0] if grey else rgb).save(part, format="PNG", optimize=True)
