"""eval_attention.py: the score against masks worked out by hand, the map against one copy at a time,
runs from the command line to the table and the pictures, and the neighbours against a double loop."""

import itertools
import json
import os
import re
import shutil
import statistics
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image
from torch import nn

import bgbias
import eval_attention as ea
from conftest import pixels_of, result, scaled, slow_removal, write_shop

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = 16  # px of the crops
N = 44  # test images of the shop

# ---- Score ---------------------------------------------------------------------------------------

MAP = torch.tensor([[1.0, 3.0], [0.0, 4.0]])


@pytest.mark.parametrize("mask, score", [
    ([[0, 0], [0, 0]], 0.0),  # a = 0, p = 0
    ([[0, 1], [0, 1]], 0.75),  # a = 7/8, p = 1/2
    ([[1, 0], [1, 0]], -0.75),  # a = 1/8, p = 1/2
    ([[0.5, 0.5], [0.5, 0.5]], 0.0),  # as much as chance: a = p = 1/2
    ([[0, 0.5], [0.25, 1]], 0.25 / 0.5625),  # a = 5.5/8, p = 7/16
])
def test_score_of_hand_worked_masks(mask, score):
    found = ea.attention_score(MAP[None], torch.tensor(mask)[None, None])
    assert found.shape == (1,)
    assert found.item() == pytest.approx(score, abs=1e-12)


def test_score_is_undefined_for_full_masks_and_flat_maps():
    half = torch.tensor([[[[0.0, 1], [0, 1]]]])
    assert ea.attention_score(MAP[None], torch.ones(1, 1, 2, 2)).isnan().all()
    assert ea.attention_score(torch.zeros(1, 2, 2), half).isnan().all()


# ---- Map -----------------------------------------------------------------------------------------


@pytest.fixture
def small():
    """A network, two images and the embedding of black, in float64."""
    torch.manual_seed(3)
    model = nn.Sequential(bgbias.smallconv(), nn.Linear(128, 8)).double()
    images = 100 * torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64)
    return model, images, model(torch.zeros_like(images[:1])).detach()


def naive_map(model, image, black, metric, noise):
    """Section 5 with one backward pass for each copy, and NumPy for the rest."""
    total = np.zeros(image.shape[1:])
    sigma = 0.15 * (float(image.max()) - float(image.min()))
    for n in noise:
        copy = (image + sigma * n).requires_grad_()
        e = model(copy[None])[0]
        if metric == "euclidean":
            d = ((e - black[0]) ** 2).sum().sqrt()
        else:
            d = 1 - (e * black[0]).sum() / (e.norm() * black[0].norm())
        (d / 25).backward()
        total += np.abs((copy.grad[0] + copy.grad[1] + copy.grad[2]).numpy() / 3)
    return np.clip((total - total.min()) / (np.quantile(total, 0.99) - total.min()), 0, 1)


def naive_score(attention, mask):
    """(score, a, p) of arrays (S, S)."""
    a, p = (attention * mask).sum() / attention.sum(), mask.mean()
    return (a - p) / (1 - p) if p < 1 else np.nan, a, p


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_map_is_that_of_one_copy_at_a_time(small, metric):
    model, images, black = small
    generators = [torch.Generator().manual_seed(7) for _ in range(2)]
    found = ea.attention_map(model, images, black, getattr(bgbias, metric), generators[0])
    for image, attention in zip(images, found):
        noise = torch.randn(25, *image.shape, dtype=torch.float64, generator=generators[1])
        expected = naive_map(model, image, black, metric, noise)
        np.testing.assert_allclose(attention.numpy(), expected, rtol=1e-9, atol=1e-9)


def test_map_of_a_network_that_sees_nothing_is_flat(small):
    found = ea.attention_map(lambda x: 0 * x.flatten(1)[:, :8] + 1, small[1], torch.zeros(1, 8),
                             bgbias.euclidean, torch.Generator())
    assert (found == 0).all()


# ---- Runs ----------------------------------------------------------------------------------------

FULL, EMPTY = "c20/p2", "c21/p2"  # test images whose masks are full and empty in the test's crop
VARIANTS = "base", "bgaugment", "own"


def train(shop, runs, *flags):
    """A run of bgbias.py with a small network."""
    bgbias.main(["--dataset", str(shop), "--runs", str(runs), "--backbone", "smallconv", "--weights", "none",
                 "--image-size", str(SIZE), "--device", "cpu", *flags])


@pytest.fixture(scope="module")
def sellers(tmp_path_factory):
    """A folder with shop/ of 22 classes x 4 photos that look alike, 44 of them test images (two batches
    of the test), and three runs, base, BGAugment and own backgrounds, trained for two batches."""
    root = write_shop(tmp_path_factory.mktemp("sellers"), classes=22, suffix="png")
    for file in root.glob("shop/images/*/*.png"):
        with Image.open(file) as photo, Image.open(file.with_name("p0.png")) as first:
            Image.blend(photo, first, 0.5).save(file)
    for name, inside in ((FULL, 255), (EMPTY, 0)):  # a photo with a full or empty mask would be left out
        mask = Image.new("L", (40, 32), inside)
        mask.paste(255 - inside, (0, 0, 2, 32))  # a margin that the crop cuts off
        mask.save(root / f"shop/masks/{name}.png")
    for flags in ([], ["--bgaugment"], ["--bgaugment", "own"]):
        train(root / "shop", root / "runs", "--epochs", "1", "--iterations", "2", "--batch-size", "8", "--lr", "1e-3",
              *flags)
    return root


@pytest.fixture
def runs(sellers, tmp_path):
    """Copies of the three run folders, without attention scores."""
    folders = zip(sorted(sellers.glob("runs/*")), VARIANTS)
    return [shutil.copytree(run, tmp_path / name) for run, name in folders]


