"""Files of tensors from which killed runs resume: cohorts in training, and results of finished pieces."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mta.errors import StoreError
from mta.system.atomic import write_tensors


@dataclass(slots=True)
class Checkpoint:
    """Tensors in a file at ``path``: a cohort in training, which saves whenever ``due``, or a piece's result.

    ``work`` is a hash of plan, data, and settings: a checkpoint with another hash is ignored. ``save`` removes the file
    again if ``allowed`` returns False, because one of its people was forgotten.
    """

    path: Path
    work: str
    every: float = 60.0
    _last: float = field(default_factory=time.monotonic)
    allowed: Callable[[], bool] = lambda: True

    def due(self) -> bool:
        """Return whether ``every`` seconds have passed since the last save."""
        return time.monotonic() - self._last >= self.every

    def save(self, tensors: Mapping[str, Tensor], progress: Mapping[str, object]) -> None:
        """Write the state; nothing is saved if another process removes the folder meanwhile, as ``forget`` does."""
        try:
            write_tensors(self.path, tensors, {"work": self.work, "progress": json.dumps(progress)})
        except (StoreError, FileNotFoundError):
            if self.path.parent.exists():
                raise
        if not self.allowed():  # checked after writing: `forget` may have looked for checkpoints just before
            self.remove()
        self._last = time.monotonic()

    def load(self) -> tuple[dict[str, Tensor], dict[str, object]] | None:
        """Return what was saved for the same ``work``; None if the file is missing, damaged, or of other work."""
        try:
            with safe_open(self.path, framework="pt") as stored:
                if (stored.metadata() or {}).get("work") != self.work:
                    return None
                progress = json.loads(stored.metadata()["progress"])
                return {key: stored.get_tensor(key) for key in stored.keys()}, progress
        except (OSError, SafetensorError, ValueError, KeyError):
            return None

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
