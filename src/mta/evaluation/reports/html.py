"""A comparison as JSON, and as one HTML page that loads nothing.

Neither contains an id of a person: a few people are shown as person A, B and C, the first ones of the comparison.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mta.bank.bank import Bank
from mta.evaluation.metrics import BETTER_LOW
from mta.evaluation.reports import figures
from mta.evaluation.reports.page import Section, page, plain
from mta.evaluation.reports.summary import (
    findings,
    headline,
    names_of,
    people_in,
    queries_each,
    title_of,
    units_in,
    verdict,
    worse_off,
)
from mta.evaluation.reports.tables import POOLED, RIVAL, markdown, rows_of
from mta.evaluation.statistics import WORSE, Comparison, Interval
from mta.system.atomic import write_text

NAME = "MTA"
_FACTS = {
    "command": "Command",
    "seed": "Seed",
    "base": "Base model",
    "note": "About these weights",
    "data": "Data",
    "terms": "Terms of the data",
    "protocol": "Protocol",
    "method": "Method",
    "bank": "Bank",
    "date": "Date",
    "versions": "Versions",
}


def to_json(comparison: Comparison, against: Sequence[str] = (POOLED, RIVAL), **meta: Any) -> dict[str, Any]:
    """Return all measurements as JSON values: means, intervals, paired differences, shares of worse-off people, costs.

    ``meta`` describes the run: base, note, data, seed, command. Answers and people are left out.
    """
    others = [name for name in against if name in names_of(comparison)]
    rows = [
        {
            "name": row.name,
            "metrics": {metric: _interval(comparison.score(row.name, metric)) for metric in row.people},
            "differences": {
                other: {m: _interval(d) for m in row.people if (d := comparison.difference(row.name, other, m))}
                for other in others
                if other != row.name
            },
            "worse_off": {
                other: {"share": shares[0], "clearly": shares[1]}
                for other in others
                if other != row.name and (shares := worse_off(comparison, row.name, other))
            },
            "seconds": row.seconds,
            "bytes_per_person": row.bytes_per_person,
        }
        for row in comparison.rows
    ]
    counts = {"people": people_in(comparison), "queries_per_person": queries_each(comparison)}
    if comparison.groups and (independent := units_in(comparison)) < people_in(comparison):
        counts["independent_groups"] = independent
    task = {"task": comparison.task.name, "primary": comparison.primary}
    return {"meta": dict(meta), **task, **counts, "verdict": verdict(comparison), "methods": rows}


def write_html(
    path: str | Path,
    comparison: Comparison,
    bank: Bank,
    people_vectors: Tensor | None,
    questions: Sequence[Mapping[str, Any]],
    meta: Mapping[str, Any],
) -> None:
    """Write a comparison as one HTML page without scripts and without requests.

    ``people_vectors`` (U, E) are the encodings of the comparison's people in its order, for the map; None leaves the
    map out. The page contains no time but ``meta["date"]``: equal inputs give equal bytes.
    """
    found = findings(comparison, NAME, POOLED, RIVAL)
    head = f"{title_of(comparison)}\n\n"
    head += "".join(f"- {f'**{mark}**: ' if mark else ''}{plain(sentence)}\n" for mark, sentence in found)
    sections = [
        *_measured(comparison),
        *_personal(comparison, bank, people_vectors),
        *_asked(questions),
        Section("How this was made", _facts(bank, meta)),
    ]
    write_text(Path(path), page(headline(comparison, NAME, POOLED), head, sections))


def _measured(comparison: Comparison) -> list[Section]:
    heads, rows = rows_of(comparison)
    lead = "Every method learns from the same few items of each person and answers the same later questions."
    table = markdown([plain(head) for head in heads], [[plain(row[0]), *row[1:]] for row in rows])
    caption = (
        "Means over people. Differences are paired, with 95% intervals in brackets; bold: the interval excludes zero. "
        f"Worse off: people with an NLL more than {WORSE:g} above that of {POOLED}. "
        "Clearly: people with a 95% interval above zero of their own."
    )
    metric = comparison.primary
    points = [
        (row.name, row.bytes_per_person, score)
        for row in comparison.rows
        if (score := comparison.score(row.name, metric))
    ]
    picture = figures.scatter(points, f"{metric}, {'lower' if metric in BETTER_LOW else 'higher'} is better")
    about = "The bytes that a method stores for each person to get its score. Vertical lines are 95% intervals."
    return [
        Section("The comparison", f"{lead}\n\n{table}\n{caption}\n"),
        Section("Score against bytes kept per person", about, {"bytes": picture}),
    ]


def _personal(comparison: Comparison, bank: Bank, people_vectors: Tensor | None) -> list[Section]:
    """Pictures of the bank's anchors and of the first people's coefficients."""
    merge = comparison.row(NAME).merge if NAME in names_of(comparison) else None
    sections = []
    if people_vectors is not None:
        text = (
            "Numbered anchors, all tested people (dots), and the strongest anchors of three people. The map shows two "
            "dimensions of many: points that are close here can be far apart."
        )
        sections.append(
            Section("Map of anchors and people", text, {"map": figures.anchor_map(bank.vectors, people_vectors, merge)})
        )
    if merge:
        text = (
            "The weight of each anchor in a person's model. Of the merge, only these numbers are stored. The people "
            "are the first of the test, not selected."
        )
        bars = figures.coefficient_bars(merge, bank.info.items)
        pictures = {f"coefficients-{n}": bar for n, bar in enumerate(bars)}
        sections.append(Section("Chosen anchors and coefficients", text, pictures))
    return sections


def _asked(questions: Sequence[Mapping[str, Any]]) -> list[Section]:
    if not questions:
        return []
    text = "The pooled model gives all people one answer. The personal models give each person their own.\n"
    for asked in questions:
        text += f"\n**{plain(asked['question'])}**\n\n- before, for everybody: {plain(asked['before'])}\n"
        for label, answer in asked["after"]:
            who = label if label.startswith("person") else f"a person {label}"
            changed = "" if answer == asked["before"] else " (changed)"
            text += f"- after, {plain(who)}: {plain(answer)}{changed}\n"
    return [Section("The same question, before and after", text)]


def _facts(bank: Bank, meta: Mapping[str, Any]) -> str:
    """A list of what a reader needs to judge or repeat the comparison."""
    info = bank.info
    rank, candidates, pooled = info.run.bank.lora.rank, info.members.candidates, info.members.task
    about: dict[str, Any] = {
        "base": info.base,
        "note": info.base_note,
        "method": "Merge-then-Adapt (arXiv:2511.20072), protocol reconstructed",
        "bank": f"{len(bank)} anchors of rank {rank} out of {candidates} candidates, encoder {info.encoder}; "
        f"task LoRA from {pooled} other people",
        **meta,
    }
    known = [key for key in dict.fromkeys([*_FACTS, *about]) if about.get(key) not in (None, "")]
    names = {key: _FACTS.get(key, key.replace("_", " ").capitalize()) for key in known}
    return "".join(f"- **{plain(names[key])}**: {plain(_words(about[key]))}\n" for key in known)


def _words(value: Any) -> str:
    """A JSON value in one line of text."""
    if isinstance(value, Mapping):
        return ", ".join(
            f"{key} ({_words(inner)})" if isinstance(inner, Mapping) else f"{key} {_words(inner)}"
            for key, inner in value.items()
        )
    if isinstance(value, list | tuple):
        return ", ".join(_words(inner) for inner in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _interval(interval: Interval | None) -> dict[str, float] | None:
    return {"mean": interval.mean, "low": interval.low, "high": interval.high} if interval else None
