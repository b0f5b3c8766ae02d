"""Times contenders in turn, each in a process of its own, so that they do not disturb each other.

Imports neither NumPy, jax nor torch, because the children measure their own imports and threads.
"""

import contextlib
import importlib
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

# No single piece of work of the suite takes so long: a child that does not answer in this time hangs.
PATIENCE_S = 900
# The pause before each run: the threads of the contender before it spin for a while before they sleep.
REST_S = 0.2


class Setting(NamedTuple):
    """The size of the task that all contenders do."""

    images: int = 60000
    batch_size: int = 128
    hidden_dim: int = 400
    latent_dim: int = 20
    models: int = 1  # that train side by side
    samples: int = 1  # of z for each image


class Runner(NamedTuple):
    """A contender that is ready to run."""

    run: Callable[[], Any]  # returns when the device has finished; what it returns must be picklable
    share: float = 1.0  # the part of the task that a run does; its seconds are scaled up to the whole


class Measured(NamedTuple):
    """The times of a contender; where `seconds` is empty, `failure` says why."""

    name: str
    prepare_s: float | None  # imports, data, initialization, and compilation if it is done ahead
    first_s: float | None  # the first run, unscaled: warm-up, and compilation if it is done on demand
    seconds: list[float]  # of each further run, scaled to the whole task
    returned: list[Any]
    failure: str = ""

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None


def take_turns(contenders: Mapping[str, str], setting: Setting, rounds: int) -> list[Measured]:
    """Times contenders A B C A B C ..., one at a time, each in its own process.

    Args:
      contenders: Name -> "module:function", a function of the setting that returns a `Runner`.
      setting: The task.
      rounds: Timed runs of each, after a run that warms up.

    Returns:
      An entry for each contender, in order; `failure` says why a contender could not run.
    """
    workers = {name: Worker("benchmarks.turns:serve", place, setting) for name, place in contenders.items()}
    found = {}
    # They prepare in turn too: compilation takes all cores, and so would the imports of all at once.
    for name, worker in workers.items():
        say(f"  {name}: preparing")
        worker.start()
        found[name] = worker.receive()
        if isinstance(found[name], Measured):
            found[name] = found[name]._replace(name=name)
    for number in range(rounds):
        for name, worker in workers.items():
            if found[name].failure:
                continue
            time.sleep(REST_S)
            answer = worker.ask("run")
            if isinstance(answer, Measured):
                found[name] = answer._replace(name=name)
                continue
            seconds, returned = answer
            found[name].seconds.append(seconds)
            found[name].returned.append(returned)
            say(f"  {name}: round {number + 1}/{rounds}, {seconds:.3f} s")
    for worker in workers.values():
        worker.stop()
    return list(found.values())


def isolated(place: str, *arguments: Any) -> Any:
    """Calls "module:function" in a fresh process, which has its own imports, threads and memory.

    Raises:
      RuntimeError: The function raised an error or its process died; the message says how.
    """
    return isolated_together([place], *arguments)[0]


def isolated_together(places: list[str], *arguments: Any) -> list[Any]:
    """Calls several functions with the same arguments at the same time, each in a fresh process on its own cores.

    Raises:
      RuntimeError: A function raised an error or its process died; the message says how.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    # A single process gets all cores; several get disjoint parts, if there are enough cores.
    parts = [cores[number :: len(places)] for number in range(len(places))]
    workers = [
        Worker("benchmarks.turns:answer", place, part, *arguments) for place, part in zip(places, parts, strict=True)
    ]
    for worker in workers:
        worker.start()
    results = [worker.receive() for worker in workers]
    for worker in workers:
        worker.stop()
    for place, result in zip(places, results, strict=True):
        if isinstance(result, Measured):
            raise RuntimeError(f"{place}: {result.failure}")
    return [result[0] for result in results]


class Worker:
    """A child process, connected by a pipe."""

    def __init__(self, target: str, *arguments: Any):
        self._target, self._arguments = target, arguments
        self._pipe: Connection
        self._process: BaseProcess

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_enter, args=(theirs, self._target, self._arguments), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, message: str) -> Any:
        """Sends a message and returns the answer; see `receive`."""
        with contextlib.suppress(OSError):  # the child is dead, as `receive` will report
            self._pipe.send(message)
        return self.receive()

    def receive(self) -> Any:
        """The next message of the child, or a `Measured` with a failure if it is dead or hangs."""
        try:
            if self._pipe.poll(PATIENCE_S):
                return self._pipe.recv()
            self._process.kill()
            return _failed(f"failed: no answer within {PATIENCE_S} s")
        except (EOFError, OSError):
            self._process.join()
            return _failed(f"failed: its process ended with code {self._process.exitcode}")

    def stop(self) -> None:
        """Ends the child by closing the pipe."""
        self._pipe.close()
        self._process.join(timeout=10)
        self._process.kill()


def _enter(pipe: Connection, target: str, arguments: tuple) -> None:
    """The main function of a child: sends every error as a message."""
    # The waiting contenders share the memory of the GPU.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # All multiply in full float32, as `vae_jax.fit` and PyTorch do; by default JAX uses TF32 on some GPUs.
    os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
    # Other trainers print progress bars and banners.
    os.environ["TQDM_DISABLE"] = "1"
    try:
        with Path(os.devnull).open("w") as devnull, contextlib.redirect_stdout(devnull):
            resolve(target)(pipe, *arguments)
    except EOFError:
        pass
    except ModuleNotFoundError as error:
        pipe.send(_failed(f"not installed: {error.name}"))
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        pipe.send(_failed(f"failed: {type(error).__name__}: {lines[0][:200]}"))


def serve(pipe: Connection, place: str, setting: Setting) -> None:
    """Prepares a contender, warms it up, and runs it once for each message."""
    start = time.perf_counter()
    runner: Runner = resolve(place)(setting)
    prepared = time.perf_counter()
    runner.run()
    pipe.send(Measured("", prepared - start, time.perf_counter() - prepared, [], []))
    while pipe.recv() == "run":
        start = time.perf_counter()
        returned = runner.run()
        pipe.send(((time.perf_counter() - start) / runner.share, returned))


def answer(pipe: Connection, place: str, cores: list[int], *arguments: Any) -> None:
    """Calls a function on the given cores (an empty list means all), and sends its result in a tuple."""
    if cores:
        os.sched_setaffinity(0, cores)
    pipe.send((resolve(place)(*arguments),))


def _failed(reason: str) -> Measured:
    return Measured("", None, None, [], [], reason)


def resolve(place: str) -> Callable[..., Any]:
    module, _, function = place.partition(":")
    return getattr(importlib.import_module(module), function)


def say(line: str) -> None:
    """Tells how far a benchmark is; the results go to standard output."""
    print(line, file=sys.stderr, flush=True)
