"""The engine contract: one suite for the embedded engine and for real vLLM.

vLLM has its own environment: ``make test-vllm`` creates it and sets MTA_VLLM_PYTHON.
"""

import asyncio
from contextlib import suppress

import httpx2
import pytest
from conftest import personalizer
from contract import WITH_VLLM, Lent, World, begun, collect, paced, prompt_of, vllm_server
from files import folder_of
from served import served

from mta.errors import InputError, MtaError, OtherBank, PersonNotFound, StateCorrupt
from mta.personalize.adapters import BASE, TASK
from mta.personalize.forgetting import forget_person
from mta.serving.engine import EngineGone, EngineRequest, ModelRemoved, QueueFull, Version
from mta.tools.served import Server, check_served

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


def run(engines, use, **how):
    """Return the result of ``use`` with a new engine, and close the engine."""

    async def go():
        engine = engines(**how)
        try:
            return await use(engine)
        finally:
            await engine.close()

    return asyncio.run(go())


def test_batched_answers_equal_single_answers(engines, world):
    people = [world.version(str(n), 1, stacked) for n in range(5) for stacked in (True, False)]
    asks = [EngineRequest(tuple(prompt_of(n)), who, COUNT) for n, who in enumerate([BASE, TASK, *people])]

    async def all_at_once(engine):
        return await asyncio.gather(*(collect(engine, ask) for ask in asks))

    found = run(engines, all_at_once)
    assert found == [world.expected(ask) for ask in asks]
    assert len({tuple(tokens) for tokens, _ in found}) > 8


def test_an_answer_excludes_its_stop_token(engines, world):
    who = world.version("0", 1)
    tokens = world.alone(who, prompt_of(0), COUNT)
    stop = next(token for token in tokens if token != tokens[0])

    async def ended(engine):
        engine.stops = frozenset({stop})
        if hasattr(engine, "scheduler"):
            engine.scheduler.stops = engine.stops
        return await collect(engine, EngineRequest(tuple(prompt_of(0)), who, COUNT))

    assert run(engines, ended) == (tokens[: tokens.index(stop)], "stop")


def test_log_probabilities_equal_the_models(engines, world):
    who, prompt = world.version("1", 1), prompt_of(1)

    async def pieces(engine):
        ask = EngineRequest(tuple(prompt), who, 3, top_logprobs=4)
        return [piece.token async for piece in engine.answer(ask) if piece.token]

    found, reference = run(engines, pieces), run(world.embedded, pieces)
    for token, other in zip(found, reference, strict=True):
        assert token.id == other.id == token.top[0][0]
        assert token.logprob == pytest.approx(other.logprob, abs=1e-3)
        assert [id for id, _ in token.top] == [id for id, _ in other.top]
        assert [value for _, value in token.top] == pytest.approx([value for _, value in other.top], abs=1e-3)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_sampled_token_has_as_many_alternatives_as_were_asked_for(engines, world, count):
    async def pieces(engine):
        ask = EngineRequest(tuple(prompt_of(1)), world.version("1", 1), 8, temperature=2.0, seed=1, top_logprobs=count)
        return [piece.token async for piece in engine.answer(ask) if piece.token]

    assert {len(token.top) for token in run(engines, pieces)} == {count}


def test_people_in_the_same_batch_do_not_change_the_answer_of_the_base(engines, world):
    """On a CPU, vLLM gives rows without an adapter that of its last slot."""
    base = EngineRequest(tuple(prompt_of(1)), BASE, 8, top_logprobs=1)

    async def logprobs(engine):
        return [piece.token.logprob async for piece in engine.answer(base) if piece.token]

    async def crowded(engine):
        people = [EngineRequest(tuple(prompt_of(n)), world.version(str(n), 1), 40) for n in range(5)]
        running = [asyncio.create_task(collect(engine, ask)) for ask in people]
        found = [await logprobs(engine) for _ in range(4)]
        await asyncio.gather(*running)
        return found

    alone = run(world.embedded, logprobs)
    for found in run(engines, crowded):
        assert found == pytest.approx(alone, abs=1e-3)


LABELS = [(31, 7, 2), (31, 2), (31, 7, 8, 2), (40, 2), (12,)]  # some begin like others


