"""The five losses against nested loops, values worked by hand, and batches without pairs."""

import math

import pytest
import torch
from torch.nn import functional as F

from bgbias import CLASS_WEIGHTS, DISTANCES, HPARAMS, IMAGES_PER_CLASS, LOSSES, SPLITS, nzmean

ROWS = [(dataset, loss) for dataset in HPARAMS for loss in HPARAMS[dataset]]


def circle(*degrees):
    """Unit vectors in the plane, (B, 2): distances and cosines can be worked out by hand."""
    angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def random_batch(images=12, classes=4, width=5, seed=0):
    """Unit embeddings around their class's centre (so that hinges are active on both sides),
    labels, class weights of any length."""
    rng = torch.Generator().manual_seed(seed)
    draw = {"generator": rng, "dtype": torch.float64}
    labels = torch.randint(classes, (images,), generator=rng)
    centres = torch.randn(classes, width, **draw)
    embeddings = F.normalize(centres[labels] + 0.7 * torch.randn(images, width, **draw), dim=1)
    return embeddings, labels, centres + torch.randn(classes, width, **draw)


# The oracles: one pair, one triplet, one logit at a time, on Python floats.


def dot(a, b):
    return sum(x * y for x, y in zip(a, b))


def distance(a, b):
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b)))


def cosine(a, b):
    return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))


def mean_of_positive(terms):
    terms = [t for t in terms if t > 0]
    return sum(terms) / len(terms) if terms else 0.0


def naive_contrastive(e, y, _, pos_margin, neg_margin):
    pos, neg = [], []
    for i in range(len(e)):
        for j in range(len(e)):
            if i != j and y[i] == y[j]:
                pos.append(distance(e[i], e[j]) - pos_margin)
            elif y[i] != y[j]:
                neg.append(neg_margin - distance(e[i], e[j]))
    return mean_of_positive(pos) + mean_of_positive(neg)


def naive_triplet(e, y, _, margin):
    terms = []
    for a in range(len(e)):
        for p in range(len(e)):
            for n in range(len(e)):
                if a != p and y[a] == y[p] and y[a] != y[n]:
                    terms.append(distance(e[a], e[p]) - distance(e[a], e[n]) + margin)
    return mean_of_positive(terms)


def naive_multi_similarity(e, y, _, alpha, beta, base):
    total = 0.0
    for a in range(len(e)):
        pos = neg = 1.0
        for j in range(len(e)):
            if j != a and y[j] == y[a]:
                pos += math.exp(alpha * (base - dot(e[a], e[j])))
            elif y[j] != y[a]:
                neg += math.exp(beta * (dot(e[a], e[j]) - base))
        total += math.log(pos) / alpha + math.log(neg) / beta
    return total / len(e)


def cross_entropy(logits, label):
    top = max(logits)
    return top + math.log(sum(math.exp(z - top) for z in logits)) - logits[label]


def naive_arcface(e, y, w, margin, scale):
    total = 0.0
    for i in range(len(e)):
        angles = [math.acos(cosine(e[i], w[c])) for c in range(len(w))]
        angles[y[i]] += margin * math.pi / 180
        total += cross_entropy([scale * math.cos(angle) for angle in angles], y[i])
    return total / len(e)


def naive_normalized_softmax(e, y, w, temperature):
    rows = [[cosine(x, c) / temperature for c in w] for x in e]
    return sum(cross_entropy(row, label) for row, label in zip(rows, y)) / len(e)


NAIVE = {"contrastive": naive_contrastive, "triplet": naive_triplet, "arcface": naive_arcface,
         "multi_similarity": naive_multi_similarity, "normalized_softmax": naive_normalized_softmax}


