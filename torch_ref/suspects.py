"""The first layer that differs, and why: the usual mistakes of a port, each tried on the PyTorch side.

A suspect is guilty when PyTorch, changed in that one way, computes what Flax computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_ref.formulas import Finding, difference, same
from torch_ref.torch_side import ChangedInput, Record, TorchSide

Elementwise = Callable[[Tensor], Tensor]
ACTIVATIONS: dict[str, Elementwise] = {
    "no activation": lambda x: x,
    "relu": F.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "exact gelu": F.gelu,
    "tanh-approximated gelu": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "elu": F.elu,
    "selu": F.selu,
    "softplus": F.softplus,
    "relu6": F.relu6,
    **{
        f"leaky relu of slope {slope}": lambda x, slope=slope: F.leaky_relu(x, slope) for slope in (0.01, 0.1, 0.2, 0.3)
    },
}
SCALES: dict[str, Elementwise] = {
    "times 255": lambda x: x * 255,
    "divided by 255": lambda x: x / 255,
    "as 2x - 1": lambda x: 2 * x - 1,
    "as (x + 1) / 2": lambda x: (x + 1) / 2,
    "normalized by MNIST's mean and deviation": lambda x: (x - 0.1307) / 0.3081,
}
EPSILONS = (1e-5, 1e-6, 1e-3, 1e-4, 1e-7, 1e-8, 1e-12)
# Layers that take [batch, channel, space...] in PyTorch and [batch, space..., channel] in Flax.
CHANNELS_FIRST = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm),
)
Arrangement = Callable[[Tensor, tuple[int, ...]], Tensor]


def _as_it_is(source: Tensor, shape: tuple[int, ...]) -> Tensor:
    return source.reshape(shape)


def _channels_first_to_last(source: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[batch, channel, space...] to [batch, space..., channel]; of flat values, the target's shape tells the space."""
    if source.ndim == 2 < len(shape):
        source = source.reshape(len(source), shape[-1], *shape[1:-1])
    return source.movedim(1, -1).reshape(shape)


def _channels_last_to_first(source: Tensor, shape: tuple[int, ...]) -> Tensor:
    if source.ndim == 2 < len(shape):
        source = source.reshape(len(source), *shape[2:], shape[1])
    return source.movedim(-1, 1).reshape(shape)


ARRANGEMENTS: tuple[Arrangement, ...] = (_as_it_is, _channels_first_to_last, _channels_last_to_first)


class Change(NamedTuple):
    """A change of the PyTorch side that would explain a difference."""

    kind: str
    where: str
    says: str
    inputs: Mapping[str, ChangedInput] = {}
    attributes: Mapping[str, Mapping[str, Any]] = {}


class Origin(NamedTuple):
    """Where a layer's input comes from: an earlier layer's output (or what the part gets), an activation, an order."""

    source: str  # empty for what the part gets
    activation: str
    arrangement: Arrangement


class Place(NamedTuple):
    """The first thing that differs in the order of the calls."""

    layer: str
    what: str  # input or output
    flax: np.ndarray
    torch: np.ndarray


def in_layers(
    side: TorchSide,
    part: str,
    given: np.ndarray,
    pixels: int,
    flax: Mapping[str, np.ndarray],
    flax_layers: Mapping[str, Record],
) -> list[Finding]:
    """The first layer of the encoder or the decoder that differs, and why; nothing if the outputs are the same.

    Args:
      side: The PyTorch side, in float64, with the same weights as Flax.
      part: `encode` or `decode`.
      given: What both sides get: images or latents.
      pixels: Pixels of an image.
      flax: Flax's outputs of this part, by name.
      flax_layers: The calls of Flax's layers, by their PyTorch names. Layers that Flax has no module for are judged by
        the outputs.
    """
    outputs, records = side.trace(part, given, pixels)
    place = _first_difference(records, _as_in_pytorch(flax_layers, dict(side.module.named_modules())))
    if place is None and _agree(outputs, flax):
        return []
    start = side.tensor(given)
    for change in _changes(side, part, records, start, [*records] if place is None else [place.layer]):
        if place is not None and (place.what == "input") != bool(change.inputs and not change.attributes):
            continue
        try:
            found, changed = side.trace(part, given, pixels, {**change.inputs}, change.attributes)
        except Exception:  # the change does not fit this layer
            continue
        explains = (
            _agree(found, flax)
            if place is None
            else same(place.flax, getattr(changed[place.layer], place.what).numpy())
        )
        if explains:
            return [Finding(change.kind, change.where, change.says)]
    if place is not None:
        return [_unexplained(place)]
    name = next(name for name, a in zip(flax, outputs, strict=True) if not same(flax[name], a.numpy()))
    worst = difference(flax[name], outputs[[*flax].index(name)].numpy())
    layers = f" after {', '.join(name for name in records if name in flax_layers)}" if flax_layers else ""
    return [Finding("unexplained", name, f"differs by {worst:.2g}{layers}; no usual mistake explains it")]


def _unexplained(place: Place) -> Finding:
    if place.flax.shape != place.torch.shape:
        shapes = f"{list(place.flax.shape)} in Flax, {list(place.torch.shape)} in PyTorch"
        return Finding("another shape", place.layer, f"its {place.what} is {shapes}; all before it agrees")
    worst = difference(place.flax, place.torch)
    return Finding("unexplained", place.layer, f"its {place.what} differs by {worst:.2g}; all before it agrees")


def _agree(outputs: tuple[Tensor, ...], flax: Mapping[str, np.ndarray]) -> bool:
    return all(same(expected, output.numpy()) for expected, output in zip(flax.values(), outputs, strict=True))


