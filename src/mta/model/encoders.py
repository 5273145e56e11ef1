"""Encode histories as vectors, so that people can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from mta.data.history import Person
from mta.data.tasks.task import Task
from mta.lora.layers import applied
from mta.model.base import BaseModel
from mta.model.fingerprint import folder_fingerprint
from mta.system.hub import local_folder
from mta.system.model_files import loading, lowers_case, modules_of, refuse_unsafe_encoder
from mta.system.progress import OnStep, Step

ENCODING = "encoding"  # the stage of these reports
_TOKENS_PER_BATCH = 4096
_REPORTED = 4096  # texts from one report of progress to the next
_KIND = "a sentence encoder"
_HINT = "Give a folder or hub id of sentence-transformers, or encode with the base:  encoder=base"


class Encoder(Protocol):
    """Encoder of texts as vectors. ``name`` is an argument of ``load_encoder``."""

    name: str

    @property
    def fingerprint(self) -> str:
        """Identity of the weights: vectors of different fingerprints are not comparable."""

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Encode n texts as (n, E) float32 on the CPU."""


class SentenceEncoder:
    """A sentence-transformers model by asset name, folder, or hub id.

    Weights are loaded at the first ``encode``; ``fingerprint`` does not need them. Raises AssetError, ModelError.
    """

    def __init__(self, name: str, device: str | None = None) -> None:
        self.name = name
        self._device = device
        self._folder = Path(local_folder(name))
        refuse_unsafe_encoder(self._folder, name)
        self._modules = modules_of(self._folder, name)

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the stored weights of all modules; loads only the tokenizer."""
        from transformers import AutoTokenizer

        files = [file for module in self._modules for file in module.weight_files(self._folder)]
        inner = self._folder / self._modules[0].path
        with loading(self.name, _KIND, _HINT):
            if lowers_case(inner):  # then sentence-transformers changes the tokenizer after loading
                tokenizer = self._model.tokenizer
            else:
                tokenizer = AutoTokenizer.from_pretrained(inner, trust_remote_code=False)
            return folder_fingerprint(self._folder, tokenizer, files)

    def encode(self, texts: Sequence[str]) -> Tensor:
        vectors: Any = self._model.encode(list(texts), batch_size=64, show_progress_bar=False, convert_to_tensor=True)
        return vectors.float().cpu()

    @cached_property
    def _model(self) -> Any:
        from sentence_transformers import SentenceTransformer

        with loading(self.name, _KIND, _HINT):
            return SentenceTransformer(
                str(self._folder),
                device=self._device,
                trust_remote_code=False,
                local_files_only=True,
                model_kwargs={"use_safetensors": True},
            )


class BaseEncoder:
    """The base model as an encoder: mean of the last hidden states over a text's tokens."""

    name = "base"

    def __init__(self, base: BaseModel) -> None:
        self._base = base

    @property
    def fingerprint(self) -> str:
        return self._base.fingerprint

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> Tensor:
        base, vectors = self._base, dict[int, Tensor]()
        rows = [base.tokenizer(text)["input_ids"][: base.prompts.max_tokens] or [0] for text in texts]
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        while order:
            width = len(rows[order[0]])
            size = max(_TOKENS_PER_BATCH // width, 1)
            chosen, order = order[:size], order[size:]
            mask = torch.tensor([[i < len(rows[r]) for i in range(width)] for r in chosen], device=base.device)
            tokens = torch.tensor([rows[r] + [0] * (width - len(rows[r])) for r in chosen], device=base.device)
            with applied(base.model, [], torch.zeros(len(chosen))):  # no other thread's adapters
                output = base.model.base_model(input_ids=tokens, attention_mask=mask.long())
            hidden = output.last_hidden_state.float()
            vectors |= zip(chosen, ((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)).cpu())
        return torch.stack([vectors[i] for i in range(len(rows))])


def load_encoder(name: str, base: BaseModel) -> Encoder:
    """Return the base model as an encoder for the name "base", else a sentence encoder (asset, folder, or hub id)."""
    return BaseEncoder(base) if name == "base" else SentenceEncoder(name, str(base.device))


def encode_people(
    encoder: Encoder,
    task: Task,
    people: Sequence[Person],
    what: Literal["input", "both", "history"],
    on_step: OnStep | None = None,
) -> Tensor:
    """Return one unit vector per person, (U, E): the mean over their items. Each distinct text is encoded once.

    ``both`` encodes an item with its target: a film's title alone does not show the rating. ``history`` encodes all
    items with their targets as one text, like the code of arXiv:2511.20072. Encoders cut the text at their limit.
    """
    texts = [[task.text_of(item, with_target=what != "input") for item in person.items] for person in people]
    if what == "history":
        texts = [["\n".join(each)] for each in texts]
    distinct = sorted({text for each in texts for text in each})
    place = {text: i for i, text in enumerate(distinct)}
    parts = []
    for number, start in enumerate(range(0, max(len(distinct), 1), _REPORTED), 1):
        parts.append(encoder.encode(distinct[start : start + _REPORTED]))
        if on_step and len(distinct) > _REPORTED:
            done = min(start + _REPORTED, len(distinct))
            on_step(ENCODING, Step(number, len(people), done, len(distinct)))
    vectors = torch.nn.functional.normalize(torch.cat(parts), dim=1)
    means = torch.stack([vectors[[place[text] for text in each]].mean(0) for each in texts])
    return torch.nn.functional.normalize(means, dim=1)
