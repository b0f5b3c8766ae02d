"""Folders of image files: every layout and kind of pixels that people have; and the form of images."""

import io
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vae_jax import InputError
from vae_jax.config import DataOptions, TrainConfig
from vae_jax.data.dataset import Dataset, checked, load
from vae_jax.system.errors import DataError

GREY = np.arange(10, 10 + 4 * 5, dtype=np.uint8).reshape(4, 5)
COLOUR = np.stack([GREY, GREY + 100, 255 - GREY], axis=-1)


def save(path: Path, pixels: np.ndarray | Image.Image, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


def folder_of(folder: Path, *names: str) -> Path:
    """Images that can be told apart: the first pixel is the number of the name."""
    for number, name in enumerate(names):
        pixels = GREY.copy()
        pixels[0, 0] = number
        save(folder / name, pixels)
    return folder


def numbers(images: np.ndarray) -> list[int]:
    return images[:, 0, 0].tolist()


LAYOUTS = {
    "flat": (["b.png", "a.png", "c.PNG"], [1, 0, 2], None),
    "classes": (["cat/1.png", "ant/2.png", "ant/1.png"], [2, 1, 0], [0, 0, 1]),
    "classes deeper": (["b/images/1.png", "a/images/1.png"], [1, 0], [0, 1]),
    "one folder in another": (["set/all/b.png", "set/all/a.png"], [1, 0], None),
}


@pytest.mark.parametrize(("names", "order", "labels"), LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_without_test_images(tmp_path, names, order, labels):
    """All images are there, in the order of their names; one of them is held out."""
    dataset = load(folder_of(tmp_path, *names))
    assert len(dataset.test_images) == 1
    (held_out,) = numbers(dataset.test_images)
    assert numbers(dataset.train_images) == [number for number in order if number != held_out]
    if labels is None:
        assert dataset.train_labels is None
    else:
        assert dataset.train_labels is not None and dataset.test_labels is not None
        of_number = dict(zip(order, labels, strict=True))
        assert dataset.train_labels.tolist() == [of_number[number] for number in numbers(dataset.train_images)]
        assert dataset.test_labels.tolist() == [of_number[held_out]]


SPLITS = {
    "flat": (["train/a.png", "train/b.png", "test/a.png"], ([0, 1], None, [2], None)),
    "classes": (["train/x/a.png", "train/y/b.png", "test/y/a.png"], ([0, 1], [0, 1], [2], [1])),
    "validation": (["Train/a.png", "Train/b.png", "valid/a.png"], ([0, 1], None, [2], None)),
    "both": (["train/a.png", "val/b.png", "test/a.png"], ([0], None, [2], None)),
    "nested": (["mnist_png/training/3/a.png", "mnist_png/testing/3/a.png"], ([0], [0], [1], [0])),
    "unlabelled": (["train/3/a.png", "test/images/a.png"], ([0], [0], [1], None)),
    "train only": (["train/a.png", "train/b.png"], ([0], None, [1], None)),
}


@pytest.mark.parametrize(("names", "expected"), SPLITS.values(), ids=SPLITS)
def test_layouts_with_parts(tmp_path, names, expected):
    dataset = load(folder_of(tmp_path, *names))
    found = (numbers(dataset.train_images), dataset.train_labels, numbers(dataset.test_images), dataset.test_labels)
    assert tuple(part.tolist() if isinstance(part, np.ndarray) else part for part in found) == expected


UNCERTAIN = {
    "a class train": (["train/a.png", "bus/a.png"], "holds train, and beside them the folders bus; .* rename train"),
    "loose beside parts": (["train/a.png", "x.png"], r"holds train, and beside them 1 images \(x.png"),
    "loose beside classes": (["b/a.png", "x.png", "a/b.png"], r"holds 1 images \(x.png, ...\) beside .*\(a, b\)"),
    "twice": (["train/a.png", "training/a.png"], "holds the folders train and training; expected one train"),
    "no train": (["val/a.png", "test/a.png"], "holds the folders test and val; expected one train"),
    "parts in classes": (["a/train/1.png", "b/test/1.png"], "holds a folder train within a, and other folders"),
}


@pytest.mark.parametrize(("names", "message"), UNCERTAIN.values(), ids=UNCERTAIN)
def test_uncertain_layouts_are_refused(tmp_path, names, message):
    with pytest.raises(DataError, match=message) as refusal:
        load(folder_of(tmp_path, *names))
    assert "\n" not in str(refusal.value) and str(tmp_path) in str(refusal.value)


def test_other_files_are_passed_over(tmp_path):
    folder_of(tmp_path, "a.png", "b.png")
    for name in ("Thumbs.db", ".DS_Store", "labels.json", "notes.txt", "._a.png", ".hidden/a.png", "__MACOSX/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"no image")
    (tmp_path / "again").symlink_to(tmp_path)  # a loop
    assert len(load(tmp_path).train_images) == 1


def alpha(pixels: np.ndarray, opacity: int) -> Image.Image:
    image = Image.fromarray(pixels).convert("LA" if pixels.ndim == 2 else "RGBA")
    image.putalpha(opacity)
    return image


def oriented(pixels: np.ndarray, orientation: int) -> dict:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return {"pixels": Image.fromarray(pixels), "exif": exif}


PALETTE = Image.fromarray(COLOUR).quantize(20)
RULES = {
    "grey": ({"pixels": GREY}, "png", GREY),
    "colour": ({"pixels": COLOUR}, "png", COLOUR),
    "bmp": ({"pixels": COLOUR}, "bmp", COLOUR),
    "tiff": ({"pixels": GREY}, "tif", GREY),
    "webp": ({"pixels": COLOUR, "lossless": True}, "webp", COLOUR),
    "ppm": ({"pixels": COLOUR}, "ppm", COLOUR),
    "one bit": ({"pixels": GREY > 20}, "png", (GREY > 20) * np.uint8(255)),
    "palette of colours": ({"pixels": PALETTE}, "png", np.asarray(PALETTE.convert("RGB"))),
    "palette of greys": ({"pixels": Image.fromarray(GREY).convert("P")}, "png", GREY),
    "first frame": (
        {"pixels": Image.fromarray(GREY), "save_all": True, "append_images": [Image.fromarray(GREY + 1)]},
        "gif",
        GREY,
    ),
    "opaque": ({"pixels": alpha(COLOUR, 255)}, "png", COLOUR),
    "transparent is black": ({"pixels": alpha(COLOUR, 0)}, "png", COLOUR * 0),
    "half transparent": ({"pixels": alpha(GREY, 51)}, "png", np.rint(GREY / 5).astype(np.uint8)),
    "one colour transparent": ({"pixels": GREY, "transparency": 12}, "png", np.where(GREY == 12, 0, GREY)),
    "cmyk": (
        {"pixels": Image.fromarray(COLOUR).convert("CMYK")},
        "tif",
        np.asarray(Image.fromarray(COLOUR).convert("CMYK").convert("RGB")),
    ),
    "upside down": (oriented(GREY, 3), "png", GREY[::-1, ::-1]),
    "on its side": (oriented(GREY, 6), "png", np.rot90(GREY, -1)),
    "a mirrored tiff": (oriented(GREY, 2), "tif", GREY[:, ::-1]),
}


@pytest.mark.parametrize(("options", "suffix", "expected"), RULES.values(), ids=RULES)
def test_the_rule_for_each_kind_of_pixel(tmp_path, options, suffix, expected):
    for name in "ab":
        save(tmp_path / f"{name}.{suffix}", **options)
    found = load(tmp_path).train_images
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found[0], expected)


def test_jpeg_files_of_any_name(tmp_path):
    for name in ("a.jpg", "b.JPEG", "c.png"):
        save(tmp_path / name, COLOUR, format="JPEG", quality=100, subsampling=0)
    assert np.abs(load(tmp_path).train_images.astype(int) - COLOUR).max() < 10


def png(width: int, height: int, kind: int = 0, body: bytes = b"") -> bytes:
    """A PNG file of 8 bits a channel that declares a size."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + name + content + zlib.crc32(name + content).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, kind, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


def content_of(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


WIDE = Image.fromarray(np.full((4, 5), 3000, np.uint16))
REFUSED = {
    "empty": (b"", "cannot be decoded"),
    "text": (b"no image at all", "cannot be decoded .not an image of a kind known here.; expected a sound image"),
    "cut": (content_of(Image.fromarray(COLOUR), "BMP")[:-9], "cannot be decoded .image file is truncated"),
    "no pixels": (png(5, 4), "cannot be decoded"),
    "bomb": (png(60_000, 60_000), "declares more than .* pixels|declares 60,000 x 60,000 pixels"),
    "just too large": (png(9000, 8000), r"declares 8,000 x 9,000 pixels; expected at most [\d,]+; make it smaller"),
    "16 bits": (content_of(WIDE), "has pixels of mode I.*, of more than 8 bits .*; expected 8 bits a channel"),
    "32 bits": (content_of(Image.fromarray(GREY.astype(np.int32)), "TIFF"), "has pixels of mode I, of more than 8"),
    "floats": (content_of(Image.fromarray(GREY.astype(np.float32)), "TIFF"), "has pixels of mode F, "),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 5 4\n", "cannot be decoded"),
}


@pytest.mark.parametrize("place", [0, 1, 2], ids=["first", "second", "last"])
@pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=REFUSED)
def test_files_that_cannot_be_decoded_are_named(tmp_path, content, message, place):
    folder_of(tmp_path, "0.png", "1.png", "2.png")
    (tmp_path / f"{place}.png").write_bytes(content)
    with pytest.raises(DataError, match=f"{tmp_path}/{place}.png: {message}") as refusal:
        load(tmp_path)
    assert "\n" not in str(refusal.value)


def test_a_png_of_16_bits_a_colour_is_refused(tmp_path):
    content = bytearray(png(5, 4, 2, bytes(4 * 31)))
    content[24] = 16
    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.png: has pixels of mode RGB, of more than 8 bits"):
        load(tmp_path)


def test_images_of_kinds_that_are_not_read_are_not_left_out(tmp_path):
    folder_of(tmp_path, "a.png", "b.png")
    (tmp_path / "c.heic").write_bytes(b"")
    with pytest.raises(DataError, match=r"holds 1 images of a kind that is not read here, such as c\.heic; expected"):
        load(tmp_path)


def test_several_sizes_are_counted_and_resized_if_asked_for(tmp_path):
    for number in range(9):
        save(tmp_path / f"{number}.png", np.full((4 + number // 3, 5), 7 * number, np.uint8))
    save(tmp_path / "9.png", np.zeros((4, 5), np.uint8))
    message = r"images of 3 sizes, 4 x 5 \(4\), 5 x 5 \(3\), 6 x 5 \(3\); expected one size; add --image-size 4 5 to"
    with pytest.raises(DataError, match=message):
        load(tmp_path)
    found = load(tmp_path, image_size=(3, 2))
    assert found.image_shape == (3, 2)
    assert sorted({*found.train_images.ravel(), *found.test_images.ravel()}) == [7 * number for number in range(9)]


def test_grey_and_colour_are_counted_and_made_grey_if_asked_for(tmp_path):
    for number, pixels in enumerate([GREY, COLOUR, COLOUR]):
        save(tmp_path / f"{number}.png", pixels)
    with pytest.raises(DataError, match="holds 1 grey images and 2 in colour; expected one kind; add --grey"):
        load(tmp_path)
    found = load(tmp_path, grey=True)
    images = {bytes(image) for image in (*found.train_images, *found.test_images)}
    assert images == {GREY.tobytes(), Image.fromarray(COLOUR).convert("L").tobytes()}


FORMS = [((3, 2), False), ((8, 10), True), (None, True), ((4, 5), False)]


@pytest.mark.parametrize(("size", "grey"), FORMS)
def test_arrays_become_what_files_become(tmp_path, size, grey):
    """An image of bytes, from an array or from a file, and of floats up to rounding."""
    for name in "ab":
        save(tmp_path / f"set/{name}.png", COLOUR)
    expected = load(tmp_path / "set", image_size=size, grey=grey)
    images = np.stack([COLOUR, COLOUR])
    np.savez(tmp_path / "bytes.npz", train_images=images)
    assert load(tmp_path / "bytes.npz", image_size=size, grey=grey).checksum() == expected.checksum()
    given = Dataset(images, None, images, None)
    np.testing.assert_array_equal(checked(given, size, grey).test_images[:1], expected.test_images)
    np.savez(tmp_path / "floats.npz", train_images=images / 255)
    floats = load(tmp_path / "floats.npz", image_size=size, grey=grey).train_images
    assert floats.dtype == np.float32 and floats.shape == expected.train_images.shape
    np.testing.assert_allclose(floats, expected.train_images / 255, atol=1.1 / 255)


def test_large_images_are_averaged_not_sampled(tmp_path):
    """A checkerboard becomes grey: the filter is antialiased."""
    board = np.indices((64, 64)).sum(axis=0) % 2 * np.uint8(255)
    np.save(tmp_path / "set.npy", np.stack([board, board]))
    small = load(tmp_path / "set.npy", image_size=(8, 8)).train_images[:, 2:-2, 2:-2]
    assert small.min() > 120 and small.max() < 135


def test_forms_that_cannot_be(tmp_path):
    np.save(tmp_path / "two.npy", np.zeros((3, 4, 5, 2), np.uint8))
    with pytest.raises(DataError, match=r"--grey: the images of .* have 2 channels; expected 3"):
        load(tmp_path / "two.npy", grey=True)
    assert load(tmp_path / "two.npy", image_size=(2, 3)).image_shape == (2, 3, 2)
    with pytest.raises(DataError, match=r"declares shape \[2, 4096, 4096, 2\].* raise --max-data-gb"):
        load(tmp_path / "two.npy", image_size=(4096, 4096), max_gb=0.05)
    for size in ((0, 5), (5, 4097), (5,), (2.5, 3)):
        with pytest.raises(InputError, match=r"^--image-size .*: expected 2 whole numbers from 1 to 4096; height and"):
            DataOptions(image_size=size).check()  # pyright: ignore[reportArgumentType]


def test_the_command_that_goes_on_has_the_form():
    assert TrainConfig(image_size=(28, 32), grey=True).command.endswith("vae_jax.train --image-size 28 32 --grey")
    assert not {"image_size", "grey"} & TrainConfig().recipe.keys()


def caches() -> set[Path]:
    return set((Path(os.environ["XDG_CACHE_HOME"]) / "vae_jax").glob("*.npz"))


def test_the_cache_follows_the_files(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = folder_of(tmp_path / "set", "a.png", "b.png", "c.png")
    before = sorted(folder.iterdir())
    first = load(folder)
    (cache,) = caches()
    assert load(folder).checksum() == first.checksum() and caches() == {cache}
    assert load(folder, grey=True).checksum() == first.checksum() and len(caches()) == 2  # one for each form
    save(folder / "a.png", GREY + 50)
    changed = load(folder)
    assert changed.checksum() != first.checksum() and cache not in caches() and len(caches()) == 2
    (folder / "c.png").unlink()
    assert len(load(folder).train_images) == 1 and len(caches()) == 2
    assert sorted([*folder.iterdir(), folder / "c.png"]) == before


def test_the_cache_is_used(tmp_path, monkeypatch):
    """It is read in place of the files: a cache with other images shows."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = folder_of(tmp_path / "set", "a.png", "b.png")
    load(folder)
    (cache,) = caches()
    np.savez(cache, train_images=np.full((2, 1, 1), 9, np.uint8))
    assert load(folder).train_images.tolist() == [[[9]]]
    with pytest.raises(DataError, match=f"{cache}: holds 0.0 GB; expected at most 0.0 GB; raise --max-data-gb"):
        load(folder, max_gb=1e-9)


def test_a_cache_that_cannot_be_kept_is_one_line(tmp_path, monkeypatch, capsys):
    folder = folder_of(tmp_path / "set", "a.png", "b.png")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        assert len(load(folder).train_images) == 1
        out = capsys.readouterr().out
        assert "not written" in out and out.count("\n") == 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    load(folder)
    (cache,) = caches()
    cache.write_bytes(b"damaged")
    assert len(load(folder).train_images) == 1
    assert capsys.readouterr().out.count("decoding the set again") == 1


def test_too_many_images_are_refused_before_they_are_decoded(tmp_path):
    folder_of(tmp_path, "a.png", "b.png")
    (tmp_path / "c.png").write_bytes(b"never looked at")
    with pytest.raises(DataError, match=r"declares shape \[3, 1000, 1000\].* raise --max-data-gb"):
        load(tmp_path, max_gb=0.002, image_size=(1000, 1000))


# Runs commands in one process, as its argument lists them; prints the exit code, standard output and error of each.
COMMANDS = """
import contextlib, io, json, runpy, sys
for words in json.loads(sys.argv[1]):
    sys.argv, code, output, error = words, 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(error):
        try:
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code or 0
    print(json.dumps([code, output.getvalue(), error.getvalue()]))
"""


def test_a_model_of_a_folder_of_images(tmp_path, mnist):
    """Trained, continued, measured and drawn; the other commands know the form from the run."""
    for number, image in enumerate(mnist.train_images[:40]):
        save(tmp_path / f"set/{number % 2}/{number}.png", Image.fromarray(image).convert("RGB"))
    small = ["--data", "set", "--grey", "--hidden-dim", "8", "--image-size"]
    train = ["vae_jax.train", "--workdir", "run", "--export", "vae.pth", *small]
    commands = [
        [*train, "9", "8", "--epochs", "1"],
        [*train, "9", "8", "--epochs", "2"],
        ["vae_jax.evaluate", "run"],
        ["vae_jax.generate", "reconstruct", "run", "--out", "a.png"],
        ["torch_ref.train", *small, "9", "8", "--epochs", "1"],
        ["vae_jax.evaluate", "run", "--image-size", "9", "9"],
        [*train, "8", "9", "--epochs", "3"],
    ]
    result = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps(commands)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    codes, outputs, errors = zip(*map(json.loads, result.stdout.splitlines()), strict=True)
    assert (codes, errors[:5]) == ((0, 0, 0, 0, 0, 2, 2), ("",) * 5)
    assert "set: 35 training, 5 test images, 9 x 8;" in outputs[0]
    assert "run: goes on after epoch 1" in outputs[1]
    assert "5 test images of set" in outputs[2]
    assert "saved vae-torch.pth" in outputs[4]
    assert "takes images of 72 pixels, but those of --data set have 81" in errors[5]
    assert "holds other images than those of the run in run" in errors[6]


@pytest.mark.parametrize("value", [[9], [9, 0], [9.0, 8], "9 8", [9, True], [1, 5000]])
def test_a_damaged_form_in_config_json_is_named(tmp_path, value):
    from vae_jax.runs.trained import read

    (tmp_path / "config.json").write_text(
        f'{{"image_size": {str(value).replace("True", "true")}}}'.replace("9 8", '"x"')
    )
    with pytest.raises(InputError, match=r"config\.json: (its image_size is|cannot be read)"):
        read(tmp_path)
