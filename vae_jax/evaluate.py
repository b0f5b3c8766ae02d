"""Measures a trained model on an image set. `python -m vae_jax.evaluate --help` lists the options.

jax is imported by the functions, not by this module, so that `--help` and wrong options are answered at once.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

import numpy as np
import tyro
from tqdm import tqdm

from vae_jax import cli
from vae_jax.config import INT32_MAX, Binarize, InputError, require_writable
from vae_jax.data import load
from vae_jax.files import replacing
from vae_jax.log import say
from vae_jax.trained import read, require_pixels

if TYPE_CHECKING:
    from jax import Array

    from vae_jax.estimate import Params
    from vae_jax.model import VAE

# A latent dimension is active where the variance over the images of its posterior mean is larger (Burda et al. 2015).
ACTIVE_VARIANCE = 0.01
# The progress bar moves once in so many floating-point operations: a second on a CPU that does 20 GFLOP/s.
STRETCH_FLOPS = 20e9
# So many logits of 784 pixels take 3 GB.
MAX_BATCH = 10**6
JSON_KEYS = (
    "images",
    "binarize",
    "loss",
    "loss_stderr",
    "bce",
    "kld",
    "kld_per_latent",
    "active_units",
    "importance_samples",
    "log_px",
    "log_px_stderr",
)


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Measure a model: loss, BCE, KLD, active units, and the importance-weighted estimate of log p(x)."""

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE.pth|WORKDIR")]
    """Weights file in any known layout (.pth, .safetensors), or the workdir of a run."""
    data: Annotated[str | None, tyro.conf.arg(metavar="STR")] = None
    """Image set; by default that of the run, else `mnist`."""
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """Where TFDS keeps its sets; by default as in the run, else TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    max_data_gb: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    """Refuse an image set that takes more memory; by default as in the run, else half of the machine's."""
    binarize: Annotated[Binarize | None, tyro.conf.arg(metavar="|".join(get_args(Binarize)))] = None
    """How grey pixels are made black or white; by default as in the run, else `none`."""
    split: Literal["test", "train"] = "test"
    """Part of the image set to look at."""
    importance_samples: int = 0
    """Samples K an image for the estimate of log p(x) (Burda et al. 2015, equation 8); 0 leaves it out."""
    images: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Look at the first so many images only."""
    batch_size: int = 4096
    """Images times samples at once; bounds the memory and changes no result."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="OUT")] = None
    """File for the figures, as one JSON object."""
    seed: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Seed of the noise and of random binarization; by default that of the run, else 0."""

    def check(self) -> None:
        """Looks at every option without changing anything.

        Raises:
          InputError: An option is out of its range, or the JSON file cannot be written.
        """
        if not 0 <= self.importance_samples <= INT32_MAX:
            raise InputError(
                f"--importance-samples {self.importance_samples}: expected a number from 0 to {INT32_MAX};"
                " a usual choice is 1000"
            )
        if self.images is not None and self.images < 2:
            raise InputError(f"--images {self.images}: expected at least 2, as a standard error needs two")
        if not 1 <= self.batch_size <= MAX_BATCH:
            raise InputError(
                f"--batch-size {self.batch_size}: expected a number from 1 to {MAX_BATCH}; the default is 4096"
            )
        if self.seed is not None and not 0 <= self.seed < 2**32:
            raise InputError(f"--seed {self.seed}: expected a whole number from 0 to {2**32 - 1}; the default is 0")
        if self.max_data_gb is not None and not self.max_data_gb > 0:
            raise InputError(f"--max-data-gb {self.max_data_gb}: expected a number above 0")
        if self.json is not None:
            require_writable("--json", self.json, self.model, self.model / "config.json", Path(self.data or ""))


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

    def to_json(self) -> str:
        """One JSON object with the keys `JSON_KEYS`."""
        return json.dumps({key: getattr(self, key) for key in JSON_KEYS}, indent=2)


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Measures as the options say, prints a table, and writes the JSON file.

    Raises:
      InputError: An option or the model cannot be used; raised before anything is computed.
    """
    config.check()
    trained = read(config.model)
    data = trained.options.get("data", "mnist") if config.data is None else config.data
    rule = config.binarize or trained.options.get("binarize", "none")
    seed = trained.options.get("seed", 0) if config.seed is None else config.seed
    dataset = load(data, config.data_dir or trained.data_dir, config.max_data_gb or trained.options.get("max_data_gb"))
    images = dataset.test_images if config.split == "test" else dataset.train_images
    require_pixels(config.model, trained, data, images.shape[1:])
    if len(images) < 2:
        raise InputError(f"--split {config.split}: --data {data} has {len(images)} image; a standard error needs two")
    if config.images is not None and config.images > len(images):
        raise InputError(f"--images {config.images}: the {config.split} images of --data {data} are {len(images)}")

    import jax
    import jax.numpy as jnp

    from vae_jax import steps
    from vae_jax.binarize import binarize

    key = jax.random.key(seed)
    # The draw of the (JAX) run itself: its whole set, of which the first images are then looked at.
    pixels_key = jax.random.fold_in(key, steps.TEST_PIXELS if config.split == "test" else steps.PIXELS)
    drawn = binarize(jnp.asarray(images.reshape(-1, trained.pixels)), rule, pixels_key)[: config.images]
    evaluation = measure(
        trained.model,
        jax.tree.map(jnp.asarray, trained.params),
        drawn,
        jax.random.fold_in(key, steps.TEST_NOISE),
        importance_samples=config.importance_samples,
        batch_size=config.batch_size,
        binarize=rule,
    )
    say(
        f"{config.model}: {trained.pixels}-{trained.hidden_dim}-{trained.latent_dim};"
        f" {evaluation.images:,} {config.split} images of {data}, binarize {rule}\n" + table(evaluation)
    )
    if dataset.pixels(rule) == "grey":
        say(
            "grey pixels: these Bernoulli figures bound a cross entropy; none is a log-likelihood of the images"
            " (--binarize makes them black or white)"
        )
    if trained.options.get("beta", 1) != 1:
        say(f"the run was trained with beta {trained.options['beta']}; here the loss is bce + kld")
    if config.json is not None:
        config.json.resolve().parent.mkdir(parents=True, exist_ok=True)
        with replacing(config.json) as part:
            part.write_text(evaluation.to_json() + "\n")
        say(f"saved {config.json}")
    return evaluation


