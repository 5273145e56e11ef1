"""A comparison with invented numbers, and questions that people were asked."""

import pytest
import torch

from mta.evaluation.metrics import Answers, measure, query_nll
from mta.evaluation.reports.two_people import Asked
from mta.evaluation.statistics import Comparison, Row
from mta.personalize.merge import Merge

HOSTILE = "<script>alert('x')</script><img src=https://evil.example/x.png onerror=\"go()\"> & {{ 7 * 7 }}"
EVERY = {"1": 0.1, "2": 0.1, "3": 0.2, "4": 0.5, "5": 0.1}
LABELS = tuple(EVERY)
SURE = {**dict.fromkeys(LABELS, 0.0), "1": 1.0}
_FIRST = {"task LoRA": (EVERY, EVERY), "MTA": (SURE, EVERY)}
ASKED = (
    Asked(7, "c1", LABELS, ((HOSTILE, "2"), ("Alien", "1")), (HOSTILE, "Fargo"), ("1", "4"), _FIRST),
    Asked(2, "c2", LABELS, (("Heat", "5"),), ("Fargo",), ("5",), {"task LoRA": (EVERY,), "MTA": (EVERY,)}),
)


def rated(task, name, people=40, queries=8, gain=0.0, seconds=0.0, kept=0.0, merge=None, seed=1):
    """A row whose model sees the true ratings through noise; ``gain`` raises the true label's score."""
    generator = torch.Generator().manual_seed(0)
    golds = torch.randint(5, (people, queries), generator=generator)
    blurred = golds[..., None] + 1.5 * torch.randn(people, queries, 1, generator=generator)
    noise = 0.05 * torch.randn(people, queries, 5, generator=torch.Generator().manual_seed(seed))
    scores = noise - (torch.arange(5) - blurred) ** 2 / 3
    scores.scatter_add_(2, golds[..., None], torch.full((people, queries, 1), gain))
    texts = [[task.labels[i] for i in row] for row in golds.tolist()]
    answers = [Answers([task.labels[i] for i in s.argmax(1).tolist()], s) for s in scores]
    measured = [measure(task, a, g).metrics for a, g in zip(answers, texts)]
    values = {metric: torch.tensor([m[metric] for m in measured], dtype=torch.float64) for metric in measured[0]}
    nll = torch.stack([query_nll(task, Answers([], s), g) for s, g in zip(scores, texts)])
    return Row(name, values, nll, seconds, kept, merge, answers)


def constant(task, people=40):
    values = {"MAE": torch.full((people,), 1.25), "accuracy": torch.full((people,), 0.2)}
    return Row("global constant", values, None, 0.0, 0.0, None)


def comparison_of(task, gain=0.3, oppu=-0.3, people=40, queries=8):
    merge = Merge(torch.arange(3).expand(people, 3).contiguous(), torch.tensor([[0.5, 0.2, 0.05]]).repeat(people, 1))
    size = {"people": people, "queries": queries}
    rows = [
        constant(task, people),
        rated(task, "task LoRA", **size),
        rated(task, "OPPU", gain=oppu, seconds=412.0, kept=9.77e6, seed=2, **size),
        rated(task, "MTA", gain=gain, seconds=3.04, kept=1.22e6, merge=merge, seed=3, **size),
    ]
    return Comparison(task, rows)


@pytest.fixture
def comparison(task):
    return comparison_of(task)
