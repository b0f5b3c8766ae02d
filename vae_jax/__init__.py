"""A Flax (JAX) variational autoencoder for MNIST, equal to the well-known PyTorch one up to rounding.

The public names stand in `__init__.pyi`. Each module is imported when one of its names is first used, so that `--help`
and the PyTorch side never wait for jax.
"""

import lazy_loader

__version__ = "0.2.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
