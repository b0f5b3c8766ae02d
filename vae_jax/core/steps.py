"""Training as pure functions of a state: a step, an epoch, a pass over the test set, all jit-compiled.

All randomness comes from the state's key, which never changes: each draw folds in its purpose and the number of its
step or epoch, so a state that is read back from disk continues with the very same draws.
"""

import math
from functools import partial
from typing import no_type_check

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, UInt, UInt8

from vae_jax.config import INT32_MAX, Objective, TrainConfig
from vae_jax.core.binarize import draw
from vae_jax.core.mesh import Shards, local, sum_over_shards
from vae_jax.core.model import Params, forward, init_params, latent_dim, to_pixels
from vae_jax.core.modules import module_of
from vae_jax.core.objective import Losses, dreg_gradient, losses, sampled_losses, sum_valid
from vae_jax.core.optimizer import AdamSettings, Schedule, adam
from vae_jax.system.errors import InputError

# A whole set, or the images of each batch.
Images = (
    UInt8[Array, "images pixels"]
    | Float[Array, "images pixels"]
    | UInt8[Array, "steps local pixels"]
    | Float[Array, "steps local pixels"]
)
# The purposes of draws.
INIT, SHUFFLE, NOISE, TEST_NOISE, PIXELS, TEST_PIXELS = range(6)


@no_type_check  # jax also builds it from placeholders: shapes, specifications, axes
class TrainState(flax.struct.PyTreeNode):
    """Everything that a step reads and changes.

    Rate and beta are leaves: one compiled step serves every value, and models that differ in them can be stacked.
    """

    step: Int[Array, ""]  # optimizer steps taken
    key: Key[Array, ""]
    beta: Float[Array, ""]
    learning_rate: Float[Array, ""]
    params: Params
    opt_state: optax.ScaleByAdamState
    model: nn.Module = flax.struct.field(pytree_node=False)
    dynamic: bool = flax.struct.field(pytree_node=False, default=False)  # draw binary pixels anew in every step
    schedule: Schedule | None = flax.struct.field(pytree_node=False, default=None)  # of the rate; None: constant
    shards: Shards = flax.struct.field(pytree_node=False, default=Shards())  # how each batch is cut
    adam: AdamSettings = flax.struct.field(pytree_node=False, default=AdamSettings())
    objective: Objective = flax.struct.field(pytree_node=False, default="elbo")
    samples: int = flax.struct.field(pytree_node=False, default=1)  # draws of z for each image in training
    warmup: int = flax.struct.field(pytree_node=False, default=0)  # steps in which the weight of the KLD rises to beta

    @property
    def sums_up(self) -> bool:
        """Whether the training loss is bce + beta * kld in every step."""
        return self.objective == "elbo" and not self.warmup

    @property
    def dtype(self) -> jnp.dtype:
        """The type that everything is computed in: that of the parameters."""
        return jax.tree.leaves(self.params)[0].dtype


def create_state(
    config: TrainConfig, pixels: int = 784, model: nn.Module | None = None, *, images: int | None = None
) -> TrainState:
    """The state before the first step: fresh parameters, Adam at rest.

    Args:
      config: The recipe.
      pixels: Pixels of an image.
      model: A module with the methods `encode` and `decode`; by default that of the config.
      images: How many images an epoch trains on; what changes from step to step needs it, to know the steps of the run.

    Raises:
      InputError: `images` is missing, or the module of the config cannot be used.
    """
    epoch_steps = _epoch_steps(config, images)
    schedule = _schedule(config, epoch_steps)
    warmup = min(config.kl_warmup * epoch_steps, INT32_MAX)
    module = module_of(config, pixels) if model is None else model
    key = jax.random.key(config.seed)

    params, opt_state = _initial(module, key, pixels)
    dtype = jax.tree.leaves(params)[0].dtype
    beta, learning_rate = jnp.asarray(config.beta, dtype), jnp.asarray(config.learning_rate, dtype)
    dynamic = config.binarize == "dynamic"
    shards = Shards(config.shards)
    return TrainState(
        jnp.int32(0),
        key,
        beta,
        learning_rate,
        params,
        opt_state,
        module,
        dynamic,
        schedule,
        shards,
        AdamSettings(b1=config.adam_b1, eps=config.adam_eps),
        config.objective,
        config.training_samples,
        warmup,
    )


