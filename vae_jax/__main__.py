"""`vae-jax COMMAND ...`: the same as `python -m vae_jax.COMMAND ...`."""

import importlib
import sys

from vae_jax.system.console import say, warn

COMMANDS = {
    "train": ("vae_jax.train", "train a model and export it as a PyTorch state dict"),
    "sweep": ("vae_jax.sweep", "train many models and compare them, with error bars over seeds"),
    "evaluate": ("vae_jax.evaluate", "measure a trained model: loss, BCE, KLD, log p(x)"),
    "generate": ("vae_jax.generate", "draw what a trained model makes"),
    "explore": ("vae_jax.explore", "write a web page that runs a trained model"),
    "encode": ("vae_jax.encode", "write the latents of an image set"),
    "export": ("vae_jax.export", "write the weights of a run, finished or not"),
    "convert": ("torch_ref.convert", "rewrite a weights file in another key layout or format"),
    "parity": ("torch_ref.parity", "compare a Flax VAE with a PyTorch one, and find where they part"),
}


def main() -> None:
    """Runs the command that the first argument names."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        say("usage: vae-jax COMMAND [options]; vae-jax COMMAND --help lists the options")
        for command, (_, description) in COMMANDS.items():
            say(f"  {command:10}{description}")
        return
    if name not in COMMANDS:
        warn(f"error: {name}: unknown command; expected one of {', '.join(COMMANDS)}")
        sys.exit(2)
    del sys.argv[1]
    importlib.import_module(COMMANDS[name][0]).main()


if __name__ == "__main__":
    main()
