"""MAP@R, R-precision, Recall@K against naive loops, scikit-learn and values worked by hand.

Embeddings of small integers whose mean is an integer too make every distance exact. So a tie is a
tie for the code, which subtracts the mean, and for the oracle.
"""

import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from torch.utils._python_dispatch import TorchDispatchMode

from bgbias import retrieval_metrics
from conftest import naive_metrics

KS = (1, 2, 4, 8)


def integers(items, width, classes, seed):
    """Integer embeddings with many ties, a second set, labels with singletons and gaps. The mean of
    multiples of the number of items is an integer."""
    rng = np.random.default_rng(seed)
    labels = 5 * rng.integers(0, classes, items) + 3
    embeddings, gallery = items * rng.integers(-2, 3, (2, items, width))
    return embeddings, gallery, labels


@pytest.mark.parametrize("items, width, classes", [
    (2, 1, 1), (3, 2, 2), (12, 1, 1), (30, 2, 4), (30, 3, 25), (60, 3, 2), (60, 6, 12)])
@pytest.mark.parametrize("seed", range(3))
def test_against_naive_loops_with_ties_and_singletons(items, width, classes, seed):
    embeddings, gallery, labels = integers(items, width, classes, seed)
    labels[-2] = labels[-1]
    for other in (None, gallery):
        found = retrieval_metrics(torch.tensor(embeddings).float(), labels, KS,
                                  None if other is None else torch.tensor(other).float())
        expected = naive_metrics(embeddings, labels, KS, other)
        assert found == pytest.approx(expected, abs=1e-6)


CLASS_SIZES = {
    "many sizes": [1, 1, 1, 2, 2, 3, 5, 8, 13, 21, 34], "R above N / 2": [40, 6, 3, 1], "two large": [30, 30],
    "pairs": [2] * 30, "one pair": [2] + [1] * 20, "one class": [40], "one class, two items": [2]}


@pytest.mark.parametrize("ks", [(1,), (1, 2, 5), (1, 3, 30, 1000)])
@pytest.mark.parametrize("sizes", CLASS_SIZES)
def test_class_sizes_against_naive_loops(sizes, ks):
    """With and without ties, with K below and above R."""
    rng = np.random.default_rng(1)
    labels = rng.permutation(np.repeat(range(len(CLASS_SIZES[sizes])), CLASS_SIZES[sizes]))
    tied = integers(len(labels), 2, 1, seed=2)[:2]
    centres = rng.normal(size=(labels.max() + 1, 3))
    apart = [centres[labels] + 0.7 * rng.normal(size=(len(labels), 3)) for _ in range(2)]
    for embeddings, gallery in (tied, apart):
        queries, other = (torch.tensor(x).float() for x in (embeddings, gallery))
        for given in (None, other):
            found = retrieval_metrics(queries, labels, ks, given)
            expected = naive_metrics(queries, labels, ks, given)
            assert found == pytest.approx(expected, abs=1e-6)
            if len(CLASS_SIZES[sizes]) == 1:
                assert set(found.values()) == {1.0}


def test_by_hand():
    """Three a, two b and a singleton on a line; first right neighbours at rank 1, 2, 3, 4, 2."""
    places, labels = [[0.0], [2.0], [7.0], [3.0], [9.0], [20.0]], [7, 7, 7, 4, 4, 1]
    found = retrieval_metrics(torch.tensor(places), labels, (1, 2, 3, 4))
    assert found == pytest.approx({
        "map@r": (1 / 2 + 1 / 4) / 5, "r_precision": (1 / 2 + 1 / 2) / 5,
        "recall@1": 1 / 5, "recall@2": 3 / 5, "recall@3": 4 / 5, "recall@4": 1})


def test_a_tie_counts_against_the_query():
    """The first item has one right and one wrong neighbour at distance 1, the second has no tie."""
    found = retrieval_metrics(torch.tensor([[0.0], [1.0], [-1.0]]), [0, 0, 1], (1, 2))
    assert found == {"map@r": 0.5, "r_precision": 0.5, "recall@1": 0.5, "recall@2": 1.0}


@pytest.mark.parametrize("width", [3, 128])
@pytest.mark.parametrize("seed", range(3))
def test_copies_of_embeddings_against_naive_loops(width, seed):
    """Half of the items are copies of right or wrong items. So is the gallery."""
    rng = np.random.default_rng(seed)
    embeddings, labels = clustered(150, 12, width, seed)
    copies = rng.choice(150, 75, replace=False)
    embeddings[copies] = embeddings[rng.integers(0, 150, 75)]
    for gallery in (None, embeddings[rng.integers(0, 150, 150)]):
        found = retrieval_metrics(embeddings, labels, (1, 4, 100), gallery)
        expected = naive_metrics(embeddings, labels, (1, 4, 100), gallery)
        assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("items", [8, 101, 1003])
