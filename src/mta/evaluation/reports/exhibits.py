"""The paper's exhibits and ours, drawn from result files alone: a Markdown section and a picture each."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from mta.evaluation.experiments.results import Results
from mta.evaluation.metrics import BETTER_LOW
from mta.evaluation.reports import plots
from mta.evaluation.reports.figures import human_bytes, human_seconds
from mta.evaluation.reports.plots import Line
from mta.evaluation.reports.summary import people_in, units_in, yardstick
from mta.evaluation.reports.tables import POOLED, RIVAL, against, markdown, marked, rows_of
from mta.evaluation.statistics import Comparison, Interval

FITTED = [10 ** (n / 4) for n in range(25)]  # people at which the lines of Figure 2 are drawn, to a million
SECONDS = (1, 60, 600, 3600, 36_000, 360_000, 3_600_000, 36_000_000)  # and the seconds that are marked
BYTES = tuple(10**n for n in range(3, 16, 2))


@dataclass(slots=True)
class Section:
    """What is said of one exhibit: a title, Markdown, and the names of its pictures (without an ending)."""

    title: str
    text: str
    pictures: list[str] = field(default_factory=list)


def sections(found: Results, folder: Path) -> list[Section]:
    """Every exhibit that has been run, its pictures drawn into ``folder``."""
    made = []
    for name in [name for name in found.recipe.exhibits if name in found.meta["exhibits"]]:
        draw = EXHIBITS.get(name, _compared)
        if section := draw(found, folder, name):
            made.append(section)
    return made


def _compared(found: Results, folder: Path, name: str) -> Section | None:
    """Any list of methods: the table, and everybody's difference to the pooled model."""
    comparison = found.comparison(name)
    if comparison is None or len(comparison.rows) < 2:
        return None
    text = _setting(found, comparison, name) + "\n" + markdown(*rows_of(comparison))
    names, measure = [row.name for row in comparison.rows], yardstick(comparison)
    rows = [(n, d) for n in names if n != POOLED and (d := against(comparison, n, measure))]
    pictures = []
    if rows:
        plots.forest(folder / name, rows, f"{measure} against {POOLED} (95% intervals; left is better)")
        pictures.append(name)
    metric = comparison.primary
    points = [(r.name, r.bytes_per_person, s) for r in comparison.rows if (s := comparison.score(r.name, metric))]
    if name == "main" and points:
        plots.scatter(folder / "bytes", points, f"{metric}, {'lower' if metric in BETTER_LOW else 'higher'} is better")
        pictures.append("bytes")
    return Section(_TITLES.get(name, name), text, pictures)


def _shots(found: Results, folder: Path, name: str) -> Section | None:
    """Score against the number of shots: everybody against the pooled model on the same questions."""
    many = {m: c for part in found.exhibit(name) for m in part.shots if (c := found.comparison(name, m))}
    if not many:
        return None
    measure = yardstick(next(iter(many.values())))
    methods = [row.name for row in next(iter(many.values())).rows if row.name != POOLED]
    series = []
    for method in methods:
        points = [(m, d) for m, c in many.items() if (d := against(c, method, measure))]
        series.append(Line(method, [m for m, _ in points], [d for _, d in points]))
    plots.lines(folder / name, series, "shots", f"{measure} against {POOLED}", log=True, level={POOLED: 0.0})
    heads = ["method", *(f"{m} shots ({people_in(c)} people)" for m, c in many.items())]
    rows = [[method, *(marked(c, measure, against(c, method, measure)) for c in many.values())] for method in methods]
    text = f"{measure} against the {POOLED}, the same last {found.recipe.queries} items as questions throughout.\n\n"
    return Section(_TITLES[name], text + markdown(heads, rows), [name])


