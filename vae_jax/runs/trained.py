"""A trained model read back, from a weights file or the folder of a run."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from vae_jax.config import (
    FLOAT32_MAX,
    GIVEN,
    Activation,
    Binarize,
    Initialization,
    ModelOptions,
    Precision,
    Recipe,
    Which,
)
from vae_jax.data.dataset import Dataset, load
from vae_jax.runs.metrics import how_far
from vae_jax.runs.workdir import CONFIG, model_file
from vae_jax.system.console import say
from vae_jax.system.errors import InputError, reason

if TYPE_CHECKING:
    import flax.linen as nn

    from torch_ref.layouts import StateDict
    from vae_jax.core.model import Params


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model with its parameters, and the options of its run."""

    model: nn.Module
    params: Params
    pixels: int
    latent_dim: int
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # config.json; empty for a weights file

    def encode(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """mu and logvar, [images, latent] each, of bytes or of pixels in [0, 1], [images, pixels]."""
        from vae_jax.core import model

        mu, logvar = model.encode(self.model, self.params, images)
        return np.asarray(mu), np.asarray(logvar)

    def decode(self, z: np.ndarray) -> np.ndarray:
        """The means of the pixels, sigmoid(logits), [..., pixels], at the latent points z, [..., latent]."""
        from vae_jax.core import model

        means = model.decode(self.model, self.params, z.reshape(-1, self.latent_dim))
        return np.asarray(means).reshape(*z.shape[:-1], self.pixels)


def read(path: Path, checkpoint: Which | None = None) -> Trained:
    """Reads a model.

    Args:
      path: A weights file in any layout that `torch_ref.convert` knows, or the workdir of a run, which may be training.
        The sizes are read from the weights.
      checkpoint: The checkpoint of the run to read; by default the model of a finished run, or the newest checkpoint
        of one that has not finished.

    Raises:
      InputError: Nothing is there, the folder holds no such checkpoint, or the file does not hold this model.
    """
    options: dict[str, Any] = {}
    file, which, own = path, checkpoint, None
    try:
        if path.is_dir():
            options = _read_options(path / CONFIG)
            own = _module(path, options)
            file = model_file(path)
            which = checkpoint or (None if file.is_file() else "newest")
        elif not path.exists():
            raise InputError(
                f"{path}: does not exist; name a weights file (.pth, .safetensors) or the workdir of a run"
            )
        elif checkpoint:
            raise InputError(f"--checkpoint {checkpoint}: {path} is a weights file, not a run; leave the option out")

        from torch_ref import convert
        from vae_jax.core.model import VAE

        if which is None:
            state_dict = convert.load(file) if own is None else convert.read(file)
        else:
            file, state_dict = _read_checkpoint(path, which, own, options)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); name a weights file or a workdir") from None
    if own is not None:
        return _with_module(file, own, state_dict, options)
    params = convert.to_params(state_dict)
    require_float32(
        str(file), [array for part in params.values() for layer in part.values() for array in layer.values()]
    )
    hidden_dim, latent_dim, pixels = convert.sizes(state_dict)
    return Trained(VAE(hidden_dim, latent_dim, pixels), params, pixels, latent_dim, options)


def _with_module(file: Path, module: nn.Module, state_dict: StateDict, options: dict[str, Any]) -> Trained:
    """A model that is not the documented one, from the state dict that its run has written by rule."""
    import jax
    import jax.numpy as jnp

    from torch_ref import convert, rules
    from vae_jax.core.model import latent_dim
    from vae_jax.core.modules import shapes_of, transposed_layers

    pixels = math.prod(options["image_shape"])
    with convert.explain_errors(file):
        params = rules.to_params(state_dict, shapes_of(module, pixels), transposed_layers(module, pixels))
    require_float32(str(file), jax.tree.leaves(params))
    params = jax.tree.map(jnp.asarray, params)
    return Trained(module, params, pixels, latent_dim(module, params, pixels), options)


def _module(workdir: Path, options: dict[str, Any]) -> nn.Module | None:
    """The module of a run; None for the documented one.

    Raises:
      InputError: It cannot be imported any more.
    """
    recipe = Recipe(
        **{field.name: options[field.name] for field in dataclasses.fields(Recipe) if field.name in options}
    )
    if recipe.model is None and len(recipe.hidden_dims) < 2 and recipe.activation == "relu":
        return None
    if "image_shape" not in options:
        raise InputError(f"{workdir / CONFIG}: has no image_shape; go on with the run, which writes it")

    from vae_jax.core.modules import module_of

    try:
        return module_of(recipe, math.prod(options["image_shape"]))
    except InputError as error:
        raise InputError(f"{workdir}: is a run of another module than the documented one: {error}") from None


