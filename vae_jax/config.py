"""Every option of every command, with its bounds. Imports neither jax nor torch, and reads no file.

`Recipe` holds the options that decide which model a run makes; what other classes add says where and how.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import operator
import os
import shlex
import shutil
import sys
import types
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import tyro

from vae_jax.system.errors import InputError
from vae_jax.system.given import json_object, require_class_name

# The largest finite float32: a larger rate or weight would be infinite on the device.
FLOAT32_MAX = 3.4028235e38
# Arrays on the device are indexed by int32.
INT32_MAX = 2**31 - 1

# How grey pixels become black and white.
Binarize = Literal["none", "dynamic", "threshold", "static"]
# Precision of matrix products, as jax.default_matmul_precision names it.
Precision = Literal["highest", "high", "default"]
# Names of the layers in a state dict: `torch_ref.layouts.LAYOUTS`.
Layout = Literal["documented", "fc-mu", "pytorch-examples"]
# How the learning rate changes over a run.
LearningRateSchedule = Literal["constant", "cosine", "exponential", "warmup-cosine", "burda2015"]
# In which order an epoch takes the training images.
ImageOrder = Literal["shuffled", "stored"]
# What a hidden layer applies to its sums.
Activation = Literal["relu", "tanh", "elu", "silu"]
# How weights are drawn at the start: as PyTorch does, or Glorot and Bengio.
Initialization = Literal["torch", "glorot"]
# What training maximizes: the evidence lower bound, or its importance-weighted form, by one of two gradients.
Objective = Literal["elbo", "iwae", "dreg"]
# Which epoch's model a run exports.
Keep = Literal["last", "best"]
# Whether images are read while the model trains on them: never, those too large for memory, or always.
Stream = Literal["never", "auto", "always"]
LatentPath = Literal["spherical", "linear"]
Split = Literal["test", "train"]
# Which models of a sweep stay on the disk: that of the lowest loss, all of them, or none.
SweepKeep = Literal["best", "all", "none"]
# Which checkpoint of a run stands for its model.
Which = Literal["newest", "best"]
# The two dimensions that a scatter of latents shows.
Axes = Literal["kld", "pca"]

# Stands for the name of a data set that the caller of `vae_jax.fit` has given.
GIVEN = "given to fit"

# What options without bounds expect, in words.
PLAIN: dict[Any, str] = {str: "text", Path: "a path", bool: "True or False"}


class Bounds(NamedTuple):
    """The values that an option accepts."""

    least: int | float
    most: int | float
    exclusive: bool = False  # whether `least` itself is refused
    hint: str = ""

    def accept(self, value: Any, whole: bool) -> bool:
        """Whether the value is a number within the bounds, and a whole one if it has to be."""
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            return False
        return (self.least < value if self.exclusive else self.least <= value) and value <= self.most

    def describe(self, whole: bool) -> str:
        """What the option expects, in words."""
        if not whole and self.most in (FLOAT32_MAX, math.inf):
            finite = "finite " if self.most == FLOAT32_MAX else ""
            return f"a {finite}number {'above' if self.exclusive else 'of at least'} {self.least:g}"
        number = "a whole number" if whole else "a number"
        if self.most == math.inf:
            return f"{number} of at least {self.least}"
        return f"{number} from {self.least} to {self.most}"


def bounded(
    default: Any, least: int | float, most: int | float = math.inf, *, exclusive: bool = False, hint: str = ""
) -> Any:
    """A dataclass field with bounds, which `Options.check` reads."""
    return dataclasses.field(default=default, metadata={"bounds": Bounds(least, most, exclusive, hint)})


@dataclasses.dataclass(frozen=True)
class Options:
    """What every options class shares: values are converted to the declared types, and checked against their bounds."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _convert(getattr(self, field.name), hints[field.name]))

    def check(self) -> None:
        """Checks the type and the bounds of every option.

        Raises:
          InputError: One is out of its bounds.
        """
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            bounds: Bounds | None = field.metadata.get("bounds")
            kinds = _alternatives(hints[field.name])
            words = [word for kind in kinds[1:] if get_origin(kind) is Literal for word in get_args(kind)]
            if (value is None and type(None) in kinds) or value in words:
                continue
            if get_origin(kinds[0]) is Literal:
                good, expected = value in get_args(kinds[0]), f"one of {', '.join(get_args(kinds[0]))}"
            elif get_origin(kinds[0]) is tuple and bounds is not None:
                count = "" if get_args(kinds[0])[-1] is Ellipsis else len(get_args(kinds[0]))
                good = isinstance(value, tuple) and count in ("", len(value))
                good = good and all(bounds.accept(v, True) for v in value or ())
                expected = f"{count} whole numbers from {bounds.least} to {bounds.most}".lstrip()
            elif bounds is not None:
                whole = kinds[0] is int
                good, expected = bounds.accept(value, whole), bounds.describe(whole)
            elif kinds[0] in PLAIN:
                good, expected = isinstance(value, kinds[0]), PLAIN[kinds[0]]
            else:
                continue
            if not good:
                default = "" if field.default in (None, dataclasses.MISSING) else f"; the default is {field.default}"
                hint = f"; {bounds.hint}" if bounds and bounds.hint else default
                given = " ".join(map(str, value)) if isinstance(value, tuple) else value
                raise InputError(f"--{option_name(field.name)} {given}: expected {expected}{hint}")


