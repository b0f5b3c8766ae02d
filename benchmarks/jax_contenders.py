"""Training epochs in JAX. Each function prepares a `Runner`, whose run is an epoch or a part of it."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState as FlaxTrainState

from benchmarks.published import PublishedConfig, burda2015
from benchmarks.turns import Runner, Setting
from vae_jax import TrainConfig, create_state, load, shuffled_batches, train_epoch
from vae_jax.runs.feed import chunk_steps, step_flops

# A step without jit takes more than ten times as long, so that loop runs only so many steps of an epoch.
EAGER_STEPS = 20


def images(count: int) -> np.ndarray:
    """The first training images as bytes, [count, 784]."""
    return load().train_images[:count].reshape(-1, 784)


def tiled(count: int) -> jax.Array:
    """`count` images on the device, [count, 784]: the training images, repeated as often as needed."""
    mnist = jnp.asarray(images(60000))
    # A copy from the host, or a check of the indices, would need the memory of all these images twice.
    return jax.jit(lambda mnist: mnist.at[jnp.arange(count) % len(mnist)].get(mode="promise_in_bounds"))(mnist)


def ours(setting: Setting) -> Runner:
    """An epoch as in `vae_jax.fit`: in the same chunks, compiled ahead."""
    config = TrainConfig(batch_size=setting.batch_size, hidden_dim=setting.hidden_dim, latent_dim=setting.latent_dim)
    train_images = tiled(setting.images)
    state = create_state(config)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    chunks = chunk_steps(_steps(setting), step_flops(setting.batch_size, parameters))
    train = {
        length: train_epoch.lower(
            state, train_images, jax.ShapeDtypeStruct((length, setting.batch_size), jnp.int32)
        ).compile()
        for length in {len(chunk) for chunk in chunks}
    }
    epoch = 0
    shuffled_batches(state.key, epoch, setting.images, setting.batch_size).block_until_ready()

    def run() -> float:
        nonlocal state, epoch
        epoch += 1
        batches = shuffled_batches(state.key, epoch, setting.images, setting.batch_size)
        sums = []
        for chunk in chunks:
            state, losses = train[len(chunk)](state, train_images, batches[chunk.start : chunk.stop])
            sums.append(losses.loss)
        return float(np.concatenate(jax.device_get(sums)).sum()) / setting.images

    return Runner(run)


def iwae(setting: Setting) -> Runner:
    """An epoch of a model of Burda et al. 2015, as `python -m benchmarks published` trains it."""
    config = burda2015(PublishedConfig("burda2015"), "iwae-1", seed=0).config
    config = dataclasses.replace(config, batch_size=setting.batch_size, training_samples=setting.samples)
    train_images = tiled(setting.images)
    state, epoch = create_state(config, images=setting.images), 0

    def run() -> float:
        nonlocal state, epoch
        epoch += 1
        batches = shuffled_batches(state.key, epoch, setting.images, setting.batch_size)
        state, losses = train_epoch(state, train_images, batches)
        return float(jax.device_get(losses.loss).sum()) / setting.images

    return Runner(run)


def stacked(setting: Setting) -> Runner:
    """An epoch of several models that differ in their seeds, as a sweep stacks them; of one, as it is."""
    if setting.models == 1:
        return ours(setting)
    train_images = tiled(setting.images)
    states = [create_state(TrainConfig(batch_size=setting.batch_size, seed=seed)) for seed in range(setting.models)]
    state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    shuffle = functools.partial(shuffled_batches, images=setting.images, batch_size=setting.batch_size)
    shuffle = jax.jit(jax.vmap(shuffle, (0, None)))
    train = jax.jit(jax.vmap(train_epoch, (0, None, 0)), donate_argnums=0)
    keys, epoch = jnp.copy(state.key), 0  # a step donates those of the state

    def run() -> float:
        nonlocal state, epoch
        epoch += 1
        state, losses = train(state, train_images, shuffle(keys, epoch))
        return float(jax.device_get(losses.loss).sum()) / setting.images / setting.models

    return Runner(run)


class DenseEncoder(nn.Module):
    """The encoder of Flax's VAE example, made of `nn.Dense` layers."""

    hidden_dim: int
    latent_dim: int

    @nn.compact
    def __call__(self, pixels):
        h = nn.relu(nn.Dense(self.hidden_dim)(pixels))
        return nn.Dense(self.latent_dim)(h), nn.Dense(self.latent_dim)(h)


class DenseDecoder(nn.Module):
    """The decoder of Flax's VAE example."""

    hidden_dim: int
    pixels: int = 784

    @nn.compact
    def __call__(self, z):
        return nn.Dense(self.pixels)(nn.relu(nn.Dense(self.hidden_dim)(z)))


class DenseVAE(nn.Module):
    """The VAE of Flax's example, which draws its own noise."""

    hidden_dim: int
    latent_dim: int

    @nn.compact
    def __call__(self, pixels, key):
        mu, logvar = DenseEncoder(self.hidden_dim, self.latent_dim)(pixels)
        z = mu + jnp.exp(0.5 * logvar) * jax.random.normal(key, mu.shape)
        return DenseDecoder(self.hidden_dim)(z), mu, logvar