def load(folder):
    """The run as a new process loads it, which has read no file yet."""
    bgbias.file_checksum.cache_clear()
    bgbias.judge_mask.cache_clear()
    return ea.load_run(folder, "cpu")


@pytest.fixture
def base(runs):
    return load(runs[0])


@pytest.fixture(scope="module")
def images(sellers):
    """Test photos, masks in [0, 1] and draw 0 of the test's five backgrounds, (N, ., S, S)."""
    run = load(min(sellers.glob("runs/*")))
    batches = bgbias.make_evaluation_batches(run.args, run.split, "test", 5, ())
    backgrounds = torch.cat([batches[n].backgrounds[0] for n in range(2)]).float()
    photos, masks = (torch.stack([pixels_of(file, SIZE) for file in files]) for files in run.split[:2])
    return photos, masks / 255, backgrounds


def lent_backgrounds(images, labels, *, any_class):
    """Draw 0 of the test's lenders of 44 photos, and their photos with the object removed."""
    groups = [0] * len(labels) if any_class else labels
    lenders = bgbias.draw_test_lenders(groups, (42, bgbias.TEST_SEED, 0), 5)[0]
    removed = [slow_removal(images[0][k].numpy(), images[1][k, 0].numpy()) for k in lenders]
    return lenders, torch.tensor(np.array(removed)).float()


def replace(images, masks, backgrounds):
    return images * masks + backgrounds * (1 - masks)


def evaluate(*argv):
    bgbias.file_checksum.cache_clear()  # a new process
    bgbias.judge_mask.cache_clear()
    ea.main([*map(str, argv), "--device", "cpu"])


def change_args(folder, **args):
    content = result(folder)
    content["args"] |= args
    (folder / "result.json").write_text(json.dumps(content))


def saved_scores(folder, array="score"):
    """What is in attention.npz: {image: score}."""
    with np.load(folder / "attention.npz") as saved:
        return dict(zip(saved["image"].tolist(), saved[array].tolist()))


def other_of(row, labels):
    """The photo with the other mask: from this one on in the random order, the first of another class."""
    order = np.random.default_rng(103).permutation(len(labels)).tolist()
    place = order.index(row)
    return [k for k in order[place:] + order[:place] if labels[k] != labels[row]][0]


def rows_of_table(text):
    """The rows {column: cell} of a Markdown table, without empty cells."""
    columns, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]]
                         for line in text.splitlines() if line.startswith("|")]
    return [{column: cell for column, cell in zip(columns, row) if cell} for row in rows]


def slow_network(folder):
    """The weights in best.pt in float64: (B, 3, S, S) normalised -> (B, D)."""
    network = bgbias.Embedder("smallconv", "none", SIZE, result(folder)["args"]["embedding"])
    network.load_state_dict(torch.load(folder / "best.pt", weights_only=True)["network"])
    network.double()
    return lambda x: nn.functional.normalize(network.head(network.backbone(x)))


@torch.no_grad()
def slow_embeddings(folder, images):
    """Each of the images (N, 3, S, S) by itself: (N, D) float64."""
    network = slow_network(folder)
    return np.concatenate([network(scaled(image.double())[None]) for image in images])


# ---- Scores --------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_scores_of_a_run_are_those_of_one_image_at_a_time(base, images, monkeypatch, metric):
    """From the files, with the distance that bgbias.py gives for the loss."""
    monkeypatch.setitem(bgbias.DISTANCES, "contrastive", getattr(bgbias, metric))
    found, network = [*ea.score_run(base).values()], slow_network(base.folder)
    black = network(scaled(torch.zeros(1, 3, SIZE, SIZE).double())).detach()
    for row in (0, 17, 43):
        generator = torch.Generator().manual_seed(bgbias.seed_of(42, ea.NOISE_SEED, row))
        noise = torch.randn(25, 3, SIZE, SIZE, generator=generator)
        attention = naive_map(network, scaled(images[0][row].double()), black, metric, noise)
        mask, other = images[1][[row, other_of(row, base.split.labels)], 0].double().numpy()
        expected = naive_score(attention, mask)
        beyond = expected[0] - naive_score(attention, other)[0]
        assert abs(beyond) > 0.01
        assert found[row] == pytest.approx((*expected, beyond), abs=1e-3)


def test_scores_are_saved(runs, base):
    evaluate(runs[0])
    images = [str(path) for path in base.split.images]
    full, empty = (np.array([name in image for image in images]) for name in (FULL, EMPTY))
    with np.load(runs[0] / "attention.npz") as saved:
        score, a, p, beyond = saved["score"], saved["a"], saved["p"], saved["beyond"]
        assert saved["image"].tolist() == images and len(images) == N
    assert (np.isnan(score) == full).all() and full.sum() == 1 and p[full] == 1 and p[empty] == 0
    np.testing.assert_allclose(score[~full], ((a - p) / (1 - p + full))[~full])
    # bgbias.py --report finds them.
    columns = bgbias.read_result(runs[0])["columns"]
    np.testing.assert_array_equal(columns["attention"], score[~full])
    # Another photo may have the full mask as its other mask, for which there is no score.
    no_other = [other_of(row, base.split.labels) == full.argmax() for row in range(N)]
    assert (np.isnan(beyond) == full | no_other).all()
    np.testing.assert_array_equal(columns["beyond another mask"], beyond[np.isfinite(beyond)])