def _as_in_pytorch(layers: Mapping[str, Record], modules: Mapping[str, nn.Module]) -> dict[str, Record]:
    """Flax's records with the channels of each layer where PyTorch's layer has them."""
    records = dict(layers)
    for name in layers.keys() & modules.keys():
        if isinstance(modules[name], CHANNELS_FIRST):
            records[name] = Record(*(np.moveaxis(array, -1, 1) for array in layers[name]))
    return records


def _first_difference(records: Mapping[str, Record], flax: Mapping[str, Record]) -> Place | None:
    for name, record in records.items():
        for what in ("input", "output") if name in flax else ():
            expected, found = getattr(flax[name], what), getattr(record, what)
            if not same(expected, found.numpy()):
                return Place(name, what, expected, found.numpy())
    return None


def _origin(records: Mapping[str, Record], start: Tensor, layer: str) -> Origin | None:
    """How the input of a layer comes about, found by trying."""
    earlier = [*records][: [*records].index(layer)]
    target = records[layer].input
    for source in [*reversed(earlier), ""]:
        output = records[source].output if source else start
        if output.numel() != target.numel():
            continue
        for activation, function in ACTIVATIONS.items():
            for arrangement in ARRANGEMENTS:
                if same(arrangement(function(output), tuple(target.shape)).numpy(), target.numpy()):
                    return Origin(source, activation, arrangement)
    return None


def _changes(
    side: TorchSide, part: str, records: Mapping[str, Record], start: Tensor, names: list[str]
) -> Iterator[Change]:
    """Every change that could explain a difference in one of these layers, or in its input."""
    modules = dict(side.module.named_modules())
    origins = {name: origin for name in records if (origin := _origin(records, start, name))}
    first = next(iter(records))
    if first in names and part == "encode":
        for how, scale in SCALES.items():
            inputs = {first: lambda _, given, scale=scale: scale(given)}
            yield Change("scaled pixels", first, f"Flax gives it the pixels of PyTorch {how}", inputs)
    for name in names:
        yield from _changes_of_weights(name, modules[name])
        yield from _changes_of_padding(name, modules[name], records[name])

    def remade(activation: str, arrangement: Arrangement, source: str) -> ChangedInput:
        def make(records: dict[str, Record], given: Tensor) -> Tensor:
            output = records[source].output if source else start
            return arrangement(ACTIVATIONS[activation](output), tuple(given.shape))

        return make

    concerned = {origins[name] for name in names if name in origins}
    for origin in sorted(concerned, key=lambda origin: [*records, ""].index(origin.source)):
        source, activation, arrangement = origin
        layers = [name for name in origins if origins[name] == origin]
        for other in _others(activation) if source else ():
            inputs = {layer: remade(other, arrangement, source) for layer in layers}
            says = f"Flax has {other} after it, PyTorch {activation}"
            yield Change("another activation", source, says, inputs)
        for other in ARRANGEMENTS:
            if other is not arrangement:
                inputs = {layer: remade(activation, other, source) for layer in layers}
                says = "its inputs are the same in another order: Flax has channels last where PyTorch has them first"
                yield Change("channel order in a flatten", layers[0], says, inputs)

    # An activation that was changed in one place was perhaps changed in all.
    for activation in {origin.activation for origin in concerned if origin.source}:
        alike = {name: origin for name, origin in origins.items() if origin.activation == activation and origin.source}
        for other in _others(activation):
            inputs = {name: remade(other, origin.arrangement, origin.source) for name, origin in alike.items()}
            sources = sorted({origin.source for origin in alike.values()})
            says = f"Flax has {other} after {', '.join(sources)}, PyTorch {activation}"
            yield Change("another activation", sources[0], says, inputs)


def _others(activation: str) -> list[str]:
    return [name for name in ACTIVATIONS if name != activation]


def _changes_of_weights(name: str, layer: nn.Module) -> Iterator[Change]:
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    if isinstance(weight, Tensor):
        kinds: list[tuple[str, str, Tensor]] = []
        if weight.ndim > 1 and weight.shape[0] == weight.shape[1]:
            kinds.append(("transposed kernel", "inputs and outputs", weight.transpose(0, 1)))
        if weight.ndim == 4 and weight.shape[2] == weight.shape[3]:
            kinds.append(("transposed kernel", "height and width", weight.transpose(2, 3)))
        if weight.ndim > 2:
            kinds.append(
                ("flipped kernel", "start and end of each dimension of space", weight.flip((*range(2, weight.ndim),)))
            )
        for kind, what, changed in kinds:
            says = f"its kernel has {what} exchanged on one side"
            yield Change(kind, name, says, attributes={name: {"weight": nn.Parameter(changed)}})
    if isinstance(bias, Tensor):
        attributes = {name: {"bias": nn.Parameter(torch.zeros_like(bias))}}
        yield Change("dropped bias", name, "Flax does not add its bias", attributes=attributes)
    for eps in EPSILONS if hasattr(layer, "eps") else ():
        says = f"Flax has {eps:g}, PyTorch {layer.eps:g}"
        yield Change("epsilon of a norm layer", name, says, attributes={name: {"eps": eps}})


def _changes_of_padding(name: str, layer: nn.Module, record: Record) -> Iterator[Change]:
    """Flax's padding "SAME" of a strided convolution, which is not the same before and behind."""
    if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return
    pads: list[int] = []
    for size, kernel, stride in zip(record.input.shape[2:], layer.kernel_size, layer.stride, strict=True):
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        pads = [total // 2, total - total // 2, *pads]  # the last dimension first
    says = f'Flax pads {pads} as "SAME" does, PyTorch {list(layer.padding)} before and behind'
    inputs = {name: lambda _, given: F.pad(given, pads)}
    yield Change("padding of a convolution", name, says, inputs, {name: {"padding": (0,) * len(layer.kernel_size)}})
