"""The shared frozen language model: weights, tokenizer, prompts, fingerprint, and layers for LoRA."""

from __future__ import annotations

import copy
import inspect
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mta.config import Run
from mta.data.tasks.prompt import PromptFormat
from mta.errors import UnsupportedModel
from mta.kernels.compile import kernels
from mta.kernels.linear import use_restored_weights, weight_of
from mta.kernels.swap import use_kernels
from mta.model import flex
from mta.model.adaptable import (
    adapted_layers,
    enable_checkpointing,
    load_weights,
    longest_text,
    outline_model,
    quantized_by,
    refuse_unsupported,
)
from mta.model.agreement import CAUSAL, Reference, called_layers, short_windows
from mta.model.fingerprint import fingerprint_of, folder_fingerprint
from mta.model.footprint import Footprint
from mta.model.tree_attention import blocks_of, can_block, flex_masks, install, masks, visible
from mta.system.assets import ASSETS
from mta.system.atomic import json_sha256
from mta.system.device import check_dtype, dtype_name, moved, pick_device, pick_dtype
from mta.system.hub import local_folder
from mta.system.model_files import loading, refuse_unsafe_base

log = logging.getLogger("mta")
Exact = tuple[Tensor, Tensor]  # rows of chosen places and tokens whose logits must not be rounded; both (k,)
_CONTENT = "Give an asset, or a folder or hub id that holds config.json, tokenizer.json and *.safetensors."
Check = Callable[[str], None]  # called with a fingerprint; raises MtaError to refuse the base


