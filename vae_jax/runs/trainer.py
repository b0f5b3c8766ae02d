"""Trains the models of a sweep, each by itself, as `vae_jax.train` does; `stack.py` trains several as one."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import flax.linen as nn
import jax

from vae_jax.config import TrainConfig
from vae_jax.core import steps
from vae_jax.core.mesh import Mesh
from vae_jax.core.modules import module_of, shapes_digest
from vae_jax.data.dataset import Dataset
from vae_jax.runs.checkpoint import Checkpoints
from vae_jax.runs.feed import Feed
from vae_jax.runs.progress import Progress, initial_progress, read_init
from vae_jax.runs.sweep_folder import Model
from vae_jax.runs.workdir import Workdir

if TYPE_CHECKING:
    from torch_ref.optimizer import Checkpoint as TorchCheckpoint


class HaltedError(Exception):
    """Training was asked to stop; all checkpoints have been written."""


@dataclasses.dataclass
class Trainer:
    """What all models of a sweep share while they train.

    Any thread may train a model; `on_steps` and `on_epoch` are called in it.
    """

    dataset: Dataset
    checksum: int
    module: nn.Module | None  # in place of those that the recipes name
    halt: threading.Event  # set: training stops between two steps
    on_steps: Callable[[str, int], None]  # the model of this name has been trained on so many images in all
    on_epoch: Callable[[], None]  # a model has done an epoch
    # The programs of stacks, by feed and number of models.
    stacks: WeakKeyDictionary[Feed, dict[int, Any]] = dataclasses.field(default_factory=WeakKeyDictionary)

    @property
    def pixels(self) -> int:
        return math.prod(self.dataset.image_shape)

    def create(self, config: TrainConfig) -> steps.TrainState:
        """The initial state of a model, but for its device."""
        return steps.create_state(config, self.pixels, self.module, images=len(self.dataset.train_images))

    def shapes(self, config: TrainConfig) -> str:
        """The digest of the parameters of a model: `modules.shapes_digest`."""
        return shapes_digest(self.module or module_of(config, self.pixels), self.pixels)

    def read_init(self, config: TrainConfig) -> TorchCheckpoint | None:
        """The file that `--init` names for a model: `progress.read_init`."""
        return read_init(config, self.pixels, self.module or module_of(config, self.pixels))

    def program(self, config: TrainConfig) -> Any:
        """What two models have in common exactly when one program trains both."""
        blank = jax.eval_shape(lambda: self.create(config))
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(blank))
        return jax.tree.structure(blank), shapes, config.batch_size, config.matmul_precision, config.image_order

    def state_bytes(self, config: TrainConfig) -> int:
        """Bytes of the parameters and of Adam's two moments."""
        blank = jax.eval_shape(lambda: self.create(config))
        return 3 * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(blank.params))

    def feed(self, config: TrainConfig) -> Feed:
        """The images, and the programs of all models that share that of this one."""
        mesh = Mesh(config.shards, 1)
        state = self.create(config)
        feed = Feed(config, self.dataset, state.replace(shards=mesh.shards), mesh)
        feed.compile_ahead(state.replace(shards=mesh.shards))
        feed.wait_until_compiled()
        return feed

    def begin(self, model: Model, most: int | None = None) -> tuple[Progress, Checkpoints]:
        """The progress of a model: that of its newest checkpoint, after at most so many steps; or the very first."""
        config = model.config
        checkpoints = Checkpoints(config, Workdir(config), self.dataset, self.checksum)
        progress = checkpoints.newest(self.module, most)
        if progress is None:
            images, init = len(self.dataset.train_images), self.read_init(config)
            progress = initial_progress(config, self.pixels, images, self.module, init)
        model.history = progress.history
        return progress, checkpoints

    def train(self, model: Model, feed: Feed) -> Progress:
        """Trains a model by itself: the same steps and bits as `vae_jax.train`.

        Args:
          model: The model; goes on from its newest checkpoint.
          feed: That of its program.

        Raises:
          HaltedError: `halt` was set; a checkpoint has been written.
          NonFiniteLossError: Training has diverged.
          OSError: A file cannot be written; the checkpoints before it are kept.
        """
        config = model.config
        progress, checkpoints = self.begin(model)
        progress.spread(Mesh(config.shards, 1))
        feed = feed.for_seed(config.seed)
        if not feed.compiled_for(len(progress.bce)):
            feed.compile_ahead(progress.state, skip=len(progress.bce))
        self.tell(model, progress, feed)
        while not progress.finished(config):
            for chunk in feed.chunks(progress.epoch, skip=len(progress.bce), show=False):
                progress.settle()
                self.tell(model, progress, feed)
                if self.halt.is_set() or checkpoints.due_within_epoch():
                    checkpoints.save(progress)
                    self.raise_if_halted()
                progress.advance(feed, chunk)
            progress.end_epoch(feed, config.beta)
            self.tell(model, progress, feed)
            self.on_epoch()
            if self.halt.is_set() or checkpoints.due_after_epoch(progress):
                checkpoints.save(progress)
                self.raise_if_halted()
        return progress

    def tell(self, model: Model, progress: Progress, feed: Feed) -> None:
        within = min(len(progress.bce) * feed.batch_size, feed.train_count)
        self.on_steps(model.name, len(progress.history) * feed.train_count + within)

    def raise_if_halted(self) -> None:
        if self.halt.is_set():
            raise HaltedError
