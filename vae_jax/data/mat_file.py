"""The numeric variables of MATLAB's .mat files of version 5 to 7, read in bounded memory.

SciPy reads them too, but a damaged file can end the whole process there. The format is that of
https://www.mathworks.com/help/pdf_doc/matlab/matfile_format.pdf.
"""

from __future__ import annotations

import io
import math
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vae_jax.data.bounded import CHUNK, MAX_DEFLATE_RATIO, require_size

HEADER = 128
MATRIX, COMPRESSED = 14, 15
# How numbers are stored: MATLAB writes whole numbers of any class in as few bytes as they need.
STORED = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
CLASSES = (
    "", "cell", "struct", "object", "char", "sparse", "double", "single", "int8", "uint8", "int16", "uint16", "int32",
    "uint32", "int64", "uint64",
)  # fmt: skip
NUMERIC = CLASSES[6:]
COMPLEX = 0x800
# Dimensions and names take no more bytes than this.
LONGEST = 1024


class Variable(NamedTuple):
    """A variable, and where in the file it is."""

    name: str
    kind: str  # its class in MATLAB
    shape: tuple[int, ...]
    place: int


def variables(path: Path) -> list[Variable]:
    """The variables of a file. Raises ValueError, EOFError or zlib.error where it is damaged."""
    found = []
    with path.open("rb") as file:
        order = _byte_order(file)
        size, place = path.stat().st_size, HEADER
        while place < size:
            file.seek(place)
            _, length = _numbers(_exactly(file, 8), order)
            with _matrix(file, place, order) as matrix:
                found.append(_head(matrix, place, order))
            place += 8 + int(length)
    return found


def read(path: Path, variable: Variable, max_bytes: int) -> np.ndarray:
    """The values of a numeric variable, in the type in which they are stored.

    Raises:
      DataError: They take more than `max_bytes` in memory, or more than the file can hold.
      ValueError, EOFError or zlib.error: The file is damaged.
    """
    with path.open("rb") as file:
        order = _byte_order(file)
        with _matrix(file, variable.place, order) as matrix:
            _head(matrix, variable.place, order)
            word = _exactly(matrix, 4)
            kind, length, small = _tag(word, order)
            if not small:
                (length,) = _numbers(_exactly(matrix, 4), order)
            if kind not in STORED:
                raise ValueError(f"numbers of type {kind}")
            dtype = np.dtype(order + STORED[kind])
            nbytes = math.prod(variable.shape) * dtype.itemsize
            require_size(
                f"{path}: {variable.name}", variable.shape, nbytes, path.stat().st_size * MAX_DEFLATE_RATIO, max_bytes
            )
            if nbytes != length:
                raise ValueError(f"{variable.name} has {length:,} bytes of numbers instead of {nbytes:,}")
            array = np.empty(variable.shape[::-1], dtype)
            memory = array.reshape(-1).view(np.uint8).data
            done = 0
            while done < nbytes:
                part = _exactly(matrix, min(CHUNK, nbytes - done))
                memory[done : done + len(part)] = part
                done += len(part)
            while matrix.read(CHUNK):  # padding; at the end of what is compressed, its checksum is checked
                pass
    return np.ascontiguousarray(array.T, dtype.newbyteorder("="))


class _Part(io.RawIOBase):
    """The next `length` bytes of a file, decompressed if they are compressed."""

    def __init__(self, file: io.BufferedIOBase, length: int, compressed: bool):
        self._file = file
        self._left = length
        self._zlib = zlib.decompressobj() if compressed else None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        content = self._read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def _read(self, count: int) -> bytes:
        if self._zlib is None:
            return self._take(count)
        while not self._zlib.eof:
            packed = self._zlib.unconsumed_tail or self._take(io.DEFAULT_BUFFER_SIZE)
            content = self._zlib.decompress(packed, count)
            if content:
                return content
            if not packed:
                raise EOFError("the file ends within what is compressed")
        return b""

    def _take(self, count: int) -> bytes:
        content = self._file.read(min(count, self._left))
        self._left -= len(content)
        return content


def _byte_order(file: io.BufferedIOBase) -> str:
    mark = _exactly(file, HEADER)[-2:]
    if mark not in (b"IM", b"MI"):
        raise ValueError("no header of version 5")
    return "<" if mark == b"IM" else ">"


def _matrix(file: io.BufferedIOBase, place: int, order: str) -> io.BufferedReader[Any]:
    """The content of the variable at a place of the file."""
    file.seek(place)
    kind, length = _numbers(_exactly(file, 8), order)
    if kind == COMPRESSED:
        inner = io.BufferedReader(_Part(file, int(length), True))
        kind, _ = _numbers(_exactly(inner, 8), order)
    else:
        inner = io.BufferedReader(_Part(file, int(length), False))
    if kind != MATRIX:
        raise ValueError(f"an element of type {kind} in the place of a variable")
    return inner


def _head(matrix: io.BufferedReader, place: int, order: str) -> Variable:
    flags, dims, name = (_short(matrix, order) for _ in range(3))
    flag, _ = _numbers(flags, order)
    kind = CLASSES[flag & 255] if flag & 255 < len(CLASSES) else ""
    shape = tuple(np.frombuffer(dims, f"{order}i4").tolist())
    if min(shape, default=-1) < 0:
        raise ValueError(f"a shape of {list(shape)}")
    return Variable(name.decode("latin-1"), f"complex {kind}" if flag & COMPLEX else kind, shape, place)


def _short(matrix: io.BufferedReader, order: str) -> bytes:
    """The content of a short element, without its padding."""
    _, length, small = _tag(_exactly(matrix, 4), order)
    if small:
        return _exactly(matrix, 4)[:length]
    (length,) = _numbers(_exactly(matrix, 4), order)
    if length > LONGEST:
        raise ValueError(f"a header of {length:,} bytes")
    return _exactly(matrix, -int(length) // 8 * -8)[:length]


def _tag(word: bytes, order: str) -> tuple[int, int, bool]:
    """Type and length of an element, and whether it is one of up to 4 bytes, which alone has its length here."""
    (number,) = _numbers(word, order)
    return (number & 0xFFFF, number >> 16, True) if number >> 16 else (number, 0, False)


def _numbers(content: bytes, order: str) -> list[int]:
    return np.frombuffer(content, f"{order}u4").tolist()


def _exactly(file: io.BufferedIOBase, count: int) -> bytes:
    content = file.read(count)
    if len(content) < count:
        raise EOFError("the file is cut")
    return content
