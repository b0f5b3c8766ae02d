"""The pictures of a sweep: its loss against each option, rate and distortion, and the curves of all models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from vae_jax.config import option_name
from vae_jax.pictures.plots import BLUE, DPI, INK, LABEL, TEN, TITLE, tidy
from vae_jax.runs.summary import Setting, settings
from vae_jax.runs.sweep_folder import Model, short

# More lines than these are not told apart by colours.
COLOURS = TEN[:8]
COLUMNS = 3  # of panels


def draw(models: Sequence[Model]) -> dict[str, Figure]:
    """The pictures that these models make, by the names of their files; none without a finished model."""
    found = settings(models)
    if not found:
        return {}
    pictures = {"curves.png": curves(found)}
    if any(len(setting.models) > 1 for setting in found) or len(found) > 1:
        pictures["options.png"] = against_options(found)
    if "beta" in found[0].options:
        pictures["rate-distortion.png"] = rate_distortion(found)
    return pictures


def against_options(found: Sequence[Setting]) -> Figure:
    """bce + kld of the test set against each option that varies: dots for models, means and standard deviations."""
    names = list(found[0].options) or ["seed"]
    rows, columns = math.ceil(len(names) / COLUMNS), min(len(names), COLUMNS)
    figure = Figure(figsize=(1.5 + 3.6 * columns, 3.8 * rows), dpi=DPI, facecolor="white", layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes, name in zip(panels, names, strict=False):
        lines = _by_others(found, name)
        values = sorted({_value(option) for setting in found for option in [setting.options.get(name)]})
        places = _places(axes, values)
        if name == "seed":
            _against_seed(axes, found[0])
        for number, (others, line) in enumerate(lines.items() if name != "seed" else ()):
            color = _color(number, len(lines))
            line.sort(key=lambda setting: _value(setting.options[name]))
            across = [places[_value(setting.options[name])] for setting in line]
            means = [setting.figure("bce + kld") for setting in line]
            deviations = [mean.deviation or 0 for mean in means]
            axes.errorbar(
                across, [mean.mean for mean in means], deviations, color=color, label=others, marker="o",
                markersize=4, capsize=4, linewidth=1.3,
            )  # fmt: skip
            for place, setting in zip(across, line, strict=True):
                losses = [model.negative_elbo for model in setting.models]
                axes.plot([place] * len(losses), losses, "_", color=color, markersize=6, alpha=0.5)
        tidy(axes)
        axes.grid(alpha=0.25)
        axes.set_xlabel(option_name(name).replace("-", " "))
        if 1 < len(lines) <= len(COLOURS):
            axes.legend(fontsize=LABEL - 1, frameon=False, labelcolor=INK)
    for axes in list(panels):  # what is left of the grid
        axes.set_visible(False)
    figure.axes[0].set_ylabel("bce + kld of the test set, nats per image")
    _title(figure, f"Test set by option; {_bars(found)}")
    return figure


def _against_seed(axes: Axes, setting: Setting) -> None:
    losses, mean = [model.negative_elbo for model in setting.models], setting.figure("bce + kld")
    axes.plot([str(model.config.seed) for model in setting.models], losses, "o", color=BLUE)
    axes.axhline(mean.mean, color=BLUE, linewidth=1)
    deviation = mean.deviation or 0
    axes.axhspan(mean.mean - deviation, mean.mean + deviation, color=BLUE, alpha=0.12, linewidth=0)


def rate_distortion(found: Sequence[Setting]) -> Figure:
    """bce against kld of the test set for each beta, with lines of equal bce + kld behind them."""
    figure = Figure(figsize=(7.2, 5.2), dpi=DPI, facecolor="white", layout="constrained")
    axes = figure.subplots()
    lines = _by_others(found, "beta")
    for number, (others, line) in enumerate(lines.items()):
        color = _color(number, len(lines))
        line.sort(key=lambda setting: setting.options["beta"])
        rates, distortions = ([setting.figure(name) for setting in line] for name in ("kld", "bce"))
        for setting in line:
            points = [(model.history[-1].test_kld, model.history[-1].test_bce) for model in setting.models]
            axes.plot(*zip(*points, strict=True), "o", color=color, markersize=3, alpha=0.4, markeredgewidth=0)
        axes.errorbar(
            [rate.mean for rate in rates], [distortion.mean for distortion in distortions],
            xerr=[rate.deviation or 0 for rate in rates],
            yerr=[distortion.deviation or 0 for distortion in distortions],
            color=color, label=others, marker="o", markersize=5, capsize=3, linewidth=1.3,
        )  # fmt: skip
        if len(lines) == 1 or number == 0:
            for setting, rate, distortion in zip(line, rates, distortions, strict=True):
                text = f"\u03b2 = {short(setting.options['beta'])}"
                axes.annotate(text, (rate.mean, distortion.mean), (8, 6), textcoords="offset points", fontsize=LABEL)
    axes.margins(0.12)
    _equal_sums(axes)
    tidy(axes)
    axes.set_xlabel("rate: KLD, nats per image")
    axes.set_ylabel("distortion: BCE, nats per image")
    if 1 < len(lines) <= len(COLOURS):
        axes.legend(fontsize=LABEL, frameon=False, labelcolor=INK)
    _title(figure, f"Rate and distortion of the test set; {_bars(found)}")
    return figure


def _equal_sums(axes: Axes) -> None:
    """Lines of equal bce + kld across the axes, named at their upper end."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    for total in MaxNLocator(7).tick_values(left + low, right + high):
        start = max(left, total - high)  # where the line enters the axes
        if start < right and total - start > low:
            axes.plot([start, min(right, total - low)], [total - start, max(low, total - right)], zorder=0)
            axes.lines[-1].set(color="#d5d8db", linewidth=0.8)
            if right - start > 0.2 * (right - left):  # else its name would leave the axes
                place = (start, total - start)
                text = axes.annotate(f"bce + kld = {total:g}", place, (4, -3), textcoords="offset points")
                text.set(fontsize=LABEL - 2, color="#8a9199", va="top", ha="left")
    axes.set(xlim=(left, right), ylim=(low, high))


