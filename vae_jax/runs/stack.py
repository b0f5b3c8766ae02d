"""Trains models that share a program as one: their states stacked along a leading axis, each step under `jax.vmap`."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from vae_jax.core import steps
from vae_jax.core.mesh import Mesh
from vae_jax.core.objective import Losses
from vae_jax.runs.checkpoint import Checkpoints
from vae_jax.runs.feed import Feed, chunk_steps, rest, step_cost
from vae_jax.runs.progress import Progress
from vae_jax.runs.sweep_folder import Model
from vae_jax.runs.trainer import Trainer
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
    """The programs of stacks of so many models of one kind; each is compiled once.

    Args:
      feed: That of one of the models.
      state: The states of the models, stacked.
    """

    def __init__(self, feed: Feed, state: steps.TrainState):
        self._batch_size, self._models = feed.batch_size, len(state.step)
        shuffle = partial(steps.shuffled_batches, images=feed.train_count, batch_size=feed.batch_size)
        self._stored = feed.batches(1) if feed.order == "stored" else None
        self._test_batches = steps.split_batches(jnp.arange(feed.test_count), feed.batch_size)
        # Pixels that are drawn differ from model to model; all others are the same images.
        train_axis, test_axis = (0 if drawn else None for drawn in feed.drawn)
        self._shuffle = jax.jit(jax.vmap(shuffle, (0, None)))
        self._train = jax.jit(jax.vmap(steps.train_epoch, (0, train_axis, 0)), donate_argnums=0)
        self._evaluate = jax.jit(jax.vmap(steps.eval_epoch, (0, test_axis, None)))
        one = jax.tree.map(lambda leaf: leaf[0], state)
        cost = self._models * step_cost(one, feed.batch_size, feed.images[0].shape[-1])
        self.chunks = chunk_steps(math.ceil(feed.train_count / feed.batch_size), cost)
        self._programs: dict[int, Any] = {}

    def take(self, feeds: list[Feed], state: steps.TrainState, skip: int) -> None:
        """Takes up models; compiles what is not compiled yet, so that the seconds of an epoch are those of training.

        Args:
          feeds: Those of the models.
          state: Their states, stacked.
          skip: Steps of the first epoch that are already done.
        """
        self._keys = jnp.copy(state.key)  # a step donates those of the state
        self._images = [
            jnp.stack(parts) if drawn else parts[0]
            for parts, drawn in zip(zip(*(feed.images for feed in feeds), strict=True), feeds[0].drawn, strict=True)
        ]
        for length in {len(chunk) for chunk in (*self.chunks, *rest(self.chunks, skip))} - self._programs.keys():
            batches = jax.ShapeDtypeStruct((self._models, length, self._batch_size), jnp.int32)
            self._programs[length] = self._train.lower(state, self._images[0], batches).compile()

    def batches(self, epoch: int) -> Int[np.ndarray, "models steps batch"]:
        """The numbers of the images in each batch of an epoch of each model."""
        if self._stored is not None:
            return np.broadcast_to(self._stored, (self._models, *self._stored.shape))
        return np.asarray(self._shuffle(self._keys, epoch))

    def train(self, state: steps.TrainState, batches: Int[np.ndarray, "models steps batch"]):
        """Takes the steps of a chunk; returns the states and the losses, [models, steps] each, on the host."""
        state, losses = self._programs[batches.shape[1]](state, self._images[0], jnp.asarray(batches))
        return state, jax.device_get(losses)

    def evaluate(self, state: steps.TrainState) -> Losses:
        return jax.device_get(self._evaluate(state, self._images[1], self._test_batches))


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
    stacks = trainer.stacks.setdefault(feed, {})
    if len(lanes) not in stacks:
        stacks[len(lanes)] = Stack(feed, state)
    stack = stacks[len(lanes)]
    if not lanes[0].progress.finished(config):
        stack.take([lane.feed for lane in lanes], state, skip=len(lanes[0].progress.bce))

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
        batches = stack.batches(lanes[0].progress.epoch)
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
            lane.progress.end_epoch(lane.feed, lane.model.config.beta, found)

        each(end_epoch)
        if lanes:
            trainer.on_epoch()
            if trainer.halt.is_set() or lanes[0].checkpoints.due_after_epoch(lanes[0].progress):
                each(save)
                trainer.raise_if_halted()
    return [(lane.model, lane.progress) for lane in lanes]
