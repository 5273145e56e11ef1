"""Calibrate a bank: compute the passes that crossfit.py asks for, here or on workers, and keep their results.

Which passes these are, and what follows from them, is in crossfit.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from mta.bank.calibration.crossfit import PIECE, Calibrator
from mta.bank.calibration.info import ALONE, OPPU
from mta.bank.calibration.laplace import Calibration
from mta.bank.calibration.people import Subject, subjects_of
from mta.bank.calibration.probes import CalibrationWorker, Probe, run_probe
from mta.config import Lora, Run, parse_size
from mta.data.history import Person
from mta.data.tasks.task import Task
from mta.distributed.executor import Executor, LocalExecutor
from mta.errors import BankError
from mta.lora.batch import LoraBatch
from mta.model.base import BaseModel
from mta.model.footprint import ParameterCounts
from mta.system.progress import Step
from mta.training.checkpoint import Checkpoint
from mta.training.plan import parameters_of, plan_cohorts
from mta.training.trainer import Job


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
    """Calibrate a bank of ``anchors`` over ``task_lora`` on ``people``, whose items are behind neither.

    ``people`` are those of ``calibration_people``. ``checkpoint`` returns where the result of a piece of work is kept,
    by its name: an interrupted calibration resumes.
    Raises BankError if the work fails, and MemoryBudgetError.
    """
    subjects = subjects_of(base, task, people, run)
    working, task_lora = anchors.to(base.device, base.dtype), task_lora and task_lora.to(base.device)
    chosen = executor or LocalExecutor()
    tokens, together = size_of_passes(base, subjects, len(anchors), run, chosen.most, chosen.on_gpu)
    measure = measuring(CalibrationWorker(base, working, task_lora, run, tokens), chosen, checkpoint)
    return calibrator_of(run, task, subjects, len(anchors), measure, together, on_step).run()


Measure = Callable[[Sequence[Probe]], Iterator[tuple[Probe, Tensor]]]


def measuring(
    worker: CalibrationWorker, executor: Executor, checkpoint: Callable[[str], Checkpoint] | None = None
) -> Measure:
    """Return a function that yields the results of probes, in any order; those in a checkpoint are not repeated."""

    def measure(pieces: Sequence[Probe]) -> Iterator[tuple[Probe, Tensor]]:
        files = {piece.name: checkpoint(piece.name) for piece in pieces} if checkpoint else {}
        missing = []
        for piece in pieces:
            saved = files[piece.name].load() if files else None
            if saved and saved[1].get("asked") == piece.asked:
                yield piece, saved[0]["found"]
            else:
                missing.append(piece)
        for outcome in executor.run(run_probe, missing, worker) if missing else ():
            if outcome.result is None:
                raise BankError(f"the bank cannot be calibrated: {outcome.error}", hint="Fix this, and try again.")
            if files:
                files[outcome.piece.name].save({"found": outcome.result.contiguous()}, {"asked": outcome.piece.asked})
            yield outcome.piece, outcome.result

    return measure


def calibrator_of(
    run: Run,
    task: Task,
    subjects: Sequence[Subject],
    anchors: int,
    measure: Measure,
    together: int,
    on_step: Callable[[Step], None] | None = None,
) -> Calibrator:
    """Return the calibration of a bank with a run's settings."""
    return Calibrator(
        subjects,
        anchors=anchors,
        settings=run.calibration,
        measure=measure,
        on_step=on_step,
        stacks=run.stack.enabled,
        rivals=rivals_of(run),
        labels=(task.labels or ()) if task.labelled else (),
        together=together,
        fewer=not run.task_lora.history,
    )


def size_of_passes(
    base: BaseModel, subjects: Sequence[Subject], anchors: int, run: Run, most: int = PIECE, on_gpu: bool | None = None
) -> tuple[int, int]:
    """Return the tokens of a pass of a calibration, and its people, at most ``most``, in a run's memory.

    Raises MemoryBudgetError.
    """
    task_lora = parameters_of(base, run.task_lora.lora) if run.task_lora.enabled else 0
    every = anchors * parameters_of(base, run.bank.lora)
    stack = parameters_of(base, run.stack.lora) if run.stack.enabled else 0
    jobs, memory = [Job(str(u), one.all) for u, one in enumerate(subjects)], parse_size(run.memory)
    over_bank = max(anchors, stack), ParameterCounts(task_lora=task_lora, shared=every, gated=every)
    alone = max(parameters_of(base, lora) for lora in rivals_of(run).values()), ParameterCounts(task_lora=task_lora)
    plans = [
        plan_cohorts(base, jobs, trained, memory, below=below, most=min(most, PIECE), on_gpu=on_gpu)
        for trained, below in (over_bank, alone)
    ]
    people = [len(plan.cohorts[0]) for plan in plans if plan.cohorts]
    return min(plan.tokens_per_batch for plan in plans), min(people, default=1)


def rivals_of(run: Run) -> dict[str, Lora]:
    """Return the shapes of the LoRAs that a bank is compared with: one of a stack's rank, and one of an anchor's."""
    return {ALONE: run.stack.lora, OPPU: run.bank.lora}
