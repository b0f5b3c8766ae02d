"""Several processes, as users start them: they train the model of one process, and only process 0 prints."""

import shutil
import socket
import subprocess

import pytest

from tests.runs import small_runs
from vae_jax import TrainConfig

PATIENCE_S = 300


@pytest.fixture(scope="module")
def recipe(options):
    """`recipe(folder, **changes)`: the options of a run of four shards."""
    return lambda folder, **changes: options(folder, epochs=1, shards=4, checkpoint_every=60.0, **changes)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, recipe) -> TrainConfig:
    """The options of a finished run of one process with one device."""
    config = recipe(tmp_path_factory.mktemp("alone"))
    finish(small_runs.start(small_runs.process(config)))
    return config


def finish(*processes: subprocess.Popen[str]) -> list[tuple[str, str]]:
    """Standard output and error of processes that end well."""
    outputs = [process.communicate(timeout=PATIENCE_S) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    return outputs


def test_open_mpi(tmp_path, recipe, alone):
    if shutil.which("mpirun") is None:
        pytest.skip("mpirun is not installed")
    mpirun = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2"]
    ((printed, errors),) = finish(small_runs.start([*mpirun, *small_runs.process(recipe(tmp_path))]))
    assert printed.count("saved") == 1
    assert "2 x cpu in 2 processes" in printed
    assert errors == ""
    small_runs.require_same(recipe(tmp_path), alone)


@pytest.mark.parametrize(("size", "rank"), [("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"), ("PMI_SIZE", "PMI_RANK")])
def test_a_launcher_that_jax_does_not_know(tmp_path, recipe, command, monkeypatch, size, rank):
    monkeypatch.delenv("OMPI_MCA_orte_hnp_uri", raising=False)
    monkeypatch.setenv(size, "2")
    code, printed, errors = command(recipe(tmp_path))
    assert (code, printed) == (2, "")
    assert f"{size}=2" in errors
    assert f"--processes ${size} --process ${rank}" in errors
    assert small_runs.listing(tmp_path) == set()


def test_a_port_that_is_taken(tmp_path, recipe, command):
    with socket.create_server(("", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
        code, printed, errors = command(recipe(tmp_path, coordinator=address, processes=2, process=0))
    assert (code, printed) == (2, "")
    assert f"--coordinator {address}: process 0 cannot listen there" in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    "address", ["localhost", "localhost:", ":1234", "localhost:port", "localhost:0", "localhost:99999"]
)
def test_a_coordinator_that_is_no_address(tmp_path, recipe, command, address):
    code, _, errors = command(recipe(tmp_path, coordinator=address, processes=2, process=0))
    assert code == 2
    assert errors == f"error: --coordinator {address}: expected HOST:PORT, such as localhost:12345\n"
