"""The floor under an epoch: its matrix products and nothing else, as fast as any BLAS of this machine does them."""

import time
from typing import NamedTuple

from benchmarks.turns import Measured, Runner, Setting

# Calls of each product between two looks at the clock.
REPEATS = 20

# Name -> "module:function" of every library that is asked.
LIBRARIES = {
    "products: NumPy (OpenBLAS)": "benchmarks.floor:numpy_products",
    "products: PyTorch (MKL; cuBLAS on a GPU)": "benchmarks.floor:torch_products",
}


class Product(NamedTuple):
    """[rows, inner] @ [inner, columns]; the transposes are how the operands of a gradient lie in memory."""

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
    """The matrix products of one training step, those of the gradients included; both heads as one layer."""
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
        # Nothing asks for the gradient of the pixels.
        if layer != "encoder.fc1":
            found.append(Product(f"{layer} input gradient", batch, features, fan_in, right_transposed=True))
    return found


def epoch_flops(setting: Setting) -> int:
    """Floating-point operations of the matrix products of an epoch."""
    return sum(product.flops for product in products(setting)) * setting.images // setting.batch_size


def numpy_products(setting: Setting) -> Runner:
    import numpy as np

    rng = np.random.default_rng(0)

    def timed(product: Product) -> float:
        left, right = (rng.random(shape, np.float32) for shape in _shapes(product))
        a, b = left.T if product.left_transposed else left, right.T if product.right_transposed else right
        out = np.empty((product.rows, product.columns), np.float32)
        return _seconds(lambda: np.matmul(a, b, out=out), lambda: None)

    return Runner(lambda: {product.name: timed(product) for product in products(setting)})


def torch_products(setting: Setting) -> Runner:
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
    """How the operands lie in memory."""
    left, right = (product.rows, product.inner), (product.inner, product.columns)
    return left[::-1] if product.left_transposed else left, right[::-1] if product.right_transposed else right


def _seconds(call, synchronize) -> float:
    """Of one call, averaged over `REPEATS`; the first one, which brings the operands near, is not counted."""
    call()
    synchronize()
    start = time.perf_counter()
    for _ in range(REPEATS):
        call()
    synchronize()
    return (time.perf_counter() - start) / REPEATS


def rows(setting: Setting, measured: list[Measured]) -> list[dict]:
    """For each product the seconds of its best library, and what they come to in an epoch."""
    import statistics

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
