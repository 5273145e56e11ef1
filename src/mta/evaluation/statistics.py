"""Running the methods and comparing them: means over people, bootstrap intervals, paired differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mta.data.tasks.task import Task
from mta.errors import InputError
from mta.evaluation.methods import Method
from mta.evaluation.metrics import BETTER_LOW, Answers, measure, primary, query_nll
from mta.evaluation.protocol import Panel
from mta.personalize.merge import Merge
from mta.system.extras import require

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
    nll: list[Tensor] | None  # for each person (queries,), averaged over seeds
    seconds: float
    bytes_per_person: float
    merge: Merge | None
    answers: list[Answers] = field(repr=False, default_factory=list)


@dataclass(frozen=True, slots=True)
class Comparison:
    """All rows over the same people.

    ``groups`` names each person's group of people who share items, in the order of the rows' people. A group is
    resampled as a whole; without ``groups`` all people are independent.
    """

    task: Task
    rows: list[Row]
    groups: tuple[str, ...] = ()

    @property
    def primary(self) -> str:
        """The metric named beforehand."""
        return primary(self.task)

    def row(self, name: str) -> Row:
        """A method's row. Raises InputError if there is none."""
        for row in self.rows:
            if row.name == name:
                return row
        raise InputError(
            f"no method {name!r} in the comparison; there are {', '.join(row.name for row in self.rows)}",
            hint="Ask for one of them; comparison.rows holds all.",
        )

    def score(self, name: str, metric: str) -> Interval | None:
        """A method's mean over people, or None where the metric does not exist for it."""
        values = self.row(name).people.get(metric)
        return None if values is None else bootstrap(values, groups=self.groups)

    def difference(self, name: str, reference: str, metric: str) -> Interval | None:
        """Paired difference over people, ``name`` minus ``reference``."""
        one, other = self.row(name).people.get(metric), self.row(reference).people.get(metric)
        return None if one is None or other is None else bootstrap(one - other, groups=self.groups)

    def worse_off(self, name: str, reference: str) -> tuple[float, float] | None:
        """Share of people whose NLL is higher by more than 0.02, and of those *clearly* worse off.

        Clearly: the 95% interval of a person's own paired difference over their queries lies above zero too.
        """
        one, other = self.row(name).nll, self.row(reference).nll
        if one is None or other is None:
            return None
        worse, clearly = 0, 0
        for mine, theirs in zip(one, other):
            difference = mine - theirs
            mean, n = float(difference.mean()), len(difference)
            # With a single query nothing can be said about a person.
            error = float(difference.std()) / n**0.5 * student_t(n) if n > 1 else float("inf")
            worse += mean > WORSE
            clearly += mean > WORSE and mean > error
        return worse / len(one), clearly / len(one)


def evaluate(
    panel: Panel, methods: Sequence[Method], seeds: Sequence[int] = (0,), on_method: Callable[[str], None] | None = None
) -> Comparison:
    """Run every method with every seed on the panel; a person's metrics are averaged over seeds first."""
    if len({method.name for method in methods}) < len(methods):
        raise InputError(
            f"methods must have different names, got {', '.join(method.name for method in methods)}",
            hint="Give one of them another:  name=…",
        )
    _ = panel.jobs  # tokenizing is nobody's training time
    rows = []
    for method in methods:
        if on_method:
            on_method(method.name)
        outcomes = [method.run(panel, seed) for seed in (seeds if method.seeded else seeds[:1])]
        measured = [_measured(panel, outcome.answers) for outcome in outcomes]
        people = {metric: torch.stack([m[metric] for m in measured]).mean(0) for metric in measured[0]}
        seconds, last = sum(outcome.seconds for outcome in outcomes) / len(outcomes), outcomes[-1]
        nll = _nll(panel, [outcome.answers for outcome in outcomes])
        rows.append(Row(method.name, people, nll, seconds, last.bytes_per_person, last.merge, last.answers))
    return Comparison(panel.task, rows, tuple(person.group for person in panel.people))


def bootstrap(values: Tensor, seed: int = 0, times: int = 10_000, groups: Sequence[str] = ()) -> Interval:
    """Mean of (U,) values and its 95% interval by resampling people.

    People of one group are drawn together, because they are no independent observations; "" is a person alone.
    """
    values, unit = values.double(), units(groups, len(values))
    count = len(set(unit))
    generator = torch.Generator().manual_seed(seed)
    at_once = max(2**24 // count, 1)  # never more than 128 MiB of draws
    sums, sizes = (torch.zeros(count, dtype=torch.float64) for _ in range(2))
    sums.index_add_(0, torch.tensor(unit), values)
    sizes.index_add_(0, torch.tensor(unit), torch.ones_like(values))
    means = []
    for done in range(0, times, at_once):
        drawn = torch.randint(count, (min(at_once, times - done), count), generator=generator)
        means.append(values[drawn].mean(1) if count == len(values) else sums[drawn].sum(1) / sizes[drawn].sum(1))
    low, high = torch.quantile(torch.cat(means), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(float(values.mean()), low, high)


def units(groups: Sequence[str], people: int) -> list[int]:
    """Number each person's independent unit, a group or a person alone, in order of appearance."""
    numbers: dict[str | int, int] = {}
    names = groups or [""] * people
    return [numbers.setdefault(name or person, len(numbers)) for person, name in enumerate(names)]


def student_t(n: int) -> float:
    """Two-sided 95% quantile of Student's t for the mean of n values."""
    require("eval", "scipy")
    from scipy.stats import t

    return float(t.ppf(0.975, n - 1))


def better(metric: str, difference: Interval) -> bool:
    """Whether a paired difference is an improvement whose interval excludes zero."""
    return difference.high < 0 if metric in BETTER_LOW else difference.low > 0


def _measured(panel: Panel, answers: Sequence[Answers]) -> dict[str, Tensor]:
    task = panel.task
    found = [measure(task, theirs, golds) for theirs, golds in zip(answers, panel.golds)]
    return {metric: torch.tensor([one[metric] for one in found], dtype=torch.float64) for metric in found[0]}


def _nll(panel: Panel, seeds: Sequence[Sequence[Answers]]) -> list[Tensor] | None:
    """Everybody's NLL query by query, averaged over seeds; None for methods without label scores."""
    people = [
        [query_nll(panel.task, answers, golds) for answers in theirs] for theirs, golds in zip(zip(*seeds), panel.golds)
    ]
    told = [[nll for nll in theirs if nll is not None] for theirs in people]
    return [torch.stack(theirs).mean(0) for theirs in told] if all(told) else None
