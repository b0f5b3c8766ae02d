"""Training epochs on the JAX side. Each function prepares a `Runner`; its run is one epoch, or a share of one."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState as FlaxTrainState

from benchmarks.turns import Runner, Setting
from vae_jax import TrainConfig, create_state, load, shuffled_batches, train_epoch
from vae_jax.model import VAE, Decoder, Encoder
from vae_jax.train import stretch_steps

# Without a jit, one step takes as long as twenty: so many of an epoch's are run.
EAGER_STEPS = 20


def images(count: int) -> np.ndarray:
    """The first training images as bytes, [count, 784]."""
    return load().train_images[:count].reshape(-1, 784)


def tiled(count: int) -> jax.Array:
    """So many training images on the device, [count, 784]: all of them again and again."""
    mnist = jnp.asarray(images(60000))
    # On the device and in one piece: a second copy, of the host's or of an index out of range, would be the peak.
    return jax.jit(lambda mnist: mnist.at[jnp.arange(count) % len(mnist)].get(mode="promise_in_bounds"))(mnist)


def ours(setting: Setting) -> Runner:
    """What `vae_jax.fit` does for an epoch, in the same stretches, compiled ahead as there."""
    config = TrainConfig(batch_size=setting.batch_size, hidden_dim=setting.hidden_dim, latent_dim=setting.latent_dim)
    train_images = tiled(setting.images)
    state = create_state(config, 784)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    stretches = stretch_steps(math.ceil(setting.images / setting.batch_size), 6 * setting.batch_size * parameters)
    train = {
        length: train_epoch.lower(
            state, train_images, jax.ShapeDtypeStruct((length, setting.batch_size), jnp.int32)
        ).compile()
        for length in {len(stretch) for stretch in stretches}
    }
    epoch = 0
    shuffled_batches(state.key, epoch, setting.images, setting.batch_size).block_until_ready()

    def run() -> float:
        nonlocal state, epoch
        epoch += 1
        batches = shuffled_batches(state.key, epoch, setting.images, setting.batch_size)
        sums = []
        for stretch in stretches:
            state, losses = train[len(stretch)](state, train_images, batches[stretch.start : stretch.stop])
            sums.append(losses.loss)
        return float(np.concatenate(jax.device_get(sums)).sum()) / setting.images

    return Runner(run)


def _flax_state(setting: Setting) -> FlaxTrainState:
    model = VAE(setting.hidden_dim, setting.latent_dim, 784)
    params = model.init(jax.random.key(0), jnp.zeros((1, 784)), jnp.zeros((1, setting.latent_dim)))["params"]
    return FlaxTrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(1e-3))


def _flax_step(state: FlaxTrainState, pixels: jax.Array, key: jax.Array) -> tuple[FlaxTrainState, jax.Array]:
    """A step as Flax's own examples write it, with the losses that optax offers."""
    latent_dim = len(state.params["encoder"]["fc2_mu"]["bias"])
    eps = jax.random.normal(jax.random.fold_in(key, state.step), (len(pixels), latent_dim))

    def objective(params):
        output = state.apply_fn({"params": params}, pixels, eps)
        bce = jnp.sum(optax.sigmoid_binary_cross_entropy(output.logits, pixels))
        kld = -0.5 * jnp.sum(1 + output.logvar - output.mu**2 - jnp.exp(output.logvar))
        return bce + kld

    loss, gradients = jax.value_and_grad(objective)(state.params)
    return state.apply_gradients(grads=gradients), loss


def _flax_loop(setting: Setting, step, steps: int) -> Runner:
    """Batches are drawn, gathered and scaled by NumPy on the host, as an input pipeline would."""
    pixels = images(setting.images)
    rng = np.random.default_rng(0)
    key = jax.random.key(1)
    state = _flax_state(setting)

    def run() -> float:
        nonlocal state
        order = rng.permutation(setting.images)
        losses = []
        for number in range(steps):
            numbers = order[number * setting.batch_size : (number + 1) * setting.batch_size]
            batch = jnp.asarray(pixels[numbers].astype(np.float32) / 255)
            state, loss = step(state, batch, key)
            losses.append(loss)
        jax.block_until_ready(state.params)
        return float(np.sum(jax.device_get(losses))) / min(setting.images, steps * setting.batch_size)

    return Runner(run, min(1.0, steps * setting.batch_size / setting.images))


def _steps(setting: Setting) -> int:
    return math.ceil(setting.images / setting.batch_size)


def flax_per_step(setting: Setting) -> Runner:
    """A jitted step, a Python loop, a host-side pipeline: what most people write."""
    return _flax_loop(setting, jax.jit(_flax_step, donate_argnums=0), _steps(setting))


def flax_eager(setting: Setting) -> Runner:
    """Stands in for google/flax's examples/vae, whose step is not jitted either."""
    return _flax_loop(setting, _flax_step, min(EAGER_STEPS, _steps(setting)))


def numpyro_svi(setting: Setting) -> Runner:
    """NumPyro's stochastic variational inference, its updates in a `fori_loop` as in its VAE example."""
    import numpyro  # pyright: ignore[reportMissingImports]
    import numpyro.distributions as dist  # pyright: ignore[reportMissingImports]
    from numpyro.contrib.module import flax_module  # pyright: ignore[reportMissingImports]
    from numpyro.infer import SVI, Trace_ELBO  # pyright: ignore[reportMissingImports]

    class Posterior(nn.Module):
        """NumPyro hands a module its input only."""

        @nn.compact
        def __call__(self, pixels):
            return Encoder(setting.hidden_dim, setting.latent_dim)(pixels)

    def model(batch):
        decode = flax_module("decoder", Decoder(setting.hidden_dim, 784), input_shape=(1, setting.latent_dim))
        with numpyro.plate("batch", len(batch)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(setting.latent_dim), 1).to_event(1))
            # Its Bernoulli gives grey pixels a probability of 0; a factor is the documented loss.
            numpyro.factor("pixels", -jnp.sum(optax.sigmoid_binary_cross_entropy(decode(z), batch), axis=-1))

    def guide(batch):
        encode = flax_module("encoder", Posterior(), input_shape=(1, 784))
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
