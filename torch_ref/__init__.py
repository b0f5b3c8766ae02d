"""The PyTorch side: the documented model, its training loop, the way to and from the JAX parameters. No jax here."""
