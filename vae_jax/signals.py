"""Ctrl-C and SIGTERM: noted while training and acted on between two steps; elsewhere the end of the process."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

STOPS = (signal.SIGINT, signal.SIGTERM)

# What `end` says first: how to go on with the work that the process is at.
advice = ""


class Interrupted(KeyboardInterrupt):
    """A signal has ended the work. The commands exit with 128 + its number, as shells count."""

    def __init__(self, signum: int):
        super().__init__()
        self.signum = signum


class Request:
    """Whether a signal has asked to stop."""

    signum: int | None = None

    def obey(self) -> None:
        """Raises `Interrupted` if one has."""
        if self.signum is not None:
            raise Interrupted(self.signum)


@contextmanager
def noted() -> Iterator[Request]:
    """Within the block, the first SIGINT or SIGTERM is only noted; the next one does what it did before.

    Outside the main thread, which alone can handle signals, none is noted.
    """
    request = Request()
    before = {signum: signal.getsignal(signum) for signum in STOPS}

    def note(signum: int, _: object) -> None:
        if request.signum is not None:
            signal.signal(signum, before[signal.Signals(signum)])
            signal.raise_signal(signum)
        request.signum = signum

    with _handled_by(note):
        yield request


@contextmanager
def deferred() -> Iterator[None]:
    """Within the block, which should be short, the first SIGINT or SIGTERM waits for its end."""
    stop = Request()
    try:
        with noted() as stop:
            yield
    finally:
        if stop.signum is not None:
            signal.raise_signal(stop.signum)


@contextmanager
def raised() -> Iterator[None]:
    """Within the block, SIGINT and SIGTERM raise `Interrupted`: for work that tidies up behind itself."""

    def interrupt(signum: int, _: object) -> None:
        raise Interrupted(signum)

    with _handled_by(interrupt):
        yield


def end_at_once() -> None:
    """From now on, SIGINT and SIGTERM end the process at once.

    No exception is raised: in the middle of an import it may be lost, or crash a library that is being loaded. What is
    on the disk is whole at every moment, as it must be for kill -9.
    """
    for signum in STOPS:
        signal.signal(signum, lambda signum, _: end(signum))


def end(signum: int) -> NoReturn:
    """Ends the process with code 128 + `signum`, after `advice` and a word."""
    with contextlib.suppress(Exception):  # a line may be half printed, and nobody may be reading any more
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        os.write(2, f"{advice}\ninterrupted\n".lstrip().encode(errors="surrogateescape"))
    # At once: libraries may still be at work in threads that must not see the interpreter go.
    os._exit(128 + signum)


@contextmanager
def _handled_by(handler: Any) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.signal(signum, handler) for signum in STOPS}
    try:
        yield
    finally:
        for signum, old in before.items():
            signal.signal(signum, old)
