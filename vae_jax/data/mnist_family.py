"""The MNIST family: where the original files of each set are, and how to decode them.

Addresses, checksums, versions and configurations are those of tensorflow_datasets 4.9 (its url_checksums/,
image_classification/mnist.py and datasets/binarized_mnist/), copied because importing that package takes seconds.
"""

import io
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np

from vae_jax.data import idx
from vae_jax.data.bounded import require_size
from vae_jax.system.errors import DataError


class Source(NamedTuple):
    """The files of a set: those at `url` + name, with the SHA-256 of each; the first configuration is the default."""

    version: str
    url: str
    sha256: dict[str, str]
    configs: tuple[str, ...] = ("",)


SETS = {
    "mnist": Source(
        "3.0.1",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
        {
            "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        },
    ),
    "fashion_mnist": Source(
        "3.0.1",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        {
            "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        },
    ),
    "kmnist": Source(
        "3.0.1",
        "http://codh.rois.ac.jp/kmnist/dataset/kmnist/",
        {
            "train-images-idx3-ubyte.gz": "51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4",
            "train-labels-idx1-ubyte.gz": "e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17",
            "t10k-images-idx3-ubyte.gz": "edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5",
            "t10k-labels-idx1-ubyte.gz": "20bb9a0ef54c7db3efc55a92eef5582c109615df22683c380526788f98e42a1c",
        },
    ),
    "emnist": Source(
        "3.1.0",
        "https://biometrics.nist.gov/cs_links/EMNIST/",
        {"gzip.zip": "fb9bb67e33772a9cc0b895e4ecf36d2cf35be8b709693c3564cea2a019fcda8e"},
        ("byclass", "bymerge", "balanced", "letters", "digits", "mnist"),
    ),
    "binarized_mnist": Source(
        "1.0.0",
        "http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/",
        {
            "binarized_mnist_train.amat": "ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d",
            "binarized_mnist_test.amat": "e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c",
        },
    ),
}


def find(spec: str, name: str, config: str | None) -> tuple[Source, str]:
    """Where to download a set of the MNIST family from.

    Args:
      spec: The set's name in messages.
      name: A key of `SETS`.
      config: The configuration; None for the default.

    Returns:
      The source, and the configuration ("" if the set has none).

    Raises:
      DataError: There is no such configuration.
    """
    source = SETS[name]
    config = config or source.configs[0]
    if config not in source.configs:
        expected = f"one of {', '.join(source.configs)}" if any(source.configs) else f"tfds:{name} alone"
        raise DataError(f"--data {spec}: {name} has no configuration {config}; expected {expected}")
    return source, config


def decode(name: str, config: str, folder: Path, max_bytes: int) -> dict[str, np.ndarray]:
    """Decodes the original files of a set.

    Args:
      name: A key of `SETS`.
      config: The configuration, as `find` returns it.
      folder: The folder with the files.
      max_bytes: The most bytes that all arrays together may take in memory.

    Returns:
      `train_images` and `test_images`, bytes ([images, 28, 28]), and `train_labels` and `test_labels` if the set has
      labels, in the order of the files.

    Raises:
      DataError: The arrays take more than `max_bytes`.
    """
    if name == "emnist":
        return _decode_emnist(folder / "gzip.zip", config, max_bytes)
    if name == "binarized_mnist":
        train = _decode_amat(folder / "binarized_mnist_train.amat", max_bytes)
        test = _decode_amat(folder / "binarized_mnist_test.amat", max_bytes - train.nbytes)
        return {"train_images": train, "test_images": test}
    return idx.load(folder, max_bytes)


def _decode_emnist(path: Path, config: str, max_bytes: int) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    with zipfile.ZipFile(path) as archive:
        for split in ("train", "test"):
            for part, ndim in (("images", 3), ("labels", 1)):
                member = archive.getinfo(f"gzip/emnist-{config}-{split}-{part}-idx{ndim}-ubyte.gz")
                with cast(io.BufferedIOBase, archive.open(member)) as file:
                    array = idx.read(file, f"{path}: {member.filename}", member.file_size, (ndim,), max_bytes)
                arrays[f"{split}_{part}"] = array
                max_bytes -= array.nbytes
    return arrays


def _decode_amat(path: Path, max_bytes: int) -> np.ndarray:
    """Decodes lines of 784 digits 0 or 1, with a space between digits."""
    digits = path.stat().st_size // 2
    require_size(str(path), (digits // 784, 28, 28), digits, sys.maxsize, max_bytes)
    return np.fromfile(path, np.uint8)[::2].reshape(-1, 28, 28) - np.uint8(ord("0"))
