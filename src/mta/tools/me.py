"""``mta demo --me``: answer a few questions, and see how well the model that they make predicts your other answers."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mta.bank.bank import Bank
from mta.data.history import Item, Person
from mta.data.tasks.task import is_number
from mta.errors import InputError
from mta.evaluation.reports.summary import OTHER, OURS, POOLED
from mta.evaluation.reports.two_people import Asked
from mta.model.base import BaseModel
from mta.personalize import Personalizer
from mta.personalize.adapters import TASK, PersonOrModel
from mta.system.device import clock
from mta.tools.demo import RECIPE, load_demo, people_of

ME, SOMEBODY = "you", "another person"
Ask = Callable[[str, Sequence[str]], str | None]
"""Asks a question with labels, and returns one of the labels; None to stop."""


def ask_me(out: Path, ask: Ask, say: Callable[[str], None]) -> Asked | None:
    """Ask the demo's questions, make a model from the first answers, and return its predictions of the others.

    ``out`` is the folder of a finished demo. Beside the own model stand everybody's, and that of a person outside the
    bank, drawn at random. Nothing is kept. Returns None if nothing was predicted. Raises InputError.
    """
    if not (out / RECIPE).is_file():
        raise InputError(f"{out} holds no finished demo", hint=f"Run this first:  mta demo --out {out}")
    recipe = load_demo(out / RECIPE)
    base = BaseModel.of(recipe.run)
    bank, shots = Bank.open(out / "bank", base), recipe.evaluation.shots
    questions, labels = bank.task.examples, bank.task.labels or ()
    if len(questions) <= shots or not labels or not all(map(is_number, labels)):
        raise InputError(
            f"the task {bank.task.name} brings {len(questions)} questions; more than {shots} with numbers as answers "
            "are needed",
            hint="Use the demo's own recipe:  mta demo, then  mta demo --me",
        )
    say(f"{bank.task.description}. Answer from {labels[0]} to {labels[-1]}; q stops.")
    asked: list[tuple[Mapping[str, str], str]] = []
    personal: Personalizer | None = None
    for number, fields in enumerate(questions):
        if number == shots:
            people, splits = people_of(recipe)
            other = secrets.choice(splits.select("test", people)).first(shots)
            personal = _personalized(base, bank, asked, other, say)
        text = next(iter(fields.values()))
        if (given := ask(f"{number + 1:2}/{len(questions)}  {text}", labels)) is None:
            break
        asked.append((fields, given))
    return _compared(personal, asked, shots) if personal and len(asked) > shots else None


def _personalized(
    base: BaseModel,
    bank: Bank,
    asked: Sequence[tuple[Mapping[str, str], str]],
    other: Person,
    say: Callable[[str], None],
) -> Personalizer:
    """Return the models of both people, in memory only."""
    target = bank.task.item.target
    items = (Item({**fields, target: given}, float(time)) for time, (fields, given) in enumerate(asked))
    personal, start = Personalizer(base, bank), clock(base.device)
    personal.personalize([Person(ME, tuple(items)), Person(SOMEBODY, other.items)])
    seconds = clock(base.device) - start
    say(f"Your model is made: {seconds:.1f} s. Answer the others, too: it predicts them without these answers.")
    return personal


def _compared(personal: Personalizer, asked: Sequence[tuple[Mapping[str, str], str]], shots: int) -> Asked:
    """Return the answers after the first ``shots``, with what the three models expect."""
    task, later = personal.bank.task, asked[shots:]
    models: dict[str, PersonOrModel] = {POOLED: TASK, OURS: ME, OTHER: SOMEBODY}
    shares = personal.shares([(who, fields) for who in models.values() for fields, _ in later])
    found = {name: tuple(shares[n * len(later) : (n + 1) * len(later)]) for n, name in enumerate(models)}
    pairs = [(next(iter(fields.values())), given) for fields, given in asked]
    questions, golds = zip(*pairs[shots:])
    return Asked(0, ME, tuple(task.labels or ()), tuple(pairs[:shots]), questions, golds, found)


def in_words(found: Asked) -> str:
    """Return how far each model was off, on average, in one sentence."""
    own, pooled, other = (found.error(name) for name in (OURS, POOLED, OTHER))
    return (
        f"On average, your model was off by {own:.2f}, everybody's by {pooled:.2f}, and that of another person, "
        f"drawn at random, by {other:.2f}. Nothing of this was kept."
    )