class BaseModel:
    """A frozen causal language model; its weights are never written to.

    Of a given model's generation settings, only the end tokens are kept.

    >>> base = BaseModel.load("smollm2-135m-instruct")        # asset name, folder, GGUF file or hub id
    """

    targets: dict[str, tuple[int, int]]  # adapted linear layers in forward order: name -> (D, O); without the LM head
    packable: bool  # rows may hold branches: the model follows the positions and masks it is given
    flexible: bool  # rows are computed by flex attention (mta.model.flex) instead of blocks

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        name: str,
        fingerprint: str = "",
        max_tokens: int = 1024,
        gradient_checkpointing: bool = False,
        quantize: str = "none",
    ) -> None:
        refuse_unsupported(model)
        check_dtype(next(model.parameters()).dtype)
        model.eval().requires_grad_(False)
        use_restored_weights(model, next(model.parameters()).dtype)
        given: Any = model.generation_config
        if given:  # without its penalties and filters: they would change answers, but not scores
            model.generation_config = type(given)(eos_token_id=given.eos_token_id)
        if gradient_checkpointing:
            enable_checkpointing(model, name)
        self.gradient_checkpointing = gradient_checkpointing
        self.model: Any = model
        self.quantize = quantize  # what mta quantized, not what was stored quantized
        self.tokenizer = tokenizer
        self.name = name
        self.place = _place(name)  # now: the working directory may change
        self.fingerprint = fingerprint or fingerprint_of(dict(model.named_parameters()), tokenizer)
        self.prompts = PromptFormat(tokenizer, longest_text(model.config, max_tokens))
        self.exchanged: list[str] = []  # classes of modules that compute with compiled kernels
        self.blocked = self.packable = self.flexible = False
        if self.has_weights:
            self._prepare(model)
        else:
            self.targets = adapted_layers(model, called_layers(model), name)

    def _prepare(self, model: Any) -> None:
        """Choose the fastest computation that gives the results of the unchanged model. Raises UnsupportedModel."""
        with short_windows(model):
            reference = Reference.of(model, self.tokenizer, self.prompts.max_tokens)  # before the model is changed
            if blockable := can_block(model):
                install(model)
            # For the strided last tokens, torch.matmul would copy the head's weight once per row.
            model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
            self.exchanged = use_kernels(model)
            self.targets = adapted_layers(model, reference.called, self.name)
            self._choose_rows(reference, blockable)

    @classmethod
    def load(
        cls,
        name: str | Path,
        dtype: str = "auto",
        device: str = "auto",
        max_tokens: int = 1024,
        gradient_checkpointing: bool = False,
        check: Check | None = None,
        quantize: str = "none",
    ) -> BaseModel:
        """Load by asset name, local folder, GGUF file, or hub id.

        ``gradient_checkpointing`` recomputes activations in the backward pass, for big bases and long texts. ``check``
        is called with the fingerprint before the weights are loaded. ``quantize``: none, nf4, or int8.
        Raises AssetError, ModelError, UnsupportedModel, MissingExtra.
        """
        place, name = pick_device(device), os.path.expanduser(name)
        load = partial(load_weights, place=place, quantize=quantize)
        model, tokenizer, fingerprint = _read(load, name, pick_dtype(dtype, place), check, quantize)
        return cls(model, tokenizer, name, fingerprint, max_tokens, gradient_checkpointing, quantize)

    @classmethod
    def of(cls, run: Run, check: Check | None = None) -> BaseModel:
        """Load the base of a run with the run's settings; ``check`` as for ``load``."""
        return cls.load(
            run.base, run.dtype, run.device, run.max_tokens, run.gradient_checkpointing, check, run.quantize
        )

    @classmethod
    def outline(cls, run: Run, check: Check | None = None) -> BaseModel:
        """Return the base of a run without weights: its layers are on the ``meta`` device and take no memory.

        It cannot compute. ``check`` and errors are those of ``load``.
        """
        dtype = pick_dtype(run.dtype, pick_device(run.device))
        name = os.path.expanduser(run.base)
        model, tokenizer, fingerprint = _read(outline_model, name, dtype, check, run.quantize)
        return cls(model, tokenizer, name, fingerprint, run.max_tokens, quantize=run.quantize)

    def as_loaded(self, run: Run) -> Run:
        """Return the run with this base as loaded and with absolute folders, so that other processes load the same.

        A device is named without a number: of several GPUs, another process may see only its own.
        """
        encoder = run.encoder if run.encoder == "base" else _place(run.encoder)  # "base": no folder
        given = {"base": self.place, "encoder": encoder, "device": run.device.partition(":")[0]}
        own = {
            "dtype": dtype_name(self.dtype),
            "max_tokens": self.prompts.max_tokens,
            "quantize": self.quantize,
            "gradient_checkpointing": self.gradient_checkpointing,  # passes are planned with it
        }
        return run.model_copy(update=given | own)

    def twin(self) -> BaseModel:
        """Return a base with new modules and the same weights, so that another thread can apply other adapters."""
        made = copy.copy(self)
        shared = {id(tensor): tensor for tensor in (*self.model.parameters(), *self.model.buffers())}
        made.model = copy.deepcopy(self.model, shared)
        return made

    def __repr__(self) -> str:
        return f"BaseModel({self.name!r}, {self.dtype} on {self.device})"

    @property
    def has_weights(self) -> bool:
        """Whether the base can compute; an outline cannot."""
        return self.device.type != "meta"

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the frozen weights."""
        return next(self.model.parameters()).dtype

    @property
    def master_dtype(self) -> torch.dtype:
        """Type in which adapters are trained and kept: float32, or float64 for a base in float64."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def pad_token(self) -> int:
        """Token that pads rows; no other token attends to it."""
        pad, known = self.tokenizer.pad_token_id, self.model.get_input_embeddings().weight.shape[0]
        return int(pad if pad is not None and pad < known else self.prompts.end_token)  # some are not in the embedding

    @property
    def stop_tokens(self) -> list[int]:
        """Tokens that end an answer: the template's end token, and those in the model's generation configuration."""
        named = getattr(self.model.generation_config, "eos_token_id", None)
        named = named if isinstance(named, list) else [named]
        return sorted({self.prompts.end_token, *(token for token in named if token is not None)})

    @property
    def note(self) -> str:
        """A note on these weights for readers of results; empty for bases that are not assets."""
        return ASSETS[self.name].note if self.name in ASSETS else ""

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether layers store their weights transposed, as GPT-2's do."""
        return any(type(m).__name__ == "Conv1D" for m in self.model.modules())

    @cached_property
    def attention_price(self) -> float:
        """Cost of one query-key pair divided by the cost of one token in the linear layers (for packing).

        Masks, softmax, and their memory traffic make a pair about three times as expensive as its operations.
        """
        linear = sum(d * o for d, o in self.targets.values())
        config = self.model.config.get_text_config()
        return 3.0 * 2.0 * config.hidden_size * config.num_hidden_layers / linear

    @cached_property
    def footprint(self) -> Footprint:
        """Memory model of passes through this base."""
        compiled = kernels("attention", next(self.model.parameters())) is not None
        plain = Footprint.of(self.model, self.dtype.itemsize, self.targets, self.exchanged)
        return replace(plain, kernels=compiled, checkpointed=self.gradient_checkpointing)

    @cached_property
    def footprint_without_kernels(self) -> Footprint:
        """The same in a process that uses no kernels: on GPUs."""
        plain = Footprint.of(self.model, self.dtype.itemsize, self.targets)
        return replace(plain, checkpointed=self.gradient_checkpointing)

    @contextmanager
    def in_training(self) -> Iterator[None]:
        """Checkpoint layers within the block if ``gradient_checkpointing`` is on.

        transformers requires training mode for that. The modules inside do not get it, so dropout stays off.
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

    def logits(
        self, tokens: Tensor, ends: Tensor, positions: Tensor, where: Tensor, exact: Exact | None = None
    ) -> Tensor:
        """Return next-token logits at chosen places of token trees; the LM head computes no other token.

        Shapes: tokens, ends, positions (B, T), where token i sees token j exactly when j <= i < ends[j];
        where (n,) flat indices into B * T -> (n, V). Give trees on the CPU, where their blocks are searched.
        """
        inputs: dict[str, Any] = {"input_ids": tokens, "use_cache": False}
        if not self.packable:  # rows of one example each, padded on the right
            return self._logits_at(where, inputs | {"attention_mask": torch.ones_like(tokens)}, exact)
        if self.flexible:
            ends, positions = moved(tokens.device, ends, positions)
            mask: Any = flex_masks(self.model, ends, positions)
        elif self.blocked:
            inputs["blocks"] = blocks = blocks_of(ends, positions, tokens.device)
            positions, flat = blocks.positions, blocks.positions.flatten()
            mask = masks(self.model, blocks.seen, flat[blocks.queries], flat[blocks.keys])
        else:
            ends, positions = moved(tokens.device, ends, positions)
            mask = masks(self.model, visible(ends), positions, positions)
        return self._logits_at(where, inputs | {"position_ids": positions, "attention_mask": mask}, exact)

    def next_logits(
        self, tokens: Tensor, positions: Tensor, cache: Any, length: int, where: Tensor, exact: Exact | None = None
    ) -> Tensor:
        """Return next-token logits at chosen places of rows that continue from a KV cache.

        Shapes: tokens, positions (B, T). ``cache`` stores their keys and values and returns (B, length) of them; a
        token sees those up to its own position. where (n,) flat indices into B * T -> (n, V).
        """
        keys = torch.arange(length, device=positions.device)[None]
        seen = keys[:, None] <= positions[:, :, None]
        cache_name = "cache" if "cache" in self._keywords else "past_key_values"  # depends on transformers' version
        inputs = {"input_ids": tokens, "position_ids": positions, "use_cache": True, cache_name: cache}
        return self._logits_at(where, inputs | {"attention_mask": masks(self.model, seen, positions, keys)}, exact)

    def _logits_at(self, where: Tensor, inputs: dict[str, Any], exact: Exact | None) -> Tensor:
        def gather(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (args[0].flatten(0, 1)[where].unsqueeze(0), *args[1:])

        def correct(head: nn.Module, args: tuple[Any, ...], logits: Tensor) -> Tensor:
            return logits if exact is None else corrected(head, args[0], logits, exact)

        # Select before the LM head, so that the model's own processing of logits still applies.
        head = self.model.get_output_embeddings()
        with head.register_forward_pre_hook(gather), head.register_forward_hook(correct):
            return self.model(**inputs).logits.squeeze(0)  # [0] would copy the logits' gradient

    @cached_property
    def _keywords(self) -> frozenset[str]:
        return frozenset(inspect.signature(self.model.forward).parameters)

    def _choose_rows(self, reference: Reference, blockable: bool) -> None:
        """Choose the fastest row format with the model's own results. Raises UnsupportedModel."""
        if not reference.agrees(self.model, self.logits, packed=False):
            raise UnsupportedModel(
                f"{self.name!r} gives a text other logits in a batch than alone: its tokens see later tokens, "
                "or its rows depend on each other",
                hint=CAUSAL,
            )
        ways = [(True, True), (True, False), (False, False)]  # blocks or dense masks; the blocks as flex attention
        wanted = flex.wanted(self.device)
        for blocked, flexible in ways if "position_ids" in self._keywords else ():
            if blocked > blockable or flexible > wanted:
                continue
            self.blocked, self.flexible, self.packable = blocked, flexible, True
            if reference.agrees(self.model, self.logits, packed=True):
                return
        self.blocked = self.packable = False
        log.info("%s: each example is computed in its own row", self.name)


