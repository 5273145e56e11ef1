"""Compare methods on a batch, or the standard methods on one bank with a report."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from mta.bank.bank import Bank
from mta.bank.calibration.info import ALONE
from mta.bank.format import check_base
from mta.config import CompareSettings, MergeSettings, Run
from mta.config.schema import OPPU_TRAINING
from mta.data.history import Person, check_distinct
from mta.data.sharing import Copies
from mta.data.shots_and_queries import has_enough_items
from mta.data.splits import draw
from mta.data.tasks.task import Task
from mta.errors import InputError
from mta.evaluation.context import Context
from mta.evaluation.methods import (
    Base,
    CalibratedLora,
    GlobalConstant,
    LabelBias,
    Merged,
    MergeThenAdapt,
    Method,
    NoHistory,
    OtherPerson,
    OwnConstant,
    PopulationMerge,
    TaskLora,
)
from mta.evaluation.methods.controls import givers_of
from mta.evaluation.protocol import TestBatch, check_lengths, members_and_others
from mta.evaluation.reports.two_people import Asked
from mta.evaluation.statistics import Comparison, Row
from mta.model.base import BaseModel
from mta.model.encoders import Encoder
from mta.personalize.merge import can_merge, check_merge
from mta.personalize.policies import policy_named
from mta.system.device import dtype_name
from mta.system.extras import require
from mta.system.progress import OnStep
from mta.system.provenance import versions

log = logging.getLogger("mta")


def run_methods(
    batch: TestBatch,
    methods: Sequence[Method],
    seeds: Sequence[int] = (0,),
    on_method: Callable[[str], None] | None = None,
) -> Comparison:
    """Run every method with every seed on the batch, and compare them."""
    if len({method.name for method in methods}) < len(methods):
        raise InputError(
            f"methods must have different names, got {', '.join(method.name for method in methods)}",
            hint="Give one of them another:  name=…",
        )
    rows = []
    for method in methods:
        if on_method:
            on_method(method.name)
        outcomes, scores = zip(*(method.scored(batch, seed) for seed in (seeds if method.seeded else seeds[:1])))
        seconds, last = sum(outcome.seconds for outcome in outcomes) / len(outcomes), outcomes[-1]
        asked = sum(one.prompt_tokens for one in last.answers) / len(last.answers)
        rows.append(Row.of(method.name, scores, seconds, last.bytes_per_person, last.merge, last.answers, asked))
    return Comparison(batch.task, rows, tuple(person.group for person in batch.people))


@dataclass(slots=True)
class ComparisonReport:
    """A comparison, its batch, and optionally two people: the HTML page shows their questions and texts."""

    comparison: Comparison
    batch: TestBatch
    meta: dict[str, Any]
    people: tuple[Asked, ...] = ()

    def outcome(self) -> dict[str, Any]:
        """Return the number of people, and each method's mean of the metric that is used for differences."""
        metric, rows = self.comparison.yardstick, self.comparison.rows
        scores = {row.name: self.comparison.score(row.name, metric) for row in rows}
        means = {name: round(score.mean, 4) for name, score in scores.items() if score}
        return {"people": self.meta["people"], metric: means}

    def write(self, out: str | Path, command: str = "") -> None:
        """Write ``report.html`` and ``results.json`` to ``out``. Both files record ``command``."""
        from mta.evaluation.reports.html import to_json, write_html
        from mta.system.atomic import write_json

        out, meta = Path(out), self.meta | {"command": command}
        write_json(out / "results.json", to_json(self.comparison, **meta))
        write_html(out / "report.html", self.comparison, self.batch.bank, self.people, meta)


