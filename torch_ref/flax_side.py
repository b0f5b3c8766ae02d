"""A Flax VAE as one side of a comparison: the one file of this package that imports jax."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from torch_ref.rules import Entry, translate
from torch_ref.torch_side import Loss, Record, Values, loss_terms
from vae_jax.core.model import Output, reparameterize
from vae_jax.core.modules import variables_of
from vae_jax.core.objective import losses
from vae_jax.core.optimizer import adam
from vae_jax.system.errors import InputError, reason

Variables = Mapping[str, Any]


def shapes(model: nn.Module, pixels: int) -> dict[str, Any]:
    """The variables of a module for images of so many pixels, as shapes; computes nothing.

    Raises:
      InputError: It lacks a method, fails, or returns something of another shape than it should.
    """
    with precision("float32"):
        return variables_of(model, pixels, type(model).__name__)


def latent_dim(model: nn.Module, variables: Variables, pixels: int) -> int:
    """The number of latent dimensions.

    Raises:
      InputError: The variables are not those of the module.
    """
    given = {key: jax.tree.map(_as_float32, tree) for key, tree in variables.items()}
    with _explained(model, "cannot use these parameters"):
        images = jax.ShapeDtypeStruct((1, pixels), jnp.float32)
        return jax.eval_shape(partial(model.apply, method="encode"), given, images)[0].shape[-1]


def _as_float32(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, jnp.float32)


@contextlib.contextmanager
def _explained(model: nn.Module, what: str, dtype: str = "float32") -> Iterator[None]:
    try:
        with precision(dtype):
            yield
    except Exception as error:  # a user's module may raise anything
        raise InputError(f"{type(model).__name__}: {what} ({reason(error)})") from None


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Within the block, jax computes in `dtype`, products included; the caller's settings are as before after it."""
    with contextlib.ExitStack() as settings:
        settings.enter_context(jax.enable_x64(dtype == "float64"))
        settings.enter_context(jax.default_matmul_precision("highest"))
        # Flax's own layers need both.
        settings.enter_context(jax.numpy_dtype_promotion("standard"))
        settings.enter_context(jax.numpy_rank_promotion("allow"))
        yield


def run(
    model: nn.Module,
    variables: Variables,
    places: list[Entry],
    images: np.ndarray,
    eps: np.ndarray,
    dtype: str,
    loss: Loss | None = None,
    tx: optax.GradientTransformation | None = None,
    steps: int = 0,
) -> Values:
    """Everything that is compared, computed in `dtype`.

    Args:
      model: A module with the methods `encode` and `decode`.
      variables: Its collections `params` and perhaps `batch_stats`.
      places: Where its parameters stand in the state dict.
      images: Pixels in [0, 1], [batch, pixels].
      eps: Noise, [batch, latent].
      dtype: float32 or float64.
      loss: Of (logits, images, mu, logvar), as `loss_terms` describes it; the documented one by default.
      tx: The optimizer; Adam with the rate 1e-3 by default.
      steps: Optimizer steps to take.
    """
    optimizer = optax.identity() if not steps else adam(1e-3) if tx is None else tx
    given = jax.tree.map(lambda leaf: np.asarray(leaf, dtype), dict(variables))

    def objective(
        params: Any, pixels: jax.Array, noise: jax.Array
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], ...]]:
        apply = partial(model.apply, {**given, "params": params})
        mu, logvar = cast(tuple[jax.Array, jax.Array], apply(pixels, method="encode"))
        z = reparameterize(mu, logvar, noise)
        output = Output(cast(jax.Array, apply(z, method="decode")), mu, logvar, z)
        returned = losses(output, pixels) if loss is None else loss(output.logits, pixels, mu, logvar)
        terms = loss_terms(returned)
        return terms["loss"], ({**output._asdict(), "recon": jax.nn.sigmoid(output.logits)}, terms)

    @jax.jit
    def step(params: Any, opt_state: Any, pixels: jax.Array, noise: jax.Array) -> Any:
        gradients, found = jax.grad(objective, has_aux=True)(params, pixels, noise)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return (gradients, *found), optax.apply_updates(params, updates), opt_state

    with _explained(model, f"fails on {len(images)} images in {dtype}", dtype):
        batch = images.astype(dtype), eps.astype(dtype)
        (gradients, outputs, terms), params, opt_state = step(
            given["params"], jax.jit(optimizer.init)(given["params"]), *batch
        )
        for _ in range(steps - 1):
            _, params, opt_state = step(params, opt_state, *batch)
        return Values(
            {name: np.asarray(value) for name, value in outputs.items()},
            {name: np.asarray(value) for name, value in terms.items()},
            _by_key(places, gradients),
            _by_key(places, params) if steps else {},
        )


def _by_key(places: list[Entry], params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    arrays = {}
    for entry in places:
        if entry.path[0] == "params":
            leaf: Any = params
            for name in entry.path[1:]:
                leaf = leaf[name]
            arrays[entry.key] = entry.to_torch(leaf)
    return arrays


def layers(
    model: nn.Module, variables: Variables, images: np.ndarray, z: np.ndarray, names: Mapping[str, str]
) -> dict[str, Record]:
    """The first call of every submodule in float64, by its PyTorch name; none of a model that has only parameters."""
    called: list[str] = []

    def trace(variables: Variables, images: jax.Array, z: jax.Array) -> list[Record]:
        records: dict[str, Record] = {}

        def intercept(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            output = call(*args, **kwargs)
            if context.method_name == "__call__" and args and isinstance(output, jax.Array):
                records.setdefault(translate(".".join(context.module.path), names), Record(args[0], output))
            return output

        with nn.intercept_methods(intercept):
            model.apply(variables, images, method="encode")
            model.apply(variables, z, method="decode")
        called[:] = records
        return [*records.values()]

    with precision("float64"):
        given = jax.tree.map(lambda leaf: np.asarray(leaf, "float64"), (dict(variables), images, z))
        records = jax.jit(trace)(*given)
        return {name: Record(*map(np.asarray, record)) for name, record in zip(called, records, strict=True)}
