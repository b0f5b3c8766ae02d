"""How time and memory of our epoch grow with images, batch size and width."""

import time
from pathlib import Path

from benchmarks.floor import epoch_flops
from benchmarks.report import NOT_MEASURED, Check, Report
from benchmarks.turns import Setting, isolated

# Parameter that varies -> its values, and the setting of all others.
SWEEPS = {
    "images": ((1000, 10_000, 100_000, 1_000_000), Setting()),
    "batch_size": ((32, 128, 512, 2048, 8192), Setting(images=16384)),
    "hidden_dim": ((100, 200, 400, 1024, 2048, 4096), Setting(images=6400)),
}
QUICK_SWEEPS = {
    "images": ((1000, 10_000), Setting()),
    "batch_size": ((128, 2048), Setting(images=4096)),
    "hidden_dim": ((100, 400), Setting(images=2560)),
}
# A point runs again until it has so many runs and seconds, or LONG_S seconds with however many runs.
ENOUGH_RUNS, ENOUGH_S, LONG_S = 3, 1.0, 10.0
# The largest exponent that counts as linear: it leaves room for the noise of the clock.
LINEAR = 1.05


def run(quick: bool, gpu: bool) -> Report:
    """Measures each point in a fresh process, so that its peak memory is its own."""
    del gpu
    tables, checks = {}, []
    sweeps = QUICK_SWEEPS if quick else SWEEPS
    for name, (values, setting) in sweeps.items():
        rows = [
            {name: value} | isolated("benchmarks.scale:point", setting._replace(**{name: value})) for value in values
        ]
        tables[name] = rows
        # The batch size also changes the number of steps, so its cost is counted per step.
        cost = "seconds a step" if name == "batch_size" else "seconds an epoch"
        sizes, costs = [row[name] for row in rows], [row[cost] for row in rows]
        exponent = growth(sizes, costs)
        steepest = max(growth(sizes[n : n + 2], costs[n : n + 2]) for n in range(len(rows) - 1))
        checks.append(
            Check(
                f"{cost} grow at most linearly with {name}: the fitted exponent is at most {LINEAR}",
                f"{exponent:.2f} (at most {steepest:.2f} between two neighbours)",
                exponent <= LINEAR,
            )
        )
    checks.append(_memory_check(tables["images"]))
    return Report(
        "scale",
        "Our epoch, the fastest run of each point; beyond 60,000 images, MNIST is repeated. Each point runs in a fresh"
        " process, so that its peak memory is its own (up to 60,000 images, jax itself takes most of it).",
        {name: setting._asdict() for name, (_, setting) in sweeps.items()},
        tables,
        checks,
    )


def point(setting: Setting) -> dict:
    """Measures a setting; runs in a fresh process."""
    import jax

    from benchmarks.jax_contenders import ours

    epoch = ours(setting).run
    seconds = []
    while sum(seconds) < (ENOUGH_S if len(seconds) >= ENOUGH_RUNS else LONG_S):
        start = time.perf_counter()
        epoch()
        seconds.append(time.perf_counter() - start)
    best = min(seconds)
    row = {
        "seconds an epoch": best,
        "seconds a step": best / -(-setting.images // setting.batch_size),
        "GFLOP/s": epoch_flops(setting) / best / 1e9,
        "runs": len(seconds),
        "uint8 images MB": setting.images * 784 / 1e6,
    }
    peak = peak_memory_mb()
    if peak is not None:
        row["peak memory MB"] = peak
    device = jax.devices()[0].memory_stats()
    if device:
        row["peak device memory MB"] = device["peak_bytes_in_use"] / 1e6
    return row


def growth(sizes: list[float], costs: list[float]) -> float:
    """The exponent e of cost ~ size^e, by least squares on the logarithms."""
    import numpy as np

    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def peak_memory_mb() -> float | None:
    """The peak resident memory of this process; None where the system does not report it."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


def _memory_check(rows: list[dict]) -> Check:
    few, many = rows[-2:]
    claim = f"from {few['images']:,} to {many['images']:,} images, memory grows by at most 1.2 x their uint8 size"
    # With few images, the peak is that of compilation.
    if "peak memory MB" not in many or many["images"] < 1_000_000:
        return Check(claim, NOT_MEASURED, None)
    ratio = (many["peak memory MB"] - few["peak memory MB"]) / (many["uint8 images MB"] - few["uint8 images MB"])
    return Check(claim, f"{ratio:.2f} x", ratio <= 1.2)
