"""Running an experiment: banks, then every method on every person, a few people at a time; resumable after any."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mta.aside import write_json, written_aside
from mta.assets import is_asset, resolve
from mta.bank.bank import Bank
from mta.base import BaseModel
from mta.config import Run, dump_yaml, override
from mta.errors import ConfigError, InputError
from mta.evaluation.facts import bank_facts, case_study
from mta.evaluation.methods import Method, Outcome
from mta.evaluation.metrics import measure, query_nll
from mta.evaluation.protocol import Panel, able
from mta.evaluation.recipe import Experiment, Part, Which, drawn, wanted
from mta.evaluation.records import Record, Records
from mta.history import Item, Person
from mta.machine import cores, processor
from mta.provenance import commit, versions
from mta.readers import read_people
from mta.splits import Splits
from mta.tasks.load import load_task
from mta.tasks.task import Task
from mta.training.trainer import OnStep

TOGETHER = 16  # people whose results are written at once
CASE, FACTS, META, RECIPE, SIZES = "case.json", "banks.json", "meta.json", "recipe.yaml", "sizes.json"


@dataclass(slots=True)
class Lab:
    """One experiment at work in its folder: who is who, and the banks that are open."""

    recipe: Experiment
    task: Task
    people: list[Person]
    splits: Splits
    base: BaseModel
    out: Path
    sizes: dict[str, Any]
    which: Which = "test"
    on_step: OnStep | None = None
    say: Callable[[str], None] = lambda _: None
    banks: dict[str, Bank] = field(default_factory=dict)
    memos: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, recipe: Experiment, out: Path, data: str | None = None, which: Which = "test", **how: Any) -> Lab:
        """Read the people, draw who takes which part, and load the base.

        Raises InputError without data, ConfigError if ``out`` was begun with other people or sizes.
        """
        source = data or recipe.data
        if source is None:
            raise InputError("this recipe brings no data", hint="Give --data with a LaMP file or folder.")
        task = load_task(recipe.run.task)
        people = read_people(resolve(source), task)
        splits, sizes = drawn(recipe, task, people)
        path = out / "splits.json"
        if path.exists() and Splits.load(path, people).digest != splits.digest:
            raise ConfigError(f"{out} was begun with other sizes", hint="Choose another folder with --out.")
        splits.save(path)
        said = source if is_asset(source) else Path(source).name
        sizes = {"data": said, **sizes}
        write_json(out / SIZES, sizes)
        with written_aside(out / RECIPE) as aside:
            aside.write_text(dump_yaml(recipe), encoding="utf-8")
        return cls(recipe, task, people, splits, BaseModel.of(recipe.run), out, sizes, which, **how)

    def bank(self, part: Part, seed: int) -> Bank:
        """The part's bank for a seed: clustering and training start from it. Built once, kept in ``banks/``."""
        name = f"{part.bank}-{seed}"
        if name not in self.banks:
            run = self.run_of(part, seed)
            self.say(f"bank {name}")
            candidates, pooled = (self.splits.select(which, self.people) for which in ("candidates", "task"))
            self.banks[name] = Bank.build(
                self.base,
                candidates,
                self.out / "banks" / name,
                task=self.task,
                run=run,
                task_people=pooled,
                on_step=self.on_step,
            )
        return self.banks[name]

    @property
    def folder(self) -> Path:
        """Where results go: development people have a folder of their own."""
        return self.out if self.which == "test" else self.out / self.which

    def run_of(self, part: Part, seed: int) -> Run:
        """The recipe's settings, changed as the part says."""
        return override(self.recipe.run, [*part.words, f"seed={seed}"])

    def key(self, part: Part, method: Method, seed: int, shots: int) -> str:
        """Names all that decides a result but the person: method, protocol, base, and the bank where it counts."""
        run = self.run_of(part, seed)
        protocol = [shots, self.recipe.queries, self.recipe.ask, part.texts or bool(self.task.labels)]
        parts: list[Any] = [method.digest, *protocol]
        parts += [self.base.fingerprint, str(self.base.dtype), run.max_tokens, self.task.model_dump(mode="json")]
        if method.of_bank:
            stages = [run.merge.model_dump(mode="json"), run.stack.model_dump(mode="json")]
            parts += [self.bank(part, seed).hash, *stages]
        if method.of_bank or method.seeded:
            parts.append(seed)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def panels(self, part: Part, seed: int, shots: int) -> Iterator[Panel]:
        """The people who are tested, a few at a time, always the same ones together."""
        bank, recipe = self.bank(part, seed), self.recipe
        memo = self.memos.setdefault(bank.hash, {})
        if "encoder" not in memo:
            memo["encoder"] = bank.encoder(self.base, recipe.run.encoder)
            is_anchor = [p for p in self.splits.select("candidates", self.people) if _is_anchor(bank, p)]
            memo["anchors"] = sorted(is_anchor, key=lambda person: person.id)  # the order of the bank
        tested = self.tested(part, shots)
        for start in range(0, len(tested), TOGETHER):
            yield Panel.of(
                self.base,
                bank,
                memo["encoder"],
                self.run_of(part, seed),
                tested[start : start + TOGETHER],
                shots=shots,
                queries=recipe.queries,
                ask=recipe.ask,
                on_step=self.on_step,
                anchors=memo["anchors"],
                pool=self.splits.select("task", self.people),
                kept=self.out / "work",
                memo=memo,
                texts=part.texts,
            )

    def tested(self, part: Part, shots: int) -> list[Person]:
        """Who has enough items, in the order of the splits; nobody where they are too few to be compared."""
        everybody = self.splits.select(self.which, self.people)
        fit = [p for p in everybody if able(self.task, p, shots, self.recipe.queries, self.recipe.ask)]
        if len(fit) < min(self.recipe.few, len(everybody)):
            self.say(f"{shots} shots: only {len(fit)} people have enough items; left out")
            return []
        return fit[: part.people or self.recipe.compared]

    def person(self, id: str) -> str:
        """A person's name in the records: it tells nothing to whoever has not the whole data."""
        return hashlib.sha256(f"{self.splits.digest}/{id}".encode()).hexdigest()[:12]

    def question(self, person: Person, item: Item, number: int) -> str:
        """A question's id in LaMP's files: the benchmark's own, or one made of the person's name here."""
        return item.id if item.is_query and item.id is not None else f"{self.person(person.id)}-{number}"


