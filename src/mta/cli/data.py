"""``mta data``: count people's items, and print their exact prompts."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mta.cli.options import Config, Json, SkipBad, Task, Words, settings, show_json

if TYPE_CHECKING:
    from mta.data.history import Person
    from mta.data.tasks import Task as TaskType

app = typer.Typer(help="Count people's items, and print their prompts.", no_args_is_help=True)
Source = Annotated[str, typer.Argument(help="A JSONL, LaMP or Per-Pcs file, a RecBole folder, or movielens-100k.")]


@app.command("describe")
def describe(
    source: Source,
    task: Task = None,
    queries: Annotated[int, typer.Option(min=1, help="Number of each person's last items to use as queries.")] = 4,
    skip_bad: SkipBad = None,
    json: Json = False,
) -> None:
    """Count people, items, queries, shared items, times and labels, and people with enough items for 1 to 16 shots.

    Example:  mta data describe history.jsonl --task lamp3 --queries 4
    """
    from mta.data.readers import describe as count
    from mta.data.readers import describe_splits
    from mta.data.readers.sharing import CROWD, connected
    from mta.data.tasks import load_task

    loaded = load_task(task or "text")
    people = people_in(source, loaded, skip_bad)
    found, splits = count(people), describe_splits(people, loaded, queries)
    shared = connected(people, loaded)[1]
    if json:
        return show_json(found | {"splits": splits, "shared": asdict(shared)})
    typer.echo("  ".join(f"{name} {value:g}" for name, value in found.items()))
    for shots, able in splits["shots"].items():
        typer.echo(f"in a recipe, last {queries} items as queries, the {shots} before them as shots: {able} people")
    typer.echo(
        f"people with a time on every item: {splits['people with times']}; other people's items keep the file's order"
    )
    typer.echo(f"shared items: {shared}" if shared.items else "shared items: none")
    if shared.crowded:
        typer.echo(f"not counted as shared: {shared.crowded} items that more than {CROWD} people have")
    if shared.judged:
        typer.echo(f"not counted as shared: {shared.judged} inputs that several people answer differently")
    if splits["labels"]:
        typer.echo("labels: " + "  ".join(f"{label} {share:.1%}" for label, share in splits["labels"].items()))


@app.command("show")
def show(
    source: Source,
    words: Words = None,
    task: Task = None,
    person: Annotated[str | None, typer.Option(help="Person id; default: the first person of the source.")] = None,
    items: Annotated[int, typer.Option(min=1, help="Number of the person's items to print.")] = 3,
    config: Config = None,
    skip_bad: SkipBad = None,
    json: Json = False,
) -> None:
    """Print a person's exact prompts. The target, the tokens that count in the loss, is between ⟦ and ⟧.

    Example:  mta data show history.jsonl --task lamp3 --person ann
    """
    from mta.data.tasks import load_task
    from mta.errors import PersonNotFound
    from mta.model.base import BaseModel

    run = settings(config, words, task=task)
    people = people_in(source, run.task, skip_bad)
    chosen = next((p for p in people if person in (None, p.id)), None)
    if chosen is None:
        raise PersonNotFound(
            f"no person {person!r} in {source}; expected the id of one of its {len(people)} people",
            hint="Leave out --person to see the first person.",
        )
    base = BaseModel.of(run)
    examples = [base.prompts.example(load_task(run.task), item) for item in (chosen.items + chosen.queries)[:items]]
    if json:
        mask = [[int(i >= e.target_start) for i in range(len(e.tokens))] for e in examples]
        return show_json([{"tokens": e.tokens, "target_mask": m, "cut": e.cut} for e, m in zip(examples, mask)])
    for example in examples:
        decode = base.tokenizer.decode
        typer.echo(f"{decode(list(example.prompt))}⟦{decode(list(example.target))}⟧")
        typer.echo(f"-- {len(example.tokens)} tokens, {len(example.target)} in the target, {example.cut} cut\n")


def people_in(source: str, task: str | TaskType, skip_bad: Path | None = None) -> list[Person]:
    """Return all people of a file, a folder or a data asset."""
    from mta.data.readers import read_people
    from mta.system.assets import resolve

    return read_people(resolve(source), task, skip_bad=skip_bad)
