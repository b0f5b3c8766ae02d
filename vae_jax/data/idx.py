"""Folders of IDX files, the format of the original MNIST: a header of big-endian numbers, then one byte a value."""

import gzip
import io
import math
import sys
import zlib
from pathlib import Path

import numpy as np

from vae_jax.data.bounded import MAX_DEFLATE_RATIO, read_into, require_size
from vae_jax.system.errors import DataError, reason

# How the name of each file begins.
STEMS = {
    "train_images": "train-images",
    "train_labels": "train-labels",
    "test_images": "t10k-images",
    "test_labels": "t10k-labels",
}


def load(folder: Path, max_bytes: int) -> dict[str, np.ndarray]:
    """Reads the four IDX files, gzipped or not, in `folder`, `folder/raw` or `folder/*/raw`.

    Args:
      folder: A folder that torchvision or a person has filled.
      max_bytes: The most bytes that all arrays together may take in memory.

    Returns:
      `train_images` and `test_images` ([images, height, width] or [images, height, width, channels]),
      `train_labels` and `test_labels` ([images]) where there are such files.

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


def is_there(folder: Path) -> bool:
    """Whether a folder holds IDX files. Raises as `load` does, where it holds some of the four only."""
    return bool(_find(folder))


def read(
    file: io.BufferedIOBase, name: str, size: int, dims: tuple[int, ...], max_bytes: int = sys.maxsize
) -> np.ndarray:
    """Reads one IDX file of bytes, gzipped or not.

    Args:
      file: The open file, at its beginning and seekable.
      name: The file's name in messages.
      size: Length of the file in bytes.
      dims: The numbers of dimensions to accept.
      max_bytes: The most bytes that the array may take in memory.

    Raises:
      DataError: The content does not match its header, or takes more than `max_bytes`.
    """
    is_gzip = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    if not is_gzip:
        return _read(file, name, size, dims, max_bytes)
    try:
        with gzip.GzipFile(fileobj=file) as unpacked:
            return _read(unpacked, name, size * MAX_DEFLATE_RATIO, dims, max_bytes)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{name}: is a damaged gzip file ({reason(error)}); expected a complete one; get the file again"
        ) from None


def _read(file: io.BufferedIOBase, name: str, length: int, dims: tuple[int, ...], max_bytes: int) -> np.ndarray:
    """Reads an uncompressed stream of at most `length` bytes."""
    expected = " or ".join(f"0x{0x800 + ndim:08x} ({ndim} dimensions of bytes)" for ndim in dims)
    magic = _read_exactly(file, 4, name)
    if magic not in [bytes([0, 0, 8, ndim]) for ndim in dims]:
        raise DataError(
            f"{name}: begins with 0x{magic.hex()}; expected the magic number of an IDX file, {expected};"
            " check that it is the right file, and gzipped at most once"
        )
    shape = tuple(np.frombuffer(_read_exactly(file, 4 * magic[3], name), ">u4").tolist())
    require_size(name, shape, math.prod(shape), length, max_bytes)
    array = np.empty(shape, np.uint8)
    read_into(file, array, name)
    return array


def _read_exactly(file: io.BufferedIOBase, count: int, name: str) -> bytes:
    found = file.read(count)
    if len(found) < count:
        raise DataError(f"{name}: ends within its header; expected an IDX file; get the file again")
    return found


def _find(folder: Path) -> dict[str, Path]:
    """The path of each file, if there are any; the unpacked file where both exist, as torchvision leaves them."""
    for place in (folder, *sorted(folder.glob("*/raw")), folder / "raw"):
        found = {part: path for part, stem in STEMS.items() if (path := _find_part(place, part, stem))}
        missing = [stem for part, stem in STEMS.items() if part.endswith("images") and part not in found]
        if found and missing:  # labels may be missing
            raise DataError(
                f"--data {folder}: {place} holds {len(found)} of the four IDX files; add {' and '.join(missing)}"
                " (-idx3-ubyte; .gz or not)"
            )
        if found:
            return found
    return {}


def _find_part(folder: Path, part: str, stem: str) -> Path | None:
    kinds = ("idx3", "idx4") if part.endswith("images") else ("idx1",)
    # Some sources write a dot for the second dash. EMNIST's names begin with the name of the set, and say test.
    stems = (stem, f"emnist-*-{stem.replace('t10k', 'test')}")
    patterns = [
        f"{s}{dash}{kind}-ubyte{suffix}" for s in stems for suffix in ("", ".gz") for kind in kinds for dash in "-."
    ]
    found = [sorted(path for path in folder.glob(pattern) if path.is_file()) for pattern in patterns]
    paths = next((paths for paths in found if paths), [])
    if len(paths) > 1:
        raise DataError(f"--data {folder}: holds {' and '.join(path.name for path in paths)}; move one of them away")
    return paths[0] if paths else None
