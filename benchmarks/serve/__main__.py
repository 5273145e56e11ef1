"""Many people at once through the gateway, against the base alone under the same load, and against PEFT.

    python -m benchmarks.serve --bank demo/bank                                     # 16 people, 30 seconds each way
    python -m benchmarks.serve --bank demo/bank --ways vllm embedded --clients 64 --seconds 60 --vllm .vllm/bin/python
    python -m benchmarks.serve --bank demo/bank --ways embedded peft --json results/serve.json

A real server for each way, in a process of its own, asked over loopback by one process of clients. Every client is
another person: made up, with coefficients over all anchors and a rank-1 stack. "Base alone" is served without adapters:
the embedded engine without adapters, vLLM without --enable-lora. PEFT generates whole batches of the same people in
its own process, without a server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.serve.load import cold, delay, load
from mta.bank.format import read_info
from mta.system.device import processor
from mta.system.process import cores

UNASKED = 24  # people who are asked for the first time when that is timed


@contextmanager
def server(args: Any, *, vllm: bool, alone: bool) -> Iterator[str]:
    """Its address, for as long as the block lasts."""
    with tempfile.TemporaryDirectory() as store:
        sizes = {"bank": args.bank, "store": store, "people": args.clients + UNASKED + 1, "slots": args.slots}
        words = [f"--{name}={value}" for name, value in (sizes | {"dtype": args.dtype}).items()]
        words += [f"--vllm={args.vllm}"] * vllm + ["--alone"] * alone
        running = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.serve.server", *words], stdout=subprocess.PIPE, text=True
        )
        try:
            assert running.stdout
            line = running.stdout.readline()
            if not line:
                raise SystemExit("the server did not start; what it said stands above")
            yield json.loads(line)["url"]
        finally:
            running.send_signal(signal.SIGTERM)
            running.wait()


def measured(args: Any, *, vllm: bool, alone: bool) -> dict[str, Any]:
    """One engine, with everybody's adapters or with none."""
    with server(args, vllm=vllm, alone=alone) as url:
        base = read_info(args.bank).run.base
        models = [base if alone else f"person:{n}" for n in range(args.clients)]
        unasked = [base if alone else f"person:{args.clients + n}" for n in range(UNASKED)]
        asyncio.run(load(url, models, 2, args.tokens, seed=1))  # what the cache keeps of these is not asked again
        found: dict[str, Any] = {"load": asyncio.run(load(url, models, args.seconds, args.tokens)).as_dict()}
        found["first use"] = asyncio.run(cold(url, unasked))
        newcomer = base if alone else f"person:{args.clients + UNASKED}"
        found["newcomer"] = asyncio.run(delay(url, models[: max(args.slots - 1, 1)], newcomer))
    return found


def peft(args: Any) -> dict[str, float]:
    """The peer, in a process of its own."""
    words = [str(args.bank), args.clients, args.tokens, args.seconds, args.dtype]
    run = [sys.executable, "-m", "benchmarks.serve.peer", *map(str, words)]
    return dict(json.loads(subprocess.run(run, stdout=subprocess.PIPE, text=True, check=True).stdout))


def ratios(found: dict[str, Any]) -> dict[str, float]:
    """People's tokens a second against the base's by the same engine, and the embedded engine's against PEFT's."""
    speed = {way: result.get("load", result)["tokens/s"] for way, result in found.items()}
    pairs = [(f"{engine}, people", f"{engine}, base alone") for engine in ("embedded", "vllm")]
    pairs += [("embedded, people", "PEFT adapter_names")]
    return {
        f"{one} / {other}": round(speed[one] / speed[other], 3) for one, other in pairs if {one, other} <= set(speed)
    }


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--bank", type=Path, default=Path("demo/bank"))
    words.add_argument("--ways", nargs="+", choices=("embedded", "vllm", "peft"), default=["embedded"])
    words.add_argument("--clients", type=int, default=16)
    words.add_argument("--slots", type=int, default=16)
    words.add_argument("--tokens", type=int, default=48)
    words.add_argument("--seconds", type=float, default=30)
    words.add_argument("--dtype", default="bfloat16")
    words.add_argument("--vllm", default=".vllm/bin/python", help="the Python of vLLM's environment (make vllm)")
    words.add_argument("--json", type=Path, help="write the figures to this file too")
    args = words.parse_args()
    found: dict[str, Any] = {}
    for engine in args.ways:
        if engine == "peft":
            found["PEFT adapter_names"] = peft(args)
            continue
        for alone in (True, False):
            way = f"{engine}, {'base alone' if alone else 'people'}"
            found[way] = measured(args, vllm=engine == "vllm", alone=alone)
            print(json.dumps({way: found[way]}), file=sys.stderr, flush=True)
    about = {"machine": f"{processor()}, {cores()} cores", "torch": torch.__version__, "dtype": args.dtype}
    about |= {name: getattr(args, name) for name in ("clients", "slots", "tokens", "seconds")}
    about["anchors"] = len(read_info(args.bank).items)
    text = json.dumps({**about, **found, "ratios": ratios(found)}, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
