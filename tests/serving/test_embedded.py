"""The embedded engine: batching and reuse of slots do not change any answer."""

import asyncio
import random
import threading
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY_RUN
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import base_of, endless, random_loras

from mta.errors import InputError
from mta.lora.batch import Factors, LoraBatch
from mta.lora.layers import applied
from mta.personalize.adapters import BASE, TASK, row_adapters
from mta.serving.embedded.engine import EmbeddedEngine
from mta.serving.engine import EngineGone, EngineRequest, ModelRemoved, QueueFull, Refused, Version
from mta.store.state import State

KINDS = ["llama", "mistral", "qwen2", "qwen3", "gemma3", "gpt2"]


class OneBank:
    """The parts of a bank that an engine needs, with random adapters."""

    def __init__(self, base, pooled=True):
        self.device_anchors = self.anchors = random_loras(base, 3, size=0.5, seed=0)
        self.task_lora = random_loras(base, 1, size=0.4, seed=5) if pooled else None
        self.info, self.hash = SimpleNamespace(run=TINY_RUN), "bank"

    def __len__(self):
        return len(self.anchors)


def world(kind="llama", people=4, pooled=True):
    base = endless(base_of(kind), 260)
    bank = OneBank(base, pooled)
    models = [BASE, TASK]
    for n in range(people):
        draw = torch.Generator().manual_seed(n)
        w = torch.randn(3, generator=draw, dtype=torch.float64).tolist()
        stack = random_loras(base, 1, size=0.6, rank=1, seed=10 + n)
        models.append(State("bank", (2, 0, 1), tuple(w), "fixed", "", f"work{n}", 0, stack))
    return base, bank, models


@torch.no_grad()
def one_by_one(base, bank, who, prompt, count, stacked=True):
    """Greedy decoding over the whole text at each step: no batch, no cache, no slot."""
    tokens, adapters = list(prompt), row_adapters(base, bank, [who], stacked)
    with applied(base.model, adapters, torch.tensor([0])):
        for _ in range(count):
            tokens.append(int(base.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


async def tokens_of(engine, ask):
    return [piece.token.id async for piece in engine.answer(ask) if piece.token]


class OneStore:
    """A store of states by the person's number."""

    def __init__(self, models):
        self.models = models

    def load(self, person, version):
        return self.models[int(person)]


class HeldStore(OneStore):
    """Notes whom it loads, and loads once ``go_on`` is set."""

    def __init__(self, models):
        super().__init__(models)
        self.loaded, self.go_on = [], threading.Event()

    def load(self, person, version):
        self.loaded.append(person)
        assert self.go_on.wait(60)
        return super().load(person, version)


def engine_of(base, bank, models, **how):
    return EmbeddedEngine(base, bank, OneStore(models), **{"chunk": 8, "length": 64} | how)


def ask_of(n, prompt, count, **how):
    """A request for person ``n`` of ``models``; 0 is the base and 1 the pooled model."""
    return EngineRequest(tuple(prompt), (BASE, TASK)[n] if n < 2 else Version(str(n), 1), max_tokens=count, **how)


def prompts_of(count, longest=40, seed=0):
    draw = random.Random(seed)
    return [[draw.randrange(3, 259) for _ in range(draw.randrange(1, longest))] for _ in range(count)]


@pytest.mark.parametrize(("kind", "pooled"), [*((kind, True) for kind in KINDS), ("llama", False)])
def test_batched_answers_equal_single_answers(kind, pooled):
    base, bank, models = world(kind, pooled=pooled)

    async def go():
        engine = engine_of(base, bank, models, slots=3)
        prompts = prompts_of(12)
        asks = [ask_of(n % 6, prompt, 5 + n % 4) for n, prompt in enumerate(prompts)]
        found = await asyncio.gather(*(tokens_of(engine, ask) for ask in asks))
        await engine.close()
        return asks, found

    asks, found = asyncio.run(go())
    for n, (ask, tokens) in enumerate(zip(asks, found)):
        assert tokens == one_by_one(base, bank, models[n % 6], ask.prompt, ask.max_tokens), n
    assert len({tuple(tokens) for tokens in found}) == len(found)


def test_a_row_at_the_last_positions_shares_a_pass_with_a_longer_one():
    """The padding of such a row lies beyond the last learned position of the model."""
    base, bank, models = world("gpt2")
    places = base.model.config.n_positions
    near, short = ([5 + n % 250 for n in range(count)] for count in (places - 10, 40))

    async def go():
        engine = engine_of(base, bank, models, slots=2, chunk=100, length=places)
        asks = ask_of(2, near, 8), ask_of(3, short, 8)
        found = await asyncio.gather(*(tokens_of(engine, ask) for ask in asks))
        await engine.close()
        return found

    expected = [one_by_one(base, bank, models[n], prompt, 8) for n, prompt in ((2, near), (3, short))]
    assert asyncio.run(go()) == expected


@settings(max_examples=15)
@given(st.data())
def test_answers_do_not_depend_on_the_order_of_arrivals_and_cancellations(data):
    base, bank, models = world()
    prompts = prompts_of(4, longest=20, seed=data.draw(st.integers(0, 3)))
    rows = data.draw(
        st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.integers(1, 8)), min_size=1, max_size=8)
    )
    gone = data.draw(st.sets(st.integers(0, 7), max_size=3))

    async def one(engine, n, row):
        who, prompt, count = row
        ask = ask_of(who, prompts[prompt], count)
        await asyncio.sleep(0.002 * (n % 3))
        tokens = []
        async for piece in engine.answer(ask):
            if piece.token:
                tokens.append(piece.token.id)
            if n in gone and len(tokens) == 2:
                break
        return tokens

    async def go():
        engine = engine_of(base, bank, models, slots=data.draw(st.integers(1, 4)), chunk=4, length=64)
        found = await asyncio.gather(*(one(engine, n, row) for n, row in enumerate(rows)))
        await engine.close()
        return found

    for n, ((who, prompt, count), tokens) in enumerate(zip(rows, asyncio.run(go()))):
        expected = one_by_one(base, bank, models[who], prompts[prompt], count)
        assert tokens == expected[: 2 if n in gone else count]


