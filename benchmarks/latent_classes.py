"""Latent classes over the survey's answers, without a language model: what the answers hold.

python -m benchmarks.latent_classes > results/latent-classes.json
"""

from __future__ import annotations

import json
from dataclasses import asdict

import torch

from mta.data.history import Person
from mta.data.readers.people import read_people
from mta.data.tasks import load_task
from mta.evaluation.statistics import bootstrap
from mta_lab.experiments.people import draw_splits
from mta_lab.experiments.recipe import load_experiment


def main(classes: int = 16, rounds: int = 200) -> None:
    """Fit by expectation and maximization on task people and candidates; predict as the recipe does."""
    recipe, task = load_experiment("survey"), load_task("survey")
    people = read_people("survey", task)
    splits, _ = draw_splits(recipe, task, people, [])
    numbers = {name: n for n, name in enumerate(sorted({item.fields["statement"] for item in people[0].items}))}
    known = [*splits.select("task", people), *splits.select("candidates", people)]

    def answers(some: list[Person], start: int, stop: int | None) -> torch.Tensor:  # (people, statements, labels)
        given = torch.zeros(len(some), len(numbers), 6, dtype=torch.float64)
        for u, person in enumerate(some):
            for item in person.items[start:stop]:
                given[u, numbers[item.fields["statement"]], int(item.fields["answer"]) - 1] = 1
        return given

    given, shares = answers(known, 0, None), torch.rand(len(known), classes, generator=torch.manual_seed(0)).double()
    for _ in range(rounds):
        shares = shares / shares.sum(1, keepdim=True)
        counts = torch.einsum("uk,usl->ksl", shares, given) + given.mean(0)  # one person of everybody's answers
        log, size = (counts / counts.sum(2, keepdim=True)).log(), shares.mean(0).log()
        shares = (size + torch.einsum("usl,ksl->uk", given, log)).softmax(1)
    tested = splits.select("test", people)
    one = (size + torch.einsum("usl,ksl->uk", answers(tested, 0, 8), log)).softmax(1)
    asked = answers(tested, 8, 20)
    chance = torch.einsum("uk,ksl->usl", one, log.exp())
    nll = -(asked * chance.log()).sum((1, 2)) / asked.sum((1, 2))
    right = (asked.argmax(2) == chance.argmax(2)).double() * asked.sum(2)
    found = {"NLL": bootstrap(nll), "accuracy": bootstrap(right.sum(1) / asked.sum((1, 2)))}
    print(json.dumps({"classes": classes} | {name: asdict(one) for name, one in found.items()}, indent=1))


if __name__ == "__main__":
    main()
