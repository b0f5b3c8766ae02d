"""The documented PyTorch model: the reference for the JAX model."""

import itertools
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae_jax.config import Activation


class Encoder(nn.Module):
    """q(z | x) = N(mu, exp(logvar)), diagonal."""

    def __init__(self, hidden_dim: int = 400, latent_dim: int = 20, pixels: int = 784):
        super().__init__()
        self.fc1 = nn.Linear(pixels, hidden_dim)
        self.fc2_mu = nn.Linear(hidden_dim, latent_dim)
        self.fc2_logvar = nn.Linear(hidden_dim, latent_dim)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Maps pixels in [0, 1], [batch, pixels], to mu and logvar, [batch, latent] each."""
        h = torch.relu(self.fc1(images))
        return self.fc2_mu(h), self.fc2_logvar(h)


class Decoder(nn.Module):
    """p(x | z) = Bernoulli(recon), with independent pixels."""

    def __init__(self, hidden_dim: int = 400, latent_dim: int = 20, pixels: int = 784):
        super().__init__()
        self.fc1 = nn.Linear(latent_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, pixels)

    def logits(self, z: Tensor) -> Tensor:
        """Maps z, [batch, latent], to logits, [batch, pixels]."""
        return self.fc2(torch.relu(self.fc1(z)))

    def forward(self, z: Tensor) -> Tensor:
        """Maps z, [batch, latent], to recon, the means of the pixels in [0, 1], [batch, pixels]."""
        return torch.sigmoid(self.logits(z))


class VAE(nn.Module):
    """The variational autoencoder of Kingma and Welling, https://arxiv.org/abs/1312.6114, as two perceptrons."""

    def __init__(self, hidden_dim: int = 400, latent_dim: int = 20, pixels: int = 784):
        super().__init__()
        self.encoder = Encoder(hidden_dim, latent_dim, pixels)
        self.decoder = Decoder(hidden_dim, latent_dim, pixels)

    @staticmethod
    def reparameterize(mu: Tensor, logvar: Tensor, eps: Tensor | None = None) -> Tensor:
        """z = mu + exp(logvar / 2) * eps, with `eps` drawn from N(0, I) if it is not given."""
        if eps is None:
            eps = torch.randn_like(mu)
        return mu + torch.exp(logvar / 2) * eps

    def forward(self, images: Tensor, eps: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Maps pixels in [0, 1], [batch, pixels], to recon ([batch, pixels]), mu and logvar ([batch, latent])."""
        mu, logvar = self.encoder(images)
        return self.decoder(self.reparameterize(mu, logvar, eps)), mu, logvar


class MLP(nn.Module):
    """The same with any number of hidden layers, the decoder's in reverse: the PyTorch side of `vae_jax.MLP`."""

    def __init__(
        self,
        hidden_dims: Sequence[int] = (400,),
        latent_dim: int = 20,
        pixels: int = 784,
        activation: Activation = "relu",
    ):
        super().__init__()
        number = len(hidden_dims) + 1
        heads = {f"fc{number}_mu": latent_dim, f"fc{number}_logvar": latent_dim}
        self.encoder = _layers((pixels, *hidden_dims), heads)
        self.decoder = _layers((latent_dim, *reversed(hidden_dims)), {f"fc{number}": pixels})
        self._activation = ACTIVATIONS[activation]

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Maps pixels in [0, 1], [batch, pixels], to mu and logvar, [batch, latent] each."""
        *hidden, mu, logvar = self.encoder.values()
        h = self._through(hidden, images)
        return mu(h), logvar(h)

    def decode(self, z: Tensor) -> Tensor:
        """Maps z, [batch, latent], to logits, [batch, pixels]."""
        *hidden, last = self.decoder.values()
        return last(self._through(hidden, z))

    def _through(self, hidden: Sequence[nn.Module], h: Tensor) -> Tensor:
        for layer in hidden:
            h = self._activation(layer(h))
        return h

    def forward(self, images: Tensor, eps: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Maps pixels in [0, 1], [batch, pixels], to recon ([batch, pixels]), mu and logvar ([batch, latent])."""
        mu, logvar = self.encode(images)
        return torch.sigmoid(self.decode(VAE.reparameterize(mu, logvar, eps))), mu, logvar


ACTIVATIONS = {"relu": F.relu, "tanh": torch.tanh, "elu": F.elu, "silu": F.silu}


def _layers(widths: Sequence[int], last: Mapping[str, int]) -> nn.ModuleDict:
    """Linear layers fc1, fc2, ... of these widths, and those that follow them side by side."""
    hidden = {f"fc{number}": nn.Linear(a, b) for number, (a, b) in enumerate(itertools.pairwise(widths), 1)}
    return nn.ModuleDict(hidden | {name: nn.Linear(widths[-1], features) for name, features in last.items()})
