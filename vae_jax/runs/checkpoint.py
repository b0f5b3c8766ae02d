"""Checkpoints: all that a run needs to go on as if it had never stopped, one safetensors file each.

The file holds the arrays of the state by name; its header holds, as JSON, the options, the epochs that are done, the
losses of the current one, and a SHA-256 of everything. The package `safetensors` opens it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from pathlib import Path
from typing import Any, cast

import flax.linen as nn
import flax.serialization
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from vae_jax.config import TrainConfig, Which
from vae_jax.core import steps
from vae_jax.data.dataset import Dataset
from vae_jax.runs.metrics import EpochMetrics, best_epoch
from vae_jax.runs.progress import Progress
from vae_jax.runs.workdir import Workdir
from vae_jax.system.console import warn
from vae_jax.system.errors import InputError, NonFiniteLossError, reason
from vae_jax.system.files import replacing

# Checkpoints that are kept, beside the one with the lowest test loss.
NEWEST = 2
# How often the folder is listed again because checkpoints vanished while they were read.
ATTEMPTS = 10


class DamagedError(ValueError):
    """A checkpoint is not as it was written."""


class Checkpoints:
    """The checkpoints of a run, in the folder `checkpoints` of its workdir, each named after its optimizer steps.

    Args:
      config: The options of the run.
      workdir: Its folder, locked.
      dataset: Its images.
      checksum: That of the images.
    """

    def __init__(self, config: TrainConfig, workdir: Workdir, dataset: Dataset, checksum: int):
        self._config = config
        self._workdir = workdir
        self._checksum = checksum
        self._images = len(dataset.train_images)
        self._epoch_steps = math.ceil(self._images / config.batch_size)
        self._pixels = math.prod(dataset.image_shape)
        self._newest: int | None = None  # of those known to be whole
        self._last = time.monotonic()

    def newest(self, model: nn.Module | None = None, most: int | None = None) -> Progress | None:
        """Reads the newest checkpoint that is whole; damaged ones are reported and skipped.

        Args:
          model: The module of the run; by default that of its options.
          most: Leave out checkpoints after more optimizer steps.

        Returns:
          The progress, or None if there is no checkpoint.

        Raises:
          InputError: All checkpoints are damaged, or they belong to a run with other options or images.
          OSError: A file cannot be read, damaged or not.
        """
        for step in reversed(self._workdir.checkpoint_steps()):
            if most is not None and step > most:
                continue
            file = self._workdir.checkpoint(step)
            try:
                arrays, notes = self._read(step)
            except DamagedError as damage:
                warn(f"warning: {file}: is damaged ({damage}); using the one before it")
                continue
            self._newest = step
            history = [EpochMetrics(**metrics) for metrics in notes["history"]]
            sums = (notes.get("loss", []), notes["bce"], notes["kld"])
            return Progress(self._state(arrays, model), history, *sums, notes["seconds"])
        if self._workdir.checkpoint_steps() and most is None:
            raise InputError(
                f"--workdir {self._workdir}: none of its checkpoints can be read; restore a copy of one,"
                " or add --overwrite to start again"
            )
        return None

    def kept(self, progress: Progress, model: nn.Module | None = None) -> Progress:
        """A finished run with the state that `--keep` asks for: its own, or that of the best epoch, read back.

        Args:
          progress: After the last epoch.
          model: The module of the run; by default that of its options.

        Raises:
          InputError: The checkpoint of the best epoch is not there, or damaged.
          OSError: It cannot be read.
        """
        best = best_epoch(progress.history)
        if self._config.keep == "last" or best.epoch == len(progress.history):
            return progress
        step = best.epoch * self._epoch_steps
        try:
            arrays, _ = self._read(step)
        except (FileNotFoundError, DamagedError) as error:
            problem = "is not there" if isinstance(error, FileNotFoundError) else f"is damaged ({error})"
            raise InputError(
                f"--keep best: the checkpoint of epoch {best.epoch}, whose test loss is the lowest"
                f" ({best.test_loss:.2f}), {problem}: {self._workdir.checkpoint(step)}; use --keep last to export the"
                " last epoch, or add --overwrite to start again"
            ) from None
        return dataclasses.replace(progress, state=self._state(arrays, model))

    def _read(self, step: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """The arrays and notes of a checkpoint of this very run."""
        arrays, notes = _decode(self._workdir.checkpoint(step).read_bytes())
        self._workdir.require_same_recipe(notes["config"])
        if notes["checksum"] != self._checksum:
            raise InputError(
                f"--data {self._config.data}: holds other images than those of the run in {self._workdir};"
                " give it those (--image-size and --grey count), add --overwrite to replace it, or name another"
                " --workdir"
            )
        return arrays, notes

    def due_within_epoch(self) -> bool:
        """Whether a checkpoint is due in the middle of an epoch."""
        return self._config.checkpoint_every > 0 and self._due(ahead=0.0)

    def due_after_epoch(self, progress: Progress) -> bool:
        """Whether a checkpoint is due after an epoch, or will be before the next one ends: here it has a test loss."""
        last = progress.history[-1]
        to_keep = self._config.keep == "best" and best_epoch(progress.history).epoch == last.epoch
        return to_keep or progress.finished(self._config) or self._due(ahead=last.seconds)

    def _due(self, ahead: float) -> bool:
        return time.monotonic() - self._last + ahead >= self._config.checkpoint_every

    def save(self, progress: Progress) -> None:
        """Writes a checkpoint; keeps the two newest and the one with the lowest test loss, and deletes the others.

        Raises:
          NonFiniteLossError: The last step has made values that are not finite; nothing is written.
          OSError: It cannot be written; those before it are still whole.
        """
        progress.settle()
        step = int(progress.state.step)
        if step in (0, self._newest) or not self._workdir.writes:  # without a step, a run begins as well without one
            return
        arrays = {name: np.asarray(leaf) for name, leaf in jax.device_get(_leaves(progress.state)).items()}
        if not all(np.isfinite(array).all() for array in arrays.values()):
            raise NonFiniteLossError(
                f"epoch {len(progress.history) + bool(progress.bce)}: step {step:,} has made parameters that are not"
                " finite; no checkpoint of them is kept; try a lower --learning-rate or --beta"
            )
        notes = {
            "config": self._workdir.described,
            "checksum": self._checksum,
            "history": [dataclasses.asdict(metrics) for metrics in progress.history],
            "loss": [] if progress.state.sums_up else progress.loss,
            "bce": progress.bce,
            "kld": progress.kld,
            "seconds": progress.seconds,
        }
        file = self._workdir.checkpoint(step)
        try:
            self._workdir.require_lock()
            file.parent.mkdir(exist_ok=True)
            for later in self._workdir.checkpoint_steps():
                if self._newest is None or later > self._newest:  # damaged, as `newest` skipped it
                    self._workdir.checkpoint(later).unlink()
            with replacing(file) as part:
                part.write_bytes(_encode(arrays, notes))
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}; the checkpoints before it are kept", str(file)) from None
        self._newest = step
        self._last = time.monotonic()
        kept = self._kept(progress.history)
        for old in self._workdir.checkpoint_steps():
            if old not in kept:
                self._workdir.checkpoint(old).unlink()

    def _kept(self, history: list[EpochMetrics]) -> set[int]:
        found = self._workdir.checkpoint_steps()
        tested = {metrics.epoch * self._epoch_steps: metrics.test_loss for metrics in history}
        best = min(tested.keys() & set(found), key=lambda step: (tested[step], step), default=found[-1])
        return {*found[-NEWEST:], best}

    def _state(self, arrays: dict[str, np.ndarray], model: nn.Module | None) -> steps.TrainState:
        """The state of these arrays, whose names, types and shapes must be those of the run's own state."""
        blank = jax.eval_shape(lambda: steps.create_state(self._config, self._pixels, model, images=self._images))
        found, expected = (
            {name: f"{leaf.dtype} {list(leaf.shape)}" for name, leaf in leaves.items()}
            for leaves in (arrays, jax.eval_shape(_leaves, blank))
        )
        for name in sorted(found | expected):
            if found.get(name) != expected.get(name):
                raise InputError(
                    f"--workdir {self._workdir}: holds a run of another model: {name} is {found.get(name, 'missing')},"
                    f" expected {expected.get(name, 'none')}; give the model of that run to go on with it, add"
                    " --overwrite to replace it, or name another folder"
                )
        tree: Any = flax.traverse_util.unflatten_dict(jax.tree.map(jnp.asarray, arrays), sep=".")
        tree["key"] = jax.random.wrap_key_data(tree["key"])
        return cast(steps.TrainState, flax.serialization.from_state_dict(blank, tree))


