"""Files that are there whole or not at all, whatever happens while they are written."""

import os
import signal
import subprocess
import sys

import pytest

from vae_jax.system.files import replacing, sweep


def test_a_file_that_fails_leaves_the_old_one(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(path) as part:
        part.write_text("new")
        raise ZeroDivisionError
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "old"


def test_a_signal_waits_until_the_file_is_there(tmp_path):
    path = tmp_path / "a.txt"
    with pytest.raises(KeyboardInterrupt), replacing(path) as part:
        signal.raise_signal(signal.SIGINT)
        part.write_text("new")
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "new"


def test_what_a_dead_process_has_left_is_removed(tmp_path):
    path = tmp_path / "a.txt"
    script = "import os, sys; from pathlib import Path; from vae_jax.system.files import replacing\n"
    script += "with replacing(Path(sys.argv[1])): os._exit(0)"
    subprocess.run([sys.executable, "-c", script, path], check=True)
    assert len(list(tmp_path.iterdir())) == 1
    with replacing(path) as part:
        part.write_text("new")
        assert [file.name.split("-")[1] for file in tmp_path.iterdir()] == [str(os.getpid())]
    assert path.read_text() == "new"


def test_what_another_process_is_writing_stays(tmp_path):
    path = tmp_path / "a.txt"
    for writer, kept in ((os.getppid(), True), (os.getpid(), False)):  # in a container, all have one number
        left = tmp_path / f".a.txt.part-{writer}-x"
        left.mkdir()
        sweep(path)
        assert left.exists() == kept
