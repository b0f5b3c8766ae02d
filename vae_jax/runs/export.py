"""The trained model as PyTorch files: model.pth in the workdir, and the file that `--export` names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from torch_ref import convert, rules
from torch_ref.layouts import StateDict
from vae_jax.config import TrainConfig
from vae_jax.core.model import MLP, VAE, Params
from vae_jax.core.modules import transposed_layers
from vae_jax.runs.workdir import MODEL, PICTURES, Workdir
from vae_jax.system.console import say
from vae_jax.system.errors import WeightsError


def state_dict_of(model: nn.Module, params: Any, pixels: int) -> StateDict:
    """The parameters of any module as a PyTorch state dict.

    The documented model and an MLP have the keys of their PyTorch modules in `torch_ref.model`; the keys of another
    module are the paths of its layers.
    """
    params = jax.device_get(params)
    if type(model) is VAE:
        return convert.to_state_dict(params)
    return rules.to_state_dict(params, transposed=transposed_layers(model, pixels))


def describe(model: nn.Module, state_dict: StateDict) -> str:
    """The PyTorch module that a state dict of a model is for, in words."""
    if type(model) is VAE:
        return "torch_ref.model.VAE({}, {}, {})".format(*convert.sizes(state_dict))
    if type(model) is MLP:
        return f"torch_ref.model.MLP({model.hidden_dims}, {model.latent_dim}, {model.pixels}, {model.activation!r})"
    return f"your PyTorch counterpart of {type(model).__name__}, whose layers have the same names"


def export(config: TrainConfig, workdir: Workdir, model: nn.Module, params: Params, pixels: int) -> None:
    """Writes model.pth and the file that `--export` names; once both exist, neither is changed.

    model.pth is written last: where it exists, everything has been exported. Only if it holds other parameters, because
    `--keep` was another or it is damaged, all is exported again.

    Raises:
      OSError: A file cannot be written; an older file in its place is still whole.
    """
    if not workdir.writes:
        return
    file = workdir.path / MODEL
    state_dict = state_dict_of(model, params, pixels)
    if file.exists() and not _holds(file, state_dict):
        workdir.unmark_finished()
    if not file.exists():
        for name in PICTURES:  # of another epoch
            (workdir.path / name).unlink(missing_ok=True)
    if file.exists() and config.export.exists():
        content = file.read_bytes()
        if convert.is_safetensors(config.export):
            content = convert.encode(state_dict, config.export)
        if config.export.read_bytes() != content:
            say(f"{config.export}: differs from {file}, the model of this run, and is left as it is")
        return
    convert.save(state_dict, config.export)
    convert.save(state_dict, file)
    if convert.is_safetensors(config.export):
        call = f'safetensors.torch.load_file("{config.export}")'
    else:
        call = f'torch.load("{config.export}", weights_only=True)'
    say(f"saved {config.export}; load it with {call}")
    if type(model) is not VAE:
        say(f"{config.export}: goes into {describe(model, state_dict)}")


def _holds(file: Path, state_dict: StateDict) -> bool:
    import torch

    try:
        with convert.explain_errors(file):
            found = convert.read(file)
            return found.keys() == state_dict.keys() and all(
                torch.equal(found[key], tensor) for key, tensor in state_dict.items()
            )
    except WeightsError:  # damaged
        return False
