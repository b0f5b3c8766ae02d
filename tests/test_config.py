"""Options: every wrong one is one line with exit code 2, answered without jax, and nothing on disk has changed."""

import dataclasses
import os
import re
import subprocess
import sys
import typing
from pathlib import Path

import numpy as np
import pytest

from vae_jax import InputError, TrainConfig, config, fit
from vae_jax.config import TorchTrainConfig
from vae_jax.runs.workdir import Workdir
from vae_jax.system import command_line

WITHOUT_JAX = """
import runpy, sys
sys.modules["jax"] = None  # importing it fails
sys.argv = ["vae_jax.train", *sys.argv[1:]]
try:
    runpy.run_module("vae_jax.train", run_name="__main__")
finally:
    assert "torch" not in sys.modules
"""


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", WITHOUT_JAX, *arguments], cwd=cwd, capture_output=True, text=True)


def listing(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.lstat().st_mtime_ns) for path in [folder, *folder.rglob("*")])


def test_help_needs_no_jax(tmp_path):
    result = run("--help", cwd=tmp_path)
    assert result.returncode == 0
    for field in TrainConfig.__dataclass_fields__:
        assert "--" + field.replace("_", "-") in result.stdout


BAD = {
    "--epochs": ["0", "-1", "1.5", "many"],
    "--batch-size": ["0", "-128"],
    "--hidden-dim": ["0", "1000000000"],
    "--latent-dim": ["-20"],
    "--learning-rate": ["0", "-0.001", "nan", "inf", "1e+39", "fast"],
    "--beta": ["-1", "nan", "inf"],
    "--patience": ["-1", "1.5", "2147483648", "none"],
    "--seed": ["-1", "4294967296"],
    "--data": ["no-such-set", ""],
    "--export": [
        "old-run",
        "runs/mnist",
        "runs",
        "runs/mnist/config.json",
        "runs/mnist/checkpoints/10/vae.pth",
        "a-loop",
        "a-file/vae.pth",
        "notes.txt",
        "notes.pth",
        "vae.onnx",
        "/proc/vae.pth",
        "/dev/null",
        "x" * 300,
    ],
    "--workdir": ["old-run", "a-loop", "blocked", "a-file", "a-file/run", "/proc/run", "x" * 300],
    "--epoch": ["3"],
}


