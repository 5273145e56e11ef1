"""Compare the standard methods on one bank, and write the report."""

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
from mta.evaluation.context import Context
from mta.evaluation.engine import evaluate
from mta.evaluation.methods import Base, GlobalConstant, Merged, MergeThenAdapt, Method, OneLora, OwnConstant, TaskLora
from mta.evaluation.protocol import Panel, has_enough_items, members_and_others
from mta.evaluation.reports.summary import yardstick
from mta.evaluation.statistics import Comparison
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
    """A comparison, its panel, and the questions that ``ask`` put to people's models."""

    comparison: Comparison
    panel: Panel
    meta: dict[str, Any]
    questions: list[dict[str, Any]] = field(default_factory=list)

    def outcome(self) -> dict[str, Any]:
        """Return the number of people, and every method's mean of the metric that differences are judged by."""
        metric, rows = yardstick(self.comparison), self.comparison.rows
        scores = {row.name: self.comparison.score(row.name, metric) for row in rows}
        means = {name: round(score.mean, 4) for name, score in scores.items() if score}
        return {"people": self.meta["people"], metric: means}

    def write(self, out: str | Path, command: str = "") -> None:
        """Write ``report.html`` and ``results.json`` to ``out``; both record ``command``, which repeats the study."""
        from mta.evaluation.reports.html import to_json, write_html
        from mta.system.atomic import write_json

        out, meta = Path(out), self.meta | {"command": command}
        write_json(out / "results.json", to_json(self.comparison, **meta))
        write_html(
            out / "report.html", self.comparison, self.panel.bank, self.panel.stage2.vectors, self.questions, meta
        )


def standard_methods(run: Run, evaluation: Evaluation, task: Task, anchors: int) -> list[Method]:
    """Return the rows of the table: constants, base, task LoRA, OPPU, merge only (each policy), adapt only, MTA."""

    def policy(name: str) -> MergeSettings:
        # Settings of the run are for its policy. Other policies that retrieve by encoding use the paper's K = 2.
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
    """Compare the standard methods on the ``people`` who are not in the bank and have enough items.

    ``limit`` draws at most this many of them with the run's seed. Raises InputError if no people are left.
    """
    task, shots, queries = bank.task, evaluation.shots, evaluation.queries
    check_merge(run.merge, len(bank), task.labelled, bank.calibration is not None)
    if bank.info.members.hashed is None:
        log.warning("this bank came without its members: these people may have been used to train it")
    members, others = members_and_others(bank, people)
    tested = [p for p in others if has_enough_items(task, p, shots, queries, "next")]
    if not tested:
        raise InputError(
            f"none of {len(people)} people can be tested: they are in the bank, share items with people in the bank, "
            f"or have fewer than {shots + queries} items",
            hint="Give people the bank was not built from, or lower shots= and queries=.",
        )
    left_out = len(people) - len(tested)
    if limit is not None and limit < len(tested):
        tested = draw(tested, run.seed, task=0, development=0, test=limit, together=False).select("test", tested)
    context = Context(base, bank, encoder or bank.encoder(base, run.encoder), run, on_step=on_step)
    panel = Panel.of(context, tested, shots=shots, queries=queries)
    known = _queries_in_bank(people, members, panel)
    methods = standard_methods(run, evaluation, task, len(bank))
    comparison = evaluate(panel, methods, evaluation.seeds or (run.seed,), on_method)
    meta = _meta(context, evaluation, len(tested)) | {"left_out": left_out, "queries_in_bank": known}
    return Study(comparison, panel, meta)


def _queries_in_bank(people: Sequence[Person], members: Sequence[Person], panel: Panel) -> int:
    """Count the queries that also occur in the histories of the bank's members, if these are among ``people``."""
    found = Copies(people, panel.task).in_histories(members, chain(*panel.queries)) if members else 0
    if found:
        log.warning("%d queries also occur in the histories of people in the bank", found)
    return found


def ask(found: Study, personal: Personalizer, fields: dict[str, str], numbers: Sequence[int]) -> None:
    """Put one question to the pooled model and to some people's models, and add the answers to the study.

    ``numbers`` are positions in the panel's people, who must have been personalized.
    """
    ids = [found.panel.people[i].id for i in numbers]
    texts = personal.generate([(TASK, fields), *((id, fields) for id in ids)])
    if found.panel.bank.task.metric == "mae":
        means = _mean_labels(personal, fields, ids)
        texts = [f"{text} (on average {mean:.1f})" for text, mean in zip(texts, means)]
    question = found.panel.bank.task.prompt(found.panel.bank.task.asked(fields))
    after = [(_shots_in_words(found, i), answer) for i, answer in zip(numbers, texts[1:])]
    found.questions.append({"question": question, "before": texts[0], "after": after})


def _mean_labels(personal: Personalizer, fields: dict[str, str], ids: Sequence[str]) -> list[float]:
    """Return the expected label under the pooled model and under each person's model."""
    task = personal.bank.task
    values = torch.tensor([float(label) for label in task.labels or ()], dtype=torch.float64)
    askers: list[Who] = [TASK, *ids]
    rows = personal.label_scores([(asker, [task.asked(fields)]) for asker in askers])
    return [float(scores[0].double().softmax(0) @ values) for scores in rows]


def _shots_in_words(found: Study, person: int) -> str:
    task, items = found.panel.bank.task, found.panel.people[person].items
    if task.metric != "mae":
        return f"with {len(items)} shots"
    mean = sum(float(task.target(item)) for item in items) / len(items)
    return f"whose {len(items)} shots are {mean:.1f} on average"


def _meta(context: Context, evaluation: Evaluation, people: int) -> dict[str, Any]:
    base, bank, run = context.base, context.bank, context.run
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
