"""The embedded engine: batching and reuse of slots do not change any answer."""

import asyncio
import random
import threading
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY_RUN
from contract import closing, pieces_of, tokens_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import base_of, endless, greedy, random_loras

from mta.lora.batch import Factors, LoraBatch
from mta.personalize.adapters import BASE, TASK, row_adapters
from mta.serving.embedded import scheduler as scheduling
from mta.serving.embedded.adapter_slots import AdapterSlots
from mta.serving.embedded.engine import EmbeddedEngine
from mta.serving.embedded.scheduler import AnswerRow, LabelWalk, Sampler, Scheduler
from mta.serving.engine import EngineRequest, ModelRemoved, Refused, Version
from mta.store.state import State

pytestmark = pytest.mark.anyio
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


def one_by_one(base, bank, who, prompt, count, stacked=True):
    return greedy(base, prompt, 0, row_adapters(base, bank, [who], stacked), count)


class OneStore:
    """A store of states by the person's number; notes whom it loads, and loads only while ``go_on`` is set."""

    def __init__(self, models):
        self.models, self.loaded, self.go_on = models, [], threading.Event()
        self.go_on.set()

    def load(self, person, version):
        self.loaded.append(person)
        assert self.go_on.wait(60)
        return self.models[int(person)]


def engine_of(base, bank, models, **how):
    return EmbeddedEngine(base, bank, OneStore(models), **{"chunk": 8, "length": 64} | how)


def request_of(n, prompt, count, **how):
    """A request for person ``n`` of ``models``; 0 is the base and 1 the pooled model."""
    return EngineRequest(tuple(prompt), (BASE, TASK)[n] if n < 2 else Version(str(n), 1), max_tokens=count, **how)


def prompts_of(count, longest=40, seed=0):
    draw = random.Random(seed)
    return [[draw.randrange(3, 259) for _ in range(draw.randrange(1, longest))] for _ in range(count)]


@pytest.mark.parametrize(("kind", "pooled"), [*((kind, True) for kind in KINDS), ("llama", False)])
async def test_batched_answers_equal_single_answers(kind, pooled):
    base, bank, models = world(kind, pooled=pooled)
    requests = [request_of(n % 6, prompt, 5 + n % 4) for n, prompt in enumerate(prompts_of(12))]
    async with closing(engine_of(base, bank, models, slots=3)) as engine:
        answers = await asyncio.gather(*(tokens_of(engine, one) for one in requests))
    for n, (request, tokens) in enumerate(zip(requests, answers)):
        assert tokens == one_by_one(base, bank, models[n % 6], request.prompt, request.max_tokens), n
    assert len({tuple(tokens) for tokens in answers}) == len(answers)


async def test_a_row_at_the_last_positions_shares_a_pass_with_a_longer_one(monkeypatch):
    """The padding of such a row lies beyond the last learned position of the model."""
    monkeypatch.setattr(scheduling, "CHUNKS", 1)  # the short row enters only the last pass of the other
    base, bank, models = world("gpt2")
    places = base.model.config.n_positions
    near, short = ([5 + n % 250 for n in range(count)] for count in (places - 10, 40))
    async with closing(engine_of(base, bank, models, slots=2, chunk=100, length=places)) as engine:
        requests = request_of(2, near, 8), request_of(3, short, 8)
        answers = await asyncio.gather(*(tokens_of(engine, one) for one in requests))
    assert answers == [one_by_one(base, bank, models[n], prompt, 8) for n, prompt in ((2, near), (3, short))]


@pytest.mark.parametrize(("labels", "rows"), [(True, 4), (False, 1)])
def test_four_chunks_are_read_at_once_while_no_row_generates_a_text(labels, rows):
    base, bank, models = world()
    scheduler = Scheduler(base, AdapterSlots(base, bank, 8), 8, 64, 8)
    how = {"labels": ((31, 2), (40, 2))} if labels else {}
    first, *others = (request_of(2, [9 + n] * 6, 4, **how) for n in range(6))
    for request in (first, *others):
        row = AnswerRow(request, lambda _: None, Sampler(request))
        row.adapter = scheduler.adapters.adapter_of(models[2])
        scheduler.waiting.append(row)
        if request is first:
            scheduler.step()  # it runs now
    before = scheduler.running
    scheduler.step()
    assert scheduler.running - before == rows


@settings(max_examples=6)
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
        await asyncio.sleep(0.002 * (n % 3))
        tokens = []
        async for piece in engine.answer(request_of(who, prompts[prompt], count)):
            if piece.token:
                tokens.append(piece.token.id)
            if n in gone and len(tokens) == 2:
                break
        return tokens

    async def go():
        async with closing(engine_of(base, bank, models, slots=data.draw(st.integers(1, 4)), chunk=4)) as engine:
            return await asyncio.gather(*(one(engine, n, row) for n, row in enumerate(rows)))

    for n, ((who, prompt, count), tokens) in enumerate(zip(rows, asyncio.run(go()))):
        expected = one_by_one(base, bank, models[who], prompts[prompt], count)
        assert tokens == expected[: 2 if n in gone else count]


