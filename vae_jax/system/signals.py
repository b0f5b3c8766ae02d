"""Ctrl-C and SIGTERM: training stops between two steps; anywhere else a command ends at once.

Only the main thread can handle signals; in any other thread the context managers here do nothing.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

STOPS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal has stopped the work; the message says how to go on. Commands exit with 128 + `signum`, as shells do."""

    def __init__(self, signum: int, advice: str = ""):
        super().__init__(advice or f"stopped by {signal.Signals(signum).name}")
        self.signum = signum
        self.advice = advice


class StopRequest:
    """Whether a signal has asked to stop."""

    def __init__(self, advice: str = ""):
        self.signum: int | None = None
        self.agreed: int | None = None  # the signal after which all processes of a run stop together
        self._advice = advice

    @property
    def requested(self) -> bool:
        return self.signum is not None

    def raise_if_requested(self) -> None:
        """Raises `Interrupted` if a signal has come."""
        if self.signum is not None:
            raise Interrupted(self.signum, self._advice)

    def raise_if_agreed(self) -> None:
        """Raises `Interrupted` if all processes have agreed to stop."""
        if self.agreed is not None:
            raise Interrupted(self.agreed, self._advice)


@contextmanager
def stop_on_signal(advice: str = "") -> Iterator[StopRequest]:
    """Within the block, the first SIGINT or SIGTERM only sets the request; the second one has its former effect.

    Args:
      advice: How to go on with the work; the message of `Interrupted`.
    """
    request = StopRequest(advice)
    before = {signum: signal.getsignal(signum) for signum in STOPS}

    def note(signum: int, _: object) -> None:
        if request.requested:
            signal.signal(signum, before[signal.Signals(signum)])
            signal.raise_signal(signum)
        request.signum = signum

    with _handled_by(note):
        yield request


@contextmanager
def defer_signals() -> Iterator[None]:
    """Within the block, which should be short, the first SIGINT or SIGTERM waits for its end."""
    stop = StopRequest()
    try:
        with stop_on_signal() as stop:
            yield
    finally:
        if stop.signum is not None:
            signal.raise_signal(stop.signum)


@contextmanager
def raise_on_signal() -> Iterator[None]:
    """Within the block, SIGINT and SIGTERM raise `Interrupted`: for work that removes what it leaves unfinished."""

    def interrupt(signum: int, _: object) -> None:
        raise Interrupted(signum)

    with _handled_by(interrupt):
        yield


def end_on_signal(advice: str = "") -> None:
    """From now on, SIGINT and SIGTERM end the process at once, after printing `advice`.

    They raise no exception: in the middle of an import it could get lost, or break a half-loaded library. Files are
    whole at every moment, as they must be for kill -9.
    """
    for signum in STOPS:
        signal.signal(signum, lambda signum, _: end(signum, advice))


def end(signum: int, advice: str = "") -> NoReturn:
    """Ends the process with code 128 + `signum`, after printing `advice` and "interrupted"."""
    with contextlib.suppress(Exception):  # a line may be half printed, and the pipe may be closed
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        os.write(2, f"{advice}\ninterrupted\n".lstrip().encode(errors="surrogateescape"))
    # At once: libraries may still be working in threads, which must not outlive the interpreter.
    os._exit(128 + signum)


@contextmanager
def _handled_by(handler: Callable[[int, Any], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.signal(signum, handler) for signum in STOPS}
    try:
        yield
    finally:
        for signum, old in before.items():
            signal.signal(signum, old)
