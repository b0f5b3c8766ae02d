"""The folder of a run: whose it is, what in it is replaced, and what is left alone."""

import dataclasses
import json
import pkgutil
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.data.tfds_server import idx_files
from tests.runs.small_runs import checkpoints, require_same
from vae_jax import Dataset, InputError, fit
from vae_jax.config import Recipe, option_name
from vae_jax.runs.events import Events
from vae_jax.runs.workdir import Workdir

pytestmark = pytest.mark.usefixtures("quick")

CHANGES = {
    "hidden_dim": 17, "latent_dim": 5, "batch_size": 100, "learning_rate": 0.002, "beta": 2.0, "seed": 1,
    "binarize": "threshold", "matmul_precision": "high", "init": Path("other.pth"),
    "learning_rate_schedule": "cosine", "shards": 2, "adam_b1": 0.5, "adam_eps": 1e-4, "activation": "tanh",
    "initialization": "glorot", "training_samples": 2, "kl_warmup": 1, "image_order": "stored",
}  # fmt: skip
# Which do not go with these, or name a module: test_own_model.
OTHERS = {"objective", "hidden_dims", "model", "model_options"}


def test_every_option_of_the_recipe_is_tried():
    assert {field.name for field in dataclasses.fields(Recipe)} == {"data", *CHANGES, *OTHERS}


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", [*CHANGES, "all"])
def test_another_recipe_is_refused(name, finished, tmp_path, command):
    changes = CHANGES if name == "all" else {name: CHANGES[name]}
    shutil.rmtree(finished.workdir / "checkpoints")  # config.json tells too
    (finished.workdir / "model.pth").unlink()
    before = contents(tmp_path)
    code, _, error = command(dataclasses.replace(finished, **changes))
    assert code == 2
    assert error.count("\n") == 1
    for option, value in changes.items():
        assert f"--{option_name(option)} was {getattr(finished, option)}, now is {value}" in error
    assert contents(tmp_path) == before


def test_another_recipe_is_refused_by_the_checkpoint(finished, undisturbed):
    (finished.workdir / "config.json").unlink()
    with pytest.raises(InputError, match="--seed was 0, now is 1; give the old ones"):
        fit(dataclasses.replace(finished, seed=1))
    fit(finished)
    require_same(finished, undisturbed)


def test_under_a_schedule_the_epochs_are_part_of_the_recipe(finished, tmp_path, command):
    config = dataclasses.replace(finished, learning_rate_schedule="cosine", epochs=1, overwrite=True)
    fit(config)
    before = contents(tmp_path)
    for changes, message in (
        ({}, "--epochs was 1, now is 2 (--learning-rate-schedule sets each rate by the steps of the whole run); give"),
        ({"learning_rate_schedule": "constant"}, "--learning-rate-schedule was cosine, now is constant; give"),
    ):
        code, _, error = command(dataclasses.replace(config, epochs=2, overwrite=False, **changes))
        assert code == 2 and error.count("\n") == 1
        assert f"holds a run with other options: {message} the old ones to go on with it" in error
        assert contents(tmp_path) == before
    code, output, _ = command(dataclasses.replace(config, overwrite=False))
    assert (
        code == 0 and output.splitlines()[-1] == f"{config.workdir}: finished after epoch 1; --overwrite starts again"
    )


def test_a_run_from_before_there_were_schedules_had_a_constant_rate(finished):
    options = json.loads((finished.workdir / "config.json").read_text())
    del options["learning_rate_schedule"]
    Workdir(finished).require_same_recipe(options)
    cosine = dataclasses.replace(finished, learning_rate_schedule="cosine")
    with pytest.raises(InputError, match="--learning-rate-schedule was constant, now is cosine; give the old ones"):
        Workdir(cosine).require_same_recipe(options)


def test_other_images_are_refused(finished, tmp_path, few_images):
    changed = few_images.train_images.copy()
    changed[5, 7, 7] += 1
    before = contents(tmp_path)
    with pytest.raises(InputError, match="--data given to fit: holds other images than those of the run in "):
        fit(finished, dataset=few_images._replace(train_images=changed))
    assert contents(tmp_path) == before
    fit(finished, dataset=few_images)


def test_a_run_goes_on_in_another_place_with_its_images_elsewhere(stopped, tmp_path, few_images_file, undisturbed):
    workdir = shutil.move(stopped.workdir, tmp_path / "moved")
    data = shutil.copy(few_images_file, tmp_path / "renamed.npz")
    config = dataclasses.replace(stopped, workdir=Path(workdir), data=data)
    fit(config)
    assert config.export.read_bytes() == undisturbed.export.read_bytes()


