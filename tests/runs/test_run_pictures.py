"""What a training run leaves to look at: pictures in its workdir, and TensorBoard events."""

import importlib.util

import numpy as np
import pytest
from PIL import Image

import torch_ref.train
import vae_jax.train
from vae_jax.config import InputError, TrainConfig

PICTURES = ["curves.png", "reconstructions.png", "samples.png"]


def options(tmp_path, **changes) -> dict:
    return {"epochs": 2, "hidden_dim": 16, "workdir": tmp_path / "run", "export": tmp_path / "vae.pth"} | changes


@pytest.mark.usefixtures("few_images")
@pytest.mark.parametrize(
    ("config_type", "fit"),
    [(TrainConfig, vae_jax.train.fit), (torch_ref.train.TorchTrainConfig, torch_ref.train.fit)],
)
def test_a_run_leaves_pictures_and_events(tmp_path, config_type, fit):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for changes in ({}, {"overwrite": True}):  # the second run's events alone are left
        _, history = fit(config_type(**options(tmp_path, pictures_every=1, tensorboard=True, **changes)))
    assert sorted(path.name for path in (tmp_path / "run").glob("*.png")) == PICTURES
    for name in PICTURES:
        with Image.open(tmp_path / "run" / name) as picture:
            assert picture.format == "PNG" and picture.width > 300

    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    names = [f"{split}/{name}" for split in ("train", "test") for name in ("loss", "bce", "kld")]
    assert sorted(events.Tags()["scalars"]) == sorted([*names, "seconds"])
    losses = [(scalar.step, scalar.value) for scalar in events.Scalars("test/loss")]
    assert losses == [(metrics.epoch, np.float32(metrics.test_loss)) for metrics in history]
    assert sorted(events.Tags()["images"]) == ["curves", "reconstructions", "samples"]
    shown = events.Images("samples")
    assert [image.step for image in shown] == [1, 2]
    with Image.open(tmp_path / "run" / "samples.png") as picture:
        assert (shown[1].width, shown[1].height) == picture.size
    hyperparameters = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"learning_rate" in hyperparameters


@pytest.mark.usefixtures("few_images")
def test_pictures_are_drawn_when_asked_for(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("vae_jax.log.RunLog.draw", lambda log, *_: drawn.append(log._history[-1].epoch))
    for every, expected in ((0, [5]), (2, [2, 4, 5])):
        drawn.clear()
        config = TrainConfig(**options(tmp_path, epochs=5, pictures_every=every, overwrite=True))
        vae_jax.train.fit(config)
        assert drawn == expected


def test_refusals(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="--pictures-every -1: expected a whole number of at least 0"):
        vae_jax.train.fit(TrainConfig(**options(tmp_path, pictures_every=-1)))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"tensorboard is not installed; pip install tensorboard"):
        vae_jax.train.fit(TrainConfig(**options(tmp_path, tensorboard=True)))
    assert not list(tmp_path.iterdir())
