"""Readers of the formats of LaMP, Per-Pcs, and RecBole. `pyproject.toml` names them in the group ``mta.readers``."""
