"""The gateway over people who do not exist, in a process of its own: the address on stdout, then requests."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from mta.bank.bank import Bank
from mta.bank.format import read_info
from mta.config import Run
from mta.lora.batch import Factors, fresh
from mta.model.base import BaseModel
from mta.personalize.adapters import BASE
from mta.serving.api.auth import Keys
from mta.serving.launch import serve, service_of, vllm_of
from mta.store import Store
from mta.store.state import State
from mta.system.device import run_in_short_thread
from mta.system.process import keep_freed_memory

LENGTH = 512  # tokens of a prompt and its answer


def opened(folder: Path, dtype: str) -> tuple[BaseModel, Bank]:
    """Base and bank; no token ends an answer, so that every way does as much."""
    base = BaseModel.load(read_info(folder).run.base, dtype, max_tokens=LENGTH)
    base.prompts.end_token = base.model.config.vocab_size
    base.model.generation_config.eos_token_id = None
    return base, Bank.open(folder, base)


def made_up(base: BaseModel, bank: Bank, person: str) -> State:
    """Coefficients over all anchors, and a stack of rank 1."""
    n, draw = len(bank), torch.Generator().manual_seed(int(person))
    w = torch.rand(n, generator=draw) / n
    stack = fresh(base.targets, 1, 16.0, 0, [person], torch.float32)
    factors = {name: Factors(a, 1e-4 * torch.randn(b.shape, generator=draw)) for name, (a, b) in stack.factors.items()}
    stack = type(stack)(factors, stack.scale)
    return State(bank.hash, tuple(range(n)), tuple(w.tolist()), "posterior", "", person, 0, stack)


@asynccontextmanager
async def _base_alone(_: object) -> AsyncIterator[str]:
    """The name of the base: without LoRA, vLLM knows no other."""
    yield BASE.value


def _leave_out(adapters: Any) -> None:
    """Apply no adapters, and move none between slots."""
    adapters.opened = lambda rows: nullcontext()
    for name in ("take", "clear", "exchange"):
        setattr(adapters, name, lambda *_: None)


def main() -> None:
    words = argparse.ArgumentParser()
    words.add_argument("--bank", type=Path)
    words.add_argument("--store")
    words.add_argument("--people", type=int)
    words.add_argument("--slots", type=int)
    words.add_argument("--dtype")
    words.add_argument("--vllm", default="")
    words.add_argument("--alone", action="store_true", help="no adapters at all: the base as it would be served alone")
    args = words.parse_args()
    base, bank = run_in_short_thread(lambda: opened(args.bank, args.dtype))
    store = Store(args.store)
    for person in map(str, range(args.people)):
        store.save(person, made_up(base, bank, person))
    lora = "--no-enable-lora" if args.alone else ""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that vLLM is stopped, too
    with vllm_of(args.vllm or None, base, args.bank, args.store, slots=args.slots, args=lora) as vllm:
        service = service_of(base, bank, Run(), args.store, Keys(), slots=args.slots, vllm=vllm)
        if vllm:
            service.engine.stops = frozenset()  # type: ignore[attr-defined]
            if args.alone:
                service.engine.adapters.held = _base_alone  # type: ignore[attr-defined]
        elif args.alone:
            _leave_out(service.engine.scheduler.adapters)  # type: ignore[attr-defined]
        serve(service, "127.0.0.1", 0, lambda url: print(json.dumps({"url": url}), flush=True))


if __name__ == "__main__":
    keep_freed_memory()  # as the command line does
    main()
