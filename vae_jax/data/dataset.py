"""Image sets: `load` reads any source into a `Dataset`."""

import math
import os
import sys
import zlib
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float32, Integer, UInt8
from tqdm import tqdm

from vae_jax.config import Binarize, DataOptions, Stream
from vae_jax.data import source
from vae_jax.data.form import Form
from vae_jax.data.mapped import MappedImages, pieces
from vae_jax.system.console import say
from vae_jax.system.errors import DataError
from vae_jax.system.memory import memory

# A set without test images is tested on one image in seven, the share of MNIST's 10,000 in 70,000.
TEST_SHARE = 7
# More channels than this are hardly channels.
MOST_CHANNELS = 4
# Arrays of fewer rows are hardly images of whatever is counted by another axis.
LEAST_SIDE = 8
# Floats this far outside [0, 1] are rounding, and are clipped.
FLOAT_NOISE = 1e-6

Pixels = Literal["grey", "binary"]


class Dataset(NamedTuple):
    """Training and test images, and their labels if the source has any.

    Images are bytes from 0 (background) to 255, or floats from 0 to 1; a fourth dimension, if any, holds channels.
    Where `load` was asked to stream, they may be `MappedImages` instead of arrays: indexed, they become arrays.
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
        """CRC-32 of the images of both parts, their types and their shapes: the identity of the set."""
        checksum = 0
        parts = (self.train_images, self.test_images)
        # Only a set that is read from its file takes long.
        hidden = None if any(isinstance(images, MappedImages) for images in parts) else True
        with tqdm(total=sum(map(len, parts)), unit=" images", desc="checksum", leave=False, disable=hidden) as bar:
            for images in parts:
                checksum = zlib.crc32(f"{images.dtype} {images.shape}".encode(), checksum)
                for piece in pieces(images):
                    checksum = zlib.crc32(np.ascontiguousarray(piece).data, checksum)
                    bar.update(len(piece))
        return checksum

    def pixels(self, rule: Binarize) -> Pixels:
        """The kind of pixels that losses are on after `rule`; images in pure black and white are binary without one."""
        binary = rule != "none" or all(
            bool(np.all((piece == 0) | (piece == (255 if piece.dtype == np.uint8 else 1))))
            # Nearly every grey set shows a grey pixel in its first images.
            for part in (self.train_images[:100], self.train_images, self.test_images)
            for piece in pieces(part)
        )
        return "binary" if binary else "grey"


def load(
    spec: str | Path = "mnist",
    data_dir: Path | None = None,
    max_gb: float | None = None,
    image_size: tuple[int, int] | None = None,
    grey: bool = False,
    stream: Stream = "never",
) -> Dataset:
    """Loads an image set.

    Args:
      spec: One of
        `mnist`: the real MNIST, bundled with the package, 60,000 training and 10,000 test images of 28 x 28;
        `tfds:NAME[/CONFIG][:VERSION]`: a TensorFlow Datasets set, downloaded unless it is already there;
        a folder of images (PNG, JPEG, BMP, GIF, WebP, TIFF, PPM): flat, or a folder for each class, or folders `train`
          and `test` (else `val`, `valid`, `validation`) of either kind; `vae_jax.data.decode` has the rules for pixels;
        a folder with the four IDX files, gzipped or not, in it, in its `MNIST/raw` or in its `raw`;
        a folder with train and test files of CSV, .mat or Parquet (also in its `data`), such as `mnist_train.csv`,
          `train_32x32.mat` or `train-00000-of-00001.parquet`;
        a file: .npz with `train_images` and perhaps `train_labels`, `test_images`, `test_labels`, or with Keras' names;
          .npy with the images alone; .mat (MATLAB, up to version 7); .csv or .csv.gz with an image a row, the label
          first or under `label`; .parquet with a column of images, encoded or as lists of numbers.
      data_dir: TFDS's folder; by default the environment variable TFDS_DATA_DIR, or else ~/tensorflow_datasets.
      max_gb: The most gigabytes that the arrays may take; by default half of the machine's memory.
      image_size: The height and width that all images are resized to; by default they stay as they are.
      grey: Whether images in colour become grey.
      stream: Whether the images of an uncompressed .npy or .npz file may stay there as `MappedImages`: those that take
        more than `max_gb` (auto), or all (always).

    Returns:
      The images and labels, in the order of the source. Integers that are all 0 or 1 are black and white pixels and
      become 0 and 255; floats outside [0, 1] by rounding are clipped; floats that are all whole numbers up to 255
      become bytes; rows of a square number of values become square images. Labels that are not integers, and cannot be
      made so, are left out. If the source has no test images, one training image in seven becomes a test image; the
      choice is the same every time, and both parts stay in order. Decoded images, CSV, .mat and Parquet files are kept
      in `$XDG_CACHE_HOME/vae_jax` or `~/.cache/vae_jax` until the files change.

    Raises:
      DataError: The set is missing, damaged, empty or too large, cannot be downloaded, or holds anything but images.
      InputError: `max_gb` or `image_size` is out of bounds.
    """
    options = DataOptions(data_dir=data_dir, max_data_gb=max_gb, image_size=image_size, grey=grey)
    options.check()
    spec = os.path.expanduser(os.fspath(spec))  # noqa: PTH111 (Path.expanduser raises for an unknown user)
    max_bytes = memory_limit(options.max_data_gb)
    form = Form(options.image_size, options.grey)
    try:
        arrays, name = source.read(spec, options.data_dir, form, max_bytes, stream)
    except OSError as error:
        where = error.filename or f"--data {spec}"
        raise DataError(
            f"{where}: cannot be read ({error.strerror or error}); expected readable files; check their permissions, or"
            " name another --data"
        ) from None
    return _dataset(arrays, name, form, max_bytes)


def checked(dataset: Dataset, image_size: tuple[int, int] | None = None, grey: bool = False) -> Dataset:
    """A data set that a caller has made, brought into the form that `Dataset` promises.

    Raises:
      DataError: An array holds something else than images.
    """
    arrays = {
        name: array if isinstance(array, MappedImages) else np.asarray(array)
        for name, array in dataset._asdict().items()
        if array is not None
    }
    return _dataset(arrays, "dataset", Form(image_size, grey), memory_limit(None))


def memory_limit(max_gb: float | None) -> int:
    """Bytes that arrays may take: so many gigabytes, or else half of the machine's memory."""
    return int(min(max_gb * 1e9, sys.maxsize)) if max_gb else memory() // 2


