"""Trains a model from beginning to end. `python -m vae_jax.train --help` lists the options.

The modules that need jax are imported by `fit`, so that `--help` and wrong options are answered at once.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from vae_jax.config import TrainConfig
from vae_jax.data.dataset import Dataset, checked, load
from vae_jax.runs.workdir import Workdir
from vae_jax.system import command_line, signals
from vae_jax.system.console import say
from vae_jax.system.errors import InputError

if TYPE_CHECKING:
    import flax.linen as nn

    from vae_jax.core.steps import TrainState
    from vae_jax.runs.metrics import EpochMetrics

# Stands for the name of a data set that the caller of `fit` has given.
GIVEN = "given to fit"


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
      The state after the last epoch, and the averages of every epoch.

    Raises:
      InputError: An option cannot be used; raised before anything is computed or written.
      NonFiniteLossError: A loss is not finite; nothing is exported, and the checkpoints before it stay.
      OSError: A file cannot be written; an older file in its place, and every checkpoint, is still whole.
      Interrupted: Ctrl-C or SIGTERM came while training; a checkpoint has been written.
    """
    config.check()
    if dataset is not None:
        config, dataset = dataclasses.replace(config, data=GIVEN), checked(dataset, config.image_size, config.grey)
    workdir = Workdir(config)
    workdir.check()
    by_command = dataset is None and model is None
    advice = config.advice if by_command else "to go on: call fit with the same arguments and overwrite=False"
    dataset = dataset or load(config.data, config.data_dir, config.max_data_gb, config.image_size, config.grey)
    with signals.defer_signals():  # half an import would break the process for good
        from vae_jax.core.settings import device_kind, fixed_settings
        from vae_jax.runs.checkpoint import Checkpoints
        from vae_jax.runs.feed import Feed
        from vae_jax.runs.logs import Logs, describe_losses
        from vae_jax.runs.progress import initial_progress, read_init, require_memory

    device, pixels = device_kind(), math.prod(dataset.image_shape)
    if model is None:
        require_memory(config, pixels)
    init = read_init(config, pixels) if workdir.begins_anew else None

    with workdir.lock(), fixed_settings(config.matmul_precision):
        workdir.sweep()
        checkpoints = Checkpoints(config, workdir, dataset)
        progress = None if config.overwrite else checkpoints.newest(model)
        if progress is None:
            progress = initial_progress(config, pixels, model, init)
            workdir.clear()
        elif len(progress.history) + bool(progress.bce) > config.epochs:
            raise InputError(
                f"--epochs {config.epochs}: {workdir} is after {progress}; give more epochs to go on with it,"
                " add --overwrite to replace it, or name another --workdir"
            )
        logs = Logs(config, workdir, dataset, device, progress.history)
        feed = Feed(config, dataset, progress.state)
        say(f"{describe(config, dataset)}; {progress.parameters:,} parameters; {device}")
        say(describe_losses(feed.pixels))

        to_go = range(progress.epoch, config.epochs + 1)
        if to_go:
            if progress.history or progress.bce:
                say(f"{workdir}: goes on after {progress}")
            workdir.unmark_finished()
            feed.compile_ahead(progress.state, skip=len(progress.bce))
        else:
            say(f"{workdir}: finished after epoch {config.epochs}; more --epochs train on, --overwrite starts again")
        with signals.defer_signals():  # while the programs compile
            import torch  # noqa: F401 - `export` needs it; its import takes a second or two

            from vae_jax.pictures.run import RunPictures
            from vae_jax.runs.export import export
        pictures = RunPictures(config, workdir, logs, feed)
        feed.wait_until_compiled()

        with signals.stop_on_signal(advice) as stop:
            for epoch in to_go:
                for chunk in feed.chunks(epoch, skip=len(progress.bce)):
                    if stop.requested or checkpoints.due_within_epoch():
                        checkpoints.save(progress)
                        stop.raise_if_requested()
                    progress.advance(feed, chunk)
                logs.add(progress.end_epoch(feed, config.beta))
                pictures.draw_if_due(progress)
                if stop.requested or checkpoints.due_after_epoch(progress):
                    checkpoints.save(progress)
                    stop.raise_if_requested()
            export(config, workdir, progress.state.model, progress.state.params)
            pictures.draw_missing(progress)  # last: an error while drawing must not cost the model
            stop.raise_if_requested()
        return progress.state, progress.history


def describe(config: TrainConfig, dataset: Dataset) -> str:
    """The images of a run in a few words."""
    train, test, shape = len(dataset.train_images), len(dataset.test_images), " x ".join(map(str, dataset.image_shape))
    return f"{config.data}: {train:,} training, {test:,} test images, {shape}"


def main() -> None:
    command_line.run(fit, TrainConfig, "python -m vae_jax.train")


if __name__ == "__main__":
    main()
