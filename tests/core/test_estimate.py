"""The importance-weighted estimate of log p(x), against the exact integral and an independent program in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.core.untrained import init
from vae_jax import VAE
from vae_jax.core import estimate


def numpy_log_weights(params, images: np.ndarray, eps: np.ndarray) -> np.ndarray:
    """log w in float64, term by term as printed: log p(x | z) + log N(z; 0, I) - log N(z; mu, exp(logvar))."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def linear(layer, x):
        return x @ layer["kernel"] + layer["bias"]

    def log_normal(z, mean, variance):
        return np.sum(-0.5 * np.log(2 * np.pi * variance) - (z - mean) ** 2 / (2 * variance), axis=-1)

    h = np.maximum(linear(params["encoder"]["fc1"], images), 0)
    mu, logvar = (linear(params["encoder"][name], h)[:, None] for name in ("fc2_mu", "fc2_logvar"))
    z = mu + np.exp(logvar / 2) * eps
    logits = linear(params["decoder"]["fc2"], np.maximum(linear(params["decoder"]["fc1"], z), 0))
    x = images[:, None]
    log_px_z = np.sum(-x * np.logaddexp(0, -logits) - (1 - x) * np.logaddexp(0, logits), axis=-1)
    return log_px_z + log_normal(z, 0, 1) - log_normal(z, mu, np.exp(logvar))


def numpy_log_px(params, images: np.ndarray, eps: np.ndarray) -> np.ndarray:
    """The estimate in float64."""
    log_w = numpy_log_weights(params, images, eps)
    top = log_w.max(axis=1, keepdims=True)
    return top[:, 0] + np.log(np.mean(np.exp(log_w - top), axis=1))


def exact_log_px(params, pixel: float, latent_dim: int) -> float:
    """log of the integral of p(x | z) p(z) over z, by the trapezoidal rule on [-9, 9] in each dimension."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)["decoder"]
    axis = np.linspace(-9, 9, 601)
    z = np.stack(np.meshgrid(*[axis] * latent_dim), axis=-1).reshape(-1, latent_dim)
    h = np.maximum(z @ params["fc1"]["kernel"] + params["fc1"]["bias"], 0)
    logits = (h @ params["fc2"]["kernel"] + params["fc2"]["bias"])[:, 0]
    log_px_z = -pixel * np.logaddexp(0, -logits) - (1 - pixel) * np.logaddexp(0, logits)
    density = np.exp(log_px_z - 0.5 * np.sum(z**2, axis=-1)) / (2 * np.pi) ** (latent_dim / 2)
    return float(np.log(np.sum(density) * (axis[1] - axis[0]) ** latent_dim))


@pytest.mark.parametrize("latent_dim", [1, 2])
@pytest.mark.parametrize("pixel", [0.0, 0.3, 1.0])
def test_estimate_agrees_with_the_exact_integral(latent_dim, pixel):
    model = VAE(hidden_dim=8, latent_dim=latent_dim, pixels=1)
    params = init(model, seed=3, scale=8)
    images, key, samples = jnp.full((1, 1), pixel), jax.random.key(1), 5000
    found = estimate.importance_log_px(model, params, images, jnp.arange(1), key, samples, batch_size=999)[0]
    # The relative error of a mean is the absolute error of its logarithm.
    weights = np.exp(
        numpy_log_weights(
            params,
            np.asarray(images),
            np.asarray(estimate.draw_eps(key, jnp.arange(1), jnp.arange(samples), latent_dim)),
        )
    )
    stderr = weights.std() / weights.mean() / np.sqrt(samples)
    exact = exact_log_px(params, pixel, latent_dim)
    assert abs(found - exact) < 3 * stderr
    # The evidence lower bound would not have done.
    assert np.log(weights).mean() < exact - 3 * stderr


def test_estimate_equals_an_independent_one_in_numpy():
    model = VAE()
    params = init(model, scale=4)
    key, numbers, samples = jax.random.key(5), jnp.arange(24), 60
    images = jax.random.uniform(jax.random.key(6), (24, 784))
    eps = estimate.draw_eps(key, numbers, jnp.arange(samples), 20)
    expected = numpy_log_px(params, np.asarray(images, np.float64), np.asarray(eps, np.float64))
    found = estimate.importance_log_px(model, params, images, numbers, key, samples, batch_size=100)
    # Float32 carries seven digits of some 600 nats.
    np.testing.assert_allclose(found.mean(), expected.mean(), rtol=0, atol=2e-4)
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-4)


def test_chunks_change_no_result():
    model = VAE(hidden_dim=16, latent_dim=3, pixels=12)
    params, key = init(model, scale=8), jax.random.key(0)
    images = jax.random.uniform(key, (23, 12))
    whole = estimate.importance_log_px(model, params, images, jnp.arange(23), key, 50, batch_size=10_000)
    for batch_size in (7, 110):  # 8 chunks of 7 samples with 6 places unused; 2 images at once
        parts = estimate.importance_log_px(model, params, images, jnp.arange(23), key, 50, batch_size)
        np.testing.assert_allclose(parts, whole, atol=1e-5)
    bounds = [estimate.bound(model, params, images, key, batch_size) for batch_size in (7, 10_000)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *bounds)
    some = estimate.importance_log_px(model, params, images, jnp.array([5, 2]), key, 50)
    np.testing.assert_allclose(some, whole[jnp.array([5, 2])], atol=1e-5)


def test_weights_that_no_float_holds():
    model = VAE(hidden_dim=16, latent_dim=2, pixels=784)
    params = init(model, scale=1000)
    images = jnp.zeros((2, 784))
    found = estimate.importance_log_px(model, params, images, jnp.arange(2), jax.random.key(0), 30, batch_size=8)
    assert np.all(np.isfinite(found)) and np.all(found < -1000)
