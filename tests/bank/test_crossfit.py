"""The procedure of a calibration against its promises."""

import math
import random
from dataclasses import replace

import pytest
import torch
from arrays import near, normal
from conftest import people_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import base_of, random_examples, random_loras

from mta.bank.calibration.crossfit import ENOUGH, RATES, RIDGE, Calibrator, left_out
from mta.bank.calibration.info import CalibrationInfo, one_step, with_calibrated_settings
from mta.bank.calibration.laplace import BOUNDLESS, Calibration, curvature_of
from mta.bank.calibration.people import Subject, subjects_of
from mta.bank.calibration.probes import CalibrationWorker, Probe, key_of, run_probe
from mta.bank.card import in_words
from mta.config import CalibrationSettings, Lora, Run, StackSettings
from mta.lora.layers import Gated, PerPerson, Shared
from mta.personalize.stages import adapt
from mta.training.gates import GateGradients
from mta.training.scoring import log_likelihood
from mta.training.trainer import Job

N = 4


@pytest.fixture(scope="module")
def scene():
    base = base_of()
    return (
        base,
        random_loras(base, N, seed=2, size=0.2),
        random_loras(base, 1, seed=1, size=0.2),
        Run(stack=StackSettings(lora=Lora(rank=1))),
    )


def known(people: int, shots: tuple[int, ...] = (4, 5, 6, 7, 8, 9)) -> list[Subject]:
    counts = [shots[u % len(shots)] for u in range(people)]
    return [
        Subject(tuple(random_examples(count, seed=u)), tuple(random_examples(3, seed=100 + u)))
        for u, count in enumerate(counts)
    ]


SETTINGS = CalibrationSettings(steps=1)


def noting(scene, probes: list[Probe]):
    """Measures as a calibration does, and notes what it was asked."""
    models = CalibrationWorker(*scene)

    def measure(pieces):
        probes.extend(pieces)
        return [(piece, run_probe(models, piece)) for piece in pieces]

    return measure


def calibrator(scene, people, measure=None) -> Calibrator:
    return Calibrator(people, N, SETTINGS, measure or noting(scene, []))


def calibrated(scene, people, measure=None) -> Calibration:
    return calibrator(scene, people, measure).run()


def test_a_calibration_says_what_it_measured(scene):
    found = calibrated(scene, known(12)).info
    assert found.people == 12
    assert [gain.shots for gain in found.gains] == [1, 4]  # too few people have 8 shots
    assert [gain.shots for gain in found.stacked] == ([1, 4] if found.rate else [])
    assert all(gain.low <= gain.mean <= gain.high for gain in found.gains + found.stacked)
    assert found.rate in (0.0, *RATES)
    assert not any("too few" in note for note in found.notes)


def test_nothing_is_measured_on_the_fold_it_was_fitted_on(scene):
    """The queries of fold 0 may change the choices of fold 1, but never the coefficients that they are scored at."""
    people, other = known(8), tuple(random_examples(3, seed=999))
    changed = [replace(one, queries=other) if u % 2 == 0 else one for u, one in enumerate(people)]
    before, after = list[Probe](), list[Probe]()
    calibrated(scene, people, noting(scene, before))
    calibrated(scene, changed, noting(scene, after))
    # The first Newton step of fold 0 is scored on fold 1, and that of fold 1, which did not change, on fold 0.
    steps = [next(p for p in probes if p.kind == "scores") for probes in (before, after)]
    near(steps[0].w[::2], steps[1].w[::2])
    assert not torch.allclose(steps[0].w[1::2], steps[1].w[1::2])