def test_another_mask_is_the_next_of_another_class():
    """In one order for all runs. The class of most photos must not be left without another one."""
    for labels in ([0, 1], [0] * 50 + [1], [0, 0, 1, 1, 2, 2, 2, 5, 5], np.random.default_rng(0).integers(3, size=80)):
        found = ea.other_masks(np.array(labels))
        assert found.tolist() == [other_of(row, labels) for row in range(len(labels))]
        assert all(labels[other] != labels[row] for row, other in enumerate(found))


def test_mask_of_is_the_mask_of_the_test(base, images):
    photos, _ = ea.collect_maps(base, range(N), ea.network_of(base))
    for row in (0, 17, 43):
        assert torch.equal(ea.mask_of(base, row), photos[row, 3] / 255)


LEFT = torch.arange(SIZE).expand(SIZE, SIZE) < SIZE // 2  # one half of an image


@pytest.mark.parametrize("attention, other, score, beyond", [
    (LEFT, ~LEFT, 1, 2),  # all on the object, where the other object is not: 1 - (-1)
    (~LEFT, ~LEFT, -1, -2),  # on the other mask only
    (LEFT, LEFT, 1, 0),  # all on the object, but both masks are the same
    (LEFT | ~LEFT, ~LEFT, 0, 0),  # everywhere
])
def test_beyond_of_planted_maps(base, monkeypatch, attention, other, score, beyond):
    """The mask of each photo is its left half."""
    photo = torch.cat([torch.zeros(3, SIZE, SIZE), 255 * LEFT[None]]).byte()
    monkeypatch.setattr(ea, "attention_maps", lambda run, rows, network: [(photo, attention.float())] * len(rows))
    monkeypatch.setattr(ea, "mask_of", lambda run, row: other.float())
    for values in ea.score_run(base, 3).values():
        assert (values.score, values.beyond) == pytest.approx((score, beyond), abs=1e-12)


def test_scores_do_not_depend_on_workers_or_batches(base, monkeypatch):
    rows, network = list(range(N)), ea.network_of(base)
    one = ea.collect_maps(base, rows, network)
    base.args.workers = 2
    for plain, parallel in zip(one, ea.collect_maps(base, rows, network)):
        assert torch.equal(plain, parallel)
    monkeypatch.setitem(ea.BATCH_PIXELS, "cpu", 3 * ea.COPIES * SIZE**2)  # 3 images instead of all
    photos, maps = ea.collect_maps(base, rows, network)
    assert torch.equal(photos, one[0])
    torch.testing.assert_close(maps, one[1], rtol=0, atol=1e-3)
    some = [40, 3, 41]
    torch.testing.assert_close(ea.collect_maps(base, some, network)[1], maps[some], rtol=0, atol=1e-3)


@pytest.fixture
def scored(monkeypatch):
    """The numbers of images whose maps were computed since the last look."""
    numbers, attention_maps = [], ea.attention_maps

    def watched(run, rows, network):
        numbers.append(len(rows))
        return attention_maps(run, rows, network)

    monkeypatch.setattr(ea, "attention_maps", watched)
    return numbers


def test_limit_scores_random_images(runs, capsys):
    evaluate(*runs, "--limit", "5")
    assert [row["images"] for row in rows_of_table(capsys.readouterr().out)] == ["5", "5", "5"]
    base, other, _ = (saved_scores(run) for run in runs)
    beyond = saved_scores(runs[0], "beyond")
    (runs[0] / "attention.npz").unlink()
    everything = ea.score_run(load(runs[0]))
    assert base.keys() == other.keys() and base.keys() < everything.keys() and len(base) == 5
    assert base.keys() != {*[*everything][:5]}
    for image in base:
        found = base[image], beyond[image]
        assert found == pytest.approx((everything[image].score, everything[image].beyond), abs=1e-3, nan_ok=True)


def test_a_larger_limit_scores_again_and_a_smaller_one_uses_what_is_there(runs, capsys, scored):
    steps = (5, [5], 5), (3, [], 5), (5, [], 5), (7, [7], 7), (None, [N], N - 1), (5, [], N - 1)
    for limit, expected, images in steps:
        evaluate(runs[0], *(["--limit", limit] if limit else []))
        row, = rows_of_table(capsys.readouterr().out)
        assert scored == expected and row["images"] == str(images), limit
        found = bgbias.read_result(runs[0])  # as the report has it; the score of one photo is undefined
        assert len(found["columns"]["attention"]) == images and found["scored"] == images + (images == N - 1)
        in_report = bgbias.table_row("", [found], ["attention"])["attention"]
        assert in_report == f"{row['attention']} ({images} photos)"
        scored.clear()


def age(path, days):
    """Changes the date of a file by so many days."""
    seconds = path.stat().st_mtime + days * 86400
    os.utime(path, (seconds, seconds))


def test_scores_of_another_checkpoint_and_of_the_same_one(runs, base):
    """Dates say nothing: a copy of a run has new ones, and an archive has old ones."""
    ea.score_run(base)
    file, best = runs[0] / "attention.npz", runs[0] / "best.pt"
    with np.load(file) as saved:
        content = dict(saved)
    np.savez(file, **content | {"score": np.full(N, 0.625)})
    age(best, +9)
    assert {values.score for values in ea.score_run(load(runs[0])).values()} == {0.625}  # these are used
    best.write_bytes((runs[1] / "best.pt").read_bytes())
    age(best, -9)
    other = ea.score_run(load(runs[1]))
    np.testing.assert_array_equal([*ea.score_run(load(runs[0])).values()], [*other.values()])


