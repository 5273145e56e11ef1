"""``mta report``: draw tables and figures from result files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mta.cli.options import Json, check_out, show_json
from mta.system.extras import require


def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders of --out (mta evaluate, bank build, demo) or --run.")],
    out: Annotated[Path, typer.Option(help="Folder for tables, figures and pages.")] = Path("report"),
    texts: Annotated[
        bool,
        typer.Option("--texts", help="Include people's texts: the case study, and answers in LaMP's format."),
    ] = False,
    json: Json = False,
) -> None:
    """Draw finished exhibits and runs as Markdown, HTML, SVG and PNG. Loads no model.

    For a recipe's folder, draws all exhibits that have been run. For a bank, comparison, personalization or demo, draws
    its results and losses. Each gets a folder in --out. The report can be published: it contains scores without texts,
    and people as salted hashes. A report with --texts must not be published.

    Example:  mta report runs/lamp3 runs/movielens --out results/
    Example:  mta report bank/ --out report/
    """
    from mta.evaluation.reports.publish import report as draw

    require("eval")
    check_out(out)
    drawn = draw(folders, out, texts=texts)
    if json:
        return show_json({"out": str(out), "drawn": drawn})
    for line in drawn:
        typer.echo(line, err=True)
    typer.echo(out)
