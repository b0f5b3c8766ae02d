"""Several processes that train one model together: they find each other, agree, and notice when one is gone.

JAX's own coordination service brings them together. It is shut down as soon as the devices are connected: from then on
it could only abort the others when a process dies. Instead, each process writes a file into the workdir again and
again, and reads those of the others.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NoReturn

import jax
import numpy as np

from vae_jax.config import INT32_MAX, TrainConfig, option_name
from vae_jax.core.mesh import Mesh, fixed_threads
from vae_jax.core.settings import require_device
from vae_jax.runs.workdir import PROCESS
from vae_jax.system.console import mute, quiet, warn
from vae_jax.system.errors import InputError, NonFiniteLossError, reason
from vae_jax.system.signals import Interrupted, StopRequest

# Bytes of a text that processes exchange; the longest options are two paths.
TEXT = 2**16
# How often a process shows that it is there, in shares of the silence that counts as its end.
BEATS = 8
# Which of the options may differ between processes: each has its own number, and may find the images elsewhere.
OWN = ("process", "coordinator", "data", "data_dir", "max_data_gb", "init")


def join(config: TrainConfig) -> Processes:
    """Connects this process with the others of its run, if there are any; must come before anything that uses a device.

    Where the options name no coordinator, JAX finds the processes that Slurm, Open MPI, Kubernetes or Cloud TPU have
    started. A model of one shard is trained by one process.

    Raises:
      InputError: The others do not come within `--initialization-timeout`, they have other options, or the devices
        cannot share the shards.
    """
    with fixed_threads(config.shards):
        _connect(config)
        require_device()
    # Over one device of each process, whatever the options, which may differ still.
    processes = Processes(config, Mesh(jax.process_count(), jax.process_count()))
    processes.require_same_options()
    with processes.together():
        mesh = Mesh(config.shards, config.devices)
    return Processes(config, mesh)


def _connect(config: TrainConfig) -> None:
    given = (config.coordinator, config.processes, config.process)
    if given == (None, None, None):
        if config.shards == 1:
            return
        _require_known_launcher()
    elif config.process == 0:
        _require_free_port(config)
    if jax.distributed.is_initialized():
        return
    jax.config.update("jax_check_proxy_envs", False)  # ours names them
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from us
    problem: list[Exception] = []

    def initialize() -> None:
        try:
            # Our own timeout comes first: after its own, JAX aborts the process.
            timeout = 2 * config.initialization_timeout + 60
            silence = math.ceil(min(config.heartbeat, INT32_MAX))  # until the watch takes over
            jax.distributed.initialize(*given, initialization_timeout=timeout, heartbeat_timeout_seconds=silence)
        except Exception as error:
            problem.append(error)

    # In a thread that may be abandoned: JAX cannot be interrupted while it waits.
    thread = threading.Thread(target=initialize, daemon=True)
    thread.start()
    thread.join(config.initialization_timeout)
    if thread.is_alive():
        proxies = [name for name in os.environ if name.lower().endswith("_proxy") and name.lower() != "no_proxy"]
        hint = f"; unset {', '.join(proxies)}, which may lead elsewhere" if proxies else ""
        late = f"not all processes have come within {config.initialization_timeout} seconds (--initialization-timeout)"
        if given == (None, None, None):
            raise InputError(
                f"--shards {config.shards}: {late}; check that the machines reach each other, or name the address of"
                f" process 0 with --coordinator, --processes and --process{hint}"
            )
        what = f"--processes {config.processes}" if config.process == 0 else f"--coordinator {config.coordinator}"
        raise InputError(
            f"{what}: {late}; start as many as --processes says, with numbers from 0, and check that the address is"
            f" that of process 0{hint}"
        )
    if problem and given != (None, None, None):
        raise InputError(f"--coordinator {config.coordinator}: cannot connect ({reason(problem[0])})")
    if problem and isinstance(problem[0], jax.errors.JaxRuntimeError):
        raise InputError(f"--shards {config.shards}: cannot connect the launcher's processes ({reason(problem[0])})")
    # Otherwise there is no cluster, or jax is in use already: this process is alone.


def _require_known_launcher() -> None:
    """JAX knows Open MPI up to version 4 only; each process of another mpirun would train the whole model, alone."""
    if "OMPI_MCA_orte_hnp_uri" in os.environ:
        return
    for size, rank in (("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"), ("PMI_SIZE", "PMI_RANK")):
        if int(os.environ.get(size, 1)) > 1 and "SLURM_STEP_NODELIST" not in os.environ:
            raise InputError(
                f"{size}={os.environ[size]}: jax does not know this kind of mpirun; start"
                f" bash -c 'python -m vae_jax.train --coordinator HOST:PORT --processes ${size} --process ${rank} ...'"
            )


def _require_free_port(config: TrainConfig) -> None:
    """Where the port is taken, JAX ends with a segmentation fault."""
    port = int(str(config.coordinator).rpartition(":")[2])
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise InputError(
            f"--coordinator {config.coordinator}: process 0 cannot listen there ({reason(error)}); give all processes"
            " another port"
        ) from None


class Processes:
    """The processes of a run, which have joined; a single one needs none of this, and does nothing here.

    Args:
      config: The options of this process.
      mesh: The devices of all.
    """

    def __init__(self, config: TrainConfig, mesh: Mesh):
        self._config = config
        self.mesh = mesh
        self.count, self.number = mesh.processes, mesh.process

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints, writes and draws."""
        return self.number == 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """Within the block, what one process refuses, all refuse.

        Raises:
          InputError: In every process, if one has raised it, or an OSError.
        """
        problem = ""
        try:
            yield
        except (InputError, OSError) as error:
            if self.count == 1:
                raise
            problem = str(error)
        for number, found in enumerate(self._gather_text(problem)):
            if found:
                raise InputError(found if number == 0 else f"process {number}: {found}")

    def require_same_options(self) -> None:
        """Checks that all processes were given the same options.

        Raises:
          InputError: One was not.
        """
        options = {name: str(value) for name, value in vars(self._config).items() if name not in OWN}
        others = [json.loads(text) for text in self._gather_text(json.dumps(options))]
        for number, other in enumerate(others):
            for name in options:
                if other[name] != others[0][name]:
                    raise InputError(
                        f"--{option_name(name)}: is {other[name]} in process {number}, {others[0][name]} in process 0;"
                        " give all processes the same options"
                    )

    def require_same(self, digest: int, what: str) -> None:
        """Checks that all processes have the same images or parameters, by a checksum.

        Raises:
          InputError: One has not.
        """
        found = self._gather(np.array([digest & 0x7FFFFFFF], np.int32))[:, 0]
        for number in np.flatnonzero(found != found[0]):
            raise InputError(f"process {number} has other {what} than process 0; give all processes the same")

    @contextmanager
    def enter(self, context: AbstractContextManager) -> Iterator[None]:
        """Enters a context; what refuses that in one process refuses it in all."""
        with contextlib.ExitStack() as stack:
            with self.together():
                stack.enter_context(context)
            yield

    def agree_to_stop(self, stop: StopRequest) -> None:
        """Lets a signal that any process has heard stop all of them after the same step."""
        stop.agreed = self._largest(stop.signum or 0) or None

    def _largest(self, value: int) -> int:
        return int(self._gather(np.array([value], np.int32)).max())

    def _gather(self, values: np.ndarray) -> np.ndarray:
        """The values of every process, [processes, ...].

        Raises:
          ConnectionError: Another process is gone.
        """
        if self.count == 1:
            return values[None]
        try:
            # The first exchange connects the devices, and Gloo prints a line about that.
            with mute() if jax.distributed.is_initialized() else contextlib.nullcontext():
                return self.mesh.gather(values)
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            raise ConnectionError(f"another process is gone ({reason(error)})") from None

    def _gather_text(self, text: str) -> list[str]:
        if self.count == 1:
            return [text]
        content = text.encode(errors="backslashreplace")[:TEXT]
        padded = np.frombuffer(content.ljust(TEXT, b"\0"), np.uint8)
        return [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in self._gather(padded)]

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Within the block, this process ends, with a line and code 1, when another one is gone.

        Raises:
          InputError: The processes do not share the workdir.
        """
        if self.count == 1:
            yield
            return
        token = self._largest(secrets.randbits(31) if self.is_first else 0)
        watch = _Watch(self._config, self.count, self.number, token)
        try:
            with contextlib.suppress(OSError):
                watch.beat()
            self._largest(0)  # all have written
            with self.together():
                watch.require_all()
            if jax.distributed.is_initialized():
                jax.distributed.shutdown()  # the devices are connected
            threading.Thread(target=watch.run, daemon=True).start()
            with contextlib.nullcontext() if self.is_first else quiet():
                yield
        except (InputError, NonFiniteLossError, Interrupted):
            watch.end(well=True)  # all processes raise it, and each may finish what it is writing
            raise
        except (jax.errors.JaxRuntimeError, ConnectionError, ValueError) as error:
            # An exchange has failed: the watch will tell which process is gone.
            time.sleep(2 * self._config.heartbeat)
            watch.end(well=False)
            raise ConnectionError(f"the exchange with the other processes has failed ({reason(error)})") from error
        except BaseException:
            watch.end(well=False)
            raise
        watch.end(well=True)


class _Watch:
    """A file of each process in the workdir; its content changes while the process lives, and a good end removes it."""

    def __init__(self, config: TrainConfig, count: int, number: int, token: int):
        self._config = config
        self._files = [config.workdir / f"{PROCESS}{other}" for other in range(count)]
        self._number = number
        self._token = token
        self._beats = 0
        self._pause = min(1.0, config.heartbeat / BEATS)
        self._busy = threading.Lock()

    def beat(self, word: str = "alive") -> None:
        """Shows the others that this process lives; or, with another word, that it does not."""
        self._beats += 1
        # In place and always of one length: it works on a full disk, and nobody reads half of it.
        file = os.open(self._files[self._number], os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            os.write(file, f"{self._token:10} {self._beats:10} {word:5}".encode())
        finally:
            os.close(file)

    def require_all(self) -> None:
        missing = [number for number in range(len(self._files)) if not self._read(number)]
        if missing:
            raise InputError(
                f"--workdir {self._config.workdir}: the file of process {missing[0]} is not there; name a folder that"
                " all processes share and can write to"
            )

    def _read(self, number: int) -> list[str]:
        """The words in the file of a process of this run; none if it is not there."""
        with contextlib.suppress(OSError):
            words = self._files[number].read_text().split()
            if words[:1] == [str(self._token)]:
                return words[1:]
        return []

    def run(self) -> None:
        """Watches the others until this process ends."""
        seen: dict[int, tuple[list[str], int]] = {}
        while True:
            with self._busy:
                with contextlib.suppress(OSError):
                    self.beat()
                for number in range(len(self._files)):
                    words = self._read(number)
                    if number not in seen or seen[number][0] != words:
                        seen[number] = (words, self._beats)
                    # In beats of our own: when all were stopped for a while, nobody is gone.
                    silence = (self._beats - seen[number][1]) * self._pause
                    if words and number != self._number and (silence > self._config.heartbeat or words[1] == "gone"):
                        self._give_up(number)
            time.sleep(self._pause)

    def _give_up(self, number: int) -> NoReturn:
        warn(
            f"error: process {number} is gone; the checkpoints are whole; to go on, start all processes again as before"
        )
        os._exit(1)  # the main thread may wait for ever

    def end(self, well: bool) -> None:
        """Tells the others that this process ends, and whether they can go on without it."""
        self._busy.acquire()  # for good: nobody beats or gives up any more
        with contextlib.suppress(OSError):
            if well:
                self._files[self._number].unlink()
            else:
                self.beat("gone")
