"""What a user names in an option: a class of theirs, and its arguments as JSON."""

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

from vae_jax.system.errors import InputError, reason

CLASS = re.compile(r"[\w.]+:[\w.<>]+")


def require_class_name(what: str, name: str) -> None:
    """Checks the form of a name, without importing anything.

    Raises:
      InputError: It does not have the form of one; the message begins with `what`.
    """
    if not CLASS.fullmatch(name):
        raise InputError(f"{what}: expected PACKAGE.MODULE:CLASS, such as my_models:ConvVAE")


def import_class(what: str, name: str) -> Any:
    """What PACKAGE.MODULE:CLASS names, installed or in the current folder.

    Raises:
      InputError: It cannot be imported; the message begins with `what`.
    """
    require_class_name(what, name)
    module, _, path = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:  # the script `vae-jax` does not look there
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except Exception as error:  # the file may do anything
        raise InputError(
            f"{what}: cannot be imported ({reason(error)}); expected PACKAGE.MODULE:CLASS, in this folder or installed"
        ) from error
    return found


def json_object(option: str, text: str) -> dict[str, Any]:
    """The JSON object that an option gives, its lists as tuples: arguments of a module have to be hashable.

    Raises:
      InputError: It is not one.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InputError(f"{option} {text:.80}: expected a JSON object, such as '{{\"latent_dim\": 20}}'")
    return {name: _as_tuples(item) for name, item in value.items()}


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(part) for part in value) if isinstance(value, list) else value
