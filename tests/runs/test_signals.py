"""Runs as processes: signals, and standard streams that are closed or cannot show a name."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.runs.small_runs import ROOT, arguments, process, require_same, start
from vae_jax import fit
from vae_jax.config import TrainConfig


def plain(config: TrainConfig) -> subprocess.Popen[str]:
    """Starts the command as a user does."""
    return start([sys.executable, "-m", "vae_jax.train", *arguments(config)])


def wait_for_library(running: subprocess.Popen, library: str) -> None:
    """Waits until a process begins to load a library."""
    while library not in Path(f"/proc/{running.pid}/maps").read_text():
        assert running.poll() is None
        time.sleep(0.001)


@pytest.mark.usefixtures("quick")
def test_signals(tmp_path, options):
    config = options(tmp_path / "stopped", epochs=60, checkpoint_every=0.0)
    for stop, epoch in ((signal.SIGKILL, 5), (signal.SIGTERM, 15), (signal.SIGINT, 25), (None, 60)):
        running = start(process(config))
        assert running.stdout is not None
        begun = [next(running.stdout) for _ in range(3)]
        if stop != signal.SIGKILL:
            assert begun[2].startswith(f"{config.workdir}: goes on after epoch ")
        if stop is None:
            break
        assert any(line.startswith(f"epoch {epoch:2}/60") for line in running.stdout)
        running.send_signal(stop)
        _, error = running.communicate(timeout=60)
        if stop == signal.SIGKILL:
            assert running.returncode == -signal.SIGKILL
        else:
            assert running.returncode == 128 + stop
            assert error == f"to go on: {config.command}\ninterrupted\n"
        assert not config.export.exists()
    _, error = running.communicate(timeout=60)
    assert (running.returncode, error) == (0, "")
    straight = options(tmp_path / "straight", epochs=60, checkpoint_every=0.0)
    fit(straight)
    require_same(config, straight)


@pytest.mark.parametrize(("stop", "library"), [(signal.SIGINT, "jaxlib"), (signal.SIGTERM, "libtorch")])
def test_a_signal_in_the_middle_of_an_import(stop, library, tmp_path, options):
    # An exception there would get lost in the library's initialization, or break it.
    config = options(tmp_path)
    running = plain(config)
    wait_for_library(running, library)
    running.send_signal(stop)
    output, error = running.communicate(timeout=60)
    assert running.returncode == 128 + stop
    assert "epoch" not in output
    assert error == f"to go on: {config.command}\ninterrupted\n"


LIBRARY_CALL = """
import sys
from pathlib import Path
from vae_jax import TrainConfig, fit
data, folder = sys.argv[1], Path(sys.argv[2])
config = TrainConfig(data, epochs=1, hidden_dim=16, latent_dim=4, workdir=folder / "run", export=folder / "vae.pth")
try:
    fit(config)
except KeyboardInterrupt:
    print("interrupted", flush=True)
import jax, torch
fit(config)
"""


@pytest.mark.parametrize("library", ["jaxlib", "libtorch"])
def test_a_library_call_can_be_interrupted_while_it_imports(library, tmp_path, few_images_file):
    running = start([sys.executable, "-c", LIBRARY_CALL, str(few_images_file), str(tmp_path)])
    wait_for_library(running, library)
    running.send_signal(signal.SIGINT)
    output, error = running.communicate(timeout=120)
    assert (running.returncode, error) == (0, "")
    assert "\nepoch 1/1 " in output.partition("interrupted\n")[2]
    assert "epoch" not in output.partition("interrupted\n")[0]
    assert (tmp_path / "vae.pth").exists()


def test_a_signal_after_the_end(tmp_path, options):
    # No advice: --overwrite would throw away what the run has made.
    config = options(tmp_path, epochs=1, overwrite=True)
    words = process(config, "import atexit, signal\natexit.register(signal.raise_signal, signal.SIGTERM)")
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert config.export.exists()
    assert (result.returncode, result.stderr) == (143, "interrupted\n")


def test_a_terminal_that_has_gone(tmp_path, options, undisturbed):
    ours, theirs = os.openpty()
    config = options(tmp_path, checkpoint_every=60.0)
    with start(process(config), output=theirs) as running:
        os.close(theirs)
        os.read(ours, 1)
        os.close(ours)
    assert running.returncode == 0
    require_same(config, undisturbed)


def test_a_pipe_that_has_gone(tmp_path, options, undisturbed):
    config = options(tmp_path, checkpoint_every=60.0)
    with start(process(config)) as running:
        assert running.stdout is not None and running.stderr is not None
        running.stdout.readline()
        running.stdout.close()
        assert running.stderr.read() == ""
    assert running.returncode == 0
    require_same(config, undisturbed)


def test_a_warning_that_nobody_reads(stopped, undisturbed):
    (stopped.workdir / "checkpoints/3.safetensors").write_bytes(b"")
    running = start(process(stopped))
    assert running.stderr is not None
    running.stderr.close()
    running.communicate(timeout=60)
    assert running.returncode == 0
    require_same(stopped, undisturbed)


def test_closed_streams(tmp_path, options, undisturbed):
    config = options(tmp_path, checkpoint_every=60.0)
    subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *process(config)], cwd=ROOT, check=True)
    require_same(config, undisturbed)


def test_a_path_that_the_terminal_cannot_show(tmp_path, options):
    config = options(tmp_path / "Größe", epochs=1)
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    result = subprocess.run(process(config), cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1].startswith(f"saved {tmp_path}/Gr\\xf6\\xdfe/vae.pth; ")


@pytest.mark.usefixtures("quick")
def test_signals_are_as_before_afterwards(finished):
    before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    fit(finished)
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == before
