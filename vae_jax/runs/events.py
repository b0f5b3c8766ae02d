"""TensorBoard event files of a run. Imports tensorboard, so only a run that writes them imports this module."""

import dataclasses
import io
import socket
import time
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue] (protobuf's)
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.plugins.hparams import summary_v2 as hparams
from tensorboard.summary.writer.record_writer import RecordWriter

from vae_jax.config import TrainConfig, to_json
from vae_jax.data.dataset import Pixels
from vae_jax.runs.metrics import EpochMetrics


class Events:
    """Writes scalars, pictures and hyperparameters, each readable as soon as it is written.

    Scalars are named after the fields of `EpochMetrics`: `train/loss`, `test/kld` and so on, and `seconds`.

    Args:
      folder: Where the event file goes.
      config: The options.
      pixels: Kind of the pixels.
      epoch: The first epoch to be written.
    """

    def __init__(self, folder: Path, config: TrainConfig, pixels: Pixels, epoch: int):
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads them in the order of their names.
        self._path = folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"
        self._add(Event(file_version="brain.Event:2"))
        # Hides what a run that died has written of this epoch and later ones.
        self._add(Event(step=epoch, session_log=SessionLog(status=SessionLog.START)))
        options = {
            name: value if isinstance(value, int | float) else str(value)
            for name, value in (to_json(config) | {"pixels": pixels}).items()
        }
        self._write(hparams.hparams_pb(options))

    def add(self, metrics: EpochMetrics) -> None:
        """Writes the scalars of an epoch."""
        values = dataclasses.asdict(metrics)
        epoch = values.pop("epoch")
        del values["pixels"]  # it is among the hyperparameters
        scalars = [Summary.Value(tag=name.replace("_", "/"), simple_value=value) for name, value in values.items()]
        self._write(Summary(value=scalars), epoch)

    def draw(self, name: str, rgb: UInt8[np.ndarray, "height width 3"], epoch: int) -> None:
        """Writes a picture."""
        png = io.BytesIO()
        Image.fromarray(rgb).save(png, format="PNG")
        image = Summary.Image(
            height=rgb.shape[0], width=rgb.shape[1], colorspace=3, encoded_image_string=png.getvalue()
        )
        self._write(Summary(value=[Summary.Value(tag=name, image=image)]), epoch)

    def _write(self, summary: Summary, epoch: int = 0) -> None:
        self._add(Event(step=epoch, summary=summary))

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        try:
            # Not by EventFileWriter, whose thread would fail unnoticed.
            with self._path.open("ab") as file:
                RecordWriter(file).write(event.SerializeToString())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from None
