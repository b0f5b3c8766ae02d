"""Reading arrays from files that may be damaged or hostile: sizes are checked before memory is allocated."""

import io

import numpy as np

from vae_jax.system.errors import DataError

# Deflate, which gzip and zip use, packs at most this many bytes into one: a file that declares more is damaged.
MAX_DEFLATE_RATIO = 1032
CHUNK = 1 << 20


def require_size(name: str, shape: tuple[int, ...], nbytes: int, length: int, max_bytes: int) -> None:
    """Checks a declared size before memory is allocated for it.

    Args:
      name: The file's name in messages.
      shape: The declared shape.
      nbytes: Memory that an array of that shape takes, in bytes.
      length: The most bytes that the file can hold, uncompressed.
      max_bytes: The most bytes that the array may take in memory.

    Raises:
      DataError: The array is empty, or too large for the file or for `max_bytes`.
    """
    if not nbytes:
        raise DataError(f"{name}: is empty (shape {list(shape)}); expected at least one value")
    if nbytes > max_bytes:
        raise DataError(
            f"{name}: declares shape {list(shape)}, {nbytes / 1e9:,.1f} GB; expected at most {max_bytes / 1e9:,.1f} GB;"
            " if the file is sound, raise --max-data-gb"
        )
    if nbytes > length:
        raise DataError(
            f"{name}: declares shape {list(shape)}, {nbytes:,} bytes, more than the file can hold ({length:,});"
            " expected a complete file; get it again"
        )


def read_into(file: io.BufferedIOBase, array: np.ndarray, name: str) -> None:
    """Fills a contiguous array with the rest of a file.

    Raises:
      DataError: The file ends too early or too late.
    """
    memory = array.reshape(-1).view(np.uint8).data
    done = 0
    while done < len(memory):
        count = file.readinto(memory[done : done + CHUNK])
        if not count:
            raise DataError(
                f"{name}: ends after {done:,} bytes of values; expected {len(memory):,} bytes, as its header declares"
                f" (shape {list(array.shape)}); get the file again"
            )
        done += count
    # A compressed file checks its checksum only when it is read to its end.
    if file.read(1):
        raise DataError(
            f"{name}: continues after {len(memory):,} bytes of values; expected it to end there, as its header declares"
            f" (shape {list(array.shape)}); get the file again"
        )