def test_scores_of_other_masks(runs, sellers, tmp_path, capsys):
    """Where a mask is inverted, a becomes 1 - a and p becomes 1 - p. That the data changed is printed."""
    shutil.copytree(sellers / "shop", tmp_path / "shop")
    change_args(runs[0], dataset=str(tmp_path / "shop"), backgrounds=str(tmp_path / "shop/backgrounds"))
    run = load(runs[0])
    before = np.array([*ea.score_run(run).values()])
    mask = run.split.masks[3]
    Image.fromarray(255 - np.asarray(Image.open(mask))).save(mask, compress_level=0)
    age(mask, -9)
    assert str(runs[0]) not in capsys.readouterr().out
    after = np.array([*ea.score_run(load(runs[0])).values()])
    assert str(runs[0]) in capsys.readouterr().out
    np.testing.assert_allclose(after[3, 1:3], 1 - before[3, 1:3], atol=1e-3)
    assert abs(after[3, 0] - before[3, 0]) > 0.01
    changed = [row == 3 or other_of(row, run.split.labels) == 3 for row in range(N)]
    np.testing.assert_array_equal((after != before)[:, 3] & ~np.isnan(before[:, 3]), changed)
    np.testing.assert_array_equal(np.delete(after, 3, 0)[:, :3], np.delete(before, 3, 0)[:, :3])


def test_attention_decodes_no_background(runs, monkeypatch):
    """Scores need neither the pool nor lenders."""
    monkeypatch.setattr(bgbias, "list_backgrounds", None)
    monkeypatch.setattr(bgbias, "draw_test_lenders", None)
    assert len(ea.score_run(load(runs[0]), 3)) == 3


# ---- Table ---------------------------------------------------------------------------------------


def scores_of(values):
    """{image: Score} of {image: score}."""
    return {image: ea.Score(score, 0, 0, score / 2) for image, score in values.items()}


def test_compare():
    rng = np.random.default_rng(0)
    base, gain = rng.normal(size=200), rng.normal(0.2, 1, 200)
    before, after = (dict(enumerate(scores)) for scores in (base, base + gain))
    before["full"] = after["full"] = np.nan
    before["only here"] = 9.0
    mean, low, high, improved, images = ea.compare(scores_of(before), scores_of(after))
    assert mean == pytest.approx(gain.mean()) and images == 200
    assert improved == (gain > 0).sum() / 200
    known = scipy.stats.bootstrap((gain,), np.mean, method="percentile", rng=1)
    assert (low, high) == pytest.approx(tuple(known.confidence_interval), abs=0.02)
    assert ea.compare(scores_of({"a": 0.1}), scores_of({"b": 0.2})) is None
    assert ea.compare(scores_of({"a": np.nan}), scores_of({"a": 0.2})) is None


def a_run(flags="", folder="runs/x", tested="toy"):
    return ea.Run(Path(folder), bgbias.parse_args(flags.split()), None, tested, "checksum")


def test_group_runs():
    base, pool, own = a_run(), a_run("--bgaugment"), a_run("--bgaugment own")
    for order in itertools.permutations([base, pool, own]):
        group, = ea.group_runs(order)
        assert [*group.items()] == [("base", base), ("BGAugment", pool), ("own backgrounds", own)]
    assert ea.group_runs([own, pool]) == [{"BGAugment": pool, "own backgrounds": own}]
    for unlike in (a_run("--bgaugment --seed 1"), a_run("--bgaugment --loss triplet"),
                   a_run("--bgaugment --lr 1"), a_run("--bgaugment --epochs 9"),
                   a_run("--bgaugment --select clean"),  # without the flag, the defaults differ too
                   a_run("--bgaugment", tested="other photos"), a_run("--bgaugment", "elsewhere/x")):
        assert ea.group_runs([unlike, base]) == [{"base": base}, {"BGAugment": unlike}]
    both = a_run("--select clean"), a_run("--bgaugment --select clean")
    assert len(ea.group_runs(both)) == 2  # for base it is the default, which is no setting
    assert len(ea.group_runs([a_run("--select replaced"), a_run("--bgaugment own --select replaced")])) == 1
    copy = a_run(folder="runs/copy")
    assert ea.group_runs([base, copy, pool]) == [{"base": base, "BGAugment": pool}, {"base": copy}]


def test_a_measured_run_is_compared_with_no_trained_one():
    """It is tested on the same photos, and has the flags of a base run."""
    measured, on_all = a_run("--measure"), a_run("--measure all")
    runs = [a_run("--bgaugment"), measured, a_run(), on_all]
    trained = {"base": runs[2], "BGAugment": runs[0]}
    assert ea.group_runs(runs) == [{"as it is": measured}, {"as it is": on_all}, trained]


def test_table(runs, capsys):
    evaluate(*runs[::-1])  # the order does not matter
    out = capsys.readouterr().out
    rows = rows_of_table(out)
    assert [row[""] for row in rows] == [*VARIANTS]
    base, *others = scores = [[x for x in saved_scores(run).values() if np.isfinite(x)] for run in runs]
    for run, row, values in zip(runs, rows, scores):
        assert row["images"] == str(len(values))
        beyond = [x for x in saved_scores(run, "beyond").values() if np.isfinite(x)]
        assert row["attention"] == f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
        assert row["beyond another mask"] == f"{statistics.mean(beyond):.2f} ± {statistics.stdev(beyond):.2f}"
    assert not {"over base [95 %]", "images improved"} & rows[0].keys()
    for row, other in zip(rows[1:], others):
        gains = [after - before for before, after in zip(base, other)]
        gain, low, high = map(float, re.findall(r"[+-]\d\.\d+", row["over base [95 %]"]))
        assert gain == pytest.approx(statistics.mean(gains), abs=6e-4) and low < gain < high
        assert row["images improved"] == f"{100 * sum(g > 0 for g in gains) / len(gains):.0f} % of {N - 1}"
    assert others[0] != others[1]
    assert "nan" not in out and out.count(FULL) == 3 and EMPTY not in out  # an undefined score is named


