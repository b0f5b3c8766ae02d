"""The pictures of a run: reconstructions, samples and curves, after some epochs and at the end."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from vae_jax.config import TrainConfig
from vae_jax.core.model import latent_dim, to_pixels
from vae_jax.pictures import kinds, plots
from vae_jax.runs.feed import Feed
from vae_jax.runs.logs import Logs
from vae_jax.runs.progress import Progress
from vae_jax.runs.trained import Trained
from vae_jax.runs.workdir import PICTURES, Workdir

RECONSTRUCTIONS, SAMPLES = 10, 64


class RunPictures:
    """Draws the pictures of a run into its workdir and its TensorBoard events.

    Args:
      config: The options of the run.
      workdir: Its folder.
      logs: Its logs.
      feed: Its images.
    """

    def __init__(self, config: TrainConfig, workdir: Workdir, logs: Logs, feed: Feed):
        self._config = config
        self._workdir = workdir
        self._logs = logs
        self._feed = feed

    def draw_if_due(self, progress: Progress) -> None:
        """Draws after every `--pictures-every` epochs; the last epoch's pictures wait until the model is exported."""
        every = self._config.pictures_every
        if every and len(progress.history) % every == 0 and not progress.finished(self._config):
            self._draw(progress)

    def draw_missing(self, progress: Progress) -> None:
        """Draws the pictures of a finished run, unless they are all there."""
        if not all((self._workdir.path / name).exists() for name in PICTURES):
            self._draw(progress)

    def _draw(self, progress: Progress) -> None:
        if not self._workdir.writes:
            return
        # On one device of this process, whatever devices hold the state.
        params = jax.tree.map(jnp.asarray, jax.device_get(progress.state.params))
        model, shape = progress.state.model, self._feed.image_shape
        images = np.asarray(to_pixels(self._feed.first_test_images[:RECONSTRUCTIONS]))
        pixels = images.shape[1]
        trained = Trained(model, params, pixels, latent_dim(model, params, pixels))
        # The same latent points every time, so that they can be compared between epochs.
        rng = np.random.default_rng(self._config.seed)
        figures = (
            kinds.figure(kinds.reconstruct(trained, images), shape),
            kinds.figure(kinds.sample(trained, rng, SAMPLES), shape),
            plots.curves(progress.history),
        )
        for name, figure in zip(PICTURES, figures, strict=True):
            rgb = plots.pixels(figure)
            plots.save(rgb, self._workdir.path / name)
            self._logs.add_picture(name.removesuffix(".png"), rgb)