@pytest.mark.parametrize(("option", "value"), [(option, value) for option in BAD for value in BAD[option]])
def test_bad_options(option, value, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("old-run").mkdir()
    Path("old-run/metrics.jsonl").write_text('{"epoch": 1}\n')
    Path("a-file").write_text("")
    Path("notes.pth").write_text("not weights")
    Path("a-loop").symlink_to("a-loop")
    Path("blocked/samples.png").mkdir(parents=True)
    before = listing(tmp_path)

    monkeypatch.setattr(sys, "argv", ["train", option, value])
    with pytest.raises(SystemExit) as stopped:
        command_line.run(fit, TrainConfig, "train")
    assert stopped.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    assert re.search(f"{option}[ :,].*{re.escape(value[:250])}", output.err)
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("option", "value"),
    [("learning-rate-schedule", "linear"), ("learning-rate-schedule", "Cosine"), ("keep", "first"), ("keep", "2")],
)
def test_a_choice_that_is_not_there(option, value, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train", f"--{option}", value])
    with pytest.raises(InputError, match=f"invalid choice '{value}' for argument '--{option}'. Expected one of "):
        command_line.parse(TrainConfig, "train")
    options = {option.replace("-", "_"): value, "workdir": tmp_path / "run", "export": tmp_path / "vae.pth"}
    with pytest.raises(InputError, match=f"^--{option} {value}: expected one of .*; the default is "):
        fit(TrainConfig(**options))
    assert not list(tmp_path.iterdir())


def test_a_bad_option_needs_no_jax(tmp_path):
    result = run("--batch-size", "0", cwd=tmp_path)
    expected = "error: --batch-size 0: expected a whole number from 1 to 2147483647; the default is 128\n"
    assert (result.returncode, result.stdout, result.stderr) == (2, "", expected)


def test_a_missing_value_and_an_unknown_option(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train", "--epochs"])
    with pytest.raises(InputError, match="Missing value for argument '--epochs'"):
        command_line.parse(TrainConfig, "train")
    monkeypatch.setattr(sys, "argv", ["train", "--epoch", "3"])
    with pytest.raises(InputError, match=r"Unrecognized options: --epoch, 3; perhaps you meant: --epochs"):
        command_line.parse(TrainConfig, "train")


def test_options_are_read(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train", "--epochs", "3", "--learning-rate", "1e-2", "--overwrite"])
    assert command_line.parse(TrainConfig, "train") == TrainConfig(epochs=3, learning_rate=0.01, overwrite=True)
    monkeypatch.setattr(sys, "argv", ["train"])
    assert command_line.parse(TrainConfig, "train") == TrainConfig()


def test_a_good_configuration_leaves_nothing_behind(tmp_path):
    before = listing(tmp_path)
    config = TrainConfig(workdir=tmp_path / "a/b", export=tmp_path / "c/vae.pth")
    config.check()
    Workdir(config).check()
    assert listing(tmp_path) == before


def test_options_are_converted_to_their_types(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    options = {"seed": np.int64(3), "batch_size": np.uint8(7), "beta": np.float32(2), "data": Path("set.npz")}
    config = TrainConfig(workdir="~/run", export="vae.pth", **options)  # pyright: ignore
    assert config.workdir == Path("/home/me/run") and config.export == Path("vae.pth")
    assert (config.seed, config.batch_size, config.beta, config.data) == (3, 7, 2.0, "set.npz")
    assert [type(value) for value in (config.seed, config.beta, config.data)] == [int, float, str]
    config.check()
    assert TrainConfig(workdir=Path("~nobody-of-that-name/run")).workdir == Path("~nobody-of-that-name/run")


COMMANDS = [
    getattr(config, name)
    for name in (
        "TrainConfig", "SweepConfig", "EvaluateConfig", "EncodeConfig", "Sample", "Decode", "ExploreConfig",
        "ExportConfig", "ConvertConfig", "ParityConfig", "TorchTrainConfig",
    )
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_the_home_folder_in_every_path(command, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    hints = typing.get_type_hints(command)
    fields = dataclasses.fields(command)
    paths = [field.name for field in fields if hints[field.name] in (Path, Path | None)]
    needed = {field.name: "x:X" for field in fields if field.default is dataclasses.MISSING}
    options = command(**needed | dict.fromkeys(paths, "~/here"))
    assert paths and {getattr(options, name) for name in paths} == {Path("/home/me/here")}


class OtherPath:
    """A path that is not pathlib's."""

    def __fspath__(self):
        return "~/run"


def test_other_paths_and_flags_are_converted(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = TrainConfig(workdir=OtherPath(), data=OtherPath(), overwrite=np.True_, grey=np.False_)  # pyright: ignore
    assert (config.workdir, config.data) == (Path("/home/me/run"), "~/run")  # `load` takes ~ as the home folder
    assert config.overwrite is True and config.grey is False
    config.check()


def test_arrays_are_lists_of_numbers():
    config = TrainConfig(hidden_dims=np.array([200, 100]), image_size=np.array([28, 28], np.uint8))  # pyright: ignore
    assert (config.hidden_dims, config.image_size) == ((200, 100), (28, 28))
    assert config == TrainConfig(hidden_dims=[200, 100], image_size=(28, 28))  # pyright: ignore
    config.check()
    with pytest.raises(InputError, match=r"^--image-size 28 28 3: expected 2 whole numbers"):
        TrainConfig(image_size=np.array([28, 28, 3])).check()  # pyright: ignore
    with pytest.raises(InputError, match=r"^--image-size .*: expected 2 whole numbers"):
        TrainConfig(image_size=np.array([[28, 28]])).check()  # pyright: ignore


WRONG = [{"seed": 1.0}, {"epochs": "3"}, {"beta": "x"}, {"epochs": True}, {"seed": None}]
WRONG += [{"overwrite": "no"}, {"grey": 0}, {"tensorboard": None}, {"workdir": None}, {"export": 3}, {"data": None}]
WRONG += [{"data": 3}, {"init": 3}]


@pytest.mark.parametrize("changes", WRONG, ids=str)
def test_wrong_types_are_refused(changes):
    (name,) = changes
    with pytest.raises(InputError, match=f"^--{name} .*: expected "):
        TrainConfig(**changes).check()


def test_the_defaults_in_words_are_the_defaults():
    words = TrainConfig(
        learning_rate_schedule="constant", patience=0, keep="last", adam_b1=0.9, shards=1, hidden_dims=()
    )
    assert words == TrainConfig() and words.command.endswith("vae_jax.train")


def test_the_recipe_is_what_decides_the_model():
    assert {"data", "seed", "init", "matmul_precision"} <= TrainConfig().recipe.keys()
    assert not {"workdir", "epochs", "data_dir", "export", "patience", "keep"} & TrainConfig().recipe.keys()
    assert TrainConfig(learning_rate_schedule="cosine", epochs=3).recipe["epochs"] == 3
    assert not {"workdir", "overwrite"} & {field.name for field in dataclasses.fields(TorchTrainConfig)}


MODULES = [f"vae_jax.{command}" for command in ("train", "evaluate", "generate", "encode", "explore", "export")]
MODULES += ["torch_ref.train", "torch_ref.convert"]


@pytest.mark.parametrize("module", MODULES)
def test_help_imports_neither_jax_nor_torch(module, tmp_path):
    code = (
        "import atexit, runpy, sys; sys.argv = ['x', '--help']\n"
        "atexit.register(lambda: print('imported', {'jax', 'torch'} & sys.modules.keys()))\n"
        f"runpy.run_module('{module}', run_name='__main__')"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "usage:" in result.stdout and result.stdout.endswith("imported set()\n")


@pytest.mark.parametrize("words", [["vae_jax.train"], ["vae_jax.generate", "sample"], ["torch_ref.convert"]], ids=str)
def test_help_whose_reader_has_seen_enough(words):
    command, pipe = [sys.executable, "-m", *words, "--help"], subprocess.PIPE
    # A short text that is buffered is written at the very end.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment) as running:
        assert running.stdout is not None and running.stderr is not None
        running.stdout.close()
        assert running.stderr.read() == ""
    assert running.returncode == 0


def test_the_console_command(tmp_path):
    def vae_jax(*words):
        return subprocess.run([sys.executable, "-m", "vae_jax", *words], cwd=tmp_path, capture_output=True, text=True)

    assert "evaluate" in vae_jax("--help").stdout
    assert (vae_jax("trian").returncode, vae_jax("trian").stderr.count("\n")) == (2, 1)
    assert "--learning-rate" in vae_jax("train", "--help").stdout
    assert vae_jax("train", "--epochs", "0").stderr.startswith("error: --epochs 0: expected a whole number")
