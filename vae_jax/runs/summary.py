"""The models of a sweep compared: averages over seeds, as numbers and as a table. Imports neither jax nor torch."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from vae_jax.config import option_name, to_json
from vae_jax.runs.sweep_folder import Model, short, varied


@dataclasses.dataclass(frozen=True)
class Figure:
    """The mean over seeds, and their standard deviation; None for a single seed."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure:
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


@dataclasses.dataclass(frozen=True)
class Setting:
    """Models that differ in their seeds only."""

    options: dict[str, Any]  # the values of the options that vary within the sweep, but for the seed
    models: list[Model]

    def figure(self, name: str) -> Figure:
        """The average of a column of the table, after the last epoch."""
        return Figure.of([figures(model)[name] for model in self.models])

    def over_epochs(self, name: str) -> list[Figure]:
        """The averages of `figures` after each epoch."""
        epochs = range(len(self.models[0].history))
        return [Figure.of([figures(model, epoch)[name] for model in self.models]) for epoch in epochs]

    def __str__(self) -> str:
        return ", ".join(f"{option_name(name)} {short(value)}" for name, value in self.options.items()) or "all seeds"


def figures(model: Model, epoch: int = -1) -> dict[str, float]:
    """What is compared of a model: averages over the test set, in nats per image, and its active units."""
    metrics, outcome = model.history[epoch], model.outcome
    found: dict[str, float] = {
        "bce + kld": metrics.test_bce + metrics.test_kld,
        "bce": metrics.test_bce,
        "kld": metrics.test_kld,
        "loss": metrics.test_loss,
    }
    if outcome is not None and outcome.active_units is not None:
        found["active units"] = float(outcome.active_units)
    if outcome is not None and outcome.log_px is not None:
        found["log p(x)"] = outcome.log_px
    return found


def settings(models: Sequence[Model]) -> list[Setting]:
    """The finished models by the options that vary but for the seed, lowest mean of bce + kld first."""
    names = [name for name in varied([model.config for model in models]) if name != "seed"]
    groups: dict[str, Setting] = {}
    for model in models:
        if model.finished:
            recipe = to_json(model.config)
            options = {name: recipe[name] for name in names}
            groups.setdefault(str(options), Setting(options, [])).models.append(model)
    return sorted(groups.values(), key=lambda setting: setting.figure("bce + kld").mean)


def table(models: Sequence[Model]) -> list[str]:
    """How the models compare, as lines of text: the best first, and those that have diverged at the end."""
    found = settings(models)
    lines = []
    if found:
        columns = list(figures(found[0].models[0]))
        if all(model.config.beta == 1 for model in models):
            columns.remove("loss")  # it is bce + kld
        rows = [[*(option_name(name) for name in found[0].options), "seeds", *columns]]
        for setting in found:
            cells = [_cell(setting.figure(name)) for name in columns]
            rows.append([*map(short, setting.options.values()), str(len(setting.models)), *cells])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        over = ", mean \u00b1 standard deviation over seeds" if len(found) < len(models) else ""
        lines = [f"test set, nats per image{over}; lowest bce + kld first"]
        lines += [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
    diverged = [model for model in models if model.outcome is not None and model.outcome.diverged]
    if diverged:
        lines.append(f"{len(diverged)} diverged: {', '.join(model.name for model in diverged)}")
    return lines


def _cell(figure: Figure) -> str:
    return f"{figure.mean:.2f}" + (f" \u00b1 {figure.deviation:.2f}" if figure.deviation is not None else "")
