"""Every source except TFDS: reads sound sets, and refuses all others in one line."""

import gzip
import hashlib
import io
import os
import shlex
import sys
import tempfile
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.data.tfds_server import idx_bytes, idx_files
from tests.fuzz.fuzz_data import IDX_NAMES, check, check_dataset, damaged, sound_arrays, sound_idx
from vae_jax.config import TrainConfig
from vae_jax.data.dataset import Dataset, checked, load
from vae_jax.system import command_line
from vae_jax.system.errors import DataError
from vae_jax.train import fit

SHA256 = {
    "train_images": "741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757",
    "train_labels": "1feba77c54802fa5339a11837ea4b2866434b83314ec45192930f1df69120c13",
    "test_images": "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161",
    "test_labels": "ddeff807876a9661a1110d45c266c86239a3a1b7d37da0c3716a7a683c852ff5",
}
TRAIN = np.arange(1, 7 * 4 * 5 + 1, dtype=np.uint8).reshape(7, 4, 5)
TEST = TRAIN[:3] + 100
LABELS = np.arange(7, dtype=np.uint8)
SMALL: dict[str, np.ndarray] = {
    "train_images": TRAIN,
    "train_labels": LABELS,
    "test_images": TEST,
    "test_labels": LABELS[:3],
}


def write_idx(folder: Path, **changed: np.ndarray | bytes) -> Path:
    """A folder of four files; `changed` ones hold other arrays, or other bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (part, array) in zip(IDX_NAMES, SMALL.items(), strict=True):
        content = changed.get(part, array)
        (folder / name).write_bytes(content if isinstance(content, bytes) else idx_bytes(content))
    return folder


def write_npz(path: Path, **arrays: np.ndarray) -> Path:
    np.savez_compressed(path, **(arrays or SMALL))  # pyright: ignore[reportArgumentType]
    return path


def assert_small(dataset) -> None:
    for found, expected in zip(dataset, SMALL.values(), strict=True):
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == expected.dtype


def test_the_bundled_set_is_the_real_mnist(mnist):
    assert mnist.train_images.shape == (60000, 28, 28)
    assert mnist.test_images.shape == (10000, 28, 28)
    assert mnist.train_labels.shape == (60000,)
    assert mnist.test_labels.shape == (10000,)
    for name, array in mnist._asdict().items():
        assert array.dtype == "uint8"
        assert hashlib.sha256(array.tobytes()).hexdigest() == SHA256[name], name


@pytest.mark.parametrize("place", [".", "raw", "MNIST/raw"])
@pytest.mark.parametrize("zipped", [False, True])
def test_idx_folder(tmp_path, place, zipped):
    folder = write_idx(tmp_path / place)
    if zipped:
        for path in list(folder.iterdir()):
            Path(f"{path}.gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    assert_small(load(str(tmp_path)))


def test_idx_names_with_a_dot(tmp_path):
    for path in list(write_idx(tmp_path).iterdir()):
        path.rename(path.with_name(path.name.replace("-idx", ".idx")))
    assert_small(load(str(tmp_path)))


def test_idx_with_channels_and_the_unpacked_file_first(tmp_path):
    colour = np.arange(7 * 2 * 3 * 3, dtype=np.uint8).reshape(7, 2, 3, 3)
    write_idx(tmp_path, train_images=colour, test_images=colour[:3])
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"never looked at")
    dataset = load(str(tmp_path))
    np.testing.assert_array_equal(dataset.train_images, colour)
    assert dataset.image_shape == (2, 3, 3)


def test_the_four_original_files(tmp_path, mnist):
    """The whole of MNIST as its four gzipped files."""
    for name, content in idx_files(mnist).items():
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content, 1))
    dataset = load(str(tmp_path))
    for found, expected in zip(dataset, mnist, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_other_sizes_and_floats_train(tmp_path):
    """The model takes the size of the images, and the run's files tell it and the kind of pixels."""
    path = write_npz(tmp_path / "set.npz", train_images=TRAIN.astype(np.float64) / 255)
    config = TrainConfig(
        data=str(path), epochs=1, hidden_dim=4, workdir=tmp_path / "run", export=tmp_path / "vae.pth", binarize="static"
    )
    state, history = fit(config)
    assert state.model.pixels == 20
    assert np.isfinite(history[0].test_loss)
    assert history[0].pixels == "binary"
    assert '"pixels": "binary"' in (tmp_path / "run" / "metrics.jsonl").read_text()
    text = (tmp_path / "run" / "config.json").read_text()
    assert '"image_shape": [\n    4,\n    5\n  ]' in text and '"pixels": "binary"' in text


