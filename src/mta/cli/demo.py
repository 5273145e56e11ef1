"""``mta demo``: the whole method on real people's ratings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mta.cli.options import Json, Seed, Track, Words, show_json, tracked, typed


def demo(
    words: Words = None,
    out: Annotated[Path, typer.Option(help="Folder for bank, people and report.")] = Path("demo"),
    recipe: Annotated[str, typer.Option(help="A recipe of the package, or a YAML file like it.")] = "movielens",
    seed: Seed = None,
    track: Track = None,
    json: Json = False,
) -> None:
    """Build a bank from MovieLens, personalize people who are not in it, and compare with everything else.

    Settings over the recipe's as key=value: run.bank.anchors=8 people.test=48.

    Example:  mta demo --out demo/
    """
    from mta.cli.screen import Screen, console
    from mta.evaluation.reports.console import show
    from mta.evaluation.reports.html import to_json
    from mta.tools.demo import demo as run_demo
    from mta.tools.demo import load_recipe

    given = [*(words or []), *([] if seed is None else [f"run.seed={seed}"])]
    chosen, opened = load_recipe(recipe), tracked(track, out)
    with Screen() as screen:
        found = run_demo(out, chosen, typed(), given, on_step=screen.step, say=screen.say, track=opened)
    if json:
        return show_json(to_json(found.comparison, **found.meta, command=typed()))
    show(found.comparison, found.meta, found.questions, console)
