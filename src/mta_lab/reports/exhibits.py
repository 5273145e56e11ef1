"""The paper's exhibits and ours, from result files alone: a section with Markdown and pictures for each exhibit."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import accumulate
from statistics import fmean

from mta.bank.calibration.info import LABEL_BIAS, CalibrationInfo
from mta.bank.card import gains_table, in_words
from mta.config import MergeSettings
from mta.config.constants import NOTICEABLE
from mta.evaluation.methods import Method, OneLora
from mta.evaluation.reports.figures import Picture
from mta.evaluation.reports.html import Section, plain
from mta.evaluation.reports.summary import FEW, OURS, POOLED, RIVAL
from mta.evaluation.reports.tables import markdown, marked, rows_of
from mta.evaluation.statistics import Comparison, Interval
from mta.system.units import human_bytes, human_seconds
from mta_lab.experiments.recipe import MAIN_BANK, bank_name
from mta_lab.experiments.results import Results
from mta_lab.reports import figures

Drawn = tuple[str, dict[str, Picture]]
"""Markdown and pictures of an exhibit."""
Exhibit = Callable[[Results, str], Drawn | None]
"""Function of the results and the exhibit's name; None if there are not enough results."""


def sections(results: Results) -> list[Section]:
    """Return every exhibit that has been run."""
    names = [name for name in results.recipe.exhibits if name in results.meta["exhibits"]]
    titled = {name: EXHIBITS.get(name, (name, _compared)) for name in names}
    drawn = [(title, draw(results, name)) for name, (title, draw) in titled.items()]
    expected = _expected(results)
    return [Section(title, *made) for title, made in drawn if made] + ([expected] if drawn and expected else [])


def _expected(results: Results) -> Section | None:
    """Return what the cards of the main banks say of gains, to compare with the gains that were measured."""
    calibrations = {name: facts["calibration"] for name, facts in results.facts.items() if facts.get("calibration")}
    texts = list[str]()
    for name, values in calibrations.items():
        known = CalibrationInfo.model_validate(values)  # an earlier one promised a gain without shots, too
        known = known.model_copy(update={"gains": tuple(gain for gain in known.gains if gain.shots)})
        texts.append(f"**{name}**. {in_words(known)}{gains_table(known)}")
    return Section("What the banks' cards expect", "\n".join(texts), {}) if texts else None


def _compared(results: Results, name: str) -> Drawn | None:
    """Any list of methods: the table, and the difference of each method to the pooled model."""
    comparison = results.comparison(name)
    if comparison is None or len(comparison.rows) < 2:
        return None
    text = _setting(results, comparison, name) + "\n" + markdown(*rows_of(comparison))
    measure, pictures = comparison.yardstick, dict[str, Picture]()
    if rows := _to_pooled(comparison, measure):
        pictures[name] = figures.forest(rows, f"{measure} against {POOLED} (95% intervals; left is better)")
    return text, pictures


def _against(results: Results, name: str) -> Drawn | None:
    """The table of any list of methods, and MTA's difference to each of them."""
    drawn, comparison = _compared(results, name), results.comparison(name)
    if drawn is None or comparison is None or OURS not in comparison.names:
        return drawn
    others = [row for row in comparison.names if row not in (OURS, POOLED)]
    rows = [[plain(other), marked(comparison, comparison.yardstick, OURS, other)] for other in others]
    head = [f"{OURS} against", comparison.yardstick]
    return f"{drawn[0]}\n{markdown(head, [row for row in rows if row[1]])}", drawn[1]


def _to_pooled(comparison: Comparison, measure: str) -> list[tuple[str, Interval]]:
    """Each other method with its difference to the pooled model."""
    names = comparison.names
    return [(name, difference) for name in names if (difference := comparison.difference(name, POOLED, measure))]


