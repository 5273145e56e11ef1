"""Run an experiment: every method on every person, a few people at a time; resumable after every batch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from mta.distributed.executor import Piece
from mta.errors import ClusterError, InputError
from mta.evaluation.methods import Method
from mta.system.atomic import json_sha256, write_json
from mta.tracking.run_folder import RunFolder
from mta_lab.experiments.facts import bank_facts, use_to_others
from mta_lab.experiments.recipe import MAIN_BANK, Part, bank_name, wanted
from mta_lab.experiments.results import FACTS, KIND, Record, Records, Where, read_beside
from mta_lab.experiments.workspace import MAIN, Workspace, batches


@dataclass(frozen=True, slots=True)
class MethodRun(Piece):
    """One method on one batch of an exhibit's people, given by their numbers: computed and written together.

    Never split: a batch always holds the same people.
    """

    exhibit: str
    part: Part
    seed: int
    shots: int
    method: Method
    where: Where
    batch: range
    full: bool  # texts are generated, too

    def __len__(self) -> int:
        return len(self.batch)

    def __str__(self) -> str:
        return f"{self.exhibit}, seed {self.seed}, {self.shots} shots: {self.method.name}"


def run_experiment(workspace: Workspace, exhibits: Sequence[str] = (), command: str = "") -> None:
    """Compute the missing results of the exhibits, seed by seed, and append them to ``scores.jsonl``.

    ``command`` is recorded so that users can repeat it.
    """
    recipe, which = workspace.recipe, workspace.which
    exhibits = wanted(recipe, which, exhibits)
    _check_people(workspace, exhibits)
    workspace.check_folder()
    settings = recipe.model_dump(mode="json")
    with RunFolder(
        folder=workspace.folder,
        kind=KIND,
        base=workspace.base,
        settings=settings,
        config=False,
        work=json_sha256([settings, workspace.splits.digest]),
        command=command,
        on_step=workspace.on_step,
        about={"which": which, "exhibits": [*exhibits], "seeds": [*recipe.seeds]},
    ) as folder:
        workspace.splits.save(workspace.out / "splits.json")  # only now: a mistake must not fix the folder's splits
        folder.begin()  # locks the folder
        records = Records(workspace.folder)
        workspace = replace(workspace, on_step=folder.step)
        workspace.write_recipe()
        for seed in recipe.seeds:  # an interrupted experiment leaves complete seeds
            _run_seed(workspace, records, exhibits, seed)
        _write_facts(workspace, exhibits)
        folder.outcome = {"results": len(records.rows), "people": len({row.person for row in records.rows})}


def _check_people(workspace: Workspace, exhibits: Sequence[str]) -> None:
    """Raise InputError if no exhibit has anybody to test, DataError for an item that is too long: before training."""
    recipe = workspace.recipe
    parts = [(part, shots) for name in exhibits for part in recipe.exhibits[name] for shots in part.shots]
    parts.append((MAIN, recipe.shots))
    if not any(workspace.tested(part, shots) for part, shots in parts):
        raise InputError(
            f"fewer than {recipe.few} people have {recipe.shots} shots and {recipe.queries} answered questions",
            hint="Lower shots=, queries=, or few=. LaMP's questions need their outputs file beside them.",
        )
    workspace.check_lengths([shots for _, shots in parts])


def _write_facts(workspace: Workspace, exhibits: Sequence[str]) -> None:
    """Write what is known of the main banks that were used; for exhibits about banks, of all.

    The exhibit ``banks`` also measures their gain for others, which takes a pass for every anchor.
    """
    path, recipe, use = workspace.folder / FACTS, workspace.recipe, "banks" in exhibits
    facts = before = read_beside(path)
    for seed in recipe.seeds:
        if not use and not workspace.has_opened(MAIN, seed):
            continue
        name = bank_name(MAIN_BANK, seed)
        own = before.get(name, {}) | bank_facts(workspace.bank(MAIN, seed))
        if use and workspace.tested(MAIN, recipe.shots):
            own |= use_to_others(list(workspace.batches_of(MAIN, seed, recipe.shots)), seed)
        facts = facts | {name: own}
    if facts:
        write_json(path, facts)


def _run_seed(workspace: Workspace, records: Records, exhibits: Sequence[str], seed: int) -> None:
    planned = [
        (exhibit, part, seed, shots)
        for exhibit in exhibits
        for part in workspace.recipe.exhibits[exhibit]
        for shots in part.shots or (workspace.recipe.shots,)
        if seed in workspace.recipe.seeds_of(part)
    ]
    known: set[tuple[Where, range, bool]] = set()  # exhibits share results

    def missing() -> Iterator[MethodRun]:
        for run in (run for where in planned for run in _missing(workspace, records, *where)):
            if not known & {(run.where, run.batch, run.full), (run.where, run.batch, True)}:
                known.add((run.where, run.batch, run.full))
                yield run

    outcomes = workspace.executor.run(compute_records, missing(), workspace)
    for number, outcome in enumerate(outcomes, 1):
        if outcome.result is None:
            hint = "Finished results are kept: correct this, or repeat the command."
            raise ClusterError(f"{outcome.piece}: {outcome.error}", hint=hint)
        records.add(outcome.result)
        if not workspace.executor.in_process:
            workspace.say(f"{number} done, now {outcome.piece}")


def _missing(
    workspace: Workspace, records: Records, exhibit: str, part: Part, seed: int, shots: int
) -> Iterator[MethodRun]:
    """Yield the runs that have no records yet: all methods on the first batch of people, then on the next."""
    say, tested = workspace.say, [workspace.hashed(person.id) for person in workspace.tested(part, shots)]
    if not tested:
        say(f"{exhibit}: {shots} shots are left out, too few people have enough items")
        return
    bank, lacking, full = workspace.bank(part, seed), [], part.texts and workspace.task.labels is None
    for method in part.methods:
        if not method.fits(workspace.task, len(bank), bank.calibration is not None):
            say(f"{exhibit}: {method.name} is left out, it does not fit this task or bank")
        elif records.lacks(where := workspace.where(part, method, seed, shots), tested, full):
            lacking.append((method, where))
    done, total, began = 0, len(tested) * len(lacking), time.monotonic()
    for batch in batches(len(tested)):
        for method, where in lacking:
            if records.lacks(where, tested[batch.start : batch.stop], full):
                run = MethodRun(exhibit, part, seed, shots, method, where, batch, full)
                if workspace.executor.in_process:
                    minutes = (time.monotonic() - began) / done * (total - done) / 60 if done else 0.0
                    left = f", about {minutes:.0f} min left" if done else ""
                    say(f"{run} ({done / total:.0%}{left})")
                yield run
            done += len(batch)


def compute_records(workspace: Workspace, run: MethodRun) -> list[Record]:
    """Return a record for each person of the batch."""
    test_batch = workspace.batch_of(run.part, run.seed, run.shots, run.batch)
    outcome, scores = run.method.scored(test_batch, run.seed)
    # Coefficients by layer are not recorded.
    merge = outcome.merge if outcome.merge is not None and outcome.merge.w.ndim == 2 else None
    return [
        Record(
            **run.where._asdict(),
            person=workspace.hashed(person.id),
            group=workspace.hashed(person.group) if person.group else "",
            metrics={name: round(value, 6) for name, value in score.metrics.items()},
            nll=None if score.nll is None else tuple(round(float(value), 5) for value in score.nll),
            seconds=round(outcome.seconds / len(test_batch.people), 4),
            bytes=round(outcome.bytes_per_person, 1),
            anchors=tuple(merge.ids[u].tolist()) if merge else (),
            w=tuple(round(float(value), 5) for value in merge.w[u]) if merge else (),
            chosen=outcome.chosen[u] if outcome.chosen else "",
            ids=tuple(workspace.question_id(person, item, n) for n, item in enumerate(test_batch.queries[u])),
            answers=tuple(outcome.answers[u].texts),
            golds=tuple(test_batch.golds[u]),
            labels=_log_probs(outcome.answers[u].scores),
            shot_labels=_log_probs(outcome.answers[u].shots),
            prompt_tokens=round(outcome.answers[u].prompt_tokens, 1),
        )
        for u, (person, score) in enumerate(zip(test_batch.people, scores))
    ]


def _log_probs(scores: Tensor | None) -> tuple[tuple[float, ...], ...]:
    """Return the log probabilities of labels in rows of scores, rounded."""
    rows = [] if scores is None else scores.double().log_softmax(1).tolist()
    return tuple(tuple(round(value, 5) for value in row) for row in rows)
