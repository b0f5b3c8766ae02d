"""The servers that TFDS downloads from, on this machine: their files, remade from images at hand, behind their URLs.

`python -m tests.tfds_server ARGUMENTS` is `python -m vae_jax.train ARGUMENTS` with `tfds:mnist`,
`tfds:fashion_mnist` and `tfds:kmnist` served so, all from the bundled images.
"""

import contextlib
import gzip
import hashlib
import io
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest import mock

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import checksums
from tensorflow_datasets.core.utils import Size
from tensorflow_datasets.datasets.binarized_mnist import binarized_mnist_dataset_builder as binarized_mnist
from tensorflow_datasets.image_classification import mnist

from vae_jax.data import Dataset, load

IDX_NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
MNIST_FAMILY = (mnist.MNIST, mnist.FashionMNIST, mnist.KMNIST)
# What a request for a path does instead of sending the file.
Fault = Callable[[BaseHTTPRequestHandler, bytes], None]


def idx_bytes(array: np.ndarray) -> bytes:
    """An array of bytes as an IDX file."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def idx_files(dataset: Dataset) -> dict[str, bytes]:
    """The four original files, not yet gzipped."""
    return {name: idx_bytes(array) for name, array in zip(IDX_NAMES, dataset, strict=True) if array is not None}


def emnist_archive(dataset: Dataset, config: str) -> bytes:
    """EMNIST's archive, with the files of one configuration."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for name, content in idx_files(dataset).items():
            name = f"gzip/emnist-{config}-{name.replace('t10k', 'test')}.gz"
            file.writestr(name, gzip.compress(content, 1))
    return archive.getvalue()


def amat_files(dataset: Dataset) -> dict[str, bytes]:
    """The files of binarized MNIST, of 0 and 1 where pixels are below and above a half; validation is half of test."""
    middle = len(dataset.test_images) // 2
    parts = {
        "train": dataset.train_images,
        "valid": dataset.test_images[:middle],
        "test": dataset.test_images[middle:],
    }
    return {
        f"binarized_mnist_{part}.amat": "".join(
            " ".join("01"[int(pixel > 127)] for pixel in image.ravel()) + "\n" for image in images
        ).encode()
        for part, images in parts.items()
    }


class Server:
    """Answers requests for `files` on 127.0.0.1; `faults` of a path come first, one a request."""

    def __init__(self, files: dict[str, bytes]):
        self.files = files
        self.faults: dict[str, list[Fault]] = {}
        self.requests: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.send_response(200)
                self.end_headers()

            def do_GET(self) -> None:
                name = self.path.rsplit("/", 1)[-1]
                server.requests.append(name)
                content = server.files.get(name)
                if content is None:
                    self.send_error(404)
                elif server.faults.get(name):
                    server.faults[name].pop(0)(self, content)
                else:
                    send(self, content)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/"

    def __enter__(self) -> "Server":
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()


def send(request: BaseHTTPRequestHandler, content: bytes, length: int | None = None) -> None:
    """A file; with another `length` announced than is sent, where one is given."""
    request.send_response(200)
    request.send_header("Content-Length", str(len(content) if length is None else length))
    request.end_headers()
    request.wfile.write(content)


@contextlib.contextmanager
def redirected(url: str, files: dict[str, bytes]) -> Iterator[None]:
    """TFDS's URLs of the MNIST family lead to `url`, and the checksums that it knows are those of `files`."""
    with contextlib.ExitStack() as patches:
        infos = {
            url + name: checksums.UrlInfo(
                size=Size(len(content)), checksum=hashlib.sha256(content).hexdigest(), filename=name
            )
            for name, content in files.items()
        }
        patches.enter_context(mock.patch.object(checksums, "get_all_url_infos", lambda: dict(infos)))
        for builder in MNIST_FAMILY:
            patches.enter_context(mock.patch.object(builder, "URL", url))
        patches.enter_context(mock.patch.object(mnist.EMNIST, "URL", url + "gzip.zip"))
        patches.enter_context(mock.patch.object(binarized_mnist, "_URL", url))
        yield


@contextlib.contextmanager
def served(files: dict[str, bytes]) -> Iterator[Server]:
    """TFDS's URLs of the MNIST family lead to a server with `files`."""
    with Server(files) as server, redirected(server.url, files):
        yield server


def main() -> None:
    from vae_jax import TrainConfig, cli, fit

    files = {f"{name}.gz": gzip.compress(content, 1) for name, content in idx_files(load()).items()}
    tfds.builder_cls("mnist")  # imported before it is patched
    with served(files):
        cli.run(fit, TrainConfig, "python -m tests.tfds_server")


if __name__ == "__main__":
    main()
