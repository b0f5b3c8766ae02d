"""Image sets: `load` reads any source into a `Dataset`."""

import sys
import zlib
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float32, Integer, UInt8

from vae_jax.config import Binarize
from vae_jax.data import idx, npz, tfds
from vae_jax.system.errors import DataError
from vae_jax.system.memory import memory

BUNDLED = Path(__file__).parent / "mnist.npz"
# A set without test images is tested on one image in seven, the share of MNIST's 10,000 in 70,000.
TEST_SHARE = 7

Pixels = Literal["grey", "binary"]


class Dataset(NamedTuple):
    """Training and test images, and their labels if the source has any.

    Images are bytes from 0 (background) to 255, or floats from 0 to 1; a fourth dimension, if any, holds channels.
    """

    train_images: (
        UInt8[np.ndarray, "train height width *channels"] | Float32[np.ndarray, "train height width *channels"]
    )
    train_labels: Integer[np.ndarray, " train"] | None
    test_images: UInt8[np.ndarray, "test height width *channels"] | Float32[np.ndarray, "test height width *channels"]
    test_labels: Integer[np.ndarray, " test"] | None

    @property
    def image_shape(self) -> tuple[int, ...]:
        """[height, width] or [height, width, channels]."""
        return self.train_images.shape[1:]

    def checksum(self) -> int:
        """CRC-32 of all images, training images first."""
        train, test = (np.ascontiguousarray(images).data for images in (self.train_images, self.test_images))
        return zlib.crc32(test, zlib.crc32(train))

    def pixels(self, rule: Binarize) -> Pixels:
        """The kind of pixels that losses are on after `rule`; images in pure black and white are binary without one."""
        binary = rule != "none" or all(
            bool(np.all((part == 0) | (part == (255 if part.dtype == np.uint8 else 1))))
            # Nearly every grey set shows a grey pixel in its first images.
            for part in (self.train_images[:100], self.train_images, self.test_images)
        )
        return "binary" if binary else "grey"


def load(spec: str = "mnist", data_dir: Path | None = None, max_gb: float | None = None) -> Dataset:
    """Loads an image set.

    Args:
      spec: One of
        `mnist`: the real MNIST, bundled with the package, 60,000 training and 10,000 test images of 28 x 28;
        `tfds:NAME[/CONFIG][:VERSION]`: a TensorFlow Datasets set, downloaded unless it is already there;
        a folder: with the four IDX files, gzipped or not, in it, in its `MNIST/raw` or in its `raw`;
        a file: .npz with `train_images` and perhaps `train_labels`, `test_images`, `test_labels`, or with Keras' names.
      data_dir: TFDS's folder; by default the environment variable TFDS_DATA_DIR, or else ~/tensorflow_datasets.
      max_gb: The most gigabytes that the arrays may take; by default half of the machine's memory.

    Returns:
      The images and labels, in the order of the source. Bytes that are all 0 or 1 are black and white pixels and become
      0 and 255. If the source has no test images, one training image in seven becomes a test image; the choice is the
      same every time, and both parts stay in order.

    Raises:
      DataError: The set is missing, damaged, empty or too large, cannot be downloaded, or holds anything but images.
    """
    max_bytes = int(min(max_gb * 1e9, sys.maxsize)) if max_gb else memory() // 2
    try:
        if spec == "mnist":
            arrays, source = npz.load(BUNDLED, max_bytes), str(BUNDLED)
        elif spec.startswith("tfds:"):
            arrays, source = tfds.load(spec, data_dir, max_bytes), spec
        elif spec and Path(spec).is_dir():
            arrays, source = idx.load(Path(spec), max_bytes), spec
        elif Path(spec).is_file():
            arrays, source = npz.load(Path(spec), max_bytes), spec
        else:
            raise DataError(
                f"--data {spec}: no such file or folder; expected mnist, tfds:NAME[/CONFIG][:VERSION], a folder with"
                " the four IDX files, or an .npz file"
            )
    except OSError as error:
        where = error.filename or f"--data {spec}"
        raise DataError(
            f"{where}: cannot be read ({error.strerror or error}); expected readable files; check their permissions, or"
            " name another --data"
        ) from None
    return _dataset(arrays, source)


def _dataset(arrays: dict[str, np.ndarray], source: str) -> Dataset:
    """Checks the arrays of a source and brings them into the form that `Dataset` promises."""
    images = {part: _images(arrays[part], f"{source}: {part}") for part in arrays if part.endswith("images")}
    for part in images:
        _check_labels(arrays.get(part.replace("images", "labels")), len(images[part]), f"{source}: {part}")
    train, train_labels = images["train_images"], arrays.get("train_labels")
    if "test_images" in images:
        test, test_labels = images["test_images"], arrays.get("test_labels")
    else:
        if len(train) < 2:
            raise DataError(
                f"{source}: holds {len(train)} image and no test images; expected at least 2 images, to train and test"
                " on; add images"
            )
        is_test = _test_share(len(train))
        train, test = train[~is_test], train[is_test]
        test_labels = None if train_labels is None else train_labels[is_test]
        train_labels = None if train_labels is None else train_labels[~is_test]
    if train.shape[1:] != test.shape[1:] or train.dtype != test.dtype:
        raise DataError(
            f"{source}: training images are {train.dtype} of shape {list(train.shape[1:])}, test images {test.dtype} of"
            f" shape {list(test.shape[1:])}; expected the same type and shape"
        )
    if train.dtype == np.uint8 and max(train.max(), test.max()) == 1:
        train, test = train * np.uint8(255), test * np.uint8(255)
    return Dataset(train, train_labels, test, test_labels)


def _images(images: np.ndarray, name: str) -> np.ndarray:
    if images.ndim not in (3, 4) or not images.size:
        raise DataError(
            f"{name}: has shape {list(images.shape)}; expected [images, height, width] or [images, height, width,"
            " channels], each at least 1"
        )
    if images.dtype == np.float32:
        low, high = images.min(), images.max()
        if np.isnan(low):
            raise DataError(f"{name}: holds NaN (not a number); expected floats in [0, 1]")
        if low < 0 or high > 1:
            raise DataError(
                f"{name}: holds floats from {low:g} to {high:g}; expected floats in [0, 1], or uint8 from 0 to 255"
            )
    return images[..., 0] if images.shape[3:] == (1,) else images


def _check_labels(labels: np.ndarray | None, count: int, name: str) -> None:
    if labels is not None and labels.shape != (count,):
        raise DataError(
            f"{name}: {count:,} images, but labels of shape {list(labels.shape)}; expected one label per image, shape"
            f" [{count}]"
        )


def _test_share(count: int) -> np.ndarray:
    """A mask of the images to test on.

    It is drawn from raw PCG64 output, which is the same in every version of NumPy; a permutation need not be.
    """
    order = np.argsort(np.random.PCG64(0).random_raw(count), kind="stable")
    is_test = np.zeros(count, bool)
    is_test[order[: max(1, count // TEST_SHARE)]] = True
    return is_test
