"""``mta evaluate``: compare methods on a bank, run a recipe, score predictions, or attack a bank."""

from __future__ import annotations

import re
from dataclasses import dataclass
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from mta.cli.data import Source, people_in
from mta.cli.options import (
    MACHINE_SETTINGS,
    MERGE_AND_STACK,
    BankDir,
    ClusterAt,
    Device,
    Json,
    Seed,
    SkipBad,
    Track,
    Words,
    Workers,
    executor_at,
    kept_over,
    open_bank,
    show_json,
    task_of,
    tracked,
    typed,
)
from mta.system.extras import require

if TYPE_CHECKING:
    from mta.bank.bank import Bank
    from mta.config import Run
    from mta.config.loader import Settings
    from mta.data.history import Person
    from mta.distributed.executor import Executor
    from mta.model.base import BaseModel
    from mta.system.progress import OnStep
    from mta.tracking.run_folder import RunFolder
    from mta.tracking.trackers import Track as Opener

S = TypeVar("S", bound="Settings")
RUN_SETTINGS = MERGE_AND_STACK | MACHINE_SETTINGS
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="YAML file with settings of evaluation, merge and stack.", dir_okay=False),
]
Predictions = Annotated[
    Path | None, typer.Option(help="Score this file of answers, and compute nothing else.", dir_okay=False)
]

Out = Annotated[Path | None, typer.Option(help="Folder for report.html, results.json and the run's settings.")]
Data = Annotated[str | None, typer.Option(help="People of a recipe: LaMP files, or any other source.")]
Exhibit = Annotated[list[str] | None, typer.Option(help="Run only this exhibit of a recipe; can be repeated.")]
On = Annotated[str, typer.Option(help="People to run a recipe on: test or development.")]
Attack = Annotated[bool, typer.Option("--privacy", help="Attack the bank: do losses reveal its training items?")]
Task = Annotated[str | None, typer.Option(help="Task of --predictions; otherwise the bank's task is used.")]
People = Annotated[int | None, typer.Option(min=1, help="Evaluate at most this many people, drawn with the seed.")]


def evaluate(
    source: Source,
    words: Words = None,
    bank: BankDir = Path("bank"),
    out: Out = None,
    config: ConfigFile = None,
    predictions: Predictions = None,
    data: Data = None,
    exhibit: Exhibit = None,
    on: On = "test",
    privacy: Attack = False,
    task: Task = None,
    people: People = None,
    seed: Seed = None,
    device: Device = None,
    skip_bad: SkipBad = None,
    cluster: ClusterAt = None,
    workers: Workers = None,
    track: Track = None,
    json: Json = False,
) -> None:
    """Compare MTA with constants, the base, the task LoRA, OPPU, merge only and adapt only.

    SOURCE holds people to test on a bank; each is personalized anew from their shots. People in the bank, and people
    with fewer than shots + queries items, are left out. key=value sets the evaluation (shots=4 queries=10) and
    overrides merge.…, stack.…, memory and dtype of the bank.
    Or SOURCE is a recipe (lamp1 … lamp7, movielens, or a .yaml file): an experiment that builds its own banks and runs
    all methods and the paper's exhibits. An interrupted experiment resumes. Draw its exhibits with mta report.
    With --predictions, a file of answers in LaMP's format is scored as in the benchmark, and nothing is computed.
    With --privacy, the bank, its merges and personal models are attacked: does the loss separate their training items
    from other items? SOURCE then holds the people of the bank and other people; shots=8 targets=16 items=16.

    Example:  mta evaluate lamp3 --data LaMP_3/dev_questions.json --out runs/lamp3 --exhibit main
    Example:  mta evaluate newcomers.jsonl --bank bank/ --out results/ shots=8 queries=12 merge.policy=ridge
    Example:  mta evaluate everybody.jsonl --bank bank/ --privacy --out privacy/
    Example:  mta evaluate dev_outputs.json --predictions mine.json --task lamp3
    """
    require("eval")  # before a model is loaded
    if predictions:
        return _score(source, predictions, task, words, json)
    if _is_recipe(source) and not privacy:
        folder = out or Path("runs") / Path(source).stem
        with executor_at(cluster, workers) as executor:
            return _experiment(source, words, folder, data, exhibit, on, executor, track, json)
    from mta.errors import InputError

    if cluster or workers:
        raise InputError(
            "--cluster and --workers are for recipes", hint="Leave them out: a comparison runs in one process."
        )
    if task:
        raise InputError(
            "--task belongs to --predictions; a comparison uses the task of its bank", hint="Leave --task out."
        )
    asked = Asked(source, words or [], bank, out, config, seed, device, skip_bad, tracked(track, out), json)
    _attack(asked, people) if privacy else _compare(asked, people)


