"""What the stages of a build share: settings, the folder, and how LoRAs are planned, trained, and resumed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path

from mta.bank.format import file_hashes
from mta.bank.worker import BankWorker, HeldOutPiece, LoraPiece, score_piece, train_piece
from mta.config import Lora, Run, parse_size
from mta.config.constants import ROUNDING_ONLY
from mta.data.history import Item, Person
from mta.data.tasks.task import Task
from mta.distributed.executor import Executor, LocalExecutor, P, R
from mta.errors import BankError
from mta.lora.batch import LoraBatch
from mta.lora.peft import CONFIG, WEIGHTS
from mta.model.base import BaseModel
from mta.model.encoders import Encoder
from mta.model.footprint import ParameterCounts
from mta.system.atomic import json_sha256
from mta.system.progress import OnStep
from mta.tracking.run_folder import RunFolder
from mta.training.checkpoint import Checkpoint
from mta.training.plan import Plan, parameters_of, plan_cohorts
from mta.training.trainer import Job

# Settings that the work key leaves out: they do not affect a bank, or the key holds a fingerprint instead.
NOT_IN_KEY = {"merge", "stack", "base", "encoder", "task", *ROUNDING_ONLY}


@dataclass(frozen=True)
class Build:
    """What a bank is built from, the settings, and its folder ``out``; the rest is how the build runs.

    ``task_lora`` is the folder of a task LoRA that was trained earlier. ``command`` is recorded.
    """

    base: BaseModel
    task: Task
    encoder: Encoder
    task_people: Sequence[Person]
    candidates: Sequence[Person]
    run: Run
    out: Path
    _: KW_ONLY
    held_out: Sequence[Person] = ()
    task_lora: Path | None = None
    executor: Executor = field(default_factory=LocalExecutor)
    on_step: OnStep | None = None
    command: str = ""


@dataclass(frozen=True, slots=True)
class BuildKeys:
    """The keys of one build. ``histories`` are the ids and item digests of each group of people."""

    histories: list[list[list[str]]]
    whole: str  # of the bank with its calibration
    training: str  # of stages 0 and 1

    @classmethod
    def of(cls, build: Build, run: Run, groups: Sequence[Sequence[Person]]) -> BuildKeys:
        """Return the keys of a build with whole settings; each group of people is in the order of ids."""
        histories = [[[person.id, person.digest()] for person in group] for group in groups]

        def key(calibrated: bool) -> str:
            settings = run.model_dump(mode="json", exclude=NOT_IN_KEY if calibrated else {*NOT_IN_KEY, "calibration"})
            if calibrated:  # a calibration measures stacks too
                settings["stack"] = run.stack.model_dump(mode="json", include={"enabled", "lora"})
            fingerprints = [build.base.fingerprint, build.encoder.fingerprint, build.task.identity]
            work = json_sha256([*fingerprints, settings, histories])
            return json_sha256([work, file_hashes(build.task_lora, [CONFIG, WEIGHTS])]) if build.task_lora else work

        return cls(histories, key(run.calibration.enabled), key(False))

    @property
    def secret(self) -> str:
        """What only the people's histories give: the key of the whole bank is in ``bank.json``."""
        return json.dumps([self.whole, self.histories])


@dataclass(frozen=True)
class BuildContext(Build):
    """A bank under construction; ``out/work`` holds markers, checkpoints, and finished anchors until it is complete."""

    _: KW_ONLY
    keys: BuildKeys
    record: RunFolder
    # The anchors among the eligible candidates, the ids of all who train them, and, once these are trained, a digest of
    # who is behind which: another machine may choose others.
    chosen: tuple[int | str, ...] = ()

    @property
    def training_key(self) -> str:
        """The key of all that stages 0 and 1 leave in ``work``: ``keys.training`` and the chosen anchors."""
        return json_sha256([self.keys.training, self.chosen])

    def job(self, key: str, items: Iterable[Item], blocks: Sequence[int] = ()) -> Job:
        """Return the job of one LoRA. Raises DataError for an item that does not fit."""
        return Job(key, list(chain(*self.base.prompts.all(self.task, items))), blocks=blocks)

    def plan(self, jobs: Sequence[Job], lora: Lora, frozen: Lora | None = None) -> Plan:
        """Plan the cohorts of jobs that train ``lora``, over ``frozen`` if there is one."""
        return plan_loras(self.base, jobs, self.run, lora, frozen, self.executor)

    def train(
        self, pieces: Sequence[LoraPiece], plan: str, task_lora: LoraBatch | None = None, on_step: OnStep | None = None
    ) -> Iterator[tuple[LoraPiece, LoraBatch]]:
        """Train pieces on the executor over ``task_lora``; yield each with its LoRAs. Raises BankError."""
        self.record.stage_begins()
        yield from self._compute(train_piece, pieces, task_lora, partial(self.checkpoint, plan), on_step)

    def held_out_loss(self, task_lora: LoraBatch, job: Job, tokens_per_batch: int) -> float:
        """Return the loss of a job's examples per target token under a task LoRA. Raises BankError."""
        ((_, loss),) = self._compute(score_piece, [HeldOutPiece(job, task_lora, tokens_per_batch)])
        return loss

    def _compute(
        self,
        function: Callable[[BankWorker, P], R],
        pieces: Sequence[P],
        task_lora: LoraBatch | None = None,
        checkpoint: Callable[[str], Checkpoint] | None = None,
        on_step: OnStep | None = None,
    ) -> Iterator[tuple[P, R]]:
        worker = BankWorker(self.base, self.run, task_lora, checkpoint, on_step or self.record.step)
        for outcome in self.executor.run(function, pieces, worker):
            if outcome.result is None:
                hint = "Fix this, and build again: it resumes."
                raise BankError(f"the bank cannot be trained: {outcome.error}", hint=hint)
            yield outcome.piece, outcome.result

    def checkpoint(self, plan: str, name: str) -> Checkpoint:
        """Return the checkpoint of a piece in training, of a plan of stage 0 or 1."""
        return self._file(self.training_key, plan, name, "checkpoint")

    def result(self, plan: str, name: str) -> Checkpoint:
        """Return the file with the result of a finished piece of stage 0 or 1."""
        return self._file(self.training_key, plan, name, "safetensors")

    def calibration_result(self, name: str) -> Checkpoint:
        """Return the file with the result of a finished piece of the calibration."""
        return self._file(json_sha256([self.keys.whole, self.chosen]), "calibration", name, "safetensors")

    def _file(self, key: str, plan: str, name: str, ending: str) -> Checkpoint:
        work = hashlib.sha256(f"{key}/{plan}/{name}".encode()).hexdigest()
        return Checkpoint(self.out / "work" / f"{name}.{ending}", work)


def plan_loras(
    base: BaseModel, jobs: Sequence[Job], run: Run, lora: Lora, frozen: Lora | None, executor: Executor
) -> Plan:
    """Plan the cohorts of jobs that train ``lora``, over ``frozen`` if there is one."""
    trained, below = parameters_of(base, lora), ParameterCounts(task_lora=parameters_of(base, frozen) if frozen else 0)
    memory, most, threads, gpu = parse_size(run.memory), executor.most, executor.threads, executor.on_gpu
    return plan_cohorts(base, jobs, trained, memory, below=below, most=most, threads=threads, on_gpu=gpu)