def _dataset(arrays: dict[str, Any], name: str, form: Form, max_bytes: int) -> Dataset:
    """Checks the arrays of a source and brings them into the form that `Dataset` promises."""

    def part(split: str) -> tuple[Any, np.ndarray | None]:
        images = _images(arrays[f"{split}_images"], f"{name}: {split}_images")
        return images, _labels(arrays.get(f"{split}_labels"), len(images), f"{name}: {split}_labels")

    train, train_labels = part("train")
    if "test_images" in arrays:
        test, test_labels = part("test")
    else:
        if len(train) < 2:
            raise DataError(
                f"{name}: holds {len(train)} image and no test images; expected at least 2 images, to train and test"
                " on; add images"
            )
        is_test = _test_share(len(train))
        if isinstance(train, MappedImages):
            train, test = train.chosen(~is_test), train.chosen(is_test)
        else:
            train, test = train[~is_test], train[is_test]
        test_labels = None if train_labels is None else train_labels[is_test]
        train_labels = None if train_labels is None else train_labels[~is_test]
    if train.dtype == test.dtype == np.uint8 and all(
        piece.max() <= 1 for part in (train, test) for piece in pieces(part)
    ):
        train, test = (_white_at_255(images) for images in (train, test))
    train, test = (form.arrays(images, name, max_bytes) for images in (train, test))
    if train.shape[1:] != test.shape[1:] or train.dtype != test.dtype:
        raise DataError(
            f"{name}: training images are {train.dtype} of shape {list(train.shape[1:])}, test images {test.dtype} of"
            f" shape {list(test.shape[1:])}; expected the same type and shape (--image-size and --grey change shapes)"
        )
    return Dataset(train, train_labels, test, test_labels)


def _white_at_255(images: Any) -> Any:
    if isinstance(images, MappedImages):
        return images.white_at_255()
    return images * np.uint8(255)