def _shots(results: Results, name: str) -> Drawn | None:
    """Score against the number of shots: differences to the pooled model on the same questions."""
    numbers = [m for part in results.recipe.exhibits[name] for m in part.shots if results.comparison(name, m)]
    ran = [set(results.seeds(name, m)) for m in numbers]
    seeds = set.intersection(*ran) if ran else set()  # numbers of different seeds could not be compared
    many = {m: c for m in numbers if (c := results.comparison(name, m, seeds))}
    if not many:
        return None
    first = next(iter(many.values()))
    measure, methods = first.yardstick, [method for method in first.names if method != POOLED]
    series = {
        method: {float(m): d for m, c in many.items() if (d := c.difference(method, POOLED, measure))}
        for method in methods
    }
    picture = figures.lines(series, "shots", f"{measure} against {POOLED}", log=True, level={POOLED: 0.0})
    heads = ["method", *(f"{m} shot{'s' * (m > 1)} ({c.people} people)" for m, c in many.items())]
    rows = [[method, *(marked(c, measure, method) for c in many.values())] for method in methods]
    same = (
        f" The questions are always the same last {results.recipe.queries} items."
        if results.recipe.ask == "last"
        else ""
    )
    only = (
        f", seed{'s' * (len(seeds) > 1)} {', '.join(map(str, sorted(seeds)))}"
        if any(one != seeds for one in ran)
        else ""
    )
    text = f"{measure} against the {POOLED}{only}.{same}\n\n"
    return text + markdown(heads, rows), {name: picture}


def _seeds(results: Results, name: str) -> Drawn | None:
    """The main methods; then differences per seed: how much depends on the clusters and the training order."""
    drawn, together, seeds = _against(results, name), results.comparison(name), results.seeds(name)
    if drawn is None or together is None or len(seeds) < 2:
        return drawn
    columns = {f"seed {seed}": c for seed in seeds if (c := results.comparison(name, seeds=[seed]))}
    columns["all"] = together
    measure, names, text = together.yardstick, together.names, drawn[0]
    for other in [one for one in (POOLED, LABEL_BIAS, RIVAL) if one in names]:
        heads = [f"{measure} against {other}", *(f"{head} ({c.people} people)" for head, c in columns.items())]
        rows = [[one, *(marked(c, measure, one, other) for c in columns.values())] for one in names if one != other]
        text += "\n" + markdown(heads, rows)
    return text, drawn[1]


def _over(pattern: str, x_label: str) -> Exhibit:
    """An exhibit with methods named by a series and a number: ``by loss, K = 4``."""

    def draw(results: Results, name: str) -> Drawn | None:
        compared, comparison = _compared(results, name), results.comparison(name)
        if compared is None or comparison is None:
            return None
        measure, series, level = comparison.yardstick, dict[str, dict[float, Interval]](), {POOLED: 0.0}
        for method, difference in _to_pooled(comparison, measure):
            if number := re.search(pattern, method):
                series.setdefault(method[: number.start()].strip(" ,"), {})[float(number[1])] = difference
            else:
                level[method] = difference.mean
        if not series:
            return compared
        picture = figures.lines(series, x_label, f"{measure} against {POOLED}", level=level)
        return compared[0], compared[1] | {name: picture}

    return draw


def _efficiency(results: Results, name: str) -> Drawn | None:
    """Figure 2: total training time and stored bytes against people, measured, and fitted up to a million."""
    bank = results.facts.get(bank_name(MAIN_BANK, results.recipe.seeds[0]))
    if not bank:
        return None
    seconds, stored, rows = dict[str, figures.Measured](), dict[str, figures.Measured](), []
    for method in [method for part in results.recipe.exhibits[name] for method in part.methods]:
        records = sorted(results.of(method, results.recipe.seeds[0]), key=lambda r: r.person)
        if not records:
            continue
        kept, pooled = fmean(record.bytes for record in records), results.recipe.run.task_lora
        if isinstance(method, OneLora):  # which needs nothing of the bank but the task LoRA
            start = bank["seconds"].get("task LoRA", 0.0)
            base = kept * pooled.lora.rank / method.lora.rank if pooled.enabled else 0.0
        else:
            unused = (
                0.0 if _is_calibrated(method, results.recipe.run.merge) else bank["seconds"].get("calibration", 0.0)
            )
            start, base = sum(bank["seconds"].values()) - unused, float(bank["bytes"])
        sums = list(accumulate((record.seconds for record in records), initial=start))
        each = (sums[-1] - start) / len(records)
        measured = [n for n in (1, 4, 16, 64, 128, 256) if n <= len(records)]
        seconds[method.name] = [(n, sums[n]) for n in measured], start, each
        stored[method.name] = [(n, base + n * kept) for n in measured], base, kept
        million = start + 1e6 * each
        cost = [human_seconds(start), f"{each:.2f}", human_seconds(sums[-1]), f"{million / 3600:,.0f} h"]
        rows.append([method.name, str(len(records)), *cost, *map(human_bytes, (base, kept, base + 1e6 * kept))])
    if not rows:
        return None
    pictures = {
        f"{name}-time": figures.growth(seconds, "training, all people", human_seconds),
        f"{name}-bytes": figures.growth(stored, "stored, all people", human_bytes),
    }
    heads = ["method", "people measured", "bank", "s per person", "all", "a million (fitted)"]
    heads += ["bank kept", "kept each", "a million (fitted)"]
    text = (
        "Points are sums of measured times, each person's share of a batch. Dashed lines extend them to a million "
        "people, which has not been run. The bank's seconds are those of the task LoRA, the anchors, and, where the "
        f"method uses it, the calibration; {RIVAL} needs the task LoRA only.\n\n"
    )
    return text + markdown(heads, rows), pictures


