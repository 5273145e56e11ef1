"""Methods made of other methods: a person's history in every prompt, and a choice of method for each person."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
from pydantic import SerializeAsAny, model_validator
from torch import Tensor

from mta.data.history import Item, Person
from mta.data.tasks.task import Form, Task
from mta.errors import InputError
from mta.evaluation.methods.merged import Merged, MergeThenAdapt
from mta.evaluation.methods.method import Method, OverMethod
from mta.evaluation.methods.plain import Base, TaskLora
from mta.evaluation.metrics import Answers, query_nll
from mta.evaluation.protocol import Outcome, TestBatch
from mta.model.generate import generate
from mta.system.device import clock
from mta_lab.methods.named import AnyMethod
from mta_lab.methods.prompts import profiled

_DESCRIBE = Task(
    name="describe-a-person",
    item=Form(
        prompt="Here is what a person did earlier:\n{history}\n\nDescribe their taste and style in one sentence.",
        target="description",
        cut=("history",),
    ),
    text="{history}",
    metric="rouge",
)


class _Prompted(OverMethod):
    """Every prompt starts with what is known of the person; ``over`` is the method that gets the prompts."""

    if TYPE_CHECKING:  # fields of the subclasses: their order is part of the digest
        k: int = 1
        over: SerializeAsAny[Method] = Base()

    def run(self, batch: TestBatch, seed: int) -> Outcome:
        start = clock(batch.base.device)
        stored = self.descriptions(batch)
        shown = profiled(batch, self.k, [f"About this person: {text}\n" for text in stored])
        seconds = clock(batch.base.device) - start
        if self.k:  # the shots must be stored for retrieval
            stored += [batch.bank.task.sentence(item) for person in batch.people for item in person.items]
        outcome = self.over.outcome(shown, seed)
        each = outcome.bytes_per_person + sum(len(text.encode()) for text in stored) / len(batch.people)
        return replace(outcome, seconds=outcome.seconds + seconds, bytes_per_person=each)

    def descriptions(self, batch: TestBatch) -> list[str]:
        """Return a text about each person; empty for none."""
        return []


class Rag(_Prompted):
    """RAG: every prompt, of shots and of queries, starts with the ``k`` earlier items nearest by BM25.

    A shot sees only the shots before it.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2304.11406"
    method: Literal["rag"] = "rag"
    name: str = "RAG"
    k: int = 1
    over: SerializeAsAny[Method] = Base()


class Pag(_Prompted):
    """PAG: every prompt starts with the base model's description of the person, and ``k`` retrieved items."""

    paper: ClassVar[str] = "https://arxiv.org/abs/2310.20081"
    method: Literal["pag"] = "pag"
    name: str = "PAG"
    k: int = 1
    tokens: int = 48
    over: SerializeAsAny[Method] = Base()

    def descriptions(self, batch: TestBatch) -> list[str]:
        base, task = batch.base, batch.bank.task
        items = [Item({"history": "\n".join(task.sentence(item) for item in p.items)}) for p in batch.people]
        prompts = [base.prompts.prompt(_DESCRIBE, item, reserve=self.tokens).tokens for item in items]
        written = generate(base, prompts, [-1] * len(prompts), [], max_new_tokens=self.tokens)
        return [base.prompts.decode(tokens) for tokens in written]


