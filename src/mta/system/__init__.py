"""Files, hub, assets, and what the machine can do; knows nothing of models."""
