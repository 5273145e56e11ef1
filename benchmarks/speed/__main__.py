"""``python -m benchmarks.speed``: measure, print one table, keep everything in one JSON file."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
from rich.console import Console

from benchmarks.speed import record, report
from benchmarks.speed.apart import quiet
from benchmarks.speed.data import Absent
from benchmarks.speed.processor import processor
from benchmarks.speed.settings import MODULES, Settings
from benchmarks.speed.timing import Row
from mta.system.process import keep_freed_memory


def main(words: Sequence[str] | None = None) -> int:
    """Returns 1 if something failed, as a row that is missed does not."""
    args = parsed(words)
    settings = Settings(args.full, args.repeats, args.people, args.memory, args.quick)
    path = args.out / f"bench-{processor().slug}.json"
    if args.markdown or args.json:
        return _print_kept(path, args.markdown)
    quiet()
    records, failed, before = record.kept(path), False, set[str]()
    for module in args.only:
        missing = _without_done(records, settings, args.again)
        names, broken, lacking = set(missing.done), False, False
        for row in _measured(module, missing):
            names.add(row.name)
            if row.skipped and not row.skipped.startswith(record.FAILED):
                lacking = True  # a peer or data that is not here: what was measured with it stays
                if any(one["name"] == row.name and one["rates"] for one in records):
                    before.add(row.name)
                    continue
            records = record.merged(records, record.record(row, module, settings))
            record.write(path, records, _command(args))
            broken |= row.skipped.startswith(record.FAILED)
        if not broken and not lacking:
            records = [one for one in records if one["module"] != module or one["name"] in names]
            record.write(path, records, _command(args))
        before |= {one["name"] for one in records if one["module"] == module} - names if broken or lacking else set()
        failed |= broken
    chosen = [record.row_of(one) for one in records if one["module"] in args.only and one["name"] not in before]
    report.show(chosen, Console(width=None if sys.stdout.isatty() else 180))
    if before:  # perhaps by another machine: a clone brings results
        print(f"Not measured now, and not shown; {path} has earlier results: {', '.join(sorted(before))}")
    return int(failed)


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("--only", type=_modules, default=MODULES, help=f"some of {','.join(MODULES)}")
    parser.add_argument("--full", action="store_true", help="the night's run: more people, steps and sizes")
    parser.add_argument("--quick", action="store_true", help="smallest sizes: whether it runs, not how fast")
    parser.add_argument("--repeats", type=int, help="turns of A and B (2; with --full 5)")
    parser.add_argument("--people", type=int, help="people in a cohort (32; with --quick 3)")
    parser.add_argument("--memory", default="4GiB", help="bound on one cohort")
    parser.add_argument("--again", action="store_true", help="measure also what this very code has measured")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of the JSON file")
    parser.add_argument("--markdown", action="store_true", help="measure nothing, print the kept rows as Markdown")
    parser.add_argument("--json", action="store_true", help="measure nothing, print the kept JSON")
    args = parser.parse_args(words)
    args.repeats = args.repeats or (5 if args.full else 1 if args.quick else 2)
    args.people = args.people or (3 if args.quick else 32)
    return args


def _modules(text: str) -> tuple[str, ...]:
    chosen = tuple(text.split(","))
    if odd := [name for name in chosen if name not in MODULES]:
        raise argparse.ArgumentTypeError(f"{odd[0]!r} is none of {', '.join(MODULES)}")
    return chosen


def _without_done(records: Sequence[dict[str, Any]], settings: Settings, again: bool) -> Settings:
    done = frozenset(one["name"] for one in records if record.current(one, settings))
    return settings if again else dataclasses.replace(settings, done=done)


def _measured(module: str, settings: Settings) -> Iterator[Row]:
    """Rows of one module as they come; what it lacks or breaks on becomes a row."""
    console, start = Console(stderr=True), time.perf_counter()
    with console.status(f"{module} ...") as status:
        try:
            for row in importlib.import_module(f"benchmarks.speed.{module}").rows(settings):
                took = time.perf_counter() - start
                console.print(f"{report.line(row)}  [dim]{took:.0f} s[/]", highlight=False, soft_wrap=True)
                yield row
                start = time.perf_counter()
                status.update(f"{module} ... after {row.name}")
        except Absent as absent:
            yield Row(module, "mta", "", skipped=str(absent))
        except Exception as error:  # a night's run goes on with the other modules
            traceback.print_exc()
            yield Row(module, "mta", "", skipped=f"{record.FAILED}{type(error).__name__}")


def _print_kept(path: Path, as_markdown: bool) -> int:
    records, here = record.kept(path), processor()
    if not records:
        print(f"nothing has been measured yet: {path.name} is not there", file=sys.stderr)
        return 1
    if as_markdown:
        print(report.markdown([record.row_of(one) for one in records], here.name, here.cores), end="")
    else:
        print(path.read_text(encoding="utf-8"), end="")
    return 0


def _command(args: argparse.Namespace) -> str:
    words = ["python -m benchmarks.speed"]
    if tuple(args.only) != MODULES:
        words.append(f"--only {','.join(args.only)}")
    words += [f"--{flag}" for flag in ("full", "quick") if getattr(args, flag)]
    return " ".join([*words, f"--repeats {args.repeats} --people {args.people} --memory {args.memory}"])


if __name__ == "__main__":
    keep_freed_memory()  # as the command line does
    sys.exit(main())
