"""Is a gain left over a stronger pooled model? MTA over a task LoRA that saw more than its own part of the people.

Takes the parts of an experiment after its exhibit ``controls``. The task LoRA is also trained on the anchors' items,
and with ``--everyone`` on those items of the calibration's people that the calibration does not measure (it measures
their first ones). It is trained for as long as held-out people gain. Anchors and tested people are the experiment's.

Run:  python -m benchmarks.stronger_task_lora lamp4 --data data/lamp4_huffpost --run runs/lamp4 --out stronger
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from mta.bank.bank import Bank
from mta.bank.build import build_bank
from mta.cli.screen import Screen
from mta.config import CalibrationSettings, MergeSettings, Training, override
from mta.data.history import Person
from mta.evaluation.compare import evaluate
from mta.evaluation.context import Context
from mta.evaluation.experiments.recipe import load_experiment
from mta.evaluation.experiments.workspace import MAIN, Workspace
from mta.evaluation.methods import Merged, MergeThenAdapt, OneLora, TaskLora
from mta.evaluation.methods.controls import OtherPerson, PopulationMerge
from mta.evaluation.protocol import Panel
from mta.evaluation.reports.html import to_json
from mta.evaluation.reports.tables import markdown, rows_of
from mta.evaluation.statistics import Comparison
from mta.model.encoders import load_encoder

WORDS = ("task_lora.rounds=12", "task_lora.per_person=64", "task_lora.items=10000")
METHODS = (
    TaskLora(),
    PopulationMerge(),
    Merged(name="merge only, laplace", merge=MergeSettings(policy="laplace", k=0)),
    MergeThenAdapt(name="MTA"),
    OtherPerson(name="MTA, other person's shots"),
    OneLora(name="OPPU", training=Training(lr=2e-4, steps=8, batch_size=64)),
)


def measured_and_rest(people: list[Person], settings: CalibrationSettings) -> tuple[list[Person], list[Person]]:
    """Return people with the first items, which a calibration measures, and with their other items."""
    most = settings.shots + max(settings.queries, settings.people * settings.queries // max(len(people), 1))
    first = [replace(person, items=person.items[:most]) for person in people]
    rest = [replace(person, items=person.items[most:]) for person in people if len(person.items) > most]
    return first, rest


def bank_of(workspace: Workspace, out: Path, screen: Screen, everyone: bool) -> Bank:
    """Build a bank with a task LoRA that saw the anchors' items, and with ``everyone`` most items of all others."""
    base, main = workspace.base, workspace.bank(MAIN, 0)
    run = override(workspace._run_of(MAIN, 0), WORDS)
    task, held_out = workspace._pooled(0)
    measured, rest = measured_and_rest(workspace._in_bank(main, "calibration"), run.calibration)
    more = [*workspace._in_bank(main, "anchor"), *(rest if everyone else [])]
    task += [person.latest(run.bank.max_items) for person in more]
    candidates, encoder = workspace.splits.select("candidates", workspace.people), load_encoder(run.encoder, base)
    how = {"held_out": held_out, "on_step": screen.step}
    build_bank(base, main.task, encoder, task, candidates, override(run, ["calibration.enabled=false"]), out, **how)
    bank = Bank.open(out, base)
    if bank.calibration is None:
        # Ids of their own: these people are behind the task LoRA, but the items that are measured are not.
        measured = [replace(person, id=f"first/{person.id}") for person in measured]
        bank = bank.calibrate(base, measured, run=run, on_step=screen.step)
    return bank


def compared(workspace: Workspace, bank: Bank, screen: Screen) -> Comparison:
    """Compare the methods over the bank, and the experiment's LoRA on everything, on the tested people."""
    recipe, base = workspace.recipe, workspace.base
    everything = next(part for part in recipe.exhibits["controls"] if part.bank == "everything")
    encoder = load_encoder(recipe.run.encoder, base)
    ours = Context(base, bank, encoder, override(workspace._run_of(MAIN, 0), WORDS), on_step=screen.step)
    tested, how = workspace.tested(MAIN, recipe.shots), {"shots": recipe.shots, "queries": recipe.queries}
    rows = []
    for context, methods in (
        (ours, METHODS),
        (workspace._context(everything, 0), [TaskLora(name="pooled on everything")]),
    ):
        panel = Panel.of(context, tested, ask=recipe.ask, write_texts=False, **how)
        rows += evaluate(panel, methods, (0,), screen.say).rows
    return Comparison(panel.task, rows, tuple(person.group for person in tested))


def main() -> None:
    """Write results.json under --out; print the table, and MTA's difference to each other method."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("recipe")
    words.add_argument("--data", required=True)
    words.add_argument("--run", type=Path, required=True)
    words.add_argument("--out", type=Path, default=Path("stronger"))
    words.add_argument("--everyone", action="store_true", help="also train on the calibration's people")
    words.add_argument("--on", choices=["test", "development"], default="test")
    given = words.parse_args()
    with Screen() as screen:
        how = {"say": screen.say, "on_step": screen.step, "write": False}
        workspace = Workspace.open(load_experiment(given.recipe), given.run, given.data, given.on, **how)
        found = compared(workspace, bank_of(workspace, given.out / "bank", screen, given.everyone), screen)
    report = to_json(found, data=given.data, command=f"python -m benchmarks.stronger_task_lora {given.recipe}")
    others = {name: found.difference("MTA", name, found.yardstick) for name in found.names if name != "MTA"}
    report["MTA against"] = {
        name: {"mean": d.mean, "low": d.low, "high": d.high} for name, d in others.items() if d is not None
    }
    (given.out / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    print(markdown(*rows_of(found)))
    for name, d in others.items():
        print(name, d and f"{d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}]")


if __name__ == "__main__":
    main()
