"""Answer all questions of a file with people's own models, a cohort of questions at a time."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mta.bank.calibration.info import LABEL_BIAS
from mta.bank.calibration.label_bias import label_biases
from mta.config.constants import ROUNDING_ONLY
from mta.data.earlier import in_words
from mta.data.history import PROFILE, Item, Person
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
LabelBias = Mapping[str, float]  # label -> what is added to its log probability
Answer = tuple[str, dict[str, float]]  # a text, and for a scored answer the shares of all labels


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer to a person's question, by ``model``: "person", "label bias", or a shared model ("task", "base").

    ``shares``: label -> probability, most likely label first; empty if the answer was generated.
    """

    person: str
    question: Item
    answer: str
    model: str
    shares: dict[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return the fields of one line of the file of answers."""
        fields = {"person": self.person, "id": self.question.id, "question": dict(self.question.fields)}
        return fields | {"answer": self.answer, "model": self.model} | ({"shares": self.shares} if self.shares else {})


@dataclass(frozen=True, slots=True)
class _Model:
    """What answers for a person: the model to ask, what it was made from, its name, and the labels' biases."""

    asked: PersonOrModel
    made_from: str
    name: str
    bias: LabelBias = field(default_factory=dict)


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
    biases: Mapping[str, LabelBias] | None = None,
    kept: Unfinished | None = None,
    on_step: OnStep | None = None,
) -> Iterator[Prediction]:
    """Yield the answers to the people's ``queries``, person by person.

    ``earlier`` returns a person's items for banks with such prompts, also if another model answers; by default, those
    kept in the store.
    Labels are scored, as in a comparison; with ``write``, and for tasks without labels, answers are generated.
    ``fallback`` answers for people without a model of this bank; without it, they raise PersonNotFound. With
    ``biases`` (of ``biases_of``), the pooled model answers for all, with a person's bias if there is one. Answers in
    ``kept`` to the same questions of the same models are not computed again. Raises DataError for a long question.
    """
    models = _models(personal, people, fallback) if biases is None else _biased(people, biases)
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
    inputs = (task.query or task.item).inputs  # an answer in the file is not read
    for start in range(0, len(rows), TOGETHER):
        part = rows[start : start + TOGETHER]
        some = [(one, replace(asked, fields={name: asked.fields[name] for name in inputs})) for one, asked in part]
        fields = [{**question.fields, PROFILE: shown.get(person, "")} for person, question in some]
        asked = [(models[person].asked, own) for (person, _), own in zip(some, fields)]
        texts = [(models[person].made_from, own) for (person, _), own in zip(some, fields)]
        key = json_sha256([personal.bank.hash, settings, scored, max_new_tokens, texts])
        answers = kept.get(key) if kept is not None else None
        if answers is None:
            if scored:
                shared = [
                    _with_bias(shares, models[who].bias) for (who, _), shares in zip(some, personal.shares(asked))
                ]
                answers = [(next(iter(shares)), shares) for shares in shared]
            else:
                answers = [(text, {}) for text in personal.generate(asked, max_new_tokens=max_new_tokens)]
            if kept is not None:
                kept.add(key, answers)
        done = start + len(some)
        if on_step:
            on_step("answers", Step(done, len({person for person, _ in some}), done, len(rows)))
        for (person, question), (answer, shares) in zip(some, answers):
            yield Prediction(person, question, answer, models[person].name, shares)


def biases_of(personal: Personalizer, people: Sequence[Person]) -> dict[str, LabelBias]:
    """Return each person's label bias of the pooled model, fitted to their items as in a comparison.

    Raises InputError for a task without labels, and for a bank whose prompts show earlier items.
    """
    bank, labels = personal.bank, personal.bank.task.labels
    if not labels or bank.history:
        found = "whose prompts show earlier items" if bank.history else f"for {bank.task.name!r}, a task without labels"
        raise InputError(f"a label bias cannot be fitted with a bank {found}", hint="Leave out  --label-bias")
    people = [person for person in people if person.items]  # the questions of a file may be all items of a person
    items = [person.items for person in people]
    scores = personal.label_scores([(TASK, own) for own in items])
    std = bank.info.calibration.setting_of(LABEL_BIAS) if bank.info.calibration else None
    biases = label_biases(bank.task, items, scores, std)
    return {person.id: dict(zip(labels, bias.tolist())) for person, bias in zip(people, biases)}


def _biased(people: Sequence[Person], biases: Mapping[str, LabelBias]) -> dict[str, _Model]:
    if missing := [person.id for person in people if person.id not in biases]:
        log.warning(
            "%d of %d people have no items for a label bias: %s answers", len(missing), len(people), _SHARED[TASK]
        )
    own = {person.id: biases.get(person.id, {}) for person in people}
    return {id: _Model(TASK, json.dumps(bias), LABEL_BIAS if bias else TASK.value, bias) for id, bias in own.items()}


def _with_bias(shares: dict[str, float], bias: LabelBias) -> dict[str, float]:
    """Return the shares of all labels with a bias on their log probabilities, the most likely label first."""
    odds = {label: share * math.exp(bias.get(label, 0)) for label, share in shares.items()}
    total = sum(odds.values())
    return dict(sorted(((label, odd / total) for label, odd in odds.items()), key=lambda pair: -pair[1]))


def _models(personal: Personalizer, people: Sequence[Person], fallback: SharedModel | None) -> dict[str, _Model]:
    """Return each person's model, their own or ``fallback``.

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
    shared = fallback and _Model(fallback, fallback.value, fallback.value)
    return {id: _Model(id, work, "person") if work or not shared else shared for id, work in works.items()}


def check_ids(people: Sequence[Person]) -> None:
    """Raise InputError unless every question has an id of its own, as LaMP's format needs."""
    ids = Counter(question.id for person in people for question in person.queries)
    if wrong := [id for id, count in ids.items() if id is None or count > 1]:
        fault = "some questions have no id" if None in ids else f"several questions have the id {wrong[0]!r}"
        raise InputError(
            f"{fault}; LaMP's format needs an id for each", hint="Add ids, or write lines:  --out answers.jsonl"
        )
