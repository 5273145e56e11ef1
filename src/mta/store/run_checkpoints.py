"""Temporary files of a run over a store: its plan, and checkpoints of cohorts."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mta.store.exports import remove_if_empty
from mta.system.storage import Storage
from mta.training.checkpoint import Checkpoint

FOLDER, KEY_FILE = "work", "store.json"
RUN = "[0-9a-f]{24}"  # name of a run's folder; other folders are not ours


@dataclass(frozen=True, slots=True)
class RunCheckpoints:
    """The folder of one run below a store. The same run, started again, finds the same folder.

    ``allowed`` returns whether checkpoints may be kept.
    """

    files: Storage
    name: str
    allowed: Callable[[], bool] = lambda: True

    @classmethod
    def of(cls, files: Storage, names: Sequence[str], allowed: Callable[[], bool] = lambda: True) -> RunCheckpoints:
        """Return the folder of a run over ``names``, which identify people and the work on them."""
        return cls(files, f"{FOLDER}/{hashlib.sha256('/'.join(names).encode()).hexdigest()[:24]}", allowed)

    def plan(self) -> list[str] | None:
        """Return the names of a stopped run, in its order; None if there is no stopped run."""
        try:
            names = json.loads(self.files.read(f"{self.name}/plan.json") or b"null")
        except (ValueError, RecursionError):
            return None
        return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None

    def note(self, names: Sequence[str]) -> None:
        """Save the names that the run will compute."""
        self.files.write(f"{self.name}/plan.json", json.dumps(list(names)).encode())

    def checkpoint(self, digest: str) -> Checkpoint | None:
        """Return the checkpoint of one cohort; None if the store is not local: then stopped cohorts start again."""
        if not self.files.local:
            return None
        path = self.files.inside(f"{self.name}/{digest[:24]}.checkpoint")
        return Checkpoint(path, digest, allowed=self.allowed)

    def drop(self) -> None:
        """Remove the folder. ``mta.store.maintenance.collect`` removes those of stopped runs."""
        self.files.remove_folder(self.name)
        remove_if_empty(self.files, FOLDER)


def drop_runs(files: Storage) -> None:
    """Remove the folders of all runs over a store, if it is one. Raises StoreError."""
    if files.read(KEY_FILE):
        for name in files.names(FOLDER):
            if re.fullmatch(RUN, name):
                files.remove_folder(f"{FOLDER}/{name}")
        remove_if_empty(files, FOLDER)