def _is_calibrated(method: Method, merge: MergeSettings) -> bool:
    """Return whether a method reads the bank's calibration; ``merge`` are the recipe's settings."""
    return (getattr(method, "merge", None) or merge).policy in ("auto", "laplace")


def _banks(results: Results, name: str) -> Drawn | None:
    """How useful each bank is to other people, and the error of cheaper merges."""
    banks = {name: facts for name, facts in results.facts.items() if "others" in facts}
    if not banks:
        return None
    rows = []
    for bank, facts in banks.items():
        errors = [f"{one[kind]:.3f}" for one in facts["fidelity"].values() for kind in ("svd", "factor")]
        others = facts["others"]
        rows.append([bank, str(facts["anchors"]), f"{others['mean']:+.3f}", f"{others['best']:+.3f}", *errors])
    kinds = [f"{merge}, {kind}" for merge in next(iter(banks.values()))["fidelity"] for kind in ("svd", "factor")]
    heads = ["bank", "anchors", "mean anchor", "best anchor", *kinds]
    text = (
        f"Nats per target token against the {POOLED}, on shots of people who are not in the bank: the mean over all "
        "anchors, and the best anchor in hindsight. Then the relative error of merges that are cut to the bank's rank "
        "by svd, or average the factors A and B separately.\n\n"
    )
    return text + markdown(heads, rows), {}


def _setting(results: Results, comparison: Comparison, name: str) -> str:
    seeds = results.seeds(name)
    said = f"{len(seeds)} seeds" if len(seeds) > 1 else f"seed {seeds[0]}" if seeds else "no bank"
    people, independent = comparison.people, comparison.independent
    groups = f" in {independent} groups that share no items" if independent < people else ""
    shots, queries = results.recipe.shots, comparison.queries_each or results.recipe.queries
    asked = {
        "last": f"The questions are each person's last {queries} items, the shots are the {shots} items before them.",
        "next": f"The shots are each person's first {shots} items, the questions are the {queries} items after them.",
    }
    over_seeds = ", and Student's t over seeds" if len(seeds) > 1 else ""
    few = f" Fewer than {FEW} independent units: intervals may be too narrow." if independent < FEW else ""
    return (
        f"{results.name}: {people} people{groups}, {said}. {asked[results.recipe.ask]} Means over people; "
        f"95% intervals by bootstrap over {'groups' if groups else 'people'}{over_seeds}; differences are paired. "
        f"Worse off: people with an NLL more than {NOTICEABLE:g} above the {POOLED}'s.{few}\n"
    )


EXHIBITS: dict[str, tuple[str, Exhibit]] = {  # titles and functions by the names in recipes
    "main": ("Every method", _compared),
    "ablation": ("Ablation", _compared),
    "shots": ("Score against shots", _shots),
    "seeds": ("Main methods, over seeds", _seeds),
    "base": ("Main methods, with another base", _against),
    "k": ("Figure 4: number of merged anchors", _over(r"K = (\d+)", "merged anchors K")),
    "alpha": ("Figure 3: fixed and fitted coefficients", _over(r"alpha = ([\d.]+)", "share of the nearest anchor")),
    "anchors": ("Size of the bank", _over(r"N = (\d+)", "anchors in the bank")),
    "efficiency": ("Figure 2: time and storage against people", _efficiency),
    "banks": ("Use of a bank to other people, and error of merges", _banks),
    "gradient": ("Coefficients from one gradient", _against),
    "choice": ("A choice for each person", _compared),
    "steps": ("The stack's steps", _against),
    "controls": ("Controls: without the person's own shots, or without any model", _against),
    "rivals": ("What a bank has to beat", _against),
    "tune": ("Settings, tried on development people", _compared),
    "oppu": ("OPPU's steps and rate, on development people", _compared),
    "bank-study": ("What makes a bank useful to others", _compared),
}
