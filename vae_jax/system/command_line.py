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

from vae_jax.system import signals
from vae_jax.system.console import STDOUT, warn
from vae_jax.system.errors import InputError, NonFiniteLossError

Config = TypeVar("Config")


def run(command: Callable[[Config], object], config_type: type[Config], prog: str) -> None:
    """Runs `command` with the options that the user typed.

    Exits with one line on standard error and code 2 where an option or file cannot be used, 1 where training diverges
    or the machine fails (a full disk, for example), 130 after Ctrl-C and 143 after SIGTERM.
    """
    # Imports and tracing make a million objects that stay. Looking for cycles among them again and again would take
    # half a second, and a whole second once more at the exit.
    gc.set_threshold(100_000)
    atexit.register(gc.freeze)
    _open_missing_streams()
    signals.end_on_signal()
    try:
        config = parse(config_type, prog)
        signals.end_on_signal(getattr(config, "advice", ""))
        command(config)
        signals.end_on_signal()  # nothing is left to go on with
    except InputError as error:
        warn(f"error: {error}")
        sys.exit(2)
    except BrokenPipeError:  # of --help, whose reader has seen enough; everything else tolerates it
        os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)
        sys.exit(0)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        warn(f"error: {where}{error.strerror or error}; fix this and rerun the command")
        sys.exit(1)
    except NonFiniteLossError as error:
        warn(f"error: {error}")
        sys.exit(1)
    except signals.Interrupted as stop:
        signals.end(stop.signum, stop.advice)


def _open_missing_streams() -> None:
    """Makes sure that writing to standard output and error, as libraries do unasked, works."""
    # A shell or a service may have closed them; the next file that we open would get their number.
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115
    # A path may have characters that the terminal's encoding lacks.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def parse(config_type: type[Config], prog: str) -> Config:
    """Reads the command line into a dataclass.

    Raises:
      InputError: An option is unknown, lacks its value, or has a value of the wrong type.
      SystemExit: With code 0, after printing `--help`.
    """
    # tyro prints its refusals in a box; we keep the text, as one line.
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(config_type, prog=prog, config=(tyro.conf.FlagCreatePairsOff,))
    except SystemExit as stop:
        if stop.code == 0:
            sys.stdout.flush()  # here, where a reader that has gone is no error
            raise
        lines = [line.strip("│|╭╮╰╯─ ") for line in box.getvalue().splitlines()[1:-1]]
        text = " ".join(line for line in lines if line.strip("-"))
        text = re.split(r" Argument helptext:| For full helptext", text)[0].replace(" Perhaps you", "; perhaps you")
        raise InputError(f"{text}; `{prog} --help` lists the options") from None
