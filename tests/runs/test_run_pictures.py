"""What a training run leaves to look at: pictures in its workdir, and TensorBoard events."""

import importlib.util

import numpy as np
import pytest
from PIL import Image

from vae_jax import InputError, fit
from vae_jax.pictures import plots
from vae_jax.runs.workdir import PICTURES


def test_a_run_leaves_pictures_and_events(tmp_path, options):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for changes in ({}, {"overwrite": True}):  # only the events of the second run are left
        config = options(tmp_path, epochs=2, checkpoint_every=60.0, pictures_every=1, tensorboard=True, **changes)
        _, history = fit(config)
    assert {path.name for path in config.workdir.glob("*.png")} == {*PICTURES}
    for name in PICTURES:
        with Image.open(config.workdir / name) as picture:
            assert picture.format == "PNG" and picture.width > 300

    assert len(list((config.workdir / "tensorboard").iterdir())) == 1
    events = EventAccumulator(str(config.workdir / "tensorboard")).Reload()
    names = [f"{split}/{name}" for split in ("train", "test") for name in ("loss", "bce", "kld")]
    assert sorted(events.Tags()["scalars"]) == sorted([*names, "seconds"])
    losses = [(scalar.step, scalar.value) for scalar in events.Scalars("test/loss")]
    assert losses == [(metrics.epoch, np.float32(metrics.test_loss)) for metrics in history]
    assert sorted(events.Tags()["images"]) == ["curves", "reconstructions", "samples"]
    shown = events.Images("samples")
    assert [image.step for image in shown] == [1, 2]
    with Image.open(config.workdir / "samples.png") as picture:
        assert (shown[1].width, shown[1].height) == picture.size
    hyperparameters = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"learning_rate" in hyperparameters


@pytest.mark.usefixtures("quick")
def test_pictures_are_drawn_when_asked_for(tmp_path, options, monkeypatch):
    drawn = []

    def curves(history):
        drawn.append(len(history))
        return np.zeros(1)

    monkeypatch.setattr(plots, "curves", curves)
    for every, expected in ((0, [5]), (2, [2, 4, 5])):
        drawn.clear()
        fit(options(tmp_path, epochs=5, checkpoint_every=60.0, pictures_every=every, overwrite=True))
        assert drawn == expected


def test_refusals(tmp_path, options, monkeypatch):
    with pytest.raises(InputError, match="--pictures-every -1: expected a whole number of at least 0"):
        fit(options(tmp_path, pictures_every=-1))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"tensorboard is not installed; pip install tensorboard"):
        fit(options(tmp_path, tensorboard=True))
    assert not list(tmp_path.iterdir())
