"""The folder of a sweep: the models it holds, what became of each, and the tables over all of them."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vae_jax.config import Recipe, SweepOptions, TrainConfig, option_name, to_json
from vae_jax.runs.metrics import EpochMetrics
from vae_jax.runs.workdir import CHECKPOINTS, CONFIG, METRICS, OUTCOME, SHAPES, SWEPT, Workdir
from vae_jax.system.errors import InputError
from vae_jax.system.files import replacing, require_writable, sweep

SWEEP, RESULTS, BEST, MODELS = "sweep.json", "results.csv", "best.pth", "models"
PICTURES = ("options.png", "rate-distortion.png", "curves.png")
FILES = (SWEEP, RESULTS, METRICS, BEST, *PICTURES)
# Options beside the recipes that decide what a sweep leaves behind.
DECISIVE = ("epochs", "keep", "importance_samples")
NAME_LENGTH = 150


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a model."""

    history: list[EpochMetrics]
    diverged: str = ""  # why it was given up, if it was
    active_units: int | None = None
    log_px: float | None = None
    log_px_stderr: float | None = None


@dataclasses.dataclass
class Model:
    """A model of a sweep; its workdir is a folder of its own."""

    name: str
    config: TrainConfig
    outcome: Outcome | None = None
    history: list[EpochMetrics] = dataclasses.field(default_factory=list)  # of the epochs that are done

    @property
    def finished(self) -> bool:
        """Whether it has trained to its end, and all losses are finite."""
        return self.outcome is not None and not self.outcome.diverged

    @property
    def negative_elbo(self) -> float:
        """bce + kld of the test set after the last epoch: unlike the loss, comparable between values of beta."""
        return self.history[-1].test_bce + self.history[-1].test_kld


