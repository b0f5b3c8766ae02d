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
    assert len(snippets) >= 3
    for snippet in snippets:
        names: dict = {}
        exec(snippet, names)
        if "digits" in names:
            assert names["digits"].shape == (16, 784)
            assert 0 < names["digits"].min() < names["digits"].max() < 1
        if "recon" in names:
            assert names["recon"].shape == (8, 784)
    assert "nats per image" in capsys.readouterr().out


def test_no_placeholder_is_left():
    assert not re.findall(r"^[A-Z]{5,}$", README, re.MULTILINE)


def test_links_lead_to_files():
    root = Path(__file__).parent.parent
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README) + re.findall(
        r"`((?:vae_jax|tests)/[\w/]+\.py)`", README
    ):
        assert (root / target).exists(), target
