"""Progress on stderr: one bar per stage on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from mta.system.progress import Step

console = Console(stderr=True)
EVERY = 15.0  # seconds between plain lines


@contextmanager
def counted(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show progress of a single count. Yields a function to call with (done, total)."""
    columns = TextColumn("{task.completed:.0f}/{task.total:.0f} {task.description}"), BarColumn(), TimeRemainingColumn()
    began = said = time.monotonic()
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        bar = progress.add_task(what, total=None)

        def update(done: int, total: int) -> None:
            nonlocal said
            progress.update(bar, completed=done, total=total)
            now = time.monotonic()
            if not console.is_terminal and now - said > EVERY:
                said, left = now, (now - began) / done * (total - done)
                console.print(f"{done}/{total} {what}, about {left:.0f} s left", highlight=False, soft_wrap=True)

        yield update


class Screen:
    """Progress of several stages; call ``step`` after each training step.

    >>> with Screen() as screen: personal.personalize(people, on_step=screen.step)
    """

    def __init__(self) -> None:
        self._bars: dict[str, TaskID] = {}
        self._began: dict[str, tuple[float, int]] = {}
        self._last: dict[str, int] = {}
        self._said: dict[str, float] = {}
        self._progress = Progress(
            TextColumn("{task.description:<14}"),
            BarColumn(),
            TextColumn("{task.completed:>6.0f}/{task.total:.0f} examples  {task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )

    def __enter__(self) -> Screen:
        if console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if console.is_terminal:
            self._progress.stop()

    def step(self, stage: str, step: Step) -> None:
        """Update the progress of ``stage`` after one step."""
        now = time.monotonic()
        if step.examples <= self._last.get(stage, 0) or stage not in self._began:  # the next cohort begins
            self._began[stage] = (now, step.examples)
        self._last[stage] = step.examples
        start, before = self._began[stage]
        rate = (step.examples - before) / max(now - start, 1e-9)
        note = f"{step.people} people"
        if step.loss is not None:
            note += f"  loss {step.loss:.3f}"
        if rate:
            note += f"  {rate:.1f} examples/s"
        if console.is_terminal:
            self._bar(stage, step, note)
        elif step.examples >= step.examples_total or now - self._said.get(stage, 0.0) > EVERY:
            self._said[stage] = now
            left = f"  about {(step.examples_total - step.examples) / rate:.0f} s left" if rate else ""
            console.print(
                f"{stage}: {step.examples}/{step.examples_total} examples  {note}{left}",
                highlight=False,
                soft_wrap=True,
            )

    def say(self, text: str) -> None:
        """Print one line."""
        console.print(text, highlight=False, soft_wrap=True)

    def _bar(self, stage: str, step: Step, note: str) -> None:
        if stage not in self._bars:
            self._bars[stage] = self._progress.add_task(stage, note=note, total=step.examples_total)
        self._progress.update(self._bars[stage], completed=step.examples, total=step.examples_total, note=note)
