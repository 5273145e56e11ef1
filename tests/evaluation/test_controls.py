"""Controls: everybody gets the model of one other person, or the same merge."""

from dataclasses import replace

import pytest
import torch
from batches import batch_of
from conftest import TINY_RUN, HashEncoder, people_of
from hypothesis import given
from hypothesis import strategies as st

from mta.bank.calibration.info import CalibrationInfo
from mta.bank.calibration.laplace import Calibration
from mta.config import MergeSettings
from mta.data.history import Person
from mta.errors import ConfigError, InputError
from mta.evaluation.context import Context
from mta.evaluation.methods import Merged, MergeThenAdapt, OtherPerson, PopulationMerge, TaskLora
from mta.evaluation.methods.controls import givers_of
from mta.evaluation.methods.method import answer
from mta.evaluation.protocol import TestBatch
from mta.lora.layers import Shared
from mta.personalize.merge import Merge, merge_loras

PEOPLE = people_of(4, prefix="x", seed=7)


@pytest.fixture
def batch(tiny):
    return batch_of(tiny, PEOPLE)


@given(groups=st.lists(st.sampled_from(["", "a", "b"]), min_size=1, max_size=8), order=st.randoms())
def test_each_person_gets_the_shots_of_another_group(groups, order):
    people = [Person(f"p{n}", (), (), group) for n, group in enumerate(groups)]
    if len({person.group or person.id for person in people}) == 1:
        with pytest.raises(InputError, match="no other person to take shots from"):
            givers_of(people, people)
        return
    found = givers_of(people, people)
    for one, giver in zip(people, found):
        assert one.id != giver.id
        assert not one.group or one.group != giver.group
    if not any(groups):
        assert {giver.id for giver in found} == {person.id for person in people}
    some, every = (order.sample(people, count) for count in (order.randint(0, len(people)), len(people)))
    expected = dict(zip((person.id for person in people), found))
    assert givers_of(some, every) == [expected[person.id] for person in some]  # whatever their order and batch


@pytest.mark.parametrize("over", [Merged(merge=MergeSettings(policy="posterior", k=0)), MergeThenAdapt()])
def test_other_persons_shots_give_other_persons_models(batch, over):
    """Person u is answered by the model of their giver, as if the giver had asked their questions."""
    givers = [batch.people.index(giver) for giver in givers_of(batch.people, batch.people)]
    asked_by_givers = [batch.queries[givers.index(u)] for u in range(len(givers))]
    expected = over.run(replace(batch, queries=asked_by_givers, merges_from=batch), seed=0)
    found = OtherPerson(over=over).run(batch, seed=0)
    for u, giver in enumerate(givers):
        torch.testing.assert_close(found.merge.w[u], expected.merge.w[giver], rtol=0, atol=1e-12)
        torch.testing.assert_close(found.answers[u].scores, expected.answers[giver].scores, rtol=0, atol=1e-10)


def test_a_batch_of_some_people_takes_others_from_all_tested_people(tiny):
    context = Context(*tiny, HashEncoder(), TINY_RUN)
    every = TestBatch.of(context, PEOPLE, shots=4, queries=2)
    some = TestBatch.of(context, PEOPLE[1:3], shots=4, queries=2, tested=PEOPLE)
    control = OtherPerson(over=Merged(merge=MergeSettings(policy="posterior", k=0)))
    torch.testing.assert_close(control.run(some, 0).merge.w, control.run(every, 0).merge.w[1:3], rtol=0, atol=1e-12)


def test_the_population_merge_is_the_dense_merge_at_mu_for_everybody(tiny):
    base, bank = tiny
    mu = torch.linspace(-0.5, 0.7, len(bank), dtype=torch.float64)
    known = Calibration(mu, torch.eye(len(bank), dtype=torch.float64), CalibrationInfo(ridge=0.3, prior=1.0))
    batch = batch_of((base, replace(bank, calibration=known)), PEOPLE)
    found = PopulationMerge().run(batch, seed=0)
    merge = Merge(torch.arange(len(bank))[None], mu[None])
    dense = merge_loras(bank.device_anchors, merge)
    expected = answer(batch, range(len(batch.people)), [*bank.task_adapters, Shared(dense)])
    assert found.bytes_per_person == 0
    for one, other in zip(found.answers, expected):
        torch.testing.assert_close(one.scores, other.scores, rtol=0, atol=1e-10)


def test_without_a_calibration_there_is_no_population_merge(tiny):
    base, bank = tiny
    with pytest.raises(ConfigError, match="the bank has no calibration"):
        PopulationMerge().run(batch_of((base, replace(bank, calibration=None))), seed=0)


def test_the_control_of_a_method_that_does_not_personalize_is_the_method(batch):
    one, other = TaskLora().run(batch, 0), OtherPerson(over=TaskLora()).run(batch, 0)
    assert all(torch.equal(a.scores, b.scores) for a, b in zip(one.answers, other.answers))
