"""Draws what a trained model makes. `python -m vae_jax.generate --help` lists the kinds of pictures.

jax is imported when a model is used, so that `--help` and wrong options are answered at once.
"""

import math
from pathlib import Path
from typing import cast

import numpy as np

from vae_jax.config import GenerateConfig, Interpolate, Manifold, Reconstruct, Sample, Traverse
from vae_jax.data.source import BUNDLED
from vae_jax.pictures import kinds
from vae_jax.pictures.kinds import Picture
from vae_jax.runs.trained import Trained, images_for, read
from vae_jax.runs.workdir import CONFIG
from vae_jax.system import command_line
from vae_jax.system.console import say
from vae_jax.system.errors import InputError
from vae_jax.system.files import require_writable

# Ordering the traversed dimensions needs no more images than this, and no more values of large images.
KLD_IMAGES, KLD_VALUES = 10_000, 10_000_000
# Pixels of all images of a picture: matplotlib takes some 120 bytes for each, 6 GB in all.
MAX_VALUES = 50_000_000


def generate(config: GenerateConfig) -> Picture:
    """Makes the picture that the options ask for and writes it.

    Raises:
      InputError: An option or the model cannot be used; raised before anything is computed.
    """
    config.check()
    _check(config)
    trained = read(config.model)
    if isinstance(config, Manifold) and trained.latent_dim != 2:
        raise InputError(
            f"{config.model}: has {trained.latent_dim} latent dimensions, and `manifold` shows 2;"
            " train a model with --latent-dim 2, or use `traverse`"
        )
    if isinstance(config, Traverse) and config.dimensions is not None and config.dimensions > trained.latent_dim:
        raise InputError(f"--dimensions {config.dimensions}: the model has {trained.latent_dim}; ask for fewer")
    _require_other_file(config, trained)
    _require_drawable(config, trained)
    from vae_jax.core.settings import device_kind, fixed_settings

    device_kind()
    rng = np.random.default_rng(config.seed)
    with fixed_settings():
        picture, image_shape = _make(config, trained, rng)
    if config.draw:
        # The originals stay as they are: their pixels are no means.
        drawn = rng.random(picture.images.shape, np.float32) < picture.images
        made = np.isfinite(picture.z[..., :1])
        picture = picture._replace(images=np.where(made, drawn, picture.images).astype(np.float32))
    kinds.save(picture, image_shape, config.out)
    say(f"saved {config.out}")
    return picture


def _make(config: GenerateConfig, trained: Trained, rng: np.random.Generator) -> tuple[Picture, tuple[int, ...]]:
    """The picture, and the shape of an image."""
    if isinstance(config, Sample):
        return kinds.sample(trained, rng, config.count), _image_shape(config, trained)
    if isinstance(config, Manifold):
        return kinds.manifold(trained, config.side), _image_shape(config, trained)
    _, dataset, rule = images_for(config, trained)
    numbers = _numbers(config, len(dataset.test_images), rng)

    import jax

    from vae_jax.core.model import to_pixels
    from vae_jax.runs.feed import as_seen_by_run

    images = as_seen_by_run(dataset.test_images, rule, jax.random.key(trained.options.get("seed", 0)), "test")
    originals = np.asarray(to_pixels(images[numbers]))
    match config:
        case Reconstruct():
            picture = kinds.reconstruct(trained, originals)
        case Interpolate():
            picture = kinds.interpolate(trained, originals[::2], originals[1::2], config.steps, config.path)
        case Traverse():
            averaged = np.asarray(to_pixels(images[: min(KLD_IMAGES, max(1, KLD_VALUES // trained.pixels))]))
            picture = kinds.traverse(trained, originals[0], averaged, config.dimensions, config.steps, config.span)
        case _:
            raise TypeError(f"no picture of that kind: {config}")
    return picture, dataset.image_shape


def _image_shape(config: GenerateConfig, trained: Trained) -> tuple[int, ...]:
    """The shape of an image; a run knows it, and needs no image set for pictures that show none."""
    shape = tuple(trained.options.get("image_shape", ()))
    if config.data is None and math.prod(shape) == trained.pixels:
        return shape
    return images_for(config, trained)[1].image_shape


def _check(config: GenerateConfig) -> None:
    if config.out.suffix not in (".png", ".npz"):
        raise InputError(f"--out {config.out}: expected a name that ends in .png (a picture) or .npz (its arrays)")
    require_writable("--out", config.out)
    if isinstance(config, Reconstruct | Interpolate):
        most = 200 if isinstance(config, Interpolate) else 100
        if len(config.numbers) > most:
            raise InputError(f"--numbers: names {len(config.numbers):,} test images; expected at most {most}")
        if isinstance(config, Interpolate) and len(config.numbers) % 2:
            numbers = " ".join(map(str, config.numbers))
            raise InputError(f"--numbers {numbers}: expected pairs, so an even count of numbers")


def _require_other_file(config: GenerateConfig, trained: Trained) -> None:
    """The picture must not replace the files that it is made from."""
    sources = {
        config.model: "the model itself",
        config.model / CONFIG: "the run's config.json",
        Path(trained.options.get("export", config.model)): "the model itself",
        Path(config.data or trained.options.get("data", "")): "the image set",
        BUNDLED: "the image set mnist",
    }
    for path, what in sources.items():
        if path.resolve() == config.out.resolve():
            raise InputError(f"--out {config.out}: is {what}; name another file to write")


def _require_drawable(config: GenerateConfig, trained: Trained) -> None:
    """The picture must fit into memory."""
    match config:
        case Sample():
            images, options = config.count, "--count"
        case Reconstruct():
            images, options = 2 * (len(config.numbers) or config.count), "--count or --numbers"
        case Interpolate():
            rows = len(config.numbers) // 2 or config.count
            images, options = rows * (config.steps + 2), "--steps, --count or --numbers"
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
    any_kind = cast(type[GenerateConfig], Sample | Reconstruct | Interpolate | Traverse | Manifold)
    command_line.run(generate, any_kind, "python -m vae_jax.generate")


if __name__ == "__main__":
    main()
