"""Load-time check: rows as they are computed against the model's own forward on one example.

Packed rows are right only if a model keeps to the masks and positions it is given. Convolutions, recurrent states, and
windows counted along the row do not keep to them. So ``Reference`` computes one path of tokens alone, before anything
is changed on the model, and ``agrees`` computes the same path among other tokens.

    row 0   another example                 padding
    row 1   trunk, another branch, branch   padding          packed; the path is trunk and branch
    row 1   trunk, branch                   padding          one example for each row

1. The logits of the path are those of the path alone, up to rounding. How much rounding matters is measured: by how
   much the logits change when the embeddings change by half a unit in the last place.
2. The logits of the path stay when all other tokens change, and when the linear layers give row 0 another output, as
   adapters do. In low precision not one bit may change: a small leak is as small as rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from mta.errors import UnsupportedModel
from mta.model.adaptable import is_linear, text_config

CAUSAL = "Give a base that reads text from left to right, such as Llama, Mistral, Qwen, Gemma or GPT-2."  # a hint
_TRUNK, _BRANCH, _PADDING = 8, 24, 4  # tokens; a branch is longer than the kernels of convolutions
_ENDS = 8  # so many tokens at either end of the branch are compared
_ROUGH = 4.0  # times the effect of rounding: what differences of order of summation stay below
_MOST = 0.5  # of a difference that may still be rounding
_WINDOW = 8  # tokens that the windows of attention are shortened to meanwhile
_WINDOWS = ("sliding_window", "attention_chunk_size")  # which transformers reads at each forward pass


@dataclass(frozen=True, slots=True)
class Reference:
    """A path of tokens (T,), its logits alone at ``places`` (n, V), and the effect of rounding on them.

    ``called`` are the names of the linear layers that the model calls; of others it reads the weights at most.
    """

    tokens: Tensor
    others: Tensor
    places: Tensor
    logits: Tensor
    rounding: float
    called: frozenset[str]

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
        with _called(model) as called:
            alone = _forward(model, path)[places]
        with _rounded(model.get_input_embeddings()):
            again = _forward(model, path)[places]
        rounding = max(_middle(again, alone), _eps(alone.dtype))
        return cls(path, drawn[depth:], torch.tensor(places), alone, rounding, frozenset(called))

    @torch.inference_mode()
    def agrees(self, model: nn.Module, logits: Callable[..., Tensor], packed: bool) -> bool:
        """Whether ``logits`` of rows are right on this model; where they raise an error they are not."""
        tokens, ends, positions, mine = (part.to(self.tokens.device) for part in self._rows(packed))
        where = tokens.shape[1] + mine[self.places.to(mine)]
        others = self.others[2 * tokens.shape[1] :][: tokens.numel()].view_as(tokens).clone()
        others[1, mine] = self.tokens
        try:
            found = logits(tokens, ends, positions, where)
            with _row_changed(model):
                again = logits(others, ends, positions, where)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # whatever a model's own code raises: it does not take such rows
            return False
        leak = float(_apart(again, found).max())
        return leak <= (self._slack if found.dtype.itemsize >= 4 else 0) and _middle(found, self.logits) <= self._slack

    @torch.inference_mode()
    def continues(self, go_on: Callable[[list[list[int]]], Tensor]) -> bool:
        """Whether two rows that ``go_on`` by some tokens each time, the second along the path, get its logits."""
        path, other = self.tokens.tolist(), self.others.tolist()
        last = min(_ENDS, len(path) - _trunk(len(path)))
        first = len(path) - last + 1
        cuts = [0, first // 2, *range(first, len(path) + 1)]
        try:
            found = [go_on([[other.pop()], path[start:stop]]) for start, stop in pairwise(cuts) if stop > start]
        except torch.OutOfMemoryError:
            raise
        except Exception:  # as above
            return False
        ends = torch.stack([logits[1] for logits in found[-last:]])
        return _middle(ends, self.logits[-last:]) <= self._slack

    @property
    def _slack(self) -> float:
        return min(_ROUGH * self.rounding, _MOST)

    def _rows(self, packed: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens, ends and positions (2, T) of both rows, and the places of the path in row 1."""
        depth = len(self.tokens)
        trunk = _trunk(depth)
        other = min(_BRANCH, depth - trunk) if packed else 0
        used, width = depth + other, depth + other + _PADDING
        mine = torch.tensor([*range(trunk), *range(trunk + other, used)])
        tokens = self.others[: 2 * width].view(2, width).clone()
        tokens[1, mine] = self.tokens
        length = depth + _PADDING  # of row 0: as long as the model takes
        ends = [used] * trunk + [trunk + other] * other + [used] * (depth - trunk) + [*range(used + 1, width + 1)]
        alone = [length] * length + [*range(length + 1, width + 1)]
        depths = [*range(trunk), *range(trunk, trunk + other), *range(trunk, depth)] + [0] * _PADDING
        along = [*range(length)] + [0] * (width - length)
        return tokens, torch.tensor([alone, ends]), torch.tensor([along, depths]), mine


