"""The final screen of ``mta demo``, judged at a glance: two people before and after, four scores, what to do next."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mta.evaluation.asking import Answer, Asked, Interview
from mta.evaluation.reports.summary import MEANING, NAME, POOLED, better_side, judge, title_of, verdict
from mta.evaluation.reports.tables import marked
from mta.evaluation.statistics import Comparison
from mta.system.units import human_bytes, human_seconds

_BLOCKS = " ▁▂▃▄▅▆▇█"
_TITLE = 26  # characters of a question or a shot
_COLOURS = {"better": "green", "worse": "red", "unclear": "default"}


def show_glance(comparison: Comparison, asked: Interview | None, commands: Sequence[str], console: Console) -> None:
    """Print what people gave before, the answers of the pooled model and of their own, scores, and commands."""
    if asked:
        _show_people(asked, console)
    console.print(f"\n[bold]{title_of(comparison)}[/]; all methods learn from the same items", highlight=False)
    console.print(scores(comparison))
    measure = comparison.yardstick
    console.print(
        f"{measure}: {MEANING.get(measure, '')}; {better_side(measure)} is better. Change: from {POOLED}, with its 95% "
        "interval over people. Harmed: people with an interval of their own above zero. Time: training, all people. "
        "Kept: of each person.",
        highlight=False,
    )
    for sentence in verdict(comparison):
        if sentence.startswith(f"{measure}: "):
            console.print(f"[bold]->[/] {escape(sentence.removeprefix(f'{measure}: '))}", highlight=False)
    console.print("\n[bold]Next[/]", highlight=False)
    for command in commands:
        console.print(f"  {command}", highlight=False, markup=False, soft_wrap=True)


def _show_people(asked: Interview, console: Console) -> None:
    for person in asked.people:
        console.print(f"\n[bold]Person {escape(person.id)}[/], {escape(person.about)}:", highlight=False)
        for line in before(person, asked.labels):
            console.print(line, highlight=False, markup=False, no_wrap=True, overflow="ellipsis")
        console.print(_answers(asked, person))


def before(person: Asked, labels: Sequence[str]) -> list[str]:
    """Return a person's items as lines: for each label, the items that the person gave it to; or three texts."""
    given = {label: [_short(text) for text, own in person.shots if own == label] for label in reversed(labels)}
    if any(given.values()):
        return [f"  gave {label}: {', '.join(texts)}" for label, texts in given.items() if texts]
    return [f"  {_short(text)}  ->  {_short(own, 48)}" for text, own in person.shots[:3]]


def bars(answer: Answer, labels: Sequence[str], most: float = 1.0) -> str:
    """Return a distribution over labels as one block character for each label; another answer as a short text.

    The highest block is a probability of ``most``.
    """
    if isinstance(answer, str):
        return " ".join(answer.split())
    if len(labels) > 9:  # too many to tell apart
        best = max(labels, key=lambda label: answer[label])
        return f"{best} {answer[best]:.0%}"
    return "".join(_BLOCKS[max(1, round(answer[label] / most * (len(_BLOCKS) - 1)))] for label in labels)


def scores(comparison: Comparison) -> Table:
    """Return one line per method: the difference to the pooled model, people worse off, time, and bytes."""
    made = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0, pad_edge=False)
    measure, people = comparison.yardstick, comparison.people
    for title in ("method", measure, "change", "", "harmed", "time", "kept"):
        made.add_column(title, justify="left" if title in ("method", "") else "right", no_wrap=True)
    for row in comparison.rows:
        score = comparison.score(row.name, measure)
        difference = comparison.difference(row.name, POOLED, measure) if row.name != POOLED else None
        said = judge(measure, difference, comparison.independent) if difference else "unclear"
        shares = comparison.worse_off(row.name, POOLED) if row.name != POOLED else None
        made.add_row(
            f"[bold]{row.name}[/]" if row.name == NAME else row.name,
            f"{score.mean:.3f}" if score else "",
            marked(comparison, measure, row.name).replace("**", "") if difference else "",
            f"[{_COLOURS[said]}]{said}[/]" if difference else "",
            f"{shares[1] * people:.0f} of {people}" if shares and shares[1] is not None else "",
            human_seconds(row.seconds),
            human_bytes(row.bytes_per_person),
        )
    return made


def _answers(asked: Interview, person: Asked) -> Table:
    made = Table(box=None, padding=(0, 2), pad_edge=True)
    shares = [one for two in (asked.pooled, person.answers) for one in two if not isinstance(one, str)]
    most = max((share for one in shares for share in one.values()), default=1.0)
    scale = "".join(label[0] for label in asked.labels) if 0 < len(asked.labels) <= 9 else ""
    numbers = any(asked.mean(one) is not None for one in shares)
    for title in ("everybody", f"person {person.id}"):
        if not made.columns:
            made.add_column("")
        made.add_column(escape(f"{title} {scale}".strip()), justify="right" if shares else "left", header_style="dim")
        if numbers:
            made.add_column("mean", justify="right", header_style="dim")
    for question, pooled, own in zip(asked.questions, asked.pooled, person.answers):
        cells = [escape(_short(question))]
        for answer in (pooled, own):
            mean = asked.mean(answer)
            cells += [escape(bars(answer, asked.labels, most)), *([f"{mean:.1f}"] if mean is not None else [])]
        made.add_row(*cells)
    return made


def _short(text: str, most: int = _TITLE) -> str:
    words = " ".join(text.split())
    return words if len(words) <= most else f"{words[: most - 1]}…"
