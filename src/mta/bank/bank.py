"""``Bank``: the anchors' meta-LoRAs, their vectors, and the task LoRA, opened from disk."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from mta.bank.add_calibration import calibrate_bank
from mta.bank.build import build_bank
from mta.bank.calibration.info import with_calibrated_settings
from mta.bank.calibration.laplace import Calibration
from mta.bank.context import Build
from mta.bank.format import (
    INDEX,
    BankInfo,
    check_base,
    read_adapters,
    read_calibration,
    read_info,
    reading,
    restore,
    verify,
)
from mta.bank.publish import bank_folder, bank_upload, publish_bank
from mta.bank.rebuild import rebuild_groups
from mta.config import CompareSettings, Run, override
from mta.data.history import Person, check_distinct
from mta.data.shots_and_queries import has_enough_items
from mta.data.splits import draw, set_aside
from mta.data.tasks.load import load_task
from mta.data.tasks.task import Task
from mta.distributed.executor import Executor, LocalExecutor
from mta.errors import BankCorrupt, BankMismatch, InputError
from mta.lora.batch import LoraBatch
from mta.lora.layers import Shared
from mta.model.base import BaseModel
from mta.model.encoders import Encoder, load_encoder
from mta.system.progress import OnStep

log = logging.getLogger("mta")


@dataclass(frozen=True, slots=True, eq=False)
class Bank:
    """A bank of N anchors for one base.

    >>> bank = Bank.build(base, people, anchors=50, out="bank/")
    >>> bank = Bank.open("bank/", base)
    """

    folder: Path
    info: BankInfo
    task: Task
    anchors: LoraBatch  # as stored, float32
    device_anchors: LoraBatch  # on the base's device and in its dtype
    vectors: Tensor  # (N, E), unit length
    task_lora: LoraBatch | None
    calibration: Calibration | None = None

    @property
    def hash(self) -> str:
        """Identity of the bank, which is stored in people's states."""
        return self.info.hash

    @classmethod
    def build(
        cls,
        base: BaseModel,
        people: Sequence[Person],
        out: str | Path,
        *,
        task: str | Path | Task | None = None,
        anchors: int | None = None,
        run: Run | None = None,
        encoder: Encoder | None = None,
        task_people: Sequence[Person] | None = None,
        hold_out: int = 0,
        executor: Executor | None = None,
        on_step: OnStep | None = None,
        command: str = "",
    ) -> Bank:
        """Run stages 0 and 1: train the task LoRA and the anchors among ``people``, and open the bank.

        ``task_people`` train only the task LoRA. By default, they are half of ``people``, drawn by hash, or none
        without a task LoRA. All others are candidates for anchors, and train the task LoRA, too (``task_lora.unseen``).
        People who share items stay in the same half, unless more than half of all people share items with each other.
        ``task`` defaults to the task that ``people`` were read for, then to ``run.task`` if that is not ``text``.
        ``hold_out`` is the number of people, with enough items for ``mta compare``, who stay out of the bank.
        A killed build resumes. ``command`` is recorded in the folder.
        Raises InputError for too few people, BankError if ``out`` holds another bank.
        """
        run = run or Run()
        task = task or getattr(people, "task", None) or (run.task if run.task != Run().task else None)
        if anchors is not None:
            run = override(run, [f"bank.anchors={anchors}"])
        if task is None:
            raise InputError(
                "no task: this list of people does not name its own", hint="Give task=..., for example task='lamp3'."
            )
        chosen, people = load_task(task), list(people)
        if not isinstance(task, Task):
            run = run.model_copy(update={"task": str(task)})  # a file's name, for the folder's config.yaml
        task_people = None if task_people is None else list(task_people)
        check_distinct([*(task_people or ()), *people])
        shared = {person.group for person in task_people or () if person.group}
        outside, people = set_aside(people, run.seed, hold_out, partial(_is_comparable, chosen, shared))
        if outside:
            log.info("%d people stay out of the bank: compare methods on them", len(outside))
        if task_people is None:
            half = len(people) // 2 if run.task_lora.enabled else 0
            together = max(Counter(p.group for p in people if p.group).values(), default=0) <= half
            if half and not together:
                log.warning("more than half of the people share items with each other, so the two halves share items")
            halves = draw(people, run.seed, task=half, development=0, test=0, together=together)
            task_people, people = halves.select("task", people), halves.select("candidates", people)
        out, encoder, executor = Path(out), encoder or load_encoder(run.encoder, base), executor or LocalExecutor()
        build = Build(
            base, chosen, encoder, task_people, people, run, out, executor=executor, on_step=on_step, command=command
        )
        build_bank(build)
        return cls.open(out, base)

    @classmethod
    def open(cls, folder: str | Path, base: BaseModel, *, full: bool = False) -> Bank:
        """Open a bank and check its files.

        The first time, or with ``full``, all hashes are checked; later only file sizes and modification times.
        Raises BankMismatch if the bank was built for another base, BankCorrupt for missing or changed files.
        """
        folder = Path(folder)
        info = read_info(folder)
        check_base(folder, info, base.name, base.fingerprint)
        with reading(folder):
            verify(folder, info, full=full)
            vectors = load_file(folder / INDEX)["vectors"]
        anchors, task_lora = read_adapters(folder, info)
        if len(vectors) != len(anchors) or anchors.shapes != base.targets:
            raise BankCorrupt(f"{folder}: anchors, index, and base do not match", hint=restore(folder))
        device_anchors = anchors.to(base.device, base.dtype)
        if base.has_weights:  # adapters are exported from an outline of the base, too
            task_lora = task_lora and task_lora.to(base.device)
        calibration = read_calibration(folder, info)
        return cls(folder, info, info.task, anchors, device_anchors, vectors, task_lora, calibration)

    def calibrate(
        self,
        base: BaseModel,
        people: Sequence[Person],
        out: str | Path,
        *,
        run: Run | None = None,
        executor: Executor | None = None,
        on_step: OnStep | None = None,
    ) -> Bank:
        """Write a copy of the bank to ``out``, calibrate the copy on items outside the bank's training, and open it.

        The copy has a new hash: personalize people again with it. ``run.calibration`` has the settings.
        Raises InputError if the bank's anchors or task LoRA were trained on all of these people, BankError if ``out``
        is not empty.
        """
        people = list(people)
        check_distinct(people)
        calibrate_bank(self.folder, base, people, run or self.info.run, Path(out), executor=executor, on_step=on_step)
        return self.open(out, base)

    def rebuild_groups(
        self,
        base: BaseModel,
        people: Sequence[Person],
        out: str | Path,
        *,
        run: Run | None = None,
        executor: Executor | None = None,
        on_step: OnStep | None = None,
    ) -> Bank:
        """Write a copy with the marked groups retrained without the people who asked to be forgotten, and open it.

        ``people`` must have all others of these groups. Memory and device are those of ``run`` (default: the bank's).
        Raises the errors of ``mta.bank.rebuild.rebuild_groups``.
        """
        encoder, run = self.encoder(base), run or self.info.run
        rebuild_groups(self.folder, base, people, encoder, Path(out), run, executor=executor, on_step=on_step)
        return self.open(out, base)

    def with_calibrated_settings(self, run: Run | None = None) -> Run:
        """Return ``run`` (default: the bank's) with ``auto`` settings replaced by the calibration's values."""
        return with_calibrated_settings(run or self.info.run, self.info.calibration, self.info.run.stack.lora)

    @classmethod
    def from_pretrained(
        cls, name_or_folder: str | Path, base: BaseModel, revision: str | None = None, *, token: str | None = None
    ) -> Bank:
        """Open a bank from a folder or, if none exists, from the hub. Raises HubError, BankMismatch, BankCorrupt."""
        return cls.open(bank_folder(name_or_folder, revision, token), base)

    def push_to_hub(self, repo_id: str, *, private: bool = True, token: str | None = None, license: str = "") -> str:
        """Publish the bank with its card on the hub, and return the address. ``from_pretrained`` opens the copy.

        The bank was trained on people's texts, so first list the files to send (``mta bank publish``). The list of
        members is not sent. Raises BankError if a person in the bank asked to be forgotten, BankCorrupt, HubError.
        """
        upload = bank_upload(self.folder, repo_id, license=license)
        return publish_bank(self.folder, repo_id, upload, private=private, token=token)

    def __len__(self) -> int:
        return len(self.anchors)

    def __repr__(self) -> str:
        return f"Bank({str(self.folder)!r}, {len(self)} anchors, task {self.task.name!r}, base {self.info.base!r})"

    @property
    def task_adapters(self) -> list[Shared]:
        """The task LoRA for all rows; empty if stage 0 was switched off."""
        return [Shared(self.task_lora)] if self.task_lora else []

    @property
    def history(self) -> int:
        """Maximum number of a person's earlier items in front of a prompt."""
        return self.info.run.task_lora.history

    def similarity(self, vectors: Tensor) -> Tensor:
        """Return the cosines of people's vectors (U, E) and the anchors' vectors, (U, N)."""
        return vectors @ self.vectors.T

    def encoder(self, base: BaseModel, name: str | None = None, given: Encoder | None = None) -> Encoder:
        """Return the encoder of the anchors' vectors: ``given``, or loaded by ``name`` (default: the bank's encoder).

        Raises BankMismatch for other weights than the bank's, before loading; ModelError if the model is no encoder.
        """
        encoder = given or load_encoder(name or self.info.encoder, base)
        if encoder.fingerprint != self.info.encoder_fingerprint:
            raise BankMismatch(
                f"encoder {encoder.name!r} has other weights (sha256 {encoder.fingerprint[:8]}…) "
                f"than when the bank was built ({self.info.encoder_fingerprint[:8]}…)",
                hint="Load the encoder that the bank was built with, or rebuild the bank.",
            )
        return encoder


def _is_comparable(task: Task, shared: Set[str], person: Person) -> bool:
    """Return whether ``mta compare`` could test a person: enough items, and in none of the groups ``shared``."""
    how = CompareSettings()
    return person.group not in shared and has_enough_items(task, person, how.shots, how.queries, "next")
