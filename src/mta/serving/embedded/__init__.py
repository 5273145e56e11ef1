"""The embedded engine: one batch for many people, in this process."""
