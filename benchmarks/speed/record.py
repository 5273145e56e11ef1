"""Rows as JSON: what was measured, on which processor, by which versions; kept until the code changes."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.speed.processor import processor
from benchmarks.speed.settings import MODULES, Settings
from benchmarks.speed.timing import Row
from mta.system.atomic import write_json
from mta.system.provenance import commit, version_of

_ROOT = Path(__file__).resolve().parents[2]
_SHOWS = ("__main__", "report", "record")  # what only shows rows does not make them old
FAILED = "failed: "  # how a row begins its reason when it was meant to be measured


def kept(path: Path) -> list[dict[str, Any]]:
    """Records of an earlier run, without rows that are no longer measured; none if the file is missing or not ours."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["rows"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [one for one in found if one["module"] in MODULES]


def record(row: Row, module: str, settings: Settings) -> dict[str, Any]:
    """A row with all raw rates and where it comes from."""
    values: dict[str, Any] = {"module": module, **asdict(row), "verdict": row.verdict}
    if row.rates:
        values |= {"ratio": row.ratio, "spread": row.spread}
    now = _now().isoformat(timespec="seconds")
    return values | {
        "settings": settings.as_dict(),
        "code": code(module),
        "commit": commit(_ROOT / "benchmarks"),
        "date": now,
    }


def row_of(values: Mapping[str, Any]) -> Row:
    """The row that a record was made of."""
    values = {name: values[name] for name in Row.__dataclass_fields__}
    return Row(**{**values, "rates": tuple(values["rates"]), "peer_rates": tuple(values["peer_rates"])})


def current(values: Mapping[str, Any], settings: Settings) -> bool:
    """Whether a record was measured within a day by this very code with the same settings, and did not fail.

    An older one may come from a clone's own results, measured on another machine.
    """
    age = _now() - datetime.datetime.fromisoformat(values["date"])
    return (
        age < datetime.timedelta(days=1)
        and values.get("code") == code(values["module"])
        and values.get("settings") == settings.as_dict()
        and not str(values.get("skipped", "")).startswith(FAILED)
    )


def merged(records: Sequence[dict[str, Any]], new: dict[str, Any]) -> list[dict[str, Any]]:
    """The records with ``new`` in the place of the one of its name, modules in the order of the table."""
    same = (new["module"], new["name"])
    places = [n for n, one in enumerate(records) if (one["module"], one["name"]) == same]
    all_of_them = [new if n in places else one for n, one in enumerate(records)] if places else [*records, new]
    return sorted(all_of_them, key=lambda one: MODULES.index(one["module"]))


def write(path: Path, records: Sequence[dict[str, Any]], command: str) -> None:
    """The whole file, written to a temporary file and renamed. No path of this machine and no name of it is in it."""
    here = processor()
    write_json(
        path,
        {
            "processor": here.name,
            "cores": here.cores,
            "instructions": list(here.flags),
            "versions": versions(),
            "commit": commit(_ROOT / "benchmarks"),
            "date": _now().isoformat(timespec="seconds"),
            "command": command,
            "rows": list(records),
        },
    )


@cache
def versions() -> dict[str, str]:
    """Of what computes."""
    return {
        name: version_of(name) or "unknown"
        for name in ("torch", "transformers", "peft", "bitsandbytes", "merge-then-adapt")
    }


@cache
def code(module: str) -> str:
    """A digest of the library's sources and the benchmark's that ``module`` may use: rows of others are old."""
    apart = {*_SHOWS, *MODULES} - ({"adaptation", module} if module in ("limit", "multi_lora") else {module})
    digest = hashlib.sha256(json.dumps(versions(), sort_keys=True).encode())
    for folder in (_ROOT / "src" / "mta", _ROOT / "benchmarks" / "speed"):
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".py", ".cpp", ".yaml") and not (folder.name == "speed" and path.stem in apart):
                digest.update(path.relative_to(_ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
