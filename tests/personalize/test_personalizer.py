"""Personalize many people at once: equal to one at a time and to an uninterrupted run; generate, export, forget."""

import dataclasses
import json
import random
import shutil
from pathlib import Path

import kill
import peft
import plain
import pytest
import torch
from conftest import TINY_RUN, HashEncoder, memory_for, people_of, personalizer
from files import folder_of
from tiny import base_of

from mta import BASE, TASK
from mta.bank.bank import Bank
from mta.config import Lora, MergeSettings, StackSettings, Training
from mta.data.history import Item, Person
from mta.errors import (
    AnchorNotFound,
    ConfigError,
    DataError,
    Diverged,
    InputError,
    MemoryBudgetError,
    PersonNotFound,
    StoreError,
)
from mta.lora.peft import read_peft
from mta.personalize import Forgotten, Personalizer, forget_person, stages
from mta.personalize.likelihoods import shots_of
from mta.personalize.merge import frozen_numbers
from mta.personalize.pipeline import Personalized
from mta.store import Store
from mta.store.state import State
from mta.training.checkpoint import Checkpoint
from mta.training.trainer import Job

QUESTION = {"title": "Film 7", "genres": "Drama"}
LEARNED = MergeSettings(policy="learned", k=2, learned=Training(lr=0.1, steps=3, batch_size=8, eps=1.0, clip=1e9))


def crowd(*sizes: int) -> list[Person]:
    """People with that many shots each."""
    return [person.first(size) for person, size in zip(people_of(len(sizes), items=9, prefix="x", seed=5), sizes)]


PEOPLE = crowd(3, 1, 8, 2, 5)


def same(found: State, expected: State, tolerance: float = 1e-10) -> None:
    assert found.anchors == expected.anchors
    assert found.work == expected.work
    assert found.w == pytest.approx(expected.w, rel=0, abs=tolerance)
    for name, tensor in found.stack.tensors().items():
        torch.testing.assert_close(tensor, expected.stack.tensors()[name], rtol=0, atol=tolerance)


@pytest.fixture
def known(tiny, tmp_path):
    """A Personalizer that knows everybody."""
    personal = personalizer(*tiny, store=tmp_path / "people")
    personal.personalize(PEOPLE)
    return personal


# -- together or alone -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merge", [TINY_RUN.merge, LEARNED], ids=["posterior", "learned"])
def test_together_equals_one_at_a_time(tiny, merge):
    together = personalizer(*tiny, merge=merge)
    assert together.personalize(PEOPLE) == Personalized(5, 0, 0)
    for person in PEOPLE:
        alone = personalizer(*tiny, merge=merge)
        alone.personalize([person])
        same(together.state(person.id), alone.state(person.id))
    assert len({together.state(person.id).w for person in PEOPLE}) == 5


def test_stacks_are_trained(known):
    for person in PEOPLE:
        assert max(float(b.abs().max()) for _, b in known.state(person.id).stack.factors.values()) > 1e-3


@pytest.mark.parametrize("stack", [True, False])
def test_a_state_records_the_losses_of_merge_and_stack(tiny, stack):
    base, bank = tiny
    personal = personalizer(*tiny, stack=TINY_RUN.stack.model_copy(update={"enabled": stack}))
    personal.personalize(PEOPLE)
    for person in PEOPLE[:3]:
        state = personal.state(person.id)
        parts = [plain.update(bank.task_lora)]
        parts.append(plain.merge(bank.anchors, state.anchors, torch.tensor(state.w, dtype=torch.float64)))
        parts += [plain.update(state.stack)] if stack else []
        examples = [base.prompts.example(bank.task, item) for item in person.items]
        tokens = sum(len(example.target) for example in examples)
        expected = []
        for n in range(1, len(parts) + 1):
            weights = plain.weights(base, *parts[:n])
            expected.append(-sum(float(plain.log_likelihood(base, weights, e)) for e in examples) / tokens)
        losses = state.losses
        found = [loss for loss in (losses.pooled, losses.merged, losses.stacked) if loss is not None]
        assert found == pytest.approx(expected, rel=0, abs=1e-10)
        assert losses.tokens == tokens
        assert len(set(expected)) == len(expected)