def option_name(field: str) -> str:
    """The option of a field, without its dashes."""
    return field.replace("_", "-")


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type itself."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _convert(value: Any, hint: Any) -> Any:
    """The value as the type that the option declares, where that is certain: text as a path, NumPy's numbers, ..."""
    kind = _alternatives(hint)[0]
    if value is None or isinstance(value, bool):
        return value
    if kind is Path and isinstance(value, str | os.PathLike):
        return Path(os.path.expanduser(value))  # noqa: PTH111 (Path.expanduser raises for an unknown user)
    if kind is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if kind is bool and str(getattr(value, "dtype", "")) == "bool":  # NumPy's
        return bool(value)
    if kind is int and hasattr(value, "__index__"):
        return operator.index(value)
    if kind is float and hasattr(value, "__float__"):
        return float(value)
    if get_origin(kind) is tuple and hasattr(value, "tolist"):  # NumPy's and JAX's arrays
        value = value.tolist()
    if get_origin(kind) is tuple and isinstance(value, list | tuple):
        return tuple(operator.index(part) if hasattr(part, "__index__") else part for part in value)
    return value


@dataclasses.dataclass(frozen=True)
class SharedRecipe(Options):
    """The options that decide a model, those that JAX and PyTorch share."""

    data: str = "mnist"
    """Image set: mnist (bundled), tfds:NAME[/CONFIG][:VERSION], a folder (images, or IDX, CSV, .mat, Parquet files), or
    a FILE (.npz, .npy, .mat, .csv, .csv.gz, .parquet)."""
    binarize: Binarize = "none"
    """Pixels: grey (none), or 0 and 1 drawn anew every epoch (dynamic), once (static), or cut at 0.5 (threshold)."""
    batch_size: int = bounded(128, 1, INT32_MAX)
    """Images per optimizer step; the last batch of an epoch may be smaller."""
    learning_rate: float = bounded(1e-3, 0, FLOAT32_MAX, exclusive=True)
    """Adam's step size."""
    hidden_dim: int = bounded(400, 1, INT32_MAX)
    """Width of the hidden layer of encoder and decoder."""
    latent_dim: int = bounded(20, 1, INT32_MAX)
    """Number of latent dimensions."""
    beta: float = bounded(1.0, 0, FLOAT32_MAX)
    """Weight of the KL divergence in the loss; 1 gives the evidence lower bound."""
    seed: int = bounded(0, 0, 2**32 - 1)
    """Seed of initialization, shuffling and noise; the same seed gives the same model."""


