"""MAP@R, R-precision, Recall@K, fooled and confused against naive loops, scikit-learn and values worked by hand.

Embeddings of small integers whose mean is an integer too make every distance exact. So a tie is a
tie for the code, which subtracts the mean, and for the oracle.
"""

import doctest
import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from torch.utils._python_dispatch import TorchDispatchMode

import bgbias
from bgbias import draw_test_lenders, fooled_and_confused, query_metrics, retrieval_metrics
from conftest import mean_of, naive_metrics, naive_query_metrics

pytestmark = pytest.mark.usefixtures("one_thread")

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


@pytest.mark.parametrize("items, width, classes", [(2, 1, 1), (12, 1, 1), (30, 2, 4), (30, 3, 25), (60, 3, 2)])
@pytest.mark.parametrize("seed", range(3))
def test_each_query_against_naive_loops(items, width, classes, seed):
    """In the order of the items; nan where a query has no right item. With and without a gallery and ignored items."""
    embeddings, gallery, labels = integers(items, width, classes, seed)
    ignored = np.random.default_rng(seed).integers(0, items, items)
    for other in (None, gallery):
        for left_out in (None, ignored):
            found = query_metrics(torch.tensor(embeddings).float(), labels, KS,
                                  None if other is None else torch.tensor(other).float(), left_out)
            expected = naive_query_metrics(embeddings, labels, KS, other, left_out)
            assert found.keys() == expected.keys()
            for name, column in found.items():
                assert column.shape == (items,)
                np.testing.assert_allclose(column.numpy(), expected[name], atol=1e-6)


IGNORED = {
    "themselves": lambda labels, rng: np.arange(len(labels)),
    "any item": lambda labels, rng: rng.integers(0, len(labels), len(labels)),
    "right items": lambda labels, rng: np.array([rng.choice(np.flatnonzero(labels == label)) for label in labels]),
    "wrong items": lambda labels, rng: np.array([rng.choice(np.flatnonzero(labels != label)) for label in labels])}


@pytest.mark.parametrize("which", IGNORED)
@pytest.mark.parametrize("sizes", [[2] * 8, [1, 1, 2, 3, 5, 8], [20, 20], [30, 2]])
def test_what_a_query_ignores_against_naive_loops(sizes, which):
    """An ignored item is as if it were not in the gallery: R counts the right items that remain, and a query without
    any is left out. With ties and without."""
    rng = np.random.default_rng(2)
    labels = rng.permutation(np.repeat(range(len(sizes)), sizes))
    ignored = IGNORED[which](labels, rng)
    tied = integers(len(labels), 2, 1, seed=3)[:2]
    for embeddings, gallery in (tied, rng.normal(size=(2, len(labels), 3))):
        queries, other = (torch.tensor(x).float() for x in (embeddings, gallery))
        for given in (None, other):
            for form in (ignored, torch.tensor(ignored), ignored.tolist()):
                found = query_metrics(queries, labels, (1, 3, 50), given, form)
                expected = naive_query_metrics(queries, labels, (1, 3, 50), given, ignored)
                for name, column in found.items():
                    np.testing.assert_allclose(column.numpy(), expected[name], atol=1e-6)
            means = retrieval_metrics(queries, labels, (1, 3, 50), given, ignored=ignored)
            assert means == pytest.approx(naive_metrics(queries, labels, (1, 3, 50), given, ignored), abs=1e-6)
            if which == "themselves":
                assert means == retrieval_metrics(queries, labels, (1, 3, 50), given)


def test_an_ignored_item_by_hand():
    """On a line: a at 0, 1 and 5, b at 2 and 3. The first a ignores its nearest photo, the first b its only one."""
    places, labels = torch.tensor([[0.0], [1.0], [5.0], [2.0], [3.0]]), [0, 0, 0, 1, 1]
    found = query_metrics(places, labels, (1, 3), ignored=[1, 3, 0, 4, 2])
    # 0: 2 b, 3 b, 5 a, R = 1.  1: 0 a, 3 b, 5 a, R = 2.  5: 3 b, 2 b, 1 a, R = 1.  2: none.  3: 2 b, R = 1.
    for name, expected in {"map@r": [0, 0.5, 0, math.nan, 1], "r_precision": [0, 0.5, 0, math.nan, 1],
                           "recall@1": [0, 1, 0, math.nan, 1], "recall@3": [1, 1, 1, math.nan, 1]}.items():
        np.testing.assert_array_equal(found[name].numpy(), expected)


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


