"""The losses against nested loops, values worked by hand, and batches without pairs.

A new loss needs no change here: what holds for every loss is tested for it too. An oracle of its own in NAIVE,
naive_<loss>(embeddings, labels, weight, **hparams), is asked for, but not required.
"""

import inspect
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import bgbias
from bgbias import (
    DISTANCES, HPARAMS, IMAGES_PER_CLASS, LOSS_TABLE, LOSSES, SPLITS, hyper_parameters, mean_above_zero)

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = [(dataset, loss) for dataset in SPLITS for loss in LOSSES]


def has_class_weights(loss):
    """A loss has class weights if it takes their learning rate."""
    return "lr_loss" in hyper_parameters(loss, "toy")


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


def test_the_table_of_losses():
    """The dictionaries, which others import, hold its rows."""
    assert [*LOSSES] == [*DISTANCES] == [*IMAGES_PER_CLASS] == [function.__name__ for function, _, _ in LOSS_TABLE]
    assert {(LOSSES[loss], DISTANCES[loss], IMAGES_PER_CLASS[loss]) for loss in LOSSES} == {*LOSS_TABLE}
    assert set(NAIVE) <= set(LOSSES)
    for loss in LOSSES:
        assert DISTANCES[loss] in (bgbias.euclidean, bgbias.cosine) and IMAGES_PER_CLASS[loss] >= 1
    # Section 4 and the attention score's Section 5.
    for loss, distance, images in (
            ("contrastive", "euclidean", 4), ("triplet", "euclidean", 4), ("multi_similarity", "cosine", 4),
            ("arcface", "cosine", 1), ("normalized_softmax", "cosine", 1)):
        assert (DISTANCES[loss].__name__, IMAGES_PER_CLASS[loss]) == (distance, images)
        assert has_class_weights(loss) == (loss in ("arcface", "normalized_softmax"))


def test_hyper_parameters_are_the_defaults_of_the_function_unless_the_dataset_has_its_own(monkeypatch):
    def some_loss(embeddings, labels, weight=None, *, margin=0.5, power=3, lr_loss=0.25):
        """Only its signature counts."""

    monkeypatch.setitem(LOSSES, "some_loss", some_loss)
    defaults = dict(margin=0.5, power=3, lr_loss=0.25)
    assert all(hyper_parameters("some_loss", dataset) == defaults for dataset in (*SPLITS, "path/to/my_photos"))
    monkeypatch.setitem(HPARAMS["cub200"], "some_loss", dict(power=9))
    monkeypatch.setitem(HPARAMS["cars196"], "some_loss", dict(lr_loss=1e-3))
    assert hyper_parameters("some_loss", "cub200") == defaults | dict(power=9)
    assert hyper_parameters("some_loss", "sop") == defaults
    for dataset in ("cars196", "path/to/my_photos"):  # a folder takes those of cars196
        assert hyper_parameters("some_loss", dataset) == defaults | dict(lr_loss=1e-3)


@pytest.mark.parametrize("dataset", HPARAMS)
def test_rows_of_hyper_parameters_are_keyword_arguments_of_their_loss(dataset):
    assert dataset in SPLITS
    for loss, row in HPARAMS[dataset].items():
        assert row.keys() <= {parameter.name for parameter in inspect.signature(LOSSES[loss]).parameters.values()
                              if parameter.kind is parameter.KEYWORD_ONLY}
        assert hyper_parameters(loss, dataset) | row == hyper_parameters(loss, dataset)


def test_hyper_parameters_of_the_paper():
    """Two of each kind, from ../shared/paper.md; each paper's dataset and toy has all of the five losses."""
    assert HPARAMS["cub200"]["contrastive"] == dict(pos_margin=-0.19999999999999726, neg_margin=0.3841191369511769)
    assert HPARAMS["sop"]["arcface"] == dict(
        margin=18.63185573324141, scale=220.36285192573413, lr_loss=0.0020186601854510562)
    for dataset in SPLITS:
        assert NAIVE.keys() <= HPARAMS[dataset].keys()
        for loss in NAIVE:  # nothing is left to a default
            assert HPARAMS[dataset][loss] == hyper_parameters(loss, dataset)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 2e-4)])
@pytest.mark.parametrize("dataset, loss", [row for row in ROWS if row[1] in NAIVE])
def test_every_row_of_hyper_parameters_against_nested_loops(dataset, loss, dtype, tolerance):
    plane = circle(0, 7, 15, 40, 41, 90, 180, 181, 275), torch.tensor([0, 0, 1, 1, 0, 2, 2, 1, 3])
    for embeddings, labels, weight in [(*plane, circle(3, 17, 200, 290) * 2), random_batch()]:
        hparams = hyper_parameters(loss, dataset)
        naive = {name: value for name, value in hparams.items() if name != "lr_loss"}
        expected = NAIVE[loss](embeddings.tolist(), labels.tolist(), weight.tolist(), **naive)
        weight = weight.to(dtype) if has_class_weights(loss) else None
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


