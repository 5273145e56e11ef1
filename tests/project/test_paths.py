"""The architecture page lists the functions that pass people on, from a command to a state or to the trainer."""

import re
import sys
from pathlib import Path

from conftest import TINY_RUN, HashEncoder, people_of
from tiny import base_of

import mta
from mta.config import override
from mta.personalize import Personalizer

ROOT = Path(__file__).parents[2]
CODE = f"{ROOT / 'src' / 'mta'}/"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
TABLES = re.findall(r"\| step \| functions \|\n\|---\|---\|\n((?:\|.*\n)+)", PAGE)
PATHS = dict(zip(("personalize", "build"), TABLES, strict=True))


def listed(path: str) -> set[tuple[str, str]]:
    """File and name of each function on one path of the page; of ``Session`` it is ``save``."""
    pairs = re.findall(r"`([\w/]+\.py)` \(([^)]+)\)", PATHS[path])
    return {(file, name) for file, names in pairs for name in re.findall(r"\w+", names)}


def passing_through(work, ends: set[str]) -> set[tuple[str, str]]:
    """File and name of each function that is running whenever one of ``ends`` is called."""
    seen = set()

    def note(frame, event, _):
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(CODE) or code.co_qualname not in ends:
            return
        while frame:
            code, frame = frame.f_code, frame.f_back
            if code.co_filename.startswith(CODE) and not code.co_name.startswith("<"):
                whole = code.co_qualname.partition(".<locals>")[0]
                name = whole.removesuffix(".save").split(".")[-1]
                seen.add((code.co_filename.removeprefix(CODE), name))

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return seen


def test_the_page_lists_what_passes_people_on_to_their_states(trusting, tmp_path):
    run = override(TINY_RUN, ["merge.policy=laplace"])
    personal = Personalizer(*trusting, tmp_path / "people", run=run, encoder=HashEncoder())
    ends = {"train_loras", "gate_gradients", "Session.save", "plan_cohorts", "Pipeline._stored", "Stages.losses"}
    seen = passing_through(lambda: personal.personalize(people_of(3)), ends)
    assert {("store/store.py", "Session")} <= seen <= listed("personalize")
    assert len(listed("personalize")) <= 28


def test_the_page_lists_what_passes_people_on_to_the_trainer(tmp_path):
    def build():
        mta.Bank.build(base_of(), people_of(24), tmp_path, task="movielens-rating", run=run, encoder=HashEncoder())

    run = override(TINY_RUN, ["calibration.enabled=false"])
    seen = passing_through(build, {"train_loras", "encode_people", "select_anchors", "pooled_items"})
    assert {("training/trainer.py", "train_loras")} <= seen <= listed("build")
    assert len(listed("build")) <= 25
