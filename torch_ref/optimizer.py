"""A PyTorch training checkpoint, `{"model": ..., "optimizer": adam.state_dict()}`, as what JAX goes on from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from torch_ref import convert
from torch_ref.convert import Params, StateDict, WeightsError
from vae_jax.config import FLOAT32_MAX

# Where a checkpoint's dict keeps the optimizer.
OPTIMIZER_KEYS = ("optimizer", "optimizer_state", "optimizer_state_dict")
# They are counted in an int32, which has to leave room for further ones.
MOST_STEPS = 10**9
# What `vae_jax.optimizer.adam` computes: with any of these otherwise, it would go on differently.
SETTINGS = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0, "amsgrad": False, "maximize": False}
# What else torch.optim.Adam and AdamW, or a schedule, store of a group; it changes no step.
PASSIVE = {"lr", "params", "param_names", "name", "initial_lr", "max_lr", "min_lr"}
PASSIVE |= {"foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"}


class Adam(NamedTuple):
    """The state of Adam: `optax.ScaleByAdamState(count, mu, nu)` is the same."""

    count: int  # steps taken  # pyright: ignore[reportIncompatibleMethodOverride]
    mu: Params  # means of the gradients, of the shapes and the type of the parameters
    nu: Params  # means of their squares
    learning_rate: float


class Checkpoint(NamedTuple):
    """A model, and its optimizer where the file has one."""

    params: Params
    adam: Adam | None


def load_checkpoint(path: Path | str) -> Checkpoint:
    """Reads a model and the state of its Adam, from a source that need not be trusted: no code in it is run.

    Args:
      path: What `convert.load` reads: a state dict, or a dict with one under one of `convert.MODEL_KEYS`. Such a dict
        may have `torch.optim.Adam.state_dict()` under one of `OPTIMIZER_KEYS`; what else it holds is not looked at, and
        may be dense tensors, numbers, texts, lists and dicts.

    Returns:
      The model in the parameter tree's form, and Adam's state, if there is one, in the same form.

    Raises:
      WeightsError: The file does not hold this model, or its optimizer is not one that `vae_jax.optimizer.adam` can
        continue exactly: other settings, or an entry that is missing, unknown, or of a wrong shape, type or value.
    """
    with convert.naming(path):
        entries = convert.read(path)
        state_dict = convert.model_of(entries)
        params = convert.to_params(state_dict)
        found = [key for key in OPTIMIZER_KEYS if entries.get(key) is not None]
        for key, entry in entries.items():
            if key not in OPTIMIZER_KEYS and isinstance(entry, Mapping) and "param_groups" in entry:
                raise WeightsError(f"key {key:.80}: is an optimizer; expected it under {', '.join(OPTIMIZER_KEYS)}")
        if len(found) > 1:
            raise WeightsError(f"holds both {found[0]} and {found[1]}; expected one of them")
        if not found:
            return Checkpoint(params, None)
        try:
            return Checkpoint(params, _adam(entries[found[0]], state_dict))
        except WeightsError as error:
            raise WeightsError(
                f"{found[0]}: {error}; `python -m torch_ref.convert IN.pth OUT.pth` keeps the model alone"
            ) from None


def _adam(optimizer: Any, state_dict: StateDict) -> Adam:
    state, groups = (_of(dict, optimizer, "it").get(key) for key in ("state", "param_groups"))
    learning_rate = _learning_rate(_of(list, groups, "param_groups"), list(state_dict))

    zeros = {key: torch.zeros_like(tensor) for key, tensor in state_dict.items()}
    if not _of(dict, state, "state"):  # it has not stepped yet
        return Adam(0, convert.to_params(zeros), convert.to_params(zeros), learning_rate)
    _require_keys(state, range(len(state_dict)), "state")
    counts = []
    averages: dict[str, StateDict] = {"exp_avg": {}, "exp_avg_sq": {}}
    # Adam numbers the parameters in the model's order, which is that of its state dict.
    for index, (key, parameter) in enumerate(state_dict.items()):
        where = f"state[{index}]"
        entry = _of(dict, state[index], where)
        _require_keys(entry, ("step", "exp_avg", "exp_avg_sq"), where)
        counts.append(_count(entry["step"], f"{where}.step"))
        if counts[-1] != counts[0]:
            raise WeightsError(f"{where}.step is {counts[-1]}; expected {counts[0]}, as in state[0]")
        for name, average in averages.items():
            average[key] = _average(entry[name], parameter, f"{where}.{name} ({key})")
            if name == "exp_avg_sq" and (average[key] < 0).any():
                raise WeightsError(f"{where}.{name} ({key}) holds negative values; expected means of squares")
    mu, nu = map(convert.to_params, averages.values())
    return Adam(counts[0], mu, nu, learning_rate)


def _learning_rate(groups: list[Any], parameters: list[str]) -> float:
    """The one step size of all groups, whose other settings have to be those of ours."""
    if not 0 < len(groups) <= len(parameters):
        raise WeightsError(f"has {len(groups)} param_groups; expected one, or several with the same settings")
    numbers: list[Any] = []
    names: list[Any] = []
    rates: list[float] = []
    for index, group in enumerate(groups):
        where = f"param_groups[{index}]"
        _of(dict, group, where)
        for name, expected in SETTINGS.items():
            # Adam of before PyTorch 1.12 has no `maximize`.
            found = group.get(name, False if name == "maximize" else None)
            if found is None:
                raise WeightsError(f"{where}.{name} is missing; expected the state of torch.optim.Adam")
            if not _is_simple(found) or found != expected:
                raise WeightsError(f"{where}.{name} is {_shown(found)}; expected {expected}, as JAX trains")
        if unknown := group.keys() - SETTINGS - PASSIVE:
            name = min(map(str, unknown))
            raise WeightsError(f"{where}.{name:.80} is unknown; expected the state of torch.optim.Adam")
        rate = _number(group.get("lr"))
        if type(rate) not in (int, float) or not 0 < rate <= FLOAT32_MAX:
            raise WeightsError(f"{where}.lr is {_shown(rate)}; expected a finite number above 0")
        rates.append(float(rate))
        if rates[-1] != rates[0]:
            raise WeightsError(f"{where}.lr is {rate}; expected {rates[0]}, as in param_groups[0]")
        numbers += _of(list, group.get("params"), f"{where}.params")
        names += _of(list, group.get("param_names", []), f"{where}.param_names")
    if numbers != list(range(len(parameters))):
        raise WeightsError(f"param_groups have other params than 0 to {len(parameters) - 1} in order; expected these")
    if names and names != parameters:
        raise WeightsError("param_groups have other param_names than the model, or in another order; expected its own")
    return rates[0]


def _count(step: Any, where: str) -> int:
    """Steps taken."""
    step = _number(step)
    if type(step) not in (int, float) or not 0 <= step <= MOST_STEPS or step != int(step):
        raise WeightsError(f"{where} is {_shown(step)}; expected a whole number from 0 to {MOST_STEPS}")
    return int(step)


def _number(value: Any) -> Any:
    """A number that may stand in a tensor of one, as PyTorch keeps some."""
    return value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value


def _average(tensor: Any, parameter: torch.Tensor, where: str) -> torch.Tensor:
    if not isinstance(tensor, torch.Tensor):
        raise WeightsError(f"{where} is {_shown(tensor)}; expected a dense tensor")
    if tensor.shape != parameter.shape or tensor.dtype != parameter.dtype:
        raise WeightsError(
            f"{where} is {list(tensor.shape)} of {tensor.dtype}; expected {list(parameter.shape)} of {parameter.dtype},"
            " as the parameter"
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


def _is_simple(value: Any) -> bool:
    """Whether it is a number, a text or a pair of numbers; a tensor or a nest compares and prints otherwise."""
    if type(value) is tuple and len(value) == 2:
        return all(type(number) in (int, float) for number in value)
    return type(value) in (int, float, bool, str)


def _shown(value: Any) -> str:
    """A value in short."""
    return f"{value}"[:80] if _is_simple(value) else type(value).__name__
