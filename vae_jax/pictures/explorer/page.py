"""Puts the page together: one HTML file with style, program, weights and images in it. Imports neither jax nor torch.

The program's files are JavaScript modules that import each other; here they become one script, because a page that is
opened from a disk may load no modules. Nothing in the page is fetched, and its Content-Security-Policy allows exactly
this script and this style.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
import zlib
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from vae_jax.runs.trained import Trained
from vae_jax.system.errors import InputError

# In the order in which they use each other.
MODULES = ("model", "facts", "paint", "place", "estimate", "now", "map", "dials", "draw", "between", "main")


class Layer(NamedTuple):
    """A linear layer, and what its outputs go through."""

    kernel: Float[np.ndarray, "inputs outputs"]
    bias: Float[np.ndarray, " outputs"]
    activation: str = "none"  # or one of `Activation`


# The layers of each part, in the order of their use: the encoder's body, its two heads, the decoder.
Layers = dict[str, list[Layer]]


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the page tells about the model, and about the images in it."""

    name: str
    data: str
    binarize: str
    shape: tuple[int, ...]  # of an image
    half: bool
    numbers: list[int]  # of the test images, within their set
    labels: list[int] | None
    kld: list[float]  # of each latent dimension, averaged over the test images
    variance: list[float]  # of each dimension of mu
    components: list[list[float]]  # the first two principal components of mu
    shares: list[float]  # of the variance, that these two explain
    training: dict[str, Any] | None
    options: dict[str, str]


def layers_of(trained: Trained) -> Layers:
    """The model as chains of linear layers.

    Raises:
      InputError: It is neither the documented model nor an MLP.
    """
    from vae_jax.core.model import MLP, VAE

    model = trained.model
    if type(model) not in (VAE, MLP):
        raise InputError(f"{type(model).__name__}: the page runs the documented model and MLPs, and no other module")
    activation = model.activation if isinstance(model, MLP) else "relu"
    encoder, decoder = trained.params["encoder"], trained.params["decoder"]
    hidden = len(decoder) - 1

    def layer(params: Any, activation: str = "none") -> Layer:
        return Layer(np.asarray(params["kernel"]), np.asarray(params["bias"]), activation)

    def body(params: Any) -> list[Layer]:
        return [layer(params[f"fc{number}"], activation) for number in range(1, hidden + 1)]

    return {
        "body": body(encoder),
        "mu": [layer(encoder[f"fc{hidden + 1}_mu"])],
        "logvar": [layer(encoder[f"fc{hidden + 1}_logvar"])],
        "decoder": [*body(decoder), layer(decoder[f"fc{hidden + 1}"])],
    }


def weights_size(layers: Layers, half: bool) -> int:
    """Bytes that the weights take in the page."""
    values = sum(layer.kernel.size + layer.bias.size for part in layers.values() for layer in part)
    return values * (2 if half else 4) * 4 // 3


def build(
    facts: Facts,
    layers: Layers,
    images: UInt8[np.ndarray, "images pixels"],
    mu: Float[np.ndarray, "images latent"],
    logvar: Float[np.ndarray, "images latent"],
) -> bytes:
    """The page, as UTF-8.

    Args:
      facts: What it tells.
      layers: The model.
      images: The test images in it.
      mu: The means of their posteriors.
      logvar: The logarithms of their variances.
    """
    shapes = {name: [(*layer.kernel.shape, layer.activation) for layer in part] for name, part in layers.items()}
    arrays = [array.ravel() for part in layers.values() for layer in part for array in (layer.kernel, layer.bias)]
    script = program()
    style = _source("style.css")
    policy = (
        f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; img-src data: blob:;"
        " base-uri 'none'; form-action 'none'"
    )
    blocks = {
        "policy": policy,
        "style": style,
        # Names are data: no text in them ends the element that holds them.
        "facts": json.dumps(dataclasses.asdict(facts) | {"layers": shapes}, allow_nan=False).replace("<", "\\u003c"),
        "weights": _base64(np.concatenate(arrays).astype("<f2" if facts.half else "<f4").tobytes()),
        "posteriors": _base64(np.stack([mu, logvar]).astype("<f4").tobytes()),
        "images": _base64(zlib.compress(images.tobytes(), 9)),
        "script": script,
    }
    text = re.sub(r"\{\{(\w+)\}\}", lambda match: blocks[match[1]], _source("index.html"))
    return text.encode()


def program() -> str:
    """The modules as one script, each in a scope of its own: what `export` named, `import` takes from a constant."""
    parts = []
    for name in MODULES:
        source = _source(f"{name}.js")
        exported = re.findall(r"^export (?:async )?(?:class|const|function) (\w+)", source, re.MULTILINE)
        source = re.sub(r'^import (\{.*\}) from "\./(\w+)\.js";$', r"const \1 = \2_module;", source, flags=re.MULTILINE)
        source = re.sub(r"^export ", "", source, flags=re.MULTILINE)
        parts.append(
            f"const {name}_module = await (async () => {{\n{source}return {{ {', '.join(exported)} }};\n}})();\n"
        )
    return "".join(parts)


def _source(name: str) -> str:
    return (files("vae_jax.pictures.explorer") / name).read_text("utf-8")


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _digest(text: str) -> str:
    return f"sha256-{_base64(hashlib.sha256(text.encode()).digest())}"
