"""How far a run has come: the state, the epochs that are done, and the steps of the current one."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from vae_jax.config import TrainConfig, option_name
from vae_jax.core import steps
from vae_jax.core.mesh import Mesh
from vae_jax.core.model import MLP, VAE, Params
from vae_jax.core.modules import shapes_of, transposed_layers
from vae_jax.runs.feed import Chunk, Feed
from vae_jax.runs.metrics import EpochMetrics, average, how_far, out_of_patience, require_finite
from vae_jax.runs.trained import require_float32
from vae_jax.system.console import say
from vae_jax.system.errors import InputError, NonFiniteLossError
from vae_jax.system.memory import memory
from vae_jax.system.signals import defer_signals

if TYPE_CHECKING:
    from torch_ref.optimizer import Checkpoint as TorchCheckpoint


@dataclasses.dataclass
class Progress:
    """How far a run has come, between two optimizer steps."""

    state: steps.TrainState
    history: list[EpochMetrics] = dataclasses.field(default_factory=list)  # of the epochs that are done
    loss: list[float] = dataclasses.field(default_factory=list)  # of each step of the current epoch
    bce: list[float] = dataclasses.field(default_factory=list)
    kld: list[float] = dataclasses.field(default_factory=list)
    seconds: float = 0.0  # of training in the current epoch

    _running: steps.Losses | None = None  # of steps that the device may still be computing

    def __str__(self) -> str:
        return how_far(len(self.history), len(self.bce))

    @property
    def epoch(self) -> int:
        """The number of the current epoch, from 1."""
        return len(self.history) + 1

    @property
    def parameters(self) -> int:
        """How many parameters the model has."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.state.params))

    def checksum(self) -> int:
        """CRC-32 of the parameters."""
        return zlib.crc32(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(self.state.params)))

    def spread(self, mesh: Mesh) -> None:
        """Puts the state on all devices of the run."""
        self.state = mesh.replicate(self.state.replace(shards=mesh.shards))

    def finished(self, config: TrainConfig) -> bool:
        """Whether no step is to follow: all epochs are done, or `--patience` has run out after one."""
        done = len(self.history) >= config.epochs or out_of_patience(self.history, config.patience)
        return done and not self.bce

    def advance(self, feed: Feed, chunk: Chunk) -> None:
        """Starts the steps of a chunk on the device, after waiting for those before it.

        Raises:
          NonFiniteLossError: A loss of the steps before is not finite.
        """
        self.settle()
        with self._clock():
            self.state, self._running = feed.train(self.state, chunk)

    def settle(self) -> None:
        """Waits until all steps are done.

        Raises:
          NonFiniteLossError: A loss is not finite.
        """
        if self._running is None:
            return
        with self._clock():
            running: Any = self._running
            while not all(part.is_ready() for part in running):
                time.sleep(0.001)  # Python hears a second Ctrl-C only between two of its own instructions
        self.take(running)
        self._running = None

    def take(self, losses: steps.Losses) -> None:
        """Adds the losses of the steps that follow, [steps] each.

        Raises:
          NonFiniteLossError: A loss is not finite.
        """
        loss, bce, kld = (np.asarray(part) for part in losses)
        bad = np.flatnonzero(~np.isfinite(loss))
        if bad.size:
            raise NonFiniteLossError(
                f"epoch {self.epoch}, step {len(self.bce) + bad[0] + 1:,}: the training loss is {loss[bad[0]]};"
                " nothing exported, the checkpoints before it are kept; start again (--overwrite) with a lower"
                " --learning-rate or --beta"
            )
        self.loss += loss.tolist()
        self.bce += bce.tolist()
        self.kld += kld.tolist()

    def end_epoch(self, feed: Feed, beta: float, tested: steps.Losses | None = None) -> EpochMetrics:
        """Measures the test set, unless its losses are known, and closes the current epoch.

        Raises:
          NonFiniteLossError: A loss is not finite; the epoch is not closed.
        """
        self.settle()
        tested = feed.evaluate(self.state) if tested is None else tested
        _, test_bce, test_kld = (np.asarray(part).tolist() for part in tested)
        train = average(self.bce, self.kld, feed.train_count, beta)
        if not self.state.sums_up:
            train = (math.fsum(self.loss) / feed.train_count, *train[1:])
        metrics = EpochMetrics(
            self.epoch,
            *train,
            *average(test_bce, test_kld, feed.test_count, beta),
            self.seconds,
            feed.pixels,
        )
        require_finite(metrics)
        self.history.append(metrics)
        self.loss, self.bce, self.kld, self.seconds = [], [], [], 0.0
        return metrics

    @contextmanager
    def _clock(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start


def initial_progress(
    config: TrainConfig, pixels: int, images: int, model: nn.Module | None = None, init: TorchCheckpoint | None = None
) -> Progress:
    """A run on so many training images before its first step: fresh parameters, or those of `--init`."""
    state = steps.create_state(config, pixels, model, images=images)
    if init is None:
        return Progress(state)

    def as_parameters(params: PyTree[np.ndarray]) -> Params:
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, state.dtype), params)

    state = state.replace(params=as_parameters(init.params))
    adam = "Adam starts anew"
    if init.adam is not None:
        count, mu, nu, _ = init.adam
        opt_state = optax.ScaleByAdamState(jnp.int32(count), as_parameters(mu), as_parameters(nu))
        state = state.replace(opt_state=opt_state)
        adam = f"Adam continues after {count:,} steps"
    say(f"{config.init}: training starts from its weights; {adam}")
    return Progress(state)


