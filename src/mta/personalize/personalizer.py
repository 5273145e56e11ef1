"""``Personalizer``: people's models, from their training to their answers; score, export, and forget."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mta.bank.bank import Bank
from mta.bank.card import adapter_card
from mta.config import parse_size
from mta.data.earlier import after
from mta.data.history import PROFILE, Item
from mta.data.tasks.prompt import Example
from mta.errors import ConfigError, InputError
from mta.lora.layers import Adapters, applied
from mta.lora.merge import truncate
from mta.lora.peft import CONFIG, WEIGHTS, has_own_card, write_peft
from mta.model.generate import generate
from mta.personalize.adapters import PersonOrModel, SharedModel, row_adapters, whole_adapter
from mta.personalize.forgetting import Forgotten, forget_person
from mta.personalize.pipeline import Pipeline
from mta.training.scoring import label_scores, log_likelihood

Question = str | Mapping[str, str]
log = logging.getLogger("mta")


class Personalizer(Pipeline):
    """Personalize people (``Pipeline``), answer with their models, export models, and forget people.

    >>> personal = Personalizer(base, bank, store="people/")
    >>> personal.personalize(people)                              # in cohorts
    >>> personal.generate([("ann", "..."), ("bob", "...")])       # one batch, two people
    """

    def generate(
        self,
        rows: Sequence[tuple[PersonOrModel, Question]],
        *,
        max_new_tokens: int | None = None,
        stacked: bool = True,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> list[str]:
        """Answer questions in one batch, each with a person's model, ``mta.TASK``, or ``mta.BASE``.

        If the bank's prompts show earlier items, a person's stored items are shown. A question can replace these items
        by a text in its field ``profile``. ``max_new_tokens`` defaults to the task's ``PromptFormat.answer_tokens``.
        ``stacked=False`` answers without the stacks. ``seed``, by default the run's, affects sampling.
        Raises PersonNotFound, StateCorrupt, OtherBank, DataError. Raises InputError for too many or too few new tokens,
        or a temperature below 0.
        """
        if temperature < 0:
            raise InputError(f"temperature is {temperature}; expected 0 or more", hint="Leave it out: 0 is greedy.")
        rows, task, longest = list(rows), self.bank.task, self.longest_answer(max_new_tokens)
        owners, adapters = self._adapters([who for who, _ in rows], stacked)
        prompts = [self.base.prompts.prompt(task, item, longest) for item in self._asked(rows)]
        _warn_of_cuts(prompts)
        tokens, seed = [prompt.tokens for prompt in prompts], self.run.seed if seed is None else seed
        answers = generate(
            self.base, tokens, owners, adapters, max_new_tokens=longest, temperature=temperature, seed=seed
        )
        return [self.base.prompts.decode(answer) for answer in answers]

    def earlier(self, person: str) -> tuple[Item, ...]:
        """Return the items that the bank's prompts show before a person's questions, or none if no items are stored.

        Raises StateCorrupt.
        """
        if not (most := self.bank.history):
            return ()
        kept = self.store.history(person) if self.store else None
        return kept.items[-most:] if kept else self._latest.get(person, ())

    def _asked(self, rows: Sequence[tuple[PersonOrModel, Question]]) -> list[Item]:
        """Return the questions as items, behind earlier items of their people. Raises DataError, StateCorrupt."""
        task, asked = self.bank.task, [(who, self.bank.task.asked(question)) for who, question in rows]
        people = {who for who, item in asked if isinstance(who, str) and PROFILE not in item.fields}
        earlier = {who: self.earlier(who) for who in people}
        warn_of_missing(self.bank, earlier)
        return [
            item if PROFILE in item.fields else after(task, item, earlier[who] if isinstance(who, str) else ())
            for who, item in asked
        ]

    def longest_answer(self, max_new_tokens: int | None = None) -> int:
        """Return the maximum number of tokens of an answer. Raises InputError for too many, or fewer than one."""
        most, usual = self.base.prompts.max_tokens, self.base.prompts.answer_tokens(self.bank.task)
        longest = usual if max_new_tokens is None else max_new_tokens
        if not 0 < longest < most:
            raise InputError(
                f"answers of {longest} tokens leave no room for a question in max_tokens={most}, or for an answer",
                hint="Change max_new_tokens, or raise max_tokens.",
            )
        return longest

    def score(self, rows: Sequence[tuple[PersonOrModel, Question, str]], *, stacked: bool = True) -> list[float]:
        """Return the log probability of each row's answer with its end token. Raises the errors of ``generate``."""
        rows = list(rows)
        owners, adapters = self._adapters([who for who, _, _ in rows], stacked)
        task = self.bank.task
        items = self._asked([(who, question) for who, question, _ in rows])
        jobs = [[self.base.prompts.example(task, item, answer)] for item, (_, _, answer) in zip(items, rows)]
        memory = parse_size(self.run.memory)
        scores = log_likelihood(self.base, jobs, adapters, owners=owners, memory=memory)
        return [float(row[0]) for row in scores]

    def label_scores(
        self, rows: Sequence[tuple[PersonOrModel, Sequence[Item]]], *, stacked: bool = True
    ) -> list[Tensor]:
        """Return the log probability of every label for each item of each row: tensors (items, labels).

        Raises ConfigError for a task without labels, and the errors of ``generate``.
        """
        rows, task = list(rows), self.bank.task
        if task.labels is None:
            raise ConfigError(f"task {task.name!r} has no labels to choose from", hint="Use generate for free text.")
        owners, adapters = self._adapters([who for who, _ in rows], stacked)
        memory, items = parse_size(self.run.memory), [items for _, items in rows]
        rated = label_scores(self.base, task, items, adapters, owners=owners, memory=memory, on_examples=_warn_of_cuts)
        return [scores.clone() for scores in rated]  # inference tensors could not be changed or trained through

    def shares(self, rows: Sequence[tuple[PersonOrModel, Question]], *, stacked: bool = True) -> list[dict[str, float]]:
        """Return the probability of every label for each row's question, the most likely label first.

        Raises ConfigError for a task without labels, and the errors of ``generate``.
        """
        rows, labels = list(rows), self.bank.task.labels or ()
        asked = [(who, [item]) for (who, _), item in zip(rows, self._asked(rows))]
        scores = self.label_scores(asked, stacked=stacked)
        shares = [dict(zip(labels, row[0].softmax(0).tolist())) for row in scores]
        return [dict(sorted(row.items(), key=lambda pair: -pair[1])) for row in shares]

    def applied(self, models: Sequence[PersonOrModel], *, stacked: bool = True) -> AbstractContextManager[None]:
        """Apply adapters in a ``with`` block: ``base.model`` computes row i of a batch with ``models[i]``."""
        owners, adapters = self._adapters(models, stacked)
        return applied(self.base.model, adapters, torch.tensor(owners))

    def export(self, person: str, out: str | Path, *, rank: int | None = None) -> float:
        """Write the task LoRA and a person's merge and stack as one PEFT folder for the unchanged base.

        Without ``rank``, the adapter is exact, and its rank is the sum of the parts' ranks. ``rank`` compresses with
        SVD. Returns the relative error of compression, 0 for an exact adapter. The store records the folder, so that
        ``forget`` removes the export. Raises PersonNotFound, PersonForgotten, StateCorrupt, OtherBank. Raises
        InputError for a rank below 1, or a folder with another adapter.
        """
        if rank is not None and rank < 1:
            raise InputError(f"rank is {rank}; expected 1 or more", hint="Leave the rank out for an exact adapter.")
        self._check_replaceable(person, Path(out))
        session = self.store.session(person) if self.store else None
        state = self.state(person)
        whole, error = whole_adapter(self.bank, state, self.base.master_dtype), torch.zeros(1)
        if rank is not None and rank < whole.rank:
            whole, error = truncate(whole, rank)
        stack, anchors = state.stack.rank if state.stack else 0, sum(map(bool, state.w))
        card = adapter_card(self.bank.info, whole.rank, float(error), anchors=anchors, stack=stack)
        transposed = self.base.fan_in_fan_out
        with session.exporting(person, out) if session else nullcontext() as written:
            write_peft(out, whole, self.base.place, fan_in_fan_out=transposed, card=card, on_weights=written)
        return float(error)

    def _check_replaceable(self, person: str, folder: Path) -> None:
        """Raise InputError if a folder holds an adapter that is no earlier export of this person."""
        if not any((folder / name).exists() for name in (CONFIG, WEIGHTS)):
            return
        if not (self.store.exports.written(person, folder) if self.store else has_own_card(folder)):
            raise InputError(f"{folder} holds another adapter", hint="Export to a new folder.")

    def forget(self, person: str, *, keep_exports: bool = False) -> Forgotten:
        """Remove a person's states, history, and exports; then mark banks trained on the person as needing a rebuild.

        ``keep_exports`` keeps the records of all remaining exports, so that an operator can delete the exports later.
        Can be repeated. Runs all steps, then raises StoreError if files of the person could not be removed.
        """
        removed = self._unsaved.pop(person, None) is not None
        self._latest.pop(person, None)
        forgotten = forget_person(person, self.store, self.bank.folder, keep_exports=keep_exports)
        for bank, reason in forgotten.unmarked.items():
            log.warning("a person was forgotten, but %s could not be marked as needing a rebuild: %s", bank, reason)
        return replace(forgotten, states_removed=removed or forgotten.states_removed)

    def _adapters(self, owners: Sequence[PersonOrModel], stacked: bool) -> tuple[list[int], list[Adapters]]:
        """Return, for a batch of rows, the number of each row's owner and the adapters of all owners."""
        known = list(dict.fromkeys(owners))
        states = [who if isinstance(who, SharedModel) else self.state(who) for who in known]
        place = {who: i for i, who in enumerate(known)}
        return [place[who] for who in owners], row_adapters(self.base, self.bank, states, stacked)


def warn_of_missing(bank: Bank, earlier: Mapping[str, Sequence[Item]]) -> None:
    """Warn if prompts of a bank show earlier items, and none are known of some people."""
    if bank.history and (unknown := sum(not items for items in earlier.values())):
        log.warning(
            "this bank's prompts show earlier items, and none are kept of %d of %d people: "
            "mta personalize --keep-histories keeps them",
            *(unknown, len(earlier)),
        )


def _warn_of_cuts(prompts: Sequence[Example]) -> None:
    """Warn of questions whose texts were shortened."""
    if shortened := sum(prompt.cut > 0 for prompt in prompts):
        log.warning("%d of %d questions were too long: the end of their text was cut off", shortened, len(prompts))