@dataclasses.dataclass(frozen=True)
class Recipe(SharedRecipe):
    """All options that decide which model a run makes: a run is continued with the same recipe only."""

    shards: int = bounded(1, 1, INT32_MAX)
    """Equal parts of each batch, for several devices; the model depends on this number, not on that of the devices."""
    image_order: ImageOrder = "shuffled"
    """Order of the training images: drawn anew for every epoch (shuffled), or as they are in the set (stored)."""
    learning_rate_schedule: LearningRateSchedule = "constant"
    """The rate over the run: falls to 0 (cosine) or to 1/100 (exponential); warmup-cosine first rises for 5 percent;
    burda2015 divides it by 10^(1/7) after 1, 4, 13, 40, 121, 364 and 1093 epochs."""
    adam_b1: float = bounded(0.9, 0, 0.999999)
    """Adam's decay of the mean of the gradients."""
    adam_eps: float = bounded(1e-8, 0, FLOAT32_MAX, exclusive=True)
    """Adam's epsilon, which keeps steps finite where gradients are small."""
    hidden_dims: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT ...")] = bounded(
        (), 1, INT32_MAX, hint="widths such as 200 200"
    )
    """Widths of several hidden layers, in place of --hidden-dim; the decoder has them in reverse."""
    activation: Activation = "relu"
    """What a hidden layer applies to its sums."""
    initialization: Initialization = "torch"
    """How weights are drawn: as torch.nn.Linear does, or Glorot-uniform with biases of 0."""
    model: Annotated[str | None, tyro.conf.arg(metavar="PACKAGE.MODULE:CLASS")] = None
    """A Flax module of your own, in place of this program's: it has the methods encode and decode."""
    model_options: Annotated[str, tyro.conf.arg(metavar="JSON")] = "{}"
    """The arguments of that module; pixels is given to it where it takes it."""
    objective: Objective = "elbo"
    """Maximize the evidence lower bound (elbo), or the importance-weighted one (iwae; dreg: less noisy gradients)."""
    training_samples: int = bounded(1, 1, 10_000)
    """Draws of z for each image in training, K."""
    kl_warmup: int = bounded(0, 0, INT32_MAX)
    """Epochs over which the weight of the KL divergence rises from 0 to --beta."""
    matmul_precision: Precision = "highest"
    """Precision of matrix products on a GPU or TPU: float32 as in PyTorch (highest), or the fastest (default)."""
    init: Path | None = None
    """Start from the weights in this PyTorch file (.pth, .safetensors), and from its Adam state if it has one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        with contextlib.suppress(ValueError, RecursionError):  # `check` refuses what is no JSON
            given: Any = self.model_options  # a dict, too, in Python
            options = given if isinstance(given, dict) else json.loads(given)
            object.__setattr__(self, "model_options", json.dumps(options, sort_keys=True))  # comparable


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions(Options):
    """Where image sets are found, and how large they may be."""

    data_dir: Path | None = None
    """Where TFDS keeps its sets; else TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    max_data_gb: float | None = bounded(None, 0, exclusive=True)
    """The most memory that an image set may take, in gigabytes; half of the machine's by default."""
    image_size: Annotated[tuple[int, int] | None, tyro.conf.arg(metavar="H W")] = bounded(
        None, 1, 4096, hint="height and width in pixels, such as 28 28"
    )
    """Resize all images to this height and width."""
    grey: bool = False
    """Make one channel of colour images, their brightness."""


