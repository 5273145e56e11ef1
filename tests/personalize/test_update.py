"""Updates for grown histories: the action chosen from the loss on new items, and equality with all items at once."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from conftest import TINY_RUN, HashEncoder, people_of, personalizer, stopped_when
from crowd import PEOPLE, in_cohorts_of, knowing, same

from mta.config import MergeSettings, override
from mta.config.constants import NOTICEABLE
from mta.data.history import Person
from mta.distributed.executor import LocalExecutor
from mta.personalize import Personalizer, stages
from mta.personalize.adapters import stored_merges
from mta.personalize.merge import merge_adapters
from mta.personalize.policies import POLICIES, policy_named
from mta.personalize.shots import shots_of
from mta.personalize.stages import adapt
from mta.personalize.update import decide
from mta.store import Store
from mta.store.state import Losses

UNIFORM = override(TINY_RUN, ["merge.policy=uniform"]).merge  # reads nothing of the shots: its stacks can be retrained


@pytest.mark.parametrize(
    ("new", "action"),
    [
        (Losses(2.0, 1.9, 1.2, 9), "keep"),  # as well as on its own shots
        (Losses(2.0, 1.9, 1.5, 9), "retrain"),  # better than the merge, but there is more to learn
        (Losses(2.0, 1.2, 1.3, 9), "retrain"),  # the stack stands in the way
        (Losses(2.0, 2.0 + 2 * NOTICEABLE, 1.2, 9), "refresh"),  # the merge does
        (Losses(2.0, 1.3, None, 9), "keep"),
        (Losses(2.0, 1.9, None, 9), "refresh"),
    ],
)
def test_what_is_decided(new, action):
    before = Losses(2.0, 1.4, 1.2 if new.stacked else None, 5)
    assert decide(before, new) == action
    unknown = Losses(2.0, None, None, 5)  # of a merge alone
    assert new.stacked or decide(unknown, new) == "refresh"


GROWN = people_of(4, items=6)
YOUNG = [person.first(3) for person in GROWN]


def started(tiny, store, people=YOUNG, **changes):
    return knowing(*tiny, store, people, **changes)


def test_a_history_is_known_by_the_digest_of_its_beginning():
    person = GROWN[0]
    assert [person.grown_from(person.first(n).digest()) for n in range(1, 7)] == [1, 2, 3, 4, 5, 6]
    assert person.grown_from(person.latest(3).digest()) == 0
    assert person.digest() == Person(person.id, person.items).digest()


def test_people_without_new_items_are_skipped_and_new_people_are_personalized(tiny, tmp_path):
    personal = started(tiny, tmp_path, YOUNG[:2])
    done = personal.update([YOUNG[0], *YOUNG[2:]])
    assert (done.unchanged, done.begun, done.kept + done.retrained + done.refreshed) == (1, 2, 0)
    assert personal.update(YOUNG).unchanged == 4


def test_a_state_of_more_items_is_kept_with_its_history_unless_fewer_are_wanted(tiny, tmp_path):
    personal = started(tiny, tmp_path, GROWN[:2])
    personal.store.save_history(GROWN[0])
    before, few = personal.state("p0"), [YOUNG[0].latest(2), GROWN[1]]
    done = personal.update(few, histories=few)
    assert (done.ahead, done.failed, done.unchanged, done.begun) == (("p0",), {}, 1, 0)
    assert (personal.state("p0"), personal.store.history("p0")) == (before, GROWN[0])
    assert personal.update(few, fewer=True).begun == 1
    assert personal.state("p0").shots == 2


def test_a_move_to_another_bank_drops_no_items_of_a_person(tiny, tmp_path):
    personal, (knowing, newer) = personalizer(*tiny, tmp_path / "people"), GROWN[:2]
    for person in (knowing, newer):
        personal.personalize([person])
        personal.store.save(person.id, replace(personal.state(person.id), bank="f" * 64, work="e" * 64))
    done = personal.update([knowing.latest(2), newer])
    assert (done.ahead, done.failed, done.begun) == ((knowing.id,), {}, 1)
    assert personal.store.load(knowing.id).bank == "f" * 64


@pytest.mark.parametrize("action", ["keep", "retrain", "refresh"])
def test_the_new_items_alone_are_worked_on(tiny, tmp_path, monkeypatch, action):
    monkeypatch.setattr("mta.personalize.update.decide", lambda before, new: action)
    personal = started(tiny, tmp_path, merge=UNIFORM if action == "retrain" else TINY_RUN.merge)
    before, steps = {p.id: personal.state(p.id) for p in GROWN}, []
    done = personal.update(GROWN, on_step=lambda stage, step: steps.append((stage, step.examples_total)))
    assert {"keep": done.kept, "retrain": done.retrained, "refresh": done.refreshed}[action] == 4
    new = sum(len(person.items) - 3 for person in GROWN)
    stack_steps = TINY_RUN.stack.training.steps
    expected = {"keep": set(), "retrain": {("stack", stack_steps * new)}}
    expected["refresh"] = expected["retrain"] | {("evidence", 4 * new)}
    assert {step for step in steps if step[0] != "losses"} == expected[action]
    assert all(examples <= new for stage, examples in steps if stage == "losses")
    for person in GROWN:
        state = personal.state(person.id)
        assert (state == before[person.id]) == (action == "keep")
        if action != "keep":
            assert state.history == person.digest()
            assert personal.store.versions(person.id) == [1, 2]
            assert (state.w == before[person.id].w) == (action == "retrain")
    again = personal.update(GROWN)
    assert again.unchanged == (0 if action == "keep" else 4)


def test_a_stack_is_trained_on_from_where_it_was(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("mta.personalize.update.decide", lambda before, new: "retrain")
    base, bank = tiny
    personal = started(tiny, tmp_path, merge=UNIFORM)
    before = [personal.state(person.id) for person in GROWN]
    personal.update(GROWN)
    for person, state in zip(GROWN, before):
        job = shots_of(base, bank.task, Person(person.id, person.items[3:]))
        over = [*bank.task_adapters, *merge_adapters(bank, stored_merges([state], base.master_dtype))]
        stack = personal.run.stack
        alone = adapt(base, [job], over, stack.lora, stack.training, start=state.stack, seed=0).tensors()
        for name, tensor in personal.state(person.id).stack.tensors().items():
            assert (tensor - alone[name]).abs().max() < 1e-10


def test_the_order_of_layers_in_a_file_does_not_decide_how_an_update_is_rounded(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("mta.personalize.update.decide", lambda before, new: "retrain")
    loaded, trained, orders = Store.load, stages.train_loras, []

    def reversed_layers(*where):
        state = loaded(*where)
        return replace(state, stack=state.stack.in_order(reversed(state.stack.names)))

    def train_loras(base, jobs, start, *more, **how):
        orders.append(list(start.factors))
        return trained(base, jobs, start, *more, **how)

    personal = started(tiny, tmp_path)
    monkeypatch.setattr(Store, "load", reversed_layers)
    monkeypatch.setattr(stages, "train_loras", train_loras)
    personal.update(GROWN)
    assert orders
    assert all(order == list(tiny[0].targets) for order in orders)


@pytest.mark.parametrize("policy", ["posterior", "loss"])
@pytest.mark.parametrize("actions", [["retrain", "refresh"], ["keep", "refresh"]])
def test_updated_coefficients_are_those_of_the_whole_history(tiny, tmp_path, monkeypatch, policy, actions):
    merge = override(TINY_RUN, [f"merge.policy={policy}", "merge.k=0"]).merge
    personal = started(tiny, tmp_path / "grown", merge=merge)
    for action, cut in zip(actions, [5, 6]):
        monkeypatch.setattr("mta.personalize.update.decide", lambda before, new, action=action: action)
        personal.update([person.first(cut) for person in GROWN])
    whole = started(tiny, tmp_path / "whole", GROWN, merge=merge)
    young = started(tiny, tmp_path / "young", merge=merge)
    for person in GROWN:
        states = [one.state(person.id) for one in (personal, whole, young)]  # anchors in the order of the encodings
        found, expected, before = (dict(zip(state.anchors, state.w)) for state in states)
        assert found == pytest.approx(expected, abs=1e-7)
        assert found != pytest.approx(before, abs=1e-6)


@pytest.mark.parametrize("action", ["keep", "retrain", "refresh"])
def test_updated_laplace_coefficients_are_those_of_the_whole_history(trusting, tmp_path, monkeypatch, action):
    monkeypatch.setattr("mta.personalize.update.decide", lambda before, new: action)
    laplace = override(TINY_RUN, ["merge.policy=laplace"]).merge
    grown = started(trusting, tmp_path / "grown", [person.first(1) for person in GROWN], merge=laplace)
    young = [grown.state(person.id) for person in GROWN]
    for cut in (3, 6):
        assert grown.update([person.first(cut) for person in GROWN]).refreshed == len(GROWN)
    whole = started(trusting, tmp_path / "whole", GROWN, merge=laplace)
    for person, before in zip(GROWN, young):
        found, expected = grown.state(person.id), whole.state(person.id)
        assert found.shots == expected.shots == 6
        assert found.gradient == pytest.approx(expected.gradient, abs=1e-9)
        assert found.loglik == pytest.approx(expected.loglik, abs=1e-9)
        assert found.w == pytest.approx(expected.w, abs=1e-9)
        assert found.w != pytest.approx(before.w, abs=1e-6)
        assert found.history == person.digest()
        unchanged = all(torch.equal(t, before.stack.tensors()[name]) for name, t in found.stack.tensors().items())
        assert unchanged == (action == "keep")


def test_items_that_a_stack_was_kept_for_do_not_lower_its_later_rates(trusting, tmp_path, monkeypatch):
    """The rates of a stack's updates add up to that of the items that it was trained on."""
    known, merge = [], override(TINY_RUN, ["merge.policy=laplace"]).merge
    personal = started(trusting, tmp_path, [person.first(2) for person in GROWN], merge=merge)
    monkeypatch.setattr(
        stages, "adapt", lambda base, jobs, *more, **how: known.append(jobs) or adapt(base, jobs, *more, **how)
    )
    for action, cut in (("keep", 3), ("keep", 4), ("refresh", 5), ("refresh", 6)):
        monkeypatch.setattr("mta.personalize.update.decide", lambda before, new, action=action: action)
        personal.update([person.first(cut) for person in GROWN])
    assert [{job.examples_before for job in jobs} for jobs in known] == [{2}, {3}]
    assert {(personal.state(p.id).shots, personal.state(p.id).untrained) for p in GROWN} == {(6, 2)}
    assert all(personal.state(p.id).from_bytes(personal.state(p.id).to_bytes()) == personal.state(p.id) for p in GROWN)


