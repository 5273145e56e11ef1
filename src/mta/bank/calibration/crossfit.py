"""Fit what a bank needs to know of people, and measure it on other people's later items.

The people are split into two folds. mu and F are judged on the fold that they were not fitted on:

    1. merge    mu by Newton steps, each as long as the other fold's later items allow; F at mu
    2. prior    how much people's gradients differ, compared with those of one person's shots; then some multiple of
                that, by items left out in turn: a quadratic model of the likelihood is not exact
    3. gains    what a person with 1, 4, 8, or 16 shots gains on later items by the merge
    4. stack    the learning rate of a stack's single step over these merges, and what a person gains with both
    5. rivals   what a person gains without the bank: by a LoRA's single step over the pooled model, by a label bias

A person's reported gain is by what the likelihood of everybody else chooses: the lengths of the Newton steps, the
multiple of the prior, a merge of the person's own, mu, or no merge, and the stack's rate. The kept calibration averages
mu and F of both folds.
Limit: the merges of the other fold's people come from mu and F that were fitted on this person, so these choices are
not fully independent of the person. tests/bank/test_card_coverage.py simulates how often the intervals hold.
Source: our choice; docs/explanation/method.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mta.bank.calibration.choices import (
    best_of,
    best_on_average,
    chosen_by_others,
    gain_of,
    measured_shots,
    rival_of,
    surely_best,
    typical_shots,
)
from mta.bank.calibration.info import DEFAULTS, LABEL_BIAS, CalibrationInfo, Gain, Rival
from mta.bank.calibration.label_bias import bias_gain, features_of, fitted_bias
from mta.bank.calibration.laplace import BOUNDLESS, Calibration, curvature_of, prior_of, solved
from mta.bank.calibration.people import Subject
from mta.bank.calibration.probes import COSTS, Kind, Probe
from mta.config import CalibrationSettings, Lora
from mta.config.constants import SHOTS
from mta.data.tasks.prompt import Example
from mta.system.progress import Step
from mta.training.gates import GateGradients

RATES = (4e-4, 8e-4, 1.6e-3, 3.2e-3, 6.4e-3, 1.28e-2)  # of a LoRA's single step
LENGTHS = (0.5, 1.0)  # of a Newton step
MULTIPLES = (1.0, 2.0, 0.5, 0.25, 0.125)  # of the prior, the estimate first
TURNS = 3  # blocks of a person's items that are left out to choose the multiple
STDS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)  # of the prior of a label bias
ENOUGH = 8  # people, to measure anything
RIDGE = 0.3
PIECE = 16  # people computed and saved together, at most
_NO_MERGE, _OWN_MERGE = 0, 2  # 1: everybody's best, mu


@dataclass(slots=True)
class Calibrator:
    """One calibration in progress: U people in two folds, N anchors. ``measure`` yields results in any order.

    ``stacks``: whether to measure stacks too. ``rivals``: name -> shape of LoRAs to measure without the bank; with
    ``labels``, a bias on these, too. ``fewer``: whether to measure gains by some of people's shots, too, which is wrong
    where prompts show the others. ``together`` people are one piece of work. ``pooled_loglik`` (U,) is the
    log-likelihood of people's later items under the pooled model, from the first pass on.
    """

    subjects: Sequence[Subject]
    anchors: int
    settings: CalibrationSettings
    measure: Callable[[Sequence[Probe]], Iterable[tuple[Probe, Tensor]]]
    on_step: Callable[[Step], None] | None = None
    stacks: bool = True
    rivals: Mapping[str, Lora] = field(default_factory=dict)
    labels: Sequence[str] = ()
    together: int = PIECE
    fewer: bool = True
    passes: int = 0
    done: int = 0  # in forward passes of one example
    pooled_loglik: Tensor = field(init=False, default_factory=lambda: torch.zeros(1).double())

    @property
    def fold(self) -> Tensor:
        """Everybody's fold, 0 or 1, (U,)."""
        return torch.arange(len(self.subjects)) % 2

    @property
    def tokens(self) -> Tensor:
        """The target tokens of everybody's later items, (U,)."""
        return torch.tensor([sum(len(e.target) for e in queries) for queries in self.queries]).double()

    @property
    def queries(self) -> list[tuple[Example, ...]]:
        return [one.queries for one in self.subjects]

    @property
    def shots(self) -> Tensor:
        return torch.tensor([len(one.shots) for one in self.subjects])

    @property
    def planned_cost(self) -> int:
        """The expected cost in forward passes of one example. It is higher if people's choices differ much."""
        queries, rivals = sum(map(len, self.queries)), len(self.rivals)
        return planned_cost(self.settings, self.shots.tolist(), queries, self.stacks, rivals, bool(self.labels))

    def run(self) -> Calibration:
        """Measure everything, and return the calibration to keep."""
        first, notes = self.first_pass()
        if len(self.subjects) < ENOUGH:
            return self.without_people(first, notes)
        mu, curvature, population, optimism = self.best_merge(first)
        every = self.gradients(mu[1 - self.fold]) if mu.any() else first
        single = self.of_shots(every)
        prior = prior_of([one.gradients for one in single], self.fold.tolist(), curvature.mean(0), RIDGE)
        counts = measured_shots(self.shots, ENOUGH, self.fewer)
        fits = [*zip(mu, curvature)]
        priors, prior = self.best_prior(fits, every, prior, typical_shots(counts))
        asked = [n for n in SHOTS if self.fewer and n <= self.settings.shots and n not in counts]
        notes += tuple(f"fewer than {ENOUGH} people have {n} shots" for n in asked)
        merges = {n: self.coefficients(fits, single, n, priors) for n in counts}
        gains = {n: self.gains(w) for n, w in merges.items()}
        kind, merges, gains = self.best_kind(mu, population, merges, gains, own=prior < BOUNDLESS)
        if kind == _NO_MERGE:
            mu, notes = torch.zeros_like(mu), (*notes, "a merge did not help: everybody keeps the pooled model")
        if kind != _OWN_MERGE:
            curvature, prior = torch.zeros_like(curvature), BOUNDLESS
        rate, stacked = self.best_rate(merges, gains) if self.stacks else (None, {})

        def honest(of: Mapping[int, Tensor]) -> dict[int, Tensor]:
            known = {n: gain - optimism.where(merges[n].any(dim=1), 0) for n, gain in of.items()}
            return {n: gain for n, gain in known.items() if bool(gain.isfinite().all())}

        def reported(of: Mapping[int, Tensor]) -> tuple[Gain, ...]:
            return tuple(gain_of(n, gain[self.shots >= n]) for n, gain in of.items())

        merged, both = honest(gains), honest(stacked)
        info = CalibrationInfo(
            ridge=RIDGE,
            prior=prior,
            rate=rate,
            people=len(self.subjects),
            gains=reported(merged),
            stacked=reported(both),
            rivals=self.rivals_of(both or merged),
            notes=notes,
        )
        return Calibration(mu.mean(0), curvature.mean(0), info)

    def quick_gain(self) -> float:
        """Return the mean gain by people's own merges, near the pooled model, per token; 0 with too few people."""
        first, _ = self.first_pass()
        if len(self.subjects) < ENOUGH:
            return 0.0
        shots = self.of_shots(first)
        rows = [torch.cat([one.gradients for one, f in zip(first, self.fold) if f == fold]) for fold in (0, 1)]
        curvature = torch.stack([curvature_of(one) for one in rows])
        prior = prior_of([one.gradients for one in shots], self.fold.tolist(), curvature.mean(0), RIDGE)
        fits = [(torch.zeros(self.anchors).double(), one) for one in curvature]
        most = typical_shots(measured_shots(self.shots, ENOUGH, self.fewer))
        priors, _ = self.best_prior(fits, first, prior, most)
        return float(self.gains(self.coefficients(fits, shots, most, priors)).mean())

    def first_pass(self) -> tuple[list[GateGradients], tuple[str, ...]]:
        """Return everybody's gradients at 0, and leave out people for whom they are not finite, with a note."""
        single = self.gradients(torch.zeros(len(self.subjects), self.anchors).double())
        whole = [all(bool(part.isfinite().all()) for part in one) for one in single]
        if lost := whole.count(False):
            self.subjects = [one for one, kept in zip(self.subjects, whole) if kept]
            single = [one for one, kept in zip(single, whole) if kept]
        later = [items.loglik[len(one.shots) :].sum() for items, one in zip(single, self.subjects)]
        self.pooled_loglik = torch.tensor(later).double()
        return single, (f"left out: {lost} people without a finite likelihood of their items",) if lost else ()

    def without_people(self, first: Sequence[GateGradients], notes: tuple[str, ...]) -> Calibration:
        """Return a calibration without gains, so that merges are made by ``posterior``; F is from the few people."""
        nothing = torch.zeros(self.anchors, dtype=torch.float64)
        curvature = curvature_of(torch.cat([nothing.new_zeros(0, self.anchors), *(one.gradients for one in first)]))
        note = f"{len(self.subjects)} people are too few to measure anything; {ENOUGH} are needed"
        info = DEFAULTS.model_copy(update={"people": len(self.subjects), "notes": (note, *notes)})
        return Calibration(nothing, curvature, info)

    def best_merge(self, first: Sequence[GateGradients]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return mu (2, N) and F (2, N, N) of both folds, everybody's gain by mu, and its optimism, both (U,).

        ``first`` are the gradients at 0. The lengths of the Newton steps are chosen on the later items of the other
        fold. A person's optimism is their gain by mu minus that by the steps which everybody else chose, up to the
        first step that differs from mu's.
        """
        mu = torch.zeros(2, self.anchors, dtype=torch.float64)
        best, curvature = torch.zeros(len(self.subjects)).double(), mu.new_zeros(2, self.anchors, self.anchors)
        honest, everyone = best, torch.ones(len(self.subjects), dtype=torch.bool)
        agreed = everyone  # so far, with everybody else's choices
        for number in range(self.settings.steps + 1):
            single = self.gradients(mu[self.fold]) if number else first
            rows = [torch.cat([one.gradients for one, f in zip(single, self.fold) if f == fold]) for fold in (0, 1)]
            curvature = torch.stack([curvature_of(one) for one in rows])
            if number == self.settings.steps:
                break
            steps = torch.cat([solved(f, RIDGE, one.mean(0)[None]) for f, one in zip(curvature, rows)])
            held = torch.stack([best, *(self.gains((mu + c * steps)[1 - self.fold]) for c in LENGTHS)], dim=1)
            others, chosen = chosen_by_others(held, everyone, best_of)
            choices = torch.tensor(others)
            honest = torch.where(agreed, held.gather(1, choices[:, None])[:, 0], honest)
            agreed = agreed & (choices == chosen)
            if chosen == 0:
                break
            mu, best = mu + LENGTHS[chosen - 1] * steps, held[:, chosen]
        return mu, curvature, best, best - honest

    def best_prior(
        self, fits: Sequence[tuple[Tensor, Tensor]], every: Sequence[GateGradients], prior: float, shots: int
    ) -> tuple[Tensor, float]:
        """Return everybody's prior (U,), the multiple of ``prior`` that the others choose, and what all choose.

        ``every`` are gradients of all items. Blocks of each person's items are predicted from ``shots`` others.
        """
        people = len(self.subjects)
        if prior >= BOUNDLESS:  # people do not differ
            return torch.full((people,), prior).double(), prior
        priors, tried = torch.tensor([prior * one for one in MULTIPLES]).double(), torch.zeros(people, len(MULTIPLES))
        for turn in range(TURNS if self.fewer else 1):
            kept, asked = zip(*(left_out(one, own, turn) for one, own in zip(self.subjects, every)))
            merges = [self.coefficients(fits, kept, shots, one.expand(people)) for one in priors]
            tried = tried + torch.stack([torch.cat(self._measured("scores", asked, w)) for w in merges], dim=1)
        chosen, final = chosen_by_others(tried / self.tokens[:, None], self.shots >= shots, best_of)
        return priors[torch.tensor(chosen)], float(priors[final])

    def best_kind(
        self, mu: Tensor, population: Tensor, merges: Mapping[int, Tensor], gains: Mapping[int, Tensor], *, own: bool
    ) -> tuple[int, dict[int, Tensor], dict[int, Tensor]]:
        """Return whether people get no merge, mu, or their own; and what they get by that, or by the others' choice.

        ``mu`` (2, N) is that of both folds, ``population`` (U,) everybody's gain by it; ``merges`` (U, N) and ``gains``
        (U,) are people's own, by shots. A gain that is not finite rules out people's own merges, and so does ``own``
        False. If people get a merge, a person's reported gain is by what the others chose.
        """
        typical, nothing = typical_shots(merges), torch.zeros_like(population)
        usable = own and all(bool(one.isfinite().all()) for one in gains.values())
        tried = torch.stack([nothing, population, gains[typical] if usable else nothing - math.inf], dim=1)
        chosen, final = chosen_by_others(tried, self.shots >= typical, best_on_average)
        kinds = torch.tensor(chosen if final else [_NO_MERGE] * len(chosen))
        people, everybody = torch.arange(len(chosen)), mu[1 - self.fold]
        kept = {n: torch.stack([torch.zeros_like(w), everybody, w])[kinds, people] for n, w in merges.items()}
        return final, kept, {n: torch.stack([nothing, population, one])[kinds, people] for n, one in gains.items()}

    def best_rate(self, merges: Mapping[int, Tensor], gains: Mapping[int, Tensor]) -> tuple[float, dict[int, Tensor]]:
        """Return the rate of a stack over ``merges`` (0: no stack), and everybody's gain with both, by shots.

        A stack is taken if it gains beyond its 95% interval. A person's gain is with the rate that the others chose.
        """
        typical, rates = typical_shots(merges), (0.0, *RATES)
        tried = torch.cat([gains[typical][:, None], self.stacked(typical, merges[typical], RATES)], dim=1)
        chosen, final = chosen_by_others(tried, self.shots >= typical, surely_best)  # numbers of rates
        if not final:
            return 0.0, {}
        used, gained = sorted(set(chosen) - {0}), dict[int, Tensor]()
        for n, w in merges.items():
            columns = {0: gains[n]}
            if n == typical:
                columns = dict(enumerate(tried.T))
            elif used:
                columns |= dict(zip(used, self.stacked(n, w, [rates[c] for c in used]).T))
            gained[n] = torch.stack([columns[c][u] for u, c in enumerate(chosen)])
        return rates[final], gained

    def rivals_of(self, ours: Mapping[int, Tensor]) -> tuple[Rival, ...]:
        """Return what people gain without the bank, beside ``ours``: shots -> everybody's gain (U,)."""
        if not ours:
            return ()
        shots = typical_shots(ours)
        people, counted = len(self.subjects), self.shots >= shots
        measured, pooled = (ours[shots], counted, shots), torch.zeros(people, 1).double()
        rivals = list[Rival]()
        if self.labels:  # of a prior, there is a weaker one: no need for none
            gains, tried = self.biased(shots)
            rivals.append(rival_of(LABEL_BIAS, STDS, gains, *measured, tried=tried))
        for name, lora in self.rivals.items():
            gains = torch.cat([pooled, self.stacked(shots, torch.zeros(people, 0).double(), RATES, lora)], dim=1)
            rivals.append(rival_of(name, (0.0, *RATES), gains, *measured))
        return tuple(rivals)

    def of_shots(self, every: Sequence[GateGradients]) -> list[GateGradients]:
        """Return people's gradients of their shots alone."""
        return [left_out(one, own, turn=0)[0] for one, own in zip(self.subjects, every)]

    def coefficients(
        self, fits: Sequence[tuple[Tensor, Tensor]], single: Sequence[GateGradients], shots: int, priors: Tensor
    ) -> Tensor:
        """Return everybody's coefficients (U, N) by the other fold's mu and F, from gradients of their latest shots.

        ``priors`` (U,) are in shots.
        """
        made = list[Tensor]()
        for fold, one, prior in zip(self.fold.tolist(), single, priors.tolist()):
            gradients, loglik = (part[-shots:] for part in one)
            mu, curvature = fits[1 - fold]
            fit = Calibration(mu, curvature, CalibrationInfo(ridge=RIDGE, prior=prior))
            made.append(fit.coefficients(gradients.sum(0)[None], loglik.sum()[None], torch.tensor([len(loglik)])))
        return torch.cat(made)

    # -- passes --------------------------------------------------------------------------------------------------------

    def gradients(self, w: Tensor) -> list[GateGradients]:
        """Return the gradients and log-likelihoods of each person's single items, at coefficients ``w`` (U, N)."""
        examples = [one.all for one in self.subjects]
        measured = self._measured("gradients", examples, w)
        rows = torch.split(torch.cat(measured), [len(one) for one in examples]) if measured else ()
        return [GateGradients(one[:, :-1], one[:, -1]) for one in rows]

    def gains(self, w: Tensor) -> Tensor:
        """Return each person's gain over the pooled model with coefficients ``w``, per token of their queries, (U,)."""
        return (torch.cat(self._measured("scores", self.queries, w)) - self.pooled_loglik) / self.tokens

    def stacked(self, shots: int, w: Tensor, rates: Sequence[float], lora: Lora | None = None) -> Tensor:
        """Return each person's gain with a LoRA over ``w`` that was trained on their latest shots, (U, rates).

        ``lora`` is its shape, by default that of a stack.
        """
        measured = self._measured("stacks", [one.shots[-shots:] for one in self.subjects], w, rates, lora)
        return (torch.cat(measured) - self.pooled_loglik[:, None]) / self.tokens[:, None]

    def biased(self, shots: int) -> tuple[Tensor, Tensor]:
        """Return each person's gain with a label bias, of their queries and of blocks left out in turn, (U, STDS) each.

        It is fitted to ``shots`` others of a person's items, as in ``best_prior``.
        """
        nothing, features = torch.zeros(len(self.subjects), 0).double(), features_of(self.labels)
        asked = [[choice for choices in one.choices for choice in choices] for one in self.subjects]
        every = torch.cat(self._measured("labels", asked, nothing)).view(-1, len(self.labels))
        rows = list[list[list[float]]]()
        for one, scores in zip(self.subjects, torch.split(every, [len(one.choices) for one in self.subjects])):
            gold, turns = torch.tensor(one.gold), [one.parted(turn) for turn in range(TURNS if self.fewer else 1)]
            parts = [(known[-shots:], block) for known, block in turns]
            biases = [[fitted_bias(scores[some], gold[some], features, std) for std in STDS] for some, _ in parts]
            rows.append([[bias_gain(scores[b], gold[b], bias) for bias in own] for own, (_, b) in zip(biases, parts)])
        gains = torch.tensor(rows).double() / self.tokens[:, None, None]
        return gains[:, 0], gains.sum(1)

    def _measured(
        self,
        kind: Kind,
        examples: Sequence[Sequence[Example]],
        w: Tensor,
        rates: Sequence[float] = (),
        lora: Lora | None = None,
    ) -> list[Tensor]:
        asked = self.queries if rates else ()
        pieces = [
            Probe(
                f"{kind}-{self.passes}-{number}",
                kind,
                tuple(map(tuple, examples[start : start + self.together])),
                w[start : start + self.together],
                tuple(asked[start : start + self.together]),
                tuple(rates),
                lora,
                len(self.labels) if kind == "labels" else 1,
            )
            for number, start in enumerate(range(0, len(examples), self.together))
        ]
        self.passes += 1
        results = dict[str, Tensor]()
        for piece, result in self.measure(pieces):
            results[piece.name] = result
            self.done += piece.cost
            if self.on_step:
                self.on_step(Step(self.passes, len(piece), self.done, max(self.done, self.planned_cost)))
        return [results[piece.name] for piece in pieces]


def left_out(one: Subject, single: GateGradients, turn: int) -> tuple[GateGradients, tuple[Example, ...]]:
    """Return the gradients of a person's items but for a block, and the block (``Subject.parted``)."""
    kept, block = one.parted(turn)
    return GateGradients(single.gradients[kept], single.loglik[kept]), tuple(one.all[n] for n in block)


def planned_cost(
    how: CalibrationSettings, shots: Sequence[int], queries: int, stacks: bool, rivals: int = 0, labels: bool = False
) -> int:
    """Return the expected cost of a calibration in forward passes of one example.

    ``shots`` are everybody's numbers of earlier items, ``queries`` all later items, ``rivals`` LoRAs without the bank.
    """
    counts, steps, every = [n for n in SHOTS if n <= how.shots], how.steps, sum(shots)
    scored = (steps * len(LENGTHS) + TURNS * len(MULTIPLES)) * queries
    newton = (steps + 1) * COSTS["gradients"] * (every + queries) + scored
    some = sum(min(own, n) for own in shots for n in counts)
    tried = COSTS["stacks"] * some + (len(RATES) + 2 * (len(counts) - 1)) * queries if stacks else 0
    alone = (
        COSTS["stacks"] * sum(min(own, typical_shots(counts)) for own in shots) + len(RATES) * queries if counts else 0
    )
    cheap = rivals * alone + COSTS["labels"] * (every + queries) * labels
    return newton + COSTS["gradients"] * (every + queries) + len(counts) * queries + tried + cheap
