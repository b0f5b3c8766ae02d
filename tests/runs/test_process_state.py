"""A library call leaves its process as it was: settings, hooks, handlers and NumPy's random state are the caller's.

Python's own random state is not looked at: the type checker of the tests draws from it.
"""

import gc
import logging
import os
import signal
import sys
import threading
import warnings

import jax
import matplotlib as mpl
import numpy as np
import pytest
import torch

from vae_jax import InputError, NonFiniteLossError, fit
from vae_jax.config import EvaluateConfig
from vae_jax.evaluate import evaluate
from vae_jax.system import signals

pytestmark = pytest.mark.usefixtures("quick")
JAX = ("jax_enable_x64", "jax_disable_jit", "jax_default_prng_impl", "jax_default_matmul_precision", "jax_debug_nans")

# The latter keeps XLA's messages out of a run of several processes; it counts when jax is imported.
NOT_OURS = {"PYTEST_CURRENT_TEST", "TF_CPP_MIN_LOG_LEVEL"}


def state() -> dict:
    return {
        "gc": (gc.get_threshold(), gc.get_freeze_count()),
        "hooks": (sys.excepthook, threading.excepthook, sys.unraisablehook, warnings.showwarning),
        "handlers": [signal.getsignal(signum) for signum in signals.STOPS],
        "streams": (sys.stdout, sys.stderr),
        "warnings": [str(entry) for entry in warnings.filters],
        "logging": (logging.root.level, list(logging.root.handlers), logging.getLogger("jax").level),
        "environment": {name: value for name, value in os.environ.items() if name not in NOT_OURS},
        "places": (os.getcwd(), list(sys.path)),  # noqa: PTH109 - a path object would hide a change of its text
        "jax": {name: getattr(jax.config, name) for name in (*JAX, "jax_threefry_partitionable")},
        "torch": (torch.get_num_threads(), torch.get_default_dtype(), torch.get_rng_state().tolist()),
        "matplotlib": {name: str(value) for name, value in mpl.rcParams.items()},
        "numpy": ([str(part) for part in np.random.get_state()], np.geterr()),  # noqa: NPY002 - the global state
        "threads": [thread for thread in threading.enumerate() if not thread.daemon],
        "limits": (sys.getrecursionlimit(), sys.getswitchinterval()),
    }


def test_a_library_call_leaves_the_process_as_it_was(tmp_path, options, undisturbed):
    def diverge():
        with pytest.raises(NonFiniteLossError):
            fit(options(tmp_path / "diverges", epochs=1, learning_rate=1e30))

    def refuse():
        with pytest.raises(InputError):
            fit(options(tmp_path / "refused", data="no/such.npz"))

    calls = {
        "fit": lambda: fit(options(tmp_path / "whole", epochs=1)),
        "fit in shards": lambda: fit(options(tmp_path / "shards", epochs=1, shards=2)),
        "evaluate": lambda: evaluate(EvaluateConfig(undisturbed.workdir)),
        "diverge": diverge,
        "refuse": refuse,
    }
    for name, call in calls.items():
        before = state()
        call()
        after = state()
        assert [part for part in before if before[part] != after[part]] == [], name