def standard_methods(
    run: Run, settings: CompareSettings, task: Task, anchors: int, calibrated: bool = True, history: bool = False
) -> list[Method]:
    """Return the rows of the table: constants, base, task LoRA, what a bank has to beat, merge only (each policy), MTA.

    Policies that need labels or a calibrated bank are left out where there are none. A brief
    comparison leaves out the base, and other merges than MTA's. Rivals are a label bias, rank 1 alone, and OPPU. Where
    prompts show a ``history``, all methods get it, and one row is the task LoRA without it.
    Controls are one merge for everybody, and MTA from another person's shots.
    """

    def policy(name: str) -> MergeSettings:
        # Settings of the run are for its policy. Other policies that retrieve by encoding use the paper's K = 2.
        if name in ("auto", run.merge.policy):
            return run.merge
        k = 0 if policy_named(name).all_anchors else min(2, anchors)
        return MergeSettings.model_validate({**run.merge.model_dump(), "policy": name, "k": k, "options": {}})

    def fits(merge: MergeSettings) -> bool:
        return can_merge(merge, anchors, task.labelled, calibrated)

    stack = run.stack
    biased: list[Method] = [LabelBias()] if task.labelled else []
    rivals = [*biased, CalibratedLora(name=ALONE, shape="stack"), CalibratedLora(training=OPPU_TRAINING)]
    ours = MergeThenAdapt(merge=run.merge, stack=stack) if stack.enabled else Merged(name="MTA", merge=run.merge)
    constants: list[Method] = [GlobalConstant(), OwnConstant()] if task.labelled else []
    pooled = [*([NoHistory()] if history else []), TaskLora()]
    controls: list[Method] = []
    if settings.controls:
        controls = [*([PopulationMerge()] if calibrated else []), OtherPerson(over=ours)]
    merges: list[Method] = [Merged(merge=run.merge)] if stack.enabled else []
    if not settings.brief:
        chosen = {name: policy(name) for name in settings.policies}
        merges = [Merged(name=f"merge only, {name}", merge=merge) for name, merge in chosen.items() if fits(merge)]
    base = [] if settings.brief else [Base()]
    return [*constants, *base, *pooled, *controls, *rivals, *merges, ours]


def compare(
    base: BaseModel,
    bank: Bank,
    people: Sequence[Person],
    settings: CompareSettings | None = None,
    *,
    run: Run | None = None,
    more: Sequence[Method] = (),
    limit: int | None = None,
    encoder: Encoder | None = None,
    on_step: OnStep | None = None,
    on_method: Callable[[str], None] | None = None,
) -> ComparisonReport:
    """Compare the standard methods, and ``more``, on the ``people`` who are not in the bank and have enough items.

    ``run`` defaults to the bank's settings. ``limit``: maximum number of people, drawn with the run's seed. Raises
    InputError if no people are left, MissingExtra without the extra ``eval``.

    >>> report = mta.compare(base, bank, people, mta.CompareSettings(shots=4, queries=4))
    >>> report.write("comparison/")  # report.html and results.json
    >>> report.comparison.score("MTA", "NLL")  # mean over people, and a 95% interval
    """
    require("eval")
    settings = settings or CompareSettings()
    check_base(bank.folder, bank.info, base.name, base.fingerprint)
    people = list(people)
    check_distinct(people)
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; expected 1 or more people", hint="Leave it out to test everybody.")
    task, shots, queries, run = bank.task, settings.shots, settings.queries, bank.with_calibrated_settings(run)
    calibrated = bank.calibration is not None
    check_merge(run.merge, len(bank), task.labelled, calibrated)
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
    left_out, seeds = len(people) - len(tested), settings.seeds or (run.seed,)
    if limit is not None and limit < len(tested):
        tested = draw(tested, run.seed, task=0, development=0, test=limit, together=False).select("test", tested)
    context = Context(base, bank, bank.encoder(base, run.encoder, encoder), run, on_step=on_step)
    batch = TestBatch.of(context, tested, shots=shots, queries=queries)
    check_lengths(base, task, ((one.id, one.items, own) for one, own in zip(batch.people, batch.queries)))
    if settings.controls:
        givers_of(batch.people, batch.people)  # raises before anything is computed
    known = None  # unless all histories behind the bank are given
    if members and len(members) == bank.info.members.people:
        known = Copies(people, task).in_histories(members, chain(*batch.queries))
    if known:
        log.warning("%d queries also occur in the histories of people in the bank", known)
    fitting = [method for method in more if method.fits(task, len(bank), calibrated)]
    if len(fitting) < len(more):
        log.warning("left out: %s", ", ".join(method.name for method in more if method not in fitting))
    methods = [*standard_methods(run, settings, task, len(bank), calibrated, bank.history > 0), *fitting]
    comparison = run_methods(batch, methods, seeds, on_method)
    meta = _meta(context, settings, seeds) | {"people": len(tested), "left_out": left_out, "queries_in_bank": known}
    return ComparisonReport(comparison, batch, meta)


def _meta(context: Context, settings: CompareSettings, seeds: Sequence[int]) -> dict[str, Any]:
    base, bank, run = context.base, context.bank, context.run
    return {
        "base": base.name,
        "note": base.note,
        "dtype": dtype_name(base.dtype),
        "task": bank.task.name,
        "shots": settings.shots,
        "queries": settings.queries,
        "seeds": list(seeds),
        "seed": run.seed,
        "anchors": len(bank),
        "bank_hash": bank.hash,
        "bank_seconds": bank.info.seconds,
        "run": run.model_dump(mode="json"),
        "evaluation": settings.model_dump(mode="json"),
        "versions": versions(),
    }
