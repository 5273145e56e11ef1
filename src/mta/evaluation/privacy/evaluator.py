"""Ask the models of a bank and of people about items they were trained on and other items, and attack the losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mta.config import MergeSettings
from mta.data.history import Item, Person
from mta.evaluation.methods import Base, Method, TaskLora
from mta.evaluation.methods.merged import answered
from mta.evaluation.metrics import query_nll
from mta.evaluation.privacy.membership import Attack, Trials, attack
from mta.evaluation.privacy.sampling import AttackSample
from mta.evaluation.protocol import Outcome, Panel
from mta.personalize.merge import Merge

ANCHORS, POOL, SHOTS = "the anchors' items", "the task LoRA's items", "a person's own shots"
OWN, ANOTHER, PERSONAL = "the anchor's own", "another anchor's", "merge and stack"
Losses = Mapping[int, float]  # number of an item -> its loss under one model
References = Mapping[str, Losses]  # name of a model without the attacked LoRA -> its losses
Sets = Sequence[Sequence[int]]  # numbers of items, one list per model


@dataclass(frozen=True, slots=True)
class Row:
    """One kind of attacked model, asked about one kind of items: numbers of models and items, and each attack by name.

    Attacks are ``loss``, and ``over base`` and ``over task LoRA``: the loss minus that of the reference model.
    """

    about: str
    name: str
    models: int
    members: int
    others: int
    attacks: Mapping[str, Attack]


class Pair(NamedTuple):
    """A target's merge and one anchor: the anchor's |w|, and the share of other items ranked below the anchor's."""

    target: int
    w: float
    beaten: float


@dataclass(frozen=True, slots=True)
class NumberedItems:
    """All items that models are asked about; their positions are their numbers.

    ``owners`` numbers each item's person: anchor a of the bank is person a. ``anchors`` and ``pool`` are numbers per
    person, ``shots`` and ``later`` per target, and ``others`` numbers of all other people.
    """

    items: list[Item]
    owners: list[int]
    anchors: Sets
    pool: Sets
    others: list[int]
    shots: Sets
    later: Sets

    @classmethod
    def of(cls, sample: AttackSample, shots: Sequence[int]) -> NumberedItems:
        """Number the items of a sample; ``shots`` is the number of shots of each target."""
        items: list[Item] = []
        owners: list[int] = []

        def numbered(people: Sequence[Person]) -> list[list[int]]:
            numbers = []
            for person in people:
                owner, first = owners[-1] + 1 if owners else 0, len(items)
                items.extend(person.items)
                owners.extend([owner] * len(person.items))
                numbers.append(list(range(first, len(items))))
            return numbers

        anchors, pool, others, targets = map(numbered, (sample.anchors, sample.pool, sample.others, sample.targets))
        return cls(
            items,
            owners,
            anchors,
            pool,
            _flat(others),
            [numbers[:count] for numbers, count in zip(targets, shots)],
            [numbers[count:] for numbers, count in zip(targets, shots)],
        )

    @property
    def targets(self) -> list[int]:
        """The person number of each target."""
        return [self.owners[numbers[0]] for numbers in self.shots]

    def others_of(self, models: int) -> Sets:
        """Deal the others' items to models, each item to one model: asking every model about all costs too much."""
        return [self.others[model::models] for model in range(models)]

    def merged_items(self, gates: Tensor, count: int) -> Sets:
        """Return ``count`` items of the anchors with a coefficient, as many of each anchor; gates (U, N) -> U lists."""
        sets = [[self.anchors[int(a)] for a in w.nonzero().flatten()] for w in gates]
        return [spread(numbers, count, turn) for turn, numbers in enumerate(sets)]


