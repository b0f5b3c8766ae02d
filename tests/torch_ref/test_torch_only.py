"""What a PyTorch user does with a trained model, without jax; and .safetensors files."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import safetensors.torch
import torch

import torch_ref
from torch_ref import convert
from torch_ref.model import VAE


@pytest.fixture
def state_dict():
    torch.manual_seed(0)
    return VAE(8, 3, 16).state_dict()


def snippet() -> str:
    """The lines of code that `torch_ref` documents."""
    lines = (torch_ref.__doc__ or "").splitlines()
    return textwrap.dedent("\n".join(line for line in lines if line.startswith("    ")))


def test_the_documented_snippet_runs_without_jax(state_dict, tmp_path):
    convert.save(state_dict, tmp_path / "vae.pth")
    assert 5 <= len(snippet().splitlines()) <= 10
    # None in sys.modules makes an import raise.
    code = 'import sys\nsys.modules.update({"jax": None, "flax": None, "optax": None})\n' + snippet()
    code += "\nassert samples.shape == (64, 16) and recon.shape == (8, 16) and mu.shape == (8, 3)"
    code += "\nassert 0 <= samples.min() and samples.max() <= 1"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_safetensors_there_and_back(state_dict, tmp_path):
    path = tmp_path / "vae.safetensors"
    convert.save(state_dict, path)
    for loaded in (convert.load(path), safetensors.torch.load_file(path)):
        assert loaded.keys() == state_dict.keys()
        assert all(torch.equal(loaded[key], state_dict[key]) for key in state_dict)
    assert [file.name for file in tmp_path.iterdir()] == ["vae.safetensors"]


def test_the_command_converts_to_safetensors_and_layouts(state_dict, tmp_path):
    convert.save(state_dict, tmp_path / "vae.pth")
    convert.convert(convert.ConvertConfig(tmp_path / "vae.pth", tmp_path / "vae.safetensors", "fc-mu"))
    assert "encoder.fc_mu.weight" in safetensors.torch.load_file(tmp_path / "vae.safetensors")
    loaded = convert.load(tmp_path / "vae.safetensors")
    assert all(torch.equal(loaded[key], state_dict[key]) for key in state_dict)


def test_safetensors_are_held_to_the_same(state_dict, tmp_path):
    path = tmp_path / "vae.safetensors"
    bias = state_dict["decoder.fc1.bias"]
    faults = {
        "missing from the state dict": {key: state_dict[key] for key in list(state_dict)[1:]},
        "unknown in the state dict": state_dict | {"extra": bias.clone()},
        "has shape": state_dict | {"decoder.fc1.bias": torch.zeros(9)},
        "has type torch.float16": state_dict | {"decoder.fc1.bias": bias.half()},
        "NaN": state_dict | {"decoder.fc1.bias": bias * np.nan},
    }
    for message, faulty in faults.items():
        safetensors.torch.save_file(faulty, path)
        with pytest.raises(convert.WeightsError, match=message):
            convert.load(path)


def test_files_that_are_no_safetensors(state_dict, tmp_path):
    path = tmp_path / "vae.safetensors"
    with pytest.raises(convert.WeightsError, match="cannot be read"):
        convert.load(path)
    torch.save(state_dict, path)
    with pytest.raises(convert.WeightsError, match=r"safetensors.torch.save_file\(model.state_dict\(\)\)"):
        convert.load(path)
    convert.save(state_dict, path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(convert.WeightsError, match="is not a file of plain tensors"):
        convert.load(path)
