"""Folders of image files: flat, or a folder for each class, or folders `train` and `test` of either kind."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vae_jax.data.cache import File
from vae_jax.data.form import Form
from vae_jax.system.console import say
from vae_jax.system.errors import DataError

# What the folders of the parts of a set are called, in any case.
SPLITS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
}
# Of the kinds that `vae_jax.data.decode` decodes.
SUFFIXES = frozenset(
    ".png .jpg .jpeg .jpe .jfif .bmp .dib .gif .webp .tif .tiff .pgm .ppm .pbm .pnm".split()  # noqa: SIM905
)
# Images that few programs write and Pillow may not read: never to be left out silently.
OTHER_SUFFIXES = frozenset((".avif", ".heic", ".heif", ".ico", ".jp2", ".jxl", ".psd", ".svg", ".tga"))


class Image(NamedTuple):
    """An image file of a part: its number in the list of all files, and the name of its class, if it has one."""

    number: int
    label: str | None


def find(folder: Path) -> list[File]:
    """The image files in a folder and the folders in it, in the order of their names below `folder`, with slashes.

    Known by the ends of their names. Hidden files and folders, `__MACOSX`, and all other files are passed over.

    Raises:
      DataError: There are images of a kind that is not read here.
      OSError: A folder cannot be read.
    """
    found: list[File] = []
    others: list[str] = []

    def walk(place: str, below: str, above: frozenset[tuple[int, int]]) -> None:
        for entry in os.scandir(place):
            name = below + entry.name
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            suffix = f".{entry.name.rpartition('.')[2].lower()}"
            if suffix in SUFFIXES and entry.is_file():
                found.append(File.of(name, entry.stat()))
            elif suffix in OTHER_SUFFIXES and entry.is_file():
                others.append(name)
            elif entry.is_dir():
                status = entry.stat()
                here = (status.st_dev, status.st_ino)
                if here not in above:  # a link may lead to a folder that it is in
                    walk(entry.path, name + "/", above | {here})

    top = os.stat(folder)  # noqa: PTH116
    walk(str(folder), "", frozenset({(top.st_dev, top.st_ino)}))
    if found and others:
        raise DataError(
            f"--data {folder}: holds {len(others):,} images of a kind that is not read here, such as {min(others)};"
            f" expected {', '.join(sorted(SUFFIXES))}; convert them, or move them away"
        )
    return sorted(found)


def load(folder: Path, files: Sequence[File], form: Form, max_bytes: int) -> dict[str, np.ndarray]:
    """Decodes the images of a folder; `vae_jax.data.decode` has the rules for their pixels.

    Args:
      folder: A folder of one of three kinds: images only; folders only, one for each class; or folders `train` and
        perhaps `test` (or `training`, `testing`, `val`, `valid`, `validation`) that are of one of the former kinds.
        Where a folder holds one folder and nothing else, that one counts.
      files: What `find` returns.
      form: What the images are brought into.
      max_bytes: The most bytes that all arrays together may take in memory.

    Returns:
      `train_images` and, if there are test images or else validation images, `test_images`, in the order of their
      names below `folder`; [images, height, width] if all are grey, or [images, height, width, 3] if all are colour.
      `train_labels` and `test_labels` if the classes have folders: the index in the sorted names of the classes of
      `train`. Test images of another class have no labels, nor have the other test images then.

    Raises:
      DataError: The folder is of another kind, or its images cannot be decoded into one array.
    """
    from vae_jax.data.decode import Encoded, decode

    parts = arrange(folder, [file.name for file in files])
    numbers = [image.number for images in parts.values() for image in images]

    def images() -> Iterator[Encoded]:
        for number in numbers:
            path = folder / files[number].name
            yield Encoded(str(path), path)

    decoded = decode(images, len(numbers), f"--data {folder}", form, max_bytes)
    classes = sorted({image.label for image in parts["train"] if image.label is not None})
    label_of = {label: index for index, label in enumerate(classes)}
    arrays: dict[str, np.ndarray] = {}
    for part, of_part in parts.items():
        arrays[f"{part}_images"], decoded = decoded[: len(of_part)], decoded[len(of_part) :]
        labels = [label_of[image.label] for image in of_part if image.label in label_of]
        if len(labels) == len(of_part):
            arrays[f"{part}_labels"] = np.array(labels, np.min_scalar_type(len(classes)))
    return arrays


def arrange(folder: Path, names: Sequence[str]) -> dict[str, list[Image]]:
    """The images of `train` and perhaps `test`, and the class of each.

    Args:
      folder: The folder, for messages.
      names: Of all image files below it, with slashes.

    Raises:
      DataError: It is not certain which images are for training, or which are of which class.
    """
    paths = _unwrap([(number, name.split("/")) for number, name in enumerate(names)])
    tops = Counter(parts[0] for _, parts in paths if len(parts) > 1)
    split_names = sorted(top for top in tops if top.lower() in SPLITS)
    if not split_names:
        return {"train": _classes(folder, paths)}
    strangers = sorted(tops.keys() - set(split_names))
    loose = [parts[0] for _, parts in paths if len(parts) == 1]
    if strangers or loose:
        beside = f"the folders {', '.join(strangers[:5])}" if strangers else f"{len(loose):,} images ({loose[0]}, ...)"
        raise DataError(
            f"--data {folder}: holds {' and '.join(split_names)}, and beside them {beside}; expected nothing beside"
            f" train and test; move the others away, or rename {split_names[0]} if it is a class"
        )
    by_split: dict[str, list[str]] = {}
    for name in split_names:
        by_split.setdefault(SPLITS[name.lower()], []).append(name)
    twice = next((same for same in by_split.values() if len(same) > 1), None)
    if twice or "train" not in by_split:
        raise DataError(
            f"--data {folder}: holds the folders {' and '.join(twice or split_names)}; expected one train, and perhaps"
            " one test or validation"
        )
    test = next((split for split in ("test", "validation") if split in by_split), None)
    if test == "test" and "validation" in by_split:
        say(f"--data {folder}: {by_split['validation'][0]} is not used; the test images are those in test")
    parts = {"train": by_split["train"][0]} | ({"test": by_split[test][0]} if test else {})
    return {
        part: _classes(folder, [(number, path[1:]) for number, path in paths if path[0] == name])
        for part, name in parts.items()
    }


def _unwrap(paths: list[tuple[int, list[str]]]) -> list[tuple[int, list[str]]]:
    """The paths without the folders that hold one folder and nothing else, except `train` and the like."""
    while all(len(parts) > 1 for _, parts in paths) and len({parts[0] for _, parts in paths}) == 1:
        if paths[0][1][0].lower() in SPLITS:
            break
        paths = [(number, parts[1:]) for number, parts in paths]
    return paths


def _classes(folder: Path, paths: list[tuple[int, list[str]]]) -> list[Image]:
    flat = [(number, parts) for number, parts in paths if len(parts) == 1]
    if len(flat) == len(paths):
        return [Image(number, None) for number, _ in paths]
    if flat:
        classes = sorted({parts[0] for _, parts in paths if len(parts) > 1})
        raise DataError(
            f"--data {folder}: holds {len(flat):,} images ({flat[0][1][0]}, ...) beside folders of images"
            f" ({', '.join(classes[:5])}); expected images only, or a folder for each class; move the others away"
        )
    for _, parts in paths:
        inner = next((name for name in parts[1:-1] if name.lower() in SPLITS), None)
        if inner:
            raise DataError(
                f"--data {folder}: holds a folder {inner} within {parts[0]}, and other folders of images beside"
                f" {parts[0]}; expected train and test at the top; name one of these folders"
            )
    return [Image(number, parts[0]) for number, parts in paths]
