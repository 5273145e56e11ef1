"""The Python API where it is stretched: iterators, threads, other bases, torch's modes, and items made by hand."""

import shutil
import threading
from dataclasses import replace
from datetime import datetime
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_RUN, HashEncoder, people_of, personalizer
from crowd import PEOPLE, QUESTION, knowing, same
from tiny import base_of, tokenizer

import mta
from mta.config import CompareSettings, Run, override
from mta.data.history import Item, Person
from mta.errors import BankMismatch, ConfigError, DataError, InputError, StoreError, UnsupportedModel
from mta.evaluation.compare import compare
from mta.evaluation.methods import Outcome, TaskLora
from mta.evaluation.metrics import from_scores
from mta.model.base import BaseModel
from mta.store import Store

IDS = [person.id for person in PEOPLE]


def test_iterators_are_answered_like_lists(known):
    rows = [(who, QUESTION) for who in IDS]
    assert known.generate(iter(rows)) == known.generate(rows) != []
    answers = [(who, QUESTION, "4") for who in IDS]
    assert known.score(iter(answers)) == known.score(answers) != []
    items = [(person.id, person.items) for person in PEOPLE]
    for found, expected in zip(known.label_scores(iter(items)), known.label_scores(items), strict=True):
        assert torch.equal(found, expected)


