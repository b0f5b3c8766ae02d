"""Image sets. `load` is the one way in; whatever the source, what comes out is a `Dataset`."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from vae_jax.config import InputError

BUNDLED = Path(__file__).parent / "mnist.npz"


class DataError(InputError):
    """An image set cannot be had or cannot be used."""


class Dataset(NamedTuple):
    """Training and test images with their labels; pixels from 0 (background) to 255."""

    train_images: UInt8[np.ndarray, "train height width"]
    train_labels: UInt8[np.ndarray, " train"]
    test_images: UInt8[np.ndarray, "test height width"]
    test_labels: UInt8[np.ndarray, " test"]


def load(name: str = "mnist") -> Dataset:
    """Loads an image set.

    Args:
      name: `mnist`, the real MNIST that ships with the package (60,000 training and 10,000 test images of 28 x 28).

    Returns:
      The images and labels, in the order of the original files.

    Raises:
      DataError: No image set has that name.
    """
    if name != "mnist":
        raise DataError(f"--data {name}: no such image set; the one there is: mnist")
    with np.load(BUNDLED) as arrays:
        return Dataset(**arrays)
