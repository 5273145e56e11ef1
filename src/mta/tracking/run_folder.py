"""Folder of a run: settings, environment, metrics of every step, and results.

    run.json       one entry per sitting (one start of the run); a resumed run has several, a killed one has no end
    config.yaml    the resolved settings, for --config
    metrics.jsonl  one line per step: stage, step, people, examples, loss, seconds

Banks, personalizations, comparisons, attacks, experiments and demos have such folders. None of these files contains ids
or texts of people.
"""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch

from mta.config.loader import to_yaml
from mta.errors import DataError
from mta.system.atomic import append_lines, exclusive, write_json, write_text
from mta.system.device import dtype_name, processor
from mta.system.process import cores
from mta.system.provenance import commit, versions

if TYPE_CHECKING:
    from mta.model.base import BaseModel
    from mta.system.progress import OnStep, Step

RUN, CONFIG, METRICS = "run.json", "config.yaml", "metrics.jsonl"
NAMES = frozenset({RUN, CONFIG, METRICS})
SCHEMA = 1


@dataclass(slots=True, kw_only=True)
class RunFolder:
    """One sitting of a run, recorded in ``folder`` from the first step on. An error before that step writes nothing.

    ``work`` identifies the computation, so that a later sitting can resume it. Without ``work`` every sitting is its
    own run. Lines with another ``work`` in the same folder belong to other runs. ``about`` holds more facts (seeds,
    plan, bank) and ``outcome`` a few results; both go into ``run.json``. Without a ``folder`` nothing is written, but
    ``on_step`` is still called for every step.
    """

    folder: Path | None
    kind: str
    base: BaseModel
    settings: Mapping[str, Any]
    config: bool = True  # False for recipes, which write their own file
    locked: bool = False  # whether the caller holds the folder's lock
    command: str = ""
    work: str = ""
    about: dict[str, Any] = field(default_factory=dict)
    outcome: dict[str, Any] = field(default_factory=dict)
    on_step: OnStep | None = None
    _before: list[dict[str, Any]] = field(default_factory=list)
    _entered: datetime = field(default_factory=lambda: datetime.now(UTC))
    _begun: bool = False
    _last: float = field(default_factory=time.monotonic)
    _held: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def __post_init__(self) -> None:
        self.work = (self.work or uuid.uuid4().hex)[:12]

    def __enter__(self) -> Self:
        self._entered = datetime.now(UTC)
        if self.folder:
            self._before = sittings(self.folder)
            if (kind := self._before[-1]["kind"] if self._before else self.kind) != self.kind:
                raise DataError(
                    f"{self.folder} holds a run of kind {kind!r}; one of kind {self.kind!r} would replace its files",
                    hint="Choose another folder.",
                )
            if self.config and not self._before and (self.folder / CONFIG).exists():
                raise DataError(
                    f"{self.folder / CONFIG} belongs to no run, since {RUN} is missing; it is not overwritten",
                    hint="Rename it, or choose another folder.",
                )
        self.stage_begins()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        with self._held:
            if kind is None or self._begun:
                self.begin()
                self._write(datetime.now(UTC), kind.__name__ if kind else "")  # the error's text may name a person

    def begin(self) -> None:
        """Record the start of the run, with its folder locked. The first step calls this if no caller did.

        Raises InputError if another process is writing to the folder.
        """
        if self._begun or not self.folder:
            return
        if not self.locked:
            self._held.enter_context(exclusive(self.folder))
        self._begun = True
        self._before = sittings(self.folder)  # another process may have ended since ``__enter__``
        self._write()  # before config.yaml: after a kill in between, config.yaml must not look like a foreign file
        if self.config:
            write_text(self.folder / CONFIG, to_yaml(self.settings))

    def note(self, name: str, value: Any) -> None:
        """Record a fact of the run at once, so that it survives a kill."""
        self.begin()
        self.about[name] = value
        self._write()

    def stage_begins(self) -> None:
        """Start the clock of the next step now."""
        self._last = time.monotonic()

    def step(self, stage: str, step: Step) -> None:
        """Record one finished step of a stage."""
        self.begin()
        before, self._last = self._last, time.monotonic()
        if self.folder:
            line = {"stage": stage, **asdict(step), "seconds": round(self._last - before, 3), "work": self.work}
            append_lines(self.folder / METRICS, [json.dumps(line)])
        if self.on_step:
            self.on_step(stage, step)

    def _write(self, ended: datetime | None = None, stopped: str = "") -> None:
        """Write ``run.json``: the earlier sittings and this one."""
        if not self.folder:
            return
        this = {
            "kind": self.kind,
            "command": self.command,
            "work": self.work,
            "begun": self._entered.isoformat(timespec="seconds"),
            "ended": ended.isoformat(timespec="seconds") if ended else None,
            "hours": round((ended - self._entered).total_seconds() / 3600, 5) if ended else None,
            "stopped": stopped,
            "machine": f"{processor()}, {cores()} cores",
            "threads": torch.get_num_threads(),
            "device": str(self.base.device),
            "dtype": dtype_name(self.base.dtype),
            "base": self.base.name,
            "note": self.base.note,
            "versions": versions(),
            "commit": commit(),
            **self.about,
            "settings": dict(self.settings),
            "outcome": self.outcome,
        }
        write_json(self.folder / RUN, {"schema": SCHEMA, "sittings": [*self._before, this]})


def sittings(folder: Path) -> list[dict[str, Any]]:
    """Return the sittings in ``run.json``, oldest first; empty without the file. Raises DataError for a wrong file."""
    path = folder / RUN
    try:
        return [one for one in json.loads(path.read_text(encoding="utf-8"))["sittings"] if one["kind"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError) as error:
        both = f" and {CONFIG}" if (folder / CONFIG).exists() else ""
        hint = f"Move {RUN}{both} away: without them, the run resumes; they hold no results."
        raise DataError(f"{path} is not a description of a run: {error}", hint=hint) from None


def lines(folder: Path, work: str) -> Iterator[dict[str, Any]]:
    """Yield the steps of ``work`` in ``metrics.jsonl``; skip lines that a kill truncated."""
    with contextlib.suppress(FileNotFoundError):  # nothing was trained
        for line in (folder / METRICS).read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                step = json.loads(line)
                if step["work"] == work[:12]:
                    yield step


def seconds_of(folder: Path, work: str) -> dict[str, float]:
    """Return the seconds spent on each stage of ``work`` in all sittings, including killed ones."""
    spent = Counter[str]()
    for step in lines(folder, work):
        spent[step["stage"]] += step["seconds"]
    return {stage: round(seconds, 1) for stage, seconds in spent.items()}
