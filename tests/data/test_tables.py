"""CSV, .mat and Parquet files as people have them: read where it is certain what they hold, or else refused."""

import gzip
import io
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import scipy.io
from PIL import Image

from vae_jax.data.dataset import load
from vae_jax.system.errors import DataError

TRAIN = np.arange(7 * 9, dtype=np.uint8).reshape(7, 3, 3)
TEST = TRAIN[:3] + 100
LABELS = np.array([5, 0, 4, 1, 9, 2, 1])
PIXELS = ",".join(f"pixel{number}" for number in range(9))


def table(images: np.ndarray, labels: np.ndarray | None = LABELS, last: bool = False) -> str:
    """Lines of a label, if there are labels, and pixels."""
    rows = images.reshape(len(images), -1)
    if labels is not None:
        column = labels[: len(rows), None].astype(rows.dtype)
        rows = np.concatenate([rows, column] if last else [column, rows], axis=1)
    return "\n".join(",".join(map(str, row)) for row in rows.tolist())


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def together(dataset) -> list[tuple[bytes, int | None]]:
    """All images of both parts with their labels, in any order."""
    pairs = []
    for images, labels in (dataset[:2], dataset[2:]):
        pairs += zip(map(bytes, images), [None] * len(images) if labels is None else labels.tolist(), strict=True)
    return sorted(pairs)


def expected(labels: np.ndarray | None = LABELS) -> list[tuple[bytes, int | None]]:
    return sorted(zip(map(bytes, TRAIN), [None] * 7 if labels is None else labels.tolist(), strict=True))


