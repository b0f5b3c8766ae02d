"""A whole training run: data, state, epochs, metrics, vae.pth. `python -m vae_jax.train --help` lists the options.

jax is imported by `fit`, not by this module, so that `--help` and wrong options are answered at once.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from vae_jax import cli
from vae_jax.config import TrainConfig
from vae_jax.data import load
from vae_jax.log import RECONSTRUCTIONS, EpochMetrics, RunLog, describe_losses
from vae_jax.trained import Trained

if TYPE_CHECKING:
    from vae_jax.objective import Losses
    from vae_jax.steps import TrainState

# The progress bar moves once in so many floating-point operations: 2 seconds on a CPU that does 20 GFLOP/s.
STRETCH_FLOPS = 40e9


def fit(config: TrainConfig) -> tuple[TrainState, list[EpochMetrics]]:
    """Trains as the options say, and writes the exported state dict and all that belongs into the workdir.

    Returns:
      The state after the last epoch, and the averages of every epoch.

    Raises:
      InputError: An option cannot be used; raised before anything is computed or written.
      NonFiniteLossError: The loss of an epoch is not finite; nothing is exported.
      OSError: A file cannot be written; the exported one that stood there before is still whole.
    """
    config.check()
    dataset = load(config.data, config.data_dir, config.max_data_gb)
    config.check_size(math.prod(dataset.image_shape))

    import jax
    import jax.numpy as jnp

    from vae_jax import steps
    from vae_jax.binarize import binarize
    from vae_jax.model import to_pixels

    train_images, test_images = (
        jnp.asarray(images.reshape(len(images), -1)) for images in (dataset.train_images, dataset.test_images)
    )
    count = len(train_images)
    batch_size = min(config.batch_size, count)
    state = steps.create_state(config, train_images.shape[1])
    # Under `dynamic`, training draws for itself; the test images are drawn once, so that epochs can be compared.
    train_rule = "none" if state.dynamic else config.binarize
    train_images = binarize(train_images, train_rule, jax.random.fold_in(state.key, steps.PIXELS))
    test_images = binarize(test_images, config.binarize, jax.random.fold_in(state.key, steps.TEST_PIXELS))
    pixels = dataset.pixels(config.binarize)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    print(
        f"{config.data}: {count:,} training and {len(test_images):,} test images"
        f" of {' x '.join(map(str, dataset.image_shape))}; {parameters:,} parameters;"
        f" {jax.devices()[0].device_kind}"
        f"\n{describe_losses(pixels)}",
        flush=True,
    )

    # All compiled ahead, so that the seconds of an epoch are those of its training.
    steps.shuffled_batches(state.key, 0, count, batch_size).block_until_ready()
    test_batches = steps.split_batches(jnp.arange(len(test_images)), batch_size)
    eval_epoch = steps.eval_epoch.lower(state, test_images, test_batches).compile()
    stretches = stretch_steps(math.ceil(count / batch_size), 6 * batch_size * parameters)
    train = {
        length: steps.train_epoch.lower(
            state, train_images, jax.ShapeDtypeStruct((length, batch_size), jnp.int32)
        ).compile()
        for length in {len(stretch) for stretch in stretches}
    }

    log = RunLog(config, dataset.image_shape, pixels)
    history = []

    def draw() -> None:
        shown = np.asarray(to_pixels(test_images[:RECONSTRUCTIONS]))
        trained = Trained(config.hidden_dim, config.latent_dim, shown.shape[1], state.params, {})
        log.draw(history, trained, shown, dataset.image_shape)

    for epoch in range(1, config.epochs + 1):
        start = time.perf_counter()
        batches = steps.shuffled_batches(state.key, epoch, count, batch_size)
        train_sums: list[Losses] = []
        # Gone before the line of the epoch is printed; not there at all where the output is no terminal.
        with tqdm(
            total=count, unit=" images", unit_scale=True, desc=f"epoch {epoch}", leave=False, disable=None
        ) as bar:
            for stretch in stretches:
                state, sums = train[len(stretch)](state, train_images, batches[stretch.start : stretch.stop])
                if train_sums:
                    # One stretch behind, so that the device always has the next one at hand.
                    train_sums[-1].loss.block_until_ready()
                    bar.update(len(train_sums[-1].loss) * batch_size)
                train_sums.append(sums)
            state.step.block_until_ready()
        seconds = time.perf_counter() - start
        metrics = EpochMetrics(
            epoch,
            *_averages(train_sums, count, config.beta),
            *_averages([eval_epoch(state, test_images, test_batches)], len(test_images), config.beta),
            seconds,
            pixels,
        )
        history.append(metrics)
        log.add(metrics)
        if epoch < config.epochs and config.draws_pictures(epoch):
            draw()

    from torch_ref import convert

    # Before the last pictures: nothing that goes wrong with them may cost the model.
    state_dict = convert.to_state_dict(jax.device_get(state.params))
    convert.save(state_dict, config.workdir / "model.pth")
    convert.save(state_dict, config.export)
    if convert.is_safetensors(config.export):
        call = f'safetensors.torch.load_file("{config.export}")'
    else:
        call = f'torch.load("{config.export}", weights_only=True)'
    print(f"saved {config.export}; load it with {call}", flush=True)
    draw()
    log.close()
    return state, history


def stretch_steps(steps: int, step_flops: int) -> list[range]:
    """The steps of an epoch in stretches between two moves of the bar, of one length where that is possible.

    Every length is compiled for itself, so a divisor of `steps` is worth being up to twice as far from the ideal.
    """
    longest = min(steps, max(1, int(STRETCH_FLOPS / step_flops)))
    length = next((n for n in range(longest, longest // 2, -1) if steps % n == 0), longest)
    return [range(steps)[start : start + length] for start in range(0, steps, length)]


def _averages(sums: list[Losses], images: int, beta: float) -> tuple[float, float, float]:
    """loss, bce and kld per image. Summed in float64, where loss = bce + beta * kld holds to the last printed digit."""
    bce = math.fsum(np.concatenate([part.bce for part in sums]).tolist()) / images
    kld = math.fsum(np.concatenate([part.kld for part in sums]).tolist()) / images
    return bce + beta * kld, bce, kld


if __name__ == "__main__":
    cli.run(fit, TrainConfig, "python -m vae_jax.train")
