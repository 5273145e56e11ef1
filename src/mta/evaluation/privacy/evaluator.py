"""An attack under way: items that were trained on and items that were not, put to the bank's models and people's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from mta.config import MergeSettings
from mta.data.history import Item, Person
from mta.evaluation.methods import Base, Merged, MergeThenAdapt, Outcome, TaskLora
from mta.evaluation.methods.merged import answered
from mta.evaluation.metrics import query_nll
from mta.evaluation.privacy.membership import Attack, Trials, attack
from mta.evaluation.privacy.sampling import Cast
from mta.evaluation.protocol import Panel
from mta.personalize.merge import Merge

ANCHORS, POOL, SHOTS = "the anchors' items", "the task LoRA's items", "a person's own shots"
OWN, ANOTHER, PERSONAL = "the anchor's own", "another anchor's", "merge and stack"
Told = Mapping[int, float]  # an item's number -> its loss under one model
Sets = Sequence[Sequence[int]]  # numbers of items, one list for each model


@dataclass(frozen=True, slots=True)
class Row:
    """One kind of model attacked: about whose items, how many models and trials, and each attack by its name.

    Attacks are ``loss``, and ``over base`` and ``over task LoRA``: the loss less that of those models.
    """

    about: str
    name: str
    models: int
    members: int
    others: int
    attacks: Mapping[str, Attack]


@dataclass(slots=True)
class Exam:
    """All items asked about have numbers, and so have people: anchor a of the bank is person a.

    ``panel`` holds the targets with their shots. ``pairs`` are (target, anchor's |w|, share of others beaten).
    """

    panel: Panel
    cast: Cast
    items_each: int
    say: Callable[[str], None] = lambda _: None
    rows: list[Row] = field(default_factory=list)
    pairs: list[tuple[int, float, float]] = field(default_factory=list)
    items: list[Item] = field(default_factory=list)
    whose: list[int] = field(default_factory=list)
    known: dict[str, Told] = field(default_factory=dict)
    anchors: Sets = field(init=False)
    pool: Sets = field(init=False)
    others: list[int] = field(init=False)
    shots: Sets = field(init=False)
    later: Sets = field(init=False)

    def __post_init__(self) -> None:
        self.anchors, self.pool = self._numbered(self.cast.anchors), self._numbered(self.cast.pool)
        self.others = [n for theirs in self._numbered(self.cast.others) for n in theirs]
        whole, kept = self._numbered(self.cast.targets), [len(person.items) for person in self.panel.people]
        self.shots = [numbers[:shots] for numbers, shots in zip(whole, kept)]
        self.later = [numbers[shots:] for numbers, shots in zip(whole, kept)]

    def _numbered(self, people: Sequence[Person]) -> list[list[int]]:
        numbers = []
        for person in people:
            who, first = self.whose[-1] + 1 if self.whose else 0, len(self.items)
            numbers.append(list(range(first, first + len(person.items))))
            self.items += person.items
            self.whose += [who] * len(person.items)
        return numbers

    # -- the models ----------------------------------------------------------------------------------------------------

    def references(self) -> None:
        """Base and task LoRA. Neither saw an anchor's item: what is told apart under them is how anchors differ."""
        # As if one person had them all: what prompts begin with alike, and whole prompts, are then computed once.
        panel, everything = replace(self.panel, people=self.panel.people[:1]), [list(range(len(self.items)))]
        methods = [Base(), TaskLora()] if self.panel.bank.task_lora else [Base()]
        for method in methods:
            self.say(method.name)
            told = self._ask(panel, everything, partial(method.run, seed=0))[0]
            self._judge(ANCHORS, method.name, [told], [_flat(self.anchors)], [self.others])
            self._judge(POOL, method.name, [told], [_flat(self.pool)], [self.others])
            self._judge(SHOTS, method.name, [told] * len(self.shots), self.shots, self.later, self._targets)
            self.known[method.name] = told

    def meta_loras(self) -> None:
        """Each anchor's meta-LoRA alone, w = 1: asked about that anchor, the most there is to find, and another."""
        self.say("meta-LoRAs, one by one")
        count, others = len(self.anchors), self._dealt(len(self.anchors))
        w = torch.ones(count, 1, dtype=self.panel.base.master_dtype)
        alone = partial(answered, merge=Merge(torch.arange(count)[:, None], w), settings=MergeSettings(k=1), seconds=0)
        following = [*self.anchors[1:], self.anchors[0]] if count > 1 else [[]]
        told = self._ask(replace(self.panel, people=self.cast.trained), _joined(self.anchors, following, others), alone)
        self._judge(ANCHORS, OWN, told, self.anchors, others, range(count))
        self._judge(ANCHORS, ANOTHER, told, following, others, range(count))

    def merge(self, name: str, settings: MergeSettings) -> None:
        """The targets' merges by one policy: about anchors they are made of, and where it is the run's, about shots."""
        self.say(name)
        seed, others = self.panel.run.seed, self._dealt(len(self.shots))
        gates = self._gates(settings)
        members = self._of_merges(gates)
        asked = _joined(members, others, *(self._own if settings == self.panel.run.merge else ()))
        told = self._ask(self.panel, asked, partial(Merged(merge=settings).run, seed=seed))
        self._judge(ANCHORS, name, told, members, others, self._targets)
        if settings == self.panel.run.merge:
            self._judge(SHOTS, name, told, *self._own, self._targets)
        self._pair(told, members, others, gates)

    def personal(self) -> None:
        """What people have: the run's merge, and the stack over it."""
        self.say(PERSONAL)
        run, others = self.panel.run, self._dealt(len(self.shots))
        members = self._of_merges(self._gates(run.merge))
        whole = partial(MergeThenAdapt(merge=run.merge, stack=run.stack).run, seed=run.seed)
        told = self._ask(self.panel, _joined(members, others, *self._own), whole)
        self._judge(ANCHORS, PERSONAL, told, members, others, self._targets)
        self._judge(SHOTS, PERSONAL, told, *self._own, self._targets)

    # -- what they are asked -------------------------------------------------------------------------------------------

    @property
    def _targets(self) -> list[int]:
        return [self.whose[numbers[0]] for numbers in self.shots]

    @property
    def _own(self) -> tuple[Sets, Sets]:
        return self.shots, self.later

    def _dealt(self, models: int) -> Sets:
        """Others' items, each to one of the models: to ask all models about all would take as many times as long."""
        return [self.others[model::models] for model in range(models)]

    def _gates(self, settings: MergeSettings) -> Tensor:
        return self.panel.merge(settings, self.panel.run.seed)[0].gates(len(self.anchors)).double().abs()

    def _of_merges(self, gates: Tensor) -> Sets:
        """For each target, items of the anchors with a coefficient, as many of each; (U, N) -> U lists."""
        sets = [[self.anchors[int(a)] for a in w.nonzero().flatten()] for w in gates]
        return [spread(theirs, self.items_each, turn) for turn, theirs in enumerate(sets)]

    def _ask(self, panel: Panel, asked: Sets, run: Callable[[Panel], Outcome]) -> list[Told]:
        panel = replace(panel, queries=[tuple(self.items[n] for n in numbers) for numbers in asked], outcomes={})
        told: list[Told] = []
        for numbers, answers, golds in zip(asked, run(panel).answers, panel.golds):
            nll = query_nll(panel.task, answers, golds)
            assert nll is not None  # every model asked here tells probabilities
            told.append(dict(zip(numbers, nll.tolist())))
        return told

    # -- what came out -------------------------------------------------------------------------------------------------

    def _judge(
        self, about: str, name: str, told: Sequence[Told], members: Sets, others: Sets, of: Sequence[int] = ()
    ) -> None:
        """One row; ``of`` says whose each model is: their own items come and go with it when people are resampled."""
        entries = [(m, n, kind) for kind, sets in ((1, members), (0, others)) for m, ns in enumerate(sets) for n in ns]
        table = np.array(entries, dtype=np.intp).reshape(-1, 3)
        counts = int(table[:, 2].sum()), int((1 - table[:, 2]).sum())
        if not all(counts):
            return
        people = [-1 if of and of[m] == self.whose[n] else self.whose[n] for m, n, _ in entries]
        trials = Trials(table[:, 0], np.array(people, dtype=np.intp), table[:, 2] == 1)
        loss = np.array([told[m][n] for m, n, _ in entries])
        below = {f"over {one}": np.array([known[n] for _, n, _ in entries]) for one, known in self.known.items()}
        scores = {"loss": -loss, **{attacked: reference - loss for attacked, reference in below.items()}}
        attacks = {attacked: attack(trials, one) for attacked, one in scores.items()}
        self.rows.append(Row(about, name, len(told), *counts, attacks))

    def _pair(self, told: Sequence[Told], members: Sets, others: Sets, gates: Tensor) -> None:
        below = list(self.known.values())[-1]
        for target, (one, theirs, rest) in enumerate(zip(told, members, others)):
            beaten = np.array([below[n] - one[n] for n in rest])
            for anchor in sorted({self.whose[n] for n in theirs}):
                scores = [below[n] - one[n] for n in theirs if self.whose[n] == anchor]
                shares = [float((beaten < s).mean() + (beaten <= s).mean()) / 2 for s in scores]
                self.pairs.append((target, float(gates[target, anchor]), sum(shares) / len(shares)))


def spread(sets: Sets, count: int, turn: int) -> list[int]:
    """At most ``count`` numbers, evenly from all sets; each ``turn`` begins with other sets, and elsewhere in them."""
    share = -(-count // max(len(sets), 1))
    picked: list[int] = []
    for i in range(len(sets)):
        numbers = sets[(turn * count + i) % len(sets)]
        picked += [numbers[(turn * share + j) % len(numbers)] for j in range(min(share, len(numbers)))]
    return picked[:count]


def _flat(sets: Sets) -> list[int]:
    return [number for numbers in sets for number in numbers]


def _joined(*parts: Sets) -> Sets:
    return [_flat(theirs) for theirs in zip(*parts)]
