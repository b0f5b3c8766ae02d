"""Models per hour of a sweep, next to the same models trained one by one, and of models stacked in one program."""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.report import Check, Report, at_least, at_most
from benchmarks.turns import Measured, Setting, say, take_turns

EPOCHS = 10
# Models of a sweep, all of the default size; the checks are about the last.
COMMANDS, QUICK_COMMANDS = (1, 4, 16), (1, 2)
ROUNDS, QUICK_ROUNDS = 2, 1
STACKS, GPU_STACKS, QUICK_STACKS = (1, 2, 4, 8, 16, 32), (1, 2, 4, 8, 16, 32, 64, 128, 256, 512), (1, 2)
STACK_ROUNDS = 3
# So many images: the steps of an epoch are alike.
IMAGES, QUICK_IMAGES = 6400, 1280
# Models of one program that a GPU shall train in at most twice the time of one.
GPU_CHECKED = 64

SWEEP = "vae_jax.sweep"
ONE_BY_ONE, PAIRS = "vae_jax.train, one after another", "vae_jax.train, two processes at once"
PEER = "torch_ref.train, one after another"
OURS, TORCH = "vae_jax, stacked", "PyTorch, torch.func"


def run(quick: bool, gpu: bool) -> Report:
    """Times whole commands in turn, then steps of stacked models in turn."""
    epochs, rounds = (1, QUICK_ROUNDS) if quick else (EPOCHS, ROUNDS)
    counts = QUICK_COMMANDS if quick else COMMANDS
    commands = time_commands(counts, epochs, rounds, 0 if gpu else 1)
    images, stacks = (QUICK_IMAGES, QUICK_STACKS) if quick else (IMAGES, GPU_STACKS if gpu else STACKS)
    stacked = time_stacks(stacks, images, 1 if quick else STACK_ROUNDS)
    return Report(
        "sweep",
        f"Whole commands as a user starts them, {epochs} epochs of the default model a model, from different seeds:"
        " medians, in turn. A single command costs the same whatever comes after it, so its rows stand for any number"
        f" of models. Stacked: seconds of {images:,} images for all models together, without start or compilation.",
        {"epochs": epochs, "rounds": rounds, "images": images},
        {"Whole commands": commands, "Stacked in one program": stacked},
        checks(commands, stacked, max(counts), gpu),
    )


def time_commands(counts: tuple[int, ...], epochs: int, rounds: int, peer_rounds: int) -> list[dict]:
    """A row for each way of training the models; the larger sweeps run once, between the others."""
    seconds: dict[tuple[str, int], list[float]] = {}

    def note(name: str, models: int, *commands: list[str]) -> None:
        seconds.setdefault((name, models), []).append(together(epochs, *commands))
        say(f"  {name}, {models} models: {seconds[name, models][-1]:.1f} s")

    for number in range(rounds):
        note(ONE_BY_ONE, 1, ["vae_jax.train", "--workdir=run"])
        note(PAIRS, 2, *(["vae_jax.train", f"--workdir=run{n}", f"--seed={n}", f"--export={n}.pth"] for n in (0, 1)))
        if number < peer_rounds:
            note(PEER, 1, ["torch_ref.train"])
        for count in counts:
            if count < max(counts) or number == 0:
                note(SWEEP, count, ["vae_jax.sweep", "--workdir=sweep", "--seed", *map(str, range(count))])
    return [
        {
            "command": name,
            "models": models,
            "runs": len(found),
            "s": statistics.median(found),
            "models/hour": 3600 * models / statistics.median(found),
        }
        for (name, models), found in sorted(seconds.items())
    ]


def together(epochs: int, *commands: list[str]) -> float:
    """Seconds until all of the commands, started at the same time, have ended.

    Raises:
      RuntimeError: One failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        running = [
            subprocess.Popen(
                [sys.executable, "-m", *command, f"--epochs={epochs}"],
                cwd=folder, stdout=subprocess.DEVNULL, stderr=(Path(folder) / f"errors{n}").open("w"),
            )
            for n, command in enumerate(commands)
        ]  # fmt: skip
        codes = [process.wait() for process in running]
        seconds = time.perf_counter() - start
        if any(codes):
            raise RuntimeError("".join(file.read_text() for file in sorted(Path(folder).glob("errors*"))).strip())
        return seconds


def time_stacks(counts: tuple[int, ...], images: int, rounds: int) -> list[dict]:
    """A row for each way of stacking and each number of models."""
    rows = []
    for count in counts:
        contenders = {OURS: "benchmarks.jax_contenders:stacked", TORCH: "benchmarks.torch_contenders:stacked"}
        for measured in take_turns(contenders, Setting(images, models=count), rounds):
            rows.append(_row(measured, count, rows))
    return rows


def _row(measured: Measured, count: int, rows: list[dict]) -> dict:
    row = {"trainer": measured.name, "models": count}
    if measured.median is None:
        return row | {"note": measured.failure}
    one = next((found["s"] for found in rows if found["trainer"] == measured.name and found["models"] == 1), None)
    one = one or measured.median
    return row | {"s": measured.median, "x one model": measured.median / one, "s a model": measured.median / count}


def checks(commands: list[dict], stacked: list[dict], count: int, gpu: bool) -> list[Check]:
    rate = {(row["command"], row["models"]): row["models/hour"] for row in commands}
    ours, claim = rate[SWEEP, count], f"a sweep of {count} models: at least"
    seconds = {row["models"]: row.get("s") for row in stacked if row["trainer"] == OURS and gpu}
    return [
        at_least(f"{claim} 1.25 x the models/hour of single commands", ours, rate[ONE_BY_ONE, 1], 1.25),
        at_least(f"{claim} 1 x the models/hour of two processes at once", ours, rate[PAIRS, 2], 1),
        at_most(
            f"on a GPU, {GPU_CHECKED} stacked models take at most 2 x the time of one",
            seconds.get(GPU_CHECKED), seconds.get(1), 2,
        ),
    ]  # fmt: skip
