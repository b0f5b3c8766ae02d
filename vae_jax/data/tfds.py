"""Sets of TensorFlow Datasets by name, without TensorFlow where possible, and a cache of their decoded arrays.

Finding and reading the cache imports neither tensorflow_datasets nor a downloader: those take longer than the reading.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vae_jax.data import mnist_family, npz
from vae_jax.system.console import say
from vae_jax.system.errors import DataError
from vae_jax.system.files import replacing

SPEC = re.compile(r"tfds:(?P<name>[a-z]\w*)(?:/(?P<config>\w[\w.+-]*))?(?::(?P<version>\d+\.\d+\.\d+))?")
# Rises with every change of the cache's content.
CACHE_VERSION = 1


def load(spec: str, data_dir: Path | None, max_bytes: int) -> dict[str, np.ndarray]:
    """Reads a set, downloading it first if necessary, and caches its decoded arrays for the next time.

    A copy that TFDS has prepared (as array_record) comes first, its images in the order of its records, which TFDS
    has shuffled; the highest version unless the spec names one. Sets of the MNIST family that are not prepared are
    decoded from their original files, in the order of the files. Other sets are prepared by TFDS if TensorFlow is
    installed. Images come from the split `train`; test images from `test`, or `validation` if there is no `test`.

    Args:
      spec: `tfds:NAME[/CONFIG][:VERSION]`.
      data_dir: TFDS's folder; by default TFDS_DATA_DIR, or else ~/tensorflow_datasets.
      max_bytes: The most bytes that all arrays together may take in memory.

    Returns:
      `train_images`, and `train_labels`, `test_images` and `test_labels` if the set has them.

    Raises:
      DataError: The set is unknown, cannot be downloaded or prepared here, or does not hold images of one size.
    """
    match = SPEC.fullmatch(spec)
    if not match:
        raise DataError(
            f"--data {spec}: does not name a TFDS set; expected tfds:NAME[/CONFIG][:VERSION],"
            " such as tfds:mnist or tfds:emnist/letters:3.1.0"
        )
    name, config, version = match.groups()
    root = Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    folder = _find_prepared(root, name, config, version)
    if folder is None and name in mnist_family.SETS:
        return _load_originals(spec, root, name, config, version, max_bytes)
    if folder is None:
        from vae_jax.data import prepared

        folder = prepared.prepare(spec, root, name, config, version)
    return _load_prepared(spec, folder, max_bytes)


def _find_prepared(root: Path, name: str, config: str | None, version: str | None) -> Path | None:
    """The folder of a prepared copy, if there is any."""
    folder = root / name
    if config is None:
        # A set with several configurations notes here which is the default.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            config = json.loads((folder / ".config" / "metadata.json").read_bytes())["default_config_name"]
    folder = folder / config if config else folder
    versions = [folder / version] if version else folder.glob("[0-9]*.[0-9]*.[0-9]*")
    prepared = [path for path in versions if (path / "dataset_info.json").is_file()]
    return max(prepared, key=lambda path: [int(digits) for digits in re.findall(r"\d+", path.name)], default=None)


def _load_prepared(spec: str, folder: Path, max_bytes: int) -> dict[str, np.ndarray]:
    def decode() -> dict[str, np.ndarray]:
        from vae_jax.data import prepared

        return prepared.read(spec, folder, max_bytes)

    # A copy that is prepared again gets another fingerprint.
    paths = sorted(path for path in folder.iterdir() if not path.name.startswith("vae_jax-"))
    return _cached(
        folder, [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths], decode, max_bytes
    )


def _load_originals(
    spec: str, root: Path, name: str, config: str | None, version: str | None, max_bytes: int
) -> dict[str, np.ndarray]:
    source, config = mnist_family.find(spec, name, config, version)
    folder = root / "downloads" / name

    def decode() -> dict[str, np.ndarray]:
        from vae_jax.data import downloads

        downloads.fetch(spec, source.url, source.sha256, folder)
        return mnist_family.decode(name, config, folder, max_bytes)

    return _cached(folder / config, source.sha256, decode, max_bytes)


def _cached(
    folder: Path, fingerprint: object, decode: Callable[[], dict[str, np.ndarray]], max_bytes: int
) -> dict[str, np.ndarray]:
    """The arrays in the cache in `folder`, or else those that `decode` returns, which are then cached.

    Args:
      folder: A folder for the cache alone or shared with the files that it was decoded from.
      fingerprint: Identifies those files; a cache with another fingerprint is out of date.
      decode: Decodes the files.
      max_bytes: The most bytes that all arrays together may take in memory.
    """
    digest = hashlib.sha256(repr(fingerprint).encode()).hexdigest()[:16]
    path = folder / f"vae_jax-{CACHE_VERSION}-{digest}.npz"
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
    arrays = decode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            np.savez(part, **arrays)  # pyright: ignore[reportArgumentType]
            for outdated in folder.glob("vae_jax-*.npz"):
                outdated.unlink()
    except OSError as error:
        say(f"{path}: not written ({error.strerror}); the next start will decode the set again")
    return arrays
