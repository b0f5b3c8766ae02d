"""Several devices and several processes: the same bits as with one, and an end in one line when something is wrong."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

from tests.runs.small_runs import ROOT, arguments, checkpoints, listing, process, require_same
from vae_jax import InputError, TrainConfig, fit

GONE = "error: process {} is gone; the checkpoints are whole; to go on, start all processes again as before\n"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    rng = np.random.default_rng(0)
    file = tmp_path_factory.mktemp("images") / "images.npz"
    sets = {
        f"{split}_{part}": rng.integers(0, most, shape, np.uint8)
        for split, count in (("train", 300), ("test", 90))
        for part, most, shape in (("images", 256, (count, 8, 8)), ("labels", 10, count))
    }
    np.savez(file, **sets)
    return file


@pytest.fixture(scope="module")
def options(images):
    """`options(folder, **changes)`: 2 epochs of 10 steps, in 4 shards, with binary pixels drawn in each step."""

    def options(folder, **changes) -> TrainConfig:
        settings = {
            "data": str(images), "workdir": folder / "run", "export": folder / "vae.pth", "epochs": 2, "shards": 4,
            "hidden_dim": 8, "latent_dim": 3, "batch_size": 32, "binarize": "dynamic", "heartbeat": 5.0,
            "initialization_timeout": 300,
        }  # fmt: skip
        return TrainConfig(**settings | changes)

    return options


def start(config: TrainConfig, devices: int = 1, before: str = "", plain: bool = False) -> subprocess.Popen[str]:
    """Starts the command, quickened or as a user does, where JAX finds so many devices."""
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    environment.pop("TF_CPP_MIN_LOG_LEVEL", None)  # jax has set it here
    pipe = subprocess.PIPE
    words = [sys.executable, "-m", "vae_jax.train", *arguments(config)] if plain else process(config, before)
    return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def numbered(*configs: TrainConfig) -> list[TrainConfig]:
    """The options of processes that train together."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    together = {"coordinator": address, "processes": len(configs)}
    return [dataclasses.replace(config, process=number, **together) for number, config in enumerate(configs)]


