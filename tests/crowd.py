"""People with few shots each, and the comparison of their states."""

import hashlib
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

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
_MET = TemporaryDirectory(prefix="mta-tests-")


def knowing(base, bank, store: Path, people: list[Person] = PEOPLE, **changes) -> Personalizer:
    """A Personalizer that knows these people: they are personalized once, and their states copied for other tests."""
    asked = repr((bank.hash, [(person.id, person.digest()) for person in people], changes))
    met = Path(_MET.name, hashlib.sha256(asked.encode()).hexdigest())
    if not met.exists():
        personalizer(base, bank, met, **changes).personalize(people)
    shutil.copytree(met, store, dirs_exist_ok=True)
    return personalizer(base, bank, store, **changes)


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