def run_experiment(lab: Lab, exhibits: Sequence[str] = (), command: str = "") -> None:
    """Compute whatever the exhibits lack, seed by seed, and write it to ``scores.jsonl`` in the lab's folder.

    ``command`` says how to get it again.
    """
    recipe = lab.recipe
    exhibits = wanted(recipe, lab.which, exhibits)
    records = Records(lab.folder)
    with _noted(lab, exhibits, command):
        for seed, name, part, shots in _planned(recipe, exhibits):
            _run_part(lab, records, name, part, seed, shots)
        if {"banks", "efficiency"} & {*exhibits}:
            _write_facts(lab)
        if "case" in exhibits:
            panel = next(lab.panels(Part(methods=()), recipe.seeds[0], recipe.shots))
            write_json(lab.folder / CASE, case_study(panel, recipe.run.merge, recipe.seeds[0]))


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


def _run_part(lab: Lab, records: Records, exhibit: str, part: Part, seed: int, shots: int) -> None:
    tested = lab.tested(part, shots)
    if not tested:
        return
    fit = [method for method in part.methods if method.fits(lab.task, len(lab.bank(part, seed)))]
    names = [lab.person(person.id) for person in tested]
    keyed = [(method, lab.key(part, method, seed, shots)) for method in fit]
    lacking = [(method, key) for method, key in keyed if records.lacks(key, names)]
    if not lacking:
        return
    done, total, began = 0, len(tested) * len(lacking), time.monotonic()
    for panel in lab.panels(part, seed, shots):
        here = [lab.person(person.id) for person in panel.people]
        for method, key in lacking:
            if records.lacks(key, here):
                left = (time.monotonic() - began) / done * (total - done) / 60 if done else 0.0
                told = f", about {left:.0f} min left" if done else ""
                where = f"{exhibit}, seed {seed}, {shots} shots: {method.name} ({done / total:.0%}{told})"
                lab.say(where)
                records.add(_measured(lab, panel, part, method, key, seed, shots))
            done += len(here)


def _measured(lab: Lab, panel: Panel, part: Part, method: Method, key: str, seed: int, shots: int) -> list[Record]:
    found = method.outcome(panel, seed)
    rows = []
    for u, person in enumerate(panel.people):
        answers, golds = found.answers[u], panel.golds[u]
        nll, metrics = query_nll(panel.task, answers, golds), measure(panel.task, answers, golds)
        if answers.nll is not None and not panel.texts:
            metrics = {"NLL": metrics["NLL"]}
        rows.append(
            Record(
                key=key,
                settings=method.digest,
                method=method.name,
                bank=part.bank,
                seed=seed,
                shots=shots,
                person=lab.person(person.id),
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


def _is_anchor(bank: Bank, person: Person) -> bool:
    return "anchor" in bank.info.members.artefacts_of(person.id)


@contextmanager
def _noted(lab: Lab, exhibits: Sequence[str], command: str) -> Iterator[None]:
    """What a reader must know of the run beside its scores; earlier runs in the same folder stay in the list."""
    path, began = lab.folder / META, time.monotonic()
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    this = {
        "command": command,
        "commit": commit(),
        "machine": f"{processor()}, {cores()} cores",
        "threads": torch.get_num_threads(),
    }
    this |= {"versions": versions(), "exhibits": list(exhibits)}
    about = {
        "base": lab.base.name,
        "note": lab.base.note,
        "dtype": str(lab.base.dtype).removeprefix("torch."),
        "which": lab.which,
        "exhibits": sorted({*before.get("exhibits", ()), *exhibits}),
    }

    def note(hours: float | None) -> None:
        write_json(path, about | {"runs": [*before.get("runs", ()), this | {"hours": hours}]})

    note(None)  # what a killed run leaves
    try:
        yield
    finally:
        note(round((time.monotonic() - began) / 3600, 3))


def _write_facts(lab: Lab) -> None:
    """What each seed's bank costs and does for others."""
    part, found = Part(methods=()), {}
    for seed in lab.recipe.seeds:
        panels = list(lab.panels(part, seed, lab.recipe.shots))
        found[f"{part.bank}-{seed}"] = bank_facts(panels, lab.bank(part, seed), seed)
    write_json(lab.folder / FACTS, found)
