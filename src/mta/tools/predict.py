"""Answer all questions of a file with people's own models, a cohort of questions at a time."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mta.config.constants import ROUNDING_ONLY
from mta.data.earlier import in_words
from mta.data.history import PROFILE, Item, Person
from mta.data.tasks.task import Task
from mta.errors import InputError, OtherBank, PersonNotFound
from mta.personalize import Personalizer
from mta.personalize.adapters import BASE, TASK, PersonOrModel, SharedModel
from mta.personalize.personalizer import warn_of_missing
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
        fields = {"person": self.person, "id": self.question.id, "question": dict(self.question.fields)}
        return fields | {"answer": self.answer, "model": shown} | ({"shares": self.shares} if self.shares else {})


class Unfinished(dict[str, list[Answer]]):
    """Answers to questions by the hash of these, in a file beside ``out`` until that is complete: a run resumes."""

    def __init__(self, out: Path) -> None:
        super().__init__()
        self.path = out.with_name(f"{out.name}.unfinished")
        for line in self.path.read_bytes().splitlines() if self.path.exists() else ():
            with suppress(ValueError):  # a killed process left half a line
                asked, answers = json.loads(line)
                self[asked] = [(text, shares) for text, shares in answers]

    def add(self, asked: str, answers: list[Answer]) -> None:
        """Keep the answers to the questions with this hash."""
        append_lines(self.path, [json.dumps([asked, answers])])

    def remove(self) -> None:
        """Forget the answers."""
        self.path.unlink(missing_ok=True)


def predict(
    personal: Personalizer,
    people: Sequence[Person],
    fallback: SharedModel | None = None,
    write: bool = False,
    max_new_tokens: int | None = None,
    *,
    earlier: Callable[[str], Sequence[Item]] | None = None,
    kept: Unfinished | None = None,
    on_step: OnStep | None = None,
) -> Iterator[Prediction]:
    """Yield the answers to the people's ``queries``, person by person.

    ``earlier`` returns a person's items for banks with such prompts, also if another model answers; by default, those
    kept in the store.
    Labels are scored, as in a comparison; with ``write``, and for tasks without labels, answers are generated.
    ``fallback`` answers for people without a model of this bank; without it, they raise PersonNotFound. Answers in
    ``kept`` to the same questions of the same models are not computed again. Raises DataError for a long question.
    """
    models = _models(personal, people, fallback)
    rows = [(person.id, question) for person in people for question in person.queries]
    task, prompts = personal.bank.task, personal.base.prompts
    most, of = personal.bank.history, earlier or personal.earlier
    known = {person.id: of(person.id)[-most:] for person in people} if most else {}
    warn_of_missing(personal.bank, known)
    shown = {id: in_words(task, items) for id, items in known.items()}
    settings = personal.run.model_dump(mode="json", exclude=set(ROUNDING_ONLY))
    scored = bool(task.labels) and not write
    longest = prompts.answer_tokens(task) if scored else personal.longest_answer(max_new_tokens)
    prompts.check(task, ((f"a question of {one!r}", question) for one, question in rows), longest)
    for start in range(0, len(rows), TOGETHER):
        some = [(person, _without_answer(task, question)) for person, question in rows[start : start + TOGETHER]]
        fields = [{**question.fields, PROFILE: shown.get(person, "")} for person, question in some]
        asked = [(models[person][0], own) for (person, _), own in zip(some, fields)]
        texts = [(models[person][1], own) for (person, _), own in zip(some, fields)]
        key = json_sha256([personal.bank.hash, settings, scored, max_new_tokens, texts])
        answers = kept.get(key) if kept is not None else None
        if answers is None:
            if scored:
                answers = [(next(iter(shares)), shares) for shares in personal.shares(asked)]
            else:
                answers = [(text, {}) for text in personal.generate(asked, max_new_tokens=max_new_tokens)]
            if kept is not None:
                kept.add(key, answers)
        done = start + len(some)
        if on_step:
            on_step("answers", Step(done, len({person for person, _ in some}), done, len(rows)))
        for (person, question), (answer, shares) in zip(some, answers):
            yield Prediction(person, question, answer, models[person][0], shares)


def _models(
    personal: Personalizer, people: Sequence[Person], fallback: SharedModel | None
) -> dict[str, tuple[PersonOrModel, str]]:
    """Return each person's model, their own or ``fallback``, and a hash of all that it was made from.

    Raises StoreError, PersonNotFound, StateCorrupt.
    """
    if personal.store:
        personal.store.check()

    def work_of(person: Person) -> str:
        with suppress(PersonNotFound, OtherBank):
            return personal.state(person.id).work
        return ""

    works = {person.id: work for person, work in zip(people, in_threads(work_of, people))}
    missing = [id for id, work in works.items() if not work]
    if missing and fallback is None:
        raise PersonNotFound(
            f"{len(missing)} of {len(people)} people have no model of this bank, {missing[0]!r} first",
            hint="Personalize them first (mta personalize), or let the pooled model answer:  --fallback task",
        )
    if missing and fallback:
        counts = len(missing), len(people), _SHARED[fallback]
        log.warning("%d of %d people have no model of this bank: %s answers", *counts)
    return {id: (id, work) if work or not fallback else (fallback, fallback.value) for id, work in works.items()}


def _without_answer(task: Task, question: Item) -> Item:
    names = (task.query or task.item).inputs
    return replace(question, fields={name: question.fields[name] for name in names})


def check_ids(people: Sequence[Person]) -> None:
    """Raise InputError unless every question has an id of its own, as LaMP's format needs."""
    ids = Counter(question.id for person in people for question in person.queries)
    if wrong := [id for id, count in ids.items() if id is None or count > 1]:
        fault = "some questions have no id" if None in ids else f"several questions have the id {wrong[0]!r}"
        raise InputError(
            f"{fault}; LaMP's format needs an id for each", hint="Add ids, or write lines:  --out answers.jsonl"
        )
