"""What each family of compiled kernels saves: a step with this family switched off against a step with all kernels.

    python -m benchmarks.kernels --out results/kernels.json

Works: a training step of rank 8 (OPPU), a training step of stage 3 (rank 1 over a task LoRA and a merge), and a
decoding step of 16 rows of different people. Each in bfloat16 and float32, in turn: A B A B.
About a quarter of an hour on two quiet cores. A stopped run continues: what the file holds is not measured again.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import torch

from benchmarks.speed import data
from benchmarks.speed.data import Absent
from benchmarks.speed.training import base_of, oppu, small, stack, task_lora
from mta.config import Training, parse_size
from mta.kernels.compile import Family, obstacle, without_kernels
from mta.kernels.functions import _onednn_is_faster
from mta.lora.batch import LoraBatch, fresh
from mta.model.base import BaseModel
from mta.serving.embedded.adapter_slots import AdapterSlots, RowAdapter
from mta.serving.embedded.kv_cache import Slots
from mta.system.atomic import read_json, write_json
from mta.system.device import cores, processor

ROWS, PROMPT = 16, 80  # rows that decode, and tokens before them
ALL = "all"  # every family switched off
TRAINING = ("norm", "rotate", "attention", "low_rank", "adamw", "linear", "onednn", ALL)
DECODING = ("norm", "rotate", "adapted_rows", "linear", ALL)
WORKS = {"rank 8": TRAINING, "stage 3": TRAINING, "decoding": DECODING}


@dataclass(frozen=True, slots=True)
class Sizes:
    """``repeats`` turns of A and B; ``people`` in a training step; ``tokens`` decoded in one turn."""

    repeats: int
    people: int
    tokens: int


def trained(base: BaseModel, work: str, sizes: Sizes) -> Callable[[], None]:
    """One optimizer step of ``people`` people with 8 examples each."""
    made = oppu if work == "rank 8" else stack
    training = Training(lr=1e-4, steps=1, batch_size=data.SHOTS)
    cohort = made(base, data.short().jobs(base, sizes.people), training, parse_size("4GiB"))
    return lambda: (cohort.train(), None)[1]


def decoded(base: BaseModel, sizes: Sizes) -> Callable[[], None]:
    """``tokens`` decoding steps of 16 rows: a task LoRA and 16 anchors that all share, and a stack for each."""
    adapters = AdapterSlots(base, _bank(base, 16), ROWS)  # a bank is what it is made of
    slots = Slots(base, ROWS, 256, 128, adapters)
    stacks = small(fresh(base.targets, 1, 1.0, 4, [str(n) for n in range(ROWS)], base.master_dtype), 4).to(base.dtype)
    for n in range(ROWS):
        gates = torch.full_like(adapters._gates[n], 1 / 16)
        adapters.take(n, RowAdapter(gates, stacks.select([n])))
        slots.take((n, ""), [10] * PROMPT)  # type: ignore[arg-type]

    def work() -> None:
        adapters._forwards.clear()  # what was looked up with other kernels
        for slot in slots._slots:
            slot.tokens = [10] * PROMPT
        with torch.inference_mode(), adapters.opened(slice(0, ROWS)):
            for _ in range(sizes.tokens):
                slots.logits(slice(0, ROWS), [[20]] * ROWS)

    return work


def _bank(base: BaseModel, anchors: int) -> Any:
    """What adapter slots need of a bank, with made-up weights: times do not depend on values."""
    made: LoraBatch = small(fresh(base.targets, 8, 2.0, 1, ["bank"] * anchors), 1).to(base.dtype)
    info = SimpleNamespace(run=SimpleNamespace(stack=SimpleNamespace(lora=SimpleNamespace(rank=1))))
    kept = {"task_lora": task_lora(base), "device_anchors": made, "anchors": made, "hash": "made up", "info": info}
    return type("Made", (), kept | {"__len__": lambda _: anchors})()


def measured(work: Callable[[], None], family: str, repeats: int) -> dict[str, Any]:
    """Seconds with all kernels and without the family, in turn.

    ``slower_without`` compares the fastest turns, which other work on the machine disturbs least; ``median`` and
    ``spread`` are of the ratios of the pairs of turns.
    """
    off = () if family == ALL else (family,)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(repeats):
        for on in (True, False):
            with nullcontext() if on else without_kernels(*off):
                start = time.perf_counter()
                work()
                seconds[on].append(time.perf_counter() - start)
    slower = sorted(without / all_on for all_on, without in zip(seconds[True], seconds[False], strict=True))
    return {
        "on_s": round(min(seconds[True]), 5),
        "off_s": round(min(seconds[False]), 5),
        "slower_without": round(min(seconds[False]) / min(seconds[True]), 4),
        "median": round(statistics.median(slower), 4),
        "spread": [round(slower[0], 4), round(slower[-1], 4)],
    }


def rows(wanted: Sequence[str], done: Sequence[str], sizes: Sizes) -> Iterator[tuple[str, dict[str, Any]]]:
    """One row per dtype, work and family that is ``wanted`` and not ``done``; none in a dtype that is not supported."""
    for dtype in ("bfloat16", "float32"):
        for work, families in WORKS.items():
            missing = [(f"{work}, {dtype}, {one}", one) for one in families if one in wanted]
            missing = [(name, one) for name, one in missing if name not in done and _matters(one, dtype)]
            if missing:
                try:
                    base = base_of(dtype)
                except Absent as absent:
                    print(absent, file=sys.stderr)
                    break
                run = decoded(base, sizes) if work == "decoding" else trained(base, work, sizes)
                run(), run()  # warm up
                for name, family in missing:
                    yield name, measured(run, family, sizes.repeats)
        base_of.cache_clear()
        gc.collect()


def _matters(family: str, dtype: str) -> bool:
    """Whether this machine uses the family in this dtype at all."""
    return family != "onednn" or (dtype == "float32" and _onednn_is_faster())


def main(words: Sequence[str] | None = None) -> None:
    families = (*get_args(Family), ALL)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/kernels.json"))
    parser.add_argument("--repeats", type=int, default=12, help="turns of A and B (12)")
    parser.add_argument("--people", type=int, default=1, help="people in a training step (1)")
    parser.add_argument("--tokens", type=int, default=6, help="decoding steps in a turn (6)")
    parser.add_argument("--only", nargs="+", choices=families, default=families, help="some families")
    args = parser.parse_args(words)
    if why := obstacle():
        raise SystemExit(f"nothing to measure: {why}")
    sizes = Sizes(args.repeats, args.people, args.tokens)
    about = {"machine": f"{processor()}, {cores()} cores", "torch": torch.__version__, "sizes": asdict(sizes)}
    kept = read_json(args.out)
    found: dict[str, Any] = kept["rows"] if isinstance(kept, dict) and kept.get("about") == about else {}
    for name, row in rows(args.only, list(found), sizes):  # rows of an earlier run count, too
        found[name] = row
        write_json(args.out, {"about": about, "rows": found})
        low, high = row["spread"]
        print(
            f"{name:32}  all {1000 * row['on_s']:8.1f} ms  without {1000 * row['off_s']:8.1f} ms  "
            f"x{row['slower_without']:.3f} [{low:.3f}, {high:.3f}]",
            flush=True,
        )


if __name__ == "__main__":
    main()