@dataclasses.dataclass(frozen=True)
class TrainConfig(DataOptions, Recipe):
    """Train the MNIST VAE (784-400-20-400-784) with JAX and export it as a PyTorch state dict.

    The same command, given again, goes on from the newest checkpoint in workdir.
    """

    epochs: int = bounded(10, 1, INT32_MAX)
    """Passes over all training images."""
    workdir: Path = Path("runs/mnist")
    """Folder for config.json, metrics.jsonl, checkpoints, pictures and TensorBoard events."""
    export: Path = Path("vae.pth")
    """PyTorch state dict to write at the end."""
    checkpoint_every: float = bounded(60.0, 0, FLOAT32_MAX)
    """Seconds of training between two checkpoints; 0 writes one after every epoch."""
    patience: int = bounded(0, 0, INT32_MAX)
    """Stop after so many epochs in a row without a lower test loss; 0 never stops early."""
    keep: Keep = "last"
    """Export the model of the last epoch, or of that with the lowest test loss (best)."""
    pictures_every: int = bounded(0, 0)
    """Draw the pictures of the run after every so many epochs; 0 draws them only at the end."""
    stream: Stream = "auto"
    """Read the images of an uncompressed .npy or .npz while training: those beyond --max-data-gb (auto), or always."""
    devices: Annotated[int | Literal["all"] | None, tyro.conf.arg(metavar="INT|all")] = bounded(None, 1, INT32_MAX)
    """Devices of all processes together to use; by default the most that divide --shards."""
    coordinator: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT")] = None
    """Address of process 0, where several processes train together; Slurm, Open MPI and others tell it themselves."""
    processes: Annotated[int | None, tyro.conf.arg(metavar="INT")] = bounded(None, 1, INT32_MAX)
    """How many processes train together."""
    process: Annotated[int | None, tyro.conf.arg(metavar="INT")] = bounded(None, 0, INT32_MAX)
    """The number of this process, from 0."""
    initialization_timeout: int = bounded(60, 1, INT32_MAX)
    """Seconds to wait for the other processes at the start."""
    heartbeat: float = bounded(30.0, 1, FLOAT32_MAX)
    """Seconds of silence after which another process counts as gone."""
    tensorboard: bool = False
    """Write TensorBoard event files to the folder tensorboard in workdir (needs the package tensorboard)."""
    overwrite: bool = False
    """Replace the run in workdir."""

    def check(self) -> None:
        super().check()
        self._check_model()
        self._check_objective()
        if self.batch_size % self.shards:
            raise InputError(
                f"--shards {self.shards}: expected a divisor of --batch-size {self.batch_size}; all parts are equal"
            )
        given = (self.coordinator, self.processes, self.process)
        if given != (None, None, None) and None in given:
            raise InputError("--coordinator, --processes and --process: expected all three, or none of them")
        port = (self.coordinator or "HOST:1").rpartition(":")
        if not (port[0] and port[2].isdecimal() and 0 < int(port[2]) < 2**16):
            raise InputError(f"--coordinator {self.coordinator}: expected HOST:PORT, such as localhost:12345")
        if self.process is not None and self.processes is not None and self.process >= self.processes:
            raise InputError(f"--process {self.process}: expected a number from 0 to {self.processes - 1}")

    def _check_model(self) -> None:
        if json_object("--model-options", self.model_options) and self.model is None:
            raise InputError("--model-options: are those of --model, which is missing; name a module")
        if self.model is not None:
            require_class_name(f"--model {self.model}", self.model)
        sizes = ("hidden_dim", "latent_dim", "hidden_dims", "activation", "initialization")
        fields = {field.name: field for field in dataclasses.fields(self)}
        for name in sizes if self.model is not None else sizes[:1] if self.hidden_dims else ():
            if getattr(self, name) != fields[name].default:
                other = (
                    "--model, which has its own sizes; give them in --model-options" if self.model else "--hidden-dims"
                )
                raise InputError(f"--{option_name(name)} {getattr(self, name)}: does not go with {other}")

    def _check_objective(self) -> None:
        if self.objective != "elbo" and (self.beta != 1 or self.kl_warmup):
            option = f"--beta {self.beta}" if self.beta != 1 else f"--kl-warmup {self.kl_warmup}"
            raise InputError(
                f"--objective {self.objective}: bounds log p(x), which {option} does not; expected --beta 1 and"
                " --kl-warmup 0, or --objective elbo"
            )

    @property
    def recipe(self) -> dict[str, Any]:
        """The options that decide the model, as JSON has them."""
        names = [field.name for field in dataclasses.fields(Recipe)]
        if self.learning_rate_schedule != "constant":  # every rate depends on where the run ends
            names.append("epochs")
        return {name: value for name, value in to_json(self).items() if name in names}

    @property
    def command(self) -> str:
        """The command that goes on with the run."""
        return shlex.join(self.command_words)

    @property
    def command_words(self) -> list[str]:
        """The same as a list."""
        return _command_words("vae_jax.train", self)

    @property
    def advice(self) -> str:
        """What an interrupted run tells its user; never to overwrite what it has done."""
        return f"to go on: {dataclasses.replace(self, overwrite=False).command}"


