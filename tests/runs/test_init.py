"""`--init`: training starts from the weights of a PyTorch file, and from its Adam state."""

import dataclasses
import shutil

import flax.linen as nn
import jax
import pytest
import torch

from tests.runs.small_runs import metrics, require_same
from tests.runs.test_own_model import Linear
from tests.torch_ref.small_conv import FlaxConv, TorchConv
from torch_ref import convert, rules
from torch_ref.model import MLP, VAE
from vae_jax import MLP as FlaxMLP
from vae_jax import VAE as FlaxVAE
from vae_jax import InputError, fit
from vae_jax.core.modules import shapes_of
from vae_jax.runs.progress import initial_progress, read_init

pytestmark = pytest.mark.usefixtures("quick")


def test_init(tmp_path, options, undisturbed):
    # With no rate to speak of, the model that was read is the one that is written.
    still = options(tmp_path / "still", epochs=1, learning_rate=1e-30, init=undisturbed.export)
    fit(still)
    assert still.export.read_bytes() == undisturbed.export.read_bytes()
    # It is read at the start only; a run that goes on has its weights.
    copy = tmp_path / "init.pth"
    shutil.copy(undisturbed.export, copy)
    changes = {"init": copy, "checkpoint_every": 0.0}
    straight = options(tmp_path / "straight", **changes)
    fit(straight)
    fit(options(tmp_path / "on", epochs=1, **changes))
    copy.unlink()
    on = options(tmp_path / "on", **changes)
    fit(on)
    require_same(on, straight)
    assert metrics(on)[0]["train_loss"] < metrics(undisturbed)[-1]["train_loss"]


def test_the_file_is_known_by_what_it_holds(tmp_path, options, undisturbed, command):
    init = tmp_path / "init.pth"
    shutil.copy(undisturbed.export, init)
    config = options(tmp_path, init=init, epochs=1)
    fit(config)
    moved = init.rename(tmp_path / "moved.pth")
    fit(dataclasses.replace(config, init=moved, epochs=2))
    shutil.copy(moved, init)
    convert.save({key: 2 * tensor for key, tensor in convert.load(moved).items()}, moved)
    for other in (moved, tmp_path / "missing.pth", None):
        code, _, error = command(dataclasses.replace(config, init=other, epochs=2))
        assert code == 2 and error.count("\n") == 1
        assert f"--init was {moved}, now is {other}" in error
    fit(dataclasses.replace(config, init=init, epochs=2))


def test_init_of_a_model_of_ones_own(tmp_path, options, few_images):
    first = options(tmp_path / "first", epochs=1)
    fit(first, few_images, Linear())
    still = options(tmp_path / "still", epochs=1, learning_rate=1e-30, init=first.export)
    fit(still, few_images, Linear())
    assert still.export.read_bytes() == first.export.read_bytes()
    with pytest.raises(InputError, match=r"vae.pth: key down.weight: has shape \[8, 784\]; expected \[10, 784\]"):
        fit(options(tmp_path / "other", init=first.export), few_images, Linear(latent_dim=5))


class Wrapped(nn.Module):
    """Its keys begin as those of a wrapped PyTorch model do."""

    def setup(self) -> None:
        self.model = Linear()

    def encode(self, images):
        return self.model.encode(images)

    def decode(self, z):
        return self.model.decode(z)


def test_prefixes_of_keys(tmp_path, options, few_images, capsys):
    first = options(tmp_path / "first", epochs=1)
    fit(first, few_images, Wrapped())
    parallel = {f"module.{key}": tensor for key, tensor in convert.read(first.export).items()}
    assert "module.model.down.weight" in parallel
    torch.save(parallel, tmp_path / "parallel.pth")
    capsys.readouterr()
    for init, said in ((first.export, None), (tmp_path / "parallel.pth", "weights: every key begins with module.")):
        still = options(tmp_path / init.stem, epochs=1, learning_rate=1e-30, init=init)
        fit(still, few_images, Wrapped())
        assert still.export.read_bytes() == first.export.read_bytes()
        out = capsys.readouterr().out
        assert said in out if said else "every key begins" not in out


