"""The model: an encoder and a decoder of small perceptrons, with a Gaussian latent vector between them.

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

from vae_jax.config import Activation, Initialization
from vae_jax.system.errors import InputError

Params = PyTree[Array]

# Floats this far outside [0, 1] are pixels all the same.
ROUNDING = 1e-6


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

    Floats outside [0, 1] by more than rounding become NaN, and so does every loss of them.

    Raises:
      InputError: The images are of another type; raised while tracing.
    """
    if images.dtype == jnp.uint8:
        return images.astype(dtype) / 255
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise InputError(f"images have type {images.dtype}; expected uint8 from 0 to 255, or floats in [0, 1]")
    # Values are unknown while tracing, so nothing can be raised; a loss of pixels up to 255 would still look like one.
    return jnp.where((images >= -ROUNDING) & (images <= 1 + ROUNDING), images, jnp.nan)


def init_linear(key: Array, fan_in: int, features: int) -> dict[str, Array]:
    """Draws the parameters of a linear layer as `torch.nn.Linear` does: ~ U(-1/sqrt(fan_in), 1/sqrt(fan_in)).

    Returns:
      `kernel` of shape [fan_in, features] and `bias` of shape [features].
    """
    bound = fan_in**-0.5
    weights = jax.random.uniform(key, (fan_in + 1, features), minval=-bound, maxval=bound)
    return {"kernel": weights[:-1], "bias": weights[-1]}


def init_glorot(key: Array, fan_in: int, features: int) -> dict[str, Array]:
    """The same with weights ~ U(-b, b), b = sqrt(6 / (fan_in + features)), and biases of 0.

    References:
      Glorot and Bengio, Understanding the Difficulty of Training Deep Feedforward Neural Networks, equation 16.
    """
    bound = (6 / (fan_in + features)) ** 0.5
    kernel = jax.random.uniform(key, (fan_in, features), minval=-bound, maxval=bound)
    return {"kernel": kernel, "bias": jnp.zeros(features)}


INITIALIZERS = {"torch": init_linear, "glorot": init_glorot}
ACTIVATIONS = {"relu": nn.relu, "tanh": nn.tanh, "elu": nn.elu, "silu": nn.silu}


def linear(params: dict[str, Array], x: Float[Array, "batch fan_in"]) -> Float[Array, "batch features"]:
    return x @ params["kernel"] + params["bias"][None]


class Encoder(nn.Module):
    """q(z | x) = N(mu, exp(logvar)), diagonal."""

    hidden_dims: tuple[int, ...] = (400,)
    latent_dim: int = 20
    activation: Activation = "relu"
    initialization: Initialization = "torch"

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch pixels"]
    ) -> tuple[Float[Array, "batch latent"], Float[Array, "batch latent"]]:
        init, h = INITIALIZERS[self.initialization], images
        for number, features in enumerate(self.hidden_dims, 1):
            layer = self.param(f"fc{number}", init, h.shape[-1], features)
            h = ACTIVATIONS[self.activation](linear(layer, h))  # [batch, hidden]
        number = len(self.hidden_dims) + 1
        mu = self.param(f"fc{number}_mu", init, h.shape[-1], self.latent_dim)
        logvar = self.param(f"fc{number}_logvar", init, h.shape[-1], self.latent_dim)
        # Both heads as one product: two products of 20 columns would take nearly twice the time.
        heads = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=-1), mu, logvar)
        mu, logvar = jnp.split(linear(heads, h), 2, axis=-1)  # [batch, latent] each
        return mu, logvar


class Decoder(nn.Module):
    """p(x | z) = Bernoulli(sigmoid(logits)), each pixel on its own."""

    hidden_dims: tuple[int, ...] = (400,)
    pixels: int = 784
    activation: Activation = "relu"
    initialization: Initialization = "torch"

    @nn.compact
    def __call__(self, z: Float[Array, "batch latent"]) -> Float[Array, "batch pixels"]:
        init, h = INITIALIZERS[self.initialization], z
        for number, features in enumerate(self.hidden_dims, 1):
            layer = self.param(f"fc{number}", init, h.shape[-1], features)
            h = ACTIVATIONS[self.activation](linear(layer, h))  # [batch, hidden]
        last = self.param(f"fc{len(self.hidden_dims) + 1}", init, h.shape[-1], self.pixels)
        return linear(last, h)


