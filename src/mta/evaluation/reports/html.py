"""Reports as pages of Markdown and HTML, and a comparison as one HTML page and as JSON.

HTML pages load nothing: no script, no request, pictures inside. A comparison's page and JSON contain no id of a person:
a few people are shown as person A, B and C.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mta.bank.bank import Bank
from mta.config.constants import NOTICEABLE
from mta.data.tasks.task import short
from mta.evaluation.reports import figures
from mta.evaluation.reports.figures import Picture
from mta.evaluation.reports.summary import CHEAP, OURS, POOLED, RIVAL, better_side, headline, title_of, verdict
from mta.evaluation.reports.tables import markdown, rows_of
from mta.evaluation.sample_answers import SampleAnswers
from mta.evaluation.statistics import Comparison
from mta.system.atomic import write_text

# -- any report --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a report: a title, Markdown, and pictures by their file names (without an ending)."""

    title: str
    text: str
    pictures: Mapping[str, Picture] = field(default_factory=dict)


def page(title: str, head: str, sections: Sequence[Section]) -> str:
    """Return the HTML of a report. ``head`` is Markdown. Raw HTML in Markdown is shown as text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markdown_it import MarkdownIt

    renderer = MarkdownIt("js-default").disable(["image", "link", "autolink"])
    pages = Environment(loader=PackageLoader("mta.evaluation.reports", "."), autoescape=True, undefined=StrictUndefined)
    pages.filters["markdown"] = renderer.render
    return pages.get_template("report.html.jinja").render(title=title, head=head, sections=sections)


def plain(text: str) -> str:
    """Escape a text for Markdown, so that any text is shown as it is. White space becomes single spaces."""
    words = re.sub(r"\s+", " ", text).strip()
    words = re.sub(r"([\\`*_\[\]<>|&~]|^[#+=-])", r"\\\1", words)
    return re.sub(r"^(\d+)([.)])", r"\1\\\2", words)


# -- a comparison ------------------------------------------------------------------------------------------------------


def to_json(comparison: Comparison, **meta: Any) -> dict[str, Any]:
    """Return all measurements as JSON values: means, intervals, paired differences, shares of worse-off people, costs.

    ``meta`` describes the run: base, note, data, seed, command. Answers and people are left out.
    """
    others = [name for name in (POOLED, *CHEAP, RIVAL, OURS) if name in comparison.names]
    rows = [
        {
            "name": row.name,
            "metrics": {m: asdict(score) for m in row.people if (score := comparison.score(row.name, m))},
            "differences": {
                other: {m: asdict(d) for m in row.people if (d := comparison.difference(row.name, other, m))}
                for other in others
                if other != row.name
            },
            "worse_off": {
                other: {"share": shares[0], "clearly": shares[1]}
                for other in others
                if (shares := comparison.worse_off(row.name, other))
            },
            "seconds": row.seconds,
            "bytes_per_person": row.bytes_per_person,
            "prompt_tokens": row.prompt_tokens,
        }
        for row in comparison.rows
    ]
    counts = {"people": comparison.people, "queries_per_person": comparison.queries_each}
    if comparison.groups and (independent := comparison.independent) < comparison.people:
        counts["independent_groups"] = independent
    task = {"task": comparison.task.name, "primary": comparison.primary}
    return {"meta": meta, **task, **counts, "verdict": verdict(comparison), "methods": rows}


def write_html(
    path: str | Path,
    comparison: Comparison,
    bank: Bank,
    samples: SampleAnswers | None,
    meta: Mapping[str, Any],
    shown: Sequence[int] = range(3),
) -> None:
    """Write a comparison as one HTML page without scripts and without requests. Equal inputs give equal bytes.

    ``shown``: the places, among the tested people, of person A, B, …; those of ``samples``, in its order.
    """
    head = f"{title_of(comparison)}\n\n"
    head += "".join(f"- {plain(sentence)}\n" for sentence in verdict(comparison))
    sections = [
        _measured(comparison),
        Section(
            "Score against bytes kept per person",
            "The bytes that a method stores for each person to get its score. Vertical lines are 95% intervals.",
            {"bytes": score_over_bytes(comparison)},
        ),
        *_coefficients(comparison, bank, shown, samples),
        *(_before_and_after(samples) if samples else ()),
        Section("How this was made", _facts(bank, meta)),
    ]
    write_text(Path(path), page(headline(comparison), head, sections))


def score_over_bytes(comparison: Comparison) -> Picture:
    """Return the picture of each method's primary metric over the bytes that it stores per person."""
    metric = comparison.primary
    points = [(r.name, r.bytes_per_person, s) for r in comparison.rows if (s := comparison.score(r.name, metric))]
    return figures.scatter(points, f"{metric}, {better_side(metric)} is better")


