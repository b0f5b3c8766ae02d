"""export: a run's weights as a PyTorch file, and what it never replaces."""

import subprocess
import sys

import pytest
import torch

from torch_ref import convert
from vae_jax import InputError, TrainConfig, fit
from vae_jax.config import ConvertConfig, ExportConfig
from vae_jax.export import export


@pytest.fixture
def run(tmp_path, few_images_file):
    """The folder of a run that was stopped after its last checkpoint."""
    config = TrainConfig(
        data=str(few_images_file),
        epochs=1,
        hidden_dim=8,
        latent_dim=3,
        workdir=tmp_path / "run",
        export=tmp_path / "vae.pth",
    )
    fit(config)
    (config.workdir / "model.pth").unlink()
    return config.workdir


def test_a_checkpoint_becomes_a_pytorch_file(run, tmp_path, capsys):
    expected = torch.load(tmp_path / "vae.pth", weights_only=True)
    out = tmp_path / "deep" / "best.safetensors"
    export(ExportConfig(run, out, checkpoint="best", layout="fc-mu"))
    found = convert.read(out)
    assert "encoder.fc_mu.weight" in found
    for name, tensor in convert.load(out).items():
        assert torch.equal(tensor, expected[name])
    lines = capsys.readouterr().out.splitlines()
    assert "has not finished; using its best checkpoint, after epoch 1, test loss" in lines[-2]
    assert lines[-1] == f"saved {out}: for torch_ref.model.VAE(8, 3, 784), layout fc-mu"
    export(ExportConfig(run, tmp_path / "newest.pth"))
    assert (tmp_path / "newest.pth").read_bytes() == (tmp_path / "vae.pth").read_bytes()


def test_no_file_of_the_run_is_replaced(run, tmp_path):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    (tmp_path / "link.pth").symlink_to(run / "model.pth")
    for out in (
        run / "model.pth",
        run / "checkpoints/5.safetensors",
        run / "checkpoints/new.pth",
        tmp_path / "link.pth",
    ):
        with pytest.raises(InputError, match=rf"--out {out}: is a file of the run itself"):
            export(ExportConfig(run, out))
    with pytest.raises(InputError, match=r"expected a name that ends in \.pth"):
        export(ExportConfig(run, tmp_path / "vae.txt"))
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_convert_points_to_it(run, tmp_path):
    with pytest.raises(InputError, match=rf"python -m vae_jax.export {run} --out {tmp_path}/x.pth --layout fc-mu$"):
        convert.convert(ConvertConfig(run, tmp_path / "x.pth", layout="fc-mu"))


def test_command_line_refuses_in_one_line(tmp_path):
    command = [sys.executable, "-m", "vae_jax.export", str(tmp_path), "--out", str(tmp_path / "x.pth")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
