"""Reports as pages of Markdown and HTML, and a comparison as one HTML page and as JSON.

HTML pages load nothing: no script, no request, pictures inside. A comparison's page and JSON contain no id of a person:
a few people are shown as person A, B and C.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mta.bank.bank import Bank
from mta.config.constants import NOTICEABLE
from mta.evaluation.metrics import COLUMNS
from mta.evaluation.reports import figures
from mta.evaluation.reports.figures import Picture
from mta.evaluation.reports.summary import BANKLESS, OTHER, OURS, POOLED, RIVAL, headline, title_of, verdict
from mta.evaluation.reports.tables import markdown, rows_of
from mta.evaluation.reports.two_people import CALLED, Asked, mean_of
from mta.evaluation.statistics import Comparison, Interval
from mta.system.atomic import write_text
from mta.system.units import human_bytes

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
    others = [name for name in (POOLED, *BANKLESS, RIVAL, OURS) if name in comparison.names]
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
    path: str | Path, comparison: Comparison, bank: Bank, people: Sequence[Asked], meta: Mapping[str, Any]
) -> None:
    """Write a comparison as one HTML page without scripts and without requests. Equal inputs give equal bytes.

    ``people`` are shown with their questions, as person A and B. Only a demo gives them: these are people's texts.
    """
    sentences = "".join(f"- {plain(sentence)}\n" for sentence in verdict(comparison))
    sections = [
        *_gains(comparison),
        *_two_people(people),
        Section("In sentences", sentences),
        _measured(comparison),
        Section("How this was made", _facts(bank, meta)),
    ]
    write_text(Path(path), page(headline(comparison), title_of(comparison), sections))


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


def _gains(comparison: Comparison) -> list[Section]:
    """The picture that a newcomer looks at first: what each model gains over everybody's, and what it costs."""
    # Of ratings, the median answer has the smallest distance to expect; the most probable one's is noisy.
    columns = [m for m in COLUMNS[comparison.task.metric] if m != "MAE"]
    metrics = [*dict.fromkeys((columns[0], *(m for m in columns if m == "accuracy"), comparison.yardstick))]
    rows = dict[str, list[Interval]]()
    for row in [comparison.row(name) for name in (OURS, *BANKLESS, RIVAL, OTHER) if name in comparison.names]:
        known = [d for metric in metrics if (d := comparison.difference(row.name, POOLED, metric))]
        if len(known) == len(metrics):
            cost = f"{human_bytes(row.bytes_per_person)}, {row.seconds / comparison.people:.2g} s"
            rows[f"{row.name}\n{cost}"] = known
    if not rows:
        return []
    text = (
        f"Each model learned from the same items of a person. Zero is the {POOLED}, one model for everybody. Below a "
        "name are the bytes kept and the seconds of training for each person. Lines are 95% intervals over people."
    )
    return [Section("What a model of one's own gains", text, {"gains": figures.gains(rows, metrics)})]


def _two_people(people: Sequence[Asked]) -> list[Section]:
    """Two people's questions with their true answers, and what several models expected."""
    text, pictures = "The two people whose models differ most in content, whatever their true answers.\n\n", {}
    for n, person in enumerate(people):
        name = f"person {chr(ord('A') + n)}"
        gave = "; ".join(f"{plain(text)} {plain(answer)}" for text, answer in person.shots)
        text += f"- {name} gave the answers: {gave}\n"
        found = {CALLED[key]: [mean_of(one) for one in answers] for key, answers in person.answers.items()}
        means = {key: [m for m in values if m is not None] for key, values in found.items() if None not in values}
        if means:  # the answers are numbers
            pictures[f"answers-{n}"] = figures.predictions(name, person.questions, person.golds, person.labels, means)
        else:
            for number, (question, gold) in enumerate(zip(person.questions, person.golds)):
                said = "; ".join(f"{CALLED[key]}: {plain(str(own[number]))}" for key, own in person.answers.items())
                text += f"    - {plain(question)} (true: {plain(gold)}) {said}\n"
    return [Section("Two people, question by question", text, pictures)] if people else []


def _facts(bank: Bank, meta: Mapping[str, Any]) -> str:
    """A list of what a reader needs to judge or repeat the comparison."""
    info = bank.info
    rank, candidates, pooled = info.run.bank.lora.rank, info.members.candidates, info.members.task
    about: dict[str, Any] = {
        **{"command": None, "seed": None, "base": info.base},
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
