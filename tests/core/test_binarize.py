"""Binary pixels: the rules, the probabilities, and what training makes of them."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from torch_ref import train as torch_train
from vae_jax import TrainConfig, fit
from vae_jax.core import steps
from vae_jax.core.binarize import binarize, draw

KEY = jax.random.key(7)
BYTES = jnp.arange(256, dtype=jnp.uint8)[None]  # every grey value once
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
    drawn = draw(images, KEY)
    assert drawn.dtype == images.dtype
    assert set(np.unique(drawn).tolist()) == {0, 255 if scale is None else 1}
    on = np.asarray(drawn != 0).mean(0)
    p = np.asarray(values) / 255
    assert on[0] == 0 and on[-1] == 1
    # Five standard deviations: one false alarm in 200,000 keys.
    np.testing.assert_array_less(abs(on - p), 5 * np.sqrt(p * (1 - p) / count) + 2**-16)


@pytest.mark.parametrize("scale", [None, 255], ids=["bytes", "floats"])
def test_draw_is_exact_to_16_bits(scale, monkeypatch):
    """With each of the 65,536 random halves once, as many are on as the probability says, to half a one."""
    halves = jnp.arange(65536, dtype=jnp.uint32)
    for value in (0, 1, 77, 128, 254, 255):
        # Words whose low and high halves run through all values.
        monkeypatch.setattr(
            jax.lax, "rng_bit_generator", lambda *_, **__: (None, halves[:32768] | halves[32768:] << 16)
        )
        images = jnp.full((256, 256), value, jnp.uint8)
        images = images if scale is None else images.astype(jnp.float32) / scale
        on = int((inspect.unwrap(draw)(images, KEY) != 0).sum())
        assert abs(on - 65536 * value / 255) <= 0.5


def test_draws_are_independent_between_pixels_images_and_keys():
    images = jnp.full((4000, 51), 127, jnp.uint8)  # an odd number of pixels: half a random word is left over
    first, second = (np.asarray(draw(images, key) != 0).astype(float) - 0.498 for key in jax.random.split(KEY))
    bound = 5 * 0.25 / np.sqrt(first.size)
    assert abs((first * second).mean()) < bound
    assert abs((first[1:] * first[:-1]).mean()) < bound
    for lag in (1, 2, 25):
        assert abs((first[:, lag:] * first[:, :-lag]).mean()) < 1.05 * bound
    half = first.size // 2  # the two halves of a word
    assert abs((first.ravel()[:half] * first.ravel()[half:]).mean()) < 1.5 * bound


def test_static_is_one_draw():
    np.testing.assert_array_equal(binarize(BYTES, "static", KEY), binarize(BYTES, "static", KEY))
    np.testing.assert_array_equal(binarize(BYTES, "static", KEY), draw(BYTES, KEY))


@pytest.fixture(scope="module")
def states():
    return {rule: steps.create_state(dataclasses.replace(CONFIG, binarize=rule), 256) for rule in ("none", "dynamic")}


def at_step(state: steps.TrainState, step: int) -> steps.TrainState:
    """A copy to give away."""
    return jax.tree.map(jnp.copy, state).replace(step=jnp.int32(step))


def test_dynamic_training_is_training_on_a_new_draw_every_step(states):
    draws = []
    for step in (0, 1, 469):
        draws.append(draw(BYTES, jax.random.fold_in(jax.random.fold_in(states["none"].key, steps.PIXELS), step)))
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
    for bce in epoch.bce:
        state, losses = steps.train_step(state, BYTES)
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
