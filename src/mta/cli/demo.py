"""``mta demo``: the whole method on MovieLens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from mta.cli import options
from mta.cli.screen import Screen, show_json, tables
from mta.system.extras import require


def demo(
    words: options.RecipeWords = None,
    out: Annotated[Path, Option(help="Folder for bank, store and report.")] = Path("demo"),
    recipe: Annotated[str, Option(help="Name of a built-in recipe, or a YAML file.")] = "movielens",
    full: Annotated[bool, Option("--full", help="Train longer, and compare all methods: 20 minutes.")] = False,
    seed: options.Seed = None,
    track: options.Track = None,
    json: options.Json = False,
) -> None:
    """Build a bank from MovieLens, personalize people outside it, and compare MTA with baselines, in 4 to 8 minutes.

    Override settings of the recipe as key=value: run.bank.anchors=8 people.test=48. The same command resumes a demo.

    Example:  mta demo --out demo/
    """
    from mta.evaluation.reports.glance import show_glance
    from mta.evaluation.reports.html import to_json
    from mta.tools import demo as tool

    require("eval")  # before a bank is built
    given = [*(words or []), *options.as_words(**{"run.seed": seed})]
    chosen, tracker = tool.load_demo(recipe), options.tracker_for(track, out)
    command = options.command_line()
    with Screen() as screen:
        found = tool.demo(out, chosen, command, given, full=full, on_step=screen.step, say=screen.say, track=tracker)
    if json:
        return show_json(to_json(found.comparison, **found.meta, command=command))
    show_glance(found.comparison, found.samples, tool.next_commands(out, found), tables())
