"""``mta demo``: run the whole method on MovieLens, from open weights to a report, with a recipe that can be copied."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field

from mta.bank.bank import Bank
from mta.config import CompareSettings, Run, override
from mta.config.constants import COMPUTED_WITH
from mta.config.loader import Settings, checked, dump_yaml, read_yaml
from mta.data.history import Person
from mta.data.readers import read_people
from mta.data.splits import Splits, draw
from mta.data.tasks.load import load_task
from mta.errors import ConfigError, InputError, MtaError
from mta.evaluation.compare import ComparisonReport, compare
from mta.evaluation.sample_answers import sample_answers
from mta.model.base import BaseModel
from mta.model.encoders import ENCODING
from mta.personalize import Personalizer
from mta.personalize.merge import check_merge
from mta.system import assets
from mta.system.atomic import write_text
from mta.system.device import gemm_rate, pick_device
from mta.system.progress import OnStep, Step
from mta.tools.cost import planned
from mta.tracking.run_folder import RunFolder
from mta.tracking.trackers import Track

TRUSTED = 1.5  # minutes of expected work after which only the measured pace counts: loading says little about training
_FEWER = "Ask for fewer people (people.test=16), or for fewer items of each: evaluation.shots=4 evaluation.queries=4"
RECIPE = "recipe.yaml"  # the settings that were chosen, in the demo's folder
SLOW = 800e9  # operations per second; slower machines run a version with fewer steps

OnTime = Callable[[float, float], None]
"""Called with the share of the demo that is done, and the seconds that are left."""


class PartSizes(Settings):
    """Number of people in each part; the rest are candidates for anchors."""

    task: int
    development: int
    test: int


class DemoRecipe(Settings):
    """A demo in one file: data, people, settings, and two lists of settings that replace some of them.

    ``short`` is for the version of a few minutes, and ``slow``, on top, for slow machines. ``minutes`` is what the
    stages of the short version take; after the first of them only their proportions count.
    """

    data: str
    people: PartSizes
    run: Run
    evaluation: CompareSettings
    minutes: dict[str, Annotated[float, Field(gt=0)]] = Field(min_length=2)
    short: tuple[str, ...] = ()
    slow: tuple[str, ...] = ()


class Clock:
    """Estimates the time left, from the minutes that stages are expected to take and the time that passed.

    In the first ``TRUSTED`` minutes of expected work, the part that is not done yet counts at the expected pace.
    The first stage reports no steps. Steps with other names than those of stages belong to the last stage, which is
    expected to go at the pace of all stages before. Stages that a resumed demo skips do not count.
    """

    def __init__(self, minutes: Mapping[str, float], on_time: OnTime) -> None:
        self._minutes, self._on_time, self._start = dict(minutes), on_time, time.monotonic()
        self._begun: dict[str, float] = {}

    def begin(self) -> None:
        """Report the time that all stages are expected to take."""
        self._on_time(0.0, 60 * sum(self._minutes.values()))

    def step(self, stage: str, step: Step) -> None:
        """Report the time left after a step of a stage."""
        if stage == ENCODING:  # takes seconds, before the first stage
            return
        stages, now = list(self._minutes), time.monotonic()
        stage = stage if stage in stages[1:] else stages[-1]
        earlier = stages[: stages.index(stage)]
        if stage not in self._begun:
            self._begun[stage] = now
            self._minutes |= {name: 0.0 for name in earlier[1:] if name not in self._begun}
        before, own = sum(self._minutes[name] for name in earlier), self._minutes[stage]
        if stage == stages[-1]:
            pace = (self._begun[stage] - self._start) / before
            done = before + min((now - self._begun[stage]) / pace, own)
        else:
            done = before + own * step.examples / max(step.examples_total, 1)
            untried = max(TRUSTED - done, 0.0)
            pace = (now - self._start + 60 * untried) / (done + untried)
        total = sum(self._minutes.values())
        self._on_time(done / total, (total - done) * pace)


def load_demo(name: str | Path) -> DemoRecipe:
    """Return a recipe of the package by name, or any recipe by path. Raises ConfigError."""
    packaged = Path(str(resources.files("mta"))) / "recipes" / f"{name}.yaml"
    path = Path(name) if str(name).endswith((".yaml", ".yml")) else packaged
    if not path.is_file():
        raise ConfigError(f"no recipe {str(name)!r}", hint="Give the path of a .yaml, or: movielens")
    return checked(DemoRecipe, read_yaml(path), f"recipe {name}")


def demo(
    out: Path,
    recipe: DemoRecipe,
    command: str,
    words: Sequence[str] = (),
    *,
    full: bool = False,
    on_step: OnStep = lambda stage, step: None,
    on_time: OnTime = lambda share, left: None,
    say: Callable[[str], None] = lambda _: None,
    track: Track | None = None,
) -> ComparisonReport:
    """Build a bank, evaluate, personalize, and write a report under ``out``; a stopped demo resumes.

    ``words`` are settings that override the recipe and its short version; ``full`` takes the recipe as it is.
    ``track`` opens an additional tracker of steps. Raises ConfigError if ``out`` holds a demo with other settings.
    """
    fresh = not (out / RECIPE).exists()
    recipe = _settled(out, recipe, words, full, say)
    clock, run = Clock(recipe.minutes, on_time), recipe.run
    if fresh and not full:  # other versions take longer, and stopped demos have less to do
        clock.begin()

    def step(stage: str, step: Step) -> None:
        on_step(stage, step)
        clock.step(stage, step)

    say(f"1/4  assets: {run.base}, {run.encoder}, {recipe.data}")
    for name in (run.base, run.encoder, recipe.data):
        if name in assets.ASSETS:
            assets.fetch(name, say)
    people = read_people(assets.resolve(recipe.data), run.task)
    sizes, evaluation = recipe.people.model_dump(), recipe.evaluation
    try:
        splits = draw(people, run.seed, **sizes, min_items=evaluation.shots + evaluation.queries)
    except InputError as error:
        raise InputError(error.message, hint=_FEWER) from None
    base = BaseModel.of(run)
    with RunFolder(
        folder=out,
        kind="demo",
        base=base,
        settings=recipe.model_dump(mode="json"),
        config=False,
        command=command,
        track=track,
        on_step=step,
        about={"seeds": [run.seed]},
    ) as folder:
        check_merge(planned(run).merge, run.bank.anchors, load_task(run.task).labelled, run.calibration.enabled)
        splits.save(out / "splits.json")  # only now: a mistake must not fix the folder's splits
        folder.begin()  # locks the folder
        write_text(out / RECIPE, dump_yaml(recipe))
        try:
            found = _compared(out, recipe, people, splits, base, folder.step, say)
        except MtaError:
            if fresh and not (out / "bank").exists():  # too little memory, or too few people: other settings may follow
                for name in ("splits.json", RECIPE):
                    (out / name).unlink()
            raise
        two = _two(found)
        say("4/4  the same questions for two people, before and after")
        personal = Personalizer(base, found.panel.bank, out / "people", run=run)
        personal.personalize([found.panel.people[i] for i in two], on_step=folder.step)
        if questions := personal.bank.task.examples[:3]:
            found.samples = sample_answers(personal, [found.panel.people[i] for i in two], questions)
        folder.outcome = found.outcome()
        found.write(out, command)
    return found


def next_commands(out: Path, found: ComparisonReport) -> list[str]:
    """Return commands to go on with, in the order in which a newcomer may want them.

    A line above each command says what it does: a comment after the command is an error in interactive zsh.
    """
    bank, store, report = (shlex.quote(str(out / name)) for name in ("bank", "people", "report.html"))
    lines = ["Compare a person's model with the others, at http://127.0.0.1:8000:"]
    lines += [f"  mta serve --bank {bank} --store {store} --insecure-local"]
    lines += [f"Open {report} in a browser (pictures, every number):"]
    lines += [f"  {'open' if sys.platform == 'darwin' else 'xdg-open'} {report}"]
    activate = Path(sys.executable).with_name("activate")
    if shutil.which("mta") is None and activate.is_file():  # called by its path, as make demo does
        lines = ["Once in each terminal:", f"  . {shlex.quote(os.path.relpath(activate))}", *lines]
    if found.samples:
        person = shlex.quote(found.samples.people[0].id)
        lines += [
            "Show all that is stored about a person:",
            f"  mta person show {person} --bank {bank} --store {store}",
        ]
    return lines


def _compared(
    out: Path,
    recipe: DemoRecipe,
    people: list[Person],
    splits: Splits,
    base: BaseModel,
    on_step: OnStep,
    say: Callable[[str], None],
) -> ComparisonReport:
    """Build the bank, and compare the methods on people outside the bank."""
    run = recipe.run
    pooled = len(splits.task) + (len(splits.candidates) if run.task_lora.kept_back else 0)
    parts = f"task LoRA on {pooled} people, {run.bank.anchors} anchors of {len(splits.candidates)} candidates"
    say(f"2/4  bank: {parts}")
    task_people, candidates = splits.select("task", people), splits.select("candidates", people)
    bank = Bank.build(base, candidates, out / "bank", task=run.task, run=run, task_people=task_people, on_step=on_step)

    say(f"3/4  {len(splits.test)} people outside the bank, {recipe.evaluation.shots} shots each, every method")
    tested = splits.select("test", people)
    found = compare(
        base, bank, tested, recipe.evaluation, run=run, on_step=on_step, on_method=lambda m: say(f"     {m}")
    )
    found.meta["data"] = recipe.data
    if recipe.data in assets.ASSETS:
        found.meta["terms"] = assets.ASSETS[recipe.data].note
    return found


def _settled(out: Path, recipe: DemoRecipe, words: Sequence[str], full: bool, say: Callable[[str], None]) -> DemoRecipe:
    """Return the version of the recipe to run, with ``words`` applied; a resumed demo keeps its first choice."""
    whole = override(recipe, words)
    short = override(recipe, [*recipe.short, *words])
    slow = override(recipe, [*recipe.short, *recipe.slow, *words])
    path = out / RECIPE
    if path.is_file():
        begun, unused = load_demo(path), {"run": set(COMPUTED_WITH)}
        for chosen in (whole,) if full else (short, slow):
            if chosen.model_dump(exclude=unused) == begun.model_dump(exclude=unused):
                return chosen
        raise ConfigError(f"{out} holds a demo with other settings ({path})", hint="Choose another folder with --out.")
    return _for_this_machine(whole if full else short, whole if full else slow, say)


def _for_this_machine(usual: DemoRecipe, slow: DemoRecipe, say: Callable[[str], None]) -> DemoRecipe:
    if pick_device(usual.run.device).type != "cpu":
        return usual
    rate = max(gemm_rate(torch.bfloat16), gemm_rate(torch.float32))
    chosen = slow if rate < SLOW else usual
    fewer = "" if chosen == usual else f": fewer steps ({', '.join(slow.slow)})"
    say(f"This machine reaches {rate / 1e9:.0f} GFLOP/s{fewer}.")
    return chosen


def _two(found: ComparisonReport) -> list[int]:
    """Return two people: those with the lowest and highest mean rating in their shots, or the first and the last."""
    task, people = found.panel.bank.task, found.panel.people
    order = list(range(len(people)))
    if task.metric == "mae":
        order.sort(key=lambda i: sum(float(task.target(item)) for item in people[i].items) / len(people[i].items))
    return sorted({order[0], order[-1]}, key=order.index)