def _command_words(module: str, options: Options) -> list[str]:
    """The command line that gives these options to a module, as a list."""
    python = "python" if shutil.which("python") == sys.executable else sys.executable
    words = [python, "-m", module]
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if value != field.default:
            values = value if isinstance(value, tuple) else [] if value is True else [value]
            words += [f"--{option_name(field.name)}", *map(str, values)]
    return words


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepOptions(DataOptions):
    """Where and how a sweep trains its models: everything but their recipes."""

    epochs: int = bounded(10, 1, INT32_MAX)
    """Passes of each model over all training images."""
    workdir: Path = Path("runs/sweep")
    """Folder for results.csv, metrics.jsonl, pictures, best.pth and, for each model, models/NAME."""
    keep: SweepKeep = "all"
    """Weights to keep: those of the best model (best.pth), of all (models/NAME/vae.pth too), or none."""
    importance_samples: int = bounded(0, 0, INT32_MAX, hint="a usual choice is 1000")
    """Samples per test image, K, to estimate log p(x) of each model; 0 leaves it out."""
    at_once: Annotated[int | None, tyro.conf.arg(metavar="INT")] = bounded(None, 1, INT32_MAX)
    """Models to train at once, stacked in one program; by default what is fastest on this device and fits into it."""
    checkpoint_every: float = bounded(60.0, 0, FLOAT32_MAX)
    """Seconds of training between two checkpoints of a model; 0 writes one after every epoch."""
    tensorboard: bool = False
    """Write TensorBoard event files, with hyperparameters, to the folder tensorboard in workdir."""
    overwrite: bool = False
    """Replace the sweep in workdir."""


def _grid() -> Any:
    """A dataclass with the options of `Recipe`, each of which takes several values."""
    hints = get_type_hints(Recipe, include_extras=True)
    fields: list[Any] = []
    for field in dataclasses.fields(Recipe):
        default = field.default_factory() if callable(field.default_factory) else field.default
        if takes_one_value(field.name):
            fields.append((field.name, hints[field.name], default))
        else:
            fields.append((field.name, tuple[hints[field.name], ...], (default,)))
    return dataclasses.make_dataclass("Grid", fields, bases=(Recipe,), frozen=True)  # the base has the help texts


def takes_one_value(name: str) -> bool:
    """Whether an option of the recipe takes a single value on the command line of a sweep: it is a list itself."""
    kinds = _alternatives(get_type_hints(Recipe)[name])
    return any((get_origin(kind) or kind) in (tuple, list, dict) for kind in kinds)


