"""Temporary files of a run over a store: its plan, and checkpoints of cohorts."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mta.store.tombstones import LIFETIME
from mta.system.storage import Storage
from mta.training.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class Work:
    """The folder of one run below a store. The same run, started again, finds the same folder.

    ``allowed`` returns whether checkpoints may be kept.
    """

    files: Storage
    name: str
    allowed: Callable[[], bool] = lambda: True

    @classmethod
    def of(cls, files: Storage, names: Sequence[str], allowed: Callable[[], bool] = lambda: True) -> Work:
        """Return the folder of a run over ``names``, which identify people and the work on them."""
        return cls(files, f"work/{hashlib.sha256('/'.join(names).encode()).hexdigest()[:24]}", allowed)

    @property
    def folder(self) -> Path | None:
        """Path of the folder; None if the store is not local."""
        return Path(self.files.at(self.name)) if self.files.local else None

    def plan(self) -> list[str] | None:
        """Return the names of a stopped run, in its order; None if there is no stopped run."""
        try:
            found = json.loads(self.files.read(f"{self.name}/plan.json") or b"null")
        except (ValueError, RecursionError):
            return None
        return found if isinstance(found, list) else None

    def note(self, names: Sequence[str]) -> None:
        """Save the names that the run will compute."""
        self.files.replace(f"{self.name}/plan.json", json.dumps(list(names)).encode())

    def checkpoint(self, digest: str) -> Checkpoint | None:
        """Return the checkpoint of one cohort; None if the store is not local: then stopped cohorts start again."""
        if not self.files.local:
            return None
        path = self.files.inside(f"{self.name}/{digest[:24]}.checkpoint")
        return Checkpoint(path, digest, allowed=self.allowed)

    def finish(self) -> None:
        """Remove the folder of the finished run, and folders of runs that stopped a week ago."""
        self.drop()
        if self.folder and self.folder.parent.is_dir():
            for folder in self.folder.parent.iterdir():
                with contextlib.suppress(FileNotFoundError):  # another run may remove its folder at the same time
                    if time.time() - folder.stat().st_mtime > LIFETIME:
                        shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # other runs' folders may be in it
                self.folder.parent.rmdir()

    def drop(self) -> None:
        """Remove the folder, so that the run starts from the beginning."""
        self.files.remove_folder(self.name)
