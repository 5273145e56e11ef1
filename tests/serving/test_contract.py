"""The engine contract: one suite for the embedded engine and for real vLLM.

vLLM has its own environment: ``make test-vllm`` creates it and sets MTA_VLLM_PYTHON.
"""

import asyncio
from contextlib import suppress
from dataclasses import replace

import pytest
from conftest import people_of, personalizer
from contract import WITH_VLLM, Lent, World, begun, closing, collect, paced, pieces_of, prompt_of, vllm_server
from files import folder_of
from served import served

from mta.data.earlier import in_words
from mta.data.history import PROFILE
from mta.errors import InputError, MtaError, OtherBank, PersonNotFound, StateCorrupt
from mta.personalize.adapters import BASE, TASK
from mta.personalize.forgetting import forget_person
from mta.serving.engine import EngineGone, EngineRequest, ModelRemoved, QueueFull, Version

pytestmark = pytest.mark.anyio
COUNT = 12
BOTH = ["embedded", pytest.param("vllm", marks=WITH_VLLM)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    made = World(tmp_path_factory.mktemp("contract"))
    for n in range(5):
        made.renew(str(n), n)
    return made


@pytest.fixture(scope="module", params=BOTH)
def engines(request, world):
    """A factory of engines of one kind."""
    if request.param == "embedded":
        yield world.embedded
    else:
        with vllm_server(world.settings()) as server:
            yield lambda **how: world.vllm(Lent(server), **how)


@pytest.fixture
async def engine(engines):
    async with closing(engines()) as made:
        yield made


def request_of(n, who, count=COUNT, length=12, **how):
    """A request of ``count`` tokens behind prompt ``n``."""
    return EngineRequest(tuple(prompt_of(n, length)), who, count, **how)


async def test_batched_answers_equal_single_answers(engine, world):
    people = [world.version(str(n), 1, stacked) for n in range(5) for stacked in (True, False)]
    requests = [request_of(n, who) for n, who in enumerate([BASE, TASK, *people])]
    answers = await asyncio.gather(*(collect(engine, one) for one in requests))
    assert answers == [world.expected(one) for one in requests]
    assert len({tuple(tokens) for tokens, _ in answers}) > 8


async def test_an_answer_excludes_its_stop_token(engine, world):
    who = world.version("0", 1)
    tokens = world.alone(who, prompt_of(0), COUNT)
    stop = next(token for token in tokens if token != tokens[0])
    engine.stops = frozenset({stop})
    if hasattr(engine, "scheduler"):
        engine.scheduler.stops = engine.stops
    assert await collect(engine, request_of(0, who)) == (tokens[: tokens.index(stop)], "stop")


async def test_log_probabilities_equal_the_models(engine, world):
    request = request_of(1, world.version("1", 1), 3, top_logprobs=4)
    async with closing(world.embedded()) as reference:
        both = [await pieces_of(one, request) for one in (engine, reference)]
    for token, other in zip(*([piece.token for piece in pieces if piece.token] for pieces in both), strict=True):
        assert token.id == other.id == token.top[0][0]
        assert token.logprob == pytest.approx(other.logprob, abs=1e-3)
        assert [id for id, _ in token.top] == [id for id, _ in other.top]
        assert [value for _, value in token.top] == pytest.approx([value for _, value in other.top], abs=1e-3)


@pytest.mark.parametrize("count", [0, 1, 2])
async def test_a_sampled_token_has_as_many_alternatives_as_were_asked_for(engine, world, count):
    request = request_of(1, world.version("1", 1), 8, temperature=2.0, seed=1, top_logprobs=count)
    assert {len(piece.token.top) for piece in await pieces_of(engine, request) if piece.token} == {count}


async def test_people_in_the_same_batch_do_not_change_the_answer_of_the_base(engine, world):
    """On a CPU, vLLM gives rows without an adapter that of its last slot."""

    async def logprobs(engine):
        pieces = await pieces_of(engine, request_of(1, BASE, 8, top_logprobs=1))
        return [piece.token.logprob for piece in pieces if piece.token]

    async with closing(world.embedded()) as reference:
        alone = await logprobs(reference)
    people = [request_of(n, world.version(str(n), 1), 40) for n in range(5)]
    running = [asyncio.create_task(collect(engine, one)) for one in people]
    for crowded in [await logprobs(engine) for _ in range(4)]:
        assert crowded == pytest.approx(alone, abs=1e-3)
    await asyncio.gather(*running)


LABELS = ((31, 7, 2), (31, 2), (31, 7, 8, 2), (40, 2), (12,))  # some begin like others


async def test_scores_of_labels_equal_the_models_beside_other_answers(engine, world):
    models = [BASE, TASK, *(world.version(str(n), 1, n % 2 == 0) for n in range(4))]
    requests = [request_of(n, who, 5, labels=LABELS) for n, who in enumerate(models)]
    beside = request_of(3, world.version("3", 1))
    scored = (pieces_of(engine, one) for one in requests)
    answer, *answers = await asyncio.gather(collect(engine, beside), *scored)
    assert answer == world.expected(beside)
    for request, (piece,) in zip(requests, answers, strict=True):
        assert piece.finish == "stop"
        assert piece.scores == pytest.approx(world.scored(request), abs=1e-3)


@pytest.fixture
def gateway(engines, world, tmp_path):
    """The gateway over one kind of engine, by HTTP."""
    with served(world.base, world.bank, tmp_path, engine=engines(), store=world.store) as here:
        yield here


def test_classify_returns_the_shares_of_the_library(gateway, world):
    task, personal = world.bank.task, personalizer(world.base, world.bank, world.store)
    fields = [{"title": f"Film {n}", "genres": "Drama"} for n in range(3)]
    models = {"person:0": ("0", True), "person:1#merged": ("1", False), "task": (TASK, True)}
    models[world.base.name] = BASE, True
    for model, (who, stacked) in models.items():
        body = {"model": model, "input": [task.prompt(task.asked(one)) for one in fields]}
        with gateway.http("serve") as http:
            found = http.post("/v1/classify", json=body, timeout=120).json()
        expected = personal.shares([(who, one) for one in fields], stacked=stacked)
        for one, shares in zip(found["data"], expected, strict=True):
            assert one["label"] == next(iter(shares))
            assert dict(zip(found["labels"], one["probs"], strict=True)) == pytest.approx(shares, abs=1e-3)


def test_classify_shows_the_items_that_the_store_keeps(gateway, world):
    (person,), question = people_of(1, items=4), {"title": "Film 7", "genres": "Drama"}
    task, personal = world.bank.task, personalizer(world.base, world.bank, world.store)
    world.store.save_history(replace(person, id="0"))
    gateway.service.history = 2
    with gateway.http("admin") as http:
        body = {"model": "person:0", "input": task.prompt(task.asked(question))}
        found = http.post("/v1/classify", json=body, timeout=120).json()
    shown = question | {PROFILE: in_words(task, person.items[-2:])}
    (expected,), (plain,) = personal.shares([("0", shown)]), personal.shares([("0", question)])
    shares = dict(zip(found["labels"], found["data"][0]["probs"], strict=True))
    assert shares == pytest.approx(expected, abs=1e-3) != pytest.approx(plain, abs=1e-3)


async def forgotten(engine, world, person, requests):
    """Forget a person while these requests run, more than there are slots; return how each of them ended."""
    with paced(engine) as step:
        running = [asyncio.create_task(pieces_of(engine, one)) for one in requests]
        await begun(engine, step, running)
        forget_person(person, world.store)
        forgetting = asyncio.create_task(engine.forget(person, [person]))
        await asyncio.sleep(0)  # the engine forgets before its next step
    await forgetting
    assert person not in {who.person for who in await engine.versions()}
    ended = await asyncio.gather(*running, return_exceptions=True)
    assert all(isinstance(end, list | ModelRemoved | PersonNotFound) for end in ended)
    assert isinstance(ended[-1], ModelRemoved | PersonNotFound)


async def test_forgetting_a_person_ends_the_scoring_of_labels_and_others_go_on(engine, world):
    gone, beside = world.renew("scored", 40), request_of(3, world.version("3", 1))
    await forgotten(engine, world, "scored", [request_of(n, gone, 5, 40, labels=LABELS) for n in range(6)])
    assert await collect(engine, beside) == world.expected(beside)


async def test_an_answer_after_scored_labels_of_the_same_prompt_is_the_models(engine, world):
    who = world.version("2", 1)
    scored, request = request_of(8, who, 5, 40, labels=LABELS), request_of(8, who, length=40)
    first, second = [(await pieces_of(engine, scored))[-1].scores for _ in range(2)]
    assert first == pytest.approx(second, abs=1e-3)
    assert await collect(engine, request) == world.expected(request)


async def test_sampling_with_a_seed_is_reproducible(engine, world):
    request = request_of(2, world.version("2", 1), temperature=2.0, seed=7)
    first, second = [await collect(engine, request) for _ in range(2)]
    assert first == second != world.expected(request)


async def test_a_cancelled_answer_frees_its_slot_and_others_continue(engine, world):
    request = request_of(0, world.version("0", 1), 40)
    stays = asyncio.create_task(collect(engine, request))
    async for piece in (leaving := engine.answer(request_of(1, world.version("1", 1), 200))):
        if piece.token:
            break
    await leaving.aclose()
    assert await stays == world.expected(request)
    async with asyncio.timeout(10):
        while engine.facts()["running"][0]:
            await asyncio.sleep(0.02)


async def test_an_error_of_one_person_reaches_only_that_request(engine, world):
    other = world.renew("other-bank", 3, bank="another")
    broken = world.renew("broken", 4)
    path = next(
        p for p in (world.folder / "people").rglob("1.safetensors") if folder_of(world.store, "broken") in str(p)
    )
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    unknown = Version("unknown", 1, True, "0" * 64)
    fine = request_of(3, world.version("3", 1))

    async def failing(who):
        with pytest.raises(MtaError) as caught:
            await collect(engine, request_of(3, who, 3))
        return type(caught.value)

    answer, *errors = await asyncio.gather(collect(engine, fine), *map(failing, (other, broken, unknown)))
    assert answer == world.expected(fine)
    assert errors == [OtherBank, StateCorrupt, PersonNotFound]


async def test_a_running_answer_keeps_its_version_after_an_update(engine, world):
    before = request_of(4, world.renew("ann", 20), 60)
    with paced(engine) as step:
        running = asyncio.create_task(collect(engine, before))
        await begun(engine, step, [running])
        assert not running.done()
        after = request_of(4, world.renew("ann", 21))
    tokens, finish = await collect(engine, after)
    assert after.who.number == before.who.number + 1
    assert await running == world.expected(before)
    assert (tokens, finish) == world.expected(after)
    assert (await running)[0][:COUNT] != tokens


async def test_a_forgotten_person_is_gone_and_the_same_id_starts_fresh(engine, world):
    first = world.renew("gone", 30)
    await collect(engine, request_of(0, first, 3))
    assert first in await engine.versions()
    await forgotten(engine, world, "gone", [request_of(n, first, 200) for n in range(20)])
    with pytest.raises(PersonNotFound):
        await collect(engine, request_of(5, first, 3))
    again = request_of(5, world.renew("gone", 31))
    assert again.who.number == first.number
    assert await collect(engine, again) == world.expected(again)


async def test_what_a_forgotten_person_asks_the_pooled_model_ends_and_others_go_on(engine, world):
    other = request_of(8, TASK, asker="bob")
    going_on = asyncio.create_task(collect(engine, other))
    await forgotten(engine, world, "ann", [request_of(n, TASK, 200, asker="ann") for n in range(20)])
    assert await going_on == world.expected(other)


async def test_dropping_a_version_ends_its_answers_and_the_persons_newer_version_goes_on(engine, world):
    old, new = world.renew("moved", 60), world.renew("moved", 61)
    before, after = request_of(6, old, 60), request_of(7, new)
    with paced(engine) as step:
        ending = asyncio.create_task(collect(engine, before))
        await begun(engine, step, [ending])
        going_on = asyncio.create_task(collect(engine, after))
        await asyncio.sleep(0)
        dropping = asyncio.create_task(engine.drop({old}))
        await asyncio.sleep(0)
    await dropping
    (ended,) = await asyncio.gather(ending, return_exceptions=True)
    in_time = not hasattr(engine, "scheduler") and ended == world.expected(before)
    assert isinstance(ended, ModelRemoved) or in_time  # nothing paces vLLM, which may have ended the answer before
    assert await going_on == world.expected(after)
    assert {who.number for who in await engine.versions() if who.person == "moved"} == {new.number}


async def test_more_people_than_the_adapter_cache_holds_are_answered_correctly(engines, world):
    requests = [request_of(n, world.version(str(n % 5), 1), 4) for n in range(15)]
    async with closing(engines(activated=2)) as engine:
        answers = [await collect(engine, one) for one in requests]
        with suppress(AttributeError):
            await engine.adapters.unloads_ended()
        assert engine.facts()["activated"][0] <= 2
    assert answers == [world.expected(one) for one in requests]


async def test_cached_prefixes_are_not_shared_between_callers(engine, world):
    requests = [request_of(6, world.version("1", 1), 2, 64, asker=asker) for asker in ("ann", "ann", "bob")]
    first, again, other = [(await pieces_of(engine, one))[-1].cached for one in requests]
    assert first == other == 0
    assert again > 0


async def test_requests_over_a_limit_are_refused_before_they_start(engines, world):
    who = world.version("0", 1)
    async with closing(engines(waiting=2)) as engine:
        with pytest.raises(InputError):
            await collect(engine, EngineRequest((), who, 3))
        with pytest.raises(InputError):
            await collect(engine, request_of(0, who, 20, 250))
        running = [asyncio.create_task(collect(engine, request_of(n, who, 100))) for n in range(6)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        with pytest.raises(QueueFull):
            await collect(engine, request_of(9, who, 3))
        assert await asyncio.gather(*running) == [world.expected(request_of(n, who, 100)) for n in range(6)]


async def test_a_closing_engine_finishes_running_answers_and_accepts_no_new_ones(engine, world):
    request = request_of(8, TASK, 100)
    with paced(engine) as step:
        running = asyncio.create_task(collect(engine, request))
        await begun(engine, step, [running])
        assert not running.done()
    await engine.close()
    with pytest.raises(EngineGone):
        await collect(engine, request)
    assert not engine.ready
    assert await running == world.expected(request)
