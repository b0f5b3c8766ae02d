"""Options: every wrong one is one line with exit code 2, answered without jax, and nothing on disk has changed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from vae_jax import InputError, TrainConfig, cli, fit

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
    Path("a-loop").symlink_to("a-loop")
    Path("blocked/samples.png").mkdir(parents=True)
    before = listing(tmp_path)

    monkeypatch.setattr(sys, "argv", ["train", option, value])
    with pytest.raises(SystemExit) as stopped:
        cli.run(fit, TrainConfig, "train")
    assert stopped.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    assert re.search(f"{option}[ :,].*{re.escape(value[:250])}", output.err)
    assert listing(tmp_path) == before


def test_a_bad_option_needs_no_jax(tmp_path):
    result = run("--batch-size", "0", cwd=tmp_path)
    expected = "error: --batch-size 0: expected a whole number from 1 to 2147483647; the default is 128\n"
    assert (result.returncode, result.stdout, result.stderr) == (2, "", expected)


def test_a_missing_value_and_an_unknown_option(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train", "--epochs"])
    with pytest.raises(InputError, match="Missing value for argument '--epochs'"):
        cli.parse(TrainConfig, "train")
    monkeypatch.setattr(sys, "argv", ["train", "--epoch", "3"])
    with pytest.raises(InputError, match=r"Unrecognized options: --epoch, 3; perhaps you meant: --epochs"):
        cli.parse(TrainConfig, "train")


def test_options_are_read(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train", "--epochs", "3", "--learning-rate", "1e-2", "--overwrite"])
    assert cli.parse(TrainConfig, "train") == TrainConfig(epochs=3, learning_rate=0.01, overwrite=True)
    monkeypatch.setattr(sys, "argv", ["train"])
    assert cli.parse(TrainConfig, "train") == TrainConfig()


def test_a_good_configuration_leaves_nothing_behind(tmp_path):
    before = listing(tmp_path)
    TrainConfig(workdir=tmp_path / "a/b", export=tmp_path / "c/vae.pth").check()
    assert listing(tmp_path) == before
