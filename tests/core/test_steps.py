import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vae_jax import (
    VAE,
    InputError,
    TrainConfig,
    adam,
    create_state,
    draw_eps,
    eval_epoch,
    losses,
    shuffled_batches,
    split_batches,
    train_epoch,
    train_step,
)

CONFIG = TrainConfig(hidden_dim=16, latent_dim=3, seed=4)
PIXELS = 30


@pytest.fixture
def images():
    return jax.random.bits(jax.random.key(9), (50, PIXELS), jnp.uint8)


def assert_trees_close(found, expected, rtol=1e-5, atol=1e-6):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def test_an_epoch_holds_every_image_once():
    key = jax.random.key(0)
    first, second = (np.asarray(shuffled_batches(key, epoch, 50, 8)) for epoch in (1, 2))
    for batches in (first, second):
        assert batches.shape == (7, 8)
        assert sorted(batches.ravel()) == [-1] * 6 + list(range(50))
        assert (batches[-1, 2:] == -1).all()
    assert (first != second).any()
    assert (np.asarray(shuffled_batches(key, 1, 50, 8)) == first).all()
    assert (np.asarray(shuffled_batches(jax.random.key(1), 1, 50, 8)) != first).any()
    assert not (np.diff(first.ravel()[:50]) == 1).all()


def test_split_batches_without_a_rest():
    np.testing.assert_array_equal(split_batches(jnp.arange(6), 3), [[0, 1, 2], [3, 4, 5]])


def test_eps_is_standard_normal_and_fresh():
    key = jax.random.key(0)
    eps = np.concatenate([np.ravel(draw_eps(key, step, (128, 20))) for step in range(50)])
    assert abs(eps.mean()) < 5 / np.sqrt(eps.size)
    assert eps.std() == pytest.approx(1, abs=5 / np.sqrt(2 * eps.size))
    assert len(np.unique(eps)) > 0.99 * eps.size


def test_train_epoch_is_train_step_over_its_batches(images):
    batches = shuffled_batches(jax.random.key(4), 1, 50, 8)
    by_epoch, sums = train_epoch(create_state(CONFIG, PIXELS), images, batches)
    state = create_state(CONFIG, PIXELS)
    for number, numbers in enumerate(np.asarray(batches)[:-1]):
        state, batch = train_step(state, images[numbers])
        assert_trees_close(jax.tree.map(lambda part, n=number: part[n], sums), batch)
    # The last batch has 2 images: the 6 places that fill it up must not count.
    eps = draw_eps(state.key, state.step, (8, 3))[:2]
    pixels = images[np.asarray(batches)[-1, :2]].astype(jnp.float32) / 255

    def total(params):
        return jnp.sum(losses(VAE(16, 3, PIXELS).apply({"params": params}, pixels, eps), pixels).loss)

    loss, gradients = jax.value_and_grad(total)(state.params)
    updates, _ = adam(state.learning_rate).update(gradients, state.opt_state)
    assert float(sums.loss[-1]) == pytest.approx(float(loss), rel=1e-5)
    assert_trees_close(by_epoch.params, jax.tree.map(jnp.add, state.params, updates))
    assert by_epoch.step == 7


def test_stretches_of_an_epoch_make_the_epoch(images):
    batches = shuffled_batches(jax.random.key(4), 1, 50, 8)
    whole, _ = train_epoch(create_state(CONFIG, PIXELS), images, batches)
    state, _ = train_epoch(create_state(CONFIG, PIXELS), images, batches[:4])
    state, _ = train_epoch(state, images, batches[4:])
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_sum_over_the_batch_is_differentiated(images):
    # Two copies of a batch double the gradient of a sum; that of a mean would stay.
    def first_moment(batch):
        state = create_state(CONFIG, PIXELS)
        # Without noise, so that both copies have the same gradient.
        params = jax.tree.map(jnp.array, state.params)
        params["encoder"]["fc2_logvar"]["bias"] -= 100
        state, _ = train_step(state.replace(params=params), batch)
        return state.opt_state.mu["decoder"]

    once = first_moment(images[:8])
    twice = first_moment(jnp.concatenate([images[:8], images[:8]]))
    assert_trees_close(twice, jax.tree.map(lambda leaf: 2 * leaf, once), rtol=1e-4, atol=1e-5)


def test_beta_weighs_the_divergence(images):
    for beta in (0.0, 2.5):
        state = create_state(TrainConfig(hidden_dim=16, latent_dim=3, beta=beta), PIXELS)
        _, batch = train_step(state, images)
        assert float(batch.loss) == pytest.approx(float(batch.bce + beta * batch.kld), rel=1e-6)


def test_the_state_is_donated(images):
    state = create_state(CONFIG, PIXELS)
    old = state.params["decoder"]["fc2"]["kernel"]
    train_step(state, images)
    assert old.is_deleted()


