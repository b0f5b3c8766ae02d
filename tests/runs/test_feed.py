"""The steps of an epoch in chunks."""

import flax.linen as nn
import jax.numpy as jnp
import pytest

from vae_jax import TrainConfig, create_state
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
