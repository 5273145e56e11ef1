"""Is a gain left over a stronger pooled model? MTA over a task LoRA that was trained on the anchors' items, too.

Takes the parts of an experiment after its exhibit ``controls``. The task LoRA is trained for as long as held-out
people gain; anchors, calibration, and tested people are the experiment's.

Run:  python -m benchmarks.stronger_task_lora lamp4 --data data/lamp4_huffpost --run runs/lamp4 --out stronger
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mta.bank.bank import Bank
from mta.bank.build import build_bank
from mta.cli.screen import Screen
from mta.config import MergeSettings, Training, override
from mta.evaluation.compare import evaluate
from mta.evaluation.context import Context
from mta.evaluation.experiments.recipe import load_experiment
from mta.evaluation.experiments.workspace import MAIN, Workspace
from mta.evaluation.methods import Merged, MergeThenAdapt, OneLora, TaskLora
from mta.evaluation.methods.controls import OtherPerson, PopulationMerge
from mta.evaluation.protocol import Panel
from mta.evaluation.reports.html import to_json
from mta.evaluation.reports.tables import markdown, rows_of
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


def panel_of(workspace: Workspace, out: Path, screen: Screen) -> Panel:
    """Return the tested people over a bank with a task LoRA that saw the anchors' items."""
    recipe, base, main = workspace.recipe, workspace.base, workspace.bank(MAIN, 0)
    run = override(workspace._run_of(MAIN, 0), WORDS)
    task, held_out = workspace._pooled(0)
    task += [person.latest(run.bank.max_items) for person in workspace._in_bank(main, "anchor")]
    candidates, encoder = workspace.splits.select("candidates", workspace.people), load_encoder(run.encoder, base)
    how = {"held_out": held_out, "on_step": screen.step}
    build_bank(base, main.task, encoder, task, candidates, run, out / "bank", **how)
    context = Context(base, Bank.open(out / "bank", base), encoder, run, on_step=screen.step)
    tested = workspace.tested(MAIN, recipe.shots)
    how = {"shots": recipe.shots, "queries": recipe.queries, "ask": recipe.ask}
    return Panel.of(context, tested, write_texts=False, **how)


def main() -> None:
    """Write results.json under --out; print the table, and MTA's difference to each other method."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("recipe")
    words.add_argument("--data", required=True)
    words.add_argument("--run", type=Path, required=True)
    words.add_argument("--out", type=Path, default=Path("stronger"))
    given = words.parse_args()
    with Screen() as screen:
        how = {"say": screen.say, "on_step": screen.step, "write": False}
        workspace = Workspace.open(load_experiment(given.recipe), given.run, given.data, **how)
        found = evaluate(panel_of(workspace, given.out, screen), METHODS, (0,), screen.say)
    report = to_json(found, data=given.data, command=f"python -m benchmarks.stronger_task_lora {given.recipe}")
    others = {m.name: found.difference("MTA", m.name, found.yardstick) for m in METHODS if m.name != "MTA"}
    report["MTA against"] = {
        name: {"mean": d.mean, "low": d.low, "high": d.high} for name, d in others.items() if d is not None
    }
    (given.out / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    print(markdown(*rows_of(found)))
    for name, d in others.items():
        print(name, d and f"{d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}]")


if __name__ == "__main__":
    main()
