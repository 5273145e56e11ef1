"""No answer uses another person's adapter, under load, cancellation, eviction, updates, and forgetting.

Each version of each person has a unique secret word; an answer must be a word of the requested person.
"""

import asyncio
import itertools
import random
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest
from conftest import people_of, personalizer
from served import stepped
from tiny import endless, random_loras

from mta.data.tasks.prompt import PromptFormat
from mta.errors import MtaError
from mta.model.generate import generate
from mta.personalize.adapters import row_adapters
from mta.personalize.forgetting import forget_person
from mta.serving.embedded.engine import EmbeddedEngine
from mta.serving.engine import EngineRequest, Version
from mta.store import Store
from mta.store.state import State

LENGTH = 4


@dataclass
class World:
    """People with known secret words, in a store that changes during the test."""

    base: object
    bank: object
    store: Store
    words: dict = field(default_factory=dict)  # (person, version, seal) -> tokens, also of versions that are gone
    forgotten: Counter = field(default_factory=Counter)  # how often each person was

    def renew(self, person, seed):
        """Save a new version of a person, with a word that no other version of anybody has."""
        for other in itertools.count(seed, 100_000):
            w, stack = (1.0, -2.0, float(other % 7)), random_loras(self.base, 1, rank=1, size=0.9, seed=other)
            state = State(self.bank.hash, (0, 1, 2), w, "fixed", "", f"{person}/{other}", 0, stack)
            word = tuple(self.said(state, person))
            if word not in self.words.values():
                return self.keep(person, state, word)

    def keep(self, person, state, word):
        """Save a state, and note what it says."""
        version = self.store.save(person, state)
        self.words[person, version, self.store.seal(person, version)] = word
        return version

    def prompt(self, person):
        """The prompt for a person."""
        return [40 + int(person), 50, 60, 70, 80]

    def said(self, state, person=""):
        """The answer of one row, computed without any engine code."""
        adapters = row_adapters(self.base, self.bank, [state])
        return generate(self.base, [self.prompt(person)], [0], adapters, max_new_tokens=LENGTH)[0]


def world_of(tiny, folder, people):
    base, bank = tiny
    endless(base, 260)
    made = World(base.twin(), bank, Store(folder))
    for n in range(people):
        made.renew(str(n), n)
    return base, made


def learner(base):
    """A copy of the modules over the same weights, with a learnable end token."""
    twin = base.twin()
    twin.prompts = PromptFormat(base.tokenizer, 512)
    return twin


class Heard(NamedTuple):
    """What came of a request: ``who`` was asked (None: had no state), and the tokens until the caller left."""

    who: Version | None
    tokens: tuple[int, ...] = ()
    left: bool = False
    refused: str = ""  # as: forgotten meanwhile, or any other error


async def asked(engine, world, person, lot):
    """Request an answer, sometimes cancelled early."""
    version, before = world.store.latest(person), world.forgotten[person]
    if version is None:
        return Heard(None)
    who = Version(person, version, seal=world.store.seal(person, version) or "")
    ask = EngineRequest(tuple(world.prompt(person)), who, max_tokens=LENGTH)
    tokens, leaves = [], lot < 0.15
    try:
        async for piece in engine.answer(ask):
            if piece.token:
                tokens.append(piece.token.id)
            if leaves and len(tokens) == 2:
                break
    except MtaError as error:
        meanwhile = world.forgotten[person] > before
        return Heard(who, refused="forgotten" if meanwhile else f"{type(error).__name__}: {error}")
    return Heard(who, tuple(tokens), leaves)


def judged(world, heard):
    """What an answer turned out to be; "wrong" with the reason if it is not a word of that version of that person."""
    if heard.who is None:
        return "nobody"
    if heard.refused:
        return heard.refused if heard.refused == "forgotten" else f"wrong: {heard.who.person} {heard.refused}"
    word = world.words[heard.who.person, heard.who.number, heard.who.seal]
    if heard.tokens != (word[: len(heard.tokens)] if heard.left else word):
        return f"wrong: {heard.who.person}@{heard.who.number}: {heard.tokens}"
    return "left early" if heard.left else "right"


async def storm(engine, world, rounds, at_once, people, seed=0):
    """EngineRequest, cancel, update, and forget at random; count what the answers turned out to be."""
    draw, found = random.Random(seed), Counter()
    for turn in range(rounds):
        chosen = [str(draw.randrange(people)) for _ in range(at_once)]
        running = [asyncio.create_task(asked(engine, world, one, draw.random())) for one in chosen]
        if turn % 3 == 0:
            await asyncio.to_thread(world.renew, str(draw.randrange(people)), 1000 + turn)
        if turn % 7 == 3:
            person = chosen[-1]  # their request waits longest
            held = turn % 2 == 0  # every other time, no answer has begun
            with stepped(engine.scheduler) if held else nullcontext():
                await asyncio.sleep(0 if held else 0.01 * draw.random())
                world.forgotten[person] += 1
                forget_person(person, world.store)
                forgetting = asyncio.create_task(engine.forget(person))
                await asyncio.sleep(0)
            await forgetting
        found.update(judged(world, heard) for heard in await asyncio.gather(*running))
    return found


def wrong_in(found):
    """The wrong answers among what a storm counted."""
    return [outcome for outcome in found if outcome.startswith("wrong")]


def run(tiny, folder, **how):
    base, world = world_of(tiny, folder, how["people"])

    async def go():
        engine = EmbeddedEngine(base, world.bank, world.store, slots=5, chunk=6, length=32, activated=4)
        found = await storm(engine, world, **how)
        await engine.close()
        return found

    return asyncio.run(go())


def test_no_answer_comes_from_another_persons_adapter(tiny, tmp_path):
    found = run(tiny, tmp_path / "people", rounds=20, at_once=12, people=9)
    assert wrong_in(found) == []
    assert found["right"] > 120  # of 240 requests
    assert found["left early"] > 12
    assert found["forgotten"] > 0


@pytest.mark.slow
def test_no_answer_in_a_hundred_thousand_comes_from_another_persons_adapter(tiny, tmp_path):
    found = run(tiny, tmp_path / "people", rounds=2500, at_once=40, people=30)
    assert wrong_in(found) == []
    assert found["right"] > 50_000  # of 100,000 requests


def test_answers_stay_correct_while_others_are_trained(tiny, tmp_path):
    base, world = world_of(tiny, tmp_path / "people", 4)
    training = personalizer(learner(base), world.bank, world.store)

    async def go():
        engine = EmbeddedEngine(base, world.bank, world.store, slots=4, chunk=6, length=32)
        job = asyncio.create_task(asyncio.to_thread(training.personalize, people_of(6, prefix="new")))
        found = Counter()
        while not job.done() or found.total() < 40:
            found.update([judged(world, await asked(engine, world, str(n), 1.0)) for n in range(4)])
        await job
        await engine.close()
        return found

    assert set(asyncio.run(go())) == {"right"}
    alone = personalizer(learner(base), world.bank, Store(tmp_path / "alone"))
    alone.personalize(people_of(6, prefix="new"))
    assert all(alone.store.load(f"new{n}") == world.store.load(f"new{n}") for n in range(6))
