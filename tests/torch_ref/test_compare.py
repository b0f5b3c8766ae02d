"""The parity tool: equal models are equal, every seeded fault is found by its place and kind, bad input is refused."""

import os
import subprocess
import sys
from pathlib import Path

import flax.linen as flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.torch_ref.small_conv import PIXELS, FlaxConv, TorchConv
from torch_ref import convert, rules
from torch_ref.formulas import well_conditioned
from torch_ref.parity import compare, parity
from vae_jax import VAE
from vae_jax.config import ParityConfig
from vae_jax.core.model import Output, init_params
from vae_jax.core.objective import losses
from vae_jax.core.optimizer import adam
from vae_jax.system.errors import InputError

RNG = np.random.default_rng(0)
IMAGES = np.clip(RNG.normal(0.3, 0.5, (6, PIXELS)), 0, 1)
EXACT = ("float64",)


def random_like(shapes):
    """Weights far enough from zero and from one another that every fault shows."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def params():
    return random_like(jax.eval_shape(lambda: init_params(FlaxConv(), jax.random.key(0), PIXELS)))


def loaded(module, params, **kwargs):
    """The PyTorch module with the Flax parameters."""
    state_dict = rules.to_state_dict(params, transposed=rules.transposed_layers(module), **kwargs)
    module.load_state_dict(rules.for_module(state_dict, module))
    return module


def test_equal_models_are_equal(params):
    before = jnp.zeros(1).dtype, torch.get_default_dtype()
    module = loaded(TorchConv(), params).train()
    weights = {key: value.clone() for key, value in module.state_dict().items()}
    report = compare(FlaxConv(), params, module, IMAGES)
    assert report.equal, str(report)
    assert report.worst("output", "float64").relative < 1e-13
    assert {row.kind for row in report.rows} == {"output", "loss", "gradient", "parameter"}
    assert len(report.rows) == 2 * (5 + 3 + 16 + 16)
    assert "TorchConv: decodes to logits" in str(report)
    assert str(report).endswith("equal: every difference is within its bound")
    # Nothing that was given has changed.
    assert (jnp.zeros(1).dtype, torch.get_default_dtype()) == before
    assert module.training and all(parameter.grad is None for parameter in module.parameters())
    assert all(torch.equal(weights[key], value) for key, value in module.state_dict().items())


class Examples(torch.nn.Module):
    """The VAE of pytorch/examples, smaller."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc21, self.fc22 = torch.nn.Linear(16, 7), torch.nn.Linear(7, 3), torch.nn.Linear(7, 3)
        self.fc3, self.fc4 = torch.nn.Linear(3, 7), torch.nn.Linear(7, 16)

    def encode(self, x):
        h1 = F.relu(self.fc1(x))
        return self.fc21(h1), self.fc22(h1)

    def reparameterize(self, mu, logvar):
        std = torch.exp(0.5 * logvar)
        eps = torch.randn_like(std)
        return mu + eps * std

    def decode(self, z):
        h3 = F.relu(self.fc3(z))
        return torch.sigmoid(self.fc4(h3))


def loss_function(recon_x, x, mu, logvar):
    """The loss of pytorch/examples."""
    return F.binary_cross_entropy(recon_x, x, reduction="sum") - 0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())


@pytest.fixture(scope="module")
def plain():
    """The documented model, small, and its parameters."""
    model = VAE(7, 3, 16)
    return model, random_like(jax.eval_shape(lambda: init_params(model, jax.random.key(0), 16)))


def test_pytorch_examples_model_is_taken_as_it_is(plain):
    model, params = plain
    module = Examples()
    module.load_state_dict(convert.to_state_dict(params, "pytorch-examples"))
    report = compare(model, params, module, IMAGES[:, :16], torch_loss=loss_function, dtypes=EXACT)
    assert report.equal, str(report)
    assert [row.name for row in report.rows if row.kind == "loss"] == ["loss"]
    assert "Examples: decodes to means" in str(report)


