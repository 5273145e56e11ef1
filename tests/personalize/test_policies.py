"""Stage 2: policies against their formulas, evidence and learning against plain loops, and the modes of a merge."""

import math
from dataclasses import replace

import plain
import pytest
import torch
from arrays import near, normal
from conftest import people_of
from pydantic import ValidationError
from scenes import scene as scene  # the fixture

from mta.bank.calibration.info import CalibrationInfo
from mta.bank.calibration.laplace import Calibration, curvature_of
from mta.config import MergeSettings, plugins
from mta.config.schema import POLICIES, POLICY_GROUP
from mta.errors import AnchorNotFound, ConfigError
from mta.lora.layers import Shared
from mta.personalize.evidence import Evidence, Labels, gather_evidence
from mta.personalize.merge import Earlier, Merge, check_merge, coefficients, fit_merge, needs_evidence
from mta.personalize.policies import PolicyInput, policy_named
from mta.personalize.shots import ShotGradients, shots_of
from mta_lab.policies import fit_labels

U, N = 3, 5
EVERY = (*POLICIES, *plugins.names(POLICY_GROUP))
SIMILARITY = normal(U, N).tanh()
ANCHORS, TASK = -40 + 3 * normal(U, N, seed=1), -40 + normal(U, seed=2)


COUNTS = torch.tensor([[7.0], [16.0], [30.0]], dtype=torch.float64)  # as if each person had one shot
EVIDENCE = Evidence(torch.cat([TASK[:, None], ANCHORS], 1)[:, None], COUNTS)
CALIBRATION = Calibration(0.1 * normal(N), curvature_of(normal(30, N, seed=6)), CalibrationInfo(ridge=0.3, prior=4.0))


def weighed(policy: str, **settings) -> Merge:
    return coefficients(MergeSettings(policy=policy, **settings), SIMILARITY, EVIDENCE)


def shares(scores: list[float]) -> list[float]:
    total = sum(math.exp(score) for score in scores)
    return [math.exp(score) / total for score in scores]


def nearest(u: int, k: int, scores: torch.Tensor = SIMILARITY) -> list[int]:
    return sorted(range(N), key=lambda n: -float(scores[u, n]))[:k]


# -- policies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, N])
def test_uniform_shares_evenly_among_the_nearest(k):
    found = weighed("uniform", k=k)
    assert found.ids.tolist() == [nearest(u, k) for u in range(U)]
    near(found.w, [[1 / k] * k] * U)


def test_top1_takes_the_nearest_alone():
    found = weighed("top1", k=3)
    assert found.ids[:, 0].tolist() == [nearest(u, 1)[0] for u in range(U)]
    near(found.w, [[1, 0, 0]] * U)


@pytest.mark.parametrize(("k", "tau"), [(2, 0.2), (4, 1.5), (0, 0.05)])
def test_similarity_is_a_softmax_of_cosines_over_tau(k, tau):
    found = weighed("similarity", k=k, tau=tau)
    for u in range(U):
        near(found.w[u], shares([float(SIMILARITY[u, n]) / tau for n in nearest(u, k or N)]))


