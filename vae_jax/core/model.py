"""The model: an encoder and a decoder of two small perceptrons, with a Gaussian latent vector between them.

Parameters are a nested dict whose paths mirror the PyTorch state dict: `encoder/fc1/kernel` is `encoder.fc1.weight`
transposed. Everything outside this file needs only two methods of a module: `encode(images)`, which returns mu and
logvar, and `decode(z)`, which returns logits. A Flax module of your own with these two methods goes the same way.
"""

from functools import partial
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, UInt8

from vae_jax.system.errors import InputError

Params = PyTree[Array]


class Output(NamedTuple):
    """The encoder's and the decoder's outputs for a batch."""

    logits: Float[Array, "batch pixels"]  # recon = sigmoid(logits)
    mu: Float[Array, "batch latent"]
    logvar: Float[Array, "batch latent"]
    z: Float[Array, "batch latent"]


def to_pixels(
    images: UInt8[Array, "batch pixels"] | Float[Array, "batch pixels"], dtype: jnp.dtype = jnp.float32
) -> Float[Array, "batch pixels"]:
    """Bytes as pixels in [0, 1], byte / 255, of type `dtype`; floats are pixels already and pass unchanged.

    Raises:
      InputError: The images are of another type; raised while tracing.
    """
    if images.dtype == jnp.uint8:
        return images.astype(dtype) / 255
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise InputError(f"images have type {images.dtype}; expected uint8 from 0 to 255, or floats in [0, 1]")
    return images


def init_linear(key: Array, fan_in: int, features: int) -> dict[str, Array]:
    """Draws the parameters of a linear layer as `torch.nn.Linear` does: ~ U(-1/sqrt(fan_in), 1/sqrt(fan_in)).

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
        # Both heads as one product: two products of 20 columns would take nearly twice the time.
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
    """The documented variational autoencoder; `VAE().apply({"params": params}, images, eps)`.

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


def init_params(model: nn.Module, key: Array, pixels: int) -> Params:
    """Draws the parameters of a module for images of so many pixels."""

    def encode_and_decode(module: Any, images: Array) -> Array:
        return module.decode(module.encode(images)[0])

    return model.init(key, jnp.zeros((1, pixels)), method=encode_and_decode)["params"]


def forward(
    model: nn.Module, params: Params, pixels: Float[Array, "batch pixels"], eps: Float[Array, "batch latent"]
) -> Output:
    """Encodes, draws z = mu + exp(logvar / 2) * eps, and decodes; `VAE.__call__` for any module.

    Args:
      model: A module with the methods `encode` and `decode`.
      params: Its parameters.
      pixels: In [0, 1].
      eps: Draws from N(0, I).
    """
    mu, logvar = cast(tuple[Array, Array], model.apply({"params": params}, pixels, method="encode"))
    z = mu + jnp.exp(logvar / 2) * eps
    logits = cast(Array, model.apply({"params": params}, z, method="decode"))
    return Output(logits, mu, logvar, z)


def latent_dim(model: nn.Module, params: Params, pixels: int) -> int:
    """The number of latent dimensions of a module, without computing anything."""
    dtype = jax.tree.leaves(params)[0].dtype
    images = jax.ShapeDtypeStruct((1, pixels), dtype)
    mu, _ = jax.eval_shape(partial(model.apply, method="encode"), {"params": params}, images)
    return mu.shape[-1]


@partial(jax.jit, static_argnames="model")
def encode(
    model: nn.Module, params: Params, images: UInt8[Array, "batch pixels"] | Float[Array, "batch pixels"]
) -> tuple[Float[Array, "batch latent"], Float[Array, "batch latent"]]:
    """mu and logvar of the posterior of each image."""
    return cast(tuple[Array, Array], model.apply({"params": params}, to_pixels(images), method="encode"))


@partial(jax.jit, static_argnames="model")
def decode(model: nn.Module, params: Params, z: Float[Array, "batch latent"]) -> Float[Array, "batch pixels"]:
    """The means of the pixels, sigmoid(logits)."""
    return jax.nn.sigmoid(cast(Array, model.apply({"params": params}, z, method="decode")))
