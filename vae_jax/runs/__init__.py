"""A training run on disk and in memory: its folder, progress, checkpoints, images, metrics, export."""
