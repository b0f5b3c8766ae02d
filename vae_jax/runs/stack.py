"""Trains models that share a program as one: their states stacked along a leading axis, each step under `jax.vmap`."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from vae_jax.core import steps
from vae_jax.core.mesh import Mesh
from vae_jax.core.objective import Losses
from vae_jax.runs.checkpoint import Checkpoints
from vae_jax.runs.feed import Feed, chunk_steps, rest, step_cost
from vae_jax.runs.progress import Progress
from vae_jax.runs.sweep_folder import Model
from vae_jax.runs.trainer import Trainer, require_finite
from vae_jax.system.errors import NonFiniteLossError


@dataclasses.dataclass
class Lane:
    """A model of a stack."""

    number: int  # its place in the stack
    model: Model
    progress: Progress  # its state is that of the last checkpoint
    checkpoints: Checkpoints
    feed: Feed


class Stack:
    """The compiled programs of a stack of models, and what they take. All models of one size share them.

    Args:
      feeds: Those of the models.
      state: The states of the models, stacked.
    """

    def __init__(self, feeds: list[Feed], state: steps.TrainState):
        first = feeds[0]
        self._count, self._test_count, self._batch_size = first.train_count, first.test_count, first.batch_size
        shuffle = partial(steps.shuffled_batches, images=self._count, batch_size=self._batch_size)
        numbers = steps.split_batches(jnp.arange(self._test_count), self._batch_size)
        self._train_images, train_axis = _shared([feed.images[0] for feed in feeds])
        self._test_images, test_axis = _shared([feed.images[1] for feed in feeds])
        self._test_batches = numbers
        self._shuffle = jax.jit(jax.vmap(shuffle, (0, None)))
        self._train = jax.jit(jax.vmap(steps.train_epoch, (0, train_axis, 0)), donate_argnums=0)
        self._evaluate = jax.jit(jax.vmap(steps.eval_epoch, (0, test_axis, None)))
        self._keys = jnp.copy(state.key)  # a step donates those of the state
        one = jax.tree.map(lambda leaf: leaf[0], state)
        cost = len(feeds) * step_cost(one, self._batch_size, self._train_images.shape[-1])
        self.chunks = chunk_steps(math.ceil(self._count / self._batch_size), cost)

    def compile_ahead(self, state: steps.TrainState, skip: int) -> None:
        """Compiles all programs, so that the seconds of an epoch are those of training."""
        lengths = {len(chunk) for chunk in (*self.chunks, *rest(self.chunks, skip))}
        shape = (len(self._keys), 1, self._batch_size)
        self._programs = {
            length: self._train.lower(
                state, self._train_images, jax.ShapeDtypeStruct((shape[0], length, shape[2]), jnp.int32)
            ).compile()
            for length in lengths
        }
        self._test = self._evaluate.lower(state, self._test_images, self._test_batches).compile()

    def shuffle(self, epoch: int) -> Int[np.ndarray, "models steps batch"]:
        return np.asarray(self._shuffle(self._keys, epoch))

    def train(self, state: steps.TrainState, batches: Int[np.ndarray, "models steps batch"]):
        """Takes the steps of a chunk; returns the states and the losses, [models, steps] each, on the host."""
        state, losses = self._programs[batches.shape[1]](state, self._train_images, jnp.asarray(batches))
        return state, jax.device_get(losses)

    def evaluate(self, state: steps.TrainState) -> Losses:
        return jax.device_get(self._test(state, self._test_images, self._test_batches))


def _shared(images: list[Array]) -> tuple[Array, int | None]:
    """The images of all models, and the axis of the models; None where all have the same."""
    if all(other is images[0] for other in images):
        return images[0], None
    return jnp.stack(images), 0


def train_stack(
    trainer: Trainer, models: list[Model], feed: Feed, on_diverged: Callable[[Model, str], None]
) -> list[tuple[Model, Progress]]:
    """Trains models as one: each gets the draws that it would get by itself, and differs by the rounding of sums only.

    Args:
      trainer: What all models of the sweep share.
      models: The models; they go on from the newest step of which all have a checkpoint.
      feed: That of their program.
      on_diverged: Called with a model as soon as it has diverged, and the reason. Its place in the stack computes on,
        which changes nothing for the others.

    Returns:
      The models that have not diverged, after their last step.

    Raises:
      HaltedError: The trainer was asked to halt; checkpoints have been written.
      OSError: A file cannot be written; the checkpoints before it are kept.
    """
    config = models[0].config
    lanes = [
        Lane(number, model, *trainer.begin(model), feed.for_seed(model.config.seed))
        for number, model in enumerate(models)
    ]
    while len(reached := {int(lane.progress.state.step) for lane in lanes}) > 1:  # killed between two of their files
        for lane in lanes:
            lane.progress, lane.checkpoints = trainer.begin(lane.model, most=min(reached))
    shards = Mesh(config.shards, 1).shards
    state = jax.tree.map(
        lambda *leaves: jnp.stack(leaves), *(lane.progress.state.replace(shards=shards) for lane in lanes)
    )
    stack = Stack([lane.feed for lane in lanes], state)
    if not lanes[0].progress.finished(config):
        stack.compile_ahead(state, skip=len(lanes[0].progress.bce))

    def each(do: Callable[[Lane], object]) -> None:
        """Does something for each model, and leaves out those that prove to have diverged."""
        for lane in list(lanes):
            try:
                do(lane)
            except NonFiniteLossError as error:
                lanes.remove(lane)
                on_diverged(lane.model, str(error))

    def save(lane: Lane) -> None:
        lane.progress.state = jax.tree.map(lambda leaf: leaf[lane.number], state)
        lane.checkpoints.save(lane.progress)

    while lanes and not lanes[0].progress.finished(config):
        batches = stack.shuffle(lanes[0].progress.epoch)
        for chunk in rest(stack.chunks, len(lanes[0].progress.bce)):
            if not lanes:
                return []
            if trainer.halt.is_set() or lanes[0].checkpoints.due_within_epoch():
                each(save)
                trainer.raise_if_halted()
            start = time.perf_counter()
            state, losses = stack.train(state, batches[:, chunk.start : chunk.stop])
            seconds = time.perf_counter() - start

            def take(lane: Lane, losses: Losses = losses, seconds: float = seconds) -> None:
                lane.progress.seconds += seconds / len(models)
                lane.progress.take(Losses(*(part[lane.number] for part in losses)))
                trainer.tell(lane.model, lane.progress, lane.feed)

            each(take)
        tested = stack.evaluate(state)

        def end_epoch(lane: Lane, tested: Losses = tested) -> None:
            found = Losses(*(part[lane.number] for part in tested))
            require_finite(lane.progress.end_epoch(lane.feed, lane.model.config.beta, found))

        each(end_epoch)
        if lanes:
            trainer.on_epoch()
            if trainer.halt.is_set() or lanes[0].checkpoints.due_after_epoch(lanes[0].progress):
                each(save)
                trainer.raise_if_halted()
    return [(lane.model, lane.progress) for lane in lanes]