def test_every_table_has_every_loss():
    """A new loss needs an entry in each, and an oracle here, in NAIVE."""
    assert set(LOSSES) == set(DISTANCES) == set(IMAGES_PER_CLASS)
    assert set(LOSSES) == set(NAIVE), "write an oracle: naive_<loss>(embeddings, labels, weight, **hparams)"
    assert set(CLASS_WEIGHTS) <= set(LOSSES)
    assert set(HPARAMS) == set(SPLITS) and all(set(HPARAMS[dataset]) <= set(LOSSES) for dataset in HPARAMS)
    for dataset, loss in ROWS:  # a class weight has a learning rate of its own
        assert ("lr_loss" in HPARAMS[dataset][loss]) == (loss in CLASS_WEIGHTS)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 2e-4)])
@pytest.mark.parametrize("dataset, loss", ROWS)
def test_every_row_of_hyper_parameters_against_nested_loops(dataset, loss, dtype, tolerance):
    plane = circle(0, 7, 15, 40, 41, 90, 180, 181, 275), torch.tensor([0, 0, 1, 1, 0, 2, 2, 1, 3])
    for embeddings, labels, weight in [(*plane, circle(3, 17, 200, 290) * 2), random_batch()]:
        hparams = HPARAMS[dataset][loss]
        naive = {name: value for name, value in hparams.items() if name != "lr_loss"}
        expected = NAIVE[loss](embeddings.tolist(), labels.tolist(), weight.tolist(), **naive)
        weight = weight.to(dtype) if loss in CLASS_WEIGHTS else None
        value = LOSSES[loss](embeddings.to(dtype), labels, weight, **hparams)
        assert value.shape == () and expected > 0
        assert value.item() == pytest.approx(expected, rel=tolerance, abs=tolerance)


MULTI_SIMILARITY = [math.log(2) / 2 + math.log(1 + math.exp(-6)) / 4, math.log(2) / 2 + math.log(1 + math.exp(-4)) / 4,
                    math.log(1 + math.exp(-6) + math.exp(-4)) / 4]
BY_HAND = [
    # At 0, 60 and 180 degrees, the distances are 1, 2 and the root of 3; one negative pair is inside the margin.
    ("contrastive", (0, 60, 180), [0, 0, 1], dict(pos_margin=0.25, neg_margin=1.9), 0.75 + 1.9 - math.sqrt(3)),
    # With a negative margin, as in CUB's row, a positive pair at distance 0 counts in the mean, otherwise not.
    ("contrastive", (0, 0, 120, 180), [0, 0, 1, 1], dict(pos_margin=-0.2, neg_margin=0), (0.2 + 1.2) / 2),
    ("contrastive", (0, 0, 120, 180), [0, 0, 1, 1], dict(pos_margin=0, neg_margin=0), 1.0),
    # Of the triplets 1 - 2 + 0.8 < 0 and 1 - sqrt(3) + 0.8 > 0, only the second one counts.
    ("triplet", (0, 60, 180), [0, 0, 1], dict(margin=0.8), 1.8 - math.sqrt(3)),
    # Cosines 0.5, -1 and -0.5; the third image has no positive, so nothing for that part.
    ("multi_similarity", (0, 60, 180), [0, 0, 1], dict(alpha=2, beta=4, base=0.5), sum(MULTI_SIMILARITY) / 3),
    # 30 degrees from its own class and 60 from the other: a margin of 30 makes them even.
    ("arcface", (30,), [0], dict(margin=30, scale=64), math.log(2)),
    # 170 + 20 degrees: cos 190, where the piecewise form of other implementations has another value.
    ("arcface", (170,), [0], dict(margin=20, scale=3),
     math.log(1 + math.exp(3 * math.cos(math.radians(80)) - 3 * math.cos(math.radians(190))))),
    ("normalized_softmax", (60,), [0], dict(temperature=0.5), math.log(1 + math.exp(math.sqrt(3) - 1))),
    # Batches without positive or negative pairs, and points at distance 0: nothing, or the margin of every pair.
    ("contrastive", (0, 80, 170, 260), [0, 1, 2, 3], HPARAMS["toy"]["contrastive"], 0.0),
    ("contrastive", (33, 33, 33, 33), [1, 1, 1, 1], HPARAMS["toy"]["contrastive"], 0.0),
    ("contrastive", (33, 33, 33, 33), [0, 0, 1, 1], HPARAMS["toy"]["contrastive"], 0.7),
    ("triplet", (0, 80, 170, 260), [0, 1, 2, 3], HPARAMS["toy"]["triplet"], 0.0),
    ("triplet", (0, 80, 170, 260), [2, 2, 2, 2], HPARAMS["toy"]["triplet"], 0.0),
    ("triplet", (33, 33, 33, 33), [0, 0, 1, 1], HPARAMS["toy"]["triplet"], 0.2),
    ("multi_similarity", (120,), [3], HPARAMS["toy"]["multi_similarity"], 0.0),
    ("multi_similarity", (33, 33, 33, 33), [1, 1, 1, 1], HPARAMS["toy"]["multi_similarity"],
     math.log(1 + 3 * math.exp(2 * -0.5)) / 2)]


