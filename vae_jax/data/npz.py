"""NumPy archives from any source: sizes are checked before memory is allocated, and nothing is ever unpickled."""

import contextlib
import io
import math
import struct
import sys
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import numpy as np

from vae_jax.data.bounded import MAX_DEFLATE_RATIO, read_into, require_size
from vae_jax.data.mapped import MappedImages
from vae_jax.system.console import say
from vae_jax.system.errors import DataError, reason

# Our names of the arrays, and those in Keras' mnist.npz.
KEYS = {
    "train_images": "x_train",
    "train_labels": "y_train",
    "test_images": "x_test",
    "test_labels": "y_test",
}


class ObjectsError(DataError):
    """An array holds Python objects."""


def load(path: Path, max_bytes: int) -> dict[str, np.ndarray]:
    """Reads the arrays of an image set.

    Args:
      path: An .npz file with `train_images` and perhaps `train_labels`, `test_images`, `test_labels`, or with the same
        under Keras' names `x_train`, `y_train`, `x_test`, `y_test`, whose other arrays are ignored; or an .npy file
        with the training images alone.
      max_bytes: The most bytes that all arrays together may take in memory.

    Returns:
      The arrays that the file has, under our names, in the machine's byte order.

    Raises:
      DataError: The file is not an .npz file, is damaged or too large, or its images are Python objects.
    """
    size = path.stat().st_size
    with _explain_damage(path):
        with path.open("rb") as file:
            if file.read(6) == b"\x93NUMPY":
                file.seek(0)
                return {"train_images": _read(file, str(path), size, max_bytes)}
        if path.suffix.lower() == ".npy" and not zipfile.is_zipfile(path):
            raise DataError(
                f"{path}: is not an .npy file; expected a file written by numpy.save; write or get it again"
            )
        with zipfile.ZipFile(path) as archive:
            members = _members(archive)
            arrays = {}
            for part, name in _names(path, members).items():
                try:
                    arrays[part] = _read_member(archive, members[name], f"{path}: array {name}", size, max_bytes)
                except ObjectsError as error:
                    if part.endswith("images"):
                        raise
                    say(f"{error}; not used")
                    continue
                max_bytes -= arrays[part].nbytes
            return arrays


def load_array(path: Path, names: Sequence[str], max_bytes: int) -> np.ndarray:
    """Reads one array: the first of these names that an .npz has, or that of an .npy.

    Raises:
      DataError: The file has no such array, is damaged or too large, or holds Python objects.
    """
    size = path.stat().st_size
    with _explain_damage(path):
        with path.open("rb") as file:
            if file.read(6) == b"\x93NUMPY":
                file.seek(0)
                return _read(file, str(path), size, max_bytes)
        with zipfile.ZipFile(path) as archive:
            members = _members(archive)
            name = next((name for name in names if name in members), None)
            if name is None:
                raise DataError(f"{path}: holds the arrays {sorted(members)!r:.200}; expected {' or '.join(names)}")
            return _read_member(archive, members[name], f"{path}: array {name}", size, max_bytes)


def map_images(path: Path, max_bytes: int) -> dict[str, np.ndarray | MappedImages] | None:
    """The arrays of `load`, whose images stay in the file; None if they cannot.

    Images can stay if they are bytes or float32 in the machine's byte order, in C order, and not compressed.

    Args:
      path: An .npy or .npz file.
      max_bytes: The most bytes that all labels together may take in memory.

    Raises:
      DataError: As `load`.
    """
    size = path.stat().st_size
    with _explain_damage(path), path.open("rb") as file:
        if file.read(6) == b"\x93NUMPY":
            images = _map(path, file, 0, size)
            return None if images is None else {"train_images": images}
        arrays: dict[str, np.ndarray | MappedImages] = {}
        with zipfile.ZipFile(path) as archive:
            members = _members(archive)
            for part, name in _names(path, members).items():
                member = members[name]
                if part.endswith("images"):
                    stored = member.compress_type == zipfile.ZIP_STORED
                    file.seek(member.header_offset + 26)  # the lengths of the name and of what follows it
                    skip = 30 + sum(struct.unpack("<HH", file.read(4)))
                    images = _map(path, file, member.header_offset + skip, size) if stored else None
                    if images is None:
                        return None
                    arrays[part] = images
                    continue
                try:
                    labels = _read_member(archive, member, f"{path}: array {name}", size, max_bytes)
                except ObjectsError as error:
                    say(f"{error}; not used")
                    continue
                arrays[part] = labels
                max_bytes -= labels.nbytes
        return arrays


def _map(path: Path, file: io.BufferedIOBase, start: int, size: int) -> MappedImages | None:
    file.seek(start)
    shape, fortran_order, dtype = _read_header(file, str(path))
    if fortran_order or not dtype.isnative or dtype not in (np.uint8, np.float32) or not 2 <= len(shape) <= 4:
        return None
    offset = file.tell()
    require_size(str(path), shape, math.prod(shape) * dtype.itemsize, size - offset, sys.maxsize)
    return MappedImages(path, offset, dtype, shape)


@contextlib.contextmanager
def _explain_damage(path: Path) -> Iterator[None]:
    """Turns what a damaged archive raises into a DataError."""
    try:
        yield
    except DataError:
        raise
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, ValueError) as error:
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


def _members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The arrays in an archive by name."""
    return {member.filename.removesuffix(".npy"): member for member in archive.infolist()}


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str, size: int, max_bytes: int) -> np.ndarray:
    """Reads an array of an archive of `size` bytes."""
    length = size if member.compress_type == zipfile.ZIP_STORED else size * MAX_DEFLATE_RATIO
    with _open(archive, member, name) as file:
        return _read(file, name, length, max_bytes)


def _open(archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str) -> io.BufferedIOBase:
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataError(
            f"{name}: is compressed by zip method {member.compress_type}; expected method 0 (stored) or 8 (deflated);"
            " write it with numpy.savez_compressed"
        )
    return cast(io.BufferedIOBase, archive.open(member))


def _read(file: io.BufferedIOBase, name: str, length: int, max_bytes: int) -> np.ndarray:
    """Reads an array whose values take at most `length` bytes in the file."""
    shape, fortran_order, dtype = _read_header(file, name)
    if dtype.hasobject:
        raise ObjectsError(f"{name}: holds Python objects, which are never unpickled; expected an array of numbers")
    require_size(name, shape, math.prod(shape) * dtype.itemsize, length, max_bytes)
    array = np.empty(shape[::-1] if fortran_order else shape, dtype)
    read_into(file, array, name)
    if dtype.kind == "b":
        array = array.view(np.uint8) != 0  # a damaged file may hold other bytes than 0 and 1
    array = array.T if fortran_order else array
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
