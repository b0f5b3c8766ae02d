"""The documented PyTorch training script, as a function and as a command."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from torch_ref.train import PixelSet, fit, losses
from vae_jax.config import TorchTrainConfig
from vae_jax.system.errors import InputError, NonFiniteLossError

LINE = re.compile(
    r"epoch +(\d+)/(\d+)  train loss ([\d.]+) = bce ([\d.]+) \+ (?:0\.5 \* )?kld ([\d.]+)  test loss ([\d.]+)  [\d.]+ s"
)


@pytest.fixture(scope="module")
def few(mnist, tmp_path_factory):
    """A file with the first images of MNIST."""
    path = tmp_path_factory.mktemp("few") / "few.npz"
    np.savez(path, train_images=mnist.train_images[:6000], test_images=mnist.test_images[:1000])
    return path


def test_losses_by_hand():
    half, images = torch.full((2, 3), 0.5), torch.tensor([[0.0, 1.0, 0.3]] * 2)
    bce, kld = losses(half, images, torch.full((2, 4), 2.0), torch.zeros(2, 4))
    assert bce.item() == pytest.approx(6 * 0.693147, rel=1e-6)
    assert kld.item() == pytest.approx(2 * 4 * 2.0)


def test_training(few, tmp_path, capsys):
    config = TorchTrainConfig(
        data=str(few), epochs=1, hidden_dim=32, latent_dim=4, batch_size=50, export=tmp_path / "vae.pth"
    )
    model, (epoch,) = fit(config)
    assert 100 < epoch.test_loss < epoch.train_loss < 360
    assert epoch.train_loss == pytest.approx(epoch.train_bce + epoch.train_kld, rel=1e-12)
    loaded = torch.load(tmp_path / "vae.pth", weights_only=True)
    assert all(torch.equal(loaded[key], tensor) for key, tensor in model.state_dict().items())
    assert [file.name for file in tmp_path.iterdir()] == ["vae.pth"]
    first, line, last = capsys.readouterr().out.splitlines()
    assert first == "losses: nats per image; cross entropy of grey pixels"
    assert last == f"saved {tmp_path / 'vae.pth'}"
    found = LINE.fullmatch(line)
    assert found and found[1] == found[2] == "1"
    loss, bce, kld, test_loss = map(float, found.groups()[2:])
    assert (loss, bce, test_loss) == tuple(round(v, 2) for v in (epoch.train_loss, epoch.train_bce, epoch.test_loss))
    assert round(bce + kld, 2) == loss  # as printed
    assert kld == pytest.approx(epoch.train_kld, abs=0.011)


def test_the_line_shows_the_kld_itself(few, tmp_path, capsys):
    config = TorchTrainConfig(
        data=str(few), epochs=10, hidden_dim=4, latent_dim=2, batch_size=3000, beta=0.5, binarize="static",
        export=tmp_path / "vae.pth",
    )  # fmt: skip
    _, history = fit(config)
    first, *lines, _ = capsys.readouterr().out.splitlines()
    assert first == "losses: nats per image; cross entropy of binary pixels"
    assert len(lines) == len(history) == 10
    assert lines[0].startswith("epoch  1/10  train loss ") and lines[-1].startswith("epoch 10/10  train loss ")
    for line, epoch in zip(lines, history, strict=True):
        assert f"bce {epoch.train_bce:.2f} + 0.5 * kld {epoch.train_kld:.2f}  test loss" in line
        assert epoch.train_loss == pytest.approx(epoch.train_bce + 0.5 * epoch.train_kld, rel=1e-12)


def test_the_same_seed_gives_the_same_model(few, tmp_path):
    config = TorchTrainConfig(data=str(few), epochs=1, hidden_dim=4, latent_dim=2, seed=3, export=tmp_path / "vae.pth")
    states = [fit(config)[0].state_dict() for _ in range(2)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_set_of_pixels(mnist):
    images = mnist.test_images[:8]
    grey = torch.stack([PixelSet(images)[number][0] for number in range(8)])
    assert torch.equal(grey, torch.from_numpy(images.reshape(8, -1)).float() / 255)
    static, dynamic = PixelSet(images, "static"), PixelSet(images, "dynamic")
    assert torch.equal(static[0][0], static[0][0])
    assert not torch.equal(dynamic[0][0], dynamic[0][0])
    assert set(dynamic[0][0].unique().tolist()) == {0, 1}


def test_a_diverging_run_stops_without_export(few, tmp_path):
    config = TorchTrainConfig(
        data=str(few), epochs=1, hidden_dim=4, latent_dim=2, batch_size=2000, learning_rate=1e30,
        export=tmp_path / "vae.pth",
    )  # fmt: skip
    with pytest.raises(NonFiniteLossError, match="epoch 1: the loss is not finite; nothing exported; try a lower"):
        fit(config)
    assert not list(tmp_path.iterdir())


def test_an_export_that_cannot_be_written_is_refused_first(few, tmp_path):
    with pytest.raises(InputError, match=f"--export {tmp_path}: is not a regular file"):
        fit(TorchTrainConfig(data="no such set", export=tmp_path))
    with pytest.raises(InputError, match=f"--export {few}: this command reads that file"):
        fit(TorchTrainConfig(data=str(few), export=few))


def test_command_refuses_like_the_other(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "torch_ref.train", "--hidden-dim", "0"], cwd=tmp_path, capture_output=True, text=True
    )
    expected = "error: --hidden-dim 0: expected a whole number from 1 to 2147483647; the default is 400\n"
    assert (result.returncode, result.stdout, result.stderr) == (2, "", expected)
    assert not list(tmp_path.iterdir())
