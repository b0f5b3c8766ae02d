"""Whatever ends a run, the same command goes on and makes the very same model."""

import json
import pkgutil
import threading

import pytest

from tests.runs.small_runs import STEPS, Died, checkpoints, metrics, require_same
from vae_jax import fit
from vae_jax.runs.checkpoint import Checkpoints

pytestmark = pytest.mark.usefixtures("quick")

# Between any two of these calls, something on the disk changes.
MOMENTS = (
    "vae_jax.runs.workdir.Workdir.sweep",
    "vae_jax.runs.workdir.Workdir.clear",
    "vae_jax.runs.workdir.Workdir.unmark_finished",
    "vae_jax.runs.logs.Logs.__init__",
    "vae_jax.runs.logs.Logs.add",
    "vae_jax.runs.checkpoint.Checkpoints.save",
    "vae_jax.pictures.run.RunPictures.draw_missing",
    "vae_jax.pictures.plots.save",
    "vae_jax.system.files.flush",
    "pathlib.Path.replace",
    "pathlib.Path.unlink",
    "torch_ref.convert.save",
)


def test_death_between_two_changes(tmp_path, options, undisturbed, monkeypatch):
    calls, last = 0, 0

    def mortal(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == last:
                raise Died
            return function(*args, **kwargs)

        return call

    for moment in MOMENTS:
        owner, name = moment.rsplit(".", 1)
        found = pkgutil.resolve_name(owner)
        monkeypatch.setattr(found, name, mortal(getattr(found, name)))
    fit(options(tmp_path / "counted"))
    assert calls > 80
    for moment in range(1, calls + 1, 23):
        config = options(tmp_path / str(moment))
        calls, last = 0, moment
        with pytest.raises(Died):
            fit(config)
        last = 0
        fit(config)
        require_same(config, undisturbed)


def test_a_finished_run(finished, undisturbed, command):
    written = [path for path in finished.workdir.parent.rglob("*") if path.suffix in (".png", ".pth")]
    before = {path: path.stat().st_mtime_ns for path in written}
    assert len(before) == 5
    code, output, _ = command(finished)
    assert code == 0
    assert output.splitlines()[-1].startswith(f"{finished.workdir}: finished after epoch 3; ")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for path in (finished.export, finished.workdir / "model.pth", finished.workdir / "samples.png"):
        path.unlink()
        assert command(finished)[0] == 0
        require_same(finished, undisturbed)


def test_more_epochs_train_on(finished, options, tmp_path, command):
    longer = {"epochs": 5, "checkpoint_every": 0.0}
    code, output, _ = command(options(tmp_path, **longer))
    assert code == 0
    assert f"{finished.workdir}: goes on after epoch 3\n" in output
    (tmp_path / "straight").mkdir()
    straight = options(tmp_path / "straight", **longer)
    fit(straight)
    assert metrics(finished) == metrics(straight)
    assert finished.export.read_bytes() == straight.export.read_bytes()
    assert json.loads((finished.workdir / "config.json").read_text())["epochs"] == 5
    code, _, error = command(options(tmp_path, epochs=4))
    assert code == 2
    assert error.startswith(f"error: --epochs 4: {finished.workdir} is after epoch 5; ")
    assert error.count("\n") == 1


def test_fewer_epochs_than_were_asked_for_before(tmp_path, options, undisturbed, monkeypatch):
    # A finished run trains on and dies: its model and pictures must not be taken for those of the last epoch.
    fit(options(tmp_path, epochs=2, checkpoint_every=0.0, pictures_every=1))
    save = Checkpoints.save

    def die(checkpoints, progress):
        save(checkpoints, progress)
        if len(progress.history) == 3:
            raise Died

    monkeypatch.setattr(Checkpoints, "save", die)
    with pytest.raises(Died):
        fit(options(tmp_path, epochs=6, checkpoint_every=0.0, pictures_every=2))
    monkeypatch.setattr(Checkpoints, "save", save)
    config = options(tmp_path, checkpoint_every=0.0)
    fit(config)
    require_same(config, undisturbed)


def test_overwrite_starts_fresh(tmp_path, options, undisturbed):
    fit(options(tmp_path, seed=1, beta=2.0))
    config = options(tmp_path, overwrite=True, checkpoint_every=60.0)
    fit(config)
    require_same(config, undisturbed)
    assert checkpoints(config) == checkpoints(undisturbed)


def test_a_loss_that_is_not_finite(tmp_path, options, command):
    config = options(tmp_path, learning_rate=1e30)
    code, _, error = command(config)
    assert code == 1
    assert error.startswith("error: epoch 1, step 2: the training loss is ")
    assert error.count("\n") == 1
    assert checkpoints(config) == [1]
    assert not config.export.exists()


def test_events_of_a_run_that_died(tmp_path, options, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = options(tmp_path, tensorboard=True, checkpoint_every=0.0)
    save, calls = Checkpoints.save, 0

    def die(*args):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise Died
        save(*args)

    monkeypatch.setattr(Checkpoints, "save", die)
    with pytest.raises(Died):
        fit(config)
    fit(config)
    events = EventAccumulator(str(config.workdir / "tensorboard")).Reload()
    assert [scalar.step for scalar in events.Scalars("test/loss")] == [1, 2, 3]


def test_two_runs_in_two_threads(tmp_path, options, undisturbed):
    (tmp_path / "alone").mkdir()
    other_alone = options(tmp_path / "alone", seed=1, beta=0.5, checkpoint_every=60.0)
    fit(other_alone)
    configs = [
        options(tmp_path / "first", checkpoint_every=60.0),
        options(tmp_path / "second", seed=1, beta=0.5, checkpoint_every=60.0),
    ]
    threads = [threading.Thread(target=fit, args=[config]) for config in configs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for config, alone in zip(configs, (undisturbed, other_alone), strict=True):
        require_same(config, alone)
    assert checkpoints(configs[0]) == [3 * STEPS]