def test_coefficients_from_gradients_without_a_stack_are_updated_without_a_choice(tiny, tmp_path, monkeypatch):
    monkeypatch.delattr("mta.personalize.update.decide")
    off = {"merge": override(TINY_RUN, ["merge.policy=laplace"]).merge}
    off |= {"stack": TINY_RUN.stack.model_copy(update={"enabled": False})}
    grown = started(tiny, tmp_path / "grown", **off)
    assert grown.update(GROWN).refreshed == len(GROWN)
    whole = started(tiny, tmp_path / "whole", GROWN, **off)
    for person in GROWN:
        found, expected = grown.state(person.id), whole.state(person.id)
        assert (found.w, found.shots) == (pytest.approx(expected.w, abs=1e-9), expected.shots)
        assert found.losses.pooled == pytest.approx(expected.losses.pooled, abs=1e-9)


def test_where_everybody_gets_the_same_merge_a_grown_history_is_updated(tiny, tmp_path):
    base, bank = tiny
    alike = replace(bank.calibration, mu=bank.calibration.mu * 0 + 0.1, curvature=bank.calibration.curvature * 0)
    tiny = base, replace(bank, calibration=alike)
    personal = personalizer(*tiny, merge=override(TINY_RUN, ["merge.policy=laplace"]).merge)
    personal.personalize(YOUNG)
    before = personal.state("p0")
    done = personal.update(GROWN)
    assert (done.begun, done.failed, done.kept + done.retrained + done.refreshed) == (0, {}, len(GROWN))
    assert (before.gradient, personal.state("p0").w) == ((), before.w)


