"""Trains many models and compares them. `python -m vae_jax.sweep --help` lists the options.

The modules that need jax are imported by the functions, so that `--help` and wrong options are answered at once.
"""

from __future__ import annotations

import dataclasses
import math
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from tqdm import tqdm

from vae_jax.config import GIVEN, NOT_SWEPT, Recipe, SweepConfig, SweepOptions, TrainConfig, option_name
from vae_jax.data.dataset import Dataset, checked, load
from vae_jax.runs.summary import table
from vae_jax.runs.sweep_folder import BEST, Model, Outcome, SweepFolder, describe, key, values, varied
from vae_jax.runs.workdir import EVENTS, SWEPT, require_tensorboard
from vae_jax.system import command_line, signals
from vae_jax.system.console import STDERR, quiet, say, tolerate_closed_output
from vae_jax.system.errors import InputError, NonFiniteLossError
from vae_jax.system.memory import memory

if TYPE_CHECKING:
    import flax.linen as nn

    from vae_jax.core.steps import TrainState
    from vae_jax.runs.feed import Feed
    from vae_jax.runs.metrics import EpochMetrics
    from vae_jax.runs.progress import Progress

# On a GPU or TPU models are stacked, as many as fit into this part of its memory.
STACK_MEMORY = 0.5
# Bytes of memory that Python, JAX, PyTorch and the compiled programs take.
LIBRARIES = 0.7e9


def sweep(
    configs: Sequence[Recipe],
    options: SweepOptions | None = None,
    dataset: Dataset | None = None,
    model: nn.Module | None = None,
) -> tuple[TrainState | list[TrainState], list[list[EpochMetrics]]]:
    """Trains a model for each config, as `python -m vae_jax.sweep` does.

    Args:
      configs: The recipes. What a `TrainConfig` says about anything but the recipe is not looked at.
      options: Epochs, workdir and all else that the models share.
      dataset: Images to train on, in place of those that the recipes name.
      model: A Flax module with the methods `encode` and `decode`, in place of those that the recipes name.

    Returns:
      The trained states, stacked along a leading axis, in the order of the configs; where they do not share a program,
      a list of such stacks, in the order of their first models. And the averages of every epoch of every model.

    Raises:
      InputError: An option cannot be used, before anything is computed or written; or a model has diverged or its state
        is not kept (`keep="all"` keeps it), after all models are trained.
      OSError: A file cannot be written; whatever is there is whole, and the same call goes on.
      Interrupted: Ctrl-C or SIGTERM came while training; checkpoints have been written.
    """
    options = options or SweepOptions()
    options.check()
    names = [field.name for field in dataclasses.fields(Recipe)]
    recipes = [Recipe(**{name: getattr(config, name) for name in names}) for config in configs]
    if model is not None:
        with signals.defer_signals():
            from vae_jax.core.modules import recipe_of
        if named := next((recipe.model for recipe in recipes if recipe.model is not None), None):
            raise InputError(f"--model {named}: a model was given to sweep as well; expected one of them")
        recipes = [dataclasses.replace(recipe, **recipe_of(model)) for recipe in recipes]
    if dataset is not None:
        recipes = [dataclasses.replace(recipe, data=GIVEN) for recipe in recipes]
        dataset = checked(dataset, options.image_size, options.grey)
    work, models = run(recipes, options, "to go on: call sweep with the same arguments", dataset, model)
    stacks = list(work.states(models))
    return stacks[0] if len(stacks) == 1 else stacks, [model.history for model in models]


def command(config: SweepConfig) -> None:
    """Trains the models that the options describe; writes and prints how they compare.

    Raises:
      InputError: An option cannot be used; raised before anything is computed or written.
      OSError: A file cannot be written; whatever is there is whole, and the same command goes on.
      Interrupted: Ctrl-C or SIGTERM came while training; checkpoints have been written.
    """
    config.check()
    run(config.recipes(), config, config.advice)


