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

from benchmarks.report import Check, Report, at_least, at_most
from benchmarks.turns import isolated

OURS, PEER, BARE = "vae_jax.train", "torch_ref.train", "benchmarks.start"
ROUNDS, BEGINNINGS = 3, 3


def run(quick: bool, gpu: bool) -> Report:
    """Runs the commands in turn; PyTorch's, which takes a minute, at the beginning and at the end."""
    del gpu
    epochs, rounds = (1, 1) if quick else (10, ROUNDS)
    # A B B A, so that a machine that grows slower or faster favours neither.
    order = [name for number in range(rounds) for name in ((OURS, BARE) if number % 2 == 0 else (BARE, OURS))]
    runs = [command(module, epochs) for module in (PEER, *order, *([] if quick else [PEER]))]

    def median(module: str, value: str) -> float:
        return statistics.median(found[value] for found in runs if found["command"] == module)

    middle = min(
        (found for found in runs if found["command"] == OURS),
        key=lambda found: abs(found["whole s"] - median(OURS, "whole s")),
    )
    begun = min(
        (isolated("benchmarks.start:beginning") for _ in range(1 if quick else BEGINNINGS)),
        key=lambda phases: sum(phases.values()),
    )
    # Training is the same with and without; its swings, many times the difference, are left out.
    cost = median(OURS, "outside epochs s") - median(BARE, "outside epochs s")
    return Report(
        "start",
        f"Whole processes as a user types them, `python -m ... --epochs {epochs}`, nothing kept from an earlier one."
        f" {BARE} is {OURS} without checkpoints, and without importing what writes them. The phases are those of the"
        " run in the middle; the parts until the first line are timed in other cold processes (the fastest counts).",
        {"epochs": epochs, "rounds": rounds},
        {
            "Commands": [{key: value for key, value in found.items() if key != "lines s"} for found in runs],
            "Medians": [
                {"command": module}
                | {value: median(module, value) for value in ("whole s", "epochs s", "outside epochs s")}
                for module in (OURS, BARE, PEER)
            ],
            "Where our seconds go": _phases(middle, begun),
        },
        [
            at_least(
                "at least 3 times faster than torch_ref.train", median(PEER, "whole s"), median(OURS, "whole s"), 3
            ),
            at_most("at most 8 s outside the epochs", median(OURS, "outside epochs s"), 1, 8),
            Check(
                "checkpoints cost at most 2 percent of the whole, by the seconds outside the epochs",
                f"{cost:.2f} s, {cost / median(BARE, 'whole s'):.1%}",
                cost <= 0.02 * median(BARE, "whole s"),
            ),
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
    from vae_jax import checkpoint, cli, train

    class NoCheckpoints(checkpoint.Checkpoints):
        """None is there, none is due, none is written."""

        def newest(self) -> None:
            pass

        def due(self, ahead: float = 0) -> bool:
            del ahead
            return False

        def save(self, progress: checkpoint.Progress) -> None:
            del progress

    checkpoint.Checkpoints = NoCheckpoints
    sys.modules["orbax.checkpoint"] = ModuleType("orbax.checkpoint")  # taken as imported
    cli.run(train.fit, train.TrainConfig, f"python -m {BARE}")


if __name__ == "__main__":
    without_checkpoints()
