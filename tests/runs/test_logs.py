"""config.json, and the line of an epoch."""

import importlib.metadata
import json

import pytest

from vae_jax import TrainConfig
from vae_jax.config import to_json
from vae_jax.runs.logs import describe_losses, epoch_line
from vae_jax.runs.metrics import EpochMetrics


def metrics(beta: float, **changes) -> EpochMetrics:
    parts = {"train_bce": 164.128, "train_kld": 25.374, "test_bce": 105.583, "test_kld": 25.3} | changes
    losses = {f"{split}_loss": parts[f"{split}_bce"] + beta * parts[f"{split}_kld"] for split in ("train", "test")}
    return EpochMetrics(**{"epoch": 10, "seconds": 12.34, "pixels": "grey"} | parts | losses)


def test_config_json(undisturbed, few_images):
    found = json.loads((undisturbed.workdir / "config.json").read_text())
    versions = {name: importlib.metadata.version(name) for name in ("vae-jax", "jax", "jaxlib", "flax")}
    assert found == to_json(undisturbed) | {
        "image_shape": [28, 28],
        "pixels": "grey",
        "checksum": few_images.checksum(),
        "versions": versions,
        "device": "cpu",
    }


def test_the_line_of_an_epoch_fits_into_a_terminal():
    line = epoch_line(metrics(1.0), epochs=10, beta=1.0)
    assert line == "epoch 10/10  train loss 189.50 = bce 164.13 + kld 25.37  test loss 130.88  12.3 s"
    assert len(line) <= 80
    assert len(describe_losses("grey")) <= 80


def test_the_parts_of_the_loss_add_up_as_printed():
    for thousandths in range(20):
        words = epoch_line(metrics(1.0, train_kld=25.37 + thousandths / 1000), epochs=10, beta=1.0).split()
        loss, bce, kld = (round(100 * float(words[place])) for place in (4, 7, 10))
        assert loss == bce + kld


@pytest.mark.parametrize("beta", [0.0, 0.5, 4.0])
def test_the_line_shows_the_kld_itself_whatever_beta_is(beta):
    assert f" + {beta:g} * kld 25.37  test loss " in epoch_line(metrics(beta), epochs=10, beta=beta)


def test_the_documented_options_fit_into_80_columns():
    from vae_jax.train import describe
    from vae_jax import load

    first = f"{describe(TrainConfig(), load())}; 652,824 parameters; cpu"
    assert len(first) <= 80
