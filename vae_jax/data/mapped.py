"""Images that stay in their file, and are read when they are asked for: for sets that do not fit into memory."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

# Bytes that are read at once where a whole set is passed through.
PIECE = 64 << 20


class MappedImages:
    """Images in an uncompressed NumPy file; indexing reads.

    Not a memory map: the pages of a map count as memory of the process for as long as it stands.

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
        return MappedImages(
            self._path, self._offset, self.dtype, self._file_shape, np.flatnonzero(mask).astype(np.int32), self._white
        )

    def white_at_255(self) -> "MappedImages":
        """The same images, whose ones are 255."""
        return MappedImages(self._path, self._offset, self.dtype, self._file_shape, self._rows, 255)

    def __getitem__(self, chosen: slice | np.ndarray) -> np.ndarray:
        """Reads images.

        Raises:
          OSError: The file cannot be read, or is shorter than it was.
        """
        if isinstance(chosen, slice):
            chosen = np.arange(len(self))[chosen] if self._rows is None else self._rows[chosen]
        else:
            chosen = chosen if self._rows is None else self._rows[chosen]
        images = np.empty((len(chosen), *self.shape[1:]), self.dtype)
        memory = images.reshape(-1).view(np.uint8).data
        size = images[:1].nbytes
        # In the order of the file, and neighbours at once.
        order = np.argsort(chosen, kind="stable")
        places = chosen[order]
        with self._path.open("rb", buffering=0) as file:
            if len(order) and (np.diff(order) == 1).all() and (np.diff(places) == 1).all():
                self._read(file, int(places[0]) * size, memory)
            else:
                for place, row in zip(places.tolist(), order.tolist(), strict=True):
                    self._read(file, place * size, memory[row * size : (row + 1) * size])
        return images * np.uint8(self._white) if self._white != 1 else images

    def _read(self, file, start: int, memory: memoryview) -> None:
        file.seek(self._offset + start)
        done = 0
        while done < len(memory):
            count = file.readinto(memory[done:])
            if not count:
                raise OSError(None, "is shorter than it was when the command started", str(self._path))
            done += count


def pieces(images: np.ndarray | MappedImages) -> Iterator[np.ndarray]:
    """All images, some at a time."""
    count = max(1, PIECE // max(1, int(np.prod(images.shape[1:])) * images.dtype.itemsize))
    for start in range(0, len(images), count):
        yield images[start : start + count]
