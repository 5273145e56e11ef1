"""What the gateway sends to vLLM and reads from vLLM; fixed responses stand in for the server."""

import asyncio
import json
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import httpx2
import pytest

from mta.errors import ConfigError
from mta.serving.api.completions import _event
from mta.serving.engine import EngineGone, EngineRequest, ModelRemoved, Version
from mta.serving.launch import remote_of
from mta.serving.model_names import wire_name
from mta.serving.vllm.engine import VllmEngine, _read
from mta.serving.vllm.registry import AdapterRegistry
from mta.serving.vllm.server import VllmSettings

ODD = "a\N{NEXT LINE}b\N{LINE SEPARATOR}c\N{PARAGRAPH SEPARATOR}d\x0b"


def test_an_event_with_odd_line_separators_in_its_text_is_read_whole():
    events = [
        {"choices": [{"text": ODD, "token_ids": [7], "finish_reason": None}]},
        {"choices": [{"text": "é", "token_ids": [8], "finish_reason": "length"}]},
    ]
    lines = [f"data: {json.dumps(event, ensure_ascii=False)}\r\n\r\n" for event in events]
    data = "".join([*lines, "data: [DONE]\n\n"]).encode()

    async def sent():  # chunks end inside of characters and lines
        for at in range(0, len(data), 7):
            yield data[at : at + 7]

    async def go():
        return [piece async for piece in _read(httpx2.Response(200, content=sent()), (), 0)]

    *pieces, end = asyncio.run(go())
    assert [piece.token.id for piece in pieces] == [7, 8]
    assert end.finish == "length"


def test_an_event_of_the_gateway_is_one_line_for_every_client():
    event = _event({"text": ODD})
    assert event.endswith("\n\n")
    assert len(event.splitlines()) == 2
    assert json.loads(event.removeprefix("data: ")) == {"text": ODD}


@asynccontextmanager
async def registry_of(folder, answer, count=4):
    """A registry of a server that ``answer`` stands in for."""
    async with httpx2.AsyncClient(transport=httpx2.MockTransport(answer), base_url="http://vllm") as client:
        yield AdapterRegistry(client, folder, count)


def models_of(*names):
    """What vLLM answers when asked for its models."""
    return httpx2.Response(200, json={"data": [{"id": name} for name in names]})


def test_dropping_a_version_unloads_it_and_leaves_the_persons_newer_version(tmp_path):
    old, new = Version("ann", 1, seal="a" * 16), Version("ann", 2, seal="b" * 16)
    names, unloaded = [wire_name(who) for who in (old, new)], []

    def answer(request):
        if request.method == "GET":
            return models_of(*names)
        unloaded.append(json.loads(request.content)["lora_name"])
        return httpx2.Response(200)

    async def go():
        async with registry_of(tmp_path, answer) as registry:
            await registry.drop({old}.__contains__, asyncio.Task.cancel)

    asyncio.run(go())
    assert unloaded == names[:1]


def test_an_adapter_that_was_not_unloaded_answers_on(tmp_path, caplog):
    """Nobody who asks is told to forget a person again, and the log says what failed."""
    asked = Version("ann", 1, seal="a" * 16)

    async def go():
        # With a count of 0, an idle adapter is unloaded at once.
        async with registry_of(tmp_path, lambda request: httpx2.Response(500), count=0) as registry:
            async with registry.held(asked) as name:
                pass
            async with registry.held(asked) as again:
                assert again == name
            await registry.unloads_ended()
            await asyncio.sleep(0)
            return len(registry)

    assert asyncio.run(go()) == 1
    assert "an idle adapter was not unloaded: EngineGone" in caplog.text


def test_adapters_of_an_earlier_gateway_make_room_first(tmp_path):
    earlier, person = Version("old", 1, seal="a" * 16), Version("new", 1, seal="a" * 16)
    unloaded = []

    def answer(request):
        if request.method == "GET":
            return models_of("base", wire_name(earlier))
        unloaded.append(json.loads(request.content)["lora_name"])
        return httpx2.Response(200)

    async def go():
        async with registry_of(tmp_path, answer, count=1) as registry:
            assert await registry.versions() == {earlier}
            async with registry.held(person):
                pass
            await registry.unloads_ended()

    asyncio.run(go())
    assert unloaded == [wire_name(earlier)]


def test_a_dropped_adapter_that_was_not_unloaded_answers_nobody(tmp_path):
    person, starts = Version("ann", 1, seal="a" * 16), asyncio.Event

    async def go():
        asked, answer = starts(), starts()

        async def refuse(request):
            if request.method == "GET":
                return models_of(wire_name(person))
            asked.set()
            await answer.wait()
            return httpx2.Response(500)

        async def use():
            async with registry.held(person):
                raise AssertionError("a dropped adapter was used")

        async with registry_of(tmp_path, refuse) as registry:
            dropping = asyncio.create_task(registry.drop({person}.__contains__, lambda answer: None))
            await asked.wait()
            using = asyncio.create_task(use())
            await asyncio.sleep(0)
            answer.set()
            return await asyncio.gather(dropping, using, return_exceptions=True)

    assert [type(error) for error in asyncio.run(go())] == [EngineGone, ModelRemoved]


