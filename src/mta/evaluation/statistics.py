"""Compare methods over people: means, bootstrap intervals, paired differences, and corrections for many of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mta.config.constants import NOTICEABLE
from mta.data.tasks.task import Task
from mta.errors import InputError
from mta.evaluation.metrics import COLUMNS, Answers, PersonScore
from mta.personalize.merge import Merge
from mta.system.units import student_t


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over people and its 95% interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True, slots=True)
class Resampled:
    """A mean over ``count`` independent units, and the means of ``draws`` (T,) bootstrap samples of them."""

    mean: float
    draws: Tensor
    count: int

    def interval(self, level: float = 0.95) -> Interval:
        """Return the mean with the central interval that holds this share of the draws."""
        tail = round((1 - level) / 2, 12)
        low, high = torch.quantile(self.draws, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
        return Interval(self.mean, low, high)

    @property
    def p(self) -> float:
        """Two-sided p-value of "the mean is zero": twice the share of draws on the rarer side of zero.

        It is never below that of the units' signs, because draws from a few units on one side never reach zero.
        """
        rarer = min(int((self.draws <= 0).sum()), int((self.draws >= 0).sum()))
        return min(max(2 * (rarer + 1) / (len(self.draws) + 1), 2.0 ** (1 - self.count)), 1.0)


@dataclass(slots=True)
class Row:
    """One method: every person's metrics with each of S seeds, the cost, and the last seed's merge and answers."""

    name: str
    people: dict[str, Tensor]  # metric -> (S, U), or (U,) for one seed
    nll: list[Tensor] | None  # for each person (queries,), averaged over seeds
    seconds: float
    bytes_per_person: float
    merge: Merge | None = None
    answers: Sequence[Answers] = field(repr=False, default=())
    prompt_tokens: float = 0.0  # per question

    @classmethod
    def of(
        cls,
        name: str,
        seeds: Sequence[Sequence[PersonScore]],
        seconds: float,
        stored: float,
        merge: Merge | None = None,
        answers: Sequence[Answers] = (),
        prompt_tokens: float = 0.0,
    ) -> Row:
        """Return the row of the scores with each of ``seeds``, which hold the same people in the same order."""
        people = {
            metric: torch.tensor([[p.metrics[metric] for p in scores] for scores in seeds], dtype=torch.float64)
            for metric in seeds[0][0].metrics
            if all(metric in p.metrics for scores in seeds for p in scores)  # some results may be of earlier versions
        }
        known = [[person.nll for person in scores if person.nll is not None] for scores in seeds]
        complete = all(len(scores) == len(seeds[0]) for scores in known)
        nll = [torch.stack(scores).mean(0) for scores in zip(*known)] if complete else None
        return cls(name, people, nll, seconds, stored, merge, answers, prompt_tokens)


@dataclass(frozen=True, slots=True)
class Comparison:
    """The rows of all methods, measured on the same people.

    ``groups`` has a name for each person: people who share items have the same name. A group is resampled as a whole.
    Without ``groups``, all people are independent.
    """

    task: Task
    rows: list[Row]
    groups: tuple[str, ...] = ()

    @property
    def primary(self) -> str:
        """The primary metric of the task."""
        return COLUMNS[self.task.metric][0]

    @property
    def yardstick(self) -> str:
        """The metric for differences: NLL, the most sensitive, or the primary metric if no method has an NLL."""
        return "NLL" if any("NLL" in row.people for row in self.rows) else self.primary

    @property
    def names(self) -> list[str]:
        return [row.name for row in self.rows]

    @property
    def people(self) -> int:
        """The number of tested people."""
        return next(iter(self.rows[0].people.values())).shape[-1]

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
        """Return the paired difference over people, ``name`` minus ``reference``; None as for ``resampled``."""
        found = self.resampled(name, reference, metric)
        return None if found is None else found.interval()

    def resampled(self, name: str, reference: str, metric: str, times: int = 10_000) -> Resampled | None:
        """Return ``times`` draws of the paired difference over people and seeds, ``name`` minus ``reference``.

        None if they are the same, if one was not run, or if one has no such metric.
        """
        if name == reference or not {name, reference} <= set(self.names):
            return None
        one, other = self.row(name).people.get(metric), self.row(reference).people.get(metric)
        return None if one is None or other is None else resample(one - other, times=times, groups=self.groups)

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
        worse = [ours - theirs for ours, theirs in zip(one, other) if float((ours - theirs).mean()) > NOTICEABLE]
        # A single query gives no interval.
        clearly = [d for d in worse if len(d) > 1 and d.mean() > d.std() / len(d) ** 0.5 * student_t(len(d))]
        return len(worse) / len(one), None if self.queries_each == 1 else len(clearly) / len(one)


def bootstrap(values: Tensor, seed: int = 0, times: int = 10_000, groups: Sequence[str] = ()) -> Interval:
    """Return the mean of values (U,) or (S, U) and its 95% interval; arguments as for ``resample``."""
    return resample(values, seed, times, groups).interval()


def resample(values: Tensor, seed: int = 0, times: int = 10_000, groups: Sequence[str] = ()) -> Resampled:
    """Resample people with replacement, and at a second level weight their S seeds; values are (U,) or (S, U).

    People of one group are drawn together, because they are not independent. The group "" is a person alone.
    A draw weights seeds alike for all people: a seed is a bank, which they share. Two or three seeds are too few to be
    resampled: the weighted mean varies like Student's t with S - 1 degrees of freedom, so that few seeds say little.
    """
    values = values.double().reshape(-1, values.shape[-1])
    unit = torch.tensor(units(groups, values.shape[1]))
    sizes = torch.bincount(unit)
    seeds, count = len(values), len(sizes)
    sums = torch.zeros(seeds, count, dtype=torch.float64).index_add_(1, unit, values)
    generator = torch.Generator().manual_seed(seed)
    at_once = max(2**24 // count, 1)  # never more than 128 MiB of draws
    means = []
    for done in range(0, times, at_once):
        now = min(at_once, times - done)
        drawn = torch.randint(count, (now, count), generator=generator)
        own = sums
        if seeds > 1:
            own = _seed_weights(now, seeds, generator) @ sums
        people = sizes[drawn].sum(1) if count < values.shape[1] else count
        means.append(own.expand(now, -1).gather(1, drawn).sum(1) / people)
    return Resampled(float(values.mean()), torch.cat(means), count)


def _seed_weights(draws: int, seeds: int, generator: torch.Generator) -> Tensor:
    """Return weights (draws, S) that sum to 1; the weighted mean of S values varies like t times its standard error."""
    normal = torch.randn(draws, seeds, generator=generator, dtype=torch.float64)
    away = (normal - normal.mean(1, keepdim=True)) / (seeds * (seeds - 1)) ** 0.5
    variance = torch.randn(draws, seeds - 1, generator=generator, dtype=torch.float64).square().mean(1, keepdim=True)
    return 1 / seeds + away / variance.sqrt()


def units(groups: Sequence[str], people: int) -> list[int]:
    """Return the number of each person's independent unit, a group or a single person, in order of appearance."""
    numbers: dict[str | int, int] = {}
    names = groups or [""] * people
    return [numbers.setdefault(name or person, len(numbers)) for person, name in enumerate(names)]
