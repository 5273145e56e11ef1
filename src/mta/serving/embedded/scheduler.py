"""Continuous batching: moves rows through one base, step by step.

    waiting ──> filling ──> running ──> done            filling and running rows have a KV slot and an adapter slot

One step admits waiting rows, runs one prefill pass of at most ``chunk`` prompt tokens, then one decoding pass with one
token per running row. So a new prompt of any length delays each token of a running row by at most one chunk. While
no row generates a text, no begun answer is delayed, and a pass takes up to ``CHUNKS`` chunks, of different rows.

A failure (out of memory, or any other exception) ends only the rows concerned, with AnswerLost:

    in a pass             the rows of that pass
    during admission      the admitted request
    anywhere else         all rows that have a slot

Slots that the failure may have left half written are emptied, so later answers do not depend on the failure.
"""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mta.errors import MtaError
from mta.model.base import BaseModel
from mta.serving.embedded.adapter_slots import AdapterSlots, RowAdapter
from mta.serving.embedded.kv_cache import Owner, Slots
from mta.serving.engine import (
    COLDEST,
    LATER,
    LOST,
    AnswerLost,
    AnswerPiece,
    EngineRequest,
    Finish,
    ServedModel,
    Token,
    log_failure,
)
from mta.system.device import moved

CHUNKS = 4  # in a prefill pass while no row generates a text
PATIENCE = 8  # consecutive failed steps after which the engine counts as unhealthy
log = logging.getLogger("mta")


class Sampler:
    """Samples the tokens of one answer with its own random generator, so that other rows have no influence."""

    def __init__(self, request: EngineRequest) -> None:
        self.request = request
        self._generator = torch.Generator()
        if request.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(request.seed)

    def token(self, logits: Tensor, likeliest: int) -> Token:
        """Return the token that follows ``logits`` (V,); ``likeliest`` is the index of the largest logit."""
        request = self.request
        id = likeliest if request.temperature < COLDEST else self._drawn(logits)
        if request.top_logprobs is None:
            return Token(id)
        logprobs = logits.float().log_softmax(-1)
        top = logprobs.topk(request.top_logprobs)
        return Token(id, float(logprobs[id]), tuple(zip(top.indices.tolist(), top.values.tolist())))

    def _drawn(self, logits: Tensor) -> int:
        probabilities, top_p = (logits.float() / self.request.temperature).softmax(-1).cpu(), self.request.top_p
        if top_p < 1:
            ordered, ids = probabilities.sort(descending=True)
            ordered[1:][(ordered.cumsum(-1) - ordered)[1:] >= top_p] = 0  # the likeliest token always stays
            return int(ids[torch.multinomial(ordered, 1, generator=self._generator)])
        return int(torch.multinomial(probabilities, 1, generator=self._generator))


class LabelWalk:
    """Scores a fixed set of answers: log p over the tokens of each label, along the tree of the labels' beginnings.

    A label "1, end" and a label "12, end" share the beginning "1". Beginnings are visited depth first, so an engine
    with one row of keys and values can go back to a shared beginning and continue from there.
    """

    def __init__(self, labels: Sequence[Sequence[int]]) -> None:
        self.labels = [tuple(label) for label in labels]
        self.scores = [0.0] * len(self.labels)
        # In lexicographic order, a beginning comes right before everything that continues it: depth first.
        self._left = sorted({label[:count] for label in self.labels for count in range(len(label))}, reverse=True)

    @property
    def wanted(self) -> list[int]:
        """The tokens whose log p is needed behind the current beginning, which is empty at first."""
        return [token for _, token in self._after()]

    def _after(self) -> list[tuple[int, int]]:
        """Return the number and the next token of each label that continues the current beginning."""
        start = self._left[-1]
        longer = [(n, label) for n, label in enumerate(self.labels) if len(label) > len(start)]
        return [(n, label[len(start)]) for n, label in longer if label[: len(start)] == start]

    def next(self, logits: Tensor) -> tuple[int, int] | None:
        """Take the logits (V,) behind the current beginning.

        Returns how many tokens of it to keep, and the token to continue with; None when all labels are scored.
        """
        after, _ = self._after(), self._left.pop()
        (tokens,) = moved(logits.device, torch.tensor([token for _, token in after]))
        logprobs = logits.float().log_softmax(-1)[tokens].tolist()  # a GPU sends only these
        for (number, _), logprob in zip(after, logprobs):
            self.scores[number] += logprob
        if not self._left:
            return None
        return len(self._left[-1]) - 1, self._left[-1][-1]


