"""Training epochs in PyTorch. Each function prepares a `Runner`, whose run is an epoch."""

import logging
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from benchmarks.turns import Runner, Setting
from torch_ref.model import MLP, VAE
from torch_ref.objective import sampled_loss
from torch_ref.train import PixelSet, losses, train_epoch
from vae_jax.data import load

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pixels(setting: Setting) -> Tensor:
    """The first training images in [0, 1], [images, 784], float32."""
    return torch.from_numpy(load().train_images[: setting.images].reshape(-1, 784)).float() / 255


def _model(setting: Setting) -> VAE:
    torch.manual_seed(0)
    return VAE(setting.hidden_dim, setting.latent_dim).to(DEVICE)


def documented(setting: Setting) -> Runner:
    """The epoch of `torch_ref.train`."""
    return _documented(setting, PixelSet(load().train_images[: setting.images]))


def documented_on_device(setting: Setting) -> Runner:
    """The same with the images on the GPU."""
    if DEVICE.type == "cpu":
        raise RuntimeError("no GPU; on a CPU this is the documented loop itself")
    return _documented(setting, TensorDataset(pixels(setting).to(DEVICE)))


def _documented(setting: Setting, train_set: Dataset[tuple[Tensor, ...]]) -> Runner:
    loader = DataLoader(train_set, setting.batch_size, shuffle=True)
    model = _model(setting)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    return Runner(lambda: sum(train_epoch(model, optimizer, loader)) / setting.images)


def in_memory(setting: Setting) -> Runner:
    """The same arithmetic, made faster: all images in one tensor on the device, and Adam in one pass (fused)."""
    model = _model(setting)
    return Runner(InMemoryTraining(model, pixels(setting).to(DEVICE), setting.batch_size).epoch)


def compiled(setting: Setting) -> Runner:
    """The same as `in_memory` under torch.compile, which uses CUDA graphs on a GPU."""
    model = _model(setting)
    mode = "reduce-overhead" if DEVICE.type == "cuda" else None
    training = InMemoryTraining(
        model,
        pixels(setting).to(DEVICE),
        setting.batch_size,
        torch.compile(summed_loss, dynamic=False, mode=mode),
    )
    return Runner(training.epoch)


def summed_loss(model: torch.nn.Module, batch: Tensor, eps: Tensor | None = None) -> Tensor:
    """The documented loss, summed over a batch."""
    recon, mu, logvar = model(batch, eps)
    bce, kld = losses(recon, batch, mu, logvar)
    return bce + kld


class InMemoryTraining:
    """Epochs over a tensor of images on the device."""

    def __init__(
        self,
        model: torch.nn.Module,
        images: Tensor,
        batch_size: int,
        loss: Callable[[Any, Tensor], Tensor] = summed_loss,
        eps: float = 1e-8,
    ):
        self._model, self._images, self._batch_size, self._loss = model, images, batch_size, loss
        self._optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=eps, fused=True)

    def epoch(self) -> float:
        """Trains on every image once; returns the loss per image, in nats."""
        total = torch.zeros((), device=self._images.device)
        for numbers in torch.randperm(len(self._images), device=self._images.device).split(self._batch_size):
            loss = self._loss(self._model, self._images[numbers])
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()
            total += loss.detach()
        return total.item() / len(self._images)


def stacked(setting: Setting) -> Runner:
    """An epoch of several models as one, by `torch.func`: each with its own parameters, batches and noise."""
    from torch.func import functional_call, grad_and_value, stack_module_state, vmap

    torch.manual_seed(0)
    models = [VAE(setting.hidden_dim, setting.latent_dim).to(DEVICE) for _ in range(setting.models)]
    params, _ = stack_module_state(models)  # pyright: ignore[reportArgumentType]
    images = pixels(setting).to(DEVICE)
    optimizer = torch.optim.Adam(params.values(), lr=1e-3, fused=True)

    def loss(params: dict[str, Tensor], batch: Tensor, eps: Tensor) -> Tensor:
        recon, mu, logvar = functional_call(models[0], params, (batch, eps))
        bce, kld = losses(recon, batch, mu, logvar)
        return bce + kld

    step = vmap(grad_and_value(loss))

    def run() -> float:
        order = torch.rand(setting.models, len(images), device=DEVICE).argsort(1)
        total = torch.zeros((), device=DEVICE)
        for numbers in order.split(setting.batch_size, 1):
            eps = torch.randn(*numbers.shape, setting.latent_dim, device=DEVICE)
            with torch.no_grad():
                grads, values = step(params, images[numbers], eps)
            for name, param in params.items():
                param.grad = grads[name]
            optimizer.step()
            total += values.sum()
        return total.item() / len(images) / setting.models

    return Runner(run)