@pytest.mark.parametrize("loss, degrees, labels, hparams, expected", BY_HAND)
def test_losses_by_hand(loss, degrees, labels, hparams, expected):
    """The class weights are at 0 and 90 degrees."""
    value = LOSSES[loss](circle(*degrees), torch.tensor(labels), circle(0, 90), **hparams)
    assert value.item() == pytest.approx(expected)


@pytest.mark.parametrize("loss", sorted(CLASS_WEIGHTS))
def test_class_weights_count_by_their_direction_only(loss):
    embeddings, labels, weight = random_batch()
    lengths = torch.linspace(0.01, 9, len(weight))[:, None]
    value, other = (LOSSES[loss](embeddings, labels, w, **HPARAMS["toy"][loss]).item()
                    for w in (weight, weight * lengths))
    assert value == pytest.approx(other, rel=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_against_finite_differences(loss):
    embeddings, labels, weight = random_batch(images=6, classes=3, width=4)
    embeddings.requires_grad_()
    if loss not in CLASS_WEIGHTS:
        assert torch.autograd.gradcheck(lambda e: LOSSES[loss](e, labels, None, **HPARAMS["toy"][loss]), embeddings)
    else:
        weight.requires_grad_()
        assert torch.autograd.gradcheck(
            lambda e, w: LOSSES[loss](e, labels, w, **HPARAMS["toy"][loss]), (embeddings, weight))


DEGENERATE = {
    "no positives": ([0, 1, 2, 3], [0, 80, 170, 260]), "no negatives, one class": ([2, 2, 2, 2], [0, 80, 170, 260]),
    "one point, one class": ([1, 1, 1, 1], [33, 33, 33, 33]), "one image": ([3], [120]),
    "one point, two classes": ([0, 0, 1, 1], [33, 33, 33, 33]), "opposite points": ([0, 1, 0, 1], [0, 180, 180, 0])}


@pytest.mark.parametrize("batch", DEGENERATE)
@pytest.mark.parametrize("dataset, loss", ROWS)
def test_degenerate_batches_are_finite_with_a_gradient(dataset, loss, batch):
    labels, degrees = DEGENERATE[batch]
    embeddings = circle(*degrees).float().requires_grad_()
    weight = circle(33, 120, 213, 0).float().requires_grad_() if loss in CLASS_WEIGHTS else None
    value = LOSSES[loss](embeddings, torch.tensor(labels), weight, **HPARAMS[dataset][loss])
    value.backward()
    assert value.isfinite() and value >= 0
    assert embeddings.grad.isfinite().all()
    assert weight is None or weight.grad.isfinite().all() and weight.grad.any()


def test_nzmean_leaves_out_zeros_and_survives_nothing():
    chosen = torch.tensor([True, True, True, False])
    assert nzmean(torch.tensor([-1.0, 3.0, 1.0, 7.0]), chosen).item() == 2.0
    terms = torch.zeros(4, requires_grad=True)
    nzmean(terms, chosen).backward()
    assert nzmean(terms, chosen).item() == 0.0 and terms.grad.isfinite().all()
    assert nzmean(torch.ones(4), ~chosen & chosen).item() == 0.0
