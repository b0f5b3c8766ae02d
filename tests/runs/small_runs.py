"""Small runs: how they are started, and what they must leave."""

import hashlib
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import vae_jax.train
from vae_jax import TrainConfig
from vae_jax.pictures import kinds, plots
from vae_jax.runs import feed
from vae_jax.runs.workdir import PICTURES

ROOT = Path(__file__).parents[2]
STEPS = 5  # of an epoch of 600 images

Options = Callable[..., TrainConfig]


class Died(BaseException):
    """Stands for a kill: nothing in the product catches it."""


def quicken(patch: pytest.MonkeyPatch) -> None:
    """Lets a run stop after every step, and spares it matplotlib: each picture is a digest of what it would show."""
    patch.setattr(feed, "CHUNK_FLOPS", 1)
    patch.setattr(kinds, "figure", lambda picture, _: picture.images)
    patch.setattr(plots, "curves", lambda history: np.array([metrics.test_loss for metrics in history]))
    patch.setattr(plots, "pixels", digest)


def digest(array: np.ndarray) -> np.ndarray:
    return np.frombuffer(hashlib.md5(array.tobytes()).digest()[:3], np.uint8).reshape(1, 1, 3)


def main() -> None:
    """The command, quickened: for a process of its own."""
    quicken(pytest.MonkeyPatch())
    vae_jax.train.main()


def arguments(config: TrainConfig) -> list[str]:
    """The options as a user types them."""
    return shlex.split(config.command)[3:]


def process(config: TrainConfig, before: str = "") -> list[str]:
    """The quickened command for `subprocess`, to be started in ROOT.

    Args:
      config: Its options.
      before: Python code to run first.
    """
    return [sys.executable, "-c", f"{before}\nfrom tests.runs import small_runs\nsmall_runs.main()", *arguments(config)]


def start(words: list[str], output: int = subprocess.PIPE) -> subprocess.Popen[str]:
    """Starts a process whose standard output and error are `output`."""
    return subprocess.Popen(words, cwd=ROOT, stdout=output, stderr=output, text=True)


def metrics(config: TrainConfig) -> list[dict]:
    """The lines of metrics.jsonl without the seconds, in which no two runs are the same."""
    lines = [json.loads(line) for line in (config.workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def listing(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def checkpoints(config: TrainConfig) -> list[int]:
    """The steps of the checkpoints; nothing else is in their folder."""
    names = listing(config.workdir / "checkpoints")
    return sorted(int(name.removesuffix(".safetensors")) for name in names)


def require_same(config: TrainConfig, other: TrainConfig) -> None:
    """A finished run has the same model, metrics and pictures as another one, and left nothing else."""
    assert config.export.read_bytes() == other.export.read_bytes()
    for name in ("model.pth", *PICTURES):
        assert (config.workdir / name).read_bytes() == (other.workdir / name).read_bytes(), name
    assert metrics(config) == metrics(other)
    assert checkpoints(config)[-1] == checkpoints(other)[-1]
    assert listing(config.workdir.parent) == listing(other.workdir.parent)
    assert listing(config.workdir) == listing(other.workdir)
