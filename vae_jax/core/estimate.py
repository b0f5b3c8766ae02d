"""Estimates for a trained model on given images: its loss, its use of the latent space, and log p(x).

Pure functions of model, parameters, images and key. Each draw of noise depends only on the key, the number of its image
and the number of its sample, so that cutting the work into other chunks changes results by rounding only.
"""

import math
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt8

from vae_jax.core.model import Params, decode_logits, forward, latent_dim, posterior, reparameterize, to_pixels
from vae_jax.core.objective import Losses, kld, log_weights, losses
from vae_jax.core.steps import split_batches


class Bound(NamedTuple):
    """The evidence lower bound of each image, and its posterior."""

    losses: Losses  # beta = 1: loss = -elbo
    mu: Float[Array, "images latent"]
    kld_per_latent: Float[Array, "images latent"]


def draw_eps(
    key: Key[Array, ""], numbers: Int[Array, " images"], samples: Int[Array, " samples"], latent_dim: int
) -> Float[Array, "images samples latent"]:
    """The noise, ~ N(0, I), of the given samples of the given images."""

    def draw(number: Int[Array, ""], sample: Int[Array, ""]) -> Float[Array, " latent"]:
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, number), sample), (latent_dim,))

    return jax.vmap(jax.vmap(draw, (None, 0)), (0, None))(numbers, samples)


@partial(jax.jit, static_argnames=("model", "batch_size"))
def bound(
    model: nn.Module,
    params: Params,
    images: UInt8[Array, "images pixels"] | Float[Array, "images pixels"],
    key: Key[Array, ""],
    batch_size: int = 4096,
    first: Int[Array, ""] | int = 0,
) -> Bound:
    """The evidence lower bound of each image, by one draw of z.

    Args:
      model: A module with the methods `encode` and `decode`.
      params: Its parameters.
      images: Bytes, or pixels in [0, 1].
      key: For the noise.
      batch_size: Images at once; bounds the memory, and changes results by rounding only.
      first: The number of the first image, on which the draws depend: for a set that is measured piece by piece.

    Returns:
      Loss, bce and kld of each image, its posterior mean, and its divergence in each latent dimension; in nats.
    """
    latent = latent_dim(model, params, images.shape[-1])

    def batch(numbers: Int[Array, " batch"]) -> Bound:
        pixels = to_pixels(images[numbers])
        eps = draw_eps(key, first + numbers, jnp.zeros(1, int), latent)[:, 0]
        output = forward(model, params, pixels, eps)
        per_latent = jax.vmap(kld, 1, 1)(output.mu[:, :, None], output.logvar[:, :, None])
        return Bound(losses(output, pixels), output.mu, per_latent)

    batches = split_batches(jnp.arange(len(images)), min(batch_size, len(images)))
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[: len(images)], jax.lax.map(batch, batches))


@partial(jax.jit, static_argnames=("model", "samples", "batch_size"))
def importance_log_px(
    model: nn.Module,
    params: Params,
    images: UInt8[Array, "images pixels"] | Float[Array, "images pixels"],
    numbers: Int[Array, " chosen"],
    key: Key[Array, ""],
    samples: int,
    batch_size: int = 4096,
    first: Int[Array, ""] | int = 0,
) -> Float[Array, " chosen"]:
    """The importance-weighted estimate of log p(x), log(1/K sum of K weights): a lower bound that rises with K.

    Args:
      model: A module with the methods `encode` and `decode`.
      params: Its parameters.
      images: Bytes, or pixels in [0, 1].
      numbers: Which of the images to look at.
      key: For the noise; sample k of image n is the same whatever the number of samples.
      samples: K.
      batch_size: Images times samples at once; bounds the memory, and changes results by rounding only.
      first: The number of the first image, as for `bound`.

    Returns:
      The estimate for each chosen image, in nats.

    References:
      Burda et al., Importance Weighted Autoencoders, equation 8. https://arxiv.org/abs/1509.00519
    """
    latent = latent_dim(model, params, images.shape[-1])
    # Chunks of one length: 10,000 samples at 4,096 at once are 3 chunks of 3,334, with two places unused.
    chunk = math.ceil(samples / math.ceil(samples / batch_size))

    def batch(numbers: Int[Array, " batch"]) -> Float[Array, " batch"]:
        pixels = to_pixels(images[numbers])
        mu, logvar = posterior(model, params, pixels)

        def add(carry, first_sample):
            # The largest weight so far, and the sum of all weights divided by it: neither overflows, and the sum
            # loses no digits however many chunks there are.
            top, total = carry
            chosen = first_sample + jnp.arange(chunk)
            eps = draw_eps(key, first + numbers, chosen, latent)
            z = reparameterize(mu[:, None], logvar[:, None], eps)
            weights = log_weights(decode_logits(model, params, z), pixels, z, eps, logvar)
            weights = jnp.where(chosen[None] < samples, weights, -jnp.inf)
            new_top = jnp.maximum(top, jnp.max(weights, axis=1))
            total = total * jnp.exp(top - new_top) + jnp.sum(jnp.exp(weights - new_top[:, None]), axis=1)
            return (new_top, total), None

        start = (jnp.full(len(numbers), -jnp.inf), jnp.zeros(len(numbers)))
        (top, total), _ = jax.lax.scan(add, start, jnp.arange(0, samples, chunk))
        return top + jnp.log(total) - math.log(samples)

    # -1, which fills up the last batch, points at the last of the chosen images.
    places = split_batches(jnp.arange(len(numbers)), min(len(numbers), max(1, batch_size // chunk)))
    return jax.lax.map(batch, numbers[places]).reshape(-1)[: len(numbers)]
