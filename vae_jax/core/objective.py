"""The loss, one function per equation. Everything is per image and in nats."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vae_jax.core.model import Output


class Losses(NamedTuple):
    """The loss of each image and its two parts: loss = bce + beta * kld."""

    loss: Float[Array, "*batch"]
    bce: Float[Array, "*batch"]
    kld: Float[Array, "*batch"]


@jax.custom_jvp
def softplus(logits: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """log(1 + exp(l)) as max(l, 0) + log1p(exp(-|l|)): exact to rounding and never infinite.

    The derivative is given as sigmoid(l). Automatic differentiation would compute a second exponential, and 0 instead
    of 1/2 at l = 0.
    """
    return jnp.maximum(logits, 0) + jnp.log1p(jnp.exp(-jnp.abs(logits)))


softplus.defjvps(lambda tangent, _, logits: tangent * jax.nn.sigmoid(logits))


def bce(logits: Float[Array, "batch pixels"], images: Float[Array, "batch pixels"]) -> Float[Array, " batch"]:
    """Binary cross entropy, -sum(x log p + (1 - x) log(1 - p)) with p = sigmoid(logits).

    Args:
      logits: Logits of the reconstruction.
      images: Pixels x in [0, 1].

    Returns:
      The cross entropy of each image, summed over its pixels, in nats.

    References:
      Kingma and Welling, Auto-Encoding Variational Bayes, appendix C.1. https://arxiv.org/abs/1312.6114
    """
    return jnp.sum(softplus(logits) - logits * images, axis=-1)


def kld(mu: Float[Array, "batch latent"], logvar: Float[Array, "batch latent"]) -> Float[Array, " batch"]:
    """KL divergence from N(mu, exp(logvar)) to N(0, I), -1/2 sum(1 + logvar - mu^2 - exp(logvar)).

    Args:
      mu: Posterior means.
      logvar: Logarithms of the posterior variances.

    Returns:
      The divergence of each image, summed over the latent dimensions, in nats.

    References:
      Kingma and Welling, Auto-Encoding Variational Bayes, appendix B. https://arxiv.org/abs/1312.6114
    """
    return -0.5 * jnp.sum(1 + logvar - mu**2 - jnp.exp(logvar), axis=-1)


def losses(output: Output, images: Float[Array, "batch pixels"], beta: float | Float[Array, ""] = 1.0) -> Losses:
    """The negative evidence lower bound and its parts; with beta other than 1, the beta-VAE's objective.

    Args:
      output: The model's outputs for `images`.
      images: Pixels in [0, 1].
      beta: Weight of the divergence.

    Returns:
      loss, bce and kld of each image, in nats. Training differentiates the sum of `loss` over the batch.

    References:
      Kingma and Welling, Auto-Encoding Variational Bayes, equation 10. https://arxiv.org/abs/1312.6114
      Higgins et al., beta-VAE, equation 4. https://openreview.net/forum?id=Sy2fzU9gl
    """
    reconstruction = bce(output.logits, images)
    divergence = kld(output.mu, output.logvar)
    return Losses(reconstruction + beta * divergence, reconstruction, divergence)
