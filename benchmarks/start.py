"""Whole commands from a cold start, and where our seconds go.

`python -m benchmarks.start` is the training command without checkpoints: it shows what they cost.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType
from unittest.mock import Mock

from benchmarks.report import Check, Report, at_least, at_most
from benchmarks.turns import isolated

OURS, PEER, BARE = "vae_jax.train", "torch_ref.train", "benchmarks.start"


def run(quick: bool, gpu: bool) -> Report:
    """Runs the commands in turn; PyTorch's, which takes minutes, once."""
    del gpu
    epochs = 1 if quick else 10
    runs = [command(module, epochs) for module in (OURS, PEER, BARE, *([] if quick else 2 * [OURS, BARE]))]
    torch = runs[1]
    # The better run: nothing makes a process faster than it is.
    best = min((found for found in runs if found["command"] == OURS), key=lambda found: found["whole s"])
    medians = {
        module: statistics.median(found["whole s"] for found in runs if found["command"] == module)
        for module in (OURS, BARE)
    }
    return Report(
        "start",
        f"Whole processes as a user types them, `python -m ... --epochs {epochs}`, nothing kept from an earlier one."
        " The parts until the first line are timed in another cold process.",
        {"epochs": epochs},
        {
            "Commands": [{key: value for key, value in found.items() if key != "lines s"} for found in runs],
            "Where our seconds go": _phases(best, isolated("benchmarks.start:beginning")),
        },
        [
            at_least("at least 3 times faster than torch_ref.train", torch["whole s"], best["whole s"], 3),
            Check("at most 8 s outside the epochs", f"{best['outside epochs s']:.2f} s", best["outside epochs s"] <= 8),
            at_most(f"with checkpoints at most 1.02 times {BARE}, without them", medians[OURS], medians[BARE], 1.02),
        ],
    )


def command(module: str, epochs: int) -> dict:
    """Runs `python -m module` and notes when each of its lines came.

    Raises:
      RuntimeError: It failed; the message is its last line.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = [f"--epochs={epochs}", f"--workdir={folder}/run", f"--export={folder}/vae.pth"]
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", module, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert process.stdout is not None
        lines = [(time.perf_counter() - start, line) for line in process.stdout]
        code = process.wait()
        whole = time.perf_counter() - start
        if code:
            raise RuntimeError(f"python -m {module} ended with code {code}: {lines[-1][1].strip() if lines else ''}")
        metrics = [json.loads(line) for line in (Path(folder) / "run/metrics.jsonl").read_text().splitlines()]
    seconds = sum(epoch["seconds"] for epoch in metrics)
    return {
        "command": module,
        "whole s": whole,
        "epochs s": seconds,
        "outside epochs s": whole - seconds,
        "final test loss": metrics[-1]["test_loss"],
        # When the first line came, and when that of the last epoch.
        "lines s": (lines[0][0], max(when for when, line in lines if line.startswith("epoch "))),
    }


def _phases(found: dict, begun: dict[str, float]) -> list[dict]:
    """Where the seconds of a run of ours went; its first line comes right before it compiles its epochs."""
    first, last = found["lines s"]
    phases = begun | {
        "interpreter, and what differs between processes": first - sum(begun.values()),
        "compilation of the epochs, imports meanwhile, and evaluation": last - first - found["epochs s"],
        "epochs": found["epochs s"],
        "checkpoint, export, pictures, exit": found["whole s"] - last,
    }
    return [{"phase": phase, "seconds": seconds} for phase, seconds in phases.items()]


def beginning() -> dict[str, float]:
    """The seconds of what `vae_jax.fit` does before its first line; for a fresh process."""
    clock = [time.perf_counter()]

    def lap() -> float:
        clock.append(time.perf_counter())
        return clock[-1] - clock[-2]

    from vae_jax.config import TrainConfig
    from vae_jax.train import load

    seconds = {"import of the command": lap()}
    images = load().train_images
    seconds["data"] = lap()
    import jax.numpy as jnp

    from vae_jax import steps

    seconds["import of jax and flax"] = lap()
    jnp.asarray(images).block_until_ready()
    seconds["first use of the device"] = lap()
    steps.create_state(TrainConfig()).step.block_until_ready()
    seconds["initialization"] = lap()
    return seconds


def without_checkpoints() -> None:
    """Trains as the command does, but writes no checkpoints and does not import what writes them."""

    for name in ("orbax", "orbax.checkpoint"):
        sys.modules[name] = ModuleType(name)
    from vae_jax import checkpoint, cli, train

    checkpoint.Checkpoints = lambda *_: Mock(newest=Mock(return_value=None), due=Mock(return_value=False))
    cli.run(train.fit, train.TrainConfig, f"python -m {BARE}")


if __name__ == "__main__":
    without_checkpoints()
