"""Damaged image sets by the thousand: `python -m tests.fuzz.fuzz_data --inputs 200000` or `--minutes 5`.

Every input is a sound file with bytes changed, cut, repeated or put in, or an archive around such an array; `--source`
names one kind of file. What `vae_jax.load` makes of it has to be images in bounds or a `DataError` of one line, in
little memory and time. The first one that is not is kept and named, with exit code 1.
"""

import argparse
import gzip
import io
import os
import resource
import shutil
import sys
import tempfile
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import scipy.io
from PIL import Image

from vae_jax.data import Dataset, load
from vae_jax.system.errors import DataError

MAX_GB = 0.001
MAX_SECONDS = 2.0
MAX_GROWTH_MB = 100
IDX_NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
FORMATS = {"png": "PNG", "jpg": "JPEG", "gif": "GIF", "bmp": "BMP", "tif": "TIFF", "webp": "WEBP"}
# Of those that cannot hold all pixels.
SUFFIXES = {"RGBA": ["png", "tif", "webp"], "CMYK": ["jpg", "tif"], "P": ["png", "gif"]}
# Numbers that lengths and counts go wrong at.
NUMBERS = [0, 1, 2, 3, 4, 8, 127, 128, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1]


def sound_idx(rng: np.random.Generator) -> dict[str, bytes]:
    """Four files of a small set."""
    shape = rng.integers(1, 6, 2)
    files = {}
    for name in IDX_NAMES:
        count = 7 if name.startswith("train") else 3
        array = rng.integers(0, 256, (count, *shape) if "images" in name else count, np.uint8)
        files[name] = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()
    return files


def sound_arrays(rng: np.random.Generator) -> dict[str, bytes]:
    """The .npy files of a small archive."""
    shape = tuple(rng.integers(1, 5, rng.choice([2, 2, 2, 3])))
    dtype = rng.choice(["uint8", "uint8", "float32", "float64", "float16", "bool", ">f4", "int64", "object", "U3"])
    arrays: dict[str, np.ndarray] = {}
    for part, count in (("train", 7), ("test", 3)):
        if part == "train" or rng.random() < 0.7:
            images = rng.random((count, *shape)) * rng.choice([1, 255])
            arrays[f"{part}_images"] = (images if rng.random() < 0.8 else images.T).astype(dtype)
        if rng.random() < 0.7:
            arrays[f"{part}_labels"] = rng.integers(0, 10, count).astype(
                rng.choice(["uint8", "int64", ">i4", "float32"])
            )
    if rng.random() < 0.3:
        names = {"train_images": "x_train", "test_images": "x_test", "train_labels": "y_train", "test_labels": "y_test"}
        arrays = {names[name]: array for name, array in arrays.items()}
    files = {}
    for name, array in arrays.items():
        file = io.BytesIO()
        np.lib.format.write_array(file, array)
        files[f"{name}.npy"] = file.getvalue()
    return files


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """The same with one to four places changed."""
    data = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        # Headers are where it counts.
        place = int(rng.integers(0, min(len(data), rng.choice([16, 128, 1 << 20])) + 1))
        end = place + int(rng.integers(1, 9))
        match rng.integers(0, 8):
            case 0:
                data[place : place + 1] = rng.bytes(1)
            case 1:
                data[place:end] = rng.bytes(end - place)
            case 2:
                del data[place:]
            case 3:
                del data[place:end]
            case 4:
                data[place:place] = rng.bytes(end - place)
            case 5:
                data[place:place] = data[place:end]
            case 6:
                size = int(rng.choice([1, 2, 4, 8]))
                number = int(rng.choice(NUMBERS)) % (1 << 8 * size)
                data[place : place + size] = number.to_bytes(size, "big" if rng.random() < 0.5 else "little")
            case 7:
                # Digits of a text header.
                digits = [index for index, byte in enumerate(data[:128]) if 48 <= byte < 58]
                if digits:
                    data[int(rng.choice(digits))] = int(rng.choice(list(b"0123456789-(,")))
    return bytes(data)


def archive(files: dict[str, bytes], rng: np.random.Generator) -> bytes:
    file = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if rng.random() < 0.5 else zipfile.ZIP_STORED
    with zipfile.ZipFile(file, "w", method) as packed:
        for name, content in files.items():
            packed.writestr(name, content)
    return file.getvalue()


def gzipped(content: bytes) -> bytes:
    return gzip.compress(content, 1, mtime=0)  # without the time, so that a seed always gives the same inputs


