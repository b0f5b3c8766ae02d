"""A server on this machine in the place of those that the MNIST family is downloaded from."""

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

from vae_jax.data import Dataset
from vae_jax.data.mnist_family import SETS, Source

IDX_NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
# Answers a request in another way than by sending the file.
Fault = Callable[[BaseHTTPRequestHandler, bytes], None]


def idx_bytes(array: np.ndarray) -> bytes:
    """An array of bytes as an IDX file."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def idx_files(dataset: Dataset) -> dict[str, bytes]:
    """The four original files, not yet gzipped."""
    return {name: idx_bytes(array) for name, array in zip(IDX_NAMES, dataset, strict=True) if array is not None}


def gzipped_idx_files(dataset: Dataset) -> dict[str, bytes]:
    """The four original files as they are published."""
    return {f"{name}.gz": gzip.compress(content, 1) for name, content in idx_files(dataset).items()}


def emnist_archive(configs: dict[str, Dataset]) -> bytes:
    """EMNIST's archive, with the files of some configurations."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for config, dataset in configs.items():
            for name, content in gzipped_idx_files(dataset).items():
                file.writestr(f"gzip/emnist-{config}-{name.replace('t10k', 'test')}", content)
    return archive.getvalue()


def amat_files(dataset: Dataset) -> dict[str, bytes]:
    """The files of binarized MNIST: 0 for pixels below a half, 1 for those above."""
    return {
        f"binarized_mnist_{part}.amat": "".join(
            " ".join("01"[int(pixel > 127)] for pixel in image.ravel()) + "\n" for image in images
        ).encode()
        for part, images in (("train", dataset.train_images), ("test", dataset.test_images))
    }


class Server:
    """Answers requests for `files` on 127.0.0.1; each of a file's `faults` answers one request for it first."""

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
    """Sends a file; `length`, if given, is announced in place of its real length."""
    request.send_response(200)
    request.send_header("Content-Length", str(len(content) if length is None else length))
    request.end_headers()
    request.wfile.write(content)


def source_at(url: str, name: str, files: dict[str, bytes]) -> Source:
    """The entry of a set in `SETS`, for these files at another address."""
    return SETS[name]._replace(url=url, sha256={file: hashlib.sha256(files[file]).hexdigest() for file in files})


@contextlib.contextmanager
def served(name: str, files: dict[str, bytes]) -> Iterator[Server]:
    """Within the block, a server on this machine has the files of a set."""
    with Server(files) as server, mock.patch.dict(SETS, {name: source_at(server.url, name, files)}):
        yield server
