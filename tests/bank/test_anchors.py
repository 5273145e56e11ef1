"""Choose the anchors: the most active person of each cluster of candidates."""

import pytest
import torch

from mta.bank.anchors import select_anchors
from mta.data.history import Item, Person


def person(id: str, items: int) -> Person:
    return Person(id, tuple(Item({"title": f"{id} {n}"}) for n in range(items)))


def corners(clusters: int, each: int) -> torch.Tensor:
    """Vectors in ``clusters`` dense clusters, far from each other: (clusters * each, clusters)."""
    noise = torch.randn(clusters * each, clusters, generator=torch.Generator().manual_seed(0))
    return torch.eye(clusters).repeat_interleave(each, 0) + 0.01 * noise


def test_the_most_active_of_a_cluster_is_its_anchor():
    items = [2, 9, 3, 4, 5, 5, 7, 6, 8, 1, 1, 1]
    found = select_anchors([person(f"p{n:02}", count) for n, count in enumerate(items)], corners(3, 4), 3, seed=0)
    assert found == [1, 6, 8]


def test_of_equally_active_people_the_smaller_id_is_taken():
    ids = ["d", "b", "c", "e", "p9", "p10", "p8", "p7"]
    found = select_anchors([person(id, 5) for id in ids], corners(2, 4), 2, seed=0)
    assert [ids[n] for n in found] == ["b", "p10"]


@pytest.mark.parametrize("candidates", [4, 7, 8, 15, 23])
def test_there_are_never_more_anchors_than_a_quarter_of_the_candidates(candidates):
    vectors = torch.randn(candidates, 6, generator=torch.Generator().manual_seed(candidates))
    found = select_anchors([person(f"p{n}", 3) for n in range(candidates)], vectors, 50, seed=0)
    assert len(found) == candidates // 4
    assert found == sorted(set(found))


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_people_who_are_all_alike_are_one_cluster():
    assert select_anchors([person(f"p{n}", 3 + n) for n in range(8)], torch.ones(8, 3), 2, seed=0) == [7]


def test_the_central_one_of_a_cluster_can_be_its_anchor():
    vectors = corners(3, 4)
    vectors[[1, 4, 11]] = torch.eye(3)  # nearest to the centers of their clusters
    middle = torch.stack([vectors[4 * c : 4 * c + 4].mean(0) for c in range(3)])
    nearest = [4 * c + int((vectors[4 * c : 4 * c + 4] - middle[c]).norm(dim=1).argmin()) for c in range(3)]
    people = [person(f"p{n:02}", 1 + n) for n in range(12)]
    assert select_anchors(people, vectors, 3, seed=0, choose="central") == nearest


def test_random_anchors_are_fixed_by_the_seed_and_one_of_each_cluster():
    people, vectors = [person(f"p{n:02}", 1 + n) for n in range(40)], corners(4, 10)
    draws = {tuple(select_anchors(people, vectors, 4, seed=seed, choose="random")) for seed in range(5)}
    assert len(draws) > 1
    assert all([n // 10 for n in draw] == [0, 1, 2, 3] for draw in draws)
    assert draws == {tuple(select_anchors(people, vectors, 4, seed=seed, choose="random")) for seed in range(5)}