def test_npz_with_our_names(tmp_path):
    assert_small(load(str(write_npz(tmp_path / "set.npz"))))


def test_npz_with_keras_names(tmp_path):
    path = write_npz(tmp_path / "set.npz", x_train=TRAIN, y_train=LABELS, x_test=TEST, y_test=LABELS[:3])
    assert_small(load(str(path)))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4", ">f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npz_of_floats(tmp_path, dtype, order):
    images = np.asarray(TRAIN / 255, dtype, order=order)
    dataset = load(str(write_npz(tmp_path / "set.npz", train_images=images, test_images=images)))
    assert dataset.train_images.dtype == np.float32 and dataset.train_labels is None
    np.testing.assert_array_equal(dataset.test_images, images.astype(np.float32))


@pytest.mark.parametrize("dtype", ["bool", "uint8", "float32"])
def test_binary_sets_are_black_and_white(tmp_path, dtype):
    on = TRAIN % 3 == 0
    dataset = load(str(write_npz(tmp_path / "set.npz", train_images=on.astype(dtype), test_images=on.astype(dtype))))
    np.testing.assert_array_equal(dataset.train_images, on * (1 if dtype == "float32" else 255))
    assert dataset.pixels("none") == "binary"


def test_one_channel_is_none(tmp_path):
    dataset = load(str(write_npz(tmp_path / "set.npz", train_images=TRAIN[..., None], test_images=TEST[..., None])))
    assert dataset.image_shape == (4, 5)
    assert dataset.pixels("none") == "grey" and dataset.pixels("dynamic") == "binary"


def test_a_set_without_test_images_gives_up_a_seventh(tmp_path):
    images = np.arange(700, dtype=np.uint16).view(np.uint8).reshape(700, 1, 2)  # each says its number
    labels = np.arange(700, dtype=np.int32)
    path = str(write_npz(tmp_path / "set.npz", train_images=images, train_labels=labels))
    first, second = load(path), load(path)
    assert len(first.test_images) == 100 and len(first.train_images) == 600
    np.testing.assert_array_equal(first.test_images, second.test_images)
    assert first.train_labels is not None and first.test_labels is not None
    np.testing.assert_array_equal(first.test_images, images[first.test_labels])
    np.testing.assert_array_equal(first.train_images, images[first.train_labels])
    assert (np.diff(first.test_labels) > 0).all() and (np.diff(first.train_labels) > 0).all()
    # The rule is for good: a change would make old and new test losses differ.
    assert first.test_labels[:8].tolist() == [2, 3, 11, 13, 20, 21, 32, 48]


