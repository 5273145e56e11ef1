"""``mta demo``, ``mta doctor``, and ``mta size``: try mta, check this machine, and estimate what many people need."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer import Option

from mta.cli import options
from mta.cli.screen import Screen, console, show_json, tables
from mta.config import Run, override
from mta.system.extras import require
from mta.system.units import human_bytes, human_seconds

if TYPE_CHECKING:
    from mta.tools.cost import Cost, Hardware
    from mta.tools.doctor import Finding

MARKS = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "problem": "[bold red]problem[/]"}


def demo(
    words: options.RecipeWords = None,
    out: Annotated[Path, Option(help="Folder for bank, store and report.")] = Path("demo"),
    recipe: Annotated[str, Option("--data", help="survey, movielens, or a recipe in a YAML file.")] = "survey",
    full: Annotated[bool, Option("--full", help="Train longer, and compare all methods.")] = False,
    me: Annotated[bool, Option("--me", help="After a demo, answer the questions yourself. Nothing is saved.")] = False,
    seed: options.Seed = None,
    json: options.Json = False,
) -> None:
    """Build a bank from a survey, personalize other people, and compare MTA with baselines, in about six minutes.

    Override settings of the recipe as key=value: run.bank.anchors=8 people.test=48. The same command resumes a demo.

    Example:  mta demo --out demo/
    """
    if me:
        return _ask_me(out, json)
    from mta.evaluation.reports.glance import show_glance
    from mta.evaluation.reports.html import to_json
    from mta.tools import demo as tool

    require("eval")  # before a bank is built
    given = [*(words or []), *options.as_words(**{"run.seed": seed})]
    options.check_out(out)
    chosen, command = tool.load_demo(recipe), options.command_line()
    with Screen() as screen:
        report = tool.demo(out, chosen, command, given, full=full, on_step=screen.step, say=screen.say)
    if json:
        return show_json(to_json(report.comparison, **report.meta, command=command))
    show_glance(report.comparison, report.people, tool.next_commands(out, report), tables())


def _ask_me(out: Path, json: bool) -> None:
    from mta.evaluation.reports.glance import predictions
    from mta.tools.me import ask_me, in_words

    def ask(question: str, labels: Sequence[str]) -> str | None:
        while True:
            console.print(f"{question}  ", end="", highlight=False, markup=False)
            by_key = sys.stdin.isatty() and all(len(label) == 1 for label in labels)
            key = typer.getchar() if by_key else sys.stdin.readline().strip() or "q"
            console.print(key if key.isprintable() else "", highlight=False, markup=False)
            if key in (*labels, "q"):
                return key if key in labels else None

    found = ask_me(out, ask, Screen().say)
    if found is None:
        return console.print("Nothing to compare, and nothing was kept.")
    if json:
        return show_json(asdict(found))
    tables().print(predictions(found, most=len(found.questions)))
    tables().print(in_words(found), highlight=False)


def doctor(
    device: Annotated[
        str | None, Option(help="Check only this device (cpu, cuda, or auto), not whether mta demo can run.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Check versions, processor, memory, kernels, cache and extras. Exits with 1 if mta demo cannot run here.

    Downloads nothing and loads no model. Compiles kernels that are not compiled yet, which takes seconds.
    With --device, exits with 1 if that device cannot be used, and checks nothing that only mta demo needs.

    Example:  mta doctor --device cuda
    """
    from mta.tools.doctor import examine

    findings = examine(device)
    problems, warnings = (sum(one.verdict == verdict for one in findings) for verdict in ("problem", "warning"))
    if json:
        show_json({"problems": problems, "warnings": warnings, "findings": [asdict(one) for one in findings]})
    else:
        say = Console(highlight=False).print
        say(_findings(findings))
        start = "Ready." if device else "Ready. Start with:  mta demo"
        then = "Fix the problems first." if problems else start
        say(f"{problems} problem{'s' * (problems != 1)}, {warnings} warning{'s' * (warnings != 1)}. {then}")
    if problems:
        raise typer.Exit(1)


