"""A comparison on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from mta.evaluation.reports.html import table, verdict
from mta.evaluation.statistics import Comparison


def show(
    comparison: Comparison, meta: Mapping[str, Any], questions: Sequence[Mapping[str, Any]], console: Console
) -> None:
    """Print the table, the verdict in plain sentences, and the questions that were asked before and after."""
    console.print(table(comparison))
    note = f" ({meta['note']})" if meta["note"] else ""
    asked = f"{meta['people']} people, {meta['shots']} shots and {meta['queries']} later queries each"
    console.print(f"{asked}; {meta['base']}{note}, {meta['dtype']}, seed {meta['seed']}", highlight=False)
    if meta.get("left_out"):
        few = meta["shots"] + meta["queries"]
        console.print(f"{meta['left_out']} people left out: in the bank, or fewer than {few} items", highlight=False)
    for sentence in verdict(comparison):
        console.print(f"  {sentence}", highlight=False)
    for question in questions:
        console.print(f"\n{question['question']}\n  before, everybody: {question['before']}", highlight=False)
        for who, answer in question["after"]:
            console.print(f"  after, a person {who}: {answer}", highlight=False)