def _measured(comparison: Comparison) -> Section:
    heads, rows = rows_of(comparison)
    table = markdown([plain(head) for head in heads], [[plain(row[0]), *row[1:]] for row in rows])
    return Section(
        "The comparison",
        "Every method learns from the same few items of each person and answers the same later questions.\n\n"
        f"{table}\n"
        "Means over people. Differences are paired, with 95% intervals in brackets; bold: the interval excludes zero. "
        f"Worse off: people with an NLL more than {NOTICEABLE:g} above that of {POOLED}. "
        "Clearly: people with a 95% interval above zero of their own.\n",
    )


def _coefficients(
    comparison: Comparison, bank: Bank, shown: Sequence[int], samples: SampleAnswers | None
) -> list[Section]:
    """Pictures of some people's coefficients."""
    merge = comparison.row(OURS).merge if OURS in comparison.names else None
    if merge is None:
        return []
    same = "the same as under the questions below" if samples else "the first of the test, not selected"
    text = (
        "The weight of each anchor in a person's model. Of the merge, the weights of all anchors are stored and, with "
        f"the default policy, the gradient that they come from. The people are {same}."
    )
    bars = figures.coefficient_bars(merge, bank.info.items, shown)
    return [Section("Chosen anchors and coefficients", text, {f"coefficients-{n}": bar for n, bar in enumerate(bars)})]


def _before_and_after(samples: SampleAnswers) -> list[Section]:
    """The answers of the pooled model and of some people's models, without the people's ids and items."""
    text = "The pooled model gives all people one answer. The personal models give each person their own.\n\n"
    names = [figures.letter(n) for n in range(len(samples.people))]
    for name, person in zip(names, samples.people):
        counts = Counter(label for _, label in person.shots)
        gave = ", ".join(
            f"{label} ({counts[label]} of {len(person.shots)})" for label in reversed(samples.labels) if counts[label]
        )
        text += f"- {name}, {plain(person.about)}" + (f"; gave before: {plain(gave)}\n" if gave else "\n")
    pictures = {}
    for n, question in enumerate(samples.questions):
        answers = {"pooled model": samples.pooled[n]} | {
            name: one.answers[n] for name, one in zip(names, samples.people)
        }
        text += f"\n**{plain(question)}**\n\n"
        for name, answer in answers.items():
            mean = samples.mean(answer)
            if isinstance(answer, str):
                text += f"- {name}: {plain(answer)}\n"
            elif mean is not None:
                text += f"- {name}: {mean:.1f} on average\n"
        if shares := {name: answer for name, answer in answers.items() if not isinstance(answer, str)}:
            pictures[f"question-{n}"] = figures.shares(shares, f"answer to {short(question, 40)}", "probability", "")
    return [Section("The same questions, before and after", text, pictures)]


def _facts(bank: Bank, meta: Mapping[str, Any]) -> str:
    """A list of what a reader needs to judge or repeat the comparison."""
    info = bank.info
    rank, candidates, pooled = info.run.bank.lora.rank, info.members.candidates, info.members.task
    about: dict[str, Any] = {
        "command": None,
        "seed": None,
        "base": info.base,
        "note": info.base_note,
        "method": "Merge-then-Adapt (arXiv:2511.20072), protocol reconstructed",
        "bank": f"{len(bank)} anchors of rank {rank} out of {candidates} candidates, encoder {info.encoder}; "
        f"task LoRA from {pooled} people",
        **meta,
    }
    names = {"base": "Base model", "note": "About these weights", "terms": "Terms of the data"}
    lines = [
        f"- **{plain(names.get(key, key.replace('_', ' ').capitalize()))}**: {plain(_words(value))}\n"
        for key, value in about.items()
        if value not in (None, "")
    ]
    return "".join(lines)


def _words(value: Any) -> str:
    """A JSON value in one line of text."""
    if isinstance(value, Mapping):
        parts = {key: f"({_words(v)})" if isinstance(v, Mapping) else _words(v) for key, v in value.items()}
        return ", ".join(f"{key} {part}" for key, part in parts.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_words, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