@dataclass(slots=True, eq=False)
class AnswerRow:
    """One answer in progress: ``left`` holds tokens that are not processed yet, ``count`` counts generated tokens."""

    request: EngineRequest
    send: Callable[[AnswerPiece | MtaError], None]
    sampler: Sampler
    adapter: RowAdapter = field(init=False)  # set before the row waits for a slot
    number: int = field(default_factory=itertools.count().__next__)  # in order of arrival
    left: list[int] = field(default_factory=list)
    count: int = 0
    cached: int = 0
    cancelled: bool = False  # the caller no longer waits
    walk: LabelWalk = field(init=False)  # of a request with labels

    def __post_init__(self) -> None:
        self.walk = LabelWalk(self.request.labels)


class Scheduler:
    """Schedules rows of different people; all work happens in ``step``, in the caller's thread."""

    def __init__(self, base: BaseModel, adapters: AdapterSlots, slots: int, length: int, chunk: int) -> None:
        self.adapters, self.chunk = adapters, chunk
        self.slots = Slots(base, slots, length, chunk, adapters)
        self.waiting: deque[AnswerRow] = deque()
        self.rows: list[AnswerRow] = []  # row n has slot n in both caches; running rows first, then filling rows
        self.running = 0
        self.failed = self.lost = 0  # failures and lost answers since the start
        self._failures_in_a_row = 0  # steps without a pass that succeeded
        self._failure_counts = False  # whether a failure counts: the first of a step, before any pass succeeded
        self.stops = frozenset(base.stop_tokens)

    @property
    def busy(self) -> bool:
        return bool(self.rows or self.waiting)

    def known(self) -> list[ServedModel]:
        """Return the owners of waiting rows and of all slots, in use or warm."""
        return [*(row.request.who for row in self.waiting), *self.slots.known()]

    @property
    def stuck(self) -> bool:
        """Whether the last ``PATIENCE`` steps all failed. New requests are still tried; one success ends this state."""
        return self._failures_in_a_row >= PATIENCE

    @torch.inference_mode()
    def step(self) -> None:
        """Drop cancelled rows, admit waiting rows, prefill, decode."""
        self._failure_counts = True
        try:
            self._drop_cancelled()
            self._admit()
            if len(self.rows) > self.running:
                self._prefill()
            if self.running:
                self._pass(slice(0, self.running), 1)
        except Exception as error:
            self._restart(error)
        self._failure_counts = False

    @torch.inference_mode()
    def end(self, error: MtaError, matches: Callable[[Owner], bool] = lambda _: True) -> None:
        """End the rows whose owner ``matches``, and empty their warm slots."""
        for row in [row for row in (*self.rows, *self.waiting) if matches((row.request.who, row.request.asker))]:
            row.send(error)
            row.cancelled = True
        try:
            self._drop_cancelled()
            self.slots.forget(matches)
        except Exception as failure:
            self._restart(failure)

    def fail(self, rows: Sequence[AnswerRow], error: Exception, what: str = "a decoding step") -> None:
        """End the answers of ``rows`` because ``what`` failed with ``error``; leave the slots as they are."""
        lost = [row for row in rows if not row.cancelled]
        self.failed, self.lost = self.failed + 1, self.lost + len(lost)
        self._failures_in_a_row += self._failure_counts  # before the callers know: they may ask for the engine's health
        self._failure_counts = False
        log_failure(what, error)
        for row in lost:
            row.send(AnswerLost(LOST, hint=LATER))
            row.cancelled = True

    def _lose(self, rows: Sequence[AnswerRow], error: Exception) -> None:
        """End ``rows`` because of ``error``, and empty their slots."""
        self.fail(rows, error)
        for row in rows:
            self._leave(row)
            self.slots.empty(len(self.rows))  # _leave moved the row's slot there

    def _restart(self, error: Exception) -> None:
        """End all rows that have a slot because of ``error``, and empty all slots: a swap may be half done."""
        self.fail(self.rows, error)
        self.rows, self.running = [], 0
        self.slots.empty_from(0)

    def _drop_cancelled(self) -> None:
        self.waiting = deque(row for row in self.waiting if not row.cancelled)
        for row in [row for row in self.rows if row.cancelled]:
            self._leave(row)

    def _admit(self) -> None:
        while self.waiting and len(self.rows) < len(self.slots):
            row = self.waiting.popleft()
            try:
                place, row.cached = self.slots.take((row.request.who, row.request.asker), row.request.prompt)
                self.adapters.take(place, row.adapter)
            except Exception as error:
                self.fail([row], error, "an admission")
                self.slots.empty_from(len(self.rows))  # slots in use were not touched
                continue
            row.left = list(row.request.prompt[row.cached :])
            self.rows.append(row)

    def _prefill(self) -> None:
        """Run one prefill pass over the oldest filling row and as many others as fit."""
        first = self.running
        room = self.chunk if any(not row.request.labels for row in self.rows[:first]) else CHUNKS * self.chunk
        self._exchange(first, min(range(first, len(self.rows)), key=lambda n: self.rows[n].number))
        count, width = 1, min(len(self.rows[first].left), self.chunk)
        for row in self.rows[first + 1 :]:
            wider = max(width, min(len(row.left), self.chunk))
            if wider * (count + 1) > room:
                break
            count, width = count + 1, wider
        self._pass(slice(first, first + count), width)

    def _pass(self, places: slice, width: int) -> None:
        """Process at most ``width`` tokens of each row; sample a token for rows that have none left.

        If the pass fails, its rows end.
        """
        rows, filling = self.rows[places], places.start == self.running
        try:
            wanted = [row.walk.wanted if row.request.labels and len(row.left) <= width else [] for row in rows]
            with self.adapters.opened(places):
                logits = self.slots.logits(places, [row.left[:width] for row in rows], wanted)
            likeliest = logits.argmax(-1).tolist()  # waits for the device, so device errors are raised here
        except Exception as error:
            return self._lose(rows, error)
        self._failures_in_a_row, self._failure_counts = 0, False
        for row in rows:
            del row.left[:width]
        ready = [n for n, row in enumerate(rows) if not row.left]
        if filling:
            for n in ready:
                self._exchange(self.rows.index(rows[n]), self.running)
                self.running += 1
        for n in ready:
            if rows[n].request.labels:
                self._next_label(rows[n], logits[n])
            else:
                self._next(rows[n], logits[n], likeliest[n])

    def _next(self, row: AnswerRow, logits: Tensor, likeliest: int) -> None:
        """Sample one more token of an answer; remove the row when the answer ends."""
        finish: Finish | None = None
        try:
            token = row.sampler.token(logits, likeliest)
        except Exception as error:  # an odd request must end only its own row
            return self._lose([row], error)
        if token.id in self.stops:
            finish = "stop"
        else:
            row.left, row.count = [token.id], row.count + 1
            row.send(AnswerPiece(token, cached=row.cached))
            if row.count >= row.request.max_tokens:
                finish = "length"
        if finish:
            row.send(AnswerPiece(finish=finish, cached=row.cached))
            row.cancelled = True
            self._leave(row)

    def _next_label(self, row: AnswerRow, logits: Tensor) -> None:
        """Score the labels' next tokens, and go on to the next beginning of a label; end after the last one."""
        try:
            step = row.walk.next(logits)
        except Exception as error:  # it must end only its own row
            return self._lose([row], error)
        if step:
            keep, token = step
            self.slots.rewind(self.rows.index(row), len(row.request.prompt) + keep)
            row.left = [token]
        else:
            row.send(AnswerPiece(finish="stop", cached=row.cached, scores=tuple(row.walk.scores)))
            row.cancelled = True
            self._leave(row)

    def _leave(self, row: AnswerRow) -> None:
        place = self.rows.index(row)
        if place < self.running:  # swap with the last running row: running rows stay contiguous
            self.running -= 1
            self._exchange(place, self.running)
            place = self.running
        self.slots.leave(place)
        self.rows[place] = self.rows[-1]
        self.rows.pop()

    def _exchange(self, one: int, other: int) -> None:
        self.slots.exchange(one, other)
        self.rows[one], self.rows[other] = self.rows[other], self.rows[one]
