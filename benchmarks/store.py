"""How fast a store is with many people, and what a person of SmolLM2 takes, against a LoRA of rank 8.

python -m benchmarks.store --states 100000 --real 2000 --folder /some/disk
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from mta.lora.batch import Factors, LoraBatch
from mta.lora.peft import write_peft
from mta.personalize.forgetting import forget_person
from mta.store import Store
from mta.store.maintenance import check, collect
from mta.store.state import State
from mta.system.device import processor
from mta.system.process import cores
from mta.system.provenance import commit

TINY = {f"layers.{n}.{name}": (16, 16) for n in range(2) for name in ("q", "v")}
SMOL = {"q": (576, 576), "k": (576, 192), "v": (576, 192), "o": (576, 576)}
SMOL |= {"gate": (576, 1536), "up": (576, 1536), "down": (1536, 576)}
REAL = {f"model.layers.{n}.{name}_proj": size for n in range(30) for name, size in SMOL.items()}


def adapter(sizes: dict[str, tuple[int, int]], rank: int, dtype: torch.dtype = torch.float32) -> LoraBatch:
    """Random factors."""
    draw = torch.Generator().manual_seed(0)
    return LoraBatch(
        {
            name: Factors(*(torch.randn(1, *shape, generator=draw).to(dtype) for shape in ((rank, d), (o, rank))))
            for name, (d, o) in sizes.items()
        }
    )


def state(work: int, stack: LoraBatch) -> State:
    """Somebody's, of one version for each ``work``."""
    w = tuple(0.1234567 * n for n in range(16))
    return State("b" * 64, tuple(range(16)), w, "learned", "h" * 64, f"{work:064x}", 0, stack)


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def rates(folder: Path, count: int) -> dict[str, float]:
    """States a second, of a tiny model: written, read, listed, checked, removed."""
    store, stack = Store(folder), adapter(TINY, 1)
    ids = [f"person {n}" for n in range(count)]
    values = {"put": timed(lambda: [store.save(id, state(0, stack)) for id in ids])}
    values["get"] = timed(lambda: [store.load(id) for id in ids])
    values["list"] = timed(store.files.find)
    values["check"] = timed(lambda: check(store))
    some = ids[: max(count // 10, 1)]
    for id in some:
        store.save(id, state(1, stack))
    seconds = timed(lambda: collect(store, keep=1))
    found = {name: round(count / each) for name, each in values.items()}
    told_gc = {"gc, files removed": round(len(some) / seconds), "gc, listing and removing, s": round(seconds, 1)}
    forgotten = timed(lambda: [forget_person(id, store) for id in some])
    return found | told_gc | {"forget": round(len(some) / forgotten), "bytes each": store.nbytes(ids[-1])}


def bytes_of(folder: Path, count: int) -> dict[str, float]:
    """Bytes a person of SmolLM2 with a stack of rank 1, in both types, and of a PEFT folder of rank 8."""
    values = {}
    for dtype in (torch.float32, torch.bfloat16):
        store, stack, name = Store(folder / str(dtype)), adapter(REAL, 1, dtype), str(dtype).removeprefix("torch.")
        seconds = timed(lambda: [store.save(f"{n}", state(0, stack)) for n in range(count)])  # noqa: B023
        values[f"{name}: bytes a person"] = sum(store.files.find().values()) / count
        values[f"{name}: put/s"] = round(count / seconds)
    write_peft(folder / "oppu", adapter(REAL, 8), "smollm2-135m-instruct")
    return values | {"OPPU, rank 8: bytes a person": sum(f.stat().st_size for f in (folder / "oppu").iterdir())}


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--states", type=int, default=100_000)
    words.add_argument("--real", type=int, default=2000)
    words.add_argument("--folder", type=Path, help="where they are written; default: a temporary folder")
    args = words.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        values: dict[str, object] = {"machine": f"{processor()}, {cores()} cores", "commit": commit()}
        values[f"{args.states} states of a tiny model, a second"] = rates(Path(folder) / "tiny", args.states)
        values[f"{args.real} states of SmolLM2"] = bytes_of(Path(folder), args.real)
    print(json.dumps(values, indent=1))


if __name__ == "__main__":
    main()