def test_a_dropped_adapter_that_was_not_unloaded_is_unloaded_later_and_its_person_can_come_back(tmp_path):
    person, loaded = Version("ann", 1, seal="a" * 16), {wire_name(Version("ann", 1, seal="a" * 16))}
    answers = [500, 200]

    def answer(request):
        if request.method == "GET":
            return models_of(*loaded)
        status = answers.pop(0)
        loaded.difference_update(loaded if status == 200 else ())
        return httpx2.Response(status)

    async def go():
        async with registry_of(tmp_path, answer) as registry:
            with pytest.raises(EngineGone):
                await registry.drop({person}.__contains__, lambda answer: None)
            await registry.versions()  # as every sweep asks
            await registry.unloads_ended()
            async with registry.held(person) as name:
                return name

    assert asyncio.run(go()) == wire_name(person)


@pytest.mark.parametrize("seed", [None, 0, -1, -2, 2**63 - 1, 2**63])
def test_every_seed_is_one_that_vllm_takes(seed):
    """It takes -1 for no seed, and refuses larger ones; the second of two answers has the next seed."""
    engine = SimpleNamespace(stops=frozenset(), _salted=lambda ask: "")
    sent = VllmEngine._body(engine, EngineRequest((1,), Version("ann", 1), 4, seed=seed), "ann")["seed"]
    assert (sent is None) == (seed is None)
    assert sent is None or 0 <= sent < 2**63


def test_a_dropped_adapter_is_given_to_nobody_while_another_answer_ends(tmp_path):
    person = Version("ann", 1, seal="a" * 16)

    def answer(request):
        return models_of(wire_name(person))

    async def go():
        begun, may_end = asyncio.Event(), asyncio.Event()

        async def use():
            async with registry.held(person):
                begun.set()
                await may_end.wait()

        async with registry_of(tmp_path, answer) as registry:
            using = asyncio.create_task(use())
            await begun.wait()
            dropping = asyncio.create_task(registry.drop({person}.__contains__, lambda answer: None))
            while not registry._loaded[wire_name(person)].dropped:
                await asyncio.sleep(0)
            with pytest.raises(ModelRemoved):
                await asyncio.wait_for(asyncio.create_task(use()), 5)
            may_end.set()
            await asyncio.gather(using, dropping)

    asyncio.run(go())


def test_an_answer_that_begins_while_its_person_is_forgotten_is_ended(tmp_path):
    person = Version("ann", 1, seal="a" * 16)

    async def go():
        listing, may_list, begun = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def answer(request):
            if request.method == "GET":
                listing.set()
                await may_list.wait()
            return models_of()

        async def use():
            async with registry.held(person):
                begun.set()
                await asyncio.Event().wait()  # an answer that would never end

        async with registry_of(tmp_path, answer) as registry:
            dropping = asyncio.create_task(registry.drop({person}.__contains__, asyncio.Task.cancel))
            await listing.wait()
            using = asyncio.create_task(use())
            await begun.wait()
            may_list.set()
            await asyncio.wait_for(dropping, 5)
            return using.cancelled(), len(registry)

    assert asyncio.run(go()) == (True, 0)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "localhost:8000", "http://127.0.0.1:80x0", "http://", "unix:socket"])
def test_an_address_that_no_client_can_use_is_a_mistake(url, tmp_path):
    with pytest.raises(ConfigError, match="--vllm-url is"):
        remote_of(url, tmp_path)


def test_the_guides_command_for_an_own_vllm_has_the_options_of_ours():
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "vllm.md").read_text(encoding="utf-8")
    shown = page.partition("mkdir -m 700")[2].partition("```")[0].replace("=", " ").split()
    settings = VllmSettings("python", "base", "bank", "people", 256)
    options = [word.replace("=", " ").split() for word in settings.command(Path("socket")) if word.startswith("--")]
    own = ("--model", "--uds", "--max-model-len", "--disable-fastapi-docs")  # the reader's choice
    for name, *value in (option for option in options if option[0] not in own):
        assert name in shown
        assert shown[shown.index(name) + 1] in value or not value
    variables = {name for name in settings.environment(Path()) if name.startswith(("VLLM_", "DO_NOT", "MTA_VLLM"))}
    assert variables - {"VLLM_CPU_KVCACHE_SPACE", "MTA_VLLM_PARENT"} <= set(shown)
