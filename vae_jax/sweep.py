"""Trains many models and compares them. `python -m vae_jax.sweep --help` lists the options.

The modules that need jax are imported by the functions, so that `--help` and wrong options are answered at once.
"""

from __future__ import annotations

import importlib.util
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from vae_jax.config import NOT_SWEPT, Recipe, SweepConfig, SweepOptions, TrainConfig, option_name
from vae_jax.data.dataset import Dataset, load
from vae_jax.runs.summary import table
from vae_jax.runs.sweep_folder import BEST, WEIGHTS, Model, Outcome, SweepFolder, describe, key, values, varied
from vae_jax.system import command_line, signals
from vae_jax.system.console import STDERR, quiet, say, tolerate_closed_output
from vae_jax.system.errors import InputError, NonFiniteLossError

if TYPE_CHECKING:
    import flax.linen as nn

    from vae_jax.runs.feed import Feed
    from vae_jax.runs.progress import Progress


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
        from vae_jax.core.mesh import fix_threads
        from vae_jax.core.settings import fixed_settings, require_device

    fix_threads(recipes[0].shards)
    require_device()
    dataset = dataset or load(
        recipes[0].data, options.data_dir, options.max_data_gb, options.image_size, options.grey, stream="never"
    )
    checksum = dataset.checksum()
    with fixed_settings(), folder.lock():
        models = folder.open(recipes, checksum)
        work = Work(folder, options, dataset, checksum, module)
        with signals.stop_on_signal(advice) as stop:
            work.train(models, stop)
            stop.raise_if_requested()
        report(folder, models)
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
    if options.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise InputError("--tensorboard: the package tensorboard is not installed; pip install tensorboard")
    folder.check(recipes)


class Work:
    """The training of a sweep: workers take one job after another, each of one model or of a stack of them."""

    def __init__(
        self, folder: SweepFolder, options: SweepOptions, dataset: Dataset, checksum: int, module: nn.Module | None
    ):
        with signals.defer_signals():
            import torch  # noqa: F401 - to export; its import takes a second or two

            from vae_jax.runs.trainer import Trainer

        self._folder, self._options, self._module = folder, options, module
        self._halt = threading.Event()
        self._images: dict[str, int] = {}  # how many each model has been trained on
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()  # to print
        self._lock = threading.Lock()  # of the files that models share
        self._feeds: dict[Any, Feed] = {}
        self._feed_lock = threading.Lock()
        self._trainer = Trainer(dataset, checksum, module, self._halt, self._images.__setitem__, self._end_epoch)
        self._images_each = options.epochs * len(dataset.train_images)

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
        size = self._options.at_once or 1
        jobs = [
            (program, [model for model in group[start : start + size] if model.outcome is None])
            for program, group in programs.items()
            for start in range(0, len(group), size)
        ]
        self._jobs = iter([(program, stack) for program, stack in jobs if stack])
        workers = 1 if self._options.at_once else int(os.environ.get("WORKERS", "2"))
        say(f"{len(todo)} models, {len(programs)} programs")
        bar = tqdm(total=len(todo) * self._images_each, unit=" images", unit_scale=True, leave=False, disable=None)
        with bar, ThreadPoolExecutor(workers) as pool:
            running = {pool.submit(self._work) for _ in range(workers)}
            failed = None
            while running:
                done, running = wait(running, timeout=0.1)
                failed = failed or next((error for job in done if (error := job.exception())), None)
                if stop.requested or failed:
                    self._halt.set()
                with tolerate_closed_output(STDERR):
                    bar.update(sum(self._images.copy().values()) - bar.n)
                while not self._lines.empty():
                    bar.clear()
                    say(self._lines.get())
        if failed:
            raise failed

    def _work(self) -> None:
        from vae_jax.core.settings import fixed_settings

        with quiet():
            while not self._halt.is_set():
                with self._lock:
                    program, models = next(self._jobs, (None, []))
                if not models:
                    return
                with fixed_settings(models[0].config.matmul_precision):
                    self._train(models, self._feed(program, models[0].config))

    def _feed(self, program: Any, config: TrainConfig) -> Feed:
        with self._feed_lock:
            if program not in self._feeds:
                self._feeds = {program: self._trainer.feed(config)}  # the former one goes with its last model
            return self._feeds[program]

    def _train(self, models: list[Model], feed: Feed) -> None:
        """Trains one model, or several as one, and records what becomes of them."""
        from vae_jax.runs.stack import train_stack
        from vae_jax.runs.trainer import HaltedError

        for model in models:
            self._folder.begin(model)
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
        from vae_jax.core.model import VAE
        from vae_jax.core.steps import TEST_NOISE
        from vae_jax.evaluate import measure

        state, keep = progress.state, self._options.keep
        noise = jax.random.fold_in(jax.random.key(model.config.seed), TEST_NOISE)
        samples = self._options.importance_samples
        found = measure(state.model, state.params, feed.images[1], noise, importance_samples=samples)
        outcome = Outcome(progress.history, "", found.active_units, found.log_px, found.log_px_stderr)
        with self._lock:
            if keep != "none" and isinstance(state.model, VAE):
                weights = convert.to_state_dict(jax.device_get(state.params))
                if keep == "all":
                    convert.save(weights, model.config.workdir / WEIGHTS)
                best = self._folder.best()
                if best is None or model.negative_elbo < best.negative_elbo:
                    convert.save(weights, self._folder.path / BEST)
            self._folder.end(model, outcome)
            self._folder.write_results()
        last = progress.history[-1]
        self._lines.put(
            f"{model.name}: test loss {last.test_loss:.2f} = bce {last.test_bce:.2f} + kld {last.test_kld:.2f}"
        )

    def _end_epoch(self) -> None:
        with self._lock:
            self._folder.write_metrics()


def report(folder: SweepFolder, models: Sequence[Model]) -> None:
    """Writes the tables and pictures of a finished sweep, and prints how its models compare."""
    with signals.defer_signals():
        from vae_jax.pictures import plots
        from vae_jax.pictures.sweep import draw

    folder.write_results()
    folder.write_metrics()
    say(*table(models))
    for name, figure in draw(folder.models).items():
        plots.save(plots.pixels(figure), folder.path / name)
    best = folder.best()
    if best is not None and (folder.path / BEST).exists():
        say(f"saved {folder.path / BEST}, the model {best.name}")


def main() -> None:
    command_line.run(command, SweepConfig, "python -m vae_jax.sweep")


if __name__ == "__main__":
    main()
