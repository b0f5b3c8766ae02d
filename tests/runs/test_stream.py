"""Streamed images make the same model, bit for bit."""

import numpy as np
import pytest

from tests.runs.small_runs import Died, metrics
from vae_jax import fit
from vae_jax.evaluate import EvaluateConfig, evaluate
from vae_jax.runs import feed
from vae_jax.runs.checkpoint import Checkpoints

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def file(few_images, tmp_path):
    """An uncompressed file, whose last batch and chunk are not full."""
    np.savez(tmp_path / "set.npz", train_images=few_images.train_images[:550], test_images=few_images.test_images[:90])
    return tmp_path / "set.npz"


def losses(config):
    return [{name: value for name, value in line.items() if name != "seconds"} for line in metrics(config)]


@pytest.mark.parametrize(("binarize", "shards"), [("static", 1), ("dynamic", 4)])
def test_streamed_and_in_memory_are_the_same(binarize, shards, file, tmp_path, options, monkeypatch):
    common = {"data": file, "binarize": binarize, "shards": shards, "checkpoint_every": 60.0, "batch_size": 64}
    here, there = options(tmp_path / "here", **common), options(tmp_path / "there", stream="always", **common)
    fit(here)
    monkeypatch.setattr(feed, "STREAM_BYTES", 4 * 64 * 784)  # chunks of 4 steps
    fit(there)
    assert there.export.read_bytes() == here.export.read_bytes()
    assert losses(there) == losses(here)


def test_a_run_goes_on_streamed(file, tmp_path, options, monkeypatch):
    whole, cut = options(tmp_path / "whole", data=file), options(tmp_path / "cut", data=file)
    fit(whole)
    save = Checkpoints.save

    def save_and_die(checkpoints, progress):
        save(checkpoints, progress)
        if progress.state.step == 3:
            raise Died

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_and_die)
        with pytest.raises(Died):
            fit(cut)
    fit(options(tmp_path / "cut", data=file, stream="always"))
    assert cut.export.read_bytes() == whole.export.read_bytes()


def test_evaluate_takes_images_piece_by_piece(file, tmp_path, options, monkeypatch):
    config = options(tmp_path, data=file, binarize="static", checkpoint_every=60.0)
    fit(config)
    whole = evaluate(EvaluateConfig(config.workdir, importance_samples=5, batch_size=30))
    monkeypatch.setattr("vae_jax.evaluate.PIECE_BYTES", 1)
    pieces = evaluate(EvaluateConfig(config.workdir, importance_samples=5, batch_size=30, max_data_gb=1e-6))
    assert pieces.images == whole.images and pieces.active_units == whole.active_units
    for name in ("loss", "bce", "kld", "log_px", "loss_stderr", "log_px_stderr"):
        assert getattr(pieces, name) == pytest.approx(getattr(whole, name), rel=1e-5)
