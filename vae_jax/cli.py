"""What the commands share: options from a dataclass, and every refusal as one line with exit code 2."""

import atexit
import contextlib
import gc
import io
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import tyro

from vae_jax import signals
from vae_jax.config import InputError, NonFiniteLossError
from vae_jax.log import STDERR, unheard

Config = TypeVar("Config")


def run(command: Callable[[Config], object], config_type: type[Config], prog: str) -> None:
    """Runs `command` with the options that the user typed.

    Exits with one line on standard error and code 2 where they cannot be used, 1 where training diverges or the machine
    gives out on the way (a full disk, say), 130 after Ctrl-C and 143 after SIGTERM.
    """
    # Imports and tracing make a million objects that stay: looking for cycles among them again and again would take
    # half a second, and once more at the exit a whole one.
    gc.set_threshold(100_000)
    atexit.register(gc.freeze)
    _require_streams()
    signals.end_at_once()
    try:
        command(parse(config_type, prog))
    except InputError as error:
        _say(error)
        sys.exit(2)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _say(f"{where}{error.strerror or error}; mend that and give the command again")
        sys.exit(1)
    except NonFiniteLossError as error:
        _say(error)
        sys.exit(1)
    except signals.Interrupted as stop:
        signals.end(stop.signum)


def _say(error: Exception | str) -> None:
    """One line, whatever names and values stand in it."""
    text = "".join(char if char.isprintable() else repr(char)[1:-1] for char in str(error))
    with unheard(STDERR):
        print(f"error: {text}", file=sys.stderr, flush=True)


def _require_streams() -> None:
    """Sees to it that libraries, which write to standard output and error unasked, and our lines can."""
    # A shell or a service may have closed them, and files of ours would take their numbers.
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115
    # A path may have characters that the terminal has not.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


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
