"""What the survey's answers hold without a language model: latent classes, and label biases of several kinds.

python -m benchmarks.latent_classes > results/latent-classes.json
"""

from __future__ import annotations

import json
from dataclasses import asdict

import torch
from torch import Tensor

from mta.data.readers.people import read_people
from mta.data.splits import Part
from mta.data.tasks import load_task
from mta.evaluation.statistics import bootstrap
from mta_lab.experiments.people import draw_splits
from mta_lab.experiments.recipe import load_experiment


def latent_classes(known: Tensor, shots: Tensor, classes: int = 16, rounds: int = 200) -> Tensor:
    """Return log p of every answer (people, statements, labels); expectation and maximization on ``known``."""
    shares = torch.rand(len(known), classes, generator=torch.manual_seed(0)).double()
    for _ in range(rounds):
        shares = shares / shares.sum(1, keepdim=True)
        counts = torch.einsum("uk,usl->ksl", shares, known) + known.mean(0)  # one person of everybody's answers
        log, size = (counts / counts.sum(2, keepdim=True)).log(), shares.mean(0).log()
        shares = (size + torch.einsum("usl,ksl->uk", known, log)).softmax(1)
    own = (size + torch.einsum("usl,ksl->uk", shots, log)).softmax(1)
    return torch.einsum("uk,ksl->usl", own, log.exp()).log()


def label_bias(features: Tensor, shares: Tensor, shots: Tensor, std: float) -> Tensor:
    """Return log p under a bias on ``shares``: one number per feature (F, statements, labels), MAP on the shots."""
    numbers = torch.zeros(len(shots), len(features), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([numbers], max_iter=200, line_search_fn="strong_wolfe")

    def log() -> Tensor:
        return (shares.log() + torch.einsum("uf,fsl->usl", numbers, features)).log_softmax(2)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = (numbers**2).sum() / (2 * std**2) - (shots * log()).sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return log().detach()


def main() -> None:
    """Fit to task people and candidates; predict as the recipe does."""
    people = read_people("survey", "survey")
    splits, _ = draw_splits(load_experiment("survey"), load_task("survey"), people, [])
    statements = sorted({item.fields["statement"] for item in people[0].items})

    def answers(part: Part, start: int = 0, stop: int | None = None) -> Tensor:  # (people, statements, labels)
        items = (person.items[start:stop] for person in splits.select(part, people))
        said = ({i.fields["statement"]: int(i.fields["answer"]) for i in own} for own in items)
        rows = torch.tensor([[own.get(statement, 0) for statement in statements] for own in said])
        return torch.nn.functional.one_hot(rows, 7)[..., 1:].double()  # 0: not asked

    known = torch.cat([answers("task"), answers("candidates")])
    shares, labels = known.mean(0), torch.arange(-2.5, 3).double()
    mean, spread = labels.expand_as(shares), (labels**2).expand_as(shares)
    values = known @ labels  # the direction in which people's answers differ most, over the statements
    direction = torch.linalg.svd(values - values.mean(0), full_matrices=False)[2][0, :, None]
    two = torch.stack([mean * (direction > 0), mean * (direction <= 0), spread])
    kinds = {"label bias": torch.stack([mean, spread]), "label bias of two groups of statements": two}
    shots, asked = answers("test", 0, 8), answers("test", 8, 20)
    others, later = answers("candidates", 0, 8), answers("candidates", 8, 20)
    found = {"shares of each statement": shares.log(), "16 latent classes": latent_classes(known, shots)}
    for name, features in kinds.items():  # candidates choose the standard deviation of the prior
        tried = {std: label_bias(features, shares, others, std) * later for std in (0.125, 0.25, 0.5, 1.0)}
        found[name] = label_bias(features, shares, shots, max(tried, key=lambda std: float(tried[std].sum())))
    nll = {name: asdict(bootstrap(-(asked * log).sum((1, 2)) / 12)) for name, log in found.items()}
    print(json.dumps(nll, indent=1))


if __name__ == "__main__":
    main()
