"""Run folders, metrics, and trackers."""
