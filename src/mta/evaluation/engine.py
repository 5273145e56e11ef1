"""Run methods on a panel and score their answers: the one engine behind comparisons and experiments."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mta.errors import InputError
from mta.evaluation.methods import Method
from mta.evaluation.metrics import PersonScore, measure
from mta.evaluation.protocol import Outcome, Panel
from mta.evaluation.statistics import Comparison, Row


def run_method(panel: Panel, method: Method, seed: int) -> tuple[Outcome, list[PersonScore]]:
    """Return a method's outcome and each person's score. The same method and seed is computed once per panel."""
    outcome = method.outcome(panel, seed)
    pairs = zip(outcome.answers, panel.golds)
    return outcome, [measure(panel.task, answers, golds, panel.write_texts) for answers, golds in pairs]


def evaluate(
    panel: Panel, methods: Sequence[Method], seeds: Sequence[int] = (0,), on_method: Callable[[str], None] | None = None
) -> Comparison:
    """Run every method with every seed on the panel; a person's metrics are averaged over seeds first."""
    if len({method.name for method in methods}) < len(methods):
        raise InputError(
            f"methods must have different names, got {', '.join(method.name for method in methods)}",
            hint="Give one of them another:  name=…",
        )
    _ = panel.jobs  # no method's seconds include tokenizing
    rows = []
    for method in methods:
        if on_method:
            on_method(method.name)
        runs = [run_method(panel, method, seed) for seed in (seeds if method.seeded else seeds[:1])]
        seconds, last = sum(outcome.seconds for outcome, _ in runs) / len(runs), runs[-1][0]
        scores = [people for _, people in runs]
        rows.append(Row.of(method.name, scores, seconds, last.bytes_per_person, last.merge, last.answers))
    return Comparison(panel.task, rows, tuple(person.group for person in panel.people))
