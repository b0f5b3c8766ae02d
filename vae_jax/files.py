"""Files that are there whole or not at all: each is written apart and takes its place in one step."""

import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vae_jax import signals
from vae_jax.config import reason


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file to write, which takes the place of `path` once it is whole and on the disk.

    What an earlier process has left of `path` is removed.

    Raises:
      OSError: It cannot be written, with `path` as its filename; a file that stood there is still whole.
    """
    # Through links; in the same folder, as only there renaming is one step.
    target = path.resolve()
    prefix = f"{_prefix(target)}{os.getpid()}-"
    sweep(target)
    try:
        with signals.deferred(), tempfile.TemporaryDirectory(dir=target.parent, prefix=prefix) as folder:
            part = Path(folder) / target.name
            yield part
            flush(part)
            part.replace(target)
    except OSError as error:
        raise OSError(error.errno, error.strerror or reason(error), str(path)) from None


def flush(*paths: Path) -> None:
    """Waits until files and the lists of folders are on the disk.

    Raises:
      OSError: The disk is full, say.
    """
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sweep(path: Path) -> None:
    """Removes what a process that was killed while it wrote `path` has left next to it."""
    target = path.resolve()
    for left in target.parent.glob(glob.escape(_prefix(target)) + "*"):
        writer = left.name.removeprefix(_prefix(target)).partition("-")[0]
        # Ours was another process's before: in a container, every one is number 1.
        if not writer.isdecimal() or int(writer) == os.getpid() or not _is_alive(int(writer)):
            shutil.rmtree(left, ignore_errors=True)


def _prefix(target: Path) -> str:
    # A name has at most 255 bytes, and a character up to 4.
    return f".{target.name[:50]}.part-"


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's; no number of a process
        pass
    return True
