"""Decoded arrays, kept for the next time: beside a set of TFDS, or else in the user's cache folder."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vae_jax.data import npz
from vae_jax.system.console import say
from vae_jax.system.errors import DataError
from vae_jax.system.files import replacing

# Rises with every change of the cache's content.
CACHE_VERSION = 2

Arrays = dict[str, np.ndarray]


class File(NamedTuple):
    """A file as the cache knows it: one that changes gets another size or time."""

    name: str  # below the folder of the set
    size: int
    modified: int  # nanoseconds
    changed: int  # the same, and no program can set it back

    @classmethod
    def of(cls, name: str, status: os.stat_result) -> "File":
        return cls(name, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def cached(folder: Path, prefix: str, fingerprint: object, decode: Callable[[], Arrays], max_bytes: int) -> Arrays:
    """The arrays in the cache in `folder`, or else those that `decode` returns, which are then cached.

    Args:
      folder: A folder for the cache alone, or shared with other files.
      prefix: How the names of all caches of the same set begin, in this folder; those out of date are removed.
      fingerprint: Identifies the files that `decode` reads, by values that JSON can hold; a cache with another one is
        out of date.
      decode: Decodes the files.
      max_bytes: The most bytes that all arrays together may take in memory.

    Raises:
      DataError: The cached arrays take more than `max_bytes`; or any error of `decode`. A cache that cannot be read or
        written is no error but one line.
    """
    path = folder / f"{prefix}{CACHE_VERSION}-{_digest(fingerprint)}.npz"
    if path.is_file():
        size = path.stat().st_size
        if size > max_bytes:
            raise DataError(
                f"{path}: holds {size / 1e9:,.1f} GB; expected at most {max_bytes / 1e9:,.1f} GB; raise --max-data-gb"
            )
        try:
            return npz.load(path, size)
        except DataError as error:
            say(f"{error}; decoding the set again")
        except OSError as error:
            say(f"{path}: cannot be read ({error.strerror}); decoding the set again")
    arrays = decode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            np.savez(part, **arrays)  # pyright: ignore[reportArgumentType]
            for outdated in folder.glob(f"{prefix}*.npz"):
                outdated.unlink(missing_ok=True)
    except OSError as error:
        say(f"{path}: not written ({error.strerror}); the next start will decode the set again")
    return arrays


def cached_for_user(
    source: Path, options: object, files: Sequence[File], decode: Callable[[], Arrays], max_bytes: int
) -> Arrays:
    """`cached` in `$XDG_CACHE_HOME/vae_jax`, or else `~/.cache/vae_jax`; nothing is written beside the user's files.

    Args:
      source: The file or folder that the user has named.
      options: What else decides the arrays, values that JSON can hold; there is one cache for each.
      files: All files that `decode` reads.
      decode: Decodes the files.
      max_bytes: The most bytes that all arrays together may take in memory.
    """
    # As the XDG base directory specification has it, a path that is not absolute does not count.
    home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    home = home if home.is_absolute() else Path(os.path.expanduser("~/.cache"))  # noqa: PTH111 (see config)
    if not home.is_absolute():
        say(
            f"{source}: there is no home folder to cache it in, set XDG_CACHE_HOME; the next start will decode it again"
        )
        return decode()
    prefix = f"{_digest((str(source.resolve()), options))}-"
    return cached(home / "vae_jax", prefix, list(files), decode, max_bytes)


def _digest(value: object) -> str:
    """A name for a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