async def loading(engine, count=1):
    """Return once the engine loads its adapter number ``count``."""
    while len(engine.store.loaded) < count:
        await asyncio.sleep(0.01)


async def test_rows_that_wait_for_one_adapter_load_it_once():
    base, bank, models = world()
    async with closing(engine_of(base, bank, models, slots=2)) as engine:
        engine.store.go_on.clear()
        running = [asyncio.create_task(tokens_of(engine, request_of(2, prompt, 3))) for prompt in prompts_of(5)]
        await loading(engine)
        running[0].cancel()
        await engine._in_thread(lambda: None)  # all rows have entered
        engine.store.go_on.set()
        first, *others = await asyncio.gather(*running, return_exceptions=True)
        assert engine.store.loaded == ["2"]
    assert isinstance(first, asyncio.CancelledError)
    assert others == [one_by_one(base, bank, models[2], prompt, 3) for prompt in prompts_of(5)[1:]]


async def test_a_store_that_hangs_stops_no_pooled_model_that_is_no_longer_cached():
    base, bank, models = world()
    async with closing(engine_of(base, bank, models, slots=4)) as engine:
        engine.store.go_on.clear()
        (prompt,) = prompts_of(1)
        waiting = [asyncio.create_task(tokens_of(engine, request_of(n, prompt, 3))) for n in (2, 3)]
        await loading(engine, 2)
        pooled = asyncio.create_task(tokens_of(engine, request_of(1, prompt, 3)))
        await asyncio.wait([pooled], timeout=30)
        answered = pooled.done()
        engine.store.go_on.set()
        await asyncio.gather(pooled, *waiting)
    assert answered


async def test_a_warm_slot_is_reused_only_by_its_owner():
    base, bank, models = world()
    text = prompts_of(1, longest=30, seed=3)[0] * 2
    async with closing(engine_of(base, bank, models, slots=2, length=128)) as engine:

        async def said(n):
            pieces = await pieces_of(engine, request_of(n, text, 4))
            return [piece.token.id for piece in pieces if piece.token], pieces[0].cached

        first, again, other = [await said(n) for n in (2, 2, 3)]
        await engine.forget("2")
        anew = await said(2)
    alone = one_by_one(base, bank, models[2], text, 4)
    assert (first, again, anew) == ((alone, 0), (alone, len(text) - 1), (alone, 0))
    assert other == (one_by_one(base, bank, models[3], text, 4), 0)


def kept(scheduler):
    """All tensors of adapters, keys, and values, with a dimension of slots."""
    own, pairs = scheduler.adapters._own.values(), scheduler.slots.cache.kept
    return [scheduler.adapters._gates, *(part for parts in (*own, *pairs) for part in parts)]


async def test_forgetting_zeroes_slots_and_adapters_of_the_person():
    base, bank, models = world()
    async with closing(engine_of(base, bank, models, slots=3)) as engine:
        await tokens_of(engine, request_of(2, [7] * 20, 4))
        await tokens_of(engine, request_of(3, [8] * 20, 4))

        def taken():
            """Numbers of slots with any nonzero value."""
            return {sum(bool(place.any()) for place in one) for one in kept(engine.scheduler)}

        assert taken() == {2}
        await engine.forget("2")
        assert taken() == {1}


async def test_a_request_that_still_loads_its_adapter_is_answered_while_the_engine_closes():
    base, bank, models = world()
    engine = engine_of(base, bank, models, slots=2)
    engine.store.go_on.clear()
    answer = asyncio.create_task(tokens_of(engine, request_of(2, [5, 6, 7], 6)))
    await loading(engine)
    closed = asyncio.create_task(engine.close())
    await asyncio.sleep(0)
    assert not engine.ready
    engine.store.go_on.set()
    await closed
    assert await answer == one_by_one(base, bank, models[2], [5, 6, 7], 6)


async def test_a_person_who_is_forgotten_while_their_adapter_loads_is_not_answered_with_it():
    """The request ends; one that comes before the load ends reads the store again."""
    base, bank, models = world()
    async with closing(engine_of(base, bank, models, slots=2)) as engine:
        engine.store.go_on.clear()
        request = request_of(2, [5, 6, 7], 6)
        running = asyncio.create_task(tokens_of(engine, request))
        await loading(engine)
        await engine.forget("2")
        again = asyncio.create_task(tokens_of(engine, request))
        await loading(engine, 2)
        engine.store.models = [*models[:2], models[3]]  # who has the id by now
        engine.store.go_on.set()
        ended, answer = await asyncio.gather(running, again, return_exceptions=True)
        assert len(engine.activated) == 1
    assert isinstance(ended, ModelRemoved)
    assert answer == one_by_one(base, bank, models[3], [5, 6, 7], 6)


