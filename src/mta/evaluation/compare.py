"""A whole comparison on one bank: who is tested, which methods, and what is written about it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from mta.bank.bank import Bank
from mta.config import Evaluation, MergeSettings, Run
from mta.data.history import Person
from mta.data.readers.sharing import Copies
from mta.data.splits import draw
from mta.data.tasks.task import Task
from mta.errors import InputError
from mta.evaluation.methods import Base, GlobalConstant, Merged, MergeThenAdapt, Method, OneLora, OwnConstant, TaskLora
from mta.evaluation.protocol import Panel, able, apart
from mta.evaluation.reports.summary import yardstick
from mta.evaluation.statistics import Comparison, evaluate
from mta.model.base import BaseModel
from mta.model.encoders import Encoder
from mta.personalize import Personalizer
from mta.personalize.adapters import TASK, Who
from mta.personalize.merge import check_merge
from mta.personalize.policies import POLICIES
from mta.system.progress import OnStep
from mta.system.provenance import versions

log = logging.getLogger("mta")


@dataclass(slots=True)
class Study:
    """A comparison, the panel it was made on, and questions that were asked before and after."""

    comparison: Comparison
    panel: Panel
    meta: dict[str, Any]
    questions: list[dict[str, Any]] = field(default_factory=list)

    def outcome(self) -> dict[str, Any]:
        """A few numbers: how many people, and every method's mean of the metric differences are judged in."""
        metric, rows = yardstick(self.comparison), self.comparison.rows
        means = {row.name: round(one.mean, 4) for row in rows if (one := self.comparison.score(row.name, metric))}
        return {"people": self.meta["people"], metric: means}

    def write(self, out: str | Path, command: str = "") -> None:
        """``report.html`` and ``results.json`` under ``out``; ``command`` says how to get them again."""
        from mta.evaluation.reports.html import to_json, write_html
        from mta.system.atomic import write_json

        out, meta = Path(out), self.meta | {"command": command}
        write_json(out / "results.json", to_json(self.comparison, **meta))
        write_html(out / "report.html", self.comparison, self.panel.bank, self.panel.vectors, self.questions, meta)


def standard_methods(run: Run, evaluation: Evaluation, task: Task, anchors: int) -> list[Method]:
    """The rows of the table: constants, base, task LoRA, OPPU, merge only by every policy, adapt only, MTA."""

    def policy(name: str) -> MergeSettings:
        # A run's settings belong to its policy; the others take the paper's K = 2 where they retrieve by encoding.
        if name == run.merge.policy:
            return run.merge
        k = 0 if POLICIES[name].wide else min(2, anchors)
        return MergeSettings.model_validate({**run.merge.model_dump(), "policy": name, "k": k})

    policies = [name for name in evaluation.policies if task.labelled or not POLICIES[name].labels]
    adapt = evaluation.adapt or run.stack
    constants: list[Method] = [GlobalConstant(), OwnConstant()] if task.labelled else []
    methods: list[Method] = [*constants, Base(), TaskLora()]
    methods.append(OneLora(name="OPPU", lora=evaluation.oppu.lora, training=evaluation.oppu.training))
    methods += [Merged(name=f"merge only, {name}", merge=policy(name)) for name in policies]
    methods.append(OneLora(name="adapt only", lora=adapt.lora, training=adapt.training))
    mta: Method = Merged(name="MTA", merge=run.merge)
    methods.append(MergeThenAdapt(merge=run.merge, stack=run.stack) if run.stack.enabled else mta)
    return methods


