"""The objectives of several samples in PyTorch, by autograd: the reference for `vae_jax.core.objective`."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Normal

from torch_ref.model import MLP, VAE
from vae_jax.config import Objective


def sampled_loss(model: MLP, images: Tensor, eps: Tensor, objective: Objective = "elbo") -> Tensor:
    """The loss of a batch by several draws of z for each image, summed over the images, in nats.

    Its gradient is the estimator of the objective, DReG's too.

    Args:
      model: A module with the methods `encode` and `decode`.
      images: Pixels in [0, 1], [batch, pixels].
      eps: Draws from N(0, I), [batch, samples, latent].
      objective: `elbo`: the cross entropy averaged over the samples, and the KL divergence in closed form; `iwae` and
        `dreg`: -L_K.

    References:
      Burda et al., Importance Weighted Autoencoders, equation 8. https://arxiv.org/abs/1509.00519
      Tucker et al., Doubly Reparameterized Gradient Estimators, equation 6. https://arxiv.org/abs/1810.04152
    """
    mu, logvar = model.encode(images)
    z = VAE.reparameterize(mu[:, None], logvar[:, None], eps)
    if objective == "dreg":
        # log q depends on z alone, and what reaches z is weighted once more.
        mu, logvar = mu.detach(), logvar.detach()
        if z.requires_grad:
            z.register_hook(lambda gradient: gradient * weights[..., None])
    logits = model.decode(z)
    pixels = images[:, None].expand_as(logits)
    log_px_z = -F.binary_cross_entropy_with_logits(logits, pixels, reduction="none").sum(-1)
    if objective == "elbo":
        divergence = -0.5 * torch.sum(1 + logvar - mu**2 - torch.exp(logvar))
        return -log_px_z.mean(1).sum() + divergence
    log_qz = Normal(mu[:, None], torch.exp(logvar / 2)[:, None], validate_args=False).log_prob(z).sum(-1)
    log_w = log_px_z + Normal(0, 1).log_prob(z).sum(-1) - log_qz
    weights = torch.softmax(log_w, 1).detach()
    return -(torch.logsumexp(log_w, 1) - math.log(eps.shape[1])).sum()
