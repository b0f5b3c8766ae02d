"""Strict numerics for every test: no silent change of dtype or rank, and full-precision products."""

import hypothesis
import jax
import numpy as np
import pytest
import torch

from vae_jax import TrainConfig, create_state, load, shuffled_batches, train_epoch

# The same examples every time; what they cost in time is no matter for a test.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")

# Two tests run at once: threads of PyTorch would wait for each other.
torch.set_num_threads(1)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(scope="session")
def mnist():
    return load("mnist")


@pytest.fixture(scope="session")
def trained(mnist) -> dict:
    """Parameters of the documented model after 150 steps on MNIST, as NumPy arrays."""
    images = mnist.train_images.reshape(60000, 784)
    state = create_state(TrainConfig(seed=1))
    batches = shuffled_batches(state.key, 1, len(images), 128)[:150]
    state, _ = train_epoch(state, jax.numpy.asarray(images), batches)
    return jax.tree.map(np.asarray, state.params)
