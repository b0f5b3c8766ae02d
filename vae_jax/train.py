"""Trains a model from beginning to end. `python -m vae_jax.train --help` lists the options.

The modules that need jax are imported by `fit`, so that `--help` and wrong options are answered at once.
"""

from __future__ import annotations

import dataclasses
import math
import os
from typing import TYPE_CHECKING

from vae_jax.config import GIVEN, TrainConfig
from vae_jax.data.dataset import Dataset, checked, load
from vae_jax.runs.workdir import Workdir
from vae_jax.system import command_line, signals
from vae_jax.system.console import say
from vae_jax.system.errors import InputError

if TYPE_CHECKING:
    import flax.linen as nn

    from torch_ref.optimizer import Checkpoint as TorchCheckpoint
    from vae_jax.core.steps import TrainState
    from vae_jax.runs.checkpoint import Checkpoints
    from vae_jax.runs.metrics import EpochMetrics
    from vae_jax.runs.progress import Progress


def fit(
    config: TrainConfig, dataset: Dataset | None = None, model: nn.Module | None = None
) -> tuple[TrainState, list[EpochMetrics]]:
    """Trains as the options say; writes checkpoints, metrics and pictures into the workdir, and exports the model.

    A run that the workdir holds goes on from its newest checkpoint, and ends as if it had never stopped.

    Args:
      config: The options.
      dataset: Images to train on, in place of those that `config.data` names.
      model: A Flax module with the methods `encode` and `decode`, in place of the documented model.

    Returns:
      The state that was exported, after the last epoch or (`keep="best"`) after that with the lowest test loss; and the
      averages of every epoch.

    Raises:
      InputError: An option cannot be used; raised before anything is computed or written.
      NonFiniteLossError: A loss is not finite; nothing is exported, and the checkpoints before it stay.
      OSError: A file cannot be written; an older file in its place, and every checkpoint, is still whole.
      Interrupted: Ctrl-C or SIGTERM came while training; a checkpoint has been written.
    """
    config.check()
    if dataset is not None:
        config, dataset = dataclasses.replace(config, data=GIVEN), checked(dataset, config.image_size, config.grey)
    if model is not None and config.model is not None:
        raise InputError(f"--model {config.model}: a model was given to fit as well; expected one of them")
    by_command = dataset is None and model is None
    advice = config.advice if by_command else "to go on: call fit with the same arguments and overwrite=False"
    if config.shards > 1 or config.coordinator:
        # jax reads it when it is imported: no messages of the service that connects processes; ours say what to do.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with signals.defer_signals():  # half an import would break the process for good
        from vae_jax.core.modules import module_of, recipe_of, require_vae, shapes_digest
        from vae_jax.core.settings import fixed_settings
        from vae_jax.runs.checkpoint import Checkpoints
        from vae_jax.runs.feed import Feed
        from vae_jax.runs.logs import Logs, describe_losses
        from vae_jax.runs.processes import join
        from vae_jax.runs.progress import read_init, require_memory

    if model is not None:
        config = dataclasses.replace(config, **recipe_of(model))
    processes = join(config)
    mesh = processes.mesh
    workdir = Workdir(config, writes=processes.is_first)
    with processes.together():
        workdir.check()
        dataset = dataset or load(
            config.data, config.data_dir, config.max_data_gb, config.image_size, config.grey, config.stream
        )
        pixels = math.prod(dataset.image_shape)
        if model is not None:
            require_vae(model, pixels, type(model).__name__)
        elif config.model is None:
            require_memory(config, pixels)
        model = model or module_of(config, pixels)
        init = read_init(config, pixels, model) if workdir.begins_anew else None
        checksum = dataset.checksum()
    processes.require_same(checksum, "images")

    with processes.enter(workdir.lock()), processes.watch(), fixed_settings(config.matmul_precision):
        workdir.sweep()
        checkpoints = Checkpoints(config, workdir, dataset, checksum)
        with processes.together():
            progress = begin_or_go_on(config, workdir, checkpoints, dataset, model, init)
        processes.require_same(progress.checksum(), "parameters")
        progress.spread(mesh)
        shapes = shapes_digest(model, pixels)
        logs = Logs(config, workdir, dataset, checksum, shapes, str(mesh), progress.history)
        feed = Feed(config, dataset, progress.state, mesh)
        idle = f", {mesh.idle} more idle (--shards)" if mesh.idle else ""
        say(f"{describe(config, dataset)}; {progress.parameters:,} parameters; {mesh}{idle}")
        say(describe_losses(feed.pixels, config))

        if progress.finished(config):
            say(f"{workdir}: finished after {progress}; {what_goes_on(config, progress)}--overwrite starts again")
        else:
            if progress.history or progress.bce:
                say(f"{workdir}: goes on after {progress}")
            if workdir.export_is_of_another_run():
                say(f"{config.export}: will be replaced when training ends; to keep it, name another file (--export)")
            workdir.unmark_finished()
            feed.compile_ahead(progress.state, skip=len(progress.bce))
        with signals.defer_signals():  # while the programs compile
            import torch  # noqa: F401 - `export` needs it; its import takes a second or two

            from vae_jax.pictures.run import RunPictures
            from vae_jax.runs.export import export
        pictures = RunPictures(config, workdir, logs, feed)
        feed.wait_until_compiled()

        with signals.stop_on_signal(advice) as stop:
            while not progress.finished(config):
                for chunk in feed.chunks(progress.epoch, skip=len(progress.bce)):
                    progress.settle()
                    processes.agree_to_stop(stop)
                    if stop.agreed or checkpoints.due_within_epoch():
                        checkpoints.save(progress)
                        stop.raise_if_agreed()
                    progress.advance(feed, chunk)
                logs.add(progress.end_epoch(feed, config.beta))
                pictures.draw_if_due(progress)
                processes.agree_to_stop(stop)
                if stop.agreed or checkpoints.due_after_epoch(progress):
                    checkpoints.save(progress)
                    stop.raise_if_agreed()
            kept = checkpoints.kept(progress, model)
            logs.end()
            export(config, workdir, kept.state.model, kept.state.params, pixels)
            pictures.draw_missing(kept)  # last: an error while drawing must not cost the model
            stop.raise_if_requested()
        return kept.state, kept.history


