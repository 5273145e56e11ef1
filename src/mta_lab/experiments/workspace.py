"""The folder of an experiment at work: its people, their banks, and the batches of people tested on them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

from mta.bank.anchors import CHOICE
from mta.bank.bank import Bank
from mta.bank.build import build_bank
from mta.bank.context import Build
from mta.bank.format import TASK_LORA
from mta.config import Run, override
from mta.config.loader import dump_yaml
from mta.data.history import Item, Person
from mta.data.readers import read_people
from mta.data.shots_and_queries import has_enough_items, shots_and_queries
from mta.data.splits import PARTS, Splits
from mta.data.tasks.load import load_task
from mta.data.tasks.task import Task
from mta.distributed.executor import Executor, LocalExecutor
from mta.errors import InputError
from mta.evaluation.context import Context
from mta.evaluation.methods import Method
from mta.evaluation.protocol import TestBatch, check_lengths
from mta.model.base import BaseModel
from mta.model.encoders import load_encoder
from mta.system.assets import ASSETS
from mta.system.atomic import json_sha256, write_json, write_text
from mta.system.progress import OnStep
from mta_lab.behind import behind_bank, behind_task_lora, in_bank, run_on_everything
from mta_lab.bm25 import with_profiles
from mta_lab.experiments.evidence import kept_evidence
from mta_lab.experiments.people import draw_splits, with_tested
from mta_lab.experiments.recipe import MAIN_BANK, Experiment, Part, Which, bank_name, difference, record_names
from mta_lab.experiments.results import RECIPE, SIZES, Where, read_beside, read_recipe
from mta_lab.methods.prompts import profiled

BATCH = 16  # people at most; their results are written together
MAIN = Part(methods=())  # the bank that the recipe describes


def batches(people: int) -> list[range]:
    """Return the numbers of people in batches of nearly equal sizes: no method gets a single person out of many."""
    count = -(-people // BATCH)
    return [range(people * n // count, people * (n + 1) // count) for n in range(count)]


def _name_of(source: str) -> str:
    """Return the name of a data set: its file or folder. LaMP's files have the same names in every folder."""
    if source in ASSETS:
        return source
    path = Path(source).resolve()
    return path.parent.name if path.name.endswith("_questions.json") else path.name


