"""Binary pixels out of grey ones. An image stays what it was, bytes or floats: its pixels become 0 or 255, or 0 or 1."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt8

from vae_jax.config import Binarize


def binarize(
    images: UInt8[Array, "images pixels"] | Float[Array, "images pixels"], rule: Binarize, key: Key[Array, ""]
) -> UInt8[Array, "images pixels"] | Float[Array, "images pixels"]:
    """Makes a whole set binary, once.

    Args:
      images: Bytes, or pixels in [0, 1].
      rule: `threshold`: on where a pixel is above 0.5; `static` or `dynamic`: one Bernoulli draw with the pixel as its
        probability (to evaluate under `dynamic`, which draws anew for every batch of training, see `draw`); `none`: the
        images as they are.
      key: For the draw.

    References:
      Salakhutdinov and Murray, On the Quantitative Analysis of Deep Belief Networks (one draw). ICML 2008
      Burda, Grosse and Salakhutdinov, Importance Weighted Autoencoders (a draw an epoch). https://arxiv.org/abs/1509.00519
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

    16 random bits decide a pixel: its probability is the grey value, byte / 255, to within 2^-16.

    Args:
      images: Bytes, or pixels in [0, 1].
      key: For the draw.
    """
    # Two pixels share a random word: half the cost of a word each.
    words = jax.random.bits(key, ((images.size + 1) // 2,), jnp.uint32)
    bits = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(-1)[: images.size].reshape(images.shape)
    if images.dtype == jnp.uint8:
        # 257 * byte of 65,535 is byte / 255; the random number is one of 65,536.
        return _as(images.dtype, (bits < images.astype(jnp.uint16) * 257) | (images == 255))
    return _as(images.dtype, bits < jnp.ceil(images * 65536).astype(jnp.int32))


def _as(dtype: jnp.dtype, on: Array) -> Array:
    return jnp.where(on, jnp.array(255 if dtype == jnp.uint8 else 1, dtype), jnp.array(0, dtype))
