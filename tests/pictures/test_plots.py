"""plots: images stay sharp and whole, and pyplot is left alone."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from vae_jax import plots
from vae_jax.log import EpochMetrics


@pytest.mark.parametrize("labels", [False, True])
def test_each_pixel_is_a_square_of_its_value(labels):
    images = np.random.default_rng(0).integers(0, 256, (3, 11, 28, 28)) / 255
    words = {"row_labels": ["a", "bb", "ccc"], "column_labels": list("abcdefghijk"), "title": "t"} if labels else {}
    rgb = plots.pixels(plots.grid(images, **words))
    found = rgb[..., 0].astype(int)
    scale = 2  # the multiple of 328 pixels that comes nearest to 640
    top, left = (36, 12 + 7 * 3) if labels else (12, 12)  # the title's line; the longest label
    row, column = top + 30 * scale, left + 2 * 30 * scale
    expected = np.kron(images[1, 2] * 255, np.ones((scale, scale)))
    shown = found[row : row + 28 * scale, column : column + 28 * scale]
    np.testing.assert_allclose(shown, expected, atol=1)
    assert found[-1].min() == 255 and found[:, -1].min() == 255  # a white margin


def test_colour_and_empty_places():
    images = np.zeros((1, 2, 4, 4, 3))
    images[0, 0] = (1, 0, 0)
    images[0, 1] = np.nan
    colours = {tuple(colour) for colour in plots.pixels(plots.grid(images)).reshape(-1, 3).tolist()}
    assert colours == {(255, 0, 0), (255, 255, 255)}


@pytest.mark.parametrize("channels", [2, 4])
def test_channels_that_are_no_colours_stand_side_by_side(channels):
    images = np.random.default_rng(0).random((2, 3, 5, 4, channels), np.float32)
    images[1, 2] = np.nan
    beside = np.concatenate([images[..., channel] for channel in range(channels)], axis=3)
    words = {"row_labels": ["a", "b"], "column_labels": list("abc")}
    np.testing.assert_array_equal(plots.pixels(plots.grid(images, **words)), plots.pixels(plots.grid(beside, **words)))


def test_an_interrupted_write_leaves_the_old_picture(tmp_path, monkeypatch):
    def stop(_self, path, **_):
        path.write_bytes(b"half a pic")
        raise KeyboardInterrupt

    (tmp_path / "a.png").write_bytes(b"old")
    monkeypatch.setattr(Image.Image, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        plots.save(np.zeros((2, 2, 3), np.uint8), tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"] and (tmp_path / "a.png").read_bytes() == b"old"


@pytest.mark.parametrize("epochs", [1, 3])
def test_curves(epochs, tmp_path):
    history = [EpochMetrics(epoch, 9.0, 6.0, 3.0, 8.0, 6.0, 2.0 / epoch, 1.0, "grey") for epoch in range(1, epochs + 1)]
    figure = plots.curves(history)
    lines = [axes.get_lines() for axes in figure.axes]
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["loss", "BCE", "KLD"]
    np.testing.assert_array_equal(lines[2][1].get_ydata(), [metrics.test_kld for metrics in history])
    plots.save(plots.pixels(figure), tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.mode == "RGB"


def test_plotting_waits_until_it_draws_and_leaves_pyplot_alone():
    code = """
import sys
import vae_jax.train, vae_jax.evaluate, vae_jax.generate, vae_jax.pictures
assert not {"matplotlib", "jax", "torch", "tensorboard"} & set(sys.modules)
import numpy as np
from vae_jax import plots
plots.pixels(plots.grid(np.zeros((1, 1, 4, 4))))
assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
