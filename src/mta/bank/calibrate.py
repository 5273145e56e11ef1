"""Calibrate a bank on people who are not in it: the population's best merge, and how far to trust a person's gradient.

The people are split into two folds. mu and F are judged on the fold that they were not fitted on:

    1. merge    mu by Newton steps on all items; each step is as long as the other fold's likelihood allows
    2. trust    F at mu from single shots; ridge and prior by the likelihood of people's later items
    3. gains    what a person with 1, 4, 8, or 16 shots gains on later items, with the trust that the other fold chose

The calibration that is kept averages both folds. Two choices are common to both: the lengths of the Newton steps, and
ridge and prior, whose candidates are scored with F and mu of either fold. Source: our choice;
docs/explanation/method.md.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from mta.bank.calibration import Calibration, CalibrationInfo, Gain, curvature_of, solved
from mta.bank.worker import open_worker
from mta.config import CalibrationSettings, Run, parse_size
from mta.data.history import Person
from mta.data.tasks.prompt import Example
from mta.data.tasks.task import Task
from mta.distributed.executor import Executor, LocalExecutor
from mta.errors import BankError
from mta.lora.batch import LoraBatch
from mta.lora.layers import Adapters, Gated, Shared
from mta.model.base import BaseModel
from mta.model.footprint import Numbers
from mta.system.progress import Step
from mta.training.checkpoint import Checkpoint
from mta.training.gates import gate_gradients
from mta.training.plan import plan_cohorts
from mta.training.scoring import log_likelihood
from mta.training.trainer import Job

LENGTHS = (0.5, 1.0)  # of a Newton step
RIDGES = (0.3, 1.0)
PRIORS = (4.0, 16.0, 64.0, 1e6)  # in shots; the last leaves mu as it is
SHOTS = (1, 4, 8, 16)
DEFAULTS = CalibrationInfo(ridge=1.0, prior=16.0)  # where there are too few people to choose
ENOUGH = 8  # people, to measure anything
_NEWTON_RIDGE = 0.3
_TYPICAL = 8  # shots, to choose ridge and prior for
_WORSE = 0.02  # nats per token; smaller losses do not count
_COST = 3  # forward passes that a gradient costs
_PIECE = 16  # people computed and saved together


def calibrate(
    base: BaseModel,
    task: Task,
    anchors: LoraBatch,
    task_lora: LoraBatch | None,
    people: Sequence[Person],
    run: Run,
    *,
    executor: Executor | None = None,
    checkpoint: Callable[[str], Checkpoint] | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> Calibration:
    """Calibrate a bank of ``anchors`` over ``task_lora`` on ``people`` (``drawn``), who are behind neither of them.

    ``checkpoint`` returns where the result of a piece of work is kept, by its name: an interrupted calibration resumes.
    Raises BankError if the work fails.
    """
    known = [known_of(base, task, person, run.calibration) for person in people]
    working, pooled = anchors.to(base.device, base.dtype), task_lora and task_lora.to(base.device)
    width = base.footprint.sums.width
    sizes = Numbers(pooled=pooled.rank * width if pooled else 0, shared=len(anchors) * anchors.rank * width)
    jobs = [Job(str(u), one.all) for u, one in enumerate(known)]
    tokens = plan_cohorts(base, jobs, len(anchors), parse_size(run.memory), below=sizes).tokens_per_batch if jobs else 0
    here = Measure(base, working, [Shared(pooled)] if pooled else [], tokens)
    cpu = torch.device("cpu")
    elsewhere = partial(
        Measure.open, base.as_loaded(run), base.fingerprint, anchors.to(cpu), pooled and pooled.to(cpu), tokens
    )
    chosen = executor or LocalExecutor()

    def measure(pieces: Sequence[Probe]) -> Iterator[tuple[Probe, Tensor]]:
        files = {piece.name: checkpoint(piece.name) for piece in pieces} if checkpoint else {}
        found = {name: saved[0]["found"] for name, file in files.items() if (saved := file.load())}
        yield from ((piece, found[piece.name]) for piece in pieces if piece.name in found)
        missing = [piece for piece in pieces if piece.name not in found]
        for outcome in chosen.run(measured, missing, here, elsewhere):
            if outcome.result is None:
                raise BankError(f"the bank cannot be calibrated: {outcome.error}", hint="Fix this, and try again.")
            if files:
                files[outcome.piece.name].save({"found": outcome.result.contiguous()}, {})
            yield outcome.piece, outcome.result

    return Calibrator(known, len(anchors), run.calibration, measure, on_step).run()


@dataclass(frozen=True, slots=True)
class Known:
    """A person's earlier items (``shots``) and later items (``queries``) as examples."""

    shots: tuple[Example, ...]
    queries: tuple[Example, ...]
    group: str | None = None  # of people who share items: they are in one fold

    @property
    def all(self) -> tuple[Example, ...]:
        return self.shots + self.queries