def test_rows_that_wait_for_one_adapter_load_it_once():
    base, bank, models = world()
    loads = []

    async def go():
        engine = engine_of(base, bank, models, slots=2)
        load, started = engine.store.load, threading.Event()
        engine.store.load = lambda *who: (loads.append(who), started.wait(10), load(*who))[2]
        asks = [ask_of(2, prompt, 3) for prompt in prompts_of(5)]
        running = [asyncio.create_task(tokens_of(engine, ask)) for ask in asks]
        while not loads:
            await asyncio.sleep(0.01)
        running[0].cancel()
        await engine._in_thread(lambda: None)  # all rows have entered
        started.set()
        found = await asyncio.gather(*running, return_exceptions=True)
        await engine.close()
        return found

    first, *others = asyncio.run(go())
    assert isinstance(first, asyncio.CancelledError)
    assert others == [one_by_one(base, bank, models[2], prompt, 3) for prompt in prompts_of(5)[1:]]
    assert len(loads) == 1


def test_a_warm_slot_is_reused_only_by_its_owner():
    base, bank, models = world()
    text = prompts_of(1, longest=30, seed=3)[0] * 2

    async def go():
        engine = engine_of(base, bank, models, slots=2, length=128)
        found = []
        for n in (2, 2, 3):
            pieces = [p async for p in engine.answer(ask_of(n, text, 4))]
            found.append(([p.token.id for p in pieces if p.token], pieces[0].cached))
        await engine.forget("2")
        pieces = [p async for p in engine.answer(ask_of(2, text, 4))]
        found.append(([p.token.id for p in pieces if p.token], pieces[0].cached))
        await engine.close()
        return found

    first, again, other, anew = asyncio.run(go())
    alone = one_by_one(base, bank, models[2], text, 4)
    assert (first, again, anew) == ((alone, 0), (alone, len(text) - 1), (alone, 0))
    assert other == (one_by_one(base, bank, models[3], text, 4), 0)


