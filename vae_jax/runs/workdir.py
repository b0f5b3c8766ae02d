"""The folder of a run: the names in it, its lock, and whether it holds the run that the options describe."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import importlib.util
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from torch_ref.convert import require_weights_file
from vae_jax.config import SharedRecipe, SweepOptions, TrainConfig, option_name, to_json
from vae_jax.system.errors import InputError
from vae_jax.system.files import require_writable, sweep

CONFIG, METRICS, MODEL = "config.json", "metrics.jsonl", "model.pth"
PICTURES = ("reconstructions.png", "samples.png", "curves.png")
FILES = (CONFIG, METRICS, MODEL, *PICTURES)
CHECKPOINTS, EVENTS, LOCK = "checkpoints", "tensorboard", ".lock"
# In the folder of a model of a sweep: its weights, in place of model.pth, and what became of it.
SWEPT, OUTCOME = "vae.pth", "outcome.json"
PROCESS = ".process-"  # and its number: a file of each process while several train together
EVENT_FILES = "events.out.tfevents.*"
# Beside the options in a run's files: the SHA-256 of the file that `--init` names.
INIT_DIGEST = "init_digest"
# And the digest of the shapes of its parameters: `modules.shapes_digest`.
SHAPES = "parameter_shapes"
# Why an option belongs to the recipe, where that depends on another one.
WHY = {"epochs": " (--learning-rate-schedule sets each rate by the steps of the whole run)"}


class Workdir:
    """The folder of a run.

    Args:
      config: The options of the run.
      writes: Whether this process writes; of several that train together, only the first does.
    """

    def __init__(self, config: TrainConfig, writes: bool = True):
        self.path = config.workdir
        self.writes = writes
        self._config = config
        self._inode: int | None = None  # of the lock file, while we hold it

    def __str__(self) -> str:
        return str(self.path)

    def check(self) -> None:
        """Checks, without changing anything, that the run can be written here and replaces nothing.

        Raises:
          InputError: A path cannot be written, or the folder holds another run.
        """
        config = self._config
        require_tensorboard(config)
        inputs = [Path(config.data), *([config.init] if config.init else [])]
        require_writable("--export", config.export, *inputs)
        require_weights_file("--export", config.export)
        for name in FILES:  # they stand for the folder, which may not exist yet
            require_writable("--workdir", self.path / name, *inputs)
        for name in (EVENTS, CHECKPOINTS):
            if (self.path / name).exists() and not (self.path / name).is_dir():
                raise InputError(f"--workdir {self}: {name} in it is not a folder; name another folder")
        if not config.overwrite:
            self._check_run()
        export, workdir = config.export.resolve(), self.path.resolve()
        if export in (workdir, *workdir.parents) or uses(workdir, export):
            raise InputError(f"--export {config.export}: --workdir {self} uses that place; name another")

    def _check_run(self) -> None:
        """Checks that the run in the folder, if there is one, is the one that the options continue."""
        if self._former_checkpoints():
            raise InputError(
                f"--workdir {self}: holds checkpoints in the format of version 0.1 (folders); finish the run with that"
                f" version, start from its weights (--init {self.path / MODEL}) in another folder, or add --overwrite"
            )
        options = self._recorded()
        has_checkpoints = bool(self.checkpoint_steps())
        if options is not None and not (has_checkpoints and options.keys().isdisjoint(self._config.recipe)):
            self.require_same_recipe(options)
        if not has_checkpoints and (options is None or (self.path / MODEL).exists()):
            # A run that was stopped before its first checkpoint leaves neither: it starts again.
            events = (str(path.relative_to(self.path)) for path in (self.path / EVENTS).glob(EVENT_FILES))
            for name in (*FILES, *events):
                if (self.path / name).exists():
                    raise InputError(
                        f"--workdir {self}: holds a run already ({name});"
                        " add --overwrite to replace it or name another folder"
                    )

    @cached_property
    def described(self) -> dict[str, Any]:
        """The options of the run as its files have them: with a digest of the file that it begins from."""
        return to_json(self._config) | ({INIT_DIGEST: self.init_digest} if self._config.init else {})

    @cached_property
    def init_digest(self) -> str | None:
        """Of the file that `--init` names, or named when the run began, if it is not there any more."""
        if self._config.init is None:
            return None
        try:
            return hashlib.sha256(self._config.init.read_bytes()).hexdigest()
        except OSError:
            recorded = self._recorded() or {}
            return recorded.get(INIT_DIGEST) if recorded.get("init") == str(self._config.init) else None

    def _recorded(self) -> dict[str, Any] | None:
        """What config.json holds; None where it cannot be read, for the checkpoints have it too."""
        try:
            options = json.loads((self.path / CONFIG).read_bytes())
        except (OSError, ValueError, RecursionError):
            return None
        return options if isinstance(options, dict) else None

    def require_same_recipe(self, options: dict[str, Any]) -> None:
        """Checks that a run with these options, as config.json has them, makes the same model.

        Raises:
          InputError: It does not; the message names every option that differs, with both values.
        """
        recipe = self._config.recipe
        shared = {field.name for field in dataclasses.fields(SharedRecipe)}
        if not options.keys() >= shared:
            raise InputError(
                f"--workdir {self}: holds a run of another program or version;"
                " add --overwrite to replace it or name another folder"
            )
        # A run from before there was an option has its default.
        options = {name: value for name, value in to_json(TrainConfig()).items() if name not in shared} | options
        # Files are known by what they hold, not by their names: they may move. Images have a checksum.
        by_content = {"data", "init"} if self.init_digest and INIT_DIGEST in options else {"data"}
        changed = [
            f"--{option_name(name)} was {options[name]}, now is {value}{WHY.get(name, '')}"
            for name, value in recipe.items()
            if name not in by_content and options[name] != value
        ]
        if "init" in by_content and options[INIT_DIGEST] != self.init_digest:
            changed.append(f"--init was {options['init']}, now is {recipe['init']}, which holds other weights")
        if changed:
            raise InputError(
                f"--workdir {self}: holds a run with other options: {'; '.join(changed)}; give the old ones to go on"
                " with it, add --overwrite to replace it, or name another folder"
            )

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Makes the folder, and keeps every other run out of it within the block.

        Raises:
          InputError: Another process is in it.
        """
        if not self.writes:
            yield
            return
        import filelock

        self.path.resolve().mkdir(parents=True, exist_ok=True)  # resolved: a link may lead to a folder yet to be made
        try:
            with filelock.FileLock(self.path / LOCK, timeout=0):
                self._inode = self._lock_inode()
                for stale in self.path.glob(f"{PROCESS}[0-9]*"):
                    stale.unlink()
                yield
        except filelock.Timeout:
            raise InputError(
                f"--workdir {self}: another process is training in it; wait for its end, or name another folder"
            ) from None

    def require_lock(self) -> None:
        """Checks that the folder is still the one that we locked.

        Raises:
          FileNotFoundError: It has been deleted, and another run may have taken its place.
        """
        if self._lock_inode() != self._inode:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.path))

    def _lock_inode(self) -> int | None:
        try:
            return (self.path / LOCK).stat().st_ino  # we keep the file open, so no other file gets this number
        except OSError:
            return None

    def checkpoint_steps(self) -> list[int]:
        """The optimizer steps that the checkpoints in the folder are named after, lowest first."""
        files = (self.path / CHECKPOINTS).glob("*.safetensors")
        return sorted(int(path.stem) for path in files if re.fullmatch("0|[1-9][0-9]*", path.stem) and path.is_file())

    def checkpoint(self, step: int) -> Path:
        """The file of the checkpoint after so many optimizer steps."""
        return self.path / CHECKPOINTS / f"{step}.safetensors"

    @property
    def begins_anew(self) -> bool:
        """Whether the run will start with its first step; without the lock, another process may still change that."""
        return self._config.overwrite or not self.checkpoint_steps()

    def export_is_of_another_run(self) -> bool:
        """Whether the file that the run exports to exists, and is not a copy of its model.pth."""
        model, export = self.path / MODEL, self._config.export
        return export.exists() and not (model.exists() and model.read_bytes() == export.read_bytes())

    def unmark_finished(self) -> None:
        """Removes model.pth, which marks a run as finished and exported."""
        if self.writes:
            (self.path / MODEL).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Removes what killed processes have left half-written."""
        if not self.writes:
            return
        folder = self.path / CHECKPOINTS
        parts = [folder / part.name[1:].partition(".part-")[0] for part in folder.glob(".*.safetensors.part-*")]
        exports = [self._config.export]
        if recorded := self._recorded():  # the command that was killed may have named another file
            exports.append(Path(str(recorded.get("export", self._config.export))))
        for path in (*exports, *(self.path / name for name in FILES), *parts):
            sweep(path)

    def clear(self) -> None:
        """Removes an earlier run; the user's own files stay."""
        if not self.writes:
            return
        # The checkpoints first: they must never stand beside the options of another run.
        for step in self.checkpoint_steps():
            self.checkpoint(step).unlink()
        for folder in self._former_checkpoints():
            shutil.rmtree(folder)
        for name in (MODEL, *PICTURES):
            (self.path / name).unlink(missing_ok=True)
        for events in (self.path / EVENTS).glob(EVENT_FILES):
            events.unlink()

    def _former_checkpoints(self) -> list[Path]:
        """Checkpoints of version 0.1, which were folders."""
        return [sums.parent for sums in (self.path / CHECKPOINTS).glob("[0-9]*/SHA256SUMS")]


