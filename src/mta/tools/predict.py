"""Answer all questions of a file with people's own models, a cohort of questions at a time."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mta.config.constants import ROUNDING_ONLY
from mta.data.history import Item, Person
from mta.data.tasks.task import Task
from mta.errors import InputError, OtherBank, PersonNotFound
from mta.personalize import Personalizer
from mta.personalize.adapters import BASE, TASK, PersonOrModel, SharedModel
from mta.system.atomic import append_lines, json_sha256
from mta.system.progress import OnStep, Step
from mta.system.storage import in_threads

log = logging.getLogger("mta")
_SHARED = {TASK: "the pooled model", BASE: "the base"}
TOGETHER = 64  # questions answered together, by at most as many models: bounds the memory
Answer = tuple[str, dict[str, float]]  # a text, and for a scored answer the shares of all labels


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


class Unfinished:
    """The answers of a run until its file is complete, in a file of their own beside it: an interrupted run resumes."""

    def __init__(self, out: Path) -> None:
        self.path = out.with_name(f"{out.name}.unfinished")
        self._found: dict[str, list[Answer]] = {}
        for line in self.path.read_bytes().splitlines() if self.path.exists() else ():
            with suppress(ValueError):  # a killed process left half a line
                asked, answers = json.loads(line)
                self._found[asked] = [(text, shares) for text, shares in answers]

    def get(self, asked: str) -> list[Answer] | None:
        """Return the answers to the questions with this hash, None if there are none yet."""
        return self._found.get(asked)

    def add(self, asked: str, answers: list[Answer]) -> None:
        """Keep the answers to the questions with this hash, once."""
        if asked not in self._found:
            append_lines(self.path, [json.dumps([asked, answers])])

    def remove(self) -> None:
        """Forget the answers."""
        self.path.unlink(missing_ok=True)


def predict(
    personal: Personalizer,
    people: Sequence[Person],
    *,
    kept: Unfinished | None = None,
    fallback: SharedModel | None = None,
    write: bool = False,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    on_step: OnStep | None = None,
) -> Iterator[Prediction]:
    """Yield the answers to the people's ``queries``, person by person.

    Labels are scored, as in a comparison; with ``write``, and for tasks without labels, answers are generated.
    ``fallback`` answers for people without a model of this bank, with a warning. Answers in ``kept`` to the same
    questions of the same models are not computed again. Raises PersonNotFound if people have no model and there is no
    fallback, and DataError for a question that is too long, before anything is computed; and the errors of
    ``Personalizer.generate``.
    """
    models, made_from = _models(personal, people, fallback)
    rows = [(person.id, question) for person in people for question in person.queries]
    task, prompts = personal.bank.task, personal.base.prompts
    settings = personal.run.model_dump(mode="json", exclude=set(ROUNDING_ONLY))
    scored = bool(task.labels) and not write
    longest = prompts.answer_tokens(task) if scored else personal.longest_answer(max_new_tokens)
    prompts.check(task, ((f"a question of {one!r}", question) for one, question in rows), longest)
    for start in range(0, len(rows), TOGETHER):
        some = rows[start : start + TOGETHER]
        asked = [(models[person], _fields(task, question)) for person, question in some]
        seed = personal.run.seed + start  # else equal questions of two cohorts would get equal answers
        texts = [(made_from[person], fields) for (person, _), (_, fields) in zip(some, asked)]
        key = json_sha256([personal.bank.hash, settings, scored, max_new_tokens, temperature, seed, texts])
        found = kept.get(key) if kept else None
        if found is None and scored:
            found = [(next(iter(shares)), shares) for shares in personal.shares(asked)]
        elif found is None:
            answers = personal.generate(asked, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
            found = [(answer, {}) for answer in answers]
        if kept:
            kept.add(key, found)
        done = start + len(some)
        if on_step:
            on_step("answers", Step(done, len({person for person, _ in some}), done, len(rows)))
        for (person, question), (answer, shares) in zip(some, found):
            asked_fields = replace(question, fields=_fields(task, question))  # without an answer that it came with
            yield Prediction(person, asked_fields, answer, models[person], shares)


def _models(
    personal: Personalizer, people: Sequence[Person], fallback: SharedModel | None
) -> tuple[dict[str, PersonOrModel], dict[str, str | None]]:
    """Return each person's model, their own or ``fallback``, and a hash of all that it was made from.

    Raises StoreError, PersonNotFound, StateCorrupt.
    """
    if personal.store:
        personal.store.check()

    def work_of(person: Person) -> str | None:
        with suppress(PersonNotFound, OtherBank):
            return personal.state(person.id).work
        return None

    known = list(in_threads(work_of, people))
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
    models = {person.id: person.id if own else fallback or person.id for person, own in zip(people, known)}
    made_from = {person.id: own or (fallback and fallback.value) for person, own in zip(people, known)}
    return models, made_from


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
