"""Pictures of what a trained model makes. `python -m vae_jax.generate --help` lists the kinds.

jax is imported when a model is used, not by this module, so that `--help` and wrong options are answered at once.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, cast, get_args

import numpy as np
import tyro

from vae_jax import cli, pictures
from vae_jax.config import Binarize, InputError, require_writable
from vae_jax.data import BUNDLED, load
from vae_jax.log import say
from vae_jax.pictures import LatentPath, Picture
from vae_jax.trained import Trained, read, require_pixels

Numbers = Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT ...")]
# The order of traversed dimensions needs no more images than this, and of large ones no more values.
KLD_IMAGES, KLD_VALUES = 10_000, 10_000_000
# Pixels of all images of a picture: matplotlib takes some 120 bytes for each, 6 GB in all.
MAX_VALUES = 50_000_000


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """Draw what a trained model makes."""

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE.pth|WORKDIR")]
    """Weights file in any known layout (.pth, .safetensors), or the workdir of a run."""
    out: Annotated[Path, tyro.conf.arg(metavar="PICTURE.png|X.npz")]
    """Picture to write, or the arrays of it."""
    data: Annotated[str | None, tyro.conf.arg(metavar="STR")] = None
    """Image set that the model was trained on; by default that of the run, else `mnist`."""
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """Where TFDS keeps its sets; by default as in the run, else TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    max_data_gb: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    """Refuse an image set that takes more memory than this; by default as in the run, else half of the machine's."""
    binarize: Annotated[Binarize | None, tyro.conf.arg(metavar="|".join(get_args(Binarize)))] = None
    """How test images are made black or white, with the seed of the run; by default as in the run, else `none`."""
    draw: bool = False
    """Show Bernoulli draws of the pixels instead of their means."""
    seed: int = 0
    """Seed of what the picture draws: latent points, the choice of test images, pixels (--draw)."""


@dataclasses.dataclass(frozen=True)
class Sample(GenerateConfig):
    """Samples from the prior."""

    count: int = 64
    """How many."""


@dataclasses.dataclass(frozen=True)
class Reconstruct(GenerateConfig):
    """Test images over their reconstructions, decoded from the posterior means."""

    count: int = 10
    """How many images to draw from the test set."""
    numbers: Numbers = ()
    """Numbers of the test images, instead of drawing them."""


@dataclasses.dataclass(frozen=True)
class Interpolate(GenerateConfig):
    """From test image to test image, through the posterior means."""

    count: int = 5
    """How many pairs to draw from the test set, one a row."""
    numbers: Numbers = ()
    """Numbers of the test images, two a row, instead of drawing them."""
    steps: int = 10
    """Images a row."""
    path: LatentPath = "spherical"
    """Along a great circle, where samples of a Gaussian lie, or along a straight line."""


@dataclasses.dataclass(frozen=True)
class Traverse(GenerateConfig):
    """A test image with one latent dimension changed at a time, that of the largest KLD first."""

    number: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Number of the test image to start from, instead of drawing it."""
    dimensions: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Only so many dimensions; all by default."""
    steps: int = 11
    """Images a row."""
    span: float = 3.0
    """From -span to span, in standard deviations of the prior."""


@dataclasses.dataclass(frozen=True)
class Manifold(GenerateConfig):
    """The images over a latent space of two dimensions (Kingma and Welling, figure 4)."""

    side: int = 20
    """Images along each side."""


