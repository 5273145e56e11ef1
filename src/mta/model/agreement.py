"""Check at load time that batched rows give the same logits as the model's own forward pass on one example.

Packed rows are correct only if a model follows the masks and positions it is given. Convolutions, recurrent states, and
windows counted along the row do not follow them. So ``Reference`` computes one path of tokens alone, before the model
is changed, and ``agrees`` computes the same path among other tokens.

    row 0   another example                 padding
    row 1   trunk, another branch, branch   padding          packed; the path is trunk and branch
    row 1   trunk, branch                   padding          one example for each row

1. The logits of the path equal those of the path alone, up to rounding. The effect of rounding is measured: the change
   of the logits when the embeddings change by half a unit in the last place.
2. The logits of the path do not change when all other tokens change, and when the linear layers give row 0 another
   output, as adapters do. In low precision they must be equal in every bit: a leak can be as small as rounding.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from mta.errors import UnsupportedModel
from mta.model.adaptable import is_adaptable
from mta.system.process import is_out_of_memory

log = logging.getLogger("mta")
CAUSAL = "Give a base that reads text from left to right, such as Llama, Mistral, Qwen, Gemma or GPT-2."  # a hint
_TRUNK, _BRANCH, _PADDING = 8, 24, 4  # tokens; a branch is longer than the kernels of convolutions
_ENDS = 8  # number of tokens compared at each end of the branch
_ROUGH = 4.0  # times the effect of rounding: upper bound of differences from the order of summation
_MOST = 0.5  # largest difference that may still be rounding
_WINDOW = 8  # tokens; attention windows are shortened to this length during the check
_WINDOWS = ("sliding_window", "attention_chunk_size")  # settings that transformers reads at each forward pass


@dataclass(frozen=True, slots=True)
class Reference:
    """A path of tokens (T,), its logits (n, V) at ``places`` when computed alone, and the effect of rounding on them.

    ``called`` are the linear layers that the model calls.
    """

    tokens: Tensor
    others: Tensor
    places: Tensor
    logits: Tensor
    rounding: float
    called: set[nn.Module]

    @classmethod
    @torch.inference_mode()
    def of(cls, model: Any, tokenizer: Any, longest: int) -> Reference:
        """Compute a path of at most ``longest`` random tokens alone. Raises UnsupportedModel."""
        draw = torch.Generator().manual_seed(0)
        depth = max(min(_depth(model, longest), longest - _PADDING), 2)
        count = 5 * (depth + _BRANCH + _PADDING)
        words = torch.tensor(_words(model, tokenizer))
        drawn = words[torch.randint(len(words), (count,), generator=draw)].to(model.device)
        path = drawn[:depth]
        branch = range(_trunk(depth), depth)
        places = sorted({*branch[:_ENDS], *branch[-_ENDS:]})
        called = set[nn.Module]()
        with _hooked(_linear_layers(model), lambda layer, *_: called.add(layer)):
            alone = _forward(model, path)[places]
        with _hooked([model.get_input_embeddings()], _rounded):
            again = _forward(model, path)[places]
        rounding = max(_middle(again, alone), _eps(alone.dtype))
        return cls(path, drawn[depth:], torch.tensor(places), alone, rounding, called)

    @torch.inference_mode()
    def agrees(self, model: Any, logits: Callable[..., Tensor], packed: bool) -> bool:
        """Return whether ``logits`` of rows are correct on this model; False if they raise an error."""
        tokens, ends, positions, path = (part.to(self.tokens.device) for part in self._rows(packed))
        where = tokens.shape[1] + path[self.places.to(path)]
        others = self.others[2 * tokens.shape[1] :][: tokens.numel()].view_as(tokens).clone()
        others[1, path] = self.tokens
        try:
            found = logits(tokens, ends, positions, where)
            with _hooked(_linear_layers(model) - {model.get_output_embeddings()}, _row_changed):
                again = logits(others, ends, positions, where)
        except Exception as error:  # any error of the model's own code: the model does not support such rows
            return _failed("packed rows" if packed else "rows of one example", error)
        leak, most = float(_apart(again, found).max()), self._slack if found.dtype.itemsize >= 4 else 0.0
        difference = _middle(found, self.logits)
        if leak <= most and difference <= self._slack:
            return True
        numbers = leak, most, difference, self._slack
        log.info("a check of rows failed: leak %.3g, allowed %.3g; difference %.3g, allowed %.3g", *numbers)
        return False

    @torch.inference_mode()
    def continues(self, go_on: Callable[[list[list[int]]], Tensor]) -> bool:
        """Return whether ``go_on``, which extends two rows by some tokens, gives the logits of the path for row 1."""
        path, other = self.tokens.tolist(), self.others.tolist()
        last = min(_ENDS, len(path) - _trunk(len(path)))
        first = len(path) - last + 1
        cuts = [0, first // 2, *range(first, len(path) + 1)]
        try:
            found = [go_on([[other.pop()], path[start:stop]]) for start, stop in pairwise(cuts) if stop > start]
        except Exception as error:  # as above
            return _failed("rows that continue from a KV cache", error)
        ends = torch.stack([logits[1] for logits in found[-last:]])
        difference = _middle(ends, self.logits[-last:])
        if difference <= self._slack:
            return True
        log.info("a check of the KV cache failed: difference %.3g, allowed %.3g", difference, self._slack)
        return False

    @property
    def _slack(self) -> float:
        return min(_ROUGH * self.rounding, _MOST)

    def _rows(self, packed: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return tokens, ends, and positions (2, T) of both rows, and the places of the path in row 1."""
        depth = len(self.tokens)
        trunk = _trunk(depth)
        other = min(_BRANCH, depth - trunk) if packed else 0
        used, width = depth + other, depth + other + _PADDING
        path = torch.tensor([*range(trunk), *range(trunk + other, used)])
        tokens = self.others[: 2 * width].view(2, width).clone()
        tokens[1, path] = self.tokens
        length = depth + _PADDING  # of row 0: the longest text that the model accepts
        ends = [used] * trunk + [trunk + other] * other + [used] * (depth - trunk) + [*range(used + 1, width + 1)]
        alone = [length] * length + [*range(length + 1, width + 1)]
        depths = [*range(trunk), *range(trunk, trunk + other), *range(trunk, depth)] + [0] * _PADDING
        along = [*range(length)] + [0] * (width - length)
        return tokens, torch.tensor([alone, ends]), torch.tensor([along, depths]), path