def _images(images: Any, name: str) -> Any:
    """Images as bytes or float32, [images, height, width] or with channels at the end; nothing is guessed silently."""
    values = math.prod(images.shape[1:])
    if images.shape[1:] and values == max(images.shape[1:]) == math.isqrt(values) ** 2 > 1:
        side = math.isqrt(values)
        say(f"{name}: rows of {values} values are taken as images of {side} x {side}")
        images = _reshaped(images, side, side)
    if images.ndim not in (3, 4) or not math.prod(images.shape):
        raise DataError(
            f"{name}: has shape {list(images.shape)}; expected [images, height, width] or [images, height, width,"
            " channels], each at least 1"
        )
    _refuse_images_last(images.shape, name)
    if images.ndim == 4:
        images = _channels_last(images, name)
    if images.dtype == np.uint8:
        return images
    if images.dtype.kind in "biu":
        low, high = int(images.min()), int(images.max())
        if low < 0 or high > 255:
            raise DataError(f"{name}: holds integers from {low} to {high}; expected integers from 0 to 255")
        return images.astype(np.uint8)
    if images.dtype.kind != "f":
        raise DataError(f"{name}: has type {images.dtype}; expected integers from 0 to 255, or floats in [0, 1]")
    ranges = [(piece.min(), piece.max()) for piece in pieces(images)]
    low, high = np.min([low for low, _ in ranges]), np.max([high for _, high in ranges])
    if np.isnan(low):
        raise DataError(f"{name}: holds NaN (not a number); expected floats in [0, 1]")
    if isinstance(images, MappedImages):
        if low < 0 or high > 1:
            raise DataError(
                f"{name}: holds floats from {low:.9g} to {high:.9g}, and stays in its file; expected floats in [0, 1],"
                " or uint8 from 0 to 255; write the file again"
            )
        return images
    if low < -FLOAT_NOISE or high > 1 + FLOAT_NOISE:
        if low >= 0 and 1 < high <= 255 and all((image == np.rint(image)).all() for image in images):
            return images.astype(np.uint8)
        raise DataError(
            f"{name}: holds floats from {low:.9g} to {high:.9g}; expected floats in [0, 1], or uint8 from 0 to 255"
        )
    return np.clip(images.astype(np.float32), 0, 1) if low < 0 or high > 1 else images.astype(np.float32, copy=False)


def _reshaped(images: Any, height: int, width: int) -> Any:
    """Images of the same values as [images, height, width]."""
    return images.of_shape(height, width) if isinstance(images, MappedImages) else images.reshape(-1, height, width)


def _refuse_images_last(shape: tuple[int, ...], name: str) -> None:
    """Refuses square images that seem to be counted by the last axis, as MATLAB has them."""
    height, width, *channels, last = shape
    if not height == width >= LEAST_SIDE or last == height or (channels and not channels[0] <= MOST_CHANNELS < last):
        return
    other = "" if channels else f"; if these are {height} images of {width} x {last}, write images[..., None]"
    raise DataError(
        f"{name}: has shape {list(shape)}, which looks like images last; expected [images, height, width] or [images,"
        f" height, width, channels]; if so, write numpy.moveaxis(images, -1, 0){other}"
    )


def _channels_last(images: Any, name: str) -> Any:
    """Images with four dimensions: drops a channel axis of length 1, and refuses channels that seem to come first."""
    _, first, second, last = images.shape
    if last == 1:
        return _reshaped(images, first, second)
    if first == 1 and last > MOST_CHANNELS:
        return _reshaped(images, second, last)
    if first <= MOST_CHANNELS < last:
        raise DataError(
            f"{name}: has shape {list(images.shape)}, which looks like channels first; expected [images, height, width,"
            " channels]; if so, write numpy.moveaxis(images, 1, -1)"
        )
    return images


def _labels(labels: np.ndarray | None, count: int, name: str) -> np.ndarray | None:
    """One integer per image, or None for labels of another form: training needs none, so they are never refused."""
    if labels is None:
        return None
    found = labels
    if found.shape == (count, 1):
        found = found[:, 0]
    if found.ndim == 2 and len(found) == count and found.dtype.kind in "biuf":
        one_hot = ((found == 0) | (found == 1)).all() and (found.sum(axis=1) == 1).all()
        found = found.argmax(axis=1) if one_hot else found
    if found.dtype.kind == "b":
        found = found.astype(np.uint8)
    if found.shape == (count,) and found.dtype.kind in "iu":
        return found
    whole = found.dtype.kind == "f" and bool((np.abs(found) < 2**53).all() and (found == np.rint(found)).all())
    if found.shape == (count,) and whole:
        return found.astype(np.int64)
    say(f"{name}: labels of shape {list(labels.shape)} and type {labels.dtype} are not used; expected {count} integers")
    return None


def _test_share(count: int) -> np.ndarray:
    """A mask of the images to test on.

    It is drawn from raw PCG64 output, which is the same in every version of NumPy; a permutation need not be.
    """
    draws = np.random.PCG64(0).random_raw(count)
    last = max(1, count // TEST_SHARE) - 1
    return draws <= np.partition(draws, last)[last]
