"""Which source `--data` names."""

import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vae_jax.config import Stream
from vae_jax.data import idx, image_folder, mnist_family, npz, tfds
from vae_jax.data.cache import File, cached_for_user
from vae_jax.data.form import Form
from vae_jax.system.errors import DataError

BUNDLED = Path(__file__).parent / "mnist.npz"
TABLES = (".csv", ".csv.gz")
ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".7z", ".rar")
EXPECTED = (
    "mnist, tfds:NAME[/CONFIG][:VERSION], a folder (of images, or of IDX, CSV, Parquet or .mat files), or a file (.npz,"
    " .npy, .mat, .csv, .csv.gz, .parquet)"
)

Arrays = dict[str, Any]  # NumPy arrays; images may be MappedImages


def read(spec: str, data_dir: Path | None, form: Form, max_bytes: int, stream: Stream = "never") -> tuple[Arrays, str]:
    """Reads a source.

    Args:
      spec: As for `vae_jax.load`.
      data_dir: TFDS's folder.
      form: What encoded images are brought into; other images are left as they are.
      max_bytes: The most bytes that all arrays together may take in memory.
      stream: Whether images may stay in their file: those that are too large for memory (auto), or all (always).

    Returns:
      `train_images`, and perhaps `train_labels`, `test_images` and `test_labels`; and the source's name in messages.

    Raises:
      DataError: There is no such source, it is not certain which it is, or it cannot be read.
      OSError: A file cannot be read.
    """
    if spec == "mnist":
        return npz.load(BUNDLED, max_bytes), str(BUNDLED)
    if spec.startswith("tfds:"):
        return tfds.load(spec, data_dir, max_bytes), spec
    path = Path(spec)
    if spec and path.is_dir():
        return _read_folder(path, form, max_bytes), spec
    if path.is_file():
        return _read_file(path, form, max_bytes, stream), spec
    meant = _suggest(spec)
    raise DataError(
        f"--data {spec}: no such file or folder; {f'perhaps {meant}; ' if meant else ''}expected {EXPECTED}"
    )


def _suggest(spec: str) -> str | None:
    """The set of the MNIST family that was meant: in capitals, without its prefix, or as torchvision spells it."""

    def letters(name: str) -> str:
        return re.sub(r"[-_ ]", "", name)

    name, slash, config = spec.lower().removeprefix("tfds:").removesuffix(".npz").partition("/")
    found = next((known for known in mnist_family.SETS if letters(known) == letters(name)), None)
    return "mnist" if found == "mnist" and not slash else f"tfds:{found}{slash}{config}" if found else None


def _read_file(path: Path, form: Form, max_bytes: int, stream: Stream) -> Arrays:
    name = path.name.lower()
    if name.endswith(TABLES):
        return _read_tables(path, {"train": path}, max_bytes)
    if name.endswith(".mat"):
        return _read_mats(path, {"train": path}, max_bytes)
    if name.endswith(".parquet"):
        return _read_parquet(path, {"train": [path]}, form, max_bytes)
    if name.endswith(ARCHIVES):
        raise DataError(f"--data {path}: is an archive; expected {EXPECTED}; unpack it and name what was in it")
    if path.suffix.lower() in image_folder.SUFFIXES:
        raise DataError(f"--data {path}: is one image; expected a folder of images, at least 2; name the folder")
    # An uncompressed file is as large as its arrays.
    if stream == "always" or (stream == "auto" and path.stat().st_size > max_bytes):
        return npz.map_images(path, max_bytes) or npz.load(path, max_bytes)
    return npz.load(path, max_bytes)


