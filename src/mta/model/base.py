"""The frozen language model everybody shares: weights, tokenizer, prompts, fingerprint, and what LoRA can attach to."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mta.config import Run
from mta.data.tasks.prompt import PromptFormat
from mta.errors import UnsupportedModel
from mta.kernels import kernels, use_kernels
from mta.model.adaptable import (
    adapted_layers,
    enable_checkpointing,
    feed_head_contiguously,
    load_weights,
    longest_text,
    outline_model,
    refuse_quantized,
    refuse_unsupported,
    text_config,
)
from mta.model.agreement import CAUSAL, Reference, called_layers, short_windows
from mta.model.fingerprint import fingerprint_of, folder_fingerprint
from mta.model.footprint import Footprint
from mta.model.tree_attention import blocks_of, can_block, install, masks, visible
from mta.system.assets import ASSETS
from mta.system.device import pick_device, pick_dtype
from mta.system.hub import local_folder
from mta.system.model_files import loading, refuse_unsafe_base

log = logging.getLogger("mta")
Check = Callable[[str], None]  # of a fingerprint
_WHAT = "a causal language model"
_HINT = "Give an asset, or a folder or hub id that holds config.json, a tokenizer and *.safetensors."


class BaseModel:
    """A causal language model whose weights are never written to.

    >>> base = BaseModel.load("smollm2-135m-instruct")        # asset name, folder or hub id
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        name: str,
        fingerprint: str = "",
        max_tokens: int = 1024,
        gradient_checkpointing: bool = False,
    ) -> None:
        refuse_unsupported(model)
        model.eval().requires_grad_(False)
        if gradient_checkpointing:
            enable_checkpointing(model, name)
        self.gradient_checkpointing = gradient_checkpointing
        self.model: Any = model
        self.tokenizer = tokenizer
        self.name = name
        self.fingerprint = fingerprint or fingerprint_of(dict(model.named_parameters()), tokenizer)
        self.prompts = PromptFormat(tokenizer, longest_text(model, max_tokens))
        if self.has_weights:
            self._prepare(model)
        else:
            self.blocked = self._packable = False
            self.exchanged = list[str]()
            self._targets = adapted_layers(model, called_layers(model), name)

    def _prepare(self, model: Any) -> None:
        """Let the model compute in the fastest way that gives what it gives alone. Raises UnsupportedModel."""
        with short_windows(model):
            # Before anything is changed on the model.
            reference = Reference.of(model, self.tokenizer, self.prompts.max_tokens)
            self.blocked = can_block(model)
            if self.blocked:
                install(model)
            feed_head_contiguously(model)
            self.exchanged = use_kernels(model)  # classes of modules that compute with compiled kernels
            self._targets = adapted_layers(model, reference.called, self.name)
            self._choose_rows(reference)

    @classmethod
    def load(
        cls,
        name: str,
        dtype: str = "auto",
        device: str = "auto",
        max_tokens: int = 1024,
        gradient_checkpointing: bool = False,
        check: Check | None = None,
    ) -> BaseModel:
        """Load by asset name, local folder or hub id. Raises AssetError, ModelError, UnsupportedModel.

        ``gradient_checkpointing`` keeps one layer's activations and computes the others again in the backward pass: for
        big bases and long texts. ``check`` gets the fingerprint before the weights are loaded, and may raise MtaError.
        """
        place = pick_device(device)
        folder, numbers = local_folder(name), pick_dtype(dtype, place)
        config, tokenizer, fingerprint = _described(folder, name, check)
        with loading(name, _WHAT, _HINT):
            model = load_weights(folder, config, name, numbers)
        return cls(model.to(place), tokenizer, name, fingerprint, max_tokens, gradient_checkpointing)

    @classmethod
    def of(cls, run: Run, check: Check | None = None) -> BaseModel:
        """The base that a run names, loaded as it says; ``check`` as for ``load``."""
        return cls.load(run.base, run.dtype, run.device, run.max_tokens, run.gradient_checkpointing, check)

    @classmethod
    def outline(cls, run: Run, check: Check | None = None) -> BaseModel:
        """The base that a run names without its weights, which takes no memory: layers lie on the ``meta`` device.

        It has tokenizer, prompts, fingerprint, shapes, and stop tokens, and computes nothing. ``check`` and errors are
        those of ``load``.
        """
        folder, dtype = local_folder(run.base), pick_dtype(run.dtype, pick_device(run.device))
        config, tokenizer, fingerprint = _described(folder, run.base, check)
        with loading(run.base, _WHAT, _HINT):
            model = outline_model(folder, config, dtype)
        return cls(model, tokenizer, run.base, fingerprint, run.max_tokens)

    def as_loaded(self, run: Run) -> Run:
        """The run with this base as it was loaded, and folders by their full names: what another process loads too."""
        named = {"base": self.name} | ({} if run.encoder == "base" else {"encoder": run.encoder})  # "base" is no folder
        full = {key: str(Path(name).resolve()) if Path(name).is_dir() else name for key, name in named.items()}
        dtype = str(self.dtype).removeprefix("torch.")
        return run.model_copy(update={**full, "dtype": dtype, "max_tokens": self.prompts.max_tokens})

    def twin(self) -> BaseModel:
        """The same weights under modules of their own: another thread can put other adapters on them meanwhile."""
        made = copy.copy(self)
        shared = {id(tensor): tensor for tensor in (*self.model.parameters(), *self.model.buffers())}
        made.model = copy.deepcopy(self.model, shared)
        return made

    @property
    def has_weights(self) -> bool:
        """Whether it can compute: an outline cannot."""
        return self.device.type != "meta"

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the frozen weights; adapters keep float32 masters unless the base is float64."""
        return next(self.model.parameters()).dtype

    @property
    def master_dtype(self) -> torch.dtype:
        """Type adapters are kept and trained in."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def pad_token(self) -> int:
        """What fills rows up; nobody attends to it."""
        pad = self.tokenizer.pad_token_id
        return int(self.prompts.end_token if pad is None else pad)

    @property
    def stop_tokens(self) -> list[int]:
        """What ends an answer: the template's end token, and whatever the model's own configuration names."""
        named = getattr(self.model.generation_config, "eos_token_id", None)
        named = named if isinstance(named, list) else [named]
        return sorted({self.prompts.end_token, *(token for token in named if token is not None)})

    @property
    def note(self) -> str:
        """What a reader of results must know about these weights."""
        return ASSETS[self.name].note if self.name in ASSETS else ""

    @property
    def targets(self) -> dict[str, tuple[int, int]]:
        """Adapted linear layers in the order of the forward pass: name -> (inputs D, outputs O). No LM head."""
        return self._targets

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether layers store their weights transposed, as GPT-2's do."""
        return any(type(m).__name__ == "Conv1D" for m in self.model.modules())

    @cached_property
    def attention_price(self) -> float:
        """Cost of one query-key pair over the cost of pushing one token through the linear layers (for packing).

        Masks, softmax and what is moved for them make a pair about three times as dear as its operations.
        """
        linear = sum(d * o for d, o in self.targets.values())
        config = text_config(self.model)
        return 3.0 * 2.0 * config.hidden_size * config.num_hidden_layers / linear

    @cached_property
    def footprint(self) -> Footprint:
        """Memory that passes through this base take."""
        compiled = kernels("attention", next(self.model.parameters())) is not None
        how = {"itemsize": self.dtype.itemsize, "kernels": compiled, "checkpointed": self.gradient_checkpointing}
        return Footprint.of(self.model, self.exchanged, **how)

    @property
    def packable(self) -> bool:
        """Whether rows may hold branches: the model keeps to the positions and masks that it is given."""
        return self._packable

    @contextmanager
    def in_training(self) -> Iterator[None]:
        """Within the block, layers are checkpointed where that was asked for.

        transformers asks a layer whether it is in training mode; what is inside it stays out, so dropout stays off.
        """
        every = self.model.modules() if self.gradient_checkpointing else ()
        layers = [module for module in every if hasattr(module, "gradient_checkpointing")]
        for layer in layers:
            layer.training = True
        try:
            yield
        finally:
            for layer in layers:
                layer.training = False

    def logits(self, tokens: Tensor, ends: Tensor, positions: Tensor, where: Tensor) -> Tensor:
        """Next-token logits at chosen places of token trees; the LM head sees no other token.

        Shapes: tokens, ends, positions (B, T), where token i sees token j exactly when j <= i < ends[j];
        where (n,) flat indices into B * T -> (n, V).
        """
        inputs: dict[str, Any] = {"input_ids": tokens, "use_cache": False}
        if self._packable:
            inputs |= {"position_ids": positions, **self._attention(ends, positions)}
        else:
            inputs["attention_mask"] = torch.ones_like(tokens)  # rows of one example each, filled up on the right

        return self._logits_at(where, inputs)

    def next_logits(self, tokens: Tensor, positions: Tensor, cache: Any, length: int, where: Tensor) -> Tensor:
        """Next-token logits at chosen places of rows that go on from what is cached of them.

        Shapes: tokens, positions (B, T); ``cache`` takes their keys and values in and gives back (B, length) of them,
        of which token t sees those up to its own position; where (n,) flat indices into B * T -> (n, V).
        """
        keys = torch.arange(length, device=positions.device)[None]
        seen = keys[:, None] <= positions[:, :, None]
        inputs = {"input_ids": tokens, "position_ids": positions, "use_cache": True, self._cache_name: cache}
        return self._logits_at(where, inputs | {"attention_mask": masks(self.model, seen, positions, keys)})

    def _logits_at(self, where: Tensor, inputs: dict[str, Any]) -> Tensor:
        def gather(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (args[0].flatten(0, 1)[where].unsqueeze(0), *args[1:])

        # In front of the LM head, so that whatever a model does to its logits afterwards stays.
        handle = self.model.get_output_embeddings().register_forward_pre_hook(gather)
        try:
            return self.model(**inputs).logits.squeeze(0)  # [0] would copy the logits' gradient
        finally:
            handle.remove()

    @cached_property
    def _cache_name(self) -> str:
        """What this version of transformers calls the cache."""
        return "cache" if "cache" in self._keywords else "past_key_values"

    @cached_property
    def _keywords(self) -> frozenset[str]:
        """What the model's forward takes by name."""
        return frozenset(inspect.signature(self.model.forward).parameters)

    def _attention(self, ends: Tensor, positions: Tensor) -> dict[str, Any]:
        """The keywords that tell a model who sees whom: blocks where its attention takes them, else dense masks."""
        if not self.blocked:
            return {"attention_mask": masks(self.model, visible(ends), positions, positions)}
        blocks, flat = blocks_of(ends, positions), positions.flatten()
        mask = masks(self.model, blocks.seen, flat[blocks.queries], flat[blocks.keys])
        return {"attention_mask": mask, "blocks": blocks}

    def _choose_rows(self, reference: Reference) -> None:
        """Take the fastest way to compute rows that gives what the model gives. Raises UnsupportedModel."""
        ways = [True, False] if self.blocked else [False]
        self.blocked = self._packable = False
        if not reference.agrees(self.model, self.logits, packed=False):
            raise UnsupportedModel(
                f"{self.name!r} gives a text other logits in a batch than alone: its tokens see the tokens after them, "
                "or its rows depend on each other",
                hint=CAUSAL,
            )
        for blocked in ways if "position_ids" in self._keywords else ():
            self.blocked, self._packable = blocked, True
            if reference.agrees(self.model, self.logits, packed=True):
                return
        self.blocked = self._packable = False
        log.info("%s: each example is computed in a row of its own", self.name)


def _described(folder: str, name: str, check: Check | None) -> tuple[Any, Any, str]:
    """Return the configuration, tokenizer, and fingerprint of a folder that is safe to load, and pass ``check``."""
    from transformers import AutoConfig, AutoTokenizer

    refuse_unsafe_base(Path(folder), name)
    with loading(name, _WHAT, _HINT):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        refuse_quantized(config)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        fingerprint = folder_fingerprint(folder, tokenizer)
        if check:
            check(fingerprint)
    return config, tokenizer, fingerprint