def test_the_example_in_the_docstring():
    """It is run, and the values of each query are those of its prose."""
    example, = doctest.DocTestFinder(recurse=False).find(retrieval_metrics, globs=vars(bgbias))
    ran = doctest.DocTestRunner().run(example)
    assert ran.attempted == 3 and ran.failed == 0
    places, labels = torch.tensor([[0.0], [2.0], [7.0], [3.0], [9.0]]), [0, 0, 0, 1, 1]
    found = query_metrics(places, labels, (1,))
    # Queries 0, 2, 7 of class a and 3, 9 of class b.
    assert found["map@r"].tolist() == [(1 / 1 + 0) / 2, (0 + 1 / 2) / 2, 0, 0, 0]
    assert found["r_precision"].tolist() == [1 / 2, 1 / 2, 0, 0, 0]
    assert found["recall@1"].tolist() == [1, 0, 0, 0, 0]
    # The order in which the prose lists what a query finds.
    for query, found_items in ((0, "2 a, 3 b, 7 a, 9 b"), (2, "3 b, 0 a, 7 a, 9 b"), (7, "9 b, 3 b, 2 a, 0 a")):
        others = sorted((abs(place - query), place, name) for place, name in
                        ((0, "a"), (2, "a"), (7, "a"), (3, "b"), (9, "b")) if place != query)
        assert ", ".join(f"{place} {name}" for _, place, name in others) == found_items
        assert f"query {query} finds {found_items}: " in retrieval_metrics.__doc__


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


def test_nothing_to_retrieve_is_an_error_of_the_means_only():
    for labels, ignored in (([0, 1, 2, 3], None), ([0, 0, 1, 1], [1, 0, 3, 2])):
        assert query_metrics(torch.eye(4), labels, (1,), ignored=ignored)["map@r"].isnan().all()
        with pytest.raises(ValueError, match="nothing to retrieve"):
            retrieval_metrics(torch.eye(4), labels, (1,), ignored=ignored)


@pytest.mark.parametrize("embeddings, labels, gallery", [(20, 16, None), (16, 20, None), (20, 20, 16), (16, 20, 20)])
def test_lengths_that_differ_are_an_error(embeddings, labels, gallery):
    """The first N are not scored instead: then the labels belong to other items."""
    given = None if gallery is None else torch.rand(gallery, 4)
    for metrics in (query_metrics, retrieval_metrics):
        with pytest.raises(ValueError, match=f"{embeddings} embeddings, {labels} labels"):
            metrics(torch.rand(embeddings, 4), torch.arange(labels) % 4, (1,), given)


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


# ---- Fooled and confused -------------------------------------------------------------------------


def naive_fooled_and_confused(clean, any_class, labels, lenders):
    """bgbias.fooled_and_confused(), one right photo at a time, with squared distances: two lists [draw][query]."""
    clean, any_class = np.asarray(clean, np.float64), np.asarray(any_class, np.float64)
    tables = []
    for shift in (0, 1):  # the impostor stands in this draw, or in the next one
        table = []
        for k in range(len(lenders)):
            row = []
            for q in range(len(labels)):
                r = [i for i in range(len(labels)) if lenders[k][i] == q][0]  # stands in front of q's background
                right = [p for p in range(len(labels)) if labels[p] == labels[q] and p != q]
                if labels[r] == labels[q] or not right:
                    row.append(math.nan)
                    continue
                impostor = ((any_class[(k + shift) % len(lenders)][r] - clean[q]) ** 2).sum()
                score = 0.0
                for p in right:
                    distance = ((any_class[k][p] - clean[q]) ** 2).sum()
                    score += 1.0 if distance > impostor else 0.5 if distance == impostor else 0.0
                row.append(score / len(right))
            table.append(row)
        tables.append(table)
    return tables


def with_lenders(labels, seed, draws=5):
    return draw_test_lenders(np.zeros(len(labels)), seed, draws)


