"""CSV files of images, one a row: a label and the pixels, as MNIST is often handed on. Read in blocks, never whole."""

from __future__ import annotations

import csv
import gzip
import io
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv as arrow
from tqdm import tqdm

from vae_jax.data.bounded import require_size
from vae_jax.system.console import printable
from vae_jax.system.errors import DataError, reason

# Bytes of text that are parsed at once; no row may be longer.
BLOCK = 1 << 22
LABELS = ("label", "labels", "class")

# Ctrl-C is for `vae_jax.system.signals`.
pa.enable_signal_handlers(False)


class Layout(NamedTuple):
    """Where the columns of a file are."""

    columns: int
    header: bool
    label: int | None  # number of the column


def load(paths: dict[str, Path], max_bytes: int) -> dict[str, np.ndarray]:
    """Reads the arrays of an image set.

    Args:
      paths: The files of `train` and perhaps `test`, gzipped or not. With a header, a column `label`, `labels` or
        `class`, if there is one, holds labels, and all others hold pixels, numbered in their order. Without one,
        1 + n x n columns are a label and pixels (785 for MNIST), and n x n columns are pixels.
      max_bytes: The most bytes that all arrays together may take in memory.

    Returns:
      `train_images`, and `test_images` if there is such a file ([images, n, n], bytes or floats), and their labels.

    Raises:
      DataError: A file is damaged or too large, or it is not certain what its columns are.
    """
    arrays = {}
    for part, path in paths.items():
        images, labels = _read(path, max_bytes)
        arrays[f"{part}_images"] = images
        if labels is not None:
            arrays[f"{part}_labels"] = labels
        max_bytes -= images.nbytes
    return arrays


def _read(path: Path, max_bytes: int) -> tuple[np.ndarray, np.ndarray | None]:
    """The images of one file, and their labels if it has any. Raises as `load` does."""
    try:
        layout = _layout(path)
        try:
            images, labels = _parse(path, layout, pa.uint8(), max_bytes)
        except pa.ArrowInvalid:  # not all of them bytes
            images, labels = _parse(path, layout, pa.float32(), max_bytes)
    except DataError:
        raise
    except Exception as error:  # a damaged file can make Arrow and gzip fail in any way
        if isinstance(error, OSError) and error.errno:
            raise
        raise DataError(
            f"{path}: is not a sound CSV file ({reason(error)}); expected in each row the pixels of an image, as"
            " numbers, with commas in between, and perhaps a label"
        ) from None
    if labels is not None and not layout.header and len(np.unique(images[:, -1])) > 1 == len(set(labels.tolist())):
        raise DataError(
            f"{path}: its first column is the same in all rows and its last is not, so labels may come last; expected"
            " them in the first column; write a header with `label` over the labels"
        )
    side = math.isqrt(images.shape[1])
    return images.reshape(-1, side, side), labels


def _open(path: Path) -> io.BufferedIOBase | gzip.GzipFile:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")


def _layout(path: Path) -> Layout:
    with _open(path) as file:
        line = file.readline(BLOCK)
    if not line.strip() or len(line) == BLOCK:
        raise DataError(
            f"{path}: its first line {'is empty' if not line.strip() else 'has no end'}; expected a CSV file"
        )
    cells = next(csv.reader([line.decode("utf-8-sig", "replace").strip()]))
    count = len(cells)
    if not all(map(_is_number, cells)):
        return _named_layout(path, [cell.strip().lower() for cell in cells])
    label = 0 if _is_square(count - 1) else None
    if label is None and not _is_square(count):
        raise DataError(
            f"{path}: has {count} columns and no header; expected n x n pixels (784 for MNIST), or a label and n x n"
            " pixels (785), with commas in between"
        )
    return Layout(count, False, label)


def _named_layout(path: Path, names: list[str]) -> Layout:
    labels = [number for number, name in enumerate(names) if name in LABELS]
    pixels = [name for name in names if name not in LABELS]
    numbers = [[int(digits) for digits in re.findall(r"\d+", name)] for name in pixels]
    in_order = all(numbers) and numbers == sorted(numbers) and len(set(map(tuple, numbers))) == len(numbers)
    if len(labels) > 1 or not _is_square(len(pixels)) or not in_order:
        listed = printable(", ".join(names[:4])[:200])
        raise DataError(
            f"{path}: has the columns {listed}, ... ({len(names)} in all); expected n x n columns of"
            f" pixels, numbered in their order (such as pixel0, pixel1, ...), and perhaps one of labels:"
            f" {' or '.join(LABELS)}"
        )
    return Layout(len(names), True, labels[0] if labels else None)


def _parse(path: Path, layout: Layout, kind: pa.DataType, max_bytes: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Images as rows, [images, pixels], and labels as the file has them."""
    names = [str(number) for number in range(layout.columns)]
    types = {name: pa.string() if number == layout.label else kind for number, name in enumerate(names)}
    dtype = np.dtype(kind.to_pandas_dtype())
    pixels = [number for number in range(layout.columns) if number != layout.label]
    blocks, labels, rows = [], [], 0
    with _open(path) as file:
        for number, text in enumerate(_whole_lines(file, path)):
            # Arrow's own reader of blocks reads far ahead, however much that is.
            lines = arrow.read_csv(
                pa.BufferReader(text),
                arrow.ReadOptions(column_names=names, skip_rows=int(layout.header and not number)),
                arrow.ParseOptions(),
                arrow.ConvertOptions(column_types=types, null_values=[], strings_can_be_null=False),
            )
            rows += len(lines)
            shape = (rows, len(pixels))
            require_size(str(path), shape, math.prod(shape) * dtype.itemsize, sys.maxsize, max_bytes)
            block = np.empty((len(lines), len(pixels)), dtype)
            for place, column in enumerate(pixels):
                block[:, place] = lines.column(column)
            blocks.append(block)
            if layout.label is not None:
                labels += lines.column(layout.label).to_pylist()
    require_size(str(path), (rows, len(pixels)), rows, sys.maxsize, max_bytes)
    images = np.empty((rows, len(pixels)), dtype)
    while blocks:  # each is let go as soon as it is copied
        block = blocks.pop()
        images[rows - len(block) : rows] = block
        rows -= len(block)
    return images, _numbers(labels) if layout.label is not None else None


def _whole_lines(file: io.BufferedIOBase | gzip.GzipFile, path: Path) -> Iterator[bytes]:
    """The text of a file in blocks that end with a line, with a progress bar."""
    rest = b""
    with tqdm(desc=f"reading {path.name}", unit="B", unit_scale=True, leave=False, disable=None) as bar:
        while block := file.read(BLOCK):
            bar.update(len(block))
            text, newline, last = block.rpartition(b"\n")
            if newline and (rest + text).strip():
                yield rest + text + newline
                rest = b""
            rest += last
            if len(rest) > BLOCK:
                raise DataError(f"{path}: has a line of more than {BLOCK:,} bytes; expected an image in each line")
    if rest.strip():
        yield rest


def _numbers(labels: list[str]) -> np.ndarray:
    """Labels as integers if they are, in the smallest type that holds them, or else as they are."""
    try:
        numbers = np.array([float(label) for label in labels])
    except ValueError:
        return np.array(labels)
    if not (np.isfinite(numbers).all() and (np.abs(numbers) < 2**53).all() and (numbers == np.rint(numbers)).all()):
        return numbers
    return numbers.astype(np.promote_types(*(np.min_scalar_type(int(n)) for n in (numbers.min(), numbers.max()))))


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _is_square(number: int) -> bool:
    """Whether so many pixels make a square image of more than one pixel."""
    return number > 1 and math.isqrt(number) ** 2 == number
