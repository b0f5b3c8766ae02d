"""JAX's global settings: a run makes the same model under each, or refuses it in one line before any work."""

import os
import subprocess

import jax
import numpy as np
import pytest

from tests.runs.small_runs import ROOT, process, require_same
from vae_jax import InputError, fit
from vae_jax.config import EncodeConfig, EvaluateConfig, ExploreConfig, Sample
from vae_jax.encode import encode
from vae_jax.evaluate import evaluate
from vae_jax.explore import explore
from vae_jax.generate import generate

# Several at once: a process of its own takes seconds.
SETTINGS = {
    "numbers": {"JAX_ENABLE_X64": "1", "JAX_DEBUG_NANS": "1", "JAX_THREEFRY_PARTITIONABLE": "0"},
    "tracing": {"JAX_DISABLE_JIT": "1"},
    "rules": {
        "JAX_DEFAULT_PRNG_IMPL": "rbg", "JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_NUMPY_RANK_PROMOTION": "raise",
        "JAX_DEFAULT_MATMUL_PRECISION": "bfloat16", "JAX_CHECK_TRACER_LEAKS": "1",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_the_same_model_under_every_setting(name, tmp_path, options, undisturbed):
    config = options(tmp_path, checkpoint_every=60.0)
    environment = os.environ | SETTINGS[name]
    result = subprocess.run(process(config), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    require_same(config, undisturbed)


# Those that a library or a notebook has set before it calls fit.
SET = {
    "jax_enable_x64": True, "jax_debug_infs": True, "jax_transfer_guard": "disallow", "jax_legacy_prng_key": "error",
}  # fmt: skip


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", SET)
def test_fit_under_a_setting_of_the_process(name, tmp_path, options, undisturbed):
    before = getattr(jax.config, name)
    jax.config.update(name, SET[name])
    try:
        fit(options(tmp_path, checkpoint_every=60.0))
        assert getattr(jax.config, name) == SET[name]
    finally:
        jax.config.update(name, before)
    require_same(options(tmp_path), undisturbed)


def test_shifted_seeds_are_refused(tmp_path, options):
    jax.config.update("jax_random_seed_offset", 5)
    try:
        with pytest.raises(InputError, match=r"^JAX_RANDOM_SEED_OFFSET=5: shifts every seed, .*; expected 0; unset it"):
            fit(options(tmp_path))
    finally:
        jax.config.update("jax_random_seed_offset", 0)
    assert not list(tmp_path.iterdir())


def test_other_commands_under_64_bits(finished, tmp_path):
    def figures(name):
        encode(EncodeConfig(finished.workdir, tmp_path / name))
        with np.load(tmp_path / name) as latents:
            arrays = {key: array.tobytes() for key, array in latents.items()}
        return evaluate(EvaluateConfig(finished.workdir, importance_samples=2, images=20)), arrays

    expected = figures("plain.npz")
    with jax.enable_x64(True):
        assert figures("set.npz") == expected


COMMANDS = [
    (evaluate, EvaluateConfig, {}),
    (generate, Sample, {"out": "x.png"}),
    (encode, EncodeConfig, {"out": "x.npz"}),
    (explore, ExploreConfig, {"out": "x.html"}),
]


@pytest.mark.parametrize(("command", "kind", "more"), COMMANDS, ids=["evaluate", "generate", "encode", "explore"])
def test_every_command_refuses_a_platform_that_is_not_there(command, kind, more, finished, monkeypatch):
    def no_devices():
        raise RuntimeError("no such backend")

    monkeypatch.setattr(jax, "devices", no_devices)
    monkeypatch.chdir(finished.workdir.parent)
    before = sorted(finished.workdir.parent.rglob("*"))
    with pytest.raises(InputError, match=r"jax finds no such device \(no such backend\); expected cpu or"):
        command(kind(model=finished.workdir, **more))
    assert sorted(finished.workdir.parent.rglob("*")) == before


@pytest.mark.parametrize("platform", ["cuda", "nonsense"])
def test_a_platform_that_is_not_there(platform, tmp_path, options):
    environment = os.environ | {"JAX_PLATFORMS": platform}
    result = subprocess.run(process(options(tmp_path)), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    error = result.stderr.splitlines()[-1]
    assert error.startswith(f"error: JAX_PLATFORMS={platform}: jax finds no such device ") and "Traceback" not in error
    assert not list(tmp_path.iterdir())
