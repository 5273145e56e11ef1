"""The protocol: some of a person's items are the shots, later ones the queries, the same for every method."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

from torch import Tensor

from mta.bank.bank import Bank
from mta.bank.calibration.info import calibrated_merge, calibrated_stack
from mta.config import MergeSettings, Run, StackSettings, parse_size
from mta.data.earlier import with_history
from mta.data.history import PROFILE, Item, Person
from mta.data.shots_and_queries import QueryOrder, shots_and_queries
from mta.data.tasks.task import Task
from mta.errors import InputError
from mta.evaluation.context import Context, gathered_evidence
from mta.evaluation.metrics import Answers
from mta.model.base import BaseModel
from mta.model.encoders import encode_people
from mta.personalize.evidence import Evidence
from mta.personalize.merge import Merge, fit_merge, frozen_numbers, needs_encodings, needs_evidence
from mta.personalize.policies import policy_of
from mta.personalize.shots import ShotsJob, shots_of
from mta.system.device import clock
from mta.training.plan import Plan, plan_cohorts

log = logging.getLogger("mta")


def members_and_others(bank: Bank, people: Sequence[Person]) -> tuple[list[Person], list[Person]]:
    """Return the people that a bank was built from, and the people who share no item with them and can be tested."""
    members = [person for person in people if bank.info.members.parts_of(person.id)]
    ids, groups = {person.id for person in members}, {person.group for person in members if person.group}
    others = [person for person in people if person.id not in ids and person.group not in groups]
    if connected := len(people) - len(members) - len(others):
        log.warning("%d people are left out, because they share items with people in the bank", connected)
    return members, others


def check_lengths(base: BaseModel, task: Task, asked: Iterable[tuple[str, Sequence[Item], Sequence[Item]]]) -> None:
    """Raise DataError with the person's id for the first item that is too long even if it is cut.

    ``asked`` are people's ids, shots, and queries. Where the answer is free text, a query leaves room for it.
    """
    room = base.prompts.answer_tokens(task) if task.labels is None else None
    for id, shots, queries in asked:
        place = f"an item of {id!r}"
        base.prompts.check(task, ((place, item) for item in (*shots, *queries)))
        if room is not None:
            base.prompts.check(task, ((place, query) for query in queries), room)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a method returns: everybody's answers, its seconds (without answering), and the bytes stored per person.

    ``chosen`` names each person's candidate, if the method chooses among methods.
    """

    answers: list[Answers]
    seconds: float
    bytes_per_person: float
    merge: Merge | None = None
    chosen: tuple[str, ...] = ()


