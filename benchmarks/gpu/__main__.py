"""``python -m benchmarks.gpu``: mta against its peers on a GPU, with random models of 135M to 8B parameters.

Rehearse on any machine:  python -m benchmarks.gpu --device cpu --quick
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded
# Read when torch starts to use a GPU: passes of many sizes leave less memory in pieces that no other pass fits into.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch
from rich.console import Console

from benchmarks.gpu.rows import PARTS, gemm_rate, rows
from benchmarks.gpu.shapes import PEOPLE, SHAPES, Shape, needed
from benchmarks.gpu.site import Site, release
from benchmarks.speed import record, report
from benchmarks.speed.apart import quiet
from benchmarks.speed.settings import Settings
from benchmarks.speed.timing import Row
from mta.config import parse_size
from mta.system.atomic import write_json
from mta.system.device import cpu, pick_device
from mta.system.provenance import commit

DTYPE = torch.bfloat16
_LEAST = 2 * 2**30  # memory for passes, below which a shape is left out
_USED = 0.9  # of the free memory: some is lost between allocations, and to libraries beside torch
_ON_CPU = 24 * 2**30  # memory for passes on a device that is not asked


def _why_not(reason: str, start: float, budget: float | None) -> str:
    """Return why a row is not measured, or "": a reason of its shape, or that time is up."""
    return reason or late(start, budget)


def main(words: Sequence[str] | None = None) -> int:
    """Measure the chosen parts of the chosen shapes, write them, and print one table. Returns 1 if a row failed."""
    args, start = parsed(words), time.monotonic()
    device, console = pick_device(args.device), Console(stderr=True)
    quiet()
    logging.basicConfig(format="%(name)s: %(message)s")
    logging.getLogger("mta").setLevel(logging.INFO)  # why the base fails a check, if it does
    shapes = [shape for shape in SHAPES if shape.name in args.shapes]
    free = int(_USED * torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else None
    for line in planned(shapes, free, args.memory, args.quick, args.people):
        console.print(line, highlight=False)
    console.print(f"torch.mm: {gemm_rate(device, DTYPE, args.quick) / 1e12:.1f} Tflop/s in bfloat16", highlight=False)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu()
    path = args.out / f"bench-{slug(name if device.type == 'cuda' else 'cpu', args.quick)}.json"
    found, run, failed = _kept(path), _now(), False
    for shape in shapes:
        site = site_of(shape, device, passes(shape, free, args.memory, args.people), args)
        reason = "" if args.quick else left_out(shape, free, site.memory, args.people)
        release(device)  # the base of the shape before
        for part in dict.fromkeys(("base", *args.only)):
            for row in rows(site, part, partial(_why_not, reason, start, args.budget)):
                row = replace(row, target=None) if args.quick else row  # tiny models have no targets
                console.print(report.line(row), highlight=False, soft_wrap=True)
                keep(found, recorded(row, run, part, site))
                write_json(path, {"device": name, "dtype": "bfloat16", "rows": list(found.values())}, private=False)
                failed |= row.skipped.startswith(record.FAILED)
    report.show([record.row_of(one) for one in found.values()], Console(width=None if sys.stdout.isatty() else 180))
    return int(failed)


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    names = [shape.name for shape in SHAPES]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="auto", help="cuda, cpu, or auto")
    parser.add_argument("--quick", action="store_true", help="tiny models: whether it runs, not how fast")
    parser.add_argument("--only", nargs="+", choices=[*PARTS], default=list(PARTS), help="parts to measure")
    parser.add_argument("--shapes", nargs="+", choices=names, default=names, help="models to measure")
    parser.add_argument("--people", type=int, help=f"people in a cohort ({PEOPLE}; with --quick 3)")
    parser.add_argument("--memory", type=parse_size, help="memory for passes (what the GPU has left; CPU: 24GiB)")
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", help="start no row after so long (default: no limit)"
    )
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of the JSON file")
    args = parser.parse_args(words)
    args.people = args.people or (3 if args.quick else PEOPLE)
    return args


def planned(
    shapes: Sequence[Shape], free: int | None, given: int | None, quick: bool, people: int = PEOPLE
) -> Iterator[str]:
    """Lines that say what each shape needs, and what does not fit, before anything is measured."""
    for shape in shapes:
        memory = passes(shape, free, given, people)
        need = needed(shape, DTYPE, memory, people)
        reason = left_out(shape, free, memory, people)
        said = "a tiny model is measured in its place" if quick else f"left out: {reason}" if reason else "fits"
        yield f"{shape.name}: {shape.parameters / 1e9:.2f} billion weights, about {need / 2**30:.0f} GiB; {said}"


def passes(shape: Shape, free: int | None, given: int | None, people: int = PEOPLE) -> int:
    """Bytes for the passes of a cohort: as given, else what is free beside all that the rows of the shape hold."""
    if given:
        return given
    return _ON_CPU if free is None else max(free - needed(shape, DTYPE, 0, people), _LEAST)


def left_out(shape: Shape, free: int | None, memory: int, people: int = PEOPLE) -> str:
    """Why a shape is not measured with ``free`` bytes, or ""; None stands for a device that is not asked."""
    need = needed(shape, DTYPE, memory, people)
    if free is None or need <= free:
        return ""
    return f"too little memory: about {need / 2**30:.0f} GiB needed, {free / 2**30:.0f} GiB free"


def late(start: float, budget: float | None) -> str:
    """Why no other row is started, or "". ``start`` is the run's, by ``time.monotonic``."""
    return "no time left" if budget is not None and time.monotonic() - start >= budget else ""


def site_of(shape: Shape, device: torch.device, memory: int, args: argparse.Namespace) -> Site:
    """Where the rows of a shape are measured."""
    settings = Settings(repeats=1 if args.quick else 3, people=args.people, quick=args.quick)
    return Site(shape.tiny() if args.quick else shape, device, DTYPE, memory, settings)


def recorded(row: Row, run: str, part: str, site: Site) -> dict[str, Any]:
    """A row with what it was measured with: the file may have rows of several runs. ``run`` is the run's start."""
    return asdict(row) | {
        "verdict": row.verdict,
        "shape": site.shape.name,
        "part": part,
        "memory": site.memory,
        "cohort": site.settings.people,
        "allocations_repeated": _repeated(site.device),
        "versions": record.versions(),
        "commit": commit(Path(__file__).resolve().parent),
        "run": run,
        "date": _now(),
    }


def _repeated(device: torch.device) -> int | None:
    """How often the process found no memory until it gave its unused memory back: such rows are slower."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return int(torch.cuda.memory_stats(device).get("num_alloc_retries", 0))


def keep(found: dict[str, dict[str, Any]], new: dict[str, Any]) -> None:
    """Add a record; drop those of the same part from earlier runs. A row that was not measured replaces none."""
    if new["skipped"] and not new["skipped"].startswith(record.FAILED):
        found.setdefault(new["name"], new)
        return
    for name, old in list(found.items()):
        if old["run"] != new["run"] and (old["shape"], old["part"]) == (new["shape"], new["part"]):
            del found[name]
    found[new["name"]] = new


def slug(device: str, quick: bool) -> str:
    """The device's name as part of a file's name. Rows of tiny models have a file of their own."""
    return re.sub(r"[^a-z0-9]+", "-", f"{device} rehearsal".lower() if quick else device.lower()).strip("-")


def _kept(path: Path) -> dict[str, dict[str, Any]]:
    """Rows of earlier runs on this device: parts may be measured one after the other."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return {row["name"]: row for row in rows if row["run"] and row["shape"] and row["part"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


if __name__ == "__main__":
    sys.exit(main())
