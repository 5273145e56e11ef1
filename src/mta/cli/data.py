"""``mta data``: look at people's items and at the exact prompts made of them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mta.cli.options import Config, Json, SkipBad, Task, Words, settings, show_json

if TYPE_CHECKING:
    from mta.data.history import Person
    from mta.data.tasks import Task as TaskType

app = typer.Typer(help="Look at people's items and at the prompts made of them.", no_args_is_help=True)
Source = Annotated[str, typer.Argument(help="A JSONL, LaMP or Per-Pcs file, a RecBole folder, or movielens-100k.")]


@app.command("describe")
def describe(
    source: Source,
    task: Task = None,
    queries: Annotated[int, typer.Option(min=1, help="How many of a person's last items are asked.")] = 4,
    skip_bad: SkipBad = None,
    json: Json = False,
) -> None:
    """Count people, items and queries; who has enough of them for 1, 4, 8 and 16 shots; shared items; times; labels.

    Example:  mta data describe history.jsonl --task lamp3 --queries 4
    """
    from mta.data.readers import describe as count
    from mta.data.readers import describe_splits
    from mta.data.readers.sharing import CROWD, connected
    from mta.data.tasks import load_task

    asked = load_task(task or "text")
    people = people_in(source, asked, skip_bad)
    found, splits = count(people), describe_splits(people, asked, queries)
    shared = connected(people, asked)[1]
    if json:
        return show_json(found | {"splits": splits, "shared": asdict(shared)})
    typer.echo("  ".join(f"{name} {value:g}" for name, value in found.items()))
    for shots, able in splits["shots"].items():
        typer.echo(f"in a recipe, last {queries} items as queries, the {shots} before them as shots: {able} people")
    typer.echo(f"people with a time on every item: {splits['people with times']}; the others keep the file's order")
    typer.echo(f"shared items: {shared}" if shared.items else "shared items: none")
    if shared.crowded:
        typer.echo(f"not counted as shared: {shared.crowded} items that more than {CROWD} people hold")
    if shared.judged:
        typer.echo(f"not counted as shared: {shared.judged} inputs that several people answer, each in their own way")
    if splits["labels"]:
        typer.echo("labels: " + "  ".join(f"{label} {share:.1%}" for label, share in splits["labels"].items()))


@app.command("show")
def show(
    source: Source,
    words: Words = None,
    task: Task = None,
    person: Annotated[str | None, typer.Option(help="Whose prompts; default: the first person.")] = None,
    items: Annotated[int, typer.Option(min=1, help="How many of their items.")] = 3,
    config: Config = None,
    skip_bad: SkipBad = None,
    json: Json = False,
) -> None:
    """Print a person's exact prompts; what the loss sees (the target mask) stands between ⟦ and ⟧.

    Example:  mta data show history.jsonl --task lamp3 --person ann
    """
    from mta.data.tasks import load_task
    from mta.errors import PersonNotFound
    from mta.model.base import BaseModel

    run = settings(config, words, task=task)
    everybody = people_in(source, run.task, skip_bad)
    chosen = next((p for p in everybody if person in (None, p.id)), None)
    if chosen is None:
        raise PersonNotFound(
            f"nobody in {source} is called {person!r}; there are {len(everybody)} people",
            hint="Leave --person out to see the first one.",
        )
    base = BaseModel.of(run)
    made = [base.prompts.example(load_task(run.task), item) for item in (chosen.items + chosen.queries)[:items]]
    if json:
        mask = [[int(i >= e.target_start) for i in range(len(e.tokens))] for e in made]
        return show_json([{"tokens": e.tokens, "target_mask": m, "cut": e.cut} for e, m in zip(made, mask)])
    for example in made:
        decode = base.tokenizer.decode
        typer.echo(f"{decode(list(example.prompt))}⟦{decode(list(example.target))}⟧")
        typer.echo(f"-- {len(example.tokens)} tokens, {len(example.target)} in the target, {example.cut} cut\n")


def people_in(source: str, task: str | TaskType, skip_bad: Path | None = None) -> list[Person]:
    """Everybody in a file, a folder or a data asset."""
    from mta.data.readers import read_people
    from mta.system.assets import resolve

    return read_people(resolve(source), task, skip_bad=skip_bad)
