"""Stages 0 and 1: the task LoRA, the anchors, and the bank on disk."""
