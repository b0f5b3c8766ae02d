"""README's snippets run as they stand, in the order they stand in, next to a vae.pth."""

import re
from pathlib import Path

import torch

from torch_ref.model import VAE

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_snippets(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(VAE().state_dict(), "vae.pth")
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    plain, with_class, library = ({} for _ in snippets)
    for snippet, names in zip(snippets, (plain, with_class, library), strict=True):
        exec(snippet, names)
    for names in (plain, with_class):
        assert names["digits"].shape == (16, 784)
        assert 0 < names["digits"].min() < names["digits"].max() < 1
    assert with_class["recon"].shape == library["recon"].shape == (8, 784)
    assert "nats per image" in capsys.readouterr().out


def test_links_lead_to_files():
    root = Path(__file__).parent.parent
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README) + re.findall(
        r"`((?:vae_jax|torch_ref|benchmarks|tests)/[\w/]+\.py)`", README
    ):
        assert (root / target).exists(), target
