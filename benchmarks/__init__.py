"""Measures this VAE next to the programs that a user might choose instead. `python -m benchmarks --help`."""
