"""Ctrl-C and SIGTERM, noted while training and acted on between two steps."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


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
    """Within the block, the first SIGINT or SIGTERM is only noted; the next one ends the process on the spot.

    Outside the main thread, which alone can do that, signals do what they did before.
    """
    request = Request()

    def note(signum: int, _: object) -> None:
        if request.signum is not None:
            os._exit(128 + signum)
        request.signum = signum

    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