@torch.inference_mode()
def called_layers(model: Any) -> frozenset[str]:
    """Return the names of the linear layers that a model on the ``meta`` device calls.

    A forward pass that reads values cannot run there: then the names of all linear layers are returned.
    """
    tokens = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    mask = torch.zeros(1, 1, 2, 2, dtype=model.dtype, device=model.device)  # of this shape, it is taken as it is
    with _called(model) as called:
        try:
            model(input_ids=tokens, attention_mask=mask, use_cache=False)
        except Exception:  # whatever a model's own code raises
            called.update(name for name, module in model.named_modules() if is_linear(module))
    return frozenset(called)


def _trunk(depth: int) -> int:
    """How many of the tokens of a path lie before its branch."""
    return min(_TRUNK, depth // 2)


@contextmanager
def short_windows(model: Any) -> Iterator[None]:
    """Within the block the model attends over short windows, so that a short path is longer than they are."""
    config = text_config(model)
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
    """Ordinary tokens: what is added to a vocabulary may stand for an image, or end a text."""
    count = min(len(tokenizer), model.get_input_embeddings().num_embeddings)
    return sorted({*range(count)} - set(tokenizer.added_tokens_decoder)) or [*range(count)]


def _depth(model: Any, longest: int) -> int:
    """Tokens of a path that is longer than every window which ``short_windows`` does not know."""
    widths = [
        value
        for name, value in vars(text_config(model)).items()
        if ("window" in name or "chunk" in name)
        and not name.endswith("layers")
        and name not in _WINDOWS
        and type(value) is int
        and value < longest
    ]
    return max(_TRUNK + _BRANCH, *(width + _BRANCH for width in widths))


def _forward(model: Any, tokens: Tensor) -> Tensor:
    """(T,) -> (T, V). Raises UnsupportedModel."""
    kind = getattr(model.config, "model_type", type(model).__name__)
    try:
        found: Tensor = model(input_ids=tokens[None]).logits[0]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UnsupportedModel(f"{kind!r} does not compute a text of {len(tokens)} tokens: {reason}", CAUSAL) from error
    if len(found) != len(tokens) or not found.isfinite().all():
        raise UnsupportedModel(f"{kind!r} does not give one finite row of logits for each token of a text", CAUSAL)
    return found


def _eps(dtype: torch.dtype) -> float:
    """Of the type that a model computes in: in float64, norms still go through float32."""
    return max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)


@contextmanager
def _called(model: Any) -> Iterator[set[str]]:
    """The names of the linear layers that are called within the block."""
    names = set[str]()

    def watch(name: str, module: nn.Module) -> Any:
        return module.register_forward_hook(lambda *_: names.add(name))

    handles = [watch(name, module) for name, module in model.named_modules() if is_linear(module)]
    try:
        yield names
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _rounded(embeddings: nn.Module) -> Iterator[None]:
    """Within the block embeddings are half a unit in the last place larger or smaller."""

    def hook(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        signs = torch.randint(2, out.shape, generator=torch.Generator().manual_seed(0)).to(out) * 2 - 1
        return out + out * signs * (_eps(out.dtype) / 2)

    handle = embeddings.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _row_changed(model: Any) -> Iterator[None]:
    """Within the block all linear layers but the head give row 0 of two another output."""

    def hook(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        rows = out.reshape(2, -1, out.shape[-1]).clone()
        rows[0] += 1 + rows[0].abs()
        return rows.reshape(out.shape)

    head = model.get_output_embeddings()
    handles = [m.register_forward_hook(hook) for m in model.modules() if is_linear(m) and m is not head]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _apart(found: Tensor, expected: Tensor) -> Tensor:
    """(n, V) twice -> (n,): differences as shares of what distinguishes the logits of a place from each other."""
    expected = expected.double()
    spread = (expected - expected.mean(-1, keepdim=True)).norm(dim=-1)
    return (found.double() - expected).norm(dim=-1) / spread.clamp(min=torch.finfo(torch.float32).tiny)


def _middle(found: Tensor, expected: Tensor) -> float:
    """The median difference at the beginning or at the end of the branch, whichever is larger: routing can flip."""
    apart = _apart(found, expected)
    return max(float(apart[:_ENDS].median()), float(apart[-_ENDS:].median()))
