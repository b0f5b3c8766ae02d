"""Image sets: files turned into NumPy arrays, one module a source. `load` is the one way in."""

from vae_jax.data.dataset import Dataset as Dataset
from vae_jax.data.dataset import Pixels as Pixels
from vae_jax.data.dataset import load as load
