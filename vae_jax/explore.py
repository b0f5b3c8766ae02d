"""Writes a web page that runs a trained model. `python -m vae_jax.explore --help` lists the options.

jax is imported when a model is used, so that `--help` and wrong options are answered at once.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from vae_jax.config import ExploreConfig, Recipe
from vae_jax.data.source import BUNDLED
from vae_jax.pictures import kinds
from vae_jax.pictures.explorer import page
from vae_jax.runs import latents
from vae_jax.runs.trained import images_for, read
from vae_jax.runs.workdir import METRICS, require_writable_beside
from vae_jax.system import command_line
from vae_jax.system.console import say
from vae_jax.system.errors import InputError
from vae_jax.system.files import replacing, require_writable

# Browsers become slow with larger pages, and mail and chat programs refuse them.
MAX_MB = 50
# Half precision has no larger number.
FLOAT16_MAX = 65504


def explore(config: ExploreConfig) -> None:
    """Reads a model and its test images, puts both into a page, and writes it.

    Raises:
      InputError: An option or the model cannot be used, or the page would be too large; nothing is written.
    """
    config.check()
    if config.out.suffix not in (".html", ".htm"):
        raise InputError(f"--out {config.out}: expected a name that ends in .html")
    require_writable_beside("--out", config.out, config.model)
    trained = read(config.model, config.checkpoint)
    if trained.latent_dim < 2:
        raise InputError(f"{config.model}: has 1 latent dimension, and the map shows 2; use `generate traverse`")
    used = [trained.options.get("data", ""), trained.options.get("export", config.model), BUNDLED]
    require_writable("--out", config.out, *(Path(path) for path in [config.data or "", *used]))
    if config.half:
        trained = dataclasses.replace(trained, params=_rounded(trained.params))
    layers = page.layers_of(trained)
    _require_size(config, page.weights_size(layers, config.half))
    data, dataset, rule = images_for(config, trained)

    import jax

    from vae_jax.core.model import to_pixels
    from vae_jax.core.settings import fixed_settings, require_device
    from vae_jax.runs.feed import as_seen_by_run

    require_device()
    # Of all test images, so that the page and `evaluate` agree on the KLD.
    with fixed_settings(trained.options.get("matmul_precision", "highest")):
        encoded = latents.encode(trained, dataset, ("test",), rule)
        numbers = choose(encoded.label, len(encoded.mu), config.images)
        total, key = len(encoded.mu), jax.random.key(trained.options.get("seed", 0))
        seen = as_seen_by_run(dataset.test_images[numbers], rule, key, "test", numbers, total)
        images = np.rint(np.asarray(to_pixels(seen)) * 255).astype(np.uint8)
    with np.errstate(over="ignore"):
        kld, variance = encoded.kld(), encoded.mu.var(axis=0)
    if not np.isfinite([kld, variance]).all():
        raise InputError(f"{config.model}: the KLD of its test images is not finite; train again")
    components, shares = kinds.principal_components(encoded.mu)
    facts = page.Facts(
        name=config.model.resolve().name,
        data=_last_name(data),
        binarize=rule,
        shape=dataset.image_shape,
        half=config.half,
        numbers=numbers.tolist(),
        labels=None if encoded.label is None else encoded.label[numbers].tolist(),
        kld=kld.tolist(),
        variance=variance.tolist(),
        components=components.tolist(),
        shares=shares.tolist(),
        training=_training(config, trained.options),
        options=_recipe(trained.options),
    )
    content = page.build(facts, layers, images, encoded.mu[numbers], encoded.logvar[numbers])
    _require_size(config, len(content))
    config.out.resolve().parent.mkdir(parents=True, exist_ok=True)
    with replacing(config.out) as part:
        part.write_bytes(content)
    say(f"saved {config.out}: {len(content) / 1e6:.1f} MB, with {len(numbers):,} test images; open it in a browser")


def choose(label: np.ndarray | None, total: int, count: int) -> np.ndarray:
    """The numbers of up to `count` test images: equally many of each label, or spread over the set if it has none."""
    count = min(count, total)
    if label is None:
        return np.arange(count) * total // count
    # Every image's place among those of its label: first all first ones, then all second ones, ...
    order = np.argsort(label, kind="stable")
    _, starts, sizes = np.unique(label[order], return_index=True, return_counts=True)
    place = np.empty(total, int)
    place[order] = np.arange(total) - np.repeat(starts, sizes)
    return np.sort(np.argsort(place, kind="stable")[:count])


def _require_size(config: ExploreConfig, size: int) -> None:
    if size > MAX_MB * 1e6:
        less = "ask for fewer --images" if config.half else "add --half, or ask for fewer --images"
        raise InputError(f"--out {config.out}: would take {size / 1e6:,.1f} MB; expected at most {MAX_MB}; {less}")


def _rounded(params: Any) -> Any:
    """Parameters rounded to half precision, of their own type again: everything in the page is about this model."""
    import jax

    def rounded(array: np.ndarray) -> np.ndarray:
        if np.abs(array).max() > FLOAT16_MAX:
            raise InputError(f"--half: the model has weights beyond {FLOAT16_MAX}, float16's largest; leave it out")
        return np.asarray(array).astype(np.float16).astype(np.float32)

    return jax.tree.map(rounded, params)


def _training(config: ExploreConfig, options: dict[str, Any]) -> dict[str, Any] | None:
    """The line of metrics.jsonl that belongs to the model, with the seconds of all epochs until then."""
    try:
        lines = [json.loads(line) for line in (config.model / METRICS).read_text().splitlines()]
        history = [
            {name: float(line[name]) for name in ("epoch", "train_loss", "test_loss", "seconds")} for line in lines
        ]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None  # a weights file, or a run without its metrics: the page does without them
    if not history or not all(map(math.isfinite, (value for line in history for value in line.values()))):
        return None
    best = config.checkpoint == "best" or (config.checkpoint is None and options.get("keep") == "best")
    chosen = min(history, key=lambda line: line["test_loss"]) if best else history[-1]
    seconds = sum(line["seconds"] for line in history if line["epoch"] <= chosen["epoch"])
    device = options.get("device")
    return chosen | {"seconds": seconds, "device": device if isinstance(device, str) else None}


def _recipe(options: dict[str, Any]) -> dict[str, str]:
    """The options that made the model, as text; of a path only the last name, as the page may be passed on."""
    names = [field.name for field in dataclasses.fields(Recipe)]
    return {name: _last_name(str(options[name])) for name in [*names, "epochs"] if options.get(name) is not None}


def _last_name(data: str) -> str:
    return data if data.startswith("tfds:") else Path(data).name


def main() -> None:
    command_line.run(explore, ExploreConfig, "python -m vae_jax.explore")


if __name__ == "__main__":
    main()
