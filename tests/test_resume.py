"""A run that cannot be lost: whatever ends it, the same command goes on and makes the very same model."""

import dataclasses
import json
import os
import pkgutil
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

import vae_jax.train
from torch_ref import convert
from torch_ref.model import VAE as TorchVAE
from torch_ref.train import TorchTrainConfig
from torch_ref.train import fit as torch_fit
from vae_jax import Dataset, InputError, TrainConfig, cli, fit, signals
from vae_jax.checkpoint import Checkpoints
from vae_jax.config import NonFiniteLossError
from vae_jax.log import RunLog, lock

STEPS = 5  # of an epoch of 600 images


def options(folder: Path, **changes) -> TrainConfig:
    """3 epochs, a checkpoint after every step."""
    settings = {"epochs": 3, "hidden_dim": 16, "latent_dim": 4, "checkpoint_every": 1e-9} | changes
    return TrainConfig(workdir=folder / "run", export=folder / "vae.pth", **settings)


def few(mnist: Dataset) -> Dataset:
    return Dataset(*(array[:600] for array in mnist))


def draw(log: RunLog, *_: object) -> None:
    """Pictures that cost nothing: the number of the epoch that they show."""
    for name in vae_jax.train.PICTURES:
        (log._config.workdir / name).write_text(str(len(log._history)))


@pytest.fixture(autouse=True)
def quick(monkeypatch, mnist):
    """600 images, a place to stop after every step, and pictures that cost nothing."""

    monkeypatch.setattr(vae_jax.train, "load", lambda *_: few(mnist))
    monkeypatch.setattr(vae_jax.train, "STRETCH_FLOPS", 1)
    monkeypatch.setattr(RunLog, "draw", draw)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, mnist):
    """A run that nothing has disturbed, with one checkpoint, at its end."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vae_jax.train, "load", lambda *_: few(mnist))
        patch.setattr(RunLog, "draw", draw)
        fit(options(folder, checkpoint_every=60.0))
    return folder


def metrics(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl without what no two runs share."""
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def numbers(folder: Path) -> list[int]:
    """The checkpoints that are there; nothing else is."""
    return sorted(int(path.name) for path in (folder / "run/checkpoints").iterdir())


def require_same(folder: Path, undisturbed: Path) -> None:
    """A finished run: the same model and metrics, and nothing left over."""
    for name in ("vae.pth", "run/model.pth", *(f"run/{name}" for name in vae_jax.train.PICTURES)):
        assert (folder / name).read_bytes() == (undisturbed / name).read_bytes()
    assert metrics(folder) == metrics(undisturbed)
    assert numbers(folder)[-1] == numbers(undisturbed)[-1]
    assert {path.name for path in folder.iterdir()} == {"run", "vae.pth"}
    assert {path.name for path in (folder / "run").iterdir()} == {path.name for path in (undisturbed / "run").iterdir()}


def newest(config: TrainConfig, mnist: Dataset):
    images = few(mnist)
    return Checkpoints(config, 600, 784, images.checksum()).newest()


def command(monkeypatch, capsys, config: TrainConfig) -> tuple[int, str, str]:
    """Runs the command with these options: exit code, standard output, standard error."""
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["train", *config.command.split()[3:]])
    try:
        cli.run(fit, TrainConfig, "train")
        code = 0
    except SystemExit as stopped:
        code = stopped.code
    return (code, *capsys.readouterr())


class Died(BaseException):
    """In the place of a kill: nothing in the product catches it."""


# Between any two of these calls, something that lasts has changed.
MOMENTS = (
    "vae_jax.log.RunLog.__init__",
    "vae_jax.log.RunLog.add",
    "vae_jax.log.RunLog.draw",
    "vae_jax.checkpoint.Checkpoints.save",
    "vae_jax.checkpoint.Checkpoints._delete",
    "vae_jax.checkpoint.flush",
    "shutil.rmtree",
    "pathlib.Path.rename",
    "pathlib.Path.replace",
    "pathlib.Path.unlink",
    "torch_ref.convert.save",
)


