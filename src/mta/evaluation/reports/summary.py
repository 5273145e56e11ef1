"""A comparison in plain sentences: what is clearly better or worse, what is not clear, and who pays for it."""

from __future__ import annotations

from typing import Literal

from mta.evaluation.metrics import BETTER_LOW
from mta.evaluation.reports.figures import human_bytes
from mta.evaluation.statistics import WORSE, Comparison, Interval, better, units

Judgement = Literal["better", "worse", "unclear"]

FEW = 20  # fewer people than this, and a bootstrap interval is too narrow to be trusted
MEANING = {
    "MAE": "the mean distance from the true rating",
    "accuracy": "the share of right answers",
    "ROUGE-L": "the overlap in words with the true text, in their order",
    "NLL": "the surprise at the true answer, in nats",
}


def verdict(comparison: Comparison, name: str = "MTA", reference: str = "task LoRA", rival: str = "OPPU") -> list[str]:
    """What the comparison says about ``name``, in sentences for a newcomer; honest where nothing is clear."""
    return [sentence for _, sentence in findings(comparison, name, reference, rival)]


def findings(comparison: Comparison, name: str, reference: str, rival: str) -> list[tuple[str, str]]:
    """The sentences of ``verdict``, each with its judgement, or a word for what it is about."""
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
        said.append(("caution", f"Only {count} {what} were tested: take every interval with a grain of salt."))
    return [*said, ("words", f"{explained}.")]


def headline(comparison: Comparison, name: str, reference: str) -> str:
    """The shortest true sentence about ``name`` and the pooled model."""
    if not {name, reference} <= set(names_of(comparison)):
        return "Methods compared"
    words = {"better": "better in", "worse": "worse in", "unclear": "no clear difference in"}
    said: dict[str, list[str]] = {}
    for metric in dict.fromkeys((comparison.primary, yardstick(comparison))):
        if difference := comparison.difference(name, reference, metric):
            said.setdefault(words[judge(metric, difference, units_in(comparison))], []).append(metric)
    return f"{name} against the pooled model: " + ", ".join(f"{w} {' and '.join(m)}" for w, m in said.items())


def yardstick(comparison: Comparison) -> str:
    """The metric differences are judged in: NLL, the most sensitive, or the primary one where there is none."""
    return "NLL" if any("NLL" in row.people for row in comparison.rows) else comparison.primary


def judge(metric: str, difference: Interval, units: int) -> Judgement:
    """Whether a paired difference excludes zero, and in which direction. One person, or one group, decides nothing."""
    turned = Interval(-difference.mean, -difference.high, -difference.low)
    if units < 2 or not (better(metric, difference) or better(metric, turned)):
        return "unclear"
    return "better" if better(metric, difference) else "worse"


def worse_off(comparison: Comparison, name: str, reference: str) -> tuple[float, float | None] | None:
    """As ``Comparison.worse_off``; from one question each, nobody can be called *clearly* worse off."""
    shares = comparison.worse_off(name, reference)
    return (shares[0], None) if shares and queries_each(comparison) == 1 else shares


def names_of(comparison: Comparison) -> list[str]:
    """The methods, in the order of the rows."""
    return [row.name for row in comparison.rows]


def people_in(comparison: Comparison) -> int:
    """How many people were tested."""
    return len(next(iter(comparison.rows[0].people.values())))


def units_in(comparison: Comparison) -> int:
    """How many independent units were tested: people who share no items, and groups of those who do."""
    return len(set(units(comparison.groups, people_in(comparison))))


def queries_each(comparison: Comparison) -> int | None:
    """How many questions everybody was asked, where it is known."""
    for row in comparison.rows:
        if row.nll is not None:
            return len(row.nll[0]) if len({len(theirs) for theirs in row.nll}) == 1 else None
    return next((len(row.answers[0].texts) for row in comparison.rows if row.answers), None)


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
