"""Run an experiment: every method on every person, a few people at a time; resumable after every batch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mta.errors import ClusterError
from mta.evaluation.engine import run_method
from mta.evaluation.experiments.bank_stats import bank_facts, case_study
from mta.evaluation.experiments.recipe import Experiment, Part, wanted
from mta.evaluation.experiments.records import Record, Records
from mta.evaluation.experiments.workspace import BATCH, Workspace
from mta.evaluation.methods import Method
from mta.evaluation.metrics import PersonScore
from mta.evaluation.protocol import Outcome, Panel
from mta.system.atomic import write_json
from mta.tracking.run_folder import RunFolder, work_of
from mta.tracking.trackers import Track

CASE, FACTS, KIND = "case.json", "banks.json", "experiment"


@dataclass(frozen=True, slots=True)
class PlannedPart:
    """One part of an exhibit with one seed and one number of shots."""

    seed: int
    exhibit: str
    part: Part
    shots: int


@dataclass(frozen=True, slots=True)
class MethodRun:
    """One method on one batch of people, from number ``start`` on: computed and written together."""

    planned: PlannedPart
    start: int
    people: int
    method: Method
    key: str

    def __len__(self) -> int:
        return self.people

    def halves(self) -> Sequence[MethodRun]:
        """Return nothing: a batch always holds the same people."""
        return ()

    @property
    def description(self) -> str:
        """Exhibit, seed, shots and method, for progress messages."""
        planned = self.planned
        return f"{planned.exhibit}, seed {planned.seed}, {planned.shots} shots: {self.method.name}"


def run_experiment(
    workspace: Workspace, exhibits: Sequence[str] = (), command: str = "", track: Track | None = None
) -> None:
    """Compute the missing results of the exhibits, seed by seed, and append them to ``scores.jsonl``.

    ``command`` is recorded so that users can repeat it; ``track`` opens an additional tracker of steps.
    """
    recipe, which = workspace.recipe, workspace.participants.which
    exhibits = wanted(recipe, which, exhibits)
    records = Records(workspace.folder)
    settings = recipe.model_dump(mode="json")
    with RunFolder(
        folder=workspace.folder,
        kind=KIND,
        base=workspace.base,
        settings=settings,
        config=False,
        work=work_of(settings, workspace.participants.splits.digest),
        command=command,
        track=track,
        on_step=workspace.on_step,
        about={"which": which, "exhibits": [*exhibits], "seeds": [*recipe.seeds]},
    ) as folder:
        folder.begin()
        workspace = replace(workspace, on_step=folder.step)
        planned = _planned(recipe, exhibits)
        for seed in recipe.seeds:  # an interrupted experiment leaves complete seeds
            _run_seed(workspace, records, [one for one in planned if one.seed == seed])
        if {"banks", "efficiency"} & {*exhibits}:
            _write_facts(workspace)
        if "case" in exhibits:
            panel = next(workspace.panels(Part(methods=()), recipe.seeds[0], recipe.shots))
            write_json(workspace.folder / CASE, case_study(panel, recipe.run.merge, recipe.seeds[0]))
        folder.outcome = {"results": len(records.rows), "people": len({row.person for row in records.rows})}


def _planned(recipe: Experiment, exhibits: Sequence[str]) -> list[PlannedPart]:
    return [
        PlannedPart(seed, name, part, shots)
        for seed in recipe.seeds
        for name in exhibits
        for part in recipe.exhibits[name]
        for shots in part.shots or (recipe.shots,)
        if seed in (part.seeds or recipe.seeds)
    ]


def _run_seed(workspace: Workspace, records: Records, planned: Sequence[PlannedPart]) -> None:
    known: set[tuple[str, int]] = set()  # exhibits share results

    def missing() -> Iterator[MethodRun]:
        for run in (run for part in planned for run in _missing(workspace, records, part)):
            if (run.key, run.start) not in known:
                known.add((run.key, run.start))
                yield run

    found = workspace.executor.run(compute_records, missing(), workspace, workspace.elsewhere())
    for number, outcome in enumerate(found, 1):
        if outcome.result is None:
            raise ClusterError(
                f"{outcome.piece.description}: {outcome.error}",
                hint="Finished results are kept; repeat the command to resume.",
            )
        records.add(outcome.result)
        if not workspace.executor.in_process:
            workspace.say(f"{number} done, now {outcome.piece.description}")


def _missing(workspace: Workspace, records: Records, planned: PlannedPart) -> Iterator[MethodRun]:
    """Yield the runs that have no records yet: all methods on the first batch of people, then on the next."""
    part, seed, shots, say = planned.part, planned.seed, planned.shots, workspace.say
    people = workspace.participants
    tested = [people.hashed(person.id) for person in people.tested(part, shots)]
    if not tested:
        say(f"{planned.exhibit}: {shots} shots are left out, too few people have enough items")
        return
    anchors = len(workspace.bank(part, seed))
    fit = [method for method in part.methods if method.fits(people.task, anchors)]
    for method in part.methods:
        if method not in fit:
            say(f"{planned.exhibit}: {method.name} is left out, it does not fit this task or bank")
    keyed = [(method, workspace.key(part, method, seed, shots)) for method in fit]
    lacking = [(method, key) for method, key in keyed if records.lacks(key, tested)]
    done, total, began = 0, len(tested) * len(lacking), time.monotonic()
    for start in range(0, len(tested), BATCH):
        batch = tested[start : start + BATCH]
        for method, key in lacking:
            if records.lacks(key, batch):
                run = MethodRun(planned, start, len(batch), method, key)
                if workspace.executor.in_process:
                    minutes = (time.monotonic() - began) / done * (total - done) / 60 if done else 0.0
                    left = f", about {minutes:.0f} min left" if done else ""
                    say(f"{run.description} ({done / total:.0%}{left})")
                yield run
            done += len(batch)


def compute_records(workspace: Workspace, run: MethodRun) -> list[Record]:
    """Return a record for each person of the batch."""
    planned = run.planned
    panel = workspace.panel(planned.part, planned.seed, planned.shots, run.start)
    outcome, scores = run_method(panel, run.method, planned.seed)
    return [_record(workspace, run, panel, outcome, u, score) for u, score in enumerate(scores)]


def _record(workspace: Workspace, run: MethodRun, panel: Panel, outcome: Outcome, u: int, score: PersonScore) -> Record:
    people, person, merge = workspace.participants, panel.people[u], outcome.merge
    if merge is not None and merge.w.ndim > 2:
        merge = None  # coefficients by layer are not recorded
    return Record(
        key=run.key,
        settings=run.method.digest,
        method=run.method.name,
        bank=run.planned.part.bank,
        seed=run.planned.seed,
        shots=run.planned.shots,
        person=people.hashed(person.id),
        group=people.hashed(person.group) if person.group else "",
        metrics={name: round(value, 6) for name, value in score.metrics.items()},
        nll=None if score.nll is None else tuple(round(float(value), 5) for value in score.nll),
        seconds=round(outcome.seconds / len(panel.people), 4),
        bytes=round(outcome.bytes_per_person, 1),
        anchors=tuple(merge.ids[u].tolist()) if merge else (),
        w=tuple(round(float(value), 5) for value in merge.w[u]) if merge else (),
        chosen=outcome.chosen[u] if outcome.chosen else "",
        ids=tuple(people.question_id(person, item, n) for n, item in enumerate(panel.queries[u])),
        answers=tuple(outcome.answers[u].texts),
        golds=tuple(panel.golds[u]),
    )


def _write_facts(workspace: Workspace) -> None:
    """Write what each seed's bank costs, and what it does for people outside the bank."""
    part, found = Part(methods=()), {}
    for seed in workspace.recipe.seeds:
        panels = list(workspace.panels(part, seed, workspace.recipe.shots))
        found[f"{part.bank}-{seed}"] = bank_facts(panels, workspace.bank(part, seed), seed)
    write_json(workspace.folder / FACTS, found)
