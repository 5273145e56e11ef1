"""``mta demo --me``: your model against everybody's and another person's, on your own later answers."""

import json

import pytest
from conftest import people_of
from tiny import save_base

from mta.errors import InputError
from mta.evaluation.reports.summary import OTHER, OURS, POOLED
from mta.tools import demo as tool
from mta.tools.me import ask_me, in_words

TITLES = [f"Film {n}" for n in range(6)]
TASK = """
name: stars
description: How many stars a person gives
item: {prompt: "Stars for {title}:", target: rating}
text: "{title}"
labels: ["1", "2", "3", "4", "5"]
metric: mae
examples:
""" + "".join(f"  - {{title: {title}}}\n" for title in TITLES)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("me")
    save_base(folder / "base")
    (folder / "stars.yaml").write_text(TASK)
    rows = [{"person": p.id, "time": item.time, **item.fields} for p in people_of(40, items=9) for item in p.items]
    (folder / "people.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = {"run.base": folder / "base", "run.task": folder / "stars.yaml", "data": folder / "people.jsonl"}
    words = [f"{key}={value}" for key, value in names.items()] + ["run.encoder=base", "run.dtype=float32"]
    words += ["people={test: 4, development: 0, task: 8}", "evaluation={shots: 3, queries: 2, brief: true}"]
    words += ["run.bank={min_items: 3, anchors: 2, choose: active}", "run.calibration.enabled=false"]
    words += ["run.task_lora={items: 8, training: {steps: 1}}", "run.merge.policy=posterior", "run.memory=64MiB"]
    tool.demo(folder / "demo", tool.load_demo("movielens"), "", words, full=True)
    return folder / "demo"


def answering(answers, asked):
    left = iter(answers)
    return lambda question, labels: asked.append((question, labels)) or next(left, None)


def test_later_answers_stand_beside_three_predictions(finished):
    asked, said = [], []
    found = ask_me(finished, answering("513524", asked), said.append)
    assert [question for question, _ in asked] == [f" {n}/6  {title}" for n, title in enumerate(TITLES, 1)]
    assert {labels for _, labels in asked} == {("1", "2", "3", "4", "5")}
    assert found.shots == (("Film 0", "5"), ("Film 1", "1"), ("Film 2", "3"))
    assert found.questions == ("Film 3", "Film 4", "Film 5")
    assert found.golds == ("5", "2", "4")
    assert list(found.answers) == [POOLED, OURS, OTHER]
    assert all(len(own) == 3 and abs(sum(own[0].values()) - 1) < 1e-6 for own in found.answers.values())
    assert "Your model is made" in said[-1]
    assert f"{found.error(OURS):.2f}" in in_words(found)
    assert not [path for path in finished.rglob("*") if "you" in path.name]


@pytest.mark.parametrize(("answers", "predicted"), [("", 0), ("513", 0), ("5135", 1)])
def test_a_person_may_stop_at_any_question(finished, answers, predicted):
    found = ask_me(finished, answering(answers, []), lambda _: None)
    assert len(found.questions if found else ()) == predicted


def test_without_a_demo_the_message_says_how_to_make_one(tmp_path):
    with pytest.raises(InputError) as caught:
        ask_me(tmp_path, answering("", []), lambda _: None)
    assert f"mta demo --out {tmp_path}" in caught.value.hint
