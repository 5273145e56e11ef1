"""Latent classes over the survey's answers, without a language model: what the answers hold.

python -m benchmarks.latent_classes > results/latent-classes.json
"""

from __future__ import annotations

import json
from dataclasses import asdict

import torch

from mta.data.readers.people import read_people
from mta.data.splits import Part
from mta.data.tasks import load_task
from mta.evaluation.statistics import bootstrap
from mta_lab.experiments.people import draw_splits
from mta_lab.experiments.recipe import load_experiment


def main(classes: int = 16, rounds: int = 200) -> None:
    """Fit by expectation and maximization on task people and candidates; predict as the recipe does."""
    people = read_people("survey", "survey")
    splits, _ = draw_splits(load_experiment("survey"), load_task("survey"), people, [])
    statements = sorted({item.fields["statement"] for item in people[0].items})

    def answers(part: Part, start: int = 0, stop: int | None = None) -> torch.Tensor:  # (people, statements, labels)
        items = (person.items[start:stop] for person in splits.select(part, people))
        said = ({i.fields["statement"]: int(i.fields["answer"]) for i in own} for own in items)
        rows = torch.tensor([[own.get(statement, 0) for statement in statements] for own in said])
        return torch.nn.functional.one_hot(rows, 7)[..., 1:].double()  # 0: not asked

    known = torch.cat([answers("task"), answers("candidates")])
    shares = torch.rand(len(known), classes, generator=torch.manual_seed(0)).double()
    for _ in range(rounds):
        shares = shares / shares.sum(1, keepdim=True)
        counts = torch.einsum("uk,usl->ksl", shares, known) + known.mean(0)  # one person of everybody's answers
        log, size = (counts / counts.sum(2, keepdim=True)).log(), shares.mean(0).log()
        shares = (size + torch.einsum("usl,ksl->uk", known, log)).softmax(1)
    own = (size + torch.einsum("usl,ksl->uk", answers("test", 0, 8), log)).softmax(1)
    asked, chance = answers("test", 8, 20), torch.einsum("uk,ksl->usl", own, log.exp())
    right = (asked.argmax(2) == chance.argmax(2)) * asked.sum(2)
    found = {"NLL": -(asked * chance.log()).sum((1, 2)) / 12, "accuracy": right.sum(1) / 12}
    print(json.dumps({"classes": classes} | {name: asdict(bootstrap(one)) for name, one in found.items()}, indent=1))


if __name__ == "__main__":
    main()