# As one program, which compiles in half the time, and once for all models of the same sizes.
@partial(jax.jit, static_argnames=("module", "pixels"))
def _initial(module: nn.Module, key: Key[Array, ""], pixels: int) -> tuple[Params, optax.OptState]:
    params = init_params(module, jax.random.fold_in(key, INIT), pixels)
    return params, adam(0.0).init(params)


def _epoch_steps(config: TrainConfig, images: int | None) -> int:
    """The steps of an epoch; 0 where nothing depends on them."""
    schedule = config.learning_rate_schedule
    if schedule == "constant" and not config.kl_warmup:
        return 0
    if images is None:
        option = f"--kl-warmup {config.kl_warmup}" if config.kl_warmup else f"--learning-rate-schedule {schedule}"
        raise InputError(
            f"{option}: depends on the steps of an epoch; expected the number of training images too:"
            " create_state(config, images=...)"
        )
    return math.ceil(images / config.batch_size)


def _schedule(config: TrainConfig, epoch_steps: int) -> Schedule | None:
    kind = config.learning_rate_schedule
    if kind == "constant":
        return None
    steps = epoch_steps if kind == "burda2015" else config.epochs * epoch_steps
    return Schedule(kind, min(steps, INT32_MAX))  # the state counts its steps as int32


def split_batches(order: Int[Array, " images"], batch_size: int) -> Int[Array, "steps batch"]:
    """Cuts a list of image numbers into batches; -1 fills up the last batch and counts for nothing."""
    padding = -len(order) % batch_size
    return jnp.pad(order, (0, padding), constant_values=-1).reshape(-1, batch_size)


@partial(jax.jit, static_argnames=("images", "batch_size"))
def shuffled_batches(
    key: Key[Array, ""], epoch: Int[Array, ""] | int, images: int, batch_size: int
) -> Int[Array, "steps batch"]:
    """The batches of an epoch: every image number from 0 to `images` - 1 once, in an order drawn from `key`."""
    # Sorting once is enough: two images in 60,000 share their 32 bits less than once an epoch.
    return split_batches(jnp.argsort(shuffle_bits(key, epoch, images)), batch_size)


@partial(jax.jit, static_argnames="images")
def shuffle_bits(key: Key[Array, ""], epoch: Int[Array, ""] | int, images: int) -> UInt[Array, " images"]:
    """The random numbers whose order is that of the images of an epoch."""
    return jax.random.bits(jax.random.fold_in(jax.random.fold_in(key, SHUFFLE), epoch), (images,))


def draw_eps(
    key: Key[Array, ""], step: Int[Array, ""] | int, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32
) -> Float[Array, "batch *samples latent"]:
    """The noise of a training step, ~ N(0, I)."""
    return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, NOISE), step), shape, dtype)


def _summed_losses(state: TrainState, params, images, eps, valid) -> Losses:
    """The losses by one draw, summed over the valid images."""
    pixels = to_pixels(images, state.dtype)
    output = forward(state.model, params, pixels, eps)
    return sum_valid(losses(output, pixels, state.beta), valid)


def _gradients(state: TrainState, params, images, eps, valid) -> tuple[Params, Losses]:
    """The gradient of the training loss, and the losses, summed over the valid images."""
    pixels = to_pixels(images, state.dtype)
    if state.objective == "dreg":
        return dreg_gradient(state.model, params, pixels, eps, valid)

    def objective(params):
        # The SUM over the batch, as in the PyTorch model: with Adam's eps, the mean would train differently.
        if eps.ndim == 2:
            batch = _summed_losses(state, params, images, eps, valid)
        else:
            batch = sum_valid(sampled_losses(state.model, params, pixels, eps, state.objective, state.beta), valid)
        return batch.loss, batch

    return jax.grad(objective, has_aux=True)(params)


