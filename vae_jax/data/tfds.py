"""Sets of TensorFlow Datasets by name, without TensorFlow where possible.

Finding and reading the cache imports neither tensorflow_datasets nor a downloader: those take longer than the reading.
"""

import contextlib
import json
import os
import re
from pathlib import Path

import numpy as np

from vae_jax.data import mnist_family
from vae_jax.data.cache import File, cached
from vae_jax.system.errors import DataError

SPEC = re.compile(r"tfds:(?P<name>[a-z]\w*)(?:/(?P<config>\w[\w.+-]*))?(?::(?P<version>[\w.+*-]+))?")
# How the names of the caches begin.
PREFIX = "vae_jax-"


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
    prepared_here = _find_prepared(root, name, config)
    folder = prepared_here.get(version) if version else next(iter(prepared_here.values()), None)
    if folder is None and version:
        _require_version(spec, name, version, list(prepared_here))
    if folder is None and name in mnist_family.SETS:
        return _load_originals(spec, root, name, config, max_bytes)
    if folder is None:
        from vae_jax.data import prepared

        folder = prepared.prepare(spec, root, name, config, version)
    return _load_prepared(spec, folder, max_bytes)


def _find_prepared(root: Path, name: str, config: str | None) -> dict[str, Path]:
    """The folder of each version that is prepared, the highest version first."""
    folder = root / name
    if config is None:
        # A set with several configurations notes here which is the default.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            config = json.loads((folder / ".config" / "metadata.json").read_bytes())["default_config_name"]
    folder = folder / config if config else folder
    prepared = [path for path in folder.glob("[0-9]*.[0-9]*.[0-9]*") if (path / "dataset_info.json").is_file()]
    prepared.sort(key=lambda path: [int(digits) for digits in re.findall(r"\d+", path.name)], reverse=True)
    return {path.name: path for path in prepared}


def _require_version(spec: str, name: str, version: str, prepared_here: list[str]) -> None:
    """Refuses a version that is neither prepared nor can be had, and names those that are there."""
    if name in mnist_family.SETS:
        known = [mnist_family.SETS[name].version]
    else:
        from vae_jax.data import prepared

        known = prepared.versions(spec, name)
    if version not in known:
        here = f"{' and '.join(prepared_here)} in --data-dir" if prepared_here else "no version in --data-dir"
        raise DataError(
            f"--data {spec}: {name} has no version {version}; TFDS has {' and '.join(known)}, and there is {here};"
            f" name one of these, or write tfds:{name} for the newest"
        )


def _load_prepared(spec: str, folder: Path, max_bytes: int) -> dict[str, np.ndarray]:
    def decode() -> dict[str, np.ndarray]:
        from vae_jax.data import prepared

        return prepared.read(spec, folder, max_bytes)

    # A copy that is prepared again gets another fingerprint.
    paths = sorted(path for path in folder.iterdir() if not path.name.startswith(PREFIX))
    # Its files may be moved or copied with their times.
    fingerprint = [File.of(path.name, path.stat())[:3] for path in paths]
    return cached(folder, PREFIX, fingerprint, decode, max_bytes)


def _load_originals(spec: str, root: Path, name: str, config: str | None, max_bytes: int) -> dict[str, np.ndarray]:
    source, config = mnist_family.find(spec, name, config)
    folder = root / "downloads" / name

    def decode() -> dict[str, np.ndarray]:
        from vae_jax.data import downloads

        downloads.fetch(spec, source.url, source.sha256, folder)
        return mnist_family.decode(name, config, folder, max_bytes)

    return cached(folder / config, PREFIX, source.sha256, decode, max_bytes)
