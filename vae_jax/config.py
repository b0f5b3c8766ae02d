"""The options of a training run and their checks. Imports neither jax nor torch: a wrong one is answered at once."""

import dataclasses
import importlib.util
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal, get_args

# The largest finite float32: a bigger rate or weight would be infinite on the device.
FLOAT32_MAX = 3.4028235e38
# How grey pixels become binary ones.
Binarize = Literal["none", "dynamic", "threshold", "static"]
# Of matrix products, as jax.default_matmul_precision has it.
Precision = Literal["highest", "high", "default"]
# What indexes arrays on the device is an int32.
INT32_MAX = 2**31 - 1
# What a run leaves in its workdir.
RUN_FILES = ("config.json", "metrics.jsonl", "model.pth")
PICTURES = ("reconstructions.png", "samples.png", "curves.png")
EVENTS, EVENT_FILES = "tensorboard", "events.out.tfevents.*"
CHECKPOINTS = "checkpoints"
LOCK = ".lock"
# Of steps, as it names a checkpoint.
NUMBER = "0|[1-9][0-9]*"
# The options that decide which model a run makes, epoch by epoch: a run is continued with the same ones only.
MODEL_OPTIONS = (
    "data", "binarize", "batch_size", "learning_rate", "hidden_dim", "latent_dim", "beta", "seed", "matmul_precision",
    "init",
)  # fmt: skip


class InputError(ValueError):
    """Something the caller gave cannot be used: one line with the option or file, what was found, and what to try.

    The commands print the line and exit with code 2.
    """


class NonFiniteLossError(ArithmeticError):
    """Training has diverged: the loss is no longer a finite number. The commands exit with code 1."""


