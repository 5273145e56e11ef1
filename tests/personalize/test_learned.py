"""Stage 2: learned coefficients against a plain loop, and the ways to compute a merge."""

from dataclasses import replace

import plain
import pytest
import torch
from arrays import near, normal
from scenes import scene as scene  # the fixture
from tiny import random_examples, random_loras

from mta.config import MergeSettings, Training
from mta.lora.layers import Gated, PerPerson, Shared
from mta.personalize.evidence import gather_evidence
from mta.personalize.merge import Earlier, Merge, fit_merge, learn, merge_adapters
from mta.training.scoring import log_likelihood

START = Merge(torch.tensor([[2, 0], [1, 3], [3, 2]]), torch.tensor([[0.4, 0.2], [0.1, 0.6], [0.3, 0.3]]).double())


DESCENT = Training(lr=0.1, steps=6, batch_size=64, eps=1.0, clip=1e9)
FROM_ZERO, FROM_POSTERIOR = ({"start": start, "training": DESCENT.model_dump()} for start in ("zero", "posterior"))


def test_learning_does_not_depend_on_mates(scene):
    base, task, bank, jobs = scene
    together = learn(base, jobs, bank, [Shared(task)], START, DESCENT, tokens_per_batch=50)
    for u, job in enumerate(jobs):
        mine = Merge(START.ids[u : u + 1], START.w[u : u + 1])
        near(together.w[u], learn(base, [job], bank, [Shared(task)], mine, DESCENT).w[0])


def test_learning_equals_a_plain_loop_over_the_coefficients(scene):
    """torch.optim.AdamW on two numbers, with dense updates in the weights."""
    base, task, bank, jobs = scene
    training = DESCENT.model_copy(update={"weight_decay": 0.3, "schedule": "linear", "clip": 0.5})
    found = learn(base, jobs, bank, [Shared(task)], START, training)
    for u, job in enumerate(jobs):
        shift = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.AdamW([shift], lr=0.1, eps=1.0, weight_decay=0.3)
        for step in range(6):
            optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 6)
            update = plain.merge(bank, START.ids[u].tolist(), START.w[u] + shift)
            changed = plain.weights(base, plain.update(task), update)
            total = sum(plain.log_likelihood(base, changed, e) for e in job.examples)
            optimizer.zero_grad()
            (-total / sum(len(e.target) for e in job.examples)).backward()
            torch.nn.utils.clip_grad_norm_([shift], 0.5)
            optimizer.step()
        assert float(shift.detach().abs().max()) > 1e-2
        near(found.w[u], START.w[u] + shift.detach(), 1e-9)


def test_the_learned_policy_may_start_from_zero_and_then_gathers_nothing(scene):
    base, task, bank, jobs = scene
    steps = []
    settings = MergeSettings(policy="learned", options=FROM_ZERO)
    how = {"similarity": normal(3, 4), "on_step": steps.append}
    found = fit_merge(base, jobs, bank, [Shared(task)], settings, **how)
    nothing = Merge(found.ids, torch.zeros_like(found.w))
    near(found.w, learn(base, jobs, bank, [Shared(task)], nothing, DESCENT).w)
    assert steps


def test_the_learned_policy_starts_from_the_posterior(scene):
    base, task, bank, jobs = scene
    pooled, similarity = [Shared(task)], normal(3, 4)
    given = {"similarity": similarity, "evidence": gather_evidence(base, jobs, bank, pooled)}
    settings = MergeSettings(policy="learned", options=FROM_POSTERIOR)
    posterior = fit_merge(base, jobs, bank, pooled, MergeSettings(policy="posterior"), **given)
    found = fit_merge(base, jobs, bank, pooled, settings, **given)
    near(found.w, learn(base, jobs, bank, pooled, posterior, DESCENT).w)


@pytest.mark.parametrize("start", [FROM_ZERO, FROM_POSTERIOR], ids=["zero", "posterior"])
def test_scale_multiplies_what_was_learned(scene, start):
    base, task, bank, jobs = scene
    pooled = [Shared(task)]
    given = {"similarity": normal(3, 4), "evidence": gather_evidence(base, jobs, bank, pooled)}
    plainly, scaled = (
        fit_merge(base, jobs, bank, pooled, MergeSettings(policy="learned", options=start, scale=s), **given)
        for s in (1.0, 2.0)
    )
    near(scaled.w, 2 * plainly.w)
    again = [
        fit_merge(base, jobs, bank, pooled, settings, earlier=Earlier(before, torch.ones(3)))
        for before, s in ((plainly, 1.0), (scaled, 2.0))
        for settings in [MergeSettings(policy="learned", options=FROM_POSTERIOR, scale=s)]
    ]
    near(again[1].w, 2 * again[0].w)


def test_anchors_that_were_chosen_by_losses_stay_when_a_history_grows(scene):
    base, task, bank, jobs = scene
    pooled, settings = [Shared(task)], MergeSettings(policy="uniform", options={"by_loss": 2})
    evidence = gather_evidence(base, jobs, bank, pooled)
    before = fit_merge(base, jobs, bank, pooled, settings, evidence=evidence)
    grown = replace(evidence, loglik=-evidence.loglik)
    after = fit_merge(base, jobs, bank, pooled, settings, evidence=grown, earlier=Earlier(before, torch.ones(3)))
    assert after.ids.equal(before.ids)
    near(after.w, before.w)


WAYS = Merge(torch.tensor([[2, 7], [0, 5]]), torch.tensor([[0.5, -0.2], [0.9, 0.3]], dtype=torch.float64))


WIDE = Merge(torch.tensor([[2, 7, 1], [0, 5, 4]]), torch.tensor([[0.5, 0.2, 0.1], [0.9, 0.3, 0.2]]).double())


@pytest.fixture
def bank_of_eight(tiny):
    base, bank = tiny
    anchors = random_loras(base, 8, seed=5, size=0.2)
    return base, replace(bank, anchors=anchors, device_anchors=anchors)


@pytest.mark.parametrize(("merge", "way"), [(WAYS, PerPerson), (WIDE, Gated)], ids=["gathered", "from the bank"])
def test_the_exact_merge_equals_dense_updates(bank_of_eight, merge, way):
    """The adapters score like a model with the exact merge written into its weights."""
    (base, bank), examples = bank_of_eight, random_examples(2, seed=4)
    (adapters,) = merge_adapters(bank, merge)
    assert isinstance(adapters, way)  # whichever is less to move
    found = log_likelihood(base, [examples] * 2, [adapters])
    for u in range(2):
        changed = plain.weights(base, plain.merge(bank.anchors, merge.ids[u].tolist(), merge.w[u]))
        near(found[u], torch.stack([plain.log_likelihood(base, changed, e) for e in examples]))


def test_a_merge_of_nothing_is_not_computed(bank_of_eight):
    _, bank = bank_of_eight
    nothing = Merge(WAYS.ids, torch.zeros_like(WAYS.w))
    assert merge_adapters(bank, nothing) == []