PACKED = gzip.compress(idx_bytes(TRAIN))
REFUSED_IDX = {
    "magic number": ({"train_images": b"\0\0\x0d\3" + bytes(12)}, "begins with 0x00000d03; expected the magic number"),
    "labels for images": ({"train_images": LABELS}, "begins with 0x00000801; expected .* 0x00000803 .3 dimensions"),
    "images for labels": ({"test_labels": TEST}, "begins with 0x00000803; expected .* 0x00000801"),
    "gzipped twice": ({"train_images": gzip.compress(PACKED)}, "begins with 0x1f8b0800.*gzipped at most once"),
    "nothing": ({"train_images": b""}, "ends within its header"),
    "half a header": ({"train_images": idx_bytes(TRAIN)[:10]}, "ends within its header"),
    "too short": (
        {"train_images": idx_bytes(TRAIN)[:-1]},
        r"\[7, 4, 5\], 140 bytes.* more than the file can hold|ends",
    ),
    "too long": ({"test_labels": idx_bytes(LABELS[:3]) + b"\0"}, "continues after 3 bytes"),
    "no images": ({"train_images": TRAIN[:0]}, r"is empty \(shape \[0, 4, 5\]\)"),
    "no pixels": ({"train_images": TRAIN[:, :0]}, r"is empty \(shape \[7, 0, 5\]\)"),
    "gzip cut": ({"train_images": PACKED[:-10]}, "damaged gzip file"),
    "gzip flipped": ({"train_images": PACKED[:-6] + b"\0" + PACKED[-5:]}, "damaged gzip file"),
    "gzip of too little": ({"train_images": gzip.compress(idx_bytes(TRAIN)[:-1])}, "ends after 139 bytes"),
    "gzip of too much": ({"train_images": gzip.compress(idx_bytes(TRAIN) + b"\0")}, "continues after 140 bytes"),
    "other test size": ({"test_images": TEST[:, :3]}, r"of shape \[4, 5\], test images uint8 of shape \[3, 5\]"),
    "bomb": ({"train_images": b"\0\0\x08\3" + b"\0\1\0\0" * 3}, "281,475.0 GB; expected at most"),
    "lie": ({"train_images": gzip.compress(b"\0\0\x08\3" + b"\0\0\1\0" * 3)}, "more than the file can hold"),
}


@pytest.mark.parametrize(("changed", "message"), REFUSED_IDX.values(), ids=REFUSED_IDX)
def test_damaged_idx_folders_are_refused(tmp_path, changed, message):
    folder = write_idx(tmp_path / "set", **changed)
    with pytest.raises(DataError, match=message) as refusal:
        load(str(folder))
    assert_one_line_about(refusal.value, folder)


DAMAGES = [(name, damage) for name in IDX_NAMES for damage in ("cut", "magic")]
DAMAGES += [(name, "missing") for name in IDX_NAMES if "images" in name]  # labels may be missing


@pytest.mark.parametrize(
    ("name", "damage"), [case for case in DAMAGES if "labels" not in case[0] or case[1] != "missing"]
)
def test_any_one_damaged_file_is_refused_by_the_command(tmp_path, monkeypatch, capsys, name, damage):
    folder = write_idx(tmp_path / "set")
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if damage != "missing":
        (folder / name).write_bytes(content[:-1] if damage == "cut" else b"\1" + content[1:])
    error = refuse(monkeypatch, capsys, tmp_path, str(folder))
    assert name.split("-idx")[0] in error


def refuse(monkeypatch, capsys, tmp_path: Path, spec: str, *more: str) -> str:
    """Runs the command, which has to refuse with one line and code 2 and to write nothing."""
    before = sorted(tmp_path.rglob("*"))
    arguments = ["train", "--data", spec, "--workdir", f"{tmp_path}/run", "--export", f"{tmp_path}/vae.pth", *more]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stop:
        command_line.run(fit, TrainConfig, "train")
    assert stop.value.code == 2
    assert sorted(tmp_path.rglob("*")) == before
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("error: ") and error.count("\n") == 1
    return error


def assert_one_line_about(error: DataError, path: Path) -> None:
    assert str(path) in str(error) and "\n" not in str(error)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names of fields that old NumPys cannot read
        np.lib.format.write_array(file, array, allow_pickle=True)
    return file.getvalue()


def npy_header(shape: str, descr: str = "'|u1'") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text


class Bomb:
    """Unpickling it would end the tests."""

    def __reduce__(self):
        return os._exit, (13,)


