"""Times whole commands from a cold start, and shows where our seconds go.

`python -m benchmarks.start` is the training command without checkpoints; the difference is what checkpoints cost.
"""

import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.report import Check, Report, at_least, at_most
from benchmarks.turns import isolated

OURS, PEER, BARE = "vae_jax.train", "torch_ref.train", "benchmarks.start"
ROUNDS, BEGINNINGS = 3, 3


def run(quick: bool, gpu: bool) -> Report:
    """Runs the commands in turn; PyTorch's, which takes a minute, only at the beginning and at the end."""
    del gpu
    epochs, rounds = (1, 1) if quick else (10, ROUNDS)
    # A B B A ..., so that a machine that becomes slower or faster favours neither.
    order = [name for number in range(rounds) for name in ((OURS, BARE) if number % 2 == 0 else (BARE, OURS))]
    runs = [command(module, epochs) for module in (PEER, *order, *([] if quick else [PEER]))]

    def median(module: str, value: str) -> float:
        return statistics.median(found[value] for found in runs if found["command"] == module)

    middle = min(
        (found for found in runs if found["command"] == OURS),
        key=lambda found: abs(found["whole s"] - median(OURS, "whole s")),
    )
    fastest = min(
        (isolated("benchmarks.start:beginning") for _ in range(1 if quick else BEGINNINGS)),
        key=lambda phases: sum(phases.values()),
    )
    # Both commands train alike, but the time of training varies by much more than checkpoints cost.
    cost = median(OURS, "outside epochs s") - median(BARE, "outside epochs s")
    return Report(
        "start",
        f"Whole processes as a user starts them, `python -m ... --epochs {epochs}`, each with nothing kept from an"
        f" earlier run. {BARE} is {OURS} without checkpoints. The phases are those of our median run; the parts before"
        " the first line are timed in further cold processes, of which the fastest counts.",
        {"epochs": epochs, "rounds": rounds},
        {
            "Commands": [{key: value for key, value in found.items() if key != "lines s"} for found in runs],
            "Medians": [
                {"command": module}
                | {value: median(module, value) for value in ("whole s", "epochs s", "outside epochs s")}
                for module in (OURS, BARE, PEER)
            ],
            "Where our seconds go": _phases(middle, fastest),
        },
        [
            at_least(
                "torch_ref.train takes at least 3 x our time", median(PEER, "whole s"), median(OURS, "whole s"), 3
            ),
            at_most("we spend at most 8 s outside the epochs", median(OURS, "outside epochs s"), 1, 8, "s"),
            Check(
                "checkpoints cost at most 2 percent of the whole time (by the seconds outside the epochs)",
                f"{cost:.2f} s, {cost / median(BARE, 'whole s'):.1%}",
                cost <= 0.02 * median(BARE, "whole s"),
            ),
        ],
    )


def command(module: str, epochs: int) -> dict:
    """Runs `python -m module`, and notes when each of its lines comes.

    Raises:
      RuntimeError: It failed; the message is its last line.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = [f"--epochs={epochs}", f"--export={folder}/vae.pth"]
        if module != PEER:
            options.append(f"--workdir={folder}/run")
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
        if module == PEER:
            found = [match for _, line in lines if (match := re.search(r"test loss (\S+)  (\S+) s$", line))]
            test_loss, seconds = float(found[-1][1]), sum(float(match[2]) for match in found)
        else:  # our lines round to 0.1 s, which is more than checkpoints cost
            metrics = [json.loads(line) for line in (Path(folder) / "run/metrics.jsonl").read_text().splitlines()]
            test_loss, seconds = metrics[-1]["test_loss"], sum(epoch["seconds"] for epoch in metrics)
    return {
        "command": module,
        "whole s": whole,
        "epochs s": seconds,
        "outside epochs s": whole - seconds,
        "final test loss": test_loss,
        # The times of the first line and of the last epoch's line.
        "lines s": (lines[0][0], max(when for when, line in lines if line.startswith("epoch "))),
    }


def _phases(found: dict, beginning: dict[str, float]) -> list[dict]:
    """Where the seconds of our run went. It prints its first line right before it compiles its epochs."""
    first, last = found["lines s"]
    phases = beginning | {
        "start of Python, and the rest before the first line": first - sum(beginning.values()),
        "compilation of the epochs, imports meanwhile, and evaluation": last - first - found["epochs s"],
        "epochs": found["epochs s"],
        "checkpoint, export, pictures, exit": found["whole s"] - last,
    }
    return [{"phase": phase, "seconds": seconds} for phase, seconds in phases.items()]


def beginning() -> dict[str, float]:
    """The seconds of what `vae_jax.fit` does before its first line; runs in a fresh process."""
    clock = [time.perf_counter()]

    def lap() -> float:
        clock.append(time.perf_counter())
        return clock[-1] - clock[-2]

    import vae_jax.train

    seconds = {"import of the command": lap()}
    images = vae_jax.train.load().train_images
    seconds["data"] = lap()
    import jax.numpy as jnp

    from vae_jax.core import steps
    from vae_jax.runs import checkpoint, feed, logs, progress  # noqa: F401  (they are timed)

    seconds["import of jax and flax"] = lap()
    jnp.asarray(images).block_until_ready()
    seconds["first use of the device"] = lap()
    steps.create_state(vae_jax.train.TrainConfig()).step.block_until_ready()
    seconds["initialization"] = lap()
    return seconds


def without_checkpoints() -> None:
    """Trains as the command does, but writes no checkpoints."""
    from vae_jax import train
    from vae_jax.system import command_line

    def fit(config: train.TrainConfig) -> None:
        from vae_jax.runs import checkpoint  # here, where `train.fit` imports it too

        class NoCheckpoints(checkpoint.Checkpoints):
            def save(self, progress: checkpoint.Progress) -> None:
                del progress

        checkpoint.Checkpoints = NoCheckpoints
        train.fit(config)

    command_line.run(fit, train.TrainConfig, f"python -m {BARE}")


if __name__ == "__main__":
    without_checkpoints()