async def test_a_forgotten_persons_request_ends_while_the_adapter_of_another_model_loads(monkeypatch):
    base, bank, models = world()
    looking, go_on = threading.Event(), threading.Event()
    async with closing(engine_of(base, bank, models, slots=3)) as engine:
        adapter_of = engine.scheduler.adapters.adapter_of

        def slow(*given):
            looking.set()
            assert go_on.wait(60)
            return adapter_of(*given)

        monkeypatch.setattr(engine.scheduler.adapters, "adapter_of", slow)
        requests = [EngineRequest((7, 8), TASK, 2, asker=key) for key in ("ann", "bob")]
        running = [asyncio.create_task(tokens_of(engine, one)) for one in requests]
        await asyncio.to_thread(looking.wait, 60)
        await engine.forget("1", ["ann"])
        go_on.set()
        theirs, others = await asyncio.gather(*running, return_exceptions=True)
        assert [slot.owner for slot in engine.scheduler.slots._slots if slot.owner] == [(TASK, "bob")]
    assert isinstance(theirs, ModelRemoved)
    assert len(others) == 2


async def test_two_conversations_of_one_caller_both_stay_warm():
    base, bank, models = world()
    one, other = [5, *range(10, 40)], [5, *range(50, 80)]  # they share the first token only
    async with closing(engine_of(base, bank, models, slots=3)) as engine:
        requests = [request_of(2, prompt, 4, asker="app") for prompt in (one, other, one, other, [*one, 7])]
        answers = [await pieces_of(engine, request) for request in requests]
    assert [pieces[-1].cached for pieces in answers] == [0, 0, len(one) - 1, len(other) - 1, len(one)]
    tokens = [[piece.token.id for piece in pieces if piece.token] for pieces in answers]
    assert tokens[:4] == [one_by_one(base, bank, models[2], prompt, 4) for prompt in (one, other, one, other)]


async def test_logits_of_labels_are_not_rounded(monkeypatch):
    """The engine asks for exact logits of the tokens that its labels need, and of no others."""
    base, bank, models = world()
    async with closing(engine_of(base, bank, models)) as engine:
        asked, computed = [], type(base).next_logits

        def next_logits(self, *given):
            asked.append([] if given[5] is None else given[5][1].tolist())
            return computed(self, *given)

        monkeypatch.setattr(type(base), "next_logits", next_logits)
        await tokens_of(engine, EngineRequest((5, 6, 7), TASK, 5, labels=((31, 7, 2), (31, 2), (40, 2))))
        await tokens_of(engine, request_of(0, (5, 6), 2))
    assert [one for one in asked if one] == [[31, 31, 40], [7, 2], [2], [2]]


async def test_sampling_depends_only_on_the_seed():
    base, bank, models = world()

    async def said(slots, mates):
        how = {"temperature": 1.5, "top_p": 0.9, "seed": 7, "top_logprobs": 3}
        others = [request_of(3, [n + 3], 9, temperature=1.0) for n in range(mates)]
        async with closing(engine_of(base, bank, models, slots=slots)) as engine:
            requests = request_of(2, [9, 8, 7], 12, **how), *others
            return (await asyncio.gather(*(tokens_of(engine, one) for one in requests)))[0]

    assert await said(1, 0) == await said(4, 6) != one_by_one(base, bank, models[2], [9, 8, 7], 12)


async def test_adapter_slots_grow_for_an_adapter_of_higher_rank():
    base, bank, models = world()
    big = random_loras(base, 1, size=0.6, rank=3, seed=40)
    large = State(
        "bank", (0,), (0.4,), "fixed", "", "w", 0, LoraBatch({n: Factors(*f) for n, f in big.factors.items()})
    )
    async with closing(engine_of(base, bank, [*models, large], slots=2)) as engine:
        requests = [request_of(n, [5, 6, 7], 6) for n in (2, len(models))]
        answers = await asyncio.gather(*(tokens_of(engine, one) for one in requests))
    assert answers == [one_by_one(base, bank, who, [5, 6, 7], 6) for who in (models[2], large)]


async def test_prompt_and_answer_never_exceed_the_length_of_the_base():
    base, bank, models = world()
    base.prompts.max_tokens = 32
    async with closing(engine_of(base, bank, models, slots=1)) as engine:
        assert len(await tokens_of(engine, request_of(0, [5] * 30, 2))) == 2
        with pytest.raises(Refused, match="more than 32"):
            await tokens_of(engine, request_of(0, [5] * 30, 3))


VOCABULARY = 5
LABELS = st.lists(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=4), min_size=1, max_size=6)


def logits_after(tokens):
    """Logits that depend on all tokens."""
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(hash(tuple(tokens)) % 2**31))


@given(LABELS)
def test_scores_equal_those_of_each_label_alone_and_no_beginning_is_computed_twice(labels):
    walk, held, computed = LabelWalk(labels), [], [()]
    while step := walk.next(logits_after(held)):
        keep, token = step
        held = [*held[:keep], token]
        computed.append(tuple(held))
    alone = [
        sum(float(logits_after(label[:n]).log_softmax(-1)[token]) for n, token in enumerate(label)) for label in labels
    ]
    assert walk.scores == pytest.approx(alone, abs=1e-5)
    assert len(set(computed)) == len(computed) == len({tuple(la[:n]) for la in labels for n in range(len(la))})
