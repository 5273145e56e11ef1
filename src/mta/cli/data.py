"""``mta data``: count people's items, and print their exact prompts."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer
from typer import Option

from mta.cli import options
from mta.cli.screen import show_json
from mta.data import describe as count
from mta.data.earlier import with_history
from mta.data.history import Item
from mta.data.sharing import connected
from mta.data.tasks import PromptFormat, load_task
from mta.data.tasks import Task as TaskType
from mta.data.tasks.prompt import Example
from mta.errors import PersonNotFound

app = typer.Typer(help="Count people's items, and print their prompts.", no_args_is_help=True)


@app.command()
def describe(
    source: options.Source,
    task: options.Task = None,
    columns: options.Columns = None,
    skip_bad: options.SkipBad = None,
    json: options.Json = False,
) -> None:
    """Count people, items, queries, shared items, times, labels, and people with enough items.

    Example:  mta data describe history.jsonl --task lamp3
    """
    loaded = load_task(task or "text")
    people = options.people_in(source, loaded, columns, skip_bad)
    counts, splits = count.describe(people), count.describe_for_evaluation(people, loaded)
    shared = connected(people, loaded)[1]
    if json:
        return show_json(counts | {"splits": splits, "shared": asdict(shared)})
    able, compared = splits["anchors"], splits["compared"]
    lines = [
        "  ".join(f"{name} {value:,.12g}" for name, value in counts.items()),
        f"with {able['items']} items or more, enough to become anchors of a bank: {able['people']} people",
        f"enough for the {compared['shots']} shots and {compared['queries']} queries of mta compare: "
        f"{compared['people']} people",
        f"people with a time on every item: {splits['people with times']}; the others follow the newest item before "
        "them",
        f"shared items: {shared}",
    ]
    if splits["labels"]:
        lines.append("labels: " + "  ".join(f"{label} {share:.1%}" for label, share in splits["labels"].items()))
    typer.echo("\n".join(lines))


@app.command()
def show(
    source: options.Source,
    words: options.Words = None,
    task: options.Task = None,
    person: Annotated[str | None, Option(help="Person id; default: the first person of the source.")] = None,
    items: Annotated[int, Option(min=1, help="Number of the person's items to print.")] = 3,
    config: options.Config = None,
    columns: options.Columns = None,
    skip_bad: options.SkipBad = None,
    json: options.Json = False,
) -> None:
    """Print a person's exact prompts. The target (the tokens that count in the loss) is between ⟦ and ⟧.

    Example:  mta data show history.jsonl --task lamp3 --person ann
    """
    run = options.settings(config, words, task=task)
    people = options.people_in(source, run.task, columns, skip_bad)
    chosen = next((p for p in people if person in (None, p.id)), None)
    if chosen is None:
        raise PersonNotFound(
            f"no person {person!r} in {source}; expected the id of one of its {len(people)} people",
            hint="Leave out --person to see the first person.",
        )
    from mta.model.base import prompts_of

    prompts, chosen = prompts_of(run), with_history(load_task(run.task), chosen, run.task_lora.history)
    examples = [_shown(prompts, load_task(run.task), item) for item in (*chosen.items, *chosen.queries)[:items]]
    if json:
        return show_json([_as_json(prompts.tokenizer, example) for example in examples])
    decode = prompts.tokenizer.decode
    for example in examples:
        target = f"⟦{decode(list(example.target))}⟧" if example.target else ""
        typer.echo(f"{decode(list(example.prompt))}{target}")
        typer.echo(f"-- {len(example.tokens)} tokens, {len(example.target)} in the target, {example.cut} cut\n")


def _as_json(tokenizer: Any, example: Example) -> dict[str, object]:
    texts = {"prompt": tokenizer.decode(list(example.prompt)), "target": tokenizer.decode(list(example.target))}
    mask = [int(i >= example.target_start) for i in range(len(example.tokens))]
    return texts | {"tokens": example.tokens, "target_mask": mask, "cut": example.cut}


def _shown(prompts: PromptFormat, task: TaskType, item: Item) -> Example:
    """Return an item as a training example, or without an answer as the prompt of a question."""
    if task.has_target(item):
        return prompts.example(task, item)
    return prompts.prompt(task, item, reserve=prompts.answer_tokens(task))