@dataclass(slots=True)
class Workspace:
    """One experiment in its folder ``out``. Banks, contexts, and the last test batch are kept in memory.

    ``which`` says who of the ``people`` is tested; ``sizes`` is the table of sizes.json.
    """

    recipe: Experiment
    out: Path
    which: Which
    task: Task
    people: Sequence[Person]
    splits: Splits
    sizes: dict[str, Any]
    base: BaseModel
    say: Callable[[str], None]
    executor: Executor
    on_step: OnStep | None
    _names: dict[tuple[str, str], tuple[str, str]] = field(init=False, repr=False)
    _ids: Counter[str | None] = field(init=False, repr=False)
    _banks: dict[str, Bank] = field(default_factory=dict, init=False, repr=False)
    _contexts: dict[tuple[str, tuple[str, ...]], Context] = field(default_factory=dict, init=False, repr=False)
    _latest: tuple[object, TestBatch] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        tested = self.splits.select(self.which, self.people)
        self._ids = Counter(query.id for person in tested for query in person.queries)
        self._names = record_names(self.recipe)

    @classmethod
    def open(
        cls,
        recipe: Experiment,
        out: Path,
        data: str | None = None,
        which: Which = "test",
        *,
        test: str | None = None,
        read: Callable[[str, Task], Sequence[Person]] = read_people,
        read_tested: Callable[[str, Task], Sequence[Person]] | None = None,
        say: Callable[[str], None] = lambda _: None,
        executor: Executor | None = None,
        on_step: OnStep | None = None,
    ) -> Self:
        """Read the people of ``data`` (or of the recipe) with ``read``, draw the parts, and load the base.

        ``test`` names other data with the people to test, which ``read_tested`` reads if it is given; without it they
        are drawn from ``data``.
        Raises InputError without data.
        """
        source = data or recipe.data
        if source is None:
            raise InputError("this recipe brings no data", hint="Give --data with a LaMP file or folder.")
        task = load_task(recipe.run.task)
        people, tested = list(read(source, task)), list[Person]()
        if test:
            people, tested = with_tested(recipe, task, people, (read_tested or read)(test, task))
        elif recipe.needs_test:
            raise InputError("this recipe tests people of another file", hint="Give --test with that file.")
        splits, sizes = draw_splits(recipe, task, people, tested)
        named = {"data": source} | ({"tested": test} if test else {})
        sizes = {key: _name_of(name) for key, name in named.items()} | sizes
        base, executor = BaseModel.of(recipe.run), executor or LocalExecutor()
        every = [*people, *tested]
        sizes["digest"] = _digest(task, splits, every)
        return cls(recipe, out, which, task, every, splits, sizes, base, say, executor, on_step)

    @property
    def folder(self) -> Path:
        """Folder of the results; results of development people have a folder of their own."""
        return self.out if self.which == "test" else self.out / self.which

    def check_folder(self) -> None:
        """Raise InputError if the folder holds the results of another recipe, or of other people or items."""
        if not (self.out / RECIPE).exists():
            return
        again = f"Give another folder with --out, or repeat its own recipe:  mta-lab evaluate {self.out / RECIPE}"
        if other := difference(read_recipe(self.out), self.recipe):
            key, earlier, expected = other
            raise InputError(
                f"{self.out} holds results of another recipe: {key} is {repr(earlier)[:80]}, "
                f"expected {repr(expected)[:80]}",
                hint=again,
            )
        digest = read_beside(self.out / SIZES).get("digest")
        if digest != self.sizes["digest"]:
            raise InputError(
                f"{self.out} holds results of other people, items, or another task: their digest is {digest}, "
                f"expected {self.sizes['digest']}",
                hint="Give another folder with --out, or --data as before.",
            )

    def write_recipe(self) -> None:
        """Write recipe and sizes into the experiment's folder."""
        write_json(self.out / SIZES, self.sizes)
        write_text(self.out / RECIPE, dump_yaml(self.recipe))

    @property
    def opener(self) -> Callable[[], Workspace]:
        """What opens this workspace in another process, over the same folder (on a shared disk)."""
        recipe = self.recipe.model_copy(update={"run": self.base.as_loaded(self.recipe.run)})
        read = ("which", "task", "people", "splits", "sizes")
        return partial(_open_remote, recipe, out=self.out.resolve(), **{name: getattr(self, name) for name in read})

    # -- people --------------------------------------------------------------------------------------------------------

    def tested(self, part: Part, shots: int) -> list[Person]:
        """Return the tested people with enough items, in the order of the splits; empty if they are too few."""
        return self._able(shots)[: part.people or self.recipe.compared]

    def _able(self, shots: int) -> list[Person]:
        """Return all people who could be tested; empty if they are too few."""
        recipe, chosen = self.recipe, self.splits.select(self.which, self.people)
        able = [p for p in chosen if has_enough_items(self.task, p, shots, recipe.queries, recipe.ask)]
        return able if len(able) >= min(recipe.few, len(chosen)) else []

    def check_lengths(self, shots: Collection[int]) -> None:
        """Raise DataError for an item of a tested person that is too long, before anything is trained."""
        protocol = partial(shots_and_queries, self.task, queries=self.recipe.queries, ask=self.recipe.ask)
        asked = ((p.id, *protocol(p, shots=count)) for count in sorted(set(shots)) for p in self._able(count))
        check_lengths(self.base, self.task, asked)

    def hashed(self, id: str) -> str:
        """Return the name of a person or group in the records: a hash that only the whole data can resolve."""
        return hashlib.sha256(f"{self.splits.digest}/{id}".encode()).hexdigest()[:12]

    def question_id(self, person: Person, item: Item, number: int) -> str:
        """Return the id of a question in LaMP's files: the benchmark's own, or the person's hash and a number.

        In Per-Pcs's files, questions of several people may have the same id.
        """
        own = item.id if item.is_query and item.id is not None else None
        return own if own and self._ids[own] == 1 else f"{self.hashed(person.id)}-{own or number}"

    def _shown(self, part: Part, people: Sequence[Person]) -> list[Person]:
        """Return people with the retrieved items that the part's prompts show."""
        return [with_profiles(self.task, person, part.retrieve) for person in people] if part.retrieve else [*people]

    # -- banks ---------------------------------------------------------------------------------------------------------

    def _run_of(self, part: Part, seed: int, *, as_trained: bool = False) -> Run:
        """Return the recipe's settings with the changes of the part, or only with those that train its bank."""
        words = part.bank_settings[0] if as_trained else part.words
        run = override(self.recipe.run, [*words, f"seed={seed}"])
        if part.pool == "task":
            return run
        parts = behind_task_lora(self.bank(MAIN, seed), *self._task_people_and_candidates, seed)
        items = (sum(len(person.items) for person in people) for people in parts)
        return run_on_everything(run, part.pool, self.bank(MAIN, seed), self._folder(MAIN, seed), *items)

    def _folder(self, part: Part, seed: int) -> Path:
        return self.out / "banks" / bank_name(part.bank, seed)

    @property
    def _task_people_and_candidates(self) -> tuple[list[Person], list[Person]]:
        """The task people and the candidates."""
        return self.splits.select("task", self.people), self.splits.select("candidates", self.people)

    def _pool(self, part: Part, seed: int) -> tuple[list[Person], list[Person]]:
        """Return the people that train a bank's task LoRA, and those held out from it (none: chosen by hash)."""
        if part.pool == "task":
            return self._shown(part, self._task_people_and_candidates[0]), []
        pool, held_out = behind_bank(self.bank(MAIN, seed), *self._task_people_and_candidates, seed)
        return self._shown(part, pool), self._shown(part, held_out)

    def has_opened(self, part: Part, seed: int) -> bool:
        """Return whether the part's bank for a seed was used so far."""
        return bank_name(part.bank, seed) in self._banks

    def bank(self, part: Part, seed: int) -> Bank:
        """Return the part's bank for a seed, which clustering and training start from. Build it once in ``banks/``."""
        name = bank_name(part.bank, seed)
        if name not in self._banks:
            run, (pool, held_out) = self._run_of(part, seed, as_trained=True), self._pool(part, seed)
            self.say(f"bank {name}")
            folder = self._folder(part, seed)
            build_bank(
                Build(
                    self.base,
                    self.task,
                    load_encoder(run.encoder, self.base),
                    pool,
                    self._shown(part, self.splits.select("candidates", self.people)),
                    run,
                    folder,
                    held_out=held_out,
                    task_lora=self._shared_task_lora(part, run),
                    executor=self.executor,
                    on_step=self.on_step,
                )
            )
            self._banks[name] = Bank.open(folder, self.base)
        return self._banks[name]

    def _shared_task_lora(self, part: Part, run: Run) -> Path | None:
        """Return the main bank's task LoRA if the part's bank would have the same. Builds that bank first."""
        if part.bank == MAIN_BANK or not run.task_lora.enabled:
            return None
        plain = self._run_of(MAIN, run.seed)
        same = not part.retrieve and part.pool == "task" and run.model_copy(update={"bank": plain.bank}) == plain
        if run.task_lora.kept_back is not None:  # then the choice of anchors matters to the task LoRA
            same &= all(getattr(run.bank, name) == getattr(plain.bank, name) for name in CHOICE)
        return self.bank(MAIN, run.seed).folder / TASK_LORA if same else None

    def _context(self, part: Part, seed: int) -> Context:
        """Return the context of a part's test batches for a seed."""
        key = (bank_name(part.bank, seed), part.words)
        if key not in self._contexts:
            bank, run = self.bank(part, seed), self._run_of(part, seed)
            anchors = in_bank(bank, "anchor", self._task_people_and_candidates[1])
            self._contexts[key] = Context(
                self.base,
                bank,
                bank.encoder(self.base, run.encoder),
                run,
                anchors=self._shown(part, anchors) if len(anchors) == len(bank) else (),  # none of groups
                task_people=self.splits.select("task", self.people),
                on_step=self.on_step,
                evidence_of=partial(kept_evidence, self.out / "work"),
            )
        return self._contexts[key]

    # -- test batches --------------------------------------------------------------------------------------------------

    def batches_of(self, part: Part, seed: int, shots: int) -> Iterator[TestBatch]:
        """Yield the tested people in batches, always the same people together."""
        for batch in batches(len(self.tested(part, shots))):
            yield self.batch_of(part, seed, shots, batch)

    def batch_of(self, part: Part, seed: int, shots: int, batch: range) -> TestBatch:
        """Return the tested people with these numbers. The last test batch is cached."""
        key = (part, seed, shots, batch)
        if self._latest is None or self._latest[0] != key:
            tested = self.tested(part, shots)
            test_batch = TestBatch.of(
                self._context(part, seed),
                tested[batch.start : batch.stop],
                shots=shots,
                queries=self.recipe.queries,
                ask=self.recipe.ask,
                write_texts=part.texts,
                tested=self._able(shots),
            )
            if part.retrieve:
                test_batch = profiled(replace(test_batch, retrieve=part.retrieve), part.retrieve)
            self._latest = key, test_batch
        return self._latest[1]

    def where(self, part: Part, method: Method, seed: int, shots: int) -> Where:
        """Return what the records of a method are about, apart from the person."""
        kind, name = self._names[part.bank, method.digest]
        return Where(kind, name, part.bank, shots, seed if method.uses_bank or method.seeded else 0)


def _digest(task: Task, splits: Splits, people: Sequence[Person]) -> str:
    """Return a hash of the task and of the items of everybody in the experiment."""
    chosen = [person for part in PARTS for person in splits.select(part, people)]
    items = [replace(person, items=(*person.items, *person.queries)).digest() for person in chosen]
    return json_sha256([task.identity, *items])[:16]


def _open_remote(recipe: Experiment, **read: Any) -> Workspace:
    """Open a workspace with the people that another process read."""
    base = BaseModel.of(recipe.run)
    return Workspace(recipe, base=base, say=lambda _: None, executor=LocalExecutor(), on_step=None, **read)