REFUSED_NPY = {
    "objects": (npy(np.array([[[Bomb()]]], object)), "holds Python objects, which are never unpickled"),
    "integers": (npy(TRAIN.astype(np.int64) * 2), "holds integers from 2 to 280; expected integers from 0 to 255"),
    "negative integers": (npy(TRAIN.astype(np.int16) - 9), "holds integers from -8 to 131; expected"),
    "text": (npy(TRAIN.astype(str)), "has type <U3; expected integers"),
    "channels first": (npy(np.zeros((7, 3, 8, 8), np.uint8)), r"channels first; .* numpy.moveaxis\(images, 1, -1\)"),
    "one row of few channels": (npy(np.zeros((7, 2, 9, 9))), "channels first"),
    "channels of RGBA first": (npy(np.zeros((7, 4, 8, 8), np.uint8)), "channels first"),
    "images last": (
        npy(np.zeros((8, 8, 70), np.uint8)),
        r"images last; .*-1, 0\); if these are 8 images of 8 x 70",
    ),
    "images of colours last": (npy(np.zeros((8, 8, 3, 70), np.uint8)), r"images last; .*moveaxis\(images, -1, 0\)$"),
    "just beyond rounding": (npy(np.full((7, 4, 5), 1.0000021)), r"from 1.0000021 to 1.0000021; expected floats"),
    "complex": (npy(TRAIN.astype(complex)), "has type complex128"),
    "records": (npy(TRAIN.view([("r", "u1")])), "expected integers"),
    "flat": (npy(TRAIN.reshape(7, 20)), r"has shape \[7, 20\]; expected \[images, height, width\]"),
    "empty": (npy(TRAIN[:0]), r"is empty \(shape \[0, 4, 5\]\)"),
    "one image": (npy(TRAIN[:1]), "holds 1 image and no test images; expected at least 2"),
    "NaN": (npy(np.where(TRAIN == 9, np.nan, 0.5)), r"holds NaN \(not a number\); expected floats in \[0, 1\]"),
    "infinite": (npy(np.where(TRAIN == 9, np.inf, 0.5)), r"holds floats from 0.5 to inf; expected floats in \[0, 1\]"),
    "negative": (npy(TRAIN - 1.5), r"holds floats from -0.5 to 138.5; expected floats in \[0, 1\], or uint8"),
    "too large for float32": (npy(TRAIN * 1e300), r"to 1.4e\+302; expected"),
    "bomb": (npy_header("(1000000, 1000, 1000)"), r"1,000.0 GB; expected at most"),
    "shape beyond all": (npy_header(f"({10**60}, 2, 2)"), "expected at most"),
    "lie": (npy_header("(100, 1000, 1000)"), "more than the file can hold"),
    "negative shape": (npy_header("(-7, -4, 5)"), "negative dimensions"),
    "cut": (npy(TRAIN)[:-1], "ends after 139 bytes"),
    "long": (npy(TRAIN) + b"\0", "continues after 140 bytes"),
    "no array": (b"nothing at all", "no sound NumPy header"),
    "nested": (npy_header("(" * 5000), "no sound NumPy header"),
    "call": (npy_header("(7, 4, 5)", "__import__('os')._exit(13)"), "no sound NumPy header"),
    "version 9": (b"\x93NUMPY\x09\0" + npy(TRAIN)[8:], "no sound NumPy header"),
}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
@pytest.mark.parametrize(("content", "message"), REFUSED_NPY.values(), ids=REFUSED_NPY)
def test_bad_arrays_are_refused(tmp_path, content, message, method):
    path = tmp_path / "set.npz"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("train_images.npy", content)
    with pytest.raises(DataError, match=message) as refusal:
        load(str(path))
    assert_one_line_about(refusal.value, path)


def test_bad_archives_are_refused(tmp_path):
    path = write_npz(tmp_path / "set.npz")
    sound = path.read_bytes()
    for content, message in [
        (b"", "not a sound .npz file"),
        (b"text", "not a sound .npz file"),
        (sound[:-30], "not a sound .npz file"),
        (sound.replace(TRAIN.tobytes()[:1], b"\xff"), "not a sound .npz file|damaged"),
    ]:
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            load(str(path))
    write_npz(path, a=TRAIN, b=TEST)
    with pytest.raises(DataError, match=r"holds the arrays \['a', 'b'\]; expected train_images"):
        load(str(path))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("train_images.npy", npy(TRAIN))
    with pytest.raises(DataError, match="compressed by zip method 14; expected"):
        load(str(path))


ONE_HOT = np.eye(10)[LABELS]


@pytest.mark.parametrize(
    "labels", [LABELS, LABELS[:, None], LABELS.astype(np.float64), ONE_HOT, ONE_HOT.astype(bool), LABELS.astype(">i8")]
)
def test_labels_in_many_forms(tmp_path, labels):
    dataset = load(write_npz(tmp_path / "set.npz", train_images=TRAIN, test_images=TEST, train_labels=labels))
    np.testing.assert_array_equal(dataset.train_labels, LABELS)
    assert dataset.test_labels is None