def curves(found: Sequence[Setting]) -> Figure:
    """Test losses over the epochs: a line for each model, and the mean and standard deviation over seeds."""
    figure = Figure(figsize=(11, 3.8), dpi=DPI, facecolor="white", layout="constrained")
    told_apart = len(found) <= len(COLOURS)
    for axes, name in zip(figure.subplots(1, 3), ("bce + kld", "bce", "kld"), strict=True):
        shown = []
        for number, setting in enumerate(found):
            color = _color(number, len(found))
            means = setting.over_epochs(name)
            epochs = range(1, len(means) + 1)
            axes.plot(epochs, [mean.mean for mean in means], color=color, linewidth=1.5, label=str(setting))
            band = [(mean.mean - (mean.deviation or 0), mean.mean + (mean.deviation or 0)) for mean in means]
            axes.fill_between(epochs, *zip(*band, strict=True), color=color, alpha=0.2, linewidth=0)
            shown += [edge for edges in band[1 if len(means) > 2 else 0 :] for edge in edges]
        margin = 0.08 * (max(shown) - min(shown) or 1)
        axes.set_ylim(min(shown) - margin, max(shown) + margin)  # the first epoch would flatten the others
        tidy(axes)
        axes.grid(alpha=0.25)
        axes.set_title({"bce": "BCE", "kld": "KLD"}.get(name, "BCE + KLD"), fontsize=TITLE, color=INK, loc="left")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    figure.axes[0].set_ylabel("nats per image")
    if len(found) > 1 and told_apart:
        legend = {"loc": "outside right upper", "fontsize": LABEL, "frameon": False, "labelcolor": INK}
        figure.legend(*figure.axes[0].get_legend_handles_labels(), **legend)
    _title(figure, f"Test set after each epoch; bands: {_bars(found)}")
    return figure


def _by_others(found: Sequence[Setting], name: str) -> dict[str, list[Setting]]:
    """The settings by the values of all options but one, best first."""
    lines: dict[str, list[Setting]] = {}
    for setting in found:
        others = {other: value for other, value in setting.options.items() if other != name}
        lines.setdefault(str(Setting(others, [])), []).append(setting)
    return lines


def _color(number: int, count: int) -> str:
    """The colour of a line; where there are too many, the best one stands out."""
    if count == 1:
        return BLUE
    return COLOURS[number] if count <= len(COLOURS) else BLUE if number == 0 else "#c5cad0"


def _value(option: Any) -> Any:
    """A value that can be sorted: a number, or text."""
    return option if isinstance(option, int | float) else str(option)


def _places(axes: Axes, values: Sequence[Any]) -> dict[Any, float]:
    """Where each value lies on the horizontal axis: numbers at their place, on a log axis if they span much."""
    numbers = all(isinstance(value, int | float) for value in values)
    places = {value: float(value) if numbers else float(number) for number, value in enumerate(values)}
    if numbers and len(values) > 1 and min(values) > 0 and max(values) / min(values) >= 5:
        axes.set_xscale("log")
    axes.set_xticks(list(places.values()), [short(value) for value in values])
    axes.xaxis.set_minor_formatter(NullFormatter())
    return places


def _bars(found: Sequence[Setting]) -> str:
    """What error bars show."""
    counts = {len(setting.models) for setting in found}
    if counts == {1}:
        return "one seed each"
    seeds = str(counts.pop()) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    return f"mean \u00b1 standard deviation of {seeds} seeds"


def _title(figure: Figure, title: str) -> None:
    figure.suptitle(title, fontsize=TITLE, color=INK, x=0.01, ha="left")
