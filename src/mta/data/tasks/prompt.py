"""Convert an item of a task to tokens: chat template, target, and truncation."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mta.data.history import PROFILE, Item
from mta.errors import DataError

if TYPE_CHECKING:
    from mta.data.tasks.task import Task

PLAIN = "{prompt}\nAnswer: "  # for tokenizers without a chat template
DATE = "26 Jul 2024"  # of templates that ask for today's; Llama 3.2's says this one without a clock
ANSWER_TOKENS = 128  # default answer length of tasks without ``answer_tokens`` and labels; 280 characters fit
_ANSWER = "§answer§"
_ANSWERED = ({"role": "user", "content": "a"}, {"role": "assistant", "content": _ANSWER})


@dataclass(frozen=True, slots=True)
class Example:
    """Tokens of a prompt and its target, ``tokens[target_start:]``. ``cut`` counts the tokens that were cut off."""

    tokens: tuple[int, ...]
    target_start: int
    cut: int = 0

    @property
    def prompt(self) -> tuple[int, ...]:
        """The tokens before the answer."""
        return self.tokens[: self.target_start]

    @property
    def target(self) -> tuple[int, ...]:
        """The tokens of the answer, its end token included."""
        return self.tokens[self.target_start :]


class PromptFormat:
    """Formats prompts and answers for one tokenizer.

    ``max_tokens`` bounds prompt and target together. Of a text in front of a prompt, the oldest items are left out
    first. Then fields in the task's ``cut`` are shortened, from their end, the longest first; instruction and target
    are never changed.
    A special token in a person's text (``<|im_end|>``), or another added token that the chat template writes, is broken
    by a space, so that text cannot end a turn and continue in another role.
    """

    def __init__(self, tokenizer: Any, max_tokens: int = 1024) -> None:
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.has_template = bool(getattr(tokenizer, "chat_template", None))
        self._template = _without_clock(tokenizer) if self.has_template else None
        self._added = _added_after(tokenizer)
        tokens = {id: str(token) for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.end_token, special = self._end_token(tokens), set(tokens.values()) | self._roles()
        self._opening, self._space = self._before_answer()
        self._special = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")

    def example(self, task: Task, item: Item, target: str | None = None) -> Example:
        """Return an item as a training example; ``target`` replaces the item's own (for a label to be scored).

        Raises DataError if instruction and target alone exceed ``max_tokens``.
        """
        return self.examples(task, item, [task.target(item) if target is None else target])[0]

    def all(self, task: Task, items: Iterable[Item], targets: Sequence[str] = ()) -> list[list[Example]]:
        """Return ``examples`` of every item, by default with its own target. Equal items are tokenized once."""
        keys = [(_content(item), item) for item in items]
        known = {key: self.examples(task, item, targets or [task.target(item)]) for key, item in dict(keys).items()}
        return [known[key] for key, _ in keys]

    def examples(self, task: Task, item: Item, targets: Sequence[str]) -> list[Example]:
        """Return one prompt with several targets (the labels of a query), cut to the same length for all targets."""
        text, cut = self.render(task.prompt(item)), 0
        tokens = self._tokens(text)
        ends = [self._target(text, tokens, target) for target in targets]
        limit = self.max_tokens - max(map(len, ends))
        if len(tokens) > limit:
            text, tokens, cut = self._fit(task, item, limit)
            ends = [self._target(text, tokens, target) for target in targets]
        return [Example(tokens + end, len(tokens), cut) for end in ends]

    def check(self, task: Task, items: Iterable[tuple[str, Item]], reserve: int | None = None) -> None:
        """Raise DataError with its place for the first item that is wrong for the task, or too long even if it is cut.

        With ``reserve``, the items are questions, and so many tokens stay free for the answer.
        """
        fine = set[object]()
        for place, item in items:
            if (key := _content(item)) in fine:
                continue
            fine.add(key)
            if wrong := task.wrong(item):
                raise DataError(f"{place}: field {wrong[0]!r}: {wrong[1]}", hint="Correct the item, or leave it out.")
            form = task.form(item)
            kept = sum(len(text.encode()) for name, text in item.fields.items() if name not in (*form.cut, PROFILE))
            if kept + len(form.prompt.encode()) < (self.max_tokens - (reserve or 0)) // 2:  # a token is a byte or more
                continue
            try:
                self.example(task, item) if reserve is None else self.prompt(task, item, reserve)
            except DataError as error:
                raise DataError(f"{place}: {error.message}", hint=error.hint) from None

    def prompt(self, task: Task, item: Item, reserve: int = 0) -> Example:
        """Return a prompt without a target; ``reserve`` tokens stay free for the generated answer."""
        _, tokens, cut = self._fit(task, item, self.max_tokens - reserve)
        return Example(tokens, len(tokens), cut)

    def answer_tokens(self, task: Task) -> int:
        """Return the length limit of an answer in tokens, including the end token.

        That is the task's ``answer_tokens``, else its longest label, else ANSWER_TOKENS; at most half of
        ``max_tokens``, so that prompts fit.
        """
        if task.answer_tokens is None and task.labels is not None:
            texts = [self._space + self._as_text(label) for label in task.labels]
            labels = [self.tokenizer(text, add_special_tokens=False) for text in texts]
            longest = max(len(label["input_ids"]) for label in labels) + 1
        else:
            longest = task.answer_tokens or ANSWER_TOKENS
        return min(longest, max(self.max_tokens // 2, 1))

    def render(self, prompt: str) -> str:
        """Return the model input for an instruction: the chat template, or PLAIN without a template."""
        return self._conversation([{"role": "user", "content": prompt}])

    def chat(self, turns: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """Return the tokens of a conversation up to the start of the next answer; nothing is cut.

        Without a chat template the last turn is the instruction, and the earlier turns precede it.
        """
        return self._tokens(self._conversation(turns))

    def answered(self, prompt: str, answers: Sequence[str]) -> list[Example]:
        """Return a ready-made instruction with several answers; nothing is cut."""
        text = self.render(prompt)
        tokens = self._tokens(text)
        return [Example(tokens + self._target(text, tokens, answer), len(tokens)) for answer in answers]

    def text(self, text: str) -> tuple[int, ...]:
        """Return the tokens of a text to be continued, without a template."""
        return self._without_end(self.tokenizer(self._as_text(text))["input_ids"])

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of an answer, without its end token."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()

    def _conversation(self, turns: Sequence[Mapping[str, str]]) -> str:
        messages = [{**turn, "content": self._as_text(turn["content"])} for turn in turns]
        if not self.has_template:
            return PLAIN.format(prompt="\n".join(turn["content"] for turn in messages))
        return self._templated(messages, add_generation_prompt=True) + self._opening

    def _templated(self, turns: Sequence[Mapping[str, str]], add_generation_prompt: bool = False) -> str:
        from jinja2 import TemplateError

        how = {"tokenize": False, "add_generation_prompt": add_generation_prompt, "chat_template": self._template}
        how["enable_thinking"] = False  # of templates that know it: an answer comes at once
        try:
            return str(self.tokenizer.apply_chat_template(list(turns), **how))
        except TemplateError as error:
            raise DataError(
                f"the base's chat template rejects these messages: {str(error).splitlines()[0]}",
                hint="Give other messages, or a base with another template (chat_template.jinja).",
            ) from None

    def _as_text(self, text: str) -> str:
        while self._special.search(text):
            text = self._special.sub(lambda match: self._broken(match[0]), text)
        return text

    def _broken(self, token: str) -> str:
        """Return a special token with a space after its first visible character, or "" if it would stay special."""
        parts = re.sub(r"(?<=\S)(?=\S)", " ", token, count=1)
        return "" if self._special.search(parts) else parts

    def _tokens(self, text: str) -> tuple[int, ...]:
        if self.has_template:  # which adds its own first token
            return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return self._without_end(self.tokenizer(text)["input_ids"])

    def _without_end(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """Return a text's tokens without those that the tokenizer appends: the answer follows."""
        return tuple(tokens[: len(tokens) - self._added])

    def _target(self, text: str, prompt: tuple[int, ...], target: str) -> tuple[int, ...]:
        """Return the target's tokens, cut from those of the whole text if these begin with ``prompt``."""
        target = self._space + self._as_text(target)
        whole = self._tokens(text + target)
        if whole[: len(prompt)] == prompt:
            return (*whole[len(prompt) :], self.end_token)
        return (*self.tokenizer(target, add_special_tokens=False)["input_ids"], self.end_token)

    def _fit(self, task: Task, item: Item, limit: int) -> tuple[str, tuple[int, ...], int]:
        fields, cut = dict(item.fields), 0
        while True:
            text = self.render(task.prompt(Item(fields, is_query=item.is_query)))
            tokens = self._tokens(text)
            excess = len(tokens) - limit
            if excess <= 0:
                return text, tokens, cut
            if fields.get(PROFILE):
                fields[PROFILE], removed = self._without_oldest(fields[PROFILE])
                cut += removed
                continue
            name = max(task.form(item).cut, key=lambda field: len(fields[field]), default=None)
            if name is None or not fields[name]:
                raise DataError(
                    f"task {task.name!r}: instruction and target take {len(tokens) + self.max_tokens - limit} tokens, "
                    f"max_tokens is {self.max_tokens}",
                    hint="Raise max_tokens, leave the item out, or list a long input under 'cut' in the task's YAML.",
                )
            fields[name], removed = self._shorten(fields[name], excess)
            cut += removed

    def _without_oldest(self, text: str) -> tuple[str, int]:
        """Return a text of items without the first one, or "" without another one; and the tokens that were cut."""
        head, colon, items = text.partition(": ")
        _, more, rest = items.partition("; ")
        kept = head + colon + rest if more else ""
        count = [len(self.tokenizer(one, add_special_tokens=False)["input_ids"]) for one in (text, kept)]
        return kept, max(count[0] - count[1], 1)

    def _shorten(self, text: str, excess: int) -> tuple[str, int]:
        """Return the text without its last ``excess`` tokens (at least one character less), and how many were cut.

        Special tokens in the text are broken, as in the prompt: they take more tokens there.
        """
        text = self._as_text(text)
        offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        keep = max(len(offsets) - excess, 0)
        end = offsets[keep][0] if keep < len(offsets) else len(text) - 1
        kept = text[:end].rstrip()
        return kept, sum(start >= len(kept) for start, _ in offsets)

    def _before_answer(self) -> tuple[str, str]:
        """Return what the template has between the prompt of an answer and the answer: text, or else white space.

        Text belongs to the prompt. A space (of Llama 2) begins the answer: it is a part of many tokenizers' words.
        """
        if self.has_template:
            prompt, whole = self._templated(_ANSWERED[:1], add_generation_prompt=True), self._templated(_ANSWERED)
            if whole.startswith(prompt) and _ANSWER in whole:
                between = whole[len(prompt) :].partition(_ANSWER)[0]
                return ("", between) if between.isspace() else (between, "")
        return "", ""

    def _roles(self) -> set[str]:
        """Return the added tokens that the chat template writes: some tokenizers do not mark those as special."""
        if not self.has_template:
            return set()
        written = str(self.tokenizer.chat_template) + self._templated(_ANSWERED)
        added = map(str, self.tokenizer.added_tokens_decoder.values())
        return {text for text in added if text.strip() and text in written}

    def _end_token(self, special: Collection[int]) -> int:
        """Return the token that ends an answer: the template's ``special`` one after it, else the tokenizer's."""
        if self.has_template:
            text = self._templated(_ANSWERED)
            after = self.tokenizer(text.rpartition(_ANSWER)[2].lstrip(), add_special_tokens=False)["input_ids"]
            if after and after[0] in special:
                return int(after[0])
        if self.tokenizer.eos_token_id is None:
            raise DataError(
                "the tokenizer has no end token, so answers could not end",
                hint="Give the tokenizer a chat template or an eos_token (tokenizer_config.json).",
            )
        return int(self.tokenizer.eos_token_id)


def _content(item: Item) -> object:
    """Return what decides an item's prompt and target."""
    return frozenset(item.fields.items()), item.is_query


def _added_after(tokenizer: Any) -> int:
    """Return how many special tokens the tokenizer appends to a text, such as an end token."""
    plain, whole = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
    ends = range(len(whole), len(plain) - 1, -1)
    return next((len(whole) - end for end in ends if whole[end - len(plain) : end] == plain), 0)


def _without_clock(tokenizer: Any) -> str:
    """Return the chat template with a fixed date, if it asks for today's: prompts of every day must be equal."""
    template = str(tokenizer.get_chat_template())
    fixed = "{%- macro strftime_now(format) -%}" + DATE + "{%- endmacro -%}"
    return fixed + template if "strftime_now" in template else template
