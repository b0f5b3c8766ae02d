"""Lines for people, on standard output and standard error."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from contextvars import ContextVar

STDOUT, STDERR = 1, 2
# Whether `say` prints; of several processes that train together, only the first one speaks.
_speaks: ContextVar[bool] = ContextVar("speaks", default=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within the block, `say` prints nothing."""
    token = _speaks.set(False)
    try:
        yield
    finally:
        _speaks.reset(token)


def say(*lines: str) -> None:
    """Prints lines at once; control characters in names and values are escaped."""
    if not _speaks.get():
        return
    with tolerate_closed_output(STDOUT):
        print("\n".join(map(printable, lines)), flush=True)


def warn(line: str) -> None:
    """Prints a line on standard error at once; control characters in names and values are escaped."""
    with tolerate_closed_output(STDERR):
        print(printable(line), file=sys.stderr, flush=True)


@contextlib.contextmanager
def mute() -> Iterator[None]:
    """Within the block, what libraries write to standard output and error, C++ ones too, goes nowhere."""
    kept = {descriptor: os.dup(descriptor) for descriptor in (STDOUT, STDERR)}
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for descriptor in kept:
            os.dup2(nowhere, descriptor)
        yield
    finally:
        for descriptor, former in kept.items():
            os.dup2(former, descriptor)
            os.close(former)
        os.close(nowhere)


def printable(text: str) -> str:
    """The text with every character that is not printable escaped, so that it stays one line."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


@contextlib.contextmanager
def tolerate_closed_output(descriptor: int) -> Iterator[None]:
    """Within the block, a closed pipe or terminal is no error: a run goes on when nobody reads its output."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise
        # Send what is still buffered nowhere, or the interpreter would try to write it again at its exit.
        # Standard output and standard error may be the same pipe.
        closed, nowhere = os.fstat(descriptor), os.open(os.devnull, os.O_WRONLY)
        for other in (STDOUT, STDERR):
            if os.path.samestat(os.fstat(other), closed):
                os.dup2(nowhere, other)
