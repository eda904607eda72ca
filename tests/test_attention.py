"""eval_attention.py: the score against masks worked out by hand, the map against one copy at a time,
runs from the command line to the table and the pictures, and the neighbours against a double loop."""

import json
import os
import re
import shutil
import statistics
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

FULL, EMPTY = "c20/p2", "c21/p2"  # test images with a full and with an empty mask


@pytest.fixture(scope="module")
def sellers(tmp_path_factory):
    """A folder with shop/ of 22 classes x 4 photos that look alike, 44 of them test images (two batches
    of the test), and two runs, base and BGAugment, trained for two batches."""
    root = write_shop(tmp_path_factory.mktemp("sellers"), classes=22, suffix="png")
    for file in root.glob("shop/images/*/*.png"):
        with Image.open(file) as photo, Image.open(file.with_name("p0.png")) as first:
            Image.blend(photo, first, 0.5).save(file)
    for name, value in ((FULL, 255), (EMPTY, 0)):
        Image.new("L", (40, 32), value).save(root / f"shop/masks/{name}.png")
    for flags in ([], ["--bgaugment"]):
        bgbias.main(["--dataset", str(root / "shop"), "--runs", str(root / "runs"), "--backbone", "smallconv",
                     "--weights", "none", "--epochs", "1", "--iterations", "2", "--batch-size", "8",
                     "--lr", "1e-3", "--image-size", str(SIZE), "--device", "cpu", *flags])
    return root


@pytest.fixture
def runs(sellers, tmp_path):
    """Copies of the two run folders, without attention scores."""
    folders = zip(sorted(sellers.glob("runs/*")), ("base", "bgaugment"))
    return [shutil.copytree(run, tmp_path / name) for run, name in folders]


@pytest.fixture
def base(runs):
    return ea.load_run(runs[0], "cpu")


@pytest.fixture(scope="module")
def images(sellers):
    """Test photos, masks in [0, 1] and draw 0 of the test's five backgrounds, (N, ., S, S)."""
    run = ea.load_run(min(sellers.glob("runs/*")), "cpu")
    batches = bgbias.make_batches(run.args, run.split, bgbias.TEST, {"replaced": 5})
    backgrounds = torch.cat([batches[n][1]["replaced"][0] for n in range(2)]).float()
    photos, masks = (torch.stack([pixels_of(file, SIZE) for file in files]) for files in run.split[:2])
    return photos, masks / 255, backgrounds


def replace(images, masks, backgrounds):
    return images * masks + backgrounds * (1 - masks)


def evaluate(*argv):
    ea.main([*map(str, argv), "--device", "cpu"])


def change_args(folder, **args):
    content = result(folder)
    content["args"] |= args
    (folder / "result.json").write_text(json.dumps(content))


def saved_scores(folder):
    """What is in attention.npz: {image: score}."""
    with np.load(folder / "attention.npz") as saved:
        return dict(zip(saved["image"].tolist(), saved["score"].tolist()))


def rows_of_table(text):
    """The rows {column: cell} of a Markdown table, without empty cells."""
    columns, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]]
                         for line in text.splitlines() if line.startswith("|")]
    return [{column: cell for column, cell in zip(columns, row) if cell} for row in rows]


def slow_network(folder):
    """The weights in best.pt in float64: (B, 3, S, S) normalised -> (B, D)."""
    network = bgbias.Embedder("smallconv", "none", SIZE)
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
        generator = torch.Generator().manual_seed(bgbias.seed_of(42, ea.NOISE, row))
        noise = torch.randn(25, 3, SIZE, SIZE, generator=generator)
        attention = naive_map(network, scaled(images[0][row].double()), black, metric, noise)
        expected = naive_score(attention, images[1][row, 0].double().numpy())
        assert found[row] == pytest.approx(expected, abs=1e-3)