def test_forgetting_zeroes_slots_and_adapters_of_the_person():
    base, bank, models = world()

    async def go():
        engine = engine_of(base, bank, models, slots=3)
        await tokens_of(engine, ask_of(2, [7] * 20, 4))
        await tokens_of(engine, ask_of(3, [8] * 20, 4))
        adapters, cache = engine.scheduler.adapters, engine.scheduler.slots.cache

        def taken():
            """Slots with any nonzero value in adapters, keys, or values."""
            kept = [
                adapters._gates,
                *(f for own in adapters._own.values() for f in own),
                *(part for pair in cache.kept for part in pair),
            ]
            return [len({n for n, place in enumerate(one) if place.any()}) for one in kept]

        before = taken()
        await engine.forget("2")
        after = taken()
        await engine.close()
        return before, after

    before, after = asyncio.run(go())
    assert set(before) == {2}
    assert set(after) == {1}


def test_a_request_that_still_loads_its_adapter_is_answered_while_the_engine_closes():
    base, bank, models = world()
    store = HeldStore(models)

    async def go():
        engine = EmbeddedEngine(base, bank, store, slots=2, length=64)
        answer = asyncio.create_task(tokens_of(engine, ask_of(2, [5, 6, 7], 6)))
        while not store.loaded:
            await asyncio.sleep(0.01)
        closing = asyncio.create_task(engine.close())
        await asyncio.sleep(0)
        assert not engine.ready
        store.go_on.set()
        await closing
        return await answer

    assert asyncio.run(go()) == one_by_one(base, bank, models[2], [5, 6, 7], 6)


def test_a_person_who_is_forgotten_while_their_adapter_loads_is_not_answered_with_it():
    """The request ends; one that comes before the load ends reads the store again."""
    base, bank, models = world()
    store = HeldStore(models)

    async def go():
        engine = EmbeddedEngine(base, bank, store, slots=2, length=64)
        ask = ask_of(2, [5, 6, 7], 6)
        running = asyncio.create_task(tokens_of(engine, ask))
        while not store.loaded:
            await asyncio.sleep(0.01)
        await engine.forget("2")
        again = asyncio.create_task(tokens_of(engine, ask))
        while len(store.loaded) < 2:
            await asyncio.sleep(0.01)
        store.models = [*models[:2], models[3]]  # who has the id by now
        store.go_on.set()
        found = await asyncio.gather(running, again, return_exceptions=True)
        known = len(engine.activated)
        await engine.close()
        return *found, known

    ended, found, known = asyncio.run(go())
    assert isinstance(ended, ModelRemoved)
    assert found == one_by_one(base, bank, models[3], [5, 6, 7], 6)
    assert known == 1


def test_a_forgotten_persons_request_ends_while_the_adapter_of_another_model_loads(monkeypatch):
    base, bank, models = world()
    looking, go_on = threading.Event(), threading.Event()

    async def go():
        engine = engine_of(base, bank, models, slots=3)
        adapter_of = engine.scheduler.adapters.adapter_of

        def slow(*given):
            looking.set()
            assert go_on.wait(60)
            return adapter_of(*given)

        monkeypatch.setattr(engine.scheduler.adapters, "adapter_of", slow)
        asked = [
            asyncio.create_task(tokens_of(engine, EngineRequest((7, 8), TASK, 2, asker=key))) for key in ("ann", "bob")
        ]
        await asyncio.to_thread(looking.wait, 60)
        await engine.forget("1", ["ann"])
        go_on.set()
        found = await asyncio.gather(*asked, return_exceptions=True)
        owners = [slot.owner for slot in engine.scheduler.slots._slots if slot.owner]
        await engine.close()
        return found, owners

    (theirs, others), owners = asyncio.run(go())
    assert isinstance(theirs, ModelRemoved)
    assert len(others) == 2
    assert owners == [(TASK, "bob")]


