"""A whole training run: data, state, epochs, metrics, checkpoints, vae.pth. `python -m vae_jax.train --help`.

jax is imported by `fit`, not by this module, so that `--help` and wrong options are answered at once.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from vae_jax import cli, signals
from vae_jax.config import PICTURES, InputError, TrainConfig
from vae_jax.data import Dataset, Pixels, load
from vae_jax.log import RECONSTRUCTIONS, STDERR, EpochMetrics, RunLog, describe_losses, lock, say, unheard
from vae_jax.trained import Trained, require_float32

if TYPE_CHECKING:
    from jax import Array

    from torch_ref.checkpoint import Checkpoint
    from torch_ref.convert import Params
    from vae_jax.checkpoint import Checkpoints, Progress
    from vae_jax.steps import TrainState

# The progress bar moves, and a signal is heeded, once in so many floating-point operations: 2 seconds on a CPU that
# does 20 GFLOP/s.
STRETCH_FLOPS = 40e9


def fit(config: TrainConfig) -> tuple[TrainState, list[EpochMetrics]]:
    """Trains as the options say, and writes the exported state dict and all that belongs into the workdir.

    A run that the workdir holds goes on from its newest checkpoint, and ends as if it had never stopped.

    Returns:
      The state after the last epoch, and the averages of every epoch.

    Raises:
      InputError: An option cannot be used; raised before anything is computed or written.
      NonFiniteLossError: A loss is not finite; nothing is exported, and the checkpoints before it stay.
      OSError: A file cannot be written; an older one in its place, and every checkpoint, is still whole.
      Interrupted: Ctrl-C or SIGTERM came while training; a checkpoint has been written.
    """
    config.check()
    signals.advice = f"to go on: {config.command}"
    dataset = load(config.data, config.data_dir, config.max_data_gb)
    config.check_size(math.prod(dataset.image_shape))
    init = None
    if config.init is not None and (config.overwrite or not config.has_checkpoints):
        init = _read_init(config, config.init, math.prod(dataset.image_shape))

    import jax

    with lock(config.workdir), jax.default_matmul_precision(config.matmul_precision):
        return _fit(config, dataset, init)


def _read_init(config: TrainConfig, path: Path, pixels: int) -> Checkpoint:
    """Reads the file that `--init` names.

    Raises:
      InputError: It cannot be used, or does not go with the other options.
    """
    import jax

    from torch_ref.checkpoint import load_checkpoint

    init = load_checkpoint(path)
    encoder = init.params["encoder"]
    found = (*encoder["fc1"]["kernel"].shape, len(encoder["fc2_mu"]["bias"]))
    if found != (pixels, config.hidden_dim, config.latent_dim):
        raise InputError(
            f"--init {path}: holds a model of {found[0]} pixels, --hidden-dim {found[1]} and --latent-dim {found[2]};"
            f" expected {pixels}, {config.hidden_dim} and {config.latent_dim}; give the options that it needs"
        )
    if init.adam is not None and np.float32(init.adam.learning_rate) != np.float32(config.learning_rate):
        raise InputError(
            f"--init {path}: its Adam has --learning-rate {init.adam.learning_rate}; expected {config.learning_rate};"
            " give the option that it needs"
        )
    values = jax.tree.leaves((init.params, () if init.adam is None else (init.adam.mu, init.adam.nu)))
    require_float32(f"--init {path}", values)
    return init


def _initial_state(config: TrainConfig, pixels: int, init: Checkpoint | None) -> TrainState:
    """The state before the first step: fresh, or that of `--init`."""
    import jax
    import jax.numpy as jnp
    import optax

    from vae_jax import steps

    state = steps.create_state(config, pixels)
    if init is None:
        return state

    def as_float32(params: Params) -> optax.Params:
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)

    state = state.replace(params=as_float32(init.params))
    if init.adam is None:
        return state
    count, mu, nu, _ = init.adam
    return state.replace(opt_state=optax.ScaleByAdamState(jnp.int32(count), as_float32(mu), as_float32(nu)))


def _fit(config: TrainConfig, dataset: Dataset, init: Checkpoint | None) -> tuple[TrainState, list[EpochMetrics]]:
    """`fit` in a workdir that no other process is in: finds out where the run stands, and goes on from there."""
    from vae_jax.checkpoint import Checkpoints, Progress

    image_shape, kind = dataset.image_shape, dataset.pixels(config.binarize)
    pixels = math.prod(image_shape)
    checkpoints = Checkpoints(config, len(dataset.train_images), pixels, dataset.checksum())
    progress = None if config.overwrite else checkpoints.newest()
    if progress is None:
        progress = Progress(_initial_state(config, pixels, init))
        log = RunLog(config, image_shape, kind)
        if init is not None:
            adam = "Adam starts anew" if init.adam is None else f"Adam goes on after {init.adam.count:,} steps"
            say(f"{config.init}: its weights are where training starts; {adam}")
    else:
        if len(progress.history) + bool(progress.bce) > config.epochs:
            raise InputError(
                f"--epochs {config.epochs}: {config.workdir} is after {progress}; give more epochs to go on with it,"
                " add --overwrite to replace it, or name another --workdir"
            )
        log = RunLog(config, image_shape, kind, progress.history)
    # From here on, --overwrite would remove what this run has made.
    signals.advice = f"to go on: {dataclasses.replace(config, overwrite=False).command}"
    _complete(config, dataset, progress, checkpoints, log)
    return progress.state, progress.history


def _complete(config: TrainConfig, dataset: Dataset, progress: Progress, checkpoints: Checkpoints, log: RunLog) -> None:
    """All that is still to do: epochs, export, pictures; `progress` moves along."""
    import jax
    import jax.numpy as jnp

    from vae_jax import steps
    from vae_jax.binarize import binarize
    from vae_jax.model import to_pixels

    image_shape, pixels = dataset.image_shape, dataset.pixels(config.binarize)
    train_images, test_images = (
        jnp.asarray(images.reshape(len(images), -1)) for images in (dataset.train_images, dataset.test_images)
    )
    state = progress.state
    # Under `dynamic`, training draws for itself; the test images are drawn once, so that epochs can be compared.
    train_rule = "none" if state.dynamic else config.binarize
    train_images = binarize(train_images, train_rule, jax.random.fold_in(state.key, steps.PIXELS))
    test_images = binarize(test_images, config.binarize, jax.random.fold_in(state.key, steps.TEST_PIXELS))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    say(
        f"{config.data}: {len(train_images):,} training and {len(test_images):,} test images"
        f" of {' x '.join(map(str, image_shape))}; {parameters:,} parameters;"
        f" {jax.devices()[0].device_kind}"
        f"\n{describe_losses(pixels)}"
    )

    def draw() -> None:
        shown = np.asarray(to_pixels(test_images[:RECONSTRUCTIONS]))
        sizes = config.hidden_dim, config.latent_dim, shown.shape[1]
        log.draw(Trained(*sizes, progress.state.params, {}), shown, image_shape)

    # It is the last thing of a run to be written, but for the pictures: where it is, all has been exported.
    model = config.workdir / "model.pth"
    if len(progress.history) < config.epochs:
        if progress.history or progress.bce:
            say(f"{config.workdir}: goes on after {progress}")
        model.unlink(missing_ok=True)
        _train(config, progress, train_images, test_images, pixels, checkpoints, log, draw)
    else:
        say(f"{config.workdir}: finished after epoch {config.epochs}; more --epochs train on, --overwrite starts anew")

    if not (model.exists() and config.export.exists()):
        from torch_ref import convert

        if not model.exists():
            # They are of an earlier epoch, if there are any.
            for name in PICTURES:
                (config.workdir / name).unlink(missing_ok=True)
        state_dict = convert.to_state_dict(jax.device_get(progress.state.params))
        convert.save(state_dict, config.export)
        convert.save(state_dict, model)
        if convert.is_safetensors(config.export):
            call = f'safetensors.torch.load_file("{config.export}")'
        else:
            call = f'torch.load("{config.export}", weights_only=True)'
        say(f"saved {config.export}; load it with {call}")
    else:
        content = model.read_bytes()
        if config.export.suffix == ".safetensors":
            from torch_ref import convert

            content = convert.encode(convert.to_state_dict(jax.device_get(progress.state.params)), config.export)
        if config.export.read_bytes() != content:
            say(f"{config.export}: differs from {model}, the model of this run, and is left as it is")
    # After the model: nothing that goes wrong with them may cost it.
    if not all((config.workdir / name).exists() for name in PICTURES):
        draw()


def _train(
    config: TrainConfig,
    progress: Progress,
    train_images: Array,
    test_images: Array,
    pixels: Pixels,
    checkpoints: Checkpoints,
    log: RunLog,
    draw: Callable[[], None],
) -> None:
    """Trains to the end of the last epoch; `progress` moves along."""
    import jax
    import jax.numpy as jnp

    from vae_jax import steps

    count = len(train_images)
    batch_size = min(config.batch_size, count)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(progress.state.params))

    test_batches = steps.split_batches(jnp.arange(len(test_images)), batch_size)
    stretches = stretch_steps(math.ceil(count / batch_size), step_flops(batch_size, parameters))
    # Of the first epoch, a checkpoint may have some steps behind it.
    done = len(progress.bce)
    rest = [range(max(stretch.start, done), stretch.stop) for stretch in stretches if stretch.stop > done]
    shuffle = steps.shuffled_batches.lower(progress.state.key, 0, count, batch_size)
    eval_epoch = steps.eval_epoch.lower(progress.state, test_images, test_batches)
    train = {
        length: steps.train_epoch.lower(
            progress.state, train_images, jax.ShapeDtypeStruct((length, batch_size), jnp.int32)
        )
        for length in {len(stretch) for stretch in (*stretches, *rest)}
    }
    # All compiled ahead, so that the seconds of an epoch are those of its training. In a thread: meanwhile
    # Ctrl-C is heard, and what the end of a run needs is imported.
    pool = ThreadPoolExecutor(1)
    shuffle, eval_epoch, *compiled = (
        pool.submit(lowered.compile) for lowered in (shuffle, eval_epoch, *train.values())
    )
    pool.shutdown(wait=False)
    for module in ("orbax.checkpoint", "torch_ref.convert", "vae_jax.plots"):
        importlib.import_module(module)
    shuffle, eval_epoch = shuffle.result(), eval_epoch.result()
    train = {length: program.result() for length, program in zip(train, compiled, strict=True)}

    with signals.noted() as stop:
        while len(progress.history) < config.epochs:
            epoch = len(progress.history) + 1
            start = time.perf_counter() - progress.seconds
            batches = shuffle(progress.state.key, epoch)
            # Gone before the line of the epoch is printed; not there at all where the output is no terminal.
            with tqdm(
                total=count, unit=" images", unit_scale=True, desc=f"epoch {epoch}", leave=False, disable=None
            ) as bar:
                for stretch in rest:
                    with unheard(STDERR):
                        bar.update(stretch.start * batch_size - bar.n)
                    progress.advance(
                        *train[len(stretch)](progress.state, train_images, batches[stretch.start : stretch.stop])
                    )
                    due = stop.signum is not None or (config.checkpoint_every > 0 and checkpoints.due())
                    if due and stretch is not rest[-1]:
                        progress.settle()
                        progress.seconds = time.perf_counter() - start
                        checkpoints.save(progress)
                        stop.obey()
                        start = time.perf_counter() - progress.seconds
                progress.settle()
            seconds = time.perf_counter() - start
            test = eval_epoch(progress.state, test_images, test_batches)
            metrics = EpochMetrics(
                epoch,
                *_averages(progress.bce, progress.kld, count, config.beta),
                *_averages(np.asarray(test.bce).tolist(), np.asarray(test.kld).tolist(), len(test_images), config.beta),
                seconds,
                pixels,
            )
            log.add(metrics)
            progress.end_epoch(metrics)
            rest = stretches
            is_last = epoch == config.epochs
            if not is_last and config.draws_pictures(epoch):
                draw()
            # In time, and where possible after an epoch: there it has a test loss.
            if is_last or stop.signum is not None or checkpoints.due(ahead=seconds):
                checkpoints.save(progress)
            stop.obey()
    stop.obey()  # one that came since the last look


def step_flops(batch_size: int, parameters: int) -> int:
    """About what a step costs, in floating-point operations at the rate of large matrix products.

    Three products of two operations; Adam, which is bound by memory, as much as 16 images; calling the programs of a
    step at all, as much as 2 million operations.
    """
    return 6 * (batch_size + 16) * parameters + 2_000_000


def stretch_steps(steps: int, step_flops: int) -> list[range]:
    """The steps of an epoch in stretches between two moves of the bar, of one length where that is possible.

    Every length is compiled for itself, so a divisor of `steps` is worth being up to twice as far from the ideal.
    """
    longest = min(steps, max(1, int(STRETCH_FLOPS / step_flops)))
    length = next((n for n in range(longest, longest // 2, -1) if steps % n == 0), longest)
    return [range(steps)[start : start + length] for start in range(0, steps, length)]


def _averages(bce: list[float], kld: list[float], images: int, beta: float) -> tuple[float, float, float]:
    """loss, bce and kld per image. Summed in float64, where loss = bce + beta * kld holds to the last printed digit."""
    bce_mean, kld_mean = math.fsum(bce) / images, math.fsum(kld) / images
    return bce_mean + beta * kld_mean, bce_mean, kld_mean


if __name__ == "__main__":
    cli.run(fit, TrainConfig, "python -m vae_jax.train")
