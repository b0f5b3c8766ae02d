"""The floor under the time of an epoch: its matrix products alone, each by the fastest BLAS on this machine."""

import statistics
import time
from typing import NamedTuple

from benchmarks.turns import Measured, Runner, Setting

# So many calls of each product are timed together.
REPEATS = 20

# Name -> "module:function" of each library that is measured.
LIBRARIES = {
    "products: NumPy (OpenBLAS)": "benchmarks.floor:numpy_products",
    "products: PyTorch (MKL; cuBLAS on a GPU)": "benchmarks.floor:torch_products",
}


class Product(NamedTuple):
    """[rows, inner] @ [inner, columns]; an operand of a gradient may lie transposed in memory."""

    name: str
    rows: int
    inner: int
    columns: int
    left_transposed: bool = False
    right_transposed: bool = False

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inner * self.columns


def products(setting: Setting) -> list[Product]:
    """The matrix products of a training step, including the gradients; the encoder's two heads are one layer."""
    batch, hidden, latent = setting.batch_size, setting.hidden_dim, setting.latent_dim
    found = []
    for layer, fan_in, features in (
        ("encoder.fc1", 784, hidden),
        ("encoder.fc2", hidden, 2 * latent),
        ("decoder.fc1", latent, hidden),
        ("decoder.fc2", hidden, 784),
    ):
        found.append(Product(f"{layer} forward", batch, fan_in, features))
        found.append(Product(f"{layer} weight gradient", fan_in, batch, features, left_transposed=True))
        # Training needs no gradient of the pixels.
        if layer != "encoder.fc1":
            found.append(Product(f"{layer} input gradient", batch, features, fan_in, right_transposed=True))
    return found


def epoch_flops(setting: Setting) -> int:
    """Floating-point operations of the matrix products of an epoch."""
    return sum(product.flops for product in products(setting)) * setting.images // setting.batch_size


def numpy_products(setting: Setting) -> Runner:
    """Times NumPy's products; a run returns the seconds of each by name."""
    import numpy as np

    rng = np.random.default_rng(0)

    def timed(product: Product) -> float:
        left, right = (rng.random(shape, np.float32) for shape in _shapes(product))
        a, b = left.T if product.left_transposed else left, right.T if product.right_transposed else right
        out = np.empty((product.rows, product.columns), np.float32)
        return _seconds(lambda: np.matmul(a, b, out=out), lambda: None)

    return Runner(lambda: {product.name: timed(product) for product in products(setting)})


def torch_products(setting: Setting) -> Runner:
    """Times PyTorch's products; a run returns the seconds of each by name."""
    import torch

    cuda = torch.cuda.is_available()
    synchronize = torch.cuda.synchronize if cuda else lambda: None

    def timed(product: Product) -> float:
        left, right = (torch.rand(shape, device="cuda" if cuda else "cpu") for shape in _shapes(product))
        a, b = left.T if product.left_transposed else left, right.T if product.right_transposed else right
        out = torch.empty((product.rows, product.columns), device=left.device)
        return _seconds(lambda: torch.mm(a, b, out=out), synchronize)

    return Runner(lambda: {product.name: timed(product) for product in products(setting)})


def _shapes(product: Product) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of the operands as they lie in memory."""
    left, right = (product.rows, product.inner), (product.inner, product.columns)
    return left[::-1] if product.left_transposed else left, right[::-1] if product.right_transposed else right


def _seconds(call, synchronize) -> float:
    """Seconds a call, averaged over `REPEATS`, after a call that brings the operands into the cache."""
    call()
    synchronize()
    start = time.perf_counter()
    for _ in range(REPEATS):
        call()
    synchronize()
    return (time.perf_counter() - start) / REPEATS


def rows(setting: Setting, measured: list[Measured]) -> list[dict]:
    """For each product the time of its fastest library, per call and per epoch."""
    found = []
    for product in products(setting):
        medians = {
            library.name.removeprefix("products: "): statistics.median(run[product.name] for run in library.returned)
            for library in measured
            if library.returned
        }
        best = min(medians, key=lambda name: medians[name])
        seconds = medians[best]
        found.append(
            {
                "product": product.name,
                "size": f"{product.rows} x {product.inner} x {product.columns}",
                "microseconds": seconds * 1e6,
                "GFLOP/s": product.flops / seconds / 1e9,
                "best library": best,
                "seconds an epoch": seconds * setting.images / setting.batch_size,
            }
        )
    return found