def _read_checkpoint(
    workdir: Path, which: Which, own: nn.Module | None, options: dict[str, Any]
) -> tuple[Path, StateDict]:
    """The model of a run's checkpoint; says which checkpoint it is."""
    import flax.traverse_util

    from torch_ref import convert, rules
    from vae_jax.core.modules import transposed_layers
    from vae_jax.runs.checkpoint import read_checkpoint

    file, arrays, notes = read_checkpoint(workdir, which)
    params = {name.removeprefix("params."): array for name, array in arrays.items() if name.startswith("params.")}
    unfinished = "" if model_file(workdir).is_file() else "has not finished; "
    loss = f", test loss {notes['history'][-1]['test_loss']:.2f}" if which == "best" else ""
    place = how_far(len(notes["history"]), len(notes["bce"]))
    say(f"{workdir}: {unfinished}using its {which} checkpoint, after {place}{loss}")
    tree = flax.traverse_util.unflatten_dict(params, sep=".")
    with convert.explain_errors(file):
        if own is None:
            return file, convert.to_state_dict(tree)
        transposed = transposed_layers(own, math.prod(options["image_shape"]))
        return file, rules.to_state_dict(tree, transposed=transposed)


def images_for(config: ModelOptions, trained: Trained) -> tuple[str, Dataset, Binarize]:
    """Loads the image set that a command's options name, or the set of the model's run.

    Returns:
      The name of the set, the set, and how its grey pixels are made black and white.

    Raises:
      InputError: The set cannot be used, or its images are not of the size that the model takes.
    """
    options = trained.options
    if config.data is None and options.get("data") == GIVEN:
        raise InputError(f"{config.model}: the images of this run were given to fit; name them with --data")
    data = options.get("data", "mnist") if config.data is None else config.data
    data_dir = config.data_dir or (Path(options["data_dir"]) if options.get("data_dir") else None)
    size = config.image_size or options.get("image_size")
    dataset = load(
        data,
        data_dir,
        config.max_data_gb or options.get("max_data_gb"),
        (size[0], size[1]) if size else None,
        config.grey or options.get("grey", False),
        stream="auto",
    )
    if math.prod(dataset.image_shape) != trained.pixels:
        raise InputError(
            f"{config.model}: takes images of {trained.pixels} pixels, but those of --data {data} have"
            f" {math.prod(dataset.image_shape)} ({' x '.join(map(str, dataset.image_shape))});"
            " name the image set that it was trained on, or its --image-size and --grey"
        )
    return data, dataset, config.binarize or options.get("binarize", "none")


def require_float32(what: str, arrays: Iterable[np.ndarray]) -> None:
    """Checks that the values of a file, which may be float64, are finite as float32 too.

    Raises:
      InputError: Some are not; the message begins with `what`.
    """
    if max(np.abs(array).max() for array in arrays) > FLOAT32_MAX:
        raise InputError(f"{what}: holds values beyond {FLOAT32_MAX:.4g}; expected those of a float32")


def _read_options(file: Path) -> dict[str, Any]:
    """The options of a run; those that are used here are checked."""
    try:
        options = json.loads(file.read_text())
    except FileNotFoundError:
        raise InputError(
            f"{file.parent}: is not a run (it has no {CONFIG}); name the workdir of a run or a weights file"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: cannot be read ({reason(error)}); train again or name a weights file") from None
    if not isinstance(options, dict):
        raise InputError(f"{file}: holds no options; train again or name a weights file")
    good = {
        "data": lambda value: isinstance(value, str),
        "export": lambda value: isinstance(value, str),
        "data_dir": lambda value: value is None or isinstance(value, str),
        "max_data_gb": lambda value: value is None or (isinstance(value, int | float) and value > 0),
        "image_size": lambda value: (
            value is None
            or (isinstance(value, list) and len(value) == 2 and all(type(s) is int and 1 <= s <= 4096 for s in value))
        ),
        "grey": lambda value: isinstance(value, bool),
        "binarize": lambda value: value in get_args(Binarize),
        "matmul_precision": lambda value: value in get_args(Precision),
        "seed": lambda value: isinstance(value, int) and 0 <= value < 2**32,
        "beta": lambda value: isinstance(value, int | float),
        "hidden_dim": _is_size,
        "latent_dim": _is_size,
        "hidden_dims": lambda value: isinstance(value, list) and all(map(_is_size, value)),
        "activation": lambda value: value in get_args(Activation),
        "initialization": lambda value: value in get_args(Initialization),
        "model": lambda value: value is None or isinstance(value, str),
        "model_options": lambda value: isinstance(value, str),
        "image_shape": lambda value: isinstance(value, list) and all(map(_is_size, value)),
    }
    for name, is_good in good.items():
        if name in options and not is_good(options[name]):
            raise InputError(f"{file}: its {name} is {options[name]!r:.100}; train again or name a weights file")
    return options


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0
