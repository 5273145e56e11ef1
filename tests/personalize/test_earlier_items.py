"""A bank whose prompts show a person's earlier items: from its training to its answers."""

import logging
from collections import Counter
from dataclasses import replace

import pytest
import torch
from builds import build, changed
from conftest import TINY_RUN, HashEncoder, people_of, personalizer
from crowd import PEOPLE, QUESTION
from tiny import base_of

from mta import TASK
from mta.bank.calibration.people import subjects_of
from mta.bank.context import BuildContext
from mta.config import CompareSettings, MergeSettings
from mta.data.earlier import in_words, with_history
from mta.data.history import PROFILE, Person
from mta.data.tasks import load_task
from mta.evaluation.compare import compare
from mta.store import Store
from mta.tools.predict import predict

SHOWN = 2
RUN = changed("task_lora", history=SHOWN)


@pytest.fixture
def jobs(monkeypatch):
    made, plain = {}, BuildContext.job
    monkeypatch.setattr(BuildContext, "job", lambda self, key, *of: made.update({key: of[0]}) or plain(self, key, *of))
    return made


@pytest.fixture
def world(tiny):
    return showing(*tiny)


def showing(base, bank):
    return base, replace(bank, info=bank.info.model_copy(update={"run": RUN}))


def counts(items):
    return Counter(item.fields.get(PROFILE, "").count(" stars for ") for item in items)


def test_a_build_trains_on_prompts_with_earlier_items(tmp_path, jobs):
    build(tmp_path / "bank", run=changed("calibration", RUN, enabled=False))
    assert len(counts(jobs["task"])) == SHOWN + 1
    anchors = [items for key, items in jobs.items() if key.startswith("anchor")]
    assert all(set(counts(items)) <= {0, 1, 2} and counts(items)[2] for items in anchors)


def test_candidates_show_nothing_that_they_keep_back(tmp_path, jobs):
    candidates = people_of(12, items=9, prefix="c")
    run = changed("calibration", changed("task_lora", RUN, unseen=4, items=400), enabled=False)
    build(tmp_path / "bank", task_people=[], candidates=candidates, run=run)
    trained = {item.fields["title"] for key, items in jobs.items() if key.startswith("anchor") for item in items}
    others = [one for one in candidates if not trained & {item.fields["title"] for item in one.items[-4:]}]
    hidden = {item.fields["title"] for one in others for item in one.items[:4]}
    hidden -= {item.fields["title"] for one in candidates for item in one.items if one not in others}
    texts = " ".join(item.fields.get(PROFILE, "") for item in jobs["task"])
    assert hidden
    assert not [title for title in hidden if f'"{title}"' in texts]


def test_a_calibration_asks_as_newcomers_are_asked():
    base, run = base_of(), changed("task_lora", changed("calibration", shots=4, queries=3), history=3)
    (person,), task = people_of(1, items=20), load_task("movielens-rating")
    (found,) = subjects_of(base, task, [person], run)
    shots = person.items[:4]
    shown = with_history(task, Person("", shots, person.items[4:7]), 3)
    assert found.shots == tuple(base.prompts.example(task, item) for item in shown.items)
    assert found.queries[0] == base.prompts.example(task, shown.queries[0])
    assert all(query.fields[PROFILE] == in_words(task, shots[-3:]) for query in shown.queries)


@pytest.mark.parametrize("policy", ["posterior", "laplace"])
def test_a_model_is_made_from_prompts_with_earlier_items(trusting, policy):
    """As from the same prompts written out by hand; and an update equals a new beginning."""
    world, merge, asked = showing(*trusting), MergeSettings(policy=policy, k=0), trusting[1].task
    found, plain = personalizer(*world, merge=merge), personalizer(*trusting, merge=merge)
    found.personalize(PEOPLE)
    plain.personalize([with_history(asked, person, SHOWN) for person in PEOPLE])
    without = personalizer(*trusting, merge=merge)
    without.personalize(PEOPLE)
    for person in PEOPLE:
        one, other = found.state(person.id), plain.state(person.id)
        assert one.w == pytest.approx(other.w, rel=0, abs=1e-12)
        for name, tensor in one.stack.tensors().items():
            torch.testing.assert_close(tensor, other.stack.tensors()[name], rtol=0, atol=1e-12)
        assert one.history == person.digest()
    assert found.state("x2").w != without.state("x2").w
    grown = personalizer(*world, merge=merge)
    grown.personalize([person.first(1) for person in PEOPLE])
    grown.update(PEOPLE)
    for person in PEOPLE:
        assert grown.state(person.id).w == pytest.approx(found.state(person.id).w, rel=0, abs=1e-9)


