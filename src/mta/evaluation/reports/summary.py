"""A comparison in sentences: which differences are clear, which are not, and how many people are worse off."""

from __future__ import annotations

from typing import Literal

from mta.evaluation.metrics import BETTER_LOW
from mta.evaluation.reports.figures import human_bytes
from mta.evaluation.statistics import WORSE, Comparison, Interval, better, units

Judgement = Literal["better", "worse", "unclear"]

FEW = 20  # bootstrap intervals over fewer people are too narrow
MEANING = {
    "MAE": "the mean distance from the true rating",
    "accuracy": "the share of right answers",
    "ROUGE-L": "the overlap in words with the true text, in their order",
    "NLL": "the surprise at the true answer, in nats",
}


def verdict(comparison: Comparison, name: str = "MTA", reference: str = "task LoRA", rival: str = "OPPU") -> list[str]:
    """Return what the comparison shows about ``name``, in sentences that need no knowledge of the method."""
    return [sentence for _, sentence in findings(comparison, name, reference, rival)]


def findings(comparison: Comparison, name: str, reference: str, rival: str) -> list[tuple[str, str]]:
    """Return the sentences of ``verdict``, each with its judgement or subject: ``better``, ``storage``, ..."""
    names = names_of(comparison)
    if name not in names:
        return [("", f"{name} is not among the methods compared.")]
    said: list[tuple[str, str]] = []
    metrics = dict.fromkeys((comparison.primary, yardstick(comparison)))
    for other, called in ((reference, f"the pooled model ({reference})"), (rival, rival)):
        if other in names and other != name:
            said += [found for metric in metrics if (found := _compared(comparison, name, other, called, metric))]
    if reference in names and (harm := _harm(comparison, name, reference)):
        said.append(harm)
    if rival in names:
        ours, theirs = (human_bytes(comparison.row(n).bytes_per_person) for n in (name, rival))
        said.append(("storage", f"Kept per person: {ours} by {name}, {theirs} by {rival}."))
    explained = "; ".join(f"{m} is {MEANING[m]} ({_direction(m)} is better)" for m in metrics if m in MEANING)
    if (count := units_in(comparison)) < FEW:
        what = "people" if count == people_in(comparison) else "independent groups of people"
        said.append(("caution", f"Only {count} {what} were tested: the intervals are too narrow to be trusted."))
    return [*said, ("words", f"{explained}.")]


def headline(comparison: Comparison, name: str, reference: str) -> str:
    """Return one sentence about ``name`` and the pooled model."""
    if not {name, reference} <= set(names_of(comparison)):
        return "Methods compared"
    words = {"better": "better in", "worse": "worse in", "unclear": "no clear difference in"}
    said: dict[str, list[str]] = {}
    for metric in dict.fromkeys((comparison.primary, yardstick(comparison))):
        if difference := comparison.difference(name, reference, metric):
            said.setdefault(words[judge(metric, difference, units_in(comparison))], []).append(metric)
    return f"{name} against the pooled model: " + ", ".join(f"{w} {' and '.join(m)}" for w, m in said.items())


def yardstick(comparison: Comparison) -> str:
    """Return the metric for differences: NLL, the most sensitive, or the primary metric if no method has an NLL."""
    return "NLL" if any("NLL" in row.people for row in comparison.rows) else comparison.primary


def judge(metric: str, difference: Interval, units: int) -> Judgement:
    """Return whether a paired difference excludes zero, and its direction. One person or group is never enough."""
    turned = Interval(-difference.mean, -difference.high, -difference.low)
    if units < 2 or not (better(metric, difference) or better(metric, turned)):
        return "unclear"
    return "better" if better(metric, difference) else "worse"


def worse_off(comparison: Comparison, name: str, reference: str) -> tuple[float, float | None] | None:
    """As ``Comparison.worse_off``. With one question per person, the *clearly* worse-off share is None."""
    shares = comparison.worse_off(name, reference)
    return (shares[0], None) if shares and queries_each(comparison) == 1 else shares


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


def _compared(comparison: Comparison, name: str, other: str, called: str, metric: str) -> tuple[str, str] | None:
    difference = comparison.difference(name, other, metric)
    if difference is None:
        return None
    judgement = judge(metric, difference, units_in(comparison))
    gain, low, high = difference.mean, difference.low, difference.high
    if metric in BETTER_LOW:
        gain, low, high = -gain, -high, -low
    if judgement == "unclear":
        mean, start, end = (f"{abs(x):.3f} {'better' if x > 0 else 'worse'}" for x in (gain, low, high))
        said = f"no clear difference between {name} and {called}"
        return judgement, f"{metric}: {said}; {name} is {mean} on average, with a 95% interval from {start} to {end}."
    least, most = (low, high) if judgement == "better" else (-high, -low)
    by = f"{abs(gain):.3f} (95% interval {least:.3f} to {most:.3f})"
    return judgement, f"{metric}: {name} is {judgement} than {called} by {by}."


def _harm(comparison: Comparison, name: str, reference: str) -> tuple[str, str] | None:
    shares = worse_off(comparison, name, reference)
    if shares is None:
        return None
    people = people_in(comparison)
    share, clearly = (None if s is None else round(s * people) for s in shares)
    said = f"{share} of {people} people are worse off with {name} than with the pooled model"
    said += f" (NLL higher by more than {WORSE:g})"
    sure = "" if clearly is None else f", {clearly} of them clearly (their own 95% interval lies above zero)"
    return "risk", f"{said}{sure}."


def _direction(metric: str) -> str:
    return "lower" if metric in BETTER_LOW else "higher"