@dataclass(frozen=True)
class TestBatch:
    """Held-out people with the same number of shots and queries each: what a method gets.

    ``people`` have only their shots, so no method can learn from queries. ``task`` has the wording of the prompts.
    ``retrieve`` is the number of earlier items in the prompts that the bank was trained with. Without ``write_texts``
    free text is not generated, and only the likelihood of the true text is computed. ``tested`` are all tested people
    with only their shots, if the batch holds some of them: controls take other people from there. Evidence and merges
    are those of ``merges_from``, if given: a batch with the same shots that asks other queries or shows other prompts.
    ``evidence_of_shots`` gives the evidence where another batch has it.
    """

    __test__ = False  # pytest takes classes called Test... for tests
    context: Context
    people: Sequence[Person]
    queries: list[tuple[Item, ...]]
    task: Task
    retrieve: int = 0
    write_texts: bool = True
    tested: Sequence[Person] = ()
    merges_from: TestBatch | None = None
    evidence_of_shots: Callable[[], Evidence] | None = None
    outcomes: dict[tuple[type, str, int], Outcome] = field(default_factory=dict, init=False, repr=False)
    merges: dict[tuple[str, int], tuple[Merge, float]] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(
        cls,
        context: Context,
        people: Sequence[Person],
        *,
        shots: int,
        queries: int,
        ask: QueryOrder = "next",
        write_texts: bool = True,
        tested: Sequence[Person] = (),
    ) -> TestBatch:
        """Split each person by ``shots_and_queries``; prompts show earlier shots as the bank's do.

        ``tested`` are all tested people, if ``people`` are some of them.

        Raises InputError if a person has too few items or was used for the bank, which may have seen the queries.
        """
        bank = context.bank
        if seen := sum(bool(bank.info.members.parts_of(person.id)) for person in people):
            raise InputError(
                f"{seen} of {len(people)} people are in the bank or its task LoRA; they cannot be tested on",
                hint="Give people the bank was not built from.",
            )

        def split(group: Sequence[Person]) -> tuple[list[Person], list[tuple[Item, ...]]]:
            parts = [shots_and_queries(bank.task, person, shots, queries, ask) for person in group]
            asked = [replace(person, items=items, queries=later) for person, (items, later) in zip(group, parts)]
            shown = [with_history(bank.task, person, bank.history) for person in asked]
            return [replace(person, queries=()) for person in shown], [person.queries for person in shown]

        return cls(context, *split(people), bank.task, write_texts=write_texts, tested=split(tested)[0])

    # -- what methods read (docs/how-to/add-a-method.md) ---------------------------------------------------------------

    @property
    def base(self) -> BaseModel:
        """The frozen model."""
        return self.context.base

    @property
    def bank(self) -> Bank:
        """The bank of anchors and its task LoRA."""
        return self.context.bank

    @property
    def run(self) -> Run:
        """The settings of the run, with what they leave to the bank's calibration."""
        return self.bank.with_calibrated_settings(self.context.run)

    @property
    def anchors(self) -> Sequence[Person]:
        """The anchors' whole histories, in the bank's order; empty if they are not known."""
        return self.context.anchors

    @property
    def task_people(self) -> Sequence[Person]:
        """The task people; empty if they are not known."""
        return self.context.task_people

    @cached_property
    def jobs(self) -> list[ShotsJob]:
        """The shots as training examples."""
        return [shots_of(self.base, self.task, person) for person in self.people]

    @cached_property
    def golds(self) -> list[list[str]]:
        """The true answers to the queries."""
        return [[self.task.target(item) for item in items] for items in self.queries]

    @property
    def history_bytes(self) -> float:
        """The bytes of the texts in front of a person's prompts, which the bank's prompts need, on average."""
        if not self.bank.history:
            return 0.0
        shown = (max(len(item.fields.get(PROFILE, "").encode()) for item in items) for items in self.queries)
        return sum(shown) / len(self.queries)

    def plan(self, numbers: int, merge: MergeSettings | None = None) -> Plan:
        """Return cohorts that fit the memory, to train ``numbers`` numbers per person, over the merge if given."""
        memory, below = parse_size(self.run.memory), frozen_numbers(self.bank, merge)
        return plan_cohorts(self.base, self.jobs, numbers, memory, below=below)

    # -- stage 2, computed once for all methods ------------------------------------------------------------------------

    @cached_property
    def _similarity(self) -> tuple[Tensor, float]:
        if self.merges_from:
            return self.merges_from._similarity
        start, how = clock(self.base.device), self.bank.info.run.bank.encode
        vectors = encode_people(self.context.encoder, self.bank.task, self.people, how)
        return self.bank.similarity(vectors), clock(self.base.device) - start

    @property
    def encoding_seconds(self) -> float:
        """Seconds that the encodings of people took."""
        return self._similarity[1]

    @property
    def similarity(self) -> Tensor:
        """Cosine of people and anchors, (U, N)."""
        return self._similarity[0]

    @cached_property
    def _evidence(self) -> tuple[Evidence, float]:
        if self.merges_from:
            return self.merges_from._evidence
        if self.evidence_of_shots:  # the seconds are those of the other batch
            return self.evidence_of_shots(), 0.0
        return (self.context.evidence_of or gathered_evidence)(self.context, self.jobs)

    @property
    def evidence(self) -> Evidence:
        """Likelihood of the shots under every anchor."""
        return self._evidence[0]

    @property
    def evidence_seconds(self) -> float:
        """Seconds that the evidence took."""
        return self._evidence[1]

    def merge(self, settings: MergeSettings, seed: int) -> tuple[Merge, float]:
        """Return everybody's merge, and the seconds that fitting it took, with those of evidence and encodings.

        Each method takes them, whichever method gathered them first.
        """
        if self.merges_from:
            return self.merges_from.merge(settings, seed)
        settings = self.merge_settings(settings)
        key = (settings.model_dump_json(), seed if policy_of(settings).learns else 0)
        if key not in self.merges:
            evidence, gathering = self._evidence if needs_evidence(settings) else (None, 0.0)
            similarity = self.similarity if needs_encodings(settings) else None
            gathering += self.encoding_seconds if similarity is not None else 0.0
            start = clock(self.base.device)
            merge = fit_merge(
                self.base,
                self.jobs,
                self.bank.device_anchors,
                self.bank.task_adapters,
                settings,
                similarity=similarity,
                evidence=evidence,
                calibration=self.bank.calibration,
                seed=seed,
                tokens_per_batch=self.plan(len(self.bank), settings).tokens_per_batch,
                on_step=partial(on_step, "coefficients") if (on_step := self.context.on_step) else None,
            )
            self.merges[key] = merge, clock(self.base.device) - start + gathering
        return self.merges[key]

    def merge_settings(self, own: MergeSettings | None) -> MergeSettings:
        """Return a method's ``own`` settings, or those of the run, with what they leave to the bank's calibration."""
        return calibrated_merge(own or self.context.run.merge, self.bank.info.calibration)

    def stack_settings(self, own: StackSettings | None, merge: MergeSettings) -> StackSettings:
        """Return a stack's ``own`` settings over ``merge``, or those of the run, with what they leave to the bank."""
        info = self.bank.info
        return calibrated_stack(own or self.context.run.stack, merge, info.calibration, info.run.stack.lora)
