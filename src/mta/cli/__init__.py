"""The command line: ``mta <verb>``. One file per verb, no logic; nothing heavy is imported before a verb runs."""

from mta.cli.app import main

__all__ = ["main"]
