"""What a run leaves behind and tells: config.json, metrics.jsonl, a line an epoch, pictures, TensorBoard events.

Imports neither jax nor torch, and what draws only when it draws.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from vae_jax.config import EVENTS, PICTURES, RUN_FILES, NonFiniteLossError, TrainConfig
from vae_jax.data import Pixels

if TYPE_CHECKING:
    from vae_jax.pictures import Coder

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


class RunLog:
    """Writes a run's files and prints its lines. Creating one replaces what an earlier run left in the folder.

    config.json holds the options, and what they alone do not tell: the shape of an image and the kind of its pixels.
    """

    def __init__(self, config: TrainConfig, image_shape: tuple[int, ...], pixels: Pixels):
        self._config = config
        config.workdir.mkdir(parents=True, exist_ok=True)
        for name in (*RUN_FILES, *PICTURES):
            (config.workdir / name).unlink(missing_ok=True)
        for old in (config.workdir / EVENTS).glob("events.out.tfevents.*"):
            old.unlink()
        described = dataclasses.asdict(config) | {"image_shape": image_shape, "pixels": pixels}
        text = json.dumps(described, indent=2, default=str)
        (config.workdir / "config.json").write_text(text + "\n")
        self._events = None
        if config.tensorboard:
            from vae_jax.events import Events

            self._events = Events(config.workdir / EVENTS, config, pixels)

    def add(self, metrics: EpochMetrics) -> None:
        """Appends to metrics.jsonl and prints a line, whose parts add up to its loss in the printed digits too.

        Raises:
          NonFiniteLossError: A loss is not finite; nothing is written.
        """
        if not math.isfinite(metrics.train_loss + metrics.test_loss):
            raise NonFiniteLossError(
                f"epoch {metrics.epoch}: the training loss is {metrics.train_loss}, the test loss {metrics.test_loss};"
                " nothing exported; try a lower --learning-rate or --beta"
            )
        with (self._config.workdir / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(dataclasses.asdict(metrics)) + "\n")
        if self._events:
            self._events.add(metrics)
        loss = round(metrics.train_loss, 2)
        bce = round(metrics.train_bce, 2)
        weight = "" if self._config.beta == 1 else "beta * "
        print(
            f"epoch {metrics.epoch:{len(str(self._config.epochs))}}/{self._config.epochs}  {metrics.pixels}"
            f"  train loss {loss:.2f} = bce {bce:.2f} + {weight}kld {loss - bce:.2f}"
            f"  test loss {metrics.test_loss:.2f}  {metrics.seconds:.2f} s",
            flush=True,
        )

    def draw(
        self, history: Sequence[EpochMetrics], model: Coder, images: np.ndarray, image_shape: tuple[int, ...]
    ) -> None:
        """Draws reconstructions.png, samples.png and curves.png.

        Args:
          history: The epochs so far.
          model: The model after the last of them.
          images: Test images to reconstruct, pixels in [0, 1], [images, pixels].
          image_shape: Of each image: height and width, and channels if it has any.
        """
        from vae_jax import pictures, plots

        # The same latent points every time, so that one sees them change.
        rng = np.random.default_rng(self._config.seed)
        figures = (
            pictures.figure(pictures.reconstruct(model, images[:RECONSTRUCTIONS]), image_shape),
            pictures.figure(pictures.sample(model, rng, SAMPLES), image_shape),
            plots.curves(history),
        )
        for name, figure in zip(PICTURES, figures, strict=True):
            rgb = plots.pixels(figure)
            plots.save(rgb, self._config.workdir / name)
            if self._events:
                self._events.draw(name.removesuffix(".png"), rgb, history[-1].epoch)

    def close(self) -> None:
        """Ends the event file."""
        if self._events:
            self._events.close()
