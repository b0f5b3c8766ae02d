"""NumPy archives from anywhere: sizes are checked before memory is taken, and nothing is ever unpickled."""

import io
import math
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import cast

import numpy as np

from vae_jax.system.errors import DataError, reason
from vae_jax.data.idx import MAX_DEFLATE_RATIO, read_into, require_size

# The names of the arrays: ours, and those of Keras' mnist.npz.
KEYS = {
    "train_images": "x_train",
    "train_labels": "y_train",
    "test_images": "x_test",
    "test_labels": "y_test",
}


def load(path: Path, max_bytes: int) -> dict[str, np.ndarray]:
    """Reads the arrays of an image set.

    Args:
      path: An .npz file with `train_images` and perhaps `train_labels`, `test_images`, `test_labels`, or with the same
        under Keras' names `x_train`, `y_train`, `x_test`, `y_test`. Other arrays are not looked at.
      max_bytes: The most that all arrays together may take in memory.

    Returns:
      The arrays that are there, under our names: images of bytes (0 and 1 for booleans) or
      float32, labels of whole numbers.

    Raises:
      DataError: The file is no .npz file, is damaged, declares too much, or holds other types.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
            names = _names(path, members)
            size = path.stat().st_size
            arrays = {}
            for part, name in names.items():
                arrays[part] = _read(archive, members[name], f"{path}: array {name}", part, size, max_bytes)
                max_bytes -= arrays[part].nbytes
            return arrays
    except DataError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise DataError(
            f"{path}: is no sound .npz file ({reason(error)}); expected one that numpy.savez or"
            " numpy.savez_compressed wrote; write or get it again"
        ) from None


def _names(path: Path, members: dict[str, zipfile.ZipInfo]) -> dict[str, str]:
    """The name in the file of each part that is there."""
    for names in ({part: part for part in KEYS}, KEYS):
        if names["train_images"] in members:
            return {part: name for part, name in names.items() if name in members}
    found = repr(sorted(members)[:8])[:200]
    raise DataError(
        f"{path}: holds the arrays {found}; expected train_images, and perhaps train_labels, test_images,"
        " test_labels (or Keras' x_train, y_train, x_test, y_test)"
    )


def _read(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str, part: str, size: int, max_bytes: int
) -> np.ndarray:
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataError(
            f"{name}: is packed by method {member.compress_type}; expected what NumPy writes: stored, or deflated"
        )
    with cast(io.BufferedIOBase, archive.open(member)) as file:
        shape, fortran_order, dtype = _read_header(file, name)
        if part.endswith("images"):
            good, expected = dtype == np.uint8 or dtype.kind in "fb", "uint8, or floats in [0, 1]"
        else:
            good, expected = dtype.kind in "iu", "whole numbers"
        if not good:
            raise DataError(f"{name}: has type {dtype}; expected {expected}")
        packed = size if member.compress_type == zipfile.ZIP_STORED else size * MAX_DEFLATE_RATIO
        require_size(name, shape, math.prod(shape) * dtype.itemsize, packed, max_bytes)
        array = np.empty(shape[::-1] if fortran_order else shape, dtype)
        read_into(file, array, name)
    array = array.T if fortran_order else array
    if dtype.kind == "b":
        array = (array.view(np.uint8) != 0).astype(np.uint8)
    elif dtype.kind == "f":
        # Out of float32's range is out of [0, 1] too, and refused as that.
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
    return np.ascontiguousarray(array, array.dtype.newbyteorder("="))


def _read_header(file: io.BufferedIOBase, name: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    """The shape, whether it is in Fortran's order, and the type."""
    readers = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
    try:
        version = np.lib.format.read_magic(file)[0]
        with warnings.catch_warnings():
            # Python 2 wrote its numbers in another way; they are read all the same.
            warnings.simplefilter("ignore")
            return readers[version](file)
    except (zipfile.BadZipFile, zlib.error, EOFError):
        raise
    except Exception as error:  # NumPy evaluates the header as a Python literal: a damaged one can break that anywhere
        raise DataError(
            f"{name}: has no sound NumPy header ({reason(error)}); expected an array; write it again"
        ) from None
