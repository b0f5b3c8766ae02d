"""The PyTorch side on its own."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from torch_ref.model import VAE
from torch_ref.train import TorchTrainConfig, fit, losses
from vae_jax.config import NonFiniteLossError


def test_the_documented_model():
    model = VAE()
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert shapes == {
        "encoder.fc1.weight": (400, 784), "encoder.fc1.bias": (400,),
        "encoder.fc2_mu.weight": (20, 400), "encoder.fc2_mu.bias": (20,),
        "encoder.fc2_logvar.weight": (20, 400), "encoder.fc2_logvar.bias": (20,),
        "decoder.fc1.weight": (400, 20), "decoder.fc1.bias": (400,),
        "decoder.fc2.weight": (784, 400), "decoder.fc2.bias": (784,),
    }  # fmt: skip
    assert sum(tensor.numel() for tensor in model.parameters()) == 652_824


def test_noise_is_drawn_where_none_is_given():
    model = VAE()
    images = torch.rand(4, 784)
    torch.manual_seed(1)
    recon, mu, logvar = model(images)
    torch.manual_seed(1)
    eps = torch.randn(4, 20)
    assert torch.equal(recon, model(images, eps)[0])
    assert torch.allclose(model.reparameterize(mu, logvar, eps), mu + torch.exp(logvar / 2) * eps)
    assert recon.min() > 0
    assert recon.max() < 1


def test_losses_by_hand():
    half, images = torch.full((2, 3), 0.5), torch.tensor([[0.0, 1.0, 0.3]] * 2)
    bce, kld = losses(half, images, torch.full((2, 4), 2.0), torch.zeros(2, 4))
    assert bce.item() == pytest.approx(6 * 0.693147, rel=1e-6)
    assert kld.item() == pytest.approx(2 * 4 * 2.0)


def test_training(tmp_path, mnist):
    np.savez(tmp_path / "few.npz", train_images=mnist.train_images[:6000], test_images=mnist.test_images[:1000])
    config = TorchTrainConfig(
        data=str(tmp_path / "few.npz"), epochs=1, hidden_dim=32, latent_dim=4, batch_size=50,
        workdir=tmp_path / "run", export=tmp_path / "vae.pth",
    )  # fmt: skip
    model, (metrics,) = fit(config)
    assert 100 < metrics.test_loss < metrics.train_loss < 360
    assert metrics.train_loss == pytest.approx(metrics.train_bce + metrics.train_kld, rel=1e-12)
    assert json.loads((tmp_path / "run/metrics.jsonl").read_text())["epoch"] == 1
    loaded = torch.load(tmp_path / "vae.pth", weights_only=True)
    assert all(torch.equal(loaded[key], tensor) for key, tensor in model.state_dict().items())


def test_a_diverging_run_stops_without_export(tmp_path):
    config = TorchTrainConfig(
        epochs=1, hidden_dim=4, latent_dim=2, batch_size=20_000, learning_rate=1e30, workdir=tmp_path / "run",
        export=tmp_path / "vae.pth",
    )  # fmt: skip
    with pytest.raises(NonFiniteLossError, match="epoch 1, after its last step: the training loss is nan"):
        fit(config)
    assert not (tmp_path / "vae.pth").exists()


@pytest.mark.parametrize("module", ["model", "convert", "train"])
def test_no_jax(module):
    check = f"import sys; sys.modules['jax'] = None; import torch_ref.{module}"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_command_refuses_like_the_other(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "torch_ref.train", "--hidden-dim", "0"], cwd=tmp_path, capture_output=True, text=True
    )
    expected = "error: --hidden-dim 0: expected a whole number from 1 to 2147483647; the default is 400\n"
    assert (result.returncode, result.stdout, result.stderr) == (2, "", expected)
    assert not list(tmp_path.iterdir())