class Faulty(TorchConv):
    """One fault, by its name."""

    fault = ""

    def __init__(self, fault):
        super().__init__(1e-6 if fault == "eps" else 1e-5)
        self.fault = fault
        if fault == "gelu":
            self.activation = torch.nn.GELU("tanh")
        elif fault == "leaky":
            self.last = torch.nn.LeakyReLU(0.2)

    def encode(self, images):
        if self.fault == "pixels":
            images = images * 255
        elif self.fault == "normalized":
            images = 2 * images - 1
        if self.fault == "exchanged":
            return super().encode(images)[::-1]
        mu, logvar = super().encode(images)
        return mu, torch.exp(logvar / 2) if self.fault == "std head" else logvar

    def decode(self, z):
        return torch.sigmoid(torch.sigmoid(super().decode(z))) if self.fault == "twice" else super().decode(z)

    def reparameterize(self, mu, logvar, eps):
        if self.fault == "std":
            return mu + logvar * eps
        return mu + torch.exp(logvar if self.fault == "half" else logvar / 2) * eps

    def loss(self, recon, images, mu, logvar):
        double = self.fault == "twice in the loss"
        recon = torch.sigmoid(recon) if double else recon
        average = "mean" if self.fault == "mean" else "sum"
        if self.fault == "twice":
            bce = F.binary_cross_entropy(recon, images, reduction=average)
        else:
            bce = F.binary_cross_entropy_with_logits(recon, images, reduction=average)
        if self.fault == "mu detached":
            mu = mu.detach()
        one = 0 if self.fault == "constant" else 1
        kld = -0.5 * torch.sum(one + logvar - mu**2 - torch.exp(logvar))
        factor = {"kld half": 2, "kld mean": 1 / len(mu), "sign": -1}.get(self.fault, 1)
        if self.fault == "kld std":
            kld = -0.5 * torch.sum(1 + 2 * logvar - mu**2 - torch.exp(2 * logvar))
        return bce, factor * kld


FAULTS = {
    "gelu": ("conv", "another activation: Flax has exact gelu after it, PyTorch tanh-approximated gelu"),
    "leaky": ("expand", "another activation: Flax has relu after it, PyTorch leaky relu of slope 0.2"),
    "eps": ("norm", "epsilon of a norm layer: Flax has 1e-05, PyTorch 1e-06"),
    "pixels": ("conv", "scaled pixels: Flax gives it the pixels of PyTorch divided by 255"),
    "normalized": ("conv", "scaled pixels: Flax gives it the pixels of PyTorch as (x + 1) / 2"),
    "exchanged": ("mu, logvar", "exchanged outputs"),
    "std head": ("logvar", "logvar taken for something else: PyTorch's is the standard deviation"),
    "std": ("z", "logvar taken for the standard deviation: PyTorch computes mu + logvar * eps"),
    "half": ("z", "missing 1/2: PyTorch computes mu + exp(logvar) * eps"),
    "twice": ("recon", "sigmoid applied twice: PyTorch"),
    "twice in the loss": ("bce", "sigmoid applied twice: PyTorch computes it of sigmoid"),
    "mean": ("bce", "mean instead of sum: PyTorch computes it as the mean over pixels and batch"),
    "kld mean": ("kld", "mean instead of sum: PyTorch computes it as the mean over the batch"),
    "kld half": ("kld", "missing 1/2: PyTorch computes it without the factor 1/2"),
    "kld std": ("kld", "logvar taken for the standard deviation: PyTorch computes it with logvar for its logarithm"),
    "sign": ("kld", "wrong sign: PyTorch computes it with the other sign"),
    "constant": ("kld", "wrong constant: PyTorch computes it without the 1"),
}


def expect(report, where: str, says: str) -> None:
    """That this is the one cause that was found."""
    assert not report.equal
    assert str(report).endswith("NOT EQUAL")
    assert len(report.findings) == 1, str(report)
    assert str(report.findings[0]).startswith(f"{where}: {says}")
    assert str(report.findings[0]) in str(report)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_pytorch_is_found(fault, params):
    report = compare(FlaxConv(), params, loaded(Faulty(fault), params), IMAGES, steps=0, dtypes=EXACT)
    expect(report, *FAULTS[fault])


def test_two_faults_in_two_parts_are_both_found(params):
    class Two(Faulty):
        def loss(self, *args):
            bce, kld = super().loss(*args)
            return bce, 2 * kld

    report = compare(FlaxConv(), params, loaded(Two("std"), params), IMAGES, steps=0, dtypes=EXACT)
    assert [(found.where, found.kind) for found in report.findings] == [
        ("z", "logvar taken for the standard deviation"),
        ("kld", "missing 1/2"),
    ]


def test_flax_padding_of_a_strided_convolution_is_found(params):
    report = compare(FlaxConv(padding="SAME"), params, loaded(TorchConv(), params), IMAGES, steps=0, dtypes=EXACT)
    expect(report, "conv", 'padding of a convolution: Flax pads [0, 1, 0, 1] as "SAME" does, PyTorch [1, 1]')


