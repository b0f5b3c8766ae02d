"""Strict numerics for every test: no silent change of dtype or rank, and full-precision products."""

import atexit
import os
import shutil
import signal
import tempfile

import hypothesis
import jax
import numpy as np
import pytest
import torch

import torch_ref.train
import vae_jax.train
from vae_jax import Dataset, TrainConfig, create_state, load, shuffled_batches, signals, train_epoch

# What one test process or command has compiled, the others need not: set before they start.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="vae_jax-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

# The same examples every time; what they cost in time is no matter for a test.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")

# Two tests run at once: threads of PyTorch would wait for each other.
torch.set_num_threads(1)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(autouse=True)
def signal_handlers():
    """A command in this process takes SIGINT and SIGTERM over for good."""
    before = {signum: signal.getsignal(signum) for signum in signals.STOPS}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.fixture(scope="session")
def mnist():
    return load("mnist")


@pytest.fixture
def few_images(monkeypatch, mnist):
    """The first images of MNIST, enough to train on for a moment, in the place of every set."""
    few = Dataset(*(array[:600] for array in mnist))
    for module in (vae_jax.train, torch_ref.train):
        monkeypatch.setattr(module, "load", lambda *_: few)


@pytest.fixture(scope="session")
def trained(mnist) -> dict:
    """Parameters of the documented model after 150 steps on MNIST, as NumPy arrays."""
    images = mnist.train_images.reshape(60000, 784)
    state = create_state(TrainConfig(seed=1))
    batches = shuffled_batches(state.key, 1, len(images), 128)[:150]
    state, _ = train_epoch(state, jax.numpy.asarray(images), batches)
    return jax.tree.map(np.asarray, state.params)