def _read_folder(folder: Path, form: Form, max_bytes: int) -> Arrays:
    if idx.is_there(folder):
        return idx.load(folder, max_bytes)
    images = image_folder.find(folder)
    tables, mats, parquets = _named_parts(folder, TABLES), _named_parts(folder, (".mat",)), _find_parquets(folder)
    kinds = {"images": images, "CSV files": tables, ".mat files": mats, "Parquet files": parquets}
    found = [kind for kind, files in kinds.items() if files]
    if len(found) > 1:
        raise DataError(
            f"--data {folder}: holds {' and '.join(found)}; expected files of one kind; name one of its files or"
            " folders, or move the others away"
        )
    if tables:
        return _read_tables(folder, tables, max_bytes)
    if mats:
        return _read_mats(folder, mats, max_bytes)
    if parquets:
        from vae_jax.data import parquet

        return _read_parquet(folder, parquet.arrange(folder, parquets), form, max_bytes)
    if images:
        return cached_for_user(
            folder, form, images, lambda: image_folder.load(folder, images, form, max_bytes), max_bytes
        )
    raise DataError(f"--data {folder}: holds {_describe(folder)}; expected {EXPECTED}")


def _read_tables(source: Path, paths: dict[str, Path], max_bytes: int) -> Arrays:
    def decode() -> Arrays:
        from vae_jax.data import csv_table

        return csv_table.load(paths, max_bytes)

    return cached_for_user(source, "csv", _files(paths.values()), decode, max_bytes)


def _read_mats(source: Path, paths: dict[str, Path], max_bytes: int) -> Arrays:
    def decode() -> Arrays:
        from vae_jax.data import mat

        arrays = mat.load(paths["train"], max_bytes)
        if "test" in paths:
            left = max_bytes - sum(array.nbytes for array in arrays.values())
            test = mat.load(paths["test"], left)
            arrays |= {name.replace("train", "test"): test[name] for name in test if name.startswith("train")}
        return arrays

    return cached_for_user(source, "mat", _files(paths.values()), decode, max_bytes)


def _read_parquet(source: Path, parts: dict[str, list[Path]], form: Form, max_bytes: int) -> Arrays:
    def decode() -> Arrays:
        from vae_jax.data import parquet

        return parquet.load(f"--data {source}", parts, form, max_bytes)

    files = _files(path for paths in parts.values() for path in paths)
    return cached_for_user(source, (form, list(parts)), files, decode, max_bytes)


def _files(paths: Iterable[Path]) -> list[File]:
    return [File.of(str(path.resolve()), path.stat()) for path in paths]


def _named_parts(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """The files of `train` and perhaps `test`: train.csv, mnist_test.csv.gz, train_32x32.mat and the like."""
    parts: dict[str, Path] = {}
    # By name first: a folder may hold a hundred thousand images.
    for name in sorted(os.listdir(folder)):  # noqa: PTH208
        if name.startswith(".") or not name.lower().endswith(suffixes) or not (folder / name).is_file():
            continue
        path = folder / name
        for part in ("train", "test"):
            if part in re.split(r"[-_. ]", name.lower()):
                if part in parts:
                    raise DataError(
                        f"--data {folder}: holds {parts[part].name} and {path.name}; expected one file of {part}"
                        " images; move one of them away"
                    )
                parts[part] = path
    return parts if "train" in parts else {}


def _find_parquets(folder: Path) -> list[Path]:
    """The Parquet files in a folder, or in its `data`, or in another of its folders if that is the only one."""
    found = [_parquets(folder), _parquets(folder / "data")]
    places = [Path(entry) for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")]
    others = {place.name: files for place in places if (files := _parquets(place))}
    if not any(found) and len(others) > 1:
        names = ", ".join(sorted(others)[:8])
        raise DataError(f"--data {folder}: holds Parquet files in {names}; name one of these folders")
    return next(filter(None, [*found, *others.values()]), [])


def _parquets(place: Path) -> list[Path]:
    names = os.listdir(place) if place.is_dir() else []  # noqa: PTH208
    return sorted(place / name for name in names if name.endswith(".parquet") and not name.startswith("."))


def _describe(folder: Path) -> str:
    """What a folder holds, in a few words."""
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    suffixes = Counter(entry.suffix.lower() or "no suffix" for entry in entries if entry.is_file())
    folders = sum(entry.is_dir() for entry in entries)
    kinds = [f"{count:,} {suffix}" for suffix, count in suffixes.most_common(5)]
    more = ", ..." if len(suffixes) > 5 else ""
    files = f"{sum(suffixes.values()):,} files ({', '.join(kinds)}{more})" if kinds else "no files"
    return f"{files} and {folders:,} folders, none of them images" if entries else "nothing"