def iwae(setting: Setting) -> Runner:
    """An epoch of a model of Burda et al. 2015: images in memory, drawn anew in each step, and Adam in one pass."""
    return Runner(_Iwae(setting, sampled_loss).epoch)


def compiled_iwae(setting: Setting) -> Runner:
    """The same under torch.compile, which uses CUDA graphs on a GPU."""
    mode = "reduce-overhead" if DEVICE.type == "cuda" else None
    return Runner(_Iwae(setting, torch.compile(sampled_loss, dynamic=False, mode=mode)).epoch)


class _Iwae(InMemoryTraining):
    def __init__(self, setting: Setting, loss: Callable[..., Tensor]):
        torch.manual_seed(0)
        model = MLP((200, 200), 50, activation="tanh").to(DEVICE)
        for name, parameter in model.named_parameters():
            if name.endswith("weight"):
                torch.nn.init.xavier_uniform_(parameter)
            else:
                torch.nn.init.zeros_(parameter)

        def of_batch(model: MLP, batch: Tensor) -> Tensor:
            eps = torch.randn(len(batch), setting.samples, 50, device=DEVICE)
            return loss(model, torch.bernoulli(batch), eps, "iwae")

        super().__init__(model, pixels(setting).to(DEVICE), setting.batch_size, of_batch, eps=1e-4)


def pythae_trainer(setting: Setting) -> Runner:
    """pythae's own trainer; its VAE has the encoder and decoder of this model."""
    from pythae.data.datasets import BaseDataset  # pyright: ignore[reportMissingImports]
    from pythae.models import VAE as PythaeVAE  # pyright: ignore[reportMissingImports]
    from pythae.models import VAEConfig  # pyright: ignore[reportMissingImports]
    from pythae.models.base.base_utils import ModelOutput  # pyright: ignore[reportMissingImports]
    from pythae.models.nn import BaseDecoder, BaseEncoder  # pyright: ignore[reportMissingImports]
    from pythae.trainers import BaseTrainer, BaseTrainerConfig  # pyright: ignore[reportMissingImports]

    logging.disable(logging.INFO)
    torch.manual_seed(0)

    class Encoder(BaseEncoder):
        def __init__(self):
            super().__init__()
            self.fc1 = torch.nn.Linear(784, setting.hidden_dim)
            self.fc2_mu = torch.nn.Linear(setting.hidden_dim, setting.latent_dim)
            self.fc2_logvar = torch.nn.Linear(setting.hidden_dim, setting.latent_dim)

        def forward(self, x: Tensor) -> ModelOutput:
            h = F.relu(self.fc1(x))
            return ModelOutput(embedding=self.fc2_mu(h), log_covariance=self.fc2_logvar(h))

    class Decoder(BaseDecoder):
        def __init__(self):
            super().__init__()
            self.fc1 = torch.nn.Linear(setting.latent_dim, setting.hidden_dim)
            self.fc2 = torch.nn.Linear(setting.hidden_dim, 784)

        def forward(self, z: Tensor) -> ModelOutput:
            return ModelOutput(reconstruction=torch.sigmoid(self.fc2(F.relu(self.fc1(z)))))

    train_images = pixels(setting)
    model = PythaeVAE(
        VAEConfig(input_dim=(784,), latent_dim=setting.latent_dim, reconstruction_loss="bce"), Encoder(), Decoder()
    )
    with tempfile.TemporaryDirectory() as folder:  # the trainer makes a folder in it now, and uses none in its steps
        trainer = BaseTrainer(
            model,
            BaseDataset(train_images, torch.zeros(len(train_images))),
            training_config=BaseTrainerConfig(
                output_dir=folder, per_device_train_batch_size=setting.batch_size, learning_rate=1e-3
            ),
        )
        trainer.prepare_training()
    epoch = 0

    def run() -> float:
        nonlocal epoch
        epoch += 1
        # The mean over the batches of each batch's mean loss.
        return float(trainer.train_step(epoch))

    return Runner(run)
