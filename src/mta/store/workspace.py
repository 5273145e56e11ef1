"""What a run over a store leaves until it is done: its plan, and checkpoints of cohorts that were stopped."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mta.system.storage import Storage
from mta.training.checkpoint import Checkpoint

ABANDONED = 7 * 24 * 3600.0  # seconds after which nobody will go on with a stopped run


@dataclass(frozen=True, slots=True)
class Work:
    """A run's own folder below a store: other runs over the same store keep theirs.

    ``names`` are those of everybody it is about; the same run, begun again, finds what it left. ``allowed`` tells
    whether checkpoints may be kept.
    """

    files: Storage
    name: str
    allowed: Callable[[], bool] = lambda: True

    @classmethod
    def of(cls, files: Storage, names: Sequence[str], allowed: Callable[[], bool] = lambda: True) -> Work:
        """The work of a run over ``names``, which tell people and what is wanted of them."""
        return cls(files, f"work/{hashlib.sha256('/'.join(names).encode()).hexdigest()[:24]}", allowed)

    @property
    def folder(self) -> Path | None:
        """Where it lies on this machine; None elsewhere."""
        return Path(self.files.at(self.name)) if self.files.local else None

    def plan(self) -> list[str] | None:
        """The names a stopped run was computing, in its order; None where none was stopped."""
        try:
            found = json.loads(self.files.read(f"{self.name}/plan.json") or b"null")
        except (ValueError, RecursionError):
            return None
        return found if isinstance(found, list) else None

    def note(self, names: Sequence[str]) -> None:
        """Begin: this is what will be computed."""
        self.files.replace(f"{self.name}/plan.json", json.dumps(list(names)).encode())

    def checkpoint(self, digest: str) -> Checkpoint | None:
        """Of one cohort; None where files lie far away: there a cohort is computed again as a whole."""
        if not self.files.local:
            return None
        path = self.files.inside(f"{self.name}/{digest[:24]}.checkpoint")
        return Checkpoint(path, digest, allowed=self.allowed)

    def finish(self) -> None:
        """Everything is there: what the run left goes, and what other runs left long ago."""
        self.files.remove_folder(self.name)
        if self.folder and self.folder.parent.is_dir():
            for folder in self.folder.parent.iterdir():
                with contextlib.suppress(FileNotFoundError):  # another run may remove its own right now
                    if time.time() - folder.stat().st_mtime > ABANDONED:
                        shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # other runs' folders may be there
                self.folder.parent.rmdir()

    def drop(self) -> None:
        """Begin anew: nothing of it is used."""
        self.files.remove_folder(self.name)