def _findings(findings: Sequence[Finding]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_header=False, show_edge=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold", max_width=max(24, Console().width // 3))  # paths may be long
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    about = ""
    for one in findings:
        if one.about != about:
            table.add_section()
        shown, about = one.about if one.about != about else "", one.about
        hint = f"\n[dim]{escape(one.hint)}[/]" if one.hint else ""
        table.add_row(f"[bold]{shown}[/]", escape(one.name), MARKS[one.verdict], escape(one.found) + hint)
    return table


def size(
    words: options.Words = None,
    people: Annotated[float, Option(min=1, help="Number of people, for example 1e6.")] = 1e6,
    base: Annotated[
        str | None,
        Option(help="Base: a built-in shape (llama-3-8b, the default), an asset, folder, GGUF file or hub id."),
    ] = None,
    anchors: Annotated[int | None, Option(min=1, help="Number of anchors in the bank.")] = None,
    rank: Annotated[int | None, Option(min=1, help="Rank of anchors, task LoRA and OPPU's adapters.")] = None,
    tokens: Annotated[float, Option(min=1, help="Tokens per item, with its prompt.")] = 128,
    shared: Annotated[float, Option(min=0, help="How many of --tokens are a prefix that all items share.")] = 0,
    targets: Annotated[float, Option(min=1, help="How many of --tokens are targets, that is, count in the loss.")] = 16,
    shots: Annotated[int, Option(min=1, help="Items per person.")] = 8,
    quantize: Annotated[str | None, Option(help="Weights of the base: none, nf4 (4 bits) or int8.")] = None,
    on: Annotated[str, Option(help="Hardware: this (measured now), l4, rtx-4090, a100 or h100.")] = "this",
    config: options.Config = None,
    json: options.Json = False,
) -> None:
    """Estimate bytes, memory and hours for a base and a number of people, against OPPU. Loads no weights.

    Example:  mta size --people 1e6 --base llama-3-8b --anchors 50 --rank 8 --on h100
    """
    from mta.tools import cost as sizing

    given = {"base": base, "quantize": quantize, "bank.anchors": anchors}
    given |= {"bank.lora.rank": rank, "task_lora.lora.rank": rank}
    run = override(Run(base="llama-3-8b"), [*(words or []), *options.as_words(**given)], config)
    load = sizing.DataSizes(tokens, targets, shots, shared=shared)
    shape, machine = sizing.Shape.of(run.base), sizing.hardware(on)
    costs, memory = sizing.costs(shape, run, load), sizing.memory(shape, run, load)
    if json:
        parts: dict[str, Any] = {"base": shape, "load": load, "hardware": machine, "memory": memory, **costs}
        times = {f"{name}, seconds": _seconds(cost, people, machine) for name, cost in costs.items()}
        return show_json({"people": people} | {name: asdict(part) for name, part in parts.items()} | times)
    say = Console(highlight=False, soft_wrap=True).print
    what = f"{run.bank.anchors} anchors of rank {run.bank.lora.rank}, {sizing.planned(run).merge.policy}"
    say(
        f"{run.base}: {shape.parameters / 1e9:.2f} billion parameters. {people:,.0f} people, {shots} items each; {what}"
    )
    say(_costs(costs, people, machine))
    named = {"base": memory.base, "bank": memory.bank, "each served row": memory.row}
    named |= {"an anchor in training": memory.anchor, "a stack in training": memory.stack}
    named |= {"each token in training": memory.token, "each target token, in addition": memory.target}
    say("Memory: " + ", ".join(f"{name} {human_bytes(size)}" for name, size in named.items()))
    if fits := sizing.what_fits(machine, memory):
        say(fits)
    say(f"Hours on {machine.name}: {machine.rate / 1e12:.2f} Tflop/s ({machine.source}), {machine.share:.0%} of it")


def _costs(costs: dict[str, Cost], people: float, machine: Hardware) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in ("", "stored once", "per person", "total", "trained once", "per person", "total"):
        table.add_column(head, justify="right" if head else "left")
    for name, cost in costs.items():
        kept = cost.fixed_bytes, cost.person_bytes, cost.fixed_bytes + people * cost.person_bytes
        table.add_row(name, *map(human_bytes, kept), *map(human_seconds, _seconds(cost, people, machine).values()))
    return table


def _seconds(cost: Cost, people: float, machine: Hardware) -> dict[str, float]:
    once, each = machine.seconds(cost.fixed_operations), machine.seconds(cost.person_operations)
    return {"once": once, "each": each, "all": once + people * each}
