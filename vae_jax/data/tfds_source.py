"""TFDS itself, kept from needing TensorFlow and from waiting for a network that is not there: prepare a set, read one.

tensorflow_datasets 4.9 needs TensorFlow to unpack archives, to open files and to write PNG images from arrays. The
builders of the MNIST family get their files packed, as they were downloaded, and examples from our readers, whose
images are Pillow's, which TFDS can write by itself. All the rest is TFDS's own: downloader, checksums, folders, format.
"""

import contextlib
import difflib
import importlib.util
import io
import logging
import math
import shutil
import sys
import threading
import time
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import numpy as np
import requests
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.download import checksums, download_manager, downloader
from tqdm import tqdm

from vae_jax.data import idx
from vae_jax.system import signals
from vae_jax.system.errors import DataError, reason

# Seconds until a connection must stand, and of silence before it counts as broken.
TIMEOUT = (5, 30)
# Seconds for the first answer of a host, the search for its address included.
REACH_SECONDS = 8
# TFDS's own ten retries take 200 seconds.
RETRIES = 2
OFFLINE = "offline there are --data mnist (bundled), --data FOLDER (IDX files), and --data-dir (a prepared copy)"


def find_builder(spec: str, root: Path, name: str, config: str | None, version: str | None) -> Any:
    """TFDS's builder of a set; one of the MNIST family is given what it otherwise needs TensorFlow for.

    Args:
      spec: What messages call the set.
      root: TFDS's folder.
      name: The set.
      config: Its configuration; None for the default one.
      version: Its version; None for the newest one.

    Raises:
      DataError: TFDS does not know the set, or cannot prepare it without TensorFlow.
    """
    try:
        builder_class = tfds.builder_cls(name)
    except tfds.core.DatasetNotFoundError:
        near = difflib.get_close_matches(name, tfds.list_builders(with_community_datasets=False))
        hint = f"perhaps {' or '.join(near)}" if near else "https://www.tensorflow.org/datasets/catalog lists them"
        raise DataError(f"--data {spec}: TFDS knows no set {name}; {hint}") from None
    if name not in EXAMPLES and importlib.util.find_spec("tensorflow") is None:
        raise DataError(
            f"--data {spec}: preparing it needs TensorFlow, which is not installed; pip install tensorflow, or name in"
            f" --data-dir a copy prepared as array_record; {', '.join(EXAMPLES)} are prepared without"
        )
    try:
        builder: Any = builder_class(data_dir=root, config=config, version=version)
    except (AssertionError, ValueError) as error:
        configs = f"; its configurations: {', '.join(builder_class.builder_configs)}" if config else ""
        raise DataError(f"--data {spec}: {reason(_root_cause(error))}{configs}") from None
    if name in EXAMPLES:
        split_generators = builder._split_generators
        builder._split_generators = lambda dl_manager: split_generators(_Packed(dl_manager))
        builder._generate_examples = EXAMPLES[name]
    return builder


def prepare(spec: str, builder: Any) -> Path:
    """Downloads a set, verifies its checksums, and prepares it as array_record.

    Args:
      spec: What messages call it.
      builder: Of `find_builder`.

    Returns:
      The folder of the prepared copy.

    Raises:
      DataError: The set cannot be downloaded or prepared; nothing half-done is left.
    """
    root, target = Path(builder.data_dir_root), Path(builder.data_dir)
    downloads = root / "downloads" / builder.name
    before = _partial_downloads(downloads)
    try:
        # TFDS's lines on standard output would repeat what its progress bars say.
        with signals.raise_on_signal(), _quiet(), _impatient(spec), contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(
                file_format="array_record",
                download_config=tfds.download.DownloadConfig(force_checksums_validation=True),
            )
    except DataError:
        raise
    except download_manager.NonMatchingChecksumError as error:
        url = next(word for word in str(error).split() if "://" in word).rstrip(",")
        raise DataError(
            f"--data {spec}: {url} arrived with a wrong checksum and was thrown away; expected the file that TFDS"
            f" knows; try again later; {OFFLINE}"
        ) from None
    except (requests.RequestException, tfds.download.DownloadError) as error:
        raise DataError(
            f"--data {spec}: the download broke off ({reason(_root_cause(error))}); try again; {OFFLINE}"
        ) from None
    except Exception as error:  # a builder can run into anything, from a full disk to a page that is gone
        raise DataError(
            f"--data {spec}: TFDS could not prepare it in {root} ({reason(_root_cause(error))}); {OFFLINE}"
        ) from error
    finally:
        for folder in _partial_downloads(downloads) - before:
            shutil.rmtree(folder, ignore_errors=True)
        for folder in (downloads, target.parent):
            with contextlib.suppress(OSError):  # that it is not empty, when all went well
                folder.rmdir()
    print(f"{spec}: prepared in {target}", flush=True)
    return target


