import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.test_util import check_grads

import torch_ref.model
from torch_ref import rules
from torch_ref.objective import sampled_loss
from vae_jax import MLP, Output, bce, kld, losses
from vae_jax.core.model import init_params
from vae_jax.core.objective import dreg_gradient, sampled_losses, sum_valid


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


MODEL = MLP((6,), 2, 9, "tanh")


def sampled(samples: int, images: int = 3):
    """Parameters, images and noise for a small model, in float64."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        shapes = jax.eval_shape(lambda: init_params(MODEL, jax.random.key(0), 9))
        params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), shapes)
        return params, jnp.asarray(rng.random((images, 9))), jnp.asarray(rng.normal(size=(images, samples, 2)))


def torch_losses(params, images, eps, objective: str):
    """The same in PyTorch: the loss, and the gradient by key."""
    model = torch_ref.model.MLP((6,), 2, 9, "tanh").double()
    model.load_state_dict(rules.to_state_dict(params))
    loss = sampled_loss(model, torch.tensor(np.asarray(images)), torch.tensor(np.asarray(eps)), objective)
    loss.backward()
    return float(loss.detach()), {key: parameter.grad for key, parameter in model.named_parameters()}


@pytest.mark.parametrize("samples", [1, 5])
@pytest.mark.parametrize("objective", ["elbo", "iwae", "dreg"])
def test_losses_and_gradients_of_several_samples_equal_pytorch(objective, samples):
    params, images, eps = sampled(samples)
    valid = jnp.ones(len(images), bool)
    with jax.enable_x64(True):
        if objective == "dreg":
            gradient, losses = dreg_gradient(MODEL, params, images, eps, valid)
        else:
            summed = lambda params: sum_valid(sampled_losses(MODEL, params, images, eps, objective), valid)  # noqa: E731
            losses, gradient = summed(params), jax.grad(lambda params: summed(params).loss)(params)
        found = rules.to_state_dict(gradient)
        loss, expected = torch_losses(params, images, eps, objective)
        np.testing.assert_allclose(losses.loss, loss, rtol=1e-10)
        for key in expected:
            torch.testing.assert_close(found[key], expected[key], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("samples", [1, 4])
def test_the_gradients_have_the_same_expectation(samples):
    """DReG's and IWAE's; with one sample, the bound's too."""
    params, images, _ = sampled(samples)
    with jax.enable_x64(True):

        def gradients(key):
            eps = jax.random.normal(key, (3, samples, 2), jnp.float64)
            valid = jnp.ones(3, bool)

            def by(objective):
                return jax.grad(
                    lambda params: sum_valid(sampled_losses(MODEL, params, images, eps, objective), valid).loss
                )(params)

            return by("iwae"), dreg_gradient(MODEL, params, images, eps, valid)[0], by("elbo")

        draws = 100_000
        keys = jax.random.split(jax.random.key(0), draws)
        means = jax.jit(
            lambda keys: jax.tree.map(lambda leaf: leaf.mean(0), jax.lax.map(gradients, keys, batch_size=1000))
        )(keys)
        iwae, dreg, elbo = (np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(mean)]) for mean in means)
    assert np.linalg.norm(dreg - iwae) < 1e-2 * np.linalg.norm(iwae)
    assert (np.linalg.norm(elbo - iwae) < 1e-2 * np.linalg.norm(iwae)) == (samples == 1)


def test_more_samples_give_a_tighter_bound_and_only_valid_images_count():
    params, images, eps = sampled(5, images=20)
    gradient = jax.jit(dreg_gradient, static_argnums=0)
    with jax.enable_x64(True):
        valid = jnp.arange(20) < 7
        some, alone = (gradient(MODEL, params, images[:n], eps[:n], valid[:n]) for n in (20, 7))
        one, every = (gradient(MODEL, params, images, eps[:, :k], valid)[1].loss for k in (1, 5))
        assert every < one
        for found, expected in zip(jax.tree.leaves(some), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-10)
