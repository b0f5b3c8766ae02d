"""Grey pixels made black or white."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from vae_jax.config import Binarize


def binarize(images: Float[Array, "*shape"], rule: Binarize, key: Key[Array, ""]) -> Float[Array, "*shape"]:
    """Applies a rule to pixels in [0, 1].

    Args:
      images: Pixels.
      rule: `none` leaves them grey; `threshold` makes those above 0.5 white; `dynamic` and `static` draw each pixel
        once, white with the probability of its grey value.
      key: Of the draws.
    """
    if rule == "none":
        return images
    if rule == "threshold":
        return jnp.where(images > 0.5, 1, 0).astype(images.dtype)
    return jax.random.bernoulli(key, images).astype(images.dtype)
