"""A trained model read back, from a weights file or a run's folder. jax and torch are imported by what uses them."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import numpy as np

from vae_jax.config import FLOAT32_MAX, Binarize, InputError, reason

if TYPE_CHECKING:
    from jax import Array

    from vae_jax.model import VAE


class Trained(NamedTuple):
    """Sizes and parameters of a model, and the options of its run."""

    hidden_dim: int
    latent_dim: int
    pixels: int
    params: Mapping[str, Mapping[str, Mapping[str, "Array | np.ndarray"]]]
    options: dict[str, Any]  # of the run's config.json; none where the model came from a file

    @property
    def data_dir(self) -> Path | None:
        """Where the run found its TFDS sets, if it named a folder."""
        return Path(self.options["data_dir"]) if self.options.get("data_dir") else None

    @property
    def model(self) -> "VAE":
        """The Flax module that takes `params`."""
        from vae_jax.model import VAE

        return VAE(self.hidden_dim, self.latent_dim, self.pixels)

    def encode(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """mu and logvar, [images, latent] each, of bytes or of pixels in [0, 1], [images, pixels]."""
        from vae_jax import model

        mu, logvar = model.encode(self.model, self.params, images)
        return np.asarray(mu), np.asarray(logvar)

    def decode(self, z: np.ndarray) -> np.ndarray:
        """The means of the pixels, sigmoid(logits), [..., pixels], at the latent points z, [..., latent]."""
        from vae_jax import model

        means = model.decode(self.model, self.params, z.reshape(-1, self.latent_dim))
        return np.asarray(means).reshape(*z.shape[:-1], self.pixels)


def read(path: Path) -> Trained:
    """Reads a model.

    Args:
      path: A weights file in any layout that `torch_ref.convert` knows, or the workdir of a run; its sizes are read off
        the weights.

    Raises:
      InputError: Nothing is there, the folder holds no finished run, or the file does not hold this model.
    """
    options: dict[str, Any] = {}
    file = path
    try:
        if path.is_dir():
            options = _read_options(path / "config.json")
            file = path / "model.pth"
            if not file.is_file():
                raise InputError(f"{path}: the run has not finished, its model.pth is missing; train to the end")
        elif not path.exists():
            raise InputError(
                f"{path}: does not exist; name a weights file (.pth, .safetensors) or the workdir of a run"
            )
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); name a weights file or a workdir") from None

    from torch_ref import convert

    state_dict = convert.load(file)
    params = convert.to_params(state_dict)
    require_float32(
        f"{file}", [array for part in params.values() for layer in part.values() for array in layer.values()]
    )
    return Trained(*convert.sizes(state_dict), params, options)


def require_float32(what: str, arrays: Iterable[np.ndarray]) -> None:
    """Checks that the values of a file, which may be float64, are finite as float32 too.

    Raises:
      InputError: Some are not; the message begins with `what`.
    """
    if max(np.abs(array).max() for array in arrays) > FLOAT32_MAX:
        raise InputError(f"{what}: holds values beyond {FLOAT32_MAX:.4g}; expected those of a float32")


def require_pixels(path: Path, trained: Trained, data: str, image_shape: tuple[int, ...]) -> None:
    """Checks that a model takes the images of an image set.

    Raises:
      InputError: They have another number of pixels.
    """
    found = int(np.prod(image_shape))
    if found != trained.pixels:
        raise InputError(
            f"{path}: takes images of {trained.pixels} pixels, but those of --data {data} have {found}"
            f" ({' x '.join(map(str, image_shape))}); name the image set that it was trained on"
        )


def _read_options(file: Path) -> dict[str, Any]:
    """The options of a run, those that are used here checked."""
    try:
        options = json.loads(file.read_text())
    except FileNotFoundError:
        raise InputError(
            f"{file.parent}: is no run (it has no config.json); name the workdir of a run or a weights file"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: cannot be read ({reason(error)}); train again or name a weights file") from None
    if not isinstance(options, dict):
        raise InputError(f"{file}: holds no options; train again or name a weights file")
    good = {
        "data": lambda value: isinstance(value, str),
        "export": lambda value: isinstance(value, str),
        "data_dir": lambda value: value is None or isinstance(value, str),
        "max_data_gb": lambda value: value is None or (isinstance(value, int | float) and value > 0),
        "binarize": lambda value: value in get_args(Binarize),
        "seed": lambda value: isinstance(value, int) and 0 <= value < 2**32,
        "beta": lambda value: isinstance(value, int | float),
    }
    for name, is_good in good.items():
        if name in options and not is_good(options[name]):
            raise InputError(f"{file}: its {name} is {options[name]!r:.100}; train again or name a weights file")
    return options