def test_gain_of_runs_that_are_scored_on_other_numbers_of_images(runs, capsys):
    """It rests on the images that both have."""
    ea.score_run(load(runs[1]))
    evaluate(*runs[:2], "--limit", "4")
    rows = rows_of_table(capsys.readouterr().out)
    assert [row["images"] for row in rows] == ["4", str(N - 1)]
    assert rows[1]["images improved"].endswith("of 4")


def test_table_beside_the_papers():
    run = a_run("--dataset cub200 --loss triplet")
    ours, papers = rows_of_table(ea.score_table([{"base": run}], {run.folder: scores_of({"a": 0.25, "b": 0.5})}))
    assert (ours["images"], ours["attention"], ours["beyond another mask"]) == ("2", "0.38 ± 0.18", "0.19 ± 0.09")
    assert papers == {"": "paper", "attention": "0.24 ± 0.08"}


# ---- Can the score be believed? ------------------------------------------------------------------


@pytest.fixture(scope="module")
def poolless(sellers, tmp_path_factory):
    """The same shop without a pool, measured with random weights. It is not changed by any test."""
    root = tmp_path_factory.mktemp("poolless")
    shutil.copytree(sellers / "shop", root / "shop", ignore=shutil.ignore_patterns("backgrounds"))
    train(root / "shop", root / "runs", "--measure")
    return load(*root.glob("runs/*"))


@pytest.fixture(scope="module")
def any_class(poolless, images):
    """The lenders of draw 0 of any_class, and their photos with the object removed."""
    return lent_backgrounds(images, poolless.split.labels, any_class=True)


def test_sanity(runs, base, images, capsys):
    evaluate(runs[0], "--sanity")
    row, = rows_of_table(capsys.readouterr().out.split("\n\n")[-1])
    masks = images[1][:, 0].double().numpy()
    complement = [naive_score(mask < 0.5, mask >= 0.5)[0] for mask in masks if mask.min() < 0.5]
    expected = {"mask as map": 1, "its complement": np.mean(complement)}
    for title, trained in (("score", True), ("random weights", False)):
        maps = ea.collect_maps(base, range(N), ea.network_of(base, trained=trained))[1].double().numpy()
        own = [naive_score(maps[i], masks[i])[0] for i in range(N)]
        other = [naive_score(maps[i], masks[other_of(i, base.split.labels)])[0] for i in range(N)]
        expected[title] = np.nanmean(own)
        expected[f"{title}: beyond another mask"] = np.nanmean(np.subtract(own, other))
    background, object_, p = ea.occlusion(base, ea.network_of(base), range(N)).double().numpy()
    expected |= {"background replaced": background.mean(), "object replaced": object_.mean()}
    scores = [(o / (o + b) - q) / (1 - q) for b, o, q in zip(background, object_, p) if q < 1]
    expected["occlusion"] = np.mean(scores)
    assert row.pop("") == "base"
    assert {title: float(value) for title, value in row.items()} == pytest.approx(expected, abs=6e-4)


def test_occlusion(base, images):
    """Distances between the embeddings of images, one at a time."""
    photos, masks, backgrounds = images
    e = slow_embeddings(base.folder, photos)
    found = ea.occlusion(base, ea.network_of(base), range(N)).numpy()
    changes = replace(photos, masks, backgrounds), replace(backgrounds, masks, photos)
    for distances, changed in zip(found, changes):
        expected = np.linalg.norm(e - slow_embeddings(base.folder, changed), axis=1)
        np.testing.assert_allclose(distances, expected, atol=1e-4)
    np.testing.assert_allclose(found[2], masks.mean((1, 2, 3)), atol=1e-6)
    some = ea.occlusion(base, ea.network_of(base), [40, 3])  # on the same backgrounds
    np.testing.assert_allclose(some, found[:, [40, 3]], atol=1e-4)


def test_occlusion_without_a_pool(poolless, images, any_class):
    """With the background of the lender, whose object is removed."""
    (photos, masks, _), (_, backgrounds) = images, any_class
    e = slow_embeddings(poolless.folder, photos)
    found = ea.occlusion(poolless, ea.network_of(poolless), range(N)).numpy()
    changes = replace(photos, masks, backgrounds), replace(backgrounds, masks, photos)
    for distances, changed in zip(found, changes):
        expected = np.linalg.norm(e - slow_embeddings(poolless.folder, changed), axis=1)
        assert expected.max() > 0.01
        np.testing.assert_allclose(distances, expected, atol=1e-4)


def test_sanity_without_a_pool(poolless, capsys):
    evaluate(poolless.folder, "--sanity")
    row, = rows_of_table(capsys.readouterr().out.split("\n\n")[-1])
    assert float(row["background replaced"]) > 0.01


# ---- Neighbours ----------------------------------------------------------------------------------


def slow_neighbours(queries, gallery, lenders=None):
    """For query i the five nearest of the gallery except i and its lender, in a double loop."""
    found = []
    for i, query in enumerate(queries):
        nobody = {i} if lenders is None else {i, lenders[i]}
        others = [(((query - other) ** 2).sum(), j) for j, other in enumerate(gallery) if j not in nobody]
        found.append([j for _, j in sorted(others)[:5]])
    return np.array(found)


@pytest.fixture(scope="module")
def slow(sellers, images):
    """For each of the three runs {"clean", "replaced": (N, 5) the nearest clean photos}."""
    found = []
    for folder in sorted(sellers.glob("runs/*")):
        clean, replaced = (slow_embeddings(folder, x) for x in (images[0], replace(*images)))
        found.append({"clean": slow_neighbours(clean, clean), "replaced": slow_neighbours(replaced, clean)})
    return found


