"""A comparison in sentences: which differences are clear, which are not, and how many people are worse off."""

from __future__ import annotations

from typing import Literal

from mta.bank.calibration.info import ALONE, LABEL_BIAS, NO_HISTORY, OPPU
from mta.config.constants import NOTICEABLE
from mta.evaluation.metrics import BETTER_LOW, MEANING
from mta.evaluation.statistics import Comparison, Interval
from mta.system.units import human_bytes

Judgement = Literal["better", "worse", "unclear"]

OURS, POOLED, RIVAL = "MTA", "task LoRA", OPPU
OTHER = "MTA, other person's shots"
HISTORY = "history in the prompt"  # a pooled model that was trained with earlier items in its prompts
CHEAP = LABEL_BIAS, ALONE  # personal models without a bank
BANKLESS = *CHEAP, HISTORY  # what needs no anchors
FLOOR = "own constant"
FEW = 20  # bootstrap intervals over fewer people are too narrow


def verdict(comparison: Comparison) -> list[str]:
    """Return what the comparison shows about MTA, in sentences that need no knowledge of the method."""
    names, metrics = comparison.names, metrics_of(comparison)
    if OURS not in names:
        return [f"{OURS} is not among the methods compared."]
    said: list[str] = []
    for other, called in (
        (POOLED, f"the {POOLED}"),
        *((name, name) for name in (*BANKLESS, RIVAL)),
        (FLOOR, f"the shares of labels in the person's own items, without any model ({FLOOR})"),
    ):
        for metric in metrics:
            if difference := comparison.difference(OURS, other, metric):
                said.append(_compared(called, metric, difference, comparison.independent))
    for metric in metrics if NO_HISTORY in names else ():
        if difference := comparison.difference(POOLED, NO_HISTORY, metric):
            who = f"the {POOLED} with earlier items in its prompts"
            said.append(_compared("the same without them", metric, difference, comparison.independent, who))
    said += _advice(comparison)
    if shares := comparison.worse_off(OURS, POOLED):
        said.append(_harm(comparison.people, *shares))
    if RIVAL in names:
        ours, theirs = (human_bytes(comparison.row(name).bytes_per_person) for name in (OURS, RIVAL))
        said.append(f"Kept per person: {ours} by {OURS}, {theirs} by {RIVAL}.")
    if (count := comparison.independent) < FEW:
        what = "people" if count == comparison.people else "independent groups of people"
        said.append(f"Only {count} {what} were tested: the intervals are too narrow to be trusted.")
    explained = "; ".join(f"{m} is {MEANING[m]} ({better_side(m)} is better)" for m in metrics if m in MEANING)
    return [*said, f"{explained}."]


def _advice(comparison: Comparison) -> list[str]:
    """Return which rivals make the anchors unnecessary on these data."""
    measure = comparison.yardstick
    rivals = (*BANKLESS, POOLED) if NO_HISTORY in comparison.names else BANKLESS
    known = {name: d for name in rivals if (d := comparison.difference(OURS, name, measure))}
    equal = [name for name, d in known.items() if judge(measure, d, comparison.independent) != "better"]
    who = " and ".join("history in the prompt alone" if name == POOLED else name for name in equal)
    return [f"In {measure}, {OURS} is not clearly better than {who}: without a bank, use that."] if equal else []


def headline(comparison: Comparison) -> str:
    """Return one sentence about MTA and the task LoRA."""
    words = {"better": "better in", "worse": "worse in", "unclear": "no clear difference in"}
    said: dict[str, list[str]] = {}
    for metric in metrics_of(comparison):
        if difference := comparison.difference(OURS, POOLED, metric):
            said.setdefault(words[judge(metric, difference, comparison.independent)], []).append(metric)
    judgements = ", ".join(f"{judgement} {' and '.join(metrics)}" for judgement, metrics in said.items())
    return f"{OURS} against the {POOLED}: {judgements}" if judgements else "Methods compared"


def judge(metric: str, difference: Interval, units: int) -> Judgement:
    """Return whether a paired difference excludes zero, and its direction. One person or group is never enough."""
    if units < 2 or difference.low <= 0 <= difference.high:
        return "unclear"
    return "better" if (difference.high < 0) == (metric in BETTER_LOW) else "worse"


def title_of(comparison: Comparison) -> str:
    """Return the task and the numbers of people, groups, and questions."""
    queries = comparison.queries_each
    each = f", {queries} questions each" if queries else ""
    people, independent = comparison.people, comparison.independent
    groups = f" in {independent} independent groups" if independent < people else ""
    return f"{comparison.task.name}: {people} people{groups}{each}"


def better_side(metric: str) -> str:
    """Return which values of a metric are better: lower or higher."""
    return "lower" if metric in BETTER_LOW else "higher"


def metrics_of(comparison: Comparison) -> list[str]:
    """Return the primary metric, and the one that differences are judged by if it is another."""
    return list(dict.fromkeys((comparison.primary, comparison.yardstick)))


def _compared(called: str, metric: str, difference: Interval, units: int, who: str = OURS) -> str:
    judgement = judge(metric, difference, units)
    gain, low, high = difference.mean, difference.low, difference.high
    if metric in BETTER_LOW:
        gain, low, high = -gain, -high, -low
    if judgement == "unclear" and metric == "NLL" and units > 1 and max(high, -low) < NOTICEABLE:
        interval = f"95% interval from {_said(high)} to {_said(low)}"
        return f"NLL: {who} is as good as {called}, to within {NOTICEABLE:g} ({interval})."
    if judgement == "unclear":
        mean, start, end = map(_said, (gain, low, high))
        said = f"no clear difference between {who} and {called}"
        return f"{metric}: {said}; {who} is {mean} on average, with a 95% interval from {start} to {end}."
    least, most = (low, high) if judgement == "better" else (-high, -low)
    interval = f"95% interval {least:.3f} to {most:.3f}"
    return f"{metric}: {who} is {judgement} than {called} by {abs(gain):.3f} ({interval})."


def _said(gain: float) -> str:
    return f"{abs(gain):.3f} {'better' if gain > 0 else 'worse'}" if gain else "equal"


def _harm(people: int, share: float, clearly: float | None) -> str:
    said = f"{round(share * people)} of {people} people are worse off with {OURS} than with the {POOLED}"
    said += f" (NLL higher by more than {NOTICEABLE:g})"
    if clearly is not None:
        said += f", {round(clearly * people)} of them clearly (their own 95% interval lies above zero)"
    return f"{said}."
