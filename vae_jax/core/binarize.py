"""Makes grey images black and white: bytes become 0 and 255, floats become 0 and 1."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry_2x32
from jaxtyping import Array, Bool, Float, Int, Integer, Key, UInt8, UInt32

from vae_jax.config import Binarize

# Pixels of a part that are drawn at once: their places take 40 bytes each.
AT_ONCE = 2**22


def binarize(
    images: UInt8[Array, "images pixels"] | Float[Array, "images pixels"],
    rule: Binarize,
    key: Key[Array, ""],
    numbers: Int[np.ndarray, " images"] | None = None,
    total: int = 0,
) -> UInt8[Array, "images pixels"] | Float[Array, "images pixels"]:
    """Makes an image set black and white, once: the whole set, or a part of it as it becomes in the whole.

    Args:
      images: Bytes, or pixels in [0, 1].
      rule: `threshold`: white where a pixel is above 0.5; `static` and `dynamic`: a Bernoulli draw with the pixel as
        its probability (under `dynamic` this is for evaluation; training draws anew for each batch); `none`: the images
        unchanged.
      key: For the draw.
      numbers: For a part, the number of each image in the set.
      total: For a part, how many images the set has.

    References:
      Salakhutdinov and Murray, On the Quantitative Analysis of Deep Belief Networks (one draw). ICML 2008
      Burda, Grosse and Salakhutdinov, Importance Weighted Autoencoders (a new draw each epoch).
        https://arxiv.org/abs/1509.00519
    """
    if rule == "none":
        return images
    if rule == "threshold":
        return _as(images.dtype, images > (127 if images.dtype == jnp.uint8 else 0.5))
    if numbers is None or np.array_equal(numbers, np.arange(total)):
        return draw_set(images, key)
    return draw_part(images, key, numbers, total)


@jax.jit
def draw(
    images: UInt8[Array, "batch pixels"] | Float[Array, "batch pixels"],
    key: Key[Array, ""],
    numbers: Int[Array, " batch"],
) -> UInt8[Array, "batch pixels"] | Float[Array, "batch pixels"]:
    """Draws each pixel from Bernoulli(pixel), black and white ones with certainty.

    16 random bits decide a pixel: its probability is the grey value, byte / 255, to within 2^-17. They depend on the
    key and on the number of the image only, whatever else is in the batch.

    Args:
      images: Bytes, or pixels in [0, 1].
      key: For the draw.
      numbers: The number of each image.
    """
    pixels = images.shape[1]
    # A block of Threefry makes the bits of four pixels.
    low, high = _threefry(key, numbers[:, None], jnp.arange(-(-pixels // 4))[None])
    bits = jnp.concatenate([low & 0xFFFF, high & 0xFFFF, low >> 16, high >> 16], axis=1)[:, :pixels]
    return _white_where(images, bits)


@jax.jit
def draw_set(
    images: UInt8[Array, "images pixels"] | Float[Array, "images pixels"], key: Key[Array, ""]
) -> UInt8[Array, "images pixels"] | Float[Array, "images pixels"]:
    """`draw` for a whole set, with other bits: XLA's own Threefry makes them, in a fraction of the time on a CPU."""
    words = jax.lax.rng_bit_generator(
        _start(key), ((images.size + 1) // 2,), jnp.uint32, algorithm=jax.lax.RandomAlgorithm.RNG_THREE_FRY
    )[1]
    bits = jnp.concatenate([words & 0xFFFF, words >> 16])[: images.size].reshape(images.shape)
    return _white_where(images, bits)


def draw_part(
    images: UInt8[Array, "part pixels"] | Float[Array, "part pixels"],
    key: Key[Array, ""],
    numbers: Int[np.ndarray, " part"],
    total: int,
) -> UInt8[Array, "part pixels"] | Float[Array, "part pixels"]:
    """The images that `draw_set` makes of a part of a set.

    Args:
      images: Bytes, or pixels in [0, 1].
      key: For the draw.
      numbers: The number of each image in the set.
      total: How many images the set has.
    """
    pixels = images.shape[1]
    words = (total * pixels + 1) // 2
    parts = []
    count = max(1, AT_ONCE // pixels)
    for start in range(0, len(images), count):
        places = numbers[start : start + count].astype(np.int64)[:, None] * pixels + np.arange(pixels)
        second = places >= words  # the upper half of a word
        blocks, odd = np.divmod(places - words * second, 2)
        high, low = (part.astype(np.uint32) for part in np.divmod(blocks, 2**32))
        parts.append(_draw_at(images[start : start + count], key, high, low, odd == 1, second))
    return jnp.concatenate(parts)


@jax.jit
def _draw_at(images: Array, key: Key[Array, ""], high: Array, low: Array, odd: Array, second: Array) -> Array:
    words = _threefry(key, high, low)
    word = jnp.where(odd, words[1], words[0])
    return _white_where(images, jnp.where(second, word >> 16, word & 0xFFFF))


def _start(key: Key[Array, ""]) -> UInt32[Array, " 4"]:
    """A key and a first counter for Threefry, two words each."""
    return jax.random.bits(key, (4,), jnp.uint32)


def _threefry(key: Key[Array, ""], high: Integer[Array, "..."], low: Integer[Array, "..."]) -> tuple[Array, Array]:
    """The two words of each Threefry block whose number is high * 2^32 + low."""
    start = _start(key)
    lows = start[2] + low.astype(jnp.uint32)
    highs = start[3] + high.astype(jnp.uint32) + (lows < start[2]).astype(jnp.uint32)  # carries
    lows, highs = jnp.broadcast_arrays(lows, highs)
    words = threefry_2x32((start[0], start[1]), jnp.concatenate([lows.ravel(), highs.ravel()]))
    return words[: lows.size].reshape(lows.shape), words[lows.size :].reshape(lows.shape)


def _white_where(images: Array, bits: UInt32[Array, "..."]) -> Array:
    """Images that are white where 16 random bits are below the pixel, black elsewhere."""
    if images.dtype == jnp.uint8:
        # 65,536 * byte / 255, rounded: 0 for black, 65,536 for white.
        limits = images.astype(jnp.uint32) * 257 + (images >> 7).astype(jnp.uint32)
    else:
        limits = jnp.round(images * 65536).astype(jnp.uint32)
    return _as(images.dtype, bits < limits)


def _as(dtype: jnp.dtype, on: Bool[Array, "images pixels"]) -> Array:
    return jnp.where(on, jnp.array(255 if dtype == jnp.uint8 else 1, dtype), jnp.array(0, dtype))
