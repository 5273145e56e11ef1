"""Setup for tests of both engines: a saved float32 base, a bank, and people with different answers."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
import torch
from conftest import TINY_RUN, HashEncoder, people_of
from served import stepped
from tiny import COMMON, random_loras, tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from mta.bank.bank import Bank
from mta.bank.build import build_bank
from mta.bank.context import Build
from mta.data.tasks import load_task
from mta.data.tasks.prompt import Example
from mta.lora.layers import Adapters
from mta.model.base import BaseModel
from mta.model.generate import generate
from mta.personalize.adapters import SharedModel, row_adapters
from mta.serving.embedded.engine import EmbeddedEngine
from mta.serving.engine import AnswerPiece, EngineRequest, ServedModel, Version
from mta.serving.vllm.engine import VllmEngine
from mta.serving.vllm.server import VllmServer, VllmSettings
from mta.store import Store
from mta.store.state import State
from mta.training.scoring import log_likelihood

LENGTH = 256
PYTHON = os.environ.get("MTA_VLLM_PYTHON", "")
WITH_VLLM = [
    pytest.mark.vllm,
    pytest.mark.skipif(not PYTHON, reason="no vLLM here: MTA_VLLM_PYTHON names no Python that has it (make test-vllm)"),
]


class World:
    """Base, bank, and store in a folder, and factories of engines over them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.place = folder, str(folder / "base")
        torch.manual_seed(0)
        config = COMMON | {"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 96}
        model = LlamaForCausalLM(LlamaConfig(**config, num_key_value_heads=1))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2.0)
        model.save_pretrained(self.place)
        tokenizer().save_pretrained(self.place)
        self.base = BaseModel.load(self.place, "float32", "cpu", LENGTH)
        run = TINY_RUN.model_copy(update={"base": self.place, "dtype": "float32"})
        people = people_of(4, prefix="t"), people_of(12, prefix="c")
        build_bank(Build(self.base, load_task("movielens-rating"), HashEncoder(), *people, run, folder / "bank"))
        self.bank = Bank.open(folder / "bank", self.base)
        self.store = Store(folder / "people")

    def renew(self, person: str, seed: int, bank: str | None = None) -> Version:
        """Save a new version of a person that differs from all others."""
        stack = random_loras(self.base, 1, rank=1, size=0.5, seed=seed)
        w = (3.0, -2.0, float(seed % 7))
        state = State(bank or self.bank.hash, (0, 1, 2), w, "fixed", "", f"{person}/{seed}", 0, stack)
        return self.version(person, self.store.save(person, state))

    def version(self, person: str, number: int, stacked: bool = True) -> Version:
        """The version as the gateway passes it to an engine."""
        return Version(person, number, stacked, self.store.seal(person, number) or "")

    def expected(self, request: EngineRequest) -> tuple[list[int], str]:
        """The tokens that the plain model answers with, and why the answer ends."""
        tokens = self.alone(request.who, list(request.prompt), request.max_tokens)
        return tokens, "length" if len(tokens) == request.max_tokens else "stop"

    def adapters(self, who: ServedModel) -> list[Adapters]:
        """The adapters of one row."""
        state = who if isinstance(who, SharedModel) else self.store.load(who.person, who.number)
        return row_adapters(self.base, self.bank, [state], isinstance(who, SharedModel) or who.stacked)

    def alone(self, who: ServedModel, prompt: list[int], count: int) -> list[int]:
        """The answer of one row, computed without any engine code."""
        return generate(self.base, [prompt], [0], self.adapters(who), max_new_tokens=count)[0]

    def scored(self, request: EngineRequest) -> list[float]:
        """The log probability of each label, computed without any engine code."""
        prompt = request.prompt
        jobs = [[Example((*prompt, *label), len(prompt)) for label in request.labels]]
        return log_likelihood(self.base, jobs, self.adapters(request.who), owners=[0])[0].tolist()

    def embedded(self, **how: int) -> EmbeddedEngine:
        """An embedded engine with its own modules, so that ``alone`` can run meanwhile."""
        return EmbeddedEngine(self.base.twin(), self.bank, self.store, slots=4, **how)

    def vllm(self, server: object, **how: int) -> VllmEngine:
        """An engine over a server that keeps running."""
        return VllmEngine(server, self.base, self.bank, self.store, slots=4, **how)

    def settings(self, **how: object) -> VllmSettings:
        """Settings of a vLLM server for this base."""
        more = ("--dtype=float32", "--block-size=32", "--enforce-eager")
        paths = {"bank": str(self.folder / "bank"), "store": str(self.folder / "people")}
        return VllmSettings(PYTHON, self.place, length=LENGTH, rows=4, args=more, **paths, **how)


class Lent:
    """A server shared by the engines of several tests; ``stop`` does nothing."""

    def __init__(self, server: VllmServer) -> None:
        self._server = server

    def __getattr__(self, name: str) -> object:
        return getattr(self._server, name)

    def stop(self) -> None:
        """Do nothing: the server keeps running."""


@contextmanager
def vllm_server(settings: VllmSettings):
    """A real vLLM server within the block."""
    server = VllmServer(settings)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def prompt_of(n: int, length: int = 12) -> list[int]:
    """Prompt tokens without an end token."""
    draw = torch.Generator().manual_seed(n)
    return torch.randint(10, 250, (length,), generator=draw).tolist()


@contextmanager
def paced(engine: object) -> Iterator[Callable[[], None]]:
    """Within the block the embedded engine makes one step per call of what is yielded; vLLM goes on by itself."""
    if not hasattr(engine, "scheduler"):
        yield lambda: None
        return
    with stepped(engine.scheduler) as steps:

        def step() -> None:
            steps.acquire(blocking=False)  # never more than one step ahead
            steps.release()

        yield step


async def begun(engine: object, step: Callable[[], None], tasks: list[asyncio.Task]) -> None:
    """Return as soon as a request is running, or all are done."""
    while not engine.facts()["running"][0] and not all(task.done() for task in tasks):
        step()
        await asyncio.sleep(0.005)


@asynccontextmanager
async def closing(engine: object) -> AsyncIterator[object]:
    """Close the engine after the block."""
    try:
        yield engine
    finally:
        await engine.close()


async def pieces_of(engine: object, request: EngineRequest) -> list[AnswerPiece]:
    """All pieces of an answer."""
    return [piece async for piece in engine.answer(request)]


async def tokens_of(engine: object, request: EngineRequest) -> list[int]:
    """The tokens of an answer."""
    return [piece.token.id for piece in await pieces_of(engine, request) if piece.token]


async def collect(engine: object, request: EngineRequest) -> tuple[list[int], str]:
    """The tokens of an answer, and its finish reason."""
    *pieces, end = await pieces_of(engine, request)
    return [piece.token.id for piece in pieces], end.finish
