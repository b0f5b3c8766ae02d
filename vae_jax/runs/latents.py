"""The latents of images: mu and logvar of whole image sets, and latent points in files.

A table (.csv, .parquet) has a row for each image, with the columns split, number, label, mu0, mu1, ..., logvar0, ...
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int64, Integer, Shaped
from tqdm import tqdm

from vae_jax.config import Binarize, Split
from vae_jax.data import npz
from vae_jax.data.dataset import Dataset
from vae_jax.runs.trained import Trained
from vae_jax.system.console import STDERR, tolerate_closed_output
from vae_jax.system.errors import DataError, InputError, reason
from vae_jax.system.files import replacing

SUFFIXES = (".npz", ".csv", ".parquet")


class Latents(NamedTuple):
    """The posteriors of images."""

    split: Shaped[np.ndarray, " images"]  # "train" or "test"
    number: Int64[np.ndarray, " images"]  # within its split
    label: Integer[np.ndarray, " images"] | None
    mu: Float32[np.ndarray, "images latent"]
    logvar: Float32[np.ndarray, "images latent"]

    def kld(self) -> Float32[np.ndarray, " latent"]:
        """The KL divergence of each dimension from the prior, in nats, averaged over the images."""
        return mean_kld(self.mu, self.logvar)


def mean_kld(
    mu: Float32[np.ndarray, "images latent"], logvar: Float32[np.ndarray, "images latent"]
) -> Float32[np.ndarray, " latent"]:
    """The KL divergence of each dimension from the prior, in nats, averaged over the images."""
    return np.mean(-0.5 * (1 + logvar - mu**2 - np.exp(logvar)), axis=0)


def encode(
    trained: Trained, dataset: Dataset, splits: Sequence[Split], rule: Binarize = "none", batch_size: int = 4096
) -> Latents:
    """Encodes images as the model's run saw them, with a progress bar where the output is a terminal.

    Args:
      trained: The model.
      dataset: The images.
      splits: The parts of the set to encode, in this order.
      rule: How grey pixels become black and white.
      batch_size: Images at once; changes results by rounding only.

    Raises:
      InputError: The model makes values that are not finite.
    """
    import jax

    from vae_jax.runs.feed import as_seen_by_run

    images = {"train": dataset.train_images, "test": dataset.test_images}
    labels = {"train": dataset.train_labels, "test": dataset.test_labels}
    sizes = [len(images[split]) for split in splits]
    batch_size = min(batch_size, max(sizes))
    key = jax.random.key(trained.options.get("seed", 0))
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    with tqdm(total=sum(sizes), unit=" images", unit_scale=True, desc="encode", leave=False, disable=None) as bar:
        for split in splits:
            count = len(images[split])
            for start in range(0, count, batch_size):
                numbers = np.arange(start, min(start + batch_size, count))
                batch = np.asarray(as_seen_by_run(images[split][numbers], rule, key, split, numbers, count))
                # The last batch is filled up, so that one program serves all.
                mu, logvar = trained.encode(np.pad(batch, ((0, batch_size - len(batch)), (0, 0))))
                parts.append((mu[: len(batch)], logvar[: len(batch)]))
                with tolerate_closed_output(STDERR):
                    bar.update(len(batch))
    mu, logvar = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    split, number = np.repeat(splits, sizes), np.concatenate([np.arange(size) for size in sizes])
    finite = np.isfinite(mu).all(axis=1) & np.isfinite(logvar).all(axis=1)
    if not finite.all():
        first = np.argmin(finite)
        raise InputError(
            f"the model encodes {split[first]} image {number[first]} into values that are not finite; train again"
        )
    found = [labels[split] for split in splits]
    label = np.concatenate(found) if all(part is not None for part in found) else None  # pyright: ignore
    return Latents(split, number, label, mu, logvar)


def save(latents: Latents, path: Path) -> None:
    """Writes latents as an .npz, a .csv or a .parquet; every float reads back as the same float32.

    The label is left out if there is none, and the split if it is the same for all images.

    Raises:
      OSError: The file cannot be written; an older file there is still whole.
    """
    arrays = {name: array for name, array in latents._asdict().items() if array is not None}
    if (latents.split == latents.split[0]).all():
        del arrays["split"]
    path.resolve().parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        if path.suffix == ".npz":
            np.savez(part, **arrays)
            return
        import pyarrow
        import pyarrow.csv
        import pyarrow.parquet

        columns = {name: array for name, array in arrays.items() if array.ndim == 1}
        columns |= {f"{name}{i}": arrays[name][:, i] for name in ("mu", "logvar") for i in range(latents.mu.shape[1])}
        table = pyarrow.table(columns)
        if path.suffix == ".parquet":
            pyarrow.parquet.write_table(table, part)
            return
        with part.open("wb") as file:
            # It would put the names in quotes.
            file.write((",".join(table.column_names) + "\n").encode())
            pyarrow.csv.write_csv(table, file, pyarrow.csv.WriteOptions(include_header=False, quoting_style="none"))


def load_points(path: Path, latent_dim: int, max_bytes: int) -> Float32[np.ndarray, "*places {latent_dim}"]:
    """Reads latent points.

    Args:
      path: An .npz with the array `z` or else `mu`, an .npy, or a table with the columns z0, z1, ... or else mu0, ...;
        nothing in it is unpickled.
      latent_dim: Dimensions of a point.
      max_bytes: The most bytes that the array may take in memory.

    Returns:
      The points, finite; a place that is all NaN, as pictures have for originals, stays so.

    Raises:
      DataError: The file is missing or damaged, or holds no such points.
    """
    if not path.is_file():  # a pipe might never end
        raise DataError(f"{path}: is not a file; name a file of latents")
    try:
        if path.suffix in (".csv", ".parquet"):
            points = _read_table(path, latent_dim, max_bytes)
        elif path.suffix in (".npz", ".npy"):
            points = npz.load_array(path, ("z", "mu"), max_bytes)
        else:
            raise DataError(f"{path}: expected a name that ends in .npz, .npy, .csv or .parquet")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or reason(error)}); name a file of latents") from None
    if points.dtype.kind not in "fiu" or points.ndim < 2 or points.shape[-1] != latent_dim:
        raise DataError(
            f"{path}: holds {points.dtype} of shape {list(points.shape)}; expected floats of shape"
            f" [..., {latent_dim}], the latent dimensions of the model"
        )
    with np.errstate(over="ignore"):  # becomes infinite, which is refused
        points = points.astype(np.float32)
    rows = points.reshape(-1, latent_dim)
    bad = ~np.isfinite(rows).all(axis=1) & ~np.isnan(rows).all(axis=1)
    if bad.any() or np.isnan(rows).all():
        where = f"point {np.argmax(bad)} holds" if bad.any() else "all points hold"
        raise DataError(f"{path}: {where} NaN or infinite values; expected finite ones")
    return points


def _read_table(path: Path, latent_dim: int, max_bytes: int) -> np.ndarray:
    """The points of a .csv or .parquet."""
    import pyarrow
    import pyarrow.csv
    import pyarrow.parquet

    try:
        if path.suffix == ".csv":
            names = pyarrow.csv.open_csv(path).schema.names
            nbytes = 4 * path.stat().st_size  # two characters or more become a float64
        else:
            metadata = pyarrow.parquet.ParquetFile(path).metadata
            names, nbytes = metadata.schema.names, 8 * metadata.num_rows * latent_dim
        if nbytes > max_bytes:
            raise DataError(
                f"{path}: would take {nbytes / 1e9:,.1f} GB; expected at most {max_bytes / 1e9:,.1f} GB; if the file is"
                " sound, raise --max-data-gb"
            )
        columns = _columns(path, names, latent_dim)
        if path.suffix == ".csv":
            table = pyarrow.csv.read_csv(path, convert_options=pyarrow.csv.ConvertOptions(include_columns=columns))
        else:
            table = pyarrow.parquet.read_table(path, columns=columns)
        if not table.num_rows:
            raise DataError(f"{path}: holds no rows; expected one for each latent point")
        return np.stack([table[name].cast("float64").to_numpy() for name in columns], axis=1)
    except pyarrow.ArrowException as error:
        raise DataError(
            f"{path}: is not a sound table ({reason(error)}); expected one such as `vae_jax.encode` writes"
        ) from None


def _columns(path: Path, names: list[str], latent_dim: int) -> list[str]:
    """The columns of the points: z0, ... or else mu0, ..."""
    for kind in ("z", "mu"):
        found = [name for name in names if re.fullmatch(rf"{kind}[0-9]+", name)]
        columns = [f"{kind}{dimension}" for dimension in range(latent_dim)]
        if found and sorted(found) != sorted(columns):
            raise DataError(
                f"{path}: has {len(found)} columns {kind}0, ...; expected {latent_dim}, the latent dimensions of the"
                " model"
            )
        if found:
            return columns
    raise DataError(f"{path}: has the columns {', '.join(names):.100}; expected z0, ... or mu0, ...")