def test_scores_of_labels_equal_the_models_beside_other_answers(engines, world):
    models = [BASE, TASK, *(world.version(str(n), 1, n % 2 == 0) for n in range(4))]
    scored = [EngineRequest(tuple(prompt_of(n)), who, 5, labels=tuple(LABELS)) for n, who in enumerate(models)]
    beside = EngineRequest(tuple(prompt_of(3)), world.version("3", 1), COUNT)

    async def pieces(engine, ask):
        return [piece async for piece in engine.answer(ask)]

    async def all_at_once(engine):
        return await asyncio.gather(collect(engine, beside), *(pieces(engine, ask) for ask in scored))

    answer, *found = run(engines, all_at_once)
    assert answer == world.expected(beside)
    for ask, (piece,) in zip(scored, found, strict=True):
        assert piece.finish == "stop"
        assert piece.scores == pytest.approx(world.scored(ask.who, list(ask.prompt), LABELS), abs=1e-3)


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
    headers = {"Authorization": f"Bearer {gateway.secrets['serve']}"}
    for model, (who, stacked) in models.items():
        body = {"model": model, "input": [task.prompt(task.asked(one)) for one in fields]}
        found = httpx2.post(f"{gateway.url}/v1/classify", json=body, headers=headers, timeout=120).json()
        expected = personal.shares([(who, one) for one in fields], stacked=stacked)
        for one, shares in zip(found["data"], expected, strict=True):
            assert one["label"] == next(iter(shares))
            assert dict(zip(found["labels"], one["probs"], strict=True)) == pytest.approx(shares, abs=1e-3)


def test_the_check_of_what_is_served_agrees(gateway, world):
    server = Server(gateway.url, gateway.secrets["serve"], base=world.base.name)
    found = check_served(server, personalizer(world.base, world.bank, world.store), ["0", "1", "2"])
    assert [one.name for one in found] == [world.base.name, "task", "person:0", "person:1", "person:2"]
    assert [one.verdict for one in found] == ["ok"] * 5, found


def test_forgetting_a_person_ends_the_scoring_of_labels_and_others_go_on(engines, world):
    gone, prompts = world.renew("scored", 40), [tuple(prompt_of(n, 40)) for n in range(6)]
    beside = EngineRequest(tuple(prompt_of(3)), world.version("3", 1), COUNT)

    async def scores(engine, prompt):
        return [piece async for piece in engine.answer(EngineRequest(prompt, gone, 5, labels=tuple(LABELS)))]

    async def forgotten(engine):
        with paced(engine) as step:
            running = [asyncio.create_task(scores(engine, prompt)) for prompt in prompts]
            await begun(engine, step, running)
            forget_person("scored", world.store)
            forgetting = asyncio.create_task(engine.forget("scored"))
            await asyncio.sleep(0)  # the engine forgets before its next step
        await forgetting
        assert "scored" not in {who.person for who in await engine.versions()}
        ended = await asyncio.gather(*running, return_exceptions=True)
        assert all(isinstance(end, list | ModelRemoved | PersonNotFound) for end in ended)
        assert isinstance(ended[-1], ModelRemoved | PersonNotFound)  # there are more than slots
        return await collect(engine, beside)

    assert run(engines, forgotten) == world.expected(beside)


def test_an_answer_after_scored_labels_of_the_same_prompt_is_the_models(engines, world):
    prompt, who = tuple(prompt_of(8, 40)), world.version("2", 1)

    async def in_turn(engine):
        scored = EngineRequest(prompt, who, 5, labels=tuple(LABELS))
        return [[piece async for piece in engine.answer(scored)][-1].scores for _ in range(2)], await collect(
            engine, EngineRequest(prompt, who, COUNT)
        )

    (first, second), answer = run(engines, in_turn)
    assert answer == world.expected(EngineRequest(prompt, who, COUNT))
    assert first == pytest.approx(second, abs=1e-3)


def test_sampling_with_a_seed_is_reproducible(engines, world):
    ask = EngineRequest(tuple(prompt_of(2)), world.version("2", 1), COUNT, temperature=2.0, seed=7)

    async def twice(engine):
        return [await collect(engine, ask), await collect(engine, ask)]

    first, second = run(engines, twice)
    assert first == second != world.expected(ask)


