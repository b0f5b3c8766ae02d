"""The conversion by rule: each kind of layer computes the same in PyTorch, and nothing is guessed."""

import flax.linen as flax
import jax
import numpy as np
import pytest
import torch
from torch import nn

from torch_ref import convert, rules
from vae_jax.core.model import VAE, init_params
from vae_jax.system.errors import WeightsError

# A layer in Flax, the same in PyTorch, and the shape of an input, channels last.
LAYERS = {
    "dense": (flax.Dense(3), lambda: nn.Linear(2, 3), (4, 2)),
    "no bias": (flax.Dense(3, use_bias=False), lambda: nn.Linear(2, 3, bias=False), (4, 2)),
    "embedding": (flax.Embed(5, 3), lambda: nn.Embedding(5, 3), None),
    "conv 1": (flax.Conv(3, (3,), 2, [(1, 1)]), lambda: nn.Conv1d(2, 3, 3, 2, 1), (2, 5, 2)),
    "conv 2": (flax.Conv(3, (3, 2), 2, 1), lambda: nn.Conv2d(2, 3, (3, 2), 2, 1), (2, 5, 6, 2)),
    "conv 3": (flax.Conv(3, (3, 3, 1)), lambda: nn.Conv3d(2, 3, (3, 3, 1), padding="same"), (2, 3, 4, 2, 2)),
    "grouped": (flax.Conv(4, (3, 3), feature_group_count=2), lambda: nn.Conv2d(2, 4, 3, 1, 1, groups=2), (2, 4, 4, 2)),
    "up 1": (flax.ConvTranspose(3, (4,), (2,)), lambda: nn.ConvTranspose1d(2, 3, 4, 2, 1), (2, 5, 2)),
    "up 2": (flax.ConvTranspose(3, (4, 4), (2, 2)), lambda: nn.ConvTranspose2d(2, 3, 4, 2, 1), (2, 5, 6, 2)),
    "up 2, valid": (
        flax.ConvTranspose(3, (3, 2), (2, 2), "VALID"),
        lambda: nn.ConvTranspose2d(2, 3, (3, 2), 2),
        (2, 3, 3, 2),
    ),
    "layer norm": (flax.LayerNorm(1e-5), lambda: nn.LayerNorm(4), (3, 4)),
    "group norm": (flax.GroupNorm(2, epsilon=1e-5), lambda: nn.GroupNorm(2, 4), (3, 5, 5, 4)),
    "batch norm": (flax.BatchNorm(True, epsilon=1e-5), lambda: nn.BatchNorm2d(4), (3, 5, 5, 4)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_computes_the_same_in_pytorch(kind):
    layer, make, shape = LAYERS[kind]
    rng = np.random.default_rng(0)
    inputs = rng.integers(0, 5, 7) if shape is None else rng.normal(size=shape)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        shapes = jax.eval_shape(layer.init, jax.random.key(0), inputs)
        variables = jax.tree.map(lambda leaf: rng.uniform(0.5, 1.5, leaf.shape), shapes)
        expected = np.asarray(jax.jit(layer.apply)(variables, inputs))

    module = nn.ModuleDict({"layer": make()}).double().eval()
    trees = {name: {"layer": tree} for name, tree in variables.items()}
    transposed = rules.transposed_layers(module)
    assert transposed == ({"layer"} if kind.startswith("up") else set())
    state_dict = rules.to_state_dict(trees["params"], trees.get("batch_stats"), transposed)
    module.load_state_dict(rules.for_module(state_dict, module))
    tensor = torch.from_numpy(inputs)
    spatial = tensor.ndim > 2
    found = module["layer"](tensor.movedim(-1, 1) if spatial else tensor).detach()
    found = found.movedim(1, -1) if spatial else found
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-13)

    back = rules.to_variables(module.state_dict(), {name: {"layer": shapes[name]} for name in shapes}, transposed)
    assert jax.tree.structure(back) == jax.tree.structure(trees)
    jax.tree.map(np.testing.assert_array_equal, back, trees)


def test_the_documented_model_has_the_documented_keys_and_bits():
    shapes = jax.eval_shape(lambda: init_params(VAE(7, 3, 12), jax.random.key(0), 12))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32), shapes)
    expected, found = convert.to_state_dict(params), rules.to_state_dict(params)
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        assert torch.equal(tensor, expected[key]) and tensor.is_contiguous()
    back = rules.to_params(found, shapes)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_the_order_of_the_tree_does_not_matter():
    kernel, bias = np.ones((2, 3), np.float32), np.ones(3, np.float32)
    one = rules.to_state_dict({"b": {"bias": bias, "kernel": kernel}, "a": {"kernel": kernel}, "log_scale": bias})
    other = rules.to_state_dict({"log_scale": bias, "a": {"kernel": kernel}, "b": {"kernel": kernel, "bias": bias}})
    assert [*one] == [*other] == ["log_scale", "a.weight", "b.weight", "b.bias"]


