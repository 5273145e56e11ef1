"""``python -m benchmarks.gpu``: mta against its peers on a GPU, with random models of 135M to 8B parameters.

Rehearse on any machine:  python -m benchmarks.gpu --device cpu --quick
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded

import torch
from rich.console import Console

from benchmarks.gpu.rows import PARTS, Site, gemm_rate, rows
from benchmarks.gpu.shapes import SHAPES, Shape, needed
from benchmarks.speed import record, report
from benchmarks.speed.apart import quiet
from benchmarks.speed.settings import Settings
from benchmarks.speed.timing import Row
from mta.config import parse_size
from mta.system.atomic import write_json
from mta.system.device import pick_device, processor
from mta.system.provenance import commit

DTYPE = torch.bfloat16


def main(words: Sequence[str] | None = None) -> int:
    """Measure the chosen parts of the chosen shapes, write them, and print one table. Returns 1 if a row failed."""
    args = parsed(words)
    device, console = pick_device(args.device), Console(stderr=True)
    quiet()
    shapes = [shape for shape in SHAPES if shape.name in args.shapes]
    free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else None
    for line in planned(shapes, free, args.memory, args.quick):
        console.print(line, highlight=False)
    console.print(f"torch.mm: {gemm_rate(device, DTYPE, args.quick) / 1e12:.1f} Tflop/s in bfloat16", highlight=False)
    path, failed = args.out / f"bench-{slug(device)}.json", False
    found = _kept(path)
    for shape in shapes:
        if free is not None and needed(shape, DTYPE, args.memory) > free:
            continue
        for row in measured(shape, device, args):
            console.print(report.line(row), highlight=False, soft_wrap=True)
            found[row.name] = asdict(row) | {"verdict": row.verdict}
            _write(path, device, found)
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
    parser.add_argument("--people", type=int, help="people in a cohort (32; with --quick 3)")
    parser.add_argument("--memory", type=parse_size, default="24GiB", help="memory for the passes of a cohort")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of the JSON file")
    args = parser.parse_args(words)
    args.people = args.people or (3 if args.quick else 32)
    return args


def planned(shapes: Sequence[Shape], free: int | None, memory: int, quick: bool) -> Iterator[str]:
    """Lines that say what each shape needs, and what does not fit, before anything is measured."""
    for shape in shapes:
        need = needed(shape, DTYPE, memory)
        fits = free is None or need <= free
        said = "a tiny model is measured in its place" if quick else "fits" if fits else "left out: too little memory"
        here = "" if free is None else f" of {free / 2**30:.0f} GiB free"
        yield f"{shape.name}: {shape.parameters / 1e9:.2f} billion weights, about {need / 2**30:.0f} GiB{here}; {said}"


def measured(shape: Shape, device: torch.device, args: argparse.Namespace) -> Iterator[Row]:
    """The rows of one shape."""
    settings = Settings(repeats=1 if args.quick else 3, people=args.people, quick=args.quick)
    shown = shape.tiny() if args.quick else shape
    site = Site(shown, device, DTYPE, args.memory, settings)
    for part in args.only:
        for row in rows(site, part):
            yield replace(row, target=None) if args.quick else row  # tiny models have no targets


def slug(device: torch.device) -> str:
    """The device's name as part of a file's name."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu-rehearsal"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _kept(path: Path) -> dict[str, dict[str, Any]]:
    """Rows of an earlier run on this device: parts may be measured one after the other."""
    try:
        return {row["name"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _write(path: Path, device: torch.device, found: dict[str, dict[str, Any]]) -> None:
    about = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "dtype": "bfloat16",
        "versions": record.versions(),
        "commit": commit(Path(__file__).resolve().parent),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "rows": list(found.values()),
    }
    write_json(path, about, private=False)


if __name__ == "__main__":
    sys.exit(main())