@pytest.mark.parametrize("sizes", [[2, 2], [2, 1], [1, 2, 3, 5, 8], [10, 10], [4] * 6, [12, 1, 1], [3]])
@pytest.mark.parametrize("seed", range(3))
def test_fooled_and_confused_against_a_slow_loop(sizes, seed):
    """Without ties, and with many. Impostors of the query's own class and classes of a single photo are left out."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(7 * np.arange(len(sizes)), sizes))
    lenders = with_lenders(labels, seed)
    shape = 1 + len(lenders), len(labels), 2
    for both in (rng.normal(size=shape), rng.integers(-2, 3, shape)):
        clean, *any_class = torch.tensor(both).float()
        for form in (labels, torch.tensor(labels)):
            found = fooled_and_confused(clean, torch.stack(any_class), form, lenders)
            expected = naive_fooled_and_confused(clean, torch.stack(any_class), labels, lenders)
            for shares, table in zip(found, expected, strict=True):
                np.testing.assert_allclose(shares.numpy(), table, atol=1e-6)
                singles = np.bincount(labels)[labels] == 1
                assert np.isnan(shares[:, singles].numpy()).all()
                inside = shares[~shares.isnan()]
                assert ((0 <= inside) & (inside <= 1)).all()
    own = np.array([[labels[np.flatnonzero(row == q)[0]] == labels[q] for q in range(len(labels))] for row in lenders])
    assert found[0].isnan().numpy()[own].all()
    if sizes == [10, 10]:
        assert 0 < own.sum() < own.size


def test_fooled_and_confused_by_hand():
    """On a line. q and p are of one class, r and s of others. In draw 0, r stands in front of q's background, p in
    front of s's; in draw 1, s stands in front of q's."""
    q, p, r, s = range(4)
    lenders = np.array([[r, s, q, p], [p, r, s, q]])
    clean = torch.tensor([[0.0], [10.0], [50.0], [60.0]])
    any_class = torch.tensor([[[0.0], [3.0], [2.0], [99.0]], [[0.0], [4.0], [5.0], [4.0]]])
    fooled, confused = fooled_and_confused(clean, any_class, [0, 0, 1, 2], lenders)
    # Draw 0: the right photo at 3 is farther than r at 2, and not farther than r in draw 1 at 5.
    # Draw 1: the right photo at 4 is as far as s at 4, and nearer than s in draw 0 at 99.
    assert fooled[:, q].tolist() == [1, 0.5] and confused[:, q].tolist() == [0, 0]
    # For p, at 10: in draw 0, s at 99 is farther than q at 0. In draw 1, q itself stands in front of p's background.
    assert fooled[0, p] == 0 and confused[0, p] == 1  # s in draw 1 at 4: |10 - 4| < |10 - 0|
    assert fooled[1, p].isnan() and confused[1, p].isnan()
    assert fooled[:, [r, s]].isnan().all() and confused[:, [r, s]].isnan().all()


@pytest.mark.parametrize("sees, expected", [("objects", (0, 0)), ("backgrounds", (1, None)), ("nothing", (0.5, 0.5))])
def test_planted_networks_are_fooled_as_they_should(sees, expected):
    """A network that sees only objects, which are alike within a class and distinct otherwise; one that sees only
    backgrounds, of which each photo has its own; and a constant one."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(range(12), 6))
    lenders = with_lenders(labels, seed=1)
    objects = torch.tensor(10 * rng.normal(size=(12, 8))[labels] + 0.1 * rng.normal(size=(72, 8))).float()
    backgrounds = torch.tensor(rng.normal(size=(72, 8))).float()
    clean, any_class = {
        "objects": (objects, objects.expand(5, -1, -1)), "backgrounds": (backgrounds, backgrounds[lenders]),
        "nothing": (torch.full((72, 8), 0.3), torch.full((5, 72, 8), 0.3))}[sees]
    for shares, value in zip(fooled_and_confused(clean, any_class, labels, lenders), expected):
        shares = shares[~shares.isnan()]
        assert len(shares) > 300
        if value is None:  # where else the impostor stands tells nothing: as often nearer as farther
            assert shares.mean() == pytest.approx(0.5, abs=0.03)
        else:
            assert (shares == value).all()
