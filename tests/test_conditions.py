"""What the conditions of the test measure, on photos with planted objects and backgrounds: all backgrounds are equal,
or they tell the class and the objects do not, or the other way round; and the numbers of run_test() against slow loops
over its embeddings."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import bgbias
from bgbias import EvaluationBatches, load_batches, run_test
from conftest import mean_of, naive_metrics, naive_query_metrics
from test_metrics import naive_fooled_and_confused

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE, CLASSES, PHOTOS = 32, 20, 8
LABELS = np.repeat(np.arange(CLASSES), PHOTOS)
LENT = "same_class", "any_class"
ON_OTHERS = "pasted", "same_class", "any_class"
KS = 1, 2, 4, 8


class MeanColour(torch.nn.Module):
    """A network that sees nothing but the mean colour of a picture."""

    def normalise(self, images):
        return images

    def forward(self, images):
        return images.mean((2, 3))


class Corner(MeanColour):
    """A network that sees only the background."""

    def forward(self, images):
        return images[:, :, 0, 0]


class Centre(MeanColour):
    """A network that sees only the object."""

    def forward(self, images):
        return images[:, :, images.shape[2] // 2, images.shape[3] // 2]


class Constant(MeanColour):
    """A network that sees nothing."""

    def forward(self, images):
        return torch.ones(len(images), 3)


def colours(seed, count, spread):
    return np.random.default_rng(seed).integers(128 - spread, 128 + spread, (count, 3))


def planted(objects, backgrounds, labels=LABELS, pool=None, seed=1, size=SIZE):
    """EvaluationBatches of photos with a square of the object's colour (N, 3) in their middle; `pool` is a list of
    colours."""
    photos, middle = np.empty((len(labels), 4, size, size), np.uint8), slice(size // 4, 3 * size // 4)
    photos[:, :3], photos[:, 3] = np.broadcast_to(backgrounds, (len(labels), 3))[..., None, None], 0
    photos[:, :3, middle, middle], photos[:, 3, middle, middle] = objects[..., None, None], 255
    if pool is not None:
        pool = [torch.tensor(colour, dtype=torch.uint8)[:, None, None].repeat(1, 40, 40) for colour in pool]
    return EvaluationBatches(torch.from_numpy(photos), labels, size, (seed, bgbias.TEST_SEED), bgbias.DRAWS, pool, LENT)


def arguments(batches):
    return SimpleNamespace(workers=0, device="cpu", dataset="planted",
                           reference="replaced" if batches.pool else "any_class")


def means_of(batches, network):
    """{condition: the mean metrics of its draws}, and the mean of fooled and of confused."""
    result, _ = run_test(network, batches, arguments(batches))
    means = {condition: {metric: np.mean([draw[metric] for draw in draws]) for metric in ("map@r", "recall@1")}
             for condition, draws in result["test"].items()}
    return means | {name: mean_of(result[name]) for name in ("fooled", "confused")}


# ---- Planted sets --------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", [None, [(200, 30, 90)]])
def test_on_one_background_all_conditions_are_equal(pool):
    """A network with random weights, and objects that differ within their class, too."""
    torch.manual_seed(0)
    objects = colours(0, CLASSES, 90)[LABELS] + colours(1, len(LABELS), 30) - 128
    found = means_of(planted(objects, np.array([200, 30, 90]), pool=pool), bgbias.Embedder("smallconv", "none", SIZE))
    assert 0.1 < found["clean"]["map@r"] < 0.9
    for condition in (*ON_OTHERS, *(("replaced", "query") if pool else ())):
        assert found[condition] == pytest.approx(found["clean"], abs=1e-9)
    assert ("replaced" in found) == bool(pool)
    # The impostor is as likely to be nearer in front of any background, because all are the same.
    assert found["fooled"] == pytest.approx(found["confused"], abs=1e-9) and 0 < found["fooled"] < 0.5


def test_classes_that_differ_only_in_their_background():
    """Another photo's background of the same class is as good as the own one, that of any other photo worth nothing."""
    found = means_of(planted(colours(0, len(LABELS), 60), colours(1, CLASSES, 100)[LABELS]), MeanColour())
    assert 0.5 < found["clean"]["map@r"] < 0.9 and found["background_only"] == {"map@r": 1, "recall@1": 1}
    for condition in ("pasted", "same_class"):
        assert found[condition] == pytest.approx(found["clean"], abs=0.02)
    for condition in ("any_class", "object_only"):
        assert found[condition]["map@r"] == pytest.approx(found["chance"]["map@r"], abs=0.01)


@pytest.mark.parametrize("condition", ON_OTHERS)
def test_classes_that_differ_only_in_their_object(condition):
    """Each photo has its own background, which tells nothing about the class; so do others. Means of five such sets."""
    sets = [means_of(planted(colours(seed, CLASSES, 120)[LABELS], colours(9 + seed, len(LABELS), 30)), MeanColour())
            for seed in range(5)]
    for metric, tolerance in (("map@r", 0.03), ("recall@1", 0.08)):
        clean, found, chance = (np.mean([some[name][metric] for some in sets])
                                for name in ("clean", condition, "chance"))
        assert found == pytest.approx(clean, abs=tolerance) and clean > 3 * chance


