"""The model, its loss, the optimizer and the steps, in pure JAX: no files, no printing, no options of commands."""
