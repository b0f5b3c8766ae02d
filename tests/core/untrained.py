"""Untrained models for tests, drawn by NumPy: quicker than compiling `create_state` for each size."""

import jax
import jax.numpy as jnp
import numpy as np

from vae_jax.core.model import VAE, Params


def init(model: VAE, seed: int = 0, scale: float = 1.0) -> Params:
    """Parameters ~ U(-1/sqrt(fan_in), 1/sqrt(fan_in)), those of the decoder's last layer `scale` times as large."""
    rng = np.random.default_rng(seed)

    def linear(fan_in: int, features: int, scale: float = 1.0) -> dict[str, np.ndarray]:
        bound = scale * fan_in**-0.5
        return {
            "kernel": rng.uniform(-bound, bound, (fan_in, features)).astype(np.float32),
            "bias": rng.uniform(-bound, bound, features).astype(np.float32),
        }

    encoder = {
        "fc1": linear(model.pixels, model.hidden_dim),
        "fc2_mu": linear(model.hidden_dim, model.latent_dim),
        "fc2_logvar": linear(model.hidden_dim, model.latent_dim),
    }
    decoder = {
        "fc1": linear(model.latent_dim, model.hidden_dim),
        "fc2": linear(model.hidden_dim, model.pixels, scale),
    }
    return jax.tree.map(jnp.asarray, {"encoder": encoder, "decoder": decoder})
