"""The documented PyTorch model: the reference for the JAX model."""

import torch
from torch import Tensor, nn


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
