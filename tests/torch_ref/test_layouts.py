"""Layouts: a parameter tree and a state dict say the same, and what is neither is refused by name."""

import numpy as np
import pytest
import torch

from torch_ref import convert
from torch_ref.layouts import LAYOUTS, check, sizes, to_params, to_state_dict
from torch_ref.model import VAE
from vae_jax.system.errors import WeightsError

KEYS = {
    "documented": ["encoder.fc1", "encoder.fc2_mu", "encoder.fc2_logvar", "decoder.fc1", "decoder.fc2"],
    "fc-mu": ["encoder.fc1", "encoder.fc_mu", "encoder.fc_logvar", "decoder.fc1", "decoder.fc2"],
    "pytorch-examples": ["fc1", "fc21", "fc22", "fc3", "fc4"],
}


@pytest.fixture
def state_dict():
    torch.manual_seed(0)
    return VAE(hidden_dim=6, latent_dim=2, pixels=9).state_dict()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(state_dict, layout):
    converted = to_state_dict(to_params(state_dict), layout)
    assert list(converted) == [f"{name}.{kind}" for name in KEYS[layout] for kind in ("weight", "bias")]
    for ours, theirs in zip(converted.values(), state_dict.values(), strict=True):
        assert torch.equal(ours, theirs)
    assert check(converted) == layout
    assert sizes(converted) == (6, 2, 9)
    back = to_state_dict(to_params(converted))
    assert all(torch.equal(back[key], state_dict[key]) for key in state_dict)


def test_kernels_are_transposed_weights(state_dict):
    params = to_params(state_dict)
    np.testing.assert_array_equal(params["encoder"]["fc1"]["kernel"], state_dict["encoder.fc1.weight"].numpy().T)
    assert params["encoder"]["fc1"]["kernel"].shape == (9, 6)


def test_conversion_copies(state_dict):
    params = to_params(state_dict)
    converted = to_state_dict(params)
    before = converted["decoder.fc2.bias"].clone(), state_dict["decoder.fc2.bias"].clone()
    params["decoder"]["fc2"]["bias"][:] = 7
    assert torch.equal(converted["decoder.fc2.bias"], before[0])
    assert torch.equal(state_dict["decoder.fc2.bias"], before[1])


def change(key, new):
    return lambda state_dict: state_dict | {key: new(state_dict.get(key))}


# What is done to a good state dict, and what the refusal says.
BAD = {
    "missing": (lambda state_dict: dict(list(state_dict.items())[:-1]), "key decoder.fc2.bias: missing"),
    "nothing": (lambda _: {}, "has no key of this model, but none at all; expected decoder.fc1.bias"),
    "extra": (change("encoder.fc3.bias", lambda _: torch.zeros(1)), "key encoder.fc3.bias: unknown"),
    "not a string": (change(3, lambda _: torch.zeros(1)), "key 3: unknown"),
    "not a tensor": (change("decoder.fc2.bias", lambda _: [1.0]), "key decoder.fc2.bias: is list"),
    "sparse": (
        change("decoder.fc2.weight", torch.Tensor.to_sparse),
        "key decoder.fc2.weight: is (Tensor|torch._utils._rebuild_sparse)",
    ),
    "transposed": (change("decoder.fc2.weight", torch.t), r"key decoder.fc2.weight: has shape \[6, 9\]"),
    "flat": (change("decoder.fc1.weight", torch.ravel), r"key decoder.fc1.weight: has shape \[12\]"),
    "column": (change("encoder.fc1.bias", lambda t: t[:, None]), r"key encoder.fc1.bias: has shape \[6, 1\]"),
    "other size": (change("encoder.fc2_mu.bias", lambda _: torch.zeros(3)), "key encoder.fc2_mu.weight: has shape"),
    "empty": (lambda _: dict(VAE(6, 0, 9).state_dict()), "expected at least one value"),
    "half": (
        lambda s: {key: value.half() if key == "decoder.fc2.bias" else value.double() for key, value in s.items()},
        "key decoder.fc2.bias: has type torch.float16",
    ),
    "integer": (change("decoder.fc2.bias", torch.Tensor.int), "key decoder.fc2.bias: has type torch.int32"),
    "mixed": (change("decoder.fc2.bias", torch.Tensor.double), "key decoder.fc2.bias: has type torch.float64"),
    "nan": (change("encoder.fc1.weight", lambda t: t * float("nan")), "key encoder.fc1.weight: holds values that"),
    "infinite": (change("encoder.fc1.bias", lambda t: t / 0), "key encoder.fc1.bias: holds values that are NaN or inf"),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("name", BAD)
def test_bad_state_dicts_are_refused_by_name(state_dict, name, tmp_path):
    apply, message = BAD[name]
    bad = apply(dict(state_dict))
    with pytest.raises(WeightsError, match=message):
        to_params(bad)
    torch.save(bad, tmp_path / "bad.pth")
    with pytest.raises(WeightsError, match=message) as caught:
        convert.load(tmp_path / "bad.pth")
    assert str(tmp_path / "bad.pth") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_parameter_trees_are_refused(state_dict):
    params = to_params(state_dict)
    params["encoder"]["fc9"] = params["encoder"].pop("fc1")
    with pytest.raises(WeightsError, match=r"key encoder.fc1.bias: missing"):
        to_state_dict(params)
