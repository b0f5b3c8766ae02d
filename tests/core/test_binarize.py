"""Binary pixels: the rules, the probabilities, and what training makes of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from torch_ref import train as torch_train
from vae_jax import TrainConfig, fit
from vae_jax.core import steps
from vae_jax.core.binarize import binarize, draw, draw_set

KEY = jax.random.key(7)
BYTES = jnp.arange(256, dtype=jnp.uint8)[None]  # every grey value once
ZERO = jnp.zeros(1, int)
CONFIG = TrainConfig(hidden_dim=8, latent_dim=2, binarize="dynamic")


@pytest.mark.parametrize("images", [BYTES, BYTES.astype(jnp.float32) / 255], ids=["bytes", "floats"])
def test_threshold_is_above_a_half(images):
    cut = binarize(images, "threshold", KEY)
    assert cut.dtype == images.dtype
    np.testing.assert_array_equal(cut == images.max(), np.arange(256)[None] > 127.5)
    np.testing.assert_array_equal(cut == 0, np.arange(256)[None] < 127.5)


def test_none_leaves_images_alone():
    assert binarize(BYTES, "none", KEY) is BYTES


@pytest.mark.parametrize("scale", [None, 255], ids=["bytes", "floats"])
def test_draw_has_the_grey_value_as_its_probability(scale):
    count = 200_000
    values = jnp.array([0, 1, 2, 100, 127, 128, 200, 254, 255], jnp.uint8)
    images = jnp.broadcast_to(values, (count, len(values)))
    images = images if scale is None else images.astype(jnp.float32) / scale
    drawn = draw(images, KEY, jnp.arange(count))
    assert drawn.dtype == images.dtype
    assert set(np.unique(drawn).tolist()) == {0, 255 if scale is None else 1}
    on = np.asarray(drawn != 0).mean(0)
    p = np.asarray(values) / 255
    assert on[0] == 0 and on[-1] == 1
    # Five standard deviations: one false alarm in 200,000 keys.
    np.testing.assert_array_less(abs(on - p), 5 * np.sqrt(p * (1 - p) / count) + 2**-16)


@pytest.mark.parametrize("draws", [lambda images, key: draw(images, key, jnp.arange(len(images))), draw_set])
def test_a_draw_turns_white_with_the_probability_of_each_byte(draws):
    count = 65536
    images = jnp.broadcast_to(BYTES, (count, 256))
    on = np.asarray(draws(images, KEY) != 0).mean(axis=0)
    p = np.arange(256) / 255
    deviations = (on - p)[1:-1] / np.sqrt(p * (1 - p) / count)[1:-1]
    assert abs(deviations).max() < 5 and 0.8 < deviations.std() < 1.2


def test_a_draw_depends_on_the_number_of_the_image_and_on_nothing_else():
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (40, 49), np.uint8))
    numbers = jnp.arange(1000, 1040)
    whole = draw(images, KEY, numbers)
    np.testing.assert_array_equal(draw(images[7:8], KEY, numbers[7:8]), whole[7:8])
    np.testing.assert_array_equal(draw(images[::-1], KEY, numbers[::-1]), whole[::-1])
    assert (draw(images, KEY, numbers + 1) != whole).mean() > 0.1


def test_draws_under_vmap_are_those_of_each_model():
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (8, 30), np.uint8))
    keys = jax.random.split(KEY, 3)
    together = jax.vmap(draw, (None, 0, None))(images, keys, jnp.arange(8))
    for key, drawn in zip(keys, together, strict=True):
        np.testing.assert_array_equal(drawn, draw(images, key, jnp.arange(8)))


def test_training_under_vmap_draws_the_pixels_of_each_model(states):
    images = jnp.tile(BYTES, (4, 1))
    batches = jnp.array([[0, 1], [2, 3]], jnp.int32)
    alone = [states["dynamic"].replace(key=key) for key in jax.random.split(KEY, 3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone)
    together = jax.vmap(steps.train_epoch, (0, None, None))(stacked, images, batches)[1].bce
    for state, bce in zip(alone, together, strict=True):
        expected = steps.train_epoch(at_step(state, 0), images, batches)[1].bce
        np.testing.assert_allclose(bce, expected, rtol=1e-5)


def test_draws_are_independent_between_pixels_images_and_keys():
    images = jnp.full((4000, 51), 127, jnp.uint8)  # an odd number of pixels: half a random word is left over
    first, second = (
        np.asarray(draw(images, key, jnp.arange(4000)) != 0).astype(float) - 0.498 for key in jax.random.split(KEY)
    )
    bound = 5 * 0.25 / np.sqrt(first.size)
    assert abs((first * second).mean()) < bound
    assert abs((first[1:] * first[:-1]).mean()) < bound
    for lag in (1, 2, 25):
        assert abs((first[:, lag:] * first[:, :-lag]).mean()) < 1.05 * bound
    for distance in (13, 26, 39):  # the four parts of a block of random bits
        assert abs((first[:, :12] * first[:, distance : distance + 12]).mean()) < 3 * bound


def test_static_is_one_draw():
    np.testing.assert_array_equal(binarize(BYTES, "static", KEY), binarize(BYTES, "static", KEY))
    np.testing.assert_array_equal(binarize(BYTES, "static", KEY), draw_set(BYTES, KEY))


@pytest.fixture(scope="module")
def states():
    return {rule: steps.create_state(dataclasses.replace(CONFIG, binarize=rule), 256) for rule in ("none", "dynamic")}


def at_step(state: steps.TrainState, step: int) -> steps.TrainState:
    """A copy to give away."""
    return jax.tree.map(jnp.copy, state).replace(step=jnp.int32(step))


def test_dynamic_training_is_training_on_a_new_draw_every_step(states):
    draws = []
    for step in (0, 1, 469):
        draws.append(draw(BYTES, jax.random.fold_in(jax.random.fold_in(states["none"].key, steps.PIXELS), step), ZERO))
        _, dynamic = steps.train_step(at_step(states["dynamic"], step), BYTES)
        _, drawn = steps.train_step(at_step(states["none"], step), draws[-1])
        _, grey = steps.train_step(at_step(states["none"], step), BYTES)
        np.testing.assert_allclose(dynamic.bce, drawn.bce, rtol=1e-6)
        assert abs(dynamic.bce - grey.bce) > 1e-3
    assert not any((draws[a] == draws[b]).all() for a, b in ((0, 1), (0, 2), (1, 2)))


def test_an_epoch_draws_as_its_steps_do(states):
    images = jnp.tile(BYTES, (2, 1))
    _, epoch = steps.train_epoch(at_step(states["dynamic"], 5), images, jnp.array([[0], [1]], jnp.int32))
    state = at_step(states["dynamic"], 5)
    for number, bce in enumerate(epoch.bce):
        state, losses = steps.train_step(state, BYTES, ZERO + number)
        np.testing.assert_allclose(losses.bce, bce, rtol=1e-5)


@pytest.mark.parametrize("rule", ["threshold", "static"])
def test_training_under_a_rule_is_training_on_images_made_binary(rule, tmp_path):
    rng = np.random.default_rng(0)
    grey = {f"{part}_images": rng.integers(0, 256, (40, 4, 4), np.uint8) for part in ("train", "test")}
    key = jax.random.key(5)
    keys = {"train_images": steps.PIXELS, "test_images": steps.TEST_PIXELS}
    binary = {
        name: np.asarray(
            binarize(jnp.asarray(grey[name].reshape(40, 16)), rule, jax.random.fold_in(key, keys[name]))
        ).reshape(40, 4, 4)
        for name in grey
    }
    histories = []
    for name, arrays, binarized in (("grey", grey, rule), ("binary", binary, "none")):
        np.savez(tmp_path / f"{name}.npz", **arrays)
        config = dataclasses.replace(
            CONFIG,
            data=str(tmp_path / f"{name}.npz"),
            binarize=binarized,
            epochs=2,
            batch_size=16,
            seed=5,
            workdir=tmp_path / name,
            export=tmp_path / f"{name}.pth",
        )
        histories.append([dataclasses.replace(metrics, seconds=0.0) for metrics in fit(config)[1]])
    assert histories[0] == histories[1]


def test_pytorch_has_the_same_rules():
    images = torch_train.to_pixels(np.asarray(BYTES))
    assert torch.equal(torch_train.binarize(images, "none"), images)
    np.testing.assert_array_equal(
        torch_train.binarize(images, "threshold").numpy(), np.asarray(binarize(BYTES, "threshold", KEY)) / 255
    )
    drawn = torch_train.binarize(images.expand(20_000, -1), "dynamic")
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert (drawn.mean(0) - images[0]).abs().max() < 0.02