def test_people_are_measured_with_the_merge_of_the_other_fold(scene, monkeypatch):
    """Their items' gradients, and where mu is best for all, the merge below their stacks, too."""
    monkeypatch.setattr(Calibrator, "gains", lambda self, w: torch.where(w > 5, -1.0, w.abs()).sum(1))
    own = Calibrator.coefficients
    monkeypatch.setattr(Calibrator, "coefficients", lambda *words: 9 + own(*words))  # never better than mu
    people, probes = known(12), list[Probe]()
    calibrated(scene, people, noting(scene, probes))
    steps = calibrator(scene, people)
    mu, *_ = steps.best_merge(steps.first_pass()[0])
    assert not torch.allclose(mu[0], mu[1])
    others = mu[1 - steps.fold]
    near([p for p in probes if p.kind == "gradients"][-1].w, others)  # the last pass over everybody's items
    stacks = [p for p in probes if p.kind == "stacks"]
    near(torch.cat([p.w for p in stacks]), others.repeat(len(stacks), 1))
    assert stacks


@pytest.mark.parametrize("people", [0, 1, ENOUGH - 1])
def test_too_few_people_give_the_documented_defaults(scene, people):
    found = calibrated(scene, known(people))
    assert float(found.mu.abs().max()) == 0
    assert (found.info.ridge, found.info.prior, found.info.rate, found.info.gains) == (1.0, 16.0, None, ())
    assert with_calibrated_settings(Run(), found.info, Lora()) == with_calibrated_settings(Run(), None, Lora())
    assert "too few" in found.info.notes[0]


@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 100))
def test_a_pass_does_not_depend_on_mates_or_order(scene, seed):
    people, w = known(5), 0.2 * normal(5, N, seed=4)
    order = random.Random(seed).sample(range(5), 3)
    for kind in ("gradients", "scores", "stacks"):
        piece, some = (
            Probe(name, kind, shots, w[index], queries, (0.01, 0.02) if kind == "stacks" else ())
            for name, index in (("one", range(5)), ("some", order))
            for shots, queries in [zip(*((people[u].shots, people[u].queries) for u in index))]
        )
        whole, found = (
            run_probe(CalibrationWorker(*scene), piece),
            run_probe(CalibrationWorker(*scene, tokens_per_batch=60), some),
        )
        if kind == "gradients":
            rows = whole.split([len(one.shots) for one in people])
            near(found, torch.cat([rows[u] for u in order]))
        else:
            near(found, whole[order])


def test_one_stack_at_several_rates_is_a_stack_for_each_rate(scene):
    base, bank, task_lora, run = scene
    pooled, lora = [Shared(task_lora)], run.stack.lora
    people, w = known(4), 0.2 * normal(4, N, seed=4)
    shots, queries = ([getattr(one, part) for one in people] for part in ("shots", "queries"))
    found = run_probe(
        CalibrationWorker(*scene), Probe("stacks", "stacks", tuple(shots), w, tuple(queries), (0.01, 0.03))
    )
    merge = Gated(bank, w)
    jobs = [Job(key_of(examples), examples) for examples in shots]
    for column, rate in enumerate((0.01, 0.03)):
        stack = adapt(base, jobs, [*pooled, merge], lora, one_step(rate))
        scores = log_likelihood(base, queries, [*pooled, merge, PerPerson(stack)])
        near(found[:, column], torch.stack([one.sum() for one in scores]))


def test_coefficients_of_a_person_use_the_fit_of_the_other_fold():
    fits, priors = [(mu, curvature_of(normal(30, N, seed=n))) for n, mu in enumerate(normal(2, N))], (5.0, 2.0)
    gradients = [GateGradients(normal(6, N, seed=seed), -normal(6, seed=seed).abs()) for seed in (7, 8)]
    found = Calibrator(known(2), N, SETTINGS, lambda pieces: []).coefficients(fits, gradients, 4, torch.tensor(priors))
    for u in (0, 1):
        sums, loglik = (part[-4:].sum(0)[None] for part in gradients[u])
        fit = Calibration(*fits[1 - u], CalibrationInfo(ridge=RIDGE, prior=priors[u]))
        near(found[u], fit.coefficients(sums, loglik, torch.tensor([4]))[0])


