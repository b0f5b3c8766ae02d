"""Reads a PyTorch training checkpoint, `{"model": ..., "optimizer": adam.state_dict()}`, for JAX to continue from."""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from torch_ref import convert, rules
from torch_ref.layouts import Params, StateDict, is_dense, model_of, to_params
from vae_jax.config import FLOAT32_MAX
from vae_jax.system.errors import WeightsError

# Where a checkpoint's dict keeps the optimizer.
OPTIMIZER_KEYS = ("optimizer", "optimizer_state", "optimizer_state_dict")
# JAX counts steps in an int32, which has to leave room for further ones.
MAX_STEPS = 10**9
# Settings that must have these values for `vae_jax.adam` to compute the same steps, as must the second beta, B2.
FIXED = {"weight_decay": 0, "amsgrad": False, "maximize": False}
B2 = 0.999
# Other entries of a group, by torch.optim.Adam, AdamW or a schedule, that change no step.
PASSIVE = {"params", "param_names", "name", "initial_lr", "max_lr", "min_lr"}
PASSIVE |= {"foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"}

AsParams = Callable[[StateDict], Params]


class Adam(NamedTuple):
    """The state of Adam; its first three fields are those of `optax.ScaleByAdamState`."""

    count: int  # steps taken  # pyright: ignore[reportIncompatibleMethodOverride]
    mu: Params  # means of the gradients, with the shapes and the type of the parameters
    nu: Params  # means of their squares
    settings: "Settings"


class Settings(NamedTuple):
    """The settings that may have any value: the rate, the decay of the mean of the gradients, and epsilon."""

    learning_rate: float
    b1: float
    eps: float


class Checkpoint(NamedTuple):
    """A model, and its optimizer if the file has one."""

    params: Params
    adam: Adam | None


def load_checkpoint(
    path: Path | str, like: rules.Tree | None = None, transposed: Collection[str] = frozenset()
) -> Checkpoint:
    """Reads a model and the state of its Adam. The file need not be trusted: no code in it is run.

    Args:
      path: A file that `convert.load` reads. A checkpoint's dict may have `torch.optim.Adam.state_dict()` under one of
        `OPTIMIZER_KEYS`. It may also hold other tensors, numbers, texts, lists and dicts, which are ignored.
      like: The parameter tree of the model, as `rules.to_params` takes it; by default the file holds the documented
        model, of any sizes.
      transposed: PyTorch's names of its layers that are transposed convolutions.

    Returns:
      The model, and Adam's state or None, both in the form of the parameter tree.

    Raises:
      WeightsError: The file does not hold this model, or `vae_jax.adam` cannot continue its optimizer exactly: it has
        other settings than JAX's Adam can have, or an entry is missing, unknown, or of a wrong shape, type or value.
    """
    as_params: AsParams = to_params
    if like is not None:
        as_params = partial(rules.to_params, like=like, transposed=transposed)
    with convert.explain_errors(path):
        entries = convert.read(path)
        own = {entry.key for entry in rules.entries({"params": like or {}}, transposed)}
        state_dict = model_of(entries, own)
        params = as_params(state_dict)
        for key, entry in entries.items():
            if key not in OPTIMIZER_KEYS and isinstance(entry, Mapping) and "param_groups" in entry:
                raise WeightsError(f"key {key:.80}: is an optimizer; expected it under {', '.join(OPTIMIZER_KEYS)}")
        found = [key for key in OPTIMIZER_KEYS if entries.get(key) is not None]
        if len(found) > 1:
            raise WeightsError(f"holds both {found[0]} and {found[1]}; expected one of them")
        if not found:
            return Checkpoint(params, None)
        try:
            return Checkpoint(params, _adam(entries[found[0]], state_dict, as_params))
        except WeightsError as error:
            raise WeightsError(f"{found[0]}: {error}; a file of model.state_dict() alone starts Adam anew") from None


def _adam(optimizer: Any, state_dict: StateDict, as_params: AsParams) -> Adam:
    state, groups = (_of(dict, optimizer, "it").get(key) for key in ("state", "param_groups"))
    settings = _settings(_of(list, groups, "param_groups"), list(state_dict))
    if not _of(dict, state, "state"):  # before the first step
        zeros = {key: torch.zeros_like(tensor) for key, tensor in state_dict.items()}
        return Adam(0, as_params(zeros), as_params(zeros), settings)
    _require_keys(state, range(len(state_dict)), "state")
    counts = []
    mu: StateDict = {}
    nu: StateDict = {}
    # Adam numbers the parameters in the model's order, which is also the order of its state dict.
    for index, (key, parameter) in enumerate(state_dict.items()):
        where = f"state[{index}]"
        entry = _of(dict, state[index], where)
        _require_keys(entry, ("step", "exp_avg", "exp_avg_sq"), where)
        counts.append(_count(entry["step"], f"{where}.step"))
        if counts[-1] != counts[0]:
            raise WeightsError(f"{where}.step is {counts[-1]}; expected {counts[0]}, as in state[0]")
        mu[key] = _average(entry["exp_avg"], parameter, f"{where}.exp_avg ({key})")
        nu[key] = _average(entry["exp_avg_sq"], parameter, f"{where}.exp_avg_sq ({key})")
        if (nu[key] < 0).any():
            raise WeightsError(f"{where}.exp_avg_sq ({key}) holds negative values; expected means of squares")
    return Adam(counts[0], as_params(mu), as_params(nu), settings)