def test_a_past_that_was_changed_is_begun_anew(tiny, tmp_path):
    personal = started(tiny, tmp_path)
    changed = Person(GROWN[0].id, GROWN[0].items[1:])
    done = personal.update([changed])
    assert (done.begun, personal.state(changed.id).history) == (1, changed.digest())


@pytest.mark.parametrize(
    "changes",
    [
        {"stack": TINY_RUN.stack.model_copy(update={"enabled": False})},
        {"stack": override(TINY_RUN, ["stack.training.lr=0.5"]).stack},
        {"merge": override(TINY_RUN, ["merge.policy=uniform"]).merge},
        {"merge": override(TINY_RUN, ["merge.k=2"]).merge},
        {"seed": 5},
    ],
)
def test_other_settings_begin_anew(tiny, tmp_path, changes):
    started(tiny, tmp_path)
    assert personalizer(*tiny, tmp_path, **changes).update(GROWN[:1]).begun == 1


@pytest.mark.parametrize("policy", ["posterior", "laplace", "uniform", "none"])
def test_mates_do_not_count(trusting, tmp_path, monkeypatch, policy):
    merge, action = MergeSettings(policy=policy, k=0), "retrain" if policy in ("uniform", "none") else "refresh"
    monkeypatch.setattr("mta.personalize.update.decide", lambda before, new: action)
    together, alone = (started(trusting, tmp_path / name, merge=merge) for name in ("together", "alone"))
    done = together.update(GROWN)
    assert (done.retrained, done.refreshed) == ((4, 0) if action == "retrain" else (0, 4))
    for person in GROWN[:2]:
        alone.update([person])
        one, other = together.state(person.id), alone.state(person.id)
        assert one.w == pytest.approx(other.w, abs=1e-10)
        for name, tensor in one.stack.tensors().items():
            assert (tensor - other.stack.tensors()[name]).abs().max() < 1e-10