class DataError(InputError):
    """An image set cannot be had or cannot be used."""


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What the two training commands share."""

    data: str = "mnist"
    """Image set: mnist (bundled), tfds:NAME[/CONFIG][:VERSION], a folder of IDX files, or a FILE.npz."""
    data_dir: Path | None = None
    """Where TFDS keeps its sets; else TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    binarize: Binarize = "none"
    """Pixels: grey (none), or 0 and 1 drawn anew every epoch (dynamic), once (static), or cut at 0.5 (threshold)."""
    max_data_gb: float | None = None
    """Refuse an image set that takes more memory than this; half of the machine's by default."""
    epochs: int = 10
    """Passes over all training images."""
    batch_size: int = 128
    """Images per optimizer step; the last batch of an epoch may be smaller."""
    learning_rate: float = 1e-3
    """Adam's step size."""
    hidden_dim: int = 400
    """Width of the hidden layer of encoder and decoder."""
    latent_dim: int = 20
    """Number of latent dimensions."""
    beta: float = 1.0
    """Weight of the KL divergence in the loss; 1 is the evidence lower bound."""
    seed: int = 0
    """Seed of initialization, shuffling and noise; the same seed gives the same model."""
    workdir: Path = Path("runs/mnist")
    """Folder for config.json, metrics.jsonl, checkpoints, pictures and TensorBoard events."""
    export: Path = Path("vae.pth")
    """PyTorch state dict to write at the end."""
    pictures_every: int = 0
    """Draw the pictures of the run after every so many epochs; 0 draws them at its end only."""
    tensorboard: bool = False
    """Write TensorBoard event files to the folder tensorboard in workdir (needs the package tensorboard)."""
    overwrite: bool = False
    """Replace the run that workdir holds."""

    def check(self) -> None:
        """Looks at every option, and at the places to write to, without changing anything.

        Raises:
          InputError: An option is out of its range, a path cannot be written, or `workdir` holds another run.
        """
        for name in ("epochs", "batch_size", "hidden_dim", "latent_dim"):
            value = getattr(self, name)
            good = isinstance(value, int) and 1 <= value <= INT32_MAX
            self._require(name, good, f"a whole number from 1 to {INT32_MAX}")
        self._require("learning_rate", 0 < self.learning_rate <= FLOAT32_MAX, "a finite number above 0")
        self._require("beta", 0 <= self.beta <= FLOAT32_MAX, "a finite number of at least 0")
        self._require(
            "seed", isinstance(self.seed, int) and 0 <= self.seed < 2**32, f"a whole number from 0 to {2**32 - 1}"
        )
        self._require(
            "pictures_every",
            isinstance(self.pictures_every, int) and self.pictures_every >= 0,
            "a whole number of at least 0",
        )
        if self.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise InputError("--tensorboard: the package tensorboard is not installed; pip install tensorboard")
        self._require("binarize", self.binarize in get_args(Binarize), f"one of {', '.join(get_args(Binarize))}")
        self._require("max_data_gb", self.max_data_gb is None or self.max_data_gb > 0, "a number above 0")
        require_writable("--export", self.export, *self.inputs)
        # A run's own file stands for the folder: the folder itself may be missing still.
        for name in (*RUN_FILES, *PICTURES):
            require_writable("--workdir", self.workdir / name, *self.inputs)
        try:
            str(self.workdir.resolve()).encode()
        except UnicodeEncodeError:
            raise InputError(f"--workdir {self.workdir}: is no UTF-8, as Orbax wants it; name another folder") from None
        for name in (EVENTS, CHECKPOINTS):
            if (self.workdir / name).exists() and not (self.workdir / name).is_dir():
                raise InputError(f"--workdir {self.workdir}: {name} in it is not a folder; name another folder")
        if not self.overwrite:
            self.check_run()
        export, workdir = self.export.resolve(), self.workdir.resolve()
        taken = (*RUN_FILES, *PICTURES, EVENTS, CHECKPOINTS, LOCK)
        if export in (workdir, *workdir.parents) or {export, *export.parents} & {workdir / name for name in taken}:
            raise InputError(f"--export {self.export}: that place is taken by --workdir {self.workdir}; name another")

    @property
    def inputs(self) -> tuple[Path, ...]:
        """The files that the run reads, which it must not write."""
        return (Path(self.data),)

    @property
    def has_checkpoints(self) -> bool:
        """Whether `workdir` holds a run that can be continued."""
        return bool(checkpoint_steps(self.workdir / CHECKPOINTS))

    def check_run(self) -> None:
        """Checks that `workdir` holds no run, nor anything else that one would replace.

        Raises:
          InputError: It does.
        """
        events = (path.relative_to(self.workdir) for path in (self.workdir / EVENTS).glob(EVENT_FILES))
        for name in (*RUN_FILES, *PICTURES, *events, *([CHECKPOINTS] if self.has_checkpoints else [])):
            if (self.workdir / name).exists():
                raise InputError(
                    f"--workdir {self.workdir}: holds a run already ({name});"
                    " add --overwrite to replace it or name another folder"
                )

    def check_size(self, pixels: int) -> None:
        """Checks that the model for images of `pixels` pixels can fit into the machine's memory.

        Raises:
          InputError: It cannot.
        """
        parameters = self.hidden_dim * (2 * pixels + 3 * self.latent_dim)
        # Parameters, their gradients and Adam's two averages, as float32.
        size, most = 16 * parameters, memory()
        if size > most:
            raise InputError(
                f"--hidden-dim {self.hidden_dim} and --latent-dim {self.latent_dim}: training would take"
                f" {size / 1e9:,.1f} GB; expected at most {most / 1e9:,.1f} GB, the machine's memory; try smaller ones"
            )

    def draws_pictures(self, epoch: int) -> bool:
        """Whether the run draws its pictures after that epoch."""
        return epoch == self.epochs or (self.pictures_every > 0 and epoch % self.pictures_every == 0)

    def _require(self, name: str, good: bool, expected: str) -> None:
        if not good:
            default = type(self).__dataclass_fields__[name].default
            option = "--" + name.replace("_", "-")
            raise InputError(f"{option} {getattr(self, name)}: expected {expected}; the default is {default}")