def run(
    recipes: Sequence[Recipe],
    options: SweepOptions,
    advice: str,
    dataset: Dataset | None = None,
    module: nn.Module | None = None,
) -> tuple[Work, list[Model]]:
    """Trains a model of each recipe, unless the folder of the sweep has it already."""
    folder = SweepFolder(options, recipes[0].data if recipes else "")
    check(recipes, options, folder)
    with signals.defer_signals():  # half an import would break the process for good
        from vae_jax.core.mesh import fixed_threads
        from vae_jax.core.settings import fixed_settings, require_device

    with fixed_threads(recipes[0].shards):
        require_device()
    dataset = dataset or load(
        recipes[0].data, options.data_dir, options.max_data_gb, options.image_size, options.grey, stream="never"
    )
    checksum = dataset.checksum()
    with fixed_settings():
        work = Work(folder, options, dataset, checksum, module)
        work.check(recipes)
    with fixed_settings(), folder.lock():
        models = folder.open(recipes, checksum, work.shapes(recipes))
        with signals.stop_on_signal(advice) as stop:
            work.train(models, stop)
            stop.raise_if_requested()
        report(folder)
    return work, models


def check(recipes: Sequence[Recipe], options: SweepOptions, folder: SweepFolder) -> None:
    """Checks, without changing anything, that a sweep can be made of these recipes.

    Raises:
      InputError: It cannot.
    """
    if not recipes:
        raise InputError("an empty sweep: expected the recipe of one model or more")
    for name, found in values(recipes).items():
        if len(found) > 1 and name in NOT_SWEPT:
            raise InputError(
                f"--{option_name(name)} {' '.join(map(str, found))}: cannot be swept, as {NOT_SWEPT[name]};"
                " give one value, and each of the others its own --workdir"
            )
    seen: set[str] = set()
    for recipe in recipes:
        if key(recipe) in seen:
            which = describe(recipe, varied(recipes)) or "all options are the same"
            raise InputError(f"two models are the same: {which}; give each value once")
        seen.add(key(recipe))
        folder.config(recipe, folder.path).check()
    require_tensorboard(options)
    folder.check(recipes)


