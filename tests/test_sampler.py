"""Batches of m images of each of their classes: each batch, and all of them in the long run."""

from collections import Counter

import numpy as np
import pytest

from bgbias import CLASS_WEIGHTS, LOSSES, MPerClassSampler, UserError, images_per_class

SIZES = [1, 3, 4, 5, 9, 9, 20, 20, 20, 30]  # photos per class: some have fewer than m
LABELS = np.random.default_rng(0).permutation(np.repeat(3 * np.arange(len(SIZES)) + 2, SIZES))


@pytest.mark.parametrize("m, batch_size", [(4, 32), (4, 40), (1, 10), (1, 1), (8, 8), (5, 20)])
def test_every_batch(m, batch_size):
    sampler, size = MPerClassSampler(LABELS, m, batch_size), Counter(LABELS.tolist())
    for number in range(50):
        batch = sampler.batch((7, number))
        assert type(batch) is list and all(type(i) is int and 0 <= i < len(LABELS) for i in batch)
        images = {}
        for i in batch:
            images.setdefault(LABELS[i].item(), []).append(i)
        assert len(batch) == batch_size and len(images) == batch_size // m  # classes are distinct
        for label, own in images.items():
            assert len(own) == m
            assert len(set(own)) == m or size[label] < m  # without replacement, or too few


def test_the_images_of_a_class_lie_together():
    sampler = MPerClassSampler(LABELS, 4, 32)
    for batch in map(sampler.batch, range(20)):
        assert (LABELS[batch].reshape(8, 4) == LABELS[batch][::4, None]).all()


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


@pytest.mark.parametrize("m, batch_size", [(4, 30), (1, 11), (4, 44), (64, 32)])
def test_impossible_batches_are_refused(m, batch_size):
    with pytest.raises(ValueError, match=f"{batch_size} .*{m} .*10 "):
        MPerClassSampler(LABELS, m, batch_size)


def test_images_per_class_of_the_paper():
    """Batches of 32: 8 classes x 4 images for pair losses, 32 x 1 for classification losses."""
    assert {images_per_class(loss, 32, 74) for loss in set(LOSSES) - CLASS_WEIGHTS} == {4}
    assert {images_per_class(loss, 32, 74) for loss in CLASS_WEIGHTS} == {1}


@pytest.mark.parametrize("loss, batch_size, classes, m", [
    ("triplet", 32, 8, 4), ("triplet", 32, 7, 8), ("triplet", 32, 3, 16), ("triplet", 32, 1, 32),
    ("arcface", 32, 31, 2), ("arcface", 32, 10, 4), ("triplet", 30, 99, 5)])
def test_with_few_classes_there_are_more_images_of_each(loss, batch_size, classes, m):
    assert images_per_class(loss, batch_size, classes) == m
    batch = MPerClassSampler(np.arange(classes), m, batch_size).batch(0)
    assert len(batch) == batch_size  # and that is a batch it can draw


def test_a_batch_too_small_for_the_loss_is_refused():
    with pytest.raises(UserError, match="--batch-size 3: "):
        images_per_class("triplet", 3, 50)