def batches_of(run):
    """All test photos, on draw 0 of the reference condition."""
    lent = ("any_class",) if run.args.reference == "any_class" else ()
    return bgbias.make_evaluation_batches(run.args, run.split, "test", 1, lent)


def nearest(run, rows):
    return ea.nearest(run, batches_of(run), rows)


def test_nearest_is_a_double_loop(runs, slow):
    """Its first neighbours are those that Recall@1 of the run counts."""
    for folder, expected in zip(runs, slow):
        run = load(folder)
        found, some = nearest(run, list(range(N))), nearest(run, [40, 3, 33])
        test, labels = result(folder)["test"], run.split.labels
        assert found.keys() == {"clean", "replaced"}
        for condition, metrics in (("clean", test["clean"][0]), ("replaced", test["query"][0])):
            np.testing.assert_array_equal(found[condition], expected[condition])
            np.testing.assert_array_equal(some[condition], expected[condition][[40, 3, 33]])
            right = labels[expected[condition][:, 0]] == labels
            assert 0.02 < right.mean() < 0.98
            assert right.mean() == pytest.approx(metrics["recall@1"], abs=1e-12)


@pytest.fixture(scope="module")
def slow_poolless(poolless, images, any_class):
    """{"clean", "any_class": (N, 5) the nearest clean photos}; nobody finds the lender."""
    lenders, backgrounds = any_class
    clean, queries = (slow_embeddings(poolless.folder, x) for x in (images[0], replace(*images[:2], backgrounds)))
    staying = slow_neighbours(queries, clean)
    assert (staying == lenders[:, None]).any(axis=1).mean() > 0.2  # otherwise it would matter little
    return {"clean": slow_neighbours(clean, clean), "any_class": slow_neighbours(queries, clean, lenders)}


def test_lenders_leave_the_gallery(poolless, any_class, slow_poolless):
    """As in the run, whose Recall@1 counts the first neighbours."""
    rows, labels, test = list(range(N)), poolless.split.labels, result(poolless.folder)["test"]
    found, some = nearest(poolless, rows), nearest(poolless, [40, 3, 33])
    assert found.keys() == {"clean", "any_class"}
    for condition, metrics in (("clean", test["clean"][0]), ("any_class", test["query"][0])):
        np.testing.assert_array_equal(found[condition], slow_poolless[condition])
        np.testing.assert_array_equal(some[condition], slow_poolless[condition][[40, 3, 33]])
        right = labels[found[condition][:, 0]] == labels
        assert 0.02 < right.mean() < 0.98
        assert right.mean() == pytest.approx(metrics["recall@1"], abs=1e-12)


@pytest.mark.parametrize("reference, expected", [("replaced", [0, 1, 4]), ("any_class", [1, 4])])
def test_a_query_without_a_right_photo_is_not_misled(reference, expected):
    """The lender of photo 0 is the only other one of its class. Photo 2 is right, photo 3 is so nowhere."""
    lenders = np.array([[1, 2, 0, 5, 3, 4]])
    batches = Namespace(labels=torch.tensor([0, 0, 1, 1, 1, 2]), lender_indices=lambda: {"any_class": lenders})
    near = {"clean": torch.tensor([[1], [0], [3], [0], [2]]), reference: torch.tensor([[2], [2], [4], [0], [0]])}
    run = Namespace(args=Namespace(reference=reference))
    assert ea.find_misled(run, batches, [0, 1, 2, 3, 4], near) == expected


def test_few_photos_have_fewer_neighbours(base, poolless):
    four = base._replace(split=bgbias.Split(*(values[:4] for values in base.split)))
    found = nearest(four, [0, 3])["replaced"]
    assert [sorted(row) for row in found.tolist()] == [[1, 2, 3], [0, 1, 2]]
    four = poolless._replace(split=four.split)
    lenders = batches_of(four).lender_indices(epoch=0)["any_class"][0]
    found = nearest(four, [0, 3])["any_class"]
    assert [{*row} for row in found.tolist()] == [{0, 1, 2, 3} - {q, lenders[q]} for q in (0, 3)]


# ---- Pictures ------------------------------------------------------------------------------------


def cells_of(file, columns, captions):
    """The cells of a picture, (rows, columns, px, px, 3), 5 px apart, and the labels of 26 px above them, both (rows,
    columns, ...). `captions` says how many lines of 32 px stand above the labels of each row."""
    picture, px, top, rows, labels = np.asarray(Image.open(file)), 905 // columns - 5, 0, [], []
    for lines in captions:
        for _ in range(lines):
            assert (picture[top:top + 32].min(axis=2) < 100).any()  # it is written there
            top += 32
        label, row, gap = np.split(picture[top:], [26, 26 + px])
        assert (gap[:5] == 255).all()
        lefts = range(0, columns * (px + 5), px + 5)
        rows.append([row[:, left:left + px] for left in lefts])
        labels.append([label[:, left:left + px + 5] for left in lefts])
        top += 26 + px + 5
    assert top == len(picture)
    return np.array(rows), np.array([[label[:, :px] for label in row] for row in labels])


def enlarged(pixels, px):
    """The picture of pixels (C, S, S)."""
    return ea.TF.to_pil_image(pixels.round().byte()).convert("RGB").resize((px, px), Image.LANCZOS)


def unlike(cell, picture):
    """How far a cell is from a picture, without its frame. Nothing is written on it."""
    return np.median(np.abs(cell - np.asarray(picture, float))[5:-5, 5:-5].max(axis=2))


def is_written(label):
    return (label.min(axis=2) < 128).any()


