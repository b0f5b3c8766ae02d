"""`--patience` stops a run early; `--keep` chooses the epoch whose model is exported; schedules resume."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.runs.small_runs import STEPS, Died, checkpoints, metrics, require_same
from torch_ref import convert
from vae_jax import fit
from vae_jax.pictures import plots
from vae_jax.runs.checkpoint import Checkpoints
from vae_jax.runs.metrics import EpochMetrics, best_epoch, out_of_patience

pytestmark = pytest.mark.usefixtures("quick")

STILL = 1e-30  # a rate that changes no parameter: every epoch has the same test loss
TOO_HIGH = 1.0  # a rate with which the test loss soon rises


def history(losses: list[float]) -> list[EpochMetrics]:
    return [EpochMetrics(number, 0.0, 0.0, 0.0, loss, 0.0, 0.0, 0.0, "grey") for number, loss in enumerate(losses, 1)]


@pytest.mark.parametrize(
    ("losses", "best", "patience", "expected"),
    [
        ([3.0], 1, 1, False),
        ([3.0, 2.0, 1.0], 3, 1, False),
        ([3.0, 2.0, 2.5], 2, 1, True),
        ([3.0, 2.0, 2.5], 2, 2, False),
        ([3.0, 2.0, 2.5, 2.1], 2, 2, True),
        ([3.0, 2.0, 2.0], 2, 1, True),  # not lower
        ([3.0, 2.0, 2.5, 1.9], 4, 2, False),
        ([1.0, 2.0, 3.0, 4.0], 1, 0, False),
    ],
)
def test_made_up_losses(losses, best, patience, expected):
    assert best_epoch(history(losses)).epoch == best
    assert out_of_patience(history(losses), patience) is expected


def test_no_epoch_is_never_out_of_patience():
    assert not out_of_patience([], 1)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def die_at(step: int, config, monkeypatch) -> None:
    """Starts the run and kills it after its checkpoint of so many steps."""
    save = Checkpoints.save

    def save_and_die(checkpoints, progress):
        save(checkpoints, progress)
        if progress.state.step == step:
            raise Died

    with monkeypatch.context() as patch, pytest.raises(Died):
        patch.setattr(Checkpoints, "save", save_and_die)
        fit(config)


def test_patience(tmp_path, options, command):
    changes = {"learning_rate": STILL, "checkpoint_every": 60.0}
    config = options(tmp_path, epochs=9, patience=2, **changes)
    code, output, _ = command(config)
    assert code == 0
    loss = metrics(config)[0]["test_loss"]
    stopped = f"epoch 3: no lower test loss for 2 epochs (best {loss:.2f} after epoch 1); stopped by --patience 2"
    assert output.splitlines()[-2] == stopped and output.splitlines()[-1].startswith(f"saved {config.export}; ")
    straight = options(tmp_path / "straight", epochs=3, **changes)
    straight.workdir.parent.mkdir()
    fit(straight)
    assert metrics(config) == metrics(straight)
    assert config.export.read_bytes() == straight.export.read_bytes()

    code, output, _ = command(config)
    finished = f"{config.workdir}: finished after epoch 3; a larger --patience trains on, --overwrite starts again"
    assert code == 0 and output.splitlines()[-2:] == [finished, stopped]
    fit(dataclasses.replace(config, epochs=10))
    assert len(metrics(config)) == 3
    fit(dataclasses.replace(config, patience=3))
    assert len(metrics(config)) == 4
    code, output, _ = command(dataclasses.replace(config, patience=3, epochs=4))
    assert code == 0
    assert output.splitlines()[-1].endswith("finished after epoch 4; more --epochs train on, --overwrite starts again")


def test_a_smaller_patience_ends_the_run_after_the_current_epoch(tmp_path, options, monkeypatch):
    config = options(tmp_path, epochs=9, learning_rate=STILL)
    die_at(3 * STEPS + 2, config, monkeypatch)
    fit(dataclasses.replace(config, patience=1))
    assert len(metrics(config)) == 4 and checkpoints(config)[-1] == 4 * STEPS


def test_pictures_of_a_run_that_stops_early_are_drawn_once(tmp_path, options, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "curves", lambda history: np.float32(drawn.append(len(history)) is None))
    fit(options(tmp_path, epochs=9, patience=2, learning_rate=STILL, pictures_every=1))
    assert drawn == [1, 2, 3]


@pytest.fixture(scope="module")
def overshot(tmp_path_factory, options):
    """The options of a run whose best epoch is not the last, and that epoch."""
    config = options(tmp_path_factory.mktemp("overshot"), learning_rate=TOO_HIGH, epochs=5, checkpoint_every=60.0)
    with pytest.MonkeyPatch.context() as patch:
        from tests.runs import small_runs

        small_runs.quicken(patch)
        fit(config)
    losses = [epoch["test_loss"] for epoch in metrics(config)]
    best = 1 + losses.index(min(losses))
    assert best < 4
    return config, best


def test_keep_best_exports_the_model_of_the_best_epoch(tmp_path, options, overshot, command):
    last, best = overshot
    changes = {"learning_rate": TOO_HIGH, "checkpoint_every": 60.0}
    config = options(tmp_path, epochs=5, keep="best", **changes)
    code, output, _ = command(config)
    loss = metrics(config)[best - 1]["test_loss"]
    assert code == 0
    assert output.splitlines()[-2] == f"--keep best: the model is that of epoch {best}, test loss {loss:.2f}"
    assert metrics(config) == metrics(last)
    assert checkpoints(config) == [best * STEPS, 5 * STEPS]
    straight = options(tmp_path / "straight", epochs=best, **changes)
    straight.workdir.parent.mkdir()
    fit(straight)
    for name in ("model.pth", "samples.png", "reconstructions.png"):
        assert (config.workdir / name).read_bytes() == (straight.workdir / name).read_bytes(), name
    assert (config.workdir / "curves.png").read_bytes() == (last.workdir / "curves.png").read_bytes()
    assert config.export.read_bytes() == straight.export.read_bytes()

    state, averages = fit(config)
    assert int(state.step) == best * STEPS and len(averages) == 5
    kept = convert.to_params(convert.load(config.export))
    assert jax.tree.all(jax.tree.map(np.array_equal, kept, jax.device_get(state.params)))


def test_keep_may_change_after_the_end(tmp_path, options, overshot):
    last, _ = overshot
    config = options(tmp_path, epochs=5, learning_rate=TOO_HIGH, checkpoint_every=60.0, keep="best")
    fit(config)
    before = contents(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in (config.export, *config.workdir.glob("*.p*"))}
    fit(config)
    assert contents(tmp_path) == before and {path: path.stat().st_mtime_ns for path in times} == times
    fit(dataclasses.replace(config, keep="last"))
    for name in ("model.pth", "samples.png", "reconstructions.png", "curves.png"):
        assert (config.workdir / name).read_bytes() == (last.workdir / name).read_bytes(), name
    assert config.export.read_bytes() == last.export.read_bytes()
    fit(config)
    assert contents(tmp_path) == before


def test_a_best_epoch_that_is_not_on_the_disk_is_not_exported(tmp_path, options, overshot, command):
    _, best = overshot
    config = options(tmp_path, epochs=5, learning_rate=TOO_HIGH, checkpoint_every=60.0)
    fit(config)
    file = config.workdir / f"checkpoints/{best * STEPS}.safetensors"
    loss = metrics(config)[best - 1]["test_loss"]
    for problem in ("is not there", "is damaged (its checksum does not match)"):
        before = contents(tmp_path)
        code, output, error = command(dataclasses.replace(config, keep="best"))
        assert (code, output) == (2, "")
        assert error == (
            f"error: --keep best: the checkpoint of epoch {best}, whose test loss is the lowest ({loss:.2f}),"
            f" {problem}: {file}; use --keep last to export the last epoch, or add --overwrite to start again\n"
        )
        assert contents(tmp_path) == before
        # Once more, with a checkpoint of that epoch, of which one bit has changed.
        fit(dataclasses.replace(config, overwrite=True, keep="best"))
        fit(config)
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)


def test_the_first_of_equal_epochs_is_kept(tmp_path, options):
    config = options(tmp_path, epochs=5, learning_rate=STILL, checkpoint_every=0.0, keep="best")
    state, _ = fit(config)
    assert int(state.step) == STEPS and checkpoints(config) == [STEPS, 4 * STEPS, 5 * STEPS]


CHANGES = {
    "cosine": {"learning_rate_schedule": "cosine", "learning_rate": 0.01},
    "warmup-cosine": {"learning_rate_schedule": "warmup-cosine", "learning_rate": 0.01, "epochs": 5},
    "patience": {"patience": 2, "learning_rate": TOO_HIGH, "epochs": 9, "keep": "best"},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_killed_run_goes_on_to_the_same_bits(name, tmp_path, options, monkeypatch):
    straight = options(tmp_path / "straight", **CHANGES[name] | {"checkpoint_every": 60.0})
    fit(straight)
    assert len(metrics(straight)) < straight.epochs if name == "patience" else len(metrics(straight)) == straight.epochs
    for step in (1, STEPS, 2 * STEPS + 3):
        config = options(tmp_path / str(step), **CHANGES[name])
        die_at(step, config, monkeypatch)
        fit(config)
        require_same(config, straight)
