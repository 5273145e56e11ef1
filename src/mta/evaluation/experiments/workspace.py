"""An experiment at its place of work: who takes which part, and the banks that are trained for it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from mta.bank.bank import Bank
from mta.bank.format import INFO, TASK_LORA
from mta.config import Run, override
from mta.config.loader import dump_yaml
from mta.data.bm25 import with_profiles
from mta.data.history import Item, Person
from mta.data.readers import read_people
from mta.data.splits import Splits
from mta.data.tasks.load import load_task
from mta.data.tasks.task import Task
from mta.distributed.executor import Executor, LocalExecutor
from mta.errors import ConfigError, InputError
from mta.evaluation.experiments.recipe import Experiment, Part, Which, drawn
from mta.evaluation.methods import Method
from mta.evaluation.protocol import Panel, able
from mta.model.base import BaseModel
from mta.system.assets import is_asset, resolve
from mta.system.atomic import write_json, write_text
from mta.system.progress import OnStep

TOGETHER = 16  # people whose results are written at once
RECIPE, SIZES = "recipe.yaml", "sizes.json"


@dataclass(slots=True)
class Lab:
    """One experiment at work in its folder: who is who, and the banks that are open."""

    recipe: Experiment
    task: Task
    people: list[Person]
    splits: Splits
    base: BaseModel
    out: Path
    source: str
    sizes: dict[str, Any]
    which: Which = "test"
    on_step: OnStep | None = None
    say: Callable[[str], None] = lambda _: None
    executor: Executor = field(default_factory=LocalExecutor)
    banks: dict[str, Bank] = field(default_factory=dict)
    memos: dict[str, dict[str, Any]] = field(default_factory=dict)
    at_hand: tuple[Any, Panel] | None = None

    @classmethod
    def open(cls, recipe: Experiment, out: Path, data: str | None = None, which: Which = "test", **how: Any) -> Lab:
        """Read the people, draw who takes which part, and load the base.

        Raises InputError without data, ConfigError if ``out`` was begun with other people or sizes.
        """
        lab = cls.read(recipe, out, data, which, **how)
        path = out / "splits.json"
        if path.exists() and Splits.load(path, lab.people).digest != lab.splits.digest:
            raise ConfigError(
                f"{out} was begun with other sizes, or with people who share items in different parts",
                hint="Choose another folder with --out; or  people.together=false  splits as before.",
            )
        lab.splits.save(path)
        write_json(out / SIZES, lab.sizes)
        write_text(out / RECIPE, dump_yaml(recipe))
        return lab

    @classmethod
    def read(cls, recipe: Experiment, out: Path, data: str | None = None, which: Which = "test", **how: Any) -> Lab:
        """``open`` that writes nothing."""
        source = data or recipe.data
        if source is None:
            raise InputError("this recipe brings no data", hint="Give --data with a LaMP file or folder.")
        task = load_task(recipe.run.task)
        people = read_people(resolve(source), task)
        splits, sizes = drawn(recipe, task, people)
        sizes = {"data": source if is_asset(source) else Path(source).name, **sizes}
        return cls(recipe, task, people, splits, BaseModel.of(recipe.run), out, source, sizes, which, **how)

    def elsewhere(self) -> Callable[[], Lab]:
        """Return a function that opens the same lab in another process, over the same folder (on a shared disk)."""
        recipe = self.recipe.model_copy(update={"run": self.base.as_loaded(self.recipe.run)})
        data = self.source if is_asset(self.source) else str(Path(self.source).resolve())
        return partial(Lab.read, recipe, self.out.resolve(), data, self.which)

    def bank(self, part: Part, seed: int) -> Bank:
        """The part's bank for a seed: clustering and training start from it. Built once, kept in ``banks/``."""
        name = f"{part.bank}-{seed}"
        if name not in self.banks:
            run = self.run_of(part, seed)
            self.say(f"bank {name}")
            self.banks[name] = Bank.build(
                self.base,
                self.seen(part, "candidates"),
                self.out / "banks" / name,
                task=self.task_of(part),
                run=run,
                task_people=self.seen(part, "task"),
                task_lora=self._trained_before(part, run),
                executor=self.executor,
                on_step=self.on_step,
            )
        return self.banks[name]

    def _trained_before(self, part: Part, run: Run) -> Path | None:
        """The main bank's task LoRA, where the part changes nothing but how anchors are chosen and trained."""
        main = self.out / "banks" / f"main-{run.seed}"
        plain = override(self.recipe.run, [f"seed={run.seed}"])
        same = not part.retrieve and run.model_copy(update={"bank": plain.bank}) == plain
        there = part.bank != "main" and run.task_lora.enabled and (main / INFO).exists()
        return main / TASK_LORA if same and there else None

    def task_of(self, part: Part) -> Task:
        """The task, in the wording of the part's prompts."""
        return self.task.profiled() if part.retrieve else self.task

    def seen(self, part: Part, which: Literal["candidates", "task"]) -> list[Person]:
        """Those a bank is trained on, each item with what the part's prompts say of earlier ones."""
        people = self.splits.select(which, self.people)
        return [with_profiles(self.task, one, part.retrieve) for one in people] if part.retrieve else people

    @property
    def folder(self) -> Path:
        """Where results go: development people have a folder of their own."""
        return self.out if self.which == "test" else self.out / self.which

    def run_of(self, part: Part, seed: int) -> Run:
        """The recipe's settings, changed as the part says."""
        return override(self.recipe.run, [*part.words, f"seed={seed}"])

    def key(self, part: Part, method: Method, seed: int, shots: int) -> str:
        """Names all that decides a result but the person: method, protocol, base, and the bank where it counts."""
        run = self.run_of(part, seed)
        protocol = [shots, self.recipe.queries, self.recipe.ask, part.texts or bool(self.task.labels)]
        parts: list[Any] = [method.digest, *protocol]
        parts += [self.base.fingerprint, str(self.base.dtype), run.max_tokens]
        parts += [self.task_of(part).identity]
        parts += [self.base.prompts.answer_tokens(self.task)] if part.texts and self.task.labels is None else []
        parts += [part.retrieve] if part.retrieve else []
        if method.of_bank:
            stages = [run.merge.model_dump(mode="json"), run.stack.model_dump(mode="json")]
            parts += [self.bank(part, seed).hash, *stages]
        if method.of_bank or method.seeded:
            parts.append(seed)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def panels(self, part: Part, seed: int, shots: int) -> Iterator[Panel]:
        """The people who are tested, a few at a time, always the same ones together."""
        for start, _ in self.sittings(part, shots):
            yield self.panel(part, seed, shots, start)

    def sittings(self, part: Part, shots: int) -> Iterator[tuple[int, list[Person]]]:
        """The people who are tested, those of each panel with the number of the first."""
        tested = self.tested(part, shots)
        for start in range(0, len(tested), TOGETHER):
            yield start, tested[start : start + TOGETHER]

    def panel(self, part: Part, seed: int, shots: int, start: int) -> Panel:
        """Some of the people who are tested, from number ``start`` on; the last one asked for is kept at hand."""
        name = (part.bank, tuple(part.words), part.retrieve, part.people, part.texts, seed, shots, start)
        if self.at_hand is None or self.at_hand[0] != name:
            self.at_hand = name, self._panel(part, seed, shots, start)
        return self.at_hand[1]

    def _panel(self, part: Part, seed: int, shots: int, start: int) -> Panel:
        bank, recipe = self.bank(part, seed), self.recipe
        memo = self.memos.setdefault(bank.hash, {})
        if "encoder" not in memo:
            memo["encoder"] = bank.encoder(self.base, recipe.run.encoder)
            is_anchor = [p for p in self.seen(part, "candidates") if _is_anchor(bank, p)]
            memo["anchors"] = sorted(is_anchor, key=lambda person: person.id)  # the order of the bank
        return Panel.of(
            self.base,
            bank,
            memo["encoder"],
            self.run_of(part, seed),
            self.tested(part, shots)[start : start + TOGETHER],
            shots=shots,
            queries=recipe.queries,
            ask=recipe.ask,
            retrieve=part.retrieve,
            on_step=self.on_step,
            anchors=memo["anchors"],
            pool=self.splits.select("task", self.people),
            kept=self.out / "work",
            memo=memo,
            texts=part.texts,
        )

    def tested(self, part: Part, shots: int) -> list[Person]:
        """Who has enough items, in the order of the splits; nobody where they are too few to be compared."""
        everybody = self.splits.select(self.which, self.people)
        fit = [p for p in everybody if able(self.task, p, shots, self.recipe.queries, self.recipe.ask)]
        if len(fit) < min(self.recipe.few, len(everybody)):
            self.say(f"{shots} shots: only {len(fit)} people have enough items; left out")
            return []
        return fit[: part.people or self.recipe.compared]

    def person(self, id: str) -> str:
        """A person's name in the records: it tells nothing to whoever has not the whole data."""
        return hashlib.sha256(f"{self.splits.digest}/{id}".encode()).hexdigest()[:12]

    def question(self, person: Person, item: Item, number: int) -> str:
        """A question's id in LaMP's files: the benchmark's own, or one made of the person's name here."""
        return item.id if item.is_query and item.id is not None else f"{self.person(person.id)}-{number}"


def _is_anchor(bank: Bank, person: Person) -> bool:
    return "anchor" in bank.info.members.artefacts_of(person.id)