def _train_step(state: TrainState, images, numbers, valid) -> tuple[TrainState, Losses]:
    """A step on a batch, of whose rows this device has its own."""
    latent = latent_dim(state.model, state.params, images.shape[-1])
    samples = () if state.objective == "elbo" and state.samples == 1 else (state.samples,)
    shape = (len(numbers) * state.shards.devices, *samples, latent)
    eps = local(draw_eps(state.key, state.step, shape, state.dtype), state.shards)
    if state.dynamic:
        images = draw(images, jax.random.fold_in(jax.random.fold_in(state.key, PIXELS), state.step), numbers)
    weighted = state
    if state.warmup:
        rise = jnp.minimum(1, state.step.astype(state.dtype) / state.warmup)
        weighted = state.replace(beta=rise * state.beta)
    gradients = partial(_gradients, weighted)
    gradient, batch = sum_over_shards(gradients, state.params, (images, eps, valid), state.shards)
    learning_rate = state.learning_rate
    if state.schedule is not None:
        learning_rate *= state.schedule.factor(state.step.astype(learning_rate.dtype))
    updates, opt_state = adam(learning_rate, *state.adam).update(gradient, state.opt_state)
    params = optax.apply_updates(state.params, updates)
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state), batch


@partial(jax.jit, donate_argnames="state")
def train_step(
    state: TrainState,
    images: UInt8[Array, "batch pixels"] | Float[Array, "batch pixels"],
    numbers: Int[Array, " batch"] | None = None,
) -> tuple[TrainState, Losses]:
    """One Adam step on one batch.

    Args:
      state: Donated: use only the returned state.
      images: Bytes, or pixels in [0, 1].
      numbers: The number of each image, on which binary pixels drawn in each step depend; by default its place.

    Returns:
      The next state, and the losses before the step, summed over the batch, in nats.
    """
    numbers = jnp.arange(len(images)) if numbers is None else numbers
    return _train_step(state, images, numbers, numbers >= 0)


@partial(jax.jit, donate_argnames="state")
def train_epoch(state: TrainState, images: Images, batches: Int[Array, "steps batch"]) -> tuple[TrainState, Losses]:
    """One Adam step on each of `batches`, as one `lax.scan`: an epoch, or any chunk of its steps.

    Args:
      state: Donated: use only the returned state.
      images: The whole training set, bytes or pixels in [0, 1]; or the images of each batch.
      batches: Numbers of the images of each batch, -1 for an empty place.

    Returns:
      The state after the last step, and the losses of each step ([steps]), summed over its batch, in nats.
    """

    def step(state, batch):
        rows, numbers = _rows(images, batch, state.shards)
        return _train_step(state, rows, numbers, numbers >= 0)

    return jax.lax.scan(step, state, (batches, images if images.ndim == 3 else None))


@jax.jit
def eval_epoch(
    state: TrainState, images: Images, batches: Int[Array, "steps batch"], first: Int[Array, ""] | int = 0
) -> Losses:
    """The losses of each batch ([steps]), summed over its images, in nats; one draw of z an image, always the same.

    Args:
      state: Its parameters, and how batches are cut.
      images: The whole test set, bytes or pixels in [0, 1]; or the images of each batch.
      batches: Numbers of the images of each batch, -1 for an empty place.
      first: The number of the first of these batches, on which the draws depend.
    """
    latent = latent_dim(state.model, state.params, images.shape[-1])

    def step(number, batch):
        rows, numbers = _rows(images, batch, state.shards)
        key = jax.random.fold_in(jax.random.fold_in(state.key, TEST_NOISE), number)
        eps = local(jax.random.normal(key, (batches.shape[1], latent), state.dtype), state.shards)
        summed = partial(_summed_losses, state)
        return number + 1, sum_over_shards(summed, state.params, (rows, eps, numbers >= 0), state.shards)

    return jax.lax.scan(step, jnp.int32(first), (batches, images if images.ndim == 3 else None))[1]


def _rows(images, batch, shards: Shards):
    """This device's images of a batch, and their numbers; -1 reads the last image, which is then left out."""
    numbers, rows = batch
    numbers = local(numbers, shards)
    return images[numbers] if rows is None else rows, numbers
