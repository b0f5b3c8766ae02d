"""A convolutional VAE of 8 x 8 images in Flax and in PyTorch, equal by rule; subclasses of either may have a fault."""

import flax.linen as flax
import jax
import torch
from torch import Tensor, nn

PIXELS, LATENT, CHANNELS = 64, 3, 4


class FlaxConv(flax.Module):
    """Encodes by a convolution, a layer norm over channels and two heads; decodes by a dense layer and a transposed
    convolution. Flattens with the channels first, as PyTorch does."""

    channels_first: bool = True
    padding: int | str = 1

    def setup(self) -> None:
        self.conv = flax.Conv(CHANNELS, (3, 3), strides=2, padding=self.padding)
        self.norm = flax.LayerNorm(epsilon=1e-5)
        self.hidden = flax.Dense(CHANNELS)
        self.mix = flax.Dense(CHANNELS)
        self.mu, self.logvar = flax.Dense(LATENT), flax.Dense(LATENT)
        self.expand = flax.Dense(CHANNELS * 16)
        self.up = flax.ConvTranspose(1, (4, 4), strides=(2, 2))

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = flax.gelu(self.conv(images.reshape(-1, 8, 8, 1)), approximate=False)  # [batch, 4, 4, channel]
        h = self.norm(h)
        if self.channels_first:
            h = h.transpose(0, 3, 1, 2)
        h = flax.relu(self.hidden(h.reshape(len(h), -1)))
        h = flax.relu(self.mix(h))
        return self.mu(h), self.logvar(h)

    def decode(self, z: jax.Array) -> jax.Array:
        h = flax.relu(self.expand(z))
        h = (
            h.reshape(-1, CHANNELS, 4, 4).transpose(0, 2, 3, 1)
            if self.channels_first
            else h.reshape(-1, 4, 4, CHANNELS)
        )
        return self.up(h).reshape(len(z), PIXELS)


class TorchConv(nn.Module):
    """The same; `decode` returns logits."""

    def __init__(self, eps: float = 1e-5):
        super().__init__()
        self.conv = nn.Conv2d(1, CHANNELS, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(CHANNELS, eps)
        self.hidden = nn.Linear(CHANNELS * 16, CHANNELS)
        self.mix = nn.Linear(CHANNELS, CHANNELS)
        self.mu, self.logvar = nn.Linear(CHANNELS, LATENT), nn.Linear(CHANNELS, LATENT)
        self.expand = nn.Linear(LATENT, CHANNELS * 16)
        self.up = nn.ConvTranspose2d(CHANNELS, 1, 4, stride=2, padding=1)
        self.activation, self.last = nn.GELU(), nn.ReLU()

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        h = self.activation(self.conv(images.reshape(-1, 1, 8, 8)))
        h = self.norm(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        h = torch.relu(self.hidden(h.flatten(1)))
        h = torch.relu(self.mix(h))
        return self.mu(h), self.logvar(h)

    def decode(self, z: Tensor) -> Tensor:
        h = self.last(self.expand(z)).reshape(-1, CHANNELS, 4, 4)
        return self.up(h).flatten(1)
