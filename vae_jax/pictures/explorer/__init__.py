"""The page that runs a model in a browser: its sources, and `page`, which puts them together."""
