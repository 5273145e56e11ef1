"""Stage 0: choose the items that train the task LoRA, and train it while held-out people gain."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import replace

from mta.bank.context import BuildContext
from mta.bank.format import TASK_LORA
from mta.bank.worker import LoraPiece
from mta.config import TaskLoraSettings
from mta.data.earlier import Shown
from mta.data.history import Item, Person, own_fields
from mta.lora.batch import LoraBatch
from mta.lora.peft import CONFIG, WEIGHTS, read_peft, write_peft
from mta.system.atomic import copy_file, write_text
from mta.system.progress import Step
from mta.training.trainer import Job

LOSSES = "held-out losses of the task LoRA"  # one for each round, in run.json
_TESTED = 256  # held-out items of the task LoRA, at most


def pooled_candidates(candidates: Sequence[Person], anchors: Set[str], settings: TaskLoraSettings) -> list[Person]:
    """Return the candidates who train the task LoRA, too, with the items that may.

    These are all items of the ``anchors`` (ids), and of others those that they do not keep back.
    Source: our choice; measured in docs/decisions/023-everyone-trains.md.
    """
    count = settings.kept_back
    if count is None:
        return []
    shared = (person if person.id in anchors else not_kept_back(person, count) for person in candidates)
    return [person for person in shared if person.items]


def not_kept_back(person: Person, count: int) -> Person:
    """Return the person without the first ``count`` items, and without later copies of these."""
    first = {tuple(own_fields(item)) for item in person.items[:count]}
    return replace(person, items=tuple(item for item in person.items[count:] if tuple(own_fields(item)) not in first))


def pooled_items(
    people: Sequence[Person],
    settings: TaskLoraSettings,
    seed: int,
    held_out: Sequence[Person] = (),
    candidates: Sequence[Person] = (),
) -> tuple[list[Item], list[Item]]:
    """Return the items that train the task LoRA, chosen by hash, and held-out items that tell when to stop.

    At most ``per_person`` items of each person, and at most ``items`` in total. With several rounds of training and 20
    people or more, a tenth of them is held out, or ``held_out``. People who share items with each other count as one,
    but never more than a fifth of all people is held out.
    The ``candidates`` train, too, and are not held out: later stages learn from them.
    The choice does not depend on the order of people. Source: our choice.
    """
    held = _held_out(people, seed) if settings.rounds > 1 and not held_out else set()
    rest = [person for person in (*people, *candidates) if _group(person) not in held]
    held_out = held_out or [person for person in people if _group(person) in held]
    trained, tested = (spread(some, settings.per_person, seed) for some in (rest, held_out))
    return trained[: settings.items], tested[:_TESTED]


def _held_out(people: Sequence[Person], seed: int) -> set[str]:
    sizes = Counter(map(_group, people))
    count, room = len(sizes) // 10 if len(sizes) >= 20 else 0, len(people) // 5
    held = set[str]()
    for group in sorted(sizes, key=lambda group: hashlib.sha256(f"{seed}/held out/{group}".encode()).digest()):
        if len(held) < count and sizes[group] <= room:
            held.add(group)
            room -= sizes[group]
    return held


def _group(person: Person) -> str:
    return person.group or person.id


def spread(people: Sequence[Person], per_person: int, seed: int) -> list[Item]:
    """Return at most ``per_person`` items of each person by hash: everybody's first ones come before second ones."""

    def draw(person: Person, place: int) -> bytes:
        return hashlib.sha256(f"{seed}/{person.id}/{place}".encode()).digest()

    ranked: list[tuple[int, bytes, Item]] = []
    for person in people:
        draws = sorted((draw(person, place), place) for place in range(len(person.items)))
        ranked += [(turn, drawn, person.items[i]) for turn, (drawn, i) in enumerate(draws[:per_person])]
    # Each person's first item comes before any second item, so that people have similar numbers of items.
    ranked.sort(key=lambda entry: entry[:2])
    return [item for _, _, item in ranked]


# -- training ----------------------------------------------------------------------------------------------------------


def train_task_lora(context: BuildContext, items: Shown, held_out: Shown) -> LoraBatch:
    """Return the task LoRA: trained on ``items``, or a copy of the given one. A finished one is read again.

    Source: our choice; several rounds: docs/decisions/022-rounds.md. Raises BankError, MemoryBudgetError, and
    DataError for an item that does not fit.
    """
    folder, done = context.out / TASK_LORA, context.out / "work" / "task.done"
    if not done.is_file() or done.read_text() != context.training_key:
        if given := context.task_lora:
            for name in (CONFIG, WEIGHTS):
                copy_file(given / name, folder / name)
        else:
            trained = _train_rounds(context, items, held_out)
            write_peft(folder, trained, context.base.place, fan_in_fan_out=context.base.fan_in_fan_out)
        write_text(done, context.training_key)
    return read_peft(folder).to(context.base.device)


def _train_rounds(context: BuildContext, items: Shown, held_out: Shown) -> LoraBatch:
    """Train the task LoRA, and train on while the loss of held-out items falls; return the best."""
    job, held = context.job("task", *items), context.job("held out", held_out.items)
    # Both are planned before the first round, which may take hours: too little memory fails at once.
    tokens = context.plan([job], context.run.task_lora.lora).tokens_per_batch
    if not held.examples:
        return _train_round(context, 0, 1, job, tokens)
    held_tokens = context.plan([held], context.run.task_lora.lora).tokens_per_batch
    most, losses, best = context.run.task_lora.rounds, list[float](), None
    for number in range(most):
        trained = _train_round(context, number, most, job, tokens, best)
        losses.append(context.held_out_loss(trained, held, held_tokens))
        if best and not losses[-1] < min(losses[:-1]):
            break
        best = trained
    context.record.note(LOSSES, losses)
    assert best is not None  # there is at least one round
    return best


def _train_round(
    context: BuildContext, number: int, most: int, job: Job, tokens: int, start: LoraBatch | None = None
) -> LoraBatch:
    """Train the task LoRA once over all items, from ``start``; a finished round is saved until the bank is."""
    name = f"task-{number}" if number else "task"
    result = context.result("", name)
    if saved := result.load():
        return LoraBatch.of_tensors(saved[0], context.run.task_lora.lora.scale).in_order(context.base.targets)

    def on_step(stage: str, step: Step) -> None:  # progress counts all rounds that there may be
        each = step.examples_total
        context.record.step(stage, replace(step, examples=step.examples + number * each, examples_total=most * each))

    piece = LoraPiece(name, "task LoRA", (replace(job, key=name),), tokens, start)
    ((_, trained),) = context.train([piece], "", on_step=on_step)
    result.save(trained.tensors(), {})
    context.checkpoint("", name).remove()
    if not context.executor.in_process:
        context.record.step("task LoRA", Step(number + 1, 1, number + 1, most))
    return trained