@pytest.mark.parametrize("labels", [LABELS > 4, np.where(LABELS == 3, -1, LABELS.astype(int))])
def test_two_classes_and_unknown_ones_are_labels(tmp_path, labels):
    found = load(
        write_npz(tmp_path / "set.npz", train_images=TRAIN, train_labels=labels, test_images=TEST)
    ).train_labels
    assert found is not None and found.dtype.kind in "iu"
    np.testing.assert_array_equal(found, labels)


@pytest.mark.parametrize(
    "labels",
    [
        LABELS[:6], LABELS / 2, LABELS.astype(str), LABELS.astype(object), ONE_HOT * 0, ONE_HOT / 2, np.array(3),
        LABELS * np.nan, LABELS.astype(complex), np.zeros((7, 2, 2), np.uint8), LABELS.astype("M8[s]"),
    ],
)  # fmt: skip
def test_other_labels_are_left_out_in_one_line(tmp_path, capsys, labels):
    path = write_npz(tmp_path / "set.npz", train_images=TRAIN, test_images=TEST, train_labels=labels)
    assert load(path).train_labels is None
    output = capsys.readouterr().out
    assert "train_labels" in output and "not used" in output and output.count("\n") == 1


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (TRAIN[..., None], TRAIN),
        (TRAIN[:, None], TRAIN),
        (TRAIN.astype(np.int64), TRAIN),
        (TRAIN.astype("<i2"), TRAIN),
        (TRAIN > 100, (TRAIN > 100) * np.uint8(255)),
        (np.full((7, 4, 5), -9e-7), np.zeros((7, 4, 5), np.float32)),
        (np.full((7, 4, 5), 1 + 9e-7), np.ones((7, 4, 5), np.float32)),
        (np.arange(7 * 9, dtype=np.uint8).reshape(7, 9), np.arange(7 * 9, dtype=np.uint8).reshape(7, 3, 3)),
        (TRAIN.astype(np.float32), TRAIN),
        (np.zeros((7, 8, 8, 3), np.uint8), np.zeros((7, 8, 8, 3), np.uint8)),
        (np.zeros((8, 8, 8), np.uint8), np.zeros((8, 8, 8), np.uint8)),
        (np.zeros((8, 8, 9, 1), np.uint8), np.zeros((8, 8, 9), np.uint8)),
        (np.zeros((7, 8, 8, 11), np.uint8), np.zeros((7, 8, 8, 11), np.uint8)),
    ],
)
def test_images_in_many_forms(tmp_path, images, expected):
    found = load(write_npz(tmp_path / "set.npz", train_images=images, test_images=images)).train_images
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(checked(Dataset(images, None, images, None)).train_images, expected)


@pytest.mark.parametrize("shape", [(784,), (1, 784), (784, 1), (1, 1, 784), (1, 784, 1)])
def test_flat_images_are_said_to_be_square(shape, tmp_path, capsys):
    path = write_npz(tmp_path / "set.npz", train_images=np.zeros((7, *shape), np.uint8))
    assert load(path).train_images.shape == (6, 28, 28)
    assert "rows of 784 values are taken as images of 28 x 28" in capsys.readouterr().out


def test_a_label_file_for_fewer_images_is_left_out(tmp_path, capsys):
    dataset = load(write_idx(tmp_path / "set", test_labels=LABELS[:2]))
    assert dataset.train_labels is not None and dataset.test_labels is None
    assert "test_labels: labels of shape [2] and type uint8 are not used; expected 3" in capsys.readouterr().out


def test_labels_of_the_test_images_alone(tmp_path):
    dataset = load(write_npz(tmp_path / "set.npz", train_images=TRAIN, test_images=TEST, test_labels=LABELS[:3]))
    assert dataset.train_labels is None
    np.testing.assert_array_equal(dataset.test_labels, LABELS[:3])


