"""Sets of TFDS without TensorFlow: originals from a server on this machine, and copies that TFDS has prepared."""

import gc
import importlib.util
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from importlib.machinery import PathFinder
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from tests.data.tfds_server import amat_files, emnist_archive, gzipped_idx_files, send, served, source_at
from vae_jax.data import Dataset, downloads, load
from vae_jax.data.mnist_family import SETS
from vae_jax.system.errors import DataError
from vae_jax.system.signals import Interrupted

TRAIN_IMAGES = "train-images-idx3-ubyte.gz"

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of TFDS and of what it imports
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def without_tensorflow():
    """These tests show what goes without TensorFlow, also where it is installed: it is not found there either."""
    find_spec = PathFinder.find_spec
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, "tensorflow", raising=False)
        patch.setattr(PathFinder, "find_spec", lambda name, *at: None if name == "tensorflow" else find_spec(name, *at))
        yield


@pytest.fixture(scope="module")
def small(mnist) -> Dataset:
    return Dataset(mnist.train_images[:300], mnist.train_labels[:300], mnist.test_images[:50], mnist.test_labels[:50])


@pytest.fixture
def server(small):
    """Serves a few images as MNIST."""
    with served("mnist", gzipped_idx_files(small)) as server:
        yield server
    # pooch leaves connections of failed downloads open: warn about them now, while the warning is ignored.
    gc.collect()


class SmallDigits(tfds.core.GeneratorBasedBuilder):
    """A set that TFDS can prepare without TensorFlow, as its images are Pillow's."""

    VERSION = tfds.core.Version("7.0.0")

    def _info(self):
        image, label = tfds.features.Image(shape=(28, 28, 1)), tfds.features.ClassLabel(num_classes=10)
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict({"image": image, "label": label})
        )

    def _split_generators(self, _):
        mnist = load("mnist")
        return {
            "train": self._generate_examples(mnist.train_images[:300], mnist.train_labels),
            "test": self._generate_examples(mnist.test_images[:50], mnist.test_labels),
        }

    def _generate_examples(self, images, labels):
        for number, image in enumerate(images):
            yield number, {"image": Image.fromarray(image), "label": int(labels[number])}


class HalfLabelled(SmallDigits):
    """The same, but the test images have no labels: TFDS writes -1."""

    VERSION = tfds.core.Version("1.0.0")

    def _split_generators(self, _):
        mnist = load("mnist")
        return {
            "train": self._generate_examples(mnist.train_images[:5], mnist.train_labels),
            "test": self._generate_examples(mnist.test_images[:5], np.array([-1, 3, -1, 9, -1])),
        }


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A data_dir with a prepared and cached set of a few images."""
    root = tmp_path_factory.mktemp("prepared")
    find_spec = importlib.util.find_spec
    with mock.patch("importlib.util.find_spec", lambda name, *more: name == "tensorflow" or find_spec(name, *more)):
        load("tfds:small_digits", root)
    return root


def renamed(prepared: Path, root: Path, name: str, version: str) -> Path:
    """The prepared set under another name, without its cache."""
    folder = root / name / version
    shutil.copytree(prepared / "small_digits/7.0.0", folder, ignore=shutil.ignore_patterns("vae_jax-*"))
    for path in list(folder.iterdir()):
        if path.suffix == ".json":
            text = path.read_text().replace('"small_digits"', f'"{name}"').replace('"7.0.0"', f'"{version}"')
            path.write_text(text)
        path.rename(folder / path.name.replace("small_digits-", f"{name}-"))
    return folder


def assert_equal(found: Dataset, expected: Dataset) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
        assert one is None or other is None or one.dtype == other.dtype


def assert_same_pairs(found: Dataset, expected: Dataset) -> None:
    """The same pairs of image and label in any order: TFDS shuffles what it prepares."""
    for part in (0, 2):
        pairs = [
            Counter(zip(map(bytes, np.asarray(dataset[part])), np.asarray(dataset[part + 1]).tolist(), strict=True))
            for dataset in (found, expected)
        ]
        assert pairs[0] == pairs[1]


def leftovers(root: Path) -> set[str]:
    """The files that a failed start has left, except the lock."""
    return {path.name for path in root.rglob("*") if path.is_file() and path.suffix != ".lock"}


def test_the_table_is_that_of_tfds():
    """Addresses, checksums, versions and configurations, in TFDS's public attributes."""
    for name, source in SETS.items():
        builder = tfds.builder_cls(name)
        assert str(builder.VERSION) == source.version
        assert builder.url_infos is not None
        for file, sha256 in source.sha256.items():
            assert builder.url_infos[source.url + file].checksum == sha256
        assert tuple(builder.builder_configs) == tuple(filter(None, source.configs))


