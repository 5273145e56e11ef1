"""Train many adapters in lock step: packed rows, one batched optimizer, checkpoints, and cohort plans."""