def test_death_between_two_changes(tmp_path, undisturbed, monkeypatch):
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
    for moment in range(1, calls + 1, 17):
        folder = tmp_path / str(moment)
        calls, last = 0, moment
        with pytest.raises(Died):
            fit(options(folder))
        last = 0
        fit(options(folder))
        require_same(folder, undisturbed)


def test_the_newest_two_and_the_best_are_kept(tmp_path):
    fit(options(tmp_path, epochs=4, checkpoint_every=0.0))
    assert numbers(tmp_path) == [3 * STEPS, 4 * STEPS]
    # Too high a rate: the first epoch is the best one.
    fit(options(tmp_path / "bad", epochs=4, checkpoint_every=0.0, learning_rate=0.1))
    losses = [epoch["test_loss"] for epoch in metrics(tmp_path / "bad")]
    best = 1 + losses.index(min(losses))
    assert numbers(tmp_path / "bad") == sorted({best * STEPS, 3 * STEPS, 4 * STEPS})


def test_a_checkpoint_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    synced, fsync, rename = [], os.fsync, Path.rename

    def note(descriptor):
        synced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def check(path, target):
        if path.suffix == ".part":
            assert {file.stat().st_ino for file in (path, *path.rglob("*"))} <= {*synced}
            synced.append("whole")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(Path, "rename", check)
    fit(options(tmp_path, epochs=1))
    assert synced.count("whole") == STEPS


def test_a_checkpoint_is_due_in_time(tmp_path, monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    checkpoints = Checkpoints(options(tmp_path, checkpoint_every=60.0), 600, 784, 0)
    now += 55
    # The next one can be written after an epoch of 6 seconds only: too late.
    assert not checkpoints.due() and not checkpoints.due(ahead=4.0) and checkpoints.due(ahead=6.0)
    now += 5
    assert checkpoints.due()


def test_a_finished_run(tmp_path, undisturbed, monkeypatch, capsys):
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    config = options(tmp_path, checkpoint_every=60.0)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.suffix in (".png", ".pth")}
    code, output, _ = command(monkeypatch, capsys, config)
    assert code == 0
    assert output.splitlines()[-1].startswith(f"{config.workdir}: finished after epoch 3; ")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for name in ("vae.pth", "run/model.pth", "run/samples.png"):
        (tmp_path / name).unlink()
        assert command(monkeypatch, capsys, config)[0] == 0
        require_same(tmp_path, undisturbed)


def test_fewer_epochs_than_were_asked_for_before(tmp_path, undisturbed, monkeypatch):
    # A finished run trains on and dies: what it has left then is of no epoch but the last.
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
    fit(options(tmp_path, epochs=3, checkpoint_every=0.0))
    require_same(tmp_path, undisturbed)


@pytest.mark.parametrize("name", ["vae.pth", "vae.safetensors"])
def test_the_export_of_another_run_is_left_alone(name, tmp_path, undisturbed, monkeypatch, capsys):
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    config = dataclasses.replace(options(tmp_path), export=tmp_path / name)
    fit(config)  # which writes it where it is missing
    capsys.readouterr()
    for content, lines in (((tmp_path / name).read_bytes(), 0), (b"another run's", 1)):
        (tmp_path / name).write_bytes(content)
        code, output, _ = command(monkeypatch, capsys, config)
        assert code == 0
        assert output.splitlines()[3:] == lines * [
            f"{tmp_path}/{name}: differs from {tmp_path}/run/model.pth, the model of this run, and is left as it is"
        ]
        assert (tmp_path / name).read_bytes() == content


