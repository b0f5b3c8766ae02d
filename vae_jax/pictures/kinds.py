"""Pictures of what a model makes: a grid of images, the latent points behind them, and the words around them.

Each kind is a function of a `Coder`; imports neither jax nor torch, and matplotlib only to write a .png.
"""

from __future__ import annotations

import math
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from vae_jax.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LatentPath = Literal["spherical", "linear"]


@runtime_checkable
class Coder(Protocol):
    """A model of either framework, as these pictures see it."""

    @property
    def latent_dim(self) -> int: ...

    def encode(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pixels in [0, 1], [images, pixels], to mu and logvar, [images, latent] each."""
        ...

    def decode(self, z: np.ndarray) -> np.ndarray:
        """Latent points, [..., latent], to the means of the pixels, [..., pixels]."""
        ...


class Picture(NamedTuple):
    """A grid of images and what is written around it."""

    images: Float[np.ndarray, "rows columns pixels"]  # means in [0, 1]; NaN where a place is empty
    z: Float[np.ndarray, "rows columns latent"]  # NaN where an image is an original
    title: str
    row_labels: list[str]
    column_labels: list[str]


def sample(model: Coder, rng: np.random.Generator, count: int = 64) -> Picture:
    """Draws z from N(0, I): `count` images, in as square a grid as they fill."""
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    z = np.full((rows * columns, model.latent_dim), np.nan, np.float32)
    z[:count] = rng.standard_normal((count, model.latent_dim), np.float32)
    z = z.reshape(rows, columns, -1)
    return Picture(model.decode(z), z, "samples from the prior", [], [])


def reconstruct(model: Coder, images: Float[np.ndarray, "images pixels"]) -> Picture:
    """Images over their reconstructions, decoded from the posterior means."""
    mu, _ = model.encode(images)
    return Picture(
        np.stack([images, model.decode(mu)]),
        np.stack([np.full_like(mu, np.nan), mu]),
        "test images and their reconstructions",
        ["image", "recon"],
        [],
    )


def interpolate(
    model: Coder,
    start: Float[np.ndarray, "pairs pixels"],
    end: Float[np.ndarray, "pairs pixels"],
    steps: int = 10,
    path: LatentPath = "spherical",
) -> Picture:
    """Decodes the points between the posterior means of images, a pair a row."""
    z = latent_path(model.encode(start)[0], model.encode(end)[0], steps, path)
    labels = [f"{t:.2f}" for t in np.linspace(0, 1, steps)]
    return Picture(model.decode(z), z, f"{path} interpolation between test images", [], labels)


def latent_path(
    start: Float[np.ndarray, "pairs latent"], end: Float[np.ndarray, "pairs latent"], steps: int, path: LatentPath
) -> Float[np.ndarray, "pairs {steps} latent"]:
    """Points from start to end: on the straight line, or turning by equal angles (White, section 2.1).

    References:
      White, Sampling Generative Networks. https://arxiv.org/abs/1609.04468
    """
    t = np.linspace(0, 1, steps, dtype=start.dtype)[None, :, None]
    a, b = start[:, None], end[:, None]
    linear = (1 - t) * a + t * b
    if path == "linear":
        return linear
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    cosine = np.sum(a * b, axis=-1) / np.maximum(lengths, np.finfo(a.dtype).tiny)
    angle = np.arccos(np.clip(cosine, -1, 1))[..., None]
    # Between parallel vectors there is no circle, or more than one.
    curved = np.sin(angle) > 1e-3
    sine = np.where(curved, np.sin(angle), 1)
    return np.where(curved, (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / sine, linear)


def traverse(
    model: Coder,
    image: Float[np.ndarray, " pixels"],
    images: Float[np.ndarray, "images pixels"],
    dimensions: int | None = None,
    steps: int = 11,
    span: float = 3.0,
) -> Picture:
    """Decodes an image's posterior mean with one latent dimension changed at a time.

    Args:
      model: The model.
      image: The image to start from.
      images: Those over which the KLD of each dimension is averaged, which orders the rows.
      dimensions: Rows; all dimensions by default.
      steps: Columns.
      span: Values from -span to span.
    """
    mu, logvar = model.encode(images)
    kld = np.mean(-0.5 * (1 + logvar - mu**2 - np.exp(logvar)), axis=0)
    order = np.argsort(kld)[::-1][:dimensions]
    values = np.linspace(-span, span, steps, dtype=mu.dtype)
    z = np.tile(model.encode(image[None])[0], (len(order), steps, 1))
    z[np.arange(len(order)), :, order] = values
    return Picture(
        model.decode(z),
        z,
        "one latent dimension at a time, that of the largest KLD (in nats) first",
        [f"z{dimension}: {kld[dimension]:.2f}" for dimension in order],
        [f"{value:+.1f}" for value in values],
    )


def manifold(model: Coder, side: int = 20) -> Picture:
    """Decodes a square grid of equal probabilities, through the inverse of the normal distribution function.

    References:
      Kingma and Welling, Auto-Encoding Variational Bayes, figure 4. https://arxiv.org/abs/1312.6114
    """
    quantiles = [NormalDist().inv_cdf((place + 0.5) / side) for place in range(side)]
    across, up = np.meshgrid(quantiles, quantiles[::-1])
    z = np.stack([across, up], axis=-1).astype(np.float32)
    # As many labels as fit.
    every = math.ceil(side / 10)
    labels = [f"{quantile:.1f}" if place % every == 0 else "" for place, quantile in enumerate(quantiles)]
    return Picture(model.decode(z), z, "the latent space, z0 across and z1 up", labels[::-1], labels)


def figure(picture: Picture, image_shape: tuple[int, ...]) -> Figure:
    """The picture as a matplotlib figure.

    Args:
      picture: What to draw.
      image_shape: Of each image: height and width, and channels if it has any.
    """
    from vae_jax import plots

    return plots.grid(
        picture.images.reshape(*picture.images.shape[:2], *image_shape),
        title=picture.title,
        row_labels=picture.row_labels,
        column_labels=picture.column_labels,
    )


def save(picture: Picture, image_shape: tuple[int, ...], path: Path) -> None:
    """Writes a picture: a .png, or an .npz with `images` ([rows, columns, height, width]), `z` and the labels.

    Args:
      picture: What to write.
      image_shape: Of each image: height and width, and channels if it has any.
      path: Its name's ending tells which.

    Raises:
      OSError: It cannot be written; a file that stood there is still whole.
    """
    path.resolve().parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npz":
        with replacing(path) as part:
            np.savez_compressed(
                part,
                images=picture.images.reshape(*picture.images.shape[:2], *image_shape),
                z=picture.z,
                row_labels=np.array(picture.row_labels),
                column_labels=np.array(picture.column_labels),
            )
        return

    from vae_jax import plots

    plots.save(plots.pixels(figure(picture, image_shape)), path)