@pytest.fixture
def drawn(monkeypatch):
    """The rows (caption, cells) of the pictures that are drawn."""
    rows, draw_grid = [], ea.draw_grid

    def watched(lines, columns, file):
        rows[:] = lines
        draw_grid(lines, columns, file)

    monkeypatch.setattr(ea, "draw_grid", watched)
    return rows


GREEN, ORANGE = (0, 158, 115), (213, 94, 0)


def check_neighbours(cells, shown, query, near, run, photos):
    """The cells and labels of one run's row: the neighbours in their order, their classes, and in the caption how
    many are right; in frames that say so. near: {"clean", "replaced" or "any_class": (N, 5)}."""
    labels, (caption, drawn), new = run.split.labels, shown, run.args.reference
    hits = {condition: labels[found[query]] == labels[query] for condition, found in near.items()}
    numbers = [tuple(map(int, found)) for found in re.findall(r"(\d) of (\d)", caption)]
    assert numbers == [(hits[new].sum(), 5), (hits["clean"].sum(), 5)]
    for cell, (_, label, _), k, hit in zip(cells[-5:], drawn[-5:], near[new][query], hits[new]):
        assert unlike(cell, photos[k]) < 2 < unlike(cell, photos[(k + 4) % N])
        frame = np.concatenate([cell[0], cell[4], cell[-1], cell[:, 0], cell[:, -1]])
        assert (frame == (GREEN if hit else ORANGE)).all()
        assert label == run.split.images[k].parent.name
    return hits[new].tolist()


def test_neighbours_picture(runs, base, images, slow, drawn, tmp_path):
    """The query on its own, on lent and on new backgrounds, and per run its neighbours in their order, in frames that
    say whether their class is the query's."""
    evaluate(*runs, "--neighbours", tmp_path / "a.png", "--images", "6")
    cells, written = cells_of(tmp_path / "a.png", 10, [2, 1, 1] * 6)
    photos, queries, right = [enlarged(x, 85) for x in images[0]], ea.shuffled(base)[:6], []
    labels = base.split.labels
    lent = [lent_backgrounds(images, labels, any_class=any_class)[1] for any_class in (False, True)]
    assert queries != sorted(queries)
    for n, query in enumerate(queries):
        image, mask = images[0][query], images[1][query]
        removed = torch.from_numpy(slow_removal(image.numpy(), mask[0].numpy()))
        versions = [image, *(replace(image, mask, other[query]) for other in ([removed] * N, *lent, images[2]))]
        assert all(unlike(cell, enlarged(x, 85)) < 2 for cell, x in zip(cells[3 * n], versions))
        assert all(map(is_written, written[3 * n]))
        shown = [label for _, label, _ in drawn[3 * n][1][:5]]
        assert shown == ["query", "pasted", "same class", "any class", "replaced"]
        assert "/".join(base.split.images[query].parts[-2:]) in drawn[3 * n][0]
        for k in (3 * n + 1, 3 * n + 2):
            assert (cells[k][:5] == 255).all() and (written[k][:5] == 255).all()  # the query is shown once
        for row, shown, near, title in zip(cells[3 * n:], drawn[3 * n:], slow, ea.TITLES.values()):
            right += check_neighbours(row, shown, query, near, base, photos)
            assert f"{title}: " in shown[0]
    assert 0 < sum(right) < len(right)  # both occur above
    assert not list(tmp_path.glob("*/attention.npz"))


def test_neighbours_picture_without_a_pool(poolless, images, any_class, slow_poolless, drawn, tmp_path):
    """The last version is that on the background of any class, and what the neighbours belong to."""
    evaluate(poolless.folder, "--neighbours", tmp_path / "a.png", "--images", "4")
    cells, _ = cells_of(tmp_path / "a.png", 9, [2] * 4)
    photos = [enlarged(x, 95) for x in images[0]]
    for n, query in enumerate(ea.shuffled(poolless)[:4]):
        assert [label for _, label, _ in drawn[n][1][:4]] == ["query", "pasted", "same class", "any class"]
        version = replace(images[0][query], images[1][query], any_class[1][query])
        assert unlike(cells[n, 3], enlarged(version, 95)) < 2
        check_neighbours(cells[n], drawn[n], query, slow_poolless, poolless, photos)


def test_long_labels_are_cut():
    font = ea.ImageFont.load_default(ea.LABEL)
    assert ea.shortened("short", font, 85) == "short"
    name = "001.Black_footed_Albatross"
    cut = ea.shortened(name, font, 85)
    head, tail = cut.split("…")
    assert name.startswith(head) and name.endswith(tail) and len(head) - len(tail) in (0, 1) and len(tail) > 3
    longer = len(tail) + (len(head) > len(tail))  # with one more letter
    assert font.getlength(cut) <= 85 < font.getlength(f"{name[:len(cut) - longer]}…{name[-longer:]}")


@pytest.mark.parametrize("pool", [True, False])
def test_worst_neighbours_are_misled_by_the_new_background(runs, poolless, slow, slow_poolless, drawn, tmp_path, pool):
    """The base run's nearest is right on the query's own background and wrong on the new one."""
    run, near = (load(runs[0]), slow[0]) if pool else (poolless, slow_poolless)
    folders, labels = runs if pool else [run.folder], run.split.labels
    right = {condition: labels[found[:, 0]] == labels for condition, found in near.items()}
    misled = [row for row in ea.shuffled(run) if right["clean"][row] and not right[run.args.reference][row]]
    assert 2 < len(misled) < 40
    for count in (N, 2):
        evaluate(*folders, "--neighbours", tmp_path / "a.png", "--images", count, "--worst")
        names = ["/".join(run.split.images[row].parts[-2:]) for row in misled[:count]]
        captions = [caption for caption, _ in drawn[::len(folders)]]
        assert len(captions) == len(names)
        assert all(name in caption for name, caption in zip(names, captions))


