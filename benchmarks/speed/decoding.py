"""Answers for 16 different people in one batch: ours against the base alone, and against PEFT's mixed batches."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed import data
from benchmarks.speed.adapters import ManyPeft, plain_model
from benchmarks.speed.data import Absent
from benchmarks.speed.settings import Settings
from benchmarks.speed.timing import Row, turns
from benchmarks.speed.training import Unequal, agreed, base_of, small
from mta.data.history import Person
from mta.lora.batch import LoraBatch, fresh
from mta.lora.layers import PerPerson, applied
from mta.model.base import BaseModel
from mta.model.generate import generate

PEOPLE, PROMPT, NEW = 16, 100, 48
_SHORT = {"float32": "fp32", "bfloat16": "bf16"}
_PEERS = {"the base alone": "transformers generate, same batch", "PEFT adapter_names": "same batch"}
_TARGETS = {
    ("bfloat16", "the base alone"): 0.85,
    ("float32", "the base alone"): 0.85,
    ("bfloat16", "PEFT adapter_names"): 2.5,
}


def rows(settings: Settings) -> Iterator[Row]:
    """Two rows per dtype."""
    for dtype in ("bfloat16", "float32"):
        names = {peer: f"decoding, {_SHORT[dtype]}, against {peer}" for peer in _PEERS}
        wanted = {peer: name for peer, name in names.items() if settings.wanted(name)}
        try:
            if wanted:
                yield from _of_dtype(dtype, wanted, settings)
        except Absent as absent:
            for peer, name in wanted.items():
                yield Row(name, "mta", peer, target=_TARGETS.get((dtype, peer)), skipped=str(absent))
        base_of.cache_clear()
        gc.collect()


def _of_dtype(dtype: str, wanted: Mapping[str, str], settings: Settings) -> Iterator[Row]:
    base = base_of(dtype)
    prompts = prompts_of(base, data.short().people[:PEOPLE])
    work = Work(base, prompts, adapters_of(base, PEOPLE), partial(plain_model, dtype))
    for peer, name in wanted.items():
        theirs = Alone(work) if peer == "the base alone" else Mixed(work)
        yield against(name, peer, work, theirs, settings)
        gc.collect()


def against(name: str, peer: str, work: Work, theirs: Alone, settings: Settings) -> Row:
    """One row, after the logits behind the prompts were compared. Raises Unequal."""
    dtype = str(work.base.dtype).removeprefix("torch.")
    expected = theirs.logits()
    difference = agreed(apart(work.logits(adapted=theirs.adapted), expected), dtype)
    if theirs.adapted and not apart(work.logits(adapted=False), expected) > 3 * difference:
        raise Unequal("the adapters change the logits no more than rounding does: nothing was compared")
    same = share_of_equal(work.answers(adapted=theirs.adapted), theirs.answers())
    if not theirs.adapted:
        work.run()  # the answers above came without adapters, so this is the first time that they are computed
    rates, peer_rates = turns(work.run, theirs.run, settings.repeats, warm=False)  # both have just decoded
    return Row(
        name,
        f"mta, {len(work.prompts)} people in one batch",
        f"{peer}: {_PEERS[peer]}",
        "tokens/s",
        tuple(rates),
        tuple(peer_rates),
        _TARGETS.get((dtype, peer)),
        difference,
        "logits behind the prompts",
        f"adapters of rank {work.adapters.rank}, prompts of {PROMPT} tokens and a few more, {work.new} new; "
        f"{same:.0%} of the decoded tokens are the same",
        more={"people": len(work.prompts), "same_tokens": same},
    )


@dataclass
class Work:
    """Our side: ``prompts`` of different people, adapter u for prompt u."""

    base: BaseModel
    prompts: Sequence[tuple[int, ...]]
    adapters: LoraBatch
    plain: Callable[[], Any]  # makes the base as transformers has it
    new: int = NEW  # tokens of each answer

    @cached_property
    def padded(self) -> dict[str, Tensor]:
        """All prompts, filled up on the left."""
        width = max(map(len, self.prompts))
        fill = [width - len(prompt) for prompt in self.prompts]
        tokens = [[self.base.pad_token] * n + list(prompt) for n, prompt in zip(fill, self.prompts)]
        seen = [[0] * n + [1] * (width - n) for n in fill]
        device = self.base.device
        return {"input_ids": torch.tensor(tokens, device=device), "attention_mask": torch.tensor(seen, device=device)}

    @cached_property
    def peft(self) -> ManyPeft:
        """PEFT with all these adapters: made once, for it takes long."""
        return ManyPeft(self.plain(), self.adapters)

    @property
    def never(self) -> int:
        """A token that no model answers: what ends an answer, so that all ways decode as much."""
        return int(self.base.model.config.vocab_size)

    def config(self) -> Any:
        """How the peers generate: as ``mta.model.generate`` does."""
        from transformers import GenerationConfig

        ends = {"eos_token_id": [self.never], "pad_token_id": self.base.pad_token}
        return GenerationConfig(max_new_tokens=self.new, do_sample=False, **ends)

    def logits(self, *, adapted: bool = True) -> Tensor:
        """Of the token after each prompt, with everybody's adapter or with nobody's."""
        owner = torch.arange(len(self.prompts))
        with torch.inference_mode(), applied(self.base.model, [PerPerson(self.adapters)] * adapted, owner):
            return self.base.model(**self.padded, logits_to_keep=1).logits[:, -1]

    def answers(self, *, adapted: bool = True) -> list[list[int]]:
        """The tokens everybody gets."""
        with _never_ending(self.base, self.never):
            added = [PerPerson(self.adapters)] * adapted
            how = {"max_new_tokens": self.new, "tokens_per_batch": 2**20}  # one batch, as the peers'
            return generate(self.base, self.prompts, range(len(self.prompts)), added, **how)

    def run(self) -> float:
        """Decode; returns how many tokens."""
        return _counted(self.answers(), self.new)


class Alone:
    """The model as transformers loads it, without adapters."""

    adapted = False

    def __init__(self, work: Work) -> None:
        self.work = work
        self.model = self._model()

    def _model(self) -> Any:
        return self.work.plain()

    def logits(self) -> Tensor:
        """As ``Work.logits``."""
        with torch.inference_mode():
            return self.model(**self.work.padded, logits_to_keep=1).logits[:, -1]

    def answers(self) -> list[list[int]]:
        """As ``Work.answers``."""
        return self._generated(self.work.padded)

    def run(self) -> float:
        """Decode; returns how many tokens."""
        return _counted(self.answers(), self.work.new)

    @torch.inference_mode()
    def _generated(self, inputs: Mapping[str, Tensor], **how: Any) -> list[list[int]]:
        whole = self.model.generate(**inputs, generation_config=self.work.config(), **how)
        return whole[:, inputs["input_ids"].shape[1] :].tolist()


class Mixed(Alone):
    """PEFT's batches of mixed adapters: at each layer one adapter after the other, for the rows that ask for it."""

    adapted = True

    def _model(self) -> Any:
        return self.work.peft.model

    def logits(self) -> Tensor:
        with torch.inference_mode():
            return self.model(**self.work.padded, logits_to_keep=1, adapter_names=self.work.peft.names).logits[:, -1]

    def answers(self) -> list[list[int]]:
        return self._generated(self.work.padded, adapter_names=self.work.peft.names)