def test_a_cancelled_answer_frees_its_slot_and_others_continue(engines, world):
    async def left(engine):
        stays = asyncio.create_task(collect(engine, EngineRequest(tuple(prompt_of(0)), world.version("0", 1), 40)))
        async for piece in (leaving := engine.answer(EngineRequest(tuple(prompt_of(1)), world.version("1", 1), 200))):
            if piece.token:
                break
        await leaving.aclose()
        found = await stays
        for _ in range(200):
            if not engine.facts()["running"][0]:
                break
            await asyncio.sleep(0.02)
        return found, engine.facts()["running"][0]

    found, running = run(engines, left)
    assert found == world.expected(EngineRequest(tuple(prompt_of(0)), world.version("0", 1), 40))
    assert running == 0


def test_an_error_of_one_person_reaches_only_that_request(engines, world):
    other = world.renew("other-bank", 3, bank="another")
    broken = world.renew("broken", 4)
    path = next(
        p for p in (world.folder / "people").rglob("1.safetensors") if folder_of(world.store, "broken") in str(p)
    )
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    unknown = Version("unknown", 1, True, "0" * 64)
    fine = EngineRequest(tuple(prompt_of(3)), world.version("3", 1), COUNT)

    async def failing(engine, who):
        with pytest.raises(MtaError) as caught:
            await collect(engine, EngineRequest(tuple(prompt_of(3)), who, 3))
        return type(caught.value)

    async def all_at_once(engine):
        return await asyncio.gather(collect(engine, fine), *(failing(engine, who) for who in (other, broken, unknown)))

    answer, *errors = run(engines, all_at_once)
    assert answer == world.expected(fine)
    assert errors == [OtherBank, StateCorrupt, PersonNotFound]


def test_a_running_answer_keeps_its_version_after_an_update(engines, world):
    old = world.renew("ann", 20)

    async def updated(engine):
        with paced(engine) as step:
            running = asyncio.create_task(collect(engine, EngineRequest(tuple(prompt_of(4)), old, 60)))
            await begun(engine, step, [running])
            assert not running.done()
            new = world.renew("ann", 21)
        return new, await collect(engine, EngineRequest(tuple(prompt_of(4)), new, COUNT)), await running

    new, after, before = run(engines, updated)
    assert new.number == old.number + 1
    assert before == world.expected(EngineRequest(tuple(prompt_of(4)), old, 60))
    assert after == world.expected(EngineRequest(tuple(prompt_of(4)), new, COUNT))
    assert before[0][:COUNT] != after[0]


def test_a_forgotten_person_is_gone_and_the_same_id_starts_fresh(engines, world):
    first = world.renew("gone", 30)

    async def forgotten(engine):
        asks = [EngineRequest(tuple(prompt_of(n)), first, 200) for n in range(20)]  # five times as many as run at once
        with paced(engine) as step:
            answers = [asyncio.create_task(collect(engine, ask)) for ask in asks]
            await begun(engine, step, answers)
            known = asyncio.create_task(engine.versions())
            await asyncio.sleep(0)  # the engine answers between two steps
            step()
            assert first in await known
            forget_person("gone", world.store)
            forgetting = asyncio.create_task(engine.forget("gone"))
            await asyncio.sleep(0)
        await forgetting
        assert "gone" not in {who.person for who in await engine.versions()}
        ended = await asyncio.gather(*answers, return_exceptions=True)
        assert isinstance(ended[-1], ModelRemoved | PersonNotFound)
        assert all(isinstance(end, tuple | ModelRemoved | PersonNotFound) for end in ended)
        with pytest.raises(PersonNotFound):
            await collect(engine, EngineRequest(tuple(prompt_of(5)), first, 3))
        again = world.renew("gone", 31)
        assert again.number == first.number
        return again, await collect(engine, EngineRequest(tuple(prompt_of(5)), again, COUNT))

    again, found = run(engines, forgotten)
    assert found == world.expected(EngineRequest(tuple(prompt_of(5)), again, COUNT))


