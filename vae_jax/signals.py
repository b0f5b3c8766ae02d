"""Ctrl-C and SIGTERM: noted while training and acted on between two steps, raised elsewhere."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

STOPS = (signal.SIGINT, signal.SIGTERM)


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
def raised() -> Iterator[None]:
    """Within the block, SIGINT and SIGTERM raise `Interrupted`."""
    hook = sys.unraisablehook

    def interrupt(signum: int, _: object) -> None:
        raise Interrupted(signum)

    def again(unraisable: Any) -> None:
        # Where it strikes while garbage is collected, Python drops the exception.
        if isinstance(unraisable.exc_value, Interrupted):
            threading.Timer(0.05, os.kill, (os.getpid(), unraisable.exc_value.signum)).start()
        else:
            hook(unraisable)

    sys.unraisablehook = again
    try:
        with _handled_by(interrupt):
            yield
    finally:
        sys.unraisablehook = hook


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
