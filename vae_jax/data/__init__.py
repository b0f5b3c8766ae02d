"""Image sets: one module per source turns files into NumPy arrays; `load` chooses the source."""

from vae_jax.data.dataset import Dataset as Dataset
from vae_jax.data.dataset import Pixels as Pixels
from vae_jax.data.dataset import load as load
