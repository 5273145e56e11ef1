"""Calibration: coefficients against their formula, and the procedure against its promises."""

import math
import random
from dataclasses import replace

import pytest
import torch
from conftest import people_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import base_of, random_examples, random_loras

from mta.bank.calibrate import ENOUGH, RIDGE, Calibrator, Known, known_people
from mta.bank.calibration import Calibration, CalibrationInfo, Gain, curvature_of, one_step, prior_of, settled, solved
from mta.bank.choices import RATES, best_of, chosen_by_others, rate_from, standard_error
from mta.bank.probes import Measure, Probe, key_of, measured
from mta.config import CalibrationSettings, Lora, Run, StackSettings, override
from mta.lora.layers import Gated, PerPerson, Shared
from mta.personalize.stages import adapt
from mta.training.gates import GateGradients
from mta.training.scoring import log_likelihood
from mta.training.trainer import Job

N = 4


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def near(found, expected, tolerance=1e-9) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


CALIBRATION = Calibration(0.1 * normal(N), curvature_of(normal(50, N, seed=1)), CalibrationInfo(ridge=0.3, prior=8.0))

# -- coefficients ------------------------------------------------------------------------------------------------------


def test_coefficients_maximize_the_quadratic_model_with_its_prior():
    gradients, loglik, shots = normal(3, N, seed=2), torch.tensor([-2.0, -9.0, -7.0]), torch.tensor([1, 4, 9])
    found = CALIBRATION.coefficients(gradients, loglik, shots)
    for u in range(3):
        w, mean, loss = found[u].clone().requires_grad_(), gradients[u] / shots[u], -loglik[u] / shots[u]
        curvature = CALIBRATION.curvature + torch.outer(mean, mean) / loss
        curvature = curvature + 0.3 * CALIBRATION.curvature.diagonal().mean() * torch.eye(N)
        d = w - CALIBRATION.mu
        objective = gradients[u] @ d - (shots[u] + 8.0) / 2 * d @ curvature @ d
        near(torch.autograd.grad(objective, w)[0], torch.zeros(N).double(), 1e-7)


@given(size=st.floats(1e-3, 1e6), loss=st.floats(1e-3, 1e3), shots=st.integers(1, 20))
def test_no_step_promises_more_than_the_shots_loss(size, loss, shots):
    gradient = size * normal(1, N, seed=2)
    found = CALIBRATION.coefficients(gradient, torch.tensor([-loss]), torch.tensor([shots]))
    assert 0 < float((gradient * (found - CALIBRATION.mu)).sum()) < loss


def test_shots_that_are_certain_already_change_nothing():
    near(CALIBRATION.coefficients(normal(1, N), torch.zeros(1), torch.tensor([3])), CALIBRATION.mu[None])


def test_without_shots_the_coefficients_are_those_of_the_population():
    near(CALIBRATION.coefficients(torch.zeros(2, N), torch.zeros(2), torch.zeros(2)), CALIBRATION.mu.expand(2, N))


def test_without_any_curvature_the_coefficients_are_those_of_the_population():
    flat = replace(CALIBRATION, curvature=torch.zeros(N, N).double())
    near(flat.coefficients(normal(2, N), torch.tensor([-4, -5]), torch.tensor([3, 5])), flat.mu.expand(2, N))


