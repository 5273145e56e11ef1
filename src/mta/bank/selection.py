"""Choose what a bank is trained on: pooled items for the task LoRA, and the people who become anchors."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence, Set
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from mta.config import BankSettings, TaskLoraSettings
from mta.data.history import Item, Person
from mta.data.tasks.task import Task
from mta.errors import InputError
from mta.model.encoders import Encoder, encode_people

CHOICE = ("anchors", "min_items", "encode", "choose")  # settings of the bank that determine the anchors
_TESTED = 256  # held-out items of the task LoRA, at most


def pooled_candidates(candidates: Sequence[Person], anchors: Set[str], settings: TaskLoraSettings) -> list[Person]:
    """Return the candidates who train the task LoRA, too, with the items that may.

    These are all items of the ``anchors`` (ids), and of others those that they do not keep back.
    Source: our choice; measured in docs/decisions/023-everyone-trains.md.
    """
    count = settings.kept_back
    if count is None:
        return []
    shared = (person if person.id in anchors else not_kept_back(person, count) for person in candidates)
    return [person for person in shared if person.items]


def not_kept_back(person: Person, count: int) -> Person:
    """Return the person without the first ``count`` items, and without later copies of these."""
    first = {_fields(item) for item in person.items[:count]}
    return replace(person, items=tuple(item for item in person.items[count:] if _fields(item) not in first))


def _fields(item: Item) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(item.fields.items()))


def pooled_items(
    people: Sequence[Person],
    settings: TaskLoraSettings,
    seed: int,
    held_out: Sequence[Person] = (),
    candidates: Sequence[Person] = (),
) -> tuple[list[Item], list[Item]]:
    """Return the items that train the task LoRA, chosen by hash, and held-out items that tell when to stop.

    At most ``per_person`` items of each person, and at most ``items`` in total. With several rounds of training and 20
    people or more, a tenth of them is held out, together with the people who share items with them; or ``held_out``.
    The ``candidates`` train, too, and are not held out: later stages learn from them.
    The choice does not depend on the order of people. Source: our choice.
    """
    held = _held_out(people, seed) if settings.rounds > 1 and not held_out else set()
    rest = [person for person in (*people, *candidates) if _group(person) not in held]
    held_out = held_out or [person for person in people if _group(person) in held]
    trained, tested = _pooled(rest, settings, seed), _pooled(held_out, settings, seed)
    return trained[: settings.items], tested[:_TESTED]


def _held_out(people: Sequence[Person], seed: int) -> set[str]:
    groups = {_group(person) for person in people}
    count = len(groups) // 10 if len(groups) >= 20 else 0
    return set(sorted(groups, key=lambda group: hashlib.sha256(f"{seed}/held out/{group}".encode()).digest())[:count])


def _group(person: Person) -> str:
    return person.group or person.id


def _pooled(people: Sequence[Person], settings: TaskLoraSettings, seed: int) -> list[Item]:
    def draw(person: Person, place: int) -> bytes:
        return hashlib.sha256(f"{seed}/{person.id}/{place}".encode()).digest()

    ranked: list[tuple[int, bytes, Item]] = []
    for person in people:
        draws = sorted((draw(person, place), place) for place in range(len(person.items)))
        ranked += [(turn, drawn, person.items[i]) for turn, (drawn, i) in enumerate(draws[: settings.per_person])]
    # Each person's first item comes before any second item, so that people have similar numbers of items.
    ranked.sort(key=lambda entry: entry[:2])
    return [item for _, _, item in ranked]


def choose_anchors(
    task: Task, encoder: Encoder, candidates: Sequence[Person], settings: BankSettings, seed: int
) -> tuple[list[Person], Tensor, list[int]]:
    """Return the candidates with enough items, their vectors (U, E), and the indices of the anchors among them."""
    able = [person for person in candidates if len(person.items) >= settings.min_items]
    vectors = encode_people(encoder, task, able, settings.encode) if able else torch.empty(0, 0)
    return able, vectors, select_anchors(able, vectors, settings.anchors, seed, choose=settings.choose)


def select_anchors(
    candidates: Sequence[Person],
    vectors: Tensor,
    anchors: int,
    seed: int,
    *,
    share: int = 4,
    choose: Literal["active", "central", "random"] = "active",
) -> list[int]:
    """Return the indices of the anchors among the candidates, ascending.

    Clusters ``vectors`` (U, E) by k-means, and takes from each cluster the person with the most items (``active``),
    nearest to the center (``central``), or drawn by the seed (``random``); on ties, the smaller id.
    There is at most one anchor per ``share`` candidates; raises InputError if that leaves no anchor.
    Source: arXiv:2511.20072, stage 1 (``active``); a quarter is our choice.
    """
    from sklearn.cluster import KMeans

    clusters = min(anchors, len(candidates) // share)
    if clusters < 1:
        raise InputError(
            f"{len(candidates)} candidates for anchors; at least {share} are needed, "
            f"and {share * anchors} for {anchors} anchors",
            hint="Give more people, or lower bank.anchors and bank.min_items.",
        )
    means = KMeans(clusters, n_init=4, random_state=seed)
    labels = torch.from_numpy(means.fit_predict(vectors.double().numpy()))
    distances = (vectors.double() - torch.from_numpy(means.cluster_centers_)[labels]).norm(dim=1)

    def rank(i: int) -> float:
        if choose == "active":
            return -len(candidates[i].items)
        draw = hashlib.sha256(f"{seed}/{candidates[i].id}".encode()).digest()
        return float(distances[i]) if choose == "central" else int.from_bytes(draw[:6], "big")

    return sorted(
        min((int(i) for i in (labels == c).nonzero()), key=lambda i: (rank(i), candidates[i].id))
        for c in range(clusters)
        if bool((labels == c).any())
    )