def test_one_point_for_everything_scores_zero_in_any_order(items):
    point = clustered(1, 1, 128, seed=0)[0]
    for labels in (torch.arange(items) % 4, torch.arange(items) * 4 // items):
        found = retrieval_metrics(point.repeat(items, 1), labels, (1, 2))
        assert set(found.values()) == {0.0}


def test_with_a_gallery_the_own_photo_never_counts():
    """In the crossed gallery each query's nearest photo is of the other class, its own far away; in
    the second case its own is at the same place."""
    queries = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
    labels = [0, 0, 1, 1]
    crossed = retrieval_metrics(queries, labels, (1, 3), gallery=queries.flip(0))
    assert crossed == {"map@r": 0.0, "r_precision": 0.0, "recall@1": 0.0, "recall@3": 1.0}
    same = retrieval_metrics(queries, labels, (1,), gallery=queries.clone())
    assert same == {"map@r": 1, "r_precision": 1, "recall@1": 1}


def clustered(items, classes, width, seed, dtype=torch.float32, noise=1):
    """Unit embeddings of class centre + noise, where retrieval is neither perfect nor hopeless."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (items,), generator=rng)
    centres = torch.randn(classes, width, generator=rng, dtype=dtype)
    around = noise * torch.randn(items, width, generator=rng, dtype=dtype)
    return torch.nn.functional.normalize(centres[labels] + around, dim=1), labels


@pytest.mark.parametrize("spread", [0.004, 0.001])
@pytest.mark.parametrize("seed", range(3))
def test_embeddings_close_together_are_told_apart(spread, seed):
    """Unit vectors in float32 that lie within `spread` of each other, as of a network that has
    hardly learned: their inner products differ in the last digits only, their distances do not."""
    around, labels = clustered(300, 20, 128, seed, dtype=torch.float64, noise=2.5)
    rng = torch.Generator().manual_seed(seed)
    direction = torch.nn.functional.normalize(torch.randn(128, generator=rng).double(), dim=0)
    moved = around + 0.05 * torch.randn(300, 128, generator=rng).double()
    embeddings, gallery = (torch.nn.functional.normalize(direction + spread / 2 * x, dim=1).float()
                           for x in (around, moved))
    assert spread / 2 < torch.cdist(embeddings.double(), gallery.double()).max() < spread
    for other in (None, gallery):
        found = retrieval_metrics(embeddings, labels, KS, other)
        expected = naive_metrics(embeddings, labels, KS, other)
        assert found == pytest.approx(expected, abs=2e-4)  # about one neighbour of one query
        assert 0.05 < found["map@r"] < 0.5


def referee(embeddings, labels, gallery, ks):
    """The same metrics from scikit-learn's nearest neighbours (no ties here)."""
    embeddings, labels, gallery = embeddings.numpy(), labels.numpy(), gallery.numpy()
    R = np.bincount(labels)[labels] - 1
    width = max(R.max(), *ks) + 1
    order = NearestNeighbors(n_neighbors=width, algorithm="brute").fit(gallery).kneighbors(
        embeddings, return_distance=False)
    order = np.array([np.append(row[row != i], -1)[: width - 1] for i, row in enumerate(order)])
    right = labels[order] == labels[:, None]
    within = right & (np.arange(width - 1) < R[:, None])
    precision = right.cumsum(axis=1) / np.arange(1, width)
    some = R > 0
    values = {"map@r": (within * precision).sum(axis=1)[some] / R[some],
              "r_precision": within.sum(axis=1)[some] / R[some]}
    values |= {f"recall@{k}": right[some, :k].any(axis=1) for k in ks}
    return {name: v.mean() for name, v in values.items()}


@pytest.mark.parametrize("items, classes", [(400, 8), (400, 150), (4700, 900)])  # 4,700: two chunks
def test_against_scikit_learn(items, classes):
    embeddings, labels = clustered(items, classes, 16, seed=items, dtype=torch.float64)
    rng = torch.Generator().manual_seed(1)
    moved = embeddings + 0.05 * torch.randn(items, 16, generator=rng, dtype=torch.float64)
    for gallery in (embeddings, moved):
        found = retrieval_metrics(embeddings, labels, KS, gallery)
        assert found == pytest.approx(referee(embeddings, labels, gallery, KS), abs=1e-6)
        assert 0.02 < found["map@r"] < 0.98


def test_the_order_of_the_items_and_the_type_of_the_labels_do_not_matter():
    embeddings, labels = clustered(300, 20, 8, seed=0)
    shuffled = torch.randperm(300, generator=torch.Generator().manual_seed(2))
    found = retrieval_metrics(embeddings, labels, KS)
    other = retrieval_metrics(embeddings[shuffled], labels[shuffled], KS)
    assert found == pytest.approx(other, abs=1e-6)
    for same in (labels.tolist(), labels.numpy(), labels.int(), 1000 - labels):
        assert retrieval_metrics(embeddings, same, KS) == found


def test_nothing_to_retrieve_is_an_error():
    with pytest.raises(ValueError):
        retrieval_metrics(torch.eye(4), torch.arange(4), (1,))


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [t for t in (result if isinstance(result, (tuple, list)) else [result])
                   if isinstance(t, torch.Tensor)]
        self.elements = max([self.elements, *(t.numel() for t in tensors)])
        return result


def test_memory_does_not_grow_with_the_square_of_the_items():
    embeddings, labels = clustered(8000, 2000, 2, seed=0)
    with Largest() as largest:
        retrieval_metrics(embeddings, labels, KS)
    assert 8000 < largest.elements <= 2**25 < 8000**2


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["embeddings", "gallery"])
def test_embeddings_that_are_not_finite_are_an_error(where, value):
    """A network that diverged must not score, let alone become the best epoch."""
    given = {name: clustered(20, 4, 4, seed=0)[0] for name in ("embeddings", "gallery")}
    given[where][3, 1] = value
    with pytest.raises(FloatingPointError):
        retrieval_metrics(labels=torch.arange(20) % 4, ks=(1,), **given)
