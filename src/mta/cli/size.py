"""``mta size``: estimate storage, memory and training time for many people."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from mta.cli.options import Config, Json, Words, settings, show_json
from mta.system.units import human_bytes, human_seconds

if TYPE_CHECKING:
    from rich.table import Table

    from mta.tools.cost import Cost, Hardware

People = Annotated[float, typer.Option(min=1, help="Number of people, for example 1e6.")]
Base = Annotated[str, typer.Option(help="Base: a built-in shape (llama-3-8b), an asset, a folder or a hub id.")]
Anchors = Annotated[int | None, typer.Option(min=1, help="Number of anchors in the bank.")]
Rank = Annotated[int | None, typer.Option(min=1, help="Rank of anchors, task LoRA and OPPU's adapters.")]
Tokens = Annotated[float, typer.Option(min=1, help="Tokens per item, with its prompt.")]
Shared = Annotated[float, typer.Option(min=0, help="How many of --tokens are a prefix that all items share.")]
Targets = Annotated[float, typer.Option(min=1, help="How many of --tokens are targets, that is, count in the loss.")]
Shots = Annotated[int, typer.Option(min=1, help="Items per person.")]
Context = Annotated[int, typer.Option(min=1, help="Tokens per served conversation.")]
Picture = Annotated[Path | None, typer.Option(help="Also draw figures: <this>-bytes and <this>-time, as SVG and PNG.")]
On = Annotated[str, typer.Option(help="Hardware: this (measured now), l4, a100 or h100.")]


def size(
    words: Words = None,
    people: People = 1e6,
    base: Base = "llama-3-8b",
    anchors: Anchors = None,
    rank: Rank = None,
    tokens: Tokens = 128,
    shared: Shared = 0,
    targets: Targets = 16,
    shots: Shots = 8,
    context: Context = 1024,
    on: On = "this",
    picture: Picture = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Estimate bytes, memory and hours for a base and a number of people, against OPPU and Per-Pcs. Loads no weights.

    Example:  mta size --people 1e6 --base llama-3-8b --anchors 50 --rank 8 --on h100 --picture size
    """
    from mta.tools import cost as sizing

    given = {"bank.anchors": anchors, "bank.lora.rank": rank, "task_lora.lora.rank": rank}
    run = settings(config, [*(f"{key}={value}" for key, value in given.items() if value), *(words or [])])
    load = sizing.Load(tokens, targets, shots, context, shared)
    shape, machine = sizing.Shape.of(base), sizing.hardware(on)
    costs, memory = sizing.costs(shape, run, load), sizing.memory(shape, run, load)
    if picture:
        _draw(picture, costs, machine)
    if json:
        parts: dict[str, Any] = {"base": shape, "load": load, "hardware": machine, "memory": memory, **costs}
        times = {f"{name}, seconds": _seconds(cost, people, machine) for name, cost in costs.items()}
        return show_json({"people": people} | {name: asdict(part) for name, part in parts.items()} | times)
    say = Console(highlight=False, soft_wrap=True).print
    what = f"{run.bank.anchors} anchors of rank {run.bank.lora.rank}, {run.merge.policy}"
    say(f"{base}: {shape.parameters / 1e9:.2f} billion parameters. {people:,.0f} people, {shots} items each; {what}")
    say(_table(costs, people, machine))
    named = {"base": memory.base, "bank": memory.bank, "each served row": memory.row}
    named |= {"an anchor in training": memory.anchor, "a stack in training": memory.stack}
    named |= {"each token in training": memory.token, "each target token, in addition": memory.target}
    say("Memory: " + ", ".join(f"{name} {human_bytes(size)}" for name, size in named.items()))
    say(f"Hours on {machine.name}: {machine.rate / 1e12:.2f} Tflop/s ({machine.source}), {machine.share:.0%} of it")


def _table(costs: dict[str, Cost], people: float, machine: Hardware) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in ("", "stored once", "per person", "total", "trained once", "per person", "total"):
        table.add_column(head, justify="right" if head else "left")
    for name, cost in costs.items():
        kept = cost.fixed_bytes, cost.person_bytes, cost.fixed_bytes + people * cost.person_bytes
        table.add_row(name, *map(human_bytes, kept), *map(human_seconds, _seconds(cost, people, machine).values()))
    return table


def _draw(path: Path, costs: dict[str, Cost], machine: Hardware) -> None:
    """Draw bytes and training time of each method against the number of people."""
    from mta.evaluation.reports.figures import Measured, growth

    kept: dict[str, Measured] = {name: ([], cost.fixed_bytes, cost.person_bytes) for name, cost in costs.items()}
    took: dict[str, Measured] = {
        name: ([], machine.seconds(cost.fixed_operations), machine.seconds(cost.person_operations))
        for name, cost in costs.items()
    }
    time = growth(took, f"training, all people, {machine.name}", human_seconds)
    growth(kept, "stored, all people", human_bytes).save(path.with_name(f"{path.name}-bytes"))
    time.save(path.with_name(f"{path.name}-time"))


def _seconds(cost: Cost, people: float, machine: Hardware) -> dict[str, float]:
    once, each = machine.seconds(cost.fixed_operations), machine.seconds(cost.person_operations)
    return {"once": once, "each": each, "all": once + people * each}
