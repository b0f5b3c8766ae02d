"""The images of a run, given to the compiled steps chunk by chunk: from the device's memory, or read on the way."""

from __future__ import annotations

import copy
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
from vae_jax.core.mesh import Mesh, Shards
from vae_jax.core.model import MLP, VAE
from vae_jax.core.objective import Losses
from vae_jax.core.settings import fixed_settings
from vae_jax.data.dataset import Dataset, Pixels
from vae_jax.data.mapped import MappedImages
from vae_jax.system.console import STDERR, tolerate_closed_output

# Between two chunks the progress bar moves and a signal can stop the run. So many floating-point operations take
# 2 seconds on a CPU that does 20 GFLOP/s, or on a GPU that does 1 TFLOP/s: a step of it is over in 0.1 ms.
CHUNK_FLOPS, GPU_CHUNK_FLOPS = 40e9, 2e12
# Bytes of the images of a chunk that are streamed; two chunks are in memory at once.
STREAM_BYTES = 64e6
# Test images to show in pictures.
FIRST = 100


class Chunk(NamedTuple):
    """Consecutive steps of an epoch."""

    steps: range
    batches: Int[Array, "steps batch"]  # numbers of the images of each batch
    images: Array  # the whole set; or the images of each batch, [steps, batch, pixels]


class Source:
    """The images of one split, as the run sees them.

    Args:
      images: The images.
      rule: How grey pixels become black and white.
      key: The run's key.
      split: Which part of the set they are.
      mesh: The devices of the run.
      stream: Whether they are read chunk by chunk, instead of lying on the devices.
    """

    def __init__(
        self,
        images: np.ndarray | MappedImages,
        rule: Binarize,
        key: Key[Array, ""],
        split: Split,
        mesh: Mesh,
        stream: bool,
    ):
        self.pixels = math.prod(images.shape[1:])
        self._images, self._key, self._mesh = images, key, mesh
        self._rule: Binarize = rule
        self._split: Split = split
        self.count = len(images)
        self._resident = None if stream else mesh.replicate(as_seen_by_run(images[:], rule, key, split))

    def for_key(self, key: Key[Array, ""]) -> Source:
        """The images as a run with another key sees them: the same ones, unless their pixels are drawn."""
        if not self.drawn:
            return self
        return Source(self._images, self._rule, key, self._split, self._mesh, self.streamed)

    @property
    def drawn(self) -> bool:
        """Whether the pixels depend on the key."""
        return self._rule not in ("none", "threshold")

    @property
    def resident(self) -> Array:
        """All images, on the device."""
        assert self._resident is not None
        return self._resident

    @property
    def streamed(self) -> bool:
        return self._resident is None

    @property
    def image_bytes(self) -> int:
        return self.pixels * self._images.dtype.itemsize

    def first(self, count: int) -> Array:
        """The first images, on one device of this process."""
        return self._seen(np.arange(min(count, self.count)))

    def of(self, batches: Int[np.ndarray, "steps batch"]) -> Array:
        """What the compiled steps take for these batches: the whole set, or the images of each batch."""
        if self._resident is not None:
            return self._resident
        numbers = batches[:, self._mesh.own(batches.shape[1])]
        numbers = np.where(numbers < 0, self.count - 1, numbers)  # an empty place has any image
        rows = self._seen(numbers.reshape(-1)).reshape(*numbers.shape, -1)
        return self._mesh.split(np.asarray(rows), axis=1)

    def shape(self, steps: int, batch_size: int) -> Any:
        """The shape and type of `of` for so many steps."""
        if self._resident is not None:
            return self._resident
        return self._mesh.shape_split((steps, batch_size, self.pixels), self._images.dtype, axis=1)

    def _seen(self, numbers: Int[np.ndarray, " part"]) -> Array:
        return as_seen_by_run(self._images[numbers], self._rule, self._key, self._split, numbers, self.count)


