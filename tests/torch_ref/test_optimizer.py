import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from torch_ref import convert
from torch_ref.layouts import LAYOUTS
from torch_ref.model import VAE
from torch_ref.optimizer import load_checkpoint
from torch_ref.train import losses as torch_losses
from vae_jax import TrainConfig, create_state, draw_eps, train_epoch
from vae_jax.system.errors import WeightsError

SIZES = (6, 2, 9)


def step(model, optimizer, pixels, eps):
    recon, mu, logvar = model(pixels, eps)
    bce, kld = torch_losses(recon, pixels, mu, logvar)
    optimizer.zero_grad()
    (bce + kld).backward()
    optimizer.step()


def stepped(optimizer_type=torch.optim.Adam, steps=3, **settings):
    """A small model and its optimizer after some steps."""
    torch.manual_seed(0)
    model = VAE(*SIZES)
    optimizer = optimizer_type(model.parameters(), **settings)
    for _ in range(steps):
        step(model, optimizer, torch.rand(4, 9), torch.randn(4, 2))
    return model, optimizer


def checkpoint(model, optimizer, layout="documented"):
    """What PyTorch users save; the layout's own model would have these keys."""
    state_dict = convert.to_state_dict(convert.to_params(model.state_dict()), layout)
    return {"epoch": 3, "model": state_dict, "optimizer": optimizer.state_dict(), "loss": [1.5, float("nan")]}


def averages(model, optimizer, name):
    """One of Adam's averages in the form of a parameter tree."""
    return convert.to_params({key: optimizer.state[value][name] for key, value in model.named_parameters()})