@pytest.mark.parametrize("form", ["relative", "link", "compressed", "idx"])
def test_the_same_images_in_another_form_are_the_same_set(form, finished, few_images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "set.npz"
    if form == "idx":
        data = tmp_path / "set"
        data.mkdir()
        for name, content in idx_files(few_images).items():
            (data / name).write_bytes(content)
    elif form == "compressed":
        np.savez_compressed(data, **few_images._asdict())
    else:
        data.symlink_to(finished.data)
    fit(dataclasses.replace(finished, data="set.npz" if form == "relative" else str(data)))
    assert "finished after epoch 3" in capsys.readouterr().out


@pytest.mark.parametrize("move", ["from test to train", "to another shape", "to another type"])
def test_the_same_bytes_as_another_set_are_refused(move, finished, few_images):
    train, test = few_images.train_images, few_images.test_images
    if move == "from test to train":
        train, test = np.concatenate([train, test[:1]]), test[1:]
    elif move == "to another shape":
        train, test = (images.reshape(-1, 14, 56) for images in (train, test))
    else:
        train, test = (np.zeros_like(images, np.float32) for images in (train, test))
    with pytest.raises(InputError, match="holds other images"):
        fit(finished, dataset=Dataset(train, None, test, None))


def test_checkpoints_of_the_former_format(tmp_path, options, undisturbed, command):
    config = options(tmp_path)
    former = config.workdir / "checkpoints/10"
    (former / "state").mkdir(parents=True)
    (former / "SHA256SUMS").write_text("0" * 64 + "  state/_METADATA\n")
    (former / "state/_METADATA").write_text("{}")
    (config.workdir / "config.json").write_text(json.dumps(config.recipe | {"epochs": 3}))
    code, output, error = command(config)
    assert (code, output) == (2, "")
    assert error == (
        f"error: --workdir {config.workdir}: holds checkpoints in the format of version 0.1 (folders); finish the run"
        f" with that version, start from its weights (--init {config.workdir}/model.pth) in another folder, or add"
        " --overwrite\n"
    )
    assert former.exists()
    config = options(tmp_path, overwrite=True)
    assert command(config)[0] == 0
    require_same(config, undisturbed)


@pytest.mark.parametrize("name", ["samples.png", "tensorboard/events.out.tfevents.1", "model.pth"])
def test_files_of_the_user_are_not_replaced(name, tmp_path, options, command):
    config = options(tmp_path)
    (config.workdir / "tensorboard").mkdir(parents=True)
    (config.workdir / name).write_text("mine")
    code, _, error = command(config)
    assert code == 2
    assert error == (
        f"error: --workdir {config.workdir}: holds a run already ({name});"
        " add --overwrite to replace it or name another folder\n"
    )
    assert (config.workdir / name).read_text() == "mine"


def test_overwrite_leaves_files_of_the_user_alone(finished, options, tmp_path):
    own = [
        finished.workdir / name
        for name in ("notes.txt", "checkpoints/5.safetensors.bak", "checkpoints/5.tar.gz", "checkpoints/5/mine")
    ]
    for path in own:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    fit(options(tmp_path, epochs=1, seed=1, overwrite=True))
    assert [path.read_text() for path in own] == 4 * ["mine"]


@pytest.mark.parametrize("content", ['{"epochs": 3, "hidden_dim": 16}', "{}"])
def test_a_run_of_another_program_is_refused(content, tmp_path, options):
    config = options(tmp_path)
    config.workdir.mkdir()
    (config.workdir / "config.json").write_text(content)
    with pytest.raises(InputError, match="holds a run of another program or version; add --overwrite"):
        fit(config)


def test_a_run_that_died_before_its_first_checkpoint_starts_again(tmp_path, options, undisturbed):
    config = options(tmp_path, checkpoint_every=60.0)
    config.workdir.mkdir()
    shutil.copy(undisturbed.workdir / "config.json", config.workdir)
    (config.workdir / "metrics.jsonl").write_text("")
    fit(config)
    require_same(config, undisturbed)


def test_two_processes_in_one_workdir(tmp_path, options, command):
    config = options(tmp_path)
    with Workdir(config).lock():
        code, _, error = command(config)
    assert (code, error) == (
        2,
        f"error: --workdir {config.workdir}: another process is training in it; wait for its end, or name another"
        " folder\n",
    )
    assert [path.name for path in config.workdir.iterdir()] == [".lock"]
    fit(config)


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("writer", ["vae_jax.runs.logs.Logs.add", "vae_jax.runs.checkpoint.Checkpoints.save"])
def test_the_workdir_is_deleted_under_the_run(writer, replaced, tmp_path, options, command, monkeypatch):
    config = options(tmp_path)
    owner, name = writer.rsplit(".", 1)
    write = getattr(pkgutil.resolve_name(owner), name)

    def delete(*args):
        shutil.rmtree(config.workdir)
        if replaced:  # by another run, which must stay as it is
            config.workdir.mkdir()
            (config.workdir / ".lock").touch()
        write(*args)

    monkeypatch.setattr(writer, delete)
    code, _, error = command(config)
    assert code == 1
    assert "No such file or directory" in error and error.count("\n") == 1
    if replaced:
        assert [path.name for path in config.workdir.iterdir()] == [".lock"]
    else:
        assert not config.workdir.exists()


def test_the_events_are_deleted_under_the_run(tmp_path, options, command, monkeypatch):
    config = options(tmp_path, tensorboard=True)
    add = Events.add

    def lose(*args):
        shutil.rmtree(config.workdir / "tensorboard")
        add(*args)

    monkeypatch.setattr(Events, "add", lose)
    code, _, error = command(config)
    assert code == 1
    assert error.startswith(f"error: {config.workdir}/tensorboard/events.out.tfevents.")
    assert "No such file or directory" in error and error.count("\n") == 1
    monkeypatch.setattr(Events, "add", add)
    fit(config)


def test_a_workdir_whose_name_is_no_text(tmp_path, options, undisturbed):
    # A file name is bytes; these are no UTF-8.
    config = options(tmp_path / "\udcff", checkpoint_every=60.0)
    fit(config)
    fit(config)
    require_same(config, undisturbed)
    assert checkpoints(config) == checkpoints(undisturbed)
