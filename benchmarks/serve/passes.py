"""What one pass of the embedded engine costs, with everybody's adapters and without: no server, no clients.

python -m benchmarks.serve.passes --bank demo/bank
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from benchmarks.serve.server import LENGTH, made_up, opened
from benchmarks.speed.timing import settle
from mta.serving.embedded.adapter_slots import AdapterSlots
from mta.serving.embedded.kv_cache import Slots
from mta.system.device import cores, in_passing, processor
from mta.system.malloc import keep_freed_memory

PROMPT = [10] * 80  # tokens that lie in every slot already
TIMES = 20


def milliseconds(slots: Slots, adapters: AdapterSlots, rows: slice, tokens: int, alone: bool) -> float:
    """The median of some passes over as many new tokens of each row."""
    found = []
    for _ in range(TIMES):
        for slot in slots._slots:
            slot.tokens = list(PROMPT)
        settle()
        start = time.perf_counter()
        with torch.inference_mode(), nullcontext() if alone else adapters.opened(rows):
            slots.logits(rows, [[20] * tokens] * (rows.stop - rows.start))
        settle()
        found.append(time.perf_counter() - start)
    return round(1000 * statistics.median(found), 1)


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--bank", type=Path, default=Path("demo/bank"))
    words.add_argument("--rows", type=int, default=16)
    words.add_argument("--dtype", default="bfloat16")
    args = words.parse_args()
    base, bank = in_passing(lambda: opened(args.bank, args.dtype))
    adapters = in_passing(lambda: AdapterSlots(base, bank, args.rows))
    slots = Slots(base, args.rows, LENGTH, 128, adapters)
    for n in range(args.rows):
        adapters.take(n, adapters.adapter_of(made_up(base, bank, str(n))))
        slots.take((n, ""), PROMPT)  # type: ignore[arg-type]
    values: dict[str, object] = {"machine": f"{processor()}, {cores()} cores", "anchors": len(bank)}
    ways = {f"a token of {args.rows} rows": (slice(0, args.rows), 1)}
    ways |= {f"{tokens} prompt tokens of one row": (slice(0, 1), tokens) for tokens in (64, 128)}
    for name, (rows, tokens) in ways.items():
        alone, people = (milliseconds(slots, adapters, rows, tokens, alone) for alone in (True, False))
        values[name] = {"base alone (ms)": alone, "people (ms)": people, "ratio": round(alone / people, 3)}
    print(json.dumps(values, indent=1))


if __name__ == "__main__":
    keep_freed_memory()  # as the command line does
    main()