def read_checkpoint(workdir: Path, which: Which) -> tuple[Path, dict[str, np.ndarray], dict[str, Any]]:
    """Reads a checkpoint as it stands on the disk, without the lock: the run may be training at the same time.

    Args:
      workdir: The folder of the run.
      which: The newest that is whole, or, among those at the end of an epoch, the one with the lowest test loss.

    Returns:
      The file, its arrays by name, and its notes.

    Raises:
      InputError: There is no such checkpoint.
      OSError: A file cannot be read, damaged or not.
    """
    run = Workdir(TrainConfig(workdir=workdir))
    found, lowest = None, math.inf
    for _ in range(ATTEMPTS):
        complete = True
        for step in reversed(run.checkpoint_steps()):
            file = run.checkpoint(step)
            try:
                arrays, notes = _decode(file.read_bytes())
            except FileNotFoundError:  # the run has written a newer one
                complete = False
                continue
            except DamagedError as damage:
                warn(f"warning: {file}: is damaged ({damage}); using another one")
                continue
            if which == "newest":
                return file, arrays, notes
            if not notes["bce"] and (loss := notes["history"][-1]["test_loss"]) <= lowest:
                found, lowest = (file, arrays, notes), loss
        if complete:
            break
    if found is None:
        where = " at the end of an epoch" if which == "best" else ""
        raise InputError(
            f"{workdir}: has no checkpoint{where} that can be read; train on (the same command goes on), or name"
            " another model"
        )
    return found


def _leaves(state: steps.TrainState) -> dict[str, Any]:
    """The leaves of a state by name: step, key, params.encoder.fc1.kernel, opt_state.mu.encoder.fc1.kernel, ..."""
    tree = flax.serialization.to_state_dict(state.replace(key=jax.random.key_data(state.key)))
    return flax.traverse_util.flatten_dict(tree, sep=".")


def _encode(arrays: dict[str, np.ndarray], notes: dict[str, Any]) -> bytes:
    text = json.dumps(notes)
    return safetensors.numpy.save(arrays, {"notes": text, "sha256": _digest(arrays, text)})


def _decode(content: bytes) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and notes of a checkpoint.

    Raises:
      DamagedError: They are not those that were written.
    """
    try:
        arrays = safetensors.numpy.load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        sound = header["sha256"] == _digest(arrays, header["notes"])
    except Exception as error:  # damage can break the reader anywhere
        raise DamagedError(reason(error)) from None
    if not sound:
        raise DamagedError("its checksum does not match")
    return arrays, json.loads(header["notes"])


def _digest(arrays: dict[str, np.ndarray], notes: str) -> str:
    """SHA-256 of the notes and of each array's name, type, shape and bytes."""
    digest = hashlib.sha256(notes.encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
