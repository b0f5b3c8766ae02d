"""README's snippets run as they stand, in the order they stand in, next to a vae.pth."""

import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from tests.runs.small_runs import quicken
from torch_ref.model import VAE
from vae_jax import TrainConfig, fit, load
from vae_jax.runs.trained import read

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_snippets(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(VAE().state_dict(), "vae.pth")
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    plain, with_class, own_model, library = ({} for _ in snippets)
    for snippet, names in zip(snippets, (plain, with_class, own_model, library), strict=True):
        exec(snippet, names)
    for names in (plain, with_class):
        assert names["digits"].shape == (16, 784)
        assert 0 < names["digits"].min() < names["digits"].max() < 1
    assert with_class["recon"].shape == library["recon"].shape == (8, 784)
    assert "nats per image" in capsys.readouterr().out


def test_the_model_of_your_own_trains_by_command(tmp_path, monkeypatch, few_images_file):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    quicken(monkeypatch)
    (snippet,) = re.findall(r"```python\n([^`]*class ConvVAE.*?)```", README, re.DOTALL)
    Path("conv_vae.py").write_text(snippet)
    options = {"model": "conv_vae:ConvVAE", "model_options": '{"latent_dim": 3, "features": 2}', "epochs": 1}
    config = TrainConfig(data=str(few_images_file), workdir=Path("run"), export=Path("conv.pth"), **options)
    fit(config)
    weights = torch.load("conv.pth", weights_only=True)
    trained = read(config.workdir)
    images = load(few_images_file).test_images[:5].reshape(5, -1)
    mu, _ = trained.encode(images)

    # SAME is a pixel on each side, for a kernel of 4 and a stride of 2.
    x = torch.tensor(images / 255, dtype=torch.float32).reshape(-1, 1, 28, 28)
    for name in ("conv1", "conv2"):
        x = F.relu(F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride=2, padding=1))
    heads = F.linear(x.permute(0, 2, 3, 1).reshape(5, -1), weights["heads.weight"], weights["heads.bias"])
    np.testing.assert_allclose(mu, heads[:, :3], atol=1e-5)
    z = torch.tensor(mu)
    x = F.relu(F.linear(z, weights["unpack.weight"], weights["unpack.bias"])).reshape(5, 7, 7, 4).permute(0, 3, 1, 2)
    for name, activation in (("deconv1", F.relu), ("deconv2", torch.sigmoid)):
        x = F.conv_transpose2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride=2, padding=1)
        x = activation(x)
    np.testing.assert_allclose(trained.decode(mu), x.reshape(5, -1), atol=1e-5)


def test_links_lead_to_files():
    root = Path(__file__).parent.parent
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README) + re.findall(
        r"`((?:vae_jax|torch_ref|benchmarks|tests)/[\w/]+\.py)`", README
    ):
        assert (root / target).exists(), target
