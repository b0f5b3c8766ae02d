"""The model: two small perceptrons around a Gaussian latent vector.

Parameters are a nested dict whose paths mirror the PyTorch state dict: `encoder/fc1/kernel` is `encoder.fc1.weight`
transposed.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8


class Output(NamedTuple):
    """What the model makes of a batch."""

    logits: Float[Array, "batch pixels"]  # recon = sigmoid(logits)
    mu: Float[Array, "batch latent"]
    logvar: Float[Array, "batch latent"]
    z: Float[Array, "batch latent"]


def to_pixels(
    images: UInt8[Array, "batch pixels"] | Float[Array, "batch pixels"], dtype: jnp.dtype = jnp.float32
) -> Float[Array, "batch pixels"]:
    """Stored bytes as pixels in [0, 1], byte / 255, of type `dtype`; floats are pixels already and pass unchanged."""
    return images.astype(dtype) / 255 if images.dtype == jnp.uint8 else images


def init_linear(key: Array, fan_in: int, features: int) -> dict[str, Array]:
    """Parameters of a linear layer as `torch.nn.Linear` draws them: all ~ U(-1/sqrt(fan_in), 1/sqrt(fan_in)).

    Returns:
      `kernel` of shape [fan_in, features] and `bias` of shape [features].
    """
    bound = fan_in**-0.5
    weights = jax.random.uniform(key, (fan_in + 1, features), minval=-bound, maxval=bound)
    return {"kernel": weights[:-1], "bias": weights[-1]}


def linear(params: dict[str, Array], x: Float[Array, "batch fan_in"]) -> Float[Array, "batch features"]:
    return x @ params["kernel"] + params["bias"][None]


class Encoder(nn.Module):
    """q(z | x) = N(mu, exp(logvar)), diagonal."""

    hidden_dim: int = 400
    latent_dim: int = 20

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch pixels"]
    ) -> tuple[Float[Array, "batch latent"], Float[Array, "batch latent"]]:
        fc1 = self.param("fc1", init_linear, images.shape[-1], self.hidden_dim)
        fc2_mu = self.param("fc2_mu", init_linear, self.hidden_dim, self.latent_dim)
        fc2_logvar = self.param("fc2_logvar", init_linear, self.hidden_dim, self.latent_dim)
        h = nn.relu(linear(fc1, images))  # [batch, hidden]
        # Both heads in one product: two of 20 columns would take nearly twice the time.
        heads = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=-1), fc2_mu, fc2_logvar)
        mu, logvar = jnp.split(linear(heads, h), 2, axis=-1)  # [batch, latent] each
        return mu, logvar


class Decoder(nn.Module):
    """p(x | z) = Bernoulli(sigmoid(logits)), each pixel on its own."""

    hidden_dim: int = 400
    pixels: int = 784

    @nn.compact
    def __call__(self, z: Float[Array, "batch latent"]) -> Float[Array, "batch pixels"]:
        fc1 = self.param("fc1", init_linear, z.shape[-1], self.hidden_dim)
        fc2 = self.param("fc2", init_linear, self.hidden_dim, self.pixels)
        h = nn.relu(linear(fc1, z))  # [batch, hidden]
        return linear(fc2, h)


class VAE(nn.Module):
    """The variational autoencoder; `VAE().apply({"params": params}, images, eps)`.

    The noise is an argument, so that the model is a pure function.

    References:
      Kingma and Welling, Auto-Encoding Variational Bayes, section 2.4 and appendix C. https://arxiv.org/abs/1312.6114
    """

    hidden_dim: int = 400
    latent_dim: int = 20
    pixels: int = 784

    def setup(self) -> None:
        self.encoder = Encoder(self.hidden_dim, self.latent_dim)
        self.decoder = Decoder(self.hidden_dim, self.pixels)

    def __call__(
        self, images: UInt8[Array, "batch pixels"] | Float[Array, "batch pixels"], eps: Float[Array, "batch latent"]
    ) -> Output:
        """Encodes, draws z = mu + exp(logvar / 2) * eps, and decodes.

        Args:
          images: Bytes, or pixels in [0, 1].
          eps: Draws from N(0, I).
        """
        mu, logvar = self.encoder(to_pixels(images, eps.dtype))
        z = mu + jnp.exp(logvar / 2) * eps
        return Output(self.decoder(z), mu, logvar, z)

    def encode(
        self, images: UInt8[Array, "batch pixels"] | Float[Array, "batch pixels"]
    ) -> tuple[Float[Array, "batch latent"], Float[Array, "batch latent"]]:
        """mu and logvar of the posterior of each image; `apply(variables, images, method="encode")`."""
        return self.encoder(to_pixels(images))

    def decode(self, z: Float[Array, "batch latent"]) -> Float[Array, "batch pixels"]:
        """Logits of the pixels; `apply(variables, z, method="decode")`."""
        return self.decoder(z)


@partial(jax.jit, static_argnames="model")
def encode(
    model: VAE, params: Mapping[str, Any], images: UInt8[Array, "batch pixels"] | Float[Array, "batch pixels"]
) -> tuple[Float[Array, "batch latent"], Float[Array, "batch latent"]]:
    """mu and logvar of the posterior of each image."""
    return cast(tuple[Array, Array], model.apply({"params": params}, images, method="encode"))


@partial(jax.jit, static_argnames="model")
def decode(model: VAE, params: Mapping[str, Any], z: Float[Array, "batch latent"]) -> Float[Array, "batch pixels"]:
    """The means of the pixels, sigmoid(logits)."""
    return jax.nn.sigmoid(cast(Array, model.apply({"params": params}, z, method="decode")))