CSV = {
    "kaggle": (f"label,{PIXELS}\n{table(TRAIN)}", LABELS),
    "quoted, in lines of Windows": (f'"label","{PIXELS.replace(",", chr(34) + "," + chr(34))}"\r\n'
                                    + table(TRAIN).replace("\n", "\r\n") + "\r\n", LABELS),
    "rows and columns": ("label,1x1,1x2,1x3,2x1,2x2,2x3,3x1,3x2,3x3\n" + table(TRAIN), LABELS),
    "label last": (f"{PIXELS},class\n{table(TRAIN, last=True)}", LABELS),
    "no header": (table(TRAIN) + "\n", LABELS),
    "byte order mark": ("\ufeff" + table(TRAIN), LABELS),
    "header and mark": (f"\ufefflabel,{PIXELS}\n{table(TRAIN)}", LABELS),
    "pixels only": (table(TRAIN, None), None),
    "named pixels only": (f"{PIXELS}\n{table(TRAIN, None)}", None),
    "whole floats": (table(TRAIN.astype(float)), LABELS),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz"])
@pytest.mark.parametrize(("content", "labels"), CSV.values(), ids=CSV)
def test_csv_files(tmp_path, content, labels, suffix):
    assert together(load(write(tmp_path / f"set{suffix}", content))) == expected(labels)


def test_csv_files_of_floats(tmp_path):
    found = load(write(tmp_path / "set.csv", table(TRAIN / 255)))
    assert found.train_images.dtype == np.float32
    np.testing.assert_array_equal(found.train_images[0], (TRAIN[0] / 255).astype(np.float32))


@pytest.mark.parametrize(
    ("train", "test"),
    [("train.csv", "test.csv"), ("mnist_train.csv.gz", "mnist_test.csv.gz"), ("Train.csv", "t-test.csv")],
)
def test_folders_with_two_csv_files(tmp_path, train, test):
    """Kaggle's test.csv has no labels; its sample_submission.csv is none of the two."""
    write(tmp_path / train, f"label,{PIXELS}\n{table(TRAIN)}")
    write(tmp_path / test, f"{PIXELS}\n{table(TEST, None)}")
    write(tmp_path / "sample_submission.csv", "ImageId,Label\n1,0")
    found = load(tmp_path)
    np.testing.assert_array_equal(found.train_images, TRAIN)
    np.testing.assert_array_equal(found.test_images, TEST)
    np.testing.assert_array_equal(found.train_labels, LABELS)
    assert found.test_labels is None


REFUSED_CSV = {
    "nothing": ("", "its first line is empty"),
    "a number too few": (table(TRAIN)[:-3], "CSV parse error: Expected 10 columns, got 9"),
    "text": (table(TRAIN) + "x", "is not a sound CSV file"),
    "missing": (table(TRAIN).replace(",12,", ",,"), "is not a sound CSV file"),
    "no square": ("1,2,3,4,5,6\n1,2,3,4,5,6", "has 6 columns and no header; expected n x n pixels"),
    "semicolons": (table(TRAIN).replace(",", ";"), "has the columns 5;0;1;2"),
    "an index": ("id," + PIXELS[:-7] + "\n" + table(TRAIN, None), r"has the columns id, pixel0, .*\(9 in all\)"),
    "another order": ("pixel0,pixel10,pixel2,pixel3\n1,2,3,4", "numbered in their order"),
    "labels last, unnamed": (table(TRAIN * [[[0, 1, 1], [1, 1, 1], [1, 1, 1]]], last=True), "labels may come last"),
    "too bright": (table(TRAIN.astype(int) * 9), "holds floats from 0 to 558; expected floats in"),
    "half values": (table(TRAIN / 2), "holds floats from 0 to 31; expected floats in"),
    "not a number": (table(TRAIN).replace(",12,", ",nan,"), r"holds NaN"),
    "only a header": (f"label,{PIXELS}\n", "is empty"),
}


@pytest.mark.parametrize(("content", "message"), REFUSED_CSV.values(), ids=REFUSED_CSV)
def test_bad_csv_files_are_refused(tmp_path, content, message):
    path = write(tmp_path / "set.csv", content)
    with pytest.raises(DataError, match=message) as refusal:
        load(path)
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


def test_damaged_gzip_is_refused(tmp_path):
    path = write(tmp_path / "set.csv.gz", table(TRAIN))
    sound = path.read_bytes()
    for content in (sound[:-9], sound[:-8] + b"1234" + sound[-4:], table(TRAIN).encode(), sound[:30] + sound[31:]):
        path.write_bytes(content)
        with pytest.raises(DataError, match="is not a sound CSV file"):
            load(path)


def mat(path: Path, **variables: np.ndarray) -> Path:
    scipy.io.savemat(path, variables, do_compression=True)
    return path


COLUMN = LABELS[:, None]
LAST = np.moveaxis(TRAIN, 0, -1)
MAT = {
    "ours": ({"train_images": TRAIN, "train_labels": LABELS}, LABELS),
    "X and y": ({"X": TRAIN, "y": COLUMN}, LABELS),
    "images last": ({"X": LAST, "y": COLUMN}, LABELS),
    "rows": ({"data": TRAIN.reshape(7, 9), "label": LABELS.astype(float)}, LABELS),
    "columns": ({"data": TRAIN.reshape(7, 9).T, "label": LABELS.astype(float)}, LABELS),
    "whole floats": ({"images": TRAIN.astype(float), "labels": COLUMN}, LABELS),
    "images alone": ({"images": TRAIN, "notes": np.array("text")}, None),
    "rows alone": ({"X": TRAIN.reshape(7, 9)}, None),
}


@pytest.mark.parametrize(("variables", "labels"), MAT.values(), ids=MAT)
def test_mat_files(tmp_path, variables, labels):
    assert together(load(mat(tmp_path / "set.mat", **variables))) == expected(labels)


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int16", "uint16", "int64", "float32", "float64"])
@pytest.mark.parametrize("compressed", [False, True])
def test_every_class_of_numbers(tmp_path, dtype, compressed):
    images = (TRAIN > 30 if dtype == "bool" else TRAIN).astype(dtype)
    scipy.io.savemat(tmp_path / "set.mat", {"n": [1], "X": images, "y": COLUMN}, do_compression=compressed)
    np.savez(tmp_path / "set.npz", train_images=images, train_labels=LABELS)
    assert together(load(tmp_path / "set.mat")) == together(load(tmp_path / "set.npz"))


def test_svhn(tmp_path):
    """Two files, images last, labels from 1 to 10, which stay as they are."""
    colour = np.repeat(LAST[:, :, None, :], 3, axis=2)
    mat(tmp_path / "train_32x32.mat", X=colour, y=COLUMN + 1)
    mat(tmp_path / "test_32x32.mat", X=colour[..., :4] + 9, y=COLUMN[:4] + 1)
    mat(tmp_path / "extra_32x32.mat", X=colour, y=COLUMN)
    found = load(tmp_path)
    np.testing.assert_array_equal(found.train_images[..., 1], TRAIN)
    np.testing.assert_array_equal(found.test_images[..., 2], TRAIN[:4] + 9)
    np.testing.assert_array_equal(found.train_labels, LABELS + 1)


REFUSED_MAT = {
    "last, not told": ({"X": LAST}, r"shape \[3, 3, 7\], and no labels that tell the number of images; expected"),
    "colour, not told": ({"X": np.zeros((32, 32, 3, 90))}, "no labels that tell"),
    "both are squares": ({"X": np.zeros((4, 9))}, "no labels that tell"),
    "other labels": ({"X": LAST, "y": COLUMN[:4]}, r"shape \[3, 3, 7\] and 4 labels"),
    "cube": ({"X": TRAIN[:3], "y": COLUMN[:3]}, r"shape \[3, 3, 3\] and 3 labels"),
    "other names": ({"a": TRAIN, "b": LABELS}, r"holds a \(7 x 3 x 3 uint8\), b \(1 x 7 int64\); expected images in"),
    "two of a name": ({"X": TRAIN, "x": TRAIN}, "one of each name"),
    "cells": ({"X": np.array([[TRAIN, 1]], object)}, "is of class cell; expected numbers"),
}


@pytest.mark.parametrize(("variables", "message"), REFUSED_MAT.values(), ids=REFUSED_MAT)
def test_uncertain_mat_files_are_refused(tmp_path, variables, message):
    path = mat(tmp_path / "set.mat", **variables)
    with pytest.raises(DataError, match=message) as refusal:
        load(path)
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


def test_other_mat_files_are_refused(tmp_path):
    for content, message in [
        (b"MATLAB 7.3 MAT-file, Platform: GLNXA64" + bytes(474) + b"\x89HDF\r\n\x1a\n", "version 7.3 .* '-v7'"),
        (b"\x89HDF\r\n\x1a\n" + bytes(600), "of MATLAB's version 7.3"),
        (b"", "is not a sound .mat file"),
        (b"text", "is not a sound .mat file"),
        (mat(tmp_path / "sound.mat", X=TRAIN, y=COLUMN).read_bytes()[:-20], "is not a sound .mat file"),
    ]:
        path = write(tmp_path / "set.mat", content)
        with pytest.raises(DataError, match=message):
            load(path)


def encoded(images: np.ndarray) -> list[bytes]:
    files = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        files.append(file.getvalue())
    return files


def structures(images: np.ndarray) -> list[dict]:
    return [{"bytes": content, "path": None} for content in encoded(images)]


def parquet(path: Path, **columns) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pa.table(columns), path, row_group_size=4)
    return path