def test_scores_are_saved(runs, base):
    evaluate(runs[0])
    images = [str(path) for path in base.split.images]
    full, empty = (np.array([name in image for image in images]) for name in (FULL, EMPTY))
    with np.load(runs[0] / "attention.npz") as saved:
        score, a, p = saved["score"], saved["a"], saved["p"]
        assert saved["image"].tolist() == images and len(images) == N
    assert (np.isnan(score) == full).all() and full.sum() == 1 and p[full] == 1 and p[empty] == 0
    np.testing.assert_allclose(score[~full], ((a - p) / (1 - p + full))[~full])
    # bgbias.py --report finds them.
    np.testing.assert_array_equal(bgbias.read_result(runs[0])["columns"]["attention"], score[~full])


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


def test_limit_scores_random_images_and_saves_nothing(runs, capsys):
    evaluate(*runs, "--limit", "5")
    assert [row["images"] for row in rows_of_table(capsys.readouterr().out)] == ["5", "5"]
    assert not list(runs[0].parent.glob("*/attention.npz"))
    base, other = (ea.score_run(ea.load_run(run, "cpu"), 5) for run in runs)
    everything = ea.score_run(ea.load_run(runs[0], "cpu"))
    assert base.keys() == other.keys() and base.keys() < everything.keys() and len(base) == 5
    assert base.keys() != {*[*everything][:5]}
    for image, values in base.items():
        assert values == pytest.approx(everything[image], abs=1e-3, nan_ok=True)


def is_newer(path, than):
    later = than.stat().st_mtime + 10
    os.utime(path, (later, later))


def test_scores_of_a_newer_checkpoint_and_of_no_newer_one(runs, base):
    ea.score_run(base)
    file, best = runs[0] / "attention.npz", runs[0] / "best.pt"
    with np.load(file) as saved:
        content = dict(saved)
    np.savez(file, **content | {"score": np.full(N, 0.625)})
    assert {score for score, _, _ in ea.score_run(base).values()} == {0.625}  # these are used
    best.write_bytes((runs[1] / "best.pt").read_bytes())
    is_newer(best, file)
    other = ea.score_run(ea.load_run(runs[1], "cpu"))
    np.testing.assert_array_equal([*ea.score_run(base).values()], [*other.values()])


def test_scores_of_newer_masks(runs, sellers, tmp_path, capsys):
    """Where a mask is inverted, a becomes 1 - a and p becomes 1 - p. That the data changed is printed."""
    shutil.copytree(sellers / "shop", tmp_path / "shop")
    change_args(runs[0], dataset=str(tmp_path / "shop"))
    run = ea.load_run(runs[0], "cpu")
    before = np.array([*ea.score_run(run).values()])
    mask = run.split.masks[3]
    Image.fromarray(255 - np.asarray(Image.open(mask))).save(mask, compress_level=0)
    is_newer(mask, runs[0] / "attention.npz")
    assert str(runs[0]) not in capsys.readouterr().out
    after = np.array([*ea.score_run(ea.load_run(runs[0], "cpu")).values()])
    assert str(runs[0]) in capsys.readouterr().out
    np.testing.assert_allclose(after[3, 1:], 1 - before[3, 1:], atol=1e-3)
    assert abs(after[3, 0] - before[3, 0]) > 0.01
    np.testing.assert_array_equal(np.delete(after, 3, 0), np.delete(before, 3, 0))


# ---- Table ---------------------------------------------------------------------------------------


def test_compare():
    rng = np.random.default_rng(0)
    base, gain = rng.normal(size=200), rng.normal(0.2, 1, 200)
    before, after = ({i: (score, 0, 0) for i, score in enumerate(scores)} for scores in (base, base + gain))
    before["full"] = after["full"] = (np.nan, 0, 1)
    before["only here"] = (9.0, 0, 0)
    mean, low, high, improved = ea.compare(before, after)
    assert mean == pytest.approx(gain.mean())
    assert improved == (gain > 0).sum() / 200
    known = scipy.stats.bootstrap((gain,), np.mean, method="percentile", rng=1)
    assert (low, high) == pytest.approx(tuple(known.confidence_interval), abs=0.02)
    assert ea.compare({"a": (0.1, 0, 0)}, {"b": (0.2, 0, 0)}) is None
    assert ea.compare({"a": (np.nan, 0, 0)}, {"a": (0.2, 0, 0)}) is None


