"""Rows on their way through one base, turn by turn: who waits, who is filling, who is running.

    waiting ──> filling ──> running ──> done            the two in the middle have a slot and a seat

One turn takes in who waits, pushes at most ``chunk`` prompt tokens of those who are filling through the model, then one
token of everybody who is running. So who runs is delayed by at most one chunk for each token, however long a newcomer's
prompt is.

A failure (out of memory, or any other exception) ends only the rows it concerns, with AnswerLost:

    in a pass             the rows of that pass
    while admitting       the request that was admitted
    anywhere else         all rows that have a slot

Slots and seats that the failure may have left half written are emptied, so later answers do not depend on it.
"""

from __future__ import annotations

import logging
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from mta.errors import MtaError
from mta.model.base import BaseModel
from mta.serving.embedded.adapter_slots import Person, Seats
from mta.serving.embedded.kv_cache import Slots
from mta.serving.engine import LATER, LOST, AnswerLost, Ask, Finish, Piece, Who
from mta.serving.sampling import Sampler

Told = Callable[[Piece | MtaError], None]
PATIENCE = 8  # steps that fail one after another before the engine counts as unhealthy
log = logging.getLogger("mta")


@dataclass(slots=True, eq=False)
class Row:
    """An answer on its way: the prompt tokens still to be pushed through, and what has been told of it."""

    ask: Ask
    person: Person
    tell: Told
    sampler: Sampler
    number: int = 0
    left: list[int] = field(default_factory=list)
    last: int = -1
    count: int = 0
    cached: int = 0
    cancelled: bool = False  # the request does not wait for more of it