@jax.vmap
def _dense_loss(logits, pixels, mu, logvar):
    """The loss of an image, computed as in Flax's VAE example."""
    log_p = nn.log_sigmoid(logits)
    log_not_p = jnp.log(-jnp.expm1(log_p))
    bce = -jnp.sum(pixels * log_p + (1 - pixels) * log_not_p)
    return bce - 0.5 * jnp.sum(1 + logvar - jnp.square(mu) - jnp.exp(logvar))


def _flax_state(setting: Setting) -> FlaxTrainState:
    model = DenseVAE(setting.hidden_dim, setting.latent_dim)
    params = model.init(jax.random.key(0), jnp.zeros((1, 784)), jax.random.key(0))["params"]
    return FlaxTrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(1e-3))


def _flax_step(state: FlaxTrainState, pixels: jax.Array, key: jax.Array) -> tuple[FlaxTrainState, jax.Array]:
    """An optimizer step as in Flax's own examples."""

    def objective(params):
        logits, mu, logvar = state.apply_fn({"params": params}, pixels, key)
        return jnp.sum(_dense_loss(logits, pixels, mu, logvar))

    loss, gradients = jax.value_and_grad(objective)(state.params)
    return state.apply_gradients(grads=gradients), loss


def _flax_loop(setting: Setting, step, steps: int) -> Runner:
    """An epoch whose batches NumPy draws, gathers and scales on the host, as an input pipeline would."""
    pixels = images(setting.images)
    rng = np.random.default_rng(0)
    key = jax.random.key(1)
    state = _flax_state(setting)

    def run() -> float:
        nonlocal state, key
        order = rng.permutation(setting.images)
        losses = []
        for number in range(steps):
            numbers = order[number * setting.batch_size : (number + 1) * setting.batch_size]
            batch = jnp.asarray(pixels[numbers].astype(np.float32) / 255)
            key, step_key = jax.random.split(key)
            state, loss = step(state, batch, step_key)
            losses.append(loss)
        jax.block_until_ready(state.params)
        return float(np.sum(jax.device_get(losses))) / min(setting.images, steps * setting.batch_size)

    return Runner(run, min(1.0, steps * setting.batch_size / setting.images))


def _steps(setting: Setting) -> int:
    return math.ceil(setting.images / setting.batch_size)


def flax_per_step(setting: Setting) -> Runner:
    """A jitted step, a Python loop and a host-side pipeline, as most people write it."""
    return _flax_loop(setting, jax.jit(_flax_step, donate_argnums=0), _steps(setting))


def flax_eager(setting: Setting) -> Runner:
    """The same without jit, as in google/flax's examples/vae, whose step is not jitted either."""
    return _flax_loop(setting, _flax_step, min(EAGER_STEPS, _steps(setting)))


def numpyro_svi(setting: Setting) -> Runner:
    """NumPyro's stochastic variational inference, with its updates in a `fori_loop` as in its VAE example."""
    import numpyro  # pyright: ignore[reportMissingImports]
    import numpyro.distributions as dist  # pyright: ignore[reportMissingImports]
    from numpyro.contrib.module import flax_module  # pyright: ignore[reportMissingImports]
    from numpyro.infer import SVI, Trace_ELBO  # pyright: ignore[reportMissingImports]

    def model(batch):
        decode = flax_module("decoder", DenseDecoder(setting.hidden_dim), input_shape=(1, setting.latent_dim))
        with numpyro.plate("batch", len(batch)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(setting.latent_dim), 1).to_event(1))
            # NumPyro's Bernoulli gives grey pixels a probability of 0. This factor is the documented cross entropy.
            numpyro.factor("pixels", -jnp.sum(optax.sigmoid_binary_cross_entropy(decode(z), batch), axis=-1))

    def guide(batch):
        encode = flax_module("encoder", DenseEncoder(setting.hidden_dim, setting.latent_dim), input_shape=(1, 784))
        mu, logvar = encode(batch)
        with numpyro.plate("batch", len(batch)):
            numpyro.sample("z", dist.Normal(mu, jnp.exp(logvar / 2)).to_event(1))

    pixels = jnp.asarray(images(setting.images).astype(np.float32) / 255)
    svi = SVI(model, guide, numpyro.optim.Adam(1e-3), Trace_ELBO())
    state = svi.init(jax.random.key(0), pixels[: setting.batch_size])
    full, rest = divmod(setting.images, setting.batch_size)

    @functools.partial(jax.jit, donate_argnums=0)
    def epoch(state, key, pixels):
        order = jax.random.permutation(key, setting.images)

        def step(number, carry):
            state, total = carry
            start = number * setting.batch_size
            state, loss = svi.update(state, pixels[jax.lax.dynamic_slice_in_dim(order, start, setting.batch_size)])
            return state, total + loss

        state, total = jax.lax.fori_loop(0, full, step, (state, 0.0))
        if rest:
            state, loss = svi.update(state, pixels[order[-rest:]])
            total += loss
        return state, total

    key = jax.random.key(1)

    def run() -> float:
        nonlocal state, key
        key, epoch_key = jax.random.split(key)
        state, total = epoch(state, epoch_key, pixels)
        return float(total) / setting.images

    return Runner(run)
