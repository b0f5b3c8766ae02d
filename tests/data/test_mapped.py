"""Images that stay in their file."""

import os

import numpy as np
import pytest

from vae_jax import DataError, load
from vae_jax.data import mapped
from vae_jax.data.dataset import checked
from vae_jax.data.mapped import MappedImages, pieces


def images(count: int, *shape: int, dtype=np.uint8) -> np.ndarray:
    values = np.random.default_rng(0).integers(0, 256, (count, *shape))
    return values.astype(np.uint8) if dtype == np.uint8 else (values / 255).astype(dtype)


FORMS = {
    "grey bytes": images(40, 5, 6),
    "colour bytes": images(40, 8, 6, 3),
    "one channel last": images(40, 5, 6, 1),
    "one channel first": images(40, 1, 5, 6),
    "flat rows": images(40, 25),
    "floats": images(40, 5, 6, dtype=np.float32),
    "zeros and ones": (images(40, 5, 6) > 127).astype(np.uint8),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_streamed_images_are_those_in_memory(name, suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(mapped, "MAPPED", 7)  # several maps
    monkeypatch.setattr(mapped, "PIECE", 500)  # several pieces
    monkeypatch.setattr(mapped, "READ_AROUND", 40)  # some images are asked for one by one
    path = tmp_path / f"set.{suffix}"
    if suffix == "npy":
        np.save(path, FORMS[name])
    else:
        labels = np.arange(30)
        np.savez(path, train_images=FORMS[name][:30], test_images=FORMS[name][30:], train_labels=labels)
    here, there = load(path), load(path, stream="always")
    assert isinstance(there.train_images, MappedImages) and isinstance(there.test_images, MappedImages)
    for expected, streamed in ((here.train_images, there.train_images), (here.test_images, there.test_images)):
        assert (streamed.shape, streamed.dtype, len(streamed)) == (expected.shape, expected.dtype, len(expected))
        chosen = np.random.default_rng(1).permutation(len(expected))[:17]
        np.testing.assert_array_equal(streamed[chosen], expected[chosen])
        np.testing.assert_array_equal(streamed[2:5], expected[2:5])
        np.testing.assert_array_equal(streamed[np.array([-1, 0])], expected[[-1, 0]])
        np.testing.assert_array_equal(np.concatenate(list(pieces(streamed))), expected)
    assert there.checksum() == here.checksum()
    assert there.pixels("none") == here.pixels("none")
    if suffix == "npz":
        np.testing.assert_array_equal(there.train_labels, here.train_labels)


def test_a_file_that_has_become_shorter_is_named(tmp_path):
    path = tmp_path / "set.npy"
    np.save(path, images(40, 5, 6))
    train = load(path, stream="always").train_images
    for size in (200, 0):
        os.truncate(path, size)
        with pytest.raises(OSError, match=r"has become shorter since the command began: '.*set.npy'"):
            train[:5]


def test_only_what_does_not_fit_stays_in_the_file(tmp_path):
    np.save(tmp_path / "set.npy", images(40, 5, 6))
    assert isinstance(load(tmp_path / "set.npy", stream="auto").train_images, np.ndarray)
    assert isinstance(load(tmp_path / "set.npy", max_gb=1e-6, stream="auto").train_images, MappedImages)
    with pytest.raises(DataError, match=r"declares shape \[40, 5, 6\].* raise --max-data-gb"):
        load(tmp_path / "set.npy", max_gb=1e-6)


@pytest.mark.parametrize("form", ["compressed", "Fortran order", "integers", "other byte order"])
def test_what_cannot_stay_in_the_file_is_read(form, tmp_path):
    grey = images(40, 5, 6)
    arrays = {
        "compressed": grey,
        "Fortran order": np.asfortranarray(grey),
        "integers": grey.astype(np.int64),
        "other byte order": images(40, 5, 6, dtype=np.float32).astype(">f4"),
    }
    if form == "compressed":
        path = tmp_path / "set.npz"
        np.savez_compressed(path, train_images=grey)
    else:
        path = tmp_path / "set.npy"
        np.save(path, arrays[form])
    found = load(path, stream="always").train_images
    assert isinstance(found, np.ndarray)
    np.testing.assert_array_equal(found, load(path).train_images)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (images(40, 5, 6).astype(np.float32), {}, "stays in its file; expected floats in"),
        (np.full((40, 5, 6), np.nan, np.float32), {}, "holds NaN"),
        (images(40, 5, 6), {"image_size": (4, 4)}, "stays in its file, where --image-size"),
        (images(40, 8, 6, 3), {"grey": True}, "stays in its file, where --image-size"),
        (images(40, 3, 16, 16), {}, "looks like channels first"),
        (images(1, 5, 6), {}, "expected at least 2 images"),
    ],
)
def test_images_that_cannot_be_streamed_are_refused(content, options, message, tmp_path):
    np.save(tmp_path / "set.npy", content)
    with pytest.raises(DataError, match=message):
        load(tmp_path / "set.npy", stream="always", **options)


def test_a_file_that_is_cut_is_refused(tmp_path):
    np.save(tmp_path / "set.npy", images(40, 5, 6))
    content = (tmp_path / "set.npy").read_bytes()
    (tmp_path / "set.npy").write_bytes(content[:-10])
    with pytest.raises(DataError, match="more than the file can hold"):
        load(tmp_path / "set.npy", stream="always")


def test_streamed_images_can_be_given_and_chosen_again(tmp_path):
    np.save(tmp_path / "set.npy", images(40, 5, 6))
    dataset = load(tmp_path / "set.npy", stream="always")
    given = checked(dataset)
    assert isinstance(given.train_images, MappedImages) and given.checksum() == dataset.checksum()
    again = dataset.train_images.chosen(np.arange(len(dataset.train_images)) % 3 == 0)
    np.testing.assert_array_equal(again[:], dataset.train_images[:][::3])


@pytest.mark.parametrize("cut", [60, 200])
def test_an_archive_that_is_cut_is_refused(cut, tmp_path):
    np.savez(tmp_path / "set.npz", train_images=images(40, 5, 6))
    content = (tmp_path / "set.npz").read_bytes()
    (tmp_path / "set.npz").write_bytes(content[cut:])  # the table of contents points beyond what is there
    with pytest.raises(DataError):
        load(tmp_path / "set.npz", stream="always")
