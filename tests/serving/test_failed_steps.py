"""Failed steps: rows of the step get an error, others get their answers, and no half-written data is reused."""

import asyncio
from functools import cache
from types import SimpleNamespace

import httpx2
import pytest
import torch
from contract import closing, tokens_of
from hypothesis import given, settings
from hypothesis import strategies as st
from test_embedded import engine_of, kept, one_by_one, prompts_of, request_of, world
from test_faults import asked
from test_faults import here as here  # the fixture
from tiny import random_loras
from torch.utils._python_dispatch import TorchDispatchMode

from mta.errors import MtaError
from mta.lora.batch import Factors, LoraBatch
from mta.serving.embedded import scheduler as scheduling
from mta.serving.embedded.adapter_slots import AdapterSlots
from mta.serving.embedded.scheduler import PATIENCE, AnswerRow, Sampler, Scheduler
from mta.serving.engine import AnswerLost
from mta.store.state import State

NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory")


WITHOUT_MEMORY = (torch.ops.aten.select.int, torch.ops.aten.zero_.default)  # what emptying a slot consists of


class FailsAt(TorchDispatchMode):
    """Within the block, torch operations with these numbers raise in this thread."""

    def __init__(self, *numbers):
        super().__init__()
        self.numbers, self.count = set(numbers), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function not in WITHOUT_MEMORY
        if function not in WITHOUT_MEMORY and self.count in self.numbers:
            raise NO_MEMORY
        return function(*args, **(kwargs or {}))


def fail_in_layer(base, wanted):
    """The last layer raises if ``wanted(shape of the pass)``; the first layer's keys and values are written by then."""

    def hook(_, args, kwargs):
        if wanted(args[0].shape[:2]):
            raise NO_MEMORY

    return base.model.model.layers[-1].register_forward_pre_hook(hook, with_kwargs=True)


def scheduler_of(base, bank, slots=3):
    return Scheduler(base, AdapterSlots(base, bank, slots), slots, 64, 8)


def answered(scheduler, models, asks, mode=None):
    """Decode all requests in this thread; return tokens or the error of each."""
    found = [[] for _ in asks]
    for ask, pieces in zip(asks, found):
        who = models[int(ask.who.person)] if hasattr(ask.who, "person") else ask.who
        row = AnswerRow(ask, pieces.append, Sampler(ask))
        row.adapter = scheduler.adapters.adapter_of(who)
        scheduler.waiting.append(row)
    with mode or torch.inference_mode():
        turns = 0
        while scheduler.busy:
            scheduler.step()
            turns += 1
            assert turns < 1000
    ends = [pieces[-1] for pieces in found]
    tokens = [
        [piece.token.id for piece in pieces if not isinstance(piece, MtaError) and piece.token] for pieces in found
    ]
    return [end if isinstance(end, MtaError) else its for end, its in zip(ends, tokens)]


@cache
def asks_of(count):
    """Requests for six owners (people, base, pooled model) in a new world, and the expected answers."""
    base, bank, models = world()
    asks = [request_of(n % 6, prompt, 3 + n % 3) for n, prompt in enumerate(prompts_of(count, longest=14))]
    right = [one_by_one(base, bank, models[n % 6], ask.prompt, ask.max_tokens) for n, ask in enumerate(asks)]
    return base, bank, models, asks, right


@settings(max_examples=6)
@given(st.lists(st.integers(1, 4000), min_size=1, max_size=4))
def test_after_any_failed_operation_answers_are_lost_or_right_and_later_ones_equal_a_fresh_engines(numbers):
    base, bank, models, asks, right = asks_of(7)
    scheduler, failing = scheduler_of(base, bank), FailsAt(*numbers)
    found = answered(scheduler, models, asks, failing)
    assert all(isinstance(one, AnswerLost) or one == expected for one, expected in zip(found, right))
    assert scheduler.failed == sum(number <= failing.count for number in failing.numbers)
    assert scheduler.lost == sum(isinstance(one, AnswerLost) for one in found)
    assert answered(scheduler, models, asks) == right


def test_a_lost_row_leaves_its_slots_zeroed():
    base, bank, models, asks, _ = asks_of(7)
    scheduler = scheduler_of(base, bank, slots=2)
    handle = fail_in_layer(base, lambda _: True)
    assert all(isinstance(one, AnswerLost) for one in answered(scheduler, models, asks))
    handle.remove()
    assert not any(part.any() for part in kept(scheduler))


def test_a_lost_row_leaves_nothing_in_a_slot_that_another_row_moves_to():
    base, bank, models = world()
    scheduler = scheduler_of(base, bank, slots=3)
    handle = fail_in_layer(base, lambda shape: shape[1] == 7)
    long = [8] * 7
    rows = []
    with torch.inference_mode():
        for who, prompt in ((2, [9] * 5), (3, long), (4, [7] * 4)):
            ask = request_of(who, prompt, 20)
            row = AnswerRow(ask, lambda _: None, Sampler(ask))
            row.adapter = scheduler.adapters.adapter_of(models[who])
            scheduler.waiting.append(row)
            rows.append(row)
            if who == 2:
                scheduler.step()
        while not rows[1].cancelled:  # one prompt is in each pass: rows[0] generates
            scheduler.step()
    handle.remove()
    place = scheduler.rows.index(rows[2])
    assert rows[2].left  # its prompt is not processed yet
    cache = scheduler.slots.cache
    assert not any(part[place].any() for pair in cache.kept for part in pair)


