"""The search behind the demo's settings, on development people, who are neither in the bank nor tested.

What came out: docs/explanation/tuning.md.

Run:  python -m benchmarks.tune --out tune [--only ridge,OPPU]
Hours on two cores; stopped, it goes on: every line of tune/results.jsonl is one finished method. --table prints them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from rich.console import Console

from mta.bank.bank import Bank
from mta.cli.screen import Screen
from mta.config import Lora, MergeSettings, StackSettings, Training, override
from mta.data.readers import read_people
from mta.data.splits import draw
from mta.evaluation import Context, run_methods
from mta.evaluation.methods import Merged, MergeThenAdapt, Method, OneLora, TaskLora
from mta.evaluation.protocol import Panel
from mta.evaluation.statistics import Comparison
from mta.model.base import BaseModel
from mta.system import assets
from mta.system.atomic import read_json, write_json
from mta.system.malloc import keep_freed_memory
from mta.tools.demo import DemoRecipe, load_demo

METRICS = ("NLL", "MAE", "MAE (median)")


def candidates(recipe: DemoRecipe) -> Iterator[Method]:
    """Everything that is tried: merges first, then what is trained."""
    run = recipe.run
    for k in (2, 0):
        yield Merged(name=f"uniform k={k}", merge=MergeSettings(policy="uniform", k=k))
        yield Merged(name=f"similarity k={k}", merge=MergeSettings(policy="similarity", k=k))
        yield Merged(name=f"loss k={k}", merge=MergeSettings(policy="loss", k=k, retrieve="loss"))
    for temperature, prior in ((2.0, 0.5), (4.0, 0.2), (4.0, 0.5), (8.0, 0.5)):
        settings = MergeSettings(policy="posterior", k=0, temperature=temperature, null_prior=prior)
        yield Merged(name=f"posterior T={temperature:g} null={prior}", merge=settings)
    for strength in (1000.0, 300.0, 200.0, 100.0, 50.0):
        yield Merged(name=f"ridge {strength:g}", merge=ridge(strength))
    for lr, steps in ((0.03, 1), (0.05, 1), (0.1, 1), (0.3, 1), (1.0, 1), (0.1, 4), (0.3, 4)):
        yield Merged(name=f"learned from 0 lr={lr:g} steps={steps}", merge=learned(lr, steps, "zero"))
    for lr, steps in ((0.05, 1), (0.15, 1), (0.05, 4)):
        yield Merged(name=f"learned from posterior lr={lr:g} steps={steps}", merge=learned(lr, steps, "posterior"))
    for lr, steps in ((2e-4, 2), (2e-4, 4), (1e-4, 4), (4e-4, 2)):
        yield OneLora(
            name=f"OPPU r8 lr={lr:g} steps={steps}", lora=Lora(), training=Training(lr=lr, steps=steps, batch_size=64)
        )
    stack = StackSettings(lora=run.stack.lora, training=Training(lr=2e-4, steps=2, batch_size=64))
    yield OneLora(name="adapt r1 lr=0.0002 steps=2", lora=stack.lora, training=stack.training)
    for name, merge in (("learned", learned(0.05, 1, "posterior")), ("ridge 200", ridge(200.0))):
        yield MergeThenAdapt(name=f"{name} + r1 lr=0.0002 steps=2", merge=merge, stack=stack)


def ridge(strength: float) -> MergeSettings:
    """All anchors, weighed by the ridge policy."""
    return MergeSettings(policy="ridge", k=0, ridge=strength)


def learned(lr: float, steps: int, start: Literal["zero", "posterior"]) -> MergeSettings:
    """All anchors, weighed by plain gradient steps from 0 or from the posterior's coefficients on."""
    training = Training(lr=lr, steps=steps, batch_size=64, eps=1.0, clip=1e9)
    return MergeSettings(policy="learned", k=0, start=start, learned=training)


def panel_of(recipe: DemoRecipe, out: Path, screen: Screen) -> Panel:
    """The demo's bank and the development people, built once."""
    run = recipe.run
    people = read_people(assets.resolve(recipe.data), run.task)
    needed = recipe.evaluation.shots + recipe.evaluation.queries
    splits = draw(people, run.seed, **recipe.people.model_dump(), min_items=needed)
    base = BaseModel.of(run)
    parts = {part: splits.select(part, people) for part in ("task", "development", "candidates")}
    bank = Bank.build(
        base,
        parts["candidates"],
        out / "bank",
        task=run.task,
        run=run,
        task_people=parts["task"],
        on_step=screen.step,
    )
    context = Context(base, bank, bank.encoder(base), run, on_step=screen.step)
    evaluation = recipe.evaluation
    return Panel.of(context, parts["development"], shots=evaluation.shots, queries=evaluation.queries)


def line(comparison: Comparison, name: str) -> dict[str, object]:
    """What is kept of one method."""
    found: dict[str, object] = {"name": name, "worse": comparison.worse_off(name, "task LoRA")}
    for metric in METRICS:
        difference = comparison.difference(name, "task LoRA", metric)
        if difference:
            found[metric] = [difference.mean, difference.low, difference.high]
    return found


def table(path: Path) -> None:
    """Print what has been tried as Markdown, best NLL first: paired differences to the task LoRA."""
    rows = sorted((json.loads(text) for text in path.read_text().splitlines()), key=lambda row: row["NLL"][0])
    lines = [f"| method | {' | '.join(METRICS)} | worse off, clearly |", "|---" * (len(METRICS) + 2) + "|"]
    for row in rows:
        cells = ["{:+.3f} [{:+.3f}, {:+.3f}]".format(*row[metric]) for metric in METRICS]
        lines.append(f"| {row['name']} | {' | '.join(cells)} | {'{:.0%}, {:.0%}'.format(*row['worse'])} |")
    Console(soft_wrap=True, markup=False, highlight=False).print("\n".join(lines))


def main() -> None:
    """Try what has not been tried yet."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--out", type=Path, default=Path("tune"))
    words.add_argument("--only", default="", help="comma-separated beginnings of names")
    words.add_argument("--table", action="store_true")
    words.add_argument("settings", nargs="*", help="key=value over the recipe")
    given = words.parse_args()
    results = given.out / "results.jsonl"
    if given.table:
        return table(results)
    recipe = override(load_demo("movielens"), given.settings)
    settings, kept = recipe.model_dump(mode="json"), given.out / "recipe.json"
    if (read_json(kept) or settings) != settings:
        words.error(f"{given.out} holds results with other settings; give another --out")
    write_json(kept, settings)
    done = {json.loads(text)["name"] for text in results.read_text().splitlines()} if results.exists() else set()
    with Screen() as screen:
        panel = panel_of(recipe, given.out, screen)
        pooled = run_methods(panel, [TaskLora()]).rows
        for method in candidates(recipe):
            if method.name in done or not method.name.startswith(tuple(given.only.split(","))):
                continue
            rows = run_methods(panel, [method], on_method=screen.say).rows
            comparison = Comparison(panel.bank.task, [*pooled, *rows])
            with results.open("a") as file:
                file.write(json.dumps(line(comparison, method.name)) + "\n")
    table(results)


if __name__ == "__main__":
    keep_freed_memory()  # as the command line does
    main()