def test_released_gives_the_nearer_anchor_the_share_of_the_farther_one():
    similarity = torch.tensor([[0.6, 0.9, 0.1], [-0.5, -0.2, -0.9], [0.0, -0.1, 0.4]], dtype=torch.float64)
    found = coefficients(MergeSettings(policy="released", k=2), similarity)
    assert found.ids.tolist() == [[1, 0], [1, 0], [2, 0]]
    expected = torch.tensor([[0.6 / 1.5, 0.9 / 1.5], [0.5, 0.5], [0.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(found.w, expected)


@pytest.mark.parametrize("k", [2, 0])
def test_loss_is_a_softmax_of_minus_the_mean_loss_per_token(k):
    found = weighed("loss", k=k, options={"tau": 0.3})
    for u in range(U):
        losses = [-float(EVIDENCE.anchor_loglik[u, n] / EVIDENCE.tokens[u]) for n in nearest(u, k or N)]
        near(found.w[u], shares([-loss / 0.3 for loss in losses]))


@pytest.mark.parametrize(("k", "prior", "temperature"), [(2, 0.5, 4.0), (0, 0.1, 1.0), (3, 0.9, 0.5)])
def test_posterior_is_bayes_with_the_task_lora_as_the_null_anchor(k, prior, temperature):
    found = weighed("posterior", k=k, null_prior=prior, temperature=temperature)
    for u in range(U):
        ids = nearest(u, k or N)
        gains = [float(EVIDENCE.anchor_loglik[u, n] - EVIDENCE.pooled_loglik[u]) for n in ids]
        odds = [(1 - prior) / len(ids) * math.exp(gain / temperature) for gain in gains]
        near(found.w[u], [o / (prior + sum(odds)) for o in odds])


def test_fixed_gives_the_nearest_its_share_and_the_rest_alike():
    near(weighed("fixed", k=4, options={"share": 0.7}).w, [[0.7, 0.1, 0.1, 0.1]] * U)
    near(weighed("fixed", k=1, options={"share": 0.7}).w, [[0.7]] * U)


@pytest.mark.parametrize("policy", ["uniform", "loss"])
def test_anchors_chosen_by_loss_are_those_with_the_highest_likelihood_of_the_shots(policy):
    found = weighed(policy, options={"by_loss": 2})
    for ids, w, u in zip(found.ids, found.w, range(U)):
        assert set(ids[w > 0].tolist()) == set(nearest(u, 2, EVIDENCE.anchor_loglik))
    near(found.w.sum(1), [1.0] * U)


def test_scale_multiplies_all_coefficients():
    near(weighed("posterior", k=3, scale=1.7).w, 1.7 * weighed("posterior", k=3).w)


@pytest.mark.parametrize(
    "policy", ["uniform", "top1", "similarity", "released", "loss", "posterior", "learned", "fixed"]
)
def test_zero_means_all_anchors(policy):
    found = weighed(policy, k=0)
    assert [sorted(ids) for ids in found.ids.tolist()] == [list(range(N))] * U


def test_more_anchors_than_there_are_is_an_error():
    with pytest.raises(AnchorNotFound) as caught:
        weighed("uniform", k=6)
    assert str(caught.value) == "merge.k is 6, but the bank has 5 anchors\n  Lower merge.k, or use 0 for all."


@pytest.mark.parametrize(
    ("policy", "options"), [("loss", {}), ("posterior", {}), ("learned", {}), ("uniform", {"by_loss": 2})]
)
def test_a_policy_that_reads_losses_asks_for_them(policy, options):
    with pytest.raises(ConfigError, match=r"^this policy needs the anchors' likelihood of the shots"):
        coefficients(MergeSettings(policy=policy, options=options), SIMILARITY)


def test_gates_are_the_coefficients_over_all_anchors():
    gates = Merge(torch.tensor([[3, 1]]), torch.tensor([[0.25, 0.5]])).gates(5)
    assert gates.tolist() == [[0, 0.5, 0, 0.25, 0]]


def labels_of(shots: list[int], kinds: int = 4) -> Labels:
    gold = torch.full((len(shots), max(shots)), -1)
    for u, count in enumerate(shots):
        gold[u, :count] = torch.arange(count) % kinds
    return Labels(2 * normal(len(shots), max(shots), kinds, 1 + N, seed=3), gold)


def test_a_policy_of_no_package_is_refused():
    with pytest.raises(ValidationError, match=r"no such policy; expected one of auto, .*, uniform"):
        MergeSettings(policy="typo")


@pytest.mark.parametrize("policy", EVERY)
def test_no_policy_depends_on_mates(policy):
    """Nor on how many shots these have: what one person lacks is padded with zeros, and counts for nothing."""
    settings, ids = MergeSettings(policy=policy), torch.tensor([[2, 0, 1], [1, 2, 3]])
    cosines, labels = SIMILARITY[:2].gather(1, ids), labels_of([1, 3])
    there = (labels.gold >= 0).double()
    both = Evidence((-40 + 3 * normal(2, 3, 1 + N, seed=4)) * there[..., None], 5 * there, labels)
    one = Evidence(both.loglik[:1, :1], both.counts[:1, :1], Labels(labels.scores[:1, :1], labels.gold[:1, :1]))
    sums, loglik, shots = normal(2, N, seed=5), torch.tensor([-3.0, -2.0]), torch.tensor([1, 3])
    two, mine = (ShotGradients(sums[:u], loglik[:u], shots[:u]) for u in (2, 1))
    weigh = policy_named(policy).weigh
    w = weigh(settings, PolicyInput(ids, cosines, both, gradients=two, calibration=CALIBRATION))
    assert w.shape == ids.shape
    alone = PolicyInput(ids[:1], cosines[:1], one, gradients=mine, calibration=CALIBRATION)
    near(w[:1], weigh(settings, alone))


@pytest.mark.parametrize("strength", [0.5, 20.0])
def test_ridge_is_the_minimum_of_its_objective(strength):
    """The gradient by autograd of the written-out objective vanishes there."""
    labels, ids = labels_of([2, 5, 3]), torch.tensor([[0, 3], [4, 1], [2, 0]])
    w = fit_labels(labels, ids, strength).requires_grad_()
    objective = strength / 2 * (w**2).sum()
    for u in range(3):
        for m in range(int((labels.gold[u] >= 0).sum())):
            task = labels.scores[u, m, :, 0]
            mixed = task + sum(w[u, k] * (labels.scores[u, m, :, 1 + ids[u, k]] - task) for k in range(2))
            objective = objective - mixed.log_softmax(0)[labels.gold[u, m]]
    near(torch.autograd.grad(objective, w)[0], torch.zeros(3, 2, dtype=torch.float64), 1e-9)
    assert w.abs().max() > 1e-2


@pytest.mark.parametrize(("anchors", "strength", "off"), [(16, 300.0, 6.0), (16, 30.0, 4.0), (4, 1.0, 5.0)])
def test_ridge_finds_the_minimum_where_the_pooled_model_is_certain_and_wrong(anchors, strength, off):
    scores = torch.full((1, 32, 5, 1 + anchors), -3.0, dtype=torch.float64)
    scores[:, :, 1], scores[:, :, 0] = 0.0, -off
    scores[:, :, 0, 1:] += torch.linspace(2, 4, anchors, dtype=torch.float64)  # what anchors add to the right label
    w = fit_labels(Labels(scores, torch.zeros(1, 32, dtype=torch.long)), torch.arange(anchors)[None], strength)
    w.requires_grad_()
    mixed = scores[0, :, :, 0] + (scores[0, :, :, 1:] - scores[0, :, :, :1]) @ w[0]
    objective = strength / 2 * (w**2).sum() - mixed.log_softmax(1)[:, 0].sum()
    near(torch.autograd.grad(objective, w)[0], torch.zeros_like(w), 1e-6)


def test_ridge_needs_labels():
    with pytest.raises(ConfigError, match="needs a task with labels"):
        weighed("ridge")


# -- evidence ----------------------------------------------------------------------------------------------------------


def test_evidence_equals_scoring_under_one_anchor_at_a_time(scene):
    base, task, bank, jobs = scene
    found = gather_evidence(base, jobs, bank, [Shared(task)])
    for u, job in enumerate(jobs):
        alone = plain.weights(base, plain.update(task))
        near(found.pooled_loglik[u], sum(plain.log_likelihood(base, alone, e) for e in job.examples))
        for n in range(4):
            with_anchor = plain.weights(base, plain.update(task), plain.update(bank, n))
            near(found.anchor_loglik[u, n], sum(plain.log_likelihood(base, with_anchor, e) for e in job.examples))
    assert found.tokens.tolist() == [sum(len(e.target) for e in job.examples) for job in jobs]


@pytest.mark.parametrize("budget", [1, 60, 4096])
def test_evidence_does_not_depend_on_mates_or_batches(scene, budget):
    base, task, bank, jobs = scene
    together = gather_evidence(base, jobs[::-1], bank, [Shared(task)], tokens_per_batch=budget)
    for u, job in enumerate(jobs[::-1]):
        alone = gather_evidence(base, [job], bank, [Shared(task)])
        near(together.anchor_loglik[u], alone.anchor_loglik[0])
        near(together.pooled_loglik[u], alone.pooled_loglik[0])


def test_labels_share_the_likelihood_of_their_golds(tiny):
    """Scoring all labels of a shot gives the same sums as scoring the right labels, and finds the right labels."""
    base, bank = tiny
    jobs = [shots_of(base, bank.task, person) for person in people_of(2, items=3)]
    plainly = [replace(job, alternatives=()) for job in jobs]
    found = gather_evidence(base, jobs, bank.device_anchors, bank.task_adapters)
    reference = gather_evidence(base, plainly, bank.device_anchors, bank.task_adapters)
    near(found.anchor_loglik, reference.anchor_loglik, 1e-9)
    near(found.pooled_loglik, reference.pooled_loglik, 1e-9)
    assert reference.labels is None
    assert found.labels.gold.tolist() == [[int(i.fields["rating"]) - 1 for i in p.items] for p in people_of(2, items=3)]


def test_evidence_reports_a_pass_per_anchor_and_one_for_the_task_lora(scene):
    base, task, bank, jobs = scene
    steps = []
    gather_evidence(base, jobs, bank, [Shared(task)], on_step=lambda stage, step: steps.append((stage, step)))
    assert [(stage, step.step) for stage, step in steps] == [("evidence", n) for n in range(1, 6)]
    assert steps[-1][1].examples == steps[-1][1].examples_total == 5 * 9


def test_evidence_is_needed_only_if_the_policy_reads_it(scene):
    base, task, bank, jobs = scene
    evidence = gather_evidence(base, jobs, bank, [Shared(task)])

    def trains(policy, evidence=None):
        steps, settings = [], MergeSettings(policy=policy)
        how = {"similarity": normal(3, 4), "evidence": evidence, "on_step": steps.append}
        fit_merge(base, jobs, bank, [Shared(task)], settings, **how)
        return bool(steps)

    assert not trains("similarity")
    assert not trains("posterior", evidence)
    assert trains("learned", evidence)
    with pytest.raises(ConfigError, match="this policy needs the anchors' likelihood of the shots"):
        trains("posterior")
    needy = [policy for policy in EVERY if needs_evidence(MergeSettings(policy=policy))]
    assert needy == ["posterior", "learned", "loss", "ridge"]
    assert not needs_evidence(MergeSettings(policy="learned"), grown=True)


# -- coefficients from a gradient --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calibration():
    return Calibration(0.2 * normal(4), 9 * curvature_of(normal(30, 4, seed=6)), CalibrationInfo(ridge=0.3, prior=4.0))


def by_gradient(scene, calibration, jobs=None, **how) -> Merge:
    base, task, bank, all_jobs = scene
    settings = MergeSettings(policy="laplace", **how.pop("settings", {}))
    return fit_merge(base, jobs or all_jobs, bank, [Shared(task)], settings, calibration=calibration, **how)


def test_laplace_solves_the_gradient_of_the_dense_merge(scene, calibration):
    base, task, bank, jobs = scene
    found = by_gradient(scene, calibration)
    for u, job in enumerate(jobs):
        w = calibration.mu.clone().requires_grad_()
        changed = plain.weights(base, plain.update(task), plain.merge(bank, range(4), w))
        loglik = sum(plain.log_likelihood(base, changed, e) for e in job.examples)
        gradient = torch.autograd.grad(loglik, w)[0]
        near(found.gradients.sums[u], gradient, 1e-9)
        shots = torch.tensor([len(job.examples)])
        near(found.w[u], calibration.coefficients(gradient[None], loglik.detach()[None], shots)[0], 1e-9)


def test_laplace_needs_one_pass_and_neither_encodings_nor_evidence(scene, calibration):
    steps = []
    by_gradient(scene, calibration, on_step=lambda step: steps.append((step.step, step.examples_total)))
    assert steps == [(1, 9)]


def test_laplace_needs_no_pass_where_everybody_gets_the_same_merge(scene, calibration):
    """As a calibration says where a person's own shots do not help: nothing of them is computed or kept."""
    alike, steps = replace(calibration, curvature=torch.zeros(4, 4).double()), []
    found = by_gradient(scene, alike, settings={"scale": 2}, on_step=steps.append)
    near(found.w, (2 * calibration.mu).expand(3, -1))
    grown = by_gradient(scene, alike, earlier=Earlier(found, torch.zeros(3)))
    near(grown.w, calibration.mu.expand(3, -1))
    assert (found.gradients, steps) == (None, [])


def test_laplace_of_parts_is_laplace_of_the_whole(scene, calibration):
    _base, _task, _bank, jobs = scene
    first = [replace(job, examples=job.examples[:1]) for job in jobs]
    rest = [replace(job, examples=job.examples[1:] or job.examples[:1]) for job in jobs]
    begun = by_gradient(scene, calibration, first)
    grown = by_gradient(scene, calibration, rest, earlier=Earlier(begun, torch.zeros(3)))
    together = [replace(job, examples=[*one.examples, *other.examples]) for job, one, other in zip(jobs, first, rest)]
    whole = by_gradient(scene, calibration, together)
    near(grown.w, whole.w)
    assert grown.gradients.shots.equal(whole.gradients.shots)


def test_laplace_refuses_a_bank_without_calibration_and_a_merge_of_some_anchors(scene, calibration):
    with pytest.raises(ConfigError, match="needs a calibrated bank") as refused:
        by_gradient(scene, None)
    assert "mta bank calibrate" in refused.value.hint
    with pytest.raises(ConfigError, match=r"merges all 4 anchors, but merge\.k is 2"):
        by_gradient(scene, calibration, settings={"k": 2})
    check_merge(MergeSettings(policy="laplace", k=4), 4, labelled=False, calibrated=True)