Grid: Any = _grid()
# The most models of a grid; far fewer fill a disk.
MOST_MODELS = 100_000
# Why an option must be the same for all models of a sweep.
NOT_SWEPT = {
    "data": "losses on different images cannot be compared",
    "binarize": "losses on different pixels cannot be compared",
    "shards": "the threads of this process depend on it",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepConfig(SweepOptions, Grid):
    """Train a model for every combination of the values given, and compare them.

    The same command, given again, goes on where it stopped; with more values it trains only what is new.
    """

    zip: bool = False
    """Pair the values up, first with first, second with second, instead of combining all with all."""
    config: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """JSON lines, the options of a model each; the options on the command line count for all lines."""

    def __post_init__(self) -> None:
        Options.__post_init__(self)  # what `Recipe` adds is for single values

    def recipes(self) -> list[Recipe]:
        """The recipe of each model.

        Raises:
          InputError: The grid is empty or far too large, `--zip` finds values that do not pair up, or `--config` cannot
            be used.
        """
        values: dict[str, tuple] = {}
        for field in dataclasses.fields(Recipe):
            value = getattr(self, field.name)
            values[field.name] = (value,) if takes_one_value(field.name) else value
            if not values[field.name]:
                raise InputError(f"--{option_name(field.name)}: expected one value or several")
        several = {name: len(found) for name, found in values.items() if len(found) > 1}
        if self.zip and len(set(several.values())) > 1:
            found = ", ".join(f"--{option_name(name)} has {count}" for name, count in several.items())
            raise InputError(f"--zip: {found} values; expected as many of each, or one")
        lines: list[dict[str, Any]] = [{}] if self.config is None else _read_lines(self.config)
        count = len(lines) * (max(several.values(), default=1) if self.zip else math.prod(several.values()))
        if count > MOST_MODELS:
            raise InputError(f"a grid of {count:,} models: expected at most {MOST_MODELS:,}; give fewer values")
        if self.zip:
            length = max(several.values(), default=1)
            rows = zip(*(found * (1 if name in several else length) for name, found in values.items()), strict=True)
        else:
            rows = itertools.product(*values.values())
        combinations = [dict(zip(values, row, strict=True)) for row in rows]
        for name in {name for line in lines for name in line}:
            if values[name] != (getattr(Recipe(), name),):
                raise InputError(f"--{option_name(name)}: is in {self.config} too; give it in one place")
        return [Recipe(**(combination | line)) for line in lines for combination in combinations]

    @property
    def advice(self) -> str:
        """What an interrupted sweep tells its user; never to overwrite what it has done."""
        words = _command_words("vae_jax.sweep", dataclasses.replace(self, overwrite=False))
        return f"to go on: {shlex.join(words)}"


def _read_lines(file: Path) -> list[dict[str, Any]]:
    """The options of a recipe on each line of a file.

    Raises:
      InputError: It cannot be read, or a line is not a JSON object of options.
    """
    try:
        lines = file.read_text().splitlines()
    except (OSError, ValueError) as error:
        raise InputError(
            f"--config {file}: cannot be read ({getattr(error, 'strerror', None) or error}); name a file of JSON lines"
        ) from None
    hints = get_type_hints(Recipe)
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"--config {file}, line {number}"
        options = {name.replace("-", "_"): value for name, value in json_object(f"{where}:", line).items()}
        for name, value in options.items():
            if name not in hints:
                raise InputError(f"{where}: {name!r:.50} is no option of a model; expected {', '.join(hints)}")
            text = _alternatives(hints[name])[0] in (str, Path) and name != "model_options"
            if text and not isinstance(value, str | None):
                raise InputError(f"{where}: --{option_name(name)} {value!r:.50}: expected text")
        try:
            Recipe(**options).check()
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        found.append(options)
    if not found:
        raise InputError(f"--config {file}: is empty; expected the options of a model on each line")
    return found


@dataclasses.dataclass(frozen=True)
class TorchTrainConfig(DataOptions, SharedRecipe):
    """Train the documented MNIST VAE with PyTorch: the reference for vae_jax.train."""

    epochs: int = bounded(10, 1, INT32_MAX)
    """Passes over all training images."""
    export: Path = Path("vae-torch.pth")
    """State dict to write at the end."""


WhichOption = Annotated[Which | None, tyro.conf.arg(metavar="|".join(get_args(Which)))]


@dataclasses.dataclass(frozen=True)
class ModelOptions(DataOptions):
    """A trained model, and the images to show it."""

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE.pth|WORKDIR")]
    """Weights file in any known layout (.pth, .safetensors), or the workdir of a run."""
    _: dataclasses.KW_ONLY
    data: Annotated[str | None, tyro.conf.arg(metavar="STR")] = None
    """Image set; by default that of the run, else `mnist`."""
    binarize: Annotated[Binarize | None, tyro.conf.arg(metavar="|".join(get_args(Binarize)))] = None
    """How grey pixels are made black or white; by default as in the run, else `none`."""
    checkpoint: WhichOption = None
    """Checkpoint of the run: the newest, or that of the lowest test loss; by default its model.pth, else the newest."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ModelOptions):
    """Measure a model: loss, BCE, KLD, active units, and the importance-weighted estimate of log p(x)."""

    split: Split = "test"
    """Part of the image set to look at."""
    importance_samples: int = bounded(0, 0, INT32_MAX, hint="a usual choice is 1000")
    """Samples per image, K, to estimate log p(x) (Burda et al. 2015, equation 8); 0 leaves it out."""
    images: Annotated[int | None, tyro.conf.arg(metavar="INT")] = bounded(
        None, 2, INT32_MAX, hint="a standard error needs two"
    )
    """Look at the first so many images only."""
    # A million logits of 784 pixels take 3 GB.
    batch_size: int = bounded(4096, 1, 10**6)
    """Images times samples at once; bounds the memory, and changes results by rounding only."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="OUT")] = None
    """File for the figures, as one JSON object."""
    seed: Annotated[int | None, tyro.conf.arg(metavar="INT")] = bounded(None, 0, 2**32 - 1)
    """Seed of the noise and of random binarization; by default that of the run, else 0."""


@dataclasses.dataclass(frozen=True)
class EncodeConfig(ModelOptions):
    """Write the latents of an image set: mu, logvar, label and number of every image."""

    out: Annotated[Path, tyro.conf.arg(metavar="LATENTS.npz|.csv|.parquet")]
    """File to write; its suffix decides the format."""
    _: dataclasses.KW_ONLY
    split: Literal["test", "train", "both"] = "test"
    """Part of the image set to encode; `both` adds a column that names the part."""
    batch_size: int = bounded(4096, 1, 10**6)
    """Images at once; bounds the memory, and changes results by rounding only."""


Numbers = Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT ...")]


@dataclasses.dataclass(frozen=True)
class GenerateConfig(ModelOptions):
    """Draw what a trained model makes."""

    out: Annotated[Path, tyro.conf.arg(metavar="PICTURE.png|X.npz")]
    """Picture to write, or the arrays of it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GridConfig(GenerateConfig):
    """Draw a grid of images."""

    draw: bool = False
    """Show Bernoulli draws of the pixels instead of their means."""
    seed: int = bounded(0, 0, 2**32 - 1)
    """Seed of what the picture draws: latent points, the choice of test images, pixels (--draw)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample(GridConfig):
    """Samples from the prior."""

    count: int = bounded(64, 1, 10_000)
    """How many."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reconstruct(GridConfig):
    """Test images above their reconstructions, decoded from the posterior means."""

    count: int = bounded(10, 1, 100)
    """How many images to draw from the test set."""
    numbers: Numbers = ()
    """Numbers of the test images, instead of drawing them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interpolate(GridConfig):
    """From test image to test image, through the posterior means."""

    count: int = bounded(5, 1, 100)
    """How many pairs to draw from the test set, one a row."""
    numbers: Numbers = ()
    """Numbers of the test images, two a row, instead of drawing them."""
    steps: int = bounded(10, 2, 100)
    """Images a row."""
    path: LatentPath = "spherical"
    """Along a great circle, where samples of a Gaussian lie, or along a straight line."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traverse(GridConfig):
    """A test image with one latent dimension changed at a time, that of the largest KLD first."""

    number: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Number of the test image to start from, instead of drawing it."""
    dimensions: Annotated[int | None, tyro.conf.arg(metavar="INT")] = bounded(None, 1, 1000)
    """Only so many dimensions; all by default."""
    steps: int = bounded(11, 2, 100)
    """Images a row."""
    span: float = bounded(3.0, 0, 100)
    """From -span to span, in standard deviations of the prior."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifold(GridConfig):
    """The images over a latent space of two dimensions (Kingma and Welling, figure 4)."""

    side: int = bounded(20, 2, 100)
    """Images along each side."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decode(GridConfig):
    """The images at latent points from a file, such as `encode` writes."""

    latents: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="LATENTS.npz|.npy|.csv|.parquet")]
    """Points to decode: the array z, or else mu, of an .npz; an .npy; the columns z0, ... or mu0, ... of a table."""
    count: int = bounded(64, 1, 10_000)
    """A picture shows the first so many; an .npz gets them all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Latents(GenerateConfig):
    """The posterior means of all test images in two dimensions, coloured by label."""

    axes: Axes = "kld"
    """The two dimensions of the largest KLD, or the first two principal components."""


@dataclasses.dataclass(frozen=True)
class ExploreConfig(ModelOptions):
    """Write a web page that runs the model: walk through its latent space, draw, and see what it makes of it."""

    out: Annotated[Path, tyro.conf.arg(metavar="PAGE.html")]
    """File to write: one page that needs no network and no server."""
    _: dataclasses.KW_ONLY
    images: int = bounded(500, 1, 10_000)
    """Test images in the page, equally many of each label where there are labels."""
    half: bool = False
    """Store the weights as float16: half the size, and three digits instead of seven."""


@dataclasses.dataclass(frozen=True)
class ExportConfig(Options):
    """Write the weights of a run, finished or not, as a PyTorch state dict."""

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="WORKDIR")]
    """Workdir of the run."""
    out: Annotated[Path, tyro.conf.arg(metavar="OUT.pth")]
    """File to write, .pth or .safetensors."""
    _: dataclasses.KW_ONLY
    checkpoint: WhichOption = None
    """The newest checkpoint, or that of the lowest test loss; by default the run's model.pth, else the newest."""
    layout: Layout = "documented"
    """Key names to write."""


