"""Checkpoints: one safetensors file each, which is whole on the disk or reported as damaged."""

import dataclasses
import json
import os
import pkgutil
import resource
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors

from tests.runs.small_runs import STEPS, checkpoints, metrics, require_same
from vae_jax import NonFiniteLossError, fit
from vae_jax.runs.checkpoint import Checkpoints
from vae_jax.runs.metrics import EpochMetrics
from vae_jax.runs.workdir import Workdir

pytestmark = pytest.mark.usefixtures("quick")


def test_the_newest_two_and_the_best_are_kept(tmp_path, options):
    config = options(tmp_path, epochs=4, checkpoint_every=0.0)
    fit(config)
    assert checkpoints(config) == [3 * STEPS, 4 * STEPS]
    # The rate is too high: an early epoch is the best one.
    config = options(tmp_path / "bad", epochs=5, checkpoint_every=0.0, learning_rate=1.0)
    fit(config)
    losses = [epoch["test_loss"] for epoch in metrics(config)]
    best = 1 + losses.index(min(losses))
    assert best < 4
    assert checkpoints(config) == [best * STEPS, 4 * STEPS, 5 * STEPS]


def test_the_package_safetensors_opens_it(undisturbed, newest):
    (file,) = (undisturbed.workdir / "checkpoints").iterdir()
    assert file.name == "15.safetensors"
    state = newest(undisturbed).state
    with safetensors.safe_open(file, "numpy") as archive:
        names = set(archive.keys())
        assert {"step", "key", "beta", "learning_rate", "opt_state.count"} <= names
        weights = {"encoder.fc1", "encoder.fc2_mu", "encoder.fc2_logvar", "decoder.fc1", "decoder.fc2"}
        for tree in ("params", "opt_state.mu", "opt_state.nu"):
            expected = {f"{tree}.{layer}.{part}" for layer in weights for part in ("kernel", "bias")}
            assert {name for name in names if name.startswith(f"{tree}.")} == expected
        kernel = archive.get_tensor("params.encoder.fc1.kernel")
        np.testing.assert_array_equal(kernel, state.params["encoder"]["fc1"]["kernel"])
        assert archive.get_tensor("step") == 15
        notes = json.loads(archive.metadata()["notes"])
    assert notes["config"]["hidden_dim"] == 16 and notes["config"]["data"] == undisturbed.data
    assert [{**epoch, "seconds": 0} for epoch in notes["history"]] == [
        {**epoch, "seconds": 0} for epoch in metrics(undisturbed)
    ]


def test_what_is_saved_is_what_is_read(stopped, newest):
    progress = newest(stopped)
    assert int(progress.state.step) == 3
    assert progress.history == [] and len(progress.bce) == len(progress.kld) == 3
    assert str(progress) == "epoch 0 and step 3 of epoch 1"


def test_a_checkpoint_is_on_the_disk_before_it_takes_its_place(tmp_path, options, monkeypatch):
    synced, renamed, fsync, replace = [], [], os.fsync, Path.replace

    def note(descriptor):
        synced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def check(path, target):
        if path.suffix == ".safetensors":
            assert path.stat().st_ino in synced
            renamed.append(path.name)
            synced.clear()
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(Path, "replace", check)
    config = options(tmp_path, epochs=1)
    fit(config)
    assert renamed == [f"{step}.safetensors" for step in range(1, STEPS + 1)]
    assert (config.workdir / "checkpoints").stat().st_ino in synced


