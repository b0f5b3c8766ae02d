"""Writes the weights of a run as a PyTorch file. `python -m vae_jax.export --help` lists the options.

jax is imported when a checkpoint is read, so that `--help` and wrong options are answered at once.
"""

from torch_ref import convert
from vae_jax.config import ExportConfig
from vae_jax.runs.trained import read
from vae_jax.runs.workdir import require_writable_beside
from vae_jax.system import command_line
from vae_jax.system.console import say
from vae_jax.system.errors import InputError


def export(config: ExportConfig) -> None:
    """Reads and checks a run's model, writes it, and says so. Nothing changes in the folder of the run.

    Raises:
      InputError: The run has no such model, or the file cannot be written.
    """
    config.check()
    require_writable_beside("--out", config.out, config.model)
    convert.require_weights_file("--out", config.out)
    trained = read(config.model, config.checkpoint)

    from vae_jax.core.model import VAE
    from vae_jax.runs.export import describe, state_dict_of

    state_dict = state_dict_of(trained.model, trained.params, trained.pixels)
    if config.layout != "documented":
        if type(trained.model) is not VAE:
            raise InputError(
                f"--layout {config.layout}: is one of the documented model; {config.model} has another, whose keys are"
                " the names of its layers; leave the option out"
            )
        state_dict = convert.to_state_dict(trained.params, config.layout)
    convert.save(state_dict, config.out)
    layout = f", layout {config.layout}" if type(trained.model) is VAE else ""
    say(f"saved {config.out}: for {describe(trained.model, state_dict)}{layout}")


def main() -> None:
    command_line.run(export, ExportConfig, "python -m vae_jax.export")


if __name__ == "__main__":
    main()
