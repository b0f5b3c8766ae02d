"""The JAX model and the PyTorch one are the same function: outputs, losses, gradients, optimizer steps.

Both sides get the same parameters, the same batches and the same noise; no random generator is matched with another.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from torch_ref import convert, rules
from torch_ref.model import MLP as TorchMLP
from torch_ref.model import VAE as TorchVAE
from torch_ref.parity import compare
from torch_ref.train import losses as torch_losses
from vae_jax import MLP, VAE, TrainConfig, create_state, draw_eps, shuffled_batches, train_epoch
from vae_jax.core.model import init_params

FORWARD = {"float32": 1e-5, "float64": 1e-10}
GRADIENTS = {"float32": 1e-4, "float64": 1e-10}
# hidden_dim, latent_dim, pixels, batch
SIZES = [(400, 20, 784, 128), (400, 20, 784, 96), (64, 2, 100, 1), (7, 33, 12, 5)]


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    with jax.enable_x64(True) if request.param == "float64" else contextlib.nullcontext():
        yield request.param


def relative_error(found, expected) -> float:
    """The largest difference, relative to the largest entry."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return np.abs(found - expected).max() / np.abs(expected).max()


def random_params(hidden_dim: int, latent_dim: int, pixels: int):
    return create_state(TrainConfig(hidden_dim=hidden_dim, latent_dim=latent_dim, seed=3), pixels).params


def assert_equal_functions(params, batch: int):
    """Outputs, losses and gradients, on grey images with true 0 and 1 among them."""
    state_dict = convert.to_state_dict(jax.device_get(params))
    sizes = convert.sizes(state_dict)
    model = TorchVAE(*sizes)
    model.load_state_dict(state_dict, strict=True)
    images = np.clip(np.random.default_rng(0).normal(0.3, 0.5, (batch, sizes[2])), 0, 1)
    report = compare(VAE(*sizes), params, model, images, torch_loss=torch_losses, steps=0)
    assert report.equal, str(report)
    assert len(report.rows) == 2 * (5 + 3 + 10)
    for row in report.rows:
        bounds = GRADIENTS if row.kind == "gradient" else FORWARD
        assert row.absolute < bounds[row.dtype] * row.largest, row


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_random_parameters(sizes):
    assert_equal_functions(random_params(*sizes[:3]), sizes[3])


def test_trained_parameters(trained):
    assert_equal_functions(trained, 128)


def test_several_layers():
    model, module = MLP((30, 20), 5, 50, "tanh"), TorchMLP((30, 20), 5, 50, "tanh")
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0), 50))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)
    module.load_state_dict(rules.for_module(rules.to_state_dict(params), module))
    report = compare(model, params, module, rng.random((9, 50)))
    assert report.equal, str(report)


def adam_steps(mnist, dtype: str, hidden_dim: int, seed: int, steps: int = 100, cosine: bool = False):
    """Losses of each step and the last parameters, of JAX and of PyTorch; the last batch is a partial one."""
    count = (steps - 1) * 128 + 96
    images = mnist.train_images[:count].reshape(count, 784)
    schedule = "cosine" if cosine else "constant"
    config = TrainConfig(seed=seed, hidden_dim=hidden_dim, learning_rate_schedule=schedule, epochs=1)
    state = create_state(config, images=count)
    state = jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.dtype == jnp.float32 else leaf, state)
    state = state.replace(learning_rate=jnp.asarray(1e-3, dtype))  # that of a float32 differs
    model = TorchVAE(hidden_dim).to(getattr(torch, dtype))
    model.load_state_dict(convert.to_state_dict(jax.device_get(state.params)))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    batches = shuffled_batches(state.key, 1, count, 128)
    noise = [draw_eps(state.key, step, (128, 20), jnp.dtype(dtype)) for step in range(steps)]
    state, sums = train_epoch(state, jnp.asarray(images), batches)
    assert state.step == steps

    torch_sums = []
    for step, numbers in enumerate(np.asarray(batches)):
        numbers = numbers[numbers >= 0]
        assert len(numbers) == (128 if step < steps - 1 else 96)
        pixels = torch.from_numpy(images[numbers]).to(getattr(torch, dtype)) / 255
        recon, mu, logvar = model(pixels, torch.from_numpy(np.array(noise[step][: len(numbers)])))
        bce, kld = torch_losses(recon, pixels, mu, logvar)
        optimizer.zero_grad()
        (bce + kld).backward()
        optimizer.step()
        if cosine:
            scheduler.step()
        torch_sums.append((bce + kld).item())
    return np.asarray(sums.loss), np.array(torch_sums), state.params, convert.to_params(model.state_dict())


@pytest.mark.parametrize("dtype", ["float64"], indirect=True)
def test_100_adam_steps(mnist, dtype):
    loss, torch_loss, params, torch_params = adam_steps(mnist, dtype, 100, seed=0)
    np.testing.assert_allclose(loss, torch_loss, rtol=1e-10)
    for (path, found), leaf in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(torch_params), strict=True):
        assert relative_error(found, leaf) < 1e-10, jax.tree_util.keystr(path)


@pytest.mark.parametrize("dtype", ["float64"], indirect=True)
def test_50_adam_steps_under_a_cosine(mnist, dtype):
    loss, torch_loss, params, torch_params = adam_steps(mnist, dtype, 100, seed=0, steps=50, cosine=True)
    np.testing.assert_allclose(loss, torch_loss, rtol=1e-10)
    for (path, found), leaf in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(torch_params), strict=True):
        assert relative_error(found, leaf) < 1e-10, jax.tree_util.keystr(path)


@pytest.mark.parametrize("dtype", ["float32"], indirect=True)
def test_100_adam_steps_up_to_a_kink(mnist, dtype):
    # With about one seed in three, one of 10 million inputs of ReLUs is so close to zero that rounding decides its
    # sign. There the two frameworks part (either may be the one that differs from float64), and then drift apart.
    for seed in (5, 2, 3, 4, 0):
        loss, torch_loss, params, torch_params = adam_steps(mnist, dtype, 400, seed)
        np.testing.assert_allclose(loss, torch_loss, rtol=2e-3)
        pairs = zip(jax.tree.leaves(params), jax.tree.leaves(torch_params), strict=True)
        if max(np.abs(found - leaf).max() for found, leaf in pairs) < 1e-4:
            np.testing.assert_allclose(loss, torch_loss, rtol=FORWARD[dtype])
            return
    pytest.fail("of five seeds, none keeps all parameters within 1e-4")


@pytest.mark.parametrize("layout", convert.LAYOUTS)
def test_file_round_trip_is_bit_exact(trained, dtype, layout, tmp_path):
    params = jax.tree.map(lambda leaf: np.asarray(leaf, dtype), trained)
    convert.save(convert.to_state_dict(params, layout), tmp_path / "vae.pth")
    back = convert.to_params(convert.load(tmp_path / "vae.pth"))
    assert jax.tree.structure(back) == jax.tree.structure(params)
    for found, expected in zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True):
        assert found.dtype == expected.dtype
        assert found.tobytes() == expected.tobytes()