def corrected(head: nn.Module, x: Tensor, logits: Tensor, exact: Exact) -> Tensor:
    """Return the ``logits`` (1, n, V) of a head for ``x`` (1, n, D) in float32, those of ``exact`` not rounded.

    A logit of 40 in bfloat16 is rounded to a multiple of 0.25: more than most people differ. Gradients are as without.
    """
    if logits.dtype.itemsize >= 4 or not isinstance(head, nn.Linear):
        return logits
    rows, tokens = exact
    full = logits.float()
    with torch.no_grad():
        products = x[0, rows].float() * weight_of(head)[tokens].float()
        full[0, rows, tokens] = products.sum(-1) + (0.0 if head.bias is None else head.bias[tokens].float())
    return full


def _read(
    make: Callable[..., Any], name: str, dtype: torch.dtype, check: Check | None, quantize: str
) -> tuple[nn.Module, Any, str]:
    """Return model, tokenizer, and fingerprint of a folder; ``make`` the model after safety checks and ``check``."""
    folder = local_folder(name)
    with loading(name, "a causal language model", _CONTENT):
        config, tokenizer = _configured(folder, name)
        fingerprint = folder_fingerprint(folder, tokenizer)
        if quantize != "none":  # another model
            fingerprint = json_sha256([fingerprint, quantize])
        if check:
            check(fingerprint)
        return make(folder, config, name, dtype), tokenizer, fingerprint


def prompts_of(run: Run) -> PromptFormat:
    """Return the prompts of a run's base, whose weights are neither read nor downloaded.

    Raises AssetError, ModelError, UnsupportedModel.
    """
    name = os.path.expanduser(run.base)
    with loading(name, "a causal language model", _CONTENT):
        config, tokenizer = _configured(local_folder(name, weights=False), name)
    return PromptFormat(tokenizer, longest_text(config, run.max_tokens))


def _configured(folder: str, name: str) -> tuple[Any, Any]:
    """Return configuration and tokenizer of a folder that is safe to load."""
    from transformers import AutoConfig, AutoTokenizer

    refuse_unsafe_base(Path(folder), name)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    quantized_by(config)
    return config, AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _place(name: str) -> str:
    """Return the absolute path of a local folder or file; the name of an asset, or of a model on the hub."""
    path = Path(os.path.expanduser(name))
    return str(path.resolve()) if name not in ASSETS and path.exists() else name