def write_idx(folder: Path, rng: np.random.Generator) -> Path:
    files = sound_idx(rng)
    victim = str(rng.choice(IDX_NAMES))
    for name, content in files.items():
        path = folder / name
        if rng.random() < 0.3:
            path, inner = folder / f"{name}.gz", damaged(content, rng) if name == victim else content
            packed = gzipped(inner)
            # The damage is in the archive, or in what a sound archive holds.
            content = damaged(gzipped(content), rng) if name == victim and rng.random() < 0.5 else packed
        elif name == victim:
            content = damaged(content, rng)
        path.write_bytes(content)
    return folder


def write_npz(folder: Path, rng: np.random.Generator) -> Path:
    files = sound_arrays(rng)
    if rng.random() < 0.5:
        victim = str(rng.choice(list(files)))
        files[victim] = damaged(files[victim], rng)
        content = archive(files, rng)
    else:
        content = damaged(archive(files, rng), rng)
    (folder / "set.npz").write_bytes(content)
    return folder / "set.npz"


def sound_image(rng: np.random.Generator, mode: str) -> tuple[bytes, str]:
    """A file of 4 x 5 pixels, and the end of its name."""
    pixels = rng.integers(0, 256, (4, 5) if mode in ("L", "1", "P") else (4, 5, len(mode)), np.uint8)
    suffix = str(rng.choice(SUFFIXES.get(mode) or list(FORMATS)))
    image = Image.fromarray(pixels, mode if mode == "CMYK" else None)
    image = image.convert(mode) if mode in ("1", "P") else image
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = int(rng.integers(1, 9))
    image.save(file, FORMATS[suffix], exif=exif if suffix in ("jpg", "png", "webp") and rng.random() < 0.5 else b"")
    return file.getvalue(), suffix


def write_npy(folder: Path, rng: np.random.Generator) -> Path:
    content = next(
        content for name, content in sound_arrays(rng).items() if "train_images" in name or "x_train" in name
    )
    (folder / "set.npy").write_bytes(damaged(content, rng))
    return folder / "set.npy"


def write_images(folder: Path, rng: np.random.Generator) -> Path:
    """A flat folder, or one with classes."""
    mode = str(rng.choice(["L", "L", "RGB", "RGBA", "CMYK", "P", "1"]))
    victim, classes = int(rng.integers(0, 4)), rng.random() < 0.3
    for number in range(4):
        content, suffix = sound_image(rng, mode)
        path = folder / (f"class {number % 2}/{number}.{suffix}" if classes else f"{number}.{suffix}")
        path.parent.mkdir(exist_ok=True)
        sound = int(rng.integers(0, len(content))) if rng.random() < 0.5 else 0
        damage = content[:sound] + damaged(content[sound:], rng)
        path.write_bytes(damage if number == victim else content)
    return folder


def write_mat(folder: Path, rng: np.random.Generator) -> Path:
    dtype = rng.choice(["uint8", "float64", "float32", "int16"])
    images = (rng.random((7, *rng.integers(2, 5, 2))) * rng.choice([1, 255])).astype(dtype)
    arrays = {"X": images if rng.random() < 0.5 else np.moveaxis(images, 0, -1), "y": rng.integers(1, 11, (7, 1))}
    file = io.BytesIO()
    scipy.io.savemat(file, arrays, do_compression=bool(rng.random() < 0.3))
    content = file.getvalue()
    sound = 128 if rng.random() < 0.7 else 0  # the header alone is easily refused
    (folder / "set.mat").write_bytes(content[:sound] + damaged(content[sound:], rng))
    return folder / "set.mat"


def sound_csv(rng: np.random.Generator) -> bytes:
    rows = rng.integers(0, 256, (7, 9 + int(rng.random() < 0.7)))
    scale = rng.choice([1, 1, 255])
    lines = [",".join(str(value if scale == 1 else value / scale) for value in row) for row in rows.tolist()]
    if rng.random() < 0.3:
        lines.insert(0, ",".join(["label", *(f"pixel{number}" for number in range(9))][-rows.shape[1] :]))
    return "\n".join(lines).encode()


def write_csv(folder: Path, rng: np.random.Generator) -> Path:
    head, end, rows = sound_csv(rng).partition(b"\n")
    (folder / "train.csv").write_bytes(
        head + end + damaged(rows, rng) if rng.random() < 0.7 else damaged(head, rng) + end + rows
    )
    return folder / "train.csv"


def write_csv_gz(folder: Path, rng: np.random.Generator) -> Path:
    content = sound_csv(rng)
    packed = damaged(gzipped(content), rng) if rng.random() < 0.7 else gzipped(damaged(content, rng))
    (folder / "train.csv.gz").write_bytes(packed)
    return folder / "train.csv.gz"