def prompts_of(base: BaseModel, people: Sequence[Person]) -> list[tuple[int, ...]]:
    """A question about each person's first movies, as many of them as make at least 100 tokens."""
    found: list[tuple[int, ...]] = []
    for person in people:
        text, tokens = "Describe in a few sentences the taste of somebody who has watched", list[int]()
        for item in person.items:
            text += f" {item.fields['title']} ({item.fields['genres']}),"
            tokens = base.tokenizer(base.prompts.render(text), add_special_tokens=False)["input_ids"]
            if len(tokens) >= PROMPT:
                break
        found.append(tuple(tokens))
    return found


def adapters_of(base: BaseModel, people: int) -> LoraBatch:
    """A made-up adapter of rank 8 for each, at a scale that changes what is answered."""
    return small(fresh(base.targets, 8, 16.0, 5, [f"person-{n}" for n in range(people)]), 5)


def apart(found: Tensor, expected: Tensor) -> float:
    """Largest relative difference over the people: norm of the difference over the norm."""
    ours, theirs = found.double(), expected.double()
    return float(((ours - theirs).norm(dim=1) / theirs.norm(dim=1)).max())


def share_of_equal(found: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]) -> float:
    """How many of the tokens are the same in both."""
    pairs = [(x, y) for ours, theirs in zip(found, expected) for x, y in zip(ours, theirs)]
    return sum(x == y for x, y in pairs) / len(pairs)


def _counted(answers: Sequence[Sequence[int]], new: int) -> float:
    assert all(len(answer) == new for answer in answers)  # else the ways would not have done the same work
    return float(sum(map(len, answers)))


@contextmanager
def _never_ending(base: BaseModel, never: int) -> Iterator[None]:
    """Within the block only a token that does not exist ends an answer."""
    kind, kept = type(base), type(base).stop_tokens
    kind.stop_tokens = property(lambda _: [never])  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        kind.stop_tokens = kept  # type: ignore[method-assign]
