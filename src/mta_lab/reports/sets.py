"""Tables over several data sets, in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from mta.evaluation.reports.summary import OURS, POOLED
from mta.evaluation.reports.tables import brackets, markdown, marked
from mta.evaluation.statistics import Interval, Resampled
from mta_lab.experiments.results import Results

DRAWS = 200_000  # of a comparison that is named in advance: its p-value after correction may be small


def overview(many: Sequence[Results]) -> str:
    """Return the main table over data sets: each method's primary metric and its difference to the pooled model.

    Each set's columns are over the people whom all of its methods have.
    """
    found = [(one.name, one.comparison("main") or one.comparison("rivals")) for one in many]
    compared = [(name, comparison) for name, comparison in found if comparison]
    if not compared:
        return ""
    names = list(dict.fromkeys(name for _, c in compared for name in c.names))
    heads, columns = ["method"], [names]
    for data, c in compared:
        measure, known = c.yardstick, c.names
        heads += [f"{data} ({c.people} people): {c.primary}", f"{measure} against {POOLED}", "worse off"]
        columns.append([str(c.score(name, c.primary) or "") if name in known else "" for name in names])
        columns.append([marked(c, measure, name, POOLED) for name in names])
        shares = [c.worse_off(name, POOLED) for name in names]
        columns.append([f"{share[0]:.0%}" if share else "" for share in shares])
    said = (
        "Each set with the seeds that all of its methods have; the main methods over more seeds: each set's page.\n\n"
    )
    return said + markdown(heads, list(zip(*columns)))


def primary(many: Sequence[Results]) -> str:
    """Return a table of the comparisons that the recipes name in advance, corrected for their number; may be empty.

    Those that were not run count, too. Each is over the people and seeds that both methods and the task LoRA have,
    whatever other methods have, in the exhibit with most people, and then most seeds. (People who are trained only to
    measure times have no results of the task LoRA.)
    """
    named = [(results, other) for results in many for other in results.recipe.primary]
    tests = [_widest(results, other) for results, other in named]
    run = [test for test, *_ in filter(None, tests)]
    if not run:
        return ""
    rows, tested = [], iter(corrected(run, len(named)))
    for (results, other), test in zip(named, tests):
        cells = ["", "", "", "not run", ""]
        if test:
            resampled, people, seeds = test
            interval, p = next(tested)
            counts = str(people), str(resampled.count), str(seeds)
            cells = [*counts, f"{interval.mean:+.3f} {brackets(interval)}", f"{p:.4f}" if p >= 1e-4 else "< 0.0001"]
        rows.append([results.name, other, *cells])
    said = (
        f"Corrected for {len(named)} comparisons: intervals cover together with 95% (Bonferroni), p-values are Holm's. "
        f"Measured by NLL where there is one, with {DRAWS:,} draws."
    )
    heads = ["set", f"{OURS} against", "people", "independent", "seeds", "difference", "p"]
    return f"{said}\n\n{markdown(heads, rows)}"


def _widest(results: Results, other: str) -> tuple[Resampled, int, int] | None:
    """Return MTA's difference to another method, people, and seeds; None if one of the two was not run."""
    rows = (OURS, other, POOLED)
    tried = [
        (comparison, comparison.people, len(results.seeds(exhibit, among=rows)))
        for exhibit in ("rivals", "seeds", "main")
        if (comparison := results.comparison(exhibit, among=rows)) and {OURS, other} <= set(comparison.names)
    ]
    if not tried:
        return None
    comparison, people, seeds = max(tried, key=lambda one: one[1:])
    test = comparison.resampled(OURS, other, comparison.yardstick, times=DRAWS)
    return (test, people, seeds) if test else None


def corrected(tests: Sequence[Resampled], planned: int = 0) -> list[tuple[Interval, float]]:
    """Return for each test an interval and a p-value, corrected for the number of tests, or of ``planned`` ones.

    Intervals cover together with 95% (Bonferroni). P-values are Holm's: the i-th smallest of m is
    multiplied by m - i + 1, and is at least as large as the one before. Tests that were not run are the last of the m.
    """
    planned = max(planned, len(tests))
    order = sorted(range(len(tests)), key=lambda n: tests[n].p)
    found: dict[int, float] = {}
    before = 0.0
    for left, n in zip(range(planned, 0, -1), order):
        found[n] = before = max(before, min(left * tests[n].p, 1.0))
    return [(test.interval(1 - 0.05 / planned), found[n]) for n, test in enumerate(tests)]
