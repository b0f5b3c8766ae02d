"""Draws what a trained model makes. `python -m vae_jax.generate --help` lists the kinds of pictures.

Each kind is a function here, listed in `KINDS` under its options. jax is imported when a model is used, so that
`--help` and wrong options are answered at once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Union, cast

import numpy as np

from vae_jax.config import (
    Binarize,
    Decode,
    GenerateConfig,
    GridConfig,
    Interpolate,
    Latents,
    Manifold,
    Reconstruct,
    Sample,
    Traverse,
)
from vae_jax.data.dataset import Dataset, memory_limit
from vae_jax.data.source import BUNDLED
from vae_jax.pictures import kinds
from vae_jax.pictures.kinds import Picture, Scatter
from vae_jax.runs import latents
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


def generate(config: GenerateConfig) -> Picture | Scatter:
    """Makes the picture that the options ask for and writes it.

    Raises:
      InputError: An option or the model cannot be used; raised before anything is computed.
    """
    config.check()
    if config.out.suffix not in (".png", ".npz"):
        raise InputError(f"--out {config.out}: expected a name that ends in .png (a picture) or .npz (its arrays)")
    require_writable("--out", config.out)
    trained = read(config.model, config.checkpoint)
    _require_other_file(config, trained)
    from vae_jax.core.settings import fixed_settings, require_device

    require_device()
    rng = np.random.default_rng(config.seed if isinstance(config, GridConfig) else 0)
    source = Source(config, trained, rng)
    with fixed_settings(trained.options.get("matmul_precision", "highest")):
        picture = KINDS[type(config)](config, source)
    if isinstance(config, GridConfig) and config.draw and isinstance(picture, Picture):
        # The originals stay as they are: their pixels are no means.
        drawn = rng.random(picture.images.shape, np.float32) < picture.images
        made = np.isfinite(picture.z[..., :1])
        picture = picture._replace(images=np.where(made, drawn, picture.images).astype(np.float32))
    kinds.save(picture, source.image_shape, config.out)
    say(f"saved {config.out}")
    return picture


class Source:
    """What pictures are made of: a model, its test images, and draws.

    Args:
      config: The options.
      trained: The model.
      rng: For the choice of test images, and for whatever else a picture draws.
    """

    def __init__(self, config: GenerateConfig, trained: Trained, rng: np.random.Generator):
        self._config = config
        self.trained = trained
        self.rng = rng

    @functools.cached_property
    def loaded(self) -> tuple[str, Dataset, Binarize]:
        """The name of the image set, the set, and how its pixels are made black and white; read when first needed."""
        return images_for(self._config, self.trained)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """The shape of an image; a run knows it, and needs no image set for pictures that show none."""
        shape = tuple(self.trained.options.get("image_shape", ()))
        if self._config.data is None and math.prod(shape) == self.trained.pixels:
            return shape
        return self.loaded[1].image_shape

    def pixels(self, chosen: np.ndarray | slice) -> np.ndarray:
        """Test images in [0, 1] as the run saw them, [images, pixels]."""
        import jax

        from vae_jax.core.model import to_pixels
        from vae_jax.runs.feed import as_seen_by_run

        _, dataset, rule = self.loaded
        total, key = len(dataset.test_images), jax.random.key(self.trained.options.get("seed", 0))
        numbers = np.arange(total)[chosen]
        return np.asarray(to_pixels(as_seen_by_run(dataset.test_images[numbers], rule, key, "test", numbers, total)))

    def originals(self, wanted: tuple[int, ...], count: int) -> np.ndarray:
        """The pixels of the test images that the options name, or of `count` drawn ones."""
        images = len(self.loaded[1].test_images)
        for number in wanted:
            if not 0 <= number < images:
                raise InputError(f"test image {number}: expected a number from 0 to {images - 1}")
        return self.pixels(np.array(wanted) if wanted else self.rng.choice(images, count, replace=count > images))

    def require_drawable(self, images: int, options: str) -> None:
        """Checks that a picture of so many images fits into memory, and that the image set goes with the model."""
        if images * self.trained.pixels > MAX_VALUES:
            raise InputError(
                f"{options}: {images:,} images of {self.trained.pixels:,} pixels are more than {MAX_VALUES:,} values;"
                " ask for fewer images"
            )
        _ = self.image_shape


def _sample(config: Sample, source: Source) -> Picture:
    source.require_drawable(config.count, "--count")
    return kinds.sample(source.trained, source.rng, config.count)


def _reconstruct(config: Reconstruct, source: Source) -> Picture:
    _require_numbers(config.numbers, 100)
    source.require_drawable(2 * (len(config.numbers) or config.count), "--count or --numbers")
    return kinds.reconstruct(source.trained, source.originals(config.numbers, config.count))


def _interpolate(config: Interpolate, source: Source) -> Picture:
    _require_numbers(config.numbers, 200)
    if len(config.numbers) % 2:
        numbers = " ".join(map(str, config.numbers))
        raise InputError(f"--numbers {numbers}: expected pairs, so an even count of numbers")
    rows = len(config.numbers) // 2 or config.count
    source.require_drawable(rows * (config.steps + 2), "--steps, --count or --numbers")
    originals = source.originals(config.numbers, 2 * config.count)
    return kinds.interpolate(source.trained, originals[::2], originals[1::2], config.steps, config.path)


def _traverse(config: Traverse, source: Source) -> Picture:
    trained = source.trained
    if config.dimensions is not None and config.dimensions > trained.latent_dim:
        raise InputError(f"--dimensions {config.dimensions}: the model has {trained.latent_dim}; ask for fewer")
    source.require_drawable((config.dimensions or trained.latent_dim) * config.steps, "--steps or --dimensions")
    (image,) = source.originals(() if config.number is None else (config.number,), 1)
    averaged = source.pixels(slice(min(KLD_IMAGES, max(1, KLD_VALUES // trained.pixels))))
    return kinds.traverse(trained, image, averaged, config.dimensions, config.steps, config.span)


def _manifold(config: Manifold, source: Source) -> Picture:
    if source.trained.latent_dim != 2:
        raise InputError(
            f"{config.model}: has {source.trained.latent_dim} latent dimensions, and `manifold` shows 2;"
            " train a model with --latent-dim 2, or use `traverse`"
        )
    source.require_drawable(config.side**2, "--side")
    return kinds.manifold(source.trained, config.side)


def _decode(config: Decode, source: Source) -> Picture:
    trained, file = source.trained, config.latents
    max_bytes = memory_limit(config.max_data_gb)
    z = latents.load_points(file, trained.latent_dim, max_bytes)
    points = z.size // trained.latent_dim
    if config.out.suffix == ".npz":
        needed = 16 * points * trained.pixels  # the pixels on the device and here, and draws of them
        if needed > max_bytes:
            raise InputError(
                f"{file}: {points:,} images of {trained.pixels:,} pixels take {needed / 1e9:,.1f} GB; expected at most"
                f" {max_bytes / 1e9:,.1f} GB; decode fewer points at once, or raise --max-data-gb"
            )
        _ = source.image_shape  # refuses an image set that does not go with the model
        return kinds.decode(trained, z)
    if z.ndim == 3 and z.shape[1] <= config.count:  # a grid, as `generate` writes it
        z = z[: config.count // z.shape[1]]
    else:
        z = kinds.square(z.reshape(points, -1)[: config.count])
    source.require_drawable(z.size // trained.latent_dim, "--count")
    if points > config.count:
        say(f"{file}: the picture shows the first of its {points:,} points; --count shows more")
    return kinds.decode(trained, z)


def _latents(config: Latents, source: Source) -> Scatter:
    if source.trained.latent_dim < 2:
        raise InputError(f"{config.model}: has 1 latent dimension, and `latents` shows 2; use `traverse`")
    _, dataset, rule = source.loaded
    return kinds.latents(latents.encode(source.trained, dataset, ("test",), rule), config.axes)


KINDS: dict[type[GenerateConfig], Callable[[Any, Source], Picture | Scatter]] = {
    Sample: _sample,
    Reconstruct: _reconstruct,
    Interpolate: _interpolate,
    Traverse: _traverse,
    Manifold: _manifold,
    Decode: _decode,
    Latents: _latents,
}


def _require_numbers(numbers: tuple[int, ...], most: int) -> None:
    if len(numbers) > most:
        raise InputError(f"--numbers: names {len(numbers):,} test images; expected at most {most}")


def _require_other_file(config: GenerateConfig, trained: Trained) -> None:
    """The picture must not replace the files that it is made from."""
    sources = {
        config.model: "the model itself",
        config.model / CONFIG: "the run's config.json",
        Path(trained.options.get("export", config.model)): "the model itself",
        Path(config.data or trained.options.get("data", "")): "the image set",
        BUNDLED: "the image set mnist",
    }
    if isinstance(config, Decode):
        sources[config.latents] = "the file of latents"
    for path, what in sources.items():
        if path.resolve() == config.out.resolve():
            raise InputError(f"--out {config.out}: is {what}; name another file to write")


def main() -> None:
    # tyro makes a subcommand of each type of the union, which has no type of its own in Python.
    any_kind = cast(type[GenerateConfig], Union[tuple(KINDS)])  # noqa: UP007 (of types known at run time)
    command_line.run(generate, any_kind, "python -m vae_jax.generate")


if __name__ == "__main__":
    main()