def test_a_loss_that_is_not_finite_is_an_error_without_a_state(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("mta.personalize.stages.mean_nll", lambda base, jobs, *_, **__: [float("nan")] * len(jobs))
    personal = personalizer(*tiny, store=tmp_path)
    with pytest.raises(Diverged, match=r"losses on shots are invalid: .*\n  Training diverged: lower stack\."):
        personal.personalize(PEOPLE)
    assert states_in(tmp_path) == {}


def test_a_diverged_person_is_reported_and_the_others_are_unchanged(tiny, tmp_path, monkeypatch):
    base, bank = tiny
    whole = personalizer(*tiny)
    whole.personalize(PEOPLE)
    astray, others = PEOPLE[1], [person for person in PEOPLE if person is not PEOPLE[1]]
    key, measured = shots_of(base, bank.task, astray).key, stages.mean_nll

    def one_is_no_number(base, jobs, *more, **how):
        return [float("nan") if job.key == key else loss for job, loss in zip(jobs, measured(base, jobs, *more, **how))]

    monkeypatch.setattr(stages, "mean_nll", one_is_no_number)
    personal = personalizer(*tiny, store=tmp_path)
    done = personal.personalize(PEOPLE)
    assert (done.trained, list(done.failed)) == (len(others), [astray.id])
    assert "finite numbers" in done.failed[astray.id]
    assert all(personal.state(person.id) == whole.state(person.id) for person in others)
    assert not (tmp_path / "work").exists()  # the next run computes no other cohort again
    assert personal.personalize(PEOPLE).unchanged == len(others)


def test_the_order_of_people_does_not_change_a_bit(tiny):
    first = personalizer(*tiny)
    first.personalize(PEOPLE)
    mixed = personalizer(*tiny)
    mixed.personalize(random.Random(0).sample(PEOPLE, len(PEOPLE)))
    assert all(mixed.state(person.id) == first.state(person.id) for person in PEOPLE)


def in_cohorts_of(base, bank, people: int, store=None) -> Personalizer:
    """A Personalizer with so little memory that only that many of PEOPLE are trained together."""
    jobs = [Job(p.id, [base.prompts.example(bank.task, item) for item in p.items]) for p in PEOPLE]
    numbers, below = sum(d + o for d, o in base.targets.values()), frozen_numbers(bank, TINY_RUN.merge)
    memory = memory_for(base, jobs, numbers, people, below=below)
    return personalizer(base, bank, store=store, memory=memory)


@pytest.mark.parametrize(("people", "sizes"), [(1, [1, 1, 1, 1, 1]), (2, [2, 2, 1]), (3, [3, 2])])
def test_the_cohort_size_does_not_change_states(tiny, people, sizes):
    large, small, seen = personalizer(*tiny), in_cohorts_of(*tiny, people), []
    large.personalize(PEOPLE)
    small.personalize(PEOPLE, on_step=lambda stage, step: seen.append((stage, step.step, step.people)))
    assert [people for stage, step, people in seen if (stage, step) == ("stack", 1)] == sizes
    for person in PEOPLE:
        same(small.state(person.id), large.state(person.id))


def test_less_memory_than_one_person_needs_is_an_error(tiny):
    with pytest.raises(MemoryBudgetError, match=r"^one person needs about \d\.\d MiB .* the budget is 0\.0 MiB"):
        personalizer(*tiny, memory="1KiB").personalize(PEOPLE)


def test_queries_do_not_change_a_state(tiny):
    first, other = personalizer(*tiny), personalizer(*tiny)
    first.personalize(PEOPLE)
    other.personalize([Person(p.id, p.items, PEOPLE[0].items) for p in PEOPLE])
    assert all(other.state(person.id) == first.state(person.id) for person in PEOPLE)


def test_the_seed_changes_the_stacks(tiny):
    first, other = personalizer(*tiny), personalizer(*tiny, seed=1)
    for personal in (first, other):
        personal.personalize(PEOPLE[:1])
    assert first.state("x0").w == other.state("x0").w
    assert first.state("x0") != other.state("x0")


def test_without_a_stack_the_merge_alone_is_kept(tiny):
    personal = personalizer(*tiny, stack=StackSettings(enabled=False))
    personal.personalize(PEOPLE)
    assert all(personal.state(person.id).stack is None for person in PEOPLE)
    assert personal.score([("x0", QUESTION, "4")]) == personal.score([("x0", QUESTION, "4")], stacked=False)


# -- again -------------------------------------------------------------------------------------------------------------


def states_in(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in store.glob("*/*/[0-9]*.safetensors")}


def test_a_second_call_trains_nobody(known, tmp_path):
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "people").rglob("*")}
    steps = []
    assert known.personalize(PEOPLE, on_step=lambda *_: steps.append(1)) == Personalized(0, 5, 0)
    assert steps == []
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "people").rglob("*")} == stamps


