"""Experiments: recipes, the runner, and the records and results on disk."""
