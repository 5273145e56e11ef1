"""Draw results/gains.svg: what each method gains on each set, with intervals (docs/explanation/results.md).

Run:  python -m benchmarks.gains   (after new results are in results/)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mta.evaluation.reports.figures import COLOURS, INK, LINE, MUTED, Picture
from mta.evaluation.statistics import Interval

RESULTS = Path(__file__).resolve().parents[1] / "results"
SETS = {  # title -> folder below results
    "survey, 250 people": "rivals/survey",
    "headlines, 36 people": "rivals/lamp4_huffpost",
    "news, 31 people": "rivals/lamp2n_huffpost",
    "ratings, 240 people": "rivals/movielens",
    "reviews, 60 people": "gradient/lamp3_amazon",
    "titles, 66 people": "rivals/lamp5_papers",
}
METHODS = {  # name in the figure -> names in the files
    "MTA": ("MTA",),
    "label bias": ("label bias",),
    "rank 1 alone": ("rank 1 alone", "adapt only"),
    "OPPU": ("OPPU",),
    "history in the prompt": ("history in the prompt",),
    "another person's MTA": ("MTA, other person's shots", "merge, other person's shots"),
}
_COLUMN = "NLL against task LoRA"
_CELL = re.compile(r"([+-]\d+\.\d+) \[([+-]\d+\.\d+), ([+-]\d+\.\d+)\]")
Gains = dict[str, Interval]


def gains() -> dict[str, Gains]:
    """Return each set's differences in NLL to the task LoRA, by method."""
    found = {}
    for title, name in SETS.items():
        text = (RESULTS / name / "README.md").read_text(encoding="utf-8")
        seeds = [part for part in text.split("\n## ") if re.search(r" people, \d+ seeds\.", part)]
        rows = _of_tables(text) | _of_tables("\n\n".join(seeds))
        found[title] = {
            method: next(rows[name] for name in names if name in rows)
            for method, names in METHODS.items()
            if not rows.keys().isdisjoint(names)
        }
    return found


def _of_tables(text: str) -> Gains:
    whole = [table for table in tables(text) if table[0][0] == "method" and _COLUMN in table[0]]
    cells = {row[0]: row[table[0].index(_COLUMN)] for table in whole for row in table[2:]}  # the last has most people
    return {name: Interval(*map(float, cell.groups())) for name, one in cells.items() if (cell := _CELL.search(one))}


def tables(text: str) -> list[list[list[str]]]:
    """Return every table of a page: rows of cells without bold, the heading first."""
    found, before = list[list[list[str]]](), ""
    for line in text.splitlines():
        if line.startswith("|"):
            if not before.startswith("|"):
                found.append([])
            found[-1].append([cell.strip().replace("**", "") for cell in line.split("|")[1:-1]])
        before = line
    return found


def picture(found: Mapping[str, Gains]) -> Picture:
    """One batch for each set; the scales differ."""

    def draw(ax: Any) -> None:
        ax.axis("off")
        names = list(METHODS)
        for number, (title, rows) in enumerate(found.items()):
            batch = ax.inset_axes((number / len(found), 0, 0.88 / len(found), 1))
            for place, one in ((names.index(name), one) for name, one in rows.items()):
                colour = COLOURS[0] if one.high < 0 else COLOURS[1] if one.low > 0 else MUTED
                batch.plot([one.low, one.high], [place, place], color=colour, linewidth=1.6)
                batch.plot(one.mean, place, "o", color=colour, markersize=5)
            batch.axvline(0, color=LINE, linewidth=1)
            batch.set_yticks(range(len(names)), names if number == 0 else [""] * len(names))
            batch.set_ylim(len(names) - 0.5, -0.5)
            batch.locator_params(axis="x", nbins=4)
            batch.tick_params(left=False, labelsize=8.5)
            batch.set_title(title, fontsize=9.5, color=INK)
            batch.set_xlabel("NLL against task LoRA", fontsize=8.5)

    said = "; ".join(
        f"{title}: " + ", ".join(f"{name} {one.mean:+.3f}" for name, one in rows.items())
        for title, rows in found.items()
    )
    return Picture(f"Differences in NLL to the task LoRA, left is better. {said}.", draw, (11.0, 2.6))


if __name__ == "__main__":
    print(*picture(gains()).save(RESULTS / "gains"), sep="\n")
