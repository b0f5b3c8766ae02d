"""The key layouts of this model's state dict, and the way from a state dict to the parameter tree of JAX and back.

Guesses nothing: refuses a missing or unknown key, a wrong shape or type, and a value that is not finite, by its name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from vae_jax.config import Layout
from vae_jax.system.console import say
from vae_jax.system.errors import WeightsError

if TYPE_CHECKING:
    import torch

Params = Mapping[str, Mapping[str, Mapping[str, np.ndarray]]]
StateDict = dict[str, "torch.Tensor"]

# The five linear layers: their places in the parameter tree, and their names in the state dict of each layout.
LAYERS = (("encoder", "fc1"), ("encoder", "fc2_mu"), ("encoder", "fc2_logvar"), ("decoder", "fc1"), ("decoder", "fc2"))
LAYOUTS: dict[Layout, tuple[str, ...]] = {
    "documented": ("encoder.fc1", "encoder.fc2_mu", "encoder.fc2_logvar", "decoder.fc1", "decoder.fc2"),
    "fc-mu": ("encoder.fc1", "encoder.fc_mu", "encoder.fc_logvar", "decoder.fc1", "decoder.fc2"),
    "pytorch-examples": ("fc1", "fc21", "fc22", "fc3", "fc4"),
}
# Where a checkpoint's dict keeps the model.
MODEL_KEYS = ("model", "model_state", "model_state_dict", "state_dict")
# What DistributedDataParallel, torch.compile and modules around the model put before its keys.
PREFIXES = ("module.", "_orig_mod.", "model.", "vae.")
# What torch.optim.swa_utils.AveragedModel puts beside them.
COUNT = "n_averaged"


def to_state_dict(params: Params, layout: Layout = "documented") -> StateDict:
    """Copies a parameter tree into a state dict of plain contiguous tensors.

    Args:
      params: `params[part][layer]["kernel"]` of shape [in, out] and `["bias"]` of shape [out], float32 or float64.
      layout: The key names to use.

    Raises:
      WeightsError: An entry is missing or unknown, or has a wrong shape, type or value.
    """
    import torch

    _require_keys(
        {f"{part}.{layer}.{name}" for part in params for layer in params[part] for name in params[part][layer]},
        {f"{part}.{layer}.{name}" for part, layer in LAYERS for name in ("kernel", "bias")},
        "the parameters",
    )
    state_dict = {}
    for (part, layer), name in zip(LAYERS, LAYOUTS[layout], strict=True):
        kernel, bias = params[part][layer]["kernel"], params[part][layer]["bias"]
        state_dict[f"{name}.weight"] = torch.from_numpy(np.array(np.asarray(kernel).T, order="C"))
        state_dict[f"{name}.bias"] = torch.from_numpy(np.array(bias))
    check(state_dict)
    return state_dict


def to_params(state_dict: Mapping[str, torch.Tensor]) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """Copies a state dict in any known layout into a parameter tree of NumPy arrays.

    Raises:
      WeightsError: A key is missing or unknown, or a tensor has a wrong shape, type or value.
    """
    names = LAYOUTS[check(state_dict)]
    params: dict[str, dict[str, dict[str, np.ndarray]]] = {"encoder": {}, "decoder": {}}
    for (part, layer), name in zip(LAYERS, names, strict=True):
        weight, bias = (state_dict[f"{name}.{kind}"].detach().cpu().numpy() for kind in ("weight", "bias"))
        params[part][layer] = {"kernel": np.array(weight.T, order="C"), "bias": np.array(bias)}
    return params


def check(state_dict: Mapping[str, torch.Tensor]) -> Layout:
    """Checks that a state dict is one of this model, whatever its sizes.

    Returns:
      The layout of its keys.

    Raises:
      WeightsError: It is not; the message names the first key at fault.
    """
    import torch

    # The layout that shares the most keys is the one that was meant.
    layout = max(LAYOUTS, key=lambda candidate: len(_keys(candidate) & state_dict.keys()))
    if not _keys(layout) & state_dict.keys():
        found = ", ".join(map(str, list(state_dict)[:3])) or "none at all"
        raise WeightsError(
            f"has no key of this model, but {found:.80}; expected {', '.join(sorted(_keys(layout)))}, alone or under"
            f" {', '.join(MODEL_KEYS)}; remove prefixes other than {', '.join(PREFIXES)}"
        )
    _require_keys(set(state_dict), _keys(layout), f"the state dict (layout {layout})")
    for key, tensor in state_dict.items():
        if not is_dense(tensor):
            raise WeightsError(f"key {key}: is {type(tensor).__name__}; expected a dense tensor")
        if tensor.dtype not in (torch.float32, torch.float64):
            raise WeightsError(f"key {key}: has type {tensor.dtype}; expected torch.float32 or torch.float64")
    dtype = Counter(tensor.dtype for tensor in state_dict.values()).most_common(1)[0][0]
    for key, shape in _shapes(state_dict, layout).items():
        tensor = state_dict[key]
        if tuple(tensor.shape) != shape:
            raise WeightsError(
                f"key {key}: has shape {list(tensor.shape)!s:.80}; expected {list(shape)}, to match the biases"
            )
        if tensor.dtype != dtype:
            raise WeightsError(f"key {key}: has type {tensor.dtype}; expected {dtype}, the type of the other keys")
        if not tensor.numel():
            raise WeightsError(f"key {key}: has shape {list(shape)}; expected at least one value")
        if not torch.isfinite(tensor).all():
            raise WeightsError(f"key {key}: holds values that are NaN or infinite; expected finite ones")
    return layout


def sizes(state_dict: Mapping[str, torch.Tensor]) -> tuple[int, int, int]:
    """(hidden_dim, latent_dim, pixels) of a state dict in any known layout: `VAE(*sizes(state_dict))` is its model.

    Raises:
      WeightsError: It is not a state dict of this model.
    """
    return _sizes(state_dict, check(state_dict))


def model_of(entries: Mapping[Any, Any], own: Collection[str] = ()) -> StateDict:
    """The state dict in the dict of a file: its own entries, or those under one of `MODEL_KEYS`.

    Prefixes that wrappers add to every key are left out, and half precision is widened to float32, both in one line.

    Args:
      entries: The dict.
      own: The keys of the model, where they are known: a prefix that belongs to them stays.

    Raises:
      WeightsError: It has several of these keys, or no dict under the key.
    """
    found = [key for key in MODEL_KEYS if key in entries and key not in own]
    if len(found) > 1:
        raise WeightsError(f"holds both {found[0]} and {found[1]}; expected one of them, the model's state dict")
    model = entries[found[0]] if found else entries
    if not isinstance(model, Mapping):
        raise WeightsError(f"key {found[0]}: is {type(model).__name__}; expected a state dict")
    return _widen(_strip_prefixes(dict(model), own))


def _strip_prefixes(state_dict: StateDict, own: Collection[str]) -> StateDict:
    """The state dict without the prefixes that wrappers add to every key, those in `own` excepted; says so."""
    if COUNT in state_dict and _all_start_with(rest := {k: v for k, v in state_dict.items() if k != COUNT}, "module."):
        say(f"weights: an average of models; {COUNT}, their number, is left out")
        state_dict = rest
    stripped = ""
    while set(own).isdisjoint(state_dict) and (prefix := _common_prefix(state_dict)):
        state_dict = {key.removeprefix(prefix): value for key, value in state_dict.items()}
        stripped += prefix
    if stripped:
        say(f"weights: every key begins with {stripped}, which is left out")
    return state_dict


def _common_prefix(state_dict: StateDict) -> str | None:
    return next((prefix for prefix in PREFIXES if _all_start_with(state_dict, prefix)), None)


def _all_start_with(state_dict: StateDict, prefix: str) -> bool:
    return bool(state_dict) and all(isinstance(key, str) and key.startswith(prefix) for key in state_dict)


def _widen(state_dict: StateDict) -> StateDict:
    """The state dict as float32, which holds every value exactly, if tensors in it are float16 or bfloat16; says so."""
    import torch

    halves = {torch.float16, torch.bfloat16}
    kinds = {value.dtype if is_dense(value) else None for value in state_dict.values()}
    if not kinds & halves or not kinds <= halves | {torch.float32}:
        return state_dict
    say(f"weights: {' and '.join(sorted(map(str, kinds)))}, read as float32")
    return {key: value.float() for key, value in state_dict.items()}


def is_dense(value: Any) -> bool:
    """Whether it is a tensor whose values all lie in memory: not sparse, quantized or without storage."""
    import torch

    dense = isinstance(value, torch.Tensor) and value.layout == torch.strided
    return dense and not value.is_quantized and not value.is_meta


def _keys(layout: Layout) -> set[str]:
    return {f"{name}.{kind}" for name in LAYOUTS[layout] for kind in ("weight", "bias")}


def _require_keys(found: set[str], expected: set[str], where: str) -> None:
    if missing := expected - found:
        raise WeightsError(f"key {min(missing)}: missing from {where}; expected {', '.join(sorted(expected))}")
    if unknown := found - expected:
        raise WeightsError(
            f"key {min(map(str, unknown)):.80}: unknown in {where}; expected {', '.join(sorted(expected))}"
        )


def _sizes(state_dict: Mapping[str, torch.Tensor], layout: Layout) -> tuple[int, int, int]:
    hidden_dim, latent_dim, pixels = (state_dict[f"{LAYOUTS[layout][layer]}.bias"].numel() for layer in (0, 1, 4))
    return hidden_dim, latent_dim, pixels


def _shapes(state_dict: Mapping[str, torch.Tensor], layout: Layout) -> dict[str, tuple[int, ...]]:
    """The shape that each key must have, given the lengths of the biases."""
    hidden_dim, latent_dim, pixels = _sizes(state_dict, layout)
    inputs = (pixels, hidden_dim, hidden_dim, latent_dim, hidden_dim)
    outputs = (hidden_dim, latent_dim, latent_dim, hidden_dim, pixels)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, fan_in, fan_out in zip(LAYOUTS[layout], inputs, outputs, strict=True):
        shapes |= {f"{name}.weight": (fan_out, fan_in), f"{name}.bias": (fan_out,)}
    return shapes