def test_files_of_other_programs_are_passed_over(tmp_path):
    folder = write_idx(tmp_path / "set")
    for name in (".DS_Store", "Thumbs.db", "._train-images-idx3-ubyte", "._t10k-labels-idx1-ubyte"):
        (folder / name).write_bytes(b"x")
    assert_small(load(folder))
    path = write_npz(tmp_path / "set.npz")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("__MACOSX/._train_images.npy", b"x")
        archive.writestr(".DS_Store", b"x")
    assert_small(load(path))


def test_the_home_folder_in_the_name_of_a_set(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_npz(tmp_path / "set.npz")
    assert_small(load("~/set.npz"))


@pytest.mark.parametrize("name", ["grün ü.npz", "a\nb.npz", "\udcff.npz", "-x.npz", "a'b.npz"], ids=ascii)
def test_files_of_any_name(tmp_path, name):
    path = write_npz(tmp_path / name)
    assert_small(load(path))
    path.write_bytes(b"text")
    with pytest.raises(DataError, match=r"is not a sound \.npz file"):
        load(path)
    assert shlex.split(TrainConfig(data=str(path)).command)[-1] == str(path)


def test_an_npy_file_holds_the_images_alone(tmp_path):
    np.save(tmp_path / "set.npy", TRAIN)
    dataset = load(tmp_path / "set.npy")
    assert len(dataset.train_images) == 6 and len(dataset.test_images) == 1 and dataset.train_labels is None
    for content in (b"", b"text"):
        (tmp_path / "set.npy").write_bytes(content)
        with pytest.raises(DataError, match=r"set\.npy: is not an \.npy file; expected a file written by numpy\.save;"):
            load(tmp_path / "set.npy")


def test_idx_folders_as_people_have_them(tmp_path):
    write_idx(tmp_path / "FashionMNIST/raw")
    assert load(tmp_path).train_labels is not None
    (tmp_path / "FashionMNIST/raw/t10k-labels-idx1-ubyte").unlink()
    assert load(tmp_path).train_labels is not None and load(tmp_path).test_labels is None
    for path in (tmp_path / "FashionMNIST/raw").glob("*labels*"):
        path.unlink()
    assert load(tmp_path).train_labels is None
    emnist = tmp_path / "emnist"
    write_idx(emnist)
    for path in list(emnist.iterdir()):
        path.rename(emnist / f"emnist-letters-{path.name.replace('t10k', 'test')}")
    assert len(load(emnist).test_images) == 3
    (emnist / "emnist-digits-train-images-idx3-ubyte").write_bytes(b"")
    with pytest.raises(DataError, match=r"holds emnist-digits-.* and emnist-letters-.*; move one of them away"):
        load(emnist)


@pytest.mark.parametrize(
    ("spec", "meant"),
    [
        ("MNIST", "mnist"),
        ("fashion_mnist", "tfds:fashion_mnist"),
        ("fashion-mnist", "tfds:fashion_mnist"),
        ("emnist/letters", "tfds:emnist/letters"),
        ("mnist.npz", "mnist"),
        ("FashionMNIST", "tfds:fashion_mnist"),
        ("KMNIST", "tfds:kmnist"),
        ("binarized mnist", "tfds:binarized_mnist"),
        ("TFDS:mnist", "mnist"),
        ("TFDS:EMNIST/letters", "tfds:emnist/letters"),
    ],
)
def test_a_name_without_its_prefix_gets_a_suggestion(spec, meant):
    with pytest.raises(DataError, match=f"--data {spec}: no such file or folder; perhaps {meant}; "):
        load(spec)


@pytest.mark.parametrize("name", ["images.zip", "MNIST.tar.gz", "set.TGZ", "set.7z"])
def test_an_archive_is_to_be_unpacked(tmp_path, name):
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        archive.writestr("images/1.png", b"")
    with pytest.raises(DataError, match=f"{name}: is an archive; expected .*; unpack it and name what was in it"):
        load(tmp_path / name)


def test_an_npz_bomb_takes_no_memory(tmp_path):
    """Ten kilobytes that unpack to 10 MB, a limit of 1 MB: refused without ever holding them."""
    path = write_npz(tmp_path / "set.npz", train_images=np.zeros((10, 1000, 1000), np.uint8))
    load(str(path))
    tracemalloc.start()
    with pytest.raises(DataError, match=r"0\.0 GB; expected at most 0\.0 GB; .* raise --max-data-gb"):
        load(str(path), max_gb=0.001)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


def test_the_command_refuses_and_writes_nothing(tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.npz").write_text("text")
    write_npz(tmp_path / "set.npz")
    for spec, message, *more in [
        ("fashion", "--data fashion: no such file or folder; expected mnist, tfds:NAME"),
        (f"{tmp_path}/empty", "/empty: holds nothing; expected mnist, tfds:NAME"),
        (f"{tmp_path}/text.npz", "text.npz: is not a sound .npz file"),
        (f"{tmp_path}/set.npz", "expected at most 0.0 GB", "--max-data-gb", "1e-9"),
        (f"{tmp_path}/set.npz", "--max-data-gb 0.0: expected a number above 0", "--max-data-gb", "0"),
        (f"{tmp_path}/{'x' * 300}", "File name too long"),
        ("/dev/null", "no such file or folder"),
    ]:
        assert message in refuse(monkeypatch, capsys, tmp_path, spec, *more)


@settings(max_examples=60)
@given(st.data())
def test_any_idx_bytes_are_arrays_or_refused(data):
    """For one of the four files: any bytes, any header, or a sound file damaged."""
    files = sound_idx(np.random.default_rng(data.draw(st.integers(0, 99))))
    name = data.draw(st.sampled_from(IDX_NAMES))
    header = st.builds(
        lambda ndim, dims: b"\0\0\x08" + bytes([ndim]) + b"".join(dim.to_bytes(4, "big") for dim in dims),
        st.integers(0, 255),
        st.lists(st.integers(0, 2**32 - 1) | st.integers(0, 7), max_size=5),
    )
    seeds = st.integers(0, 2**32).map(np.random.default_rng)
    any_bytes = st.one_of(
        st.binary(max_size=100),
        st.builds(bytes.__add__, header, st.binary(max_size=100)),
        st.builds(damaged, st.just(files[name]), seeds),
    )
    packed = st.one_of(
        st.builds(gzip.compress, any_bytes),
        st.builds(damaged, st.just(gzip.compress(files[name])), seeds),
        st.builds(bytes.__add__, st.just(b"\x1f\x8b"), st.binary(max_size=100)),
    )
    files[name] = data.draw(st.one_of(any_bytes, packed))
    with tempfile.TemporaryDirectory() as folder:
        for path, content in files.items():
            (Path(folder) / path).write_bytes(content)
        check(folder)


@settings(max_examples=60)
@given(st.data())
def test_any_archive_bytes_are_arrays_or_refused(data):
    """Any bytes, an archive around any array or a damaged one, or a damaged archive."""
    files = sound_arrays(np.random.default_rng(data.draw(st.integers(0, 99))))
    seeds = st.integers(0, 2**32).map(np.random.default_rng)
    arrays = hnp.arrays(
        hnp.scalar_dtypes() | hnp.array_dtypes(), hnp.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=3)
    )
    member = st.one_of(st.binary(max_size=200), arrays.map(npy), st.builds(damaged, st.just(npy(TRAIN)), seeds))
    files["train_images.npy"] = data.draw(st.just(files.get("train_images.npy", b"")) | member)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    content = data.draw(
        st.one_of(
            st.binary(max_size=100), st.just(packed.getvalue()), st.builds(damaged, st.just(packed.getvalue()), seeds)
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "set.npz"
        path.write_bytes(content)
        check(str(path))


@settings(max_examples=30)
@given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=3, max_dims=4, min_side=1, max_side=4)))
def test_every_sound_array_comes_back(images):
    images = np.concatenate([images, images])  # two at least
    with tempfile.TemporaryDirectory() as folder:
        path = write_npz(Path(folder) / "set.npz", train_images=images, test_images=images)
        dataset = load(str(path))
        check_dataset(dataset)
        expected = images * np.uint8(255 if images.max() == 1 else 1)
        np.testing.assert_array_equal(dataset.train_images.ravel(), expected.ravel())