def measure(
    model: VAE,
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
      model: Its sizes.
      params: Its parameters.
      images: Bytes, or pixels in [0, 1]; [images, pixels], at least two.
      key: Of the noise.
      importance_samples: Samples K an image for log p(x); 0 leaves it out.
      batch_size: Images times samples at once; bounds the memory and changes no result.
      binarize: How the images were made, for the record.

    References:
      Burda et al., Importance Weighted Autoencoders, equation 8 and section 5.2. https://arxiv.org/abs/1509.00519
    """
    from vae_jax import estimate

    bound = estimate.bound(model, params, images, key, batch_size)
    loss, bce, kld = (_mean_and_stderr(part) for part in bound.losses)
    log_px = log_px_stderr = None
    if importance_samples:
        log_px, log_px_stderr = _mean_and_stderr(
            _log_px(model, params, images, key, samples=importance_samples, batch_size=batch_size)
        )
    return Evaluation(
        images=len(images),
        binarize=binarize,
        loss=loss[0],
        loss_stderr=loss[1],
        bce=bce[0],
        bce_stderr=bce[1],
        kld=kld[0],
        kld_stderr=kld[1],
        kld_per_latent=tuple(np.asarray(bound.kld_per_latent, np.float64).mean(axis=0).tolist()),
        active_units=int(np.sum(np.asarray(bound.mu, np.float64).var(axis=0) > ACTIVE_VARIANCE)),
        importance_samples=importance_samples,
        log_px=log_px,
        log_px_stderr=log_px_stderr,
    )


def _log_px(model: VAE, params: Params, images: Array, key: Array, *, samples: int, batch_size: int) -> np.ndarray:
    """The estimate for every image: one call an interval of the progress bar, all of one length."""
    import jax.numpy as jnp

    from vae_jax import estimate, steps

    image_flops = 2 * samples * model.hidden_dim * (model.latent_dim + model.pixels)
    calls = math.ceil(len(images) / max(1, STRETCH_FLOPS // image_flops))
    numbers = steps.split_batches(jnp.arange(len(images)), math.ceil(len(images) / calls))
    parts = []
    with tqdm(total=len(images), unit=" images", desc=f"log p(x), K = {samples:,}", leave=False, disable=None) as bar:
        for part in numbers:
            parts.append(np.asarray(estimate.importance_log_px(model, params, images, part, key, samples, batch_size)))
            bar.update(min(len(part), len(images) - bar.n))
    return np.concatenate(parts)[: len(images)]


def _mean_and_stderr(per_image: Array | np.ndarray) -> tuple[float, float]:
    # In float64, whatever the device computes in.
    values = np.asarray(per_image, np.float64)
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


def table(evaluation: Evaluation) -> str:
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
    lines.append("kld per latent dimension, the largest first:")
    cells = [f"z{number}: {per_latent[number]:.2f}" for number in order]
    lines += [
        "  " + "".join(f"{cell:12}" for cell in cells[start : start + 8]).rstrip() for start in range(0, len(cells), 8)
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(evaluate, EvaluateConfig, "python -m vae_jax.evaluate")
