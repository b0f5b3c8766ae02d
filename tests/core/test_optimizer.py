import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from vae_jax import adam


def test_first_step_by_hand():
    # After one step the corrected means are g and g^2: the update is -rate * g / (|g| + eps).
    tx = adam(0.1, eps=1.0)
    gradients = {"w": jnp.array([2.0, -0.5, 0.0])}
    updates, state = tx.update(gradients, tx.init(gradients))
    np.testing.assert_allclose(updates["w"], [-0.1 * 2 / 3, 0.1 * 0.5 / 1.5, 0.0], rtol=1e-6)
    np.testing.assert_allclose(state.mu["w"], [0.2, -0.05, 0.0], rtol=1e-6)
    np.testing.assert_allclose(state.nu["w"], [0.004, 0.00025, 0.0], rtol=1e-6)
    assert state.count == 1


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