def test_layers_with_another_name():
    params = {"encoder": {"Dense_0": {"kernel": np.ones((2, 3))}, "Dense_10": {"kernel": np.ones((3, 1))}}}
    names = {"encoder": "net.0", "encoder.Dense_0": "first"}
    state_dict = rules.to_state_dict(params, names=names)
    assert {key: list(value.shape) for key, value in state_dict.items()} == {
        "first.weight": [3, 2],
        "net.0.Dense_10.weight": [1, 3],
    }
    back = rules.to_params(state_dict, params, names=names)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    with pytest.raises(WeightsError, match=r"key x.weight: stands for both params.encoder.Dense_0.kernel and params"):
        rules.to_state_dict(params, names={"encoder.Dense_0": "x", "encoder.Dense_10": "x"})


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 4)


LIKE = {
    "params": {
        "conv": {"kernel": np.ones((3, 3, 1, 2)), "bias": np.ones(2)},
        "norm": {"scale": np.ones(2), "bias": np.ones(2)},
        "out": {"kernel": np.ones((2, 4)), "bias": np.ones(4)},
    },
    "batch_stats": {"norm": {"mean": np.ones(2), "var": np.ones(2)}},
}


def without(key):
    return lambda weights: weights.pop(key)


def put(key, value):
    return lambda weights: weights.update({key: value})


BAD = {
    "key conv.bias: missing from": without("conv.bias"),
    "key norm.running_var: missing from": without("norm.running_var"),
    "key extra.weight: unknown in": put("extra.weight", torch.ones(1)),
    "key 3: unknown in": put(3, torch.ones(1)),
    "key out.weight: has shape [2, 4]; expected [4, 2]": put("out.weight", torch.ones(2, 4)),
    "key conv.weight: has shape [1, 2, 3, 3]; expected [2, 1, 3, 3]": put("conv.weight", torch.ones(1, 2, 3, 3)),
    "key norm.running_mean: has shape [3]; expected [2]": put("norm.running_mean", torch.ones(3)),
    "key out.bias: has type torch.float16; expected torch.float32 or": put("out.bias", torch.ones(4).half()),
    "key out.bias: has type torch.int64": put("out.bias", torch.ones(4).long()),
    "key out.bias: is list; expected a dense tensor": put("out.bias", [1.0] * 4),
    "key out.weight: is Tensor; expected a dense tensor": put("out.weight", torch.ones(4, 2).to_sparse()),
    "key norm.weight: holds values that are NaN or infinite": put("norm.weight", torch.tensor([1.0, torch.nan])),
    "key norm.running_var: holds values that are NaN or infinite": put(
        "norm.running_var", torch.tensor([1, torch.inf])
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_weights_are_refused_by_key(message):
    weights = dict(Small().state_dict())
    BAD[message](weights)
    for convert_to in (lambda: rules.to_variables(weights, LIKE), lambda: rules.for_module(weights, Small())):
        with pytest.raises(WeightsError) as caught:
            convert_to()
        assert str(caught.value).startswith(message)


def test_counters_are_supplied_and_left_out():
    module = Small()
    weights = rules.to_state_dict(LIKE["params"], LIKE["batch_stats"])
    assert "norm.num_batches_tracked" not in weights
    whole = rules.for_module(weights, module)
    assert [*whole] == [*module.state_dict()]
    module.load_state_dict(whole)
    jax.tree.map(np.testing.assert_array_equal, rules.to_variables(module.state_dict(), LIKE), LIKE)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"kernel": np.ones(3)}, r"key a.weight: its kernel has shape \[3\]; expected \[in, out\], or one to three"),
        ({"kernel": np.ones((1,) * 6)}, r"key a.weight: its kernel has shape \[1, 1, 1, 1, 1, 1\]"),
        ({"bias": np.ones(3, int)}, "key a.bias: has type int64; expected float32 or float64"),
        ({"bias": np.array([np.nan])}, "key a.bias: holds values that are NaN or infinite"),
    ],
)
def test_bad_trees_are_refused_by_key(layer, message):
    with pytest.raises(WeightsError, match=message):
        rules.to_state_dict({"a": layer})
