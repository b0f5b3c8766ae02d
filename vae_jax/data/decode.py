"""Image files of any kind that Pillow reads safely, decoded into one array.

The rule for each kind of pixel, so that nothing is guessed:
  grey images (1-bit, 8-bit, or a palette of greys) have no channels; all others have red, green and blue;
  transparent pixels are blended with black, the background of this package;
  CMYK and YCbCr become RGB as Pillow converts them; colour profiles are not looked at;
  more than 8 bits a channel, and floats, are refused: how to scale them is the owner's choice;
  EXIF's orientation is applied (a PNG's if it comes before the pixels), so that images stand as a viewer shows them;
  of several frames or pages, the first is taken.
"""

from __future__ import annotations

import io
import math
import os
import sys
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from vae_jax.data.bounded import require_size
from vae_jax.data.form import Form
from vae_jax.system.errors import DataError, reason

# Not EPS and the like, which run other programs.
FORMATS = ("PNG", "JPEG", "BMP", "DIB", "GIF", "WEBP", "TIFF", "PPM")
GREY_MODES = ("1", "L", "LA")
MODES = (*GREY_MODES, "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
# The most pixels of an image, 8,192 x 8,192: Pillow warns above 89 million.
MAX_PIXELS = 1 << 26
# Images that a thread decodes in one go.
BATCH = 64
WORKERS = min(8, os.cpu_count() or 1)
# Bytes for each pixel while images are decoded: three copies of 4 bytes in each thread.
BYTES_PER_PIXEL = 12 * WORKERS
# Sizes that a message names.
NAMED_SIZES = 5


class Encoded(NamedTuple):
    """An image file, or the content of one."""

    name: str  # in messages
    content: Path | bytes


class OtherShapeError(Exception):
    """An image has not the shape of the first."""


def decode(images: Callable[[], Iterable[Encoded]], count: int, name: str, form: Form, max_bytes: int) -> np.ndarray:
    """Decodes images into one array, in threads, with a progress bar.

    Args:
      images: Returns the images, the same ones in each call.
      count: How many they are, at least one.
      name: Their name in messages.
      form: What they are brought into.
      max_bytes: The most bytes that the array may take in memory, and also the images that are decoded at one time.

    Returns:
      Bytes, [images, height, width] if all are grey, or [images, height, width, 3] if all are colour.

    Raises:
      DataError: An image cannot be decoded or is too large, or they are not of one size, or some are grey and some in
        colour.
    """
    most = min(MAX_PIXELS, max_bytes // BYTES_PER_PIXEL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow, about what it reads all the same
        first = next(iter(images()), None)
        if first is None:
            raise DataError(f"{name}: holds no images; expected {count:,}; get it again")
        shape = _decode_one(first, form, most).shape
        total = (count, *shape)
        require_size(name, total, math.prod(total), sys.maxsize, max_bytes)
        array = np.empty(total, np.uint8)
        try:
            done = _decode_all(images(), array, name, form, most)
        except OtherShapeError:
            raise DataError(_describe_shapes(images(), count, name, form, most)) from None
    if done != count:
        raise DataError(f"{name}: holds {done:,} images; expected {count:,}, as it declares; get it again")
    return array


def _decode_all(images: Iterable[Encoded], array: np.ndarray, name: str, form: Form, most: int) -> int:
    """Fills the array; returns how many images there were, which may be too few or one too many."""

    def decode_batch(start: int, batch: list[Encoded]) -> int:
        for number, encoded in enumerate(batch, start):
            image = _decode_one(encoded, form, most)
            if image.shape != array.shape[1:]:
                raise OtherShapeError
            array[number] = image
        return len(batch)

    left, done = iter(images), 0
    waiting: deque[Future[int]] = deque()  # never many, as their content is in memory
    bar = tqdm(total=len(array), desc=f"decoding {name}", unit=" images", leave=False, disable=None)
    with bar, ThreadPoolExecutor(WORKERS) as pool:
        for start in range(0, len(array), BATCH):
            batch = list(islice(left, min(BATCH, len(array) - start)))
            waiting.append(pool.submit(decode_batch, start, batch))
            if len(waiting) > 2 * WORKERS:
                count = waiting.popleft().result()
                done += count
                bar.update(count)
        return done + sum(future.result() for future in waiting) + sum(1 for _ in islice(left, 1))


@contextmanager
def _opened(encoded: Encoded, most: int) -> Iterator[Image.Image]:
    """An image whose header is read and found good; whatever goes wrong in the block is a `DataError` too."""
    name = encoded.name
    content = encoded.content if isinstance(encoded.content, Path) else io.BytesIO(encoded.content)
    try:
        with Image.open(content, formats=FORMATS) as image:
            width, height = image.size
            if width * height > most:
                more = ", or raise --max-data-gb" if most < MAX_PIXELS else ""
                raise DataError(
                    f"{name}: declares {height:,} x {width:,} pixels; expected at most {most:,}; make it smaller{more}"
                )
            if image.mode not in MODES or any(";16" in str(tile[3]) for tile in image.tile):
                raise DataError(
                    f"{name}: has pixels of mode {image.mode}, of more than 8 bits or of a kind that is not known here;"
                    " expected 8 bits a channel, grey or RGB; convert it, or write floats in [0, 1] to an .npz file"
                )
            yield image
    except DataError:
        raise
    except Image.DecompressionBombError:
        raise DataError(f"{name}: declares more than {most:,} pixels; expected fewer; make it smaller") from None
    except Exception as error:  # a damaged image can make Pillow fail in any way
        if isinstance(error, OSError) and error.errno:
            raise
        why = "not an image of a kind known here" if isinstance(error, Image.UnidentifiedImageError) else reason(error)
        raise DataError(
            f"{name}: cannot be decoded ({why}); expected a sound image ({', '.join(FORMATS)}); get it again, or move"
            " it away"
        ) from None


def _decode_one(encoded: Encoded, form: Form, most: int) -> np.ndarray:
    """Bytes, [height, width] or [height, width, 3]."""
    with _opened(encoded, most) as image:
        if image.format != "PNG" or "exif" in image.info:  # for a PNG, looking takes as long as decoding
            ImageOps.exif_transpose(image, in_place=True)
        mode = "L" if _is_grey(image) else "RGB"
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            pixels = image.convert("RGBA")
            upright = Image.new("RGB", image.size)
            upright.paste(pixels, mask=pixels.getchannel("A"))
        else:
            upright = image if image.mode in ("1", "L") else image.convert("RGB")
        return np.asarray(form.image(upright if upright.mode == mode else upright.convert(mode)))


def _is_grey(image: Image.Image) -> bool:
    if image.mode not in ("P", "PA"):
        return image.mode in GREY_MODES
    palette = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
    return bool((palette == palette[:, :1]).all())


def _describe_shapes(images: Iterable[Encoded], count: int, name: str, form: Form, most: int) -> str:
    """Why images do not fit into one array, from their headers."""
    sizes: Counter[tuple[int, int]] = Counter()
    grey = 0
    for encoded in tqdm(images, total=count, desc=f"measuring {name}", leave=False, disable=None):
        with _opened(encoded, most) as image:
            width, height = image.size
            if image.format != "TIFF" and image.getexif().get(0x0112, 1) > 4:  # lies on its side
                width, height = height, width
            sizes[height, width] += 1
            grey += _is_grey(image)
    if form.size is None and len(sizes) > 1:
        named = [f"{height} x {width} ({number:,})" for (height, width), number in sizes.most_common(NAMED_SIZES)]
        more = ", ..." if len(sizes) > NAMED_SIZES else ""
        (height, width), _ = sizes.most_common(1)[0]
        return (
            f"{name}: holds images of {len(sizes):,} sizes, {', '.join(named)}{more}; expected one size; add"
            f" --image-size {height} {width} to resize them"
        )
    return (
        f"{name}: holds {grey:,} grey images and {count - grey:,} in colour; expected one kind; add --grey to make all"
        " of them grey"
    )
