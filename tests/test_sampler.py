"""Batches of m images of each of their classes: each batch, and all of them in the long run."""

from collections import Counter

import numpy as np
import pytest

from bgbias import IMAGES_PER_CLASS, MPerClassSampler, UserError, make_sampler

SIZES = [1, 3, 4, 5, 9, 9, 20, 20, 20, 30]  # photos per class: some have fewer than m
LABELS = np.random.default_rng(0).permutation(np.repeat(3 * np.arange(len(SIZES)) + 2, SIZES))


@pytest.mark.parametrize("m, batch_size", [(4, 32), (4, 40), (1, 10), (1, 1), (8, 8), (5, 20), (4, 30)])
def test_every_batch(m, batch_size):
    """m images of each of its classes, which are distinct. The images of a class lie together."""
    sampler, size = MPerClassSampler(LABELS, m, batch_size), Counter(LABELS.tolist())
    for number in range(50):
        batch = sampler.batch((7, number))
        assert type(batch) is list and all(type(i) is int and 0 <= i < len(LABELS) for i in batch)
        rows = np.reshape(batch, (batch_size // m, m))
        assert (LABELS[rows] == LABELS[rows[:, :1]]).all() and len(set(LABELS[rows[:, 0]])) == len(rows)
        for own in rows:  # without replacement, unless there are too few
            assert len(set(own)) == m or size[LABELS[own[0]]] < m


def test_a_batch_is_a_function_of_its_seed():
    """An int or a tuple; whatever was drawn before, here, from another sampler or from NumPy."""
    seeds = [0, 1, (1, 2), (1, 3), (2, 1), (1, 2, 3), (2**40, 7)]
    sampler = MPerClassSampler(LABELS, 4, 16)
    batches = {seed: sampler.batch(seed) for seed in seeds}
    assert len({str(batch) for batch in batches.values()}) == len(seeds)
    np.random.seed(5)
    for seed in reversed(seeds):
        assert sampler.batch(seed) == batches[seed]
        assert MPerClassSampler(LABELS, 4, 16).batch(seed) == batches[seed]


def test_labels_may_be_any_sequence_of_integers():
    for labels in (LABELS.tolist(), tuple(LABELS.tolist()), LABELS.astype(np.int32)):
        assert MPerClassSampler(labels, 4, 16).batch(3) == MPerClassSampler(LABELS, 4, 16).batch(3)


def test_classes_and_their_images_are_equally_likely():
    """1,000 batches of 5 of 10 classes: 500 +- 16 for each class, whatever its size."""
    sampler = MPerClassSampler(LABELS, 2, 10)
    batches = [sampler.batch((1, number)) for number in range(1000)]
    classes = Counter(label for batch in batches for label in set(LABELS[batch].tolist()))
    assert len(classes) == len(SIZES) and all(420 < n < 580 for n in classes.values())
    images = Counter(i for batch in batches for i in batch)
    assert len(images) == len(LABELS)
    of_twenty = [images[i] for i in np.flatnonzero(LABELS == 3 * 6 + 2)]  # 2 of 20: 50 +- 7 each
    assert min(of_twenty) > 20 and max(of_twenty) < 80


def test_too_few_classes_are_an_error():
    with pytest.raises(ValueError):
        MPerClassSampler(LABELS, 4, 44).batch(0)


def batches_of(loss, batch_size, classes):
    """(classes, m) of the batches of a loss, for `classes` classes of 40 photos each."""
    labels = np.repeat(np.arange(classes), 40)
    sampler = make_sampler(labels, loss, batch_size)
    rows = np.reshape(sampler.batch(0), (-1, sampler.m))
    assert type(sampler) is MPerClassSampler and rows.size == sampler.batch_size <= batch_size
    assert len(np.unique(labels[rows])) == len(rows) and (labels[rows] == labels[rows[:, :1]]).all()
    return rows.shape


PAPER = {"contrastive": (8, 4), "triplet": (8, 4), "multi_similarity": (8, 4), "arcface": (32, 1),
         "normalized_softmax": (32, 1)}


@pytest.mark.parametrize("loss", IMAGES_PER_CLASS)
def test_batches_of_the_paper(loss):
    """Batches of 32: 8 classes x 4 images for pair losses, 32 x 1 for classification losses."""
    m = IMAGES_PER_CLASS[loss]
    assert batches_of(loss, 32, 74) == PAPER.get(loss, (32 // m, m))


@pytest.mark.parametrize("loss, batch_size, classes, expected", [
    ("triplet", 32, 8, (8, 4)), ("triplet", 32, 7, (7, 4)), ("triplet", 32, 3, (3, 10)), ("triplet", 30, 99, (7, 4)),
    ("triplet", 8, 99, (2, 4)), ("arcface", 32, 31, (31, 1)), ("arcface", 32, 10, (10, 3)), ("arcface", 2, 9, (2, 1))])
def test_with_few_classes_there_are_more_images_of_each(loss, batch_size, classes, expected):
    assert batches_of(loss, batch_size, classes) == expected


@pytest.mark.parametrize("loss, batch_size, classes", [
    ("triplet", 7, 50), ("arcface", 1, 50), ("triplet", 32, 1), ("arcface", 32, 1)])
def test_a_batch_without_two_classes_is_refused(loss, batch_size, classes):
    with pytest.raises(UserError, match=f"^--batch-size {batch_size}: "):
        batches_of(loss, batch_size, classes)