def study(
    base: BaseModel,
    bank: Bank,
    run: Run,
    people: Sequence[Person],
    evaluation: Evaluation,
    *,
    limit: int | None = None,
    encoder: Encoder | None = None,
    on_step: OnStep | None = None,
    on_method: Callable[[str], None] | None = None,
) -> Study:
    """Compare the standard methods on those of ``people`` who are not in the bank and have enough items.

    ``limit`` draws so many of them by the run's seed. Raises InputError when nobody is left.
    """
    needed = evaluation.shots + evaluation.queries
    task = bank.task
    check_merge(run.merge, len(bank), task.labelled)
    if bank.info.members.hashed is None:
        log.warning("this bank came without its members: nobody here knows whether these people helped to train it")
    members, strangers = apart(bank, people)
    tested = [p for p in strangers if able(task, p, evaluation.shots, evaluation.queries, "next")]
    if not tested:
        raise InputError(
            f"none of {len(people)} people can be tested: they are in the bank, share items with people in the bank, "
            f"or have fewer than {needed} items",
            hint="Give people the bank was not built from, or lower shots= and queries=.",
        )
    left_out = len(people) - len(tested)
    if limit is not None and limit < len(tested):
        tested = draw(tested, run.seed, task=0, development=0, test=limit, together=False).select("test", tested)
    encoder = encoder or bank.encoder(base, run.encoder)
    how: dict[str, Any] = {"shots": evaluation.shots, "queries": evaluation.queries, "on_step": on_step}
    panel = Panel.of(base, bank, encoder, run, tested, **how)
    known = _in_bank(people, members, panel)
    methods = standard_methods(run, evaluation, task, len(bank))
    found = evaluate(panel, methods, evaluation.seeds or (run.seed,), on_method)
    return Study(
        found,
        panel,
        _meta(base, bank, run, evaluation, len(tested)) | {"left_out": left_out, "queries_in_bank": known},
    )


def _in_bank(people: Sequence[Person], members: Sequence[Person], panel: Panel) -> int:
    """Count the queries that stand in the histories of the bank's people, as far as these are among ``people``."""
    found = Copies(people, panel.task).in_histories(members, chain(*panel.queries)) if members else 0
    if found:
        log.warning("%d queries stand in the histories of people in the bank", found)
    return found


def ask(found: Study, personal: Personalizer, fields: dict[str, str], whose: Sequence[int]) -> None:
    """Put one question to the pooled model and to three people's, and note the answers in the study.

    ``whose`` are numbers into the panel's people, who must have been personalized.
    """
    people = [found.panel.people[i].id for i in whose]
    answers = personal.generate([(TASK, fields), *((id, fields) for id in people)])
    scores = _expected(personal, fields, people) if found.panel.bank.task.metric == "mae" else [None] * len(answers)
    told = [text if score is None else f"{text} (on average {score:.1f})" for text, score in zip(answers, scores)]
    question = found.panel.bank.task.prompt(found.panel.bank.task.asked(fields))
    after = [(_shots_in_words(found, i), answer) for i, answer in zip(whose, told[1:])]
    found.questions.append({"question": question, "before": told[0], "after": after})


def _expected(personal: Personalizer, fields: dict[str, str], people: Sequence[str]) -> list[float]:
    task = personal.bank.task
    values = torch.tensor([float(label) for label in task.labels or ()], dtype=torch.float64)
    whose: list[Who] = [TASK, *people]
    rows = personal.label_scores([(who, [task.asked(fields)]) for who in whose])
    return [float(scores[0].double().softmax(0) @ values) for scores in rows]


def _shots_in_words(found: Study, person: int) -> str:
    task, items = found.panel.bank.task, found.panel.people[person].items
    if task.metric != "mae":
        return f"with {len(items)} shots"
    mean = sum(float(task.target(item)) for item in items) / len(items)
    return f"whose {len(items)} shots are {mean:.1f} on average"


def _meta(base: BaseModel, bank: Bank, run: Run, evaluation: Evaluation, people: int) -> dict[str, Any]:
    return {
        "base": base.name,
        "note": base.note,
        "dtype": str(base.dtype).removeprefix("torch."),
        "task": bank.task.name,
        "people": people,
        "shots": evaluation.shots,
        "queries": evaluation.queries,
        "seeds": list(evaluation.seeds or (run.seed,)),
        "seed": run.seed,
        "anchors": len(bank),
        "bank_seconds": bank.info.seconds,
        "run": run.model_dump(mode="json"),
        "evaluation": evaluation.model_dump(mode="json"),
        "versions": versions(),
    }