class SweepFolder:
    """The folder of a sweep.

    sweep.json holds the options that are the same for all models, and the recipe of each model by its name. A model
    that has come to its end has the file outcome.json; all tables are made of these.

    Args:
      options: The options of the sweep.
      data: The name of its image set.
    """

    def __init__(self, options: SweepOptions, data: str):
        self.path = options.workdir
        self._options = options
        self._data = data
        self._workdir = Workdir(TrainConfig(workdir=options.workdir))
        self.models: list[Model] = []  # all that the folder holds, in the order in which they were asked for
        self.lock = self._workdir.lock

    def __str__(self) -> str:
        return str(self.path)

    def check(self, recipes: Sequence[Recipe]) -> None:
        """Checks, without changing anything, that the sweep can be written here and goes on with what is there.

        Raises:
          InputError: A path cannot be written, or the folder holds something else.
        """
        inputs = [Path(self._data), *(recipe.init for recipe in recipes if recipe.init)]
        for name in FILES:
            require_writable("--workdir", self.path / name, *inputs)
        if (self.path / MODELS).exists() and not (self.path / MODELS).is_dir():
            raise InputError(f"--workdir {self}: {MODELS} in it is not a folder; name another folder")
        if self._options.overwrite:
            return
        if (self.path / SWEEP).exists():
            self._require_same(recipes)
            return
        for name in (CONFIG, CHECKPOINTS, *FILES, MODELS):
            if (self.path / name).exists():
                raise InputError(
                    f"--workdir {self}: holds something else than a sweep already ({name}); add --overwrite to write"
                    " into it or name another folder"
                )

    def _read(self) -> tuple[dict[str, Any], dict[str, Recipe]]:
        """The shared options of the sweep in the folder, and the recipe of each model.

        Raises:
          InputError: They cannot be read.
        """
        try:
            found = json.loads((self.path / SWEEP).read_text())
            recipes = {name: Recipe(**recipe) for name, recipe in found.pop("models").items()}
            assert found.keys() >= {*DECISIVE, "checksum"}
        except (OSError, ValueError, TypeError, AttributeError, KeyError, AssertionError, RecursionError):
            raise InputError(
                f"--workdir {self}: its {SWEEP} cannot be read, or is of another version; add --overwrite to start"
                " again or name another folder"
            ) from None
        return found, recipes

    def _require_same(self, recipes: Sequence[Recipe]) -> None:
        """Checks that the sweep in the folder has the same options, but for those that vary in it or now.

        Raises:
          InputError: It does not; the message names every option that differs, with both values.
        """
        options, known = self._read()
        now = to_json(self._options)
        changed = [(name, options[name], now[name]) for name in DECISIVE if options[name] != now[name]]
        old_values, new_values = values(list(known.values())), values(recipes)
        for name in old_values:
            old, new = old_values[name], new_values[name]
            if name != "data" and len(old) == len(new) == 1 and old != new:
                changed.append((name, old[0], new[0]))
        if changed and known:
            told = "; ".join(f"--{option_name(name)} was {old}, now is {new}" for name, old, new in changed)
            raise InputError(
                f"--workdir {self}: holds a sweep with other options, which it does not vary: {told}; give the old ones"
                " to go on with it, add --overwrite to replace it, or name another folder"
            )

    def open(
        self, recipes: Sequence[Recipe], checksum: int, shapes: Mapping[tuple[str | None, str], str]
    ) -> list[Model]:
        """Takes up the models of these recipes, known ones and new ones; the folder must be locked.

        Args:
          recipes: Those of the models to train.
          checksum: That of the images.
          shapes: The digest of the parameters that each module of the user's own makes, by its name and options.

        Raises:
          InputError: The folder holds a sweep on other images, or finished models of a module that has changed since.
        """
        known: dict[str, Recipe] = {}
        if self._options.overwrite:
            self._clear()
        elif (self.path / SWEEP).exists():
            options, known = self._read()
            if known and options["checksum"] != checksum:
                raise InputError(
                    f"--data {self._data}: holds other images than those of the sweep in {self}; give it those"
                    " (--image-size and --grey count), add --overwrite to replace it, or name another --workdir"
                )
            for name, recipe in known.items():
                self._require_same_shapes(name, recipe, shapes.get((recipe.model, recipe.model_options)))
        names = {key(recipe): name for name, recipe in known.items()}
        varying = varied([*known.values(), *recipes])
        for recipe in recipes:
            if key(recipe) not in names:
                names[key(recipe)] = name = _unused_name(recipe, varying, known)
                self._clear_model(name)  # what an unknown model of this name has left must not be taken for this one
                known[name] = recipe
        shared = {name: value for name, value in to_json(self._options).items() if name in DECISIVE}
        described = {name: to_json(recipe) for name, recipe in known.items()}
        with replacing(self.path / SWEEP) as part:
            part.write_text(json.dumps(shared | {"checksum": checksum, "models": described}, indent=1) + "\n")
        for name in FILES:
            sweep(self.path / name)
        self.models = [self._model(name, recipe) for name, recipe in known.items()]
        by_name = {model.name: model for model in self.models}
        return [by_name[names[key(recipe)]] for recipe in recipes]

    def _require_same_shapes(self, name: str, recipe: Recipe, shapes: str | None) -> None:
        """Checks that a finished model has the parameters that its module makes now, if `shapes` is known."""
        folder = self.path / MODELS / name
        try:
            found = json.loads((folder / CONFIG).read_text()).get(SHAPES) if (folder / OUTCOME).exists() else None
        except (OSError, ValueError, AttributeError):
            return
        if None not in (found, shapes) and found != shapes:
            raise InputError(
                f"--workdir {self}: its model {name} has parameters of other shapes than {recipe.model} makes now;"
                " name another folder, or add --overwrite to train all models again"
            )

    def _model(self, name: str, recipe: Recipe) -> Model:
        config = self.config(recipe, self.path / MODELS / name)
        for file in (CONFIG, OUTCOME, SWEPT):
            sweep(config.workdir / file)
        try:
            found = json.loads((config.workdir / OUTCOME).read_text())
            outcome = Outcome(**found | {"history": [EpochMetrics(**metrics) for metrics in found["history"]]})
        except FileNotFoundError:
            return Model(name, config)
        except (ValueError, TypeError, KeyError):
            raise InputError(
                f"{config.workdir / OUTCOME}: cannot be read; delete it to train this model again"
            ) from None
        return Model(name, config, outcome, outcome.history)

    def config(self, recipe: Recipe, workdir: Path) -> TrainConfig:
        """The options of the run that makes a model, in the folder `workdir`."""
        own = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(Recipe)}
        names = {field.name for field in dataclasses.fields(TrainConfig)} - {"keep", "overwrite"}
        shared: dict[str, Any] = {
            field.name: getattr(self._options, field.name)
            for field in dataclasses.fields(SweepOptions)
            if field.name in names
        }
        place: dict[str, Any] = {"workdir": workdir, "export": workdir / SWEPT}
        return TrainConfig(**(shared | own | place))

    def begin(self, model: Model, image_shape: tuple[int, ...], shapes: str) -> None:
        """Makes the folder of a model, with its options: from now on it is a run that other commands can look at."""
        model.config.workdir.mkdir(parents=True, exist_ok=True)
        described = to_json(model.config) | {"image_shape": image_shape, SHAPES: shapes}
        with replacing(model.config.workdir / CONFIG) as part:
            part.write_text(json.dumps(described, indent=2) + "\n")

    def end(self, model: Model, outcome: Outcome) -> None:
        """Records what became of a model, after everything else about it has been written."""
        self._workdir.require_lock()
        with replacing(model.config.workdir / OUTCOME) as part:
            part.write_text(json.dumps(dataclasses.asdict(outcome), indent=1) + "\n")
        model.outcome, model.history = outcome, outcome.history
        kept = 1 if self._options.keep == "all" and model.finished else 0
        run = Workdir(model.config)
        for step in run.checkpoint_steps()[: -kept or None]:
            run.checkpoint(step).unlink()

    def best(self) -> Model | None:
        """The finished model of the lowest bce + kld on the test set, the first of several."""
        return min((model for model in self.models if model.finished), key=lambda m: m.negative_elbo, default=None)

    def write_results(self) -> None:
        """Writes results.csv, a row for each model that has come to its end."""
        rows = [row(model) for model in self.models if model.outcome is not None]
        with replacing(self.path / RESULTS) as part, part.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys() if rows else ["name"])
            writer.writeheader()
            writer.writerows(rows)

    def write_metrics(self) -> None:
        """Writes metrics.jsonl, every epoch of every model."""
        lines = (
            json.dumps({"model": model.name} | dataclasses.asdict(metrics)) + "\n"
            for model in self.models
            for metrics in model.history
        )
        with replacing(self.path / METRICS) as part:
            part.write_text("".join(lines))

    def _clear(self) -> None:
        """Removes an earlier sweep; the user's own files stay."""
        try:
            known = self._read()[1] if (self.path / SWEEP).exists() else {}
        except InputError:
            known = {}
        for name in known:
            self._clear_model(name)
        for name in FILES:
            if name != SWEEP:  # is replaced; without it, the same command without --overwrite would not go on
                (self.path / name).unlink(missing_ok=True)

    def _clear_model(self, name: str) -> None:
        """Removes what the folder of a model holds of it."""
        folder = self.path / MODELS / name
        for file in (OUTCOME, SWEPT):
            (folder / file).unlink(missing_ok=True)
        Workdir(TrainConfig(workdir=folder)).clear()


