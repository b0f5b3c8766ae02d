"""A Flax module of the user's own goes the same way as the documented model."""

import dataclasses
import json
import shutil
import signal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

from tests.runs.small_runs import STEPS, checkpoints, metrics
from vae_jax import MLP, VAE, InputError, fit
from vae_jax.runs.progress import Progress
from vae_jax.runs.trained import read
from vae_jax.runs.workdir import PICTURES
from vae_jax.system.signals import Interrupted


class Linear(nn.Module):
    """One layer each way."""

    latent_dim: int = 4

    def setup(self) -> None:
        self.down, self.up = nn.Dense(2 * self.latent_dim), nn.Dense(784)

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        mu, logvar = jnp.split(self.down(images), 2, axis=-1)
        return mu, logvar

    def decode(self, z: jax.Array) -> jax.Array:
        return self.up(z)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, options, few_images):
    """A run of it that nothing has disturbed: options, state and averages."""
    config = options(tmp_path_factory.mktemp("own"), learning_rate=0.01)
    return config, *fit(config, few_images, Linear())


@pytest.mark.usefixtures("quick")
def test_it_goes_on_to_the_same_bits(straight, tmp_path, options, few_images, monkeypatch):
    config = options(tmp_path, learning_rate=0.01)
    advance, steps = Progress.advance, 0

    def interrupt(*args):
        nonlocal steps
        advance(*args)
        steps += 1
        if steps == 7:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch, pytest.raises(Interrupted) as interrupted:
        patch.setattr(Progress, "advance", interrupt)
        fit(config, few_images, Linear())
    assert str(interrupted.value) == "to go on: call fit with the same arguments and overwrite=False"
    assert checkpoints(config)[-1] == STEPS + 2
    state, history = fit(config, few_images, Linear())
    expected = straight[1]
    for found, right in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_array_equal(found, right)
    assert [dataclasses.replace(epoch, seconds=0.0) for epoch in history] == [
        dataclasses.replace(epoch, seconds=0.0) for epoch in straight[2]
    ]


def test_it_trains_and_draws_pictures_and_writes_a_pytorch_file(straight, few_images, capsys):
    config, state, history = straight
    assert isinstance(state.model, Linear)
    assert history[-1].test_loss < 543 < history[0].test_loss  # of pixels that are 0.5: 784 ln 2
    assert [epoch["test_loss"] for epoch in metrics(config)] == [epoch.test_loss for epoch in history]
    for name in PICTURES:
        with Image.open(config.workdir / name) as picture:
            assert picture.width > 300
    weights = torch.load(config.export, weights_only=True)
    assert {key: tuple(tensor.shape) for key, tensor in weights.items()} == {
        "down.bias": (8,), "down.weight": (8, 784), "up.bias": (784,), "up.weight": (784, 4)
    }  # fmt: skip
    np.testing.assert_array_equal(weights["down.weight"].numpy().T, state.params["down"]["kernel"])
    fit(config, few_images, Linear())
    assert "finished after epoch 3" in capsys.readouterr().out


@pytest.mark.parametrize("checkpoint", [None, "newest"])
def test_it_is_read_back(checkpoint, straight):
    config, state, _ = straight
    trained = read(config.workdir, checkpoint)
    assert trained.model == Linear() and trained.latent_dim == 4 and trained.pixels == 784
    for found, right in zip(jax.tree.leaves(trained.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_array_equal(found, right)


def test_a_module_that_cannot_be_imported_any_more_is_one_line(straight, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(straight[0].workdir, workdir)
    text = (workdir / "config.json").read_text()
    (workdir / "config.json").write_text(text.replace("test_own_model:Linear", "test_own_model:Gone"))
    with pytest.raises(InputError, match=f"{workdir}: is a run of .*Gone: cannot be imported .*expected PACKAGE"):
        read(workdir)


class Tanh(VAE):
    """Parameters of the same names and shapes, which make another model."""

    def decode(self, z: jax.Array) -> jax.Array:
        return jnp.tanh(self.decoder(z))


def test_a_model_with_the_parameters_of_the_documented_one_stays_itself(tmp_path, options, few_images):
    config = options(tmp_path, epochs=1)
    fit(config, few_images, Tanh(16, 4))
    trained = read(config.workdir)
    assert trained.model == Tanh(16, 4)
    assert np.all(trained.decode(np.zeros((1, 4), np.float32)) <= 1 / (1 + np.exp(-1)))


def test_models_of_the_package_are_the_options_that_name_them(tmp_path, options, few_images):
    config = options(tmp_path, epochs=1, hidden_dim=400)
    fit(config, few_images, MLP((9, 8), 3, activation="tanh"))
    found = json.loads((config.workdir / "config.json").read_text())
    assert (found["hidden_dims"], found["latent_dim"], found["activation"], found["model"]) == ([9, 8], 3, "tanh", None)
    assert read(config.workdir).model == MLP((9, 8), 3, activation="tanh")


@pytest.mark.usefixtures("quick")
def test_its_pictures_are_those_of_its_last_epoch(tmp_path, options, few_images):
    straight = options(tmp_path / "straight", epochs=2)
    fit(straight, few_images, Linear())
    for epochs in (1, 2):
        config = options(tmp_path / "on", epochs=epochs)
        fit(config, few_images, Linear())
    for name in PICTURES:
        assert (config.workdir / name).read_bytes() == (straight.workdir / name).read_bytes()


@pytest.mark.parametrize("model", [None, Linear(latent_dim=5)])
def test_another_model_is_refused(model, straight, few_images):
    config, *_ = straight
    with pytest.raises(InputError, match=f"--workdir {config.workdir}: holds a run with other options: --model"):
        fit(config, few_images, model)