def _seeds(found: Results, folder: Path, name: str) -> Section | None:
    """How much of a difference is the draw of clusters and training: seed by seed, and all of them together."""
    together, seeds = found.comparison(name), found.seeds(name)
    if together is None or len(seeds) < 2:
        return None
    alone = [c for seed in seeds if (c := found.comparison(name, seed=seed))]
    measure, text = yardstick(together), _setting(found, together, name)
    names = [row.name for row in together.rows]
    for other in [one for one in (POOLED, RIVAL) if one in names]:
        one = (f"seed {seed} ({people_in(c)} people)" for seed, c in zip(seeds, alone))
        heads = [f"{measure} against {other}", *one, f"all, averaged for each person ({people_in(together)} people)"]
        rows = [
            [one, *(marked(c, measure, c.difference(one, other, measure)) for c in (*alone, together))]
            for one in names
            if one != other
        ]
        text += "\n" + markdown(heads, rows)
    differences = [(one, d) for one in names if one != POOLED and (d := against(together, one, measure))]
    plots.forest(folder / name, differences, f"{measure} against {POOLED}, {len(seeds)} seeds (left is better)")
    return Section(_TITLES[name], text, [name])


def _over(pattern: str, x_label: str) -> Callable[[Results, Path, str], Section | None]:
    """An exhibit whose methods are called by a series and a number: ``by loss, K = 4``."""

    def draw(found: Results, folder: Path, name: str) -> Section | None:
        section = _compared(found, folder, name)
        comparison = found.comparison(name)
        if section is None or comparison is None:
            return None
        measure, series = yardstick(comparison), dict[str, list[tuple[float, Interval]]]()
        level = {POOLED: 0.0}
        for row in comparison.rows:
            number, difference = re.search(pattern, row.name), against(comparison, row.name, measure)
            if number and difference:
                series.setdefault(row.name[: number.start()].strip(" ,"), []).append((float(number[1]), difference))
            elif difference and row.name != POOLED:
                level[row.name] = difference.mean
        drawn = [Line(label, [x for x, _ in points], [d for _, d in points]) for label, points in series.items()]
        if drawn:
            plots.lines(folder / name, drawn, x_label, f"{measure} against {POOLED}", level=level)
        return section

    return draw


def _efficiency(found: Results, folder: Path, name: str) -> Section | None:
    """Figure 2: total training time and stored bytes against people, measured and then continued as a line."""
    methods = [method for part in found.exhibit(name) for method in part.methods]
    if not found.facts:
        return None
    bank = next(iter(found.facts.values()))
    fixed = sum(bank["seconds"].values())
    seconds, stored, rows = {}, {}, []
    for method in methods:
        records = sorted((r for r in found.of(method) if r.seed == found.recipe.seeds[0]), key=lambda r: r.person)
        if not records:
            continue
        start = 0.0 if method.name == RIVAL else fixed
        sums = [start]
        for record in records:
            sums.append(sums[-1] + record.seconds)
        each, kept = (sums[-1] - start) / len(records), sum(r.bytes for r in records) / len(records)
        base = 0.0 if method.name == RIVAL else float(bank["bytes"])
        measured = [n for n in (1, 4, 16, 64, 128, 256) if n <= len(records)]
        seconds[method.name] = ([(n, sums[n]) for n in measured], [(n, start + n * each) for n in FITTED])
        stored[method.name] = ([(n, base + n * kept) for n in measured], [(n, base + n * kept) for n in FITTED])
        million = start + 1e6 * each
        cost = [human_seconds(start), f"{each:.2f}", human_seconds(sums[-1]), f"{million / 3600:,.0f} h"]
        size = [human_bytes(base), human_bytes(kept), human_bytes(base + 1e6 * kept)]
        rows.append([method.name, str(len(records)), *cost, *size])
    if not rows:
        return None
    plots.growth(folder / f"{name}-time", seconds, "training, all people", human_seconds, SECONDS)
    plots.growth(folder / f"{name}-bytes", stored, "stored, all people", human_bytes, BYTES)
    heads = ["method", "people measured", "bank", "s per person", "all", "a million (fitted)"]
    heads += ["bank kept", "kept each", "a million (fitted)"]
    text = "Dots are measured; dashes continue the line through them to a million people, which nobody has run.\n\n"
    return Section(_TITLES[name], text + markdown(heads, rows), [f"{name}-time", f"{name}-bytes"])


