"""The module of a run: the documented one, an MLP of other layers, or the user's own, which is imported by its name."""

import dataclasses
import hashlib
import json
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vae_jax.config import Recipe
from vae_jax.core.model import MLP, VAE, init_params
from vae_jax.system.errors import InputError, reason
from vae_jax.system.given import import_class, json_object


def module_of(config: Recipe, pixels: int) -> nn.Module:
    """The module that a recipe names, for images of so many pixels.

    Raises:
      InputError: It is not there, does not take its options, or is no VAE.
    """
    if config.model is not None:
        module = _own_module(config.model, json_object("--model-options", config.model_options), pixels)
        require_vae(module, pixels, f"--model {config.model}")
        return module
    if config.hidden_dims or config.activation != "relu" or config.initialization != "torch":
        hidden_dims = config.hidden_dims or (config.hidden_dim,)
        return MLP(hidden_dims, config.latent_dim, pixels, config.activation, config.initialization)
    return VAE(config.hidden_dim, config.latent_dim, pixels)


def recipe_of(module: nn.Module) -> dict[str, Any]:
    """The options of a recipe that name a module which the caller has made: the way back from `module_of`."""
    fields = {field.name: getattr(module, field.name) for field in dataclasses.fields(module)}
    # The images decide the number of pixels.
    fields = {name: value for name, value in fields.items() if name not in ("parent", "name", "pixels")}
    if type(module) in (VAE, MLP):
        return fields
    # What is no JSON, such as a function, stands as text: enough to know the run by, but not to make the module again.
    options = json.dumps(fields, default=_as_text, sort_keys=True)
    return {"model": f"{type(module).__module__}:{type(module).__qualname__}", "model_options": options}


def require_vae(module: Any, pixels: int, name: str) -> None:
    """Checks, without computing anything, that a module has what training needs.

    Raises:
      InputError: It lacks a method, keeps more than parameters, or a shape is wrong; the message begins with `name`.
    """
    if others := set(variables_of(module, pixels, name)) - {"params"}:
        raise InputError(
            f"{name}: keeps {', '.join(sorted(others))} beside its parameters; expected params alone: use LayerNorm or"
            " GroupNorm in place of BatchNorm"
        )


def variables_of(module: Any, pixels: int, name: str) -> dict[str, Any]:
    """The parameters of a module, and whatever else it keeps, as shapes and types; computes nothing.

    Raises:
      InputError: It lacks a method, or a shape is wrong; the message begins with `name`.
    """
    if not isinstance(module, nn.Module):
        raise InputError(f"{name}: is no flax.linen.Module; expected one with the methods encode and decode")
    for method in ("encode", "decode"):
        if not callable(getattr(module, method, None)):
            raise InputError(
                f"{name}: has no method {method}; expected encode(images) -> (mu, logvar) and decode(z) -> logits"
            )

    def both(module: Any, images: jax.Array) -> Any:
        posterior = module.encode(images)
        good = isinstance(posterior, tuple | list) and len(posterior) == 2
        shapes = [getattr(part, "shape", None) for part in posterior] if good else []
        if not good or shapes[0] != shapes[1] or shapes[0] is None or len(shapes[0]) != 2 or shapes[0][0] != 3:
            found = f"the shapes {shapes}" if good else type(posterior).__name__
            raise InputError(
                f"{name}: encode returns {found} for images of shape [3, {pixels}]; expected a tuple of mu and logvar,"
                " each of shape [3, latent]"
            )
        logits = module.decode(posterior[0])
        if getattr(logits, "shape", None) != (3, pixels):
            raise InputError(
                f"{name}: decode returns {getattr(logits, 'shape', type(logits).__name__)} for z of shape"
                f" {list(shapes[0])}; expected logits of shape [3, {pixels}], a value for each pixel"
            )
        return logits

    try:
        return jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((3, pixels)), method=both))
    except InputError:
        raise
    except Exception as error:  # a user's module may raise anything
        raise InputError(
            f"{name}: fails on images of shape [3, {pixels}] ({reason(error)}); expected one that takes flat images"
        ) from error


def transposed_layers(module: nn.Module, pixels: int) -> frozenset[str]:
    """The paths of the transposed convolutions in a module, such as `decoder.ConvTranspose_0`."""
    found = set()

    def note(next_method: Any, arguments: Any, keywords: Any, context: Any) -> Any:
        if isinstance(context.module, nn.ConvTranspose):
            found.add(".".join(context.module.path))
        return next_method(*arguments, **keywords)

    with nn.intercept_methods(note):
        shapes_of(module, pixels)
    return frozenset(found)


def shapes_of(module: nn.Module, pixels: int) -> Any:
    """The tree of the parameters of a module, as shapes and types."""
    return jax.eval_shape(lambda: init_params(module, jax.random.key(0), pixels))


def shapes_digest(module: nn.Module, pixels: int) -> str:
    """SHA-256 of the names, types and shapes of the parameters of a module: another one is another architecture."""
    leaves = jax.tree.leaves_with_path(shapes_of(module, pixels))
    lines = sorted(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}" for path, leaf in leaves)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _own_module(name: str, options: dict[str, Any], pixels: int) -> nn.Module:
    found = import_class(f"--model {name}", name)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise InputError(f"--model {name}: is no class of flax.linen.Module; name one")
    names = {field.name for field in dataclasses.fields(found)} - {"parent", "name"}
    if unknown := options.keys() - names:
        raise InputError(
            f"--model-options: {name} takes no {min(unknown)}; expected {', '.join(sorted(names)) or 'none'}"
        )
    given = {"pixels": pixels} if "pixels" in names else {}
    try:
        return found(**given | options)
    except Exception as error:
        raise InputError(f"--model-options: {name} cannot be made ({reason(error)})") from error


def _as_text(value: Any) -> str:
    return getattr(value, "__qualname__", None) or repr(value)
