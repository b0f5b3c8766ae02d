import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vae_jax import VAE, TrainConfig, create_state, to_pixels

SHAPES = {
    "encoder": {"fc1": (784, 400), "fc2_mu": (400, 20), "fc2_logvar": (400, 20)},
    "decoder": {"fc1": (20, 400), "fc2": (400, 784)},
}


@pytest.fixture(scope="module")
def params():
    return create_state(TrainConfig()).params


def test_parameters_are_the_documented_ones(params):
    shapes = jax.tree.map(jnp.shape, params)
    assert shapes == {
        part: {name: {"kernel": shape, "bias": shape[1:]} for name, shape in layers.items()}
        for part, layers in SHAPES.items()
    }
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 652_824


def test_initialization_is_pytorchs(params):
    for layers in params.values():
        for layer in layers.values():
            bound = layer["kernel"].shape[0] ** -0.5
            for leaf in layer.values():
                assert jnp.abs(leaf).max() <= bound
                # The mean of n draws from U(-b, b) is 0 and their standard deviation b / sqrt(3), within 5 errors.
                assert abs(jnp.mean(leaf)) < 5 * bound / np.sqrt(3 * leaf.size)
                assert jnp.std(leaf) == pytest.approx(bound / np.sqrt(3), rel=5 / np.sqrt(leaf.size))
    leaves = [np.asarray(leaf).ravel()[:20] for leaf in jax.tree.leaves(params)]
    scaled = {tuple((leaf / np.abs(leaf).max()).round(4)) for leaf in leaves}
    assert len(scaled) == len(leaves), "two layers share their random numbers"


def test_output(params):
    images = jax.random.uniform(jax.random.key(0), (3, 784))
    eps = jax.random.normal(jax.random.key(1), (3, 20))
    output = VAE().apply({"params": params}, images, eps)
    assert [part.shape for part in output] == [(3, 784), (3, 20), (3, 20), (3, 20)]
    np.testing.assert_allclose(output.z, output.mu + jnp.exp(output.logvar / 2) * eps, rtol=1e-6)
    mu, logvar = VAE().apply({"params": params}, images, method="encode")
    np.testing.assert_array_equal(mu, output.mu)
    np.testing.assert_array_equal(logvar, output.logvar)
    logits = VAE().apply({"params": params}, output.z, method="decode")
    np.testing.assert_allclose(logits, output.logits, rtol=1e-5, atol=1e-6)


def test_bytes_and_pixels_are_the_same_images(params):
    stored = jax.random.bits(jax.random.key(0), (2, 784), jnp.uint8)
    eps = jnp.zeros((2, 20))
    from_bytes, from_pixels = (
        VAE().apply({"params": params}, images, eps) for images in (stored, stored.astype(jnp.float32) / 255)
    )
    np.testing.assert_array_equal(from_bytes.logits, from_pixels.logits)


def test_to_pixels():
    np.testing.assert_allclose(to_pixels(jnp.array([[0, 51, 255]], jnp.uint8)), [[0, 0.2, 1]], rtol=1e-7)
    pixels = jnp.array([[0.25, 1.0, 0.0, -9e-7, 1 + 9e-7]])
    np.testing.assert_array_equal(to_pixels(pixels), pixels)


@pytest.mark.parametrize("value", [255.0, 1.00001, -0.5, -1e-5])
def test_floats_out_of_range_become_nan(value):
    np.testing.assert_array_equal(to_pixels(jnp.array([[0.5, value]])), [[0.5, jnp.nan]])


IMAGES_OF_OTHER_TYPES = """
import jax
import jax.numpy as jnp
from vae_jax import InputError, TrainConfig, create_state, measure, train_epoch, train_step
state = create_state(TrainConfig(hidden_dim=4, latent_dim=2))
for images in [jnp.zeros((2, 784), dtype) for dtype in ("int32", "int8", "uint16", "bool", "complex64")]:
    for call in (
        lambda: train_step(state, images),
        lambda: train_epoch(state, images, jnp.zeros((1, 2), jnp.int32)),
        lambda: measure(state.model, state.params, images, jax.random.key(0)),
    ):
        try:
            call()
            raise SystemExit(f"{images.dtype} was not refused")
        except InputError as error:
            assert str(error).startswith(f"images have type {images.dtype}; expected uint8"), error
try:
    measure(state.model, state.params, jnp.full((2, 784), 255.0), jax.random.key(0))
    raise SystemExit("floats of 255 were not refused")
except InputError as error:
    assert str(error).startswith("images hold floats from 255 to 255; expected floats in [0, 1]"), error
"""


def test_images_of_other_types_are_refused():
    # In a process of its own, where no type checker comes first.
    subprocess.run([sys.executable, "-c", IMAGES_OF_OTHER_TYPES], check=True)