def test_more_epochs_train_on(tmp_path, undisturbed, monkeypatch, capsys):
    shutil.copytree(undisturbed, tmp_path / "on", dirs_exist_ok=True)
    longer = {"epochs": 5, "checkpoint_every": 0.0}
    code, output, _ = command(monkeypatch, capsys, options(tmp_path / "on", **longer))
    assert code == 0
    assert f"{tmp_path}/on/run: goes on after epoch 3\n" in output
    fit(options(tmp_path / "straight", **longer))
    require_same(tmp_path / "on", tmp_path / "straight")
    assert json.loads((tmp_path / "on/run/config.json").read_text())["epochs"] == 5
    code, _, error = command(monkeypatch, capsys, options(tmp_path / "on", epochs=4))
    assert code == 2
    assert error.startswith(f"error: --epochs 4: {tmp_path}/on/run is after epoch 5; ")
    assert error.count("\n") == 1


CHANGES = {
    "hidden_dim": 17, "latent_dim": 5, "batch_size": 100, "learning_rate": 0.002, "beta": 2.0, "seed": 1,
    "binarize": "threshold", "data": "tfds:mnist", "matmul_precision": "high", "init": Path("other.pth"),
}  # fmt: skip


@pytest.mark.parametrize("name", [*CHANGES, "all"])
def test_other_options_are_refused(name, tmp_path, undisturbed, monkeypatch, capsys):
    changes = CHANGES if name == "all" else {name: CHANGES[name]}
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "run/checkpoints")  # config.json tells too
    (tmp_path / "run/model.pth").unlink()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    old = options(tmp_path)
    code, _, error = command(monkeypatch, capsys, dataclasses.replace(old, **changes))
    assert code == 2
    assert error.count("\n") == 1
    for option, value in changes.items():
        assert f"--{option.replace('_', '-')} was {getattr(old, option)}, now is {value}" in error
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_other_options_are_refused_by_the_checkpoint(tmp_path, undisturbed):
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    (tmp_path / "run/config.json").unlink()
    with pytest.raises(InputError, match="--seed was 0, now is 1; give the old ones"):
        fit(options(tmp_path, seed=1))
    fit(options(tmp_path))
    require_same(tmp_path, undisturbed)


def test_other_images_are_refused(tmp_path, undisturbed, monkeypatch, mnist):
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    images = few(mnist)
    changed = images.train_images.copy()
    changed[5, 7, 7] += 1
    monkeypatch.setattr(vae_jax.train, "load", lambda *_: images._replace(train_images=changed))
    with pytest.raises(InputError, match="--data mnist: holds other images than those of the run in "):
        fit(options(tmp_path))


def test_overwrite_starts_fresh(tmp_path, undisturbed):
    fit(options(tmp_path, seed=1, hidden_dim=8))
    kept = tmp_path / "run/checkpoints/5.bak"
    kept.mkdir()
    kept.with_name("5.tar.gz").touch()
    fit(options(tmp_path, overwrite=True, checkpoint_every=60.0))
    for path in (kept, kept.with_name("5.tar.gz")):  # a user's own
        shutil.move(path, tmp_path.parent / f"{tmp_path.name}-{path.name}")
    require_same(tmp_path, undisturbed)
    assert numbers(tmp_path) == numbers(undisturbed)


@pytest.mark.parametrize("name", ["samples.png", "tensorboard/events.out.tfevents.1", "model.pth"])
def test_files_of_the_user_are_not_replaced(name, tmp_path, monkeypatch, capsys):
    (tmp_path / "run/tensorboard").mkdir(parents=True)
    (tmp_path / "run" / name).write_text("mine")
    code, _, error = command(monkeypatch, capsys, options(tmp_path))
    assert code == 2
    assert error == (
        f"error: --workdir {tmp_path}/run: holds a run already ({name});"
        " add --overwrite to replace it or name another folder\n"
    )
    assert (tmp_path / "run" / name).read_text() == "mine"