def drawn(people: Sequence[Person], members: Set[str], settings: CalibrationSettings, seed: int) -> list[Person]:
    """Return the people to calibrate on: at most ``settings.people``, by hash, with two items or more.

    ``members`` are the ids of people in the bank. People who share items with them are left out too.
    """
    groups = {person.group for person in people if person.group and person.id in members}
    others = [person for person in people if person.id not in members and person.group not in groups]
    able = [person for person in others if len(person.items) > 1]
    return sorted(able, key=lambda one: hashlib.sha256(f"{seed}/{one.id}".encode()).digest())[: settings.people]


def known_of(base: BaseModel, task: Task, person: Person, settings: CalibrationSettings) -> Known:
    """Return a person's latest items as queries, and the items just before them as shots."""
    queries = min(settings.queries, len(person.items) // 2)
    items = person.items[-queries - settings.shots :]
    examples = [base.prompts.example(task, item) for item in items]
    return Known(tuple(examples[:-queries]), tuple(examples[-queries:]), person.group)


@dataclass(frozen=True, slots=True)
class Probe:
    """Work on some people's examples at coefficients ``w`` (U, N): gradients of single examples, or log-likelihoods."""

    name: str
    examples: tuple[tuple[Example, ...], ...]
    w: Tensor
    gradients: bool

    def __len__(self) -> int:
        return len(self.examples)

    def halves(self) -> Sequence[Probe]:
        """Return nothing: a calibration needs all its people."""
        return ()


@dataclass(frozen=True, slots=True)
class Measure:
    """The models to measure with."""

    base: BaseModel
    bank: LoraBatch
    pooled: Sequence[Shared]
    tokens_per_batch: int = 2048

    @classmethod
    def open(cls, run: Run, fingerprint: str, bank: LoraBatch, pooled: LoraBatch | None, tokens: int) -> Measure:
        """Load the base that ``run`` names, in a worker. Raises BankMismatch for another base, and load errors."""
        worker = open_worker(run, fingerprint, pooled)
        shared = [Shared(worker.pooled)] if worker.pooled else []
        return cls(worker.base, bank.to(worker.base.device, worker.base.dtype), shared, tokens)

    def gradients(self, piece: Probe) -> Tensor:
        """Return the gradients of all single examples, (examples of all people, N), float64."""
        people = [u for u, examples in enumerate(piece.examples) for _ in examples]
        jobs = [Job(str(i), [example]) for i, example in enumerate(itertools.chain(*piece.examples))]
        at = piece.w[people].to(self.base.master_dtype)
        found = gate_gradients(self.base, jobs, self.bank, at, self.pooled, tokens_per_batch=self.tokens_per_batch)
        return found.gradients

    def scores(self, piece: Probe) -> Tensor:
        """Return people's log-likelihoods, (U,), float64."""
        adapters: list[Adapters] = [
            *self.pooled,
            Gated(self.bank, piece.w.to(self.base.device, self.base.master_dtype)),
        ]
        found = log_likelihood(self.base, piece.examples, adapters, tokens_per_batch=self.tokens_per_batch)
        return torch.stack([scores.double().sum() for scores in found])


def measured(measure: Measure, piece: Probe) -> Tensor:
    """Return the gradients or the log-likelihoods that a piece asks for."""
    return measure.gradients(piece) if piece.gradients else measure.scores(piece)


@dataclass(slots=True)
class Calibrator:
    """One calibration in progress: U people in two folds, N anchors. ``measure`` yields results in any order."""

    known: Sequence[Known]
    anchors: int
    settings: CalibrationSettings
    measure: Callable[[Sequence[Probe]], Iterable[tuple[Probe, Tensor]]]
    on_step: Callable[[Step], None] | None = None
    passes: int = 0
    examples: int = 0  # computed so far; a gradient counts as three
    fold: Tensor = field(init=False)

    def __post_init__(self) -> None:
        groups = [one.group or f"person {u}" for u, one in enumerate(self.known)]
        numbers = {group: n for n, group in enumerate(dict.fromkeys(groups))}
        self.fold = torch.tensor([numbers[group] % 2 for group in groups], dtype=torch.long)

    @property
    def planned(self) -> int:
        """The number of examples to compute at most; a gradient counts as three."""
        everything, shots = (sum(map(len, part)) for part in zip(*((one.all, one.shots) for one in self.known)))
        newton = self.settings.steps * (_COST + len(LENGTHS))
        tried = 1 + len(RIDGES) * len(PRIORS) + len(SHOTS)
        return (1 + newton) * everything + _COST * shots + tried * (everything - shots)

    def run(self) -> Calibration:
        if len(self.known) < ENOUGH or int(self.fold.bincount(minlength=2).min()) < ENOUGH // 4:
            return self.without_people()
        mu, curvature = self.best_merge()
        shots = self.gradients([one.shots for one in self.known], mu[1 - self.fold])
        folds = [Calibration(mu[f], curvature[f], DEFAULTS) for f in (0, 1)]
        return Calibration(mu.mean(0), curvature.mean(0), self.choose(folds, shots))

    def without_people(self) -> Calibration:
        """Return the documented defaults: no population merge, and F from the few people there are."""
        nothing = torch.zeros(self.anchors, dtype=torch.float64)
        found = self.gradients([one.all for one in self.known], nothing.expand(len(self.known), -1))
        curvature = curvature_of(torch.cat([nothing.new_zeros(0, self.anchors), *found]))
        few = f"{len(self.known)} people are too few to measure anything, or too many of them share items"
        note = f"{few}; {ENOUGH} are needed: defaults were taken"
        info = DEFAULTS.model_copy(update={"people": len(self.known), "notes": (note,)})
        return Calibration(nothing, curvature, info)

    def best_merge(self) -> tuple[Tensor, Tensor]:
        """Return mu (2, N) and F (2, N, N) of both folds.

        The lengths of the Newton steps are chosen on the other fold. F is that of the last step's gradients.
        """
        everything = [one.all for one in self.known]
        tokens = _tokens(everything)
        mu = torch.zeros(2, self.anchors, dtype=torch.float64)
        best, curvature = self.scores(everything, mu[1 - self.fold]), mu.new_zeros(2, self.anchors, self.anchors)
        for _ in range(self.settings.steps):
            found = self.gradients(everything, mu[self.fold])
            rows = [torch.cat([row for row, f in zip(found, self.fold.tolist()) if f == fold]) for fold in (0, 1)]
            curvature = torch.stack([curvature_of(one) for one in rows])
            steps = torch.cat([solved(f, _NEWTON_RIDGE, one.mean(0)[None]) for f, one in zip(curvature, rows)])
            held = {c: self.scores(everything, (mu + c * steps)[1 - self.fold]) for c in LENGTHS}
            length = max(held, key=lambda c: float((held[c] / tokens).mean()))
            if float(((held[length] - best) / tokens).mean()) <= 0:
                break
            mu, best = mu + length * steps, held[length]
        return mu, curvature

    def choose(self, folds: Sequence[Calibration], gradients: Sequence[Tensor]) -> CalibrationInfo:
        """Choose the ridge and the prior that serve people's queries best, and measure the expected gains.

        ``folds`` were fitted to one fold each; ``gradients`` are those of each person's shots at the other fold's mu.
        """
        queries, lengths = [one.queries for one in self.known], torch.tensor([len(rows) for rows in gradients])
        pooled = self.scores(queries, torch.zeros(len(queries), self.anchors, dtype=torch.float64))

        def gains(shots: int, trust: Sequence[tuple[float, float]]) -> Tensor:
            """Return each person's gain per token from their latest shots; ``trust`` is by the person's fold."""
            sums = torch.stack([rows[-shots:].sum(0) for rows in gradients])
            w = torch.empty_like(sums)
            for f in (0, 1):
                mine = self.fold == f
                other = replace(folds[1 - f], info=CalibrationInfo(ridge=trust[f][0], prior=trust[f][1]))
                w[mine] = other.coefficients(sums[mine], lengths[mine].clamp_max(shots))
            return (self.scores(queries, w) - pooled) / _tokens(queries)

        grid = list(itertools.product(RIDGES, PRIORS))
        table = torch.stack([gains(_TYPICAL, [trust, trust]) for trust in grid])
        crossed = [grid[int(table[:, self.fold != f].mean(1).argmax())] for f in (0, 1)]
        ridge, prior = grid[int(table.mean(1).argmax())]
        counts = {n: lengths >= n for n in SHOTS}
        found = [gain_of(n, gains(n, crossed)[able]) for n, able in counts.items() if int(able.sum()) >= ENOUGH]
        return CalibrationInfo(ridge=ridge, prior=prior, people=len(self.known), gains=tuple(found))

    # -- passes --------------------------------------------------------------------------------------------------------

    def gradients(self, examples: Sequence[Sequence[Example]], w: Tensor) -> list[Tensor]:
        """Return the gradients of each person's single examples, (examples, N) each."""
        found = self._measured(examples, w, gradients=True)
        return list(torch.split(torch.cat(found), [len(one) for one in examples])) if found else []

    def scores(self, examples: Sequence[Sequence[Example]], w: Tensor) -> Tensor:
        """Return each person's log-likelihood, (U,)."""
        return torch.cat(self._measured(examples, w, gradients=False))

    def _measured(self, examples: Sequence[Sequence[Example]], w: Tensor, *, gradients: bool) -> list[Tensor]:
        chosen = [slice(start, start + _PIECE) for start in range(0, len(examples), _PIECE)]
        pieces = [
            Probe(f"calibration-{self.passes}-{n}", tuple(tuple(e) for e in examples[some]), w[some], gradients)
            for n, some in enumerate(chosen)
        ]
        self.passes += 1
        found = dict[str, Tensor]()
        for piece, result in self.measure(pieces):
            found[piece.name] = result
            self.examples += sum(map(len, piece.examples)) * (_COST if gradients else 1)
            if self.on_step:
                self.on_step(Step(self.passes, len(piece), self.examples, self.planned))
        return [found[piece.name] for piece in pieces]


def gain_of(shots: int, gains: Tensor) -> Gain:
    """Return the mean gain of people (U,) with its 95% interval (normal approximation)."""
    mean, half = float(gains.mean()), 1.96 * float(gains.std()) / math.sqrt(len(gains))
    worse = float((gains < -_WORSE).double().mean())
    return Gain(shots=shots, people=len(gains), mean=mean, low=mean - half, high=mean + half, worse=worse)


def _tokens(examples: Sequence[Sequence[Example]]) -> Tensor:
    return torch.tensor([sum(len(e.target) for e in one) for one in examples], dtype=torch.float64)