class Chosen(Method):
    """Choose among ``candidates``; the first is the default, which does not personalize.

    Shots are held out in ``folds`` turns. Another candidate is chosen only if its mean loss on them is lower than that
    of the default by ``margin`` standard errors; among several, the lowest. With one shot, the default stays.
    The seconds are the sum over candidates, which counts a shared merge several times: an upper bound.
    Source: our choice.
    """

    shows_history: ClassVar[bool] = False  # the candidates' outcomes count it
    method: Literal["choice"] = "choice"
    name: str = "MTA, chosen"
    candidates: tuple[AnyMethod, ...] = (TaskLora(), Merged(), MergeThenAdapt())
    folds: int = 4
    margin: float = 0.5

    @model_validator(mode="after")
    def _read_one_person(self) -> Self:
        for one in self.candidates:
            if one.uses_other_people:  # in folds, other rows hold this row's held-out shots
                raise ValueError(f"candidates: {one.name!r} reads other people; choose among methods that do not")
        return self

    @property
    def seeded(self) -> bool:
        return any(candidate.seeded for candidate in self.candidates)

    def fits(self, task: Task, anchors: int, calibrated: bool) -> bool:
        return all(candidate.fits(task, anchors, calibrated) for candidate in self.candidates)

    def run(self, batch: TestBatch, seed: int) -> Outcome:
        picks, seconds = self._picks(batch, seed)
        outcomes = [candidate.outcome(batch, seed) for candidate in self.candidates]
        return Outcome(
            [outcomes[pick].answers[u] for u, pick in enumerate(picks)],
            seconds + sum(outcome.seconds for outcome in outcomes),
            sum(outcomes[pick].bytes_per_person for pick in picks) / len(picks),
            chosen=tuple(self.candidates[pick].name for pick in picks),
        )

    def _picks(self, batch: TestBatch, seed: int) -> tuple[list[int], float]:
        """Return the number of each person's candidate, and the seconds of trying the candidates on held-out shots."""
        folds, owners = folds_of(batch, self.folds)
        if not owners:
            return [0] * len(batch.people), 0.0
        outcomes = [candidate.outcome(folds, seed) for candidate in self.candidates]
        losses: list[list[Tensor]] = [[] for _ in batch.people]
        for row, u in enumerate(owners):
            held_out = [self._nll(n, folds, outcome.answers[row], row) for n, outcome in enumerate(outcomes)]
            losses[u].append(torch.stack(held_out))
        picks = [pick(torch.cat(rows, 1), self.margin) if rows else 0 for rows in losses]
        return picks, sum(outcome.seconds for outcome in outcomes)

    def _nll(self, number: int, folds: TestBatch, answers: Answers, row: int) -> Tensor:
        nll = query_nll(folds.task, answers, folds.golds[row])
        if nll is None:
            raise InputError(
                f"method {self.candidates[number].name!r} gives no probabilities, which {self.name!r} compares",
                hint="Leave it out of candidates:",
            )
        return nll


def folds_of(batch: TestBatch, count: int) -> tuple[TestBatch, list[int]]:
    """Return a batch that asks people about their own shots, and the number of the person in each of its rows.

    Each person has up to ``count`` rows. A row holds out some shots as queries and keeps the others as shots. The
    benchmark's own queries are not asked. A person with one shot has no row.
    """
    if batch.bank.history:  # a kept shot's prompt may show one that is held out
        raise InputError("no choice is made where prompts show earlier items", hint="Leave out the method  choice.")
    people = batch.people
    sizes = [len(person.items) for person in people]
    rows = [(u, turn) for u, size in enumerate(sizes) if size > 1 for turn in range(min(count, size))]
    owners, asked = [u for u, _ in rows], [people[u].items[turn::count] for u, turn in rows]
    kept = [[n for n in range(sizes[u]) if n % count != turn] for u, turn in rows]
    few = [
        Person(f"{people[u].id}/{turn}", tuple(people[u].items[n] for n in rest)) for (u, turn), rest in zip(rows, kept)
    ]
    folds = TestBatch(batch.context, few, asked, batch.bank.task, batch.retrieve, write_texts=False)
    if batch.retrieve:  # the prompts of the other shots may show a held-out item: evidence is gathered again
        return profiled(folds, batch.retrieve), owners
    return replace(folds, evidence_of_shots=lambda: batch.evidence.of_shots(owners, kept)), owners


def pick(losses: Tensor, margin: float) -> int:
    """Return the number of the candidate to use. Shapes: losses (candidates, shots); the first row is the default."""
    gains = losses[0] - losses[1:]
    shots = gains.shape[1]
    error = gains.std(1) / shots**0.5 if shots > 1 else torch.zeros(len(gains))
    sure = gains.mean(1) - margin * error
    means = [0.0, *torch.where(sure > 0, gains.mean(1), -1.0).tolist()]
    return max(range(len(means)), key=lambda i: means[i])