@pytest.mark.parametrize("loss", ["arcface", "normalized_softmax"])
def test_class_weights_count_by_their_direction_only(loss):
    embeddings, labels, weight = random_batch()
    lengths = torch.linspace(0.01, 9, len(weight))[:, None]
    value, other = (LOSSES[loss](embeddings, labels, w, **hyper_parameters(loss, "toy")).item()
                    for w in (weight, weight * lengths))
    assert value == pytest.approx(other, rel=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_against_finite_differences(loss):
    embeddings, labels, weight = random_batch(images=6, classes=3, width=4)
    embeddings.requires_grad_()
    hparams = hyper_parameters(loss, "toy")
    if not has_class_weights(loss):
        assert torch.autograd.gradcheck(lambda e: LOSSES[loss](e, labels, None, **hparams), embeddings)
    else:
        weight.requires_grad_()
        assert torch.autograd.gradcheck(lambda e, w: LOSSES[loss](e, labels, w, **hparams), (embeddings, weight))


DEGENERATE = {
    "no positives": ([0, 1, 2, 3], [0, 80, 170, 260]), "no negatives, one class": ([2, 2, 2, 2], [0, 80, 170, 260]),
    "one point, one class": ([1, 1, 1, 1], [33, 33, 33, 33]), "one image": ([3], [120]),
    "one point, two classes": ([0, 0, 1, 1], [33, 33, 33, 33]), "opposite points": ([0, 1, 0, 1], [0, 180, 180, 0])}
# A training may ask these of every loss: its batches have two classes, and its network can collapse.
POSSIBLE = "one point, two classes", "opposite points"


@pytest.mark.parametrize("dataset, loss, batch", [
    (*row, batch) for row in ROWS for batch in DEGENERATE if row[1] in NAIVE or batch in POSSIBLE])
def test_degenerate_batches_are_finite_with_a_gradient(dataset, loss, batch):
    labels, degrees = DEGENERATE[batch]
    embeddings = circle(*degrees).float().requires_grad_()
    weight = circle(33, 120, 213, 0).float().requires_grad_() if has_class_weights(loss) else None
    value = LOSSES[loss](embeddings, torch.tensor(labels), weight, **hyper_parameters(loss, dataset))
    value.backward()
    assert value.isfinite() and (value >= 0 or loss not in NAIVE)
    assert embeddings.grad.isfinite().all()
    assert weight is None or weight.grad.isfinite().all() and weight.grad.any()


def test_mean_above_zero_leaves_out_zeros_and_survives_nothing():
    chosen = torch.tensor([True, True, True, False])
    assert mean_above_zero(torch.tensor([-1.0, 3.0, 1.0, 7.0]), chosen).item() == 2.0
    terms = torch.zeros(4, requires_grad=True)
    mean_above_zero(terms, chosen).backward()
    assert mean_above_zero(terms, chosen).item() == 0.0 and terms.grad.isfinite().all()
    assert mean_above_zero(torch.ones(4), ~chosen & chosen).item() == 0.0


# ---- A new loss ----------------------------------------------------------------------------------


def proxy_anchor(embeddings, labels, weight, *, margin=0.1, alpha=32.0, lr_loss=0.5):
    """Kim et al. 2020, on proxies that occur in the batch and on all."""
    cosines = embeddings @ F.normalize(weight, dim=1).T
    own = F.one_hot(labels, len(weight)).bool()
    near = torch.where(own, (-alpha * (cosines - margin)).exp(), 0).sum(dim=0)
    far = torch.where(own, 0, (alpha * (cosines + margin)).exp()).sum(dim=0)
    return near.log1p().sum() / own.any(dim=0).sum() + far.log1p().mean()


def smoothed_pairs(embeddings, labels, weight=None, *, scale=8.0):
    """A pair loss without class weights."""
    assert weight is None
    same = (labels[:, None] == labels).to(embeddings)
    return F.binary_cross_entropy_with_logits(scale * (embeddings @ embeddings.T), same)


@pytest.fixture
def new_losses(monkeypatch):
    """As if LOSS_TABLE had two rows more."""
    for function, images in ((proxy_anchor, 2), (smoothed_pairs, 4)):
        monkeypatch.setitem(LOSSES, function.__name__, function)
        monkeypatch.setitem(DISTANCES, function.__name__, bgbias.cosine)
        monkeypatch.setitem(IMAGES_PER_CLASS, function.__name__, images)


@pytest.mark.parametrize("loss", ["proxy_anchor", "smoothed_pairs"])
@pytest.mark.parametrize("dataset", ["toy", "cub200", "folder"])
def test_a_new_loss_is_one_function_and_one_row(new_losses, shop, monkeypatch, dataset, loss):
    """It trains for two steps, with the settings of any dataset; the photos are those of the shop."""
    folder = str(shop / "shop")
    args = bgbias.parse_args([
        "--dataset", folder if dataset == "folder" else dataset, "--loss", loss, "--backbone", "smallconv",
        "--weights", "none", "--backgrounds", f"{folder}/backgrounds", "--image-size", "32", "--device", "cpu",
        "--workers", "0", "--epochs", "1", "--iterations", "2", "--batch-size", "8"])
    defaults = {"proxy_anchor": dict(margin=0.1, alpha=32.0, lr_loss=0.5), "smoothed_pairs": dict(scale=8.0)}[loss]
    assert args.hparams == defaults
    splits = bgbias.load_splits(folder)
    state = bgbias.State(args, classes=len(np.unique(splits["train"].labels)), weights="none")
    assert (state.class_weights is not None) == (loss == "proxy_anchor")
    before = [parameter.detach().clone() for parameter in state.network.parameters()]
    proxies = None if state.class_weights is None else state.class_weights.detach().clone()

    asked, real = [], bgbias.MPerClassSampler
    monkeypatch.setattr(bgbias, "MPerClassSampler", lambda *given: asked.append(given[1:]) or real(*given))
    bgbias.train(args, splits, state, shop / "run")
    assert asked == [(2, 6) if loss == "proxy_anchor" else (4, 8)]  # 3 classes, and 2: (m, size of a batch)
    assert state.finished_epochs == 1 and math.isfinite(state.history[1]["loss"]) and (shop / "run/best.pt").exists()
    assert not any(map(torch.equal, before, state.network.parameters()))
    assert proxies is None or not torch.equal(proxies, state.class_weights)