def assert_equal_trees(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs, strict=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
def test_a_checkpoint_is_read_bit_for_bit(layout, new_format, tmp_path):
    model, optimizer = stepped()
    path = tmp_path / "checkpoint.pth"
    torch.save(checkpoint(model, optimizer, layout), path, _use_new_zipfile_serialization=new_format)
    read = load_checkpoint(path)
    assert_equal_trees(read.params, convert.to_params(model.state_dict()))
    assert read.adam is not None
    assert (read.adam.count, read.adam.settings) == (3, (1e-3, 0.9, 1e-8))
    assert_equal_trees(read.adam.mu, averages(model, optimizer, "exp_avg"))
    assert_equal_trees(read.adam.nu, averages(model, optimizer, "exp_avg_sq"))
    # The model alone is read out of it too.
    assert_equal_trees(convert.to_params(convert.load(path)), read.params)


@pytest.mark.parametrize("model_key", ["model", "model_state_dict", "state_dict"])
@pytest.mark.parametrize("optimizer_key", ["optimizer", "optimizer_state_dict"])
def test_names_in_use(model_key, optimizer_key, tmp_path):
    model, optimizer = stepped()
    torch.save({model_key: model.state_dict(), optimizer_key: optimizer.state_dict()}, tmp_path / "a.pth")
    read = load_checkpoint(tmp_path / "a.pth")
    assert read.adam is not None and read.adam.count == 3


def test_a_model_without_an_optimizer(tmp_path):
    model, _ = stepped()
    convert.save(model.state_dict(), tmp_path / "vae.safetensors")
    torch.save(model.state_dict(), tmp_path / "vae.pth")
    torch.save({"model": model.state_dict()}, tmp_path / "dict.pth")
    for name in ("vae.safetensors", "vae.pth", "dict.pth"):
        read = load_checkpoint(tmp_path / name)
        assert read.adam is None
        assert_equal_trees(read.params, convert.to_params(model.state_dict()))


def test_an_optimizer_that_has_not_stepped(tmp_path):
    model, optimizer = stepped(steps=0, lr=0.25)
    torch.save(checkpoint(model, optimizer), tmp_path / "a.pth")
    read = load_checkpoint(tmp_path / "a.pth")
    assert read.adam is not None
    assert (read.adam.count, read.adam.settings) == (0, (0.25, 0.9, 1e-8))
    for tree in (read.adam.mu, read.adam.nu):
        assert_equal_trees(tree, jax.tree.map(np.zeros_like, read.params))


def test_adamw_without_decay_and_equal_groups_are_adam(tmp_path):
    model, optimizer = stepped(torch.optim.AdamW, weight_decay=0)
    torch.save(checkpoint(model, optimizer), tmp_path / "a.pth")
    torch.manual_seed(0)
    model = VAE(*SIZES)
    optimizer = torch.optim.Adam([{"params": model.encoder.parameters()}, {"params": model.decoder.parameters()}])
    step(model, optimizer, torch.rand(4, 9), torch.randn(4, 2))
    torch.save(checkpoint(model, optimizer), tmp_path / "b.pth")
    for name, count in (("a.pth", 3), ("b.pth", 1)):
        read = load_checkpoint(tmp_path / name)
        assert read.adam is not None and read.adam.count == count


def test_settings_are_read_and_what_changes_no_step_is_passed_over(tmp_path):
    model, optimizer = stepped(lr=torch.tensor(1e-3), betas=(0.5, 0.999), eps=1e-4)
    content = {
        "model_state": model.state_dict(),
        "optimizer_state": optimizer.state_dict(),
        "scheduler": {"last_lr": [1.0]},
    }
    content["optimizer_state"]["param_groups"][0] |= {
        "name": "all",
        "max_lr": 0.1,
        "param_names": list(model.state_dict()),
        "betas": [0.5, 0.999],
    }
    torch.save(content, tmp_path / "a.pth")
    read = load_checkpoint(tmp_path / "a.pth")
    assert read.adam is not None
    assert (read.adam.count, read.adam.settings) == (3, pytest.approx((1e-3, 0.5, 1e-4)))
    torch.save({"model": model.state_dict(), "optimizer": None}, tmp_path / "b.pth")
    assert load_checkpoint(tmp_path / "b.pth").adam is None


def test_steps_as_numbers(tmp_path):
    """As PyTorch before 1.12 wrote them."""
    model, optimizer = stepped()
    content = checkpoint(model, optimizer)
    for entry in content["optimizer"]["state"].values():
        entry["step"] = int(entry["step"])
    del content["optimizer"]["param_groups"][0]["maximize"]
    torch.save(content, tmp_path / "a.pth")
    read = load_checkpoint(tmp_path / "a.pth")
    assert read.adam is not None and read.adam.count == 3


def group(**settings):
    return lambda content: content["optimizer"]["param_groups"][0].update(settings)


def state(index, **entries):
    return lambda content: content["optimizer"]["state"][index].update(entries)


def drop(*path):
    def change(content):
        for key in path[:-1]:
            content = content[key]
        del content[path[-1]]

    return change


def negative(content):
    content["optimizer"]["state"][1]["exp_avg_sq"][0] = -1


def two_groups(**settings):
    def change(content):
        group = content["optimizer"]["param_groups"][0]
        content["optimizer"]["param_groups"] = [
            group | {"params": [*range(4)]},
            group | {"params": [*range(4, 10)]} | settings,
        ]

    return change


def replaced(**entries):
    return lambda content: content.update(entries)


# What is done to a good checkpoint, and what the refusal says.
BAD = {
    "b1": (group(betas=(1.0, 0.999)), r"optimizer: param_groups\[0\].betas is \(1.0, 0.999\); expected a number"),
    "b2": (group(betas=(0.9, 0.99)), r"param_groups\[0\].betas is \(0.9, 0.99\); expected .* and 0.999"),
    "one beta": (group(betas=0.9), r"param_groups\[0\].betas is 0.9; expected"),
    "eps": (group(eps=0.0), r"param_groups\[0\].eps is 0.0; expected a finite number above 0"),
    "two eps": (two_groups(eps=1e-7), r"param_groups\[1\].eps is 1e-07; expected 1e-08, as in param_groups\[0\]"),
    "two betas": (two_groups(betas=(0.5, 0.999)), r"param_groups\[1\].betas\[0\] is 0.5; expected 0.9, as in"),
    "decay": (group(weight_decay=0.01), r"param_groups\[0\].weight_decay is 0.01; expected 0"),
    "amsgrad": (group(amsgrad=True), r"param_groups\[0\].amsgrad is True; expected False"),
    "maximize": (group(maximize=True), r"param_groups\[0\].maximize is True; expected False"),
    "no eps": (drop("optimizer", "param_groups", 0, "eps"), r"param_groups\[0\].eps is missing"),
    "unknown": (group(momentum=0.9), r"param_groups\[0\].momentum is unknown"),
    "rate": (group(lr=-1.0), r"param_groups\[0\].lr is -1.0; expected a finite number above 0"),
    "infinite rate": (group(lr=float("inf")), r"param_groups\[0\].lr is inf"),
    "two rates in one": (group(lr=torch.tensor([1e-3, 1e-3])), r"param_groups\[0\].lr is Tensor"),
    "two rates": (two_groups(lr=1.0), r"param_groups\[1\].lr is 1.0; expected 0.001, as in param_groups\[0\]"),
    "no groups": (lambda content: content["optimizer"].update(param_groups=[]), "has 0 param_groups"),
    "other order": (group(params=[*range(9, -1, -1)]), "param_groups have other params than 0 to 9"),
    "fewer": (group(params=[0, 1]), "param_groups have other params than 0 to 9"),
    "no state": (drop("optimizer", "state"), "state is NoneType; expected a dict"),
    "one missing": (drop("optimizer", "state", 4), r"state\[4\] is missing"),
    "one more": (lambda content: content["optimizer"]["state"].update({10: {}}), r"state\[10\] is unknown"),
    "no average": (drop("optimizer", "state", 2, "exp_avg"), r"state\[2\]\[exp_avg\] is missing"),
    "another average": (state(2, max_exp_avg_sq=torch.zeros(2, 6)), r"state\[2\]\[max_exp_avg_sq\] is unknown"),
    "shape": (state(1, exp_avg=torch.zeros(7)), r"state\[1\].exp_avg \(encoder.fc1.bias\) is \[7\] of torch.float32"),
    "type": (state(1, exp_avg=torch.zeros(6).double()), r"state\[1\].exp_avg .* is \[6\] of torch.float64; expected"),
    "list": (state(1, exp_avg=[0.0] * 6), r"state\[1\].exp_avg .* is list; expected a dense tensor"),
    "spread": (state(1, exp_avg=torch.zeros(1).expand(6)), "state.1.exp_avg: .* in a storage of 1 values"),
    "nan": (state(1, exp_avg=torch.full((6,), torch.nan)), r"state\[1\].exp_avg .* holds values that are NaN"),
    "negative": (negative, r"state\[1\].exp_avg_sq \(encoder.fc1.bias\) holds negative values"),
    "steps": (state(3, step=torch.tensor(4.0)), r"state\[3\].step is 4; expected 3, as in state\[0\]"),
    "negative step": (state(0, step=-1), r"state\[0\].step is -1; expected a whole number"),
    "half a step": (state(0, step=torch.tensor(0.5)), r"state\[0\].step is 0.5"),
    "too many steps": (state(0, step=torch.tensor(2.0**31 - 1)), r"state\[0\].step is 2147483648.0; expected"),
    "nan step": (state(0, step=torch.tensor(torch.nan)), r"state\[0\].step is nan"),
    "not a dict": (replaced(optimizer=[1, 2]), "optimizer: it is list; expected a dict"),
    "two models": (lambda content: content.update(state_dict=content["model"]), "both model and state_dict"),
    "two optimizers": (replaced(optimizer_state_dict={}), "both optimizer and optimizer_state_dict"),
    "no dict of weights": (replaced(model=[1, 2]), "key model: is list; expected a state dict"),
    "another model": (replaced(model={"a": torch.zeros(1)}), "has no key of this model, but a; expected"),
    "other names": (group(param_names=[*"abcdefghij"]), "param_groups have other param_names than the keys"),
    "another place": (replaced(optim={"state": {}, "param_groups": []}), "key optim: is an optimizer; expected"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_checkpoints_are_refused_by_name(name, tmp_path):
    change, message = BAD[name]
    content = checkpoint(*stepped())
    change(content)
    torch.save(content, tmp_path / "bad.pth")
    with pytest.raises(WeightsError, match=message) as caught:
        load_checkpoint(tmp_path / "bad.pth")
    assert str(caught.value).startswith(f"{tmp_path / 'bad.pth'}: ")
    assert str(caught.value).isprintable()
    if "alone starts Adam anew" in str(caught.value):
        convert.load(tmp_path / "bad.pth")


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "RMSprop", "Adamax", "NAdam", "RAdam", "AdamW"])
def test_other_optimizers_are_refused(name, tmp_path):
    content = checkpoint(*stepped(getattr(torch.optim, name)))
    torch.save(content, tmp_path / "bad.pth")
    with pytest.raises(WeightsError, match=r"optimizer: param_groups\[0\]"):
        load_checkpoint(tmp_path / "bad.pth")


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float64", 1e-10)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_jax_goes_on_where_pytorch_stopped(dtype, tolerance, layout, tmp_path):
    with jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext():
        hidden_dim, latent_dim, pixels, batch, steps = 40, 5, 49, 16, 30
        rng = np.random.default_rng(0)
        images = rng.random((2 * steps * batch, pixels)).astype(dtype)
        batches = np.arange(2 * steps * batch, dtype=np.int32).reshape(2 * steps, batch)
        state = create_state(TrainConfig(hidden_dim=hidden_dim, latent_dim=latent_dim, seed=5), pixels)

        torch.manual_seed(0)
        model = VAE(hidden_dim, latent_dim, pixels).to(getattr(torch, dtype))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for number in range(2 * steps):
            if number == steps:
                torch.save(checkpoint(model, optimizer, layout), tmp_path / "half.pth")
            eps = np.array(draw_eps(state.key, number, (batch, latent_dim), jnp.dtype(dtype)))
            step(model, optimizer, torch.from_numpy(images[batches[number]]), torch.from_numpy(eps))

        read = load_checkpoint(tmp_path / "half.pth")
        assert read.adam is not None
        count, mu, nu, settings = read.adam
        assert (count, settings) == (steps, (1e-3, 0.9, 1e-8))
        params, mu, nu = jax.tree.map(jnp.asarray, (read.params, mu, nu))
        opt_state = optax.ScaleByAdamState(jnp.int32(count), mu, nu)
        state = state.replace(step=jnp.int32(count), params=params, opt_state=opt_state)
        # 1e-3 of a float32 differs from that of a float64.
        rates = {"beta": jnp.asarray(1, dtype), "learning_rate": jnp.asarray(settings.learning_rate, dtype)}
        state = state.replace(**rates)
        state, _ = train_epoch(state, jnp.asarray(images), jnp.asarray(batches[steps:]))

        assert state.opt_state.count == 2 * steps
        mu, nu = (averages(model, optimizer, name) for name in ("exp_avg", "exp_avg_sq"))
        expected = (convert.to_params(model.state_dict()), mu, nu)
        found = (state.params, state.opt_state.mu, state.opt_state.nu)
        for (path, ours), theirs in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
            assert ours.dtype == dtype
            error = np.abs(np.asarray(ours) - theirs).max() / max(1, np.abs(theirs).max())
            assert error < tolerance, jax.tree_util.keystr(path)
