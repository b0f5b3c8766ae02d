import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vae_jax import InputError, TrainConfig, create_state
from vae_jax.core import steps
from vae_jax.core.mesh import Mesh, Shards, sum_over_shards


def squares(params, rows, weights):
    return {"squares": jnp.sum(params * rows**2, axis=0), "weight": jnp.sum(weights)}


@pytest.mark.parametrize("total", [1, 2, 3, 4, 5, 6, 7, 8, 12, 13])
def test_the_sum_over_shards_is_that_over_the_batch(total):
    rng = np.random.default_rng(total)
    rows, weights = rng.normal(size=(2 * total, 3)), rng.integers(0, 9, 2 * total)
    cut = jax.jit(lambda *rows: sum_over_shards(squares, jnp.float32(2), rows, Shards(total)))
    found = cut(jnp.asarray(rows, jnp.float32), jnp.asarray(weights, jnp.int32))
    np.testing.assert_allclose(found["squares"], 2 * (rows**2).sum(axis=0), rtol=1e-6)
    assert found["weight"] == weights.sum()


# Powers of two around 2^24, where float32 has no odd numbers: only this order of additions gives this sum.
@pytest.mark.parametrize(
    ("shards", "expected"),
    [
        ([2**24, 1], 2**24),
        ([1, 1, 2**24], 2**24 + 2),
        ([2**24, 1, 1], 2**24),
        ([2**24, 1, 1, 1], 2**24 + 2),
        ([1, 1, 1, 2**24], 2**24 + 2),
        ([2**24, 1, 1, 1, 1], 2**24 + 4),
        ([1, 1, 1, 1, 2**24], 2**24 + 4),
        ([2**24, 1, 1, 1, 1, 1], 2**24 + 4),
        ([2**24, 1, 1, 1, 1, 1, 1], 2**24 + 4),
        ([2**24, 1, 1, 1, 1, 1, 1, 1], 2**24 + 6),
    ],
)
def test_shards_are_added_in_pairs(shards, expected):
    rows = (jnp.asarray(shards, jnp.float32),)
    found = jax.jit(lambda *rows: sum_over_shards(lambda _, row: row.sum(), (), rows, Shards(len(shards))))(*rows)
    assert found == expected


def test_one_shard_is_the_plain_function():
    arguments = jnp.float32(2), jnp.ones((6, 3)), jnp.ones(6)
    plain = jax.make_jaxpr(squares)(*arguments)
    cut = jax.make_jaxpr(lambda params, *rows: sum_over_shards(squares, params, rows, Shards()))(*arguments)
    assert str(cut) == str(plain)


def test_shards_change_rounding_only():
    images = jax.random.bits(jax.random.key(9), (48, 30), jnp.uint8)
    batches = steps.split_batches(jnp.arange(44), 12)
    found = []
    for shards in (1, 3, 4):
        state = create_state(TrainConfig(hidden_dim=16, latent_dim=3, batch_size=12, shards=shards), 30)
        assert state.shards == Shards(shards)
        tested = steps.eval_epoch(state, images, batches)
        state, losses = steps.train_epoch(state, images, batches)
        found.append(jax.tree.leaves((state.params, losses, tested)))
    for other in found[1:]:
        for leaf, first in zip(other, found[0], strict=True):
            np.testing.assert_allclose(leaf, first, rtol=1e-4, atol=1e-5)
    assert any((leaf != first).any() for leaf, first in zip(found[1], found[0], strict=True))


@pytest.mark.parametrize(("shards", "devices"), [(4, 3), (4, 2), (1, 2), (3, 6)])
def test_devices_that_are_not_there_or_cannot_share_the_shards(shards, devices):
    with pytest.raises(InputError, match=f"^--shards {shards} and --devices {devices}: 1 device cannot share them"):
        Mesh(shards, devices)


@pytest.mark.parametrize("devices", [None, 1, "all"])
def test_a_mesh_of_one_device(devices):
    mesh = Mesh(4, devices)
    assert mesh.shards == Shards(4, 1)
    assert str(mesh) == jax.devices()[0].device_kind
    rows = np.arange(6.0, dtype=np.float32).reshape(3, 2)
    for placed in (mesh.replicate({"rows": rows})["rows"], mesh.split(rows, 1)):
        np.testing.assert_array_equal(placed, rows)
    np.testing.assert_array_equal(mesh.gather(rows), rows[None])
