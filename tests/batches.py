"""Three people outside a tiny bank, for tests of methods."""

import pytest
import torch
from conftest import TINY_RUN, HashEncoder, people_of

from mta.config import MergeSettings
from mta.evaluation.context import Context
from mta.evaluation.protocol import TestBatch

SHOTS, QUERIES, PEOPLE = 4, 2, 3
POSTERIOR = MergeSettings(policy="posterior", k=0)


def batch_of(tiny, people=None, shots=SHOTS, **changes):
    base, bank = tiny
    people = people_of(PEOPLE, prefix="x", seed=7) if people is None else people
    anchors = [p for p in people_of(12, prefix="c") if "anchor" in bank.info.members.parts_of(p.id)]
    anchors.sort(key=lambda person: person.id)
    context = Context(base, bank, HashEncoder(), TINY_RUN, **{"anchors": anchors, **changes})
    return TestBatch.of(context, people, shots=shots, queries=QUERIES)


@pytest.fixture
def batch(tiny):
    return batch_of(tiny)


def same(one, other, tolerance=0.0):
    return all(torch.allclose(a.scores, b.scores, rtol=0, atol=tolerance) for a, b in zip(one.answers, other.answers))
