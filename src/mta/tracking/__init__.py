"""Run folders and metrics."""