def require_tensorboard(options: TrainConfig | SweepOptions) -> None:
    """Checks that TensorBoard events can be written, if they are asked for.

    Raises:
      InputError: They cannot.
    """
    if options.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise InputError("--tensorboard: the package tensorboard is not installed; pip install tensorboard")


def model_file(workdir: Path) -> Path:
    """The weights of a run that has finished, or of a model of a sweep."""
    return workdir / (SWEPT if (workdir / OUTCOME).is_file() else MODEL)


def uses(workdir: Path, path: Path) -> bool:
    """Whether a path is that of a file that a run in this folder keeps, or would keep."""
    path, workdir = path.resolve(), workdir.resolve()
    swept = (SWEPT, OUTCOME) if (workdir / OUTCOME).is_file() else ()
    return bool({path, *path.parents} & {workdir / name for name in (*FILES, *swept, EVENTS, CHECKPOINTS, LOCK)})


def require_writable_beside(option: str, path: Path, model: Path, *inputs: Path) -> None:
    """Checks that a file can be written that is none of the inputs, and none of the run's if `model` is its folder.

    Raises:
      InputError: It cannot, and why.
    """
    require_writable(option, path, model, *inputs)
    if uses(model, path):
        raise InputError(f"{option} {path}: is a file of the run itself; name another file to write")
