"""Training steps per second of the models of a published table (Burda et al. 2015), next to the same in PyTorch."""

from benchmarks.report import Check, Report, at_least
from benchmarks.turns import Measured, Setting, take_turns

SAMPLES, QUICK_SAMPLES = (1, 5, 50), (1, 5)
# Images of a run, which takes images / BATCH_SIZE steps.
IMAGES, QUICK_IMAGES = 12_000, 400
BATCH_SIZE = 20
ROUNDS, QUICK_ROUNDS = 5, 1
OURS, TORCH, COMPILED = "vae_jax", "PyTorch, images in memory, fused Adam", "PyTorch, the same under torch.compile"
CONTENDERS = {
    OURS: "benchmarks.jax_contenders:iwae",
    TORCH: "benchmarks.torch_contenders:iwae",
    COMPILED: "benchmarks.torch_contenders:compiled_iwae",
}


def run(quick: bool, gpu: bool) -> Report:
    """Times a piece of an epoch of IWAE, of each number of samples, in turn."""
    del gpu
    images, rounds = (QUICK_IMAGES, QUICK_ROUNDS) if quick else (IMAGES, ROUNDS)
    rows = []
    for samples in QUICK_SAMPLES if quick else SAMPLES:
        # Fewer images where each has many samples.
        part = images // (10 if samples > 10 else 1)
        setting = Setting(part, BATCH_SIZE, samples=samples)
        rows += [_row(measured, setting) for measured in take_turns(CONTENDERS, setting, rounds)]
    return Report(
        "cells",
        "IWAE with K samples an image, 784-200-200-50-200-200-784, tanh, batches of 20, pixels drawn anew in each step:"
        f" medians of {rounds}, in turn.",
        {"images": images, "rounds": rounds},
        {"Steps per second": rows},
        checks(rows),
    )


def _row(measured: Measured, setting: Setting) -> dict:
    row = {"K": setting.samples, "trainer": measured.name}
    if measured.median is None:
        return row | {"note": measured.failure}
    return row | {"steps/s": setting.images / setting.batch_size / measured.median, "loss": measured.returned[-1]}


def checks(rows: list[dict]) -> list[Check]:
    rates = {row["trainer"]: row.get("steps/s") for row in rows if row["K"] == 1}
    return [at_least("K = 1: at least 2 x the steps/s of PyTorch", rates[OURS], rates[TORCH], 2)]
