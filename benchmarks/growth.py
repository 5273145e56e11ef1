"""Histories that grow from 8 items to 16: what keeping, training on, refreshing and beginning anew are worth, and cost.

python -m benchmarks.growth --bank demo/bank --people 32 --out results/growth.json

People of MovieLens who had no part in the bank. A state is made of a person's first 8 items; then 8 more come. All are
asked their next 12, and the NLL of what they answered (over the labels) is compared, paired, with keeping the state.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from mta.bank.bank import Bank
from mta.bank.format import read_info
from mta.config import Run, override
from mta.data.history import Person
from mta.data.readers import read_people
from mta.evaluation.statistics import Interval, bootstrap
from mta.model.base import BaseModel
from mta.personalize import Personalizer
from mta.personalize.adapters import row_adapters
from mta.personalize.outcomes import Updated
from mta.personalize.policies import policy_of
from mta.personalize.update import Action, StateUpdate, _decided
from mta.store.state import State
from mta.system.assets import resolve
from mta.system.atomic import write_json
from mta.system.device import cores, processor
from mta.system.malloc import keep_freed_memory
from mta.system.provenance import commit
from mta.training.scoring import label_scores

SHOTS, MORE, ASKED = 8, 8, 12


def newcomers(bank: Bank, count: int) -> list[Person]:
    """People with enough items who are in nothing of the bank, drawn by a hash."""
    everybody = read_people(resolve("movielens-100k"), "movielens-rating")
    enough = [person for person in everybody if len(person.items) >= SHOTS + MORE + ASKED]
    new = [person for person in enough if not bank.info.members.parts_of(person.id)]
    drawn = sorted(new, key=lambda person: hashlib.sha256(f"growth/{person.id}".encode()).digest())
    return sorted(drawn[:count], key=lambda person: person.id)


def made(base: BaseModel, bank: Bank, run: Run, people: list[Person]) -> tuple[list[State], float]:
    """States of all their items, and the seconds that took."""
    personal, start = Personalizer(base, bank, run=run), time.perf_counter()
    personal.personalize(people)
    return [personal.state(person.id) for person in people], time.perf_counter() - start


def updated(
    base: BaseModel, bank: Bank, run: Run, young: list[Person], grown: list[Person], always: Action | None
) -> tuple[list[State], Updated, float]:
    """States that were updated, what became of them, and the seconds that the update took."""
    personal = Personalizer(base, bank, run=run)
    personal.personalize(young)
    start = time.perf_counter()
    with patch("mta.personalize.update._decided", (lambda *_: StateUpdate(always)) if always else _decided):
        done = personal.update(grown)
    seconds = time.perf_counter() - start
    return [personal.state(person.id) for person in grown], done, seconds


def losses(base: BaseModel, bank: Bank, people: list[Person], states: list[State]) -> Tensor:
    """(U,): mean NLL of what people answered to their questions, in nats."""
    found = []
    for person, state in zip(people, states):
        items = person.items[SHOTS + MORE : SHOTS + MORE + ASKED]
        (scores,) = label_scores(base, bank.task, [items], row_adapters(base, bank, [state]), owners=[0])
        right = [(bank.task.labels or ()).index(bank.task.target(item)) for item in items]
        found.append(-torch.log_softmax(scores, 1)[range(len(items)), right].mean())
    return torch.stack(found).double()


def main() -> None:
    """Measure and write."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("words", nargs="*", help="settings over the bank's, as key=value")
    parse.add_argument("--bank", type=Path, default=Path("demo/bank"))
    parse.add_argument("--people", type=int, default=32)
    parse.add_argument("--out", type=Path)
    args = parse.parse_args()
    base = BaseModel.of(read_info(args.bank).run)
    bank = Bank.open(args.bank, base)
    run = bank.settled(override(bank.info.run, args.words))
    if policy_of(run.merge).gradients:
        parse.error("states of this policy get new coefficients at every update: give merge.policy=learned")
    people = newcomers(bank, args.people)
    young, grown = [p.first(SHOTS) for p in people], [p.first(SHOTS + MORE) for p in people]
    states, took = made(base, bank, run, young)
    kept = losses(base, bank, people, states)
    rows: dict[str, dict[str, Any]] = {}
    rows["keep"] = {"nll": float(kept.mean()), "seconds a person": 0.0, "at first": took / len(people)}

    def tell(name: str, states: list[State], seconds: float) -> None:
        found: Interval = bootstrap(losses(base, bank, people, states) - kept)
        rows[name] = {"against keeping": asdict(found), "seconds a person": seconds / len(people)}
        print(f"{name:10} {found}  {seconds / len(people):.2f} s a person", flush=True)

    print(f"keep       {rows['keep']['nll']:.3f} nats; at first {took / len(people):.2f} s a person")
    choices: tuple[Action | None, ...] = ("retrain", "refresh", None)
    for name in choices:
        states, done, seconds = updated(base, bank, run, young, grown, name)
        tell(name or "decided", states, seconds)
    rows["decided"]["actions"] = {"keep": done.kept, "retrain": done.retrained, "refresh": done.refreshed}
    print(rows["decided"]["actions"])
    tell("anew", *made(base, bank, run, grown))
    if args.out:
        about = {"machine": f"{processor()}, {cores()} cores", "commit": commit(), "people": len(people)}
        write_json(args.out, {**about, "words": args.words, "bank": bank.hash, "rows": rows})


if __name__ == "__main__":
    keep_freed_memory()  # as the command line does
    main()