class Work:
    """The training of a sweep: workers take one job after another, each of one model or of a stack of them."""

    def __init__(
        self, folder: SweepFolder, options: SweepOptions, dataset: Dataset, checksum: int, module: nn.Module | None
    ):
        with signals.defer_signals():
            import jax
            import torch  # noqa: F401 - to export; its import takes a second or two

            from vae_jax.runs.trainer import Trainer

        self._folder, self._options, self._module = folder, options, module
        self._devices = jax.local_devices()
        self._halt = threading.Event()
        self._images: dict[str, int] = {}  # how many each model has been trained on
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()  # to print
        self._lock = threading.Lock()  # of the files that models share
        self._metrics_due = 0.0
        self._feeds: dict[Any, tuple[Any, Feed]] = {}  # of the program that each device has at present
        self._feed_lock = threading.Lock()
        self._trainer = Trainer(dataset, checksum, module, self._halt, self._images.__setitem__, self._end_epoch)
        self._images_each = options.epochs * len(dataset.train_images)

    def check(self, recipes: Sequence[Recipe]) -> None:
        """Checks that the models have room, and that the files of `--init` suit them.

        Raises:
          InputError: They do not.
        """
        from vae_jax.core.modules import require_vae

        if self._module is not None:
            require_vae(self._module, self._trainer.pixels, type(self._module).__name__)
        configs = [self._folder.config(recipe, self._folder.path) for recipe in recipes]
        self._bytes = [self._trainer.state_bytes(config) for config in configs]
        for config in {key(dataclasses.replace(config, seed=0, beta=1.0)): config for config in configs}.values():
            self._trainer.read_init(config)
        disk, free = self.disk, psutil.disk_usage(str(existing(self._folder.path))).free
        if disk > free:
            raise InputError(
                f"--workdir {self._folder}: {len(recipes):,} models would take {disk / 1e9:,.1f} GB of disk; expected"
                f" at most {free / 1e9:,.1f} GB, which are free; use --keep best or none, or fewer models"
            )
        if self.memory > memory():
            raise InputError(
                f"{self._at_once} models at once would take {self.memory / 1e9:,.1f} GB of memory; expected at most"
                f" {memory() / 1e9:,.1f} GB, the machine's; use a smaller --at-once, or smaller models"
            )

    def shapes(self, recipes: Sequence[Recipe]) -> dict[tuple[str | None, str], str]:
        """The digest of the parameters that each module of the user's own makes, by its name and options."""
        configs = [self._folder.config(recipe, self._folder.path) for recipe in recipes if recipe.model is not None]
        modules = {(config.model, config.model_options): config for config in configs}
        return {name: self._trainer.shapes(config) for name, config in modules.items()}

    @property
    def disk(self) -> float:
        """Bytes that the sweep takes on the disk at most: a state is parameters and Adam's two moments."""
        largest = sorted(self._bytes)[-self._at_once :]
        if self._options.keep == "all":
            # A checkpoint and the weights of each model; those that train may have two checkpoints more.
            return sum(self._bytes) * 4 / 3 + 2 * sum(largest)
        return 3 * sum(largest) + (max(largest) / 3 if self._options.keep == "best" else 0)

    @property
    def memory(self) -> float:
        """Bytes of memory that the sweep takes, about: the libraries, the images, and the models that train at once."""
        dataset = self._trainer.dataset
        images = dataset.train_images.nbytes + dataset.test_images.nbytes
        # The state, its gradients, a copy while a checkpoint is encoded.
        return LIBRARIES + 2 * images + 3 * sum(sorted(self._bytes)[-self._at_once :])

    @property
    def _stack(self) -> int:
        """How many models a device trains as one; on a CPU, whose cores one model fills, stacking makes it slower."""
        device = self._devices[0]
        if self._options.at_once:
            return self._options.at_once
        if device.platform == "cpu":
            return 1
        room = STACK_MEMORY * (device.memory_stats() or {}).get("bytes_limit", 8e9)
        share = math.ceil(len(self._bytes) / len(self._devices))
        # The state, its gradients, and as much again for the activations.
        return max(1, min(share, int(room / (3 * max(self._bytes)))))

    @property
    def _at_once(self) -> int:
        """How many models train at once."""
        return self._stack * len(self._devices)

    def train(self, models: list[Model], stop: signals.StopRequest) -> None:
        """Trains all models that have not come to their end.

        Raises:
          OSError: A file cannot be written.
        """
        todo = [model for model in models if model.outcome is None]
        if len(todo) < len(models):
            say(f"{self._folder}: {len(models) - len(todo)} of {len(models)} models are finished")
        programs: dict[Any, list[Model]] = {}
        for model in models:
            programs.setdefault(self._trainer.program(model.config), []).append(model)
        size = self._stack
        jobs = [
            (program, [model for model in group[start : start + size] if model.outcome is None])
            for program, group in programs.items()
            for start in range(0, len(group), size)
        ]
        self._jobs = iter([(program, stack) for program, stack in jobs if stack])
        if todo:
            how = f"stacked by {size}" if size > 1 else "one after another"
            how += f", on {len(self._devices)} devices" if len(self._devices) > 1 else ""
            count = len({program for program, stack in jobs if stack})
            say(
                f"{len(todo)} model{'s' * (len(todo) > 1)} to train, {count} program{'s' * (count > 1)}, {how};"
                f" up to {self.disk / 1e9:.2f} GB of disk, about {self.memory / 1e9:.1f} GB of memory"
            )
        begin, told = None, not todo
        bar = tqdm(total=len(todo) * self._images_each, unit=" images", unit_scale=True, leave=False, disable=None)
        with bar, ThreadPoolExecutor(len(self._devices)) as pool:
            running = {pool.submit(self._work, device) for device in self._devices}
            failed = None
            while running:
                done, running = wait(running, timeout=0.1)
                failed = failed or next((error for job in done if (error := job.exception())), None)
                if stop.requested or failed:
                    self._halt.set()
                images = sum(self._images.copy().values())
                with tolerate_closed_output(STDERR):
                    bar.update(images - bar.n)
                if begin is None and images:  # before, programs are compiled and checkpoints read
                    begin = time.monotonic(), images
                elif not told and begin and any(model.history for model in todo) and images > begin[1]:
                    told = True
                    rate = (images - begin[1]) / (time.monotonic() - begin[0])
                    seconds = (len(todo) * self._images_each - images) / rate
                    self._lines.put(
                        f"about {seconds / 60:.0f} minutes to go" if seconds > 90 else f"{seconds:.0f} s to go"
                    )
                while not self._lines.empty():
                    bar.clear()
                    say(self._lines.get())
        if failed:
            raise failed

    def _work(self, device: Any) -> None:
        """Does job after job on one device."""
        import jax

        from vae_jax.core.settings import fixed_settings

        with quiet(), jax.default_device(device):
            while not self._halt.is_set():
                with self._lock:
                    program, models = next(self._jobs, (None, []))
                if not models:
                    return
                with fixed_settings(models[0].config.matmul_precision):
                    self._train(models, self._feed(device, program, models[0].config))

    def _feed(self, device: Any, program: Any, config: TrainConfig) -> Feed:
        with self._feed_lock:
            if self._feeds.get(device, (None,))[0] != program:
                self._feeds[device] = program, self._trainer.feed(config)  # the former one goes with its last model
            return self._feeds[device][1]

    def _train(self, models: list[Model], feed: Feed) -> None:
        """Trains one model, or several as one, and records what becomes of them."""
        from vae_jax.runs.stack import train_stack
        from vae_jax.runs.trainer import HaltedError

        for model in models:
            self._folder.begin(model, self._trainer.dataset.image_shape, self._trainer.shapes(model.config))
        try:
            if len(models) == 1:
                trained = [(models[0], self._trainer.train(models[0], feed))]
            else:
                trained = train_stack(self._trainer, models, feed, self._give_up)
            for model, progress in trained:
                self._finish(model, progress, feed.for_seed(model.config.seed))
        except NonFiniteLossError as error:
            self._give_up(models[0], str(error))
        except HaltedError:
            pass

    def _give_up(self, model: Model, reason: str) -> None:
        """Records a model that has diverged."""
        outcome = Outcome(model.history, diverged=reason.partition(";")[0])
        with self._lock:
            self._folder.end(model, outcome)
            self._folder.write_results()
        self._lines.put(f"{model.name}: diverged, {outcome.diverged}")

    def _finish(self, model: Model, progress: Progress, feed: Feed) -> None:
        """Measures a trained model, writes its weights, and records it."""
        import jax

        from torch_ref import convert
        from vae_jax.core.steps import TEST_NOISE
        from vae_jax.evaluate import measure
        from vae_jax.runs.export import state_dict_of

        state, keep = progress.state, self._options.keep
        noise = jax.random.fold_in(jax.random.key(model.config.seed), TEST_NOISE)
        samples = self._options.importance_samples
        found = measure(state.model, state.params, feed.images[1], noise, importance_samples=samples)
        outcome = Outcome(progress.history, "", found.active_units, found.log_px, found.log_px_stderr)
        if self._options.tensorboard:
            from vae_jax.runs.events import Events

            place = self._folder.path / EVENTS / model.name
            events = Events(place, model.config, progress.history[0].pixels, 1)
            for metrics in progress.history:
                events.add(metrics)
        with self._lock:
            if keep != "none":
                weights = state_dict_of(state.model, state.params, math.prod(feed.image_shape))
                if keep == "all":
                    convert.save(weights, model.config.workdir / SWEPT)
                best = self._folder.best()
                if best is None or model.negative_elbo < best.negative_elbo:
                    convert.save(weights, self._folder.path / BEST)
            self._folder.end(model, outcome)
            self._folder.write_results()
        last = progress.history[-1]
        self._lines.put(
            f"{model.name}: test loss {last.test_loss:.2f} = bce {last.test_bce:.2f} + kld {last.test_kld:.2f}"
        )

    def states(self, models: list[Model]) -> Iterator[TrainState]:
        """The states of trained models, stacked; one stack for each program.

        Raises:
          InputError: The state of a model is not there.
        """
        import jax
        import jax.numpy as jnp

        programs: dict[Any, list[TrainState]] = {}
        for model in models:
            if not model.finished or self._options.keep != "all":
                why = "it has diverged" if not model.finished else f"keep={self._options.keep!r} does not keep it"
                raise InputError(f"{model.name}: its state is not there, as {why}; its figures are in results.csv")
            state = self._trainer.begin(model)[0].state
            programs.setdefault(self._trainer.program(model.config), []).append(state)
        for states in programs.values():
            yield jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)

    def _end_epoch(self) -> None:
        with self._lock:
            if time.monotonic() > self._metrics_due:  # short epochs of many models would write most of the time
                self._folder.write_metrics()
                self._metrics_due = time.monotonic() + 1


def report(folder: SweepFolder) -> None:
    """Writes the tables and pictures of a finished sweep, and prints how its models compare."""
    with signals.defer_signals():
        from vae_jax.pictures import plots
        from vae_jax.pictures.sweep import draw

    folder.write_results()
    folder.write_metrics()
    say(*table(folder.models))
    for name, figure in draw(folder.models).items():
        plots.save(plots.pixels(figure), folder.path / name)
    best = folder.best()
    if best is not None and (folder.path / BEST).exists():
        say(f"saved {folder.path / BEST}, the model {best.name}")


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(folder for folder in (path.resolve(), *path.resolve().parents) if folder.exists())


def main() -> None:
    command_line.run(command, SweepConfig, "python -m vae_jax.sweep")


if __name__ == "__main__":
    main()
