import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from vae_jax import adam
from vae_jax.config import INT32_MAX
from vae_jax.core.optimizer import Schedule


def test_first_step_by_hand():
    # After one step the corrected means are g and g^2: the update is -rate * g / (|g| + eps).
    tx = adam(0.1, eps=1.0)
    gradients = {"w": jnp.array([2.0, -0.5, 0.0])}
    updates, state = tx.update(gradients, tx.init(gradients))
    np.testing.assert_allclose(updates["w"], [-0.1 * 2 / 3, 0.1 * 0.5 / 1.5, 0.0], rtol=1e-6)
    np.testing.assert_allclose(state.mu["w"], [0.2, -0.05, 0.0], rtol=1e-6)
    np.testing.assert_allclose(state.nu["w"], [0.004, 0.00025, 0.0], rtol=1e-6)
    assert state.count == 1


@pytest.mark.filterwarnings("error")
def test_without_averages_by_hand():
    tx = adam(0.1, b1=0.0, b2=0.0, eps=1.0)
    gradients = {"w": jnp.array([2.0, -0.5, 0.0])}
    updates, _ = tx.update(gradients, tx.init(gradients))
    np.testing.assert_allclose(updates["w"], [-0.1 * 2 / 3, 0.1 * 0.5 / 1.5, 0.0], rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e4])
def test_equals_pytorch_in_float32(scale):
    # Gradients near eps, ordinary ones and large ones; the same ones on both sides, so nothing can amplify rounding.
    gradients = (scale * np.random.default_rng(0).normal(size=(300, 50))).astype(np.float32)
    weight = torch.nn.Parameter(torch.zeros(50))
    optimizer = torch.optim.Adam([weight], lr=1e-3)
    tx = adam(1e-3)
    params = jnp.zeros(50)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for gradient in gradients:
        weight.grad = torch.from_numpy(gradient)
        optimizer.step()
        updates, state = update(jnp.asarray(gradient), state)
        params = params + updates
    np.testing.assert_allclose(params, weight.detach().numpy(), rtol=0, atol=2e-8 * 300**0.5)


# (kind, steps of the run): {steps taken: factor of the next one}, by hand
FACTORS = {
    ("cosine", 4): {0: 1, 1: (2 + 2**0.5) / 4, 2: 0.5, 3: (2 - 2**0.5) / 4, 4: 0, 9: 0},
    ("cosine", 1): {0: 1},
    ("exponential", 4): {0: 1, 1: 0.1**0.5, 2: 0.1, 3: 0.1**1.5, 4: 0.01, 9: 0.01},
    ("warmup-cosine", 40): {0: 0, 1: 0.5, 2: 1, 21: 0.5, 40: 0, 50: 0},
    ("warmup-cosine", 19): {0: 1, 19: 0},
    ("warmup-cosine", INT32_MAX): {0: 0, INT32_MAX // 40: 0.5, INT32_MAX // 20: 1, INT32_MAX: 0},
}


@pytest.mark.parametrize(("kind", "steps"), FACTORS)
def test_factors_of_a_schedule_by_hand(kind, steps):
    factor = jax.jit(Schedule(kind, steps).factor)
    for step, expected in FACTORS[kind, steps].items():
        found = factor(jnp.float32(step))
        assert found.dtype == jnp.float32 and found.shape == ()
        assert float(found) == pytest.approx(expected, rel=1e-5, abs=1e-6), step


@pytest.mark.parametrize("kind", ["cosine", "exponential", "warmup-cosine"])
def test_a_schedule_only_falls_after_its_warmup(kind):
    factors = np.array([Schedule(kind, 60).factor(jnp.float32(step)) for step in range(61)])
    top = 3 if kind == "warmup-cosine" else 0
    assert factors[top] == 1 and (np.diff(factors[: top + 1]) > 0).all() and (np.diff(factors[top:]) < 0).all()
