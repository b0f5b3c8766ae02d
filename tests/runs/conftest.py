import shutil
import sys

import pytest

import vae_jax.train
from tests.runs import small_runs
from tests.runs.small_runs import Died, Options
from vae_jax import TrainConfig, fit
from vae_jax.runs.checkpoint import Checkpoints
from vae_jax.runs.workdir import Workdir


@pytest.fixture(scope="session")
def options(few_images_file) -> Options:
    """`options(folder, **changes)`: 3 epochs on 600 images, by default a checkpoint after every step."""

    def options(folder, **changes) -> TrainConfig:
        settings = {"epochs": 3, "hidden_dim": 16, "latent_dim": 4, "checkpoint_every": 1e-9} | changes
        return TrainConfig(
            **{"data": str(few_images_file), "workdir": folder / "run", "export": folder / "vae.pth"} | settings
        )

    return options


@pytest.fixture
def quick(monkeypatch):
    small_runs.quicken(monkeypatch)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, options):
    """The options of a run that nothing has disturbed, with one checkpoint, at its end."""
    config = options(tmp_path_factory.mktemp("undisturbed"), checkpoint_every=60.0)
    with pytest.MonkeyPatch.context() as patch:
        small_runs.quicken(patch)
        fit(config)
    return config


@pytest.fixture
def finished(tmp_path, undisturbed, options):
    """The options of a copy of that run."""
    shutil.copytree(undisturbed.workdir.parent, tmp_path, dirs_exist_ok=True)
    return options(tmp_path, checkpoint_every=60.0)


@pytest.fixture(scope="session")
def died(tmp_path_factory, options):
    """The options of a run that died in its first epoch, with checkpoints after steps 2 and 3."""
    config = options(tmp_path_factory.mktemp("died"))
    save = Checkpoints.save

    def save_and_die(checkpoints, progress):
        save(checkpoints, progress)
        if progress.state.step == 3:
            raise Died

    with pytest.MonkeyPatch.context() as patch:
        small_runs.quicken(patch)
        patch.setattr(Checkpoints, "save", save_and_die)
        with pytest.raises(Died):
            fit(config)
    assert small_runs.checkpoints(config) == [2, 3]
    return config


@pytest.fixture
def stopped(tmp_path, died, options):
    """The options to go on with a copy of that run."""
    shutil.copytree(died.workdir.parent, tmp_path, dirs_exist_ok=True)
    return options(tmp_path, checkpoint_every=60.0)


@pytest.fixture
def newest(few_images):
    """`newest(config)`: what the run would go on with."""
    return lambda config: Checkpoints(config, Workdir(config), few_images, few_images.checksum()).newest()


@pytest.fixture
def command(monkeypatch, capsys):
    """`command(config)` runs the command: exit code, standard output, standard error."""

    def command(config: TrainConfig) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["train", *small_runs.arguments(config)])
        try:
            vae_jax.train.main()
            code = 0
        except SystemExit as end:
            code = end.code
        return (code, *capsys.readouterr())

    return command
