"""Answer all questions of a file with people's own models, a cohort of questions at a time."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from mta.data.history import Item, Person
from mta.data.tasks.task import Task
from mta.errors import InputError, OtherBank, PersonNotFound
from mta.personalize import Personalizer
from mta.personalize.adapters import BASE, TASK, PersonOrModel, SharedModel
from mta.system.progress import OnStep, Step
from mta.system.storage import in_threads

log = logging.getLogger("mta")
_SHARED = {TASK: "the pooled model", BASE: "the base"}
TOGETHER = 64  # questions answered together, by at most as many models: bounds the memory


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer to a person's question, by ``model``: the person's id, or a shared model.

    ``shares``: label -> probability, most likely label first; empty if the answer was generated.
    """

    person: str
    question: Item
    answer: str
    model: PersonOrModel
    shares: dict[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return the fields of one line of the file of answers."""
        shown = self.model.value if isinstance(self.model, SharedModel) else "person"
        found = {"person": self.person, "id": self.question.id, "question": dict(self.question.fields)}
        return found | {"answer": self.answer, "model": shown} | ({"shares": self.shares} if self.shares else {})


def predict(
    personal: Personalizer,
    people: Sequence[Person],
    *,
    fallback: SharedModel | None = None,
    write: bool = False,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    on_step: OnStep | None = None,
) -> Iterator[Prediction]:
    """Yield the answers to the people's ``queries``, person by person.

    Labels are scored, as in a comparison; with ``write``, and for tasks without labels, answers are generated.
    ``fallback`` answers for people without a model of this bank, with a warning. Raises PersonNotFound if there are any
    and no fallback, before anything is computed; and the errors of ``Personalizer.generate``.
    """
    models = _models(personal, people, fallback)
    rows = [(person.id, question) for person in people for question in person.queries]
    task, done = personal.bank.task, 0
    for start in range(0, len(rows), TOGETHER):
        some = rows[start : start + TOGETHER]
        asked = [(models[person], _fields(task, question)) for person, question in some]
        if task.labels and not write:
            shares = personal.shares(asked)
            answers = [next(iter(own)) for own in shares]
        else:
            shares = [{} for _ in asked]
            seed = personal.run.seed + start  # else equal questions of two cohorts would get equal answers
            answers = personal.generate(asked, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
        done += len(some)
        if on_step:
            on_step("answers", Step(done, len({person for person, _ in some}), done, len(rows)))
        for (person, question), answer, own in zip(some, answers, shares):
            yield Prediction(person, question, answer, models[person], own)


def _models(personal: Personalizer, people: Sequence[Person], fallback: SharedModel | None) -> dict[str, PersonOrModel]:
    """Return each person's model: their own, or ``fallback``. Raises StoreError, PersonNotFound, StateCorrupt."""
    if personal.store:
        personal.store.check()

    def has_model(person: Person) -> bool:
        with suppress(PersonNotFound, OtherBank):
            return bool(personal.state(person.id))
        return False

    known = list(in_threads(has_model, people))
    missing = [person.id for person, own in zip(people, known) if not own]
    if missing and fallback is None:
        raise PersonNotFound(
            f"{len(missing)} of {len(people)} people have no model of this bank, {missing[0]!r} first",
            hint="Personalize them first (mta personalize), or let the pooled model answer:  --fallback task",
        )
    if missing and fallback:
        log.warning(
            "%d of %d people have no model of this bank: %s answers", len(missing), len(people), _SHARED[fallback]
        )
    return {person.id: person.id if own else fallback or person.id for person, own in zip(people, known)}


def _fields(task: Task, question: Item) -> dict[str, str]:
    return {name: question.fields[name] for name in (task.query or task.item).inputs}


def check_ids(people: Sequence[Person]) -> None:
    """Raise InputError unless every question has an id of its own, as LaMP's format needs."""
    ids = Counter(question.id for person in people for question in person.queries)
    if wrong := [id for id, count in ids.items() if id is None or count > 1]:
        found = "some questions have no id" if None in ids else f"several questions have the id {wrong[0]!r}"
        raise InputError(
            f"{found}; LaMP's format needs an id for each", hint="Add ids, or write lines:  --out answers.jsonl"
        )