class GaussianVAE(nn.Module):
    """What the models here share: `setup` of a subclass makes `self.encoder` and `self.decoder`.

    The noise is an argument, so that the model is a pure function.
    """

    def __call__(
        self: Any,
        images: UInt8[Array, "batch pixels"] | Float[Array, "batch pixels"],
        eps: Float[Array, "batch latent"],
    ) -> Output:
        """Encodes, draws z = mu + exp(logvar / 2) * eps, and decodes.

        Args:
          images: Bytes, or pixels in [0, 1].
          eps: Draws from N(0, I).
        """
        mu, logvar = self.encoder(to_pixels(images, eps.dtype))
        z = reparameterize(mu, logvar, eps)
        return Output(self.decoder(z), mu, logvar, z)

    def encode(
        self: Any, images: UInt8[Array, "batch pixels"] | Float[Array, "batch pixels"]
    ) -> tuple[Float[Array, "batch latent"], Float[Array, "batch latent"]]:
        """mu and logvar of the posterior of each image; `apply(variables, images, method="encode")`."""
        return self.encoder(to_pixels(images))

    def decode(self: Any, z: Float[Array, "batch latent"]) -> Float[Array, "batch pixels"]:
        """Logits of the pixels; `apply(variables, z, method="decode")`."""
        return self.decoder(z)


class VAE(GaussianVAE):
    """The documented variational autoencoder; `VAE().apply({"params": params}, images, eps)`.

    References:
      Kingma and Welling, Auto-Encoding Variational Bayes, section 2.4 and appendix C. https://arxiv.org/abs/1312.6114
    """

    hidden_dim: int = 400
    latent_dim: int = 20
    pixels: int = 784

    def setup(self) -> None:
        self.encoder = Encoder((self.hidden_dim,), self.latent_dim)
        self.decoder = Decoder((self.hidden_dim,), self.pixels)


class MLP(GaussianVAE):
    """The same with any number of hidden layers; the decoder has the widths of the encoder in reverse.

    With one layer of ReLU it is the documented model bit for bit, names of parameters included; with more the names
    count on: encoder/fc1, encoder/fc2, encoder/fc3_mu, encoder/fc3_logvar, decoder/fc1, decoder/fc2, decoder/fc3.
    """

    hidden_dims: tuple[int, ...] = (400,)
    latent_dim: int = 20
    pixels: int = 784
    activation: Activation = "relu"
    initialization: Initialization = "torch"

    def setup(self) -> None:
        how = (self.activation, self.initialization)
        self.encoder = Encoder(self.hidden_dims, self.latent_dim, *how)
        self.decoder = Decoder(self.hidden_dims[::-1], self.pixels, *how)


def reparameterize(
    mu: Float[Array, "*#places latent"], logvar: Float[Array, "*#places latent"], eps: Float[Array, "*#places latent"]
) -> Float[Array, "... latent"]:
    """z = mu + exp(logvar / 2) * eps: draws from the posterior for draws `eps` from N(0, I)."""
    return mu + jnp.exp(logvar / 2) * eps


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
    mu, logvar = posterior(model, params, pixels)
    z = reparameterize(mu, logvar, eps)
    return Output(decode_logits(model, params, z), mu, logvar, z)


def posterior(
    model: nn.Module, params: Params, pixels: Float[Array, "batch pixels"]
) -> tuple[Float[Array, "batch latent"], Float[Array, "batch latent"]]:
    """mu and logvar of the posterior of each image, whose pixels are in [0, 1]."""
    mu, logvar = cast(tuple[Array, Array], model.apply({"params": params}, pixels, method="encode"))
    return mu, logvar


def decode_logits(
    model: nn.Module, params: Params, z: Float[Array, "*places latent"]
) -> Float[Array, "*places pixels"]:
    """Logits of the pixels at latent points."""
    logits = cast(Array, model.apply({"params": params}, z.reshape(-1, z.shape[-1]), method="decode"))
    return logits.reshape(*z.shape[:-1], logits.shape[-1])


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
    return posterior(model, params, to_pixels(images))


@partial(jax.jit, static_argnames="model")
def decode(model: nn.Module, params: Params, z: Float[Array, "batch latent"]) -> Float[Array, "batch pixels"]:
    """The means of the pixels, sigmoid(logits)."""
    return jax.nn.sigmoid(decode_logits(model, params, z))