def read_init(config: TrainConfig, pixels: int, model: nn.Module) -> TorchCheckpoint | None:
    """Reads the file that `--init` names, if it names one.

    Args:
      config: The options of the run.
      pixels: Pixels of an image.
      model: The module of the run.

    Raises:
      InputError: It cannot be used, or does not go with the other options.
    """
    path = config.init
    if path is None:
        return None
    with defer_signals():  # half an import would break the process for good; torch takes a second
        from torch_ref.optimizer import load_checkpoint

    widths: tuple[int, ...] = ()
    if type(model) is VAE:
        widths = (model.hidden_dim,)
    elif type(model) is MLP:
        widths = model.hidden_dims
    if len(widths) == 1:
        init = load_checkpoint(path)  # in any known layout
        encoder = init.params["encoder"]
        found = (*encoder["fc1"]["kernel"].shape, len(encoder["fc2_mu"]["bias"]))
        expected = (pixels, *widths, model.latent_dim)
        if found != expected:
            width = "--hidden-dims" if config.hidden_dims else "--hidden-dim"
            raise InputError(
                f"--init {path}: holds a model of {found[0]} pixels, {width} {found[1]} and --latent-dim"
                f" {found[2]}; expected {expected[0]}, {expected[1]} and {expected[2]}; give the options that it needs"
            )
    else:
        init = load_checkpoint(path, shapes_of(model, pixels), transposed_layers(model, pixels))
    if init.adam is not None:
        options = ("learning_rate", "adam_b1", "adam_eps")
        for name, found in zip(options, init.adam.settings, strict=True):
            expected = getattr(config, name)
            if np.float32(found) != np.float32(expected):
                raise InputError(
                    f"--init {path}: its Adam has --{option_name(name)} {found}; expected {expected}; give the option"
                    " that it needs"
                )
    moments = () if init.adam is None else (init.adam.mu, init.adam.nu)
    require_float32(f"--init {path}", jax.tree.leaves((init.params, moments)))
    return init


def require_memory(config: TrainConfig, pixels: int) -> None:
    """Checks that training the documented model can fit into the machine's memory.

    Raises:
      InputError: It cannot.
    """
    widths = (pixels, *(config.hidden_dims or (config.hidden_dim,)))
    parameters = 2 * sum(a * b for a, b in itertools.pairwise(widths)) + 3 * widths[-1] * config.latent_dim
    # Parameters, their gradients and Adam's two moments, as float32.
    size, most = 16 * parameters, memory()
    if size > most:
        several = " ".join(map(str, config.hidden_dims))
        option = f"--hidden-dims {several}" if several else f"--hidden-dim {config.hidden_dim}"
        raise InputError(
            f"{option} and --latent-dim {config.latent_dim}: training would take"
            f" {size / 1e9:,.1f} GB; expected at most {most / 1e9:,.1f} GB, the machine's memory; try smaller ones"
        )
