"""The final screen of ``mta demo``, judged at a glance: two people before and after, four scores, what to do next."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mta.evaluation.reports.summary import POOLED, verdict
from mta.evaluation.reports.tables import show_scores
from mta.evaluation.sample_answers import Answer, PersonAnswers, SampleAnswers
from mta.evaluation.statistics import Comparison

_BLOCKS = " ▁▂▃▄▅▆▇█"
_TITLE = 26  # characters of a question or a shot


def show_glance(
    comparison: Comparison, samples: SampleAnswers | None, commands: Sequence[str], console: Console
) -> None:
    """Print what people gave before, the answers of the pooled model and of their own, scores, and commands."""
    if samples:
        _show_people(samples, console)
    show_scores(comparison, console)
    measure = comparison.yardstick
    for sentence in verdict(comparison):
        if sentence.startswith(f"{measure}: "):
            console.print(f"[bold]->[/] {escape(sentence.removeprefix(f'{measure}: '))}", highlight=False)
    console.print("\n[bold]Next[/]", highlight=False)
    for command in commands:
        console.print(f"  {command}", highlight=False, markup=False, soft_wrap=True)


def _show_people(samples: SampleAnswers, console: Console) -> None:
    shares = [one for own in (samples.pooled, *(person.answers for person in samples.people)) for one in own]
    most = max((share for one in shares if not isinstance(one, str) for share in one.values()), default=1.0)
    for person in samples.people:
        console.print(f"\n[bold]Person {escape(person.id)}[/], {escape(person.about)}:", highlight=False)
        for line in before(person, samples.labels):
            console.print(line, highlight=False, markup=False, no_wrap=True, overflow="ellipsis")
        console.print(_answers(samples, person, most))
    bars = " Bars: the probability of each answer." if most < 1.0 else ""
    console.print(
        f"Pooled model: the {POOLED}, one model for all. The person's model mixes the bank's LoRAs with "
        f"weights that fit this person's items.{bars}",
        style="dim",
        highlight=False,
    )


def before(person: PersonAnswers, labels: Sequence[str]) -> list[str]:
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


def _answers(samples: SampleAnswers, person: PersonAnswers, most: float) -> Table:
    made = Table(box=None, padding=(0, 2), pad_edge=True)
    shares = [one for two in (samples.pooled, person.answers) for one in two if not isinstance(one, str)]
    scale = "".join(label[0] for label in samples.labels) if 0 < len(samples.labels) <= 9 else ""
    numbers = any(samples.mean(one) is not None for one in shares)
    for title in ("pooled model", f"person {person.id}"):
        if not made.columns:
            made.add_column("")
        made.add_column(escape(f"{title} {scale}".strip()), justify="right" if shares else "left", header_style="dim")
        if numbers:
            made.add_column("mean", justify="right", header_style="dim")
    for question, pooled, own in zip(samples.questions, samples.pooled, person.answers):
        cells = [escape(_short(question))]
        for answer in (pooled, own):
            mean = samples.mean(answer)
            cells += [escape(bars(answer, samples.labels, most)), *([f"{mean:.1f}"] if mean is not None else [])]
        made.add_row(*cells)
    return made


def _short(text: str, most: int = _TITLE) -> str:
    words = " ".join(text.split())
    return words if len(words) <= most else f"{words[: most - 1]}…"
