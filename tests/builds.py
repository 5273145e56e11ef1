"""Small banks for tests, and what their folders hold."""

from pathlib import Path

from conftest import TINY_RUN, HashEncoder, people_of, stopped_when
from tiny import base_of

from mta.bank.build import build_bank
from mta.bank.context import Build
from mta.bank.format import read_info
from mta.config import Run
from mta.data.tasks import load_task

TASK_PEOPLE, CANDIDATES = people_of(4, prefix="somebody-t"), people_of(12, prefix="somebody-c")


def build(out: Path, task_people=TASK_PEOPLE, candidates=CANDIDATES, run: Run = TINY_RUN, encoder=None, **how) -> Path:
    task = load_task("movielens-rating")
    build_bank(Build(base_of(), task, encoder or HashEncoder(), task_people, candidates, run, out, **how))
    return out


def stopped(out: Path, stage: str = "anchors", at: int = 1, **how) -> None:
    """Stop a build at a step of a stage."""
    with stopped_when(lambda name, step: (name, step.step) == (stage, at)) as stop:
        build(out, on_step=stop, **how)


def changed(group: str, run: Run = TINY_RUN, **values) -> Run:
    return run.model_copy(update={group: getattr(run, group).model_copy(update=values)})


UNCALIBRATED = changed("calibration", enabled=False)  # most of the time of a build


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def trained(folder: Path) -> dict[str, bytes]:
    """The files that the bank's hash covers, apart from the description."""
    return {name: data for name, data in files_in(folder).items() if name in read_info(folder).files}
