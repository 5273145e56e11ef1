"""Real vLLM with our plugin: failures that once stopped a server (serving/vllm/registry.py), and its shutdown.

``make test-vllm`` creates its environment and sets MTA_VLLM_PYTHON; otherwise these tests are skipped.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import httpx2
import openai
import pytest
from contract import PYTHON, WITH_VLLM, Lent, World, closing, collect, prompt_of, vllm_server
from served import served

from mta.serving.engine import EngineGone, EngineRequest
from mta.serving.vllm.server import VllmNotStarted, VllmServer

pytestmark = WITH_VLLM
COUNT = 8


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    made = World(tmp_path_factory.mktemp("vllm"))
    for n in range(24):
        made.renew(str(n), n)
    return made


@pytest.fixture(scope="module")
def server(world):
    with vllm_server(world.settings()) as running:
        yield running


def request_of(world, n, count=COUNT):
    return EngineRequest(tuple(prompt_of(n)), world.version(str(n), 1), count)


async def listed(engine):
    """The names that vLLM knows."""
    return [model["id"] for model in (await engine.client.get("/v1/models")).json()["data"]]


@pytest.mark.anyio
async def test_adapters_are_unloaded_before_their_files_are_deleted(world, server):
    """More people than vLLM keeps loaded: it reads an adapter again after dropping it."""
    async with closing(world.vllm(Lent(server), activated=3)) as engine:
        for n in [*range(24), *range(24), 0, 5, 0]:
            request = request_of(world, n)
            assert await collect(engine, request) == world.expected(request), n
        await engine.adapters.unloads_ended()
        assert len(await listed(engine)) <= 1 + 3
        assert engine.facts()["activated"][0] <= 3
    assert sum(path.is_dir() for path in server.folder.iterdir()) <= 3
    assert server.up


@pytest.mark.anyio
async def test_the_server_folder_is_private_and_reveals_no_id(world, server):
    who = world.renew("somebody", 50)
    async with closing(world.vllm(Lent(server))) as engine:
        await collect(engine, EngineRequest(tuple(prompt_of(1)), who, COUNT))
    assert server.folder.stat().st_mode & 0o077 == 0
    assert not any("somebody" in str(path) for path in server.folder.rglob("*"))


@pytest.mark.anyio
async def test_a_server_that_ends_ends_its_answers_and_the_gateway_says_so(world):
    with vllm_server(world.settings()) as server:
        async with closing(world.vllm(Lent(server))) as engine:
            engine.stops = frozenset()  # so that answers are long
            rows = [asyncio.create_task(collect(engine, request_of(world, n, 230))) for n in range(1, 5)]
            await asyncio.wait(rows, return_when=asyncio.FIRST_COMPLETED)
            os.killpg(server._process.pid, signal.SIGSTOP)  # from now on, it finishes no answer
            rows.append(asyncio.create_task(collect(engine, request_of(world, 5, 230))))
            await asyncio.sleep(0.2)
            os.killpg(server._process.pid, signal.SIGKILL)
            await asyncio.to_thread(server._process.wait)
            ended = await asyncio.gather(*rows, return_exceptions=True)
            assert isinstance(ended[-1], EngineGone)
            assert all(isinstance(end, EngineGone) or len(end[0]) == 230 for end in ended)
            with pytest.raises(EngineGone, match=r"the vLLM server ended \(exit status -9\)"):
                await collect(engine, request_of(world, 2))
            assert not engine.ready
            assert not engine.alive
    assert not server.folder.exists()


def test_a_server_that_cannot_start_reports_why_and_leaves_nothing(world):
    broken = VllmServer(replace(world.settings(), base="no"))
    with pytest.raises(VllmNotStarted, match="no"):
        broken.start()
    assert not broken.folder.exists()


def test_a_server_stops_and_leaves_nothing_when_its_gateway_is_killed(world):
    code = f"""if True:
        import os
        from mta.serving.vllm.server import VllmServer, VllmSettings
        server = VllmServer(VllmSettings(**{asdict(world.settings())!r}))
        server.start()
        print(server._process.pid, server.folder, flush=True)
        os.kill(os.getpid(), 9)
    """
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=400)
    pid, folder = found.stdout.split()
    until = time.monotonic() + 60
    while (Path(f"/proc/{pid}").exists() or Path(folder).exists()) and time.monotonic() < until:
        time.sleep(0.5)
    assert not Path(f"/proc/{pid}").exists()
    assert not Path(folder).exists()


def test_registering_the_plugin_imports_nothing_heavy(world, tmp_path):
    code = """if True:
        import json, sys
        import vllm.lora.resolver
        before = set(sys.modules)
        from mta.serving.vllm.plugin import register
        register()
        register()
        new = sorted(name for name in set(sys.modules) - before if not name.startswith("mta"))
        print(json.dumps([new, sorted(vllm.lora.resolver.LoRAResolverRegistry.get_supported_resolvers())]))
    """
    given = {"BANK": str(world.folder / "bank"), "STORE": "people", "FOLDER": str(tmp_path), "RANK": "16"}
    env = os.environ | {f"MTA_VLLM_{name}": value for name, value in given.items()}
    found = subprocess.run([PYTHON, "-c", code], env=env, capture_output=True, text=True, check=True, timeout=120)
    new, resolvers = json.loads(found.stdout.splitlines()[-1])
    assert resolvers == ["mta"]
    assert not {name.partition(".")[0] for name in new} & {"torch", "transformers", "safetensors", "pydantic", "fsspec"}


def test_openais_client_reaches_vllm_only_through_the_gateway(world, server, tmp_path):
    engine = world.vllm(Lent(server))
    with served(world.base, world.bank, tmp_path, engine=engine, store=world.store) as here:
        client = here.client("serve")
        text = "Film 7"
        asked = {"model": "person:3", "prompt": text, "max_tokens": COUNT, "temperature": 0}
        whole = client.completions.create(**asked, logprobs=2)
        stream = client.completions.create(**asked, stream=True)
        pieces = [chunk.choices[0].text for chunk in stream if chunk.choices]
        tokens = world.alone(world.version("3", 1), list(world.base.prompts.text(text)), COUNT)
        shown = world.base.tokenizer.decode(tokens, skip_special_tokens=True)
        assert whole.choices[0].text == "".join(pieces) == shown
        assert whole.usage.completion_tokens == len(tokens)
        assert len(whole.choices[0].logprobs.tokens) == len(tokens)
        with pytest.raises(openai.NotFoundError):
            client.completions.create(**asked | {"model": "person:nobody"})
        assert {model.id for model in client.models.list()} == {world.base.name, "task"}
        with here.http("admin") as http:
            for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/sleep", "/v1/tokenize", "/tokenize"):
                assert http.post(path, json={}).status_code in (404, 405)
            assert "person" not in http.get("/metrics").text.partition("mta_engine")[2]


def test_the_command_line_starts_and_stops_vllm(world):
    """As in docs/how-to/vllm.md; SIGTERM stops gateway and vLLM."""
    words = ["serve", "--bank", str(world.folder / "bank"), "--store", str(world.folder / "people"), "--port", "0"]
    words += ["--insecure-local", "--json", "--vllm", PYTHON, "--vllm-args", "--block-size=32 --enforce-eager"]
    gateway = subprocess.Popen([sys.executable, "-m", "mta", *words], stdout=subprocess.PIPE, text=True)
    output = ""
    while not output.rstrip().endswith("}"):
        line = gateway.stdout.readline()
        assert line, "it ended"
        output += line
    body = {"model": "person:4", "prompt": "Film 7", "max_tokens": COUNT, "temperature": 0}
    answer = httpx2.post(f"{json.loads(output)['url']}/v1/completions", json=body, timeout=120).json()
    tokens = world.alone(world.version("4", 1), list(world.base.prompts.text("Film 7")), COUNT)
    assert answer["choices"][0]["text"] == world.base.tokenizer.decode(tokens, skip_special_tokens=True)
    servers = subprocess.run(["pgrep", "-P", str(gateway.pid)], capture_output=True, text=True).stdout.split()
    gateway.send_signal(signal.SIGTERM)
    assert gateway.wait(60) in (0, 128 + signal.SIGTERM, -signal.SIGTERM)
    assert servers
    assert not any(Path(f"/proc/{pid}").exists() for pid in servers)
