"""Checkpoints of a run: all that it takes to go on as if it had never stopped. Orbax writes and reads them.

Each has the digests of its files in SHA256SUMS (`sha256sum -c` knows the form): Orbax is only ever given whole ones.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np

from vae_jax import steps
from vae_jax.config import CHECKPOINTS, NUMBER, InputError, NonFiniteLossError, TrainConfig, checkpoint_steps, reason
from vae_jax.files import flush, replacing
from vae_jax.log import STDERR, EpochMetrics, locked, require_locked, unheard

# Checkpoints that are kept beside the one with the lowest test loss.
NEWEST = 2
SUMS = "SHA256SUMS"


@dataclasses.dataclass
class Progress:
    """Where a run stands between two optimizer steps."""

    state: steps.TrainState
    history: list[EpochMetrics] = dataclasses.field(default_factory=list)  # of the epochs that are behind it
    bce: list[float] = dataclasses.field(default_factory=list)  # of each step of the epoch that has begun
    kld: list[float] = dataclasses.field(default_factory=list)
    seconds: float = 0.0  # of training in that epoch

    _running: steps.Losses | None = None  # steps that the device may still be at

    def __str__(self) -> str:
        within = f" and step {len(self.bce):,} of epoch {len(self.history) + 1}" if self.bce else ""
        return f"epoch {len(self.history)}{within}"

    def advance(self, state: steps.TrainState, sums: steps.Losses) -> None:
        """Takes further steps in, which need not be done yet; waits for those before them.

        Args:
          state: After the last of them.
          sums: The losses of each, summed over its batch.

        Raises:
          NonFiniteLossError: A loss of those before is not finite.
        """
        self.settle()
        self.state, self._running = state, sums

    def settle(self) -> None:
        """Waits until all steps are done.

        Raises:
          NonFiniteLossError: A loss is not finite.
        """
        if self._running is None:
            return
        bad = np.flatnonzero(~np.isfinite(self._running.loss))
        if bad.size:
            raise NonFiniteLossError(
                f"epoch {len(self.history) + 1}, step {len(self.bce) + bad[0] + 1:,}: the training loss is"
                f" {self._running.loss[bad[0]]}; nothing exported, the checkpoints before it are kept; start anew"
                " (--overwrite) with a lower --learning-rate or --beta"
            )
        self.bce += np.asarray(self._running.bce).tolist()
        self.kld += np.asarray(self._running.kld).tolist()
        self._running = None

    def end_epoch(self, metrics: EpochMetrics) -> None:
        """Closes the epoch that has begun."""
        self.history.append(metrics)
        self.bce, self.kld, self.seconds = [], [], 0.0


class _DamagedError(ValueError):
    """A checkpoint is not as it was written."""


class Checkpoints:
    """The checkpoints of a run, in the folder `checkpoints` of its workdir, each named after its number of steps.

    Args:
      config: The options of the run.
      count: Number of training images.
      pixels: Pixels of each.
      checksum: Of all images.
    """

    def __init__(self, config: TrainConfig, count: int, pixels: int, checksum: int):
        self._config = config
        self._pixels = pixels
        self._epoch_steps = math.ceil(count / config.batch_size)
        self._checksum = checksum
        self._shown = config.workdir / CHECKPOINTS
        self._folder = self._shown.resolve()
        self._locked = locked(config.workdir)
        self._newest: int | None = None  # of those known to be whole
        self._last = time.monotonic()
        self._sweep()

    def newest(self) -> Progress | None:
        """Reads the newest checkpoint that is whole; damaged ones are passed over, saying which and why.

        Returns:
          What it holds, or None where there is none.

        Raises:
          InputError: All of them are damaged, or they are those of a run with other options or images.
          OSError: One cannot be read, damaged or not.
        """
        for number in reversed(self._numbers()):
            try:
                arrays, notes = self._read(number)
            except _DamagedError as damage:
                with unheard(STDERR):
                    print(f"warning: {self._shown / str(number)}: is damaged ({damage}); passed over", file=sys.stderr)
                continue
            self._config.require_same_run(notes["config"])
            if notes["checksum"] != self._checksum:
                raise InputError(
                    f"--data {self._config.data}: holds other images than those of the run in {self._config.workdir};"
                    " give it those, add --overwrite to replace it, or name another --workdir"
                )
            self._newest = number
            arrays = jax.tree.map(jnp.array, arrays)
            blank = jax.eval_shape(lambda: steps.create_state(self._config, self._pixels))
            key = jax.random.wrap_key_data(arrays["key"])
            state = cast(steps.TrainState, flax.serialization.from_state_dict(blank, arrays | {"key": key}))
            history = [EpochMetrics(**metrics) for metrics in notes["history"]]
            return Progress(state, history, notes["bce"], notes["kld"], notes["seconds"])
        if self._numbers():
            raise InputError(
                f"--workdir {self._config.workdir}: none of its checkpoints can be read; bring back a copy of one,"
                " or add --overwrite to start anew"
            )
        return None

    def due(self, ahead: float = 0) -> bool:
        """Whether it is time for a checkpoint, or will be in so many seconds."""
        return time.monotonic() - self._last + ahead >= self._config.checkpoint_every

    def save(self, progress: Progress) -> None:
        """Writes a checkpoint; keeps the two newest and the one with the lowest test loss, and deletes the others.

        Raises:
          NonFiniteLossError: The last step has made values that are not finite; nothing is written.
          OSError: It cannot be written; those before it are still whole.
        """
        number = int(progress.state.step)
        if number == self._newest:
            return
        arrays = flax.serialization.to_state_dict(
            jax.device_get(progress.state.replace(key=jax.random.key_data(progress.state.key)))
        )
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(arrays)):
            raise NonFiniteLossError(
                f"epoch {len(progress.history) + bool(progress.bce)}: step {number:,} has made parameters that are not"
                " finite; no checkpoint of them is kept;"
                " try a lower --learning-rate or --beta"
            )
        notes = {
            "config": dataclasses.asdict(self._config),
            "checksum": self._checksum,
            "epoch": len(progress.history),
            "history": [dataclasses.asdict(metrics) for metrics in progress.history],
            "bce": progress.bce,
            "kld": progress.kld,
            "seconds": progress.seconds,
        }
        notes = json.loads(json.dumps(notes, default=str))  # paths as text
        try:
            require_locked(self._config.workdir, self._locked)  # Orbax would make another one
            for later in self._numbers():
                if self._newest is None or later > self._newest:  # damaged: it was passed over
                    self._delete(later)
            part = self._folder / f"{number}.part"
            with _orbax() as orbax, orbax.Checkpointer(orbax.CompositeCheckpointHandler()) as checkpointer:
                items = {"state": orbax.args.PyTreeSave(arrays), "notes": orbax.args.JsonSave(notes)}
                checkpointer.save(part, orbax.args.Composite(**items))
            with replacing(part / SUMS) as sums:
                sums.write_text(_sums(part))
            # Before an older one is deleted: a power cut may not take both.
            flush(part, *part.rglob("*"))
            part.rename(self._folder / str(number))
            flush(self._folder)
            self._newest = number
            for old in self._numbers():
                if old not in self._kept(progress.history):
                    self._delete(old)
        except Exception as error:  # a full disk, say, which the libraries have various words for
            self._sweep()
            code = re.search(r"os_error_code='(\d+)'", str(error))
            why = os.strerror(int(code[1])) if code else getattr(error, "strerror", None) or reason(error)
            raise OSError(None, f"{why}; the checkpoints before it are kept", str(self._shown / str(number))) from None
        self._last = time.monotonic()

    def _read(self, number: int) -> tuple[dict[str, Any], dict[str, Any]]:
        folder = self._folder / str(number)
        try:
            expected = (folder / SUMS).read_text(errors="replace")
        except FileNotFoundError:
            raise _DamagedError(f"{SUMS} is missing") from None
        differing = {line.split("  ", 1)[-1] for line in {*expected.splitlines()} ^ {*_sums(folder).splitlines()}}
        if differing:
            raise _DamagedError(f"{SUMS} does not match {min(differing)}")
        with _orbax() as orbax, orbax.Checkpointer(orbax.CompositeCheckpointHandler()) as checkpointer:
            items = {"state": orbax.args.PyTreeRestore(), "notes": orbax.args.JsonRestore()}
            checkpoint = checkpointer.restore(folder, orbax.args.Composite(**items))
        return checkpoint["state"], checkpoint["notes"]

    def _numbers(self) -> list[int]:
        """The steps of the checkpoints that are there, oldest first."""
        return checkpoint_steps(self._folder)

    def _kept(self, history: list[EpochMetrics]) -> set[int]:
        numbers = self._numbers()
        tested = {metrics.epoch * self._epoch_steps: metrics.test_loss for metrics in history}
        best = min(tested.keys() & set(numbers), key=lambda number: tested[number], default=numbers[-1])
        return {*numbers[-NEWEST:], best}

    def _delete(self, number: int) -> None:
        # Under another name first: no half of one is ever taken for a checkpoint.
        gone = self._folder / f"{number}.deleted"
        (self._folder / str(number)).rename(gone)
        shutil.rmtree(gone)

    def _sweep(self) -> None:
        """Removes what a process that was killed was writing or deleting."""
        for path in self._folder.glob("[0-9]*.*"):
            if re.fullmatch(rf"({NUMBER})\.(deleted|part(\.orbax-checkpoint-tmp.*)?)", path.name):
                shutil.rmtree(path, ignore_errors=True)


def _sums(folder: Path) -> str:
    """A line for each file in a checkpoint: its digest, and its path. Hidden files are a file manager's, not ours."""
    files = sorted(path for path in folder.rglob("[!.]*") if path.is_file() and path.relative_to(folder) != Path(SUMS))
    lines = []
    for path in files:
        with path.open("rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.relative_to(folder)}\n")
    return "".join(lines)


@contextmanager
def _orbax() -> Iterator[Any]:
    """Orbax, imported when it is needed, and kept from printing pages about an error that it raises as well."""
    import orbax.checkpoint as orbax

    logger, hook = logging.getLogger("absl"), sys.unraisablehook
    before = logger.disabled

    def quiet(unraisable: Any) -> None:
        # What threads were still writing when a write failed finds Orbax's event loop gone.
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    logger.disabled, sys.unraisablehook = True, quiet
    try:
        yield orbax
        sys.unraisablehook = hook  # not after an error: some of them come to it later
    finally:
        logger.disabled = before
