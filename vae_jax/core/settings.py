"""JAX's global settings, and the device. The recipe decides the model, not the environment."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import jax

from vae_jax.config import Precision
from vae_jax.system.errors import InputError, reason


@contextmanager
def fixed_settings(matmul_precision: Precision | None = None) -> Iterator[None]:
    """Within the block, settings that would change draws, types or programs have their defaults, whatever the caller
    or the environment has set.

    Args:
      matmul_precision: Of matrix products; None leaves it as it is.
    """
    with ExitStack() as settings:
        settings.enter_context(jax.enable_x64(False))
        settings.enter_context(jax.disable_jit(False))
        settings.enter_context(jax.default_prng_impl("threefry2x32"))
        settings.enter_context(jax.threefry_partitionable(True))
        settings.enter_context(jax.transfer_guard("allow"))
        if matmul_precision is not None:
            settings.enter_context(jax.default_matmul_precision(matmul_precision))
        yield


def require_device() -> None:
    """Checks that JAX finds a device, and that no setting which cannot be undone for a block changes the draws.

    Raises:
      InputError: JAX finds no device (JAX_PLATFORMS asks for one that is not there), or it shifts every seed.
    """
    offset = getattr(jax.config, "jax_random_seed_offset", 0)
    if offset:
        raise InputError(
            f"JAX_RANDOM_SEED_OFFSET={offset}: shifts every seed, so --seed would make another model than elsewhere;"
            " expected 0; unset it, and choose the model by --seed"
        )
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        platforms = os.environ.get("JAX_PLATFORMS", "")
        raise InputError(
            f"JAX_PLATFORMS={platforms}: jax finds no such device ({reason(error)}); expected cpu or a platform whose"
            " jax is installed (pip install 'jax[cuda13]'); unset it to use what is there"
        ) from None
