"""Comparisons as Markdown tables: scores, paired differences with intervals, and numbers of worse-off people."""

from __future__ import annotations

from collections.abc import Sequence

from mta.evaluation.experiments.results import Results
from mta.evaluation.reports.figures import human_bytes
from mta.evaluation.reports.summary import judge, names_of, people_in, units_in, worse_off, yardstick
from mta.evaluation.statistics import Comparison, Interval

POOLED, RIVAL = "task LoRA", "OPPU"


def rows_of(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return the heads and rows of a comparison, one row per method. Empty columns are left out."""
    first, measure = comparison.primary, yardstick(comparison)
    beside = ("MAE (median)", "accuracy", "ROUGE-1")
    extra = [m for m in beside if m != first and any(m in row.people for row in comparison.rows)]
    heads = ["method", first, *extra]
    if measure != first:
        heads.append(measure)
    heads += [f"{metric} against {other}" for metric in dict.fromkeys((measure, first)) for other in (POOLED, RIVAL)]
    heads += ["worse off", "clearly", "s per person", "kept each"]
    rows = [_texts(comparison, row.name, first, measure, extra) for row in comparison.rows]
    filled = [n for n in range(len(heads)) if any(row[n] for row in rows)]
    return [heads[n] for n in filled], [[row[n] for n in filled] for row in rows]


def _texts(comparison: Comparison, name: str, first: str, measure: str, extra: Sequence[str]) -> list[str]:
    row = comparison.row(name)
    texts = [name, *(_mean(comparison.score(name, metric)) for metric in (first, *extra))]
    if measure != first:
        texts.append(_mean(comparison.score(name, measure)))
    names = names_of(comparison)
    for metric in dict.fromkeys((measure, first)):
        for other in (POOLED, RIVAL):
            known = other in names and other != name
            texts.append(marked(comparison, metric, comparison.difference(name, other, metric) if known else None))
    shares = worse_off(comparison, name, POOLED) if POOLED in names and name != POOLED else None
    people = people_in(comparison)
    texts += [f"{shares[0] * people:.0f} of {people}", f"{(shares[1] or 0) * people:.0f}"] if shares else ["", ""]
    return [*texts, f"{row.seconds / people:.2f}", human_bytes(row.bytes_per_person)]


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table. The first column contains names, the others numbers."""
    lines = [heads, ["---", *["--:"] * (len(heads) - 1)], *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def overview(many: Sequence[Results]) -> str:
    """Return the main table over data sets: each method's primary metric and its difference to the pooled model."""
    found = [(one, c) for one in many if (c := one.comparison("main"))]
    if not found:
        return ""
    names = list(dict.fromkeys(row.name for _, c in found for row in c.rows))
    heads = ["method"]
    for one, comparison in found:
        heads += [f"{one.name}: {comparison.primary}", f"{yardstick(comparison)} against {POOLED}", "worse off"]
    rows = []
    for name in names:
        cells = [name]
        for _, comparison in found:
            if name not in names_of(comparison):
                cells += ["", "", ""]
                continue
            score = comparison.score(name, comparison.primary)
            difference = against(comparison, name, yardstick(comparison)) if name != POOLED else None
            shares = worse_off(comparison, name, POOLED) if name != POOLED else None
            cells.append(f"{score.mean:.3f} [{score.low:.3f}, {score.high:.3f}]" if score else "")
            cells += [marked(comparison, yardstick(comparison), difference), f"{shares[0]:.0%}" if shares else ""]
        rows.append(cells)
    return markdown(heads, rows)


def against(comparison: Comparison, name: str, metric: str) -> Interval | None:
    """Return the paired difference to the pooled model; None if one of the two was not run."""
    known = {name, POOLED} <= set(names_of(comparison))
    return comparison.difference(name, POOLED, metric) if known else None


def marked(comparison: Comparison, metric: str, difference: Interval | None) -> str:
    """Return a difference with its interval, in bold if the interval excludes zero."""
    if difference is None:
        return ""
    text = f"{difference.mean:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"
    return text if judge(metric, difference, units_in(comparison)) == "unclear" else f"**{text}**"


def _mean(score: Interval | None) -> str:
    return f"{score.mean:.3f}" if score else ""
