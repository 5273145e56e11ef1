"""People's adapters as PEFT folders for vLLM, built from bank and store when a name is first requested.

VLLM takes one LoRA of bounded rank per request. The stack is kept exactly; task LoRA and merge are truncated by svd to
the remaining rank. The shared factors are decomposed once, so truncating for one person needs only the svd of small
cores:

    sum over ranks p of gate[p] * B_p A_p  =  Q_B (R_B diag(gate) R_A^T) Q_A^T
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from mta.bank.format import read_adapters, read_info, verify
from mta.errors import InputError, MtaError, StateCorrupt
from mta.lora.batch import Factors, LoraBatch, even, join, shared_ranks
from mta.lora.merge import truncate
from mta.lora.peft import write_peft
from mta.personalize.adapters import BASE, SharedModel, adapter_parts
from mta.serving.engine import ServedModel, Version, from_wire
from mta.store import Store
from mta.store.state import State

log = logging.getLogger("mta")
_OVERSAMPLING = 8  # additional directions in the randomized svd, for accurate last singular values
_ITERATIONS = 4  # power iterations of the randomized svd


def folder_of(name: str) -> str:
    """Return the folder name of an adapter: hashes of person and name, so that the path reveals no id."""
    who = from_wire(name)
    return f"{_hash(who.person if isinstance(who, Version) else '')}-{_hash(name)}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def remove_all(folder: Path, person: str) -> None:
    """Delete all files of a person's adapters, also partial files from a server that stopped.

    Call this only after vLLM unloaded the adapters: missing files crash vLLM.
    """
    for left in (*folder.glob(f"{_hash(person)}-*"), *folder.glob(f".{_hash(person)}-*")):
        shutil.rmtree(left, ignore_errors=True)


class AdapterFolders:
    """Builds adapters as PEFT folders on first request, by their name in vLLM."""

    def __init__(self, bank: Path, store: str, folder: Path, rank: int) -> None:
        self.bank, self.store, self.folder, self.rank = bank, Store(store), folder, rank

    @cached_property
    def _exporter(self) -> LoraExporter:
        info = read_info(self.bank)
        verify(self.bank, info)
        return LoraExporter(*read_adapters(self.bank, info), info.hash, self.rank)

    def path(self, name: str) -> Path | None:
        """Return the folder of an adapter; None if the name is unknown or the adapter cannot be built."""
        who, folder = from_wire(name), self.folder / folder_of(name)
        if who is None or name == BASE.value:
            return None
        try:
            if self._is_stored(who) and (folder.exists() or self._build(who, folder)) and self._is_stored(who):
                return folder
            shutil.rmtree(folder, ignore_errors=True)  # forgotten, perhaps meanwhile
        except (MtaError, OSError) as error:  # OSError: for example a full disk
            log.warning("an adapter could not be built: %s", type(error).__name__)  # the message may hold an id
        return None

    def _build(self, who: ServedModel, folder: Path) -> bool:
        """Write an adapter; return whether its parts fit a slot."""
        owner = self.store.load(who.person, who.number) if isinstance(who, Version) else who
        try:
            adapter = self._exporter.adapter(owner, isinstance(who, SharedModel) or who.stacked)
        except InputError as unfit:  # does not know whose state it is
            log.warning("an adapter could not be built: %s", unfit)
            return False
        write_peft(folder, adapter, "")
        return True

    def _is_stored(self, who: ServedModel) -> bool:
        """Whether the store holds that version with the same content; the models without a person always exist."""
        if isinstance(who, SharedModel):
            return True
        seal = self.store.seal(who.person, who.number)
        return seal is not None and seal.startswith(who.seal)


class LoraExporter:
    """Builds adapters of rank at most ``rank`` from a bank's anchors, its task LoRA, and people's states."""

    def __init__(self, anchors: LoraBatch, task_lora: LoraBatch | None, bank: str, rank: int) -> None:
        self.anchors, self.task_lora, self.bank, self.rank = anchors, task_lora, bank, rank
        shared = [batch for batch in (task_lora, anchors) if batch is not None]
        self._spans: dict[str, tuple[Tensor, ...]] = {}  # Q_A, R_A, Q_B, R_B of each layer
        for name in anchors.names:
            a, b = shared_ranks(shared, name)
            self._spans[name] = *torch.linalg.qr(a.mT), *torch.linalg.qr(b)

    def adapter(self, owner: State | SharedModel, stacked: bool = True) -> LoraBatch:
        """Return one adapter with scale 1, whose task LoRA and merge are truncated to the slot's rank.

        The base's adapter is zero. Raises InputError for a pooled model without a task LoRA, and for a stack that fills
        the slot; OtherBank; StateCorrupt.
        """
        if owner is BASE:
            return LoraBatch({name: _zero(pair) for name, pair in self.anchors.factors.items()})
        if isinstance(owner, SharedModel):
            if self.task_lora is None:
                raise InputError("the bank has no task LoRA", hint="The pooled model is the base.")
            fits = self.task_lora.rank <= self.rank
            return self.task_lora.scaled_into_b() if fits else truncate(self.task_lora, self.rank)[0]
        parts = adapter_parts(owner, self.anchors, self.bank, torch.float32, stacked)
        stack = [parts.stack] if parts.stack else []
        room = self.rank - sum(part.rank for part in stack)
        if room < 1:
            raise InputError(
                f"a stack of rank {self.rank - room} leaves no room in a slot of rank {self.rank}",
                hint="Give vLLM larger slots:  --vllm-args '--max-lora-rank 32'",
            )
        assert parts.gates is not None  # of a person
        whole = join([self._merged(parts.gates, room), *stack])
        if any(not part.isfinite().all() for pair in whole.factors.values() for part in pair):
            raise StateCorrupt("a person's adapter contains NaN or infinity", hint="Personalize again.")
        return whole

    def _merged(self, anchor_gates: Tensor, rank: int) -> LoraBatch:
        """Return task LoRA and exact merge truncated to ``rank``."""
        shares = anchor_gates.repeat_interleave(self.anchors.rank)
        gates = torch.cat([shares.new_ones(self.task_lora.rank if self.task_lora else 0), shares])
        factors = {}
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # the same state gives the same adapter
            for name, (q_a, r_a, q_b, r_b) in self._spans.items():
                core = (r_b * gates) @ r_a.mT
                u, s, v = torch.svd_lowrank(core, min(rank + _OVERSAMPLING, *core.shape), _ITERATIONS)
                u, s, v = u[:, :rank], s[:rank], v[:, :rank]
                root = s.sqrt()
                factors[name] = Factors(((v * root).mT @ q_a.mT)[None], (q_b @ (u * root))[None])
        return even(factors)


def _zero(pair: Factors) -> Factors:
    """Return factors of rank 1 with product zero, for one adapter."""
    return Factors(torch.zeros_like(pair.a[:1, :1]), torch.zeros_like(pair.b[:1, :, :1]))
