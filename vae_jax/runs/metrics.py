"""The averages of an epoch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from vae_jax.data.dataset import Pixels
from vae_jax.system.errors import NonFiniteLossError


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
    seconds: float  # of training, without evaluation and compilation
    pixels: Pixels  # what the cross entropy is taken of: losses on grey and on binary pixels cannot be compared


def require_finite(metrics: EpochMetrics) -> None:
    """Checks the losses of an epoch: the last step can diverge when its own loss, taken before it, was still finite.

    Raises:
      NonFiniteLossError: One is not finite.
    """
    if not math.isfinite(metrics.train_loss + metrics.test_loss):
        raise NonFiniteLossError(
            f"epoch {metrics.epoch}, after its last step: the training loss is {metrics.train_loss}, the test loss"
            f" {metrics.test_loss}; nothing exported; try a lower --learning-rate or --beta"
        )


def best_epoch(history: Sequence[EpochMetrics]) -> EpochMetrics:
    """The epoch with the lowest test loss, the first of several."""
    return min(history, key=lambda metrics: metrics.test_loss)


def out_of_patience(history: Sequence[EpochMetrics], patience: int) -> bool:
    """Whether the last `patience` epochs have brought no lower test loss; 0 is never out of patience."""
    return bool(history) and 0 < patience <= history[-1].epoch - best_epoch(history).epoch


def average(bce: Sequence[float], kld: Sequence[float], images: int, beta: float) -> tuple[float, float, float]:
    """loss, bce and kld per image, from sums over batches.

    They are added in float64, in which loss = bce + beta * kld holds to the last printed digit.
    """
    bce_mean, kld_mean = math.fsum(bce) / images, math.fsum(kld) / images
    return bce_mean + beta * kld_mean, bce_mean, kld_mean


def how_far(epochs: int, steps: int) -> str:
    """The place of a run in words: the epochs that are done, and the steps of the next one."""
    return f"epoch {epochs}" + (f" and step {steps:,} of epoch {epochs + 1}" if steps else "")
