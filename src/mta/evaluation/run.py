"""Running the methods and comparing them: means over people, bootstrap intervals, paired differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mta.evaluation.methods import Method
from mta.evaluation.metrics import BETTER_LOW, Answers, measure, primary, query_nll
from mta.evaluation.protocol import Panel
from mta.fuse import Merge
from mta.tasks.task import Task

WORSE = 0.02  # nats: less than this is not called a difference


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over people and its 95% interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(slots=True)
class Row:
    """One method: its metrics for every person (averaged over seeds), its cost, and the last seed's merge."""

    name: str
    people: dict[str, Tensor]  # metric -> (U,)
    nll: Tensor | None  # (U, queries), averaged over seeds
    seconds: float
    bytes_per_person: float
    merge: Merge | None
    answers: list[Answers] = field(repr=False, default_factory=list)


@dataclass(frozen=True, slots=True)
class Comparison:
    """All rows over the same people."""

    task: Task
    rows: list[Row]
    seed: int = 0

    @property
    def primary(self) -> str:
        """The metric named beforehand."""
        return primary(self.task)

    def row(self, name: str) -> Row:
        """A method's row."""
        return next(row for row in self.rows if row.name == name)

    def score(self, name: str, metric: str) -> Interval | None:
        """A method's mean over people, or None where the metric does not exist for it."""
        values = self.row(name).people.get(metric)
        return None if values is None else bootstrap(values, self.seed)

    def difference(self, name: str, reference: str, metric: str) -> Interval | None:
        """Paired difference over people, ``name`` minus ``reference``."""
        one, other = self.row(name).people.get(metric), self.row(reference).people.get(metric)
        return None if one is None or other is None else bootstrap(one - other, self.seed)

    def worse_off(self, name: str, reference: str) -> tuple[float, float] | None:
        """Share of people whose NLL is higher by more than 0.02, and of those *clearly* worse off.

        Clearly: the 95% interval of a person's own paired difference over their queries lies above zero too.
        """
        one, other = self.row(name).nll, self.row(reference).nll
        if one is None or other is None:
            return None
        difference = one - other
        mean, error = difference.mean(1), difference.std(1) / difference.shape[1] ** 0.5
        clearly = (mean > WORSE) & (mean - student_t(difference.shape[1]) * error > 0)
        return float((mean > WORSE).double().mean()), float(clearly.double().mean())


def evaluate(
    panel: Panel, methods: Sequence[Method], seeds: Sequence[int] = (0,), on_method: Callable[[str], None] | None = None
) -> Comparison:
    """Run every method with every seed on the panel; a person's metrics are averaged over seeds first."""
    rows = []
    for method in methods:
        if on_method:
            on_method(method.name)
        outcomes = [method.run(panel, seed) for seed in (seeds if _varies(method) else seeds[:1])]
        measured = [_measured(panel, outcome.answers) for outcome in outcomes]
        people = {metric: torch.stack([m[metric] for m in measured]).mean(0) for metric in measured[0]}
        nll = [_nll(panel, outcome.answers) for outcome in outcomes]
        rows.append(
            Row(
                method.name,
                people,
                None if nll[0] is None else torch.stack([n for n in nll if n is not None]).mean(0),
                sum(outcome.seconds for outcome in outcomes) / len(outcomes),
                outcomes[-1].bytes_per_person,
                outcomes[-1].merge,
                outcomes[-1].answers,
            )
        )
    return Comparison(panel.bank.task, rows)


def bootstrap(values: Tensor, seed: int = 0, times: int = 10_000) -> Interval:
    """Mean of (U,) values and its 95% interval by resampling people."""
    values = values.double()
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(values), (times, len(values)), generator=generator)
    means = values[draws].mean(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(float(values.mean()), low, high)


def student_t(n: int) -> float:
    """Two-sided 95% quantile of Student's t for the mean of n values."""
    from scipy.stats import t

    return float(t.ppf(0.975, n - 1))


def better(metric: str, difference: Interval) -> bool:
    """Whether a paired difference is an improvement whose interval excludes zero."""
    return difference.high < 0 if metric in BETTER_LOW else difference.low > 0


def _varies(method: Method) -> bool:
    return hasattr(method, "training") or hasattr(method, "stack") or getattr(method, "settings", None) is not None


def _measured(panel: Panel, answers: Sequence[Answers]) -> dict[str, Tensor]:
    task = panel.bank.task
    found = [measure(task, theirs, golds) for theirs, golds in zip(answers, panel.golds)]
    return {metric: torch.tensor([one[metric] for one in found], dtype=torch.float64) for metric in found[0]}


def _nll(panel: Panel, answers: Sequence[Answers]) -> Tensor | None:
    if answers[0].scores is None:
        return None
    pairs = zip(answers, panel.golds)
    return torch.stack([query_nll(panel.bank.task, a.scores, golds) for a, golds in pairs if a.scores is not None])
