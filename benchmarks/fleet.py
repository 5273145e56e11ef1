"""A thousand people through a local Ray cluster: does each cost the same, whether they are a hundred or a thousand?

python -m benchmarks.fleet --bank demo/bank --people 100 1000 --shots 2 --out results/fleet.json

People are copies of MovieLens raters, each with other items of theirs. Seconds are taken from the first cohort that is
done to the last, so that starting workers, which is told apart, is not counted for each.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from mta.bank.bank import Bank
from mta.bank.format import read_info
from mta.config import override
from mta.data.history import Person
from mta.data.readers import read_people
from mta.distributed.ray import Cluster
from mta.model.base import BaseModel
from mta.personalize import Personalizer
from mta.store import Store
from mta.store.maintenance import check
from mta.system.assets import resolve
from mta.system.atomic import write_json
from mta.system.device import processor
from mta.system.process import cores, keep_freed_memory
from mta.system.provenance import commit, versions

WORDS = ["merge.policy=similarity", "merge.k=2", "stack.training.steps=4"]


def copies(count: int, shots: int) -> list[Person]:
    """People with ``shots`` items each, no two of one rater the same."""
    raters = sorted(read_people(resolve("movielens-100k"), "movielens-rating"), key=lambda person: person.id)
    made = []
    for n in range(count):
        rater, turn = raters[n % len(raters)], n // len(raters)
        start = turn * shots % (len(rater.items) - shots)
        made.append(Person(f"copy {n}", rater.items[start : start + shots]))
    return made


def measured(
    base: BaseModel, bank: Bank, people: list[Person], store: Path, args: argparse.Namespace
) -> dict[str, float]:
    """One fleet, from nothing."""
    run = override(bank.info.run, [*WORDS, *args.words])
    reported = [(0, time.perf_counter())]
    with Cluster("local", workers=args.workers, most=args.together) as cluster:
        personal = Personalizer(base, bank, store, run=run, executor=cluster)
        done = personal.personalize(
            people, on_step=lambda _, step: reported.append((step.examples, time.perf_counter()))
        )
    whole = reported[-1][1] - reported[0][1]
    (first, since), (last, until) = reported[args.workers], reported[-1]
    found = check(Store(store))
    return {
        "people": done.trained,
        "failed": len(done.failed),
        "seconds": round(whole, 1),
        "seconds before the first cohort is done": round(reported[1][1] - reported[0][1], 1),
        "seconds a person": round((until - since) / (last - first), 4),
        "bytes a person": found.bytes / max(found.people, 1),
        "bytes": found.bytes,
    }


def main() -> None:
    """Measure and write."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("words", nargs="*", help="settings over the bank's, as key=value")
    parse.add_argument("--bank", type=Path, default=Path("demo/bank"))
    parse.add_argument("--people", type=int, nargs="+", default=[100, 1000])
    parse.add_argument("--shots", type=int, default=2)
    parse.add_argument("--workers", type=int, default=cores())
    parse.add_argument("--together", type=int, default=16)
    parse.add_argument("--out", type=Path)
    args = parse.parse_args()
    if (fewest := -(-min(args.people) // args.together)) <= args.workers + 1:
        parse.error(
            f"{min(args.people)} people are {fewest} cohorts, too few for {args.workers} workers: lower --workers"
        )
    base = BaseModel.of(read_info(args.bank).run)
    bank, rows = Bank.open(args.bank, base), []
    for count in args.people:
        with tempfile.TemporaryDirectory() as store:
            rows.append(measured(base, bank, copies(count, args.shots), Path(store), args))
        print(json.dumps(rows[-1]), flush=True)
    each = [row["seconds a person"] for row in rows]
    about = {"machine": f"{processor()}, {cores()} cores", "commit": commit(), "versions": versions()}
    about |= {
        "workers": args.workers,
        "together": args.together,
        "shots": args.shots,
        "settings": [*WORDS, *args.words],
    }
    found = {**about, "fleets": rows, "last against first, a person": round(each[-1] / each[0], 3)}
    print("a person of the last fleet against one of the first:", found["last against first, a person"])
    if args.out:
        write_json(args.out, found)


if __name__ == "__main__":
    keep_freed_memory()  # as the command line does
    main()
