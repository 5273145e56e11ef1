"""The final screen of ``mta demo``, judged at a glance: two people before and after, four scores, what to do next."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mta.evaluation.reports.figures import shortened
from mta.evaluation.reports.summary import verdict
from mta.evaluation.reports.tables import show_scores
from mta.evaluation.reports.two_people import CALLED, Answer, Asked, mean_of
from mta.evaluation.statistics import Comparison

_QUESTIONS = 6  # of a person


def show_glance(comparison: Comparison, people: Sequence[Asked], commands: Sequence[str], console: Console) -> None:
    """Print what two people answered, and what their and other models expected; then scores, and commands."""
    for person in people:
        _show_person(person, console)
    show_scores(comparison, console)
    measure = comparison.yardstick
    for sentence in verdict(comparison):
        if sentence.startswith(f"{measure}: "):
            console.print(f"[bold]->[/] {escape(sentence.removeprefix(f'{measure}: '))}", highlight=False)
    console.print("\n[bold]Next[/]", highlight=False)
    for command in commands:
        console.print(f"  {command}", highlight=False, markup=False, soft_wrap=True)


def _show_person(person: Asked, console: Console) -> None:
    console.print(f"\n[bold]Person {escape(person.id)}[/] gave {len(person.shots)} answers:", highlight=False)
    for line in before(person):
        console.print(line, highlight=False, markup=False, no_wrap=True, overflow="ellipsis")
    console.print("Later answers, and what models of everybody's, their own, and another person's items expect:")
    console.print(predictions(person))


def before(person: Asked) -> list[str]:
    """Return a person's items as lines: for each label, the items that the person gave it to; or three texts."""
    given = {
        label: [shortened(text) for text, own in person.shots if own == label] for label in reversed(person.labels)
    }
    if any(given.values()):
        return [f"  {label}: {', '.join(texts)}" for label, texts in given.items() if texts]
    return [f"  {shortened(text)}  ->  {shortened(own, 48)}" for text, own in person.shots[:3]]


def said(answer: Answer) -> str:
    """Return an answer in a few characters: the expected number, the most likely label, or the text."""
    mean = mean_of(answer)
    if isinstance(answer, str):
        return " ".join(answer.split())
    best = max(answer, key=lambda label: answer[label])
    return f"{best} {answer[best]:.0%}" if mean is None else f"{mean:.1f}"


def predictions(person: Asked, most: int = _QUESTIONS) -> Table:
    """Return the first ``most`` questions with the true answers and those that models expect, and the mean errors."""
    made = Table(box=None, padding=(0, 2), pad_edge=True)
    numbers = bool(person.labels)
    for title in ("", "true", *(CALLED[name] for name in person.answers)):
        made.add_column(title, justify="right" if title and numbers else "left", header_style="dim")
    for n, (question, gold) in enumerate(zip(person.questions[:most], person.golds)):
        answers = [escape(said(given[n])) for given in person.answers.values()]
        made.add_row(escape(shortened(question)), escape(gold if numbers else shortened(gold)), *answers)
    errors = [person.error(name) for name in person.answers]
    if all(error is not None for error in errors):
        count = len(person.questions)
        made.add_row(f"mean error, all {count}", "", *(f"{error:.2f}" for error in errors), style="bold")
    return made
