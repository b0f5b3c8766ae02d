"""Writes the latents of an image set. `python -m vae_jax.encode --help` lists the options.

jax is imported when a model is used, so that `--help` and wrong options are answered at once.
"""

from pathlib import Path

from vae_jax.config import EncodeConfig, Split
from vae_jax.runs import latents
from vae_jax.runs.latents import Latents
from vae_jax.runs.trained import images_for, read
from vae_jax.runs.workdir import require_writable_beside
from vae_jax.system import command_line
from vae_jax.system.console import say
from vae_jax.system.errors import InputError
from vae_jax.system.files import require_writable


def encode(config: EncodeConfig) -> Latents:
    """Encodes the images that the options name, as the model's run saw them, and writes their latents.

    Raises:
      InputError: An option or the model cannot be used; raised before anything is computed.
    """
    config.check()
    if config.out.suffix not in latents.SUFFIXES:
        raise InputError(f"--out {config.out}: expected a name that ends in {', '.join(latents.SUFFIXES)}")
    require_writable_beside("--out", config.out, config.model)
    trained = read(config.model, config.checkpoint)
    require_writable("--out", config.out, Path(config.data or trained.options.get("data", "")))
    data, dataset, rule = images_for(config, trained)

    from vae_jax.core.settings import fixed_settings, require_device

    require_device()
    splits: tuple[Split, ...] = ("train", "test") if config.split == "both" else (config.split,)
    with fixed_settings(trained.options.get("matmul_precision", "highest")):
        encoded = latents.encode(trained, dataset, splits, rule, config.batch_size)
    latents.save(encoded, config.out)
    labels = "" if encoded.label is not None else "; without labels"
    say(
        f"saved {config.out}: {len(encoded.mu):,} {' and '.join(splits)} images of {data}, binarize {rule},"
        f" {trained.latent_dim} latent dimensions{labels}"
    )
    return encoded


def main() -> None:
    command_line.run(encode, EncodeConfig, "python -m vae_jax.encode")


if __name__ == "__main__":
    main()
