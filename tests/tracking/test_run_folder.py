"""A run's folder: it says what was asked and how it went, whoever dies meanwhile, and says nothing of anybody."""

import json
import os
import re
import signal

import kill
import pytest
import yaml
from conftest import TINY_RUN
from tiny import base_of

from mta.config import Run
from mta.errors import DataError, InputError
from mta.system.atomic import json_sha256
from mta.system.progress import Step
from mta.tracking.run_folder import RunFolder, lines, seconds_of, sittings

SETTINGS = TINY_RUN.model_dump(mode="json")


def kept(folder, **more):
    return RunFolder(folder=folder, base=base_of(), settings=SETTINGS, **{"kind": "personalize"} | more)


def steps(run, stage="stack", count=3, people=2):
    for n in range(1, count + 1):
        run.step(stage, Step(n, people, n * people, count * people, 1.0 / n))


def stopped(error, folder, count=3, **more):
    """A run that an error ends after some steps."""
    with kept(folder, **more) as run:
        steps(run, count=count)
        raise error


# what is kept


def test_a_run_records_command_settings_and_machine(tmp_path):
    about = {"seeds": [0], "plan": "abc"}
    with kept(tmp_path, command="mta personalize", about=about) as run:
        steps(run)
        run.outcome = {"trained": 2}
    (one,) = sittings(tmp_path)
    assert (one["kind"], one["command"], one["seeds"], one["plan"]) == ("personalize", "mta personalize", [0], "abc")
    assert (one["device"], one["dtype"], one["base"]) == ("cpu", "float64", "tiny-llama")
    assert one["versions"].keys() == {"merge-then-adapt", "torch", "transformers", "python"}
    assert one["settings"] == SETTINGS
    assert one["outcome"] == {"trained": 2}
    assert one["begun"]
    assert one["ended"]
    assert one["hours"] is not None
    assert one["stopped"] == ""
    assert one["threads"] >= 1
    assert Run.model_validate(yaml.safe_load((tmp_path / "config.yaml").read_text())) == TINY_RUN


def test_every_step_is_a_line(tmp_path):
    with kept(tmp_path) as run:
        steps(run)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    named = [(row["stage"], row["step"], row["people"], row["examples"]) for row in rows]
    assert named == [("stack", n, 2, 2 * n) for n in (1, 2, 3)]
    assert [row["loss"] for row in rows] == [1.0, 0.5, 1 / 3]
    assert all(row["seconds"] >= 0 for row in rows)


def test_without_a_folder_nothing_is_written_and_callbacks_are_still_called():
    reported = []
    with kept(None, on_step=lambda stage, step: reported.append((stage, step.step))) as run:
        steps(run)
    assert reported == [("stack", 1), ("stack", 2), ("stack", 3)]


def test_a_mistake_before_the_first_step_leaves_nothing(tmp_path):
    with pytest.raises(InputError):
        stopped(InputError("nobody can be tested", "Give more people."), tmp_path / "run", 0)
    assert not (tmp_path / "run").exists()


# who stops, and who dies


def test_a_run_that_goes_on_has_several_sittings_and_one_metrics_file(tmp_path):
    how = {"work": json_sha256(["the same"])}
    with pytest.raises(KeyboardInterrupt):
        stopped(KeyboardInterrupt(), tmp_path, 2, **how)
    with kept(tmp_path, **how) as run:
        steps(run, count=1)
        run.outcome = {"trained": 2}
    first, second = sittings(tmp_path)
    assert (first["stopped"], second["stopped"]) == ("KeyboardInterrupt", "")
    assert (first["outcome"], second["outcome"]) == ({}, {"trained": 2})
    assert first["work"] == second["work"]
    assert len(list(lines(tmp_path, first["work"]))) == 3


def test_a_run_of_another_kind_does_not_replace_the_files_of_the_first(tmp_path):
    with kept(tmp_path, kind="comparison") as run:
        steps(run)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(DataError, match="kind 'comparison'; one of kind 'privacy' would replace"):
        kept(tmp_path, kind="privacy").__enter__()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_text_of_an_error_is_not_kept(tmp_path):
    with pytest.raises(DataError):
        stopped(DataError("ann-quispe has no item", "Give her one."), tmp_path)
    assert sittings(tmp_path)[0]["stopped"] == "DataError"
    assert not any(b"quispe" in path.read_bytes() for path in tmp_path.iterdir())


@pytest.mark.parametrize(("name", "text"), [("run.json", '{"mine": 1}'), ("config.yaml", "lr: 1  # mine")])
def test_what_is_not_ours_is_not_written_over(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError), kept(tmp_path) as run:
        steps(run)
    assert (tmp_path / name).read_text() == text


def test_a_run_that_died_has_no_end(tmp_path):
    def dying():
        with kept(tmp_path) as run:
            steps(run)
            os.kill(os.getpid(), signal.SIGKILL)

    assert kill._attempt(dying) == -signal.SIGKILL
    (one,) = sittings(tmp_path)
    assert (one["ended"], one["hours"]) == (None, None)
    with kept(tmp_path) as run:
        steps(run)
    assert [bool(one["ended"]) for one in sittings(tmp_path)] == [False, True]


@pytest.mark.parametrize("write", range(1, 5))
def test_a_run_that_was_killed_as_it_began_goes_on(tmp_path, write):
    assert kill._attempt(kept(tmp_path).begin, write=write) == -signal.SIGKILL
    with kept(tmp_path) as run:
        steps(run)
    assert sittings(tmp_path)[-1]["ended"]
    assert (tmp_path / "config.yaml").exists()


def test_a_line_that_a_kill_has_torn_is_passed_over(tmp_path):
    with kept(tmp_path, work="w" * 12) as run:
        steps(run)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "st')
    assert len(list(lines(tmp_path, "w" * 12))) == 3
    with kept(tmp_path, work="w" * 12) as run:
        steps(run)
    assert len(list(lines(tmp_path, "w" * 12))) == 6  # the next line is whole
    assert seconds_of(tmp_path, "w" * 12).keys() == {"stack"}
    assert seconds_of(tmp_path, "another") == {}


@pytest.mark.parametrize("text", ["[", "[]", '{"sittings": [1]}'])
def test_a_foreign_run_file_is_an_error(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(
        DataError, match=f"^{re.escape(str(tmp_path))}/run.json is not a description of a run: .*\n  Move"
    ):
        sittings(tmp_path)