def begin_or_go_on(
    config: TrainConfig,
    workdir: Workdir,
    checkpoints: Checkpoints,
    dataset: Dataset,
    model: nn.Module,
    init: TorchCheckpoint | None,
) -> Progress:
    """The progress of the run in the workdir; or that before the first step, after removing what the folder holds."""
    from vae_jax.runs.progress import initial_progress, read_init

    progress = None if config.overwrite else checkpoints.newest(model)
    if progress is None:
        pixels = math.prod(dataset.image_shape)
        # Before we had the lock, another process may have been about to clear the folder.
        init = init or read_init(config, pixels, model)
        progress = initial_progress(config, pixels, len(dataset.train_images), model, init)
        workdir.clear()
    elif len(progress.history) + bool(progress.bce) > config.epochs:
        raise InputError(
            f"--epochs {config.epochs}: {workdir} is after {progress}; give more epochs to go on with it,"
            " add --overwrite to replace it, or name another --workdir"
        )
    elif progress.finished(config):
        checkpoints.kept(progress, model)  # what cannot be exported is refused before anything changes
    return progress


def describe(config: TrainConfig, dataset: Dataset) -> str:
    """The images of a run in a few words."""
    train, test, shape = len(dataset.train_images), len(dataset.test_images), " x ".join(map(str, dataset.image_shape))
    return f"{config.data}: {train:,} training, {test:,} test images, {shape}"


def what_goes_on(config: TrainConfig, progress: Progress) -> str:
    """The options that make a finished run train on, in words."""
    if len(progress.history) < config.epochs:
        return "a larger --patience trains on, "
    # A schedule is over at its end.
    return "more --epochs train on, " if config.learning_rate_schedule == "constant" else ""


def main() -> None:
    command_line.run(fit, TrainConfig, "python -m vae_jax.train")


if __name__ == "__main__":
    main()