def a_run(flags="", folder="runs/x", tested="toy"):
    return ea.Run(Path(folder), bgbias.parse_args(flags.split()), None, tested)


def test_pair_up():
    base, other = a_run(), a_run("--bgaugment")
    for order in ([base, other], [other, base]):
        pair, = ea.pair_up(order)
        assert [*pair.items()] == [("base", base), ("bgaugment", other)]
    for unlike in (a_run("--bgaugment --seed 1"), a_run("--bgaugment --loss triplet"),
                   a_run("--bgaugment --lr 1"), a_run("--bgaugment --epochs 0"),
                   a_run("--bgaugment", tested="other photos"), a_run("--bgaugment", "elsewhere/x")):
        assert ea.pair_up([unlike, base]) == [{"base": base}, {"bgaugment": unlike}]


def test_table(runs, capsys):
    evaluate(*runs[::-1])  # the order does not matter
    out = capsys.readouterr().out
    rows = rows_of_table(out)
    assert [row[""] for row in rows] == ["base", "bgaugment"]
    base, other = ([score for score in saved_scores(run).values() if np.isfinite(score)] for run in runs)
    for row, scores in zip(rows, (base, other)):
        assert row["images"] == str(len(scores))
        assert row["attention"] == f"{statistics.mean(scores):.2f} ± {statistics.stdev(scores):.2f}"
    gains = [after - before for before, after in zip(base, other)]
    gain, low, high = map(float, re.findall(r"[+-]\d\.\d+", rows[1]["BGAugment - base [95 %]"]))
    assert gain == pytest.approx(statistics.mean(gains), abs=6e-4) and low < gain < high
    assert rows[1]["images improved"] == f"{100 * sum(g > 0 for g in gains) / len(gains):.0f} %"
    assert "nan" not in out and out.count(FULL) == 2 and EMPTY not in out  # an undefined score is named


def test_table_beside_the_papers():
    run = a_run("--dataset cub200 --loss triplet")
    scores = {run.folder: {"a": (0.25, 0, 0), "b": (0.5, 0, 0)}}
    ours, papers = rows_of_table(ea.score_table([{"base": run}], scores))
    assert (ours["images"], ours["attention"]) == ("2", "0.38 ± 0.18")
    assert papers == {"": "paper", "attention": "0.24 ± 0.08"}


# ---- Can the score be believed? ------------------------------------------------------------------


def test_sanity(runs, base, images, capsys):
    evaluate(runs[0], "--sanity")
    row, = rows_of_table(capsys.readouterr().out.split("\n\n")[-1])
    masks = images[1][:, 0].double().numpy()
    complement = [naive_score(mask < 0.5, mask >= 0.5)[0] for mask in masks if mask.min() < 0.5]
    expected = {"mask as map": 1, "its complement": np.mean(complement)}
    for title, trained in (("score", True), ("random weights", False)):
        maps = ea.collect_maps(base, range(N), ea.network_of(base, trained=trained))[1].double().numpy()
        own, other = ([naive_score(maps[i], masks[i - k])[0] for i in range(N)] for k in (0, 1))
        expected[title] = np.nanmean(own)
        expected[f"{title}: beyond another's mask"] = np.nanmean(np.subtract(own, other))
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


# ---- Neighbours ----------------------------------------------------------------------------------


def slow_neighbours(queries, gallery):
    """For query i the five nearest of the gallery except i, in a double loop."""
    found = []
    for i, query in enumerate(queries):
        others = [(((query - other) ** 2).sum(), j) for j, other in enumerate(gallery) if j != i]
        found.append([j for _, j in sorted(others)[:5]])
    return np.array(found)


@pytest.fixture(scope="module")
def slow(sellers, images):
    """For each of the two runs {"clean", "replaced": (N, 5) the nearest clean photos}."""
    found = []
    for folder in sorted(sellers.glob("runs/*")):
        clean, replaced = (slow_embeddings(folder, x) for x in (images[0], replace(*images)))
        found.append({"clean": slow_neighbours(clean, clean), "replaced": slow_neighbours(replaced, clean)})
    return found


