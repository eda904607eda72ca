"""What the conditions of the test measure, on photos with planted backgrounds: all are the same, or they tell the
class and the objects do not, or the other way round."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import bgbias

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE, CLASSES, PHOTOS = 32, 20, 8
LABELS = np.repeat(np.arange(CLASSES), PHOTOS)
ON_OTHERS = ("pasted", "same_class", "other_class", "replaced")


class MeanColour(torch.nn.Module):
    """A network that sees nothing but the mean colour of a picture."""

    def normalise(self, images):
        return images

    def forward(self, images):
        return images.mean((2, 3))


def colours(seed, count, spread):
    return np.random.default_rng(seed).integers(128 - spread, 128 + spread, (count, 3))


def run_test(objects, backgrounds, network):
    """{condition: the mean metrics of its draws} of photos with a square of the object's colour (N, 3) in their
    middle, on own backgrounds."""
    photos = np.empty((len(LABELS), 4, SIZE, SIZE), np.uint8)
    photos[:, :3], photos[:, 3] = np.broadcast_to(backgrounds, (len(LABELS), 3))[..., None, None], 0
    photos[:, :3, 8:24, 8:24], photos[:, 3, 8:24, 8:24] = objects[..., None, None], 255
    batches = bgbias.Batches(photos=torch.from_numpy(photos), labels=LABELS, size=SIZE, seed=(1, bgbias.TEST),
                             draws=bgbias.TEST_DRAWS)
    scores = bgbias.run_test(network, batches, SimpleNamespace(workers=0, device="cpu", dataset="planted"))
    return {condition: {metric: np.mean([draw[metric] for draw in draws]) for metric in ("map@r", "recall@1")}
            for condition, draws in scores.items()}


def test_on_one_background_all_conditions_are_equal():
    """A network with random weights, and objects that differ within their class, too."""
    torch.manual_seed(0)
    objects = colours(0, CLASSES, 90)[LABELS] + colours(1, len(LABELS), 30) - 128
    found = run_test(objects, np.array([200, 30, 90]), bgbias.Embedder("smallconv", "none", SIZE))
    assert 0.1 < found["clean"]["map@r"] < 0.9
    for condition in (*ON_OTHERS, "query"):
        assert found[condition] == pytest.approx(found["clean"], abs=1e-9)


def test_classes_that_differ_only_in_their_background():
    """Another photo's background of the same class is as good as the own one, that of another class worth nothing."""
    found = run_test(colours(0, len(LABELS), 60), colours(1, CLASSES, 100)[LABELS], MeanColour())
    assert 0.5 < found["clean"]["map@r"] < 0.9 and found["background_only"] == {"map@r": 1, "recall@1": 1}
    for condition in ("pasted", "same_class"):
        assert found[condition] == pytest.approx(found["clean"], abs=0.02)
    for condition in ("other_class", "replaced", "object_only"):
        assert found[condition]["map@r"] == pytest.approx(found["chance"]["map@r"], abs=0.01)


@pytest.mark.parametrize("condition", ON_OTHERS)
def test_classes_that_differ_only_in_their_object(condition):
    """Each photo has its own background, which tells nothing about the class; so do others. Means of five such sets."""
    sets = [run_test(colours(seed, CLASSES, 120)[LABELS], colours(9 + seed, len(LABELS), 30), MeanColour())
            for seed in range(5)]
    for metric, tolerance in (("map@r", 0.03), ("recall@1", 0.08)):
        clean, found, chance = (np.mean([some[name][metric] for some in sets])
                                for name in ("clean", condition, "chance"))
        assert found == pytest.approx(clean, abs=tolerance) and clean > 3 * chance
