"""Command line ``mta``. Commands import torch and other heavy packages only when they run."""

from mta.cli.app import main

__all__ = ["main"]
