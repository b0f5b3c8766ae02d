"""The form that images are brought into, whatever their source: `--image-size` and `--grey`."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from vae_jax.data.bounded import require_size
from vae_jax.data.mapped import MappedImages
from vae_jax.system.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

# Images that are made grey at once.
CHUNK = 256
# ITU-R 601-2 luma, as Pillow has it, for floats.
LUMA = np.array([0.299, 0.587, 0.114], np.float32)


class Form(NamedTuple):
    """What images are asked for. Colours become grey first, by ITU-R 601-2 luma: 0.299 R + 0.587 G + 0.114 B.

    Then images are resized by Pillow's bilinear filter, which is antialiased and never leaves the range of the pixels.
    """

    size: tuple[int, int] | None = None  # height and width; None: as they are
    grey: bool = False

    def image(self, image: Image.Image) -> Image.Image:
        """One image of 8 bits (L or RGB), in the form."""
        if self.grey and image.mode != "L":
            image = image.convert("L")
        return image if self.size is None else _resized(image, self.size)

    def arrays(self, images: np.ndarray | MappedImages, name: str, max_bytes: int) -> Any:
        """Images in the form.

        Args:
          images: [images, height, width] or [images, height, width, channels], bytes or floats.
          name: Their name in messages.
          max_bytes: The most bytes that the result may take in memory.

        Returns:
          The same number of images of the same type.

        Raises:
          DataError: Grey is asked for but the channels are not red, green and blue; or the result is too large.
        """
        if isinstance(images, MappedImages):
            if (self.grey and images.ndim == 4) or (self.size is not None and images.shape[1:3] != self.size):
                raise DataError(
                    f"{name}: stays in its file, where --image-size and --grey cannot change it; write it as it should"
                    " be, or use --stream never"
                )
            return images
        if self.grey and images.ndim == 4:
            images = _grey(images, name)
        if self.size is None or images.shape[1:3] == self.size:
            return images
        from PIL import Image

        size, channels = self.size, images.shape[3:]
        shape = (len(images), *size, *channels)
        require_size(name, shape, math.prod(shape) * images.itemsize, sys.maxsize, max_bytes)
        result = np.empty(shape, images.dtype)
        for number, image in enumerate(tqdm(images, desc=f"resizing {name}", leave=False, disable=None)):
            for channel in np.ndindex(channels):  # Pillow knows no images of floats, or of 2 channels
                resized = _resized(Image.fromarray(image[..., *channel]), size)
                result[number, ..., *channel] = np.asarray(resized)
        return np.clip(result, 0, 1, out=result) if images.dtype.kind == "f" else result


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    from PIL import Image

    height, width = size
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BILINEAR)


def _grey(images: np.ndarray, name: str) -> np.ndarray:
    from PIL import Image

    count, height, width, channels = images.shape
    if channels != 3:
        raise DataError(
            f"--grey: the images of {name} have {channels} channels; expected 3 (red, green, blue), or none; leave out"
            " --grey"
        )
    result = np.empty((count, height, width), images.dtype)
    for start in tqdm(range(0, count, CHUNK), desc=f"{name}: making it grey", leave=False, disable=None):
        chunk = images[start : start + CHUNK]
        if images.dtype == np.uint8:
            grey = np.asarray(Image.fromarray(chunk.reshape(-1, width, 3)).convert("L")).reshape(chunk.shape[:3])
        else:
            grey = np.minimum(chunk @ LUMA, 1)
        result[start : start + CHUNK] = grey
    return result
