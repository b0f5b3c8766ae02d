"""Whole runs: what they print, what they leave behind, and that a seed decides everything."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

import vae_jax.train
from torch_ref.model import VAE as TorchVAE
from torch_ref.train import losses as torch_losses
from vae_jax import Dataset, TrainConfig, fit
from vae_jax.runs.feed import Feed

KEYS = ["epoch", "train_loss", "train_bce", "train_kld", "test_loss", "test_bce", "test_kld", "seconds", "pixels"]


def small(folder: Path, **options) -> TrainConfig:
    """A model that trains for an epoch on all of MNIST in half a second."""
    options = {"epochs": 1, "hidden_dim": 16, "latent_dim": 4, "batch_size": 500} | options
    return TrainConfig(workdir=folder / "run", export=folder / "vae.pth", **options)


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """A run as a user types it, its output not a terminal: (folder, standard output and error together)."""
    folder = tmp_path_factory.mktemp("command")
    options = ["--epochs=2", "--hidden-dim=64", "--latent-dim=5", "--workdir=run", "--export=out/vae.pth"]
    result = subprocess.run(
        [sys.executable, "-m", "vae_jax.train", *options], cwd=folder, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return folder, result.stdout + result.stderr


def test_what_a_run_prints(command):
    folder, output = command
    assert not set(output) & {"\r", "\x1b", "\b"}
    lines = output.splitlines()
    assert lines[0].startswith("mnist: 60,000 training, 10,000 test images, 28 x 28; ")
    assert lines[1] == "losses: nats per image; cross entropy of grey pixels, not a log-likelihood"
    assert lines[-1] == 'saved out/vae.pth; load it with torch.load("out/vae.pth", weights_only=True)'
    metrics = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3 + len(metrics)
    for line, epoch in zip(lines[2:-1], metrics, strict=True):
        words = line.split()
        assert words[:2] == ["epoch", f"{epoch['epoch']}/2"] and words[-1] in ("s", "ms")
        loss, bce, kld, test_loss = (float(words[number]) for number in (4, 7, 10, 13))
        assert round(100 * loss) == round(100 * bce) + round(100 * kld)
        assert loss == pytest.approx(epoch["train_loss"], abs=0.0051)
        assert bce == pytest.approx(epoch["train_bce"], abs=0.0051)
        assert test_loss == pytest.approx(epoch["test_loss"], abs=0.0051)


def test_what_a_run_leaves_behind(command):
    folder, _ = command
    found = [path for path in folder.rglob("*") if "checkpoints" not in path.parts[:-1]]
    assert sorted(path.name for path in found) == [
        ".lock", "checkpoints", "config.json", "curves.png", "metrics.jsonl", "model.pth", "out",
        "reconstructions.png", "run", "samples.png", "vae.pth",
    ]  # fmt: skip
    assert [path.name for path in (folder / "run/checkpoints").iterdir()] == ["938.safetensors"]
    config = json.loads((folder / "run/config.json").read_text())
    described = {name: config.pop(name) for name in ("versions", "device", "checksum", "parameter_shapes")}
    assert all(described.values())
    assert config == {
        "data": "mnist", "epochs": 2, "batch_size": 128, "learning_rate": 0.001, "hidden_dim": 64, "latent_dim": 5,
        "beta": 1.0, "seed": 0, "workdir": "run", "export": "out/vae.pth", "pictures_every": 0, "tensorboard": False,
        "overwrite": False, "data_dir": None, "binarize": "none", "max_data_gb": None,
        "checkpoint_every": 60.0, "matmul_precision": "highest", "init": None,
        "learning_rate_schedule": "constant", "patience": 0, "keep": "last", "shards": 1, "devices": None,
        "coordinator": None, "processes": None, "process": None, "initialization_timeout": 60, "heartbeat": 30.0,
        "image_size": None, "grey": False, "stream": "auto", "image_order": "shuffled",
        "adam_b1": 0.9, "adam_eps": 1e-8, "hidden_dims": [], "activation": "relu", "initialization": "torch",
        "model": None, "model_options": "{}", "objective": "elbo", "training_samples": 1, "kl_warmup": 0,
        "image_shape": [28, 28], "pixels": "grey",
    }  # fmt: skip
    metrics = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    for number, epoch in enumerate(metrics, 1):
        assert list(epoch) == KEYS
        assert epoch["epoch"] == number
        for split in ("train", "test"):
            assert epoch[f"{split}_loss"] == pytest.approx(epoch[f"{split}_bce"] + epoch[f"{split}_kld"], rel=1e-12)
        assert 0 < epoch["seconds"] < 600
    assert metrics[1]["train_loss"] < metrics[0]["train_loss"] < 220
    assert metrics[1]["test_loss"] < metrics[0]["test_loss"] < 180


def test_pytorch_finds_the_same_test_loss(command, mnist):
    folder, _ = command
    model = TorchVAE(hidden_dim=64, latent_dim=5)
    model.load_state_dict(torch.load(folder / "out/vae.pth", weights_only=True), strict=True)
    images = torch.from_numpy(mnist.test_images.reshape(10000, 784)).float() / 255
    torch.manual_seed(0)
    with torch.no_grad():
        recon, mu, logvar = model(images)
        bce, kld = (part.item() / 10000 for part in torch_losses(recon, images, mu, logvar))
    last = json.loads((folder / "run/metrics.jsonl").read_text().splitlines()[-1])
    # Other noise: the standard error of the difference is about 0.02 nats in the first, none in the second.
    assert bce == pytest.approx(last["test_bce"], abs=0.2)
    assert kld == pytest.approx(last["test_kld"], rel=1e-5)


def test_a_seed_decides_the_model(tmp_path):
    params, metrics = zip(
        *((jax.device_get(state.params), history) for state, history in (
            fit(small(tmp_path / str(number), seed=seed)) for number, seed in enumerate((0, 0, 1))
        )),
        strict=True,
    )  # fmt: skip
    first, again, other = (np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)]) for tree in params)
    assert first.tobytes() == again.tobytes()
    assert np.mean(first == other) < 0.01
    assert metrics[0][0].train_loss == metrics[1][0].train_loss != metrics[2][0].train_loss
    assert (tmp_path / "0/vae.pth").read_bytes() == (tmp_path / "1/vae.pth").read_bytes()


def test_averages_are_over_all_images(tmp_path, mnist):
    # With weights that never change, the averages of an epoch are those of the fresh model, whatever the batches.
    some = Dataset(*(array[:6000] for array in mnist))
    histories = [
        fit(small(tmp_path / str(batch_size), batch_size=batch_size, learning_rate=1e-30), some)[1]
        for batch_size in (700, 10**9)
    ]
    for history in histories:
        assert history[0].train_loss == pytest.approx(histories[0][0].train_loss, abs=0.1)
        assert history[0].train_kld == pytest.approx(histories[0][0].train_kld, rel=1e-5)
        assert history[0].train_loss == pytest.approx(history[0].test_loss, rel=0.01)


def test_beta_in_the_files(tmp_path):
    _, (metrics,) = fit(small(tmp_path, beta=3.0))
    assert metrics.train_loss == pytest.approx(metrics.train_bce + 3 * metrics.train_kld, rel=1e-12)
    assert metrics.test_loss == pytest.approx(metrics.test_bce + 3 * metrics.test_kld, rel=1e-12)


@pytest.mark.parametrize("precision", ["highest", "high", "default"])
def test_precision_of_matrix_products(precision, tmp_path, monkeypatch):
    programs = []

    def lower(*_, **__):
        programs.append(jax.jit(jax.numpy.dot).lower(*2 * [jax.numpy.eye(2)]).as_text())
        raise KeyboardInterrupt

    monkeypatch.setattr(Feed, "compile_ahead", lower)
    with pytest.raises(KeyboardInterrupt):
        fit(small(tmp_path, matmul_precision=precision))
    assert f"precision = [{precision.upper()}, {precision.upper()}]" in programs[0]


def test_overwrite_replaces_the_run_and_nothing_else(tmp_path):
    config = small(tmp_path, overwrite=True)
    config.workdir.mkdir()
    (config.workdir / "metrics.jsonl").write_text("old\n")
    (config.workdir / "notes.txt").write_text("mine")
    fit(config)
    assert len((config.workdir / "metrics.jsonl").read_text().splitlines()) == 1
    assert "old" not in (config.workdir / "metrics.jsonl").read_text()
    assert (config.workdir / "notes.txt").read_text() == "mine"


def test_a_diverging_run_stops_without_export(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("vae.pth").write_bytes(b"PK\3\4 of an older model")
    options = ["--hidden-dim=16", "--latent-dim=4", "--batch-size=500", "--learning-rate=1e30"]
    monkeypatch.setattr(sys, "argv", ["train", *options])
    with pytest.raises(SystemExit) as stopped:
        vae_jax.train.main()
    assert stopped.value.code == 1
    assert Path("vae.pth").read_bytes() == b"PK\3\4 of an older model"
    output = capsys.readouterr()
    assert output.err.startswith("error: epoch 1, step 2: the training loss is nan; ")
    assert output.err.count("\n") == 1
    assert "saved" not in output.out


def test_a_run_needs_nothing_that_only_posix_has(tmp_path):
    script = """
import os, sys, signal
import flax, jax, matplotlib.figure, optax, psutil, torch, tqdm, vae_jax
from vae_jax.runs import checkpoint, feed
from vae_jax.pictures import plots
for name in ("sysconf", "kill", "killpg", "fork", "getuid", "geteuid", "getpgid", "setsid", "statvfs", "fchmod"):
    delattr(os, name)
for name in ("SIGHUP", "SIGKILL", "SIGUSR1", "SIGSTOP", "SIGALRM", "setitimer", "pthread_sigmask"):
    delattr(signal, name)
open_file = os.open
def open_no_folder(path, *args, **keywords):
    if os.path.isdir(path) and ".part-" not in str(path):  # on POSIX, shutil opens the folders that it removes
        raise PermissionError(13, "Permission denied", path)
    return open_file(path, *args, **keywords)
os.open = open_no_folder
import vae_jax.train
sys.argv[1:] = ["--epochs=1", "--hidden-dim=8", "--latent-dim=2", "--batch-size=1000", "--workdir=run"]
for _ in range(2):  # begun, and gone on with
    vae_jax.train.main()
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "finished after epoch 1" in result.stdout
    assert torch.load(tmp_path / "vae.pth", weights_only=True)