def test_eval_epoch(images):
    state = create_state(CONFIG, PIXELS)
    # Without noise the losses do not depend on the batches.
    state.params["encoder"]["fc2_logvar"]["bias"] -= 100
    sums = eval_epoch(state, images, split_batches(jnp.arange(50), 8))
    assert sums.loss.shape == (7,)
    pixels = images.astype(jnp.float32) / 255
    direct = losses(state.model.apply({"params": state.params}, pixels, jnp.zeros((50, 3))), pixels)
    assert_trees_close(jax.tree.map(jnp.sum, sums), jax.tree.map(jnp.sum, direct))


def test_many_models_at_once(images):
    # The state is a plain pytree: models of several seeds, rates and betas are trained side by side by vmap alone.
    batches = split_batches(jnp.arange(50), 10)
    settings = [{"seed": 4}, {"seed": 5, "beta": 2.0}, {"seed": 4, "learning_rate": 1e-2}]
    states = [create_state(TrainConfig(hidden_dim=16, latent_dim=3, **setting), PIXELS) for setting in settings]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    together, _ = jax.vmap(train_epoch, in_axes=(0, None, None))(stacked, images, batches)
    for number, state in enumerate(states):
        alone, _ = train_epoch(state, images, batches)
        assert_trees_close(jax.tree.map(lambda leaf, n=number: leaf[n], together.params), alone.params, atol=1e-5)


def test_one_compiled_step_serves_every_rate_and_beta(images):
    settings = [{}, {"beta": 0.5}, {"learning_rate": 0.1}, {"seed": 9}]
    states = [create_state(TrainConfig(hidden_dim=16, latent_dim=3, **setting), PIXELS) for setting in settings]
    lowered = {train_step.lower(state, images).as_text() for state in states}
    assert len(lowered) == 1


SCHEDULES = {  # of a run of 2 epochs of 50 images in batches of 2
    "constant": optax.constant_schedule(1.0),
    "warmup-cosine": optax.warmup_cosine_decay_schedule(0.0, 1.0, 2, 50),
}


@pytest.mark.parametrize("kind", SCHEDULES)
def test_each_step_has_the_rate_of_its_schedule(kind, images):
    settings = {"hidden_dim": 16, "latent_dim": 3, "batch_size": 2, "epochs": 2, "learning_rate": 0.01}
    state = create_state(TrainConfig(learning_rate_schedule=kind, **settings), PIXELS, images=50)
    by_hand = create_state(TrainConfig(**settings), PIXELS)
    batches = jnp.concatenate([shuffled_batches(state.key, epoch, 50, 2) for epoch in (1, 2)])
    rate = by_hand.learning_rate
    state, _ = train_epoch(state, images, batches[:30])
    state, _ = train_epoch(state, images, batches[30:])
    for step, numbers in enumerate(batches):
        # A step donates its state: the rate needs an array of its own each time.
        by_hand = by_hand.replace(learning_rate=rate * jnp.float32(SCHEDULES[kind](step)))
        by_hand, _ = train_step(by_hand, images[numbers])
    assert_trees_close(state.params, by_hand.params, rtol=1e-4, atol=1e-5)


def test_states_of_one_schedule_share_a_program_and_are_stacked(images):
    settings = [{"learning_rate": 0.01}, {"learning_rate": 0.1, "seed": 9}]
    config = TrainConfig(hidden_dim=16, latent_dim=3, learning_rate_schedule="cosine", epochs=1, batch_size=10)
    states = [create_state(dataclasses.replace(config, **setting), PIXELS, images=50) for setting in settings]
    assert len({train_step.lower(state, images).as_text() for state in states}) == 1
    batches = split_batches(jnp.arange(50), 10)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    together, _ = jax.vmap(train_epoch, in_axes=(0, None, None))(stacked, images, batches)
    for number, state in enumerate(states):
        alone, _ = train_epoch(state, images, batches)
        assert_trees_close(jax.tree.map(lambda leaf, n=number: leaf[n], together.params), alone.params, atol=1e-4)


def test_a_schedule_needs_the_number_of_images():
    with pytest.raises(InputError, match="--learning-rate-schedule cosine: depends on the steps of an epoch"):
        create_state(TrainConfig(learning_rate_schedule="cosine"))


def test_a_module_of_your_own_takes_the_same_way(images):
    class Own(nn.Module):
        def setup(self):
            self.down, self.up = nn.Dense(6), nn.Dense(PIXELS)

        def encode(self, images):
            return jnp.split(self.down(images), 2, axis=-1)

        def decode(self, z):
            return self.up(z)

    state = create_state(CONFIG, PIXELS, Own())
    batches = split_batches(jnp.arange(50), 10)
    state, first = train_epoch(state, images, batches)
    for _ in range(20):
        state, last = train_epoch(state, images, batches)
    assert float(last.loss.sum()) < float(first.loss.sum())
    assert eval_epoch(state, images, batches).loss.shape == (5,)


def test_floats_up_to_255_have_no_plausible_loss(images):
    bright, batches = images.astype(jnp.float32), split_batches(jnp.arange(50), 20)
    state = create_state(CONFIG, PIXELS)
    assert np.isnan(eval_epoch(state, bright, batches).loss).all()
    assert np.isnan(train_epoch(state, bright, batches)[1].loss).all()
