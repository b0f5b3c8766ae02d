"""Sets of TensorFlow Datasets, without TensorFlow: where they lie, and a cache of their decoded arrays next to them.

What is cached is found and read here without importing tensorflow_datasets, which takes longer than the reading.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from vae_jax.data import npz
from vae_jax.system.errors import DataError
from vae_jax.system.files import replacing

SPEC = re.compile(r"tfds:(?P<name>[a-z]\w*)(?:/(?P<config>\w[\w.+-]*))?(?::(?P<version>\d+\.\d+\.\d+))?")
# Rises with every change of what the cache holds.
CACHE_VERSION = 1


def load(spec: str, data_dir: Path | None, max_bytes: int) -> dict[str, np.ndarray]:
    """Reads a set, preparing it first where it is not prepared, and leaves its arrays behind for the next time.

    A prepared copy is used as it is, the highest version where the spec names none. Splits: `train`; for testing
    `test`, or `validation` where there is no `test`.

    Args:
      spec: `tfds:NAME[/CONFIG][:VERSION]`.
      data_dir: TFDS's folder; by default that of TFDS_DATA_DIR, or ~/tensorflow_datasets.
      max_bytes: The most that all arrays together may take in memory.

    Returns:
      `train_images`, and where the set has them `train_labels`, `test_images` and `test_labels`.

    Raises:
      DataError: The set is unknown, cannot be downloaded or prepared here, or holds no images of one size.
    """
    match = SPEC.fullmatch(spec)
    if not match:
        raise DataError(
            f"--data {spec}: is no name of a TFDS set; expected tfds:NAME[/CONFIG][:VERSION],"
            " such as tfds:mnist or tfds:emnist/letters:3.1.0"
        )
    root = Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    folder = _find(root, **match.groupdict())
    arrays = folder and _read_cache(folder, max_bytes)
    if arrays:
        return arrays
    from vae_jax.data import tfds_source

    # What cannot be prepared is refused here, with nothing written.
    builder = None if folder else tfds_source.find_builder(spec, root, **match.groupdict())
    with _lock(root, match["name"]):
        # Another process may have done it all while this one waited.
        folder = _find(root, **match.groupdict()) or tfds_source.prepare(spec, builder)
        arrays = _read_cache(folder, max_bytes)
        if not arrays:
            arrays = tfds_source.read(spec, folder, max_bytes)
            _write_cache(folder, arrays)
    return arrays


def _find(root: Path, name: str, config: str | None, version: str | None) -> Path | None:
    """The folder of a prepared copy, if there is one."""
    folder = root / name
    if config is None:
        # A set with several configurations says here which one is meant by its name alone.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            config = json.loads((folder / ".config" / "metadata.json").read_bytes())["default_config_name"]
    folder = folder / config if config else folder
    versions = [folder / version] if version else folder.glob("[0-9]*.[0-9]*.[0-9]*")
    prepared = [path for path in versions if (path / "dataset_info.json").is_file()]
    return max(prepared, key=lambda path: [int(digits) for digits in re.findall(r"\d+", path.name)], default=None)


@contextlib.contextmanager
def _lock(root: Path, name: str) -> Iterator[None]:
    """Keeps other processes of ours from preparing the same set; one that waits says so."""
    import filelock

    path = root / "downloads" / f"{name}.vae_jax.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(path)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            print(f"waiting for another process that prepares tfds:{name}", flush=True)
            lock.acquire()
    except OSError:
        # A folder that we cannot write to holds prepared sets at best, which are read without a lock.
        yield
        return
    try:
        yield
    finally:
        lock.release()


def _cache_path(folder: Path) -> Path:
    """The name of the cache tells which files it was made from: a set prepared anew has another."""
    paths = sorted(path for path in folder.iterdir() if not path.name.startswith("vae_jax-"))
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    digest = hashlib.sha256(repr(files).encode()).hexdigest()[:16]
    return folder / f"vae_jax-{CACHE_VERSION}-{digest}.npz"


def _read_cache(folder: Path, max_bytes: int) -> dict[str, np.ndarray] | None:
    path = _cache_path(folder)
    if not path.is_file():
        return None
    size = path.stat().st_size
    if size > max_bytes:
        raise DataError(
            f"{path}: holds {size / 1e9:,.1f} GB; expected at most {max_bytes / 1e9:,.1f} GB; raise --max-data-gb"
        )
    try:
        return npz.load(path, size)
    except DataError as error:
        print(f"{error}; decoding the set again", flush=True)
        return None


def _write_cache(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    path = _cache_path(folder)
    try:
        with replacing(path) as part:
            np.savez(part, **arrays)  # pyright: ignore[reportArgumentType]
            for old in folder.glob("vae_jax-*.npz"):
                old.unlink()
    except OSError as error:
        print(f"{path}: not written ({error.strerror}); the next start will decode the set again", flush=True)
