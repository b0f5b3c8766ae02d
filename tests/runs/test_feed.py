"""The steps of an epoch: the order of its images, and chunks."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vae_jax import TrainConfig, create_state, fit, split_batches, sweep, train_epoch
from vae_jax.config import SweepOptions
from vae_jax.runs.feed import CHUNK_FLOPS, chunk_steps, step_cost, step_flops


@pytest.mark.parametrize(("steps", "flops"), [(469, 5 * 10**8), (1, 10**12), (600, 10**12), (467, 5 * 10**8), (10, 1)])
def test_chunks_cover_an_epoch(steps, flops):
    chunks = chunk_steps(steps, flops)
    assert [step for chunk in chunks for step in chunk] == list(range(steps))
    for chunk in chunks:
        assert len(chunk) == 1 or len(chunk) * flops <= CHUNK_FLOPS
    assert len({len(chunk) for chunk in chunks}) <= 2
    if steps == 469:
        assert {len(chunk) for chunk in chunks} == {67}  # 7 times 67: one program to compile


def test_small_batches_of_large_models_have_short_chunks():
    # Such a step costs what Adam costs, not what the products cost.
    assert CHUNK_FLOPS / step_flops(1, 3_200_000) < 200
    assert CHUNK_FLOPS / step_flops(128, 652_824) > 67


class Convolution(nn.Module):
    """Few parameters, which are used at each of 784 places."""

    def setup(self) -> None:
        self.conv, self.heads = nn.Conv(9, (5, 5)), nn.Dense(2)

    def encode(self, images):
        x = self.heads(self.conv(images.reshape(-1, 28, 28, 1)).mean((1, 2)))
        return x, x

    def decode(self, z):
        return jnp.broadcast_to(z.sum(1, keepdims=True), (len(z), 784))


def test_a_step_costs_what_its_samples_and_convolutions_cost():
    one, five = (create_state(TrainConfig(hidden_dim=8, training_samples=k)) for k in (1, 5))
    assert step_cost(five, 128, 784) > 4 * step_cost(one, 128, 784)
    assert step_cost(create_state(TrainConfig(), 784, Convolution()), 128, 784) > 2 * 2 * 128 * 784 * 225


def test_images_in_the_order_of_the_set(tmp_path, options, few_images):
    config = options(tmp_path / "memory", image_order="stored", epochs=2, checkpoint_every=60.0)
    state, _ = fit(config)
    expected = create_state(config)
    images = jnp.asarray(few_images.train_images.reshape(600, -1))
    for _ in range(2):
        expected, _ = train_epoch(expected, images, split_batches(jnp.arange(600), 128))
    for found, right in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_allclose(found, right, atol=1e-6)
    streamed = options(tmp_path / "streamed", image_order="stored", epochs=2, stream="always")
    fit(streamed)
    assert streamed.export.read_bytes() == config.export.read_bytes()
    # Models that differ in it alone do not train as one, and a stack has it too.
    orders = (("stored", 0), ("stored", 1), ("shuffled", 0))
    recipes = [options(tmp_path, image_order=order, seed=seed) for order, seed in orders]
    stacks, _ = sweep(recipes, SweepOptions(epochs=2, at_once=2, workdir=tmp_path / "sweep"))
    for stack, same in zip(stacks, (True, False), strict=True):
        for found, right in zip(jax.tree.leaves(stack.params), jax.tree.leaves(expected.params), strict=True):
            assert np.allclose(found[0], right, atol=1e-6) == same