PARQUET = {
    "hugging face": ({"image": structures(TRAIN), "label": LABELS}, LABELS),
    "fine labels": ({"img": structures(TRAIN), "fine_label": LABELS, "coarse_label": LABELS // 2}, LABELS),
    "bytes": ({"picture": encoded(TRAIN), "labels": LABELS.astype(np.int8)}, LABELS),
    "nested lists": ({"image": TRAIN.tolist(), "label": LABELS}, LABELS),
    "flat lists": ({"pixels": TRAIN.reshape(7, 9).tolist(), "label": LABELS}, LABELS),
    "lists of one length": ({"pixels": pa.FixedSizeListArray.from_arrays(TRAIN.ravel(), 9)}, None),
    "labels are text": ({"image": structures(TRAIN), "label": list("abcdefg")}, None),
}


@pytest.mark.parametrize(("columns", "labels"), PARQUET.values(), ids=PARQUET)
def test_parquet_files(tmp_path, columns, labels):
    assert together(load(parquet(tmp_path / "set.parquet", **columns))) == expected(labels)


@pytest.mark.parametrize("place", [".", "data", "mnist"])
@pytest.mark.parametrize("test", ["test", "validation"])
def test_folders_of_hugging_face(tmp_path, place, test):
    """In shards, with what else such a folder holds."""
    for shard, rows in enumerate((slice(0, 5), slice(5, 7))):
        columns = {"image": structures(TRAIN[rows]), "label": LABELS[rows]}
        parquet(tmp_path / place / f"train-{shard:05}-of-00002.parquet", **columns)
    parquet(tmp_path / place / f"{test}-00000-of-00001-0a1b.parquet", image=structures(TEST), label=LABELS[:3])
    write(tmp_path / "README.md", "text")
    found = load(tmp_path)
    np.testing.assert_array_equal(found.train_images, TRAIN)
    np.testing.assert_array_equal(found.train_labels, LABELS)
    np.testing.assert_array_equal(found.test_images, TEST)
    np.testing.assert_array_equal(found.test_labels, LABELS[:3])
    (tmp_path / place / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(
        DataError, match=r"holds train-00000-of-00002\.parquet, but not all 2 of its kind; add the others"
    ):
        load(tmp_path)


REFUSED_PARQUET = {
    "no image": ([None, *structures(TRAIN)], r"row 0 holds no image"),
    "no bytes": ([*structures(TRAIN), {"bytes": None, "path": "a.png"}], r"row 7 holds no image"),
    "no picture": ([*structures(TRAIN), {"bytes": b"text", "path": "a.png"}], "row 7: cannot be decoded"),
    "two sizes": (structures(TRAIN) + structures(TRAIN[:1, :2]), r"2 sizes, 3 x 3 \(7\), 2 x 3 \(1\); .* --image-size"),
    "two lengths": ([[1, 2, 3, 4], [1, 2, 3]], r"images of several lengths \(\[4, 3\]\); expected one"),
    "a missing number": ([[1, 2, 3, 4], [1, None, 3, 4]], "1 numbers are missing"),
    "a missing list": ([[1, 2, 3, 4], None], "several lengths"),
    "text": (["a", "b"], r"has the columns image \(string\); expected one of images"),
    "none": (pa.array([], pa.binary()), "holds no images"),
}


@pytest.mark.parametrize(("column", "message"), REFUSED_PARQUET.values(), ids=REFUSED_PARQUET)
def test_bad_parquet_files_are_refused(tmp_path, column, message):
    path = parquet(tmp_path / "set.parquet", image=column)
    with pytest.raises(DataError, match=message) as refusal:
        load(path)
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


def test_damaged_parquet_files_are_refused(tmp_path):
    path = parquet(tmp_path / "set.parquet", image=structures(TRAIN))
    sound = path.read_bytes()
    for content in (
        b"",
        b"PAR1",
        sound[:-9],
        sound[:40] + bytes(40) + sound[80:],
        sound[:-60] + bytes(40) + sound[-20:],
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"is not a sound Parquet file|cannot be decoded"):
            load(path)


def test_damaged_statistics_do_not_end_the_process(tmp_path):
    """pyarrow, asked for the sizes of such a column, would."""
    path = parquet(tmp_path / "set.parquet", image=TRAIN.tolist())
    sound = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(sound)
        damaged[-int(rng.integers(9, 300))] ^= 1 << int(rng.integers(0, 8))
        path.write_bytes(damaged)
        try:
            load(path)
        except DataError as error:
            assert "\n" not in str(error)


def bomb_csv(path: Path) -> Path:
    return write(path / "set.csv.gz", (b"0," * 4095 + b"0\n") * 12_500)


def bomb_mat(path: Path) -> Path:
    return mat(path / "set.mat", X=np.zeros((50, 1000, 1000), np.uint8))


def bomb_parquet(path: Path) -> Path:
    return parquet(
        path / "set.parquet", image=pa.FixedSizeListArray.from_arrays(np.zeros(8_000_000, np.uint8), 4_000_000)
    )


BOMBS = [(bomb_csv, 5e7), (bomb_mat, 5e7), (bomb_parquet, 8e6)]


@pytest.mark.parametrize(("bomb", "size"), BOMBS)
def test_bombs_take_no_memory(tmp_path, bomb, size):
    """Files of a few kilobytes that unpack to megabytes, a limit of 1 MB: refused without ever holding them."""
    path = bomb(tmp_path)
    assert path.stat().st_size < size / 100
    tracemalloc.start()
    tracemalloc.reset_peak()
    before = pa.default_memory_pool().max_memory()
    with pytest.raises(DataError, match="raise --max-data-gb"):
        load(path, max_gb=0.001)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e7
    assert pa.default_memory_pool().max_memory() <= max(before, 3e7)


FOLDERS = {
    "nothing": ([], "holds nothing; expected mnist, tfds:NAME"),
    "other files": (
        ["a.txt", "b.txt", "c.xlsx", "d/e.txt"],
        r"holds 3 files \(2 .txt, 1 .xlsx\) and 1 folders, none of",
    ),
    "two kinds": (["train.csv", "a.png"], "holds images and CSV files; expected files of one kind; name one of its"),
    "two of train": (
        ["train.csv", "mnist_train.csv"],
        "holds mnist_train.csv and train.csv; expected one file of train",
    ),
    "unknown parts": (
        ["a.parquet", "b.parquet"],
        "holds a.parquet, and 1 more .parquet files; expected names that begin",
    ),
    "no train": (["test-0.parquet", "val-0.parquet"], r"holds test-0.parquet, but no train-\*.parquet"),
    "two sets": (["a/train.parquet", "b/train.parquet"], "holds Parquet files in a, b; name one of these folders"),
}


@pytest.mark.parametrize(("names", "message"), FOLDERS.values(), ids=FOLDERS)
def test_other_folders_are_refused(tmp_path, names, message):
    for name in names:
        write(tmp_path / name, "")
    with pytest.raises(DataError, match=message) as refusal:
        load(tmp_path)
    assert str(tmp_path) in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_single_image_is_no_set(tmp_path):
    Image.fromarray(TRAIN[0]).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png: is one image; expected a folder of images, at least 2"):
        load(tmp_path / "a.png")
