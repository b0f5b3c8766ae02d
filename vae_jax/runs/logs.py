"""What a run tells: config.json, metrics.jsonl, a line an epoch, TensorBoard events. Imports neither jax nor torch."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections.abc import Sequence

import numpy as np

from vae_jax.config import TrainConfig
from vae_jax.data.dataset import Dataset, Pixels
from vae_jax.runs.metrics import EpochMetrics, best_epoch, out_of_patience
from vae_jax.runs.workdir import CONFIG, EVENTS, METRICS, SHAPES, Workdir
from vae_jax.system.console import say
from vae_jax.system.files import replacing
from vae_jax.system.signals import defer_signals


def describe_losses(pixels: Pixels, config: TrainConfig) -> str:
    """The line that says what all losses of a run mean."""
    warning = ", not a log-likelihood" if pixels == "grey" else ""
    samples = config.training_samples
    training = f"; in training {samples} draws an image" if samples > 1 else ""
    if config.objective != "elbo":
        training = f"; in training -L_{samples} ({config.objective})"
    return f"losses: nats per image; cross entropy of {pixels} pixels{warning}{training}"


class Logs:
    """Writes a run's files and prints its lines.

    config.json holds the options, the shape of an image, the kind of its pixels, the checksum of all images, a digest
    of the shapes of all parameters, and the versions and the device that the run started with.

    Args:
      config: The options.
      workdir: The folder of the run, locked.
      dataset: Its images.
      checksum: That of the images.
      shapes: `modules.shapes_digest` of the model.
      device: What computes.
      history: The epochs that a continued run has done.
    """

    def __init__(
        self,
        config: TrainConfig,
        workdir: Workdir,
        dataset: Dataset,
        checksum: int,
        shapes: str,
        device: str,
        history: Sequence[EpochMetrics],
    ):
        self._config = config
        self._workdir = workdir
        self._history = list(history)
        pixels = dataset.pixels(config.binarize)
        described = workdir.described | {
            "image_shape": dataset.image_shape,
            "pixels": pixels,
            "checksum": checksum,
            SHAPES: shapes,
            "versions": {name: importlib.metadata.version(name) for name in ("vae-jax", "jax", "jaxlib", "flax")},
            "device": device,
        }
        self._events = None
        if not workdir.writes:
            return
        with replacing(workdir.path / CONFIG) as part:
            part.write_text(json.dumps(described, indent=2) + "\n")
        self._write_metrics()  # after the options: with them alone, a run can begin again
        if config.tensorboard:
            with defer_signals():
                from vae_jax.runs.events import Events

            self._events = Events(workdir.path / EVENTS, config, pixels, len(self._history) + 1)

    def add(self, metrics: EpochMetrics) -> None:
        """Appends an epoch to metrics.jsonl and prints its line."""
        self._history.append(metrics)
        self._write_metrics()
        if self._events:
            self._events.add(metrics)
        say(epoch_line(metrics, self._config))

    def add_picture(self, name: str, rgb: np.ndarray) -> None:
        """Adds a picture of the last epoch, [height, width, 3] bytes, to the TensorBoard events, if there are any."""
        if self._events:
            self._events.draw(name, rgb, self._history[-1].epoch)

    def end(self) -> None:
        """Says why a finished run has stopped early, if it has, and which epoch `--keep best` exports."""
        config, last, best = self._config, self._history[-1], best_epoch(self._history)
        if last.epoch < config.epochs and out_of_patience(self._history, config.patience):
            epochs = f"{last.epoch - best.epoch} epoch{'s' if last.epoch - best.epoch > 1 else ''}"
            say(
                f"epoch {last.epoch}: no lower test loss for {epochs} (best {best.test_loss:.2f} after epoch"
                f" {best.epoch}); stopped by --patience {config.patience}"
            )
        if config.keep == "best":
            say(f"--keep best: the model is that of epoch {best.epoch}, test loss {best.test_loss:.2f}")

    def _write_metrics(self) -> None:
        if not self._workdir.writes:
            return
        self._workdir.require_lock()
        # The whole file every time: nobody ever reads half a line.
        with replacing(self._workdir.path / METRICS) as part:
            part.write_text("".join(json.dumps(dataclasses.asdict(metrics)) + "\n" for metrics in self._history))


def epoch_line(metrics: EpochMetrics, config: TrainConfig) -> str:
    """The line of an epoch, at most 80 characters with the documented options; its parts add up as printed."""
    loss, bce = round(metrics.train_loss, 2), round(metrics.train_bce, 2)
    # With beta 1 the last digit of the KLD is that of the difference, so that the printed sum holds.
    beta, epochs = config.beta, config.epochs
    kld = f"kld {loss - bce:.2f}" if beta == 1 else f"{beta:g} * kld {metrics.train_kld:.2f}"
    parts = f"= bce {bce:.2f} + {kld}"
    if config.objective != "elbo" or config.kl_warmup:  # the loss is not the sum of these averages
        parts = f"(bce {bce:.2f}, kld {metrics.train_kld:.2f})"
    seconds = metrics.seconds
    time = f"{1000 * seconds:.0f} ms" if seconds < 0.0995 else f"{seconds:.{1 if seconds < 9.95 else 0}f} s"
    return (
        f"epoch {metrics.epoch:{len(str(epochs))}}/{epochs}  train loss {loss:.2f} {parts}"
        f"  test loss {metrics.test_loss:.2f}  {time}"
    )