class Decoder:
    """Rows of different people in slots of one cache; everything happens in ``turn``, in the caller's thread."""

    def __init__(self, base: BaseModel, seats: Seats, slots: int, length: int, chunk: int) -> None:
        self.seats, self.chunk = seats, chunk
        self.slots = Slots(base, slots, length, chunk, seats.exchange)
        self.waiting: deque[Row] = deque()
        self.rows: list[Row] = []  # row n has slot n and seat n; those who run come first, then those who fill
        self.running = 0
        self.failed = self.lost = 0  # steps that failed and answers that were lost with them, since the start
        self._failed_in_a_row = 0
        self._admitted = 0
        self._stops = frozenset(base.stop_tokens)

    @property
    def busy(self) -> bool:
        """Whether a turn would do anything."""
        return bool(self.rows or self.waiting)

    def known(self) -> list[Who]:
        """The owners of rows, of waiting rows, and of warm slots."""
        return [row.ask.who for row in (*self.rows, *self.waiting)] + [who for who, _ in self.slots.owners()]

    @property
    def stuck(self) -> bool:
        """Whether the last ``PATIENCE`` steps all failed. New requests are still tried: one that works ends this."""
        return self._failed_in_a_row >= PATIENCE

    @torch.inference_mode()
    def turn(self) -> None:
        """One step for everybody; who was cancelled leaves first."""
        try:
            self._drop_cancelled()
            self._admit()
            if len(self.rows) > self.running:
                self._fill()
            if self.running:
                self._decode()
        except Exception as error:
            self._restart(error)

    @torch.inference_mode()
    def end(self, why: MtaError, wanted: Callable[[Who], bool] = lambda _: True) -> None:
        """End the answers of those who are ``wanted``, and empty the slots they left warm."""
        for row in [row for row in (*self.rows, *self.waiting) if wanted(row.ask.who)]:
            row.tell(why)
            row.cancelled = True
        try:
            self._drop_cancelled()
            for place in self.slots.forget(lambda owner: wanted(owner[0])):
                self.seats.clear(place)
        except Exception as error:
            self._restart(error)

    def note(self, error: Exception, lost: int) -> None:
        """Count a failure and the answers it ended, and log its type and place; its message may hold user data."""
        self.failed, self.lost = self.failed + 1, self.lost + lost
        self._failed_in_a_row += 1
        frame = traceback.extract_tb(error.__traceback__)[-1]
        log.error("a decoding step failed: %s at %s:%s", type(error).__name__, Path(frame.filename).name, frame.lineno)

    def fail(self, rows: Sequence[Row], error: Exception) -> None:
        """End answers because of ``error``; slots and seats stay as they are."""
        lost = [row for row in rows if not row.cancelled]
        self.note(error, len(lost))
        for row in lost:
            row.tell(AnswerLost(LOST, hint=LATER))
            row.cancelled = True

    def _lose(self, rows: Sequence[Row], error: Exception) -> None:
        """End these rows because of ``error``, and empty their slots and seats."""
        self.fail(rows, error)
        for row in rows:
            self._leave(row)
            self._empty(len(self.rows))  # where its slot is now

    def _restart(self, error: Exception) -> None:
        """End all rows that have a slot because of ``error``, and empty all slots and seats: any may be half moved."""
        self.fail(self.rows, error)
        self.rows, self.running, self.slots.used = [], 0, 0
        self._empty_idle()

    def _empty_idle(self) -> None:
        for place in range(self.slots.used, len(self.slots)):
            self._empty(place)

    def _empty(self, place: int) -> None:
        self.slots.empty(place)
        self.seats.clear(place)

    def _drop_cancelled(self) -> None:
        self.waiting = deque(row for row in self.waiting if not row.cancelled)
        for row in [row for row in self.rows if row.cancelled]:
            self._leave(row)

    def _admit(self) -> None:
        while self.waiting and not self.slots.full:
            row = self.waiting.popleft()
            try:
                place, row.cached = self.slots.take((row.ask.who, row.ask.asker), row.ask.prompt)
                self.seats.take(place, row.person)
            except Exception as error:
                self.fail([row], error)
                self.slots.used = len(self.rows)
                self._empty_idle()  # slots that are at work were not touched
                continue
            row.left = list(row.ask.prompt[row.cached :])
            self._admitted += 1
            row.number = self._admitted
            self.rows.append(row)

    def _fill(self) -> None:
        """Push prompt tokens of those who are filling: as many rows as share a chunk, first come, first served."""
        first = self.running
        oldest = min(range(first, len(self.rows)), key=lambda n: self.rows[n].number)
        self._exchange(first, oldest)
        rows, width = [self.rows[first]], min(len(self.rows[first].left), self.chunk)
        for row in self.rows[first + 1 :]:
            wider = max(width, min(len(row.left), self.chunk))
            if wider * (len(rows) + 1) > self.chunk:
                break
            rows, width = [*rows, row], wider
        found = self._pass(slice(first, first + len(rows)), [row.left[:width] for row in rows])
        if found is None:
            return
        logits, likeliest = found
        for row in rows:
            del row.left[:width]
        ready = [n for n, row in enumerate(rows) if not row.left]
        for n in ready:
            self._start(rows[n])
        for n in ready:
            self._next(rows[n], logits[n], likeliest[n])

    def _decode(self) -> None:
        rows = self.rows[: self.running]
        if found := self._pass(slice(0, len(rows)), [[row.last] for row in rows]):
            for row, logits, likeliest in zip(rows, *found):
                self._next(row, logits, likeliest)

    def _pass(self, rows: slice, tokens: list[list[int]]) -> tuple[Tensor, list[int]] | None:
        """Next-token logits of rows and the likeliest tokens; None if the pass failed, which ended its rows."""
        try:
            with self.seats.opened(rows):
                logits = self.slots.logits(rows, tokens)
            likeliest = logits.argmax(-1).tolist()  # waits for the device: what failed there is raised here
        except Exception as error:
            self._lose(self.rows[rows], error)
            return None
        self._failed_in_a_row = 0
        return logits, likeliest

    def _next(self, row: Row, logits: Tensor, likeliest: int) -> None:
        """One more token of an answer; who is done leaves."""
        finish: Finish | None = None
        try:
            token = row.sampler.token(logits, likeliest)
        except Exception as error:  # whatever is odd about one row must not be everybody's end
            return self._lose([row], error)
        if token.id in self._stops:
            finish = "stop"
        else:
            row.last, row.count = token.id, row.count + 1
            row.tell(Piece(token, cached=row.cached))
            if row.count >= row.ask.max_tokens:
                finish = "length"
        if finish:
            row.tell(Piece(finish=finish, cached=row.cached))
            row.cancelled = True
            self._leave(row)

    def _start(self, row: Row) -> None:
        """A row whose prompt is through goes over to those who run."""
        self._exchange(self.rows.index(row), self.running)
        self.running += 1

    def _leave(self, row: Row) -> None:
        place = self.rows.index(row)
        if place < self.running:  # the last one that runs takes its place, so that those who run stay together
            self.running -= 1
            self._exchange(place, self.running)
            place = self.running
        self.slots.leave(place)
        self.rows[place] = self.rows[-1]
        self.rows.pop()

    def _exchange(self, one: int, other: int) -> None:
        if one != other:
            self.slots.exchange(one, other)
            self.rows[one], self.rows[other] = self.rows[other], self.rows[one]
