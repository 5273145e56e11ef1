"""People with few shots each, and the comparison of their states."""

from pathlib import Path

import pytest
import torch
from conftest import TINY_RUN, memory_for, people_of, personalizer

from mta.data.history import Person
from mta.personalize import Personalizer
from mta.personalize.merge import frozen_numbers
from mta.store.state import State
from mta.training.trainer import Job

QUESTION = {"title": "Film 7", "genres": "Drama"}


def crowd(*sizes: int) -> list[Person]:
    """People with that many shots each."""
    return [person.first(size) for person, size in zip(people_of(len(sizes), items=9, prefix="x", seed=5), sizes)]


PEOPLE = crowd(3, 1, 8, 2, 5)


def same(found: State, expected: State, tolerance: float = 1e-10) -> None:
    assert found.anchors == expected.anchors
    assert found.work == expected.work
    assert found.w == pytest.approx(expected.w, rel=0, abs=tolerance)
    assert (found.history, found.shots, found.settings) == (expected.history, expected.shots, expected.settings)
    assert found.gradient == pytest.approx(expected.gradient, rel=tolerance, abs=tolerance)
    assert found.loglik == pytest.approx(expected.loglik, rel=tolerance, abs=tolerance)
    assert found.losses.tokens == expected.losses.tokens
    assert found.losses.merged == pytest.approx(expected.losses.merged, rel=0, abs=tolerance)
    for name, tensor in found.stack.tensors().items():
        torch.testing.assert_close(tensor, expected.stack.tensors()[name], rtol=0, atol=tolerance)


def in_cohorts_of(base, bank, people: int, store=None, **changes) -> Personalizer:
    """A Personalizer with so little memory that only that many of PEOPLE are trained together."""
    jobs = [Job(p.id, [base.prompts.example(bank.task, item) for item in p.items]) for p in PEOPLE]
    numbers, below = (
        sum(d + o for d, o in base.targets.values()),
        frozen_numbers(bank, changes.get("merge", TINY_RUN.merge)),
    )
    memory = memory_for(base, jobs, numbers, people, below=below)
    return personalizer(base, bank, store=store, memory=memory, **changes)


def states_in(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in store.glob("*/*/[0-9]*.safetensors")}
