"""How time and memory grow: with people, anchors, the length of prompts. Every point is a process of its own."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.speed.data import SHOTS
from benchmarks.speed.processor import best_dtype
from benchmarks.speed.settings import Settings
from benchmarks.speed.timing import Row, slope
from mta.config import parse_size

_ROOT = Path(__file__).resolve().parents[2]
_GIB = 2**30
_MINUTE = 60
_MOST = 1.05  # times the time per person of few people that one of many may take


@dataclass(frozen=True, slots=True)
class Curve:
    """What grows (``kind`` as ``point`` knows it), at which points, for how many ``people``, and what it is called."""

    name: str
    kind: str
    x: Sequence[int]
    people: int
    note: str
    label: str
    time: str = "seconds"
    memory: str = "GiB above base and bank"


def curves(settings: Settings) -> list[Curve]:
    """The curves of a run beside that of people: coarser where it is short."""
    quick, full = settings.quick, settings.full
    anchors = (2, 4) if quick else (8, 16, 32, 64, 128, 256) if full else (8, 64, 256)
    lengths = (64, 128) if quick else (64, 128, 256, 512, 1024) if full else (64, 256, 1024)
    few, some = (4, 4) if full else (1, 2)
    evidence = f"posterior evidence, {SHOTS} short prompts a person, people: {few}"
    alone = f"stage 3, {SHOTS} prompts a person that share nothing, people: {some}; memory {settings.memory}"
    return [
        Curve("growth with anchors", "anchors", anchors, few, evidence, "anchors", memory="GiB above the base"),
        Curve("growth with prompts", "tokens", lengths, some, alone, "tokens a prompt"),
    ]


def rows(settings: Settings) -> Iterator[Row]:
    """People first, then the other curves."""
    yield from with_people(settings)
    for curve in curves(settings):
        if settings.wanted(curve.name):
            points = {x: measure(curve.kind, [x], settings, curve.people) for x in curve.x}
            yield curve_row(curve, points)


def with_people(settings: Settings) -> Iterator[Row]:
    """The curve, the time of many against that of few in turn, and the memory of many: all from the same processes."""
    few, many = (2, 4) if settings.quick else (16, 256)
    names = ["growth with people", f"{many} people against {few}", f"memory of {many} people"]
    if not any(map(settings.wanted, names)):
        return
    below = [x for x in (1, 4, 16, 64) if x < many]
    points = {x: measure("people", [x], settings) for x in below}
    turned = measure("in-turn", [few, many, settings.repeats if settings.full else 1], settings)
    points[many] = turned | {"seconds": statistics.median(turned["many"])}
    note = f"stage 3, {SHOTS} short prompts a person, one step, memory {settings.memory}"
    yield curve_row(Curve(names[0], "people", [*below, many], 1, note, "people", "seconds per person"), points)
    fews = [(a + b) / 2 for a, b in zip(turned["few"], turned["few"][1:])]  # before and after
    yield Row(
        names[1],
        f"mta, {many} people",
        f"mta, {few} people, before and after",
        "people/min",
        tuple(_MINUTE * many / seconds for seconds in turned["many"]),
        tuple(_MINUTE * few / seconds for seconds in fews),
        round(1 / _MOST, 3),
        note=f"{note}; the target is {_MOST}x the time per person",
    )
    used = turned["peak"] - turned["before"]
    yield Row(
        names[2],
        f"--memory {settings.memory}",
        f"{many} people, peak above base and bank",
        "GiB",
        (parse_size(settings.memory) / _GIB,),
        (used / _GIB,),
        1.0,
        note=f"resident at the peak, all counted: {turned['peak'] / _GIB:.2f} GiB",
    )


def curve_row(curve: Curve, points: dict[int, dict[str, Any]]) -> Row:
    """One curve with the slopes of its time and memory, which are exponents of x."""
    xs = list(curve.x)
    times = [points[x]["seconds"] / (x if curve.kind == "people" else 1) for x in xs]
    peaks = [points[x]["peak"] / _GIB for x in xs]
    above = [(points[x]["peak"] - points[x]["before"]) / _GIB for x in xs]
    series = {curve.time: times, curve.memory: above}
    return Row(
        curve.name,
        f"mta {best_dtype()}",
        "",
        note=curve.note,
        more={
            "curve": curve.kind,
            "x": xs,
            "x_label": curve.label,
            "y_label": f"{curve.time}; GiB at the peak",
            "series": series,
            "slopes": {label: slope(xs, values) for label, values in series.items()},
            "peak_gib": peaks,
        },
    )


def measure(kind: str, x: Sequence[int], settings: Settings, people: int = 2) -> dict[str, Any]:
    """One point, by a process of its own. Raises CalledProcessError with what it said."""
    words = [kind, *map(str, x), "--dtype", best_dtype(), "--memory", settings.memory, "--people", str(people)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.speed.point", *words],
        cwd=_ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    return dict(found)
