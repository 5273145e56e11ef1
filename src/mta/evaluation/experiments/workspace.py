"""The folder of an experiment at work: the banks that are built for it, and the panels that are tested on them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

from mta.bank.bank import Bank
from mta.bank.format import INFO, TASK_LORA
from mta.config import Run, override
from mta.config.loader import dump_yaml
from mta.distributed.executor import Executor, LocalExecutor
from mta.evaluation.context import Context
from mta.evaluation.experiments.participants import Participants
from mta.evaluation.experiments.recipe import Experiment, Part, Which
from mta.evaluation.methods import Method
from mta.evaluation.protocol import Panel
from mta.model.base import BaseModel
from mta.system.assets import is_asset
from mta.system.atomic import write_json, write_text
from mta.system.progress import OnStep

BATCH = 16  # people whose results are written together
RECIPE, SIZES = "recipe.yaml", "sizes.json"


@dataclass(slots=True)
class Loaded:
    """Cache of a workspace: banks by name, contexts by bank and settings, and the last panel with its arguments."""

    banks: dict[str, Bank] = field(default_factory=dict)
    contexts: dict[tuple[str, tuple[str, ...]], Context] = field(default_factory=dict)
    panel: tuple[tuple[Part, int, int, int], Panel] | None = None


@dataclass(frozen=True, slots=True)
class Workspace:
    """One experiment in its folder ``out``."""

    participants: Participants
    base: BaseModel
    out: Path
    say: Callable[[str], None] = lambda _: None
    executor: Executor = field(default_factory=LocalExecutor)
    on_step: OnStep | None = None
    loaded: Loaded = field(default_factory=Loaded, init=False, repr=False)

    @classmethod
    def open(
        cls,
        recipe: Experiment,
        out: Path,
        data: str | None = None,
        which: Which = "test",
        *,
        say: Callable[[str], None] = lambda _: None,
        executor: Executor | None = None,
        on_step: OnStep | None = None,
    ) -> Self:
        """Read the people, draw the parts, load the base, and write the recipe, the sizes and the splits.

        Raises InputError without data, DataError if ``out`` holds an experiment with other people or sizes.
        """
        participants = Participants.read(recipe, data, which)
        workspace = cls(participants, BaseModel.of(recipe.run), out, say, executor or LocalExecutor(), on_step)
        participants.splits.save(out / "splits.json")
        write_json(out / SIZES, participants.sizes)
        write_text(out / RECIPE, dump_yaml(recipe))
        return workspace

    @property
    def recipe(self) -> Experiment:
        """The recipe of the experiment."""
        return self.participants.recipe

    @property
    def folder(self) -> Path:
        """Folder of the results; results of development people have a folder of their own."""
        which = self.participants.which
        return self.out if which == "test" else self.out / which

    def elsewhere(self) -> Callable[[], Workspace]:
        """Return a function that opens this workspace in another process, over the same folder (on a shared disk)."""
        recipe = self.recipe.model_copy(update={"run": self.base.as_loaded(self.recipe.run)})
        source = self.participants.source
        data = source if is_asset(source) else str(Path(source).resolve())
        return partial(_in_worker, recipe, self.out.resolve(), data, self.participants.which)

    # -- banks ---------------------------------------------------------------------------------------------------------

    def run_of(self, part: Part, seed: int) -> Run:
        """Return the recipe's settings with the changes of the part."""
        return override(self.recipe.run, [*part.words, f"seed={seed}"])

    def bank(self, part: Part, seed: int) -> Bank:
        """Return the part's bank for a seed, which clustering and training start from. Build it once in ``banks/``."""
        name, people = f"{part.bank}-{seed}", self.participants
        if name not in self.loaded.banks:
            run = self.run_of(part, seed)
            self.say(f"bank {name}")
            self.loaded.banks[name] = Bank.build(
                self.base,
                people.trained_on(part, "candidates"),
                self.out / "banks" / name,
                task=people.task_of(part),
                run=run,
                task_people=people.trained_on(part, "task"),
                task_lora=self._shared_task_lora(part, run),
                executor=self.executor,
                on_step=self.on_step,
            )
        return self.loaded.banks[name]

    def _shared_task_lora(self, part: Part, run: Run) -> Path | None:
        """Return the main bank's task LoRA if the part changes only how anchors are chosen and trained."""
        main = self.out / "banks" / f"main-{run.seed}"
        plain = override(self.recipe.run, [f"seed={run.seed}"])
        same = not part.retrieve and run.model_copy(update={"bank": plain.bank}) == plain
        exists = part.bank != "main" and run.task_lora.enabled and (main / INFO).exists()
        return main / TASK_LORA if same and exists else None

    def context(self, part: Part, seed: int) -> Context:
        """Return the context of a part's panels for a seed."""
        key = (f"{part.bank}-{seed}", part.words)
        if key not in self.loaded.contexts:
            bank, people = self.bank(part, seed), self.participants
            members = bank.info.members
            anchors = [p for p in people.trained_on(part, "candidates") if "anchor" in members.artefacts_of(p.id)]
            self.loaded.contexts[key] = Context(
                self.base,
                bank,
                bank.encoder(self.base, self.recipe.run.encoder),
                self.run_of(part, seed),
                anchors=sorted(anchors, key=lambda person: person.id),  # the order of the bank
                pool=people.splits.select("task", people.people),
                on_step=self.on_step,
                evidence_folder=self.out / "work",
            )
        return self.loaded.contexts[key]

    # -- panels --------------------------------------------------------------------------------------------------------

    def panels(self, part: Part, seed: int, shots: int) -> Iterator[Panel]:
        """Yield the tested people in batches, always the same people together."""
        for start in range(0, len(self.participants.tested(part, shots)), BATCH):
            yield self.panel(part, seed, shots, start)

    def panel(self, part: Part, seed: int, shots: int, start: int) -> Panel:
        """Return the batch of tested people that begins with number ``start``. The last panel is cached."""
        key = (part, seed, shots, start)
        if self.loaded.panel is None or self.loaded.panel[0] != key:
            panel = Panel.of(
                self.context(part, seed),
                self.participants.tested(part, shots)[start : start + BATCH],
                shots=shots,
                queries=self.recipe.queries,
                ask=self.recipe.ask,
                retrieve=part.retrieve,
                write_texts=part.texts,
            )
            self.loaded.panel = key, panel
        return self.loaded.panel[1]

    def key(self, part: Part, method: Method, seed: int, shots: int) -> str:
        """Return a hash of everything but the person that determines a result: method, protocol, base, and bank."""
        run, people, recipe = self.run_of(part, seed), self.participants, self.recipe
        protocol = [shots, recipe.queries, recipe.ask, part.texts or bool(people.task.labels)]
        parts: list[Any] = [method.digest, *protocol]
        parts += [self.base.fingerprint, str(self.base.dtype), run.max_tokens]
        parts += [people.task_of(part).identity]
        parts += [self.base.prompts.answer_tokens(people.task)] if part.texts and people.task.labels is None else []
        parts += [part.retrieve] if part.retrieve else []
        if method.of_bank:
            stages = [run.merge.model_dump(mode="json"), run.stack.model_dump(mode="json")]
            parts += [self.bank(part, seed).hash, *stages]
        if method.of_bank or method.seeded:
            parts.append(seed)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _in_worker(recipe: Experiment, out: Path, data: str, which: Which) -> Workspace:
    return Workspace(Participants.read(recipe, data, which), BaseModel.of(recipe.run), out)
