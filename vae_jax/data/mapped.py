"""Images that stay in their file, and are read when they are asked for: for sets that do not fit into memory."""

import errno
import math
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

# Bytes that are read at once where a whole set is passed through.
PIECE = 64 << 20
# Images that are read through one map; the system maps up to 64 kilobytes around each.
MAPPED = 2048
# Where images lie further apart than this many bytes, each is asked for by itself: Linux would read as much around it.
READ_AROUND = 128 << 10


class MappedImages:
    """Images in an uncompressed NumPy file; indexing reads.

    The file is mapped into memory anew for every few images: what a map has read counts as memory of the process for as
    long as the map stands.

    Args:
      path: The file.
      offset: Where the images begin in it, in bytes.
      dtype: uint8, or float32 as the machine has it.
      shape: [images, height, width] or [images, height, width, channels].
      rows: Which of the images, and in which order; by default all.
      white: The factor that turns integers into bytes from 0 to 255.
    """

    def __init__(
        self,
        path: Path,
        offset: int,
        dtype: np.dtype,
        shape: tuple[int, ...],
        rows: np.ndarray | None = None,
        white: int = 1,
    ):
        self._path, self._offset, self._rows, self._white = path, offset, rows, white
        self.dtype, self._file_shape = dtype, shape
        self.shape = shape if rows is None else (len(rows), *shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def of_shape(self, *shape: int) -> "MappedImages":
        """The same images in another shape, [height, width] or [height, width, channels]."""
        shape = (self._file_shape[0], *shape)
        return MappedImages(self._path, self._offset, self.dtype, shape, self._rows, self._white)

    def chosen(self, mask: np.ndarray) -> "MappedImages":
        """The images where the mask is true."""
        rows = np.flatnonzero(mask).astype(np.int32) if self._rows is None else self._rows[mask]
        return MappedImages(self._path, self._offset, self.dtype, self._file_shape, rows, self._white)

    def white_at_255(self) -> "MappedImages":
        """The same images, whose ones are 255."""
        return MappedImages(self._path, self._offset, self.dtype, self._file_shape, self._rows, 255)

    def __getitem__(self, chosen: slice | np.ndarray) -> np.ndarray:
        """Reads images.

        Raises:
          OSError: The file cannot be read, or has become shorter.
        """
        if self._rows is not None:
            chosen = self._rows[chosen]
        elif isinstance(chosen, slice):
            chosen = np.arange(*chosen.indices(len(self)))
        images = np.empty((len(chosen), *self.shape[1:]), self.dtype)
        rows = images.reshape(len(chosen), -1)  # NumPy copies whole rows faster than images
        order = np.argsort(chosen, kind="stable")  # as they lie in the file
        for start in range(0, len(order), MAPPED):
            places = order[start : start + MAPPED]
            rows[places] = np.take(self._map(chosen[places]), chosen[places], axis=0)
        return images * np.uint8(self._white) if self._white != 1 else images

    def _map(self, chosen: np.ndarray) -> np.ndarray:
        """The images of the file as flat rows, of which those that are chosen, in order, are about to be read."""
        row = math.prod(self._file_shape[1:])
        size = row * self.dtype.itemsize
        with self._path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < self._offset + self._file_shape[0] * size:
                raise OSError(errno.EIO, "has become shorter since the command began", str(self._path))
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            scattered = int(chosen[-1] - chosen[0]) * size > len(chosen) * READ_AROUND
            if scattered and hasattr(os, "posix_fadvise"):
                # By itself the system reads one image after the other, and up to megabytes around each.
                mapped.madvise(mmap.MADV_RANDOM)
                for image in (chosen % self._file_shape[0]).tolist():  # negative ones count from the end
                    os.posix_fadvise(file.fileno(), self._offset + image * size, size, os.POSIX_FADV_WILLNEED)
        return np.ndarray((self._file_shape[0], row), self.dtype, mapped, self._offset)


def pieces(images: np.ndarray | MappedImages) -> Iterator[np.ndarray]:
    """All images, some at a time."""
    count = max(1, PIECE // max(1, int(np.prod(images.shape[1:])) * images.dtype.itemsize))
    for start in range(0, len(images), count):
        yield images[start : start + count]