def chance_of(photos, n):
    """MAP@R of a random order of all other photos, for classes of n. The one at place i is right with probability
    R / (photos - 1), and then each one before it with (R - 1) / (photos - 2)."""
    R = n - 1
    return sum((1 + (i - 1) * (R - 1) / (photos - 2)) / i for i in range(1, R + 1)) / (photos - 1)


@pytest.mark.parametrize("classes", [2, 3, 6, 30])
def test_a_network_that_sees_only_backgrounds_scores_chance_on_any_class(classes):
    """Although they tell the class: they are the class's, plus a smaller deviation of each photo's own. Means of 20
    sets, within 3 points."""
    labels, found = np.repeat(np.arange(classes), PHOTOS), []
    for seed in range(20):
        backgrounds = colours(seed, classes, 120)[labels] + colours(100 + seed, len(labels), 4) - 128
        batches = planted(colours(200 + seed, len(labels), 100), backgrounds, labels, seed=seed, size=12)
        found.append(means_of(batches, Corner()))
    clean, same_class, any_class, chance = (
        np.mean([some[condition]["map@r"] for some in found])
        for condition in ("clean", "same_class", "any_class", "chance"))
    assert clean > 0.8 and same_class > 0.8
    assert any_class == pytest.approx(chance_of(len(labels), PHOTOS), abs=0.03)
    assert any_class == pytest.approx(chance, abs=0.03)


@pytest.mark.parametrize("R, others", [(1, 5), (4, 9), (7, 15)])
def test_the_closed_form_of_chance_against_all_orders(R, others):
    scores = []
    for places in itertools.combinations(range(1, others + 1), R):  # of the right photos
        scores.append(sum(hits / place for hits, place in enumerate(places, start=1) if place <= R) / R)
    assert chance_of(others + 1, R + 1) == pytest.approx(np.mean(scores))


@pytest.mark.parametrize("classes, photos, sets", [(2, 8, 40), (6, 5, 20), (30, 8, 1)])
def test_the_condition_chance_against_its_closed_form(classes, photos, sets):
    """Its seed is fixed, so the labels are shuffled for each set."""
    rng, count, draws = np.random.default_rng(0), classes * photos, []
    for _ in range(sets):
        labels = rng.permutation(np.repeat(np.arange(classes), photos))
        batches = planted(np.zeros((count, 3)), np.zeros(3), labels)
        draws += run_test(Constant(), batches, arguments(batches))[0]["test"]["chance"]
    assert len(draws) == 5 * sets
    assert np.mean([draw["map@r"] for draw in draws]) == pytest.approx(chance_of(count, photos), abs=0.02)


def test_fooled_and_confused_of_planted_networks():
    """0: only the object counts; 1: only the background, of which each photo has its own; exactly 1/2: nothing."""
    batches = planted(colours(0, CLASSES, 120)[LABELS], colours(1, len(LABELS), 120))
    for network, fooled, confused in ((Centre(), 0, 0), (Corner(), 1, None), (Constant(), 0.5, 0.5)):
        result, photos = run_test(network, batches, arguments(batches))
        assert result["fooled"] == pytest.approx([fooled] * 5, abs=1e-12)
        assert ((photos["fooled"] == 100 * fooled) | photos["fooled"].isnan()).all()
        if confused is not None:
            assert result["confused"] == pytest.approx([confused] * 5, abs=1e-12)
        else:  # elsewhere, the impostor's background is as near as that of a right photo
            assert np.mean(result["confused"]) == pytest.approx(0.5, abs=0.05)


# ---- The numbers of run_test ---------------------------------------------------------------------

GROUPS = {"three to a class": [0, 1, 2, 3] * 3, "many sizes": [0, 5, 5, 2, 5, 2, 7, 5, 2, 9],
          "two of each": [0, 0, 1, 1]}


