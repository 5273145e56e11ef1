"""``mta report``: tables and pictures from result files alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mta.cli.options import Json, check_out, show_json


def report(
    folders: Annotated[
        list[Path], typer.Argument(help="The --out folders of mta evaluate, bank build or demo; --run folders.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for tables, pictures and pages.")] = Path("report"),
    texts: Annotated[
        bool,
        typer.Option("--texts", help="Also what people wrote: in the case study, and all answers in LaMP's format."),
    ] = False,
    json: Json = False,
) -> None:
    """Draw every exhibit that has been run, and runs beside each other: Markdown, HTML, SVG, PNG. No model is loaded.

    Of a recipe's folder every exhibit; of banks, comparisons, personalizations and demos what differs between them
    (runs.html): settings, losses, what came out. What is written can be published: scores without texts, people as
    salted hashes. With --texts it cannot.

    Example:  mta report runs/lamp3 runs/movielens --out results/
    Example:  mta report bank-8/ bank-16/ --out compared/
    """
    from mta.evaluation.reports.publish import report as draw

    check_out(out)
    drawn = draw(folders, out, texts=texts)
    if json:
        return show_json({"out": str(out), "drawn": drawn})
    for line in drawn:
        typer.echo(line, err=True)
    typer.echo(out)
