"""A run's folder: what was asked, what it was computed with, how it went step by step, and what came out.

    run.json       an entry for each sitting: a run that was stopped and goes on has several; one that died has no end
    config.yaml    the resolved settings, ready to be given back with --config
    metrics.jsonl  a line for each step: stage, step, people, examples, loss, seconds

Banks, comparisons, experiments and demos are kept in such folders. Nobody's id or text is in any of these files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
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
from mta.system.atomic import owner_only, write_json, write_text
from mta.system.device import cores, processor
from mta.system.provenance import commit, versions
from mta.tracking.trackers import SINKS, Sink, Track

if TYPE_CHECKING:
    from mta.model.base import BaseModel
    from mta.training.trainer import OnStep, Step

RUN, CONFIG, METRICS = "run.json", "config.yaml", "metrics.jsonl"
NAMES = frozenset({RUN, CONFIG, METRICS, *SINKS})  # a sink's files lie in a folder of its name
SCHEMA = 1


@dataclass(slots=True, kw_only=True)
class RunFolder:
    """One sitting of a run, kept in ``folder`` from its first step on: a mistake found before that leaves nothing.

    ``work`` names what is computed, where a later sitting goes on with it; else every sitting is a run of its own, and
    lines of other work in the same folder are another run's. ``about`` are further
    facts (seeds, plan, bank), ``outcome`` a few numbers once they are known; both go into ``run.json``. Without a
    ``folder`` nothing is kept; ``on_step`` is told of every step all the same.

    >>> with RunFolder(folder=out, kind="personalize", base=base, settings=settings) as kept:
    ...     kept.outcome = asdict(personal.personalize(people, on_step=kept.step))
    """

    folder: Path | None
    kind: str
    base: BaseModel
    settings: Mapping[str, Any]
    config: bool = True  # recipes are written by who reads them
    command: str = ""
    work: str = ""
    about: dict[str, Any] = field(default_factory=dict)
    outcome: dict[str, Any] = field(default_factory=dict)
    track: Track | None = None
    on_step: OnStep | None = None
    _before: list[dict[str, Any]] = field(default_factory=list)
    _entered: datetime = field(default_factory=lambda: datetime.now(UTC))
    _begun: bool = False
    _sink: Sink | None = None
    _steps: Counter[str] = field(default_factory=Counter)
    _examples: dict[str, int] = field(default_factory=dict)
    _last: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.work = (self.work or uuid.uuid4().hex)[:12]

    def __enter__(self) -> Self:
        self._entered = datetime.now(UTC)
        if self.folder:
            self._before = sittings(self.folder)
            if self.config and not self._before and (self.folder / CONFIG).exists():
                raise DataError(
                    f"{self.folder / CONFIG} is no run's, and would be written over",
                    hint="Name it otherwise, or choose another folder.",
                )
        self.stage_begins()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if kind is None or self._begun:
            self.begin()
            self._write(datetime.now(UTC), kind.__name__ if kind else "")  # an error's text may name somebody
        if self._sink:
            self._sink.close()

    def begin(self) -> None:
        """Write down that it has begun; the first step does, where nobody did before."""
        if self._begun:
            return
        self._begun = True
        if self.folder:
            self._steps.update(line["stage"] for line in lines(self.folder, self.work))
            self._write()  # before the settings: a kill in between must not leave a config.yaml that seems another's
            if self.config:
                write_text(self.folder / CONFIG, to_yaml(self.settings))
            self._sink = self.track(self.folder) if self.track else None

    def stage_begins(self) -> None:
        """What was done until now is not counted as time of the next step."""
        self._last = time.monotonic()

    def step(self, stage: str, step: Step) -> None:
        """One step of a stage is done."""
        self.begin()
        before, self._last = self._last, time.monotonic()
        seconds = self._last - before
        self._steps[stage] += 1
        if self.folder:
            with open(self.folder / METRICS, "a", encoding="utf-8", opener=owner_only) as log:
                told = {"stage": stage, **asdict(step), "seconds": round(seconds, 3), "work": self.work}
                log.write(json.dumps(told) + "\n")
        if self._sink:
            self._sink.log(self._values(stage, step, seconds), self._steps[stage])
        if self.on_step:
            self.on_step(stage, step)

    def _values(self, stage: str, step: Step, seconds: float) -> dict[str, float]:
        """What a sink is told: losses, rates, counts."""
        more, self._examples[stage] = step.examples - self._examples.get(stage, 0), step.examples
        told: dict[str, float] = {"people": step.people, "examples": step.examples}
        if more > 0 and seconds > 0:  # else the next cohort begins
            told["examples_per_second"] = more / seconds
        if step.loss is not None:
            told["loss"] = step.loss
        name = re.sub(r"[^\w.-]+", "_", stage)
        return {f"{name}/{key}": value for key, value in told.items()}

    def _write(self, ended: datetime | None = None, stopped: str = "") -> None:
        """Raises DataError where what is there is no list of sittings."""
        if not self.folder or not self._begun:
            return
        this = {
            "kind": self.kind,
            "command": self.command,
            "work": self.work,
            "begun": _text(self._entered),
            "ended": _text(ended) if ended else None,
            "hours": round((ended - self._entered).total_seconds() / 3600, 5) if ended else None,
            "stopped": stopped,
            "machine": f"{processor()}, {cores()} cores",
            "threads": torch.get_num_threads(),
            "device": str(self.base.device),
            "dtype": str(self.base.dtype).removeprefix("torch."),
            "base": self.base.name,
            "note": self.base.note,
            "versions": versions(),
            "commit": commit(),
            **self.about,
            "settings": dict(self.settings),
            "outcome": self.outcome,
        }
        write_json(self.folder / RUN, {"schema": SCHEMA, "sittings": [*self._before, this]})


def work_of(*parts: object) -> str:
    """A name for work that all of this decides."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def sittings(folder: Path) -> list[dict[str, Any]]:
    """What ``run.json`` says, oldest first; nothing where there is none. Raises DataError for one that is not ours."""
    path = folder / RUN
    try:
        told = json.loads(path.read_text(encoding="utf-8"))["sittings"]
        if all(isinstance(one["settings"], dict) and isinstance(one["kind"], str) for one in told):
            return list(told)
        raise ValueError("its sittings have no settings")
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError) as error:
        hint = "Move it away: what was computed is not in it, and the run goes on without it."
        raise DataError(f"{path} is no description of a run: {error}", hint=hint) from None


def lines(folder: Path, work: str) -> Iterator[dict[str, Any]]:
    """The steps of ``metrics.jsonl`` that belong to ``work``; lines that a kill has torn are passed over."""
    with contextlib.suppress(FileNotFoundError):  # nothing was trained
        for line in (folder / METRICS).read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                step = json.loads(line)
                if step["work"] == work[:12] and isinstance(step["stage"], str):
                    yield step


def seconds_of(folder: Path, work: str) -> dict[str, float]:
    """Time spent on each stage of ``work``, in all sittings, also those that were killed."""
    spent = Counter[str]()
    for step in lines(folder, work):
        with contextlib.suppress(KeyError, TypeError):
            spent[step["stage"]] += step["seconds"]
    return {stage: round(seconds, 1) for stage, seconds in spent.items()}


def _text(time: datetime) -> str:
    return time.isoformat(timespec="seconds")
