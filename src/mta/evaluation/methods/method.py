"""The base class of methods, and ``answer``, which answers the queries with a model."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field, SerializeAsAny

from mta.config import parse_size
from mta.config.loader import Settings
from mta.data.history import Item
from mta.data.tasks.prompt import Example
from mta.data.tasks.task import Task
from mta.errors import Diverged
from mta.evaluation.metrics import Answers, PersonScore, from_scores, measure
from mta.evaluation.protocol import Outcome, TestBatch
from mta.lora.layers import Adapters
from mta.model.generate import generate
from mta.system.atomic import json_sha256
from mta.training.scoring import label_scores, log_likelihood


class Method(Settings, ABC):
    """One row of the table. ``method`` is the name of the class in recipes, ``name`` the name of the row."""

    paper: ClassVar[str] = ""

    method: str = Field(default="", description="name of the class; each class sets it")
    name: str

    @property
    def digest(self) -> str:
        """Hash of the method and its settings, without its name."""
        return json_sha256(_unnamed(self.model_dump(mode="json")))[:12]

    @property
    def seeded(self) -> bool:
        """Whether the seed affects the result: stacks start from the seed, and learned coefficients draw batches."""
        return False

    @property
    def uses_bank(self) -> bool:
        """Whether the method uses the bank or its task LoRA."""
        return True

    @property
    def shows_history(self) -> bool:
        """Whether prompts begin with earlier items if the bank's prompts do. These items are stored per person."""
        return True

    @property
    def uses_other_people(self) -> bool:
        """Whether a person's result depends on items of other people, and not only through the bank."""
        return False

    def fits(self, task: Task, anchors: int, calibrated: bool) -> bool:
        """Return whether the method works for this task, and for a bank with ``anchors`` that is ``calibrated`` or not.

        If not, experiments leave it out.
        """
        return True

    def outcome(self, batch: TestBatch, seed: int) -> Outcome:
        """Return the outcome of ``run``, computed once per batch: ``Chosen`` reads outcomes of other methods again."""
        key = (type(self), self.digest, seed)
        if key not in batch.outcomes:
            _ = batch.jobs  # no method's seconds include tokenizing
            outcome = self.run(batch, seed)
            kept = batch.history_bytes if self.shows_history else 0.0
            batch.outcomes[key] = replace(outcome, bytes_per_person=outcome.bytes_per_person + kept)
        return batch.outcomes[key]

    def scored(self, batch: TestBatch, seed: int) -> tuple[Outcome, list[PersonScore]]:
        """Return the outcome and each person's score. Raises Diverged for a score that is not finite."""
        outcome = self.outcome(batch, seed)
        pairs = zip(outcome.answers, batch.golds)
        scores = [measure(batch.task, answers, golds, batch.write_texts) for answers, golds in pairs]
        for score in scores:
            if not all(map(math.isfinite, score.metrics.values())):
                raise Diverged(
                    f"{self.name}, seed {seed}: a person's score is not finite: {dict(score.metrics)}",
                    hint="Lower its rate (lr).",
                )
        return outcome, scores

    @abstractmethod
    def run(self, batch: TestBatch, seed: int) -> Outcome:
        """Learn from the batch's shots and answer the batch's queries."""


def _unnamed(settings: Any) -> Any:
    """Return the settings without the row names of the method and of the methods inside it."""
    if isinstance(settings, dict):
        return {key: _unnamed(value) for key, value in settings.items() if key != "name"}
    return [_unnamed(value) for value in settings] if isinstance(settings, list) else settings


class OverMethod(Method):
    """A method that changes the input of another method, ``over``."""

    shows_history: ClassVar[bool] = False  # the outcome of ``over`` counts it

    if TYPE_CHECKING:  # a field of the subclasses: their order is part of the digest
        over: SerializeAsAny[Method]

    @property
    def seeded(self) -> bool:
        return self.over.seeded

    @property
    def uses_bank(self) -> bool:
        return self.over.uses_bank

    @property
    def uses_other_people(self) -> bool:
        return self.over.uses_other_people

    def fits(self, task: Task, anchors: int, calibrated: bool) -> bool:
        return self.over.fits(task, anchors, calibrated)


def answer(
    batch: TestBatch, people: Sequence[int], adapters: Sequence[Adapters], *, together: bool = False
) -> list[Answers]:
    """Answer the queries of some of the batch's people with ``adapters``, which have the order of ``people``.

    With ``together``, all people are asked with the adapters of the first person.

    Labels are scored if the task has labels. Otherwise the text is decoded greedily, and the NLL per token of the gold
    text is returned, too.
    """
    task, base, queries = batch.task, batch.base, [batch.queries[i] for i in people]
    memory, everybody = parse_size(batch.run.memory), [0] * len(people) if together else None
    if all(task.labels_of(item) for items in queries for item in items):
        asked: list[Example] = []
        found = label_scores(base, task, queries, adapters, owners=everybody, memory=memory, on_examples=asked.extend)
        sizes = _prompt_tokens(asked, queries)
        return [replace(from_scores(task, scores), prompt_tokens=size) for scores, size in zip(found, sizes)]
    jobs = [[base.prompts.example(task, item) for item in items] for items in queries]
    sizes = _prompt_tokens([example for job in jobs for example in job], queries)
    tokens = [torch.tensor([len(example.target) for example in job]).double() for job in jobs]
    logliks = log_likelihood(base, jobs, adapters, owners=everybody, memory=memory)
    nll = [-scores.double() / own for scores, own in zip(logliks, tokens)]
    if not batch.write_texts:
        return [
            Answers([""] * len(items), nll=own, prompt_tokens=size) for items, own, size in zip(queries, nll, sizes)
        ]
    longest = base.prompts.answer_tokens(task)
    prompts = [base.prompts.prompt(task, item, reserve=longest).tokens for items in queries for item in items]
    owners = [0 if together else person for person, items in enumerate(queries) for _ in items]
    written = iter(generate(base, prompts, owners, adapters, max_new_tokens=longest))
    texts = [[base.prompts.decode(next(written)) for _ in items] for items in queries]
    return [Answers(mine, nll=own, prompt_tokens=size) for mine, own, size in zip(texts, nll, sizes)]


def _prompt_tokens(asked: Iterable[Example], queries: Sequence[Sequence[Item]]) -> list[float]:
    """Return each person's mean length of a prompt in tokens; ``asked`` has an example for each of all queries."""
    lengths = (len(example.prompt) for example in asked)
    return [sum(islice(lengths, len(items))) / len(items) for items in queries]
