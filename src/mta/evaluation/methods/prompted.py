"""Methods that put a person's history into the prompt; both can be laid over any other method."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from mta.data.history import Item
from mta.data.tasks.form import Form
from mta.data.tasks.task import Task
from mta.evaluation.methods.method import AnyMethod, Method, Outcome, register
from mta.evaluation.methods.plain import Base
from mta.evaluation.protocol import Panel
from mta.model.generate import generate


class _LaidOver:
    """What a method has from the one it stands ``over``."""

    if TYPE_CHECKING:  # each of them has it as a field, among its own
        over: Method

    @property
    def seeded(self) -> bool:
        return self.over.seeded

    @property
    def of_bank(self) -> bool:
        return self.over.of_bank


@register
class Retrieved(_LaidOver, Method):
    """RAG: the ``k`` earlier items nearest by BM25 stand in front of every prompt, of shots and of queries.

    A shot sees only the shots before it. ``over`` is who is asked: the base, the task LoRA, MTA.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2304.11406"
    method: Literal["rag"] = "rag"
    name: str = "RAG"
    k: int = 1
    over: AnyMethod = Base()

    def run(self, panel: Panel, seed: int) -> Outcome:
        return _asked(self.over, panel, seed, self.k, [], _text(panel), time.monotonic())


@register
class Profile(_LaidOver, Method):
    """PAG: the base model describes a person from their shots; the description, and ``k`` retrieved items, is shown."""

    paper: ClassVar[str] = "https://arxiv.org/abs/2310.20081"
    method: Literal["pag"] = "pag"
    name: str = "PAG"
    k: int = 1
    tokens: int = 48
    over: AnyMethod = Base()

    def run(self, panel: Panel, seed: int) -> Outcome:
        start = time.monotonic()
        profiles = self._written(panel)
        told = [f"About this person: {text}\n" for text in profiles]
        kept = sum(len(text.encode()) for text in profiles) / len(profiles) + (_text(panel) if self.k else 0.0)
        return _asked(self.over, panel, seed, self.k, told, kept, start)

    def _written(self, panel: Panel) -> list[str]:
        base, task = panel.base, panel.bank.task
        asked = [Item({"history": "\n".join(task.told(item) for item in p.items)}) for p in panel.people]
        prompts = [base.prompts.prompt(_DESCRIBE, item, reserve=self.tokens).tokens for item in asked]
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


def _text(panel: Panel) -> float:
    """Bytes of a person's shots, which have to be kept to be retrieved."""
    told = [panel.bank.task.told(item) for person in panel.people for item in person.items]
    return sum(len(text.encode()) for text in told) / len(panel.people)


def _asked(over: Method, panel: Panel, seed: int, k: int, before: Sequence[str], kept: float, start: float) -> Outcome:
    """The answers of ``over`` to prompts with a history in them; ``start`` is when their making began."""
    asked = panel.profiled(k, before)
    _ = asked.jobs
    seconds = time.monotonic() - start
    found = over.run(asked, seed)
    return replace(found, seconds=found.seconds + seconds, bytes_per_person=found.bytes_per_person + kept)
