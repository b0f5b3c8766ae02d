"""Makes grey images black and white: bytes become 0 and 255, floats become 0 and 1."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, UInt8

from vae_jax.config import Binarize


def binarize(
    images: UInt8[Array, "images pixels"] | Float[Array, "images pixels"], rule: Binarize, key: Key[Array, ""]
) -> UInt8[Array, "images pixels"] | Float[Array, "images pixels"]:
    """Makes a whole image set black and white, once.

    Args:
      images: Bytes, or pixels in [0, 1].
      rule: `threshold`: white where a pixel is above 0.5; `static` and `dynamic`: a Bernoulli draw with the pixel as
        its probability (under `dynamic` this is for evaluation; training draws anew for each batch); `none`: the images
        unchanged.
      key: For the draw.

    References:
      Salakhutdinov and Murray, On the Quantitative Analysis of Deep Belief Networks (one draw). ICML 2008
      Burda, Grosse and Salakhutdinov, Importance Weighted Autoencoders (a new draw each epoch).
        https://arxiv.org/abs/1509.00519
    """
    if rule == "none":
        return images
    if rule == "threshold":
        return _as(images.dtype, images > (127 if images.dtype == jnp.uint8 else 0.5))
    return draw(images, key)


@jax.jit
def draw(
    images: UInt8[Array, "images pixels"] | Float[Array, "images pixels"], key: Key[Array, ""]
) -> UInt8[Array, "images pixels"] | Float[Array, "images pixels"]:
    """Draws each pixel from Bernoulli(pixel), black and white ones with certainty.

    16 random bits decide a pixel: its probability is the grey value, byte / 255, to within 2^-17.

    Args:
      images: Bytes, or pixels in [0, 1].
      key: For the draw.
    """
    # Half a word for each pixel. XLA's own Threefry makes them in half the time of jax.random.bits on a CPU.
    start = jax.random.bits(key, (4,), jnp.uint32)
    words = jax.lax.rng_bit_generator(
        start, ((images.size + 1) // 2,), jnp.uint32, algorithm=jax.lax.RandomAlgorithm.RNG_THREE_FRY
    )[1]
    bits = jnp.concatenate([words & 0xFFFF, words >> 16])[: images.size].reshape(images.shape)
    if images.dtype == jnp.uint8:
        # 65,536 * byte / 255, rounded: 0 for black, 65,536 for white.
        limits = images.astype(jnp.uint32) * 257 + (images >> 7).astype(jnp.uint32)
    else:
        limits = jnp.round(images * 65536).astype(jnp.uint32)
    return _as(images.dtype, bits < limits)


def _as(dtype: jnp.dtype, on: Bool[Array, "images pixels"]) -> Array:
    return jnp.where(on, jnp.array(255 if dtype == jnp.uint8 else 1, dtype), jnp.array(0, dtype))