@given(parts=st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_coefficients_of_a_grown_history_are_those_of_the_whole(parts):
    single = normal(sum(parts), N + 1, seed=3)
    single[:, -1] = -single[:, -1].abs()  # log-likelihoods
    whole = CALIBRATION.coefficients(
        single[:, :-1].sum(0)[None], single[:, -1].sum()[None], torch.tensor([len(single)])
    )
    sums, shots = torch.zeros(1, N + 1).double(), torch.zeros(1)
    for part in single.split(parts):
        sums, shots = sums + part.sum(0), shots + len(part)
    near(CALIBRATION.coefficients(sums[:, :-1], sums[:, -1], shots), whole)


@given(shots=st.integers(2, 12))
def test_curvature_is_positive_however_few_the_shots(shots):
    found = curvature_of(normal(shots, N, seed=shots))
    near(found, found.T)
    assert float(torch.linalg.eigvalsh(found)[0]) > 0
    gradients = normal(3, N, seed=9)
    assert bool(((solved(found, 0.1, gradients) * gradients).sum(1) > 0).all())


def people_who_differ(by: float, counts=(4, 8, 12), times=200) -> list[torch.Tensor]:
    """Gradients of people's shots: variance 1 within people, ``by`` between them."""
    return [normal(n, N, seed=u) + math.sqrt(by) * normal(1, N, seed=10_000 + u) for u, n in enumerate(counts * times)]


@pytest.mark.parametrize("prior", [0.5, 2.0, 8.0])
def test_the_prior_is_the_variance_within_people_over_that_between_them(prior):
    people = people_who_differ(1 / prior)
    assert prior_of(people, [0] * len(people), torch.eye(N).double(), 0.3) == pytest.approx(prior, rel=0.15)


def test_where_people_do_not_differ_nobody_leaves_mu():
    def prior(people, folds=(0,) * 600):
        return prior_of(people, folds[: len(people)], torch.eye(N).double(), 0.3)

    assert prior(people_who_differ(0)) > 100
    assert prior([normal(5, N)] * 4) == 1e6  # the variance between people is below what chance gives
    assert prior([normal(1, N, seed=u) for u in range(9)]) == 1e6  # one shot each
    assert prior([normal(9, N)]) == 1e6
    assert prior([normal(9, N), normal(9, N, seed=1)], [0, 1]) == 1e6  # nobody can be compared


@given(fold=st.lists(st.integers(0, 1), min_size=6, max_size=6))
def test_the_prior_compares_people_of_one_fold_only(fold):
    """The gradients of each fold are at another mu: that difference says nothing about people."""
    people, curvature, far = people_who_differ(1.0, times=2), curvature_of(normal(30, N)), 5 * normal(2, N, seed=9)
    moved = [rows + far[f] for rows, f in zip(people, fold)]
    near(prior_of(moved, fold, curvature, 0.3), prior_of(people, fold, curvature, 0.3), 1e-6)


@given(order=st.permutations(range(6)))
def test_the_prior_does_not_depend_on_the_order_or_on_coordinates(order):
    people, curvature, turn = people_who_differ(1.0, times=2), curvature_of(normal(30, N)), normal(N, N, seed=3)
    folds = [0, 1, 0, 1, 0, 0]
    whole = prior_of(people, folds, curvature, 0.0)
    near(prior_of([people[u].flip(0) for u in order], [folds[u] for u in order], curvature, 0.0), whole)
    near(prior_of([rows @ turn.T for rows in people], folds, turn @ curvature @ turn.T, 0.0), whole, 1e-6)


# -- the procedure -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scene():
    base = base_of()
    return (
        base,
        random_loras(base, N, seed=2, size=0.2),
        [Shared(random_loras(base, 1, seed=1, size=0.2))],
        Lora(rank=1),
    )


def known(people: int) -> list[Known]:
    return [
        Known(tuple(random_examples(4 + u % 6, seed=u)), tuple(random_examples(3, seed=100 + u))) for u in range(people)
    ]


SETTINGS = CalibrationSettings(steps=1)


def calibrated(scene, people, measure=None) -> Calibration:
    models = Measure(*scene)
    return Calibrator(people, N, SETTINGS, measure or (lambda pieces: [(p, measured(models, p)) for p in pieces])).run()


def same(one: Calibration, other: Calibration) -> None:
    near(one.mu, other.mu)
    near(one.curvature, other.curvature)
    unlike = {"gains", "stacked"}
    assert one.info.model_dump(exclude=unlike) == other.info.model_dump(exclude=unlike)
    for a, b in zip(one.info.gains + one.info.stacked, other.info.gains + other.info.stacked, strict=True):
        assert a.model_dump() == pytest.approx(b.model_dump())


def test_a_calibration_says_what_it_measured(scene):
    found = calibrated(scene, known(12)).info
    assert found.people == 12
    assert [gain.shots for gain in found.gains] == [1, 4]  # too few people have 8 shots
    assert [gain.shots for gain in found.stacked] == [1, 4]
    assert all(gain.low <= gain.mean <= gain.high for gain in found.gains + found.stacked)
    assert found.rate in (0.0, *RATES)
    assert not any("too few" in note for note in found.notes)


def test_nothing_is_measured_on_the_fold_it_was_fitted_on(scene):
    """The queries of fold 0 may change the choices of fold 1, but never the coefficients that they are scored at."""
    scored: dict[str, list[Probe]] = {}

    def recorded(name, people):
        models = Measure(*scene)
        scored[name] = []

        def note(pieces):
            scored[name] += pieces
            return [(piece, measured(models, piece)) for piece in pieces]

        calibrated(scene, people, note)

    people = known(8)
    recorded("before", people)
    other = random_examples(3, seed=999)
    recorded("after", [replace(one, queries=tuple(other)) if u % 2 == 0 else one for u, one in enumerate(people)])
    # The first Newton step of fold 0 is scored on fold 1, and that of fold 1, which did not change, on fold 0.
    steps = [next(p for p in scored[name] if p.kind == "scores") for name in ("before", "after")]
    near(steps[0].w[::2], steps[1].w[::2])
    assert not torch.allclose(steps[0].w[1::2], steps[1].w[1::2])


@pytest.mark.parametrize("people", [0, 1, ENOUGH - 1])
def test_too_few_people_give_the_documented_defaults(scene, people):
    found = calibrated(scene, known(people))
    assert float(found.mu.abs().max()) == 0
    assert (found.info.ridge, found.info.prior, found.info.rate, found.info.gains) == (1.0, 16.0, None, ())
    assert settled(Run(), found.info, SHAPE) == settled(Run(), None, SHAPE)
    assert "too few" in found.info.notes[0]


def test_people_who_all_share_items_give_the_documented_defaults(scene):
    found = calibrated(scene, [replace(one, group="all") for one in known(ENOUGH + 2)])
    assert float(found.mu.abs().max()) == 0
    assert "share items" in found.info.notes[0]


@settings(max_examples=5, deadline=None)
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
        whole, found = measured(Measure(*scene), piece), measured(Measure(*scene, tokens_per_batch=60), some)
        if kind == "gradients":
            rows = whole.split([len(one.shots) for one in people])
            near(found, torch.cat([rows[u] for u in order]))
        else:
            near(found, whole[order])


def test_one_stack_at_several_rates_is_a_stack_for_each_rate(scene):
    base, bank, pooled, lora = scene
    people, w = known(4), 0.2 * normal(4, N, seed=4)
    shots, queries = ([getattr(one, part) for one in people] for part in ("shots", "queries"))
    found = measured(Measure(*scene), Probe("stacks", "stacks", tuple(shots), w, tuple(queries), (0.01, 0.03)))
    merge = Gated(bank, w)
    jobs = [Job(key_of(examples), examples) for examples in shots]
    for column, rate in enumerate((0.01, 0.03)):
        stack = adapt(base, jobs, [*pooled, merge], lora, one_step(rate))
        scores = log_likelihood(base, queries, [*pooled, merge, PerPerson(stack)])
        near(found[:, column], torch.stack([one.sum() for one in scores]))


# -- choices -----------------------------------------------------------------------------------------------------------


def test_a_gain_that_is_not_clear_is_not_chosen():
    before, doubtful = normal(20, 1), torch.tensor([0.5, -0.45]).repeat(10)[:, None]
    everybody = torch.arange(20)
    assert best_of(torch.cat([before, before + doubtful], 1), everybody) == 0
    assert best_of(torch.cat([before, before + doubtful + 0.5], 1), everybody) == 1
    assert best_of(torch.cat([before, before + 0.01], 1), everybody) == 1  # small, but for everybody


def test_a_candidate_that_diverged_is_not_chosen():
    broken = torch.tensor([-math.inf, *[5.0] * 9])[:, None]
    assert best_of(torch.cat([torch.zeros(10, 1), broken, broken * math.nan], 1), torch.arange(10)) == 0


def test_people_who_share_items_count_as_one():
    gains, alone = normal(6, 2), torch.arange(6)
    near(standard_error(gains, alone), gains.std(0) / 6**0.5)
    thrice = gains.repeat_interleave(3, dim=0)  # three copies of a person say no more than one
    near(standard_error(thrice, alone.repeat_interleave(3)), standard_error(gains, alone))
    assert bool(standard_error(gains, torch.zeros(6)).isinf().all())


class Scripted(Calibrator):
    """A calibration whose passes return gains that were made up."""

    def __init__(self, stack):
        super().__init__(known(10), N, SETTINGS, lambda pieces: [])
        self.made_up = stack

    def stacked(self, shots, w, rates):
        return torch.stack([self.made_up(rate) for rate in rates], dim=1)


NOTHING = torch.zeros(10).double()
MERGES = {n: torch.zeros(10, N).double() for n in (1, 8)}


def test_where_no_merge_helps_there_is_none(scene, monkeypatch):
    monkeypatch.setattr(Calibrator, "gains", lambda self, w: -w.abs().sum(1))
    found = calibrated(scene, known(12))
    near(found.coefficients(normal(2, N), -torch.ones(2), torch.tensor([3, 8])), torch.zeros(2, N).double())
    assert {gain.mean for gain in found.info.gains} == {0.0}
    assert "a merge did not help" in found.info.notes[0]


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


def test_without_a_helpful_stack_the_gains_are_those_of_the_merge():
    made, gains = Scripted(lambda rate: NOTHING - 9), {n: normal(10, seed=n) for n in MERGES}
    rate, found = made.best_rate(MERGES, gains)
    assert rate == 0
    assert all(torch.equal(found[n], gains[n]) for n in gains)


def test_a_stack_must_help_beyond_its_interval():
    gains = torch.tensor([1.6 if u // 2 % 2 == 0 else -1.0 for u in range(10)]).double()  # 1.3 standard errors
    made = Scripted(lambda rate: gains)
    assert made.best_rate(MERGES, dict.fromkeys(MERGES, NOTHING))[0] == 0


def test_nobody_chooses_what_they_are_served_with():
    """A person is served with what is best for the others who share no items with them."""
    gains = torch.tensor([[0.0, 9.0, 0.0], [0.0, 8.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0]])

    def most(some, groups):
        assert len(some) == len(groups)
        return int(some.mean(0).argmax())

    assert chosen_by_others(gains, torch.tensor([0, 0, 1, 2, 3]), most) == [2, 2, 1, 1, 1]
    assert chosen_by_others(gains, torch.arange(5), most) == [1, 1, 1, 1, 1]


@given(people=st.integers(3, 12), seed=st.integers(0, 50))
def test_what_others_chose_is_the_best_candidate_for_them(people, seed):
    gains = normal(people, 3, seed=seed)
    found = chosen_by_others(gains, torch.arange(people), best_of)
    others = [torch.cat([gains[:u], gains[u + 1 :]]) for u in range(people)]
    assert found == [best_of(some, torch.arange(people - 1)) for some in others]


def test_the_rate_is_the_best_of_those_that_surely_help():
    small = 0.02 + 0.01 * normal(20, seed=1)
    wild = 0.1 + normal(20, seed=2)
    larger = 2 * small
    assert rate_from(torch.stack([0 * small, small, larger, wild], dim=1), torch.arange(20)) == 2
    assert rate_from(torch.stack([0 * small, wild], dim=1), torch.arange(20)) == 0


def test_coefficients_of_a_person_use_the_fit_of_the_other_fold():
    info, mu = CalibrationInfo(ridge=RIDGE, prior=5.0), normal(2, N)
    fits = [Calibration(mu[n], curvature_of(normal(30, N, seed=n)), info) for n in (0, 1)]
    gradients = [GateGradients(normal(6, N, seed=seed), -normal(6, seed=seed).abs()) for seed in (7, 8)]
    found = Calibrator(known(2), N, SETTINGS, lambda pieces: []).coefficients(fits, gradients, 4)
    for u in (0, 1):
        sums, loglik = (part[-4:].sum(0)[None] for part in gradients[u])
        near(found[u], fits[1 - u].coefficients(sums, loglik, torch.tensor([4]))[0])


@pytest.mark.parametrize("people", [ENOUGH + 4, ENOUGH])
def test_people_without_a_finite_likelihood_are_left_out(scene, people):
    """One person's NaN would make everybody's averages NaN, and leave everybody without a merge."""
    everybody, models = known(people), Measure(*scene)

    def measure(pieces):
        for piece in pieces:
            found = measured(models, piece)
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
        unnoted = replace(found, info=found.info.model_copy(update={"notes": ()}))
        same(unnoted, calibrated(scene, [*everybody[:1], *everybody[2:]]))
    else:
        assert "too few" in found.info.notes[0]


# -- people ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("people", "queries"), [(4, 3), (2, 6), (1, 10)])
def test_where_people_are_few_each_is_asked_more(task, people, queries):
    """Twelve queries of four people are wanted; at most half of a person's items are queries."""
    settings = CalibrationSettings(people=4, queries=3, shots=8)
    found = known_people(base_of(), task, people_of(people, items=20), settings)
    assert [(len(one.shots), len(one.queries)) for one in found] == [(8, queries)] * people


# -- what a run leaves to the calibration ------------------------------------------------------------------------------

SHAPE = Run().stack.lora
FOUND = CalibrationInfo(
    ridge=1.0, prior=8.0, rate=3.2e-3, gains=(Gain(shots=8, people=9, mean=0, low=0, high=0, worse=0),)
)


def test_a_run_follows_the_calibration():
    run = settled(Run(), FOUND, SHAPE)
    assert (run.merge.policy, run.stack.training) == ("laplace", one_step(3.2e-3))
    assert settled(run, FOUND, SHAPE) == run


def test_without_a_calibration_a_run_takes_the_posterior_and_its_own_stack():
    run = settled(Run(), None, SHAPE)
    assert (run.merge.policy, run.stack.training) == ("posterior", Run().stack.training)


@pytest.mark.parametrize(
    "run",
    [
        override(Run(), ["stack.training.steps=2", "merge.policy=ridge"]),
        Run.model_validate({"stack": {"training": {"steps": 2}}, "merge": {"policy": "ridge"}}),
    ],
    ids=["words", "file"],
)
def test_what_is_given_counts(run):
    found = settled(run, FOUND, SHAPE)
    assert (found.merge.policy, found.stack.training.steps) == ("ridge", 2)


def test_training_given_in_python_counts():
    training = one_step(0.5)
    assert settled(Run(stack=StackSettings(training=training)), FOUND, SHAPE).stack.training == training


@pytest.mark.parametrize("words", [["merge.k=2"], ["merge.retrieve=loss"], ["merge.policy=similarity"]])
def test_a_calibration_is_for_merges_of_all_anchors_by_laplace(words):
    run = settled(override(Run(), words), FOUND, SHAPE)
    assert run.merge.policy in ("posterior", "similarity")
    assert run.stack.training == Run().stack.training


@pytest.mark.parametrize("words", [["stack.lora.rank=8"], ["merge.scale=0.5"]])
@pytest.mark.parametrize("rate", [0.0, 3.2e-3])
def test_a_calibration_is_for_stacks_of_its_shape_over_merges_as_they_are(words, rate):
    run = settled(override(Run(), words), FOUND.model_copy(update={"rate": rate}), SHAPE)
    assert run.merge.policy == "laplace"
    assert (run.stack.enabled, run.stack.training) == (True, Run().stack.training)


def test_a_stack_that_does_not_help_is_not_trained():
    assert not settled(Run(), FOUND.model_copy(update={"rate": 0.0}), SHAPE).stack.enabled
