"""Parameter tree <-> PyTorch state dict, in every known key layout; vae.pth and .safetensors files read and written.

Nothing is guessed: a key too many or too few, a shape that does not fit, a value that is not finite is refused by name.
`python -m torch_ref.convert IN.pth OUT.pth --layout NAME` rewrites a file in another layout, or as .safetensors.
"""

import contextlib
import dataclasses
import io
import stat
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import safetensors.torch
import torch
import tyro

from torch_ref import pth
from torch_ref.pth import WeightsError
from vae_jax import cli
from vae_jax.config import memory, reason, require_writable
from vae_jax.files import replacing
from vae_jax.log import say

Params = Mapping[str, Mapping[str, Mapping[str, np.ndarray]]]
StateDict = dict[str, torch.Tensor]
Layout = Literal["documented", "fc-mu", "pytorch-examples"]

# The five linear layers: their place in the parameter tree, and their names in the files of each layout.
LAYERS = (("encoder", "fc1"), ("encoder", "fc2_mu"), ("encoder", "fc2_logvar"), ("decoder", "fc1"), ("decoder", "fc2"))
LAYOUTS: dict[Layout, tuple[str, ...]] = {
    "documented": ("encoder.fc1", "encoder.fc2_mu", "encoder.fc2_logvar", "decoder.fc1", "decoder.fc2"),
    "fc-mu": ("encoder.fc1", "encoder.fc_mu", "encoder.fc_logvar", "decoder.fc1", "decoder.fc2"),
    "pytorch-examples": ("fc1", "fc21", "fc22", "fc3", "fc4"),
}


# Where a checkpoint's dict keeps the model.
MODEL_KEYS = ("model", "model_state", "model_state_dict", "state_dict")


def to_state_dict(params: Params, layout: Layout = "documented") -> StateDict:
    """Copies a parameter tree into a state dict of plain contiguous tensors.

    Args:
      params: `params[part][layer]["kernel"]` of shape [in, out] and `["bias"]` of shape [out], float32 or float64.
      layout: Key names of the state dict.

    Raises:
      WeightsError: An entry is missing or unknown, or has a wrong shape, type or value.
    """
    found = {f"{part}.{layer}.{name}" for part in params for layer in params[part] for name in params[part][layer]}
    _require_keys(
        found, {f"{part}.{layer}.{name}" for part, layer in LAYERS for name in ("kernel", "bias")}, "the parameters"
    )
    state_dict = {}
    for (part, layer), name in zip(LAYERS, LAYOUTS[layout], strict=True):
        kernel, bias = params[part][layer]["kernel"], params[part][layer]["bias"]
        state_dict[f"{name}.weight"] = torch.from_numpy(np.array(np.asarray(kernel).T, order="C"))
        state_dict[f"{name}.bias"] = torch.from_numpy(np.array(bias))
    check(state_dict)
    return state_dict


def to_params(state_dict: Mapping[str, torch.Tensor]) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """Copies a state dict, in whichever known layout, into a parameter tree of NumPy arrays.

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
      WeightsError: Naming the first key at fault.
    """
    # The layout that shares the most keys is the one that is meant.
    keys: dict[Layout, set[str]] = {layout: _keys(layout) for layout in LAYOUTS}
    layout = max(keys, key=lambda candidate: len(keys[candidate] & state_dict.keys()))
    if not keys[layout] & state_dict.keys():
        found = _shown(", ".join(map(str, list(state_dict)[:3])) or "none at all")
        raise WeightsError(
            f"has no key of this model, but {found}; expected {', '.join(sorted(keys[layout]))}, alone or under"
            f' {", ".join(MODEL_KEYS)}; what a wrapper has put before them ("module.", "_orig_mod.") has to go'
        )
    _require_keys(set(state_dict), keys[layout], f"the state dict (layout {layout})")

    for key, tensor in state_dict.items():
        if (
            not isinstance(tensor, torch.Tensor)
            or tensor.layout != torch.strided
            or tensor.is_quantized
            or tensor.is_meta
        ):
            raise WeightsError(f"key {key}: is {type(tensor).__name__}; expected a dense tensor")
        if tensor.dtype not in (torch.float32, torch.float64):
            raise WeightsError(f"key {key}: has type {tensor.dtype}; expected torch.float32 or torch.float64")
    dtype = Counter(tensor.dtype for tensor in state_dict.values()).most_common(1)[0][0]
    for key, shape in _shapes(state_dict, layout).items():
        tensor = state_dict[key]
        if tuple(tensor.shape) != shape:
            raise WeightsError(
                f"key {key}: has shape {_shown(list(tensor.shape))}; expected {list(shape)}, to go with the biases"
            )
        if tensor.dtype != dtype:
            raise WeightsError(f"key {key}: has type {tensor.dtype}; expected {dtype}, as the other keys have it")
        if not tensor.numel():
            raise WeightsError(f"key {key}: has shape {_shown(list(tensor.shape))}; expected at least one value")
        if not torch.isfinite(tensor).all():
            raise WeightsError(f"key {key}: holds values that are NaN or infinite; expected finite ones")
    return layout


