"""The losses, one function per equation. Everything is per image and in nats."""

import math
from typing import NamedTuple, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vae_jax.config import Objective
from vae_jax.core.model import Output, Params, decode_logits, posterior, reparameterize


class Losses(NamedTuple):
    """The loss of each image and its two parts: loss = bce + beta * kld, unless the objective is another bound."""

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


def bce(logits: Float[Array, "*#batch pixels"], images: Float[Array, "*#batch pixels"]) -> Float[Array, "..."]:
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


def log_weights(
    logits: Float[Array, "batch samples pixels"],
    images: Float[Array, "batch pixels"],
    z: Float[Array, "batch samples latent"],
    eps: Float[Array, "batch samples latent"],
    logvar: Float[Array, "batch latent"],
) -> Float[Array, "batch samples"]:
    """log of the importance weights, w = p(x | z) p(z) / q(z | x).

    Args:
      logits: Decoded from z.
      images: Pixels x in [0, 1].
      z: Draws from the posterior.
      eps: (z - mu) / exp(logvar / 2).
      logvar: Logarithms of the posterior variances.

    Returns:
      log w of each image and sample, in nats.

    References:
      Burda, Grosse and Salakhutdinov, Importance Weighted Autoencoders, equation 8. https://arxiv.org/abs/1509.00519
    """
    log_px_z = -bce(logits, images[:, None])
    # The constants of the two Gaussians, -latent/2 log(2 pi), cancel.
    log_pz = -0.5 * jnp.sum(z**2, axis=-1)
    log_qz = -0.5 * jnp.sum(eps**2, axis=-1) - 0.5 * jnp.sum(logvar, axis=-1)[:, None]
    return log_px_z + log_pz - log_qz


def iwae(log_weights: Float[Array, "batch samples"]) -> Float[Array, " batch"]:
    """The importance-weighted bound on log p(x), L_K = log(1/K sum of K weights); with one sample, the usual bound.

    References:
      Burda et al., Importance Weighted Autoencoders, equation 8. https://arxiv.org/abs/1509.00519
    """
    return jax.nn.logsumexp(log_weights, axis=1) - math.log(log_weights.shape[1])


def sampled_losses(
    model: nn.Module,
    params: Params,
    images: Float[Array, "batch pixels"],
    eps: Float[Array, "batch samples latent"],
    objective: Objective,
    beta: float | Float[Array, ""] = 1.0,
) -> Losses:
    """The losses of images by several draws of z each.

    Args:
      model: A module with the methods `encode` and `decode`.
      params: Its parameters.
      images: Pixels in [0, 1].
      eps: Draws from N(0, I).
      objective: `elbo`: the cross entropy is averaged over the samples, and beta weighs the divergence; `iwae` and
        `dreg`: the loss is -L_K, which beta does not enter.
      beta: Weight of the divergence.

    Returns:
      loss, bce (averaged over the samples) and kld of each image, in nats.
    """
    mu, logvar = posterior(model, params, images)
    z = reparameterize(mu[:, None], logvar[:, None], eps)
    logits = decode_logits(model, params, z)
    reconstruction = jnp.mean(bce(logits, images[:, None]), axis=1)
    divergence = kld(mu, logvar)
    if objective == "elbo":
        return Losses(reconstruction + beta * divergence, reconstruction, divergence)
    return Losses(-iwae(log_weights(logits, images, z, eps, logvar)), reconstruction, divergence)


def dreg_gradient(
    model: nn.Module,
    params: Params,
    images: Float[Array, "batch pixels"],
    eps: Float[Array, "batch samples latent"],
    valid: Bool[Array, " batch"],
) -> tuple[Params, Losses]:
    """The doubly reparameterized gradient of -L_K, summed over the valid images, and their losses.

    It has the expectation of IWAE's gradient. For the decoder it is the same, sum_k w_k d log w_k with normalized
    weights; for the encoder sum_k w_k^2 (d log w_k / d z_k) (d z_k / d phi), where log q depends on z alone.

    References:
      Tucker, Lawson, Gu and Maddison, Doubly Reparameterized Gradient Estimators, equation 6.
      https://arxiv.org/abs/1810.04152
    """
    (mu, logvar), pull_encoder = jax.vjp(lambda params: posterior(model, params, images), params)
    z, pull_z = jax.vjp(lambda mu, logvar: reparameterize(mu[:, None], logvar[:, None], eps), mu, logvar)

    def log_w(params: Params, z: Array) -> tuple[Array, Array]:
        logits = decode_logits(model, params, z)
        standard = (z - mu[:, None]) * jnp.exp(-logvar / 2)[:, None]
        return log_weights(logits, images, z, standard, logvar), logits

    log_ws, pull_log_w, logits = jax.vjp(log_w, params, z, has_aux=True)
    weights = jax.nn.softmax(log_ws, axis=1)
    from_decoder, to_z = pull_log_w(jnp.where(valid[:, None], -weights, 0))
    (from_encoder,) = pull_encoder(pull_z(weights[..., None] * to_z))
    gradient = jax.tree.map(jnp.add, from_decoder, from_encoder)
    reconstruction = jnp.mean(bce(logits, images[:, None]), axis=1)
    return gradient, sum_valid(Losses(-iwae(log_ws), reconstruction, kld(mu, logvar)), valid)


T = TypeVar("T")


def sum_valid(losses: T, valid: Bool[Array, " batch"]) -> T:
    """Sums over the valid images of a batch; the others only fill it up."""
    return jax.tree.map(lambda per_image: jnp.sum(jnp.where(valid, per_image, 0)), losses)
