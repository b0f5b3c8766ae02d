"""One picture for each benchmark; their axes hold ratios, which outlast a machine."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.report import Report

OURS, OTHERS = "#1f77b4", "#999999"


def draw(report: Report, path: Path) -> None:
    """Draws a report with what it measured; a benchmark of which nothing could be measured gets an empty frame."""
    figure = Figure(figsize=(8, 4), layout="constrained", dpi=120)
    {"epoch": _epoch, "start": _start, "scale": _scale, "evaluate": _evaluate, "fidelity": _fidelity}[report.name](
        figure, report
    )
    machine = report.environment.get("machine", {})
    figure.suptitle(f"{report.name}: {machine.get('device', '')}, {machine.get('cores', '')} cores", fontsize=10)
    figure.savefig(path)


def _bars(axes: Axes, names: list[str], ratios: list[float], label: str) -> None:
    """Horizontal bars, the first name on top and in our colour."""
    bars = axes.barh(names, ratios, color=[OURS] + [OTHERS] * (len(names) - 1))
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.spines[["top", "right"]].set_visible(False)


def _epoch(figure: Figure, report: Report) -> None:
    rows = [row for row in report.tables["Epochs"] if row.get("times the floor")]
    axes = figure.subplots()
    _bars(
        axes,
        [row["contender"] for row in rows],
        [row["times the floor"] for row in rows],
        "time of an epoch / time of its matrix products alone",
    )
    axes.set_xscale("log")


def _start(figure: Figure, report: Report) -> None:
    ours, *others = report.tables["Medians"]
    phases = report.tables["Where our seconds go"]
    whole = sum(row["seconds"] for row in phases)  # of the run in the middle: nearly the median, not quite
    axes = figure.subplots()
    left = 0.0
    for row in phases:
        axes.barh([ours["command"]], [row["seconds"] / whole], left=left, label=row["phase"])
        left += row["seconds"] / whole
    axes.barh([row["command"] for row in others], [row["whole s"] / ours["whole s"] for row in others], color=OTHERS)
    axes.invert_yaxis()
    axes.set_xlabel("time of the whole command / time of ours")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)


def _scale(figure: Figure, report: Report) -> None:
    for axes, (name, rows) in zip(figure.subplots(1, len(report.tables)), report.tables.items(), strict=True):
        cost = "seconds a step" if name == "batch_size" else "seconds an epoch"
        sizes = [row[name] / rows[0][name] for row in rows]
        axes.loglog(sizes, [row[cost] / rows[0][cost] for row in rows], "o-", color=OURS, label="measured")
        axes.loglog(sizes, sizes, "--", color=OTHERS, label="linear")
        axes.set_xlabel(f"{name} / {rows[0][name]:,}")
        axes.set_ylabel(f"{cost} / the first")
        axes.legend(fontsize=8)


def _evaluate(figure: Figure, report: Report) -> None:
    rows = [row for row in report.tables["Throughput"] if "median s" in row]
    best = min((row["median s"] for row in rows), default=1)
    _bars(
        figure.subplots(),
        [row["estimator"] for row in rows],
        [row["median s"] / best for row in rows],
        "time for the same images and samples / the shortest",
    )


def _fidelity(figure: Figure, report: Report) -> None:
    left, right = figure.subplots(1, 2)
    rows = report.tables["Divergence"]
    for column in ("float32 parameters", "float32 loss", "float64 parameters", "float64 loss"):
        left.semilogy([row["steps"] for row in rows], [row[column] for row in rows], label=column)
    left.set_xlabel("steps")
    left.set_ylabel("largest difference (of losses: relative)")
    left.legend(fontsize=8)

    runs = report.tables["Final losses"]
    means = {row["side"]: row["test loss mean"] for row in report.tables["Mean and deviation"]}
    for number, side in enumerate(means):
        ratios = [row["test loss"] / means["PyTorch"] for row in runs if row["side"] == side]
        right.plot([number] * len(ratios), ratios, "o", color=OTHERS if number else OURS)
        right.plot([number], [means[side] / means["PyTorch"]], "_", markersize=40, color="black")
    right.set_xticks(range(len(means)), list(means))
    right.set_xlim(-0.5, len(means) - 0.5)
    right.set_ylabel("final test loss / mean of PyTorch's")
