"""Image sets in MATLAB's .mat files: which variables they are, and how they lie."""

import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vae_jax.data import mat_file
from vae_jax.data.mat_file import Variable
from vae_jax.system.console import printable
from vae_jax.system.errors import DataError, reason

# What the variables may be called, in any case; the first that is there counts.
NAMES = {
    "train_images": ("train_images", "x_train", "xtrain", "images", "data", "x"),
    "train_labels": ("train_labels", "y_train", "ytrain", "labels", "label", "y"),
    "test_images": ("test_images", "x_test", "xtest"),
    "test_labels": ("test_labels", "y_test", "ytest"),
}


def load(path: Path, max_bytes: int) -> dict[str, np.ndarray]:
    """Reads the arrays of an image set.

    Args:
      path: A .mat file of version 5 to 7 with images in a variable `train_images`, `x_train`, `images`, `data` or `X`,
        and perhaps labels in `train_labels`, `y_train`, `labels`, `label` or `y`; test images in `test_images` or
        `x_test`, and their labels. Upper and lower case are the same.
      max_bytes: The most bytes that all arrays together may take in memory.

    Returns:
      The arrays, under our names. Images of the shape [..., images] (as MATLAB users and SVHN have them) are brought
      to [images, ...] if the labels tell their number; labels are as the file has them (SVHN's 10 stands for 0).

    Raises:
      DataError: The file is damaged or too large, or it is not certain where its images are and how they lie.
    """
    with path.open("rb") as file:
        head = file.read(1024)
    if head.startswith(b"MATLAB 7.3") or b"\x89HDF\r\n\x1a\n" in (head[:8], head[512:520]):
        raise DataError(
            f"{path}: is of MATLAB's version 7.3 (HDF5), which is not read here; expected version 7; in MATLAB, write"
            " save(FILE, '-v7', ...), or write the arrays to an .npz file"
        )
    try:
        return _load(path, max_bytes)
    except DataError:
        raise
    except (EOFError, ValueError, zlib.error) as error:
        raise DataError(
            f"{path}: is not a sound .mat file ({reason(error)}); expected MATLAB's version 5 to 7; write or get it"
            " again"
        ) from None


def _load(path: Path, max_bytes: int) -> dict[str, np.ndarray]:
    found = mat_file.variables(path)
    arrays: dict[str, np.ndarray] = {}
    for part, variable in _choose(path, found).items():
        if variable.kind not in mat_file.NUMERIC:
            raise DataError(f"{path}: {variable.name} is of class {variable.kind}; expected numbers")
        arrays[part] = mat_file.read(path, variable, max_bytes)
        max_bytes -= arrays[part].nbytes
    return {
        **arrays,
        **{
            f"{part}_images": _images_first(arrays[f"{part}_images"], arrays.get(f"{part}_labels"), f"{path}: {part}")
            for part in ("train", "test")
            if f"{part}_images" in arrays
        },
        **{
            name: array.T if array.ndim == 2 and len(array) == 1 else array
            for name, array in arrays.items()
            if name.endswith("labels")
        },
    }


def _choose(path: Path, variables: Sequence[Variable]) -> dict[str, Variable]:
    """The variable of each array that the file has."""
    by_name: dict[str, list[Variable]] = {}
    for variable in variables:
        by_name.setdefault(variable.name.lower(), []).append(variable)
    found = {
        part: by_name[names[0]]
        for part, accepted in NAMES.items()
        if (names := [name for name in accepted if name in by_name])
    }
    if "train_images" not in found or any(len(same) > 1 for same in found.values()):
        listed = ", ".join(f"{name} ({' x '.join(map(str, shape))} {kind})" for name, kind, shape, _ in variables)
        raise DataError(
            f"{path}: holds {printable(listed[:300]) or 'no variables'}; expected images in train_images, x_train,"
            " images, data or X, one of each name, and perhaps labels in train_labels, y_train, labels or y"
        )
    return {part: same[0] for part, same in found.items()}


def _images_first(images: np.ndarray, labels: np.ndarray | None, name: str) -> np.ndarray:
    """Images in the order [images, ...], if it is certain which axis that is."""
    count = None if labels is None else labels.size if 1 in labels.shape else len(labels)
    if count is not None and images.shape.count(count) == 1 and count in (images.shape[0], images.shape[-1]):
        return images if images.shape[0] == count else np.ascontiguousarray(np.moveaxis(images, -1, 0))
    if count is None and images.ndim == 2 and _is_square(images.shape[1]) and not _is_square(images.shape[0]):
        return images  # rows of pixels
    # Images that are square along the last two axes, or before the channels, and no other way.
    square_last = images.ndim > 2 and images.shape[1] == images.shape[2]
    square_first = images.ndim > 2 and images.shape[0] == images.shape[1]
    if count is None and square_last and not square_first:
        return images
    with_labels = f" and {count:,} labels" if count is not None else ", and no labels that tell the number of images"
    raise DataError(
        f"{name} images have shape {list(images.shape)}{with_labels}; expected [images, ...] or [..., images], with"
        " as many labels; write them to an .npz file as train_images, [images, height, width]"
    )


def _is_square(number: int) -> bool:
    return math.isqrt(number) ** 2 == number
