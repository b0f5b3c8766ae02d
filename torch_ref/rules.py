"""Weights of any model, by rule: a tree of Flax parameters to the state dict of the same layers in PyTorch, and back.

A parameter's path, joined by dots, is its key. The last name of the path says what it is:

| Flax        | PyTorch        | the values                                                                           |
| ----------- | -------------- | ------------------------------------------------------------------------------------ |
| `kernel`    | `weight`       | dense: [in, out] transposed to [out, in]                                             |
|             |                | convolution: [space..., in, out] to [out, in, space...]                              |
|             |                | transposed convolution: [space..., in, out] to [in, out, space...], flipped in space |
| `scale`     | `weight`       | the same (batch, layer and group norm)                                               |
| `embedding` | `weight`       | the same                                                                             |
| `mean`      | `running_mean` | the same (batch norm; among the batch statistics only)                               |
| `var`       | `running_var`  | the same (batch norm; among the batch statistics only)                               |
| any other   | the same       | the same                                                                             |

A kernel does not show whether its convolution is transposed: `transposed` names these layers, as PyTorch calls them.
It means `flax.linen.ConvTranspose` as it is by default, with transpose_kernel=False.

`names` translates layers that have another name in PyTorch: the dotted path of a Flax layer, or of a module around it,
to the dotted PyTorch name that takes its place, such as {"encoder.Dense_0": "encoder.fc1"}.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from torch_ref.layouts import StateDict, is_dense
from vae_jax.system.errors import WeightsError

if TYPE_CHECKING:
    import torch

# Nested mappings whose leaves have a shape: arrays, or jax.ShapeDtypeStruct.
Tree = Mapping[str, Any]
PARAMETERS = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
STATISTICS = {"mean": "running_mean", "var": "running_var"}
# Batch norm's counter, which Flax does not have.
COUNTER = "num_batches_tracked"


class Entry(NamedTuple):
    """An array of the variables, and its place in the state dict."""

    path: tuple[str, ...]  # from the name of its collection on
    key: str
    leaf: Any
    axes: tuple[int, ...]  # the tree's axes, in PyTorch's order
    flipped: tuple[int, ...]  # the axes, in PyTorch's order, that run backwards

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in PyTorch."""
        return tuple(self.leaf.shape[axis] for axis in self.axes)

    def to_torch(self, array: Any) -> np.ndarray:
        """The array of this place, or its gradient, as PyTorch has it."""
        return np.array(np.flip(np.transpose(np.asarray(array), self.axes), self.flipped), order="C")


def to_state_dict(
    params: Tree,
    batch_stats: Tree | None = None,
    transposed: Collection[str] = frozenset(),
    names: Mapping[str, str] | None = None,
) -> StateDict:
    """Copies a parameter tree into a state dict of plain contiguous tensors; the same keys in the same order always.

    Args:
      params: Nested mappings of float32 or float64 arrays.
      batch_stats: Flax's collection of that name, if the model has batch norms.
      transposed: PyTorch's names of the layers that are transposed convolutions.
      names: PyTorch's names of layers that are called differently there.

    Raises:
      WeightsError: An array has a type, a number of axes or a value that cannot be, or two have the same key.
    """
    import torch

    state_dict = {}
    variables = {"params": params, "batch_stats": batch_stats or {}}
    for entry in entries(variables, transposed, names):
        array = np.asarray(entry.leaf)
        if array.dtype not in (np.float32, np.float64):
            raise WeightsError(f"key {entry.key}: has type {array.dtype}; expected float32 or float64")
        _require_finite(entry.key, bool(np.isfinite(array).all()))
        state_dict[entry.key] = torch.from_numpy(entry.to_torch(array))
    return state_dict