def test_what_a_forgotten_person_asks_the_pooled_model_ends_and_others_go_on(engines, world):
    theirs = [
        EngineRequest(tuple(prompt_of(n)), TASK, 200, asker="ann") for n in range(20)
    ]  # five times as many as run at once
    other = EngineRequest(tuple(prompt_of(8)), TASK, COUNT, asker="bob")

    async def forgotten(engine):
        with paced(engine) as step:
            ending = [asyncio.create_task(collect(engine, ask)) for ask in theirs]
            await begun(engine, step, ending)
            going_on = asyncio.create_task(collect(engine, other))
            await asyncio.sleep(0)
            forgetting = asyncio.create_task(engine.forget("ann", ["ann"]))
            await asyncio.sleep(0)
        await forgetting
        ended = await asyncio.gather(*ending, return_exceptions=True)
        assert isinstance(ended[-1], ModelRemoved)
        assert all(isinstance(end, tuple | ModelRemoved) for end in ended)
        return await going_on

    assert run(engines, forgotten) == world.expected(other)


def test_dropping_a_version_ends_its_answers_and_the_persons_newer_version_goes_on(engines, world):
    old, new = world.renew("moved", 60), world.renew("moved", 61)
    ask = EngineRequest(tuple(prompt_of(7)), new, COUNT)

    async def dropped(engine):
        with paced(engine) as step:
            ending = asyncio.create_task(collect(engine, EngineRequest(tuple(prompt_of(6)), old, 60)))
            await begun(engine, step, [ending])
            going_on = asyncio.create_task(collect(engine, ask))
            await asyncio.sleep(0)
            dropping = asyncio.create_task(engine.drop({old}))
            await asyncio.sleep(0)
        await dropping
        (ended,) = await asyncio.gather(ending, return_exceptions=True)
        in_time = not hasattr(engine, "scheduler") and ended == world.expected(
            EngineRequest(tuple(prompt_of(6)), old, 60)
        )
        assert isinstance(ended, ModelRemoved) or in_time  # nothing paces vLLM, which may have ended the answer before
        found = await going_on
        assert {who.number for who in await engine.versions() if who.person == "moved"} == {new.number}
        return found

    assert run(engines, dropped) == world.expected(ask)


def test_more_people_than_the_adapter_cache_holds_are_answered_correctly(engines, world):
    asks = [EngineRequest(tuple(prompt_of(n)), world.version(str(n % 5), 1), 4) for n in range(15)]

    async def in_turn(engine):
        found = [await collect(engine, ask) for ask in asks]
        with suppress(AttributeError):
            await engine.adapters.unloads_ended()
        return found, engine.facts()["activated"][0]

    found, held = run(engines, in_turn, activated=2)
    assert found == [world.expected(ask) for ask in asks]
    assert held <= 2


def test_cached_prefixes_are_not_shared_between_callers(engines, world):
    prompt = tuple(prompt_of(6, 64))

    async def cached(engine, asker):
        ask = EngineRequest(prompt, world.version("1", 1), 2, asker=asker)
        return [piece.cached async for piece in engine.answer(ask)][-1]

    async def three(engine):
        return [await cached(engine, asker) for asker in ("ann", "ann", "bob")]

    first, again, other = run(engines, three)
    assert first == other == 0
    assert again > 0


def test_requests_over_a_limit_are_refused_before_they_start(engines, world):
    who = world.version("0", 1)

    async def refused(engine):
        with pytest.raises(InputError):
            await collect(engine, EngineRequest((), who, 3))
        with pytest.raises(InputError):
            await collect(engine, EngineRequest(tuple(prompt_of(0, 250)), who, 20))
        running = [asyncio.create_task(collect(engine, EngineRequest(tuple(prompt_of(n)), who, 100))) for n in range(6)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        with pytest.raises(QueueFull):
            await collect(engine, EngineRequest(tuple(prompt_of(9)), who, 3))
        return await asyncio.gather(*running)

    assert all(len(tokens) <= 100 for tokens, _ in run(engines, refused, most=6))


def test_a_closing_engine_finishes_running_answers_and_accepts_no_new_ones(engines, world):
    async def closed(engine):
        with paced(engine) as step:
            running = asyncio.create_task(collect(engine, EngineRequest(tuple(prompt_of(8)), TASK, 100)))
            await begun(engine, step, [running])
            assert not running.done()
        await engine.close()
        with pytest.raises(EngineGone):
            await collect(engine, EngineRequest(tuple(prompt_of(8)), TASK, 3))
        assert not engine.ready
        return await running

    assert run(engines, closed) == world.expected(EngineRequest(tuple(prompt_of(8)), TASK, 100))
