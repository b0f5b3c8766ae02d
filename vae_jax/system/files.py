"""Files that are written whole or not at all: first under a temporary name, then renamed in one step."""

import contextlib
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from vae_jax.system import signals
from vae_jax.system.errors import InputError, reason

# Temporary folders that threads of this process are writing to.
_in_use: set[str] = set()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to; the file replaces `path` once it is complete and flushed to the disk.

    What a killed process has left of an earlier attempt at `path` is removed.

    Raises:
      OSError: The file cannot be written; `filename` is `path`, and an older file there is still whole.
    """
    # Links are followed. In the same folder, as only there renaming is one step.
    target = path.resolve()
    prefix = f"{_prefix(target)}{os.getpid()}-"
    sweep(target)
    folder = ""
    try:
        with signals.defer_signals(), tempfile.TemporaryDirectory(dir=target.parent, prefix=prefix) as folder:
            _in_use.add(folder)
            part = Path(folder) / target.name
            yield part
            flush(part)
            part.replace(target)
            with contextlib.suppress(PermissionError):  # Windows opens no folders
                flush(target.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror or reason(error), str(path)) from None
    finally:
        _in_use.discard(folder)


def flush(path: Path) -> None:
    """Waits until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # Windows flushes no file opened to read
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(path: Path) -> None:
    """Removes what processes that were killed while they wrote `path` have left next to it."""
    target = path.resolve()
    for left in target.parent.glob(glob.escape(_prefix(target)) + "*"):
        writer = left.name.removeprefix(_prefix(target)).partition("-")[0]
        # Our own number may have been another process's before: in a container, every process is number 1.
        ours = writer == str(os.getpid()) and str(left) not in _in_use
        if not writer.isdecimal() or ours or not _is_alive(int(writer)):
            shutil.rmtree(left, ignore_errors=True)


def _prefix(target: Path) -> str:
    # A name has at most 255 bytes, and a character up to 4.
    return f".{target.name[:50]}.part-"


def _is_alive(process: int) -> bool:
    try:
        return psutil.pid_exists(process)
    except OverflowError:  # not a process number
        return True


def require_writable(option: str, path: Path, *inputs: Path) -> None:
    """Checks that a file can be created or replaced at `path` and is none of `inputs`; leaves nothing behind.

    Raises:
      InputError: It cannot, and why.
    """
    try:
        # Through links, as writing would go.
        path = path.resolve()
        if path in [file.resolve() for file in inputs]:
            raise InputError(f"{option} {path}: this command reads that file; name another file to write")
        if path.exists() and not path.is_file():
            raise InputError(f"{option} {path}: is not a regular file; name a file to write")
        folder = next(parent for parent in path.parents if parent.exists())
        # Only trying tells: permission bits mean nothing to root or on a read-only disk.
        tempfile.TemporaryFile(dir=folder).close()
        # Raises where the name is too long for the file system.
        path.exists()
    except (OSError, RuntimeError) as error:  # the latter for a loop of links, until Python 3.13
        why = getattr(error, "strerror", None) or error
        raise InputError(
            f"{option} {path}: cannot be written ({why}); name a path in a folder you may write to"
        ) from None
