"""Does what a bank's card promises hold? Two invented sets of 50 people, and 40 newcomers for each.

Nothing is set but the number of anchors, and what words say. One set has labels (a person's snack for a time and a
weather), the other free text (a person's way to pass on a message). Each newcomer has 8 items to learn from and 8 later
ones: the gain there is compared with the card's, and written to promise.json, with the NLL of both models.
Run:  python -m benchmarks.promise --out promise
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mta
from mta.bank.calibration.info import Gain
from mta.config import Run, override
from mta.system.atomic import write_json
from mta.system.device import processor
from mta.system.quantiles import student_t

PEOPLE, NEWCOMERS, ITEMS, SHOTS, ANCHORS = 50, 40, 24, 8, 6
TIMES, WEATHERS, SNACKS = ("morning", "noon", "evening"), ("sun", "rain", "snow"), ("apple", "toast", "soup", "nuts")
SNACK_TASK = """name: snack
item:
  prompt: "It is {time_of_day}, with {weather} outside. Which snack: apple, toast, soup or nuts? Answer with one word."
  target: snack
text: "{time_of_day}, {weather}"
labels: [apple, toast, soup, nuts]
metric: accuracy
"""
NAMES, THINGS = ("Ada", "Kim", "Noor", "Lev", "Mia"), ("the report", "the keys", "lunch", "the train", "the invoice")
STYLES: tuple[Callable[[str, str], str], ...] = (
    lambda who, what: f"hey {who.lower()}, quick one about {what} :)",
    lambda who, what: f"Dear {who}, I am writing to you about {what}. Kind regards",
    lambda who, what: f"{who.upper()}! {what.upper()}! NOW!",
    lambda who, what: f"{who}: {what}. Thanks.",
)


def snack(person: random.Random, day: random.Random) -> dict[str, str]:
    """Return one choice of a person who has a favorite for each situation, and keeps to it four times out of five."""
    favorites = {place: person.choice(SNACKS) for place in itertools.product(TIMES, WEATHERS)}
    when, weather = day.choice(TIMES), day.choice(WEATHERS)
    found = favorites[when, weather] if day.random() < 0.8 else day.choice(SNACKS)
    return {"time_of_day": when, "weather": weather, "snack": found}


def message(person: random.Random, day: random.Random) -> dict[str, str]:
    """Return one message of a person who has a style, and keeps to it nine times out of ten."""
    own, who = person.choice(STYLES), day.choice(NAMES)
    what = f"{day.choice(THINGS)} at {day.randrange(24)}:{day.randrange(10, 60)}"  # people do not share items
    style = own if day.random() < 0.9 else day.choice(STYLES)
    return {"input": f"Write to {who} about {what}.", "output": style(who, what)}


def write(path: Path, made: Callable[[random.Random, random.Random], dict[str, str]], people: int, name: str) -> None:
    """Write the items of invented people as JSONL."""
    lines = [
        json.dumps({"person": f"{name}-{n}"} | made(random.Random(f"{name} {n}"), random.Random(f"{name} {n} {item}")))
        for n in range(people)
        for item in range(ITEMS)
    ]
    path.write_text("\n".join(lines) + "\n")


@dataclass(frozen=True)
class Held:
    """Gain of newcomers on later items with a 95% interval, the card's expected gain, and the mean NLLs of both models.

    All in nats per token.
    """

    mean: float
    half: float
    expected: Gain
    pooled: float
    personal: float


def held(folder: Path, task: str, base: mta.BaseModel, run: Run) -> Held:
    """Build a bank from ``people.jsonl``, personalize ``newcomers.jsonl``, and compare their gain with the card's."""
    people, newcomers = (mta.read_people(folder / f"{name}.jsonl", task=task) for name in ("people", "newcomers"))
    bank = mta.Bank.build(base, people, folder / "bank", run=run)
    personal = mta.Personalizer(base, bank)
    personal.personalize([person.first(SHOTS) for person in newcomers])
    pooled, own = list[float](), list[float]()
    for person in newcomers:
        later = [(item.fields, bank.task.target(item)) for item in person.after(SHOTS, SHOTS)]
        tokens = sum(len(base.prompts.example(bank.task, item).target) for item in person.after(SHOTS, SHOTS))
        for who, found in ((mta.TASK, pooled), (person.id, own)):
            found.append(-sum(personal.score([(who, *one) for one in later])) / tokens)
    gains = [before - after for before, after in zip(pooled, own)]
    half = student_t(len(gains)) * statistics.stdev(gains) / math.sqrt(len(gains))
    assert bank.info.calibration
    card = bank.info.calibration
    expected = next(one for one in card.stacked or card.gains if one.shots == SHOTS)
    return Held(statistics.mean(gains), half, expected, statistics.mean(pooled), statistics.mean(own))


def main() -> None:
    """Write both sets, and what was promised and what came."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("words", nargs="*", help="settings of the run, such as task_lora.training.lr=1e-3")
    args = parser.parse_args()
    out, run = args.out, override(Run(), [f"bank.anchors={ANCHORS}", *args.words])
    base = mta.BaseModel.load("smollm2-135m-instruct")
    (out / "snack").mkdir(parents=True, exist_ok=True)
    (out / "message").mkdir(exist_ok=True)
    (out / "snack.yaml").write_text(SNACK_TASK)
    results = dict[str, object]()
    for made, task in ((snack, str(out / "snack.yaml")), (message, "text")):
        folder = out / made.__name__
        write(folder / "people.jsonl", made, PEOPLE, "reader")
        write(folder / "newcomers.jsonl", made, NEWCOMERS, "newcomer")
        found = held(folder, task, base, run)
        low, high = found.expected.low, found.expected.high
        print(
            f"{made.__name__}: promised {found.expected.mean:.3f} [{low:.3f}, {high:.3f}] with {SHOTS} shots; "
            f"{NEWCOMERS} newcomers gained {found.mean:.3f} ± {found.half:.3f}"
        )
        gained = {"mean": found.mean, "low": found.mean - found.half, "high": found.mean + found.half}
        levels = {"pooled": found.pooled, "personal": found.personal}
        results[made.__name__] = {
            "promised": found.expected.model_dump(),
            "people": NEWCOMERS,
            "gained": gained,
            "NLL": levels,
        }
    settings = run.model_dump(mode="json", include={"task_lora", "bank", "calibration"})
    write_json(
        out / "promise.json", {"machine": processor(), "words": args.words, "run": settings, "nats per token": results}
    )


if __name__ == "__main__":
    main()
