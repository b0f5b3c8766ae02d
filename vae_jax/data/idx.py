"""Folders of IDX files, the format of the original MNIST: a header of big-endian numbers, then one byte a value."""

import gzip
import io
import math
import sys
import zlib
from pathlib import Path

import numpy as np

from vae_jax.system.errors import DataError, reason

# The parts of a set, by the beginning of their file's name.
STEMS = {
    "train_images": "train-images",
    "train_labels": "train-labels",
    "test_images": "t10k-images",
    "test_labels": "t10k-labels",
}
# A byte of deflated data stands for at most 1,032 bytes: what declares more than that is refused before it is read.
MAX_DEFLATE_RATIO = 1032
CHUNK = 1 << 20


def load(folder: Path, max_bytes: int) -> dict[str, np.ndarray]:
    """Reads the four IDX files, gzipped or not, in `folder`, `folder/MNIST/raw` or `folder/raw`.

    Args:
      folder: Where torchvision or a person has put the files.
      max_bytes: The most that all arrays together may take in memory.

    Returns:
      `train_images` and `test_images` ([images, height, width] or [images, height, width, channels]),
      `train_labels` and `test_labels` ([images]).

    Raises:
      DataError: A file is missing, damaged, too large, or not an IDX file of bytes.
    """
    arrays: dict[str, np.ndarray] = {}
    for part, path in _find(folder).items():
        with path.open("rb") as file:
            dims = (3, 4) if part.endswith("images") else (1,)
            arrays[part] = read(file, str(path), path.stat().st_size, dims, max_bytes)
        max_bytes -= arrays[part].nbytes
    return arrays


def read(
    file: io.BufferedIOBase, name: str, size: int, dims: tuple[int, ...], max_bytes: int = sys.maxsize
) -> np.ndarray:
    """Reads one IDX file of bytes, gzipped or not.

    Args:
      file: Open at its beginning, and seekable.
      name: What messages call it.
      size: Length of the file in bytes.
      dims: Numbers of dimensions that are welcome.
      max_bytes: The most that the array may take in memory.

    Raises:
      DataError: What the file holds is not what its header declares, or more than `max_bytes`.
    """
    packed = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    try:
        if packed:
            with gzip.GzipFile(fileobj=file) as unpacked:
                return _read(unpacked, name, size * MAX_DEFLATE_RATIO, dims, max_bytes)
        return _read(file, name, size, dims, max_bytes)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{name}: damaged gzip file ({reason(error)}); expected a whole one; get the file again"
        ) from None


def _read(file: io.BufferedIOBase, name: str, length: int, dims: tuple[int, ...], max_bytes: int) -> np.ndarray:
    """Reads what is left of `file` after decompression, which is at most `length` bytes."""
    expected = " or ".join(f"0x{0x800 + ndim:08x} ({ndim} dimensions of bytes)" for ndim in dims)
    magic = _read_exactly(file, 4, name)
    if magic not in [bytes([0, 0, 8, ndim]) for ndim in dims]:
        raise DataError(
            f"{name}: begins with 0x{magic.hex()}; expected the magic number of an IDX file, {expected};"
            " is it the right file, and unpacked only once?"
        )
    shape = tuple(np.frombuffer(_read_exactly(file, 4 * magic[3], name), ">u4").tolist())
    require_size(name, shape, math.prod(shape), length, max_bytes)
    array = np.empty(shape, np.uint8)
    read_into(file, array, name)
    return array


def require_size(name: str, shape: tuple[int, ...], nbytes: int, length: int, max_bytes: int) -> None:
    """Checks a declared size before any memory is taken for it.

    Args:
      name: What the message calls the file.
      shape: The declared shape.
      nbytes: What an array of that shape takes in memory.
      length: The most bytes that the file can hold, unpacked.
      max_bytes: The most that the array may take in memory.

    Raises:
      DataError: The array is empty, or would be too large for the file or for `max_bytes`.
    """
    if not nbytes:
        raise DataError(f"{name}: is empty (shape {list(shape)}); expected at least one value")
    if nbytes > max_bytes:
        raise DataError(
            f"{name}: declares shape {list(shape)}, {nbytes / 1e9:,.1f} GB; expected at most {max_bytes / 1e9:,.1f} GB;"
            " where the file is sound, raise --max-data-gb"
        )
    if nbytes > length:
        raise DataError(
            f"{name}: declares shape {list(shape)}, {nbytes:,} bytes, more than the file can hold ({length:,});"
            " expected a whole file; get it again"
        )


def read_into(file: io.BufferedIOBase, array: np.ndarray, name: str) -> None:
    """Fills a contiguous array with the rest of a file.

    Raises:
      DataError: The file ends too early or too late.
    """
    bytes_wanted = array.reshape(-1).view(np.uint8).data
    done = 0
    while done < len(bytes_wanted):
        count = file.readinto(bytes_wanted[done : done + CHUNK])
        if not count:
            raise DataError(
                f"{name}: ends after {done:,} bytes of values; its header declares shape {list(array.shape)},"
                f" {len(bytes_wanted):,} bytes; get the file again"
            )
        done += count
    # Reading to the end is also what makes a compressed file check its checksum.
    if file.read(1):
        raise DataError(
            f"{name}: goes on after the {len(bytes_wanted):,} bytes that its header declares (shape"
            f" {list(array.shape)}); expected it to end there; get the file again"
        )


def _read_exactly(file: io.BufferedIOBase, count: int, name: str) -> bytes:
    found = file.read(count)
    if len(found) < count:
        raise DataError(f"{name}: ends within its header; expected an IDX file; get the file again")
    return found


def _find(folder: Path) -> dict[str, Path]:
    """The path of each part; the unpacked file where both are there, as torchvision leaves them."""
    for place in (folder, folder / "MNIST" / "raw", folder / "raw"):
        found = {part: path for part, stem in STEMS.items() if (path := _find_part(place, part, stem))}
        if missing := [stem for part, stem in STEMS.items() if part not in found]:
            if found:
                raise DataError(
                    f"--data {folder}: {place} holds {len(found)} of the four IDX files;"
                    f" {' and '.join(missing)} (-idx3-ubyte or -idx1-ubyte, or the same with .gz) missing; add them"
                )
            continue
        return found
    raise DataError(
        f"--data {folder}: holds no IDX files; expected train-images-idx3-ubyte, train-labels-idx1-ubyte,"
        " t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, or the same with .gz, there or in MNIST/raw or raw"
    )


def _find_part(folder: Path, part: str, stem: str) -> Path | None:
    kinds = ("idx3", "idx4") if part.endswith("images") else ("idx1",)
    # Some sources write a dot for the second dash.
    names = [f"{stem}{dash}{kind}-ubyte{suffix}" for suffix in ("", ".gz") for kind in kinds for dash in "-."]
    return next((folder / name for name in names if (folder / name).is_file()), None)
