"""Measures this VAE next to everything that one might choose instead. `python -m benchmarks --help`."""
