"""Every jitted function of the package can be made into a program for a GPU and a TPU, whatever this machine has."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from tests.core.untrained import init
from vae_jax import VAE, TrainConfig, create_state
from vae_jax.core import binarize, estimate, model, steps
from vae_jax.core.mesh import AXIS, Shards
from vae_jax.core.optimizer import Schedule

PIXELS, IMAGES, STEPS, BATCH, SAMPLES, DEVICES = 30, 40, 3, 8, 5, 4
KEY = jax.random.key(0)
MODEL = VAE(8, 3, PIXELS)
PARAMS = init(MODEL)
SET = jnp.zeros((IMAGES, PIXELS), jnp.uint8)
BATCHES = jnp.zeros((STEPS, BATCH), jnp.int32)
GREY = SET.astype(jnp.float32)
EACH = jnp.zeros((STEPS, BATCH, PIXELS), jnp.uint8)
STATE = create_state(TrainConfig(hidden_dim=8, latent_dim=3, batch_size=BATCH), PIXELS)
DYNAMIC, CUT = STATE.replace(dynamic=True), STATE.replace(dynamic=True, shards=Shards(DEVICES))
SCHEDULED = STATE.replace(schedule=Schedule("warmup-cosine", 100))


def lower(program, *arguments) -> str:
    """The program for both, as text."""
    return program.trace(*arguments).lower(lowering_platforms=("cuda", "tpu")).as_text()


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        (steps.shuffled_batches, (KEY, 1, IMAGES, BATCH)),
        (steps.train_step, (STATE, SET)),
        (steps.train_step, (DYNAMIC, SET, jnp.arange(IMAGES))),
        (steps.train_epoch, (STATE, SET, BATCHES)),
        (steps.train_epoch, (STATE, GREY, BATCHES)),
        (steps.train_epoch, (SCHEDULED, SET, BATCHES)),
        (steps.train_epoch, (CUT, SET, BATCHES)),
        (steps.train_epoch, (DYNAMIC, EACH, BATCHES)),
        (steps.train_epoch, (CUT, EACH, BATCHES)),
        (steps.eval_epoch, (STATE, SET, BATCHES)),
        (steps.eval_epoch, (CUT, SET, BATCHES)),
        (steps.eval_epoch, (CUT, EACH, BATCHES)),
        (estimate.bound, (MODEL, PARAMS, SET, KEY, BATCH)),
        (estimate.importance_log_px, (MODEL, PARAMS, SET, jnp.arange(9), KEY, SAMPLES, BATCH)),
        (model.encode, (MODEL, PARAMS, SET)),
        (model.decode, (MODEL, PARAMS, jnp.zeros((BATCH, 3)))),
        (binarize.draw, (SET, KEY, jnp.arange(IMAGES))),
        (binarize.draw, (GREY, KEY, jnp.arange(IMAGES))),
        (binarize.draw_set, (SET, KEY)),
        (jax.jit(lambda key: create_state(TrainConfig(hidden_dim=8, latent_dim=3), PIXELS).replace(key=key)), (KEY,)),
    ],
)
def test_one_device(program, arguments):
    assert "module @jit_" in lower(program, *arguments)


@pytest.mark.parametrize("function", [steps.train_epoch, steps.eval_epoch])
@pytest.mark.parametrize(("images", "axis"), [(SET, None), (EACH, 1)])
def test_several_devices(function, images, axis):
    everywhere = PartitionSpec()
    split = everywhere if axis is None else PartitionSpec(*[None] * axis, AXIS)
    program = jax.jit(
        jax.shard_map(
            function,
            mesh=AbstractMesh((DEVICES,), (AXIS,)),
            in_specs=(everywhere, split, everywhere),
            out_specs=everywhere,
            check_vma=False,
        )
    )
    assert "all_gather" in lower(program, CUT.replace(shards=Shards(DEVICES, DEVICES)), images, BATCHES)
