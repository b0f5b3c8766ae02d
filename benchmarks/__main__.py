"""`python -m benchmarks`: runs the benchmarks and stores their results."""

import dataclasses
import importlib
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Literal, get_args

import tyro

from benchmarks import report
from vae_jax.system import command_line
from vae_jax.system.files import require_writable

Name = Literal["epoch", "start", "scale", "evaluate", "fidelity", "machines", "sweep", "cells"]
NAMES: tuple[Name, ...] = get_args(Name)


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
    """Measure this VAE next to the programs that you might choose instead; writes JSON, Markdown and a picture each."""

    names: Annotated[tuple[Name, ...], tyro.conf.Positional] = NAMES
    """Benchmarks to run; by default all of them."""
    quick: bool = False
    """Try the whole suite on small settings, within 3 minutes; the figures mean little."""
    out: Path | None = None
    """Folder for the results; by default benchmarks/results, and runs/benchmarks-quick with --quick."""


def benchmark(config: BenchmarkConfig) -> None:
    """Runs each benchmark and writes its files as soon as it is done.

    Raises:
      InputError: The folder cannot be written.
    """
    # Some container images set it for another processor, which makes NumPy's products several times slower.
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
        # Imported only after the measurement, which matplotlib's threads and memory would disturb.
        plots = importlib.import_module("benchmarks.plots")
        plots.draw(found, out / f"{name}.png")
        print(found.to_markdown(), flush=True)
    print(f"saved {out}; {time.perf_counter() - suite_start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    if sys.argv[1:2] == ["published"]:  # trains for hours, with options of its own
        del sys.argv[1]
        importlib.import_module("benchmarks.published").main()
        sys.exit()
    command_line.run(benchmark, BenchmarkConfig, "python -m benchmarks")