@dataclass(frozen=True, slots=True)
class MembershipEvaluator:
    """Membership inference on one bank; ``panel`` holds the targets with their shots, ``trained`` the anchors."""

    panel: Panel
    items: NumberedItems
    trained: Sequence[Person]
    items_each: int
    say: Callable[[str], None] = lambda _: None

    # -- the models ----------------------------------------------------------------------------------------------------

    def references(self) -> tuple[References, list[Row]]:
        """Return the losses and rows of base and task LoRA, which were not trained on the items of anchors."""
        items, rows = self.items, []
        # One person asks about all items, so that equal prompts and prompt beginnings are computed once.
        panel, everything = self._panel_of(self.panel.people[:1]), [range(len(items.items))]
        found: dict[str, Losses] = {}
        for method in [Base(), TaskLora()] if self.panel.bank.task_lora else [Base()]:
            self.say(method.name)
            losses = self._losses(panel, everything, partial(method.run, seed=0))[0]
            row, same = partial(self._rows, name=method.name, references=found.copy()), [losses] * len(items.shots)
            rows += row(ANCHORS, losses=[losses], members=[_flat(items.anchors)], others=[items.others])
            rows += row(POOL, losses=[losses], members=[_flat(items.pool)], others=[items.others])
            rows += row(SHOTS, losses=same, members=items.shots, others=items.later, owners=items.targets)
            found[method.name] = losses
        return found, rows

    def meta_lora_rows(self, references: References) -> list[Row]:
        """Return the rows of each meta-LoRA alone, w = 1: about its own anchor, the upper bound, and about another."""
        self.say("meta-LoRAs, one by one")
        anchors = self.items.anchors
        count, others = len(anchors), self.items.others_of(len(anchors))
        w = torch.ones(count, 1, dtype=self.panel.base.master_dtype)
        alone = partial(answered, merge=Merge(torch.arange(count)[:, None], w), settings=MergeSettings(k=1), seconds=0)
        following = [*anchors[1:], anchors[0]] if count > 1 else [[]]
        losses = self._losses(self._panel_of(self.trained), _joined(anchors, following, others), alone)
        row = partial(self._rows, ANCHORS, losses=losses, others=others, owners=range(count), references=references)
        return [*row(name=OWN, members=anchors), *row(name=ANOTHER, members=following)]

    def target_rows(
        self, name: str, method: Method, settings: MergeSettings, references: References
    ) -> tuple[list[Row], list[Pair]]:
        """Return the rows of the targets' models: about the anchors in their merges, by ``settings``, and about shots.

        Rows about shots exist for the run's own merge only.
        """
        self.say(name)
        items, run = self.items, self.panel.run
        merge, _ = self.panel.merge(settings, run.seed)
        gates = merge.gates(len(items.anchors)).double().abs()
        others, members = items.others_of(len(items.shots)), items.merged_items(gates, self.items_each)
        with_shots = settings == run.merge
        asked = _joined(members, others, items.shots, items.later) if with_shots else _joined(members, others)
        losses = self._losses(self.panel, asked, partial(method.run, seed=run.seed))
        row = partial(self._rows, name=name, losses=losses, owners=items.targets, references=references)
        rows = row(ANCHORS, members=members, others=others)
        if with_shots:
            rows += row(SHOTS, members=items.shots, others=items.later)
        return rows, self._pairs(losses, members, others, gates, references)

    # -- their answers -------------------------------------------------------------------------------------------------

    def _panel_of(self, people: Sequence[Person]) -> Panel:
        return replace(self.panel, people=people)

    def _losses(self, panel: Panel, asked: Sets, run: Callable[[Panel], Outcome]) -> list[Losses]:
        panel = panel.asked([tuple(self.items.items[n] for n in numbers) for numbers in asked])
        losses: list[Losses] = []
        for numbers, answers, golds in zip(asked, run(panel).answers, panel.golds):
            nll = query_nll(panel.task, answers, golds)
            assert nll is not None  # every attacked model gives probabilities
            losses.append(dict(zip(numbers, nll.tolist())))
        return losses

    # -- the attacks ---------------------------------------------------------------------------------------------------

    def _rows(
        self,
        about: str,
        *,
        name: str,
        losses: Sequence[Losses],
        members: Sets,
        others: Sets,
        references: References,
        owners: Sequence[int] = (),
    ) -> list[Row]:
        """Return one row, or none without members or others.

        ``owners`` numbers the person of each model: their items are resampled together with the model.
        """
        entries = [(m, n, kind) for kind, sets in ((1, members), (0, others)) for m, ns in enumerate(sets) for n in ns]
        table = np.array(entries, dtype=np.intp).reshape(-1, 3)
        counts = int(table[:, 2].sum()), int((1 - table[:, 2]).sum())
        if not all(counts):
            return []
        owner_of = self.items.owners
        people = [-1 if owners and owners[m] == owner_of[n] else owner_of[n] for m, n, _ in entries]
        trials = Trials(table[:, 0], np.array(people, dtype=np.intp), table[:, 2] == 1)
        loss = np.array([losses[m][n] for m, n, _ in entries])
        scores = {"loss": -loss}
        for reference, known in references.items():
            scores[f"over {reference}"] = np.array([known[n] for _, n, _ in entries]) - loss
        attacks = {attacked: attack(trials, values) for attacked, values in scores.items()}
        return [Row(about, name, len(losses), *counts, attacks)]

    def _pairs(
        self, losses: Sequence[Losses], members: Sets, others: Sets, gates: Tensor, references: References
    ) -> list[Pair]:
        """Return how often the items of each anchor in a merge rank above the other items, over the last reference."""
        below, owner_of, pairs = list(references.values())[-1], self.items.owners, []
        for target, (loss, numbers, rest) in enumerate(zip(losses, members, others)):
            beaten = np.array([below[n] - loss[n] for n in rest])
            for anchor in sorted({owner_of[n] for n in numbers}):
                scores = [below[n] - loss[n] for n in numbers if owner_of[n] == anchor]
                shares = [float((beaten < s).mean() + (beaten <= s).mean()) / 2 for s in scores]
                pairs.append(Pair(target, float(gates[target, anchor]), sum(shares) / len(shares)))
        return pairs


def spread(sets: Sets, count: int, turn: int) -> list[int]:
    """Return at most ``count`` numbers, evenly from all sets; each ``turn`` starts with another set and position."""
    share = -(-count // max(len(sets), 1))
    picked: list[int] = []
    for i in range(len(sets)):
        numbers = sets[(turn * count + i) % len(sets)]
        picked += [numbers[(turn * share + j) % len(numbers)] for j in range(min(share, len(numbers)))]
    return picked[:count]


def _flat(sets: Sets) -> list[int]:
    return [number for numbers in sets for number in numbers]


def _joined(*parts: Sets) -> Sets:
    return [_flat(sets) for sets in zip(*parts)]
