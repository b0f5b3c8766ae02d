"""The trained model as PyTorch files: model.pth in the workdir, and the file that `--export` names."""

from __future__ import annotations

from pathlib import Path

import flax.linen as nn
import jax
import numpy as np

from torch_ref import convert
from vae_jax.config import TrainConfig
from vae_jax.core.model import VAE, Params
from vae_jax.runs.workdir import MODEL, PICTURES, Workdir
from vae_jax.system.console import say
from vae_jax.system.errors import WeightsError


def export(config: TrainConfig, workdir: Workdir, model: nn.Module, params: Params) -> None:
    """Writes model.pth and the file that `--export` names; once both exist, neither is changed.

    model.pth is written last: where it exists, everything has been exported. Only if it holds other parameters, because
    `--keep` was another or it is damaged, all is exported again.

    Raises:
      OSError: A file cannot be written; an older file in its place is still whole.
    """
    file = workdir.path / MODEL
    if file.exists() and not _holds(file, params):
        workdir.unmark_finished()
    if not file.exists():
        for name in PICTURES:  # of another epoch
            (workdir.path / name).unlink(missing_ok=True)
    if not isinstance(model, VAE):
        say(f"{type(model).__name__}: is not the documented model, so that no PyTorch file is written")
        return
    state_dict = convert.to_state_dict(jax.device_get(params))
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


def _holds(file: Path, params: Params) -> bool:
    try:
        found = convert.to_params(convert.load(file))
    except WeightsError:  # damaged
        return False
    return jax.tree.all(jax.tree.map(np.array_equal, found, jax.device_get(params)))
