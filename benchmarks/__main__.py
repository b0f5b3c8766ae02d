"""`python -m benchmarks`: runs the benchmarks and keeps what they found."""

import dataclasses
import importlib
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import tyro

from benchmarks import report
from vae_jax import cli
from vae_jax.config import require_writable

Name = Literal["epoch", "start", "scale", "evaluate", "fidelity"]
NAMES: tuple[Name, ...] = ("epoch", "start", "scale", "evaluate", "fidelity")


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
    """Measure this VAE next to everything that one might choose instead; results as JSON, Markdown and a picture."""

    names: Annotated[tuple[Name, ...], tyro.conf.Positional] = NAMES
    """Benchmarks to run; by default all of them."""
    quick: bool = False
    """Small settings that try the whole suite within 3 minutes; the figures mean little."""
    out: Path | None = None
    """Folder for the results; by default benchmarks/results, and runs/benchmarks-quick with --quick."""


def benchmark(config: BenchmarkConfig) -> None:
    """Runs each benchmark and writes its files as soon as it is done.

    Raises:
      InputError: The folder cannot be written.
    """
    # Some container images set it for another processor; with it, NumPy's products are several times slower.
    os.environ.pop("OPENBLAS_CORETYPE", None)
    out = config.out or (Path("runs/benchmarks-quick") if config.quick else Path(__file__).parent / "results")
    for name in config.names:
        require_writable("--out", out / f"{name}.json")
    suite_start = time.perf_counter()
    environment = report.environment()
    gpu = environment["machine"]["device"].startswith("gpu")
    for name in config.names:
        print(f"{name}:", file=sys.stderr, flush=True)
        start = time.perf_counter()
        load = round(os.getloadavg()[0], 2)
        found: report.Report = importlib.import_module(f"benchmarks.{name}").run(config.quick, gpu)
        found.settings |= {"quick": config.quick, "whole benchmark s": round(time.perf_counter() - start, 1)}
        found.environment = environment | {"load before": load}
        found.write(out)
        # Only now: matplotlib's threads and memory are not for the measurements.
        plot = importlib.import_module("benchmarks.plots")
        plot.draw(found, out / f"{name}.png")
        print(found.to_markdown(), flush=True)
    print(f"saved {out}; {time.perf_counter() - suite_start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    cli.run(benchmark, BenchmarkConfig, "python -m benchmarks")