def test_a_checkpoint_is_due_in_time(tmp_path, options, few_images, newest, undisturbed, monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    config = options(tmp_path, checkpoint_every=60.0)
    due = Checkpoints(config, Workdir(config), few_images, few_images.checksum())
    progress = newest(undisturbed)

    def due_after_epoch(seconds: float) -> bool:
        history = [dataclasses.replace(progress.history[0], seconds=seconds)]
        return due.due_after_epoch(dataclasses.replace(progress, history=history))

    now += 55
    # After an epoch of 6 seconds, the next chance of a checkpoint with a test loss comes too late.
    assert not due.due_within_epoch() and not due_after_epoch(4.0) and due_after_epoch(6.0)
    now += 5
    assert due.due_within_epoch() and due_after_epoch(0.0)
    every_epoch = Checkpoints(
        dataclasses.replace(config, checkpoint_every=0.0), Workdir(config), few_images, few_images.checksum()
    )
    assert not every_epoch.due_within_epoch()
    assert isinstance(progress.history[0], EpochMetrics) and every_epoch.due_after_epoch(progress)


def damages(content: bytes) -> list[bytes | None]:
    """A file truncated, emptied, grown, deleted, and with single bits flipped all over it."""
    header = 8 + int.from_bytes(content[:8], "little")
    # In the length of the header, everywhere in the header, and everywhere in the arrays.
    places = [*range(0, 64, 11), *np.linspace(64, 8 * header - 1, 25, dtype=int)]
    places += [*np.linspace(8 * header, 8 * len(content) - 1, 10, dtype=int)]
    flipped = []
    for place in places:
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        flipped.append(bytes(damaged))
    return [content[: len(content) // 2], content[:-1], content[:5], b"", content + b"\0", None, *flipped]


def test_any_damage_to_the_newest_checkpoint(stopped, newest, capsys):
    file = stopped.workdir / "checkpoints/3.safetensors"
    content = file.read_bytes()
    for damaged in damages(content):
        if damaged is None:
            file.unlink()
        else:
            file.write_bytes(damaged)
        capsys.readouterr()
        assert int(newest(stopped).state.step) == 2
        error = capsys.readouterr().err
        if damaged is None:
            assert error == ""
        else:
            assert error.startswith(f"warning: {file}: is damaged (")
            assert error.endswith("); using the one before it\n") and error.count("\n") == 1
    file.write_bytes(content)
    assert int(newest(stopped).state.step) == 3


def test_a_run_goes_on_from_the_older_checkpoint(stopped, undisturbed, command):
    file = stopped.workdir / "checkpoints/3.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    code, output, error = command(stopped)
    assert code == 0
    assert error == f"warning: {file}: is damaged (its checksum does not match); using the one before it\n"
    assert f"{stopped.workdir}: goes on after epoch 0 and step 2 of epoch 1\n" in output
    # The one that is whole stays until there are two newer ones.
    assert checkpoints(stopped) == [2, 3 * STEPS]
    require_same(stopped, undisturbed)


def test_all_checkpoints_damaged(stopped, options, tmp_path, command):
    for file in (stopped.workdir / "checkpoints").iterdir():
        file.write_bytes(b"")
    before = sorted(tmp_path.rglob("*"))
    code, _, error = command(stopped)
    assert code == 2
    assert error.splitlines()[-1] == (
        f"error: --workdir {stopped.workdir}: none of its checkpoints can be read; restore a copy of one,"
        " or add --overwrite to start again"
    )
    assert sorted(tmp_path.rglob("*")) == before
    assert command(options(tmp_path, overwrite=True))[0] == 0


# What file managers, notebooks, sync clients, editors and network disks leave beside checkpoints.
FOREIGN = [
    "00999.safetensors", "999", "3.safetensors.bak", "best.safetensors", ".DS_Store", "Thumbs.db", "desktop.ini",
    ".ipynb_checkpoints/3-checkpoint.safetensors", "3 (conflicted copy 2026-01-01).safetensors", ".sync_1.db",
    ".3.safetensors.swp", "3.safetensors~", "#3.safetensors#", "._3.safetensors", ".nfs000000000012",
    "3.safetensors.dvc", "README.md", "../._config.json", "../notes.txt",
]  # fmt: skip


def test_what_is_no_checkpoint_is_left_alone(stopped, undisturbed, newest):
    folder = stopped.workdir / "checkpoints"
    own = [folder / name for name in FOREIGN]
    for path in own:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    (folder / "999.safetensors").mkdir()
    assert int(newest(stopped).state.step) == 3
    fit(stopped)
    for path in own:
        assert path.read_text() == "mine"
        path.unlink()
    (folder / ".ipynb_checkpoints").rmdir()
    (folder / "999.safetensors").rmdir()
    require_same(stopped, undisturbed)


def test_files_half_written_by_a_killed_process_are_removed(stopped, undisturbed):
    # No process has this number: Linux gives numbers up to 2^22 only.
    for place in (stopped.workdir, stopped.workdir / "checkpoints", stopped.export.parent):
        name = {"run": "metrics.jsonl", "checkpoints": "4.safetensors"}.get(place.name, "vae.pth")
        part = place / f".{name}.part-99999999-abc"
        part.mkdir()
        (part / name).write_text("half")
    fit(stopped)
    require_same(stopped, undisturbed)


def test_what_an_earlier_command_left_of_another_export_is_removed(stopped, tmp_path):
    options = json.loads((stopped.workdir / "config.json").read_text())
    (stopped.workdir / "config.json").write_text(json.dumps(options | {"export": str(tmp_path / "first.pth")}))
    left, foreign = (tmp_path / f".{name}.part-99999999-abc" for name in ("first.pth", "theirs.pth"))
    left.mkdir()
    foreign.mkdir()  # of a run that we know nothing of
    fit(stopped)
    assert foreign.exists() and not left.exists()


@pytest.mark.parametrize(
    ("writer", "call", "file", "note"),
    [
        (
            "vae_jax.runs.checkpoint.Checkpoints.save",
            10,
            "run/checkpoints/8.safetensors",
            "; the checkpoints before it are kept",
        ),
        ("vae_jax.runs.logs.Logs.add", 3, "run/metrics.jsonl", ""),
        ("torch_ref.convert.save", 1, "vae.pth", ""),
    ],
)
def test_a_full_disk(writer, call, file, note, tmp_path, options, undisturbed, command, monkeypatch):
    # From a call in the middle of the run on, no file may grow beyond 100 bytes.
    owner, name = writer.rsplit(".", 1)
    write, calls = getattr(pkgutil.resolve_name(owner), name), 0
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(*args):
        nonlocal calls
        calls += 1
        if calls == call:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        try:
            write(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    config = options(tmp_path)
    monkeypatch.setattr(writer, fill)
    code, _, error = command(config)
    assert code == 1
    assert error == f"error: {tmp_path}/{file}: File too large{note}; fix this and rerun the command\n"
    assert not list(tmp_path.rglob("*.part-*"))
    monkeypatch.setattr(writer, write)
    code, output, _ = command(config)
    assert code == 0
    assert "goes on after" in output or "finished" in output
    require_same(config, undisturbed)


def test_parameters_that_are_not_finite_are_not_kept(finished, newest, few_images):
    progress = newest(finished)
    progress.state = progress.state.replace(
        step=progress.state.step + 1,
        params=jax.tree.map(lambda leaf: leaf * jnp.float32(jnp.nan), progress.state.params),
    )
    with pytest.raises(NonFiniteLossError, match="epoch 3: step 16 has made parameters that are not finite"):
        Checkpoints(finished, Workdir(finished), few_images, few_images.checksum()).save(progress)
    assert checkpoints(finished) == [3 * STEPS]
