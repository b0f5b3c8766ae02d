"""plots: images stay sharp and whole, labels stay readable, and pyplot is left alone."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from vae_jax.pictures import plots
from vae_jax.runs.metrics import EpochMetrics


@pytest.mark.parametrize(
    "words",
    [
        {},
        {"row_labels": ["a", "bb", "ccc"], "column_labels": list("abcdefghijk"), "title": "t"},
        {"row_labels": ["a", "bb", "ccc"], "row_axis": "z1", "column_axis": "z0", "marks": [0.5, np.nan, 10.0]},
        {"title": "a title that is much wider than the images below it" * 3},
    ],
)
def test_each_pixel_is_a_square_of_its_value(words):
    images = np.random.default_rng(0).integers(0, 256, (3, 11, 28, 28)) / 255
    figure = plots.grid(images, **words)
    rgb = plots.pixels(figure)
    scale = 5  # the multiple of 328 pixels that comes nearest to 1600
    # The sheet lies where its axes lie, on whole pixels.
    sheet = figure.axes[0].get_window_extent()
    left, top = round(sheet.x0), round(len(rgb) - sheet.y1)
    np.testing.assert_allclose((sheet.x0, len(rgb) - sheet.y1), (left, top), atol=1e-6)
    row, column = top + 30 * scale, left + 2 * 30 * scale
    expected = np.kron(images[1, 2] * 255, np.ones((scale, scale)))
    shown = rgb[row : row + 28 * scale, column : column + 28 * scale, 0].astype(int)
    inside = slice(20, -20)  # a mark may reach into the edge of an image
    np.testing.assert_allclose(shown[inside], expected[inside], atol=1)
    border = np.concatenate([rgb[0], rgb[-1], rgb[:, 0], rgb[:, -1]])
    assert border.min() == 255  # nothing is cut off


def test_marks_are_drawn_under_their_row():
    images = np.zeros((2, 3, 8, 8))
    rgb = plots.pixels(plots.grid(images, marks=[1.0, np.nan])).astype(int)
    down, across = np.nonzero(rgb.max(axis=2) - rgb.min(axis=2) > 50)
    assert across.mean() == pytest.approx(rgb.shape[1] / 2, abs=3)  # column 1 of 0 to 2
    assert down.mean() == pytest.approx(rgb.shape[0] / 2, abs=12)  # between the rows


@pytest.mark.parametrize("count", [2, 3, 16, 20, 60])
def test_labels_never_overlap_and_stay_symmetric(count):
    labels = [f"{place:+.2f}" for place in range(count)]
    figure = plots.grid(np.zeros((count, count, 8, 8)), row_labels=labels, column_labels=labels)
    renderer = FigureCanvasAgg(figure).get_renderer()
    for labels, side in ((figure.axes[0].get_xticklabels(), 0), (figure.axes[0].get_yticklabels(), 1)):
        shown = [place for place, label in enumerate(labels) if label.get_text()]
        assert shown and shown == [count - 1 - place for place in reversed(shown)]
        boxes = [labels[place].get_window_extent(renderer) for place in shown]
        edges = sorted((box.bounds[side], box.bounds[side] + box.bounds[side + 2]) for box in boxes)
        assert all(end < start for (_, end), (start, _) in itertools.pairwise(edges))


def test_colour_and_empty_places():
    images = np.zeros((1, 2, 4, 4, 3))
    images[0, 0] = (1, 0, 0)
    images[0, 1] = np.nan
    colours = np.unique(plots.pixels(plots.grid(images)).reshape(-1, 3), axis=0)
    assert colours.tolist() == [[255, 0, 0], [255, 255, 255]]


@pytest.mark.parametrize("channels", [2, 4])
def test_channels_that_are_no_colours_stand_side_by_side(channels):
    images = np.random.default_rng(0).random((2, 3, 5, 4, channels), np.float32)
    images[1, 2] = np.nan
    beside = np.concatenate([images[..., channel] for channel in range(channels)], axis=3)
    words = {"row_labels": ["a", "b"], "column_labels": list("abc")}
    np.testing.assert_array_equal(plots.pixels(plots.grid(images, **words)), plots.pixels(plots.grid(beside, **words)))


def scatter(label: np.ndarray | None) -> Figure:
    points = np.random.default_rng(0).standard_normal((300, 2))
    return plots.scatter(points, label, title="Means", axis_names=("z0", "z1"))


@pytest.mark.parametrize("labels", [1, 2, 10, 11, 62, 70])
def test_every_label_of_a_scatter_looks_its_own_way(labels):
    figure = scatter(np.arange(300) % labels + 5)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [str(number + 5) for number in range(labels)]
    looks = {(entry.get_marker(), entry.get_color()) for entry in legend.get_lines()}
    assert len(looks) == labels
    names = {text.get_text() for text in figure.axes[0].texts}
    assert names >= {str(number + 5) for number in range(labels)} | {"1\u03c3", "2\u03c3", "3\u03c3"}
    shown = sum(len(points.get_offsets()) for points in figure.axes[0].collections)
    assert shown == 300 and figure.axes[0].get_title(loc="left") == "Means"
    border = plots.pixels(figure)
    assert np.concatenate([border[0], border[-1], border[:, 0], border[:, -1]]).min() == 255  # nothing is cut off


@pytest.mark.parametrize(
    ("label", "title"), [(None, "Means; no labels"), (np.arange(300) % 71, "Means; 71 labels, too many for colours")]
)
def test_a_scatter_says_why_it_has_one_colour(label, title):
    figure = scatter(label)
    assert figure.axes[0].get_title(loc="left") == title and not figure.legends
    colours = np.concatenate([points.get_facecolor() for points in figure.axes[0].collections])
    assert len(np.unique(colours, axis=0)) == 1


def test_an_interrupted_write_leaves_the_old_picture(tmp_path, monkeypatch):
    def stop(_self, path, **_):
        path.write_bytes(b"half a pic")
        raise KeyboardInterrupt

    (tmp_path / "a.png").write_bytes(b"old")
    monkeypatch.setattr(Image.Image, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        plots.save(np.zeros((2, 2, 3), np.uint8), tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"] and (tmp_path / "a.png").read_bytes() == b"old"


def history(*losses: float) -> list[EpochMetrics]:
    return [
        EpochMetrics(number + 1, loss, loss - 3, 3.0 - 2 / loss, loss - 1, loss - 4, 3.0, 1.0, "grey")
        for number, loss in enumerate(losses)
    ]


@pytest.mark.parametrize("losses", [(9.0,), (9.0, 8.0, 7.0), (7.0, 7.0, 7.0)])
def test_curves(losses, tmp_path):
    metrics = history(*losses)
    figure = plots.curves(metrics)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["loss", "BCE", "KLD"]
    assert "grey pixels" in figure.get_suptitle()
    for axes, name in zip(figure.axes, ("loss", "bce", "kld"), strict=True):
        for line, part in zip(axes.get_lines(), ("train", "test"), strict=True):
            assert line.get_label() == part
            np.testing.assert_array_equal(line.get_ydata(), [getattr(one, f"{part}_{name}") for one in metrics])
    plots.save(plots.pixels(figure), tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.mode == "RGB" and image.width == 1800


def test_the_first_epoch_does_not_flatten_the_curves():
    loss, _, kld = plots.curves(history(165.0, 122.0, 110.0, 106.0)).axes
    low, high = loss.get_ylim()
    assert 100 < low < 105 and 122 < high < 130
    assert loss.texts[0].get_text() == "epoch 1, not shown:\ntrain 165.0\ntest 164.0"
    assert not kld.texts
    # Two epochs are shown whole.
    loss, *_ = plots.curves(history(165.0, 122.0)).axes
    assert loss.get_ylim()[1] > 165 and not loss.texts


def test_plotting_waits_until_it_draws_and_leaves_pyplot_alone():
    code = """
import sys
import vae_jax.train, vae_jax.evaluate, vae_jax.generate, vae_jax.pictures.kinds
assert not {"matplotlib", "jax", "torch", "tensorboard"} & set(sys.modules)
import numpy as np
from vae_jax.pictures import plots
plots.pixels(plots.grid(np.zeros((1, 1, 4, 4))))
assert "matplotlib" in sys.modules and not {"matplotlib.pyplot", "jax", "torch"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
