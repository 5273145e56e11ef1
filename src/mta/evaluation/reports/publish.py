"""``mta report``: result files in, a folder of tables, pictures and one page out."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mta.evaluation.experiments.records import FILE, Record, publish
from mta.evaluation.experiments.results import BEFORE, Results
from mta.evaluation.experiments.runner import CASE, FACTS
from mta.evaluation.experiments.workspace import RECIPE, SIZES
from mta.evaluation.reports.exhibits import Section, sections
from mta.evaluation.reports.runs import compared, is_experiment, read_runs
from mta.evaluation.reports.tables import overview
from mta.system.atomic import copy_file, make_folder, write_json, write_text
from mta.tracking.run_folder import RUN


def report(folders: Sequence[Path], out: Path, *, texts: bool = False) -> list[str]:
    """Draw every exhibit of every experiment's folder, and other runs beside each other; returns what was drawn.

    Of runs (banks, comparisons, personalizations, demos) ``runs.md`` and ``runs.html`` tell what differs, with
    experiments' among them where both are given.
    For each set a folder with ``README.md``, ``index.html``, pictures (SVG and PNG), and what a reader needs to draw
    them again: scores without texts, compressed, sizes and settings. ``texts`` adds what holds people's texts: the case
    study, and every method's answers in LaMP's format under ``answers/``. Raises DataError.
    """
    experiments = [folder for folder in folders if is_experiment(folder)]
    told = [folder for folder in folders if folder not in experiments or (folder / RUN).exists()]
    runs = read_runs(told) if len(experiments) < len(folders) else []
    many = [Results.read(folder) for folder in experiments]
    drawn = []
    for found in many:
        folder = out / found.name
        make_folder(folder)
        if not texts and found.case:
            found.case.update(_without_texts(found.case))
        made = sections(found, folder)
        _copy(found, folder, texts)
        _write(folder, found.recipe.about or found.name, _sizes(found), made)
        drawn += [f"{found.name}: {section.title}" for section in made]
    if len(many) > 1:
        _write(out, "Every set", overview(many), [])
    if runs:
        made = compared(runs, out)
        _write(out, "Runs compared", "", made, ("runs.md", "runs.html"))
        drawn += [f"runs: {section.title}" for section in made]
    return drawn


def lamp_answers(records: Sequence[Record], lamp: str, folder: Path) -> None:
    """Each method's answers as LaMP wants them: a file a method, bank, seed and number of shots.

    ``golds-<shots>.json`` holds the true answers to the same questions, for the benchmark's own script.
    """
    files: dict[str, dict[str, str]] = {}
    for record in records:
        name = f"{record.method} {record.bank} {record.shots} {record.seed}".lower()
        for called, texts in ((name, record.answers), (f"golds {record.shots}", record.golds)):
            rows = files.setdefault(re.sub(r"[^a-z0-9]+", "-", called).strip("-"), {})
            rows.update(zip(record.ids, texts))
    for name, rows in files.items():
        ordered = [{"id": id, "output": text} for id, text in sorted(rows.items())]
        write_json(folder / f"{name}.json", {"task": lamp, "golds": ordered})


def _copy(found: Results, folder: Path, texts: bool) -> None:
    if folder.resolve() == found.folder.resolve():
        return
    publish(found.records, folder / f"{FILE}.gz")
    beside: list[tuple[str, object]] = [
        (SIZES, found.sizes),
        (FACTS, found.facts),
        (CASE, found.case),
    ]
    for name, value in beside:
        if value:
            write_json(folder / name, value)
    recipe = found.folder / RECIPE
    copy_file(recipe if recipe.exists() else found.folder.parent / RECIPE, folder / RECIPE)
    for name in (RUN, BEFORE):
        if (found.folder / name).exists():
            copy_file(found.folder / name, folder / name)
    if texts:
        lamp_answers(found.records, found.task.lamp or found.task.name, folder / "answers")


def _without_texts(case: dict[str, Any]) -> dict[str, Any]:
    """A case that can be published: labels and numbers stay, what somebody wrote or was asked does not."""
    labelled = all(answer["labels"] for answer in case["answers"].values())
    answers = {name: one | ({} if labelled else {"text": ""}) for name, one in case["answers"].items()}
    return {"shots": [], "query": "", "answers": answers} | ({} if labelled else {"gold": ""})


def _sizes(found: Results) -> str:
    sizes, meta = found.sizes, found.meta
    parts = ", ".join(
        f"{name} {sizes[name]}" for name in ("task", "candidates", "development", "test") if name in sizes
    )
    enough = ", ".join(f"{count} with {m}" for m, count in sizes.get("test people with shots", {}).items())
    return (
        f"People: {sizes.get('people')} in all, of whom {sizes.get('qualified')} have enough items; parts: {parts}; "
        f"test people with enough items for so many shots: {enough}. Anchors: {sizes.get('anchors')}.\n\n"
        f"Base: {meta.get('base')} ({meta.get('note')}), {meta.get('dtype')}. "
        f"Merge-then-Adapt (arXiv:2511.20072), protocol reconstructed.\n\n{_runs(meta)}"
    )


def _runs(meta: dict[str, Any]) -> str:
    """How it was made: a line for each run of the experiment."""
    said = []
    for run in meta.get("runs", ()):
        with_versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        took = "stopped before its end" if run["hours"] is None else f"{run['hours']:.2f} hours"
        took += ", then stopped" * bool(run.get("stopped"))
        line = f"- {run['command'] or 'from Python'}: {took} on {run['machine']}, "
        said.append(f"{line}{run['threads']} threads; commit {run['commit'] or 'unknown'}; {with_versions}\n")
    return "".join(said)


def _write(
    folder: Path,
    title: str,
    head: str,
    made: Sequence[Section],
    names: tuple[str, str] = ("README.md", "index.html"),
) -> None:
    """The same as Markdown and as a page that needs nothing but the pictures beside it."""
    text, page = f"# {title}\n\n{head}\n", f"<h1>{html.escape(title)}</h1>\n{_paragraphs(head)}"
    for section in made:
        text += f"## {section.title}\n\n{section.text}\n"
        text += "".join(f"![{section.title}]({picture}.svg)\n\n" for picture in section.pictures)
        page += f"<h2>{html.escape(section.title)}</h2>\n{_paragraphs(section.text)}"
        page += "".join(
            f'<img src="{picture}.svg" alt="{html.escape(section.title)}">\n' for picture in section.pictures
        )
    for name, content in zip(names, (text, _PAGE.format(title=html.escape(title), body=page))):
        write_text(folder / name, content)


def _paragraphs(text: str) -> str:
    """Our own Markdown as HTML: paragraphs, lists, bold, tables."""
    made = []
    for block in re.split(r"\n\s*\n", text.strip()):
        lines = block.split("\n")
        table = [line for line in lines if line.startswith("|")]
        before = [line for line in lines if not line.startswith(("|", "- "))]
        items = [line[2:] for line in lines if line.startswith("- ")]
        if before:
            made.append(f"<p>{_inline(' '.join(before))}</p>")
        if items:
            made.append("<ul>" + "".join(f"<li>{_inline(item)}</li>" for item in items) + "</ul>")
        if table:
            made.append(_table(table))
    return "\n".join(made) + "\n"


def _table(lines: Sequence[str]) -> str:
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    head = "".join(f"<th>{_inline(cell.strip())}</th>" for cell in rows[0])
    body = "".join(
        f"<tr><th>{_inline(row[0].strip())}</th>" + "".join(f"<td>{_inline(c.strip())}</td>" for c in row[1:]) + "</tr>"
        for row in rows[2:]
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _inline(text: str) -> str:
    return re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", html.escape(text.replace("\\|", "|"), quote=False))


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1c1d20; margin: 0 auto; max-width: 1200px; padding: 2rem 1rem; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #d9d8d2; white-space: nowrap; }}
th:first-child {{ text-align: left; }}
thead th {{ color: #61646c; white-space: normal; vertical-align: bottom; }}
img {{ max-width: 100%; display: block; margin: 1rem 0; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""