def write_parquet(folder: Path, rng: np.random.Generator) -> Path:
    """A column of structures, of bytes or of lists of numbers, and labels."""
    encoded = [sound_image(rng, "L")[0] for _ in range(5)]
    column = [
        pa.array([{"bytes": content, "path": None} for content in encoded]),
        pa.array(encoded),
        pa.array(rng.integers(0, 256, (5, 9)).tolist()),
        pa.array(rng.random((5, 3, 3)).tolist()),
    ][int(rng.integers(0, 4))]
    file = io.BytesIO()
    table = pa.table({"image": column, "label": rng.integers(0, 10, 5)})
    compression = str(rng.choice(["none", "snappy", "gzip", "zstd"]))
    pyarrow.parquet.write_table(table, file, compression=compression, use_dictionary=bool(rng.random() < 0.5))
    content = file.getvalue()
    # The footer is at the end.
    content = damaged(content, rng) if rng.random() < 0.5 else damaged(content[::-1], rng)[::-1]
    (folder / "set.parquet").write_bytes(content)
    return folder / "set.parquet"


# Writes one damaged set into an empty folder, and returns what to give to `load`.
WRITERS = {
    "idx": write_idx,
    "npz": write_npz,
    "npy": write_npy,
    "images": write_images,
    "mat": write_mat,
    "csv": write_csv,
    "csv.gz": write_csv_gz,
    "parquet": write_parquet,
}


def check(spec: str) -> str:
    """Loads a set.

    Returns:
      `arrays`, or `refused`.

    Raises:
      AssertionError: What came out is neither images in bounds nor a `DataError` of one line.
    """
    try:
        dataset = load(spec, max_gb=MAX_GB)
    except DataError as error:
        assert len(str(error)) < 1000 and "\n" not in str(error), f"a long message: {error}"
        return "refused"
    check_dataset(dataset)
    return "arrays"


def check_dataset(dataset: Dataset) -> None:
    """Raises AssertionError where a data set is not what `Dataset` promises."""
    for images, labels in (dataset[:2], dataset[2:]):
        assert images.ndim in (3, 4) and images.size, images.shape
        assert images.dtype == np.uint8 or (images.dtype == np.float32 and images.min() >= 0 and images.max() <= 1)
        assert labels is None or labels.shape == (len(images),)
    assert dataset.train_images.shape[1:] == dataset.test_images.shape[1:]
    assert dataset.train_images.dtype == dataset.test_images.dtype


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=200_000)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--source", choices=WRITERS)
    options = parser.parse_args()
    sources = [options.source] if options.source else list(WRITERS)
    start = time.monotonic()
    outcomes = Counter()
    slowest = 0.0
    base = None
    peak = 0
    with tempfile.TemporaryDirectory() as parent:
        folder, cache = Path(parent) / "set", Path(parent) / "cache"
        os.environ["XDG_CACHE_HOME"] = str(cache)
        for number in range(options.inputs):
            if time.monotonic() - start > 60 * options.minutes:
                break
            for place in (folder, cache):
                shutil.rmtree(place, ignore_errors=True)
            folder.mkdir()
            source = sources[number % len(sources)]
            spec = WRITERS[source](folder, np.random.default_rng([options.seed, number]))
            began = time.process_time()  # of this process alone, however busy the machine
            try:
                outcomes[source, check(str(spec))] += 1
            except Exception as error:
                kept = Path(tempfile.mkdtemp(prefix="fuzz-"))
                shutil.copytree(folder, kept, dirs_exist_ok=True)
                print(f"input {number} of seed {options.seed} ({source}), kept in {kept}: {error!r}")
                sys.exit(1)
            seconds = time.process_time() - began
            slowest = max(slowest, seconds)
            # Kilobytes at the peak; after a thousand inputs, every library has what it keeps.
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            base = peak if number == 1000 else base
            if seconds > MAX_SECONDS or (base and peak - base > MAX_GROWTH_MB * 1000):
                print(f"input {number} of seed {options.seed} ({source}): {seconds:.1f} s, peak {peak / 1000:.0f} MB")
                sys.exit(1)
    for source in sources:
        print(f"{source}: {outcomes[source, 'refused']:,} refused, {outcomes[source, 'arrays']:,} arrays")
    print(
        f"{outcomes.total():,} inputs in {time.monotonic() - start:.0f} s; slowest {slowest:.2f} s, memory peak"
        f" {peak / 1000:.0f} MB"
    )


if __name__ == "__main__":
    main()