def key(recipe: Recipe) -> str:
    """What tells a recipe from others; images are known by their checksum, not by the name of their place."""
    return json.dumps({name: value for name, value in to_json(recipe).items() if name != "data"})


def values(recipes: Sequence[Recipe]) -> dict[str, list[Any]]:
    """The values of each option in these recipes, each once, in their order."""
    found = [to_json(recipe) for recipe in recipes]
    names = [field.name for field in dataclasses.fields(Recipe)]
    return {name: list({json.dumps(recipe[name]): recipe[name] for recipe in found}.values()) for name in names}


def varied(recipes: Sequence[Recipe]) -> list[str]:
    """The options in which these recipes differ."""
    return [name for name, found in values(recipes).items() if len(found) > 1 and name != "data"]


def short(value: Any) -> str:
    """A value of an option, in few characters: 4 for 4.0, and a dash for none."""
    if isinstance(value, list):
        return " ".join(map(short, value)) or "-"
    return "-" if value is None else str(value).removesuffix(".0")


def describe(recipe: Recipe, names: Sequence[str]) -> str:
    """The values of some options, as a user types them."""
    options = to_json(recipe)
    return " ".join(f"--{option_name(name)} {short(options[name])}" for name in names)


def _unused_name(recipe: Recipe, names: Sequence[str], taken: dict[str, Recipe]) -> str:
    """A name for the folder of a model, such as beta=0.5_seed=3."""
    options = to_json(recipe)
    text = "_".join(f"{option_name(name)}={short(options[name])}" for name in names) or "model"
    text = re.sub(r"[^\w.=+-]+", "-", text, flags=re.ASCII)[:NAME_LENGTH]
    return next(
        name for number in range(len(taken) + 1) if (name := text + f"_{number + 1}" * (number > 0)) not in taken
    )


def row(model: Model) -> dict[str, Any]:
    """A model as a row of results.csv; what there is not is empty."""
    outcome = model.outcome
    assert outcome is not None
    last = dataclasses.asdict(outcome.history[-1]) if model.finished else {}
    losses = [f"{part}_{name}" for part in ("train", "test") for name in ("loss", "bce", "kld")]
    options = to_json(model.config)
    recipe = {field.name: options[field.name] for field in dataclasses.fields(Recipe)}
    return {
        "name": model.name,
        "status": f"diverged: {outcome.diverged}" if outcome.diverged else "finished",
        **recipe,
        "epochs": len(outcome.history),
        **{name: last.get(name) for name in losses},
        "active_units": outcome.active_units,
        "log_px": outcome.log_px,
        "log_px_stderr": outcome.log_px_stderr,
        "pixels": last.get("pixels"),
        "seconds": round(sum(metrics.seconds for metrics in outcome.history), 3),
    }