@dataclasses.dataclass(frozen=True)
class ConvertConfig(Options):
    """Rewrite a weights file of this model in another key layout."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IN.pth")]
    """File to read, .pth or .safetensors; its layout is recognised."""
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT.pth")]
    """File to write, .pth or .safetensors."""
    layout: Layout = "documented"
    """Key names to write."""


ClassName = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODULE:CLASS")]
JsonObject = Annotated[str, tyro.conf.arg(metavar="JSON")]


@dataclasses.dataclass(frozen=True)
class ParityConfig(DataOptions):
    """Compare a Flax VAE with a PyTorch one: outputs, losses, gradients, Adam steps; and find where they part.

    Exits with 0 if they are equal up to rounding, with 1 if they are not.
    """

    flax: ClassName
    """Flax module with the methods encode(images) and decode(z), such as vae_jax:VAE."""
    torch: ClassName
    """PyTorch module, such as torch_ref.model:VAE."""
    _: dataclasses.KW_ONLY
    weights: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """State dict of the PyTorch module (.pth, .safetensors) for both; by default the weights that it begins with."""
    flax_options: JsonObject = "{}"
    """Arguments of the Flax class, such as '{"latent_dim": 20}'."""
    torch_options: JsonObject = "{}"
    """Arguments of the PyTorch class."""
    names: JsonObject = "{}"
    """Layers that have another name in PyTorch, such as '{"encoder.Dense_0": "encoder.fc1"}'."""
    data: str = "mnist"
    """Image set, as for train; its first test images are used."""
    images: int = bounded(32, 1, INT32_MAX)
    """How many images."""
    image_shape: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT ...")] = ()
    """Shape that PyTorch's encoder takes an image in, such as 1 28 28; by default all pixels in a row."""
    steps: int = bounded(5, 0, INT32_MAX)
    """Adam steps to compare."""


def to_json(options: Options) -> dict[str, Any]:
    """The options as JSON has them: paths as text, tuples as lists."""

    def plain(value: Any) -> Any:
        return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value

    return {name: plain(value) for name, value in dataclasses.asdict(options).items()}
