"""Parquet files as Hugging Face's datasets have them: a column of images, encoded or as numbers, and one of labels."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as arrow
from tqdm import tqdm

from vae_jax.data.bounded import require_size
from vae_jax.data.decode import Encoded, decode
from vae_jax.data.form import Form
from vae_jax.data.image_folder import SPLITS
from vae_jax.data.parquet_footer import column_sizes
from vae_jax.system.console import printable, say
from vae_jax.system.errors import DataError, reason

SPLIT = re.compile(rf"({'|'.join(SPLITS)})(?=[-._]|$)", re.IGNORECASE)
SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})")
IMAGES = ("image", "img", "images", "pixel_values", "pixels")
LABELS = ("label", "labels", "fine_label")
# Rows that are read at once.
ROWS = 256

pa.enable_signal_handlers(False)
# Its functions are made when it is imported.
pc: Any = pyarrow.compute


class Columns(NamedTuple):
    """The columns of a set."""

    image: str
    kind: str  # struct, bytes or numbers
    label: str | None


def arrange(folder: Path, paths: Sequence[Path]) -> dict[str, list[Path]]:
    """The files of `train` and perhaps `test`, from their names: `train-00000-of-00002.parquet` and the like.

    Raises:
      DataError: A name tells no part, there is no file of `train`, or a file of several is missing.
    """
    parts: dict[str, list[Path]] = {}
    for path in sorted(paths):
        match = SPLIT.match(path.name)
        if not match and len(paths) > 1:
            raise DataError(
                f"--data {folder}: holds {path.name}, and {len(paths) - 1} more .parquet files; expected names that"
                " begin with train, test or validation; name one of the files, or move this one away"
            )
        parts.setdefault(SPLITS[match[1].lower()] if match else "train", []).append(path)
        shard = SHARD.match(path.name)
        if shard and len([other for other in paths if other.name.startswith(f"{shard[1]}-")]) != int(shard[3]):
            raise DataError(
                f"--data {folder}: holds {path.name}, but not all {int(shard[3])} of its kind; add the others"
            )
    if "train" not in parts:
        raise DataError(f"--data {folder}: holds {paths[0].name}, but no train-*.parquet; add it, or name one file")
    test = next((split for split in ("test", "validation") if split in parts), None)
    if test == "test" and "validation" in parts:
        say(f"--data {folder}: {parts['validation'][0].name} is not used; the test images are those in test")
    return {"train": parts["train"]} | ({"test": parts[test]} if test else {})


def load(name: str, parts: dict[str, list[Path]], form: Form, max_bytes: int) -> dict[str, np.ndarray]:
    """Reads the arrays of an image set.

    Args:
      name: The set's name in messages.
      parts: The files of `train` and perhaps `test`. Images are in a column `image`, `img`, ... or the only one that
        can hold images: structures with the field `bytes`, or bytes, of encoded images (PNG, JPEG, ...), or lists of
        numbers, nested or not. Labels are in a column of integers `label`, `labels` or `fine_label`.
      form: What encoded images are brought into.
      max_bytes: The most bytes that all arrays together may take in memory.

    Returns:
      `train_images`, and `test_images` if there are such files, and their labels.

    Raises:
      DataError: A file is damaged or too large, or holds no images, or images of several sizes.
    """
    path = parts["train"][0]
    try:
        files = {}
        for path in (path for paths in parts.values() for path in paths):
            files[path] = _open(path, max_bytes)
        path = parts["train"][0]
        columns = _columns(path, files[path])
        counts = {part: sum(files[path].metadata.num_rows for path in paths) for part, paths in parts.items()}

        def batches(*names: str) -> Iterator[tuple[str, pa.RecordBatch]]:
            nonlocal path
            for path, file in files.items():
                for batch in file.iter_batches(ROWS, columns=[*names], use_threads=False):
                    yield str(path), batch

        if columns.kind == "numbers":
            images = _numbers(name, batches(columns.image), sum(counts.values()), max_bytes)
        else:
            images = decode(lambda: _encoded(batches(columns.image)), sum(counts.values()), name, form, max_bytes)
        labels = (
            np.concatenate([_plain(batch.column(0)) for _, batch in batches(columns.label)]) if columns.label else None
        )
    except DataError:
        raise
    except Exception as error:  # a damaged file can make Arrow fail in any way
        if isinstance(error, OSError) and error.errno:
            raise
        raise DataError(f"{path}: is not a sound Parquet file ({reason(error)}); get it again") from None
    arrays = {}
    for part, count in counts.items():
        arrays[f"{part}_images"], images = images[:count], images[count:]
        if labels is not None:
            arrays[f"{part}_labels"], labels = labels[:count], labels[count:]
    return arrays


def _open(path: Path, max_bytes: int) -> Any:
    """An open file whose columns fit into memory, as it declares."""
    for column, values, nbytes in column_sizes(path):
        size = max(values, nbytes)  # a value takes at least a byte in memory, however few in the file
        if not 0 <= size <= max_bytes:
            raise DataError(
                f"{path}: declares {size / 1e9:,.1f} GB for a part of {printable(column[:100])}; expected at most"
                f" {max_bytes / 1e9:,.1f} GB; if the file is sound, raise --max-data-gb"
            )
    return arrow.ParquetFile(path)


def _columns(path: Path, file: Any) -> Columns:
    schema = file.schema_arrow
    kinds = {field.name: kind for field in schema if (kind := _kind(field.type))}
    named = [name for name in IMAGES if name in kinds]
    found = named[:1] or list(kinds)
    if len(found) != 1 or len(set(schema.names)) < len(schema.names):
        listed = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise DataError(
            f"{path}: has the columns {printable(listed[:300])}; expected one of images:"
            f" {', '.join(IMAGES)}, of encoded images or lists of numbers"
        )
    label = next(
        (name for name in LABELS if name in schema.names and pa.types.is_integer(schema.field(name).type)), None
    )
    return Columns(found[0], kinds[found[0]], label)


def _kind(kind: pa.DataType) -> str | None:
    """How a column of this type holds images, if it can."""
    if pa.types.is_struct(kind):
        fields = {field.name: field.type for field in kind.fields}
        return "struct" if "bytes" in fields and _is_bytes(fields["bytes"]) else None
    if _is_bytes(kind):
        return "bytes"
    inner = kind
    while _is_list(inner):
        inner = inner.value_type
    number = pa.types.is_integer(inner) or pa.types.is_floating(inner)
    return "numbers" if inner is not kind and number else None


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _encoded(batches: Iterator[tuple[str, pa.RecordBatch]]) -> Iterator[Encoded]:
    number = dict[str, int]()
    for name, batch in batches:
        column = batch.column(0)
        if pa.types.is_struct(column.type):
            column = pc.struct_field(column, "bytes")
        for value in column:
            row = number.get(name, 0)
            number[name] = row + 1
            if not value.is_valid:
                raise DataError(f"{name}: row {row} holds no image; expected the bytes of one in every row")
            yield Encoded(f"{name}: row {row}", value.as_py())


def _numbers(name: str, batches: Iterator[tuple[str, pa.RecordBatch]], count: int, max_bytes: int) -> np.ndarray:
    """Lists of numbers, nested or not, as one array, [images, ...]."""
    array, done = None, 0
    for path, batch in tqdm(batches, desc=f"reading {name}", leave=False, disable=None):
        part = _dense(batch.column(0), path)
        if array is None:
            shape = (count, *part.shape[1:])
            require_size(name, shape, math.prod(shape) * part.itemsize, sys.maxsize, max_bytes)
            array = np.empty(shape, part.dtype)
        if part.shape[1:] != array.shape[1:] or done + len(part) > count:
            raise DataError(
                f"{path}: holds images of shape {list(part.shape[1:])} and {list(array.shape[1:])}; expected one shape"
            )
        array[done : done + len(part)] = part
        done += len(part)
    if array is None or done != count:
        raise DataError(f"{name}: holds {done:,} images; expected {max(count, 1):,}; get it again")
    return array


def _dense(column: pa.Array, path: str) -> np.ndarray:
    shape = [len(column)]
    while _is_list(column.type):
        lengths = pc.unique(pc.list_value_length(column))
        if len(lengths) != 1 or not lengths[0].is_valid:
            raise DataError(f"{path}: holds images of several lengths ({lengths.to_pylist()[:5]}); expected one")
        shape.append(lengths[0].as_py())
        column = column.flatten()
    return _plain(column).reshape(shape)


def _plain(column: pa.Array) -> np.ndarray:
    if column.null_count:
        raise ValueError(f"{column.null_count:,} numbers are missing")
    return column.to_numpy(zero_copy_only=False)
