"""How fast the embedded engine answers many people at once, against the base alone under the same load.

    python -m benchmarks.serve --bank demo/bank                       # 16 people at once, 30 seconds each way
    python -m benchmarks.serve --bank demo/bank --clients 64 --seconds 60

Every client is another person and asks again as soon as it is answered. People are made up: coefficients over all
anchors, a rank-1 stack. "Base alone" is the same engine without seats, so nothing but the adapters differs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from mta.bank.bank import Bank
from mta.bank.files import read_info
from mta.base import BaseModel
from mta.lora.batch import fresh
from mta.machine import cores, in_passing, processor
from mta.rows import BASE
from mta.serving.embedded import EmbeddedEngine
from mta.serving.engine import Ask, Version, Who
from mta.state import State


@dataclass
class Times:
    """What the clients saw."""

    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0

    def told(self) -> dict[str, float]:
        found = {"tokens/s": self.tokens / self.seconds, "answers": len(self.first)}
        for name, times in (("first token", self.first), ("token", self.gaps)):
            found |= {f"{name} p{p} (ms)": 1000 * float(np.percentile(times, p)) for p in (50, 95, 99)}
        return found


class MadeUp:
    """States of people who do not exist."""

    def __init__(self, base: BaseModel, bank: Bank) -> None:
        self.base, self.bank = base, bank

    def load(self, person: str, version: int) -> State:
        n = len(self.bank)
        w = torch.rand(n, generator=torch.Generator().manual_seed(int(person))) / n
        stack = fresh(self.base.targets, 1, 16.0, 0, [person], torch.float32)
        anchors = tuple(range(n))
        return State(self.bank.hash, anchors, tuple(w.tolist()), "posterior", "", person, 0, stack)


async def load(engine: EmbeddedEngine, whose: list[Who], prompts: list[tuple[int, ...]], args: object) -> Times:
    """One client for each of ``whose``, asking again and again."""
    times, until = Times(), time.monotonic() + args.seconds  # type: ignore[attr-defined]

    async def client(n: int) -> None:
        turn = n
        while time.monotonic() < until:
            ask = Ask(prompts[turn % len(prompts)], whose[n], max_tokens=args.tokens)  # type: ignore[attr-defined]
            turn, last = turn + len(whose), time.monotonic()
            begun = last
            async for piece in engine.answer(ask):
                if piece.token:
                    now = time.monotonic()
                    (times.first if last == begun else times.gaps).append(now - last)
                    last, times.tokens = now, times.tokens + 1

    start = time.monotonic()
    await asyncio.gather(*(client(n) for n in range(len(whose))))
    times.seconds = time.monotonic() - start
    return times


def measured(base: BaseModel, bank: Bank, args: object, *, alone: bool) -> dict[str, float]:
    """One way: everybody by their own adapters, or the base alone."""
    draw = random.Random(0)
    words = base.tokenizer("the film was good and long with a story of people in a town by the sea")["input_ids"]
    prompts = [tuple(draw.choices(words, k=draw.randrange(40, 120))) for _ in range(512)]

    async def go() -> dict[str, float]:
        engine = EmbeddedEngine(base, bank, MadeUp(base, bank), slots=args.slots, chunk=args.chunk, length=512)  # type: ignore[attr-defined,arg-type]
        if alone:
            engine.decoder.seats.opened = lambda rows: nullcontext()  # type: ignore[assignment,method-assign]
        whose: list[Who] = [BASE if alone else Version(str(n), 1) for n in range(args.clients)]  # type: ignore[attr-defined]
        warm, args.seconds = args.seconds, 2  # type: ignore[attr-defined]
        await load(engine, whose, prompts, args)
        args.seconds = warm  # type: ignore[attr-defined]
        times = await load(engine, whose, prompts, args)
        await engine.close()
        return times.told()

    return asyncio.run(go())


def opened(folder: Path, dtype: str) -> tuple[BaseModel, Bank]:
    base = BaseModel.load(read_info(folder).run.base, dtype)
    base.prompts.end_token = base.model.config.vocab_size  # answers of one length: both ways do as much
    base.model.generation_config.eos_token_id = None
    return base, Bank.open(folder, base)


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--bank", type=Path, default=Path("demo/bank"))
    words.add_argument("--clients", type=int, default=16)
    words.add_argument("--slots", type=int, default=16)
    words.add_argument("--chunk", type=int, default=64)
    words.add_argument("--tokens", type=int, default=48)
    words.add_argument("--seconds", type=float, default=30)
    words.add_argument("--dtype", default="bfloat16")
    args = words.parse_args()
    base, bank = in_passing(lambda: opened(args.bank, args.dtype))
    found = {"base alone": measured(base, bank, args, alone=True), "people": measured(base, bank, args, alone=False)}
    ratio = found["people"]["tokens/s"] / found["base alone"]["tokens/s"]
    about = {"machine": f"{processor()}, {cores()} cores", "anchors": len(bank), "dtype": args.dtype}
    print(json.dumps({**about, **found, "ratio": ratio}, indent=1))


if __name__ == "__main__":
    main()