def test_the_real_mnist_is_downloaded_and_decoded(mnist, tmp_path, capsys):
    """All 70,000 images in MNIST's order; the second start is at least 4 times faster and downloads nothing."""
    seconds = []
    with served("mnist", gzipped_idx_files(mnist)) as server:
        for out_lines in (4, 0):
            start = time.process_time()  # of this process alone, however busy the machine
            dataset = load("tfds:mnist", tmp_path)
            seconds.append(time.process_time() - start)
            assert_equal(dataset, mnist)
            assert sorted(server.requests) == sorted(server.files)
            out, error = capsys.readouterr()
            assert out.count(f"downloading {server.url}") == out.count("\n") == out_lines and error == ""
    assert seconds[0] > 4 * seconds[1], seconds


def test_neither_tfds_nor_a_downloader_is_imported_to_read_the_cache(server, tmp_path):
    load("tfds:mnist", tmp_path)
    program = f"""
import sys
from vae_jax.data import mnist_family, load
mnist_family.SETS["mnist"] = {SETS["mnist"]!r}
load("tfds:mnist", {str(tmp_path)!r})
assert not {{"tensorflow_datasets", "pooch", "requests", "filelock"}} & set(sys.modules)
""".replace("Source(", "mnist_family.Source(")
    subprocess.run([sys.executable, "-c", program], check=True)
    assert len(server.requests) == 4


@pytest.mark.parametrize("name", ["fashion_mnist", "kmnist"])
def test_the_mnist_family(small, tmp_path, name):
    with served(name, gzipped_idx_files(small)) as server:
        assert_equal(load(f"tfds:{name}", tmp_path), small)
        assert_equal(load(f"tfds:{name}:3.0.1", tmp_path), small)
        assert len(server.requests) == 4


def test_emnist_out_of_its_archive(small, tmp_path):
    """Two configurations share one download; each has a cache of its own."""
    archive = emnist_archive({"letters": small, "byclass": Dataset(*(array[::-1] for array in small))})
    with served("emnist", {"gzip.zip": archive}) as server:
        for _ in range(2):
            assert_equal(load("tfds:emnist/letters", tmp_path), small)
            assert_equal(load("tfds:emnist", tmp_path), Dataset(*(array[::-1] for array in small)))
        assert_equal(load("tfds:emnist/letters:3.1.0", tmp_path), small)
        assert len(server.requests) == 1
    assert len(list(tmp_path.rglob("vae_jax-*.npz"))) == 2


def test_binarized_mnist_is_black_and_white(small, tmp_path):
    with served("binarized_mnist", amat_files(small)):
        dataset = load("tfds:binarized_mnist", tmp_path)
    assert dataset.pixels("none") == "binary" and dataset.train_labels is None and dataset.test_labels is None
    np.testing.assert_array_equal(dataset.train_images, np.where(small.train_images > 127, 255, 0))
    np.testing.assert_array_equal(dataset.test_images, np.where(small.test_images > 127, 255, 0))
    assert dataset.train_images.dtype == np.uint8


