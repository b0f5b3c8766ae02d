"""JAX's global settings: a run makes the same model under each, or refuses it in one line before any work."""

import os
import subprocess

import pytest

from tests.runs.small_runs import ROOT, process, require_same

SETTINGS = [
    {"JAX_ENABLE_X64": "1"}, {"JAX_DISABLE_JIT": "1"}, {"JAX_DEFAULT_PRNG_IMPL": "rbg"},
    {"JAX_THREEFRY_PARTITIONABLE": "0"}, {"JAX_DEBUG_NANS": "1"}, {"JAX_NUMPY_DTYPE_PROMOTION": "strict"},
    {"JAX_NUMPY_RANK_PROMOTION": "raise"}, {"JAX_DEFAULT_MATMUL_PRECISION": "bfloat16"},
    {"JAX_CHECK_TRACER_LEAKS": "1"},
]  # fmt: skip


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_the_same_model_under_every_setting(setting, tmp_path, options, undisturbed):
    config = options(tmp_path, checkpoint_every=60.0)
    result = subprocess.run(process(config), cwd=ROOT, env=os.environ | setting, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    require_same(config, undisturbed)


@pytest.mark.parametrize("platform", ["cuda", "nonsense"])
def test_a_platform_that_is_not_there(platform, tmp_path, options):
    environment = os.environ | {"JAX_PLATFORMS": platform}
    result = subprocess.run(process(options(tmp_path)), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    error = result.stderr.splitlines()[-1]
    assert error.startswith(f"error: JAX_PLATFORMS={platform}: jax finds no such device ") and "Traceback" not in error
    assert not list(tmp_path.iterdir())
