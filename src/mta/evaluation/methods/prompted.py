"""Methods that put a person's history into the prompt; both can be combined with any other method."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from mta.data.history import Item
from mta.data.tasks.task import Form, Task
from mta.evaluation.methods.method import AnyMethod, Method, Outcome, register
from mta.evaluation.methods.plain import Base
from mta.evaluation.protocol import Panel
from mta.model.generate import generate


class _Combined:
    """Properties that come from the method ``over`` which the prompts are given to."""

    if TYPE_CHECKING:  # a field of each subclass
        over: Method

    @property
    def seeded(self) -> bool:
        return self.over.seeded

    @property
    def of_bank(self) -> bool:
        return self.over.of_bank


@register
class Retrieved(_Combined, Method):
    """RAG: every prompt, of shots and of queries, starts with the ``k`` earlier items nearest by BM25.

    A shot sees only the shots before it. ``over`` is the method that gets the prompts: the base, the task LoRA, MTA.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2304.11406"
    method: Literal["rag"] = "rag"
    name: str = "RAG"
    k: int = 1
    over: AnyMethod = Base()

    def run(self, panel: Panel, seed: int) -> Outcome:
        return _with_history(self.over, panel, seed, self.k, [], _history_bytes(panel), time.monotonic())


@register
class Profile(_Combined, Method):
    """PAG: every prompt starts with the base model's description of the person, and ``k`` retrieved items."""

    paper: ClassVar[str] = "https://arxiv.org/abs/2310.20081"
    method: Literal["pag"] = "pag"
    name: str = "PAG"
    k: int = 1
    tokens: int = 48
    over: AnyMethod = Base()

    def run(self, panel: Panel, seed: int) -> Outcome:
        start = time.monotonic()
        descriptions = self._descriptions(panel)
        before = [f"About this person: {text}\n" for text in descriptions]
        stored = sum(len(text.encode()) for text in descriptions) / len(descriptions)
        if self.k:
            stored += _history_bytes(panel)
        return _with_history(self.over, panel, seed, self.k, before, stored, start)

    def _descriptions(self, panel: Panel) -> list[str]:
        base, task = panel.base, panel.bank.task
        items = [Item({"history": "\n".join(task.sentence(item) for item in p.items)}) for p in panel.people]
        prompts = [base.prompts.prompt(_DESCRIBE, item, reserve=self.tokens).tokens for item in items]
        written = generate(base, prompts, [-1] * len(prompts), [], max_new_tokens=self.tokens)
        return [base.prompts.decode(tokens) for tokens in written]


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


def _history_bytes(panel: Panel) -> float:
    """Return the mean bytes of a person's shots, which must be stored for retrieval."""
    texts = [panel.bank.task.sentence(item) for person in panel.people for item in person.items]
    return sum(len(text.encode()) for text in texts) / len(panel.people)


def _with_history(
    over: Method, panel: Panel, seed: int, k: int, before: Sequence[str], stored: float, start: float
) -> Outcome:
    """Return the outcome of ``over`` on prompts with a history; ``start`` is when the preparation began."""
    profiled = panel.profiled(k, before)
    _ = profiled.jobs
    seconds = time.monotonic() - start
    found = over.run(profiled, seed)
    return replace(found, seconds=found.seconds + seconds, bytes_per_person=found.bytes_per_person + stored)
