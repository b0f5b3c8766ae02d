"""Weights files: reads and writes vae.pth and .safetensors in every known key layout.

`python -m torch_ref.convert IN.pth OUT.pth --layout NAME` rewrites a file in another layout or format. The functions
import torch when they need it, so that `--help` and wrong options are answered at once.
"""

from __future__ import annotations

import contextlib
import io
import shlex
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch_ref.layouts import LAYOUTS as LAYOUTS
from torch_ref.layouts import MODEL_KEYS as MODEL_KEYS
from torch_ref.layouts import Params as Params
from torch_ref.layouts import StateDict as StateDict
from torch_ref.layouts import check as check
from torch_ref.layouts import model_of as model_of
from torch_ref.layouts import sizes as sizes
from torch_ref.layouts import to_params as to_params
from torch_ref.layouts import to_state_dict as to_state_dict
from vae_jax.config import ConvertConfig
from vae_jax.system import command_line
from vae_jax.system.console import printable, say
from vae_jax.system.errors import InputError, reason
from vae_jax.system.errors import WeightsError as WeightsError
from vae_jax.system.files import replacing, require_writable
from vae_jax.system.memory import memory

SUFFIXES = (".pth", ".pt", ".safetensors")
# How files begin that people take for weights.
NOT_WEIGHTS = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself; run `git lfs pull`",
    b"<!doctype": "an HTML page, not a weights file; download the file itself",
    b"<html": "an HTML page, not a weights file; download the file itself",
    b"<": "an XML text, such as the error message of a server, not a weights file; download the file itself",
    b"{": "a JSON text, such as the error message of a server, not a weights file; download the file itself",
    b"\x1f\x8b": "gzipped; unpack it first",
}


def load(path: Path | str) -> StateDict:
    """Reads a file in any known layout. The file need not be trusted: no code in it is run.

    Args:
      path: A file that `torch.save` wrote, or one of the safetensors package, whatever its name. It holds a state dict,
        alone or in a checkpoint's dict under one of `MODEL_KEYS`.

    Returns:
      A state dict in the documented layout, ready for `torch_ref.model.VAE.load_state_dict`.

    Raises:
      WeightsError: The file is missing, is of another kind, or does not hold this model.
    """
    with explain_errors(path):
        return to_state_dict(to_params(model_of(read(path))))


@contextlib.contextmanager
def explain_errors(path: Path | str) -> Iterator[None]:
    """Turns every error in its block into a WeightsError: one printable line that begins with the path."""
    try:
        yield
    except WeightsError as error:
        message = str(error)
    except OSError as error:
        message = f"cannot be read ({error.strerror or error}); name a weights file"
    except Exception as error:  # a damaged file can break its reader anywhere
        writer = "safetensors.torch.save_file" if is_safetensors(path) else "torch.save"
        message = (
            f"is not a file of plain tensors ({reason(error)}); expected one that {writer}(model.state_dict()) wrote"
        )
    else:
        return
    raise WeightsError(printable(f"{path}: {message}")) from None


def read(path: Path | str) -> dict[Any, Any]:
    """Reads the dict in a file of either kind, in a few times as much memory as the file is long.

    Returns:
      The entries: dense tensors, numbers, texts, dicts and lists of these; and empty objects for all else.

    Raises:
      WeightsError: It is no regular file, is too long, holds no dict, or holds something else than such entries.
      OSError: It cannot be read.
      Exception: Of any kind, for a damaged file.
    """
    from torch_ref import pickles

    status = Path(path).stat()
    if not stat.S_ISREG(status.st_mode) or not status.st_size:  # a pipe or a device might never end
        raise WeightsError("is empty, or not a regular file; name a weights file")
    # Tensors that share their storage, and the copies on the way, take several times as much.
    if status.st_size > memory() / 8:
        raise WeightsError(
            f"takes {status.st_size / 1e9:,.1f} GB; expected at most {memory() / 8e9:,.1f} GB, an eighth of the memory"
        )
    with Path(path).open("rb") as file:
        start = file.read(64)
    # By their content: people rename files.
    if start[8:9] == b"{" and b"\0" in start[:8]:  # the length of the header, which may look like any text
        return _read_safetensors(path)
    for begin, what in NOT_WEIGHTS.items():
        if start.removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith(begin):
            raise WeightsError(f"is {what}")
    entries = pickles.read(path)
    if not isinstance(entries, dict):
        raise WeightsError(f"holds {type(entries).__name__}; expected what model.state_dict() returns")
    return entries


def _read_safetensors(path: Path | str) -> StateDict:
    import safetensors.torch

    from torch_ref.pickles import MAX_LENGTH

    content = Path(path).read_bytes()
    if struct.unpack("<Q", content[:8])[0] > MAX_LENGTH:  # the package would build millions of objects
        raise ValueError("its header is too long")
    return safetensors.torch.load(content)


def is_safetensors(path: Path | str) -> bool:
    """Whether the name is that of a file of the safetensors package."""
    return Path(path).suffix == ".safetensors"


def require_weights_file(option: str, path: Path) -> None:
    """Checks that a path to write to has the name of a weights file, and that no other file would be replaced.

    Raises:
      InputError: It has another suffix, or another file is there.
    """
    if path.suffix not in SUFFIXES:
        raise InputError(f"{option} {path}: expected a name that ends in {', '.join(SUFFIXES)}; rename it")
    if path.is_file() and path.stat().st_size:
        try:
            with path.open("rb") as file:
                start = file.read(9)
        except OSError as error:
            raise InputError(
                f"{option} {path}: cannot be read ({error.strerror}); name another file to write"
            ) from None
        if not (start.startswith((b"PK\3\4", b"\x80\2")) or start[8:] == b"{"):
            raise InputError(f"{option} {path}: is there already and is not a weights file; name another file to write")


def save(state_dict: StateDict, path: Path | str) -> None:
    """Writes a state dict, whole or not at all, for `torch.load(path, weights_only=True)`.

    If the name ends in .safetensors, it is written for `safetensors.torch.load_file(path)`.

    Raises:
      OSError: It cannot be written; an older file at `path` is still whole.
    """
    path = Path(path)
    # In memory first: on a full disk, torch.save does not say what is wrong.
    content = encode(state_dict, path)
    path.resolve().parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        part.write_bytes(content)


def encode(state_dict: StateDict, path: Path | str) -> bytes:
    """The bytes that `save` writes to a file of that name; always the same for the same state dict."""
    if is_safetensors(path):
        import safetensors.torch

        return safetensors.torch.save(state_dict, {"format": "pt"})  # other programs look for the format

    import torch

    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    return buffer.getvalue()


def convert(config: ConvertConfig) -> None:
    """Reads, checks and writes a file, and says so.

    Raises:
      InputError: The file to read is not one of this model, or the other cannot be written.
    """
    config.check()
    if config.source.is_dir():
        words = [str(config.source), "--out", str(config.target)]
        words += [] if config.layout == "documented" else ["--layout", config.layout]
        raise InputError(f"{config.source}: is a folder; for a run: python -m vae_jax.export {shlex.join(words)}")
    require_writable("OUT.pth", config.target)
    require_weights_file("OUT.pth", config.target)
    state_dict = load(config.source)
    save(to_state_dict(to_params(state_dict), config.layout), config.target)
    hidden_dim, latent_dim, pixels = sizes(state_dict)
    say(f"saved {config.target}: {pixels}-{hidden_dim}-{latent_dim}, layout {config.layout}")


def main() -> None:
    command_line.run(convert, ConvertConfig, "python -m torch_ref.convert")


if __name__ == "__main__":
    main()
