"""``mta demo``, ``mta evaluate``, and ``mta report``: compare methods, attack a bank, and draw the results."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from inspect import signature
from json import dumps
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

import mta
from mta.cli import options
from mta.cli.screen import Screen, console, show_json
from mta.config import Evaluation, Privacy, load_settings, override
from mta.config.loader import read_yaml
from mta.data.readers import read_answers
from mta.data.tasks import load_task
from mta.errors import InputError
from mta.system.assets import resolve
from mta.system.extras import require

if TYPE_CHECKING:
    from mta.distributed.executor import Executor
    from mta.evaluation.compare import Study
    from mta.evaluation.privacy.runner import Findings

RUN_SETTINGS = options.MERGE_AND_STACK | options.MACHINE_SETTINGS
_PEOPLE = {"source", "words", "bank", "out", "config", "seed", "device", "skip_bad", "track", "json"}
_PEOPLE |= {"person_column", "input_column", "output_column", "time_column"}
_RECIPE = {"source", "words", "out", "data", "test", "exhibit", "on", "people", "seed", "device", "track", "json"}
_TAKES = {  # what can be evaluated, its options, and why there are no others
    "a file of answers": (
        {"source", "predictions", "task", "json"},
        "--predictions only scores a file, for example  --predictions mine.json --task lamp3",
    ),
    "a recipe": (
        _RECIPE | {"cluster", "workers"},
        "a recipe names its settings and task, builds its banks, and reads LaMP files or JSONL as they are",
    ),
    "a comparison": (
        _PEOPLE | {"people"},
        "a comparison tests the people of SOURCE on the bank's task, in one process",
    ),
    "an attack": (_PEOPLE | {"privacy"}, "--privacy takes people and a bank; for fewer people: targets=8"),
}


def demo(
    words: options.Words = None,
    out: Annotated[Path, Option(help="Folder for bank, store and report.")] = Path("demo"),
    recipe: Annotated[str, Option(help="Name of a built-in recipe, or a YAML file.")] = "movielens",
    full: Annotated[bool, Option("--full", help="Train longer, and compare all methods: 20 minutes.")] = False,
    seed: options.Seed = None,
    track: options.Track = None,
    json: options.Json = False,
) -> None:
    """Build a bank from MovieLens, personalize people outside it, and compare MTA with baselines, in 5 to 8 minutes.

    Override settings of the recipe as key=value: run.bank.anchors=8 people.test=48. The same command resumes a demo.

    Example:  mta demo --out demo/
    """
    from mta.evaluation.reports.glance import show_glance
    from mta.tools import demo as tool

    require("eval")  # before a bank is built
    given = [*(words or []), *options.as_words(**{"run.seed": seed})]
    chosen, tracker = tool.load_demo(recipe), options.tracker_for(track, out)
    command = options.command_line()
    with Screen() as screen:
        left = partial(screen.whole, "whole demo")
        found = tool.demo(
            out, chosen, command, given, full=full, on_step=screen.step, on_time=left, say=screen.say, track=tracker
        )
    if json:
        return _show(found, json)
    show_glance(found.comparison, found.asked, tool.next_commands(out, found), console)


def evaluate(
    source: options.Source,
    words: options.Words = None,
    bank: options.BankDir = Path("bank"),
    out: Annotated[Path | None, Option(help="Folder for report.html, results.json and the run's settings.")] = None,
    config: Annotated[
        Path | None, Option(help="YAML file with settings of evaluation, merge and stack.", dir_okay=False)
    ] = None,
    predictions: Annotated[
        Path | None, Option(help="Score this file of answers, and compute nothing else.", dir_okay=False)
    ] = None,
    data: Annotated[str | None, Option(help="People of a recipe: LaMP files, or any other source.")] = None,
    test: Annotated[str | None, Option(help="Test these people; otherwise a recipe draws them from --data.")] = None,
    exhibit: Annotated[list[str] | None, Option(help="Run only this exhibit of a recipe; can be repeated.")] = None,
    on: Annotated[str, Option(help="People to run a recipe on: test or development.")] = "test",
    privacy: Annotated[bool, Option("--privacy", help="Attack the bank: do losses reveal its training items?")] = False,
    task: Annotated[str | None, Option(help="Task of --predictions; otherwise the bank's task is used.")] = None,
    people: Annotated[int | None, Option(min=1, help="Evaluate at most this many people, drawn with the seed.")] = None,
    seed: options.Seed = None,
    device: options.Device = None,
    person_column: options.PersonColumn = None,
    input_column: options.InputColumn = None,
    output_column: options.OutputColumn = None,
    time_column: options.TimeColumn = None,
    skip_bad: options.SkipBad = None,
    cluster: options.ClusterAt = None,
    workers: options.Workers = None,
    track: options.Track = None,
    json: options.Json = False,
) -> None:
    """Compare MTA with constants, the base, the task LoRA, OPPU, merge only and adapt only.

    SOURCE holds people to test on a bank; each is personalized anew from their shots. People in the bank, and people
    with fewer than shots + queries items, are left out. key=value sets the evaluation (shots=4 queries=10) and
    overrides merge.…, stack.…, memory and dtype of the bank.
    Or SOURCE is a recipe (lamp1 to lamp5, lamp2n, lamp7, movielens, or a .yaml file): an experiment that builds its own
    banks and runs all methods and the paper's exhibits. An interrupted experiment resumes. Draw its exhibits with mta
    report.
    With --predictions, a file of answers in LaMP's format is scored as in the benchmark, and nothing is computed.
    With --privacy, the bank, its merges and personal models are attacked: does the loss separate their training items
    from other items? SOURCE then holds the people of the bank and other people; shots=8 targets=16 items=16.

    Example:  mta evaluate lamp3 --data LaMP_3/dev_questions.json --out runs/lamp3 --exhibit main
    Example:  mta evaluate newcomers.jsonl --bank bank/ --out results/ shots=8 queries=12 merge.policy=ridge
    Example:  mta evaluate everybody.jsonl --bank bank/ --privacy --out privacy/
    Example:  mta evaluate dev_outputs.json --predictions mine.json --task lamp3
    """
    kind = _kind(source, predictions, privacy)
    _check_options(kind, locals())
    from mta.evaluation.privacy.runner import privacy as attack

    require("eval")  # before a model is loaded
    if predictions:
        return _score(source, predictions, task, json)
    if kind == "a recipe":
        place = out or Path("runs") / Path(source).stem
        given = options.as_words(**{"run.device": device, "seeds": None if seed is None else [seed]})
        with options.executor_at(cluster, workers) as executor:
            return _experiment(
                source, [*(words or []), *given], place, data, test, exhibit or [], on, people, executor, track, json
            )
    columns = options.Columns(person_column, input_column, output_column, time_column)
    tracker = options.tracker_for(track, out)
    tested = options.people_in(source, options.task_of(bank), columns, skip_bad)
    chosen, run_words = _settings(Privacy if privacy else Evaluation, config, words or [])
    base, opened, run = options.open_bank(bank, run_words, seed=seed, device=device, open_to=options.MERGE_AND_STACK)
    used = chosen.model_dump(mode="json") | base.as_loaded(run).model_dump(mode="json", include=set(RUN_SETTINGS))
    name = "privacy" if privacy else "comparison"
    with Screen() as screen, options.run_folder(name, out, base, opened, used, tracker, screen.step) as folder:
        found: Findings | Study
        if isinstance(chosen, Privacy):
            found = attack(base, opened, run, tested, chosen, on_step=folder.step, say=screen.say)
        else:
            found = mta.study(
                base, opened, run, tested, chosen, limit=people, on_step=folder.step, on_method=screen.say
            )
        folder.outcome = found.outcome()
        if out:
            _write(found, out)
    _show(found, json)


def _kind(source: str, predictions: Path | None, privacy: bool) -> str:
    if predictions:
        return "a file of answers"
    if _is_recipe(source):
        return "a recipe"
    return "an attack" if privacy else "a comparison"


def _check_options(kind: str, values: Mapping[str, object]) -> None:
    """Raise InputError if options are given that are not for this kind of evaluation."""
    takes, why = _TAKES[kind]
    known = signature(evaluate).parameters
    given = [name for name, option in known.items() if values[name] != option.default and name not in takes]
    if given:
        flags = ["settings" if name == "words" else f"--{name.replace('_', '-')}" for name in given]
        raise InputError(f"{', '.join(flags)}: not for {kind}", hint=f"Leave it out: {why}.")


def _settings(
    kind: type[Evaluation] | type[Privacy], config: Path | None, words: list[str]
) -> tuple[Evaluation | Privacy, list[str]]:
    """Return the settings of a comparison or an attack, and the settings of the run as key=value."""
    given = read_yaml(config).items()
    run_words = [f"{key}={dumps(value, default=str)}" for key, value in given if key in RUN_SETTINGS]
    run_words += [word for word in words if re.split("[.=]", word)[0] in RUN_SETTINGS]
    own_words = [word for word in words if word not in run_words]
    return load_settings(kind, config, own_words, beside=RUN_SETTINGS), run_words


def _write(found: Study | Findings, out: Path) -> None:
    from mta.evaluation.compare import Study
    from mta.evaluation.privacy import report as attacks

    command = options.command_line()
    found.write(out, command) if isinstance(found, Study) else attacks.write(found, out, command)


def _show(found: Study | Findings, json: bool) -> None:
    from mta.evaluation.compare import Study
    from mta.evaluation.privacy import report as attacks
    from mta.evaluation.reports import tables
    from mta.evaluation.reports.html import to_json

    command = options.command_line()
    if isinstance(found, Study):
        if json:
            return show_json(to_json(found.comparison, **found.meta, command=command))
        return tables.show(found.comparison, found.meta, console)
    show_json(attacks.to_json(found, command)) if json else attacks.show(found, console)


def _is_recipe(source: str) -> bool:
    from mta.evaluation.experiments.recipe import names

    return Path(source).suffix in (".yaml", ".yml") or (source in names() and not Path(source).exists())


def _experiment(
    name: str,
    words: list[str],
    out: Path,
    data: str | None,
    test: str | None,
    exhibits: list[str],
    on: str,
    people: int | None,
    executor: Executor,
    track: str | None,
    json: bool,
) -> None:
    from mta.evaluation.experiments.recipe import Which, load_experiment, wanted
    from mta.evaluation.experiments.runner import run_experiment
    from mta.evaluation.experiments.workspace import Workspace

    if on not in ("test", "development"):
        raise InputError(
            f"--on is {on!r}; expected test or development",
            hint="Leave --on out for test people, or give  --on development",
        )
    tracker = options.tracker_for(track, out)
    recipe = override(load_experiment(name), words)
    recipe = recipe.limited(people) if people else recipe
    which: Which = "test" if on == "test" else "development"
    wanted(recipe, which, exhibits)  # before anything is written or loaded
    with Screen() as screen:
        workspace = Workspace.open(
            recipe, out, data, which, test=test, say=screen.say, executor=executor, on_step=screen.step
        )
        run_experiment(workspace, exhibits, options.command_line(), tracker)
    if json:
        return show_json({"out": str(workspace.folder), "sizes": workspace.sizes})
    typer.echo(f"Draw the exhibits with:  mta report {quote(str(workspace.folder))}", err=True)


def _score(source: str, predictions: Path, task: str | None, json: bool) -> None:
    from mta.evaluation.metrics import score

    if not task:
        raise InputError("--predictions needs the task", hint="For example --predictions mine.json --task lamp3.")
    asked = load_task(task)
    golds = read_answers(Path(resolve(source)), asked)
    found = score(asked, read_answers(predictions, asked, empty=True), golds)
    if json:
        return show_json(found | {"questions": len(golds)})
    typer.echo("  ".join(f"{metric} {value:.4f}" for metric, value in found.items()) + f"  questions {len(golds)}")


def report(
    folders: Annotated[list[Path], Argument(help="Folders of --out (mta evaluate, bank build, demo) or --run.")],
    out: Annotated[Path, Option(help="Folder for tables, figures and pages.")] = Path("report"),
    texts: Annotated[
        bool, Option("--texts", help="Include people's texts: the case study, and answers in LaMP's format.")
    ] = False,
    json: options.Json = False,
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
    options.check_out(out)
    drawn = draw(folders, out, texts=texts)
    if json:
        return show_json({"out": str(out), "drawn": drawn})
    typer.echo("\n".join(drawn), err=True)
    typer.echo(out)