def to_params(
    state_dict: Mapping[str, torch.Tensor],
    like: Tree,
    transposed: Collection[str] = frozenset(),
    names: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Copies a state dict into a parameter tree of NumPy arrays: the way back from `to_state_dict`.

    Args:
      state_dict: Dense tensors, float32 or float64. Batch norm's `num_batches_tracked` is left out.
      like: The tree to fill, of arrays or of the shapes that `jax.eval_shape` returns.
      transposed: PyTorch's names of the layers that are transposed convolutions.
      names: PyTorch's names of layers that are called differently there.

    Returns:
      Nested dicts as in `like`.

    Raises:
      WeightsError: A key is missing or unknown, or a tensor has a wrong shape, type or value; the message names it.
    """
    return to_variables(state_dict, {"params": like}, transposed, names)["params"]


def to_variables(
    state_dict: Mapping[str, torch.Tensor],
    like: Mapping[str, Tree],
    transposed: Collection[str] = frozenset(),
    names: Mapping[str, str] | None = None,
) -> dict[str, dict[str, Any]]:
    """As `to_params`, for a model with batch statistics: `like` has the collections `params` and `batch_stats`."""
    found = {key: tensor for key, tensor in state_dict.items() if not _is_counter(key, state_dict)}
    places = entries(like, transposed, names)
    check(found, {entry.key: entry.shape for entry in places}, "the state dict")
    variables: dict[str, dict[str, Any]] = {collection: {} for collection in like}
    for entry in places:
        array = np.flip(found[entry.key].detach().cpu().numpy(), entry.flipped)
        branch: dict[str, Any] = variables
        for name in entry.path[:-1]:
            branch = branch.setdefault(name, {})
        branch[entry.path[-1]] = np.array(np.transpose(array, np.argsort(entry.axes)), order="C")
    return variables


def for_module(state_dict: Mapping[str, torch.Tensor], module: torch.nn.Module) -> StateDict:
    """A state dict that `module.load_state_dict(..., strict=True)` accepts: checked, in the module's order of keys.

    Batch norm's `num_batches_tracked` is taken from the module where the state dict lacks it.

    Raises:
      WeightsError: A key is missing or unknown, or a tensor has a wrong shape, type or value; the message names it.
    """
    own = module.state_dict()
    found = {key: own[key] for key in own if _is_counter(key, own)} | dict(state_dict)
    shapes = {key: tuple(tensor.shape) for key, tensor in own.items()}
    check(found, shapes, "the weights", f"as the PyTorch module {type(module).__name__} has it")
    return {key: found[key] for key in own}


def transposed_layers(module: torch.nn.Module) -> frozenset[str]:
    """The names of a module's layers that are transposed convolutions."""
    from torch import nn

    kinds = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    return frozenset(name for name, layer in module.named_modules() if isinstance(layer, kinds))


def check(
    state_dict: Mapping[str, torch.Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    where: str,
    why: str = "as the parameters have it",
) -> None:
    """Checks that a state dict has exactly these keys, with dense finite tensors of these shapes.

    Raises:
      WeightsError: It does not; the message names the first key at fault.
    """
    import torch

    if missing := shapes.keys() - state_dict.keys():
        raise WeightsError(
            f"key {min(missing)}: missing from {where}; expected shape {list(shapes[min(missing)])}, {why}"
        )
    if unknown := sorted(map(str, state_dict.keys() - shapes.keys())):
        raise WeightsError(f"key {unknown[0]:.80}: unknown in {where}; expected only {', '.join(sorted(shapes))}")
    for key, shape in shapes.items():
        tensor = state_dict[key]
        if not is_dense(tensor):
            raise WeightsError(f"key {key}: is {type(tensor).__name__}; expected a dense tensor")
        if tuple(tensor.shape) != shape:
            raise WeightsError(f"key {key}: has shape {list(tensor.shape)!s:.80}; expected {list(shape)}, {why}")
        if _is_counter(key, state_dict):
            continue
        if tensor.dtype not in (torch.float32, torch.float64):
            raise WeightsError(f"key {key}: has type {tensor.dtype}; expected torch.float32 or torch.float64")
        _require_finite(key, bool(torch.isfinite(tensor).all()))


def entries(
    variables: Mapping[str, Tree],
    transposed: Collection[str] = frozenset(),
    names: Mapping[str, str] | None = None,
) -> list[Entry]:
    """Every array of the collections `params` and `batch_stats` with its key; sorted by layer, weights first.

    Raises:
      WeightsError: A kernel has a number of axes that no layer has, or two arrays have the same key.
    """
    found = [_entry(path, leaf, transposed, names or {}) for path, leaf in _leaves(variables)]
    # Trees that jax has returned are sorted, others are not: the file must not depend on it.
    found.sort(key=lambda entry: (entry.path[1:-1], not entry.key.endswith("weight"), entry.path[-1]))
    paths: dict[str, tuple[str, ...]] = {}
    for entry in found:
        if entry.key in paths:
            both = f"{'.'.join(paths[entry.key])} and {'.'.join(entry.path)}"
            raise WeightsError(f"key {entry.key}: stands for both {both}; expected a name of its own for each")
        paths[entry.key] = entry.path
    return found


def _entry(path: tuple[str, ...], leaf: Any, transposed: Collection[str], names: Mapping[str, str]) -> Entry:
    collection, *layers, last = path
    layer = translate(".".join(layers), names)
    name = (STATISTICS if collection == "batch_stats" else PARAMETERS).get(last, last)
    key = f"{layer}.{name}" if layer else name
    rank = len(leaf.shape)
    axes, flipped = tuple(range(rank)), ()
    if last == "kernel":
        if not 2 <= rank <= 5:
            raise WeightsError(
                f"key {key}: its kernel has shape {list(leaf.shape)}; expected [in, out], or one to three dimensions of"
                " space and [in, out]"
            )
        *space, fan_in, fan_out = axes
        axes = (fan_out, fan_in, *space)
        if layer in transposed:
            # PyTorch adds a kernel to the output at each input; Flax slides it over the spread input: backwards.
            axes, flipped = (fan_in, fan_out, *space), tuple(range(2, rank))
    return Entry(path, key, leaf, axes, flipped)


def _leaves(tree: Tree, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, branch in tree.items():
        if isinstance(branch, Mapping):
            yield from _leaves(branch, (*path, str(name)))
        else:
            yield (*path, str(name)), branch


def translate(layer: str, names: Mapping[str, str]) -> str:
    """The layer's PyTorch name: of the paths in `names` that lead to it, the longest decides."""
    leading = [path for path in names if layer == path or layer.startswith(f"{path}.")]
    if not leading:
        return layer
    path = max(leading, key=len)
    return names[path] + layer.removeprefix(path)


def _is_counter(key: Any, state_dict: Mapping[str, Any]) -> bool:
    layer, _, last = str(key).rpartition(".")
    return last == COUNTER and (f"{layer}.running_mean" if layer else "running_mean") in state_dict


def _require_finite(key: str, finite: bool) -> None:
    if not finite:
        raise WeightsError(f"key {key}: holds values that are NaN or infinite; expected finite ones")
