"""The PyTorch side without jax; and its commands, which answer before torch is imported."""

import subprocess
import sys
import textwrap

import pytest
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


@pytest.mark.parametrize(
    "module", ["causes", "convert", "layouts", "model", "optimizer", "parity", "pickles", "rules", "train"]
)
def test_no_jax_is_imported(module):
    code = f"import sys; import torch_ref.{module}; assert not {{'jax', 'flax', 'optax'}} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("module", ["convert", "parity", "train"])
def test_help_does_not_wait_for_torch(module):
    code = f"""
import runpy, sys

class Refuse:
    def find_spec(self, name, *_):
        assert name != "torch"

sys.argv = ["", "--help"]
sys.meta_path.insert(0, Refuse())
runpy.run_module("torch_ref.{module}", run_name="__main__")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"usage: python -m torch_ref.{module} ")