def test_threads_take_turns_and_leave_the_model_as_it_was(known):
    asked = [(who, QUESTION, "4") for who in IDS]
    alone = {row[0]: known.score([row]) for row in asked}
    nobody = known.score([(mta.BASE, QUESTION, "4")])
    found, start = {row[0]: [] for row in asked}, threading.Barrier(len(asked))

    def ask(row):
        start.wait()
        for _ in range(5):
            found[row[0]].append(known.score([row]))

    threads = [threading.Thread(target=ask, args=(row,)) for row in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {who: [score] * 5 for who, score in alone.items()}
    assert known.score([(mta.BASE, QUESTION, "4")]) == nobody


def test_blocks_with_adapters_are_not_nested(known):
    with known.applied(IDS[:1]), pytest.raises(InputError, match="are applied to this model already"):
        known.score([(IDS[1], QUESTION, "4")])
    assert len(known.score([(IDS[1], QUESTION, "4")])) == 1


def test_samples_depend_on_the_seed_which_is_the_runs_by_default(known):
    def sampled(**how):
        return known.generate([(IDS[0], QUESTION)] * 4, temperature=5.0, max_new_tokens=8, **how)

    assert sampled() == sampled(seed=TINY_RUN.seed) == sampled() != sampled(seed=1)
    for wrong, found in (("temperature", -1.0), ("max_new_tokens", 0), ("max_new_tokens", 10**6)):
        with pytest.raises(InputError, match=wrong):
            known.generate([(IDS[0], QUESTION)], **{wrong: found})


def test_slices_of_people_keep_their_task(tmp_path):
    path = tmp_path / "people.jsonl"
    path.write_text("".join(f'{{"person": "{who}", "text": "Fine.", "score": "4"}}\n' for who in "abc"))
    people = mta.read_people(str(path), "lamp3")
    assert (people[1:].task, len(people[1:]), people[0].id) == (people.task, 2, "a")


def test_people_of_another_task_are_refused(tiny, tmp_path):
    path = tmp_path / "people.jsonl"
    path.write_text('{"person": "a", "input": "Fine.", "output": "4"}\n')
    with pytest.raises(InputError, match="read for task 'text', the bank's is"):
        personalizer(*tiny).personalize(mta.read_people(path, "text"))


def test_a_summary_says_how_many_people_failed(known):
    wrong = Person("wrong", (Item({"another": "field"}),))
    done, said = known.personalize([*PEOPLE, wrong]), "0 texts were shortened; 1 failed"
    assert (list(done.failed), str(done)) == (
        ["wrong"],
        f"0 people personalized, {len(PEOPLE)} were up to date; {said}",
    )


def test_public_names_are_listed_before_they_are_imported():
    assert set(mta.__all__) <= set(dir(mta))


def test_a_bank_of_another_base_is_refused(tiny):
    model, bank = base_of().model, tiny[1]
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    base = BaseModel(model, tokenizer(), "tiny-llama")
    with pytest.raises(BankMismatch):
        mta.Personalizer(base, bank, run=TINY_RUN)
    with pytest.raises(BankMismatch):
        compare(base, bank, PEOPLE, CompareSettings(shots=2, queries=1), run=TINY_RUN, encoder=HashEncoder())


def test_nobody_is_compared_twice(tiny):
    with pytest.raises(InputError, match="1 people are given twice"):
        compare(*tiny, [*PEOPLE, PEOPLE[0]], CompareSettings(shots=2, queries=1), run=TINY_RUN, encoder=HashEncoder())


@pytest.mark.parametrize(("given", "reason"), [({}, "missing"), ({"rating": "4.0"}, "unknown label")])
def test_items_made_in_python_are_checked(tiny, given, reason):
    odd = Person.of("odd", [Item({"title": "Alien", "genres": "Horror"} | given)] * 4)
    done = personalizer(*tiny).personalize([PEOPLE[0], odd])
    assert (done.trained, list(done.failed)) == (1, ["odd"])
    assert reason in str(done.failed["odd"])
    with pytest.raises(DataError, match=reason):
        compare(*tiny, [*PEOPLE, odd], CompareSettings(shots=2, queries=1), run=TINY_RUN, encoder=HashEncoder())


def test_a_bank_is_built_of_items_of_its_task(tmp_path):
    people = [Person.of(p.id, [Item({**i.fields, "rating": "5.0"}) for i in p.items]) for p in people_of(16)]
    given = {"task": "movielens-rating", "run": TINY_RUN, "encoder": HashEncoder()}
    with pytest.raises(DataError, match=r"field 'rating': unknown label '5\.0'"):
        mta.Bank.build(base_of(), people, tmp_path / "bank", **given)


@pytest.mark.parametrize("value", [5, None, 4.0])
def test_fields_of_an_item_are_text(value):
    with pytest.raises(InputError, match="field 'rating' of an item is a value of type"):
        Item({"title": "Alien", "rating": value})


def test_a_bank_of_people_without_a_task_is_not_one_of_free_texts(tmp_path):
    with pytest.raises(InputError, match="no task"):
        mta.Bank.build(base_of(), people_of(16), tmp_path / "bank", anchors=3, encoder=HashEncoder())


def test_nobody_is_built_or_calibrated_on_twice(tiny, tmp_path):
    base, bank = tiny
    people = people_of(16)
    with pytest.raises(InputError, match="1 people are given twice"):
        mta.Bank.build(base, people, tmp_path / "bank", task="movielens-rating", task_people=[people[3]], run=TINY_RUN)
    assert not (tmp_path / "bank").exists()
    with pytest.raises(InputError, match="16 people are given twice"):
        bank.calibrate(base, (one for one in [*people, *people]), tmp_path / "copy")


class First(TaskLora):
    """A method that answers otherwise than its base class."""

    name: str = "first label"

    def run(self, batch, seed):
        shares = torch.tensor([0.9, *[0.025] * 4]).log()
        return Outcome([from_scores(batch.task, shares.expand(len(asked), -1)) for asked in batch.queries], 0.0, 0.0)


class Unfit(First):
    name: str = "unfit"

    def fits(self, task, anchors, calibrated):
        return False


def test_further_methods_have_results_of_their_own_and_are_left_out_where_they_do_not_fit(tiny, caplog):
    settings = CompareSettings(shots=2, queries=1, brief=True)
    found = compare(*tiny, PEOPLE, settings, run=TINY_RUN, encoder=HashEncoder(), more=[First(), Unfit()]).comparison
    assert found.score("first label", "NLL") != found.score("task LoRA", "NLL")
    assert "unfit" not in found.names
    assert "left out: unfit" in caplog.text


@pytest.mark.parametrize("limit", [0, -1])
def test_somebody_is_compared(tiny, limit):
    with pytest.raises(InputError, match=f"limit is {limit}; expected 1 or more"):
        compare(*tiny, PEOPLE, CompareSettings(shots=2, queries=1), run=TINY_RUN, encoder=HashEncoder(), limit=limit)


@pytest.mark.parametrize("time", [float("nan"), float("inf"), "2024-03-01", datetime(2024, 3, 1)])
def test_a_time_is_finite(time):
    with pytest.raises(InputError, match="the time of an item"):
        Item({"title": "Alien"}, time=time)


def test_a_store_that_was_removed_begins_anew(tiny, tmp_path):
    personal = knowing(*tiny, tmp_path / "people")
    shutil.rmtree(tmp_path / "people")
    personal.personalize(PEOPLE[:1])
    assert Store(tmp_path / "people").load(IDS[0]).work
    (tmp_path / "people" / "store.json").unlink()
    with pytest.raises(StoreError, match="damaged or missing"):
        personal.store.save(IDS[0], replace(personal.state(IDS[0]), work="other"))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_training_depends_on_neither_the_callers_modes_nor_the_kind_of_sequence(tiny, known, mode):
    personal = personalizer(*tiny)
    with mode():
        assert personal.personalize(iter(PEOPLE[:3])).trained == 3
    for who in IDS[:3]:
        same(personal.state(who), known.state(who))


def test_scores_can_be_changed_and_trained_through(known):
    (scores,) = known.label_scores([(IDS[0], PEOPLE[0].items)])
    scores -= scores.max()
    heat = torch.ones((), dtype=scores.dtype, requires_grad=True)
    (heat * scores).sum().backward()
    assert heat.grad is not None


def test_a_model_that_peft_adapted_is_refused():
    import peft

    base = base_of()
    model = peft.get_peft_model(base.model, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    with pytest.raises(UnsupportedModel, match="has adapters of PEFT already"):
        BaseModel(model, tokenizer(), "adapted")


def test_wrong_numbers_are_refused(known, tiny, task, tmp_path):
    for rank in (0, -1):
        with pytest.raises(InputError, match="expected 1 or more"):
            known.export(IDS[0], tmp_path / "out", rank=rank)
    with pytest.raises(ConfigError, match="anchors"):
        mta.Bank.build(tiny[0], people_of(12), tmp_path / "bank", task=task, run=TINY_RUN, anchors=0)
    assert not (tmp_path / "out").exists()


def test_equal_times_of_any_kind_are_the_same_item():
    made = [Person.of("a", [mta.Item({"text": "x"}, time)]) for time in (np.int64(5), 5, 5.0, Decimal(5))]
    assert len({person.digest() for person in made}) == 1
    assert {type(person.items[0].time) for person in made} == {float}


def test_the_settings_beside_a_bank_of_an_own_task_name_its_file(tmp_path):
    task = tmp_path / "mine.yaml"
    task.write_text((Path(mta.__file__).parent / "data/tasks/builtin/movielens-rating.yaml").read_text())
    bank = mta.Bank.build(base_of(), people_of(16), tmp_path / "bank", task=task, run=TINY_RUN, encoder=HashEncoder())
    assert override(Run(), [], bank.folder / "config.yaml").task == str(task)