def test_the_prior_is_the_multiple_that_helps_the_others_most(scene, monkeypatch):
    people = known(12)
    monkeypatch.setattr(Calibrator, "coefficients", lambda *given: given[4][:, None].expand(-1, N))
    one, size = calibrator(scene, people), torch.tensor([1.0, -1.0] * 6).double()
    every = [GateGradients(normal(len(one.all), N), normal(len(one.all))) for one in people]
    for gain, final in ((size * 0 + 0.2, 0.5), (size, 4.0), (size * 0 - 0.2, 8.0)):
        monkeypatch.setattr(Calibrator, "_measured", lambda self, kind, asked, w, g=gain: [g * (4.0 - w[:, 0])])
        priors, chosen = one.best_prior([], every, 4.0, 2)
        assert chosen == final
        assert set(priors.tolist()) == {final}
    assert one.best_prior([], every, BOUNDLESS, 2)[1] == BOUNDLESS


def test_each_block_of_items_is_left_out_in_turn():
    (one,) = known(1)
    every = GateGradients(normal(len(one.all), N), normal(len(one.all)))
    turns = [left_out(one, every, turn) for turn in range(len(one.all) // len(one.queries) + 2)]
    assert [e for _, block in reversed(turns) for e in block] == list(one.all)
    for kept, block in turns:
        near(kept.loglik, every.loglik[[i for i, e in enumerate(one.all) if e not in block]])


@pytest.mark.parametrize("people", [ENOUGH + 4, ENOUGH])
def test_people_without_a_finite_likelihood_are_left_out(scene, people):
    """One person's NaN would make everybody's averages NaN, and leave everybody without a merge."""
    everybody, models = known(people), CalibrationWorker(*scene)

    def measure(pieces):
        for piece in pieces:
            found = run_probe(models, piece)
            rows = [one == broken for one in piece.examples for _ in (one if piece.kind == "gradients" else [one])]
            yield (
                piece,
                found.masked_fill(torch.tensor(rows)[:, None], math.nan) if piece.kind == "gradients" else found,
            )

    broken = everybody[1].all
    found = calibrated(scene, everybody, measure)
    assert found.info.people == people - 1
    assert "left out: 1 people" in " ".join(found.info.notes)
    if people > ENOUGH:
        without = calibrated(scene, [*everybody[:1], *everybody[2:]])
        near(found.mu, without.mu)
        near(found.curvature, without.curvature)
        assert found.info.prior == pytest.approx(without.info.prior)
        unlike = {"prior", "gains", "stacked", "notes"}
        assert found.info.model_dump(exclude=unlike) == without.info.model_dump(exclude=unlike)
        both = [one.info.gains + one.info.stacked for one in (found, without)]
        for gain, other in zip(*both, strict=True):
            assert gain.model_dump() == pytest.approx(other.model_dump())
    else:
        assert "too few" in found.info.notes[0]


# -- stacks ------------------------------------------------------------------------------------------------------------


class Scripted(Calibrator):
    """A calibration whose passes return gains that were made up."""

    def __init__(self, stack, shots=(8,)):
        super().__init__(known(10, shots), N, SETTINGS, lambda pieces: [])
        self.made_up = stack

    def stacked(self, shots, w, rates):
        return torch.stack([self.made_up(rate) for rate in rates], dim=1)


NOTHING = torch.zeros(10).double()
MERGES = {n: torch.zeros(10, N).double() for n in (1, 8)}


def test_a_person_does_not_choose_the_newton_step_that_their_reported_gain_is_by(scene, monkeypatch):
    """Without the first person, there would be no step: only that person's gain beyond mu's is reported, here none."""
    size = torch.tensor([4.0] + [1.0, -0.9] * 5 + [1.0]).double()
    monkeypatch.setattr(Calibrator, "gains", lambda self, w: size * w.any(dim=1))
    monkeypatch.setattr(
        Calibrator, "coefficients", lambda self, fits, *_: torch.stack([fits[f][0] for f in 1 - self.fold])
    )
    people = known(12)
    steps = calibrator(scene, people)
    mu, _, best, optimism = steps.best_merge(steps.first_pass()[0])
    assert bool(mu.any())
    near(optimism[0], best[0])
    found = calibrated(scene, people)
    assert found.info.gains[0].mean == pytest.approx(float((best - optimism).mean()))
    assert found.info.gains[0].mean < float(best.mean()) - float(best[0]) / 12 + 1e-9


def test_the_curvature_is_that_of_the_items_at_mu(scene, monkeypatch):
    monkeypatch.setattr(Calibrator, "gains", lambda self, w: w.abs().sum(1))  # every Newton step is taken in full
    people, models = known(12), CalibrationWorker(*scene)
    found = calibrated(scene, people)

    def at(mu, fold):
        made = [Probe("", "gradients", (one.all,), mu[None]) for u, one in enumerate(people) if u % 2 == fold]
        return curvature_of(torch.cat([run_probe(models, probe)[:, :-1] for probe in made]))

    steps = calibrator(scene, people)
    mu, curvature, *_ = steps.best_merge(steps.first_pass()[0])
    assert bool(mu.any(1).all())
    near(curvature, torch.stack([at(one, fold) for fold, one in enumerate(mu)]))
    near(found.curvature, curvature.mean(0))


def test_where_no_merge_helps_there_is_none(scene, monkeypatch):
    monkeypatch.setattr(Calibrator, "gains", lambda self, w: -w.abs().sum(1))
    found = calibrated(scene, known(12))
    near(found.coefficients(normal(2, N), -torch.ones(2), torch.tensor([3, 8])), torch.zeros(2, N).double())
    assert {gain.mean for gain in found.info.gains} == {0.0}
    assert "a merge did not help" in found.info.notes[-1]


def test_where_a_step_of_ones_own_does_not_help_everybody_gets_the_same_merge(scene, monkeypatch):
    measure = Calibrator.coefficients
    monkeypatch.setattr(Calibrator, "coefficients", lambda *words: 9 + measure(*words))
    monkeypatch.setattr(Calibrator, "gains", lambda self, w: torch.where(w > 5, -1.0, w.abs()).sum(1))
    found = calibrated(scene, known(12))
    assert bool(found.mu.any())
    near(found.coefficients(normal(2, N), -torch.ones(2), torch.tensor([3, 8])), found.mu.expand(2, -1))
    assert {gain.mean for gain in found.info.gains} == {found.info.gains[0].mean}
    assert [gain.shots for gain in found.info.gains] == [1, 4]  # none is promised without shots, and so without a state
    assert found.info.prior == BOUNDLESS


def test_where_peoples_shots_say_nothing_nobody_gets_a_merge_of_their_own(scene, monkeypatch):
    """However much larger its mean gain happens to be."""
    measure = Calibrator.coefficients
    monkeypatch.setattr(Calibrator, "coefficients", lambda *words: 9 + measure(*words))
    monkeypatch.setattr(Calibrator, "gains", lambda self, w: w.abs().sum(1))
    assert calibrated(scene, known(12)).personal
    monkeypatch.setattr("mta.bank.calibration.crossfit.prior_of", lambda *_: BOUNDLESS)
    found = calibrated(scene, known(12))
    assert not found.personal
    assert bool(found.mu.any())


@pytest.mark.parametrize("gain", [math.nan, -math.inf])
@pytest.mark.parametrize("at", [1, 4])
def test_a_gain_that_is_not_finite_rules_out_merges_of_ones_own(scene, monkeypatch, gain, at):
    def own(self, fits, found, shots, priors):
        return torch.full((len(self.subjects), N), 9.0 + shots).double()

    def gains(self, w):
        last = [len(self.subjects) - 1] if float(w[0, 0]) == 9.0 + at else []
        return w.abs().sum(1).index_fill(0, torch.tensor(last, dtype=torch.long), gain)

    monkeypatch.setattr(Calibrator, "coefficients", own)
    monkeypatch.setattr(Calibrator, "gains", gains)
    found = calibrated(scene, known(12))
    assert not found.personal
    assert all(math.isfinite(one.mean) for one in found.info.gains)


def test_a_card_of_a_bank_without_merges_reports_no_gain_of_any(scene, monkeypatch):
    """One person's large loss decides for everybody, although it does not decide for that person."""
    size = torch.tensor([-1e6] + [1.0] * 11).double()
    monkeypatch.setattr(Calibrator, "gains", lambda self, w: size * w.abs().sum(1))
    found = calibrated(scene, known(12))
    assert {gain.mean for gain in found.info.gains} == {0.0}
    assert "everybody keeps the pooled model" in found.info.notes[-1]
    assert "everybody gets" not in in_words(found.info)


def test_a_person_gets_the_kind_of_merge_that_helps_the_others(scene, monkeypatch):
    """One person's huge gain must not make their own reported gain: all others lose."""
    people = known(12)
    size = torch.tensor([1e6] + [-1.0] * 11).double()
    monkeypatch.setattr(Calibrator, "gains", lambda self, w: size * w.abs().sum(1))
    found = calibrated(scene, people)
    assert all(gain.mean <= 0 for gain in found.info.gains)
    assert bool(found.curvature.any())  # everybody's mean gain is above zero


def test_people_with_few_shots_do_not_decide_whether_a_merge_helps(scene, monkeypatch):
    """The card's gain with eight shots is that of people who have so many, and so is the choice behind it."""
    few = torch.tensor([1, 8]).repeat(8)
    monkeypatch.setattr(Calibrator, "gains", lambda self, w: torch.where(few == 8, -1.0, 9.0) * w.abs().sum(1))
    found = calibrated(scene, known(16, (1, 8)))
    assert "a merge did not help" in found.info.notes[-1]


@pytest.mark.parametrize("best", RATES)
def test_the_rate_is_the_one_that_gains_most(best):
    made = Scripted(lambda rate: NOTHING + (rate == best))
    rate, found = made.best_rate(MERGES, dict.fromkeys(MERGES, NOTHING))
    assert rate == best
    assert all(float(gain.min()) == 1 for gain in found.values())


def test_people_get_the_rate_that_everybody_else_chose():
    # Everybody gains from the first rate, but the first person more from the second, which outweighs the others.
    gain = {RATES[0]: NOTHING + 1, RATES[1]: torch.tensor([99.0] + [0.5] * 9).double()}
    made = Scripted(lambda rate: gain.get(rate, NOTHING - 1))
    _, found = made.best_rate(MERGES, dict.fromkeys(MERGES, NOTHING))
    assert all(float(each[0]) == 1 for each in found.values())


def test_a_stack_must_help_beyond_its_interval():
    gains = torch.tensor([1.6 if u // 2 % 2 == 0 else -1.0 for u in range(10)]).double()  # 1.3 standard errors
    made = Scripted(lambda rate: gains)
    assert made.best_rate(MERGES, dict.fromkeys(MERGES, NOTHING))[0] == 0


# -- people ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("people", "queries"), [(4, 3), (2, 6), (1, 10)])
def test_where_people_are_few_each_is_asked_more(task, people, queries):
    """Twelve queries of four people are wanted; at most half of a person's items are queries."""
    settings = CalibrationSettings(people=4, queries=3, shots=8)
    found = subjects_of(base_of(), task, people_of(people, items=20), Run(calibration=settings))
    assert [(len(one.shots), len(one.queries)) for one in found] == [(8, queries)] * people


def test_people_are_measured_as_newcomers(task):
    """Their first items are the shots, and the next ones the queries, although they have more."""
    (person,), base = people_of(1, items=20), base_of()
    (found,) = subjects_of(base, task, [person], Run(calibration=CalibrationSettings(people=1, queries=3, shots=8)))
    assert found.all == tuple(base.prompts.example(task, item) for item in person.items[:11])
    assert found.queries == found.all[8:]


def test_where_prompts_show_all_shots_nobody_is_measured_with_fewer(scene):
    steps = calibrator(scene, known(12, (6,)))
    assert [gain.shots for gain in steps.run().info.gains] == [1, 4]
    steps = calibrator(scene, known(12, (6,)))
    steps.fewer = False
    assert [gain.shots for gain in steps.run().info.gains] == [6]