def test_nearest_is_a_double_loop(runs, slow):
    """Its first neighbours are those that Recall@1 of the run counts."""
    for folder, expected in zip(runs, slow):
        run = ea.load_run(folder, "cpu")
        found, some = ea.nearest(run, list(range(N))), ea.nearest(run, [40, 3, 33])
        test, labels = result(folder)["test"], run.split.labels
        for condition, metrics in (("clean", test["clean"][0]), ("replaced", test["query"][0])):
            np.testing.assert_array_equal(found[condition], expected[condition])
            np.testing.assert_array_equal(some[condition], expected[condition][[40, 3, 33]])
            right = labels[expected[condition][:, 0]] == labels
            assert 0.02 < right.mean() < 0.98
            assert right.mean() == pytest.approx(metrics["recall@1"], abs=1e-12)


def test_runs_with_own_backgrounds(sellers, tmp_path, capsys):
    """The first neighbours are those that Recall@1 of the run counts, so the backgrounds are those of the run."""
    bgbias.main(["--dataset", str(sellers / "shop"), "--backgrounds", "own", "--runs", str(tmp_path), "--epochs", "0",
                 "--backbone", "smallconv", "--weights", "none", "--image-size", str(SIZE), "--device", "cpu"])
    folder, = tmp_path.glob("*")
    evaluate(folder, "--sanity")
    row, = rows_of_table(capsys.readouterr().out.split("\n\n")[-1])
    assert float(row["background replaced"]) > 0.01
    run = ea.load_run(folder, "cpu")
    labels, query = run.split.labels, result(folder)["test"]["query"][0]
    right = labels[ea.nearest(run, list(range(2 * N)))["replaced"][:, 0]] == labels
    assert 0.02 < right.mean() == pytest.approx(query["recall@1"], abs=1e-12)


def test_four_photos_have_three_neighbours_each(base):
    four = base._replace(split=bgbias.Split(*(values[:4] for values in base.split)))
    found = ea.nearest(four, [0, 3])["replaced"]
    assert [sorted(row) for row in found.tolist()] == [[1, 2, 3], [0, 1, 2]]


# ---- Pictures ------------------------------------------------------------------------------------


def cells_of(file, columns, captions):
    """The cells of a picture, (rows, columns, px, px, 3), 5 px apart. `captions` says how many lines of
    32 px stand above each row."""
    picture, px, top, rows = np.asarray(Image.open(file)), 905 // columns - 5, 0, []
    for lines in captions:
        for _ in range(lines):
            assert (picture[top:top + 32].min(axis=2) < 100).any()  # it is written there
            top += 32
        row, gap = picture[top:top + px], picture[top + px:top + px + 5]
        assert (gap == 255).all()
        rows.append([row[:, left:left + px] for left in range(0, columns * (px + 5), px + 5)])
        top += px + 5
    assert top == len(picture)
    return np.array(rows)


def enlarged(pixels, px):
    """The picture of pixels (C, S, S)."""
    return ea.TF.to_pil_image(pixels.round().byte()).convert("RGB").resize((px, px), Image.LANCZOS)


def unlike(cell, picture):
    """How far a cell is from a picture, without its frame and its text."""
    return np.median(np.abs(cell - np.asarray(picture, float))[40:-5, 5:-5].max(axis=2))


@pytest.fixture
def drawn(monkeypatch):
    """The rows (caption, cells) of the pictures that are drawn."""
    rows, draw_grid = [], ea.draw_grid

    def watched(lines, columns, file):
        rows[:] = lines
        draw_grid(lines, columns, file)

    monkeypatch.setattr(ea, "draw_grid", watched)
    return rows


