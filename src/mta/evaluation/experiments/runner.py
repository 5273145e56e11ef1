"""Running an experiment: every method on every person, a few people at a time; resumable after any."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mta.errors import ClusterError
from mta.evaluation.experiments.bank_stats import bank_facts, case_study
from mta.evaluation.experiments.recipe import Experiment, Part, wanted
from mta.evaluation.experiments.records import Record, Records
from mta.evaluation.experiments.workspace import Lab
from mta.evaluation.methods import Method, Outcome
from mta.evaluation.metrics import measure, query_nll
from mta.system.atomic import write_json
from mta.tracking.run_folder import RunFolder, work_of
from mta.tracking.trackers import Track

CASE, FACTS, KIND = "case.json", "banks.json", "experiment"


def run_experiment(lab: Lab, exhibits: Sequence[str] = (), command: str = "", track: Track | None = None) -> None:
    """Compute whatever the exhibits lack, seed by seed, and write it to ``scores.jsonl`` in the lab's folder.

    ``command`` says how to get it again; ``track`` opens where steps are told.
    """
    recipe = lab.recipe
    exhibits = wanted(recipe, lab.which, exhibits)
    records = Records(lab.folder)
    about = {"which": lab.which, "exhibits": [*exhibits], "seeds": [*recipe.seeds]}
    settings = recipe.model_dump(mode="json")
    how: dict[str, Any] = {
        "work": work_of(settings, lab.splits.digest),
        "command": command,
        "track": track,
        "on_step": lab.on_step,
        "about": about,
    }
    with RunFolder(folder=lab.folder, kind=KIND, base=lab.base, settings=settings, config=False, **how) as kept:
        kept.begin()
        lab.on_step = kept.step
        for seed in recipe.seeds:  # what is stopped leaves whole seeds behind
            _run_seed(lab, records, [planned for planned in _planned(recipe, exhibits) if planned[0] == seed])
        if {"banks", "efficiency"} & {*exhibits}:
            _write_facts(lab)
        if "case" in exhibits:
            panel = next(lab.panels(Part(methods=()), recipe.seeds[0], recipe.shots))
            write_json(lab.folder / CASE, case_study(panel, recipe.run.merge, recipe.seeds[0]))
        kept.outcome = {"results": len(records.rows), "people": len({row.person for row in records.rows})}


def _planned(recipe: Experiment, exhibits: Sequence[str]) -> list[tuple[int, str, Part, int]]:
    """(seed, exhibit, part, shots), seed by seed: what is stopped leaves whole seeds behind."""
    return [
        (seed, name, part, shots)
        for seed in recipe.seeds
        for name in exhibits
        for part in recipe.exhibits[name]
        for shots in part.shots or (recipe.shots,)
        if seed in (part.seeds or recipe.seeds)
    ]


def _run_seed(lab: Lab, records: Records, planned: Sequence[tuple[int, str, Part, int]]) -> None:
    known: set[tuple[str, int]] = set()  # exhibits share what they have in common

    def lacking() -> Iterator[Sitting]:
        for one in (one for part in planned for one in _lacking(lab, records, *part)):
            if (one.key, one.start) not in known:
                known.add((one.key, one.start))
                yield one

    for number, found in enumerate(lab.executor.run(measured, lacking(), lab, lab.elsewhere()), 1):
        if found.result is None:
            raise ClusterError(f"{found.piece.where}: {found.error}", hint="What is done is kept; repeat it.")
        records.add(found.result)
        if not lab.executor.in_process:
            lab.say(f"{number} done, now {found.piece.where}")


@dataclass(frozen=True, slots=True)
class Sitting:
    """One method on some people of an exhibit, from number ``start`` on: what is computed, and written, at once."""

    exhibit: str
    part: Part
    seed: int
    shots: int
    start: int
    people: int
    method: Method
    key: str

    def __len__(self) -> int:
        return self.people

    def halves(self) -> Sequence[Sitting]:
        """People are always compared together with the same ones."""
        return ()

    @property
    def where(self) -> str:
        """For a reader."""
        return f"{self.exhibit}, seed {self.seed}, {self.shots} shots: {self.method.name}"


def _lacking(lab: Lab, records: Records, seed: int, exhibit: str, part: Part, shots: int) -> Iterator[Sitting]:
    """What is not in the records yet: all methods on some people, then on the next."""
    tested = lab.tested(part, shots)
    if not tested:
        return
    fit = [method for method in part.methods if method.fits(lab.task, len(lab.bank(part, seed)))]
    for method in part.methods:
        if method not in fit:
            lab.say(f"{exhibit}: {method.name} is left out, it does not fit this task or bank")
    names = [lab.person(person.id) for person in tested]
    keyed = [(method, lab.key(part, method, seed, shots)) for method in fit]
    lacking = [(method, key) for method, key in keyed if records.lacks(key, names)]
    done, total, began = 0, len(tested) * len(lacking), time.monotonic()
    for start, people in lab.sittings(part, shots):
        here = names[start : start + len(people)]
        for method, key in lacking:
            if records.lacks(key, here):
                sitting = Sitting(exhibit, part, seed, shots, start, len(here), method, key)
                if lab.executor.in_process:
                    left = (time.monotonic() - began) / done * (total - done) / 60 if done else 0.0
                    told = f", about {left:.0f} min left" if done else ""
                    lab.say(f"{sitting.where} ({done / total:.0%}{told})")
                yield sitting
            done += len(here)


def measured(lab: Lab, sitting: Sitting) -> list[Record]:
    """A record for each of the people."""
    part, seed, shots = sitting.part, sitting.seed, sitting.shots
    panel = lab.panel(part, seed, shots, sitting.start)
    found = sitting.method.outcome(panel, seed)
    rows = []
    for u, person in enumerate(panel.people):
        answers, golds = found.answers[u], panel.golds[u]
        nll, metrics = query_nll(panel.task, answers, golds), measure(panel.task, answers, golds)
        if answers.nll is not None and not panel.texts:
            metrics = {"NLL": metrics["NLL"]}
        rows.append(
            Record(
                key=sitting.key,
                settings=sitting.method.digest,
                method=sitting.method.name,
                bank=part.bank,
                seed=seed,
                shots=shots,
                person=lab.person(person.id),
                group=lab.person(person.group) if person.group else "",
                metrics={name: round(value, 6) for name, value in metrics.items()},
                nll=None if nll is None else tuple(round(float(one), 5) for one in nll),
                seconds=round(found.seconds / len(panel.people), 4),
                bytes=round(found.bytes_per_person, 1),
                ids=tuple(lab.question(person, item, n) for n, item in enumerate(panel.queries[u])),
                answers=tuple(answers.texts),
                golds=tuple(golds),
                chosen=found.chosen[u] if found.chosen else "",
                **_coefficients(found, u),
            )
        )
    return rows


def _coefficients(found: Outcome, person: int) -> dict[str, Any]:
    if found.merge is None or found.merge.w.ndim > 2:
        return {}
    w = tuple(round(float(one), 5) for one in found.merge.w[person])
    return {"anchors": tuple(found.merge.ids[person].tolist()), "w": w}


def _write_facts(lab: Lab) -> None:
    """What each seed's bank costs and does for others."""
    part, found = Part(methods=()), {}
    for seed in lab.recipe.seeds:
        panels = list(lab.panels(part, seed, lab.recipe.shots))
        found[f"{part.bank}-{seed}"] = bank_facts(panels, lab.bank(part, seed), seed)
    write_json(lab.folder / FACTS, found)