def test_tfds_data_dir_is_honoured(server, small, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert_equal(load("tfds:mnist"), small)
    assert leftovers(tmp_path) > set(server.files)


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
        (refuse_connection, "cannot be downloaded to"),
        (cut, "cannot be downloaded to"),
        (error_500, r"cannot be downloaded to .* \(500 "),
        (error_404, r"cannot be downloaded to .* \(404 "),
        (wrong_bytes, "has a wrong checksum and was thrown away"),
    ],
)
def test_a_broken_download_leaves_nothing_and_the_next_start_succeeds(server, small, tmp_path, capfd, fault, message):
    server.faults[TRAIN_IMAGES] = [fault] * (downloads.RETRIES + 1)
    start = time.perf_counter()
    with pytest.raises(DataError, match=f"{server.url}{TRAIN_IMAGES} {message}") as refusal:
        load("tfds:mnist", tmp_path)
    assert time.perf_counter() - start < 15
    assert "\n" not in str(refusal.value) and "offline, use --data mnist" in str(refusal.value)
    assert capfd.readouterr() == (f"downloading {server.url}{TRAIN_IMAGES}\n" * 3, "")
    assert not leftovers(tmp_path)
    assert_equal(load("tfds:mnist", tmp_path), small)


def test_one_lost_answer_is_asked_for_again(server, small, tmp_path):
    server.faults[TRAIN_IMAGES] = [error_500]
    assert_equal(load("tfds:mnist", tmp_path), small)


def test_only_missing_and_damaged_files_are_downloaded_again(server, small, tmp_path):
    server.faults["t10k-labels-idx1-ubyte.gz"] = [error_404] * (downloads.RETRIES + 1)
    with pytest.raises(DataError, match="t10k-labels"):
        load("tfds:mnist", tmp_path)
    assert leftovers(tmp_path) == set(server.files) - {"t10k-labels-idx1-ubyte.gz"}
    (tmp_path / "downloads/mnist" / TRAIN_IMAGES).write_bytes(b"something else")
    server.requests.clear()
    assert_equal(load("tfds:mnist", tmp_path), small)
    assert server.requests == [TRAIN_IMAGES, "t10k-labels-idx1-ubyte.gz"]


def test_ctrl_c_in_a_download_leaves_nothing_half_done(server, small, tmp_path):
    def interrupt(request, content):
        cut(request, content)
        os.kill(os.getpid(), signal.SIGINT)

    server.faults[TRAIN_IMAGES] = [interrupt]
    with pytest.raises(Interrupted):
        load("tfds:mnist", tmp_path)
    assert not leftovers(tmp_path)
    assert_equal(load("tfds:mnist", tmp_path), small)


def test_remains_of_a_killed_download_are_removed(server, small, tmp_path):
    left = tmp_path / "downloads/mnist/tmpabcdefgh"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half a file")
    assert_equal(load("tfds:mnist", tmp_path), small)
    assert server.requests and not left.exists()


def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def assert_offline(root: Path, host: str, reason: str) -> None:
    """Loading is refused soon, in one line, which names what goes offline."""
    start = time.perf_counter()
    with pytest.raises(DataError, match=rf"{host} cannot be reached: .*{reason}") as refusal:
        load("tfds:mnist", root)
    assert time.perf_counter() - start < 5
    assert "--data mnist (bundled), --data FOLDER (IDX files), or --data-dir" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not leftovers(root)


def test_no_network_is_one_line_soon(tmp_path, monkeypatch, capfd):
    """Nobody listens; somebody never answers; an address is looked up in vain, and for ever."""
    assert downloads.REACH_SECONDS < 20
    monkeypatch.setattr(downloads, "REACH_SECONDS", 1)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        for port, reason in (
            (closed_port(), "Connection refused"),
            (silent.getsockname()[1], "no answer within 1 sec"),
        ):
            monkeypatch.setitem(SETS, "mnist", SETS["mnist"]._replace(url=f"http://127.0.0.1:{port}/"))
            assert_offline(tmp_path, r"127\.0\.0\.1", reason)
    monkeypatch.setitem(SETS, "mnist", SETS["mnist"]._replace(url="http://no-such-host.invalid/"))
    assert_offline(tmp_path, "no-such-host.invalid", "")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(3))
    assert_offline(tmp_path, "no-such-host.invalid", "no answer within 1 sec")
    assert capfd.readouterr() == ("", "")