@pytest.mark.parametrize(
    ("model", "torch_model", "pixels"),
    [
        (FlaxVAE(16, 4), VAE(16, 4), 784),
        (FlaxMLP((16,), 4, activation="tanh"), MLP((16,), 4, activation="tanh"), 784),
        (FlaxMLP((16, 8), 4), MLP((16, 8), 4), 784),
        (FlaxConv(), TorchConv(), 64),
    ],
)
def test_init_with_adam(model, torch_model, pixels, tmp_path, options, capsys):
    # PyTorch's Adam after 7 steps, in which each parameter is its own gradient.
    optimizer = torch.optim.Adam(torch_model.parameters(), lr=0.001, betas=(0.5, 0.999), eps=1e-4)
    for _ in range(7):
        for parameter in torch_model.parameters():
            parameter.grad = parameter.detach().clone()
        optimizer.step()
    file = tmp_path / "torch.pth"
    torch.save({"model": torch_model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    config = options(tmp_path, init=file, adam_b1=0.5, adam_eps=1e-4)
    state = initial_progress(config, pixels, 600, model, read_init(config, pixels, model)).state
    assert capsys.readouterr().out == f"{file}: training starts from its weights; Adam continues after 7 steps\n"
    assert int(state.step) == 0 and int(state.opt_state.count) == 7
    moments = optimizer.state_dict()["state"]
    keys, like = torch_model.state_dict(), shapes_of(model, pixels)
    for tree, found in (
        (keys, state.params),
        ({key: moments[number]["exp_avg"] for number, key in enumerate(keys)}, state.opt_state.mu),
        ({key: moments[number]["exp_avg_sq"] for number, key in enumerate(keys)}, state.opt_state.nu),
    ):
        expected = rules.to_params(tree, like, rules.transposed_layers(torch_model))
        assert jax.tree.all(jax.tree.map(lambda ours, right: bool((ours == right).all()), found, expected))


def test_refusals(tmp_path, options, undisturbed, command):
    file = undisturbed.export
    config = options(tmp_path, init=file)
    model = VAE(16, 4)
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    torch.save({"model": model.state_dict(), "optimizer": adam.state_dict()}, tmp_path / "adam.pth")
    huge = {key: tensor.double() * 1e300 for key, tensor in model.state_dict().items()}
    torch.save(huge, tmp_path / "huge.pth")
    for changes, message in (
        (
            {"hidden_dim": 17},
            f"--init {file}: holds a model of 784 pixels, --hidden-dim 16 and --latent-dim 4; expected 784, 17 and 4;",
        ),
        ({"init": tmp_path / "no.pth"}, f"{tmp_path}/no.pth: cannot be read (No such file or directory)"),
        ({"init": undisturbed.workdir / "config.json"}, "config.json: is a JSON text"),
        (
            {"init": tmp_path / "huge.pth"},
            f"--init {tmp_path}/huge.pth: holds values beyond 3.403e+38; expected those of a float32\n",
        ),
        (
            {"init": tmp_path / "adam.pth"},
            f"--init {tmp_path}/adam.pth: its Adam has --learning-rate 0.01; expected 0.001;"
            " give the option that it needs\n",
        ),
        (
            {"init": tmp_path / "adam.pth", "learning_rate": 0.01, "adam_eps": 1e-4},
            f"--init {tmp_path}/adam.pth: its Adam has --adam-eps 1e-08; expected 0.0001;",
        ),
        (
            {"init": tmp_path / "adam.pth", "learning_rate": 0.01, "adam_b1": 0.5},
            f"--init {tmp_path}/adam.pth: its Adam has --adam-b1 0.9; expected 0.5;",
        ),
    ):
        code, _, error = command(dataclasses.replace(config, **changes))
        assert code == 2
        assert message in error and error.count("\n") == 1
    assert not config.workdir.exists()
