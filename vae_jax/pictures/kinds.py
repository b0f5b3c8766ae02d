"""Pictures of what a model makes: grids of images with the latent points behind them, and scatters of latent points.

Each kind of picture is a function, most of them of an `Autoencoder`. Imports neither jax nor torch, and matplotlib only
to draw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Float64, Integer

from vae_jax.config import Axes, LatentPath
from vae_jax.runs.latents import Latents, mean_kld
from vae_jax.system.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@runtime_checkable
class Autoencoder(Protocol):
    """A trained model of any framework."""

    @property
    def latent_dim(self) -> int: ...

    def encode(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """mu and logvar, [images, latent] each, of pixels in [0, 1], [images, pixels]."""
        ...

    def decode(self, z: np.ndarray) -> np.ndarray:
        """The means of the pixels, [..., pixels], at latent points, [..., latent]."""
        ...


class Picture(NamedTuple):
    """A grid of images, and the words around it."""

    # [rows, columns, ...]; where only the arrays are asked for, the places may have any shape.
    images: Float[np.ndarray, "*places pixels"]  # means in [0, 1]; NaN where a place is empty
    z: Float[np.ndarray, "*places latent"]  # NaN where an image is an original or a place is empty
    title: str
    row_labels: Sequence[str] = ()
    column_labels: Sequence[str] = ()
    row_axis: str = ""  # what the row labels measure
    column_axis: str = ""
    marks: Sequence[float] = ()  # for each row, the column to mark; 2.5 lies between columns 2 and 3, NaN marks nothing


class Scatter(NamedTuple):
    """The posterior means of images in two dimensions, and the words around them."""

    points: Float[np.ndarray, "images 2"]
    mu: Float[np.ndarray, "images latent"]
    label: Integer[np.ndarray, " images"] | None
    title: str
    axes: tuple[str, str]  # what the two dimensions are


def sample(model: Autoencoder, rng: np.random.Generator, count: int = 64) -> Picture:
    """Draws `count` points z from N(0, I) and decodes them, in a grid that is as square as possible."""
    z = square(rng.standard_normal((count, model.latent_dim), np.float32))
    return Picture(model.decode(z), z, "Samples from the prior")


def decode(model: Autoencoder, z: Float[np.ndarray, "*places latent"]) -> Picture:
    """Decodes latent points; a place that is NaN stays empty."""
    return Picture(model.decode(z), z, "Decoded latent points")


def square(z: Float[np.ndarray, "points latent"]) -> Float[np.ndarray, "rows columns latent"]:
    """Points row by row in a grid that is as square as possible; NaN fills its last row."""
    columns = math.ceil(math.sqrt(len(z)))
    rows = math.ceil(len(z) / columns)
    filled = np.pad(z, ((0, rows * columns - len(z)), (0, 0)), constant_values=np.nan)
    return filled.reshape(rows, columns, -1)


def reconstruct(model: Autoencoder, images: Float[np.ndarray, "images pixels"]) -> Picture:
    """Images above their reconstructions, decoded from the posterior means."""
    mu, _ = model.encode(images)
    return Picture(
        np.stack([images, model.decode(mu)]),
        np.stack([np.full_like(mu, np.nan), mu]),
        "Test images and their reconstructions",
        row_labels=["image", "reconstruction"],
    )


def interpolate(
    model: Autoencoder,
    start: Float[np.ndarray, "pairs pixels"],
    end: Float[np.ndarray, "pairs pixels"],
    steps: int = 10,
    path: LatentPath = "spherical",
) -> Picture:
    """Decodes the points between the posterior means of two images, which stand at the ends of their row.

    Args:
      model: The model.
      start: The image at the left end of each row.
      end: The image at the right end of each row.
      steps: Points on the path; a row has two columns more, for the images themselves.
      path: A great circle or a straight line.
    """
    z = latent_path(model.encode(start)[0], model.encode(end)[0], steps, path)
    return Picture(
        np.concatenate([start[:, None], model.decode(z), end[:, None]], axis=1),
        np.pad(z, ((0, 0), (1, 1), (0, 0)), constant_values=np.nan),
        f"{path.capitalize()} interpolation between test images",
        column_labels=["image", *(f"{t:.2f}" for t in np.linspace(0, 1, steps)), "image"],
        column_axis="position on the path between the two posterior means",
    )


def latent_path(
    start: Float[np.ndarray, "pairs latent"], end: Float[np.ndarray, "pairs latent"], steps: int, path: LatentPath
) -> Float[np.ndarray, "pairs {steps} latent"]:
    """Points from start to end: in equal steps on a straight line, or in equal angles (White, section 2.1).

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
    # No single great circle joins parallel vectors: they get the straight line.
    curved = np.sin(angle) > 1e-3
    sine = np.where(curved, np.sin(angle), 1)
    return np.where(curved, (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / sine, linear)


def traverse(
    model: Autoencoder,
    image: Float[np.ndarray, " pixels"],
    images: Float[np.ndarray, "images pixels"],
    dimensions: int | None = None,
    steps: int = 11,
    span: float = 3.0,
) -> Picture:
    """Decodes an image's posterior mean with one latent dimension changed at a time.

    A mark under each row shows the image's own value, where it lies within the span.

    Args:
      model: The model.
      image: The image to start from.
      images: The images over which the KLD of each dimension is averaged; the largest KLD comes first.
      dimensions: Rows; all dimensions by default.
      steps: Columns.
      span: The values go from -span to span.
    """
    mu, logvar = model.encode(images)
    kld = mean_kld(mu, logvar)
    order = np.argsort(kld)[::-1][:dimensions]
    values = np.linspace(-span, span, steps, dtype=mu.dtype)
    own = model.encode(image[None])[0][0]
    z = np.tile(own, (len(order), steps, 1))
    z[np.arange(len(order)), :, order] = values
    return Picture(
        model.decode(z),
        z,
        "One latent dimension changed at a time, ordered by its KLD",
        row_labels=[f"z{dimension}: {kld[dimension]:.2f} nats" for dimension in order],
        column_labels=[_signed(value) for value in values.tolist()],
        column_axis="value in standard deviations of the prior; \N{BLACK UP-POINTING TRIANGLE} the image's own value",
        marks=np.interp(own[order], values, np.arange(steps), left=np.nan, right=np.nan).tolist(),
    )


def manifold(model: Autoencoder, side: int = 20) -> Picture:
    """Decodes a square grid over a latent space of two dimensions, in steps of equal probability.

    References:
      Kingma and Welling, Auto-Encoding Variational Bayes, figure 4. https://arxiv.org/abs/1312.6114
    """
    quantiles = [NormalDist().inv_cdf((place + 0.5) / side) for place in range(side)]
    across, up = np.meshgrid(quantiles, quantiles[::-1])
    z = np.stack([across, up], axis=-1).astype(np.float32)
    labels = [_signed(quantile) for quantile in quantiles]
    return Picture(
        model.decode(z),
        z,
        "The latent space, in steps of equal probability",
        row_labels=labels[::-1],
        column_labels=labels,
        row_axis="z1",
        column_axis="z0",
    )


def latents(encoded: Latents, axes: Axes = "kld") -> Scatter:
    """Shows the posterior means of images in two of the model's dimensions, or in two directions between them.

    The origin and the scale stay those of the prior, N(0, I), which looks the same from every direction.

    Args:
      encoded: The images; the model has at least two latent dimensions.
      axes: `kld`: the two dimensions of the largest KLD; `pca`: the first two principal components of mu.
    """
    mu = encoded.mu
    if axes == "kld":
        kld = encoded.kld()
        # In the order of their numbers if there are no others.
        chosen = np.argsort(kld)[::-1][:2] if len(kld) > 2 else np.arange(2)
        points = mu[:, chosen]
        names = [f"z{dimension} (KLD {kld[dimension]:.2f} nats)" for dimension in chosen]
    else:
        two, shares = principal_components(mu)
        points = (mu @ two.T).astype(np.float32)
        names = [f"principal component {place} ({share:.0%} of the variance)" for place, share in enumerate(shares, 1)]
    return Scatter(points, mu, encoded.label, f"Posterior means of {len(mu):,} test images", (names[0], names[1]))


def principal_components(
    mu: Float[np.ndarray, "images latent"],
) -> tuple[Float64[np.ndarray, "2 latent"], Float64[np.ndarray, " 2"]]:
    """The first two principal components of posterior means, of length 1, and their shares of the variance."""
    centred = (mu - mu.mean(axis=0)).astype(np.float64)
    _, variances, components = np.linalg.svd(centred.T @ centred)
    # The sign of a component means nothing: its largest part points up.
    two = components[:2]
    two = two * np.sign(two[[0, 1], np.abs(two).argmax(axis=1)])[:, None]
    return two, variances[:2] / max(variances.sum(), np.finfo(np.float64).tiny)


def _signed(value: float) -> str:
    """The value with its sign and one decimal; without a sign where that would be -0.0."""
    return "0" if round(value, 1) == 0 else f"{value:+.1f}".replace("-", "\N{MINUS SIGN}")


def figure(picture: Picture | Scatter, image_shape: tuple[int, ...]) -> Figure:
    """The picture as a matplotlib figure.

    Args:
      picture: The picture.
      image_shape: Height and width of an image, and its channels if it has any.
    """
    from vae_jax.pictures import plots

    if isinstance(picture, Scatter):
        return plots.scatter(picture.points, picture.label, title=picture.title, axis_names=picture.axes)
    words = picture._asdict()
    images = words.pop("images")
    del words["z"]
    return plots.grid(images.reshape(*images.shape[:-1], *image_shape), **words)


def save(picture: Picture | Scatter, image_shape: tuple[int, ...], path: Path) -> None:
    """Writes a picture: a .png, or an .npz of its arrays.

    These are `images` ([rows, columns, height, width]), `z` and the labels of a grid, and `points` ([images, 2]),
    `mu`, `label` and `axes` of a scatter.

    Args:
      picture: The picture.
      image_shape: Height and width of an image, and its channels if it has any.
      path: The file; its suffix decides the format.

    Raises:
      OSError: The file cannot be written; an older file there is still whole.
    """
    path.resolve().parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npz":
        with replacing(path) as part:
            np.savez_compressed(part, **_arrays(picture, image_shape))
        return

    from vae_jax.pictures import plots

    plots.save(plots.pixels(figure(picture, image_shape)), path)


def _arrays(picture: Picture | Scatter, image_shape: tuple[int, ...]) -> dict[str, Any]:
    if isinstance(picture, Scatter):
        arrays = {"points": picture.points, "mu": picture.mu, "axes": np.array(picture.axes)}
        return arrays if picture.label is None else arrays | {"label": picture.label}
    return {
        "images": picture.images.reshape(*picture.images.shape[:-1], *image_shape),
        "z": picture.z,
        "row_labels": np.array(picture.row_labels),
        "column_labels": np.array(picture.column_labels),
    }
