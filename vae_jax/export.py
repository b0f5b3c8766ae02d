"""Writes the weights of a run as a PyTorch file. `python -m vae_jax.export --help` lists the options.

jax is imported when a checkpoint is read, so that `--help` and wrong options are answered at once.
"""

from torch_ref import convert
from vae_jax.config import ExportConfig
from vae_jax.runs.trained import read
from vae_jax.runs.workdir import require_writable_beside
from vae_jax.system import command_line
from vae_jax.system.console import say


def export(config: ExportConfig) -> None:
    """Reads and checks a run's model, writes it, and says so. Nothing changes in the folder of the run.

    Raises:
      InputError: The run has no such model, or the file cannot be written.
    """
    config.check()
    require_writable_beside("--out", config.out, config.model)
    convert.require_weights_file("--out", config.out)
    trained = read(config.model, config.checkpoint)
    state_dict = convert.to_state_dict(trained.params, config.layout)
    convert.save(state_dict, config.out)
    hidden_dim, latent_dim, pixels = convert.sizes(state_dict)
    say(f"saved {config.out}: {pixels}-{hidden_dim}-{latent_dim}, layout {config.layout}")


def main() -> None:
    command_line.run(export, ExportConfig, "python -m vae_jax.export")


if __name__ == "__main__":
    main()
