"""Compare methods over people: means, bootstrap intervals, and paired differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mta.data.tasks.task import Task
from mta.errors import InputError
from mta.evaluation.metrics import BETTER_LOW, PRIMARY, Answers, PersonScore
from mta.personalize.merge import Merge
from mta.system.extras import require

WORSE = 0.02  # nats; smaller differences do not count


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
    """One method: every person's metrics (averaged over seeds), the cost, and the last seed's merge and answers."""

    name: str
    people: dict[str, Tensor]  # metric -> (U,)
    nll: list[Tensor] | None  # for each person (queries,), averaged over seeds
    seconds: float
    bytes_per_person: float
    merge: Merge | None = None
    answers: Sequence[Answers] = field(repr=False, default=())

    @classmethod
    def of(
        cls,
        name: str,
        seeds: Sequence[Sequence[PersonScore]],
        seconds: float,
        stored: float,
        merge: Merge | None = None,
        answers: Sequence[Answers] = (),
    ) -> Row:
        """Average the scores of each person over ``seeds``, which hold the same people in the same order."""
        people = {
            metric: torch.tensor([[p.metrics[metric] for p in scores] for scores in seeds], dtype=torch.float64).mean(0)
            for metric in seeds[0][0].metrics
        }
        known = [[person.nll for person in scores if person.nll is not None] for scores in seeds]
        complete = all(len(scores) == len(seeds[0]) for scores in known)
        nll = [torch.stack(scores).mean(0) for scores in zip(*known)] if complete else None
        return cls(name, people, nll, seconds, stored, merge, answers)


@dataclass(frozen=True, slots=True)
class Comparison:
    """All rows over the same people.

    ``groups`` names for each person the group of people who share items with them. A group is resampled as a whole.
    Without ``groups`` all people are independent.
    """

    task: Task
    rows: list[Row]
    groups: tuple[str, ...] = ()

    @property
    def primary(self) -> str:
        """The primary metric of the task."""
        return PRIMARY[self.task.metric]

    @property
    def yardstick(self) -> str:
        """The metric for differences: NLL, the most sensitive, or the primary metric if no method has an NLL."""
        return "NLL" if any("NLL" in row.people for row in self.rows) else self.primary

    @property
    def names(self) -> list[str]:
        """The methods in the order of the rows."""
        return [row.name for row in self.rows]

    @property
    def people(self) -> int:
        """The number of tested people."""
        return len(next(iter(self.rows[0].people.values())))

    @property
    def independent(self) -> int:
        """The number of independent units: people who share no items, and groups of people who do."""
        return len(set(units(self.groups, self.people)))

    @property
    def queries_each(self) -> int | None:
        """The number of questions per person; None if it differs or is unknown."""
        for row in self.rows:
            if row.nll is not None:
                return len(row.nll[0]) if len({len(theirs) for theirs in row.nll}) == 1 else None
        return next((len(row.answers[0].texts) for row in self.rows if row.answers), None)

    def row(self, name: str) -> Row:
        """Return the row of a method. Raises InputError if there is none."""
        rows = {row.name: row for row in self.rows}
        if name not in rows:
            raise InputError(
                f"no method {name!r} in the comparison; there are {', '.join(rows)}",
                hint="Give one of these names; comparison.rows holds all rows.",
            )
        return rows[name]

    def score(self, name: str, metric: str) -> Interval | None:
        """Return a method's mean over people, or None if the method has no such metric."""
        values = self.row(name).people.get(metric)
        return None if values is None else bootstrap(values, groups=self.groups)

    def difference(self, name: str, reference: str, metric: str) -> Interval | None:
        """Return the paired difference over people, ``name`` minus ``reference``.

        None if they are the same, if one was not run, or if one has no such metric.
        """
        if name == reference or not {name, reference} <= set(self.names):
            return None
        one, other = self.row(name).people.get(metric), self.row(reference).people.get(metric)
        return None if one is None or other is None else bootstrap(one - other, groups=self.groups)

    def worse_off(self, name: str, reference: str) -> tuple[float, float | None] | None:
        """Return the share of people whose NLL is higher by more than 0.02 nats, and the share of clearly worse ones.

        Clearly: the 95% interval of the person's paired difference over their queries also lies above zero; None with
        one query each. None altogether as for ``difference``.
        """
        if name == reference or not {name, reference} <= set(self.names):
            return None
        one, other = self.row(name).nll, self.row(reference).nll
        if one is None or other is None:
            return None
        worse = [ours - theirs for ours, theirs in zip(one, other) if float((ours - theirs).mean()) > WORSE]
        # A single query gives no interval.
        clearly = [d for d in worse if len(d) > 1 and d.mean() > d.std() / len(d) ** 0.5 * student_t(len(d))]
        return len(worse) / len(one), None if self.queries_each == 1 else len(clearly) / len(one)


def bootstrap(values: Tensor, seed: int = 0, times: int = 10_000, groups: Sequence[str] = ()) -> Interval:
    """Return the mean of (U,) values and its 95% interval by resampling people.

    People of one group are drawn together, because they are not independent. The group "" is a person alone.
    """
    values, unit = values.double(), torch.tensor(units(groups, len(values)))
    sizes, sums = torch.bincount(unit), torch.bincount(unit, values)
    count = len(sizes)
    generator = torch.Generator().manual_seed(seed)
    at_once = max(2**24 // count, 1)  # never more than 128 MiB of draws
    means = []
    for done in range(0, times, at_once):
        drawn = torch.randint(count, (min(at_once, times - done), count), generator=generator)
        means.append(sums[drawn].sum(1) / sizes[drawn].sum(1))
    low, high = torch.quantile(torch.cat(means), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(float(values.mean()), low, high)


def units(groups: Sequence[str], people: int) -> list[int]:
    """Return the number of each person's independent unit, a group or a single person, in order of appearance."""
    numbers: dict[str | int, int] = {}
    names = groups or [""] * people
    return [numbers.setdefault(name or person, len(numbers)) for person, name in enumerate(names)]


def student_t(n: int) -> float:
    """Return the two-sided 95% quantile of Student's t for the mean of n values."""
    require("eval", "scipy")
    from scipy.stats import t

    return float(t.ppf(0.975, n - 1))


def better(metric: str, difference: Interval) -> bool:
    """Return whether a paired difference is an improvement whose interval excludes zero."""
    return difference.high < 0 if metric in BETTER_LOW else difference.low > 0
