"""config.json, and the line of an epoch."""

import dataclasses
import importlib.metadata
import json
import math

import numpy as np
import pytest

from vae_jax import VAE, NonFiniteLossError, TrainConfig, fit
from vae_jax.config import to_json
from vae_jax.core.modules import shapes_digest
from vae_jax.core.objective import Losses
from vae_jax.runs.feed import Feed
from vae_jax.runs.logs import describe_losses, epoch_line
from vae_jax.runs.metrics import EpochMetrics, require_finite
from vae_jax.train import describe


def metrics(beta: float, **changes) -> EpochMetrics:
    parts = {"train_bce": 164.128, "train_kld": 25.374, "test_bce": 105.583, "test_kld": 25.3} | changes
    losses = {f"{split}_loss": parts[f"{split}_bce"] + beta * parts[f"{split}_kld"] for split in ("train", "test")}
    return EpochMetrics(**{"epoch": 10, "seconds": 4.56, "pixels": "grey"} | losses | parts)


def test_other_shapes_have_another_digest():
    digests = {shapes_digest(VAE(*sizes), pixels) for *sizes, pixels in ((16, 4, 784), (17, 4, 784), (16, 4, 783))}
    assert len(digests) == 3 and all(len(digest) == 64 for digest in digests)


def test_config_json(undisturbed, few_images):
    found = json.loads((undisturbed.workdir / "config.json").read_text())
    versions = {name: importlib.metadata.version(name) for name in ("vae-jax", "jax", "jaxlib", "flax")}
    assert found == to_json(undisturbed) | {
        "image_shape": [28, 28],
        "pixels": "grey",
        "checksum": few_images.checksum(),
        "parameter_shapes": shapes_digest(VAE(16, 4), 784),
        "versions": versions,
        "device": "cpu",
    }


@pytest.mark.parametrize(
    ("seconds", "printed"),
    [(0.056, "56 ms"), (0.0999, "0.1 s"), (0.56, "0.6 s"), (4.56, "4.6 s"), (9.97, "10 s"), (123.4, "123 s")],
)
def test_the_line_of_an_epoch_fits_into_a_terminal(seconds, printed):
    line = epoch_line(metrics(1.0, seconds=seconds), TrainConfig())
    assert line == f"epoch 10/10  train loss 189.50 = bce 164.13 + kld 25.37  test loss 130.88  {printed}"
    assert len(line) <= 80


def test_the_first_lines_fit_into_a_terminal(mnist):
    first = f"{describe(TrainConfig(), mnist)}; 652,824 parameters; cpu"
    assert first == "mnist: 60,000 training, 10,000 test images, 28 x 28; 652,824 parameters; cpu"
    for line in (first, describe_losses("grey", TrainConfig()), describe_losses("binary", TrainConfig())):
        assert len(line) <= 80


def test_the_parts_of_the_loss_add_up_as_printed():
    for thousandths in range(20):
        words = epoch_line(metrics(1.0, train_kld=25.37 + thousandths / 1000), TrainConfig()).split()
        loss, bce, kld = (round(100 * float(words[place])) for place in (4, 7, 10))
        assert loss == bce + kld


@pytest.mark.parametrize("beta", [0.0, 0.5, 4.0])
def test_the_line_shows_the_kld_itself_whatever_beta_is(beta):
    assert f" + {beta:g} * kld 25.37  test loss " in epoch_line(metrics(beta), TrainConfig(beta=beta))


@pytest.mark.parametrize("part", ["train_loss", "test_loss"])
def test_a_loss_that_is_not_finite(part):
    bad = dataclasses.replace(metrics(1.0), **{part: math.nan})
    with pytest.raises(NonFiniteLossError, match=r"^epoch 10, after its last step: "):
        require_finite(bad)


def test_an_epoch_without_a_finite_loss_leaves_no_line(tmp_path, options, few_images, monkeypatch, capsys):
    config = options(tmp_path)
    losses = Losses(*[np.full(3, math.nan, np.float32)] * 3)
    monkeypatch.setattr(Feed, "evaluate", lambda *_: losses)
    with pytest.raises(NonFiniteLossError, match=r"^epoch 1, after its last step: "):
        fit(config, few_images)
    assert (config.workdir / "metrics.jsonl").read_text() == ""
    assert "epoch" not in capsys.readouterr().out


def test_the_line_of_another_objective_gives_its_parts_without_a_sum():
    config = TrainConfig(objective="iwae", training_samples=5)
    assert "train loss 189.50 (bce 164.13, kld 25.37)  test loss" in epoch_line(metrics(1.0), config)
    assert describe_losses("binary", config).endswith("binary pixels; in training -L_5 (iwae)")
    assert describe_losses("binary", TrainConfig(training_samples=3)).endswith("; in training 3 draws an image")
