import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from vae_jax import Output, bce, kld, losses


def test_bce_by_hand():
    # sigmoid(0) = 1/2 costs log 2 a pixel whatever the pixel is; sigmoid(log 3) = 3/4.
    logits = jnp.array([[0.0, 0.0, 0.0], [np.log(3), np.log(3), -np.log(3)]])
    images = jnp.array([[0.0, 0.3, 1.0], [1.0, 0.0, 0.5]])
    expected = [3 * np.log(2), -np.log(0.75) - np.log(0.25) - 0.5 * np.log(0.25) - 0.5 * np.log(0.75)]
    np.testing.assert_allclose(bce(logits, images), expected, rtol=1e-6)


def test_bce_at_huge_logits():
    logits = jnp.array([[1e4, -1e4, 1e4, -1e4]])
    images = jnp.array([[1.0, 0.0, 0.0, 1.0]])
    assert bce(logits, images) == 2e4
    gradient = jax.grad(lambda logits: jnp.sum(bce(logits, images)))(logits)
    np.testing.assert_array_equal(gradient, [[0.0, 0.0, 1.0, -1.0]])


def test_the_gradient_of_the_bce_at_the_kink():
    # sigmoid(0) - x, which the derivative of max(l, 0) + log1p(exp(-|l|)) would miss there.
    gradient = jax.grad(lambda logits: jnp.sum(bce(logits, jnp.array([[0.25]]))))(jnp.zeros((1, 1)))
    np.testing.assert_array_equal(gradient, [[0.25]])


def test_bce_keeps_the_last_digits_of_sure_pixels():
    # log(1 + exp(-30)) is 9e-14: taking the logarithm of a float32 sum would give 0.
    assert bce(jnp.array([[-30.0]]), jnp.array([[0.0]]))[0] == pytest.approx(np.exp(-30), rel=1e-6)


def test_gradients():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        logits, mu, logvar = (jnp.asarray(rng.normal(size=(3, 4))) for _ in range(3))
        images = jnp.asarray(rng.uniform(size=(3, 4)))
        check_grads(jax.jit(lambda logits: bce(logits, images)), (logits,), order=2)
        check_grads(jax.jit(kld), (mu, logvar), order=2)


def test_kld_by_hand():
    # KL(N(m, s^2) || N(0, 1)) = (m^2 + s^2 - 1) / 2 - log s.
    mu = jnp.array([[0.0, 0.0], [2.0, 0.0]])
    logvar = jnp.array([[0.0, 0.0], [0.0, 2 * np.log(3)]])
    np.testing.assert_allclose(kld(mu, logvar), [0.0, 4 / 2 + (9 - 1) / 2 - np.log(3)], rtol=1e-6)


def test_kld_against_sampling():
    mu, logvar = jnp.array([[0.7]]), jnp.array([[-1.2]])
    z = mu + jnp.exp(logvar / 2) * jax.random.normal(jax.random.key(0), (200_000, 1))
    log_ratio = -0.5 * ((z - mu) ** 2 / jnp.exp(logvar) + logvar) + 0.5 * z**2
    assert kld(mu, logvar)[0] == pytest.approx(float(jnp.mean(log_ratio)), abs=3 * float(jnp.std(log_ratio)) / 447)


@pytest.mark.parametrize("beta", [0.0, 1.0, 4.0])
def test_losses_add_up(beta):
    output = Output(jnp.ones((2, 3)), jnp.ones((2, 5)), jnp.zeros((2, 5)), jnp.ones((2, 5)))
    images = jnp.zeros((2, 3))
    result = losses(output, images, beta)
    np.testing.assert_array_equal(result.bce, bce(output.logits, images))
    np.testing.assert_array_equal(result.kld, [2.5, 2.5])
    np.testing.assert_array_equal(result.loss, result.bce + beta * 2.5)