def test_no_query_is_misled(runs, failure, tmp_path):
    """A network that maps everything to one point has the same neighbours on any background."""
    state = torch.load(runs[0] / "best.pt", weights_only=True)
    state["network"]["head.weight"].zero_()
    torch.save(state, runs[0] / "best.pt")
    flags = [runs[0], "--neighbours", tmp_path / "a.png", "--worst", "--device", "cpu"]
    line = failure(flags, main=ea.main)
    assert "--worst" in line and str(runs[0]) in line and not (tmp_path / "a.png").exists()


def test_figure(runs, base, images, drawn, tmp_path):
    """Per image: the photo, its mask, and the map of each run with its score."""
    evaluate(*runs, "--figure", tmp_path / "a.png", "--images", "3")
    rows, (cells, written) = ea.shuffled(base)[:3], cells_of(tmp_path / "a.png", 5, [0] * 3)
    for n, row in enumerate(rows):
        photo, other = (enlarged(images[0][k], 176) for k in (row, (row + 4) % N))
        mask = enlarged(255 * images[1][row], 176).convert("L")
        assert unlike(cells[n, 0], photo) < 2 < unlike(cells[n, 0], other)
        outline = np.abs(cells[n, 1].astype(int) - cells[n, 0]).max(axis=2) > 60
        expected = np.asarray(ea.outlined(photo, mask))
        assert outline.any() and (cells[n, 1][outline] == expected[outline]).all()
        assert all(map(is_written, written[n]))
        for k, (folder, title) in enumerate(zip(runs, ea.TITLES.values())):
            run = load(folder)
            attention = ea.collect_maps(run, [row], ea.network_of(run))[1][0]
            assert unlike(cells[n, 2 + k], ea.outlined(ea.heated(photo, attention), mask)) < 3
            score = saved_scores(folder)[str(run.split.images[row])]
            assert drawn[n][1][2 + k][1] == f"{title} {score:.2f}"
    evaluate(runs[0], "--figure", tmp_path / "b.png", "--images", "2")
    cells_of(tmp_path / "b.png", 3, [0] * 2)  # photo, mask and one map


def test_heat_map_and_outline():
    photo, attention = Image.new("RGB", (9, 9), (10, 200, 30)), torch.zeros(9, 9)
    attention[4, 4] = 1
    heat = np.asarray(ea.heated(photo, attention))
    assert heat[4, 4].tolist() == [255, 255, 0]
    assert len(set(heat[0, 0].tolist())) == 1  # grey
    mask = np.zeros((9, 9), np.uint8)
    mask[:, 5:] = 255
    edge = np.asarray(ea.outlined(photo, Image.fromarray(mask))) != np.asarray(photo)
    assert edge.any(axis=(0, 2)).tolist() == [False] * 4 + [True] * 2 + [False] * 3


# ---- Errors --------------------------------------------------------------------------------------


def test_unfinished_runs_are_left_out(runs, failure, capsys):
    """Their best epoch, and so their scores, may still change."""
    (runs[0] / "result.json").unlink()
    (runs[0].parent / "report.md").touch()  # as RUNS/* has it
    assert str(runs[0]) in failure([runs[0], "--device", "cpu"], main=ea.main)
    evaluate(runs[0], runs[0].parent / "report.md", runs[1], "--limit", "3")
    out = capsys.readouterr().out
    assert str(runs[0]) in out and "report.md" not in out
    assert [row[""] for row in rows_of_table(out)] == ["bgaugment"]


@pytest.mark.parametrize("change", [{"format": 1}, {"format": None}])
def test_runs_of_another_version_are_left_out(runs, failure, capsys, change):
    content = result(runs[0]) | change
    (runs[0] / "result.json").write_text(json.dumps({key: content[key] for key in content if content[key] is not None}))
    assert str(runs[0]) in failure([runs[0], "--device", "cpu"], main=ea.main)
    evaluate(*runs[:2], "--limit", "3")
    line, *rest = capsys.readouterr().out.splitlines()
    assert str(runs[0]) in line and "version" in line
    assert [row[""] for row in rows_of_table("\n".join(rest))] == ["bgaugment"]


def test_runs_of_a_network_that_has_changed_are_left_out(runs, failure, capsys):
    """Its weights in new code would be a network that nobody measured."""
    nets = runs[0].parent / "nets"
    nets.mkdir()
    (nets / "hubconf.py").write_text("import bgbias\n\ndef net():\n    return bgbias.smallconv()\n")
    content = result(runs[0])
    content["args"]["backbone"] = f"{nets}:net"
    content["network"] = bgbias.network_checksum(f"{nets}:net", "runs", "data")
    (runs[0] / "result.json").write_text(json.dumps(content))
    evaluate(*runs[:2], "--limit", "3")
    assert len(rows_of_table(capsys.readouterr().out)) == 2
    (nets / "layers.py").write_text("x = 1\n")
    evaluate(*runs[:2], "--limit", "3")
    line, *rest = capsys.readouterr().out.splitlines()
    assert str(runs[0]) in line and "network" in line
    assert [row[""] for row in rows_of_table("\n".join(rest))] == ["bgaugment"]


def test_two_groups_are_no_picture(runs, failure, tmp_path):
    change_args(runs[1], seed=7)
    line = failure([*runs, "--neighbours", tmp_path / "a.png", "--device", "cpu"], main=ea.main)
    assert all(str(run) in line for run in runs) and not (tmp_path / "a.png").exists()