def test_a_folder_that_cannot_be_written_is_named(server, tmp_path):
    (tmp_path / "downloads").write_text("a file in the place of the folder")
    with pytest.raises(DataError, match=rf"cannot be downloaded to {tmp_path}/downloads/mnist .*--data-dir"):
        load("tfds:mnist", tmp_path)
    assert not server.requests


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tfds:", "does not name a TFDS set; expected tfds:NAME"),
        ("tfds:../mnist", "does not name a TFDS set"),
        ("tfds:mnist:", "does not name a TFDS set"),
        ("tfds:mnist:3", "mnist has no version 3; TFDS has 3.0.1, and there is no version in --data-dir; name one"),
        ("tfds:mnist:abc", "mnist has no version abc; TFDS has 3.0.1"),
        ("tfds:cifar10:9.9.9", "cifar10 has no version 9.9.9; TFDS has 3.0.2, and there is no version in --data-dir"),
        ("tfds:fashon_mnist:1.0.0", "TFDS has no set fashon_mnist; perhaps fashion_mnist"),
        ("tfds:fashon_mnist", "TFDS has no set fashon_mnist; perhaps fashion_mnist"),
        (
            "tfds:cifar10",
            "needs TensorFlow, which is not installed; pip install tensorflow, or .* array_record; mnist, ",
        ),
        ("tfds:mnist:1.0.0", "mnist has no version 1.0.0; TFDS has 3.0.1, and there is no version in --data-dir"),
        ("tfds:mnist/letters", "mnist has no configuration letters; expected tfds:mnist alone"),
        ("tfds:emnist/greek", "emnist has no configuration greek; expected one of byclass, .*letters"),
    ],
)
def test_unknown_sets_are_refused_with_nothing_written(tmp_path, spec, message):
    with pytest.raises(DataError, match=message):
        load(spec, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_a_set_that_tfds_prepares(prepared, small):
    assert_same_pairs(load("tfds:small_digits", prepared), small)
    assert_same_pairs(load("tfds:small_digits:7.0.0", prepared), small)
    assert tfds.builder("small_digits", data_dir=prepared).is_prepared()


def test_missing_labels_stay_negative(tmp_path):
    find_spec = importlib.util.find_spec
    with mock.patch("importlib.util.find_spec", lambda name, *more: name == "tensorflow" or find_spec(name, *more)):
        dataset = load("tfds:half_labelled", tmp_path)
    assert dataset.test_labels is not None and sorted(dataset.test_labels.tolist()) == [-1, -1, -1, 3, 9]
    assert dataset.train_labels is not None and dataset.train_labels.dtype == np.uint8


@pytest.mark.parametrize("version", ["1.2.3", "7", "seven"])
def test_a_version_that_is_not_there_is_told_from_those_that_are(prepared, version):
    message = f"small_digits has no version {version}; TFDS has 7.0.0, and there is 7.0.0 in --data-dir; name one of"
    with pytest.raises(DataError, match=message):
        load(f"tfds:small_digits:{version}", prepared)


def test_a_prepared_copy_is_used_as_it_is(prepared, small, tmp_path, capfd):
    """A set that TFDS does not know; the highest prepared version."""
    renamed(prepared, tmp_path, "my_digits", "6.0.0")
    folder = renamed(prepared, tmp_path, "my_digits", "10.0.0")
    (tmp_path / "my_digits/11.0.0").mkdir()  # not prepared
    assert_same_pairs(load("tfds:my_digits", tmp_path), small)
    assert len(list(folder.glob("vae_jax-*.npz"))) == 1
    assert capfd.readouterr() == ("", "")


def test_a_prepared_copy_comes_before_a_download(prepared, small, tmp_path, server):
    renamed(prepared, tmp_path, "mnist", "3.0.1")
    assert_same_pairs(load("tfds:mnist", tmp_path), small)
    assert not server.requests


def test_a_tfrecord_copy_gets_a_clear_answer(prepared, tmp_path):
    folder = renamed(prepared, tmp_path, "mnist", "3.0.1")
    info = (folder / "dataset_info.json").read_text()
    (folder / "dataset_info.json").write_text(info.replace("array_record", "tfrecord"))
    with pytest.raises(DataError, match=f"{folder} is prepared as tfrecord; expected array_record") as refusal:
        load("tfds:mnist", tmp_path)
    assert "another --data-dir" in str(refusal.value)


@pytest.mark.parametrize("damage", [b"", b"not what it was"])
def test_a_damaged_cache_is_made_anew(prepared, small, tmp_path, damage, server, capfd):
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    load("tfds:mnist", tmp_path)
    for cache in tmp_path.rglob("vae_jax-*.npz"):
        cache.write_bytes(damage)
    assert_same_pairs(load("tfds:small_digits", tmp_path), small)
    assert_equal(load("tfds:mnist", tmp_path), small)
    assert capfd.readouterr().out.count("decoding the set again") == 2
    assert_same_pairs(load("tfds:small_digits", tmp_path), small)
    assert_equal(load("tfds:mnist", tmp_path), small)
    assert capfd.readouterr().out == ""
    assert len(server.requests) == 4


def test_a_set_that_is_prepared_anew_is_decoded_anew(prepared, small, tmp_path):
    folder = renamed(prepared, tmp_path, "my_digits", "7.0.0")
    load("tfds:my_digits", tmp_path)
    (before,) = folder.glob("vae_jax-*.npz")
    os.utime(next(folder.glob("*train*")))
    assert_same_pairs(load("tfds:my_digits", tmp_path), small)
    (after,) = folder.glob("vae_jax-*.npz")
    assert before != after


def test_a_damaged_copy_is_named(prepared, tmp_path):
    folder = renamed(prepared, tmp_path, "my_digits", "7.0.0")
    record = next(folder.glob("*train*"))
    record.write_bytes(record.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"cannot be read .*; delete that folder and start again") as refusal:
        load("tfds:my_digits", tmp_path)
    assert str(folder) in str(refusal.value) and "\n" not in str(refusal.value)


def test_too_large_a_set_is_refused_from_files_and_cache(prepared, small, tmp_path):
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    archive = {"gzip.zip": emnist_archive({"byclass": small})}
    for name, files in [
        ("small_digits", None),
        ("mnist", gzipped_idx_files(small)),
        ("emnist", archive),
        ("binarized_mnist", amat_files(small)),
    ]:
        with served(name, files) if files else mock.MagicMock():
            load(f"tfds:{name}", tmp_path)
            for _ in range(2):
                with pytest.raises(DataError, match="raise --max-data-gb"):
                    load(f"tfds:{name}", tmp_path, max_gb=1e-6)
                for cache in tmp_path.rglob("vae_jax-*.npz"):
                    cache.unlink()


def load_elsewhere(url: str, files: dict[str, bytes], root: Path) -> list[int]:
    """In another process: the sums of the arrays."""
    with mock.patch.dict(SETS, {"mnist": source_at(url, "mnist", files)}):
        return [int(part.sum(dtype=np.int64)) for part in load("tfds:mnist", root) if part is not None]


def test_two_starts_at_once_download_once(server, small, tmp_path):
    expected = [int(part.sum(dtype=np.int64)) for part in small]
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        starts = [pool.submit(load_elsewhere, server.url, server.files, tmp_path) for _ in range(2)]
        assert [start.result(timeout=60) for start in starts] == [expected, expected]
    assert sorted(server.requests) == sorted(server.files)
