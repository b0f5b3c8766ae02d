"""TFDS without TensorFlow, by its own downloader, from a server on this machine."""

import gzip
import importlib.util
import json
import multiprocessing
import shutil
import socket
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import requests
import tensorflow_datasets as tfds

from tests.tfds_server import Server, amat_files, emnist_archive, idx_files, redirected, send, served
from vae_jax import DataError, Dataset, load, tfds_source

TRAIN_IMAGES = "train-images-idx3-ubyte.gz"
# As many as a builder of TFDS asks for.
COUNTS = {"_TRAIN_EXAMPLES": 300, "_TEST_EXAMPLES": 50}

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of TFDS and of what it imports
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.skipif(importlib.util.find_spec("tensorflow") is not None, reason="shows what goes without TensorFlow"),
]


@pytest.fixture(scope="module")
def small(mnist) -> Dataset:
    return Dataset(mnist.train_images[:300], mnist.train_labels[:300], mnist.test_images[:50], mnist.test_labels[:50])


@pytest.fixture
def server(small, monkeypatch):
    """Serves MNIST, Fashion-MNIST and KMNIST of a few images."""
    from tensorflow_datasets.image_classification import mnist as builders

    for name, count in COUNTS.items():
        monkeypatch.setattr(builders, name, count)
    with served({f"{name}.gz": gzip.compress(content) for name, content in idx_files(small).items()}) as server:
        yield server


@pytest.fixture(scope="module")
def prepared(small, tmp_path_factory) -> Path:
    """A data_dir with a prepared and cached `mnist` of a few images."""
    from tensorflow_datasets.image_classification import mnist as builders

    root = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        for name, count in COUNTS.items():
            patch.setattr(builders, name, count)
        with served({f"{name}.gz": gzip.compress(content) for name, content in idx_files(small).items()}):
            load("tfds:mnist", root)
    return root


def assert_same(found: Dataset, expected: Dataset) -> None:
    """The same pairs of image and label, in whatever order: TFDS shuffles what it writes."""
    for part in (0, 2):
        pairs = [
            Counter(zip(map(bytes, np.asarray(dataset[part])), np.asarray(dataset[part + 1]).tolist(), strict=True))
            for dataset in (found, expected)
        ]
        assert pairs[0] == pairs[1]


def leftovers(root: Path) -> list[str]:
    """What a start that failed has left, but for folders and the lock."""
    return [
        path.name
        for path in root.rglob("*")
        if (path.is_file() and path.suffix != ".lock") or "incomplete" in path.name
    ]


def test_the_real_mnist_is_prepared_without_tensorflow(mnist, tmp_path, capsys):
    """All 70,000 images; the second start is 20 times faster than the first reading, and asks for nothing."""
    with served({f"{name}.gz": gzip.compress(content, 1) for name, content in idx_files(mnist).items()}) as server:
        builder = tfds_source.find_builder("tfds:mnist", tmp_path, "mnist", None, None)
        folder = tfds_source.prepare("tfds:mnist", builder)
        assert len(server.requests) == 4
    start = time.perf_counter()
    first = load("tfds:mnist", tmp_path)
    first_seconds = time.perf_counter() - start
    start = time.perf_counter()
    second = load("tfds:mnist", tmp_path)
    second_seconds = time.perf_counter() - start
    assert_same(first, mnist)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)
    assert first_seconds > 20 * second_seconds, (first_seconds, second_seconds)
    # Any other program on the machine can read it, and TFDS knows it by its own name.
    assert tfds.builder("mnist", data_dir=tmp_path).is_prepared()
    assert json.loads((folder / "dataset_info.json").read_text())["moduleName"].startswith("tensorflow_datasets.")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["fashion_mnist", "kmnist"])
def test_the_mnist_family(server, small, tmp_path, name):
    assert_same(load(f"tfds:{name}", tmp_path), small)
    assert_same(load(f"tfds:{name}:3.0.1", tmp_path), small)
    assert len(server.requests) == 4


def test_emnist_out_of_its_archive(small, tmp_path, monkeypatch):
    from tensorflow_datasets.image_classification import mnist as builders

    config = next(config for config in builders.EMNIST.BUILDER_CONFIGS if config.name == "letters")
    monkeypatch.setattr(config, "train_examples", 300)
    monkeypatch.setattr(config, "test_examples", 50)
    with served({"gzip.zip": emnist_archive(small, "letters")}):
        assert_same(load("tfds:emnist/letters", tmp_path), small)
    assert_same(load("tfds:emnist/letters:3.1.0", tmp_path), small)
    # TFDS's default configuration is another one, which is not prepared.
    assert (tmp_path / "emnist/letters/3.1.0").is_dir()


