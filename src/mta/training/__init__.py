"""Training many adapters in lock step: packed rows, one optimizer for all, checkpoints, a plan."""