def ends(running: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit code, standard output and standard error of each process."""
    try:
        texts = [each.communicate(timeout=300) for each in running]
    finally:
        for each in running:
            each.kill()
    return [(each.returncode, *text) for each, text in zip(running, texts, strict=True)]


ON_MANY_DEVICES = """
import sys
from tests.runs import small_runs
small_runs.quicken(small_runs.pytest.MonkeyPatch())
for words in sys.argv[1].split(";"):
    sys.argv = ["train", *words.split(",")]
    small_runs.vae_jax.train.main()
"""


@pytest.fixture(scope="module")
def runs(options, tmp_path_factory):
    """The options of finished runs, by their number of devices: in one process each."""
    found = {}
    for devices in (1, 4):  # that JAX finds
        some = {
            used: options(tmp_path_factory.mktemp("run"), devices=used) for used in ((1,) if devices == 1 else (2, 4))
        }
        environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        words = ";".join(",".join(arguments(config)) for config in some.values())
        subprocess.run([sys.executable, "-c", ON_MANY_DEVICES, words], cwd=ROOT, env=environment, check=True)
        found |= some
    return found


def test_any_number_of_devices_makes_the_same_bits(runs):
    for devices in (2, 4):
        require_same(runs[devices], runs[1])
    device = json.loads((runs[4].workdir / "config.json").read_text())["device"]
    assert device == "4 x cpu"


# Slow enough to be disturbed.
SLOW = """
import time
from vae_jax.runs.progress import Progress
end_epoch = Progress.end_epoch
Progress.end_epoch = lambda *arguments: time.sleep(0.3) or end_epoch(*arguments)
"""


def test_processes_that_stop_and_die(tmp_path, options):
    straight = options(tmp_path / "straight", epochs=12)
    alone = start(straight)
    config = options(tmp_path / "disturbed", epochs=12, checkpoint_every=0.0)
    # A process that hangs is noticed as one that is gone: by its silence.
    for signum, number in ((signal.SIGTERM, 1), (signal.SIGSTOP, 0)):
        configs = numbered(config, config)
        running = [start(each, 2, SLOW) for each in configs]
        assert running[0].stdout is not None
        if not any(text.startswith("epoch ") for text in running[0].stdout):
            pytest.fail(str(ends(running)))
        running[number].send_signal(signum)
        if signum == signal.SIGTERM:
            for each, (code, _, error) in zip(configs, ends(running), strict=True):
                assert (code, error) == (143, f"to go on: {each.command}\ninterrupted\n")
            assert listing(config.workdir) >= {"checkpoints", ".lock"}
            assert not {".process-0", ".process-1"} & listing(config.workdir)
        else:
            (survivor,) = ends([running[1 - number]])
            running[number].kill()
            running[number].communicate()
            assert (survivor[0], survivor[2]) == (1, GONE.format(number))
        assert checkpoints(config)
        assert not config.export.exists()
    ((code, output, error),) = ends([start(config, 2)])
    assert (code, error) == (0, "")
    assert "; 2 x cpu\n" in output and f"\n{config.workdir}: goes on after epoch " in output
    assert ends([alone])[0][0] == 0
    require_same(config, straight)


def test_two_processes_make_the_same_bits(tmp_path, options, runs):
    config = options(tmp_path)
    (code, output, error), other = ends([start(each, 2) for each in numbered(config, config)])
    assert (code, error) == (0, "")
    assert "; 4 x cpu in 2 processes\n" in output
    assert other == (0, "", "")
    require_same(config, runs[1])


# What ends process 0 after its first epoch.
FULL_DISK = """
import errno
from vae_jax.runs.checkpoint import Checkpoints
def save(*_):
    raise OSError(errno.ENOSPC, "No space left on device", "5.safetensors")
Checkpoints.save = save
"""


def test_a_full_disk(tmp_path, options):
    config = options(tmp_path, epochs=1000, checkpoint_every=0.0)
    first, second = numbered(config, config)
    found = ends([start(first, before=FULL_DISK), start(second)])
    assert [(code, error) for code, _, error in found] == [
        (1, "error: 5.safetensors: No space left on device; fix this and rerun the command\n"),
        (1, GONE.format(0)),
    ]


def test_a_loss_that_is_not_finite(tmp_path, options):
    config = options(tmp_path, learning_rate=1e30)
    found = ends([start(each) for each in numbered(config, config)])
    for code, _, error in found:
        assert code == 1
        assert error.startswith("error: epoch 1, step ") and error.count("\n") == 1
    assert not {".process-0", ".process-1"} & listing(config.workdir)


OTHER_SHARDS = "--shards: is 1 in process 1, 4 in process 0; give all processes the same options"
OTHER_FOLDER = (
    "--workdir: is {folder}/other in process 1, {folder}/run in process 0; give all processes the same options"
)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"shards": 1}, OTHER_SHARDS),
        ({"workdir": "other"}, OTHER_FOLDER),
        ({"data": "mnist"}, "process 1 has other images than process 0; give all processes the same"),
        ({"data": "missing.npz"}, "process 1: --data missing.npz: no such file or folder"),
    ],
)
def test_processes_that_do_not_go_together(changes, line, tmp_path, options):
    if "workdir" in changes:
        changes = {"workdir": tmp_path / changes["workdir"]}
    found = ends([start(each) for each in numbered(options(tmp_path), options(tmp_path, **changes))])
    for code, output, error in found:
        assert (code, output) == (2, "")
        assert error.startswith(f"error: {line.format(folder=tmp_path)}") and error.count("\n") == 1
    assert not listing(tmp_path)


def test_devices_that_are_not_there(tmp_path, options):
    with pytest.raises(InputError, match=r"^--shards 4 and --devices 3: 1 device cannot share them equally; expected"):
        fit(options(tmp_path, devices=3))
    assert not listing(tmp_path)


def test_a_process_that_nobody_joins(tmp_path, options):
    pair = 2 * [options(tmp_path, initialization_timeout=3)]
    first, second = numbered(*pair)[0], numbered(*pair)[1]  # at two addresses
    found = ends([start(first, plain=True), start(second, plain=True)])
    for what, (code, output, error) in zip(
        ("--processes 2", f"--coordinator {second.coordinator}"), found, strict=True
    ):
        assert (code, output) == (2, "")
        assert error.startswith(f"error: {what}: not all processes have come within 3 seconds")
        assert error.count("\n") == 1
    assert not listing(tmp_path)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"shards": 5}, "--shards 5: expected a divisor of --batch-size 32; all parts are equal"),
        ({"shards": 0}, "--shards 0: expected a whole number from 1 to 2147483647; the default is 1"),
        ({"devices": 0}, "--devices 0: expected a whole number from 1 to 2147483647"),
        ({"devices": "some"}, "--devices some: expected a whole number from 1 to 2147483647"),
        ({"heartbeat": 0.5}, "--heartbeat 0.5: expected a finite number of at least 1; the default is 30.0"),
        ({"coordinator": "host:1"}, "--coordinator, --processes and --process: expected all three, or none of them"),
        ({"processes": 2, "process": 0}, "--coordinator, --processes and --process: expected all three, or none"),
        ({"coordinator": "host:1", "processes": 2}, "--coordinator, --processes and --process: expected all three"),
        (
            {"coordinator": "host:1", "processes": 2, "process": 2},
            "--process 2: expected a number from 0 to 1",
        ),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together(changes, line, tmp_path, options):
    with pytest.raises(InputError) as refusal:
        options(tmp_path, **changes).check()
    assert str(refusal.value).startswith(line)