def generate(config: GenerateConfig) -> Picture:
    """Makes the picture that the options ask for and writes it.

    Raises:
      InputError: An option or the model cannot be used; raised before anything is computed.
    """
    _check(config)
    trained = read(config.model)
    if isinstance(config, Manifold) and trained.latent_dim != 2:
        raise InputError(
            f"{config.model}: has {trained.latent_dim} latent dimensions, and `manifold` shows 2;"
            " train one with --latent-dim 2, or use `traverse`"
        )
    if isinstance(config, Traverse) and config.dimensions is not None and config.dimensions > trained.latent_dim:
        raise InputError(f"--dimensions {config.dimensions}: the model has {trained.latent_dim}")
    data = config.data if config.data is not None else trained.options.get("data", "mnist")
    _require_other_file(config, trained, data)
    _require_drawable(config, trained)
    max_data_gb = trained.options.get("max_data_gb") if config.max_data_gb is None else config.max_data_gb
    test_images = load(data, config.data_dir or trained.data_dir, max_data_gb).test_images
    image_shape = test_images.shape[1:]
    require_pixels(config.model, trained, data, image_shape)
    rng = np.random.default_rng(config.seed)
    numbers = _numbers(config, len(test_images), rng)

    import jax
    import jax.numpy as jnp

    from vae_jax import steps
    from vae_jax.binarize import binarize
    from vae_jax.model import to_pixels

    rule = config.binarize or trained.options.get("binarize", "none")
    # The draw of the run itself: its whole set, of which some images are then looked at.
    key = jax.random.fold_in(jax.random.key(trained.options.get("seed", 0)), steps.TEST_PIXELS)
    drawn_images = binarize(jnp.asarray(test_images.reshape(-1, trained.pixels)), rule, key)

    def originals(chosen: np.ndarray | slice) -> np.ndarray:
        return np.asarray(to_pixels(drawn_images[chosen]))

    match config:
        case Sample():
            picture = pictures.sample(trained, rng, config.count)
        case Reconstruct():
            picture = pictures.reconstruct(trained, originals(numbers))
        case Interpolate():
            pixels = originals(numbers)
            picture = pictures.interpolate(trained, pixels[::2], pixels[1::2], config.steps, config.path)
        case Traverse():
            picture = pictures.traverse(
                trained,
                originals(numbers)[0],
                originals(slice(min(KLD_IMAGES, max(1, KLD_VALUES // trained.pixels)))),
                config.dimensions,
                config.steps,
                config.span,
            )
        case Manifold():
            picture = pictures.manifold(trained, config.side)
        case _:
            raise TypeError(f"no picture of that kind: {config}")
    if config.draw:
        # Not the originals, whose pixels are no means.
        drawn = rng.random(picture.images.shape, np.float32) < picture.images
        made = np.isfinite(picture.z[..., :1])
        picture = picture._replace(images=np.where(made, drawn, picture.images).astype(np.float32))
    pictures.save(picture, image_shape, config.out)
    say(f"saved {config.out}")
    return picture


def _check(config: GenerateConfig) -> None:
    if config.out.suffix not in (".png", ".npz"):
        raise InputError(f"--out {config.out}: expected a name that ends in .png (a picture) or .npz (its arrays)")
    require_writable("--out", config.out)
    # The widest pictures that are still pictures.
    bounds = {"count": (1, 10_000 if isinstance(config, Sample) else 100), "steps": (2, 100), "side": (2, 100)}
    bounds |= {"dimensions": (1, 1000), "seed": (0, 2**32 - 1), "span": (0, 100)}
    for name, (least, most) in bounds.items():
        value = getattr(config, name, None)
        if value is not None and not least <= value <= most:
            raise InputError(f"--{name} {value}: expected a value from {least} to {most}")
    if isinstance(config, Reconstruct | Interpolate):
        most = bounds["count"][1] * (2 if isinstance(config, Interpolate) else 1)
        if len(config.numbers) > most:
            raise InputError(f"--numbers: names {len(config.numbers):,} test images; expected at most {most}")
    if config.max_data_gb is not None and not config.max_data_gb > 0:
        raise InputError(f"--max-data-gb {config.max_data_gb}: expected a number above 0")


def _require_other_file(config: GenerateConfig, trained: Trained, data: str) -> None:
    """The picture must not replace what it is made from."""
    sources = {
        config.model: "the model itself",
        config.model / "config.json": "the run's config.json",
        Path(trained.options.get("export", config.model)): "the model itself",
        Path(data): "the image set",
        BUNDLED: "the image set mnist",
    }
    for path, what in sources.items():
        if path.resolve() == config.out.resolve():
            raise InputError(f"--out {config.out}: is {what}; name another file to write")


def _require_drawable(config: GenerateConfig, trained: Trained) -> None:
    """The picture must fit into the memory."""
    match config:
        case Sample():
            images, options = config.count, "--count"
        case Reconstruct():
            images, options = 2 * (len(config.numbers) or config.count), "--count or --numbers"
        case Interpolate():
            rows = len(config.numbers) // 2 or config.count
            images, options = rows * config.steps, "--steps, --count or --numbers"
        case Traverse():
            images, options = (config.dimensions or trained.latent_dim) * config.steps, "--steps or --dimensions"
        case Manifold():
            images, options = config.side**2, "--side"
        case _:
            raise TypeError(f"no picture of that kind: {config}")
    if images * trained.pixels > MAX_VALUES:
        raise InputError(
            f"{options}: {images:,} images of {trained.pixels:,} pixels are more than {MAX_VALUES:,} values;"
            " ask for fewer images"
        )


def _numbers(config: GenerateConfig, images: int, rng: np.random.Generator) -> np.ndarray:
    """Which test images the picture is about, as asked for or drawn."""
    match config:
        case Reconstruct():
            wanted, count = config.numbers, config.count
        case Interpolate():
            wanted, count = config.numbers, 2 * config.count
            if len(wanted) % 2:
                raise InputError(f"--numbers {' '.join(map(str, wanted))}: expected pairs, so an even count of numbers")
        case Traverse():
            wanted, count = () if config.number is None else (config.number,), 1
        case _:
            wanted, count = (), 0
    for number in wanted:
        if not 0 <= number < images:
            raise InputError(f"test image {number}: expected a number from 0 to {images - 1}")
    return np.array(wanted) if wanted else rng.choice(images, count, replace=count > images)


def main() -> None:
    # tyro makes a subcommand of each type of the union, which has no type of its own in Python.
    kinds = cast(type[GenerateConfig], Sample | Reconstruct | Interpolate | Traverse | Manifold)
    cli.run(generate, kinds, "python -m vae_jax.generate")


if __name__ == "__main__":
    main()
