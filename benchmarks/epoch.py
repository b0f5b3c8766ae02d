"""Seconds per training epoch: the same model, batch and loss by everything that one might choose instead."""

import math
import statistics

from benchmarks import floor
from benchmarks.report import Check, Report, at_least, at_most
from benchmarks.turns import Measured, Setting, take_turns

OURS = "vae_jax"
DOCUMENTED = "torch_ref.train, as documented"
ON_DEVICE = "torch_ref.train, images on the GPU"
COMPILED = "PyTorch, the same under torch.compile"
FLOOR = "the floor: matrix products alone"
EAGER = "Flax, un-jitted step (as google/flax examples/vae)"
CONTENDERS = {
    OURS: "benchmarks.jax_contenders:ours",
    DOCUMENTED: "benchmarks.torch_contenders:documented",
    "PyTorch, images in memory, fused Adam": "benchmarks.torch_contenders:in_memory",
    COMPILED: "benchmarks.torch_contenders:compiled",
    "Flax, jitted step, host-side pipeline": "benchmarks.jax_contenders:flax_per_step",
    "NumPyro SVI": "benchmarks.jax_contenders:numpyro_svi",
    "pythae trainer": "benchmarks.torch_contenders:pythae_trainer",
    EAGER: "benchmarks.jax_contenders:flax_eager",
    # A row of its own on a GPU only.
    ON_DEVICE: "benchmarks.torch_contenders:documented_on_device",
}


def run(quick: bool, gpu: bool) -> Report:
    """Times every contender and the floor in turn."""
    setting = Setting(images=6400 if quick else 60000)
    rounds = 2 if quick else 6
    contenders = {name: place for name, place in CONTENDERS.items() if gpu or name != ON_DEVICE}
    measured = take_turns(contenders | floor.LIBRARIES, setting, rounds)
    trainers, libraries = measured[: len(contenders)], measured[len(contenders) :]
    products = floor.rows(setting, libraries)
    floor_s = sum(row["seconds an epoch"] for row in products)
    rows = [_row(one, trainers[0].median, floor_s) for one in trainers]
    rows.append({"contender": FLOOR, "median s": floor_s, "ours is faster by": None, "times the floor": 1.0})
    return Report(
        "epoch",
        f"Seconds per training epoch of {setting.images:,} images, batch {setting.batch_size}, 784-400-20, float32:"
        f" medians of {rounds} runs, in turn, after one that warms up. The floor is the matrix products of the epoch"
        " alone, each by the best BLAS here. The un-jitted loop is run for 20 steps and scaled up. The loss is that of"
        " the last run, in nats per image: all train the same model (20 steps are not an epoch, and pythae averages"
        " over batches).",
        setting._asdict() | {"rounds": rounds},
        {"Epochs": rows, "The floor": products},
        _cpu_checks(trainers, floor_s, gpu) + _gpu_checks(trainers, setting, gpu),
    )


def _row(one: Measured, ours: float | None, floor_s: float) -> dict:
    median = one.median
    row = {"contender": one.name, "median s": median}
    if median is None:
        return row | {"note": one.failure}
    low, _, high = statistics.quantiles(one.seconds, n=4, method="inclusive")
    return row | {
        "quartiles s": f"{low:.3g} to {high:.3g}",
        "ours is faster by": median / ours if ours else None,
        "times the floor": median / floor_s,
        "loss": one.returned[-1],
        "prepare s": one.prepare_s,
        "first run s": one.first_s,
        "runs s": [round(seconds, 4) for seconds in one.seconds],
    }


def _cpu_checks(trainers: list[Measured], floor_s: float, gpu: bool) -> list[Check]:
    by_name = {one.name: one.median for one in trainers if one.median and not gpu}
    ours = by_name.get(OURS)
    peers = {name: seconds for name, seconds in by_name.items() if name != OURS}
    best = min(peers, key=lambda name: peers[name], default="")
    return [
        at_most("CPU: our epoch is at most 1.35 times the floor", ours, floor_s, 1.35),
        at_least(f"CPU: at least 1.5 times faster than the best peer ({best})", peers.get(best), ours, 1.5),
        at_least("CPU: at least 3.5 times faster than the documented PyTorch loop", peers.get(DOCUMENTED), ours, 3.5),
        at_least("CPU: at least 15 times faster than the un-jitted Flax loop", peers.get(EAGER), ours, 15),
    ]


def _gpu_checks(trainers: list[Measured], setting: Setting, gpu: bool) -> list[Check]:
    by_name = {one.name: one.median for one in trainers if one.median and gpu}
    ours = by_name.get(OURS)
    step = math.ceil(setting.images / setting.batch_size) * 1e-6
    return [
        at_most("GPU: at most 75 microseconds a step", ours, step, 75),
        at_least(
            "GPU: at least 8 times faster than the documented loop with the images on the GPU",
            by_name.get(ON_DEVICE),
            ours,
            8,
        ),
        at_least("GPU: at least 2 times faster than torch.compile (CUDA graphs)", by_name.get(COMPILED), ours, 2),
    ]