def sizes(state_dict: Mapping[str, torch.Tensor]) -> tuple[int, int, int]:
    """(hidden_dim, latent_dim, pixels) of a state dict in any known layout: `VAE(*sizes(state_dict))` is its model."""
    names = LAYOUTS[check(state_dict)]
    (hidden_dim, pixels), (latent_dim, _) = (
        state_dict[f"{names[0]}.weight"].shape,
        state_dict[f"{names[1]}.weight"].shape,
    )
    return hidden_dim, latent_dim, pixels


def load(path: Path | str) -> StateDict:
    """Reads a file in any known layout, from a source that need not be trusted: no code in it is run.

    Args:
      path: A PyTorch file, or one of the safetensors package where the name ends in .safetensors. The model may stand
        in a checkpoint's dict, under one of `MODEL_KEYS`.

    Returns:
      A state dict in the documented layout, ready for `torch_ref.model.VAE.load_state_dict`.

    Raises:
      WeightsError: The file is missing, is of another kind, or does not hold this model.
    """
    with naming(path):
        return to_state_dict(to_params(model_of(read(path))))


@contextlib.contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Every error in its block comes out as a WeightsError: one printable line that begins with the path."""
    try:
        yield
    except WeightsError as error:
        message = str(error)
    except OSError as error:
        message = f"cannot be read ({error.strerror or error}); name a weights file"
    except Exception as error:  # a damaged file can break its reader anywhere
        writer = "safetensors.torch.save_file" if is_safetensors(path) else "torch.save"
        message = (
            f"is not a file of plain tensors ({reason(error)}); expected one that {writer}(model.state_dict()) wrote"
        )
    else:
        return
    raise WeightsError(
        "".join(char if char.isprintable() else repr(char)[1:-1] for char in f"{path}: {message}")
    ) from None


def read(path: Path | str) -> dict[Any, Any]:
    """Reads the dict in a file of either kind, taking no more memory than a few times its length.

    Returns:
      The entries: dense tensors, numbers, texts, dicts and lists of these.

    Raises:
      WeightsError: It is no regular file, is too long, or holds no dict, or what has no place in one.
      OSError: It cannot be read.
      Exception: Of whatever kind its reader raises, where it is damaged or holds more than that.
    """
    status = Path(path).stat()
    # A pipe or a device might never end.
    if not stat.S_ISREG(status.st_mode) or not status.st_size:
        raise WeightsError("is empty, or not a regular file; name a weights file")
    # Tensors that share their storage, and the copies on the way, take several times as much.
    if status.st_size > memory() / 8:
        raise WeightsError(
            f"takes {status.st_size / 1e9:,.1f} GB; expected at most {memory() / 8e9:,.1f} GB, an eighth of the memory"
        )
    entries = _read_safetensors(path) if is_safetensors(path) else pth.read(path)
    if not isinstance(entries, dict):
        raise WeightsError(f"holds {type(entries).__name__}; expected a state dict")
    return entries


def _read_safetensors(path: Path | str) -> StateDict:
    content = Path(path).read_bytes()
    # A long header makes the package build millions of objects.
    if struct.unpack("<Q", content[:8])[0] > pth.MOST:
        raise ValueError("its header is too long")
    return safetensors.torch.load(content)


def model_of(entries: Mapping[Any, Any]) -> StateDict:
    """The state dict in what `read` returns: its entries themselves, or those under one of `MODEL_KEYS`.

    Raises:
      WeightsError: There are several, or it is none.
    """
    found = [key for key in MODEL_KEYS if key in entries]
    if len(found) > 1:
        raise WeightsError(f"holds both {found[0]} and {found[1]}; expected one of them, the model's state dict")
    model = entries[found[0]] if found else entries
    if not isinstance(model, Mapping):
        raise WeightsError(f"key {found[0]}: is {type(model).__name__}; expected a state dict")
    return dict(model)


def is_safetensors(path: Path | str) -> bool:
    """Whether a file of that name is, or is to be, one of the safetensors package."""
    return Path(path).suffix == ".safetensors"


def save(state_dict: StateDict, path: Path | str) -> None:
    """Writes a state dict for `torch.load(path, weights_only=True)`: whole, or not at all.

    Where the name ends in .safetensors, it is written for `safetensors.torch.load_file(path)`.

    Raises:
      OSError: It cannot be written; a file that stood there is still whole.
    """
    path = Path(path)
    # In memory first: on a full disk, torch.save itself does not say what is wrong.
    content = encode(state_dict, path)
    path.resolve().parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        part.write_bytes(content)


def encode(state_dict: StateDict, path: Path | str) -> bytes:
    """What `save` writes to a file of that name, the same for the same state dict."""
    if is_safetensors(path):
        return safetensors.torch.save(state_dict)
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    return buffer.getvalue()


def _keys(layout: Layout) -> set[str]:
    return {f"{name}.{kind}" for name in LAYOUTS[layout] for kind in ("weight", "bias")}


def _require_keys(found: set[str], expected: set[str], where: str) -> None:
    if missing := expected - found:
        raise WeightsError(f"key {min(missing)}: missing from {where}; expected {', '.join(sorted(expected))}")
    if unknown := found - expected:
        raise WeightsError(
            f"key {_shown(min(unknown, key=str))}: unknown in {where}; expected {', '.join(sorted(expected))}"
        )


def _shown(found: object) -> str:
    return str(found) if len(str(found)) <= 80 else f"{str(found)[:80]}..."


def _shapes(state_dict: Mapping[str, torch.Tensor], layout: Layout) -> dict[str, tuple[int, ...]]:
    """The shape that each key must have, given the biases of the first two layers and of the last."""
    names = LAYOUTS[layout]
    hidden_dim, latent_dim, pixels = (state_dict[f"{names[layer]}.bias"].numel() for layer in (0, 1, 4))
    widths = [
        (pixels, hidden_dim),
        (hidden_dim, latent_dim),
        (hidden_dim, latent_dim),
        (latent_dim, hidden_dim),
        (hidden_dim, pixels),
    ]
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (fan_in, features) in zip(names, widths, strict=True):
        shapes |= {f"{name}.weight": (features, fan_in), f"{name}.bias": (features,)}
    return shapes


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
    """Rewrite a weights file of this model in another key layout."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IN.pth")]
    """File to read, .pth or .safetensors; its layout is recognised."""
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT.pth")]
    """File to write, .pth or .safetensors."""
    layout: Layout = "documented"
    """Key names to write."""


def convert(config: ConvertConfig) -> None:
    """Reads, checks, writes and says so."""
    state_dict = load(config.source)
    require_writable("OUT.pth", config.target)
    save(to_state_dict(to_params(state_dict), config.layout), config.target)
    hidden_dim, latent_dim, pixels = sizes(state_dict)
    say(f"saved {config.target}: {pixels}-{hidden_dim}-{latent_dim}, layout {config.layout}")


if __name__ == "__main__":
    cli.run(convert, ConvertConfig, "python -m torch_ref.convert")
