"""Files written whole or not at all, and the half-finished cohort that a killed run leaves behind."""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder that is flushed and renamed to ``path`` when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield aside
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None) -> None:
    """A safetensors file, written aside and renamed."""
    with written_aside(path) as aside:
        aside.write_bytes(save(dict(tensors), dict(header or {})))


def write_json(path: Path, value: object) -> None:
    """A JSON file, written aside and renamed."""
    with written_aside(path) as aside:
        aside.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@dataclass(slots=True)
class Checkpoint:
    """The state of one cohort in training, kept under ``path`` every ``every`` seconds.

    ``work`` names the work (a hash of plan, data and settings): a checkpoint of other work is ignored.
    """

    path: Path
    work: str
    every: float = 60.0
    _last: float = field(default_factory=time.monotonic)

    def due(self) -> bool:
        """Whether ``every`` seconds have passed since the last save."""
        return time.monotonic() - self._last >= self.every

    def save(self, tensors: Mapping[str, Tensor], progress: Mapping[str, object]) -> None:
        """Write tensors and progress as one file."""
        write_tensors(self.path, tensors, {"work": self.work, "progress": json.dumps(progress)})
        self._last = time.monotonic()

    def load(self) -> tuple[dict[str, Tensor], dict[str, object]] | None:
        """What was saved for this very work, or None; a file cut short or of other work counts as none."""
        try:
            with safe_open(self.path, framework="pt") as stored:
                header = stored.metadata() or {}
                if header.get("work") != self.work:
                    return None
                return {key: stored.get_tensor(key) for key in stored.keys()}, json.loads(header["progress"])
        except (OSError, SafetensorError, ValueError, KeyError):
            return None

    def remove(self) -> None:
        """Forget the checkpoint: the cohort is finished and stored elsewhere."""
        self.path.unlink(missing_ok=True)