def read(spec: str, folder: Path, max_bytes: int) -> dict[str, np.ndarray]:
    """Decodes a prepared copy, record by record.

    Args:
      spec: What messages call it.
      folder: The prepared copy, of any set that has images.
      max_bytes: The most that all arrays together may take in memory.

    Returns:
      `train_images`, and where the set has them `train_labels`, `test_images` and `test_labels`.

    Raises:
      DataError: The copy is no array_record one, is damaged or too large, or holds no images of one size.
    """
    try:
        with _quiet():
            builder = tfds.builder_from_directory(folder)
            formats = sorted(file_format.value for file_format in builder.info.available_file_formats())
            if "array_record" not in formats:
                raise DataError(
                    f"--data {spec}: {folder} is prepared as {' and '.join(formats)}; expected array_record, which can"
                    " be read without TensorFlow; name another --data-dir, or move that folder away"
                )
            splits = builder.info.splits
            if "train" not in splits:
                raise DataError(f"--data {spec}: has the splits {sorted(splits)}; expected train among them")
            test = next((split for split in ("test", "validation") if split in splits), None)
            arrays = {}
            for part, split in (("train", "train"), ("test", test)):
                if split:
                    arrays |= _read_split(spec, builder, split, part, max_bytes)
                    max_bytes -= arrays[f"{part}_images"].nbytes
            return arrays
    except DataError:
        raise
    except Exception as error:  # a damaged copy can break TFDS anywhere
        raise DataError(
            f"--data {spec}: the copy in {folder} cannot be read ({reason(_root_cause(error))}); expected what"
            " TFDS prepared; delete that folder and start again"
        ) from error


def _read_split(spec: str, builder: Any, split: str, part: str, max_bytes: int) -> dict[str, np.ndarray]:
    features = dict(builder.info.features.items())
    images = [key for key, feature in features.items() if isinstance(feature, tfds.features.Image)]
    key = "image" if "image" in images else images[0] if len(images) == 1 else None
    if not key or features[key].np_dtype not in (np.uint8, np.float32):
        raise DataError(f"--data {spec}: has the features {features}; expected one of 8-bit or float images")
    source = builder.as_data_source(split)
    has_labels = isinstance(features.get("label"), tfds.features.ClassLabel)
    labels = np.empty(len(source), np.int32)
    array = None
    for number, example in enumerate(tqdm(source, desc=f"reading {split}", leave=False, disable=None)):
        image = example[key]
        if array is None:
            shape = (len(source), *image.shape)
            idx.require_size(
                f"--data {spec}: {split}", shape, math.prod(shape) * image.itemsize, sys.maxsize, max_bytes
            )
            array = np.empty(shape, image.dtype)
        if image.shape != array.shape[1:]:
            raise DataError(
                f"--data {spec}: {split} image {number} has shape {list(image.shape)}, the first one"
                f" {list(array.shape[1:])}; expected images of one size"
            )
        array[number] = image
        if has_labels:
            labels[number] = example["label"]
    if array is None:
        raise DataError(f"--data {spec}: {split} is empty; expected images")
    # Bytes where they are enough, as the other sources have them.
    labels = labels.astype(np.min_scalar_type(labels.max()))
    return {f"{part}_images": array} | ({f"{part}_labels": labels} if has_labels else {})


class _Packed:
    """Stands for TFDS's download manager before a builder: archives stay packed, for our readers to look into."""

    def __init__(self, dl_manager: tfds.download.DownloadManager):
        self._dl_manager = dl_manager

    def download(self, urls: Any) -> Any:
        paths = self._dl_manager.download(urls)
        for path in paths.values() if isinstance(paths, dict) else [paths]:
            # TFDS takes a file that it finds from an earlier download at its name.
            expected, found = downloader.read_url_info(path), checksums.compute_url_info(path)
            if (found.size, found.checksum) != (expected.size, expected.checksum):
                raise DataError(
                    f"{path}: has {int(found.size):,} bytes of checksum {found.checksum[:12]}; expected"
                    f" {int(expected.size):,} of {expected.checksum[:12]}, as downloaded; delete it and start again"
                )
        return paths

    download_and_extract = download

    def extract(self, paths: Any) -> Any:
        return paths