def test_what_is_no_checkpoint_is_left_alone(tmp_path, two_checkpoints, undisturbed, mnist):
    shutil.copytree(two_checkpoints, tmp_path, dirs_exist_ok=True)
    checkpoints = tmp_path / "run/checkpoints"
    (checkpoints / "00999").mkdir()
    (checkpoints / "3.part2").mkdir()
    (checkpoints / "3.part").mkdir()  # what a process that was killed has left
    (checkpoints / "999").touch()
    for number in (2, 3):
        (checkpoints / str(number) / ".DS_Store").touch()
    assert int(newest(options(tmp_path), mnist).state.step) == 3
    fit(options(tmp_path, checkpoint_every=60.0))
    for name in ("00999", "3.part2"):
        (checkpoints / name).rmdir()
    (checkpoints / "999").unlink()
    require_same(tmp_path, undisturbed)


def test_a_workdir_that_orbax_cannot_name(tmp_path, monkeypatch, capsys):
    config = options(tmp_path / "\udcff")
    code, _, error = command(monkeypatch, capsys, config)
    assert code == 2
    assert error.startswith("error: --workdir ") and "is no UTF-8" in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_run_of_the_other_program_is_refused(tmp_path, few_images, monkeypatch):  # noqa: ARG001
    torch_fit(TorchTrainConfig(epochs=1, hidden_dim=16, workdir=tmp_path / "run", export=tmp_path / "vae.pth"))
    with pytest.raises(InputError, match="holds a run of another program or version; add --overwrite"):
        fit(options(tmp_path))


def test_two_processes_in_one_workdir(tmp_path, monkeypatch, capsys):
    config = options(tmp_path)
    with lock(config.workdir):
        code, _, error = command(monkeypatch, capsys, config)
    assert (code, error) == (
        2,
        f"error: --workdir {config.workdir}: another process is training in it; wait for its end, or name another"
        " folder\n",
    )
    assert [path.name for path in config.workdir.iterdir()] == [".lock"]
    fit(config)


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory, mnist):
    """A run that died after its first epoch: a checkpoint after its last step but one, and one after its last."""
    folder = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vae_jax.train, "load", lambda *_: few(mnist))
        patch.setattr(vae_jax.train, "STRETCH_FLOPS", 1)
        patch.setattr(Checkpoints, "_delete", lambda *_: (_ for _ in ()).throw(Died))
        with pytest.raises(Died):
            fit(options(folder))
    assert numbers(folder) == [1, 2, 3]
    shutil.rmtree(folder / "run/checkpoints/1")
    return folder


