"""Measures a trained model on an image set. `python -m vae_jax.evaluate --help` lists the options.

The modules that need jax are imported by the functions, so that `--help` and wrong options are answered at once.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from vae_jax.config import EvaluateConfig
from vae_jax.data.mapped import MappedImages
from vae_jax.runs.trained import images_for, read
from vae_jax.runs.workdir import require_writable_beside
from vae_jax.system import command_line
from vae_jax.system.console import say
from vae_jax.system.errors import InputError, NonFiniteLossError
from vae_jax.system.files import replacing, require_writable

if TYPE_CHECKING:
    import flax.linen as nn
    from jax import Array

    from vae_jax.core.model import Params

# A latent dimension is active where the variance over the images of its posterior mean is larger (Burda et al. 2015).
ACTIVE_VARIANCE = 0.01
# The progress bar moves once in so many floating-point operations: a second on a CPU that does 20 GFLOP/s.
BAR_FLOPS = 20e9
# Images that are on the device at once.
PIECE_BYTES = 512e6


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Averages over images, in nats per image, and their standard errors over the images."""

    images: int
    binarize: str
    loss: float  # bce + kld, the negative evidence lower bound
    loss_stderr: float
    bce: float
    bce_stderr: float
    kld: float
    kld_stderr: float
    kld_per_latent: tuple[float, ...]
    active_units: int
    importance_samples: int  # 0: log_px was not asked for
    log_px: float | None
    log_px_stderr: float | None


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Measures as the options say, prints a table, and writes the JSON file.

    Raises:
      InputError: An option or the model cannot be used; raised before anything is computed.
    """
    config.check()
    if config.json is not None:
        require_writable_beside("--json", config.json, config.model)
    trained = read(config.model, config.checkpoint)
    if config.json is not None:
        require_writable("--json", config.json, Path(config.data or trained.options.get("data", "")))
    data, dataset, rule = images_for(config, trained)
    images: np.ndarray | MappedImages = dataset.test_images if config.split == "test" else dataset.train_images
    if len(images) < 2:
        raise InputError(f"--split {config.split}: --data {data} has {len(images)} image; a standard error needs two")
    if config.images is not None and config.images > len(images):
        raise InputError(
            f"--images {config.images}: --data {data} has {len(images)} {config.split} images; ask for fewer"
        )

    import jax
    import jax.numpy as jnp

    from vae_jax.core import steps
    from vae_jax.core.settings import fixed_settings, require_device
    from vae_jax.runs.feed import as_seen_by_run

    seed = trained.options.get("seed", 0) if config.seed is None else config.seed
    numbers = np.arange(config.images or len(images))
    per_piece = max(config.batch_size, int(PIECE_BYTES // (trained.pixels * images.dtype.itemsize)))
    require_device()
    with fixed_settings(trained.options.get("matmul_precision", "highest")):
        key = jax.random.key(seed)

        def seen(numbers: np.ndarray) -> Array:
            return as_seen_by_run(images[numbers], rule, key, config.split, numbers, len(images))

        evaluation = _measure(
            trained.model,
            jax.tree.map(jnp.asarray, trained.params),
            map(seen, np.split(numbers, range(per_piece, len(numbers), per_piece))),
            jax.random.fold_in(key, steps.TEST_NOISE),
            config.importance_samples,
            config.batch_size,
            rule,
        )
    say(f"{config.model}: {evaluation.images:,} {config.split} images of {data}, binarize {rule}", *table(evaluation))
    if dataset.pixels(rule) == "grey":
        say(
            "grey pixels: these figures bound a cross entropy, not a log-likelihood",
            "(--binarize makes the pixels black and white)",
        )
    if trained.options.get("beta", 1) != 1:
        say(f"the run was trained with beta {trained.options['beta']}; here the loss is bce + kld")
    if config.json is not None:
        config.json.resolve().parent.mkdir(parents=True, exist_ok=True)
        with replacing(config.json) as part:
            found = {"model": str(config.model), "data": data, "split": config.split, "seed": seed}
            part.write_text(json.dumps(found | dataclasses.asdict(evaluation), indent=2) + "\n")
        say(f"saved {config.json}")
    return evaluation


def measure(
    model: nn.Module,
    params: Params,
    images: Array,
    key: Array,
    *,
    importance_samples: int = 0,
    batch_size: int = 4096,
    binarize: str = "none",
) -> Evaluation:
    """Measures a model, with a progress bar where the output is a terminal.

    Args:
      model: A Flax module with the methods `encode` and `decode`.
      params: Its parameters.
      images: Bytes, or pixels in [0, 1]; [images, pixels], at least two.
      key: For the noise.
      importance_samples: Samples K an image for log p(x); 0 leaves it out.
      batch_size: Images times samples at once; bounds the memory, and changes results by rounding only.
      binarize: How the images were made black and white, for the record.

    Raises:
      InputError: The images are not bytes, or floats in [0, 1].
      NonFiniteLossError: A figure is not finite.

    References:
      Burda et al., Importance Weighted Autoencoders, equation 8 and section 5.2. https://arxiv.org/abs/1509.00519
    """
    return _measure(model, params, [images], key, importance_samples, batch_size, binarize)


def _measure(
    model: nn.Module,
    params: Params,
    pieces: Iterable[Array],
    key: Array,
    importance_samples: int,
    batch_size: int,
    binarize: str,
) -> Evaluation:
    """`measure` for images that come piece by piece."""
    import jax

    from vae_jax.core import estimate

    bounds, log_px_parts, first = [], [], 0
    for images in pieces:
        _require_pixels(images)
        bounds.append(jax.device_get(estimate.bound(model, params, images, key, batch_size, first)))
        if importance_samples:
            log_px_parts.append(
                _log_px(model, params, images, key, samples=importance_samples, batch_size=batch_size, first=first)
            )
        first += len(images)
    bound = jax.tree.map(lambda *parts: np.concatenate(parts), *bounds)
    (loss, loss_stderr), (bce, bce_stderr), (kld, kld_stderr) = (_mean_and_stderr(part) for part in bound.losses)
    log_px = log_px_stderr = None
    if importance_samples:
        log_px, log_px_stderr = _mean_and_stderr(np.concatenate(log_px_parts))
    if not math.isfinite(loss + (log_px or 0)):
        raise NonFiniteLossError(
            f"the loss of this model is {loss} (bce {bce}, kld {kld}), log p(x) {log_px}; train again"
        )
    return Evaluation(
        images=first,
        binarize=binarize,
        loss=loss,
        loss_stderr=loss_stderr,
        bce=bce,
        bce_stderr=bce_stderr,
        kld=kld,
        kld_stderr=kld_stderr,
        kld_per_latent=tuple(np.asarray(bound.kld_per_latent, np.float64).mean(axis=0).tolist()),
        active_units=int(np.sum(np.asarray(bound.mu, np.float64).var(axis=0) > ACTIVE_VARIANCE)),
        importance_samples=importance_samples,
        log_px=log_px,
        log_px_stderr=log_px_stderr,
    )


def _require_pixels(images: Array) -> None:
    if np.issubdtype(images.dtype, np.floating) and not -1e-6 <= float(images.min()) <= float(images.max()) <= 1 + 1e-6:
        raise InputError(
            f"images hold floats from {float(images.min()):.9g} to {float(images.max()):.9g}; expected floats in"
            " [0, 1], or uint8 from 0 to 255"
        )


def _log_px(
    model: nn.Module, params: Params, images: Array, key: Array, *, samples: int, batch_size: int, first: int
) -> np.ndarray:
    """The estimate for every image, in calls of one length; the progress bar moves between them."""
    import jax
    import jax.numpy as jnp

    from vae_jax.core import estimate, steps

    image_flops = samples * sum(leaf.size for leaf in jax.tree.leaves(params))  # the decoder is about half of them
    calls = math.ceil(len(images) / max(1, BAR_FLOPS // image_flops))
    numbers = steps.split_batches(jnp.arange(len(images)), math.ceil(len(images) / calls))
    parts = []
    with tqdm(total=len(images), unit=" images", desc=f"log p(x), K = {samples:,}", leave=False, disable=None) as bar:
        for part in numbers:
            log_px = estimate.importance_log_px(model, params, images, part, key, samples, batch_size, first)
            parts.append(np.asarray(log_px))
            bar.update(min(len(part), len(images) - bar.n))
    return np.concatenate(parts)[: len(images)]


def _mean_and_stderr(per_image: Array | np.ndarray) -> tuple[float, float]:
    # In float64, whatever type the device computes in.
    values = np.asarray(per_image, np.float64)
    with np.errstate(invalid="ignore"):  # of values that are not finite, which `measure` refuses
        return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


def table(evaluation: Evaluation) -> list[str]:
    """The figures as lines of text."""
    rows = [
        ("loss = bce + kld", evaluation.loss, evaluation.loss_stderr),
        ("bce", evaluation.bce, evaluation.bce_stderr),
        ("kld", evaluation.kld, evaluation.kld_stderr),
    ]
    if evaluation.log_px is not None and evaluation.log_px_stderr is not None:
        rows.append((f"log p(x), K = {evaluation.importance_samples:,}", evaluation.log_px, evaluation.log_px_stderr))
    lines = [f"{'nats per image':24}{'mean':>9}{'std. error':>13}"]
    lines += [f"{name:24}{mean:9.2f}{stderr:13.2f}" for name, mean, stderr in rows]
    per_latent = evaluation.kld_per_latent
    order = np.argsort(per_latent)[::-1]
    lines.append(
        f"active units: {evaluation.active_units} of {len(per_latent)}"
        f" (variance of mu over the images > {ACTIVE_VARIANCE})"
    )
    lines.append("kld of each latent dimension, largest first:")
    cells = [f"z{number}: {per_latent[number]:.2f}" for number in order]
    lines += [
        "  " + "".join(f"{cell:12}" for cell in cells[start : start + 6]).rstrip() for start in range(0, len(cells), 6)
    ]
    return lines


def main() -> None:
    command_line.run(evaluate, EvaluateConfig, "python -m vae_jax.evaluate")


if __name__ == "__main__":
    main()