def test_channels_in_another_order_are_found_in_both_parts(params):
    module = loaded(TorchConv(), params)
    report = compare(FlaxConv(channels_first=False), params, module, IMAGES, steps=0, dtypes=EXACT)
    assert [(found.where, found.kind) for found in report.findings] == [
        ("hidden", "channel order in a flatten"),
        ("up", "channel order in a flatten"),
    ]


def test_a_kernel_that_is_used_transposed_is_found(params):
    class Transposed(torch.nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight.T, self.bias)

    module = TorchConv()
    module.mix = Transposed(4, 4)
    report = compare(FlaxConv(), params, loaded(module, params), IMAGES, steps=0, dtypes=EXACT)
    expect(report, "mix", "transposed kernel: its kernel has inputs and outputs exchanged on one side")


def test_an_unknown_fault_is_placed(params):
    class Odd(torch.nn.LayerNorm):
        def forward(self, x):
            return super().forward(x) + torch.sin(x)

    module = TorchConv()
    module.norm = Odd(4)
    report = compare(FlaxConv(), params, loaded(module, params), IMAGES, steps=0, dtypes=EXACT)
    expect(report, "norm", "unexplained: its output differs by 0.99; all before it agrees")


def shuffle_channels(weight):
    """The inputs of a dense layer after a flatten of 4 channels, as Flax has them."""
    return weight.reshape(4, 4, 16).swapaxes(1, 2).reshape(4, 64)