def damages(content: bytes) -> list[bytes | None]:
    """One file truncated, emptied, grown, deleted, and with single bits flipped all over it."""
    flipped = []
    for place in np.linspace(0, 8 * len(content) - 1, 4, dtype=int):
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        flipped.append(bytes(damaged))
    return [content[: len(content) // 2], b"", content + b"\0", None, *flipped]


def test_any_damage_to_the_newest_checkpoint(tmp_path, two_checkpoints, mnist, capsys):
    config = options(tmp_path)
    shutil.copytree(two_checkpoints, tmp_path, dirs_exist_ok=True)
    checkpoint = config.workdir / "checkpoints/3"
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    assert len(files) > 5
    for file in files:
        content = file.read_bytes()
        for damaged in damages(content):
            if damaged is None:
                file.unlink()
            else:
                file.write_bytes(damaged)
            capsys.readouterr()
            assert int(newest(config, mnist).state.step) == 2
            error = capsys.readouterr().err
            assert error.startswith(f"warning: {checkpoint}: is damaged (")
            assert error.endswith("); passed over\n") and error.count("\n") == 1
            file.write_bytes(content)
    assert int(newest(config, mnist).state.step) == 3


def test_a_run_goes_on_from_the_older_checkpoint(tmp_path, two_checkpoints, undisturbed, monkeypatch, capsys):
    shutil.copytree(two_checkpoints, tmp_path, dirs_exist_ok=True)
    for file in (tmp_path / "run/checkpoints/3").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    (tmp_path / "run/checkpoints/2.bak").mkdir()  # a user's own
    code, output, error = command(monkeypatch, capsys, options(tmp_path, checkpoint_every=60.0))
    assert code == 0
    why = "SHA256SUMS does not match _CHECKPOINT_METADATA"
    assert error == f"warning: {tmp_path}/run/checkpoints/3: is damaged ({why}); passed over\n"
    assert f"{tmp_path}/run: goes on after epoch 0 and step 2 of epoch 1\n" in output
    # The whole one stays until two newer ones are.
    (tmp_path / "run/checkpoints/2.bak").rmdir()
    assert numbers(tmp_path) == [2, 15]
    require_same(tmp_path, undisturbed)


def test_a_run_goes_on_unheard(tmp_path, two_checkpoints, undisturbed):
    shutil.copytree(two_checkpoints, tmp_path, dirs_exist_ok=True)
    (tmp_path / "run/checkpoints/3/SHA256SUMS").unlink()
    process = start(tmp_path, checkpoint_every=60.0)
    assert process.stderr is not None
    process.stderr.close()
    process.communicate(timeout=60)
    assert process.returncode == 0
    require_same(tmp_path, undisturbed)


def test_all_checkpoints_damaged(tmp_path, two_checkpoints, monkeypatch, capsys):
    shutil.copytree(two_checkpoints, tmp_path, dirs_exist_ok=True)
    for file in (tmp_path / "run/checkpoints").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    before = sorted(tmp_path.rglob("*"))
    code, _, error = command(monkeypatch, capsys, options(tmp_path))
    assert code == 2
    assert "none of its checkpoints can be read" in error.splitlines()[-1]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("writer", "file"),
    [
        ("vae_jax.checkpoint.Checkpoints.save", "run/checkpoints/10"),
        ("vae_jax.log.RunLog._write_metrics", "run/metrics.jsonl"),
        ("torch_ref.convert.save", "vae.pth"),
    ],
)
def test_a_full_disk(writer, file, tmp_path, undisturbed, monkeypatch, capsys):
    # No file may grow beyond 100 bytes, from a call in the middle of the run on.
    owner, name = writer.rsplit(".", 1)
    write, calls = getattr(pkgutil.resolve_name(owner), name), 0
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(*args):
        nonlocal calls
        calls += 1
        if calls == {"save": 10 if "Checkpoints" in writer else 1}.get(name, 3):
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        try:
            write(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(writer, fill)
    code, _, error = command(monkeypatch, capsys, options(tmp_path))
    assert code == 1
    assert error.startswith(f"error: {tmp_path}/{file}: File too large")
    assert error.count("\n") == 1
    assert not list(tmp_path.rglob("*.part-*")) and not list(tmp_path.rglob("*tmp*"))
    monkeypatch.setattr(writer, write)
    code, output, _ = command(monkeypatch, capsys, options(tmp_path))
    assert code == 0
    assert "goes on after" in output or "finished" in output
    require_same(tmp_path, undisturbed)


def test_the_workdir_is_deleted_under_the_run(tmp_path, monkeypatch, capsys):
    for method in ("vae_jax.log.RunLog.add", "vae_jax.checkpoint.Checkpoints.save"):
        config = options(tmp_path / method)
        owner, name = method.rsplit(".", 1)
        write = getattr(pkgutil.resolve_name(owner), name)

        def delete(*args, config=config, write=write):
            shutil.rmtree(config.workdir)
            write(*args)

        monkeypatch.setattr(method, delete)
        code, _, error = command(monkeypatch, capsys, config)
        monkeypatch.setattr(method, write)
        assert code == 1
        assert "No such file or directory" in error and error.count("\n") == 1
        assert not config.workdir.exists()


def test_the_events_are_deleted_under_the_run(tmp_path, monkeypatch, capsys):
    from vae_jax.events import Events

    config = options(tmp_path, tensorboard=True)
    add = Events.add

    def lose(*args):
        shutil.rmtree(config.workdir / "tensorboard")
        add(*args)

    monkeypatch.setattr(Events, "add", lose)
    code, _, error = command(monkeypatch, capsys, config)
    assert code == 1
    assert error.startswith(f"error: {config.workdir}/tensorboard/events.out.tfevents.")
    assert "No such file or directory" in error and error.count("\n") == 1
    monkeypatch.setattr(Events, "add", add)
    fit(config)


def test_another_run_in_the_place_of_a_deleted_workdir(tmp_path, monkeypatch, capsys):
    for method in ("vae_jax.log.RunLog.add", "vae_jax.checkpoint.Checkpoints.save"):
        config = options(tmp_path / method)
        owner, name = method.rsplit(".", 1)
        write = getattr(pkgutil.resolve_name(owner), name)

        def replace(*args, config=config, write=write):
            shutil.rmtree(config.workdir)
            config.workdir.mkdir()
            (config.workdir / ".lock").touch()
            write(*args)

        monkeypatch.setattr(method, replace)
        code, _, error = command(monkeypatch, capsys, config)
        monkeypatch.setattr(method, write)
        assert code == 1
        assert "No such file or directory" in error and error.count("\n") == 1
        assert [path.name for path in config.workdir.iterdir()] == [".lock"]


def test_a_loss_that_is_not_finite(tmp_path, monkeypatch, capsys):
    config = options(tmp_path, learning_rate=1e30)
    code, _, error = command(monkeypatch, capsys, config)
    assert code == 1
    assert error.startswith("error: epoch 1, step 2: the training loss is ")
    assert error.count("\n") == 1
    assert numbers(tmp_path) == [1]
    assert not (tmp_path / "vae.pth").exists()


def test_parameters_that_are_not_finite_are_not_kept(tmp_path, mnist):
    config = options(tmp_path)
    fit(config)
    progress = newest(config, mnist)
    progress.state = progress.state.replace(
        step=progress.state.step + 1, params=jax.tree.map(lambda leaf: leaf * np.float32(np.nan), progress.state.params)
    )
    checkpoints = Checkpoints(config, 600, 784, few(mnist).checksum())
    with pytest.raises(NonFiniteLossError, match="epoch 3: step 16 has made parameters that are not finite"):
        checkpoints.save(progress)
    assert numbers(tmp_path) == [14, 15]


def test_init(tmp_path, undisturbed):
    file = undisturbed / "vae.pth"
    # At no rate at all, what comes out is what went in.
    fit(options(tmp_path / "still", epochs=1, learning_rate=1e-30, init=file))
    assert (tmp_path / "still/vae.pth").read_bytes() == file.read_bytes()
    # It is read at the start only; a run that goes on has its weights.
    copy = tmp_path / "init.pth"
    shutil.copy(file, copy)
    changes = {"init": copy, "checkpoint_every": 0.0}
    fit(options(tmp_path / "straight", epochs=3, **changes))
    fit(options(tmp_path / "on", epochs=1, **changes))
    copy.unlink()
    fit(options(tmp_path / "on", epochs=3, **changes))
    require_same(tmp_path / "on", tmp_path / "straight")
    assert metrics(tmp_path / "on")[0]["train_loss"] < metrics(undisturbed)[-1]["train_loss"]


def test_init_with_adam(tmp_path, undisturbed, monkeypatch):
    # PyTorch's Adam after 7 steps, each gradient the parameter itself.
    model = TorchVAE(16, 4)
    model.load_state_dict(convert.load(undisturbed / "vae.pth"))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    for _ in range(7):
        for parameter in model.parameters():
            parameter.grad = parameter.detach().clone()
        optimizer.step()
    file = tmp_path / "torch.pth"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    begun = []
    monkeypatch.setattr(vae_jax.train, "_train", lambda _, progress, *__: begun.append(progress.state))
    fit(options(tmp_path, init=file))
    (state,) = begun
    assert int(state.step) == 0 and int(state.opt_state.count) == 7
    for name, tree in (("exp_avg", state.opt_state.mu), ("exp_avg_sq", state.opt_state.nu)):
        keys = model.state_dict()
        moments = {key: optimizer.state_dict()["state"][number][name] for number, key in enumerate(keys)}
        expected = convert.to_params(moments)
        assert jax.tree.all(jax.tree.map(lambda found, right: bool((found == right).all()), tree, expected))


def test_init_refusals(tmp_path, undisturbed, monkeypatch, capsys):
    file = undisturbed / "vae.pth"
    for changes, message in (
        (
            {"hidden_dim": 17},
            f"--init {file}: holds a model of 784 pixels, --hidden-dim 16 and --latent-dim 4; expected",
        ),
        ({"init": tmp_path / "no.pth"}, f"{tmp_path}/no.pth: cannot be read (No such file or directory)"),
        ({"init": undisturbed / "run/config.json"}, "is not a file of plain tensors"),
    ):
        code, _, error = command(monkeypatch, capsys, options(tmp_path, **{"init": file} | changes))
        assert code == 2
        assert message in error and error.count("\n") == 1
    model = TorchVAE(16, 4)
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    torch.save({"model": model.state_dict(), "optimizer": adam.state_dict()}, tmp_path / "adam.pth")
    huge = {key: tensor.double() * 1e300 for key, tensor in model.state_dict().items()}
    torch.save(huge, tmp_path / "huge.pth")
    code, _, error = command(monkeypatch, capsys, options(tmp_path, init=tmp_path / "huge.pth"))
    assert (code, error) == (
        2,
        f"error: --init {tmp_path}/huge.pth: holds values beyond 3.403e+38; expected those of a float32\n",
    )
    code, _, error = command(monkeypatch, capsys, options(tmp_path, init=tmp_path / "adam.pth"))
    assert code == 2
    assert error == (
        f"error: --init {tmp_path}/adam.pth: its Adam has --learning-rate 0.01; expected 0.001;"
        " give the option that it needs\n"
    )
    assert not (tmp_path / "run").exists()


def test_events_of_a_run_that_died(tmp_path, monkeypatch):
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


SCRIPT = """
import sys
from pathlib import Path
import vae_jax.train
from vae_jax import Dataset, TrainConfig, cli, load
few = Dataset(*(array[:600] for array in load()))
vae_jax.train.load = lambda *_: few
vae_jax.train.STRETCH_FLOPS = 1
vae_jax.log.RunLog.draw = lambda log, *_: [
    (log._config.workdir / name).write_text(str(len(log._history))) for name in vae_jax.train.PICTURES
]
cli.run(vae_jax.fit, TrainConfig, "train")
"""


def start(folder: Path, output: int = subprocess.PIPE, **changes) -> subprocess.Popen[str]:
    """The command in a process of its own, on 600 images."""
    words = options(folder, **changes).command.split()[3:]
    return subprocess.Popen([sys.executable, "-c", SCRIPT, *words], stdout=output, stderr=output, text=True)


def test_signals(tmp_path):
    longer = {"epochs": 60, "checkpoint_every": 0.0}
    for stop, epoch in ((signal.SIGKILL, 5), (signal.SIGTERM, 15), (signal.SIGINT, 25), (None, 60)):
        process = start(tmp_path / "stopped", **longer)
        assert process.stdout is not None
        begun = [next(process.stdout) for _ in range(3)]
        if stop != signal.SIGKILL:
            assert begun[2].startswith(f"{tmp_path}/stopped/run: goes on after epoch ")
        if stop is None:
            break
        assert any(line.startswith(f"epoch {epoch:2}/60") for line in process.stdout)
        process.send_signal(stop)
        _, error = process.communicate(timeout=60)
        if stop == signal.SIGKILL:
            assert process.returncode == -signal.SIGKILL
        else:
            assert process.returncode == 128 + stop
            assert error == f"to go on: {options(tmp_path / 'stopped', **longer).command}\ninterrupted\n"
        assert not (tmp_path / "stopped/vae.pth").exists()
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (0, "")
    fit(options(tmp_path / "straight", **longer))
    require_same(tmp_path / "stopped", tmp_path / "straight")


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_starting(stop, tmp_path):
    process = start(tmp_path)
    while not (tmp_path / "run/.lock").exists():
        time.sleep(0.01)
    process.send_signal(stop)
    output, error = process.communicate(timeout=60)
    assert process.returncode == 128 + stop
    assert "epoch" not in output
    assert error == f"to go on: {options(tmp_path).command}\ninterrupted\n"


def test_a_signal_after_the_end(tmp_path):
    script = f"import atexit, signal\natexit.register(signal.raise_signal, signal.SIGTERM)\n{SCRIPT}"
    words = options(tmp_path).command.split()[3:]
    result = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True)
    assert (tmp_path / "vae.pth").exists()
    assert (result.returncode, result.stderr) == (143, f"to go on: {options(tmp_path).command}\ninterrupted\n")


@pytest.mark.parametrize("library", ["jaxlib", "_tensorstore"])
def test_a_signal_in_the_middle_of_an_import(library, tmp_path):
    # An exception there would be lost in the library's initialization, or break it.
    process = start(tmp_path, overwrite=True)
    while library not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    begun = library != "jaxlib"
    assert error == f"to go on: {options(tmp_path, overwrite=not begun).command}\ninterrupted\n"


def test_a_signal_outlives_what_it_waited_for():
    with pytest.raises(KeyboardInterrupt), signals.deferred():
        signal.raise_signal(signal.SIGINT)
        raise OSError


def test_a_second_signal_does_what_it_did_before():
    script = (
        "import signal\n"
        "from vae_jax.signals import noted\n"
        "try:\n"
        "    with noted() as stop:\n"
        "        signal.raise_signal(signal.SIGINT)\n"
        "        print(stop.signum, flush=True)\n"
        "        signal.raise_signal(signal.SIGINT)\n"
        "except KeyboardInterrupt:\n"
        "    with noted() as stop:\n"
        "        signal.raise_signal(signal.SIGTERM)\n"
        "        print(stop.signum, flush=True)\n"
        "        signal.raise_signal(signal.SIGTERM)\n"
        "        print('still here', flush=True)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (-signal.SIGTERM, "2\n15\n", "")


def test_a_terminal_that_has_gone(tmp_path, undisturbed):
    ours, theirs = os.openpty()
    with start(tmp_path, checkpoint_every=60.0, output=theirs) as process:
        os.close(theirs)
        os.read(ours, 1)
        os.close(ours)
    assert process.returncode == 0
    assert (tmp_path / "run/model.pth").read_bytes() == (undisturbed / "run/model.pth").read_bytes()


def test_a_path_that_the_terminal_cannot_show(tmp_path):
    folder = tmp_path / "Größe"
    words = [sys.executable, "-c", SCRIPT, *shlex.split(options(folder).command)[3:]]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    result = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1].startswith(f"saved {tmp_path}/Gr\\xf6\\xdfe/vae.pth; ")


def test_closed_streams(tmp_path, undisturbed):
    words = [sys.executable, "-c", SCRIPT, *options(tmp_path).command.split()[3:]]
    subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *words], check=True)
    assert (tmp_path / "run/model.pth").read_bytes() == (undisturbed / "run/model.pth").read_bytes()


def test_a_pipe_that_has_gone(tmp_path, undisturbed):
    with start(tmp_path, checkpoint_every=60.0) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0
    for name in ("vae.pth", "run/model.pth"):
        assert (tmp_path / name).read_bytes() == (undisturbed / name).read_bytes()


def test_signals_are_as_before_afterwards(tmp_path):
    before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    fit(options(tmp_path))
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == before
