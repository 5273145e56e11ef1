"""``mta demo``: run the whole method on MovieLens ratings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mta.cli.options import Json, Seed, Track, Words, show_json, tracked, typed
from mta.system.extras import require


def demo(
    words: Words = None,
    out: Annotated[Path, typer.Option(help="Folder for bank, store and report.")] = Path("demo"),
    recipe: Annotated[str, typer.Option(help="Name of a built-in recipe, or a YAML file.")] = "movielens",
    seed: Seed = None,
    track: Track = None,
    json: Json = False,
) -> None:
    """Build a bank from MovieLens, personalize people outside it, and compare MTA with the baselines.

    Override settings of the recipe as key=value: run.bank.anchors=8 people.test=48.

    Example:  mta demo --out demo/
    """
    from mta.cli.screen import Screen, console
    from mta.evaluation.reports.html import to_json
    from mta.evaluation.reports.tables import show
    from mta.tools.demo import demo as run_demo
    from mta.tools.demo import load_recipe

    require("eval")  # before a bank is built
    given = [*(words or []), *([] if seed is None else [f"run.seed={seed}"])]
    chosen, opened = load_recipe(recipe), tracked(track, out)
    with Screen() as screen:
        found = run_demo(out, chosen, typed(), given, on_step=screen.step, say=screen.say, track=opened)
    if json:
        return show_json(to_json(found.comparison, **found.meta, command=typed()))
    show(found.comparison, found.meta, found.questions, console)
