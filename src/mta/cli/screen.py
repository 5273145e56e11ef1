"""Output of commands: progress on stderr (a bar per stage on a terminal, plain lines elsewhere), results on stdout."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from mta.system.process import OtherProcesses, cores
from mta.system.units import human_seconds

if TYPE_CHECKING:
    from mta.system.progress import Step

# FORCE_COLOR makes a file a terminal for rich, which would write its bars there again and again.
console = Console(stderr=True, force_interactive=None if sys.stderr and sys.stderr.isatty() else False)
EVERY = 15.0  # seconds between plain lines
_SHARED = 0.25  # share of the cores that other processes use: from here on, it is said


@dataclass(slots=True)
class _Stage:
    """Progress of a stage. Its cohort began at time ``began``, when ``before`` examples of the stage were done."""

    bar: TaskID
    done: int
    before: int = 0
    began: float = 0.0
    printed: float = -EVERY


class _Note(ProgressColumn):
    """Note of a row: one line, cut where the terminal is too narrow for all columns."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["note"], no_wrap=True, overflow="ellipsis")


class Screen:
    """Progress of several stages; call ``step`` after each training step.

    >>> with Screen() as screen: personal.personalize(people, on_step=screen.step)
    """

    def __init__(self, unit: str = "examples") -> None:
        self._unit = unit
        self._stages: dict[str, _Stage] = {}
        self._others, self._looked, self._warned = OtherProcesses(), 0.0, False
        self._progress = Progress(
            TextColumn("{task.description:<14}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=12),
            _Note(),
            TimeElapsedColumn(table_column=Column(no_wrap=True)),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
            TextColumn("left", table_column=Column(no_wrap=True)),
            console=console,
            disable=not console.is_interactive,
        )

    def __enter__(self) -> Screen:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def step(self, stage: str, step: Step) -> None:
        """Update the progress of ``stage`` after one training step."""
        loss = "" if step.loss is None else f"  loss {step.loss:.3f}"
        self.count(stage, step.examples, step.examples_total, f"{step.people} people{loss}")

    def count(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Update the progress of ``stage``: ``done`` of ``total`` units."""
        if (known := self._stages.get(stage)) is None:
            known = self._stages[stage] = _Stage(self._progress.add_task(stage, note=note, total=total), done=total)
        now = time.monotonic()
        if not self._looked:  # not before: kernels may have been compiled meanwhile
            self._looked, self._others = now, OtherProcesses()
        if done <= known.done:  # the first or the next cohort begins
            known.began, known.before = now, done
            self._progress.reset(known.bar, total=total)  # or a finished cohort's times would stay
        known.done = done
        rate = (done - known.before) / max(now - known.began, 1e-9)
        notes = [note] if note else []
        if rate:
            notes.append(f"{rate:.1f} {self._unit}/s")
        so_far = f"{done:>6}/{total} {self._unit}"
        self._progress.update(known.bar, completed=done, total=total, note="  ".join([so_far, *notes]))
        self._look_at_others(now)
        if not console.is_interactive and (done >= total or now - known.printed > EVERY):
            known.printed = now
            if rate and done < total:
                notes.append(f"about {human_seconds((total - done) / rate)} left")
            self.say("  ".join([f"{stage}: {done}/{total} {self._unit}", *notes]))

    def _look_at_others(self, now: float) -> None:
        """Say once if other processes use the cores: two that compute with torch slow each other severalfold."""
        if self._warned or now - self._looked < EVERY:
            return
        self._looked, used = now, self._others.cores()
        self._warned = used > _SHARED * cores()
        if self._warned:
            self.say(
                f"Other processes use {used:.1f} of {cores()} cores, which slows this down severalfold. Wait for them, "
                "or set OMP_NUM_THREADS so that all processes together have no more threads than cores."
            )

    def say(self, text: str) -> None:
        """Print one line."""
        console.print(text, highlight=False, markup=False, soft_wrap=True)


def tables() -> Console:
    """Return a console for tables on stdout; in a file or a pipe, they are 160 columns wide."""
    return Console(width=None if sys.stdout and sys.stdout.isatty() else 160)


def show_json(value: object) -> None:
    """Print a result as JSON on stdout."""
    typer.echo(json.dumps(value, indent=1, ensure_ascii=False))
