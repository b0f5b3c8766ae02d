"""What a run leaves in its folder and tells: config.json, metrics.jsonl, a line an epoch, pictures, TensorBoard events.

Imports neither jax nor torch, and what draws only when it draws.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vae_jax.config import (
    CHECKPOINTS,
    EVENT_FILES,
    EVENTS,
    LOCK,
    PICTURES,
    RUN_FILES,
    InputError,
    NonFiniteLossError,
    RunConfig,
    checkpoint_steps,
)
from vae_jax.data import Pixels
from vae_jax.files import replacing, sweep

if TYPE_CHECKING:
    from vae_jax.pictures import Coder

STDOUT, STDERR = 1, 2
# Of each picture of a run.
RECONSTRUCTIONS, SAMPLES = 10, 64


@dataclasses.dataclass(frozen=True)
class EpochMetrics:
    """Averages over an epoch, in nats per image; a line of metrics.jsonl."""

    epoch: int
    train_loss: float
    train_bce: float
    train_kld: float
    test_loss: float
    test_bce: float
    test_kld: float
    seconds: float  # of training; neither evaluation nor compilation
    pixels: Pixels  # what the cross entropy is on: the two kinds cannot be compared


def describe_losses(pixels: Pixels) -> str:
    """The line that says what all losses of a run are."""
    warning = " (no log-likelihood of binary ones)" if pixels == "grey" else ""
    return f"losses are nats per image, a cross entropy on {pixels} pixels{warning}"


def say(line: str) -> None:
    """Prints a line at once."""
    with unheard(STDOUT):
        print(line, flush=True)


@contextmanager
def unheard(descriptor: int) -> Iterator[None]:
    """Where nobody reads any more what is written there (to a pipe or a terminal that has gone), the run goes on."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise
        # What is still in the buffer must not be tried again at the end. Both may go to the same place.
        gone, nowhere = os.fstat(descriptor), os.open(os.devnull, os.O_WRONLY)
        for other in (STDOUT, STDERR):
            if os.path.samestat(os.fstat(other), gone):
                os.dup2(nowhere, other)


@contextmanager
def lock(workdir: Path) -> Iterator[None]:
    """Makes the folder, and keeps every other process of ours out of it within the block.

    Raises:
      InputError: Another process is in it.
    """
    import filelock

    workdir.resolve().mkdir(parents=True, exist_ok=True)  # a link to a folder that is still to be made, too
    try:
        with filelock.FileLock(workdir / LOCK, timeout=0):
            yield
    except filelock.Timeout:
        raise InputError(
            f"--workdir {workdir}: another process is training in it; wait for its end, or name another folder"
        ) from None


def locked(workdir: Path) -> int | None:
    """What tells the lock file of a folder from that of another folder in its place."""
    try:
        return (workdir / LOCK).stat().st_ino  # whose process keeps it open: no other file gets the number
    except OSError:
        return None


def require_locked(workdir: Path, number: int | None) -> None:
    """Checks that a folder is still the one with the lock file of this number.

    Raises:
      FileNotFoundError: It has been deleted, and another run may be in its place.
    """
    if locked(workdir) != number:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(workdir))


class RunLog:
    """Writes a run's files and prints its lines.

    config.json holds the options, and what they alone do not tell: the shape of an image and the kind of its pixels.

    Args:
      config: The options.
      image_shape: Of each image: height and width, and channels if it has any.
      pixels: Kind of the pixels.
      history: The epochs behind a run that goes on, whose other files stay; without it, whatever an earlier run left
        in the folder is removed.
    """

    def __init__(
        self,
        config: RunConfig,
        image_shape: tuple[int, ...],
        pixels: Pixels,
        history: Sequence[EpochMetrics] | None = None,
    ):
        self._config = config
        self._locked = locked(config.workdir)
        self._history = list(history or ())
        workdir = config.workdir
        for path in (config.export, *(workdir / name for name in (*RUN_FILES, *PICTURES))):
            sweep(path)
        if history is None:
            # First the checkpoints: none may ever stand next to the options of another run. What else is there is the
            # user's own.
            for number in checkpoint_steps(workdir / CHECKPOINTS):
                shutil.rmtree(workdir / CHECKPOINTS / str(number))
            for name in ("model.pth", *PICTURES):
                (workdir / name).unlink(missing_ok=True)
            for old in (workdir / EVENTS).glob(EVENT_FILES):
                old.unlink()
        described = dataclasses.asdict(config) | {"image_shape": image_shape, "pixels": pixels}
        with replacing(workdir / "config.json") as part:
            part.write_text(json.dumps(described, indent=2, default=str) + "\n")
        self._write_metrics()  # after the options: with them alone, a run can be begun again
        self._events = None
        if config.tensorboard:
            from vae_jax.events import Events

            self._events = Events(workdir / EVENTS, config, pixels, len(self._history) + 1)

    def add(self, metrics: EpochMetrics) -> None:
        """Appends to metrics.jsonl and prints a line, whose parts add up to its loss in the printed digits too.

        Raises:
          NonFiniteLossError: A loss is not finite; nothing is written.
        """
        if not math.isfinite(metrics.train_loss + metrics.test_loss):
            raise NonFiniteLossError(
                f"epoch {metrics.epoch}, after its last step: the training loss is {metrics.train_loss},"
                f" the test loss {metrics.test_loss}; nothing exported; try a lower --learning-rate or --beta"
            )
        self._history.append(metrics)
        self._write_metrics()
        if self._events:
            self._events.add(metrics)
        loss = round(metrics.train_loss, 2)
        bce = round(metrics.train_bce, 2)
        weight = "" if self._config.beta == 1 else "beta * "
        say(
            f"epoch {metrics.epoch:{len(str(self._config.epochs))}}/{self._config.epochs}  {metrics.pixels}"
            f"  train loss {loss:.2f} = bce {bce:.2f} + {weight}kld {loss - bce:.2f}"
            f"  test loss {metrics.test_loss:.2f}  {metrics.seconds:.2f} s"
        )

    def _write_metrics(self) -> None:
        require_locked(self._config.workdir, self._locked)
        # All of it, every time: half a line is never there to be read.
        with replacing(self._config.workdir / "metrics.jsonl") as part:
            part.write_text("".join(json.dumps(dataclasses.asdict(metrics)) + "\n" for metrics in self._history))

    def draw(self, model: Coder, images: np.ndarray, image_shape: tuple[int, ...]) -> None:
        """Draws reconstructions.png, samples.png and curves.png.

        Args:
          model: The model after the last epoch.
          images: Test images to reconstruct, pixels in [0, 1], [images, pixels].
          image_shape: Of each image: height and width, and channels if it has any.
        """
        from vae_jax import pictures, plots

        # The same latent points every time, so that one sees them change.
        rng = np.random.default_rng(self._config.seed)
        figures = (
            pictures.figure(pictures.reconstruct(model, images[:RECONSTRUCTIONS]), image_shape),
            pictures.figure(pictures.sample(model, rng, SAMPLES), image_shape),
            plots.curves(self._history),
        )
        for name, figure in zip(PICTURES, figures, strict=True):
            rgb = plots.pixels(figure)
            plots.save(rgb, self._config.workdir / name)
            if self._events:
                self._events.draw(name.removesuffix(".png"), rgb, self._history[-1].epoch)
