"""Seconds per training epoch: the same model, batch size and loss in each program that a user might choose."""

import math
import statistics

from benchmarks import floor
from benchmarks.report import Check, Report, at_least, at_most
from benchmarks.turns import Measured, Setting, take_turns

OURS = "vae_jax"
DOCUMENTED = "torch_ref.train, as documented"
ON_DEVICE = "torch_ref.train, images on the GPU"
COMPILED = "PyTorch, images in memory, torch.compile"
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
    # On a CPU this is the documented loop itself.
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
    rows = [_row(trainer, trainers[0].median, floor_s) for trainer in trainers]
    rows.append({"contender": FLOOR, "median s": floor_s, "times ours": None, "times the floor": 1.0})
    return Report(
        "epoch",
        f"Seconds per training epoch of {setting.images:,} images, batch {setting.batch_size}, 784-400-20, float32."
        f" The contenders run in turn; the table shows medians of {rounds} runs, after a run that warms up. The floor"
        " is the time of the epoch's matrix products alone, each by the fastest BLAS here. The un-jitted loop runs 20"
        " steps, whose time is scaled up to an epoch. The loss is that of the last run, in nats per image; it shows"
        " that all train the same model (but 20 steps are not an epoch, and pythae averages over batches).",
        setting._asdict() | {"rounds": rounds},
        {"Epochs": rows, "The floor": products},
        _cpu_checks(trainers, floor_s, gpu) + _gpu_checks(trainers, setting, gpu),
    )


def _row(trainer: Measured, ours: float | None, floor_s: float) -> dict:
    median = trainer.median
    row = {"contender": trainer.name, "median s": median}
    if median is None:
        return row | {"note": trainer.failure}
    low, _, high = statistics.quantiles(trainer.seconds, n=4, method="inclusive")
    return row | {
        "quartiles s": f"{low:.3g} to {high:.3g}",
        "times ours": median / ours if ours else None,
        "times the floor": median / floor_s,
        "loss": trainer.returned[-1],
        "prepare s": trainer.prepare_s,
        "first run s": trainer.first_s,
        "runs s": [round(seconds, 4) for seconds in trainer.seconds],
    }


def _cpu_checks(trainers: list[Measured], floor_s: float, gpu: bool) -> list[Check]:
    medians = {trainer.name: trainer.median for trainer in trainers if trainer.median and not gpu}
    ours = medians.get(OURS)
    peers = {name: seconds for name, seconds in medians.items() if name != OURS}
    best = min(peers, key=lambda name: peers[name], default="")
    return [
        at_most("CPU: our epoch takes at most 1.35 x the floor", ours, floor_s, 1.35),
        at_least(f"CPU: the fastest peer ({best}) takes at least 1.5 x our time", peers.get(best), ours, 1.5),
        at_least("CPU: the documented PyTorch loop takes at least 3.5 x our time", peers.get(DOCUMENTED), ours, 3.5),
        at_least("CPU: the un-jitted Flax loop takes at least 15 x our time", peers.get(EAGER), ours, 15),
    ]


def _gpu_checks(trainers: list[Measured], setting: Setting, gpu: bool) -> list[Check]:
    medians = {trainer.name: trainer.median for trainer in trainers if trainer.median and gpu}
    ours = medians.get(OURS)
    microsecond_a_step = math.ceil(setting.images / setting.batch_size) * 1e-6
    return [
        at_most("GPU: our step takes at most 75 microseconds", ours, microsecond_a_step, 75, "microseconds"),
        at_least(
            "GPU: the documented loop with its images on the GPU takes at least 8 x our time",
            medians.get(ON_DEVICE),
            ours,
            8,
        ),
        at_least("GPU: torch.compile (CUDA graphs) takes at least 2 x our time", medians.get(COMPILED), ours, 2),
    ]
