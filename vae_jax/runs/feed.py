"""The images of a run on the device, given to the compiled steps chunk by chunk."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key
from tqdm import tqdm

from vae_jax.config import Binarize, Split, TrainConfig
from vae_jax.core import steps
from vae_jax.core.binarize import binarize
from vae_jax.core.mesh import Mesh
from vae_jax.core.objective import Losses
from vae_jax.data.dataset import Dataset, Pixels
from vae_jax.system.console import STDERR, tolerate_closed_output

# Between two chunks the progress bar moves and a signal can stop the run. So many floating-point operations take
# 2 seconds on a CPU that does 20 GFLOP/s.
CHUNK_FLOPS = 40e9
# Test images to show in pictures.
FIRST = 100


class Chunk(NamedTuple):
    """Consecutive steps of an epoch."""

    steps: range
    batches: Int[Array, "steps batch"]  # numbers of the images of each batch


class Feed:
    """The images of a run on the device, and the compiled programs that take them.

    Args:
      config: The options of the run.
      dataset: Its images.
      state: The state from which it starts or goes on.
      mesh: The devices that train.
    """

    def __init__(self, config: TrainConfig, dataset: Dataset, state: steps.TrainState, mesh: Mesh):
        # Under `dynamic`, each step draws for itself; the test images are drawn once, so that epochs can be compared.
        train_rule = "none" if state.dynamic else config.binarize
        self._key = jax.random.key(config.seed)  # a step donates the one in the state
        self.train_images = mesh.replicate(as_seen_by_run(dataset.train_images, train_rule, self._key, "train"))
        test_images = as_seen_by_run(dataset.test_images, config.binarize, self._key, "test")
        self.first_test_images = jnp.copy(test_images[:FIRST])
        self.test_images = mesh.replicate(test_images)
        self.image_shape = dataset.image_shape
        self.pixels: Pixels = dataset.pixels(config.binarize)
        self._mesh = mesh
        # A set smaller than a batch makes a smaller batch, of equal shards all the same.
        images = config.shards * math.ceil(len(self.train_images) / config.shards)
        self._batch_size = min(config.batch_size, images)
        self._test_batches = mesh.replicate(steps.split_batches(jnp.arange(len(self.test_images)), self._batch_size))
        parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        self._chunks = chunk_steps(
            math.ceil(len(self.train_images) / self._batch_size), step_flops(self._batch_size, parameters)
        )
        self._programs: dict[Any, Future] = {}

    def compile_ahead(self, state: steps.TrainState, skip: int = 0) -> None:
        """Starts to compile, in a thread, all programs that the rest of the run needs.

        Compiled ahead, so that the seconds of an epoch are those of training; in a thread, so that Ctrl-C is heard and
        the caller can import meanwhile. Tracing happens in the caller's thread, because jax's settings, which are part
        of a program, are set per thread; only compiling moves to the other thread.

        Args:
          state: Of the shapes and types to compile for.
          skip: Steps of the first epoch that are already done.
        """
        lengths = {len(chunk) for chunk in (*self._chunks, *_rest(self._chunks, skip))}
        batches = {length: jax.ShapeDtypeStruct((length, self._batch_size), jnp.int32) for length in lengths}
        lowered: dict[Any, Any] = {
            "shuffle": steps.shuffled_batches.lower(self._key, 0, len(self.train_images), self._batch_size),
            "evaluate": self._mesh.jit(steps.eval_epoch, None, None, None).lower(
                state, self.test_images, self._test_batches
            ),
        }
        train = self._mesh.jit(steps.train_epoch, None, None, None, donate=True)
        for length in lengths:
            lowered[length] = train.lower(state, self.train_images, batches[length])
        pool = ThreadPoolExecutor(1)
        self._programs = {name: pool.submit(program.compile) for name, program in lowered.items()}
        pool.shutdown(wait=False)

    def wait_until_compiled(self) -> None:
        for program in self._programs.values():
            program.result()

    def chunks(self, epoch: int, skip: int = 0) -> Iterator[Chunk]:
        """The steps of an epoch after the first `skip`, with a progress bar where there is a terminal."""
        batches = self._programs["shuffle"].result()(self._key, epoch)
        count = len(self.train_images)
        bar = tqdm(total=count, unit=" images", unit_scale=True, desc=f"epoch {epoch}", leave=False, disable=None)
        with bar:
            for chunk in _rest(self._chunks, skip):
                with tolerate_closed_output(STDERR):
                    bar.update(chunk.start * self._batch_size - bar.n)
                yield Chunk(chunk, self._mesh.replicate(batches[chunk.start : chunk.stop]))

    def train(self, state: steps.TrainState, chunk: Chunk) -> tuple[steps.TrainState, Losses]:
        """Takes the steps of a chunk: `steps.train_epoch`."""
        return self._programs[len(chunk.steps)].result()(state, self.train_images, chunk.batches)

    def evaluate(self, state: steps.TrainState) -> Losses:
        """The losses of each test batch: `steps.eval_epoch`."""
        return self._programs["evaluate"].result()(state, self.test_images, self._test_batches)


def as_seen_by_run(images: np.ndarray, rule: Binarize, key: Key[Array, ""], split: Split) -> Array:
    """A split's images on the device as a run with this key sees them: flat, and binarized with the run's own draw.

    Args:
      images: [images, height, width] or [images, height, width, channels], bytes or floats.
      rule: How grey pixels become black and white.
      key: The run's key, `jax.random.key(seed)`.
      split: Which part of the set the images are.

    Returns:
      [images, pixels], of the same type.
    """
    purpose = steps.TEST_PIXELS if split == "test" else steps.PIXELS
    flat = jnp.asarray(images.reshape(len(images), -1))
    return binarize(flat, rule, jax.random.fold_in(key, purpose))


def step_flops(batch_size: int, parameters: int) -> int:
    """About how many floating-point operations a step costs, at the rate of large matrix products.

    Three products of two operations each; Adam, which is bound by memory, costs as much as 16 images; starting the
    programs of a step costs as much as 2 million operations.
    """
    return 6 * (batch_size + 16) * parameters + 2_000_000


def chunk_steps(steps: int, step_flops: int) -> list[range]:
    """The steps of an epoch in chunks, all of one length where that is possible.

    Each length is compiled by itself, so a divisor of `steps` is worth being up to twice as far from the ideal.
    """
    longest = min(steps, max(1, int(CHUNK_FLOPS / step_flops)))
    length = next((n for n in range(longest, longest // 2, -1) if steps % n == 0), longest)
    return [range(steps)[start : start + length] for start in range(0, steps, length)]


def _rest(chunks: list[range], skip: int) -> list[range]:
    """The chunks without their first `skip` steps."""
    return [range(max(chunk.start, skip), chunk.stop) for chunk in chunks if chunk.stop > skip]
