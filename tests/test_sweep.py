"""Sweeps: the same models as single runs, nothing lost, and bad input refused before any work."""

import csv
import dataclasses
import errno
import importlib
import json
import os
import shutil
import signal
import sys

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from vae_jax import InputError, Recipe, SweepOptions, TrainConfig, fit, sweep
from vae_jax.config import ExportConfig
from vae_jax.runs.checkpoint import Checkpoints
from vae_jax.system.signals import Interrupted

export = importlib.import_module("vae_jax.export")
module = importlib.import_module("vae_jax.sweep")  # the package has the function under this name


class Died(BaseException):
    """Stands for a kill: nothing in the product catches it."""


def recipes(few_images_file, **grid):
    """A small recipe for each seed and beta."""
    grid = {"seed": [0, 1], "beta": [0.5, 1]} | grid
    small = {"data": str(few_images_file), "hidden_dim": 8, "latent_dim": 2}
    return [
        Recipe(**small | {"seed": seed, "beta": beta} | {n: v for n, v in grid.items() if n not in ("seed", "beta")})
        for beta in grid["beta"]
        for seed in grid["seed"]
    ]


def rows(folder):
    with (folder / "results.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


@pytest.fixture
def options(tmp_path):
    return SweepOptions(workdir=tmp_path / "sweep", epochs=2)


@pytest.fixture
def single(tmp_path, few_images_file):
    """The single run of seed 1 and beta 0.5: its config and history."""
    recipe = dataclasses.asdict(recipes(few_images_file)[1])
    config = TrainConfig(**recipe, epochs=2, workdir=tmp_path / "run", export=tmp_path / "vae.pth")
    return config, fit(config)[1]


def test_each_model_is_that_of_a_single_run(options, single, few_images_file):
    config, history = single
    states, histories = sweep(recipes(few_images_file), options)
    assert states.beta.tolist() == [0.5, 0.5, 1, 1]
    folder = options.workdir
    assert (folder / "models/beta=0.5_seed=1/vae.pth").read_bytes() == config.export.read_bytes()
    assert [m.test_loss for m in histories[1]] == [m.test_loss for m in history]
    found = rows(folder)
    assert [row["name"] for row in found] == ["beta=0.5_seed=0", "beta=0.5_seed=1", "beta=1_seed=0", "beta=1_seed=1"]
    assert all(row["status"] == "finished" for row in found)
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 8
    for name in ("options.png", "rate-distortion.png", "curves.png", "best.pth"):
        assert (folder / name).stat().st_size > 1000


def test_stacked_models_differ_by_rounding(options, single, few_images_file):
    _, history = single
    _, histories = sweep(recipes(few_images_file), dataclasses.replace(options, at_once=3))
    np.testing.assert_allclose([m.test_loss for m in histories[1]], [m.test_loss for m in history], rtol=1e-4)


def die():
    raise Died


def fill_the_disk():
    raise OSError(errno.ENOSPC, "No space left on device", "8.safetensors")


ENDS = {
    "killed": (die, Died),
    "stopped": (lambda: os.kill(os.getpid(), signal.SIGTERM), Interrupted),
    "disk is full": (fill_the_disk, OSError),
}


@pytest.mark.parametrize(("how", "at_once"), [*((how, None) for how in ENDS), ("killed", 4)])
def test_a_disturbed_sweep_ends_as_an_undisturbed_one(how, at_once, tmp_path, few_images_file, monkeypatch):
    whole, disturbed = (
        SweepOptions(workdir=tmp_path / name, epochs=2, at_once=at_once, checkpoint_every=1e-9) for name in "ab"
    )
    sweep(recipes(few_images_file), whole)
    end, raised = ENDS[how]
    save, count = Checkpoints.save, 0

    def save_and_end(checkpoints, progress):
        nonlocal count
        save(checkpoints, progress)
        count += 1
        if count == 3:
            end()

    monkeypatch.setattr(Checkpoints, "save", save_and_end)
    with pytest.raises(raised):
        sweep(recipes(few_images_file), disturbed)
    sweep(recipes(few_images_file), disturbed)
    assert rows(disturbed.workdir) == rows(whole.workdir)


def test_two_sweeps_in_one_folder(options, few_images_file):
    with module.SweepFolder(options, "few.npz").lock(), pytest.raises(InputError, match="another process"):
        sweep(recipes(few_images_file), options)


@pytest.mark.parametrize("at_once", [None, 3])
def test_a_diverging_model_disturbs_no_other(at_once, tmp_path, few_images_file):
    good = recipes(few_images_file, seed=[0, 1], beta=[1])
    bad = dataclasses.replace(good[0], learning_rate=1e30)
    # Stacks are compared with stacks of as many models.
    other = [dataclasses.replace(good[0], seed=2)] if at_once else []
    with pytest.raises(InputError, match="has diverged"):
        sweep([good[0], bad, good[1]], SweepOptions(workdir=tmp_path / "a", epochs=2, at_once=at_once))
    sweep([good[0], *other, good[1]], SweepOptions(workdir=tmp_path / "b", epochs=2, at_once=at_once))
    assert [row["status"].partition(":")[0] for row in rows(tmp_path / "a")] == ["finished", "diverged", "finished"]
    assert "NaN" not in (tmp_path / "a/metrics.jsonl").read_text()
    for seed in (0, 1):
        (model,) = (tmp_path / "a/models").glob(f"*learning-rate=0.001_seed={seed}")
        assert (model / "vae.pth").read_bytes() == (tmp_path / f"b/models/seed={seed}/vae.pth").read_bytes()


def test_a_sweep_grows_and_names_what_has_changed(options, few_images_file, monkeypatch):
    sweep(recipes(few_images_file, seed=[0]), options)
    trained = []
    begin = module.SweepFolder.begin
    monkeypatch.setattr(
        module.SweepFolder,
        "begin",
        lambda folder, model, *shapes: (trained.append(model.name), begin(folder, model, *shapes)),
    )
    sweep(recipes(few_images_file), options)
    assert trained == ["beta=0.5_seed=1", "beta=1_seed=1"]
    with pytest.raises(InputError, match="--hidden-dim was 8, now is 9"):
        sweep(recipes(few_images_file, hidden_dim=9), options)
    with pytest.raises(InputError, match="--epochs was 2, now is 3"):
        sweep(recipes(few_images_file), dataclasses.replace(options, epochs=3))


WIDTH = 3


class Changing(nn.Module):
    """A module whose code changes between two sweeps."""

    def setup(self) -> None:
        self.down, self.up = nn.Dense(2 * WIDTH), nn.Dense(784)

    def encode(self, images):
        return tuple(jnp.split(self.down(images), 2, axis=-1))

    def decode(self, z):
        return self.up(z)


def test_a_sweep_does_not_mix_models_of_changed_code(options, few_images_file, tmp_path, monkeypatch):
    recipe = Recipe(data=str(few_images_file), model=f"{__name__}:Changing")
    first, then = ([dataclasses.replace(recipe, seed=seed) for seed in seeds] for seeds in ((0, 1), (2, 3)))
    sweep(first, options)
    before = (options.workdir / "sweep.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(f"{__name__}.WIDTH", 4)
        with pytest.raises(InputError, match=r"its model seed=0 has parameters of other shapes than .*:Changing makes"):
            sweep(then, options)
    assert (options.workdir / "sweep.json").read_bytes() == before
    sweep(then, options)
    assert len(rows(options.workdir)) == 4
    # With no rate to speak of, a model stays what --init has made it.
    init = options.workdir / "models/seed=2/vae.pth"
    again = dataclasses.replace(options, workdir=tmp_path / "again", epochs=1)
    sweep([dataclasses.replace(recipe, model=None, learning_rate=1e-30, init=init)], again, model=Changing())
    assert (again.workdir / "models/model/vae.pth").read_bytes() == init.read_bytes()


def test_files_of_the_user_and_of_the_models_stay(options, few_images_file):
    one = recipes(few_images_file, seed=[0], beta=[1])
    sweep(one, options)
    own = options.workdir / "models/model/checkpoints/notes.txt"
    own.write_text("mine")
    sweep(one, dataclasses.replace(options, overwrite=True))
    assert own.read_text() == "mine"
    model = options.workdir / "models/model"
    with pytest.raises(InputError, match="is a file of the run itself"):
        export.export(ExportConfig(model=model, out=model / "vae.pth"))


def test_a_sweep_goes_on_with_its_images_elsewhere_and_foreign_files_beside_it(options, few_images_file, tmp_path):
    sweep(recipes(few_images_file, seed=[0], beta=[1]), options)
    found = rows(options.workdir)
    for name in ("models/.DS_Store", "models/Thumbs.db", "models/model/.DS_Store", "models/model/checkpoints/._1"):
        (options.workdir / name).write_text("not ours")
    data = shutil.copy(few_images_file, tmp_path / "renamed.npz")
    sweep(recipes(data, seed=[0], beta=[1]), options)
    assert rows(options.workdir) == found


def test_an_overwritten_sweep_takes_nothing_from_a_damaged_one(options, few_images_file):
    one = recipes(few_images_file, seed=[0], beta=[1])
    _, before = sweep(one, dataclasses.replace(options, epochs=1))
    (options.workdir / "sweep.json").write_text("{")
    _, after = sweep(one, dataclasses.replace(options, overwrite=True))
    assert (len(before[0]), len(after[0])) == (1, 2)


OWN_FORMS = [
    {
        "hidden_dim": 400,
        "hidden_dims": (8, 6),
        "activation": "tanh",
        "learning_rate_schedule": "cosine",
        "kl_warmup": 2,
    },
    {"binarize": "dynamic", "objective": "iwae", "training_samples": 2},
]


@pytest.mark.parametrize("form", OWN_FORMS, ids=lambda form: " ".join(form))
def test_other_recipes_stacked_and_not(form, tmp_path, few_images_file):
    models = recipes(few_images_file, beta=[1], **form)
    run = TrainConfig(**dataclasses.asdict(models[1]), epochs=2, workdir=tmp_path / "run", export=tmp_path / "vae.pth")
    _, history = fit(run)
    losses = [metrics.test_loss for metrics in history]
    found = [
        sweep(models, SweepOptions(workdir=tmp_path / name, epochs=2, at_once=at_once))[1][1]
        for name, at_once in (("alone", 1), ("stacked", 2))
    ]
    assert (tmp_path / "alone/models/seed=1/vae.pth").read_bytes() == run.export.read_bytes()
    assert [metrics.test_loss for metrics in found[0]] == losses
    np.testing.assert_allclose([metrics.test_loss for metrics in found[1]], losses, rtol=1e-4)


@pytest.mark.parametrize("keep", ["best", "none"])
def test_keep(keep, options, few_images_file, monkeypatch):
    arguments = ["--hidden-dim", "8", "--latent-dim", "2", "--epochs", "1", "--seed", "0", "1", "--keep", keep]
    command = ["sweep", "--data", str(few_images_file), "--workdir", str(options.workdir), *arguments]
    monkeypatch.setattr(sys, "argv", command)
    module.main()
    assert [path.name for path in options.workdir.rglob("*.pth")] == (["best.pth"] if keep == "best" else [])
    assert not list(options.workdir.rglob("*.safetensors"))
    assert len(json.loads((options.workdir / "sweep.json").read_text())["models"]) == 2


BAD = {
    "--seed 1 1": "two models are the same",
    "--seed": "--seed: expected one value or several",
    "--binarize none dynamic": "--binarize none dynamic: cannot be swept",
    "--shards 1 2": "--shards 1 2: cannot be swept",
    "--data mnist fashion": "--data mnist fashion: cannot be swept",
    "--seed 0 1 --beta 1 2 3 --zip": "--zip: --beta has 3, --seed has 2 values",
    "--beta 1 -2": "--beta -2",
    "--config missing.jsonl": "--config missing.jsonl: cannot be read",
    "--hidden-dim 100000000 --latent-dim 2 3": "GB",
}


@pytest.mark.parametrize("words", BAD)
def test_refusals(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sweep", *words.split()])
    with pytest.raises(SystemExit) as stopped:
        module.main()
    assert stopped.value.code == 2
    output = capsys.readouterr()
    assert output.err.startswith("error: ") and output.err.count("\n") == 1 and BAD[words] in output.err
    assert output.out == "" and not list(tmp_path.iterdir())
