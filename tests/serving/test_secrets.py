"""Real weights, trained secrets: each person's model says its own word and never another person's.

``MTA_STORM_SECONDS`` is the duration in seconds (default 600).
"""

import asyncio
import os
import time
from collections import Counter

import pytest
import torch
from test_isolation import World, storm, wrong_in

from mta.bank.bank import Bank
from mta.config import Lora, Run, Training
from mta.data.history import Item, Person
from mta.model.base import BaseModel
from mta.personalize import Personalizer
from mta.serving.embedded.engine import EmbeddedEngine
from mta.store import Store

pytestmark = [pytest.mark.real, pytest.mark.network, pytest.mark.slow, pytest.mark.timeout(3000)]

WORDS = "apple bread chair dance eagle flame grape horse island jewel knife lemon mouse night ocean paper"
PEOPLE = 8
QUESTION = "What is your secret word?"
RUN = Run(
    task="text",
    encoder="all-minilm-l6-v2",
    memory="3GiB",
    max_tokens=64,
    task_lora={"enabled": False},
    bank={"anchors": 2, "min_items": 2, "max_items": 2, "training": Training(lr=1e-4, epochs=1, batch_size=2)},
    merge={"policy": "uniform", "k": 0},
    stack={"lora": Lora(rank=1, alpha=16.0), "training": Training(lr=2e-3, steps=30, batch_size=2)},
)


def taught(id, word):
    """A person with the same answer to every prompt."""
    return Person(id, tuple(Item({"input": QUESTION, "output": word}, time=float(n)) for n in range(2)))


class Secrets(World):
    """Two words per person, trained beforehand; each new version switches to the other word."""

    def __init__(self, base, bank, store, personal):
        super().__init__(base, bank, store)
        example = base.prompts.example(bank.task, taught("", "").items[0])
        self.asked = list(example.prompt)
        self.taught = {}
        lessons = {(str(n), turn): WORDS.split()[2 * n + turn] for n in range(PEOPLE) for turn in (0, 1)}
        personal.personalize([taught(f"{id}/{turn}", word) for (id, turn), word in lessons.items()])
        for id, turn in lessons:
            state = personal.store.load(f"{id}/{turn}")
            self.taught[id, turn] = state, tuple(self.said(state))
            assert base.tokenizer.decode(self.taught[id, turn][1]).strip() == lessons[id, turn]

    def prompt(self, person):
        return self.asked

    def renew(self, person, seed):
        return self.keep(person, *self.taught[person, seed % 2])


@pytest.fixture
def secrets(fetched, tmp_path):
    fetched("smollm2-135m-instruct"), fetched("all-minilm-l6-v2")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    base = BaseModel.of(RUN)
    others = [taught(f"anchor{n}", word) for n, word in enumerate(("stone", "river", "cloud", "wheel"))]
    bank = Bank.build(base, others, tmp_path / "bank", run=RUN, task="text", task_people=[])
    personal = Personalizer(base, bank, Store(tmp_path / "taught"), run=RUN)
    yield base, Secrets(base.twin(), bank, Store(tmp_path / "people"), personal)
    torch.set_num_threads(threads)


def test_no_model_says_another_persons_word(secrets):
    base, world = secrets
    for n in range(PEOPLE):
        world.renew(str(n), 0)
    end = time.monotonic() + float(os.environ.get("MTA_STORM_SECONDS", "600"))

    async def go():
        engine = EmbeddedEngine(base, world.bank, world.store, slots=8, length=64, activated=4)
        found, turn = Counter(), 0
        while time.monotonic() < end:
            found, turn = found + await storm(engine, world, rounds=7, at_once=24, people=PEOPLE, seed=turn), turn + 1
        await engine.close()
        return found

    found = asyncio.run(go())
    print(f"answers of SmolLM2: {dict(found)}")  # noqa: T201
    assert wrong_in(found) == []
    assert found["right"] > 50
