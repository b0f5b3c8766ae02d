"""`--init`: training starts from the weights of a PyTorch file, and from its Adam state."""

import dataclasses
import shutil

import jax
import pytest
import torch

from tests.runs.small_runs import metrics, require_same
from torch_ref import convert
from torch_ref.model import VAE
from vae_jax import fit
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


def test_init_with_adam(tmp_path, options, undisturbed, capsys):
    # PyTorch's Adam after 7 steps, in which each parameter is its own gradient.
    model = VAE(16, 4)
    model.load_state_dict(convert.load(undisturbed.export))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    for _ in range(7):
        for parameter in model.parameters():
            parameter.grad = parameter.detach().clone()
        optimizer.step()
    file = tmp_path / "torch.pth"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    config = options(tmp_path, init=file)
    state = initial_progress(config, 784, 600, init=read_init(config, 784)).state
    assert capsys.readouterr().out == f"{file}: training starts from its weights; Adam continues after 7 steps\n"
    assert int(state.step) == 0 and int(state.opt_state.count) == 7
    for name, tree in (("exp_avg", state.opt_state.mu), ("exp_avg_sq", state.opt_state.nu)):
        keys = model.state_dict()
        moments = {key: optimizer.state_dict()["state"][number][name] for number, key in enumerate(keys)}
        expected = convert.to_params(moments)
        assert jax.tree.all(jax.tree.map(lambda found, right: bool((found == right).all()), tree, expected))


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
    ):
        code, _, error = command(dataclasses.replace(config, **changes))
        assert code == 2
        assert message in error and error.count("\n") == 1
    assert not config.workdir.exists()
