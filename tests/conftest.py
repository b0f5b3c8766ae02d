"""Strict numerics for every test: no silent change of dtype or rank, and full-precision products."""

import atexit
import os
import shutil
import signal
import tempfile
from pathlib import Path

import hypothesis
import jax
import numpy as np
import pytest
import torch

from vae_jax import Dataset, TrainConfig, create_state, load, shuffled_batches, train_epoch
from vae_jax.system import signals

# What one test process or command has compiled, the others need not: they inherit the environment.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="vae_jax-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
    # This process has read its environment already.
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

# Decoded sets are cached for the tests alone.
if "vae_jax-tests-" not in os.environ.get("XDG_CACHE_HOME", ""):
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="vae_jax-tests-")
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

# The same examples every time, however long they take.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")

# Two tests run at once: threads of PyTorch would wait for each other.
torch.set_num_threads(1)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(autouse=True)
def signal_handlers():
    """Puts the signal handlers back, which a command in this process replaces for good."""
    before = {signum: signal.getsignal(signum) for signum in signals.STOPS}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.fixture(scope="session")
def mnist() -> Dataset:
    return load("mnist")


@pytest.fixture(scope="session")
def few_images(mnist) -> Dataset:
    """The first images of MNIST, enough to train on for a moment."""
    return Dataset(*(array[:600] for array in mnist))


@pytest.fixture(scope="session")
def few_images_file(few_images, tmp_path_factory) -> Path:
    """The same as a file for `--data`."""
    file = tmp_path_factory.mktemp("few") / "few.npz"
    np.savez(file, **few_images._asdict())
    return file


@pytest.fixture(scope="session")
def trained(mnist) -> dict:
    """Parameters of the documented model after 150 steps on MNIST, as NumPy arrays."""
    images = mnist.train_images.reshape(60000, 784)
    state = create_state(TrainConfig(seed=1))
    batches = shuffled_batches(state.key, 1, len(images), 128)[:150]
    state, _ = train_epoch(state, jax.numpy.asarray(images), batches)
    return jax.tree.map(np.asarray, state.params)
