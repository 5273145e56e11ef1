"""A study on the terminal."""

from __future__ import annotations

from rich.console import Console

from mta.evaluation.report import table, verdict
from mta.evaluation.study import Study


def show(found: Study, console: Console) -> None:
    """Table, verdict in plain sentences, and the questions that were asked before and after."""
    meta = found.meta
    console.print(table(found.comparison))
    note = f" ({meta['note']})" if meta["note"] else ""
    asked = f"{meta['people']} people, {meta['shots']} shots and {meta['queries']} later queries each"
    console.print(f"{asked}; {meta['base']}{note}, {meta['dtype']}, seed {meta['seed']}", highlight=False)
    if meta.get("left_out"):
        few = meta["shots"] + meta["queries"]
        console.print(f"{meta['left_out']} people left out: in the bank, or fewer than {few} items", highlight=False)
    for sentence in verdict(found.comparison):
        console.print(f"  {sentence}", highlight=False)
    for question in found.questions:
        console.print(f"\n{question['question']}\n  before, everybody: {question['before']}", highlight=False)
        for who, answer in question["after"]:
            console.print(f"  after, a person {who}: {answer}", highlight=False)
