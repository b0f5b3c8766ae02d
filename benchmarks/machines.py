"""Several devices and processes: images per second, what the exchange costs, and PyTorch's DistributedDataParallel.

The devices of a CPU share its cores, so the best that several of them can do is what one does.
"""

import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.report import Check, Report, at_least
from benchmarks.turns import REST_S, Measured, Worker, resolve, say

if TYPE_CHECKING:
    from vae_jax import Dataset

COUNTS, QUICK_COUNTS = (2, 4), (2,)
BATCHES, QUICK_BATCHES = (128, 1024, 8192), (128, 1024)
IMAGES, QUICK_IMAGES = 32768, 2048
ROUNDS, QUICK_ROUNDS = 5, 2
# The batch size of the checks.
CHECKED = 1024
DDP = "PyTorch, DistributedDataParallel (gloo), documented loop"
FAST_DDP = "PyTorch, DistributedDataParallel (gloo), faster loop"
APART = "vae_jax, the same without exchange"
STREAMED = "vae_jax, streamed from an .npz"


class Contender(NamedTuple):
    """A program of one or several processes."""

    name: str
    place: str  # "module:function": called as function(contender, number of the process, task)
    processes: int
    devices: int  # of all processes
    shards: int


class Task(NamedTuple):
    """What all contenders do."""

    images: int
    batches: tuple[int, ...]
    port: int  # where the processes of a contender meet
    folder: Path  # for files of a contender


class Group:
    """The processes of a contender, each of which serves all batch sizes."""

    def __init__(self, contender: Contender, images: int, batches: tuple[int, ...]):
        self.contender = contender
        self._folder = tempfile.TemporaryDirectory()
        with socket.create_server(("", 0)) as server:
            task = Task(images, batches, server.getsockname()[1], Path(self._folder.name))
        self._workers = [
            Worker("benchmarks.machines:serve", contender, number, task) for number in range(contender.processes)
        ]
        for worker in self._workers:
            worker.start()
        self.failure = _failure([worker.receive() for worker in self._workers])

    def run(self, batch_size: int) -> float | None:
        """Seconds of an epoch, of the slowest process; None if one has failed."""
        if self.failure:
            return None
        with ThreadPoolExecutor(len(self._workers)) as pool:  # at once: they wait for each other
            answers: list[Any] = list(pool.map(lambda worker: worker.ask(batch_size), self._workers))
        self.failure = _failure(answers)
        return None if self.failure else max(answers)

    def stop(self) -> None:
        for worker in self._workers:
            worker.stop()
        self._folder.cleanup()


def _failure(answers: list[Any]) -> str:
    return next((answer.failure for answer in answers if isinstance(answer, Measured)), "")


def run(quick: bool, gpu: bool) -> Report:
    """Times all contenders in turn, on the CPU."""
    del gpu
    counts, batches = (QUICK_COUNTS, QUICK_BATCHES) if quick else (COUNTS, BATCHES)
    images, rounds = (QUICK_IMAGES, QUICK_ROUNDS) if quick else (IMAGES, ROUNDS)
    rows = measure(contenders(counts), images, batches, rounds)
    return Report(
        "machines",
        f"An epoch of {images:,} images in memory, medians of {rounds} in turn. All devices and processes share the"
        " cores of this CPU. Without exchange, each process trains a model of its own on its share of each batch; the"
        " share of the exchange is the time that this saves.",
        {"images": images, "rounds": rounds},
        {f"Batches of {size:,}": [row for row in rows if row["batch"] == size] for size in batches},
        checks(rows),
    )


def contenders(counts: tuple[int, ...]) -> list[Contender]:
    """One device; then for each count, as many shards on one device, on several, and in several processes."""
    found = [Contender("vae_jax", "benchmarks.machines:ours", 1, 1, 1)]
    for count in counts:
        found += [
            Contender("vae_jax", "benchmarks.machines:ours", processes, devices, count)
            for processes, devices in ((1, 1), (1, count), (count, count))
        ]
        found.append(Contender(APART, "benchmarks.machines:apart", count, count, count))
    found += [Contender(STREAMED, "benchmarks.machines:streamed", count, count, count) for count in (1, 2)]
    return [
        *found,
        Contender(DDP, "benchmarks.machines:documented_in_parallel", 2, 2, 2),
        Contender(FAST_DDP, "benchmarks.machines:in_memory_in_parallel", 2, 2, 2),
    ]