def test_answers_come_behind_the_items_that_the_store_keeps(world, tmp_path, caplog):
    personal = personalizer(*world, store=tmp_path / "people")
    personal.personalize(PEOPLE, histories=PEOPLE[:4])
    task, person = personal.bank.task, PEOPLE[2]
    text = in_words(task, person.items[-SHOWN:])
    by_hand = QUESTION | {PROFILE: text}
    assert text.count(" stars for ") == SHOWN
    with caplog.at_level(logging.WARNING, "mta"):
        assert personal.score([("x2", QUESTION, "4")]) == personal.score([("x2", by_hand, "4")])
        assert personal.generate([("x2", QUESTION)]) == personal.generate([("x2", by_hand)])
        assert not caplog.messages
        last = personal.score([("x4", QUESTION, "4")])
    assert "none are kept of 1 of 1 people" in caplog.text
    assert last == personal.score([("x4", QUESTION | {PROFILE: ""}, "4")])
    assert personal.score([(TASK, QUESTION, "4")]) == personal.score([(TASK, QUESTION | {PROFILE: ""}, "4")])
    shares = personal.shares([("x2", QUESTION)])
    assert shares == personal.shares([("x2", by_hand)]) != personal.shares([("x2", QUESTION | {PROFILE: ""})])
    personal.forget("x2")
    assert personal.earlier("x2") == ()


def test_without_a_store_the_items_stay_in_memory(world):
    personal = personalizer(*world)
    personal.personalize(PEOPLE)
    assert [*personal.earlier("x2")] == [*PEOPLE[2].items[-SHOWN:]]
    personal.forget("x2")
    assert personal.earlier("x2") == ()


def test_the_pooled_model_predicts_behind_earlier_items_alone(world, tmp_path):
    personal, task = personalizer(*world), world[1].task
    question = replace(PEOPLE[2].items[0], fields=QUESTION, is_query=True)
    asking = [Person("x2", (), (question,)), Person("nobody", (), (question,))]
    items = {"x2": PEOPLE[2].items}
    found = [*predict(personal, asking, TASK, earlier=lambda person: items.get(person, ()))]
    texts = [in_words(task, PEOPLE[2].items[-SHOWN:]), ""]
    expected = personal.shares([(TASK, QUESTION | {PROFILE: text}) for text in texts])
    assert [one.shares for one in found] == [pytest.approx(shares, rel=0, abs=1e-12) for shares in expected]
    assert expected[0] != expected[1]
    assert [dict(one.question.fields) for one in found] == [QUESTION, QUESTION]
    assert Store(tmp_path).history("x2") is None


def test_a_comparison_has_a_row_without_the_history_and_counts_its_price(world):
    base, bank = world
    people = people_of(5, items=8, prefix="n", seed=3)
    run = TINY_RUN.model_copy(update={"stack": TINY_RUN.stack.model_copy(update={"enabled": False})})
    settings = CompareSettings(shots=4, queries=3, brief=True)
    found = compare(base, bank, people, settings, run=run, encoder=HashEncoder()).comparison
    plain, shown = found.row("task LoRA, no history"), found.row("task LoRA")
    text = max(len(in_words(bank.task, person.items[2:4]).encode()) for person in people)
    assert 0 < shown.bytes_per_person <= text
    assert plain.bytes_per_person == 0
    assert shown.prompt_tokens > plain.prompt_tokens > 0
    assert found.row("MTA").prompt_tokens == shown.prompt_tokens
    assert found.row("own constant").prompt_tokens == 0
    assert found.row("MTA").bytes_per_person > shown.bytes_per_person
