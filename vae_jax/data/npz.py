"""NumPy archives from any source: sizes are checked before memory is allocated, and nothing is ever unpickled."""

import io
import math
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import cast

import numpy as np

from vae_jax.data.bounded import MAX_DEFLATE_RATIO, read_into, require_size
from vae_jax.system.errors import DataError, reason

# Our names of the arrays, and those in Keras' mnist.npz.
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
        under Keras' names `x_train`, `y_train`, `x_test`, `y_test`. Other arrays are ignored.
      max_bytes: The most bytes that all arrays together may take in memory.

    Returns:
      The arrays that the file has, under our names: images as bytes (booleans become 0 and 1) or float32, labels as
      integers.

    Raises:
      DataError: The file is not an .npz file, is damaged or too large, or holds arrays of other types.
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
            f"{path}: is not a sound .npz file ({reason(error)}); expected a file written by numpy.savez or"
            " numpy.savez_compressed; write or get it again"
        ) from None


def _names(path: Path, members: dict[str, zipfile.ZipInfo]) -> dict[str, str]:
    """The name in the file of each array that it has."""
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
            f"{name}: is compressed by zip method {member.compress_type}; expected method 0 (stored) or 8 (deflated);"
            " write it with numpy.savez_compressed"
        )
    with cast(io.BufferedIOBase, archive.open(member)) as file:
        shape, fortran_order, dtype = _read_header(file, name)
        if part.endswith("images"):
            good, expected = dtype == np.uint8 or dtype.kind in "fb", "uint8, or floats in [0, 1]"
        else:
            good, expected = dtype.kind in "iu", "integers"
        if not good:
            raise DataError(f"{name}: has type {dtype}; expected {expected}")
        length = size if member.compress_type == zipfile.ZIP_STORED else size * MAX_DEFLATE_RATIO
        require_size(name, shape, math.prod(shape) * dtype.itemsize, length, max_bytes)
        array = np.empty(shape[::-1] if fortran_order else shape, dtype)
        read_into(file, array, name)
    array = array.T if fortran_order else array
    if dtype.kind == "b":
        array = (array.view(np.uint8) != 0).astype(np.uint8)
    elif dtype.kind == "f":
        # Values beyond float32's range become infinite, and are refused later for being outside [0, 1].
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
    return np.ascontiguousarray(array, array.dtype.newbyteorder("="))


def _read_header(file: io.BufferedIOBase, name: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    """The shape, whether the order is Fortran's, and the type."""
    readers = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
    try:
        version = np.lib.format.read_magic(file)[0]
        with warnings.catch_warnings():
            # NumPy warns about headers that Python 2 wrote, and reads them all the same.
            warnings.simplefilter("ignore")
            return readers[version](file)
    except (zipfile.BadZipFile, zlib.error, EOFError):
        raise
    except Exception as error:  # NumPy evaluates the header as a Python literal, so damage can raise nearly anything
        raise DataError(
            f"{name}: has no sound NumPy header ({reason(error)}); expected a NumPy array; write it again"
        ) from None