def test_neighbours_picture(runs, base, images, slow, drawn, tmp_path):
    """The query on its own, on a partner's and on a new background, and per run its neighbours in their order,
    in frames that say whether their class is the query's."""
    evaluate(*runs, "--neighbours", tmp_path / "a.png", "--images", "6")
    cells, labels = cells_of(tmp_path / "a.png", 10, [2, 1] * 6), base.split.labels
    photos, queries, right = [enlarged(x, 85) for x in images[0]], ea.shuffled(base)[:6], []
    batches = bgbias.make_batches(base.args, base.split, bgbias.TEST, bgbias.TEST_DRAWS)
    partners = [torch.cat([batches[n][1][name][0] for n in range(2)]) for name in ("same_class", "other_class")]
    assert queries != sorted(queries)
    for n, query in enumerate(queries):
        image, mask = images[0][query], images[1][query]
        removed = [torch.from_numpy(slow_removal(x[:3].numpy(), x[3].numpy() / 255))
                   for x in (torch.cat([image, 255 * mask]), *(partner[query] for partner in partners))]
        versions = [image, *(replace(image, mask, other) for other in (*removed, images[2][query]))]
        assert all(unlike(cell, enlarged(x, 85)) < 2 for cell, x in zip(cells[2 * n], versions))
        assert (cells[2 * n + 1][:5] == 255).all()  # the same query, which is shown once
        assert "/".join(base.split.images[query].parts[-2:]) in drawn[2 * n][0]
        for row, (caption, _), near in zip(cells[2 * n:], drawn[2 * n:], slow):
            hits = {condition: labels[near[condition][query]] == labels[query] for condition in near}
            right += hits["replaced"].tolist()
            numbers = [tuple(map(int, found)) for found in re.findall(r"(\d) of (\d)", caption)]
            assert numbers == [(hits["replaced"].sum(), 5), (hits["clean"].sum(), 5)]
            for cell, k, hit in zip(row[5:], near["replaced"][query], hits["replaced"]):
                assert unlike(cell, photos[k]) < 2 < unlike(cell, photos[(k + 4) % N])
                frame = np.concatenate([cell[0], cell[4], cell[-1], cell[:, 0], cell[:, -1]])
                assert (frame == ((0, 158, 115) if hit else (213, 94, 0))).all()  # green or orange
    assert 0 < sum(right) < len(right)  # both occur above
    assert not list(tmp_path.glob("*/attention.npz"))


def test_worst_neighbours_are_misled_by_the_new_background(runs, base, slow, drawn, tmp_path):
    """The base run's nearest is right on the query's own background and wrong on the new one."""
    labels = base.split.labels
    right = {condition: labels[near[:, 0]] == labels for condition, near in slow[0].items()}
    misled = [row for row in ea.shuffled(base) if right["clean"][row] and not right["replaced"][row]]
    assert 2 < len(misled) < 40
    for count in (N, 2):
        evaluate(*runs, "--neighbours", tmp_path / "a.png", "--images", count, "--worst")
        names = ["/".join(base.split.images[row].parts[-2:]) for row in misled[:count]]
        captions = [caption for caption, _ in drawn[::2]]
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
    rows, cells = ea.shuffled(base)[:3], cells_of(tmp_path / "a.png", 4, [0] * 3)
    for n, row in enumerate(rows):
        photo, other = (enlarged(images[0][k], 221) for k in (row, (row + 4) % N))
        mask = enlarged(255 * images[1][row], 221).convert("L")
        assert unlike(cells[n, 0], photo) < 2 < unlike(cells[n, 0], other)
        outline = np.abs(cells[n, 1].astype(int) - cells[n, 0]).max(axis=2)[40:] > 60
        expected = np.asarray(ea.outlined(photo, mask))[40:]
        assert outline.any() and (cells[n, 1][40:][outline] == expected[outline]).all()
        for k, folder in enumerate(runs):
            run = ea.load_run(folder, "cpu")
            attention = ea.collect_maps(run, [row], ea.network_of(run))[1][0]
            assert unlike(cells[n, 2 + k], ea.outlined(ea.heated(photo, attention), mask)) < 3
            score = saved_scores(folder)[str(run.split.images[row])]
            assert f"{score:.2f}" in drawn[n][1][2 + k][1]
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


def test_two_pairs_are_no_picture(runs, failure, tmp_path):
    change_args(runs[1], seed=7)
    line = failure([*runs, "--neighbours", tmp_path / "a.png", "--device", "cpu"], main=ea.main)
    assert all(str(run) in line for run in runs) and not (tmp_path / "a.png").exists()
