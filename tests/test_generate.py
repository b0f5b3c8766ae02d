"""generate: every kind of picture, from its latent points to its file, and what is refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.core.untrained import init
from torch_ref import convert
from vae_jax import VAE, InputError, TrainConfig, Trained, fit, load
from vae_jax.config import (
    Decode,
    EncodeConfig,
    Interpolate,
    Latents,
    Manifold,
    Reconstruct,
    Sample,
    Traverse,
)
from vae_jax.core import steps
from vae_jax.core.binarize import binarize
from vae_jax.data.source import BUNDLED
from vae_jax.encode import encode
from vae_jax.generate import generate
from vae_jax.runs import latents
from vae_jax.runs.trained import read


def save_model(path: Path, model: VAE) -> Path:
    """Writes an untrained model, and gives its path back."""
    convert.save(convert.to_state_dict(jax.device_get(init(model, scale=8))), path)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("weights") / "vae.pth", VAE(16, 5))


@pytest.fixture(scope="module")
def weights_2d(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("weights") / "vae2.pth", VAE(16, 2))


def test_sample(weights, tmp_path):
    picture = generate(Sample(weights, tmp_path / "a.npz", count=10))
    with np.load(tmp_path / "a.npz") as file:
        arrays = dict(file)
    assert arrays["images"].shape == (3, 4, 28, 28) and arrays["z"].shape == (3, 4, 5)
    # Two places of the grid are empty.
    assert np.isnan(arrays["images"][2, 2:]).all() and np.isfinite(arrays["images"].reshape(12, -1)[:10]).all()
    assert arrays["images"][0].min() >= 0 and arrays["images"][0].max() <= 1
    np.testing.assert_array_equal(picture.images[0], read(weights).decode(picture.z[0]))
    same, other = (generate(Sample(weights, tmp_path / "b.npz", count=10, seed=seed)).z for seed in (0, 1))
    np.testing.assert_array_equal(same, picture.z)
    assert not np.array_equal(other, picture.z, equal_nan=True)


def test_reconstruct(weights, tmp_path):
    picture = generate(Reconstruct(weights, tmp_path / "a.npz", numbers=(3, 1)))
    test_images = load().test_images
    np.testing.assert_allclose(picture.images[0].reshape(2, 28, 28), test_images[[3, 1]] / 255, atol=1e-6)
    trained = read(weights)
    mu, _ = trained.encode(picture.images[0])
    np.testing.assert_array_equal(picture.images[1], trained.decode(mu))
    drawn = generate(Reconstruct(weights, tmp_path / "b.npz", count=4))
    assert drawn.images.shape == (2, 4, 784)


def test_binarized_originals(weights, tmp_path):
    picture = generate(Reconstruct(weights, tmp_path / "a.npz", binarize="threshold", count=3))
    assert set(np.unique(picture.images[0])) == {0, 1}
    (tmp_path / "config.json").write_text(json.dumps({"binarize": "threshold"}))
    shutil.copy(weights, tmp_path / "model.pth")
    of_run = generate(Reconstruct(tmp_path, tmp_path / "b.npz", count=3))
    np.testing.assert_array_equal(of_run.images, picture.images)


@pytest.mark.parametrize("rule", ["static", "dynamic"])
def test_binarized_originals_are_those_of_the_run(tmp_path, rule):
    images = np.random.default_rng(0).integers(0, 256, (40, 6, 6), np.uint8)
    np.savez(tmp_path / "set.npz", train_images=images, test_images=images)
    run = tmp_path / "run"
    fit(
        TrainConfig(
            data=str(tmp_path / "set.npz"),
            binarize=rule,
            epochs=1,
            hidden_dim=8,
            latent_dim=3,
            seed=3,
            workdir=run,
            export=tmp_path / "vae.pth",
        )
    )
    key = jax.random.fold_in(jax.random.key(3), steps.TEST_PIXELS)
    test_set = np.asarray(binarize(jnp.asarray(images.reshape(40, 36)), rule, key)).astype(np.float32) / 255
    # Whichever else is shown, and however the picture draws.
    for numbers, seed in (((3, 1), 0), ((1, 30, 3), 8)):
        picture = generate(Reconstruct(run, tmp_path / "a.npz", numbers=numbers, seed=seed))
        np.testing.assert_array_equal(picture.images[0], test_set[list(numbers)])
    mu, logvar = read(run).encode(test_set)
    kld = -0.5 * np.mean(1 + logvar - mu**2 - np.exp(logvar), axis=0)
    traversal = generate(Traverse(run, tmp_path / "b.npz", number=7))
    last = np.argmax(-kld)
    np.testing.assert_allclose(
        np.delete(traversal.z[0, 0], np.argmax(kld)), np.delete(mu[7], np.argmax(kld)), atol=1e-6
    )
    assert traversal.row_labels[-1] == f"z{last}: {kld[last]:.2f} nats"


def test_interpolate_runs_from_image_to_image(weights, tmp_path):
    picture = generate(Interpolate(weights, tmp_path / "a.npz", numbers=(0, 1, 2, 3), steps=5))
    mu, _ = read(weights).encode(load().test_images[:4].reshape(4, -1))
    assert picture.z.shape == (2, 7, 5)
    np.testing.assert_allclose(picture.z[:, 1], mu[::2], atol=1e-6)
    np.testing.assert_allclose(picture.z[:, -2], mu[1::2], atol=1e-6)
    assert generate(Interpolate(weights, tmp_path / "b.npz", count=3, path="linear")).images.shape == (3, 12, 784)


def test_traverse_orders_dimensions_by_kld(weights, tmp_path):
    picture = generate(Traverse(weights, tmp_path / "a.npz", number=7, steps=3, span=2.0))
    trained, images = read(weights), load().test_images.reshape(10_000, -1)
    mu, logvar = trained.encode(images)
    kld = -0.5 * np.mean(1 + logvar - mu**2 - np.exp(logvar), axis=0)
    assert [label.split(":")[0] for label in picture.row_labels] == [f"z{number}" for number in np.argsort(-kld)]
    for row, dimension in enumerate(np.argsort(-kld)):
        np.testing.assert_array_equal(picture.z[row, :, dimension], [-2, 0, 2])
        others = np.delete(np.arange(5), dimension)
        np.testing.assert_allclose(picture.z[row][:, others], np.tile(mu[7, others], (3, 1)), atol=1e-6)
    assert len(generate(Traverse(weights, tmp_path / "b.npz", dimensions=2)).images) == 2


def test_manifold_is_a_grid_of_quantiles(weights_2d, tmp_path):
    picture = generate(Manifold(weights_2d, tmp_path / "a.png", side=4))
    # The normal quantiles of 1/8, 3/8, 5/8 and 7/8; z0 to the right, z1 up.
    quantiles = [-1.15035, -0.31864, 0.31864, 1.15035]
    np.testing.assert_allclose(picture.z[2, :, 0], quantiles, atol=1e-5)
    np.testing.assert_allclose(picture.z[:, 1, 1], quantiles[::-1], atol=1e-5)


def test_draw_shows_black_or_white(weights, tmp_path):
    means = generate(Reconstruct(weights, tmp_path / "a.npz", count=40))
    drawn = generate(Reconstruct(weights, tmp_path / "b.npz", count=40, draw=True))
    np.testing.assert_array_equal(drawn.images[0], means.images[0])  # the originals
    assert set(np.unique(drawn.images[1])) == {0, 1}
    assert abs(drawn.images[1].mean() - means.images[1].mean()) < 0.02


def test_decode_makes_the_images_of_a_file_again(weights, tmp_path, capsys):
    made = generate(Interpolate(weights, tmp_path / "made.npz", count=3, steps=4))
    again = generate(Decode(weights, tmp_path / "again.npz", latents=tmp_path / "made.npz"))
    np.testing.assert_array_equal(again.images[:, 1:-1], made.images[:, 1:-1])
    assert np.isnan(again.images[:, [0, -1]]).all()  # the originals, which have no latent point
    # A picture of at most 12 images has two rows of six of them.
    capsys.readouterr()
    grid = generate(Decode(weights, tmp_path / "a.png", latents=tmp_path / "made.npz", count=12))
    np.testing.assert_array_equal(grid.z, made.z[:2])
    assert "shows the first of its 18 points" in capsys.readouterr().out


def test_decode_takes_what_encode_writes(weights, tmp_path):
    encoded = encode(EncodeConfig(weights, tmp_path / "latents.npz"))
    images = generate(Decode(weights, tmp_path / "all.npz", latents=tmp_path / "latents.npz")).images
    assert images.shape == (10_000, 784)
    with np.load(tmp_path / "all.npz") as arrays:
        assert arrays["images"].shape == (10_000, 28, 28)
    for suffix in (".npz", ".csv", ".parquet"):
        latents.save(encoded, tmp_path / f"table{suffix}")
        few = generate(Decode(weights, tmp_path / "a.png", latents=tmp_path / f"table{suffix}", count=5))
        assert few.images.shape == (2, 3, 784) and np.isnan(few.images[1, 2]).all()
        np.testing.assert_allclose(few.images.reshape(6, -1)[:5], images[:5], atol=1e-6)
    drawn = generate(Decode(weights, tmp_path / "b.npz", latents=tmp_path / "latents.npz", draw=True)).images
    assert set(np.unique(drawn)) == {0, 1} and drawn.mean() == pytest.approx(images.mean(), abs=0.001)
    with pytest.raises(InputError, match=r"10,000 images of 784 pixels take 0.1 GB; expected at most 0.0 GB"):
        generate(Decode(weights, tmp_path / "c.npz", latents=tmp_path / "latents.npz", max_data_gb=0.04))


def test_decode_replaces_no_latents(weights, tmp_path):
    np.savez(tmp_path / "a.npz", z=np.zeros((2, 5)))
    with pytest.raises(InputError, match="is the file of latents"):
        generate(Decode(weights, tmp_path / "a.npz", latents=tmp_path / "a.npz"))


def test_latents_are_those_of_the_test_images(weights, tmp_path):
    picture = generate(Latents(weights, tmp_path / "a.npz"))
    mu, _ = read(weights).encode(load().test_images.reshape(10_000, 784))
    np.testing.assert_allclose(picture.mu, mu, atol=1e-5)
    np.testing.assert_array_equal(picture.label, load().test_labels)
    generate(Latents(weights, tmp_path / "a.png", axes="pca"))
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == "RGB" and image.width > 1600
    path = save_model(tmp_path / "vae.pth", VAE(4, 1))
    with pytest.raises(InputError, match="has 1 latent dimension, and `latents` shows 2"):
        generate(Latents(path, tmp_path / "b.png"))


@pytest.mark.parametrize("kind", [Sample, Reconstruct, Interpolate, Traverse, Manifold])
def test_pictures_are_written(weights_2d, tmp_path, kind):
    out = tmp_path / "deep" / "picture.png"
    generate(kind(weights_2d, out))
    with Image.open(out) as picture:
        assert picture.format == "PNG" and picture.width > 600


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Manifold, {}, "has 5 latent dimensions, and `manifold` shows 2"),
        (Sample, {"out": Path("a.jpg")}, "--out a.jpg: expected a name that ends in .png"),
        (Sample, {"out": Path("/dev/null/a.png")}, "--out /dev/null/a.png"),
        (Sample, {"model": Path("nowhere.pth")}, "nowhere.pth: does not exist"),
        (Sample, {"count": 0}, "--count 0"),
        (Sample, {"seed": -1}, "--seed -1"),
        (Sample, {"data": "digits"}, "--data digits"),
        (Sample, {"max_data_gb": 0.0}, "--max-data-gb 0.0: expected a number above 0"),
        (Reconstruct, {"numbers": (1,) * 101}, "--numbers: names 101 test images; expected at most 100"),
        (Interpolate, {"numbers": (1,) * 202}, "--numbers: names 202 test images; expected at most 200"),
        (Reconstruct, {"numbers": (10_000,)}, "test image 10000: expected a number from 0 to 9999"),
        (Interpolate, {"numbers": (1, 2, 3)}, "--numbers 1 2 3: expected pairs"),
        (Interpolate, {"steps": 1}, "--steps 1"),
        (Traverse, {"number": -1}, "test image -1"),
        (Traverse, {"dimensions": 6}, "--dimensions 6: the model has 5"),
        (Traverse, {"span": float("nan")}, "--span nan"),
    ],
)
def test_refusals(weights, tmp_path, monkeypatch, kind, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as refusal:
        generate(kind(**({"model": weights, "out": tmp_path / "x.png"} | options)))
    assert message in str(refusal.value) and "\n" not in str(refusal.value)
    assert not list(tmp_path.iterdir())


def test_refuses_weights_of_another_image_size(tmp_path):
    path = save_model(tmp_path / "small.pth", VAE(8, 2, 64))
    with pytest.raises(InputError, match=r"takes images of 64 pixels, but those of --data mnist have 784 \(28 x 28\)"):
        generate(Sample(path, tmp_path / "x.png"))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Sample, {"count": 500}, "--count: 500 images of 102,400 pixels are more than 50,000,000 values"),
        (Reconstruct, {"numbers": (1,) * 100}, None),
        (Reconstruct, {"count": 100}, None),
        (Interpolate, {"steps": 100}, "--steps, --count or --numbers: 510 images"),
        (Interpolate, {"numbers": (1, 2) * 5, "steps": 100}, "--steps, --count or --numbers: 510 images"),
        (Traverse, {"dimensions": 5, "steps": 100}, "--steps or --dimensions: 500 images"),
        (Traverse, {"steps": 100}, None),
        (Manifold, {"side": 100}, "--side: 10,000 images"),
    ],
)
def test_refuses_pictures_beyond_the_memory(tmp_path, kind, options, message):
    latent_dim = 2 if kind is Manifold else 5 if "dimensions" in options else 4
    path = save_model(tmp_path / "vae.pth", VAE(1, latent_dim, 320 * 320))
    # A picture that is small enough gets as far as the image set.
    with pytest.raises(InputError, match=message or "takes images of 102400 pixels"):
        generate(kind(path, tmp_path / "x.png", **options))


def test_traverse_encodes_few_large_images(weights, tmp_path, monkeypatch):
    seen = []
    encode = Trained.encode
    monkeypatch.setattr(Trained, "encode", lambda self, images: seen.append(len(images)) or encode(self, images))
    monkeypatch.setattr("vae_jax.generate.KLD_VALUES", 784 * 50)
    generate(Traverse(weights, tmp_path / "a.npz"))
    assert max(seen) == 50


def test_never_replaces_what_it_is_made_from(weights_2d, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    model, data, link = tmp_path / "model.png", tmp_path / "set.npz", tmp_path / "link.npz"
    model.write_bytes(weights_2d.read_bytes())
    np.savez(data, train_images=np.zeros((3, 28, 28), np.uint8))
    (run / "config.json").write_text(json.dumps({"export": str(model), "data": str(data)}))
    shutil.copy(weights_2d, run / "model.pth")
    link.symlink_to(run / "config.json")
    before = {path: path.read_bytes() for path in (model, data, link)}
    for config, what in (
        (Sample(model, run / ".." / "model.png"), "the model itself"),
        (Sample(run, model), "the model itself"),
        (Sample(run, link), "the run's config.json"),
        (Sample(run, data), "the image set"),
        (Sample(model, data, data=str(data)), "the image set"),
        (Sample(model, BUNDLED), "the image set mnist"),
    ):
        with pytest.raises(InputError, match=rf"--out .*: is {what}; name another file to write"):
            generate(config)
    assert {path: path.read_bytes() for path in before} == before


def test_an_image_set_is_taken_as_given(weights, tmp_path, monkeypatch):
    run = {"data": "mnist", "data_dir": "sets", "max_data_gb": 3.0, "image_size": [28, 28], "grey": True}
    (tmp_path / "config.json").write_text(json.dumps(run))
    shutil.copy(weights, tmp_path / "model.pth")
    asked = []
    monkeypatch.setattr(
        "vae_jax.runs.trained.load", lambda *options, stream: asked.append((*options, stream)) or load()
    )
    given = {"data": "", "data_dir": Path("here"), "max_data_gb": 1.0, "image_size": (8, 9)}
    for options in ({}, given):
        generate(Reconstruct(tmp_path, tmp_path / "a.npz", **options))
    assert asked == [
        ("mnist", Path("sets"), 3.0, (28, 28), True, "auto"),
        ("", Path("here"), 1.0, (8, 9), True, "auto"),
    ]


def test_a_run_needs_no_image_set_for_samples(weights, weights_2d, tmp_path):
    for kind, model in ((Sample, weights), (Manifold, weights_2d)):
        (tmp_path / "config.json").write_text(json.dumps({"data": "no/longer/there.npz", "image_shape": [28, 28]}))
        shutil.copy(model, tmp_path / "model.pth")
        generate(kind(tmp_path, tmp_path / "a.png"))
        (tmp_path / "config.json").write_text(json.dumps({"data": "no/longer/there.npz", "image_shape": [7, 7]}))
        with pytest.raises(InputError, match="no such file"):
            generate(kind(tmp_path, tmp_path / "b.png"))


def test_command_line(weights, tmp_path):
    command = [sys.executable, "-m", "vae_jax.generate", "manifold", str(weights), "--out", str(tmp_path / "x.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert not (tmp_path / "x.png").exists()