def test_two_conversations_of_one_caller_both_stay_warm():
    base, bank, models = world()
    one, other = [5, *range(10, 40)], [5, *range(50, 80)]  # they share the first token only

    async def go():
        engine = engine_of(base, bank, models, slots=3)
        asks = [ask_of(2, prompt, 4, asker="app") for prompt in (one, other, one, other, [*one, 7])]
        found = [[piece async for piece in engine.answer(ask)] for ask in asks]
        await engine.close()
        return [[piece.token.id for piece in pieces if piece.token] for pieces in found], [p[-1].cached for p in found]

    answers, cached = asyncio.run(go())
    assert cached == [0, 1, len(one) - 1, len(other) - 1, len(one)]
    assert answers[:4] == [one_by_one(base, bank, models[2], prompt, 4) for prompt in (one, other, one, other)]


def test_oversized_and_late_requests_are_refused():
    base, bank, models = world()

    async def go():
        engine = engine_of(base, bank, models, slots=1, waiting=2)
        ask = ask_of(2, [5] * 10, 50)
        with pytest.raises(InputError, match="more than 64"):
            await tokens_of(engine, ask_of(2, [5] * 10, 60))
        with pytest.raises(InputError, match="empty"):
            await tokens_of(engine, ask_of(2, [], 4))
        found = await asyncio.gather(*(tokens_of(engine, ask) for _ in range(8)), return_exceptions=True)
        assert [len(one) for one in found[:3]] == [50] * 3
        assert all(isinstance(one, QueueFull) for one in found[3:])
        await engine.close()
        assert not engine.ready
        with pytest.raises(EngineGone):
            await tokens_of(engine, ask)

    asyncio.run(go())


def test_logits_of_labels_are_not_rounded(monkeypatch):
    """The engine asks for exact logits of the tokens that its labels need, and of no others."""
    base, bank, models = world()
    engine, asked, computed = engine_of(base, bank, models), [], type(base).next_logits

    def next_logits(self, *given):
        asked.append([] if given[5] is None else given[5][1].tolist())
        return computed(self, *given)

    monkeypatch.setattr(type(base), "next_logits", next_logits)
    labels = EngineRequest((5, 6, 7), TASK, 5, labels=((31, 7, 2), (31, 2), (40, 2)))

    async def go():
        try:
            await tokens_of(engine, labels)
            await tokens_of(engine, ask_of(0, (5, 6), 2))
        finally:
            await engine.close()

    asyncio.run(go())
    assert [one for one in asked if one] == [[31, 31, 40], [7, 2], [2], [2]]


def test_sampling_depends_only_on_the_seed():
    base, bank, models = world()

    async def go(slots, mates):
        engine = engine_of(base, bank, models, slots=slots)
        how = {"temperature": 1.5, "top_p": 0.9, "seed": 7, "top_logprobs": 3}
        ask = ask_of(2, [9, 8, 7], 12, **how)
        others = [ask_of(3, [n + 3], 9, temperature=1.0) for n in range(mates)]
        found, *_ = await asyncio.gather(*(tokens_of(engine, one) for one in (ask, *others)))
        await engine.close()
        return found

    alone, among = asyncio.run(go(1, 0)), asyncio.run(go(4, 6))
    assert alone == among != one_by_one(base, bank, models[2], [9, 8, 7], 12)


def test_adapter_slots_grow_for_an_adapter_of_higher_rank():
    base, bank, models = world()
    big = random_loras(base, 1, size=0.6, rank=3, seed=40)
    large = State(
        "bank", (0,), (0.4,), "fixed", "", "w", 0, LoraBatch({n: Factors(*f) for n, f in big.factors.items()})
    )

    async def go():
        engine = engine_of(base, bank, [*models, large], slots=2)
        found = await asyncio.gather(*(tokens_of(engine, ask_of(n, [5, 6, 7], 6)) for n in (2, len(models))))
        await engine.close()
        return found

    assert asyncio.run(go()) == [one_by_one(base, bank, who, [5, 6, 7], 6) for who in (models[2], large)]


def test_prompt_and_answer_never_exceed_the_length_of_the_base():
    base, bank, models = world()
    base.prompts.max_tokens = 32

    async def go():
        engine = engine_of(base, bank, models, slots=1, length=64)
        try:
            assert len(await tokens_of(engine, ask_of(0, [5] * 30, 2))) == 2
            with pytest.raises(Refused, match="more than 32"):
                await tokens_of(engine, ask_of(0, [5] * 30, 3))
        finally:
            await engine.close()

    asyncio.run(go())