def _idx_examples(num_examples: int, data_path: Any, label_path: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """The examples of a pair of IDX files, as the builders of MNIST, Fashion-MNIST, KMNIST and EMNIST make them."""
    images, labels = _read_idx(Path(data_path), 3), _read_idx(Path(label_path), 1)
    for number in range(num_examples):
        yield number, {"image": Image.fromarray(images[number]), "label": int(labels[number])}


def _read_idx(path: Path, dims: int) -> np.ndarray:
    if path.is_file():
        with path.open("rb") as file:
            return idx.read(file, str(path), path.stat().st_size, (dims,))
    # EMNIST's are in an archive, which the builder thinks is a folder by now.
    archive_path, member = path.parent.parent, f"{path.parent.name}/{path.name}"
    with zipfile.ZipFile(archive_path) as archive, cast(io.BufferedIOBase, archive.open(member)) as file:
        return idx.read(file, str(path), archive.getinfo(member).file_size, (dims,))


def _amat_examples(data_path: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """The examples of a file of binarized MNIST: lines of 784 digits 0 or 1, with spaces between them."""
    digits = np.frombuffer(Path(data_path).read_bytes(), np.uint8)[::2] - ord("0")
    for number, image in enumerate(digits.reshape(-1, 28, 28)):
        yield number, {"image": Image.fromarray(image)}


EXAMPLES = {
    "mnist": _idx_examples,
    "fashion_mnist": _idx_examples,
    "kmnist": _idx_examples,
    "emnist": _idx_examples,
    "binarized_mnist": _amat_examples,
}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No warnings of libraries about what is reported anyway; no progress bars where nobody looks on."""
    loggers = [logging.getLogger(name) for name in ("absl", "urllib3")]
    levels = [logger.level for logger in loggers]
    show_bars = sys.stderr.isatty()
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        if not show_bars:
            tfds.disable_progress_bar()
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if not show_bars:
            tfds.enable_progress_bar()


@contextlib.contextmanager
def _impatient(spec: str) -> Iterator[None]:
    """Has TFDS's downloader give up soon: on a host that does not answer, on silence, and once one file has failed.

    On leaving, no download is under way.
    """
    retries, open_url = downloader.MAX_RETRIES, downloader._open_url
    stopped = threading.Event()
    running: set[threading.Thread] = set()

    def until_stopped(blocks: Iterable[bytes]) -> Iterator[bytes]:
        for block in blocks:
            if stopped.is_set():
                raise OSError("stopped")
            yield block

    @contextlib.contextmanager
    def open_url_soon(url: str, **kwargs: Any) -> Iterator[tuple[Any, Iterator[bytes]]]:
        running.add(threading.current_thread())
        try:
            if not stopped.is_set():
                _require_reachable(spec, url)
            with open_url(url, timeout=TIMEOUT, **kwargs) as (response, blocks):
                yield response, until_stopped(blocks)
        finally:
            running.discard(threading.current_thread())

    downloader.MAX_RETRIES, downloader._open_url = RETRIES, open_url_soon
    try:
        yield
    finally:
        stopped.set()
        while running:
            time.sleep(0.01)
        downloader.MAX_RETRIES, downloader._open_url = retries, open_url


def _require_reachable(spec: str, url: str) -> None:
    """Asks for the header of a file.

    Raises:
      DataError: No answer came in time. An answer that is an error is one: what it means is for the downloader to say.
    """
    outcome: list[Exception | None] = []

    def ask() -> None:
        try:
            requests.head(url, timeout=TIMEOUT[0]).close()
            outcome.append(None)
        except Exception as error:
            outcome.append(error)

    # In a thread that nobody waits for in the end: looking up an address knows no timeout.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(REACH_SECONDS)
    error = outcome[0] if outcome else TimeoutError(f"no answer within {REACH_SECONDS} seconds")
    if error:
        raise DataError(
            f"--data {spec}: {urlsplit(url).hostname} cannot be reached ({reason(_root_cause(error))}), wanted"
            f" {url}; {OFFLINE}"
        )


def _partial_downloads(downloads: Path) -> set[Path]:
    return set(downloads.glob("**/*.tmp.*"))


def _root_cause(error: BaseException) -> BaseException:
    while inner := error.__cause__ or error.__context__:
        error = inner
    return error