WEIGHTS = {
    "transposed": ("mix.weight", lambda weights: weights["mix.weight"].T, "transposed kernel"),
    "flipped": ("up.weight", lambda weights: weights["up.weight"].flip(2, 3), "flipped kernel"),
    "height": ("conv.weight", lambda weights: weights["conv.weight"].mT, "transposed kernel"),
    "order": (
        "hidden.weight",
        lambda weights: shuffle_channels(weights["hidden.weight"]),
        "channel order in a flatten",
    ),
    "exchanged": ("mu.weight", lambda weights: weights["logvar.weight"], "exchanged layers"),
    "dropped": ("expand.bias", lambda weights: 0 * weights["expand.bias"], "dropped bias"),
    "scaled": ("conv.weight", lambda weights: weights["conv.weight"] / 255, "scaled weights"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_other_weights_are_found(name, params):
    key, make, kind = WEIGHTS[name]
    module = loaded(TorchConv(), params)
    with torch.no_grad():
        module.get_parameter(key).copy_(make(dict(module.state_dict())).clone())
    expect(compare(FlaxConv(), params, module, IMAGES, steps=0, dtypes=EXACT), key, kind)


def examples(params):
    module = Examples()
    module.load_state_dict(convert.to_state_dict(params, "pytorch-examples"))
    return module


def test_an_activation_is_found_without_submodules_in_flax(plain, monkeypatch):
    model, params = plain
    monkeypatch.setattr(F, "relu", torch.tanh)
    report = compare(model, params, examples(params), IMAGES[:, :16], steps=0, dtypes=EXACT)
    assert [str(found) for found in report.findings] == [
        "fc1: another activation: Flax has relu after it, PyTorch tanh",
        "fc3: another activation: Flax has relu after it, PyTorch tanh",
    ]


def test_a_loss_in_one_number_is_taken_apart(plain):
    model, params = plain

    def mean(recon, images, mu, logvar):
        kld = -0.5 * torch.mean(torch.sum(1 + logvar - mu**2 - logvar.exp(), 1))
        return F.binary_cross_entropy(recon, images, reduction="mean") + kld

    report = compare(model, params, examples(params), IMAGES[:, :16], torch_loss=mean, steps=0, dtypes=EXACT)
    assert [str(found) for found in report.findings] == [
        "bce: mean instead of sum: PyTorch computes it as the mean over pixels and batch",
        "kld: mean instead of sum: PyTorch computes it as the mean over the batch",
    ]


def test_a_fault_in_the_loss_of_flax_is_found(plain):
    model, params = plain

    def loss(logits, images, mu, logvar):
        return losses(Output(logits, mu, logvar, mu), images, beta=4.0).loss

    report = compare(model, params, examples(params), IMAGES[:, :16], flax_loss=loss, steps=0, dtypes=EXACT)
    expect(report, "loss", "weight of the KLD: Flax computes bce + 4 * kld; expected bce + kld")


def test_a_cut_gradient_is_found(plain):
    model, params = plain

    class Cut(Examples):
        def reparameterize(self, mu, logvar):
            return super().reparameterize(mu, logvar.detach())

        def loss(self, *args):
            return loss_function(*args[:3], args[3].detach())

    module = Cut()
    module.load_state_dict(examples(params).state_dict())
    report = compare(model, params, module, IMAGES[:, :16], steps=0, dtypes=EXACT)
    assert report.findings[0].kind in ("cut gradient", "another gradient")
    cut = [row for row in report.rows if row.name == "fc22.weight" and row.kind == "gradient"]
    assert not cut[0].holds


def test_another_epsilon_of_adam_is_found(plain):
    model, params = plain
    report = compare(model, params, examples(params), IMAGES[:, :16], tx=adam(1e-3, eps=1e-4), dtypes=EXACT)
    expect(report, "eps", "another optimizer setting: Flax's steps are those of eps 0.0001, PyTorch has 1e-08")


def test_gradients_that_are_rounding_errors_are_left_out_of_the_steps():
    gradient = np.array([1.0, 1e-3, 1e-9, 0.0])
    np.testing.assert_array_equal(well_conditioned(gradient + 1e-12, gradient), [True, True, False, False])
    np.testing.assert_array_equal(well_conditioned(gradient, gradient), [True, True, False, True])
    single = gradient.astype(np.float32)
    np.testing.assert_array_equal(well_conditioned(single, single / 2), [True, True, False, True])


class Normed(flax.Module):
    """A model with batch statistics."""

    def setup(self):
        self.norm, self.down, self.up = flax.BatchNorm(use_running_average=True), flax.Dense(4), flax.Dense(9)

    def encode(self, images):
        h = self.down(self.norm(images))
        return h[:, :2], h[:, 2:]

    def decode(self, z):
        return self.up(z)


class TorchNormed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.down, self.up = torch.nn.BatchNorm1d(9), torch.nn.Linear(9, 4), torch.nn.Linear(2, 9)

    def encode(self, images):
        h = self.down(self.bn(images))
        return h[:, :2], h[:, 2:]

    def decode(self, z):
        return self.up(z)


def test_batch_statistics_and_other_names():
    stats = {"norm": {"mean": np.linspace(0, 1, 9), "var": np.linspace(1, 2, 9)}}
    shapes = jax.eval_shape(lambda: init_params(Normed(), jax.random.key(0), 9))
    params, names = random_like(shapes), {"norm": "bn"}
    module = loaded(TorchNormed(), params, batch_stats=stats, names=names).double()
    report = compare(Normed(), params, module, IMAGES[:, :9], batch_stats=stats, names=names, steps=0, dtypes=EXACT)
    assert report.equal, str(report)


class NoDecode(flax.Module):
    def encode(self, images):
        return images, images


class One(NoDecode):
    def encode(self, images):
        return images

    def decode(self, z):
        return z


class Wide(NoDecode):
    def decode(self, z):
        return jnp.concatenate([z, z], 1)


class Broken(Wide):
    def encode(self, images):
        raise KeyError(f"width {images.ndim}")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (NoDecode(), "NoDecode: has no method decode; expected encode(images) -> (mu, logvar) and decode(z) -> logits"),
        (One(), "One: encode returns DynamicJaxprTracer"),
        (Wide(), "Wide: decode returns (3, 18) for z of shape [3, 9]"),
        (Broken(), "Broken: fails on images of shape [3, 9] (KeyError 'width 2')"),
    ],
)
def test_bad_flax_modules_are_refused(model, message):
    with pytest.raises(InputError) as caught:
        compare(model, {}, torch.nn.Identity(), np.zeros((2, 9)))
    assert str(caught.value).startswith(message)


class Mute(TorchNormed):
    decode = None


class Single(TorchNormed):
    def encode(self, images):
        return self.down(images)


class Narrow(TorchNormed):
    def decode(self, z):
        return z


class Square(TorchNormed):
    def encode(self, images):
        return super().encode(images.reshape(-1, 1, 9, 9))


BAD_TORCH = {
    "Mute: has neither decode nor decoder; expected decode(z)": lambda: Mute(),
    "Single: encode returns Tensor; expected mu and logvar, [batch, latent] each": lambda: Single(),
    "Narrow: decode returns [2, 2]; expected [2, 9]": lambda: Narrow(),
    "Square: encode fails on [2, 9] (shape '[-1, 1, 9, 9]' is invalid": lambda: Square(),
}


