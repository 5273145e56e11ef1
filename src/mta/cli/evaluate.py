"""``mta evaluate``: are people better off? Every method on the same shots and the same later queries."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mta.cli.data import Source, people_in
from mta.cli.options import (
    MERGE_AND_STACK,
    OF_THE_MACHINE,
    BankDir,
    Device,
    Json,
    Seed,
    SkipBad,
    Words,
    check_out,
    open_bank,
    show_json,
    task_of,
    typed,
)

if TYPE_CHECKING:
    from mta.history import Person

Settings = Annotated[Path | None, typer.Option("--config", help="Evaluation settings in YAML.", dir_okay=False)]
Predictions = Annotated[
    Path | None, typer.Option(help="Score this file of answers instead, made elsewhere.", dir_okay=False)
]


def evaluate(
    source: Source,
    words: Words = None,
    bank: BankDir = Path("bank"),
    out: Annotated[Path | None, typer.Option(help="Folder for report.html and results.json.")] = None,
    config: Settings = None,
    predictions: Predictions = None,
    data: Annotated[str | None, typer.Option(help="The people a recipe is run on: LaMP files, or any others.")] = None,
    exhibit: Annotated[list[str] | None, typer.Option(help="Only this exhibit of a recipe; may be repeated.")] = None,
    on: Annotated[str, typer.Option(help="Whom a recipe is run on: test, or development people.")] = "test",
    task: Annotated[str | None, typer.Option(help="The task of --predictions; else it is the bank's.")] = None,
    people: Annotated[int | None, typer.Option(min=1, help="Only so many people, drawn by the seed.")] = None,
    seed: Seed = None,
    device: Device = None,
    skip_bad: SkipBad = None,
    json: Json = False,
) -> None:
    """Compare MTA with constants, the base, the task LoRA, OPPU, merge only and adapt only.

    SOURCE is people to be tested on a bank, from their shots anew; who is in the bank, or has fewer than shots +
    queries items, is left out. Settings as key=value are those of the evaluation (shots=4 queries=10), and merge.…,
    stack.…, memory and dtype over the bank's.
    Or SOURCE is a recipe (lamp1 … lamp7, movielens, or a .yaml): an experiment with banks of its own, every method, and
    the paper's exhibits, which goes on where it was stopped; mta report draws it.
    With --predictions nothing is computed: a file of answers in LaMP's format is scored as the benchmark does it.

    Example:  mta evaluate lamp3 --data LaMP_3/dev_questions.json --out runs/lamp3 --exhibit main
    Example:  mta evaluate newcomers.jsonl --bank bank/ --out results/ shots=8 queries=12 merge.policy=ridge
    Example:  mta evaluate dev_outputs.json --predictions mine.json --task lamp3
    """
    if predictions:
        return _score(source, predictions, task, words, json)
    if _is_recipe(source):
        return _experiment(source, words, out or Path("runs") / Path(source).stem, data, exhibit, on, json)
    from mta.errors import InputError

    if task:
        raise InputError("--task belongs to --predictions; a comparison is about the task of its bank")
    check_out(out)
    _compare(people_in(source, task_of(bank), skip_bad), words or [], bank, out, config, people, seed, device, json)


def _compare(
    everybody: list[Person],
    words: list[str],
    bank: Path,
    out: Path | None,
    config: Path | None,
    people: int | None,
    seed: int | None,
    device: str | None,
    json: bool,
) -> None:
    from mta.cli.screen import Screen, console
    from mta.config import Evaluation, load_settings
    from mta.evaluation.report import to_json
    from mta.evaluation.show import show
    from mta.evaluation.study import study

    of_run = [word for word in words if re.split("[.=]", word)[0] in MERGE_AND_STACK | OF_THE_MACHINE]
    chosen = load_settings(Evaluation, config, [word for word in words if word not in of_run])
    base, opened, run = open_bank(bank, of_run, seed, device, open_to=MERGE_AND_STACK)
    with Screen() as screen:
        found = study(base, opened, run, everybody, chosen, limit=people, on_step=screen.step, on_method=screen.say)
    if json:
        show_json(to_json(found.comparison, **found.meta, command=typed()))
    else:
        show(found, console)
    if out:
        found.write(out, typed())


def _is_recipe(source: str) -> bool:
    from mta.evaluation.recipe import names

    return Path(source).suffix in (".yaml", ".yml") or (source in names() and not Path(source).exists())


def _experiment(
    name: str,
    words: list[str] | None,
    out: Path,
    data: str | None,
    exhibits: list[str] | None,
    on: str,
    json: bool,
) -> None:
    from mta.cli.screen import Screen
    from mta.config import override
    from mta.errors import InputError
    from mta.evaluation.experiment import run_experiment
    from mta.evaluation.lab import Lab
    from mta.evaluation.recipe import Which, load_experiment, wanted

    if on not in ("test", "development"):
        raise InputError(f"--on is {on!r}; expected test or development")
    check_out(out)
    recipe = override(load_experiment(name), words or [])
    which: Which = "test" if on == "test" else "development"
    wanted(recipe, which, exhibits or ())  # before anything is written or loaded
    with Screen() as screen:
        lab = Lab.open(recipe, out, data, which, say=screen.say)
        lab.on_step = screen.step
        run_experiment(lab, exhibits or (), typed())
    if json:
        return show_json({"out": str(lab.folder), "sizes": lab.sizes})
    typer.echo(f"Draw it with:  mta report {lab.folder}", err=True)


def _score(source: str, predictions: Path, task: str | None, words: list[str] | None, json: bool) -> None:
    from mta.assets import resolve
    from mta.errors import InputError
    from mta.evaluation.lamp import score
    from mta.readers import read_answers
    from mta.tasks import load_task

    if words or not task:
        raise InputError(
            "--predictions needs the task, and takes no settings",
            hint="For example --predictions mine.json --task lamp3.",
        )
    asked = load_task(task)
    golds = read_answers(Path(resolve(source)), asked)
    found = score(asked, read_answers(predictions, asked, empty=True), golds)
    if json:
        show_json(found | {"questions": len(golds)})
    else:
        typer.echo("  ".join(f"{metric} {value:.4f}" for metric, value in found.items()) + f"  questions {len(golds)}")