def measured(labels, pool, seed=1):
    """(embeddings of the test, lenders, run_test's two results) of photos whose objects and backgrounds both tell the
    class somewhat."""
    rng, labels = np.random.default_rng(seed), np.array(labels)
    some = lambda spread: rng.integers(80, 175, (10, 3))[labels] + rng.integers(-spread, spread + 1, (len(labels), 3))
    batches = planted(some(60), some(60), labels, [*rng.integers(0, 256, (8, 3))] if pool else None, seed)
    network, args = MeanColour(), arguments(batches)
    embeddings = bgbias.embed(network, load_batches(batches, args), bgbias.all_views)
    return embeddings, batches.lender_indices(0), *run_test(network, batches, args)


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("name", GROUPS)
def test_every_condition_against_naive_loops(name, pool):
    """In `query`, only the query stands in front of another background; without a pool, the photo that lent it is not
    in the gallery, whatever its class."""
    labels = GROUPS[name]
    embeddings, lenders, result, _ = measured(labels, pool)
    clean, test = embeddings["clean"][0], result["test"]
    assert [*test] == ["clean", *(["replaced"] if pool else []), *LENT, "pasted", "object_only", "background_only",
                       "photo_and_object", "chance", "query"]
    assert {condition: len(draws) for condition, draws in embeddings.items()} == {
        "clean": 1, "pasted": 1, "object_only": 1, "background_only": 1, **({"replaced": 5} if pool else {}),
        "same_class": min(5, max(np.bincount(labels)) - 1), "any_class": min(5, len(labels) - 1)}
    for condition, draws in embeddings.items():
        assert test[condition] == [pytest.approx(naive_metrics(draw, labels, KS), abs=1e-6) for draw in draws]
    assert len(test["photo_and_object"]) == 1 and len(test["chance"]) == 5
    both = (clean + embeddings["object_only"][0]).double().numpy() / 2
    both /= np.sqrt((both ** 2).sum(axis=1, keepdims=True))
    assert test["photo_and_object"][0] == pytest.approx(naive_metrics(both, labels, KS), abs=1e-6)

    expected = []
    for k, draw in enumerate(embeddings["replaced" if pool else "any_class"]):
        values = naive_query_metrics(draw, labels, KS, clean, None if pool else lenders["any_class"][k])
        if not all(map(math.isnan, values["map@r"])):
            expected.append({metric: mean_of(column) for metric, column in values.items()})
    assert test["query"] == [pytest.approx(draw, abs=1e-6) for draw in expected]
    if name == "two of each":  # a draw in which each photo's lender is the other one of its class has no queries
        own = [all(np.array(labels)[draw] == labels) for draw in lenders["any_class"]]
        assert len(test["query"]) == (5 if pool else 3 - sum(own))


@pytest.mark.parametrize("seed", range(12))
def test_draws_without_queries_or_impostors_are_omitted(seed):
    """Of two pairs: within a random cycle of four, one draw of the three may go from each photo to its partner."""
    embeddings, lenders, result, photos = measured([0, 0, 1, 1], pool=False, seed=seed)
    partners = [draw.tolist() == [1, 0, 3, 2] for draw in lenders["any_class"]]
    assert len(lenders["any_class"]) == 3
    asked = 3 - sum(partners)
    assert len(result["test"]["query"]) == len(result["fooled"]) == len(result["confused"]) == asked
    assert len(result["test"]["any_class"]) == 3
    assert all(0 <= draw["map@r"] <= 1 for draws in result["test"].values() for draw in draws)
    assert not photos["fooled"].isnan().any()


def test_a_set_without_impostors_has_no_fooled():
    """Of one class."""
    _, _, result, photos = measured([0] * 6, pool=True)
    assert result["fooled"] == result["confused"] == [] and photos["fooled"].isnan().all()
    assert result["test"]["any_class"][0]["map@r"] == 1


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("name", GROUPS)
def test_fooled_and_confused_of_a_test_against_a_slow_loop(name, pool):
    """With a pool too, they stand in the draws of any_class."""
    labels = GROUPS[name]
    embeddings, lenders, result, photos = measured(labels, pool)
    tables = naive_fooled_and_confused(embeddings["clean"][0], embeddings["any_class"], labels, lenders["any_class"])
    for column, table in zip(("fooled", "confused"), tables):
        means = [mean_of(row) for row in table]
        assert result[column] == pytest.approx([mean for mean in means if not math.isnan(mean)], abs=1e-6)
        expected = [100 * mean_of(of_photo) for of_photo in zip(*table)]
        np.testing.assert_allclose(photos[column].numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("name", GROUPS)
def test_the_table_of_the_photos_against_naive_loops(name, pool):
    """Average precisions in %, means over the draws; the drop is that of the reference condition."""
    labels = GROUPS[name]
    embeddings, _, result, photos = measured(labels, pool)
    conditions = ["clean", "any_class", *(["replaced"] if pool else [])]
    assert [*photos] == [*conditions, "drop", "fooled", "confused"]
    expected = {}
    for condition in conditions:
        draws = [naive_query_metrics(draw, labels, KS)["map@r"] for draw in embeddings[condition]]
        expected[condition] = [100 * sum(of_photo) / len(draws) for of_photo in zip(*draws)]
        np.testing.assert_allclose(photos[condition].numpy(), expected[condition], atol=1e-4)
        mean = 100 * np.mean([draw["map@r"] for draw in result["test"][condition]])
        assert photos[condition].nanmean().item() == pytest.approx(mean, abs=1e-4)
    drop = np.subtract(expected["clean"], expected[conditions[-1]])
    np.testing.assert_allclose(photos["drop"].numpy(), drop, atol=1e-4)
    alone = np.bincount(labels)[labels] == 1
    assert all(np.isnan(values.numpy()[alone]).all() for values in photos.values())
    assert not np.isnan(photos["drop"].numpy()[~alone]).any()