def measure(contenders: list[Contender], images: int, batches: tuple[int, ...], rounds: int) -> list[dict]:
    """A row for each batch size and contender."""
    groups = []
    for contender in contenders:
        say(f"  {contender.name}, {contender.processes} processes, {contender.devices} devices: preparing")
        groups.append(Group(contender, images, batches))
    rows = []
    for size in batches:
        seconds: list[list[float]] = [[] for _ in groups]
        for number in range(rounds):
            for group, found in zip(groups, seconds, strict=True):
                time.sleep(REST_S)
                taken = group.run(size)
                if taken is not None:
                    found.append(taken)
            say(f"  batches of {size}: round {number + 1}/{rounds}")
        rows += [_row(group, size, images, found) for group, found in zip(groups, seconds, strict=True)]
    for group in groups:
        group.stop()
    for row in rows:
        row |= _compared(row, rows)
    return rows


def _row(group: Group, batch_size: int, images: int, seconds: list[float]) -> dict:
    name, _, processes, devices, shards = group.contender
    row: dict[str, Any] = {
        "trainer": name, "processes": processes, "devices": devices, "shards": shards, "batch": batch_size
    }  # fmt: skip
    if not seconds:
        return row | {"note": group.failure}
    median = statistics.median(seconds)
    return row | {"steps/s": -(-images // batch_size) / median, "images/s": images / median}


def _compared(row: dict, rows: list[dict]) -> dict:
    """The speed of a row against one device with the same shards, and the share of the exchange between processes; that
    of streamed images against the same in memory."""
    layout = (row["processes"], row["devices"], row["shards"], row["batch"])
    memory, apart = find(rows, "vae_jax", *layout), find(rows, APART, *layout)
    one = find(rows, "vae_jax", 1, 1, row["shards"], row["batch"])
    if "images/s" not in row:
        return {}
    if row["trainer"] == STREAMED:
        return {"x in memory": row["images/s"] / memory if memory else None}
    if row["devices"] == 1:
        return {}
    found = {"x one device": row["images/s"] / one if one else None}
    if apart and row["trainer"] == "vae_jax":
        found["exchange"] = f"{max(0.0, 1 - row['images/s'] / apart):.0%}"
    return found


def find(rows: list[dict], trainer: str, processes: int, devices: int, shards: int, batch_size: int) -> float | None:
    """The images per second of a row."""
    wanted = {"trainer": trainer, "processes": processes, "devices": devices, "shards": shards, "batch": batch_size}
    return next((row.get("images/s") for row in rows if row.items() >= wanted.items()), None)


def checks(rows: list[dict]) -> list[Check]:
    ours = find(rows, "vae_jax", 2, 2, 2, CHECKED)
    one, ddp = find(rows, "vae_jax", 1, 1, 2, CHECKED), find(rows, DDP, 2, 2, 2, CHECKED)
    images = f"two processes, --shards 2, batches of {CHECKED:,}: at least"
    return [
        at_least(f"{images} 0.85 x the images/s of one process with all cores", ours, one, 0.85),
        at_least(f"{images} 2 x the images/s of DistributedDataParallel's documented loop", ours, ddp, 2),
        at_least(
            f"streamed in one process, batches of {CHECKED:,}: at least 0.9 x the images/s in memory",
            find(rows, STREAMED, 1, 1, 1, CHECKED),
            find(rows, "vae_jax", 1, 1, 1, CHECKED),
            0.9,
        ),
    ]


def serve(pipe: Connection, contender: Contender, number: int, task: Task) -> None:
    """A process of a contender: prepares all batch sizes, warms up, and then runs an epoch for each message."""
    each = contender.devices // contender.processes
    os.environ |= {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={each}",
        "JAX_PLATFORMS": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
    }
    epochs: dict[int, Callable[[], Any]] = resolve(contender.place)(contender, number, task)
    for epoch in epochs.values():
        epoch()
    pipe.send("ready")
    while True:
        epoch = epochs[pipe.recv()]
        start = time.perf_counter()
        epoch()
        pipe.send(time.perf_counter() - start)


def streamed(contender: Contender, number: int, task: Task) -> dict:
    """The same with the images in a file, which is read while the model trains."""
    import numpy as np

    from vae_jax import load

    mnist = load()
    file = task.folder / f"images{number}.npz"
    np.savez(file, train_images=mnist.train_images[: task.images], test_images=mnist.test_images)
    return ours(contender, number, task, load(str(file), stream="always"))


def ours(contender: Contender, number: int, task: Task, dataset: "Dataset | None" = None) -> dict:
    """Epochs as in `vae_jax.fit`, on the first images of MNIST by default."""
    import jax

    from vae_jax import TrainConfig
    from vae_jax.runs.processes import join

    given = (f"localhost:{task.port}", contender.processes, number) if contender.processes > 1 else (None, None, None)
    coordinator, processes, process = given
    config = TrainConfig(
        shards=contender.shards,
        coordinator=coordinator,
        processes=processes,
        process=process,
        stream="auto" if dataset is None else "always",
    )
    mesh = join(config).mesh
    if contender.processes > 1:
        jax.distributed.shutdown()  # as `Processes.watch` does; it would complain of the others' end
    return _epochs(config, mesh, dataset or first(task.images), task.batches)


def apart(contender: Contender, number: int, task: Task) -> dict:
    """The same for one process's share of each batch; it trains a model of its own."""
    from vae_jax import TrainConfig
    from vae_jax.core.mesh import Mesh

    del number
    count = contender.processes
    os.environ["NPROC"] = str(contender.shards)  # as many threads as with the exchange
    shares = tuple(size // count for size in task.batches)
    config = TrainConfig(shards=contender.shards // count)
    epochs = _epochs(config, Mesh(config.shards), first(task.images // count), shares)
    return {share * count: epoch for share, epoch in epochs.items()}


def first(images: int) -> "Dataset":
    """The first training images of MNIST."""
    from vae_jax import load

    mnist = load()
    return mnist._replace(train_images=mnist.train_images[:images], train_labels=None)


def _epochs(config: Any, mesh: Any, dataset: "Dataset", batches: tuple[int, ...]) -> dict:
    import dataclasses

    import numpy as np

    from vae_jax import create_state
    from vae_jax.runs.feed import Feed

    def epoch(batch_size: int) -> Callable[[], float]:
        ours = dataclasses.replace(config, batch_size=batch_size)
        state = mesh.replicate(create_state(ours).replace(shards=mesh.shards))
        feed = Feed(ours, dataset, state, mesh)
        feed.compile_ahead(state)
        feed.wait_until_compiled()
        number = 0

        def run() -> float:
            nonlocal state, number
            number += 1
            sums = []
            for chunk in feed.chunks(number):
                state, losses = feed.train(state, chunk)
                sums.append(losses.loss)
            return float(sum(np.asarray(loss).sum() for loss in sums)) / len(dataset.train_images)

        return run

    return {size: epoch(size) for size in batches}


def documented_in_parallel(contender: Contender, number: int, task: Task) -> dict:
    """The documented loop with the images in memory: a DataLoader of tensors, and Adam as it is."""
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    from torch_ref.train import train_epoch

    model, own = _in_parallel(contender, number, task)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def epoch(batch_size: int) -> Callable[[], Any]:
        loader = DataLoader(TensorDataset(own), batch_size, shuffle=True)
        return lambda: train_epoch(model, optimizer, loader)

    return {size: epoch(size // contender.processes) for size in task.batches}


def in_memory_in_parallel(contender: Contender, number: int, task: Task) -> dict:
    """The same made faster: batches cut from one tensor, Adam in one pass, and no sums read back in between."""
    from benchmarks.torch_contenders import InMemoryTraining

    model, own = _in_parallel(contender, number, task)
    return {size: InMemoryTraining(model, own, size // contender.processes).epoch for size in task.batches}


def _in_parallel(contender: Contender, number: int, task: Task) -> tuple[Any, Any]:
    """The model that the processes share, a thread each (as torchrun has it), and the images of this process."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    from benchmarks.torch_contenders import pixels
    from benchmarks.turns import Setting
    from torch_ref.model import VAE

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // contender.processes))
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://localhost:{task.port}", rank=number, world_size=contender.processes
    )
    torch.manual_seed(0)
    return DistributedDataParallel(VAE()), pixels(Setting(task.images))[number :: contender.processes]