def test_only_new_people_are_trained(known):
    seen = []
    newcomer = people_of(1, prefix="new")
    done = known.personalize([*PEOPLE, *newcomer], on_step=lambda stage, step: seen.append(step.people))
    assert (done, set(seen)) == (Personalized(1, 5, 0), {1})
    assert [known.store.versions(person.id) for person in PEOPLE] == [[1]] * 5


def test_changed_shots_make_a_new_version(known):
    before = known.state("x0")
    more = Person.of("x0", [*PEOPLE[0].items, Item({**QUESTION, "rating": "1"}, time=99.0)])
    assert known.personalize([more, *PEOPLE[1:]]) == Personalized(1, 4, 0)
    assert known.store.versions("x0") == [1, 2]
    assert known.store.load("x0", 1) == before
    assert known.state("x0").history == more.digest() != before.history


def test_changed_settings_make_a_new_version(known, tiny):
    other = personalizer(*tiny, store=known.store, merge=MergeSettings(policy="uniform", k=2))
    assert other.personalize(PEOPLE).trained == 5
    assert other.state("x0").w == (0.5, 0.5)
    assert known.store.versions("x0") == [1, 2]


def test_a_damaged_state_is_trained_again(known, tmp_path):
    before = known.state("x0")
    (path,) = (tmp_path / "people").glob(f"*/{folder_of(known.store, 'x0')}/1.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    assert known.personalize(PEOPLE) == Personalized(1, 4, 0)
    same(known.state("x0"), before)


def test_texts_that_were_cut_are_counted(tiny):
    long = Person.of("long", [Item({"title": "word " * 100, "genres": "Drama", "rating": "4"})])
    assert personalizer(*tiny).personalize([long, *PEOPLE]).shortened == 1


def personalize_in(folder: Path, bank: str) -> None:
    """Personalize five people in cohorts of two, in a store with a fixed key; the test kills this process."""
    (folder / "people").mkdir(parents=True, exist_ok=True)
    (folder / "people" / "store.json").write_text(json.dumps({"schema": 1, "key": "ab" * 32}))
    base = base_of()
    personal = in_cohorts_of(base, Bank.open(bank, base), 2, store=folder / "people")
    personal.personalize(PEOPLE)


@pytest.mark.slow
def test_killed_again_and_again_the_store_ends_the_same(tiny, tmp_path):
    _, bank = tiny
    folders = [tmp_path / name for name in ("whole", "one", "two", "three")]
    kills = kill.until_done(personalize_in, folders, bank.folder)
    assert all(kills)
    expected = states_in(tmp_path / "whole" / "people")
    assert len(expected) == 5
    for folder in folders:
        assert states_in(folder / "people") == expected
        assert not (folder / "people" / "work").exists()


def test_a_run_goes_on_from_its_checkpoint(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpoint, "due", lambda _: True)
    whole, personal, seen = personalizer(*tiny), personalizer(*tiny, store=tmp_path), []
    whole.personalize(PEOPLE)

    def stop(stage, step):
        seen.append((stage, step.step))
        if (stage, step.step) == ("stack", 2) and seen.count(("stack", 2)) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        personal.personalize(PEOPLE, on_step=stop)
    seen.append("again")
    personal.personalize(PEOPLE, on_step=stop)
    again = seen[seen.index("again") + 1 :]
    assert [step for stage, step in again if stage == "stack"] == [2]
    assert all(personal.state(person.id) == whole.state(person.id) for person in PEOPLE)


class FullDisk(Store):
    """A store that saves the states of a few people and then fails, as a full disk does."""

    room: int

    def save(self, id, state, *more, **how):
        if not self.room:
            raise OSError("No space left on device")
        self.room -= 1
        return super().save(id, state, *more, **how)


@pytest.mark.parametrize("saved", [0, 3])
def test_a_run_stopped_before_all_states_are_saved_does_not_train_again(tiny, tmp_path, saved):
    whole, full = personalizer(*tiny), FullDisk(tmp_path)
    full.room = saved
    whole.personalize(PEOPLE)
    with pytest.raises(OSError, match="No space left"):
        personalizer(*tiny, store=full).personalize(PEOPLE)
    personal, seen = personalizer(*tiny, store=tmp_path), []
    personal.personalize(PEOPLE, on_step=lambda stage, step: seen.append(stage))
    assert seen.count("stack") == 0
    assert all(personal.state(person.id) == whole.state(person.id) for person in PEOPLE)
    assert not (tmp_path / "work").exists()


def test_a_run_of_other_people_keeps_the_checkpoint_of_a_stopped_run(tiny, tmp_path):
    def stop(stage, step):
        if stage == "stack":
            raise KeyboardInterrupt

    personal = personalizer(*tiny, store=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        personal.personalize(PEOPLE, on_step=stop)
    (begun,) = (tmp_path / "work").iterdir()
    personal.personalize(people_of(1, prefix="other"))
    assert list((tmp_path / "work").iterdir()) == [begun]
    assert (begun / "plan.json").is_file()
    personal.forget("x0")
    assert not (tmp_path / "work").exists()


def test_a_resumed_plan_covers_everybody(tiny, tmp_path):
    def stop(stage, step):
        raise KeyboardInterrupt

    changed = [*PEOPLE[1:], PEOPLE[0].first(2)]
    personalizer(*tiny, store=tmp_path).personalize(PEOPLE)
    with pytest.raises(KeyboardInterrupt):
        personalizer(*tiny, store=tmp_path).personalize(changed, on_step=stop)  # a plan of one person
    personalizer(*tiny, store=tmp_path, merge=MergeSettings(policy="uniform")).personalize(changed)
    again = personalizer(*tiny, store=tmp_path)
    assert again.personalize(changed).trained == len(PEOPLE)
    assert {again.state(person.id).policy for person in PEOPLE} == {"posterior"}


def test_a_store_that_is_damaged_is_an_error_before_anything_is_trained(known, tiny, tmp_path):
    (tmp_path / "people" / "store.json").write_text("{}")
    again = personalizer(*tiny, store=tmp_path / "people")
    with pytest.raises(StoreError, match=r"store\.json is damaged or missing"):
        again.personalize(PEOPLE, on_step=lambda *_: pytest.fail("something ran"))


@pytest.mark.parametrize(
    ("merge", "error"), [({"policy": "uniform", "k": 9}, AnchorNotFound), ({"policy": "ridge"}, ConfigError)]
)
def test_impossible_settings_are_refused_before_training(tiny, merge, error):
    base, bank = tiny
    text = bank.task.model_copy(update={"labels": None, "metric": "rouge"})
    personal = personalizer(base, dataclasses.replace(bank, task=text), merge=MergeSettings(**merge))
    with pytest.raises(error, match=r"merge\.k is 9, but the bank has|policy 'ridge' needs a task with labels"):
        personal.personalize(PEOPLE, on_step=lambda *_: pytest.fail("something ran"))


def test_histories_are_kept_only_when_asked_for(tiny, tmp_path):
    personal = personalizer(*tiny, store=tmp_path)
    personal.personalize(PEOPLE)
    assert personal.store.history("x0") is None
    personal.personalize(PEOPLE, keep_histories=True)
    assert personal.store.history("x0") == PEOPLE[0]
    personal.forget("x0")
    assert personal.store.history("x0") is None
    with pytest.raises(InputError, match="histories are kept in a store, and there is none"):
        personalizer(*tiny).personalize(PEOPLE, keep_histories=True)


def test_a_shortened_question_is_reported(known, caplog):
    known.generate([("x0", {"title": "long " * 400, "genres": "Drama"})], max_new_tokens=2)
    assert caplog.messages == ["1 of 1 questions were too long: the end of their text was cut off"]


# -- using it ----------------------------------------------------------------------------------------------------------


ROWS = [
    ("x0", QUESTION),
    (BASE, QUESTION),
    ("x2", {"title": "A much longer title", "genres": "Comedy"}),
    (TASK, QUESTION),
]
ROWS += [("x0", {"title": "B", "genres": "Drama"}), ("x4", QUESTION), (BASE, {"title": "B", "genres": "Drama"})]


def test_a_batch_of_people_answers_like_each_person_alone(known):
    together = known.generate(ROWS, max_new_tokens=12)
    assert together == [known.generate([row], max_new_tokens=12)[0] for row in ROWS]
    assert len({together[0], together[1], together[3], together[5]}) > 1  # four models, one question


def test_answers_have_the_length_of_the_task_by_default(known):
    longest = known.base.prompts.answer_tokens(known.bank.task)
    assert longest == 2  # a label, and the end
    assert (
        known.generate(ROWS) == known.generate(ROWS, max_new_tokens=longest) != known.generate(ROWS, max_new_tokens=12)
    )


def test_a_batch_of_people_scores_like_each_person_alone(known):
    rows = [(who, question, answer) for who, question in ROWS for answer in ("1", "5")]
    together = known.score(rows)
    alone = [known.score([row])[0] for row in rows]
    assert together == pytest.approx(alone, rel=0, abs=1e-9)
    assert len({round(score, 6) for score in together}) == len(rows)


def test_base_and_task_rows_equal_the_plain_model_and_the_task_lora(known, tiny):
    base, bank = tiny
    example = base.prompts.example(bank.task, bank.task.asked(QUESTION), "4")
    pooled = plain.weights(base, plain.update(bank.task_lora))
    expected = [float(plain.log_likelihood(base, changed, example)) for changed in ({}, pooled)]
    assert known.score([(BASE, QUESTION, "4"), (TASK, QUESTION, "4")]) == pytest.approx(expected, rel=0, abs=1e-10)


def test_a_persons_row_adds_task_lora_merge_and_stack(known, tiny):
    base, bank = tiny
    example = base.prompts.example(bank.task, bank.task.asked(QUESTION), "4")
    state = known.state("x2")
    merge = plain.merge(bank.anchors, state.anchors, torch.tensor(state.w, dtype=torch.float64))
    parts = [plain.update(bank.task_lora), merge, plain.update(state.stack)]
    whole, merged = (float(plain.log_likelihood(base, plain.weights(base, *p), example)) for p in (parts, parts[:2]))
    assert known.score([("x2", QUESTION, "4")]) == pytest.approx([whole], rel=0, abs=1e-10)
    assert known.score([("x2", QUESTION, "4")], stacked=False) == pytest.approx([merged], rel=0, abs=1e-10)
    assert abs(whole - merged) > 1e-4


def test_the_base_answers_as_its_own_generate_does(known, tiny):
    base, bank = tiny
    prompt = base.prompts.prompt(bank.task, bank.task.asked(QUESTION), 12).tokens
    tokens = base_of().model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=2)
    expected = base.tokenizer.decode(tokens[0, len(prompt) :], skip_special_tokens=True).strip()
    assert known.generate([(BASE, QUESTION)], max_new_tokens=12) == [expected]


def test_a_label_scores_the_same_among_labels_and_alone(known, tiny):
    _, bank = tiny
    items = PEOPLE[2].items[:3]
    found = known.label_scores([("x2", items), (TASK, items[:1])])
    assert [tuple(scores.shape) for scores in found] == [(3, 5), (1, 5)]
    for i, item in enumerate(items):
        question = {name: item.fields[name] for name in ("title", "genres")}
        alone = known.score([("x2", question, label) for label in bank.task.labels])
        assert found[0][i].tolist() == pytest.approx(alone, rel=0, abs=1e-10)


def test_an_empty_batch_gives_no_answers(known):
    assert known.generate([]) == known.score([]) == known.label_scores([]) == []


def test_another_personalizer_uses_the_states_of_the_store(known, tiny):
    other = personalizer(*tiny, store=known.store)
    assert other.generate(ROWS, max_new_tokens=6) == known.generate(ROWS, max_new_tokens=6)


# -- export ------------------------------------------------------------------------------------------------------------


def tokens_asked(base, bank) -> tuple[int, ...]:
    return base.prompts.prompt(bank.task, bank.task.asked(QUESTION)).tokens


def loaded_by_peft(folder: Path):
    return peft.PeftModel.from_pretrained(base_of().model, folder).double()


def test_an_export_computes_the_same_in_peft(known, tiny, tmp_path):
    """What stands in the files, computed by PEFT and by us: to the last digits of float64."""
    base, bank = tiny
    assert known.export("x2", tmp_path / "out") == 0.0
    found = loaded_by_peft(tmp_path / "out")(input_ids=torch.tensor([tokens_asked(base, bank)])).logits[0]
    adapter = read_peft(tmp_path / "out").to(torch.float64)
    expected = plain.logits(base, plain.weights(base, plain.update(adapter)), tokens_asked(base, bank))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_an_export_is_task_lora_merge_and_stack(known, tiny, tmp_path):
    """Exports are in float32, so every factor has a relative error of up to 6e-8."""
    base, bank = tiny
    known.export("x2", tmp_path / "out")
    adapter, state = read_peft(tmp_path / "out"), known.state("x2")
    assert {t.dtype for t in adapter.tensors().values()} == {torch.float32}
    assert adapter.rank == 3 * bank.anchors.rank + bank.task_lora.rank + 1
    merge = plain.merge(bank.anchors, state.anchors, torch.tensor(state.w, dtype=torch.float64))
    for name in adapter.names:
        expected = bank.task_lora.delta(name)[0] + merge[name] + state.stack.delta(name)[0]
        difference = adapter.to(torch.float64).delta(name)[0] - expected
        assert float(difference.norm() / expected.norm()) < 2e-7
    model = loaded_by_peft(tmp_path / "out")
    example = base.prompts.example(bank.task, bank.task.asked(QUESTION), "4")
    table = model(input_ids=torch.tensor([example.tokens])).logits[0].log_softmax(-1)
    score = sum(table[example.target_start - 1 + i, token] for i, token in enumerate(example.target))
    assert known.score([("x2", QUESTION, "4")]) == pytest.approx([float(score)], rel=0, abs=1e-4)


@pytest.mark.parametrize(("mode", "rank"), [("factor", 2 + 2 + 1), ("svd", 3 + 2 + 1)])
def test_an_export_merges_the_way_the_stack_was_trained_over(tiny, tmp_path, mode, rank):
    base, bank = tiny
    personal = personalizer(*tiny, merge=MergeSettings(policy="uniform", k=2, mode=mode, rank=3))
    personal.personalize(PEOPLE[:2])
    personal.export("x1", tmp_path / "out")
    assert read_peft(tmp_path / "out").rank == rank
    found = loaded_by_peft(tmp_path / "out")(input_ids=torch.tensor([tokens_asked(base, bank)])).logits
    with torch.inference_mode(), personal.applied(["x1"]):
        expected = base.model(input_ids=torch.tensor([tokens_asked(base, bank)])).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_an_anchor_with_weight_zero_adds_no_rank_to_an_export(tiny, tmp_path):
    personal = personalizer(*tiny, merge=MergeSettings(policy="top1", k=2))
    personal.personalize(PEOPLE[:1])
    assert personal.state("x0").w == (1.0, 0.0)
    personal.export("x0", tmp_path / "out")
    assert read_peft(tmp_path / "out").rank == 2 + 2 + 1


@pytest.mark.parametrize("rank", [1, 4])
def test_a_compressed_export_reports_its_error(known, tmp_path, rank):
    known.export("x2", tmp_path / "whole")
    error = known.export("x2", tmp_path / "small", rank=rank)
    whole, small = (read_peft(tmp_path / name).to(torch.float64) for name in ("whole", "small"))
    assert small.rank == rank
    lost = sum(float((whole.delta(name) - small.delta(name)).square().sum()) for name in whole.names)
    total = sum(float(whole.delta(name).square().sum()) for name in whole.names)
    best = sum(float(torch.linalg.svdvals(whole.delta(name)[0])[rank:].square().sum()) for name in whole.names)
    assert error == pytest.approx((lost / total) ** 0.5, rel=1e-3)
    assert error == pytest.approx((best / total) ** 0.5, rel=1e-3)
    assert 0 < error < 1


def test_a_rank_that_is_enough_loses_nothing(known, tmp_path):
    assert known.export("x2", tmp_path / "whole", rank=64) == 0.0
    assert read_peft(tmp_path / "whole").rank == 9


# -- forget ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def own_bank(tiny, tmp_path):
    """A bank that a test may mark as needing a rebuild."""
    base, bank = tiny
    return base, Bank.open(shutil.copytree(bank.folder, tmp_path / "bank"), base)


def test_forgetting_removes_only_the_person(own_bank, tmp_path):
    _, bank = own_bank
    personal = personalizer(*own_bank, store=tmp_path / "people")
    personal.personalize(PEOPLE)
    personal.store.save_history(PEOPLE[0])
    assert personal.forget("x0") == Forgotten(True, [])
    with pytest.raises(PersonNotFound):
        personal.state("x0")
    assert personal.store.history("x0") is None
    assert len(states_in(tmp_path / "people")) == 4
    assert personal.forget("x0") == Forgotten(False, [])
    assert not (bank.folder / "needs-rebuild.json").exists()


def test_forgetting_removes_what_was_exported_and_names_what_it_could_not(own_bank, tmp_path):
    personal = personalizer(*own_bank, store=tmp_path / "people")
    personal.personalize(PEOPLE)
    for name in ("one", "two", "three"):
        personal.export("x0", tmp_path / name)
    personal.export("x1", tmp_path / "three")  # now the folder holds another person's adapter
    assert [Path(export.folder).name for export in personal.store.exports.of("x0")] == ["one", "two", "three"]
    assert personal.forget("x0") == Forgotten(True, [], [f"{tmp_path}/three (its adapter was changed since)"])
    assert [(tmp_path / name).exists() for name in ("one", "two", "three")] == [False, False, True]
    assert personal.forget("x0") == Forgotten(False, [])
    assert personal.forget("x1") == Forgotten(True, [])
    assert not (tmp_path / "three").exists()


@pytest.mark.parametrize("done", range(4))
def test_a_forgetting_that_is_killed_still_knows_the_exports(own_bank, tmp_path, monkeypatch, done):
    personal, unlink, left = personalizer(*own_bank, store=tmp_path / "people"), Path.unlink, [done]
    personal.personalize(PEOPLE[:1])
    for name in ("one", "two"):
        personal.export("x0", tmp_path / name)

    def killed(path, *how, **more):
        if path.parent.name in ("one", "two"):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
        unlink(path, *how, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            personal.forget("x0")
    assert "x0" in personal.store
    gone = [f"{tmp_path / 'one'} (missing: it was removed before, or moved)"] if done == 3 else []
    assert personal.forget("x0") == Forgotten(True, [], gone)
    assert not any((tmp_path / name).exists() for name in ("one", "two"))


def test_an_export_without_a_store_is_not_recorded(tiny, tmp_path):
    personal = personalizer(*tiny)
    personal.personalize(PEOPLE[:1])
    assert personal.export("x0", tmp_path / "out") == 0.0
    assert personal.forget("x0") == Forgotten(True, [])
    assert read_peft(tmp_path / "out").rank


def test_forgetting_names_what_still_holds_something_of_a_person(own_bank, tmp_path):
    _, bank = own_bank
    personal = personalizer(*own_bank, store=tmp_path / "people")
    personal.personalize(people_of(1, prefix="t"))
    assert personal.forget("t0") == Forgotten(True, ["task LoRA"])
    assert json.loads((bank.folder / "needs-rebuild.json").read_text()) == {"needs_rebuild": ["task LoRA"]}


def test_forgetting_needs_no_model(own_bank, tmp_path):
    personal = personalizer(*own_bank, store=tmp_path / "people")
    personal.personalize(people_of(1, prefix="t"))
    assert forget_person("t0", Store(tmp_path / "people"), own_bank[1].folder) == Forgotten(True, ["task LoRA"])
    assert "t0" not in Store(tmp_path / "people")


def test_forgetting_works_without_a_store(own_bank):
    personal = personalizer(*own_bank)
    personal.personalize(PEOPLE)
    assert personal.forget("x0") == Forgotten(True, [])
    with pytest.raises(PersonNotFound):
        personal.state("x0")


# -- mistakes ----------------------------------------------------------------------------------------------------------


def test_an_unknown_person_is_an_error(known, tiny):
    with pytest.raises(PersonNotFound, match=r"^no state of 'nobody' in the store .*people\n  Personalize first:  mta"):
        known.generate([("x0", QUESTION), ("nobody", QUESTION)])
    with pytest.raises(PersonNotFound) as caught:
        personalizer(*tiny).state("nobody")
    assert str(caught.value) == "no state is known for that person\n  Call personalize for them first."


def test_a_state_of_another_bank_is_refused(known, tiny):
    _, bank = tiny
    other = State("f" * 64, (0,), (1.0,), "top1", PEOPLE[0].digest(), "0" * 64, 0)
    known.store.save("x0", other)
    with pytest.raises(StoreError) as caught:
        known.generate([("x0", QUESTION)])
    assert str(caught.value) == (
        f"the person's state was made with bank ffffffff…, the bank at {bank.folder} is {bank.hash[:8]}…\n"
        "  Open that bank, or personalize again: mta personalize"
    )
    assert known.personalize(PEOPLE) == Personalized(1, 4, 0)
    assert known.state("x0").bank == bank.hash


def test_a_person_without_items_is_an_error(tiny, tmp_path):
    personal = personalizer(*tiny, store=tmp_path / "people")
    with pytest.raises(DataError) as caught:
        personal.personalize([*PEOPLE, Person("empty", ())])
    assert str(caught.value) == "1 of 6 people have no item\n  Leave them out, or give each of them an item."
    assert not (tmp_path / "people").exists()


def test_a_person_given_twice_is_an_error(tiny):
    with pytest.raises(DataError) as caught:
        personalizer(*tiny).personalize([*PEOPLE, PEOPLE[2].first(1)])
    assert str(caught.value) == "a person is given twice\n  Put all items of a person into one history."


def test_a_question_without_its_fields_is_an_error(known):
    with pytest.raises(DataError):
        known.generate([("x0", {"title": "no genres"})])


def test_the_banks_settings_are_used_unless_others_are_given(tiny):
    assert Personalizer(*tiny, encoder=HashEncoder()).run == TINY_RUN


@pytest.mark.parametrize("rank", [2, 3])
def test_people_with_stacks_of_different_ranks_answer_in_one_batch(known, tiny, rank):
    wide = StackSettings(lora=Lora(rank=rank, alpha=6.0), training=TINY_RUN.stack.training)
    other = personalizer(*tiny, store=known.store, stack=wide)
    other.personalize(people_of(1, prefix="wide"))
    rows = [("wide0", QUESTION, "3"), ("x0", QUESTION, "3")]
    assert known.score(rows) == pytest.approx([known.score([row])[0] for row in rows], rel=0, abs=1e-10)


def test_a_merge_is_computed_in_the_mode_its_stack_was_trained_over(tiny, tmp_path):
    """Two people's states by different modes, answered together by a third run's settings."""
    base, bank = tiny
    modes = {PEOPLE[0].id: "factor", PEOPLE[1].id: "exact"}
    rows, alone = [], []
    for person in PEOPLE[:2]:
        merge = MergeSettings(policy="uniform", k=0, mode=modes[person.id])
        made = personalizer(base, bank, tmp_path / "people", merge=merge)
        made.personalize([person])
        alone.append(made.score([(person.id, QUESTION, "3")])[0])
        rows.append((person.id, QUESTION, "3"))
    later = personalizer(base, bank, tmp_path / "people", merge=MergeSettings(mode="svd"))
    assert later.score(rows) == pytest.approx(alone, abs=1e-9)
    exact = personalizer(base, bank, merge=MergeSettings(policy="uniform", k=0))
    exact.personalize(PEOPLE[:1])
    assert abs(exact.score(rows[:1])[0] - alone[0]) > 1e-6
