"""Personalize many people at once: equal to one at a time; answer questions; mistakes."""

import random
from dataclasses import replace

import plain
import pytest
import torch
from conftest import TINY_RUN, HashEncoder, people_of, personalizer
from crowd import PEOPLE, QUESTION, in_cohorts_of, knowing, same
from tiny import base_of

from mta import BASE, TASK
from mta.config import Lora, MergeSettings, StackSettings
from mta.data.history import Item, Person
from mta.errors import BankMismatch, DataError, InputError, MemoryBudgetError, PersonNotFound, StoreError
from mta.personalize import Personalizer, stages
from mta.personalize.outcomes import Personalized
from mta.personalize.shots import shots_of
from mta.store.state import State

# -- together or alone -------------------------------------------------------------------------------------------------


def test_together_equals_one_at_a_time(by_policy, tmp_path):
    *tiny, merge = by_policy
    together = knowing(*tiny, tmp_path, merge=merge)
    for person in PEOPLE:
        alone = personalizer(*tiny, merge=merge)
        assert alone.personalize([person]) == Personalized(1, 0, 0)
        same(together.state(person.id), alone.state(person.id))
    assert len({together.state(person.id).w for person in PEOPLE}) == 5


@pytest.mark.parametrize("policy", ["posterior", "laplace", "laplace at mu"])
@pytest.mark.parametrize("stack", [True, False])
def test_a_state_records_the_losses_of_merge_and_stack(trusting, stack, policy, monkeypatch):
    """Losses that a stage computes anyway are not computed again, and those that nothing reads not at all."""
    base, bank = trusting
    mu = bank.calibration.mu * 0 + (0.1 if policy == "laplace at mu" else 0.0)
    bank = replace(bank, calibration=replace(bank.calibration, mu=mu))
    settings = TINY_RUN.merge.model_copy(update={"policy": policy.split()[0]})
    personal = personalizer(base, bank, merge=settings, stack=TINY_RUN.stack.model_copy(update={"enabled": stack}))
    passes, plain_pass = list[int](), stages.mean_nll
    monkeypatch.setattr(stages, "mean_nll", lambda *given, **how: passes.append(1) or plain_pass(*given, **how))
    personal.personalize(PEOPLE)
    passes_of = {"posterior": 1, "laplace": int(stack), "laplace at mu": 1 + stack}
    assert len(passes) == passes_of[policy]
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
        if policy != "posterior" and not stack:  # its coefficients are solved again in any case
            assert losses.merged is None
            expected.pop()
        found = [loss for loss in (losses.pooled, losses.merged, losses.stacked) if loss is not None]
        assert found == pytest.approx(expected, rel=0, abs=1e-10)
        assert losses.tokens == tokens
        assert len(set(expected)) == len(expected)


def test_a_diverged_person_is_reported_and_the_others_are_unchanged(tiny, tmp_path, monkeypatch):
    base, bank = tiny
    whole = knowing(*tiny, tmp_path / "whole")
    astray, others = PEOPLE[1], [person for person in PEOPLE if person is not PEOPLE[1]]
    key, measured = shots_of(base, bank.task, astray).key, stages.mean_nll

    def one_is_no_number(base, jobs, *more, **how):
        return [float("nan") if job.key == key else loss for job, loss in zip(jobs, measured(base, jobs, *more, **how))]

    monkeypatch.setattr(stages, "mean_nll", one_is_no_number)
    personal = personalizer(*tiny, store=tmp_path / "people")
    done = personal.personalize(PEOPLE)
    assert (done.trained, list(done.failed)) == (len(others), [astray.id])
    assert "finite numbers" in str(done.failed[astray.id])
    assert all(personal.state(person.id) == whole.state(person.id) for person in others)
    assert not (tmp_path / "people" / "work").exists()  # the next run computes no other cohort again
    assert personal.personalize(PEOPLE).unchanged == len(others)


def test_neither_the_order_of_people_nor_their_queries_change_a_bit(by_policy, tmp_path):
    *tiny, merge = by_policy
    first, mixed = knowing(*tiny, tmp_path, merge=merge), personalizer(*tiny, merge=merge)
    people = random.Random(0).sample(PEOPLE, len(PEOPLE))
    mixed.personalize([Person(p.id, p.items, PEOPLE[0].items) for p in people])
    assert all(mixed.state(person.id) == first.state(person.id) for person in PEOPLE)


def test_the_cohort_size_does_not_change_states(by_policy, tmp_path):
    *tiny, merge = by_policy
    large, small, seen = knowing(*tiny, tmp_path, merge=merge), in_cohorts_of(*tiny, 2, merge=merge), []
    small.personalize(PEOPLE, on_step=lambda stage, step: seen.append((stage, step.step, step.people)))
    assert [people for stage, step, people in seen if (stage, step) == ("stack", 1)] == [2, 2, 1]
    for person in PEOPLE:
        same(small.state(person.id), large.state(person.id))