def _settings(groups: list[Any], parameters: list[str]) -> Settings:
    """Checks the settings of all groups, and that the groups have the same ones."""
    if not 0 < len(groups) <= len(parameters):
        raise WeightsError(f"has {len(groups)} param_groups; expected one, or several with the same settings")
    numbers: list[Any] = []
    names: list[Any] = []
    found: list[Settings] = []
    for index, group in enumerate(groups):
        where = f"param_groups[{index}]"
        _of(dict, group, where)
        found.append(_settings_of(group, where))
        for name, value, first in zip(("lr", "betas[0]", "eps"), found[-1], found[0], strict=True):
            if value != first:
                raise WeightsError(f"{where}.{name} is {value}; expected {first}, as in param_groups[0]")
        numbers += _of(list, group.get("params"), f"{where}.params")
        names += _of(list, group.get("param_names", []), f"{where}.param_names")
    if numbers != list(range(len(parameters))):
        raise WeightsError(f"param_groups have other params than 0 to {len(parameters) - 1} in this order")
    if names and names != parameters:
        raise WeightsError("param_groups have other param_names than the keys of the model in their order")
    return found[0]


def _settings_of(group: Mapping[Any, Any], where: str) -> Settings:
    for name in ("betas", "eps", *FIXED):
        # Before 1.12, PyTorch's Adam had no `maximize`.
        if group.get(name, False if name == "maximize" else None) is None:
            raise WeightsError(f"{where}.{name} is missing; expected the state of torch.optim.Adam")
    for name, expected in FIXED.items():
        value = group.get(name, False)
        if not _is_plain(value) or value != expected:
            raise WeightsError(f"{where}.{name} is {_shown(value)}; expected {expected}, as JAX trains")
    if unknown := group.keys() - FIXED - PASSIVE - {"lr", "betas", "eps"}:
        raise WeightsError(f"{where}.{min(map(str, unknown)):.80} is unknown; expected the state of torch.optim.Adam")
    rate, betas, eps = _number(group.get("lr")), group["betas"], _number(group["eps"])
    for name, value in (("lr", rate), ("eps", eps)):
        if type(value) not in (int, float) or not 0 < value <= FLOAT32_MAX:
            raise WeightsError(f"{where}.{name} is {_shown(value)}; expected a finite number above 0")
    betas = tuple(betas) if type(betas) is list else betas
    if not (type(betas) is tuple and _is_plain(betas)) or not 0 <= betas[0] < 1 or betas[1] != B2:
        raise WeightsError(f"{where}.betas is {_shown(betas)}; expected a number of at least 0 and below 1, and {B2}")
    return Settings(float(rate), float(betas[0]), float(eps))


def _count(step: Any, where: str) -> int:
    step = _number(step)
    if type(step) not in (int, float) or not 0 <= step <= MAX_STEPS or step != int(step):
        raise WeightsError(f"{where} is {_shown(step)}; expected a whole number from 0 to {MAX_STEPS}")
    return int(step)


def _average(tensor: Any, parameter: torch.Tensor, where: str) -> torch.Tensor:
    if not is_dense(tensor):
        raise WeightsError(f"{where} is {_shown(tensor)}; expected a dense tensor")
    if tensor.shape != parameter.shape or tensor.dtype != parameter.dtype:
        raise WeightsError(
            f"{where} is {list(tensor.shape)} of {tensor.dtype}; expected {list(parameter.shape)} of"
            f" {parameter.dtype}, as the parameter has"
        )
    if not torch.isfinite(tensor).all():
        raise WeightsError(f"{where} holds values that are NaN or infinite; expected finite ones")
    return tensor


def _require_keys(found: Mapping[Any, Any], expected: Any, where: str) -> None:
    for key in expected:
        if key not in found:
            raise WeightsError(f"{where}[{key}] is missing; expected the state of torch.optim.Adam after a step")
    if unknown := found.keys() - set(expected):
        raise WeightsError(f"{where}[{min(map(str, unknown)):.80}] is unknown; expected the state of torch.optim.Adam")


def _of(kind: type, value: Any, where: str) -> Any:
    if not isinstance(value, kind):
        raise WeightsError(f"{where} is {_shown(value)}; expected a {kind.__name__}")
    return value


def _number(value: Any) -> Any:
    """PyTorch keeps some numbers in a tensor of one value."""
    return value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value


def _is_plain(value: Any) -> bool:
    """Whether it is a number, a text or a pair of numbers: comparing or printing others may take forever."""
    if type(value) is tuple and len(value) == 2:
        return all(type(number) in (int, float) for number in value)
    return type(value) in (int, float, bool, str)


def _shown(value: Any) -> str:
    return f"{value}"[:80] if _is_plain(value) else type(value).__name__
