"""The trained model as PyTorch files: model.pth in the workdir, and the file that `--export` names."""

from __future__ import annotations

import flax.linen as nn
import jax

from torch_ref import convert
from vae_jax.config import TrainConfig
from vae_jax.core.model import VAE, Params
from vae_jax.runs.workdir import MODEL, PICTURES, Workdir
from vae_jax.system.console import say


def export(config: TrainConfig, workdir: Workdir, model: nn.Module, params: Params) -> None:
    """Writes model.pth and the file that `--export` names; once both exist, neither is changed.

    model.pth is written last: where it exists, everything has been exported.

    Raises:
      OSError: A file cannot be written; an older file in its place is still whole.
    """
    if not isinstance(model, VAE):
        say(f"{type(model).__name__}: is not the documented model, so that no PyTorch file is written")
        return
    file = workdir.path / MODEL
    if file.exists() and config.export.exists():
        content = file.read_bytes()
        if convert.is_safetensors(config.export):
            content = convert.encode(convert.to_state_dict(jax.device_get(params)), config.export)
        if config.export.read_bytes() != content:
            say(f"{config.export}: differs from {file}, the model of this run, and is left as it is")
        return
    state_dict = convert.to_state_dict(jax.device_get(params))
    if not file.exists():
        for name in PICTURES:  # of an earlier epoch
            (workdir.path / name).unlink(missing_ok=True)
    convert.save(state_dict, config.export)
    convert.save(state_dict, file)
    if convert.is_safetensors(config.export):
        call = f'safetensors.torch.load_file("{config.export}")'
    else:
        call = f'torch.load("{config.export}", weights_only=True)'
    say(f"saved {config.export}; load it with {call}")