class Feed:
    """The images of a run, and the compiled programs that take them.

    Args:
      config: The options of the run.
      dataset: Its images.
      state: The state from which it starts or goes on.
      mesh: The devices that train.
    """

    def __init__(self, config: TrainConfig, dataset: Dataset, state: steps.TrainState, mesh: Mesh):
        self._key = jax.random.key(config.seed)  # a step donates the one in the state
        self._mesh = mesh
        # Under `dynamic`, each step draws for itself; the test images are drawn once, so that epochs can be compared.
        train_rule = "none" if state.dynamic else config.binarize
        train_images, test_images = dataset.train_images, dataset.test_images
        stream = config.stream == "always" or isinstance(train_images, MappedImages)
        self._train = Source(train_images, train_rule, self._key, "train", mesh, stream)
        self._test = Source(test_images, config.binarize, self._key, "test", mesh, stream)
        self.train_count, self.test_count = self._train.count, self._test.count
        self.first_test_images = self._test.first(FIRST)
        self.order = config.image_order
        self.image_shape = dataset.image_shape
        self.pixels: Pixels = dataset.pixels(config.binarize)
        # A set smaller than a batch makes a smaller batch, of equal shards all the same.
        self.batch_size = min(config.batch_size, config.shards * math.ceil(self.train_count / config.shards))
        flops = step_cost(state, self.batch_size, self._train.pixels)
        most = int(max(1, STREAM_BYTES // (self.batch_size * self._train.image_bytes))) if stream else None
        self._chunks = chunk_steps(math.ceil(self.train_count / self.batch_size), flops, most)
        test_steps = math.ceil(self.test_count / self.batch_size)
        self._test_chunks = chunk_steps(test_steps, 0, most) if stream else [range(test_steps)]
        self._programs: dict[Any, Future] = {}

    @property
    def drawn(self) -> tuple[bool, bool]:
        """Whether the pixels of the training images, and those of the test images, depend on the seed."""
        return self._train.drawn, self._test.drawn

    @property
    def images(self) -> tuple[Array, Array]:
        """The training and the test images as the run sees them, [images, pixels]; they must be in memory."""
        return self._train.resident, self._test.resident

    def for_seed(self, seed: int) -> Feed:
        """The feed of a run that differs in the seed: it shares the programs, and the images unless they are drawn."""
        feed = copy.copy(self)
        feed._key = jax.random.key(seed)
        feed._train, feed._test = self._train.for_key(feed._key), self._test.for_key(feed._key)
        return feed

    def compile_ahead(self, state: steps.TrainState, skip: int = 0) -> None:
        """Starts to compile, in a thread, all programs that the rest of the run needs.

        Compiled ahead, so that the seconds of an epoch are those of training; in a thread, so that Ctrl-C is heard and
        the caller can import meanwhile. Tracing happens in the caller's thread, because jax's settings, which are part
        of a program, are set per thread; only compiling moves to the other thread.

        Args:
          state: Of the shapes and types to compile for.
          skip: Steps of the first epoch that are already done.
        """
        lowered: dict[Any, Any] = {}
        if self.order == "shuffled" and self._train.streamed:
            lowered["shuffle"] = steps.shuffle_bits.lower(self._key, 0, self.train_count)
        elif self.order == "shuffled":
            lowered["shuffle"] = steps.shuffled_batches.lower(self._key, 0, self.train_count, self.batch_size)
        split = 1 if self._train.streamed else None
        evaluate = self._mesh.jit(steps.eval_epoch, None, split, None, None)
        train = self._mesh.jit(steps.train_epoch, None, split, None, donate=True)

        def batches(length: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((length, self.batch_size), jnp.int32)

        for length in {len(chunk) for chunk in self._test_chunks}:
            images = self._test.shape(length, self.batch_size)
            lowered["evaluate", length] = evaluate.lower(state, images, batches(length), jnp.int32(0))
        for length in {len(chunk) for chunk in (*self._chunks, *rest(self._chunks, skip))}:
            images = self._train.shape(length, self.batch_size)
            lowered["train", length] = train.lower(state, images, batches(length))
        pool = ThreadPoolExecutor(1)
        self._programs = {name: pool.submit(program.compile) for name, program in lowered.items()}
        pool.shutdown(wait=False)

    def compiled_for(self, skip: int) -> bool:
        """Whether there are programs for an epoch without its first steps."""
        return all(("train", len(chunk)) in self._programs for chunk in rest(self._chunks, skip))

    def wait_until_compiled(self) -> None:
        for program in self._programs.values():
            program.result()

    def chunks(self, epoch: int, skip: int = 0, show: bool = True) -> Iterator[Chunk]:
        """The steps of an epoch after the first `skip`, with a progress bar where there is a terminal, if `show`."""
        batches = self.batches(epoch)
        hidden = None if show else True
        bar = tqdm(
            total=self.train_count, unit=" images", unit_scale=True, desc=f"epoch {epoch}", leave=False, disable=hidden
        )
        with bar:
            for chunk in self._read_ahead(self._train, batches, rest(self._chunks, skip)):
                with tolerate_closed_output(STDERR):
                    bar.update(chunk.steps.start * self.batch_size - bar.n)
                yield chunk

    def batches(self, epoch: int) -> Int[np.ndarray, "steps batch"]:
        """The numbers of the images in each batch of an epoch: `steps.shuffled_batches`, or all in their order."""
        if self.order == "stored":
            return np.asarray(steps.split_batches(jnp.arange(self.train_count), self.batch_size))
        found = np.asarray(self._programs["shuffle"].result()(self._key, epoch))
        if not self._train.streamed:
            return found
        # For many images XLA's sort takes 50 bytes an image. This takes 12, and the same order.
        keys = found.astype(np.uint64) << 32
        keys |= np.arange(self.train_count, dtype=np.uint32)
        keys.sort()
        batches = np.full((-(-self.train_count // self.batch_size), self.batch_size), -1, np.int32)
        batches.reshape(-1)[: self.train_count] = keys & 0xFFFFFFFF
        return batches

    def train(self, state: steps.TrainState, chunk: Chunk) -> tuple[steps.TrainState, Losses]:
        """Takes the steps of a chunk: `steps.train_epoch`."""
        return self._programs["train", len(chunk.steps)].result()(state, chunk.images, chunk.batches)

    def evaluate(self, state: steps.TrainState) -> Losses:
        """The losses of each test batch: `steps.eval_epoch`."""
        numbers = steps.split_batches(jnp.arange(self.test_count), self.batch_size)
        parts: list[Losses] = []
        for chunk in self._read_ahead(self._test, np.asarray(numbers), self._test_chunks):
            program = self._programs["evaluate", len(chunk.steps)].result()
            parts.append(
                program(state, chunk.images, chunk.batches, self._mesh.replicate(jnp.int32(chunk.steps.start)))
            )
        # On the host, one device and many give the same.
        return jax.tree.map(lambda *losses: jnp.concatenate([np.asarray(part) for part in losses]), *parts)

    def _read_ahead(self, source: Source, batches: np.ndarray, chunks: list[range]) -> Iterator[Chunk]:
        """The chunks; while one is in use, a thread reads the next."""
        device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]

        def read(chunk: range) -> Chunk:
            numbers = batches[chunk.start : chunk.stop]
            with fixed_settings(), jax.default_device(device):  # jax's settings hold for one thread
                return Chunk(chunk, self._mesh.replicate(jnp.asarray(numbers)), source.of(numbers))

        with ThreadPoolExecutor(1) as pool:
            following = pool.submit(read, chunks[0]) if chunks else None
            for number in range(len(chunks)):
                assert following is not None
                chunk = following.result()
                following = pool.submit(read, chunks[number + 1]) if number + 1 < len(chunks) else None
                yield chunk


def as_seen_by_run(
    images: np.ndarray,
    rule: Binarize,
    key: Key[Array, ""],
    split: Split,
    numbers: Int[np.ndarray, " part"] | None = None,
    total: int = 0,
) -> Array:
    """A split's images on the device as a run with this key sees them: flat, and binarized with the run's own draw.

    Args:
      images: [images, height, width] or [images, height, width, channels], bytes or floats.
      rule: How grey pixels become black and white.
      key: The run's key, `jax.random.key(seed)`.
      split: Which part of the set the images are.
      numbers: Where they are only some images of the split, their numbers.
      total: And how many images the split has.

    Returns:
      [images, pixels], of the same type.
    """
    purpose = steps.TEST_PIXELS if split == "test" else steps.PIXELS
    flat = jnp.asarray(images.reshape(len(images), -1))
    return binarize(flat, rule, jax.random.fold_in(key, purpose), numbers, total)


def step_cost(state: steps.TrainState, batch_size: int, pixels: int) -> int:
    """About how many floating-point operations a step of a run costs, at the rate of large matrix products."""
    if type(state.model) in (VAE, MLP):
        parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        return step_flops(batch_size * state.samples, parameters)
    # Parameters do not tell what a convolution costs, and it reaches half the rate.
    shapes = jax.eval_shape(lambda: state.replace(shards=Shards()))
    images = jax.ShapeDtypeStruct((batch_size, pixels), jnp.uint8)
    analysis: Any = steps.train_step.lower(shapes, images).cost_analysis()
    return int(2 * analysis["flops"])


def step_flops(batch_size: int, parameters: int) -> int:
    """About how many floating-point operations a step costs, at the rate of large matrix products.

    Three products of two operations each; Adam, which is bound by memory, costs as much as 16 images; starting the
    programs of a step costs as much as 2 million operations.
    """
    return 6 * (batch_size + 16) * parameters + 2_000_000


def chunk_steps(steps: int, step_flops: int, most: int | None = None) -> list[range]:
    """The steps of an epoch in chunks, all of one length where that is possible, of at most `most` steps each.

    Each length is compiled by itself, so a divisor of `steps` is worth being up to twice as far from the ideal.
    """
    flops = CHUNK_FLOPS if jax.default_backend() == "cpu" else GPU_CHUNK_FLOPS
    longest = min(steps, most or steps, max(1, int(flops / max(1, step_flops))))
    length = next((n for n in range(longest, longest // 2, -1) if steps % n == 0), longest)
    return [range(steps)[start : start + length] for start in range(0, steps, length)]


def rest(chunks: list[range], skip: int) -> list[range]:
    """The chunks without their first `skip` steps."""
    return [range(max(chunk.start, skip), chunk.stop) for chunk in chunks if chunk.stop > skip]