def test_an_update_that_is_stopped_and_repeated_ends_as_if_undisturbed(by_policy, tmp_path):
    """Neither are items added twice, nor are people left out."""
    *tiny, merge = by_policy
    halves = [person.first((len(person.items) + 1) // 2) for person in PEOPLE]
    whole = knowing(*tiny, tmp_path / "whole", halves, merge=merge)
    whole.update(PEOPLE)
    torn = in_cohorts_of(*tiny, 2, store=knowing(*tiny, tmp_path / "torn", halves, merge=merge).store, merge=merge)
    for at in (1, 3, 6):  # each in what the one before left
        steps = itertools.count(1)
        with stopped_when(lambda stage, step, steps=steps, at=at: next(steps) == at) as stop:
            torn.update(PEOPLE, on_step=stop)
    torn.update(PEOPLE)
    for person in PEOPLE:
        same(torn.state(person.id), whole.state(person.id))
    again = torn.update(PEOPLE)
    assert again.kept + again.unchanged == len(PEOPLE)


def test_an_update_keeps_the_grown_histories(tiny, tmp_path):
    personal = started(tiny, tmp_path)
    personal.update(GROWN, histories=GROWN)
    assert [personal.store.history(person.id) for person in GROWN] == GROWN


def test_an_update_that_fails_for_one_person_updates_the_others(tiny, tmp_path):
    personal = started(tiny, tmp_path)
    broken = replace(personal.state("p0"), work="0" * 64)
    for _, b in broken.stack.factors.values():
        b.fill_(torch.finfo(b.dtype).max)
    personal.store.save("p0", broken)
    done = personal.update(GROWN)
    assert list(done.failed) == ["p0"]
    assert "expected finite numbers" in str(done.failed["p0"])
    assert personal.state("p0") == broken
    assert done.kept + done.retrained + done.refreshed == len(GROWN) - 1


def test_an_update_that_was_overtaken_says_so(tiny, tmp_path, monkeypatch):
    """An update from an older version does not replace a newer version that was saved meanwhile; others are updated."""
    personal = started(tiny, tmp_path, YOUNG[:2])
    other = personalizer(*tiny, tmp_path, seed=1)

    def meanwhile(before, new):
        other.personalize(GROWN[:1])
        return "retrain"

    monkeypatch.setattr("mta.personalize.update.decide", meanwhile)
    done = personal.update(GROWN[:2])
    assert list(done.failed) == ["p0"]
    assert done.failed["p0"].message.startswith("a newer version of 'p0' was saved meanwhile")
    assert personal.state("p0") == other.state("p0")
    assert [personal.store.versions(id) for id in ("p0", "p1")] == [[1, 2], [1, 2]]


@pytest.mark.parametrize("update", [False, True])
def test_a_state_that_another_process_made_meanwhile_is_not_replaced(tiny, tmp_path, update):
    """The run was planned when the person had no state, or one of another bank."""
    other = personalizer(*tiny, tmp_path, seed=1)

    class Slow(LocalExecutor):
        def run(self, *given):
            other.personalize(GROWN[:1])
            return super().run(*given)

    personal = Personalizer(*tiny, other.store, run=TINY_RUN, encoder=HashEncoder(), executor=Slow())
    done = personal.update(YOUNG[:2]) if update else personal.personalize(YOUNG[:2])
    assert list(done.failed) == ["p0"]
    assert personal.state("p0") == other.state("p0")
    assert [personal.store.versions(id) for id in ("p0", "p1")] == [[1], [1]]


@pytest.mark.parametrize("w", [(1.0, 1e-9, 1e-9), (0.5, 0.0, 0.2)])
def test_a_posterior_that_float32_cannot_hold_begins_anew(tiny, tmp_path, monkeypatch, w):
    """The evidence of earlier items is lost in such coefficients."""
    merge = override(TINY_RUN, ["merge.policy=posterior", "merge.k=0"]).merge
    personal = started(tiny, tmp_path / "grown", YOUNG[:1], merge=merge)
    with monkeypatch.context() as patched:
        load = Store.load
        patched.setattr(Store, "load", lambda *given: replace(load(*given), w=w))
        assert personal.update(GROWN[:1]).begun == 1
    whole = started(tiny, tmp_path / "whole", GROWN[:1], merge=merge)
    same(personal.state(GROWN[0].id), whole.state(GROWN[0].id))


def test_a_policy_of_cosines_and_losses_gets_both_of_a_grown_history(tiny, tmp_path, monkeypatch):
    seen = []

    def both(settings, known):
        seen.append(bool(known.similarity.any()))
        return known.loglik * 0 + 0.1

    monkeypatch.setitem(POLICIES, "loss", replace(policy_named("loss"), weigh=both, cosines=True))
    monkeypatch.setattr("mta.personalize.update.decide", lambda *_: "refresh")
    merge = override(TINY_RUN, ["merge.policy=loss", "merge.k=0"]).merge
    personal = personalizer(*tiny, merge=merge)
    personal.personalize(YOUNG[:1])
    personal.update(GROWN[:1])
    assert seen == [True, True]


@pytest.mark.parametrize("start", ["zero", "posterior"])
def test_learned_coefficients_are_fitted_to_all_new_items(tiny, tmp_path, monkeypatch, start):
    monkeypatch.setattr("mta.personalize.update.decide", lambda before, new: "retrain")
    personal = started(tiny, tmp_path, merge=MergeSettings(policy="learned", options={"start": start}))
    before = [personal.state(person.id).w for person in GROWN]
    assert personal.update(GROWN).refreshed == len(GROWN)
    assert all(personal.state(person.id).w != w for person, w in zip(GROWN, before))
