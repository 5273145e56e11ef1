"""Files, hub, assets, and machine properties; independent of models."""
