"""Several devices: a batch is cut into shards, whose sums are added in the same order on any number of devices.

The devices of all processes form one axis. Each device computes its shards one after another; all devices then gather
the sums, add them alike, and take the same optimizer step: the state is always the same on every device.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from vae_jax.system.errors import InputError

AXIS = "shards"
EVERYWHERE = PartitionSpec()
T = TypeVar("T", bound=PyTree)


class Shards(NamedTuple):
    """Into how many equal parts a batch is cut, and how many devices share them; the latter must divide the former."""

    total: int = 1
    devices: int = 1


def local(rows: Array, shards: Shards) -> Array:
    """The rows of a batch that belong to this device's shards."""
    if shards.devices == 1:
        return rows
    size = len(rows) // shards.devices
    return jax.lax.dynamic_slice_in_dim(rows, jax.lax.axis_index(AXIS) * size, size)


def sum_over_shards(function: Callable[..., T], params: PyTree[Array], rows: tuple[Array, ...], shards: Shards) -> T:
    """Sums over the images of a batch, added in pairs of shards: the same bits on any number of devices.

    Args:
      function: Called as `function(params, *rows)` with the rows of one shard; returns sums over them, of one type.
      params: The same on every device.
      rows: This device's rows of the batch, [batch / devices, ...] each.
      shards: How the batch is cut.

    Returns:
      What `function` returns, summed over all shards; with one shard, exactly that.
    """
    if shards.total == 1:
        return function(params, *rows)
    sums = []
    for shard in zip(*(jnp.split(part, shards.total // shards.devices) for part in rows), strict=True):
        # Without the barriers XLA fuses a shard with its neighbours, and differently for each number of devices.
        sums.append(jax.lax.optimization_barrier(function(jax.lax.optimization_barrier(params), *shard)))
    if len(sums).bit_count() == 1:  # a power of two: the sum is a branch of the tree
        sums = [_sum_in_pairs(sums)]
    if shards.devices > 1:
        # As one vector: exchanging each array by itself takes several times as long between processes.
        vectors, unravel = jax.vmap(lambda tree: ravel_pytree(tree)[0])(_stack(sums)), ravel_pytree(sums[0])[1]
        gathered = jax.lax.all_gather(vectors, AXIS, tiled=True)
        return unravel(_sum_in_pairs(list(gathered)))
    return _sum_in_pairs(sums)


def _stack(trees: list[T]) -> T:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _sum_in_pairs(trees: list[T]) -> T:
    """The sum as a tree over neighbours; an odd one at the end waits for the next level."""
    while len(trees) > 1:
        pairs = zip(trees[::2], trees[1::2], strict=False)
        sums = [jax.lax.optimization_barrier(jax.tree.map(jnp.add, left, right)) for left, right in pairs]
        trees = sums + trees[len(sums) * 2 :]
    return trees[0]


@contextmanager
def fixed_threads(shards: int) -> Iterator[None]:
    """Lets a CPU use the same number of threads everywhere, if JAX first looks for its devices within the block."""
    before = os.environ.get("NPROC")
    if shards > 1:
        # XLA's thread pool has as many threads as this says, at least one for each device; by default as many as there
        # are cores. How a matrix product is cut among them changes its last bits.
        os.environ["NPROC"] = str(shards)
    try:
        yield
    finally:
        if before is not None:
            os.environ["NPROC"] = before
        else:
            os.environ.pop("NPROC", None)


class Mesh:
    """The devices, of all processes, that share the shards of a batch.

    Args:
      shards: Into how many parts a batch is cut.
      devices: How many devices to use; by default one for one shard, and else the most that divide `shards`.

    Raises:
      InputError: There are not so many devices, or they cannot share the shards.
    """

    def __init__(self, shards: int = 1, devices: int | Literal["all"] | None = None):
        self.processes, self.process = jax.process_count(), jax.process_index()
        each = min(Counter(device.process_index for device in jax.devices()).values())
        if devices is None:
            fitting = (n for n in range(each, 0, -1) if shards % (n * self.processes) == 0)
            each_used = 1 if shards == 1 and self.processes == 1 else next(fitting, 0)
        elif devices == "all":
            each_used = each
        else:
            each_used = devices // self.processes if devices % self.processes == 0 else 0
        used = each_used * self.processes
        if not used or each_used > each or shards % used:
            found = f"{each} device{'s' if each > 1 else ''}"
            found = f"{self.processes} processes with {found} each" if self.processes > 1 else found
            raise InputError(
                f"--shards {shards}" + (f" and --devices {devices}" if devices else "") + f": {found} cannot share them"
                " equally; expected a number of devices, the same in each process, that divides the shards"
            )
        self.shards = Shards(shards, used)
        chosen = [
            device
            for process in range(self.processes)
            for device in [device for device in jax.devices() if device.process_index == process][:each_used]
        ]
        self._mesh = jax.sharding.Mesh(np.array(chosen), (AXIS,)) if used > 1 else None
        self.idle = jax.device_count() - used
        self._gather = self.jit(lambda own: jax.lax.all_gather(own, AXIS, tiled=True), 0)

    def __str__(self) -> str:
        kind = jax.devices()[0].device_kind
        if self._mesh is None:
            return kind
        processes = f" in {self.processes} processes" if self.processes > 1 else ""
        return f"{self.shards.devices} x {kind}{processes}"

    def replicate(self, tree: T) -> T:
        """Arrays, the same in each process, on every device."""
        if self._mesh is None:
            return jax.tree.map(jnp.asarray, tree)
        sharding = NamedSharding(self._mesh, EVERYWHERE)

        def put(leaf: Any) -> Array:
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                return jax.random.wrap_key_data(put(jax.random.key_data(leaf)))
            # device_put would compare them between processes, in the thread that reads ahead amid the steps' exchanges.
            return jax.make_array_from_process_local_data(sharding, np.asarray(leaf), leaf.shape)

        return jax.tree.map(put, tree)

    def own(self, size: int) -> slice:
        """Which rows of a batch of this size belong to the shards of this process."""
        each = size // self.processes
        return slice(self.process * each, (self.process + 1) * each)

    def split(self, rows: np.ndarray, axis: int) -> Array:
        """The rows of a batch on the devices whose shards they belong to, from those of this process.

        Args:
          rows: This process's rows.
          axis: That of the batch.
        """
        if self._mesh is None:
            return jnp.asarray(rows)
        sharding = NamedSharding(self._mesh, PartitionSpec(*[None] * axis, AXIS))
        return jax.make_array_from_process_local_data(sharding, rows)

    def shape_split(self, shape: tuple[int, ...], dtype: np.dtype, axis: int) -> jax.ShapeDtypeStruct:
        """What `split` returns for rows of the whole batch of this shape, without them."""
        sharding = NamedSharding(self._mesh, PartitionSpec(*[None] * axis, AXIS)) if self._mesh else None
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def jit(self, function: Callable, *axes: int | None, donate: bool = False) -> Any:
        """`function` on every device, jitted.

        Args:
          function: From the arrays of one device to results that are the same on all.
          axes: For each argument the axis along which the devices share it; None: each has all of it.
          donate: Whether the first argument is donated.
        """
        donated = (0,) if donate else ()
        if self._mesh is None:
            return jax.jit(function, donate_argnums=donated)
        specs = tuple(EVERYWHERE if axis is None else PartitionSpec(*[None] * axis, AXIS) for axis in axes)
        on_each = jax.shard_map(function, mesh=self._mesh, in_specs=specs, out_specs=EVERYWHERE, check_vma=False)
        return jax.jit(on_each, donate_argnums=donated)

    def gather(self, values: np.ndarray) -> np.ndarray:
        """The values of each process, [processes, ...]; every process has to call it."""
        if self.processes == 1:
            return values[None]
        each = self.shards.devices // self.processes
        rows = self.split(np.repeat(values[None], each, axis=0), 0)
        return np.asarray(self._gather(rows))[::each]