def _banks(found: Results, folder: Path, name: str) -> Section | None:
    """What each bank does for others, and what cheaper merges lose."""
    if not found.facts:
        return None
    rows = []
    for bank, facts in found.facts.items():
        errors = [f"{one[kind]:.3f}" for one in facts["fidelity"].values() for kind in ("svd", "factor")]
        others = facts["others"]
        rows.append([bank, str(facts["anchors"]), f"{others['mean']:+.3f}", f"{others['best']:+.3f}", *errors])
    kinds = [f"{merge}, {kind}" for merge in next(iter(found.facts.values()))["fidelity"] for kind in ("svd", "factor")]
    heads = ["bank", "anchors", "mean anchor", "best anchor", *kinds]
    text = (
        f"Nats per target token against the {POOLED} on shots of people who are not in the bank: of an anchor "
        "taken at random, and of the best one in hindsight. Then the relative error of merges, cut by svd to the "
        "bank's rank, or with factors averaged apart.\n\n"
    )
    return Section(_TITLES[name], text + markdown(heads, rows))


def _case(found: Results, folder: Path, name: str) -> Section | None:
    """Figure 5: one person's question from shots to answers."""
    case = found.case
    if not case:
        return None
    pictures = []
    shots = "".join(f"- {_line(shot)}\n" for shot in case["shots"])
    why = [
        [str(a["anchor"]), str(a["items"]), f"{a['cosine']:.2f}", f"{a['gain']:+.2f}", f"{a['w']:+.3f}"]
        for a in case["anchors"][:6]
    ]
    answers = [
        [method, _line(a["text"]), "" if a["nll"] is None else f"{a['nll']:.3f}"]
        for method, a in case["answers"].items()
    ]
    if all(a["labels"] for a in case["answers"].values()):
        groups = {method: a["labels"] for method, a in case["answers"].items()}
        plots.bars(folder / name, groups, "answer", "probability", case["gold"])
        pictures.append(name)
    asked = f"Their shots:\n\n{shots}\nThe question: {_line(case['query'])}\n\n" if shots else _UNTOLD
    gold = f"The true answer: {_line(case['gold'])}\n\n" if case["gold"] else ""
    text = (
        asked
        + gold
        + markdown(["method", "answer", "NLL of the true one"], answers)
        + "\nWhy this merge: the strongest anchors, how near they are by content, and how much likelier the shots are "
        "under them than under the pooled model (nats).\n\n"
        + markdown(["anchor", "items", "cosine", "gain on the shots", "coefficient"], why)
    )
    return Section(_TITLES[name], text, pictures)


def _setting(found: Results, comparison: Comparison, name: str) -> str:
    seeds = found.seeds(name)
    said = f"{len(seeds)} seeds" if len(seeds) > 1 else f"seed {seeds[0]}" if seeds else "no bank"
    people, independent = people_in(comparison), units_in(comparison)
    groups = f" in {independent} groups that share no items" if independent < people else ""
    return (
        f"{found.name}: {people} people{groups}, their last {found.recipe.queries} items as questions, the "
        f"{found.recipe.shots} before them as shots, {said}. Means over people, 95% intervals by bootstrap over "
        f"{'groups' if groups else 'them'}, differences paired. "
        "Worse off: NLL more than .02 above the pooled model's.\n"
    )


def _line(text: str) -> str:
    """A text that cannot break a table or begin a list."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|").strip()


_UNTOLD = "The first of the people who are tested; their shots and the question are not published.\n\n"
_TITLES = {
    "main": "Every method",
    "ablation": "Ablation",
    "shots": "Score against shots",
    "seeds": "Seeds: clusters and training drawn anew",
    "k": "Figure 4: number of merged anchors",
    "alpha": "Figure 3: fixed coefficients against fitted ones",
    "anchors": "Size of the bank",
    "efficiency": "Figure 2: time and storage against people",
    "banks": "What a bank is good for, and what merges lose",
    "case": "Figure 5: one person's question",
    "tune": "Settings, tried on development people",
    "bank-study": "What makes a bank useful to others",
}
EXHIBITS: dict[str, Callable[[Results, Path, str], Section | None]] = {
    "shots": _shots,
    "seeds": _seeds,
    "k": _over(r"K = (\d+)", "merged anchors K"),
    "alpha": _over(r"alpha = ([\d.]+)", "share of the nearest anchor"),
    "anchors": _over(r"N = (\d+)", "anchors in the bank"),
    "efficiency": _efficiency,
    "banks": _banks,
    "case": _case,
}