@dataclass(frozen=True, slots=True)
class Asked:
    """Arguments of a comparison on a bank, or of an attack on it."""

    source: str
    words: list[str]
    bank: Path
    out: Path | None
    config: Path | None
    seed: int | None
    device: str | None
    skip_bad: Path | None
    track: Opener | None
    json: bool

    def people(self) -> list[Person]:
        """Read the people. Call this before a model is loaded, so that a bad file fails early."""
        return people_in(self.source, task_of(self.bank), self.skip_bad)

    def opened(self, kind: type[S]) -> tuple[BaseModel, Bank, Run, S]:
        """Return base, bank, the settings of the run (over the bank's), and the settings of class ``kind``."""
        from mta.config import load_settings
        from mta.config.loader import read_yaml

        in_file = (read_yaml(self.config) if self.config else {}).items()
        run_words = [f"{key}={dumps(value)}" for key, value in in_file if key in RUN_SETTINGS]
        run_words += [word for word in self.words if re.split("[.=]", word)[0] in RUN_SETTINGS]
        chosen = load_settings(
            kind, self.config, [word for word in self.words if word not in run_words], beside=RUN_SETTINGS
        )
        return *open_bank(self.bank, run_words, self.seed, self.device, open_to=MERGE_AND_STACK), chosen

    def kept(self, kind: str, base: BaseModel, bank: Bank, run: Run, chosen: Settings, on_step: OnStep) -> RunFolder:
        """Return the folder of this run. Its config.yaml can be given back with --config."""
        settings = chosen.model_dump(mode="json") | base.as_loaded(run).model_dump(
            mode="json", include=set(RUN_SETTINGS)
        )
        return kept_over(kind, base, bank, settings, self.out, track=self.track, on_step=on_step)


def _compare(asked: Asked, people: int | None) -> None:
    from mta.cli.screen import Screen, console
    from mta.config import Evaluation
    from mta.evaluation.compare import study
    from mta.evaluation.reports.html import to_json
    from mta.evaluation.reports.tables import show

    people_given = asked.people()
    base, bank, run, chosen = asked.opened(Evaluation)
    with Screen() as screen, asked.kept("comparison", base, bank, run, chosen, screen.step) as kept:
        found = study(base, bank, run, people_given, chosen, limit=people, on_step=kept.step, on_method=screen.say)
        kept.outcome = found.outcome()
        if asked.out:
            found.write(asked.out, typed())
    if asked.json:
        show_json(to_json(found.comparison, **found.meta, command=typed()))
    else:
        show(found.comparison, found.meta, found.questions, console)


def _attack(asked: Asked, people: int | None) -> None:
    from mta.cli.screen import Screen, console
    from mta.config import Privacy
    from mta.errors import InputError
    from mta.evaluation.privacy.report import show, to_json, write
    from mta.evaluation.privacy.runner import privacy

    if people or _is_recipe(asked.source):
        raise InputError(
            "--privacy takes people and a bank, no recipe and no --people", hint="For fewer people: targets=8."
        )
    people_given = asked.people()
    base, bank, run, chosen = asked.opened(Privacy)
    with Screen() as screen, asked.kept("privacy", base, bank, run, chosen, screen.step) as kept:
        found = privacy(base, bank, run, people_given, chosen, on_step=kept.step, say=screen.say)
        kept.outcome = found.outcome()
        if asked.out:
            write(found, asked.out, typed())
    show_json(to_json(found, command=typed())) if asked.json else show(found, console)


def _is_recipe(source: str) -> bool:
    from mta.evaluation.experiments.recipe import names

    return Path(source).suffix in (".yaml", ".yml") or (source in names() and not Path(source).exists())


def _experiment(
    name: str,
    words: list[str] | None,
    out: Path,
    data: str | None,
    exhibits: list[str] | None,
    on: str,
    executor: Executor,
    track: str | None,
    json: bool,
) -> None:
    from mta.cli.screen import Screen
    from mta.config import override
    from mta.errors import InputError
    from mta.evaluation.experiments.recipe import Which, load_experiment, wanted
    from mta.evaluation.experiments.runner import run_experiment
    from mta.evaluation.experiments.workspace import Workspace

    if on not in ("test", "development"):
        raise InputError(
            f"--on is {on!r}; expected test or development",
            hint="Leave --on out for test people, or give  --on development",
        )
    opened = tracked(track, out)
    recipe = override(load_experiment(name), words or [])
    which: Which = "test" if on == "test" else "development"
    wanted(recipe, which, exhibits or ())  # before anything is written or loaded
    with Screen() as screen:
        workspace = Workspace.open(recipe, out, data, which, say=screen.say, executor=executor, on_step=screen.step)
        run_experiment(workspace, exhibits or (), typed(), opened)
    if json:
        return show_json({"out": str(workspace.folder), "sizes": workspace.participants.sizes})
    typer.echo(f"Draw the exhibits with:  mta report {workspace.folder}", err=True)


def _score(source: str, predictions: Path, task: str | None, words: list[str] | None, json: bool) -> None:
    from mta.data.readers import read_answers
    from mta.data.tasks import load_task
    from mta.errors import InputError
    from mta.evaluation.lamp_scores import score
    from mta.system.assets import resolve

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
