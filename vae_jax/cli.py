"""What the commands share: options from a dataclass, and every refusal as one line with exit code 2."""

import contextlib
import io
import re
import sys
from collections.abc import Callable
from typing import TypeVar

import tyro

from vae_jax.config import InputError

Config = TypeVar("Config")


def run(command: Callable[[Config], object], config_type: type[Config], prog: str) -> None:
    """Runs `command` with the options that the user typed.

    Exits with one line on standard error and code 2 where they cannot be used, 1 where the machine gives out on the way
    (a full disk, say), 130 after Ctrl-C.
    """
    try:
        command(parse(config_type, prog))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def parse(config_type: type[Config], prog: str) -> Config:
    """Reads the command line into a dataclass.

    Raises:
      InputError: An option is unknown, lacks its value, or has one of the wrong type.
      SystemExit: With code 0, after printing `--help`.
    """
    # tyro draws its refusals as a box; its text is kept, as one line.
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(config_type, prog=prog, config=(tyro.conf.FlagCreatePairsOff,))
    except SystemExit as stop:
        if stop.code == 0:
            raise
        lines = [line.strip("│|╭╮╰╯─ ") for line in box.getvalue().splitlines()[1:-1]]
        text = " ".join(line for line in lines if line.strip("-"))
        text = re.split(r" Argument helptext:| For full helptext", text)[0].replace(" Perhaps you", "; perhaps you")
        raise InputError(f"{text}; `{prog} --help` lists the options") from None
