"""The documented PyTorch training loop: the reference for parity and for speed. `python -m torch_ref.train --help`."""

import dataclasses
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from torch_ref import convert
from torch_ref.model import VAE
from vae_jax import cli
from vae_jax.config import TrainConfig
from vae_jax.data import load
from vae_jax.log import EpochMetrics, RunLog


@dataclasses.dataclass(frozen=True)
class TorchTrainConfig(TrainConfig):
    """Train the documented MNIST VAE with PyTorch: the same model, loss, optimizer and files as vae_jax.train."""

    workdir: Path = Path("runs/mnist-torch")
    """Folder for config.json and metrics.jsonl."""
    export: Path = Path("vae-torch.pth")
    """State dict to write at the end."""


def losses(recon: Tensor, images: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    """BCE and KLD as documented: summed over pixels or latent dimensions and over the batch, in nats."""
    bce = F.binary_cross_entropy(recon, images, reduction="sum")
    kld = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
    return bce, kld


def train_epoch(
    model: VAE, optimizer: torch.optim.Optimizer, batches: Iterable[Sequence[Tensor]], beta: float = 1.0
) -> tuple[float, float]:
    """One epoch as documented: an optimizer step on each batch of pixels ([batch, pixels], in [0, 1]).

    Returns:
      BCE and KLD before each step, summed over all images, in nats.
    """
    device = next(model.parameters()).device
    total_bce = total_kld = 0.0
    for (images,) in batches:
        images = images.to(device)
        recon, mu, logvar = model(images)
        bce, kld = losses(recon, images, mu, logvar)
        loss = bce + beta * kld
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total_bce += bce.item()
        total_kld += kld.item()
    return total_bce, total_kld


def fit(config: TorchTrainConfig) -> tuple[VAE, list[EpochMetrics]]:
    """Trains on the GPU if there is one, else on the CPU, and writes config.json, metrics.jsonl and the state dict.

    Raises:
      InputError: An option cannot be used; raised before anything is computed or written.
    """
    config.check()
    dataset = load(config.data)
    torch.manual_seed(config.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train_set, test_set = (
        TensorDataset(torch.from_numpy(images.reshape(len(images), -1)).float() / 255)
        for images in (dataset.train_images, dataset.test_images)
    )
    train_loader = DataLoader(train_set, config.batch_size, shuffle=True)
    test_loader = DataLoader(test_set, config.batch_size)
    model = VAE(config.hidden_dim, config.latent_dim, train_set[0][0].numel()).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)

    log = RunLog(config)
    history = []
    for epoch in range(1, config.epochs + 1):
        start = time.perf_counter()
        bar = tqdm(train_loader, desc=f"epoch {epoch}", leave=False, disable=None)
        train_bce, train_kld = train_epoch(model, optimizer, bar, config.beta)
        seconds = time.perf_counter() - start

        test_bce = test_kld = 0.0
        with torch.no_grad():
            for (images,) in test_loader:
                images = images.to(device)
                recon, mu, logvar = model(images)
                bce, kld = losses(recon, images, mu, logvar)
                test_bce += bce.item()
                test_kld += kld.item()
        train, test = len(train_set), len(test_set)
        metrics = EpochMetrics(
            epoch,
            (train_bce + config.beta * train_kld) / train,
            train_bce / train,
            train_kld / train,
            (test_bce + config.beta * test_kld) / test,
            test_bce / test,
            test_kld / test,
            seconds,
        )
        history.append(metrics)
        log.add(metrics)

    convert.save(convert.to_state_dict(convert.to_params(model.state_dict())), config.export)
    print(f"saved {config.export}")
    return model, history


if __name__ == "__main__":
    cli.run(fit, TorchTrainConfig, "python -m torch_ref.train")