@pytest.mark.anyio
async def test_a_failed_prefill_ends_only_its_own_row(monkeypatch):
    monkeypatch.setattr(scheduling, "CHUNKS", 1)  # one prompt is in each pass
    base, bank, models = world()
    handle = fail_in_layer(base, lambda shape: shape[1] == 7)
    async with closing(engine_of(base, bank, models, slots=3)) as engine:
        requests = [request_of(2, [9] * 5, 20), request_of(3, [8] * 7, 4), request_of(4, [7] * 4, 20)]
        first, lost, last = await asyncio.gather(*(tokens_of(engine, one) for one in requests), return_exceptions=True)
        facts = engine.facts()
        assert engine.ready
        assert engine.alive
    handle.remove()
    assert isinstance(lost, AnswerLost)
    assert [first, last] == [one_by_one(base, bank, models[n], requests[n - 2].prompt, 20) for n in (2, 4)]
    assert (facts["failed_steps"][0], facts["lost"][0]) == (1, 1)


@pytest.mark.anyio
async def test_an_adapter_that_does_not_fit_fails_only_its_request():
    base, bank, models = world()
    wrong = random_loras(base, 1, rank=1, seed=9)
    name = list(wrong.factors)[-1]
    wrong = LoraBatch(wrong.factors | {name: Factors(wrong.factors[name].a[..., :-1], wrong.factors[name].b)})
    models.append(State("bank", (0,), (1.0,), "fixed", "", "w", 0, wrong))
    async with closing(engine_of(base, bank, models, slots=2)) as engine:
        requests = [request_of(n, [5, 6, 7], 6) for n in (2, 6, 3, 6, 4)]
        found = await asyncio.gather(*(tokens_of(engine, one) for one in requests), return_exceptions=True)
    assert [isinstance(one, AnswerLost) for one in found] == [False, True, False, True, False]
    assert found[::2] == [one_by_one(base, bank, models[n], [5, 6, 7], 6) for n in (2, 3, 4)]


@pytest.mark.parametrize("number", range(1, 30, 3))
def test_adapter_slots_are_unchanged_after_a_failed_growth(number):
    base, bank, models = world()
    adapters, big = AdapterSlots(base, bank, 2), random_loras(base, 1, size=0.6, rank=3, seed=40)
    large = State("bank", (0,), (0.4,), "fixed", "", "w", 0, big)
    before = [adapters.adapter_of(models[2]), adapters.adapter_of(large)]
    adapters.take(0, before[0])
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad(), adapters.opened(slice(0, 1)):
        expected = base.model(tokens, use_cache=False).logits
    with FailsAt(number), pytest.raises(torch.OutOfMemoryError):
        adapters.take(1, before[1])
    with torch.no_grad(), adapters.opened(slice(0, 1)):
        assert torch.equal(base.model(tokens, use_cache=False).logits, expected)
    assert len({factor.shape[1] for factors in adapters._own.values() for factor in factors}) == 1


@pytest.mark.anyio
async def test_a_failed_adapter_load_ends_only_its_request():
    base, bank, models = world()

    class Broken:
        def __getattr__(self, name):
            raise NO_MEMORY

    async with closing(engine_of(base, bank, [*models, Broken()])) as engine:
        requests = [request_of(n, [5, 6, 7], 3) for n in (6, 2)]
        lost, answer = await asyncio.gather(*(tokens_of(engine, one) for one in requests), return_exceptions=True)
        assert engine.facts()["failed_steps"][0] == 1
    assert isinstance(lost, AnswerLost)
    assert answer == one_by_one(base, bank, models[2], [5, 6, 7], 3)


@pytest.mark.anyio
async def test_an_engine_that_fails_at_every_step_is_unhealthy_until_a_step_succeeds():
    base, bank, models = world()
    request = request_of(2, [5, 6, 7], 3)
    async with closing(engine_of(base, bank, models)) as engine:
        handle = fail_in_layer(base, lambda _: True)
        for _ in range(PATIENCE):
            assert (engine.ready, engine.alive) == (True, True)
            with pytest.raises(AnswerLost):
                await tokens_of(engine, request)
        assert (engine.ready, engine.alive) == (False, False)
        handle.remove()
        assert await tokens_of(engine, request) == one_by_one(base, bank, models[2], [5, 6, 7], 3)
        assert (engine.ready, engine.alive) == (True, True)


def test_rows_that_fail_after_a_pass_do_not_make_the_engine_unhealthy():
    base, bank, models = world()
    slots = 2 * PATIENCE
    scheduler = Scheduler(base, AdapterSlots(base, bank, slots), slots, 64, 64)  # all in one pass
    for _ in range(slots):
        ask = request_of(2, [5, 6, 7], 3)
        row = AnswerRow(ask, lambda _: None, SimpleNamespace(token=None))  # choosing a token fails
        row.adapter = scheduler.adapters.adapter_of(models[2])
        scheduler.waiting.append(row)
    with torch.inference_mode():
        while scheduler.busy:
            scheduler.step()
    assert scheduler.lost == slots
    assert not scheduler.stuck


def test_a_lost_answer_is_a_500_with_an_explanation_and_is_counted(here):
    before = asked(here, temperature=0).json()["choices"]
    handle = fail_in_layer(here.base, lambda _: True)
    found = asked(here)
    handle.remove()
    assert found.status_code == 500
    assert found.json()["error"] | {"message": ""} == {
        "message": "", "type": "server_error", "code": "answer_lost", "param": None
    }  # fmt: skip
    assert "could not be computed" in found.json()["error"]["message"]
    assert "memory" not in found.text
    assert asked(here, temperature=0).json()["choices"] == before
    metrics = httpx2.get(f"{here.url}/metrics", timeout=60).text
    assert "mta_engine_failed_steps 1.0" in metrics
    assert "mta_engine_lost 1.0" in metrics
    assert 'mta_requests_total{kind="completion",status="500"} 1.0' in metrics
