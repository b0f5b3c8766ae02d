"""A picture for each benchmark that a picture explains better than a table."""

import math
import textwrap
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter, NullLocator

from benchmarks.report import Report
from vae_jax.pictures.plots import BLUE, DPI, INK, LABEL, ORANGE, TITLE, pixels, save, tidy

GREY = "#a3acb5"
NAMES = {  # that are clear without their table
    "PyTorch, the same under torch.compile": "PyTorch, images in memory, torch.compile",
    "benchmarks.start": "vae_jax.train without checkpoints",
}


def draw(report: Report, path: Path) -> None:
    """Writes the picture of a report, if it has a picture; the axes of what could not be measured stay empty."""
    pictures = {"epoch": _epoch, "start": _start, "scale": _scale, "fidelity": _fidelity}
    if report.name not in pictures:
        return
    figure = Figure(figsize=(9, 3.8), layout="constrained", dpi=DPI, facecolor="white")
    title = pictures[report.name](figure, report)
    machine = report.environment.get("machine", {})
    platform, _, kind = machine.get("device", "cpu").partition(": ")
    hardware = f"{machine.get('cores', '?')} CPU cores" if platform == "cpu" else kind
    figure.suptitle(f"{title}, {hardware}", fontsize=TITLE, color=INK, x=0.01, ha="left")
    save(pixels(figure), path)


def _bars(axes: Axes, names: list[str], seconds: list[float], colors: list[str], end: float = math.inf) -> None:
    """Horizontal bars with their seconds, the first on top; bars that are longer than `end` are broken there."""
    bars = axes.barh(names, [min(value, end) for value in seconds], color=colors)
    labels = [f"{value:.2f}" if value < 10 else f"{value:.1f}" for value in seconds]
    axes.bar_label(bars, labels, padding=4, fontsize=LABEL, color=INK)
    for bar, value in zip(bars, seconds, strict=True):
        if value > end:
            middle = bar.get_y() + bar.get_height() / 2
            axes.text(0.94 * end, middle, "//", color="white", fontsize=16, weight="bold", ha="center", va="center")
    axes.margins(x=0.1)
    _finish_bars(axes)


def _finish_bars(axes: Axes) -> None:
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    tidy(axes)
    axes.tick_params(axis="y", length=0)


def _epoch(figure: Figure, report: Report) -> str:
    rows = sorted((row for row in report.tables["Epochs"] if row.get("median s")), key=lambda row: row["median s"])
    names, seconds = [row["contender"] for row in rows], [row["median s"] for row in rows]
    colors = [BLUE if name == "vae_jax" else ORANGE if name.startswith("the floor") else GREY for name in names]
    # An outlier would flatten all others.
    end = 1.25 * seconds[-2] if len(seconds) > 1 and seconds[-1] > 2 * seconds[-2] else math.inf
    _bars(figure.subplots(), [_label(name, 40) for name in names], seconds, colors, end)
    return "Seconds per training epoch"


def _start(figure: Figure, report: Report) -> str:
    figure.set_figheight(4.6)
    medians = report.tables["Medians"]
    phases = [row for row in report.tables["Where our seconds go"] if row["phase"] != "epochs"]
    whole, rest = figure.subplots(1, 2)

    names = [_label(row["command"], 22) for row in medians]
    left = [0.0] * len(names)
    for part, column, color in (("training", "epochs s", BLUE), ("everything else", "outside epochs s", ORANGE)):
        seconds = [row[column] for row in medians]
        bars = whole.barh(names, seconds, left=left, color=color, label=part)
        whole.bar_label(bars, fmt="%.1f", label_type="center", fontsize=LABEL, color="white")
        left = [before + value for before, value in zip(left, seconds, strict=True)]
    whole.legend(fontsize=LABEL, frameon=False, labelcolor=INK, loc="upper right")
    _finish_bars(whole)
    _title(whole, "The whole command")

    names = [_label(row["phase"], 36) for row in phases]
    _bars(rest, names, [row["seconds"] for row in phases], [ORANGE] * len(names))
    _title(rest, f"Everything else in {medians[0]['command']}")
    return f"A run of {report.settings['epochs']} epochs from a cold start"


def _label(name: str, width: int) -> str:
    return textwrap.fill(NAMES.get(name, name), width)


def _title(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=LABEL + 1, color=INK, loc="left")


def _scale(figure: Figure, report: Report) -> str:
    axis_names = {"images": "images", "batch_size": "images per batch", "hidden_dim": "width of the hidden layer"}
    short = EngFormatter(sep="")  # 10k, 1M
    for axes, (name, rows) in zip(figure.subplots(1, len(report.tables)), report.tables.items(), strict=True):
        cost = "seconds a step" if name == "batch_size" else "seconds an epoch"
        sizes = [row[name] for row in rows]
        axes.loglog(sizes, [row[cost] for row in rows], "o-", color=BLUE, label="measured")
        proportional = [size / sizes[-1] * rows[-1][cost] for size in sizes]
        axes.loglog(sizes, proportional, "--", color=GREY, zorder=1, label="proportional")
        axes.set_xticks(sizes, [short(size) if size >= 10000 else str(size) for size in sizes])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(axis_names[name])
        _title(axes, cost.capitalize())
        tidy(axes)
        axes.grid(alpha=0.25)
    figure.axes[0].legend(fontsize=LABEL, frameon=False, labelcolor=INK)
    return "How the time of training grows"


def _fidelity(figure: Figure, report: Report) -> str:
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    rows = report.tables["Divergence"]
    steps = [row["steps"] for row in rows]
    for column in ("float32 parameters", "float32 loss", "float64 parameters", "float64 loss"):
        values = [row[column] for row in rows]
        left.semilogy(steps, values, color=BLUE if "parameters" in column else ORANGE)
        words = "any parameter" if "parameters" in column else "loss of a step (relative)"
        left.annotate(
            f"{column.split()[0]}: {words}",
            (steps[-1], max(values)),
            xytext=(0, 5),
            textcoords="offset points",
            ha="right",
            fontsize=LABEL,
            color=INK,
        )
    left.set_xlabel("steps from the same parameters, with the same batches and noise")
    left.set_ylabel("largest difference")
    _title(left, "Drift within an epoch")
    tidy(left)
    left.grid(alpha=0.25)

    losses = {row["side"]: [] for row in report.tables["Final losses"]}
    for row in report.tables["Final losses"]:
        losses[row["side"]].append(row["test loss"])
    for number, values in enumerate(losses.values()):
        right.plot([number] * len(values), values, "o", color=BLUE if number == 0 else GREY)
        mean = sum(values) / len(values)
        right.plot([number - 0.15, number + 0.15], [mean, mean], color=INK)
        right.annotate(f"mean {mean:.2f}", (number + 0.18, mean), va="center", fontsize=LABEL, color=INK)
    right.set_xticks(range(len(losses)), list(losses))
    right.set_xlim(-0.4, len(losses) - 0.3)
    right.set_ylabel("nats per image; a dot for each seed")
    _title(right, f"Test loss after {report.settings['epochs']} epochs")
    tidy(right)
    right.grid(axis="y", alpha=0.25)
    return "JAX and PyTorch side by side"
