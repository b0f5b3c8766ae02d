"""kinds: the latent points and labels of every picture, and its files."""

import numpy as np
import pytest
from PIL import Image

from vae_jax.pictures import kinds
from vae_jax.runs.latents import Latents


class Linear:
    """An autoencoder of 4 x 4 pixels whose posterior means and variances are easily told."""

    def __init__(self, latent_dim: int = 3, pixels: int = 16):
        self.latent_dim = latent_dim
        rng = np.random.default_rng(0)
        self._weights = rng.standard_normal((pixels, latent_dim), np.float32) / pixels**0.5

    def encode(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mu = (images - 0.5) @ self._weights
        # The KLD grows with the number of the dimension.
        return mu, np.tile(-np.arange(self.latent_dim, dtype=np.float32), (len(images), 1))

    def decode(self, z: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-z @ self._weights.T))


IMAGES = np.random.default_rng(1).random((50, 16), np.float32)


def test_sample_fills_a_grid(tmp_path):
    model = Linear()
    picture = kinds.sample(model, np.random.default_rng(0), 10)
    kinds.save(picture, (4, 4), tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as file:
        arrays = dict(file)
    assert arrays["images"].shape == (3, 4, 4, 4) and arrays["z"].shape == (3, 4, 3)
    # Two places of the grid are empty.
    assert np.isnan(arrays["images"][2, 2:]).all() and np.isfinite(arrays["images"].reshape(12, -1)[:10]).all()
    np.testing.assert_array_equal(picture.images[0], model.decode(picture.z[0]))
    same, other = (kinds.sample(model, np.random.default_rng(seed), 10).z for seed in (0, 1))
    np.testing.assert_array_equal(same, picture.z)
    assert not np.array_equal(other, picture.z, equal_nan=True)


def test_samples_are_drawn_from_the_prior():
    z = kinds.sample(Linear(), np.random.default_rng(0), 10_000).z.reshape(-1, 3)
    # Five standard errors of 10,000 draws.
    np.testing.assert_allclose(z.mean(axis=0), 0, atol=0.05)
    np.testing.assert_allclose(z.std(axis=0), 1, atol=0.036)


def test_reconstruct_decodes_the_posterior_means():
    model = Linear()
    picture = kinds.reconstruct(model, IMAGES[:4])
    np.testing.assert_array_equal(picture.images[0], IMAGES[:4])
    np.testing.assert_array_equal(picture.images[1], model.decode(model.encode(IMAGES[:4])[0]))
    assert np.isnan(picture.z[0]).all() and picture.row_labels == ["image", "reconstruction"]


@pytest.mark.parametrize("path", ["spherical", "linear"])
def test_interpolate_runs_from_image_to_image(path):
    model = Linear()
    picture = kinds.interpolate(model, IMAGES[:2], IMAGES[2:4], 5, path)
    assert picture.images.shape == (2, 7, 16) and picture.z.shape == (2, 7, 3)
    np.testing.assert_array_equal(picture.images[:, [0, -1]], np.stack([IMAGES[:2], IMAGES[2:4]], axis=1))
    assert np.isnan(picture.z[:, [0, -1]]).all()
    mu, _ = model.encode(IMAGES[:4])
    np.testing.assert_allclose(picture.z[:, 1], mu[:2], atol=1e-6)
    np.testing.assert_allclose(picture.z[:, -2], mu[2:], atol=1e-6)
    np.testing.assert_allclose(picture.images[:, 1:-1], model.decode(picture.z[:, 1:-1]), atol=1e-6)
    assert picture.column_labels == ["image", "0.00", "0.25", "0.50", "0.75", "1.00", "image"]
    assert path in picture.title.lower()


def test_latent_paths():
    start, end = np.array([[1.0, 0.0], [2.0, 0.0]]), np.array([[0.0, 1.0], [-2.0, 0.0]])
    linear = kinds.latent_path(start, end, 3, "linear")
    np.testing.assert_allclose(linear[0], [[1, 0], [0.5, 0.5], [0, 1]])
    curved = kinds.latent_path(start, end, 3, "spherical")
    np.testing.assert_allclose(np.linalg.norm(curved[0], axis=-1), 1)
    np.testing.assert_allclose(curved[0, 1], [0.5**0.5, 0.5**0.5])
    # No single circle joins opposite, equal or zero vectors: they get the straight line.
    np.testing.assert_allclose(curved[1], linear[1])
    zero = np.zeros((1, 2))
    np.testing.assert_array_equal(kinds.latent_path(zero, zero, 3, "spherical"), np.zeros((1, 3, 2)))


def test_traverse_orders_dimensions_by_kld_and_marks_the_own_value():
    model = Linear()
    picture = kinds.traverse(model, IMAGES[7], IMAGES, steps=3, span=2.0)
    mu, logvar = model.encode(IMAGES)
    kld = -0.5 * np.mean(1 + logvar - mu**2 - np.exp(logvar), axis=0)
    assert picture.row_labels == [f"z{number}: {kld[number]:.2f} nats" for number in (2, 1, 0)]
    assert picture.column_labels == ["\N{MINUS SIGN}2.0", "0", "+2.0"]
    for row, dimension in enumerate((2, 1, 0)):
        np.testing.assert_array_equal(picture.z[row, :, dimension], [-2, 0, 2])
        np.testing.assert_allclose(
            np.delete(picture.z[row], dimension, 1), [np.delete(mu[7], dimension)] * 3, atol=1e-6
        )
        # Columns 0, 1, 2 hold the values -2, 0, 2.
        assert picture.marks[row] == pytest.approx(mu[7, dimension] / 2 + 1, abs=1e-5)
    assert len(kinds.traverse(model, IMAGES[7], IMAGES, dimensions=2).images) == 2


def test_traverse_marks_no_value_outside_the_span():
    picture = kinds.traverse(Linear(), IMAGES[7], IMAGES, span=1e-6)
    assert np.isnan(picture.marks).all()
    assert picture.column_labels == ["0"] * 11
    kinds.figure(picture, (4, 4))


def test_manifold_is_a_grid_of_quantiles():
    picture = kinds.manifold(Linear(latent_dim=2), side=4)
    # The normal quantiles of 1/8, 3/8, 5/8 and 7/8; z0 to the right, z1 up.
    quantiles = [-1.15035, -0.31864, 0.31864, 1.15035]
    np.testing.assert_allclose(picture.z[2, :, 0], quantiles, atol=1e-5)
    np.testing.assert_allclose(picture.z[:, 1, 1], quantiles[::-1], atol=1e-5)
    labels = ["\N{MINUS SIGN}1.2", "\N{MINUS SIGN}0.3", "+0.3", "+1.2"]
    assert picture.column_labels == labels and picture.row_labels == labels[::-1]
    assert (picture.row_axis, picture.column_axis) == ("z1", "z0")


def encoded(**changes) -> Latents:
    """200 images whose mu varies most in dimension 2, then in 0; the KLD is largest in dimension 1, then in 2."""
    mu = np.random.default_rng(2).standard_normal((200, 3)).astype(np.float32) * np.float32([0.5, 0.1, 0.9])
    logvar = np.tile(np.float32([0, -5, 0]), (200, 1))
    return Latents(np.array(["test"] * 200), np.arange(200), np.arange(200) % 10, mu, logvar)._replace(**changes)


def test_latents_shows_the_dimensions_of_the_largest_kld():
    picture = kinds.latents(encoded(), "kld")
    np.testing.assert_array_equal(picture.points, encoded().mu[:, [1, 2]])
    kld = encoded().kld()
    assert picture.axes == (f"z1 (KLD {kld[1]:.2f} nats)", f"z2 (KLD {kld[2]:.2f} nats)")
    assert picture.title == "Posterior means of 200 test images"
    # Of two dimensions, both, in their own order.
    two = encoded(mu=encoded().mu[:, :2], logvar=encoded().logvar[:, :2])
    np.testing.assert_array_equal(kinds.latents(two).points, two.mu)


def test_latents_shows_principal_components():
    mu = encoded().mu + np.float32([0, 0, 7])
    picture = kinds.latents(encoded(mu=mu), "pca")
    # The directions in which mu varies most, about dimensions 2 and 0; the origin stays the prior's.
    np.testing.assert_allclose(picture.points, mu[:, [2, 0]], atol=0.6)
    assert picture.points[:, 0].mean() == pytest.approx(7, abs=0.3)
    np.testing.assert_allclose(np.corrcoef(picture.points.T)[0, 1], 0, atol=1e-5)
    share = picture.points[:, 0].var() / mu.var(axis=0).sum()
    assert picture.axes[0] == f"principal component 1 ({share:.0%} of the variance)"
    same = np.ones((4, 3), np.float32)  # no variance at all
    assert np.isfinite(kinds.latents(encoded(mu=same), "pca").points).all()


def test_the_arrays_of_a_scatter(tmp_path):
    for label in (None, np.arange(200) % 3):
        picture = kinds.latents(encoded(label=label))
        kinds.save(picture, (4, 4), tmp_path / "a.npz")
        with np.load(tmp_path / "a.npz") as file:
            arrays = dict(file)
        assert arrays.keys() == {"points", "mu", "axes"} | (set() if label is None else {"label"})
        np.testing.assert_array_equal(arrays["points"], picture.points)


def test_decode_leaves_empty_places():
    z = kinds.square(np.random.default_rng(0).random((5, 3), np.float32))
    picture = kinds.decode(Linear(), z)
    assert z.shape == (2, 3, 3) and np.isnan(picture.images[1, 2]).all()
    np.testing.assert_array_equal(picture.images[0], Linear().decode(z[0]))


@pytest.mark.parametrize(
    ("draw", "mode"),
    [
        (lambda: kinds.sample(Linear(), np.random.default_rng(0), 5), "L"),
        (lambda: kinds.reconstruct(Linear(), IMAGES[:3]), "L"),
        (lambda: kinds.interpolate(Linear(), IMAGES[:1], IMAGES[1:2]), "L"),
        (lambda: kinds.traverse(Linear(), IMAGES[0], IMAGES), "RGB"),  # its marks are coloured
        (lambda: kinds.manifold(Linear(latent_dim=2)), "L"),
        (lambda: kinds.decode(Linear(), kinds.square(np.zeros((5, 3), np.float32))), "L"),
        (lambda: kinds.latents(encoded()), "RGB"),
    ],
    ids=["sample", "reconstruct", "interpolate", "traverse", "manifold", "decode", "latents"],
)
def test_pictures_are_sharp(draw, mode, tmp_path):
    kinds.save(draw(), (4, 4), tmp_path / "deep" / "picture.png")
    with Image.open(tmp_path / "deep" / "picture.png") as image:
        assert image.format == "PNG" and image.mode == mode and max(image.size) > 1200
        assert image.info["dpi"] == pytest.approx((200, 200), abs=0.1)


def test_colour(tmp_path):
    picture = kinds.sample(Linear(2, 4 * 4 * 3), np.random.default_rng(0), 6)
    kinds.save(picture, (4, 4, 3), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == "RGB"
    kinds.save(picture, (4, 4, 3), tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as arrays:
        assert arrays["images"].shape == (2, 3, 4, 4, 3)


def test_an_interrupted_write_leaves_the_old_arrays(tmp_path, monkeypatch):
    def stop(path, **_):
        path.write_bytes(b"half the arrays")
        raise KeyboardInterrupt

    out = tmp_path / "a.npz"
    out.write_bytes(b"old")
    monkeypatch.setattr(np, "savez_compressed", stop)
    with pytest.raises(KeyboardInterrupt):
        kinds.save(kinds.sample(Linear(), np.random.default_rng(0)), (4, 4), out)
    assert list(tmp_path.iterdir()) == [out] and out.read_bytes() == b"old"
