"""The documented PyTorch training loop: the reference for parity and for speed. `python -m torch_ref.train --help`."""

import dataclasses
import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from torch_ref import convert
from torch_ref.model import VAE
from vae_jax import cli
from vae_jax.config import Binarize, RunConfig
from vae_jax.data import Dataset as ImageSet
from vae_jax.data import load
from vae_jax.log import RECONSTRUCTIONS, EpochMetrics, RunLog, describe_losses, lock, say


@dataclasses.dataclass(frozen=True)
class TorchTrainConfig(RunConfig):
    """Train the documented MNIST VAE with PyTorch: the same model, loss, optimizer and files as vae_jax.train."""

    workdir: Path = Path("runs/mnist-torch")
    """Folder for config.json, metrics.jsonl, pictures and TensorBoard events."""
    export: Path = Path("vae-torch.pth")
    """State dict to write at the end."""


class Coder(NamedTuple):
    """A model as its pictures see it (`vae_jax.pictures.Coder`)."""

    model: VAE
    latent_dim: int
    device: torch.device

    @torch.no_grad()
    def encode(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pixels to mu and logvar."""
        mu, logvar = self.model.encoder(torch.from_numpy(images).to(self.device))
        return mu.cpu().numpy(), logvar.cpu().numpy()

    @torch.no_grad()
    def decode(self, z: np.ndarray) -> np.ndarray:
        """Latent points to the means of the pixels."""
        return self.model.decoder(torch.from_numpy(z).to(self.device)).cpu().numpy()


def losses(recon: Tensor, images: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    """BCE and KLD as documented: summed over pixels or latent dimensions and over the batch, in nats."""
    bce = F.binary_cross_entropy(recon, images, reduction="sum")
    kld = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
    return bce, kld


def to_pixels(images: np.ndarray) -> Tensor:
    """A set of images, bytes or floats, as pixels in [0, 1] of shape [images, pixels]."""
    tensor = torch.tensor(images.reshape(len(images), -1), dtype=torch.float32)
    return tensor / 255 if images.dtype == np.uint8 else tensor


def binarize(images: Tensor, rule: Binarize) -> Tensor:
    """Pixels in [0, 1] cut at 0.5 (threshold), drawn (static, dynamic), or left as they are (none)."""
    if rule == "threshold":
        return (images > 0.5).float()
    return images if rule == "none" else torch.bernoulli(images)


@torch.no_grad()
def eval_epoch(model: VAE, batches: Iterable[Sequence[Tensor]]) -> tuple[float, float]:
    """BCE and KLD summed over all images, in nats; NaN where the model is not finite."""
    device = next(model.parameters()).device
    total_bce = total_kld = 0.0
    try:
        for (images,) in batches:
            images = images.to(device)
            recon, mu, logvar = model(images)
            bce, kld = losses(recon, images, mu, logvar)
            total_bce += bce.item()
            total_kld += kld.item()
    except RuntimeError as error:
        return _nan_or_raise(error)
    return total_bce, total_kld


def _nan_or_raise(error: RuntimeError) -> tuple[float, float]:
    """NaN where binary_cross_entropy has met one and complained, on a CPU or on a GPU; any other error is raised."""
    if "between 0 and 1" in str(error) or "device-side assert" in str(error):
        return math.nan, math.nan
    raise error


class PixelSet(Dataset[tuple[Tensor]]):
    """Images for a DataLoader, one at a time as pixels in [0, 1], [pixels].

    Bytes go the way of the documented script, which has torchvision's MNIST and ToTensor: each image through PIL.
    """

    def __init__(self, images: np.ndarray, rule: Binarize = "none"):
        # Under `dynamic`, an image is drawn anew whenever it is asked for.
        self._dynamic = rule == "dynamic"
        self._images = images if rule in ("none", "dynamic") else binarize(to_pixels(images), rule).numpy()

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, number: int) -> tuple[Tensor]:
        image = self._images[number]
        if image.dtype == np.uint8 and image.ndim == 2:
            image = np.array(Image.fromarray(image))
        pixels = to_pixels(image[None])[0]
        return (binarize(pixels, "dynamic") if self._dynamic else pixels,)


def train_epoch(
    model: VAE, optimizer: torch.optim.Optimizer, batches: Iterable[Sequence[Tensor]], beta: float = 1.0
) -> tuple[float, float]:
    """One epoch as documented: an optimizer step on each batch of pixels ([batch, pixels], in [0, 1]).

    Returns:
      BCE and KLD before each step, summed over all images, in nats; NaN from the first step on that is not finite.
    """
    device = next(model.parameters()).device
    total_bce = total_kld = 0.0
    try:
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
    except RuntimeError as error:
        return _nan_or_raise(error)
    return total_bce, total_kld


def fit(config: TorchTrainConfig) -> tuple[VAE, list[EpochMetrics]]:
    """Trains on the GPU if there is one, else on the CPU, and writes config.json, metrics.jsonl and the state dict.

    Raises:
      InputError: An option cannot be used; raised before anything is computed or written.
      NonFiniteLossError: The loss of an epoch is not finite; nothing is exported.
    """
    config.check()
    dataset = load(config.data, config.data_dir, config.max_data_gb)
    config.check_size(math.prod(dataset.image_shape))
    with lock(config.workdir):
        return _fit(config, dataset)


def _fit(config: TorchTrainConfig, dataset: ImageSet) -> tuple[VAE, list[EpochMetrics]]:
    """`fit` in a workdir that no other process is in."""
    torch.manual_seed(config.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pixels = dataset.pixels(config.binarize)
    # Under `dynamic` too, the test images are drawn once, so that epochs can be compared.
    train_set = PixelSet(dataset.train_images, config.binarize)
    test_set = PixelSet(dataset.test_images, "static" if config.binarize == "dynamic" else config.binarize)
    batch_size = min(config.batch_size, len(train_set))
    train_loader = DataLoader(train_set, batch_size, shuffle=True)
    test_loader = DataLoader(test_set, batch_size)
    model = VAE(config.hidden_dim, config.latent_dim, train_set[0][0].numel()).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)

    say(describe_losses(pixels))
    log = RunLog(config, dataset.image_shape, pixels)
    history = []

    def draw() -> None:
        shown = np.stack([test_set[number][0] for number in range(min(RECONSTRUCTIONS, len(test_set)))])
        log.draw(Coder(model, config.latent_dim, device), shown, dataset.image_shape)

    for epoch in range(1, config.epochs + 1):
        start = time.perf_counter()
        bar = tqdm(train_loader, desc=f"epoch {epoch}", leave=False, disable=None)
        train_bce, train_kld = train_epoch(model, optimizer, bar, config.beta)
        seconds = time.perf_counter() - start

        test_bce, test_kld = eval_epoch(model, test_loader)
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
            pixels,
        )
        history.append(metrics)
        log.add(metrics)
        if epoch < config.epochs and config.draws_pictures(epoch):
            draw()

    # Before the last pictures: nothing that goes wrong with them may cost the model.
    state_dict = convert.to_state_dict(convert.to_params(model.state_dict()))
    convert.save(state_dict, config.workdir / "model.pth")
    convert.save(state_dict, config.export)
    say(f"saved {config.export}")
    draw()
    return model, history


if __name__ == "__main__":
    cli.run(fit, TorchTrainConfig, "python -m torch_ref.train")
