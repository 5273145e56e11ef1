"""Command line ``mta <verb>``: one file per verb, without logic. Heavy imports happen only when a verb runs."""

from mta.cli.app import main

__all__ = ["main"]