@dataclasses.dataclass(frozen=True)
class TrainConfig(RunConfig):
    """Train the MNIST VAE (784-400-20-400-784) with JAX and export it as a PyTorch state dict.

    Given again, the same command goes on from the newest checkpoint in workdir.
    """

    checkpoint_every: float = 60.0
    """Seconds of training between two checkpoints; 0 writes one after every epoch."""
    matmul_precision: Precision = "highest"
    """Of matrix products on a GPU or TPU: float32 as in PyTorch (highest), or the device's fastest (default)."""
    init: Path | None = None
    """Start from the weights in this PyTorch file (.pth, .safetensors), and from its Adam state if it has one."""

    def check(self) -> None:
        """Looks at every option, and at the places to write to, without changing anything.

        Raises:
          InputError: An option is out of its range, a path cannot be written, or `workdir` holds a run that other
            options made.
        """
        self._require("checkpoint_every", 0 <= self.checkpoint_every <= FLOAT32_MAX, "a finite number of at least 0")
        precisions = get_args(Precision)
        self._require("matmul_precision", self.matmul_precision in precisions, f"one of {', '.join(precisions)}")
        super().check()

    @property
    def inputs(self) -> tuple[Path, ...]:
        """The files that the run reads, which it must not write."""
        return super().inputs if self.init is None else (*super().inputs, self.init)

    @property
    def command(self) -> str:
        """The command that goes on with the run."""
        python = "python" if shutil.which("python") == sys.executable else sys.executable
        words = [python, "-m", "vae_jax.train"]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                words += ["--" + field.name.replace("_", "-")] + ([] if value is True else [str(value)])
        return shlex.join(words)

    def check_run(self) -> None:
        """Checks that the run in `workdir`, if there is one, is one that these options continue.

        Raises:
          InputError: It is another, or nothing of it is left to go on from.
        """
        file = self.workdir / "config.json"
        try:
            options = json.loads(file.read_bytes())
        except (OSError, ValueError, RecursionError):
            options = None  # the checkpoints have them too
        if isinstance(options, dict) and not (self.has_checkpoints and options.keys().isdisjoint(MODEL_OPTIONS)):
            self.require_same_run(options)
        if not self.has_checkpoints and (not isinstance(options, dict) or (self.workdir / "model.pth").exists()):
            # No checkpoint is what a run leaves that was stopped before its first one: that one starts anew.
            super().check_run()

    def require_same_run(self, options: dict[str, Any]) -> None:
        """Checks that a run with these options makes the model that one with `options`, as config.json has them, makes.

        Raises:
          InputError: It makes another one; the message has every option at fault, with its old and its new value.
        """
        where = f"--workdir {self.workdir}: holds a run"
        if not set(options) >= {*MODEL_OPTIONS, "checkpoint_every"}:
            raise InputError(
                f"{where} of another program or version; add --overwrite to replace it or name another folder"
            )
        new = {name: getattr(self, name) for name in MODEL_OPTIONS}
        changed = [
            f"--{name.replace('_', '-')} was {options[name]}, now is {value}"
            for name, value in new.items()
            if options[name] != (str(value) if isinstance(value, Path) else value)
        ]
        if changed:
            raise InputError(
                f"{where} with other options: {'; '.join(changed)}; give the old ones to go on with it,"
                " add --overwrite to replace it, or name another folder"
            )


def checkpoint_steps(folder: Path) -> list[int]:
    """The numbers of steps that the checkpoints in a folder are named after, lowest first."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if re.fullmatch(NUMBER, path.name) and path.is_dir())


def reason(error: BaseException) -> str:
    """What a library's error says, as a short piece of a line."""
    return " ".join((str(error) or type(error).__name__).split())[:150]


def memory() -> int:
    """Bytes of memory that this process can use: the machine's, or less in a container."""
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(size, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no container, or one without a limit
        return size


def require_writable(option: str, path: Path, *inputs: Path) -> None:
    """Checks that a file can be created or replaced at `path`, leaving nothing behind, and is none of `inputs`.

    Raises:
      InputError: It cannot, and why.
    """
    try:
        # Through links, as writing would go.
        path = path.resolve()
        if path in [file.resolve() for file in inputs]:
            raise InputError(f"{option} {path}: is read by this very command; name another file to write")
        if path.exists() and not path.is_file():
            raise InputError(f"{option} {path}: is not a regular file; name a file to write")
        folder = next(parent for parent in path.parents if parent.exists())
        # Trying is the only sure test: permission bits mean nothing to root or on a read-only disk.
        tempfile.TemporaryFile(dir=folder).close()
        # Raises where the name is too long for the file system.
        path.exists()
    except (OSError, RuntimeError) as error:  # the latter for a loop of links, until Python 3.13
        why = getattr(error, "strerror", None) or error
        raise InputError(
            f"{option} {path}: cannot be written ({why}); name a path in a folder you may write to"
        ) from None
