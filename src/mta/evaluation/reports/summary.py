"""A comparison in sentences: which differences are clear, which are not, and how many people are worse off."""

from __future__ import annotations

from typing import Literal

from mta.evaluation.metrics import BETTER_LOW
from mta.evaluation.statistics import WORSE, Comparison, Interval, better, units
from mta.system.units import human_bytes

Judgement = Literal["better", "worse", "unclear"]

NAME, POOLED, RIVAL = "MTA", "task LoRA", "OPPU"
FEW = 20  # bootstrap intervals over fewer people are too narrow
MEANING = {
    "MAE": "the mean distance from the true rating",
    "accuracy": "the share of right answers",
    "ROUGE-L": "the overlap in words with the true text, in their order",
    "NLL": "the surprise at the true answer, in nats",
}


def verdict(comparison: Comparison) -> list[str]:
    """Return what the comparison shows about MTA, in sentences that need no knowledge of the method."""
    return [sentence for _, sentence in findings(comparison)]


def findings(comparison: Comparison) -> list[tuple[str, str]]:
    """Return the sentences of ``verdict``, each with its judgement or subject: ``better``, ``storage``, ..."""
    names, metrics = names_of(comparison), _metrics(comparison)
    if NAME not in names:
        return [("", f"{NAME} is not among the methods compared.")]
    found: list[tuple[str, str]] = []
    for other, called in ((POOLED, f"the pooled model ({POOLED})"), (RIVAL, RIVAL)):
        for metric in metrics:
            if difference := against(comparison, NAME, other, metric):
                judgement = judge(metric, difference, units_in(comparison))
                found.append((judgement, _compared(judgement, called, metric, difference)))
    if shares := worse_off(comparison, NAME, POOLED):
        found.append(("risk", _harm(people_in(comparison), *shares)))
    if RIVAL in names:
        ours, theirs = (human_bytes(comparison.row(name).bytes_per_person) for name in (NAME, RIVAL))
        found.append(("storage", f"Kept per person: {ours} by {NAME}, {theirs} by {RIVAL}."))
    if (count := units_in(comparison)) < FEW:
        what = "people" if count == people_in(comparison) else "independent groups of people"
        found.append(("caution", f"Only {count} {what} were tested: the intervals are too narrow to be trusted."))
    explained = "; ".join(f"{m} is {MEANING[m]} ({better_side(m)} is better)" for m in metrics if m in MEANING)
    return [*found, ("words", f"{explained}.")]


def headline(comparison: Comparison) -> str:
    """Return one sentence about MTA and the pooled model."""
    words = {"better": "better in", "worse": "worse in", "unclear": "no clear difference in"}
    said: dict[str, list[str]] = {}
    for metric in _metrics(comparison):
        if difference := against(comparison, NAME, POOLED, metric):
            said.setdefault(words[judge(metric, difference, units_in(comparison))], []).append(metric)
    found = ", ".join(f"{judgement} {' and '.join(metrics)}" for judgement, metrics in said.items())
    return f"{NAME} against the pooled model: {found}" if found else "Methods compared"


def yardstick(comparison: Comparison) -> str:
    """Return the metric for differences: NLL, the most sensitive, or the primary metric if no method has an NLL."""
    return "NLL" if any("NLL" in row.people for row in comparison.rows) else comparison.primary


def judge(metric: str, difference: Interval, units: int) -> Judgement:
    """Return whether a paired difference excludes zero, and its direction. One person or group is never enough."""
    if units < 2 or difference.low <= 0 <= difference.high:
        return "unclear"
    return "better" if better(metric, difference) else "worse"


def against(comparison: Comparison, name: str, other: str, metric: str) -> Interval | None:
    """Return the paired difference of two methods; None if they are the same, or if one was not run."""
    pair = {name, other} & set(names_of(comparison))
    return comparison.difference(name, other, metric) if len(pair) == 2 else None


def worse_off(comparison: Comparison, name: str, other: str) -> tuple[float, float | None] | None:
    """As ``Comparison.worse_off``, but None as in ``against``. With one question each, the *clear* share is None."""
    if len({name, other} & set(names_of(comparison))) < 2 or not (shares := comparison.worse_off(name, other)):
        return None
    return (shares[0], None) if queries_each(comparison) == 1 else shares


def names_of(comparison: Comparison) -> list[str]:
    """Return the methods in the order of the rows."""
    return [row.name for row in comparison.rows]


def people_in(comparison: Comparison) -> int:
    """Return the number of tested people."""
    return len(next(iter(comparison.rows[0].people.values())))


def units_in(comparison: Comparison) -> int:
    """Return the number of independent units: people who share no items, and groups of people who do."""
    return len(set(units(comparison.groups, people_in(comparison))))


def queries_each(comparison: Comparison) -> int | None:
    """Return the number of questions per person; None if it differs or is unknown."""
    for row in comparison.rows:
        if row.nll is not None:
            return len(row.nll[0]) if len({len(theirs) for theirs in row.nll}) == 1 else None
    return next((len(row.answers[0].texts) for row in comparison.rows if row.answers), None)


def title_of(comparison: Comparison) -> str:
    """Return the task and the numbers of people, groups, and questions."""
    queries = queries_each(comparison)
    each = f", {queries} questions each" if queries else ""
    people, independent = people_in(comparison), units_in(comparison)
    groups = f" in {independent} independent groups" if independent < people else ""
    return f"{comparison.task.name}: {people} people{groups}{each}"


def better_side(metric: str) -> str:
    """Return which values of a metric are better: lower or higher."""
    return "lower" if metric in BETTER_LOW else "higher"


def _metrics(comparison: Comparison) -> list[str]:
    return list(dict.fromkeys((comparison.primary, yardstick(comparison))))


def _compared(judgement: Judgement, called: str, metric: str, difference: Interval) -> str:
    gain, low, high = difference.mean, difference.low, difference.high
    if metric in BETTER_LOW:
        gain, low, high = -gain, -high, -low
    if judgement == "unclear":
        mean, start, end = (f"{abs(x):.3f} {'better' if x > 0 else 'worse'}" for x in (gain, low, high))
        said = f"no clear difference between {NAME} and {called}"
        return f"{metric}: {said}; {NAME} is {mean} on average, with a 95% interval from {start} to {end}."
    least, most = (low, high) if judgement == "better" else (-high, -low)
    interval = f"95% interval {least:.3f} to {most:.3f}"
    return f"{metric}: {NAME} is {judgement} than {called} by {abs(gain):.3f} ({interval})."


def _harm(people: int, share: float, clearly: float | None) -> str:
    said = f"{round(share * people)} of {people} people are worse off with {NAME} than with the pooled model"
    said += f" (NLL higher by more than {WORSE:g})"
    if clearly is not None:
        said += f", {round(clearly * people)} of them clearly (their own 95% interval lies above zero)"
    return f"{said}."
