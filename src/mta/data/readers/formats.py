"""Formats that other packages read, found by the entry points of the group ``mta.readers``.

An entry point names an object with the methods of ``Format``; ``mta_lab.readers`` has examples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from mta.config import plugins
from mta.data.readers.rejects import Records, Rejects
from mta.data.readers.rows import RecordPart
from mta.data.tasks.task import Task


class Format(Protocol):
    """A format of people's items."""

    def opens(self, path: Path) -> bool:
        """Return whether a path has this format, by names of files alone."""

    def knows(self, record: Mapping[str, Any]) -> bool:
        """Return whether the first record of a JSON file has this format."""

    def parts(
        self, path: Path, records: Records | None, task: Task, rejects: Rejects, answers: bool
    ) -> Iterator[RecordPart]:
        """Yield people's items; a person may come in many parts. Raises DataError.

        ``records`` are those of a file that it ``knows``; None for a path that it ``opens``. Without ``answers``,
        questions need none.
        """

    def beside(self, file: Path) -> list[Path]:
        """Return the files that are read together with a file, whether or not they exist."""


def formats() -> list[Format]:
    """Return the formats of all installed packages."""
    return [plugins.load("mta.readers", name) for name in plugins.names("mta.readers")]
