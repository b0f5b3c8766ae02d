"""A model read back from the folder of a run, finished or not."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from tests.runs.small_runs import STEPS, metrics
from torch_ref import convert
from vae_jax import InputError, fit
from vae_jax.config import EncodeConfig, EvaluateConfig, ExploreConfig, ExportConfig, Latents, Sample
from vae_jax.encode import encode
from vae_jax.evaluate import evaluate
from vae_jax.explore import explore
from vae_jax.export import export
from vae_jax.generate import generate
from vae_jax.runs.trained import images_for, read

pytestmark = pytest.mark.usefixtures("quick")


def require_checkpoint(trained, folder: Path, step: int) -> None:
    """The model is that of the checkpoint after so many steps."""
    arrays = safetensors.numpy.load_file(folder / f"checkpoints/{step}.safetensors")
    for part, layers in trained.params.items():
        for layer, leaves in layers.items():
            for name, leaf in leaves.items():
                np.testing.assert_array_equal(leaf, arrays[f"params.{part}.{layer}.{name}"])


def state_of(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in [folder, *folder.rglob("*")]}


def test_an_interrupted_run_is_its_newest_checkpoint(stopped, capsys):
    before = state_of(stopped.workdir)
    for checkpoint in (None, "newest"):
        require_checkpoint(read(stopped.workdir, checkpoint), stopped.workdir, 3)
        line = "has not finished; using its newest checkpoint, after epoch 0 and step 3 of epoch 1"
        assert capsys.readouterr().out == f"{stopped.workdir}: {line}\n"
    assert read(stopped.workdir).options["hidden_dim"] == 16
    assert state_of(stopped.workdir) == before


@pytest.mark.parametrize(
    ("command", "config"),
    [
        (evaluate, lambda run, out: EvaluateConfig(run, images=2, json=out / "a.json")),
        (generate, lambda run, out: Sample(run, out / "a.npz")),
        (generate, lambda run, out: Latents(run, out / "a.npz")),
        (encode, lambda run, out: EncodeConfig(run, out / "a.npz")),
        (explore, lambda run, out: ExploreConfig(run, out / "a.html")),
        (export, lambda run, out: ExportConfig(run, out / "a.safetensors", layout="pytorch-examples")),
    ],
    ids=["evaluate", "sample", "latents", "encode", "explore", "export"],
)
def test_every_command_takes_an_interrupted_run(command, config, stopped, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    before = state_of(stopped.workdir)
    command(config(stopped.workdir, tmp_path / "out"))
    assert f"{stopped.workdir}: has not finished; using its newest checkpoint" in capsys.readouterr().out
    assert len(list((tmp_path / "out").iterdir())) == 1 and state_of(stopped.workdir) == before


def test_a_finished_run_is_its_model(finished, capsys):
    (weights,) = convert.load(finished.workdir / "model.pth")["decoder.fc1.bias"][None]
    trained = read(finished.workdir)
    np.testing.assert_array_equal(trained.params["decoder"]["fc1"]["bias"], weights)
    assert capsys.readouterr().out == ""
    require_checkpoint(read(finished.workdir, "newest"), finished.workdir, 3 * STEPS)
    assert capsys.readouterr().out == f"{finished.workdir}: using its newest checkpoint, after epoch 3\n"


def test_the_best_checkpoint_has_the_lowest_test_loss(tmp_path, options, capsys):
    config = options(tmp_path, epochs=5, checkpoint_every=0.0, learning_rate=1.0)  # an early epoch is the best one
    fit(config)
    losses = [epoch["test_loss"] for epoch in metrics(config)]
    best = 1 + losses.index(min(losses))
    assert best < 4
    capsys.readouterr()
    require_checkpoint(read(config.workdir, "best"), config.workdir, best * STEPS)
    line = f"using its best checkpoint, after epoch {best}, test loss {min(losses):.2f}\n"
    assert capsys.readouterr().out == f"{config.workdir}: {line}"
    # Without it, the best of those that are left.
    (config.workdir / f"checkpoints/{best * STEPS}.safetensors").write_bytes(b"damaged")
    left = min((4, 5), key=lambda epoch: losses[epoch - 1])
    require_checkpoint(read(config.workdir, "best"), config.workdir, left * STEPS)
    assert "is damaged" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_skipped(stopped, capsys):
    file = stopped.workdir / "checkpoints/3.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    require_checkpoint(read(stopped.workdir), stopped.workdir, 2)
    assert f"warning: {file}: is damaged" in capsys.readouterr().err


def test_a_checkpoint_that_vanishes_gives_way_to_those_that_came(stopped, monkeypatch):
    """As if the run went on between listing and reading."""
    folder, read_bytes = stopped.workdir / "checkpoints", Path.read_bytes
    newer = (folder / "3.safetensors").read_bytes()
    (folder / "3.safetensors").rename(folder / "1.safetensors")

    def go_on(path):
        if path.name == "2.safetensors":
            for step in (1, 2):
                (folder / f"{step}.safetensors").unlink()
            (folder / "3.safetensors").write_bytes(newer)
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", go_on)
    require_checkpoint(read(stopped.workdir), stopped.workdir, 3)


def test_refusals(finished):
    with pytest.raises(InputError, match=r"--checkpoint best: .*model.pth is a weights file, not a run"):
        read(finished.workdir / "model.pth", "best")
    (finished.workdir / "model.pth").unlink()
    shutil.rmtree(finished.workdir / "checkpoints")
    with pytest.raises(InputError, match="has no checkpoint that can be read; train on"):
        read(finished.workdir)


def test_there_is_no_best_within_the_first_epoch(stopped):
    with pytest.raises(InputError, match="has no checkpoint at the end of an epoch that can be read"):
        read(stopped.workdir, "best")


def test_images_given_to_fit_must_be_named(tmp_path, options, few_images, few_images_file):
    config = options(tmp_path, epochs=1)
    fit(config, few_images)
    trained = read(config.workdir)
    with pytest.raises(InputError, match="the images of this run were given to fit; name them with --data"):
        images_for(EvaluateConfig(config.workdir), trained)
    _, dataset, _ = images_for(EvaluateConfig(config.workdir, data=str(few_images_file)), trained)
    np.testing.assert_array_equal(dataset.test_images, few_images.test_images)


def test_the_images_of_a_run_may_have_moved(finished, few_images_file, tmp_path, monkeypatch):
    moved = shutil.copy(few_images_file, tmp_path / "moved.npz")
    path = finished.workdir / "config.json"
    path.write_text(path.read_text().replace(str(few_images_file), "gone.npz"))
    trained = read(finished.workdir)
    with pytest.raises(InputError, match=r"^--data gone\.npz: no such file"):
        images_for(EvaluateConfig(finished.workdir), trained)
    for name in (moved, "moved.npz"):
        monkeypatch.chdir(tmp_path)
        data, dataset, _ = images_for(EvaluateConfig(finished.workdir, data=str(name)), trained)
        assert data == str(name) and dataset.image_shape == (28, 28)
