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
from typing import Any, cast

import flax.linen as nn
import flax.serialization
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from vae_jax.config import TrainConfig, to_json
from vae_jax.core import steps
from vae_jax.data.dataset import Dataset
from vae_jax.runs.metrics import EpochMetrics
from vae_jax.runs.progress import Progress
from vae_jax.runs.workdir import Workdir
from vae_jax.system.console import warn
from vae_jax.system.errors import InputError, NonFiniteLossError, reason
from vae_jax.system.files import replacing

# Checkpoints that are kept, beside the one with the lowest test loss.
NEWEST = 2


class DamagedError(ValueError):
    """A checkpoint is not as it was written."""


class Checkpoints:
    """The checkpoints of a run, in the folder `checkpoints` of its workdir, each named after its optimizer steps.

    Args:
      config: The options of the run.
      workdir: Its folder, locked.
      dataset: Its images.
    """

    def __init__(self, config: TrainConfig, workdir: Workdir, dataset: Dataset):
        self._config = config
        self._workdir = workdir
        self._checksum = dataset.checksum()
        self._epoch_steps = math.ceil(len(dataset.train_images) / config.batch_size)
        self._pixels = math.prod(dataset.image_shape)
        self._newest: int | None = None  # of those known to be whole
        self._last = time.monotonic()

    def newest(self, model: nn.Module | None = None) -> Progress | None:
        """Reads the newest checkpoint that is whole; damaged ones are reported and skipped.

        Args:
          model: The module of the run; by default the documented one.

        Returns:
          The progress, or None if there is no checkpoint.

        Raises:
          InputError: All checkpoints are damaged, or they belong to a run with other options or images.
          OSError: A file cannot be read, damaged or not.
        """
        for step in reversed(self._workdir.checkpoint_steps()):
            file = self._workdir.checkpoint(step)
            try:
                arrays, notes = _decode(file.read_bytes())
            except DamagedError as damage:
                warn(f"warning: {file}: is damaged ({damage}); using the one before it")
                continue
            self._workdir.require_same_recipe(notes["config"])
            if notes["checksum"] != self._checksum:
                raise InputError(
                    f"--data {self._config.data}: holds other images than those of the run in {self._workdir};"
                    " give it those (--image-size and --grey count), add --overwrite to replace it, or name another"
                    " --workdir"
                )
            self._newest = step
            history = [EpochMetrics(**metrics) for metrics in notes["history"]]
            return Progress(self._state(arrays, model), history, notes["bce"], notes["kld"], notes["seconds"])
        if self._workdir.checkpoint_steps():
            raise InputError(
                f"--workdir {self._workdir}: none of its checkpoints can be read; restore a copy of one,"
                " or add --overwrite to start again"
            )
        return None

    def due_within_epoch(self) -> bool:
        """Whether a checkpoint is due in the middle of an epoch."""
        return self._config.checkpoint_every > 0 and self._due(ahead=0.0)

    def due_after_epoch(self, progress: Progress) -> bool:
        """Whether a checkpoint is due after an epoch, or will be before the next one ends: here it has a test loss."""
        last = progress.history[-1]
        return last.epoch == self._config.epochs or self._due(ahead=last.seconds)

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
        if step in (0, self._newest):  # without a step, the run begins as well without a checkpoint
            return
        arrays = {name: np.asarray(leaf) for name, leaf in jax.device_get(_leaves(progress.state)).items()}
        if not all(np.isfinite(array).all() for array in arrays.values()):
            raise NonFiniteLossError(
                f"epoch {len(progress.history) + bool(progress.bce)}: step {step:,} has made parameters that are not"
                " finite; no checkpoint of them is kept; try a lower --learning-rate or --beta"
            )
        notes = {
            "config": to_json(self._config),
            "checksum": self._checksum,
            "history": [dataclasses.asdict(metrics) for metrics in progress.history],
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
        best = min(tested.keys() & set(found), key=lambda step: tested[step], default=found[-1])
        return {*found[-NEWEST:], best}

    def _state(self, arrays: dict[str, np.ndarray], model: nn.Module | None) -> steps.TrainState:
        """The state of these arrays, whose names, types and shapes must be those of the run's own state."""
        blank = jax.eval_shape(lambda: steps.create_state(self._config, self._pixels, model))
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