def test_less_memory_than_one_person_needs_is_an_error(tiny):
    with pytest.raises(MemoryBudgetError, match=r"^one person needs about \d\.\d MiB .* the budget is 0\.0 MiB"):
        personalizer(*tiny, memory="1KiB").personalize(PEOPLE)


def test_the_seed_changes_the_stacks(known, tiny):
    other = personalizer(*tiny, seed=1)
    other.personalize(PEOPLE[:1])
    assert known.state("x0").w == pytest.approx(other.state("x0").w, rel=0, abs=1e-12)
    assert known.state("x0") != other.state("x0")


def test_without_a_stack_the_merge_alone_is_kept(tiny):
    personal = personalizer(*tiny, stack=StackSettings(enabled=False))
    personal.personalize(PEOPLE[:2])
    assert all(personal.state(person.id).stack is None for person in PEOPLE[:2])
    assert personal.score([("x0", QUESTION, "4")]) == personal.score([("x0", QUESTION, "4")], stacked=False)


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
        f"the person's state was made with bank ffffffff…, this bank is {bank.hash[:8]}…\n"
        "  Open that bank, or personalize again:  mta personalize"
    )
    assert known.personalize(PEOPLE) == Personalized(1, 4, 0)
    assert known.state("x0").bank == bank.hash


def test_a_person_without_items_is_an_error(tiny, tmp_path):
    personal = personalizer(*tiny, store=tmp_path / "people")
    with pytest.raises(DataError) as caught:
        personal.personalize([*PEOPLE, Person("empty", ())])
    assert str(caught.value) == "1 of 6 people have no item\n  Leave them out, or give each of them an item."
    assert not (tmp_path / "people").exists()


@pytest.mark.parametrize("others", [PEOPLE, []])
def test_a_person_with_an_item_that_does_not_fit_is_named_and_the_others_go_on(tiny, tmp_path, others):
    item = Item({"title": "Alien", "genres": "Horror " * 500, "rating": "4"})  # genres are not shortened
    personal = personalizer(*tiny, store=tmp_path / "people")
    done = personal.personalize([*others, Person.of("long", [item])])
    assert (done.trained, list(done.failed)) == (len(others), ["long"])
    assert "instruction and target take" in str(done.failed["long"])
    personal.update([*others, Person.of("long", [item])])
    alone = knowing(*tiny, tmp_path / "alone")
    for person in others:
        same(personal.state(person.id), alone.state(person.id))
    with pytest.raises(PersonNotFound):
        personal.state("long")


class OtherEncoder(HashEncoder):
    fingerprint = "hash-2"


@pytest.mark.parametrize("policy", ["posterior", "uniform", "learned"])
def test_merges_of_all_anchors_by_what_they_predict_need_no_encoder(tiny, policy):
    run = TINY_RUN.model_copy(update={"merge": MergeSettings(policy=policy, k=0)})
    personal = Personalizer(*tiny, run=run, encoder=OtherEncoder())
    assert personal.personalize(PEOPLE[:2]).failed == {}


def test_an_encoder_other_than_the_banks_is_refused(tiny):
    run = TINY_RUN.model_copy(update={"merge": MergeSettings(policy="similarity", k=2)})
    with pytest.raises(BankMismatch, match="has other weights"):
        Personalizer(*tiny, run=run, encoder=OtherEncoder()).personalize(PEOPLE)


def test_a_person_given_twice_is_an_error(tiny):
    with pytest.raises(InputError, match="1 people are given twice"):
        personalizer(*tiny).personalize([*PEOPLE, PEOPLE[2].first(1)])


def test_a_question_without_its_fields_is_an_error(known):
    with pytest.raises(DataError):
        known.generate([("x0", {"title": "no genres"})])
    with pytest.raises(DataError, match="the fields of a question are texts; title is 5"):
        known.generate([("x0", {"title": 5, "genres": "Crime"})])


def test_an_answer_that_leaves_no_room_for_its_question_is_an_error(known):
    most = known.base.prompts.max_tokens
    with pytest.raises(InputError, match=f"answers of {most} tokens leave no room"):
        known.generate([("x0", QUESTION)], max_new_tokens=most)


@pytest.mark.parametrize("rank", [2, 3])
def test_people_with_stacks_of_different_ranks_answer_in_one_batch(known, tiny, rank):
    wide = StackSettings(lora=Lora(rank=rank, alpha=6.0), training=TINY_RUN.stack.training)
    other = personalizer(*tiny, store=known.store, stack=wide)
    other.personalize(people_of(1, prefix="wide"))
    rows = [("wide0", QUESTION, "3"), ("x0", QUESTION, "3")]
    assert known.score(rows) == pytest.approx([known.score([row])[0] for row in rows], rel=0, abs=1e-10)
