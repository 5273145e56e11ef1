"""Reports of experiments and other runs."""
