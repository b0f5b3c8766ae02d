"""The documented PyTorch training script, `python -m torch_ref.train`: the reference for parity and for speed."""

import importlib
import math
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from vae_jax.config import Binarize, TorchTrainConfig
from vae_jax.system import command_line

if __name__ == "__main__":
    # Importing torch takes two seconds: the options are read first, so that --help need not wait for it.
    command_line.run(
        lambda config: importlib.import_module("torch_ref.train").fit(config),
        TorchTrainConfig,
        "python -m torch_ref.train",
    )
    sys.exit()

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from torch_ref import convert
from torch_ref.model import VAE
from vae_jax.data import load
from vae_jax.system.console import say
from vae_jax.system.errors import NonFiniteLossError
from vae_jax.system.files import require_writable


class Epoch(NamedTuple):
    """Averages over the images of an epoch, in nats per image, and the seconds that training took."""

    train_loss: float
    train_bce: float
    train_kld: float
    test_loss: float
    seconds: float


def losses(recon: Tensor, images: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    """BCE and KLD as documented: summed over pixels or latent dimensions and over the batch, in nats."""
    bce = F.binary_cross_entropy(recon, images, reduction="sum")
    kld = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
    return bce, kld


def to_pixels(images: np.ndarray) -> Tensor:
    """Images, bytes or floats, as pixels in [0, 1] of shape [images, pixels]."""
    tensor = torch.tensor(images.reshape(len(images), -1), dtype=torch.float32)
    return tensor / 255 if images.dtype == np.uint8 else tensor


def binarize(images: Tensor, rule: Binarize) -> Tensor:
    """Pixels in [0, 1]: cut at 0.5 (threshold), drawn (static, dynamic), or unchanged (none)."""
    if rule == "threshold":
        return (images > 0.5).float()
    return images if rule == "none" else torch.bernoulli(images)


class PixelSet(Dataset[tuple[Tensor]]):
    """Images for a DataLoader: each as its pixels in [0, 1], [pixels].

    The documented script uses torchvision's MNIST and ToTensor, which pass each image of bytes through PIL: so does
    this class. Under `dynamic`, an image is drawn anew each time it is read.
    """

    def __init__(self, images: np.ndarray, rule: Binarize = "none"):
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
    """Takes an optimizer step on each batch of pixels in [0, 1], [batch, pixels].

    Returns:
      BCE and KLD before each step, summed over all images, in nats.

    Raises:
      RuntimeError: On a CPU, by binary_cross_entropy, when a reconstruction is NaN.
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


@torch.no_grad()
def eval_epoch(model: VAE, batches: Iterable[Sequence[Tensor]]) -> tuple[float, float]:
    """BCE and KLD summed over all images, in nats. Raises as `train_epoch` does."""
    device = next(model.parameters()).device
    total_bce = total_kld = 0.0
    for (images,) in batches:
        images = images.to(device)
        recon, mu, logvar = model(images)
        bce, kld = losses(recon, images, mu, logvar)
        total_bce += bce.item()
        total_kld += kld.item()
    return total_bce, total_kld


def fit(config: TorchTrainConfig) -> tuple[VAE, list[Epoch]]:
    """Trains on the GPU if there is one, else on the CPU; prints a line for each epoch, and writes the state dict.

    Raises:
      InputError: An option or the image set cannot be used; raised before anything is computed or written.
      NonFiniteLossError: The loss of an epoch is not finite; nothing is written.
    """
    config.check()
    require_writable("--export", config.export, Path(config.data))
    convert.require_weights_file("--export", config.export)
    dataset = load(config.data, config.data_dir, config.max_data_gb, config.image_size, config.grey)
    torch.manual_seed(config.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Under `dynamic` too, the test images are drawn only once, so that epochs can be compared.
    train_set = PixelSet(dataset.train_images, config.binarize)
    test_set = PixelSet(dataset.test_images, "static" if config.binarize == "dynamic" else config.binarize)
    batch_size = min(config.batch_size, len(train_set))
    train_loader = DataLoader(train_set, batch_size, shuffle=True)
    test_loader = DataLoader(test_set, batch_size)
    model = VAE(config.hidden_dim, config.latent_dim, train_set[0][0].numel()).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)

    say(f"losses: nats per image; cross entropy of {dataset.pixels(config.binarize)} pixels")
    history = []
    for number in range(1, config.epochs + 1):
        try:
            start = time.perf_counter()
            sums = train_epoch(model, optimizer, train_loader, config.beta)
            seconds = time.perf_counter() - start
            train_bce, train_kld = (total / len(train_set) for total in sums)
            test_bce, test_kld = (total / len(test_set) for total in eval_epoch(model, test_loader))
        except RuntimeError as error:  # binary_cross_entropy complains about NaN, on a CPU or on a GPU
            if "between 0 and 1" not in str(error) and "device-side assert" not in str(error):
                raise
            train_bce = train_kld = test_bce = test_kld = seconds = math.nan
        epoch = Epoch(
            train_bce + config.beta * train_kld, train_bce, train_kld, test_bce + config.beta * test_kld, seconds
        )
        if not math.isfinite(epoch.train_loss + epoch.test_loss):
            raise NonFiniteLossError(
                f"epoch {number}: the loss is not finite; nothing exported; try a lower --learning-rate or --beta"
            )
        history.append(epoch)
        loss, bce = round(epoch.train_loss, 2), round(train_bce, 2)
        # With beta 1 the last digit of the KLD is that of the difference, so that the printed sum holds.
        kld = f"kld {loss - bce:.2f}" if config.beta == 1 else f"{config.beta:g} * kld {train_kld:.2f}"
        say(
            f"epoch {number:{len(str(config.epochs))}}/{config.epochs}  train loss {loss:.2f} = bce {bce:.2f} + {kld}"
            f"  test loss {epoch.test_loss:.2f}  {seconds:.2f} s"
        )
    convert.save(convert.to_state_dict(convert.to_params(model.state_dict())), config.export)  # plain, on the CPU
    say(f"saved {config.export}")
    return model, history