@pytest.mark.parametrize("message", BAD_TORCH)
def test_bad_pytorch_modules_are_refused(message):
    stats = {"norm": {"mean": np.zeros(9), "var": np.ones(9)}}
    params = random_like(jax.eval_shape(lambda: init_params(Normed(), jax.random.key(0), 9)))
    module, names = BAD_TORCH[message](), {"norm": "bn"}
    with pytest.raises(InputError) as caught:
        compare(Normed(), params, module, np.ones((2, 9)), batch_stats=stats, names=names, steps=0, dtypes=EXACT)
    assert str(caught.value).startswith(message)


def test_other_layers_are_refused_key_by_key(params):
    def refusal(change):
        module = TorchConv()
        change(module)
        with pytest.raises(InputError) as caught:
            compare(FlaxConv(), params, module, IMAGES)
        return str(caught.value)

    def extra(module):
        module.extra = torch.nn.Linear(2, 2)

    def gone(module):
        del module.mix

    def no_bias(module):
        module.mix.bias = None

    def wider(module):
        module.hidden = torch.nn.Linear(64, 5)

    assert refusal(extra).startswith("key extra.bias: missing from the weights; expected shape [2], as the PyTorch")
    assert refusal(gone).startswith("key mix.bias: unknown in the weights")
    assert refusal(no_bias).startswith("key mix.bias: unknown in the weights")
    assert refusal(wider).startswith("key hidden.weight: has shape [4, 64]; expected [5, 64], as the PyTorch module")


@pytest.fixture
def command(params, tmp_path):
    """Options of the command for the small models, with weights and images in files."""
    convert.save(loaded(TorchConv(), params).state_dict(), tmp_path / "conv.pth")
    images = np.random.default_rng(0).integers(0, 256, (8, 8, 8), np.uint8)
    np.savez(tmp_path / "small.npz", train_images=images, test_images=images)

    def options(**changed):
        defaults = {"weights": tmp_path / "conv.pth", "data": str(tmp_path / "small.npz"), "images": 6}
        names = {"flax": "tests.torch_ref.small_conv:FlaxConv", "torch": "tests.torch_ref.small_conv:TorchConv"}
        return ParityConfig(**(names | defaults | changed))

    return options


def test_the_command_compares(command, capsys):
    parity(command())
    out = capsys.readouterr().out
    assert out.startswith("FlaxConv (Flax) and TorchConv (PyTorch), 6 images\n")
    assert out.endswith("equal: every difference is within its bound\n")
    with pytest.raises(SystemExit) as stop:
        parity(command(torch_options='{"eps": 1e-3}'))
    assert stop.value.code == 1
    assert "norm: epsilon of a norm layer: Flax has 1e-05, PyTorch 0.001\nNOT EQUAL\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"flax": "FlaxConv"}, "FlaxConv: expected PACKAGE.MODULE:CLASS, such as my_models:ConvVAE"),
        ({"flax": "nowhere.here:VAE"}, "nowhere.here:VAE: cannot be imported (No module named 'nowhere')"),
        ({"torch": "torch.nn:Nothing"}, "torch.nn:Nothing: cannot be imported (module 'torch.nn' has no attribute"),
        ({"torch": "vae_jax:VAE"}, "vae_jax:VAE: is no PyTorch module; name its class"),
        ({"flax_options": "{"}, "--flax-options {: expected a JSON object"),
        ({"flax_options": "[]"}, "--flax-options []: expected a JSON object"),
        (
            {"torch_options": '{"width": 3}'},
            '--torch-options {"width": 3}: tests.torch_ref.small_conv:TorchConv cannot be',
        ),
        ({"images": 0}, "--images 0: expected a whole number"),
        ({"data": "mnist"}, "FlaxConv: fails on images of shape [3, 784]"),
    ],
)
def test_bad_options_are_refused(changed, message, command):
    with pytest.raises(InputError) as caught:
        parity(command(**changed))
    assert str(caught.value).startswith(message)


def test_a_file_of_other_weights_is_refused_with_its_name(command, plain, tmp_path):
    convert.save(convert.to_state_dict(plain[1]), tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"other.pth: key conv.bias: missing from the weights; expected shape \[4\]"):
        parity(command(weights=tmp_path / "other.pth"))


def test_the_command_ends_with_two_and_one_line(tmp_path):
    (tmp_path / "mine.py").write_text("raise RuntimeError('not today')")
    command = [sys.executable, "-m", "torch_ref.parity", "mine:Flax", "mine:Torch"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == (
        "error: mine:Flax: cannot be imported (not today); expected PACKAGE.MODULE:CLASS, in this folder or installed\n"
    )
