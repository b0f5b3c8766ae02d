"""The results of a benchmark, written as JSON for programs and as Markdown for readers."""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.turns import isolated

PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "numpy", "numpyro", "pythae")
NOT_MEASURED = "not measured"


class Check(NamedTuple):
    """An expectation and the value found; `holds` is None where it could not be measured."""

    claim: str
    found: str
    holds: bool | None


def at_most(claim: str, value: float | None, unit: float | None, limit: float, unit_name: str = "x") -> Check:
    """Checks that value / unit is at most `limit`; None where either could not be measured."""
    if not value or not unit:
        return Check(claim, NOT_MEASURED, None)
    return Check(claim, f"{value / unit:.3g} {unit_name}", value / unit <= limit)


def at_least(claim: str, value: float | None, unit: float | None, limit: float) -> Check:
    """Checks that value is at least `limit` times `unit`; None where either could not be measured."""
    if not value or not unit:
        return Check(claim, NOT_MEASURED, None)
    return Check(claim, f"{value / unit:.3g} x", value / unit >= limit)


@dataclasses.dataclass
class Report:
    """The results of a benchmark.

    `tables` maps a title to rows, each a dict from column to value; a missing value is None.
    """

    name: str
    about: str
    settings: dict[str, Any]
    tables: dict[str, list[dict[str, Any]]]
    checks: list[Check] = dataclasses.field(default_factory=list)
    environment: dict[str, Any] = dataclasses.field(default_factory=dict)

    def to_json(self) -> str:
        plain = dataclasses.asdict(self)
        plain["checks"] = [check._asdict() for check in self.checks]
        return json.dumps(plain, indent=1) + "\n"

    def to_markdown(self) -> str:
        """The tables and checks, below a line with the machine, the date and the versions."""
        parts = [f"# {self.name}", self.about, describe(self.environment)]
        for title, rows in self.tables.items():
            parts += [f"**{title}**", table(rows)]
        if self.checks:
            verdicts = {True: "yes", False: "**no**", None: NOT_MEASURED}
            parts.append(
                table([{"expected": c.claim, "found": c.found, "holds": verdicts[c.holds]} for c in self.checks])
            )
        return "\n\n".join(part for part in parts if part) + "\n"

    def write(self, folder: Path) -> None:
        """Writes NAME.json and NAME.md."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self.name}.json").write_text(self.to_json())
        (folder / f"{self.name}.md").write_text(self.to_markdown())


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table; numbers are right-aligned, with three or four significant digits."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    numeric = {column: any(isinstance(row.get(column), int | float) for row in rows) for column in columns}
    lines = [columns, ["---:" if numeric[column] else "---" for column in columns]]
    lines += [[_cell(row.get(column)) for column in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        if value == 0 or 1e-3 <= abs(value) < 1e6:
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}" if abs(value) >= 100 else f"{value:.3g}"
        return f"{value:.1e}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|")


def environment() -> dict[str, Any]:
    """The machine, the versions and the date."""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": {
            "processor": _line("/proc/cpuinfo", "model name") or platform.processor(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory": _line("/proc/meminfo", "MemTotal"),
            "system": platform.platform(),
            "device": isolated("benchmarks.report:device"),
        },
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
    }


def device() -> str:
    """The device that JAX computes on. Call it in a process of its own: it occupies the GPU."""
    import jax

    return f"{jax.devices()[0].platform}: {jax.devices()[0].device_kind}"


def describe(environment: dict[str, Any]) -> str:
    """The environment as one line."""
    if not environment:
        return ""
    machine = environment["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['device']}; {environment['date']};"
        f" load before {environment.get('load before', 'unknown')}; {versions}."
    )


def _line(file: str, name: str) -> str | None:
    """The value of `name` in a file of "name : value" lines."""
    if not Path(file).exists():
        return None
    lines = Path(file).read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), None)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
