"""The answers of the pooled model and of people's models to the same questions, to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mta.data.history import Person
from mta.data.tasks.task import Task, is_number
from mta.personalize import Personalizer
from mta.personalize.adapters import TASK, PersonOrModel

Answer = Mapping[str, float] | str  # the probability of every label, or a text


@dataclass(frozen=True, slots=True)
class PersonAnswers:
    """A person, and the answers of the person's model to the questions.

    ``shots`` are the items that the model was trained on: the first field and the answer of each.
    """

    id: str
    about: str
    shots: tuple[tuple[str, str], ...]
    answers: tuple[Answer, ...]


@dataclass(frozen=True, slots=True)
class SampleAnswers:
    """Answers of the pooled model and of some people's models. ``labels`` is empty for free text."""

    questions: tuple[str, ...]
    labels: tuple[str, ...]
    pooled: tuple[Answer, ...]
    people: tuple[PersonAnswers, ...]

    def mean(self, answer: Answer) -> float | None:
        """Return the expected value of an answer with numbers as labels."""
        if isinstance(answer, str) or not all(map(is_number, answer)):
            return None
        return sum(float(label) * share for label, share in answer.items())


def sample_answers(
    personal: Personalizer, people: Sequence[Person], questions: Sequence[Mapping[str, str]]
) -> SampleAnswers:
    """Put questions, given as fields, to the pooled model and to the models of ``people``, in one batch.

    The people must have been personalized on their items.
    """
    task = personal.bank.task
    askers: list[PersonOrModel] = [TASK, *(person.id for person in people)]
    rows = [(who, fields) for who in askers for fields in questions]
    answered: Sequence[Answer]
    if task.labels is None:
        answered = personal.generate(rows)
    else:
        answered = [{label: shares[label] for label in task.labels} for shares in personal.shares(rows)]
    each = len(questions)
    pooled, *answers = (tuple(answered[n : n + each]) for n in range(0, len(answered), each))
    own_answers = tuple(
        PersonAnswers(one.id, _about(task, one), _shots(task, one), own) for one, own in zip(people, answers)
    )
    return SampleAnswers(
        tuple(next(iter(fields.values())) for fields in questions), task.labels or (), pooled, own_answers
    )


def _about(task: Task, person: Person) -> str:
    count = len(person.items)
    if task.metric == "mae":
        return f"{count} shots, {sum(float(task.target(item)) for item in person.items) / count:.1f} on average"
    return f"{count} shots"


def _shots(task: Task, person: Person) -> tuple[tuple[str, str], ...]:
    first = task.item.inputs[0] if task.item.inputs else task.item.target
    return tuple((item.fields[first], task.target(item)) for item in person.items)
