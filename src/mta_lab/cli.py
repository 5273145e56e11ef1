"""``mta-lab``: run experiments, attack a bank, score answers, and draw results."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Annotated

import typer
from typer import Argument, Option

from mta.cli import options, screen
from mta.cli.app import run
from mta.cli.compare import Out, opened
from mta.cli.screen import Screen, show_json
from mta.config import override
from mta.data.tasks import load_task
from mta.errors import InputError
from mta.system.extras import require
from mta_lab.privacy.settings import AttackSettings
from mta_lab.readers.lamp import read_answers

app = typer.Typer(
    name="mta-lab",
    help="Reproduce papers with mta: experiments, the privacy attack, scores, and reports.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def main() -> None:
    """Run a command. Print a user's mistake without a traceback, and exit with 1."""
    run(app)


@app.command()
def evaluate(
    recipe: Annotated[
        str, Argument(help="lamp1 to lamp5, lamp2n, lamp7, authors-lamp1 to -lamp5, survey, movielens, or a file.")
    ],
    words: options.RecipeWords = None,
    out: Annotated[
        Path | None, Option(help="Folder for banks and results; default: runs/ and the recipe's name.")
    ] = None,
    data: Annotated[str | None, Option(help="The people: LaMP files, or any other source.")] = None,
    test: Annotated[str | None, Option(help="Source of the people to test; default: drawn from --data.")] = None,
    exhibit: Annotated[list[str] | None, Option(help="Run only this exhibit; can be repeated.")] = None,
    on: Annotated[str, Option(help="People to run on: test or development.")] = "test",
    device: options.Device = None,
    columns: options.Columns = None,
    skip_bad: options.SkipBad = None,
    cluster: options.ClusterAt = None,
    workers: options.Workers = None,
    together: options.Together = None,
    json: options.Json = False,
) -> None:
    """Run a recipe: an experiment that builds its own banks, runs all methods, and makes the paper's exhibits.

    key=value overrides settings of the recipe: seeds=[0] compared=16 run.base=FOLDER. A killed experiment resumes.
    Draw its exhibits with mta-lab report. To compare methods on a bank of yours, use mta compare.

    Example:  mta-lab evaluate lamp3 --data LaMP_3/dev_questions.json --out runs/lamp3 --exhibit main
    """
    from mta_lab.experiments.recipe import Which, load_experiment, wanted
    from mta_lab.experiments.runner import run_experiment
    from mta_lab.experiments.workspace import Workspace

    require("lab")  # before a bank is built
    if on not in ("test", "development"):
        raise InputError(
            f"--on is {on!r}; expected test or development",
            hint="Leave --on out for test people, or give  --on development",
        )
    out = out or Path("runs") / Path(recipe).stem
    options.check_out(out)
    given = options.as_words(**{"run.device": device})
    if any(word.startswith("run.seed=") for word in words or ()):
        raise InputError("run.seed has no effect: every seed is run on its own", hint="Give  seeds=[0,1]")
    chosen = override(load_experiment(recipe), [*(words or []), *given])
    which: Which = "test" if on == "test" else "development"
    exhibits = exhibit or []
    wanted(chosen, which, exhibits)  # before anything is written or loaded
    if skip_bad and test:
        hint = "Correct the bad rows of both files, and leave --skip-bad out."
        raise InputError("--skip-bad takes the bad rows of one file, and --test names another", hint=hint)
    with options.executor_at(cluster, workers, chosen.run.device, together) as executor, Screen() as screen:
        workspace = Workspace.open(
            chosen,
            out,
            data,
            which,
            test=test,
            read=lambda source, task: options.people_in(source, task, None if test else columns, skip_bad),
            read_tested=lambda source, task: options.people_in(source, task, columns, None),
            say=screen.say,
            executor=executor,
            on_step=screen.step,
        )
        run_experiment(workspace, exhibits, options.command_line("mta-lab"))
    if json:
        return show_json({"out": str(workspace.folder), "sizes": workspace.sizes})
    typer.echo(f"Draw the exhibits with:  mta-lab report {quote(str(workspace.folder))}", err=True)


@app.command()
def attack(
    source: options.Source,
    words: options.Words = None,
    bank: options.BankDir = Path("bank"),
    out: Out = None,
    config: options.Config = None,
    seed: options.Seed = None,
    device: options.Device = None,
    columns: options.Columns = None,
    skip_bad: options.SkipBad = None,
    json: options.Json = False,
) -> None:
    """Attack a bank, its merges and personal models by their losses on training items and other items.

    Do losses reveal which items a model was trained on? SOURCE holds people of the bank and other people. key=value
    sets the attack (shots=8 targets=16 items=16; fewer targets take less time) and overrides merge.…, stack.…, memory
    and dtype of the bank.

    Example:  mta-lab attack everybody.jsonl --bank bank/ --out privacy/
    """
    from mta_lab.privacy import report
    from mta_lab.privacy.runner import privacy

    require("lab")  # before a model is loaded
    command = options.command_line("mta-lab")
    given = source, words, bank, out, config, seed, device, columns, skip_bad
    with opened("privacy", AttackSettings, *given) as session:
        findings = privacy(
            session.base,
            session.bank,
            session.people,
            session.settings,
            run=session.run,
            on_step=session.folder.step,
            say=session.screen.say,
        )
        session.folder.outcome = findings.outcome()
        if out:
            report.write(findings, out, command)
    show_json(report.to_json(findings, command)) if json else report.show(findings, screen.tables())


@app.command()
def score(
    answers: Annotated[Path, Argument(help="A model's answers in LaMP's format.", dir_okay=False)],
    true: Annotated[Path, Option(help="The true answers: LaMP's outputs file, or the questions file beside it.")],
    task: Annotated[str, Option(help="A built-in task, for example lamp3, or a YAML file.")],
    json: options.Json = False,
) -> None:
    """Score a file of answers as LaMP's benchmark does. Loads no model.

    Example:  mta-lab score mine.json --true dev_outputs.json --task lamp3
    """
    from mta_lab.lamp_scores import score as lamp_scores

    require("lab")
    asked = load_task(task)
    golds = read_answers(true, asked)
    scores = lamp_scores(asked, read_answers(answers, asked, empty=True), golds)
    if json:
        return show_json(scores | {"questions": len(golds)})
    typer.echo("  ".join(f"{metric} {value:.4f}" for metric, value in scores.items()) + f"  questions {len(golds)}")


@app.command()
def report(
    folders: Annotated[
        list[Path],
        Argument(
            file_okay=False,
            help="Output folders of mta compare, demo, bank build, personalize --run, mta-lab evaluate, attack.",
        ),
    ],
    out: Annotated[Path, Option(help="Folder for tables, figures and pages.")] = Path("report"),
    texts: Annotated[bool, Option("--texts", help="Include people's texts (answers in LaMP's format).")] = False,
    json: options.Json = False,
) -> None:
    """Draw finished exhibits and runs as Markdown, HTML, SVG and PNG. Loads no model.

    For a recipe's folder, draws all exhibits that have been run. For a bank, comparison, attack, personalization or
    demo, draws its results and losses. Each has a folder in --out. The report can be published: it contains scores
    without texts, and people as salted hashes. A report with --texts must not be published.

    Example:  mta-lab report runs/lamp3 runs/movielens --out results/
    Example:  mta-lab report bank/ --out report/
    """
    from mta_lab.reports.report import report as draw

    require("lab")
    options.check_out(out)
    drawn = draw(folders, out, texts=texts)
    if json:
        return show_json({"out": str(out), "drawn": drawn})
    typer.echo("\n".join(drawn), err=True)
    typer.echo(out)