def test_binarized_mnist_is_black_and_white(small, tmp_path):
    with served(amat_files(small)):
        dataset = load("tfds:binarized_mnist", tmp_path)
    assert dataset.pixels("none") == "binary" and dataset.train_labels is None
    expected = np.where(small.train_images > 127, 255, 0).astype(np.uint8)
    assert Counter(map(bytes, dataset.train_images)) == Counter(map(bytes, expected))
    assert len(dataset.test_images) == 25  # those of `test`; `validation` is another 25


def test_tfds_data_dir_is_honoured(prepared, small, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    assert_same(load("tfds:mnist"), small)


def refuse_connection(request, _):
    request.connection.shutdown(socket.SHUT_RDWR)


def cut(request, content):
    send(request, content[: len(content) // 2], len(content))


def error_500(request, _):
    request.send_error(500)


def error_404(request, _):
    request.send_error(404)


def wrong_bytes(request, content):
    send(request, content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (refuse_connection, "the download broke off"),
        (cut, "the download broke off"),
        (error_500, "the download broke off .*500"),
        (error_404, "the download broke off .*404"),
        (wrong_bytes, "train-images-idx3-ubyte.gz arrived with a wrong checksum and was thrown away"),
    ],
)
def test_a_broken_download_leaves_nothing_and_the_next_start_succeeds(server, small, tmp_path, capfd, fault, message):
    server.faults[TRAIN_IMAGES] = [fault] * (tfds_source.RETRIES + 1)
    start = time.perf_counter()
    with pytest.raises(DataError, match=message) as refusal:
        load("tfds:mnist", tmp_path)
    assert time.perf_counter() - start < 15
    assert "\n" not in str(refusal.value) and "offline there are --data mnist" in str(refusal.value)
    assert capfd.readouterr() == ("", "")
    assert not [name for name in leftovers(tmp_path) if TRAIN_IMAGES[:12] in name or "mnist-train" in name]
    assert not (tmp_path / "mnist").exists()
    server.faults.clear()
    assert_same(load("tfds:mnist", tmp_path), small)


def test_one_lost_answer_is_asked_for_again(server, small, tmp_path):
    server.faults[TRAIN_IMAGES] = [error_500]
    assert_same(load("tfds:mnist", tmp_path), small)


def test_a_damaged_earlier_download_is_named(server, tmp_path):
    def arrived():
        # A file, and what TFDS notes of it, in whichever order.
        notes = (tmp_path / "downloads").rglob("*train-labels*.gz.INFO")
        return [note.with_suffix("") for note in notes if note.with_suffix("").exists() and note.stat().st_size]

    def late_404(request, content):
        # The four files are downloaded side by side; the other one has to be there first.
        end = time.monotonic() + 60
        while not arrived() and time.monotonic() < end:
            time.sleep(0.01)
        error_404(request, content)

    server.faults[TRAIN_IMAGES] = [late_404] * (tfds_source.RETRIES + 1)
    with pytest.raises(DataError, match="broke off"):
        load("tfds:mnist", tmp_path)
    server.faults.clear()
    (labels,) = arrived()
    labels.write_bytes(b"something else")
    with pytest.raises(DataError, match=r"has 14 bytes of checksum .*; delete it and start again") as refusal:
        load("tfds:mnist", tmp_path)
    assert str(labels) in str(refusal.value)
    labels.unlink()
    load("tfds:mnist", tmp_path)


def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_no_network_is_one_line_soon(server, tmp_path, monkeypatch, capfd):
    """Nobody listens; then somebody who never answers."""
    from tensorflow_datasets.core.download import checksums
    from tensorflow_datasets.image_classification import mnist as builders

    infos = checksums.get_all_url_infos()
    monkeypatch.setattr(tfds_source, "REACH_SECONDS", 1)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        for port, reason in (
            (closed_port(), "Connection refused"),
            (silent.getsockname()[1], "no answer within 1 sec"),
        ):
            url = f"http://127.0.0.1:{port}/"
            redirected = {key.replace(server.url, url): info for key, info in infos.items()}
            monkeypatch.setattr(checksums, "get_all_url_infos", lambda infos=redirected: dict(infos))
            monkeypatch.setattr(builders.MNIST, "URL", url)
            start = time.perf_counter()
            with pytest.raises(
                DataError, match=rf"127\.0\.0\.1 cannot be reached .*{reason}.* wanted {url}"
            ) as refusal:
                load("tfds:mnist", tmp_path)
            assert time.perf_counter() - start < 5
            assert "--data mnist (bundled), --data FOLDER (IDX files), and --data-dir" in str(refusal.value)
    assert capfd.readouterr() == ("", "")
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tfds:", "is no name of a TFDS set; expected tfds:NAME"),
        ("tfds:../mnist", "is no name of a TFDS set"),
        ("tfds:mnist:3", "is no name of a TFDS set"),
        ("tfds:fashon_mnist", "TFDS knows no set fashon_mnist; perhaps fashion_mnist"),
        (
            "tfds:cifar10",
            "needs TensorFlow, which is not installed; pip install tensorflow, or .* array_record; mnist, ",
        ),
        ("tfds:mnist:1.0.0", "mnist cannot be loaded at version 1.0.0, only: 3.0.1"),
        ("tfds:emnist/greek", "greek not found.*; its configurations: byclass, .*letters"),
    ],
)
def test_unknown_sets_are_refused_with_nothing_written(tmp_path, spec, message):
    with pytest.raises(DataError, match=message):
        load(spec, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_a_tfrecord_copy_gets_a_clear_answer(prepared, tmp_path):
    folder = tmp_path / "mnist/3.0.1"
    shutil.copytree(prepared / "mnist/3.0.1", folder, ignore=shutil.ignore_patterns("vae_jax-*"))
    info = (folder / "dataset_info.json").read_text()
    (folder / "dataset_info.json").write_text(info.replace("array_record", "tfrecord"))
    with pytest.raises(DataError, match=f"{folder} is prepared as tfrecord; expected array_record") as refusal:
        load("tfds:mnist", tmp_path)
    assert "another --data-dir" in str(refusal.value)


def test_a_prepared_copy_is_used_as_it_is(prepared, small, tmp_path):
    """Of a set that TFDS does not know, in a version that it could not make, with its cache made anew."""
    folder = tmp_path / "my_digits/7.0.0"
    shutil.copytree(prepared / "mnist/3.0.1", folder)
    for path in list(folder.iterdir()):
        if path.suffix == ".json":
            text = path.read_text().replace('"mnist"', '"my_digits"').replace('"3.0.1"', '"7.0.0"')
            path.write_text(text)
        path.rename(folder / path.name.replace("mnist-", "my_digits-"))
    (tmp_path / "my_digits/10.0.0").mkdir()  # not prepared
    assert_same(load("tfds:my_digits", tmp_path), small)
    assert len(list(folder.glob("vae_jax-*.npz"))) == 1


@pytest.mark.parametrize("damage", [b"", b"not what it was"])
def test_a_damaged_cache_is_made_anew(prepared, small, tmp_path, damage):
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    cache = next(tmp_path.glob("mnist/*/vae_jax-*.npz"))
    cache.write_bytes(damage)
    assert_same(load("tfds:mnist", tmp_path), small)
    assert_same(load("tfds:mnist", tmp_path), small)


def test_a_damaged_copy_is_named(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    next(tmp_path.glob("mnist/*/vae_jax-*.npz")).unlink()
    record = next(tmp_path.glob("mnist/*/*train*"))
    record.write_bytes(record.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"cannot be read .*; delete that folder and start again") as refusal:
        load("tfds:mnist", tmp_path)
    assert str(record.parent) in str(refusal.value)


def test_too_large_a_set_is_refused_from_copy_and_cache(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    for _ in range(2):
        with pytest.raises(DataError, match="raise --max-data-gb"):
            load("tfds:mnist", tmp_path, max_gb=1e-6)
        for cache in tmp_path.glob("mnist/*/vae_jax-*.npz"):
            cache.unlink()


def load_elsewhere(url: str, files: dict[str, bytes], root: Path) -> list[int]:
    """In another process: the sums of the arrays."""
    from tensorflow_datasets.image_classification import mnist as builders

    with pytest.MonkeyPatch.context() as patch, redirected(url, files):
        for name, count in COUNTS.items():
            patch.setattr(builders, name, count)
        return [int(part.sum(dtype=np.int64)) for part in load("tfds:mnist", root) if part is not None]


def test_two_starts_at_once_prepare_once(server, small, tmp_path):
    expected = [int(part.sum(dtype=np.int64)) for part in small]
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        starts = [pool.submit(load_elsewhere, server.url, server.files, tmp_path) for _ in range(2)]
        assert [start.result(timeout=60) for start in starts] == [expected, expected]
    assert sorted(server.requests) == sorted(server.files)


def test_the_server_is_on_this_machine():
    with Server({"file": b"content"}) as server:
        assert server.url.startswith("http://127.0.0.1:")
        assert requests.get(server.url + "file", timeout=5).content == b"content"