def _failed(what: str, error: Exception) -> bool:
    """Log the error of a check, which may be the device's and not the model's; return False. Raise a lack of memory."""
    if is_out_of_memory(error):
        raise error
    reason = (str(error).splitlines() or [""])[0]
    log.warning("%s are not used, for their check failed: %s: %s", what, type(error).__name__, reason)
    return False


@torch.inference_mode()
def called_layers(model: Any) -> set[nn.Module]:
    """Return the linear layers that a model on the ``meta`` device calls.

    A forward pass that reads values cannot run there; then all linear layers are returned.
    """
    tokens = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    mask = torch.zeros(1, 1, 2, 2, dtype=model.dtype, device=model.device)  # a mask of this shape is used as it is
    called = set[nn.Module]()
    try:
        with _hooked(_linear_layers(model), lambda layer, *_: called.add(layer)):
            model(input_ids=tokens, attention_mask=mask, use_cache=False)
    except Exception:  # any error of the model's own code
        return _linear_layers(model)
    return called


def _trunk(depth: int) -> int:
    """Return how many tokens of a path precede its branch."""
    return min(_TRUNK, depth // 2)


@contextmanager
def short_windows(model: Any) -> Iterator[None]:
    """Shorten the model's attention windows within the block, so that a short path is longer than a window."""
    config = model.config.get_text_config()
    before = {name: getattr(config, name, None) for name in _WINDOWS}
    long = {name: width for name, width in before.items() if isinstance(width, int) and width > _WINDOW}
    try:
        for name in long:
            setattr(config, name, _WINDOW)
        yield
    finally:
        for name, width in long.items():
            setattr(config, name, width)


def _words(model: Any, tokenizer: Any) -> list[int]:
    """Return ordinary tokens, without added ones, which may represent an image or end a text."""
    count = min(len(tokenizer), model.get_input_embeddings().num_embeddings)
    return sorted({*range(count)} - set(tokenizer.added_tokens_decoder)) or [*range(count)]


def _depth(model: Any, longest: int) -> int:
    """Return the length of a path in tokens, longer than every window that ``short_windows`` does not shorten."""
    widths = [
        value
        for name, value in vars(model.config.get_text_config()).items()
        if ("window" in name or "chunk" in name)
        and not name.endswith("layers")
        and name not in _WINDOWS
        and type(value) is int
        and value < longest
    ]
    return _BRANCH + max([_TRUNK, *widths])


def _forward(model: Any, tokens: Tensor) -> Tensor:
    """Return the logits of one text: tokens (T,) -> (T, V). Raises UnsupportedModel."""
    kind = getattr(model.config, "model_type", type(model).__name__)
    try:
        found: Tensor = model(input_ids=tokens[None]).logits[0]
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UnsupportedModel(f"{kind!r} cannot compute a text of {len(tokens)} tokens: {reason}", CAUSAL) from error
    if len(found) != len(tokens) or not found.isfinite().all():
        raise UnsupportedModel(f"{kind!r} does not give one finite row of logits for each token of a text", CAUSAL)
    return found


def _eps(dtype: torch.dtype) -> float:
    """Return the precision a model computes in, at best that of float32: in float64, norms still use float32."""
    return max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)


def _linear_layers(model: nn.Module) -> set[nn.Module]:
    return set(filter(is_adaptable, model.modules()))


@contextmanager
def _hooked(modules: Iterable[nn.Module], hook: Callable[..., Tensor | None]) -> Iterator[None]:
    """Call ``hook`` after the forward pass of modules within the block; a returned tensor replaces their output."""
    with ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_hook(hook))
        yield


def _rounded(_: nn.Module, __: Any, out: Tensor) -> Tensor:
    """Change embeddings by plus or minus half a unit in the last place."""
    signs = torch.randint(2, out.shape, generator=torch.Generator().manual_seed(0)).to(out) * 2 - 1
    return out + out * signs * (_eps(out.dtype) / 2)


def _row_changed(_: nn.Module, __: Any, out: Tensor) -> Tensor:
    """Change the output of a linear layer for row 0 of two."""
    rows = out.reshape(2, -1, out.shape[-1]).clone()
    rows[0] += 1 + rows[0].abs()
    return rows.reshape(out.shape)


def _apart(found: Tensor, expected: Tensor) -> Tensor:
    """Return the differences of logits (n, V) at each place, (n,), relative to the spread of the expected logits."""
    expected, found = expected.cpu().double(), found.cpu().double()  # some devices have no float64
    spread = (expected - expected.mean(-1, keepdim=True)).norm(dim=-1)
    return (found - expected).norm(dim=-1) / spread.clamp(min=torch.finfo(torch.float32).tiny)


def _middle(found: Tensor, expected: Tensor) -> float:
    """Return the larger of the median differences at the start and the end of the branch.

    Medians, because expert routing can flip at single tokens.
    """
    apart = _apart(found, expected)
    return max(float(apart[:_ENDS].median()), float(apart[-_ENDS:].median()))
