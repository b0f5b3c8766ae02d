"""Weights files: written whole, read back bit for bit, and the command that rewrites them."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

from torch_ref import convert
from torch_ref.model import VAE
from vae_jax.config import ConvertConfig
from vae_jax.system.errors import InputError, WeightsError


@pytest.fixture
def state_dict():
    torch.manual_seed(0)
    return VAE(hidden_dim=6, latent_dim=2, pixels=9).state_dict()


def test_the_file_is_plain(state_dict, tmp_path):
    path = tmp_path / "vae.pth"
    convert.save(convert.to_state_dict(convert.to_params(state_dict)), path)
    loaded = torch.load(path, weights_only=True)
    assert list(loaded) == list(state_dict)
    for tensor in loaded.values():
        assert type(tensor) is torch.Tensor
        assert tensor.is_contiguous()
        assert not tensor.requires_grad
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    VAE(6, 2, 9).load_state_dict(loaded, strict=True)


def test_what_is_no_regular_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")
    (tmp_path / "link.pth").symlink_to("/dev/zero")
    (tmp_path / "empty.pth").touch()
    for name in ("pipe.pth", "link.pth", "empty.pth", "."):
        with pytest.raises(WeightsError, match="is empty, or not a regular file; name a weights file"):
            convert.load(tmp_path / name)
    with pytest.raises(WeightsError, match="cannot be read"):
        convert.load(tmp_path / ("x" * 5000))


def test_a_file_too_large_for_the_memory_is_not_read(tmp_path):
    for name in ("large.pth", "large.safetensors"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(1 << 42)  # it takes no room on the disk
        with pytest.raises(WeightsError, match=r"takes 4,398.0 GB; expected at most .* an eighth of the memory"):
            convert.load(tmp_path / name)


def test_a_long_safetensors_header_is_not_read(tmp_path):
    path = tmp_path / "long.safetensors"
    path.write_bytes((2 << 20).to_bytes(8, "little") + b"{" + b" " * (2 << 20))
    with pytest.raises(WeightsError, match="its header is too long"):
        convert.load(path)


def test_an_interrupted_save_leaves_the_old_file(tmp_path, state_dict, monkeypatch):
    path = tmp_path / "vae.pth"
    convert.save(state_dict, path)
    before = path.read_bytes()

    def interrupted(_, file):
        file.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert.save(state_dict, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_saving_through_a_link(tmp_path, state_dict):
    (tmp_path / "link.pth").symlink_to(tmp_path / "real.pth")
    convert.save(state_dict, tmp_path / "link.pth")
    assert (tmp_path / "link.pth").is_symlink()
    assert convert.load(tmp_path / "real.pth").keys() == state_dict.keys()


def test_safetensors_there_and_back(state_dict, tmp_path):
    path = tmp_path / "vae.safetensors"
    convert.save(state_dict, path)
    for loaded in (convert.load(path), safetensors.torch.load_file(path)):
        assert loaded.keys() == state_dict.keys()
        assert all(torch.equal(loaded[key], state_dict[key]) for key in state_dict)
    assert [file.name for file in tmp_path.iterdir()] == ["vae.safetensors"]
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}  # other programs look for it


def test_safetensors_are_held_to_the_same(state_dict, tmp_path):
    path = tmp_path / "vae.safetensors"
    bias = state_dict["decoder.fc1.bias"]
    faults = {
        "missing from the state dict": {key: state_dict[key] for key in list(state_dict)[1:]},
        "unknown in the state dict": state_dict | {"extra": bias.clone()},
        "has shape": state_dict | {"decoder.fc1.bias": torch.zeros(9)},
        "has type torch.float64": state_dict | {"decoder.fc1.bias": bias.double()},
        "NaN": state_dict | {"decoder.fc1.bias": bias * np.nan},
    }
    for message, faulty in faults.items():
        safetensors.torch.save_file(faulty, path)
        with pytest.raises(WeightsError, match=message):
            convert.load(path)


def test_files_that_are_no_safetensors(state_dict, tmp_path):
    path = tmp_path / "vae.safetensors"
    with pytest.raises(WeightsError, match="cannot be read"):
        convert.load(path)
    path.write_bytes(b"something else")
    with pytest.raises(WeightsError, match=r"safetensors.torch.save_file\(model.state_dict\(\)\)"):
        convert.load(path)
    convert.save(state_dict, path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(WeightsError, match="is not a file of plain tensors"):
        convert.load(path)


def test_the_command_converts_to_safetensors_and_layouts(state_dict, tmp_path):
    convert.save(state_dict, tmp_path / "vae.pth")
    convert.convert(ConvertConfig(tmp_path / "vae.pth", tmp_path / "vae.safetensors", "fc-mu"))
    assert "encoder.fc_mu.weight" in safetensors.torch.load_file(tmp_path / "vae.safetensors")
    loaded = convert.load(tmp_path / "vae.safetensors")
    assert all(torch.equal(loaded[key], state_dict[key]) for key in state_dict)


@pytest.mark.parametrize("name", ["b.onnx", "b", "b.pth.tar"])
def test_other_suffixes_are_refused(name, state_dict, tmp_path):
    convert.save(state_dict, tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"expected a name that ends in \.pth, \.pt, \.safetensors") as caught:
        convert.convert(ConvertConfig(tmp_path / "a.pth", tmp_path / name))
    assert str(caught.value).startswith(f"OUT.pth {tmp_path / name}: ")
    assert [file.name for file in tmp_path.iterdir()] == ["a.pth"]


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "torch_ref.convert", *map(str, arguments)], capture_output=True, text=True
    )


def test_a_file_to_replace_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "vae.pth").write_bytes(b"PK")

    def refuse(path, _mode):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match=r"--export .*vae.pth: cannot be read \(Permission denied\); name another"):
        convert.require_weights_file("--export", tmp_path / "vae.pth")


def test_command(tmp_path, state_dict):
    torch.save(state_dict, tmp_path / "in.pth")
    result = run(tmp_path / "in.pth", tmp_path / "out.pth", "--layout", "pytorch-examples")
    assert result.returncode == 0, result.stderr
    assert "9-6-2" in result.stdout
    assert sorted(torch.load(tmp_path / "out.pth", weights_only=True))[:2] == ["fc1.bias", "fc1.weight"]

    result = run(tmp_path / "missing.pth", tmp_path / "other.pth")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {tmp_path / 'missing.pth'}: cannot be read (No such file")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "other.pth").exists()
