"""Copies that TFDS has prepared: reads those in the array_record format, and has TFDS prepare what is not there yet.

Reading needs no TensorFlow; preparing does.
"""

import difflib
import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from vae_jax.data.bounded import require_size
from vae_jax.data.downloads import OFFLINE, require_reachable, root_cause
from vae_jax.data.mnist_family import SETS
from vae_jax.system import signals
from vae_jax.system.console import say
from vae_jax.system.errors import DataError, reason


def prepare(spec: str, root: Path, name: str, config: str | None, version: str | None) -> Path:
    """Downloads a set and prepares it as array_record, with TFDS and TensorFlow.

    Args:
      spec: The set's name in messages.
      root: TFDS's folder.
      name: The set.
      config: Its configuration; None for the default.
      version: Its version; None for the newest.

    Returns:
      The folder of the prepared copy.

    Raises:
      DataError: TFDS does not know the set, TensorFlow is missing, or the set cannot be downloaded or prepared.
    """
    builder_class = _builder_class(spec, name)
    if importlib.util.find_spec("tensorflow") is None:
        raise DataError(
            f"--data {spec}: preparing this set needs TensorFlow, which is not installed; pip install tensorflow, or"
            f" name in --data-dir a copy prepared as array_record; {', '.join(SETS)} need no TensorFlow"
        )
    try:
        builder: Any = builder_class(data_dir=root, config=config, version=version)
    except (AssertionError, ValueError) as error:
        configs = f"; its configurations: {', '.join(builder_class.builder_configs)}" if config else ""
        raise DataError(f"--data {spec}: {reason(root_cause(error))}{configs}") from None
    try:
        for url in list(builder.url_infos or ())[:1]:
            require_reachable(url)
        with signals.raise_on_signal():
            builder.download_and_prepare(file_format="array_record")
    except Exception as error:  # a builder can fail in any way, from a full disk to a page that is gone
        raise DataError(
            f"--data {spec}: TFDS cannot prepare it in {root} ({reason(root_cause(error))}); try again later; {OFFLINE}"
        ) from error
    say(f"{spec}: prepared in {builder.data_dir}")
    return Path(builder.data_dir)


def versions(spec: str, name: str) -> list[str]:
    """The versions of a set that TFDS can prepare, its own choice first.

    Raises:
      DataError: TFDS does not know the set.
    """
    builder_class = _builder_class(spec, name)
    configs = [config.version for config in builder_class.builder_configs.values()]
    found = (builder_class.VERSION, *builder_class.SUPPORTED_VERSIONS, *configs)
    return list(dict.fromkeys(str(version) for version in found if version))


def _builder_class(spec: str, name: str) -> Any:
    try:
        return tfds.builder_cls(name)
    except tfds.core.DatasetNotFoundError:
        near = difflib.get_close_matches(name, tfds.list_builders(with_community_datasets=False))
        hint = f"perhaps {' or '.join(near)}" if near else "https://www.tensorflow.org/datasets/catalog lists them"
        raise DataError(f"--data {spec}: TFDS has no set {name}; {hint}") from None


def read(spec: str, folder: Path, max_bytes: int) -> dict[str, np.ndarray]:
    """Decodes a prepared copy, record by record.

    Args:
      spec: The set's name in messages.
      folder: The prepared copy, of any set that has images.
      max_bytes: The most bytes that all arrays together may take in memory.

    Returns:
      `train_images` ([images, height, width, channels]), and `train_labels`, `test_images` and `test_labels` if the set
      has them, in the order of the records. Test images are those of the split `test`, or else of `validation`.

    Raises:
      DataError: The copy is not an array_record copy, is damaged or too large, or does not hold images of one size.
    """
    try:
        builder = tfds.builder_from_directory(folder)
        formats = sorted(file_format.value for file_format in builder.info.available_file_formats())
        if "array_record" not in formats:
            raise DataError(
                f"--data {spec}: {folder} is prepared as {' and '.join(formats)}; expected array_record, which can be"
                " read without TensorFlow; name another --data-dir, or move that folder away"
            )
        splits = builder.info.splits
        if "train" not in splits:
            raise DataError(f"--data {spec}: has the splits {sorted(splits)}; expected train among them")
        arrays = _read_split(spec, builder, "train", "train", max_bytes)
        test = next((split for split in ("test", "validation") if split in splits), None)
        if test:
            arrays |= _read_split(spec, builder, test, "test", max_bytes - arrays["train_images"].nbytes)
        return arrays
    except DataError:
        raise
    except Exception as error:  # a damaged copy can make TFDS fail in any way
        raise DataError(
            f"--data {spec}: the copy in {folder} cannot be read ({reason(root_cause(error))}); expected a copy that"
            " TFDS has prepared; delete that folder and start again"
        ) from error


def _read_split(spec: str, builder: Any, split: str, part: str, max_bytes: int) -> dict[str, np.ndarray]:
    features = dict(builder.info.features.items())
    images = [key for key, feature in features.items() if isinstance(feature, tfds.features.Image)]
    key = "image" if "image" in images else images[0] if len(images) == 1 else None
    if not key or features[key].np_dtype not in (np.uint8, np.float32):
        raise DataError(f"--data {spec}: has the features {features}; expected one feature of 8-bit or float images")
    source = builder.as_data_source(split)
    has_labels = isinstance(features.get("label"), tfds.features.ClassLabel)
    labels = np.empty(len(source), np.int32)
    array = None
    for number, example in enumerate(tqdm(source, desc=f"reading {split}", leave=False, disable=None)):
        image = example[key]
        if array is None:
            shape = (len(source), *image.shape)
            require_size(f"--data {spec}: {split}", shape, math.prod(shape) * image.itemsize, sys.maxsize, max_bytes)
            array = np.empty(shape, image.dtype)
        if image.shape != array.shape[1:]:
            raise DataError(
                f"--data {spec}: {split} image {number} has shape {list(image.shape)}, the first image"
                f" {list(array.shape[1:])}; expected images of one size"
            )
        array[number] = image
        if has_labels:
            labels[number] = example["label"]
    if array is None:
        raise DataError(f"--data {spec}: {split} is empty; expected images")
    # The smallest type that holds the labels, as in the other sources; -1 stands for no label.
    labels = labels.astype(np.promote_types(*map(np.min_scalar_type, (labels.min(), labels.max()))))
    return {f"{part}_images": array} | ({f"{part}_labels": labels} if has_labels else {})
