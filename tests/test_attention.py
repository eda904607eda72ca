"""eval_attention.py: the score against hand-worked masks, the map against a loop over single copies
and a closed form, runs of bgbias.py through shards, resuming, table, figure and each error, and the
nearest neighbours against a double loop and the run's own Recall@1."""

import json
import shutil
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import bgbias
import eval_attention as ea

SIZE = 16  # px of the crops

# Section 6 of the paper, as printed.
PAPER = """
arcface cars196 0.49 0.10 0.56 0.10 cub200 0.25 0.08 0.33 0.09 sop 0.13 0.14 0.26 0.17
contrastive cars196 0.50 0.09 0.53 0.10 cub200 0.25 0.08 0.32 0.10 sop 0.07 0.16 0.31 0.20
multi_similarity cars196 0.52 0.09 0.50 0.09 cub200 0.26 0.08 0.30 0.09 sop 0.11 0.17 0.28 0.19
normalized_softmax cars196 0.51 0.09 0.56 0.09 cub200 0.24 0.08 0.30 0.08 sop 0.12 0.14 0.28 0.20
triplet cars196 0.50 0.09 0.54 0.09 cub200 0.24 0.08 0.33 0.09 sop 0.08 0.17 0.26 0.22
"""


def test_paper_table():
    for line in PAPER.split("\n")[1:-1]:
        loss, *cells = line.split()
        for dataset, *numbers in (cells[0:5], cells[5:10], cells[10:15]):
            rows = [bgbias.PAPER[dataset][loss][kind] for kind in ("base", "bgaugment")]
            ours = [figure for row in rows for figure in (row.attention, row.attention_std)]
            assert ours == [float(n) for n in numbers]


# --------------------------------------------------------------------------------------------------
# Score
# --------------------------------------------------------------------------------------------------

MAP = torch.tensor([[1.0, 3.0], [0.0, 4.0]])


@pytest.mark.parametrize("mask, score", [
    ([[0, 0], [0, 0]], 0.0),  # a = 0, p = 0
    ([[0, 1], [0, 1]], 0.75),  # a = 7/8, p = 1/2
    ([[1, 0], [1, 0]], -0.75),  # a = 1/8, p = 1/2
    ([[0.5, 0.5], [0.5, 0.5]], 0.0),  # attention at random: a = p = 1/2
    ([[0, 0.5], [0.25, 1]], 0.25 / 0.5625),  # a = 5.5/8, p = 7/16
])
def test_score_of_hand_worked_masks(mask, score):
    found = ea.attention_score(MAP[None], torch.tensor(mask)[None, None])
    assert found.shape == (1,)
    assert found.item() == pytest.approx(score, abs=1e-12)


def test_score_is_undefined_for_full_masks_and_flat_maps():
    assert ea.attention_score(MAP[None], torch.ones(1, 1, 2, 2)).isnan().all()
    half = torch.tensor([[[[0.0, 1], [0, 1]]]])
    assert ea.attention_score(torch.zeros(1, 2, 2), half).isnan().all()


def test_score_of_the_mask_itself_is_exactly_1():
    mask = (torch.rand(5, 1, 9, 7, generator=torch.Generator().manual_seed(0)) > 0.4).float()
    assert (ea.attention_score(mask[:, 0], mask) == 1).all()
    assert (ea.attention_score(1 - mask[:, 0], mask) < 0).all()


# --------------------------------------------------------------------------------------------------
# Map
# --------------------------------------------------------------------------------------------------


def small_network():
    torch.manual_seed(3)
    return bgbias.Embedder("smallconv", "none", SIZE).double()


def some_images(count=3):
    generator = torch.Generator().manual_seed(1)
    return 100 * torch.randn(count, 3, SIZE, SIZE, dtype=torch.float64, generator=generator)


def naive_map(model, image, black, loss, noise):
    """Section 5 with one backward pass a copy, through everything, and NumPy for the rest."""
    total = np.zeros(image.shape[1:])
    sigma = 0.15 * (float(image.max()) - float(image.min()))
    for n in noise:
        copy = (image + sigma * n).requires_grad_()
        e = model(copy[None])[0]
        if loss in ("contrastive", "triplet"):
            d = ((e - black[0]) ** 2).sum().sqrt()
        else:
            d = 1 - (e * black[0]).sum() / (e.norm() * black[0].norm())
        (d / 25).backward()
        total += np.abs((copy.grad[0] + copy.grad[1] + copy.grad[2]).numpy() / 3)
    low = total.min()
    return np.clip((total - low) / (np.quantile(total, 0.99) - low), 0, 1)


@pytest.mark.parametrize("loss", bgbias.LOSSES)
def test_map_is_that_of_one_copy_at_a_time(loss):
    model, images = small_network(), some_images(2)
    black = model(torch.zeros(1, 3, SIZE, SIZE, dtype=torch.float64)).detach()
    generators = [torch.Generator().manual_seed(7) for _ in range(2)]
    found = ea.attention_map(model, images, black, ea.DISTANCES[loss], generators[0])
    for image, attention in zip(images, found):
        noise = torch.randn(25, 3, SIZE, SIZE, dtype=torch.float64, generator=generators[1])
        expected = naive_map(model, image, black, loss, noise)
        np.testing.assert_allclose(attention.numpy(), expected, rtol=1e-9, atol=1e-9)


def test_map_of_a_linear_model_is_the_mean_of_its_weights():
    """f(x) = w x: the distance to black is |w (x - black)|, its gradient +-w with any noise."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 5, 1)).double()
    w = model[1].weight.detach().reshape(3, 4, 5).numpy()
    images = 200 * torch.rand(2, 3, 4, 5, dtype=torch.float64)
    black = model(torch.zeros(1, 3, 4, 5, dtype=torch.float64)).detach()
    found = ea.attention_map(model, images, black, ea.euclidean, torch.Generator())
    G = np.abs(w.mean(axis=0))  # signed mean over the channels, then the absolute value
    expected = np.clip((G - G.min()) / (np.quantile(G, 0.99) - G.min()), 0, 1)
    for attention in found:
        np.testing.assert_allclose(attention.numpy(), expected, rtol=1e-9, atol=1e-12)


def test_map_takes_no_gradients_of_weights():
    model = small_network()
    ea.attention_map(model, some_images(1), torch.zeros(1, 128), ea.cosine, torch.Generator())
    assert all(p.grad is None for p in model.parameters())


def test_map_of_a_network_that_sees_nothing_is_flat():
    def constant(x):
        return 0 * x.flatten(1)[:, :8] + 1

    black = torch.zeros(1, 8)
    found = ea.attention_map(constant, some_images(2), black, ea.euclidean, torch.Generator())
    assert (found == 0).all()


def test_map_does_not_depend_on_the_batch_or_its_order():
    model, images = small_network(), some_images(4)
    black = model(torch.zeros(1, 3, SIZE, SIZE, dtype=torch.float64)).detach()

    def maps(order):
        generators = [torch.Generator().manual_seed(i) for i in order]
        return ea.attention_map(model, images[order], black, ea.cosine, generators)

    together = maps([0, 1, 2, 3])
    torch.testing.assert_close(maps([3, 1]), together[[3, 1]])
    torch.testing.assert_close(maps([2]), together[[2]])


# --------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two untrained runs, base and BGAugment, of 3 classes x 3 photos, all of them test images, of
    which class_5/2.png has a full and class_5/1.png an empty mask."""
    root, rng = tmp_path_factory.mktemp("attention"), np.random.default_rng(0)
    for k in range(9):
        name = f"class_{3 + k // 3}/{k % 3}.png"
        mask = np.zeros((24, 20), np.uint8)
        mask[6:18, 5:15] = 255
        mask = {7: 0 * mask, 8: 0 * mask + 255}.get(k, mask)
        photo = rng.integers(0, 256, (24, 20, 3), np.uint8)
        for kind, pixels in (("images", photo), ("masks", mask)):
            (root / "photos" / kind / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / "photos" / kind / name)
    for part in ("val", "test"):
        (root / "pool" / part).mkdir(parents=True)
        background = rng.integers(0, 256, (24, 24, 3), np.uint8)
        Image.fromarray(background).save(root / "pool" / part / "0.png")
    for flags in ([], ["--bgaugment"]):
        bgbias.main(["--dataset", str(root / "photos"), "--backgrounds", str(root / "pool"),
                     "--runs", str(root / "runs"), "--backbone", "smallconv", "--weights", "none",
                     "--epochs", "0", "--image-size", str(SIZE), "--device", "cpu", *flags])
    base, other = (root / f"runs/photos-untrained-{kind}-s42" for kind in ("base", "bgaugment"))
    state = torch.load(other / "best.pt", weights_only=True)  # both start alike: move one
    state["network"]["head.weight"] *= torch.linspace(0.1, 3, 128)[:, None]
    torch.save(state, other / "best.pt")
    return base, other


@pytest.fixture
def runs(trained, monkeypatch):
    """The two run folders, without any scores; tables are printed in one block."""
    monkeypatch.setenv("COLUMNS", "400")
    yield trained
    for folder in trained:
        for file in folder.glob("attention*"):
            file.unlink()


def scores_of(folder):
    return np.array(list(ea.read_scores(ea.load_run(folder, "cpu")).values()))


def two_images_a_batch(monkeypatch):
    """Instead of all nine at once."""
    for device in ea.BATCH_PIXELS:
        monkeypatch.setitem(ea.BATCH_PIXELS, device, 2 * ea.COPIES * SIZE**2)


def row_of(text, heading, run):
    """{heading: cell} of a run's row in the Markdown table that has this heading."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    first = next(i for i, cells in enumerate(lines) if heading in cells)
    row, = [cells for cells in lines[first:first + 4] if cells[:1] == [run.name]]
    return {name: cell for name, cell in zip(lines[first][1:], row[1:], strict=True) if cell}


def test_scores_of_a_run(runs):
    run = ea.load_run(runs[0], "cpu")
    ea.score_run(run)
    with np.load(runs[0] / "attention.npz") as saved:
        assert saved["image"].tolist() == [str(p) for p in run.images]
        assert len(saved["image"]) == 9
        np.testing.assert_allclose(saved["p"][-2:], [0, 1])
        assert np.isfinite(saved["score"]).tolist() == [True] * 8 + [False]
        expected = (saved["a"][:8] - saved["p"][:8]) / (1 - saved["p"][:8])
        np.testing.assert_allclose(saved["score"][:8], expected)
    summary = json.loads((runs[0] / "attention.json").read_text())
    assert (summary["images"], summary["undefined"]) == (9, [str(run.images[8])])
    assert summary["mean"] == pytest.approx(expected.mean())
    assert summary["std"] == pytest.approx(expected.std(ddof=1))


def test_scores_do_not_depend_on_batch_size_or_shards(runs, monkeypatch):
    run = ea.load_run(runs[0], "cpu")
    together = np.array(list(ea.score_run(run).values()))
    (runs[0] / "attention.npz").unlink()  # attention.json, of the scores just deleted, stays
    two_images_a_batch(monkeypatch)
    for i in (2, 1, 3):
        ea.score_run(run, (i, 3))
        for name in ("attention.npz", "attention.json"):
            assert (runs[0] / name).exists() == (i == 3)
    np.testing.assert_allclose(scores_of(runs[0]), together, atol=1e-4)


def test_a_shard_prints_no_table(runs, capsys):
    ea.main([str(runs[0]), "--device", "cpu", "--shard", "2/3"])
    out = capsys.readouterr().out
    assert out == f"{runs[0]}: 6 images left to the other shards, no table yet\n"


def test_interrupted_scoring_goes_on(runs, monkeypatch):
    two_images_a_batch(monkeypatch)
    run, mapping, batches = ea.load_run(runs[0], "cpu"), ea.attention_map, []

    def interrupted(model, images, *args):
        batches.append(len(images))
        if batches == [2, 2, 2, 2]:
            raise KeyboardInterrupt
        return mapping(model, images, *args)

    monkeypatch.setattr(ea, "attention_map", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ea.score_run(run)
    first = scores_of(runs[0])
    assert len(first) == 6 and not (runs[0] / "attention.json").exists()
    ea.score_run(run)
    assert batches[4:] == [2, 1]  # the rest
    resumed = scores_of(runs[0])
    np.testing.assert_array_equal(resumed[:6], first)
    (runs[0] / "attention.npz").unlink()
    np.testing.assert_allclose(resumed, list(ea.score_run(run).values()), atol=1e-4)


def test_scores_are_saved_on_the_way(runs, monkeypatch):
    """A job that is killed, where nothing can be saved at the end, loses a 50th of the images."""
    two_images_a_batch(monkeypatch)
    run, mapping, saved = ea.load_run(runs[0], "cpu"), ea.attention_map, []

    def watched(*args):
        saved.append(len(ea.read_scores(run)))
        return mapping(*args)

    monkeypatch.setattr(ea, "attention_map", watched)
    ea.score_run(run)
    assert saved == [0, 2, 4, 6, 8]


def test_another_checkpoint_starts_over(runs):
    run = ea.load_run(runs[0], "cpu")
    ea.score_run(run)
    best = (runs[0] / "best.pt").read_bytes()
    try:
        (runs[0] / "best.pt").write_bytes((runs[1] / "best.pt").read_bytes())
        assert ea.read_scores(ea.load_run(runs[0], "cpu")) == {}
    finally:
        (runs[0] / "best.pt").write_bytes(best)
    assert len(ea.read_scores(run)) == 9


def with_photos_of_its_own(run, folder):
    """A copy of an untrained run in `folder`, of a copy of its photos there."""
    saved = json.loads((run / "config.json").read_text())
    shutil.copytree(saved["args"]["dataset"], folder / "photos")
    copy = copy_of(run, folder / run.name)
    saved["args"]["dataset"] = str(folder / "photos")
    (copy / "config.json").write_text(json.dumps(saved))
    return copy


def score_again(folder):
    """The saved scores (N, 3) after one more call of the command."""
    ea.main([str(folder), "--device", "cpu"])
    with np.load(folder / "attention.npz") as saved:
        return np.stack([saved["score"], saved["a"], saved["p"]], axis=1)


def test_inverted_masks_are_scored_anew(runs, tmp_path):
    """What lay on the object lies on the background then: a becomes 1 - a, p becomes 1 - p."""
    run = with_photos_of_its_own(runs[0], tmp_path)
    before, mean = score_again(run), json.loads((run / "attention.json").read_text())["mean"]
    for mask in (tmp_path / "photos/masks").glob("*/*.png"):
        Image.fromarray(255 - np.asarray(Image.open(mask))).save(mask)
    after = score_again(run)
    np.testing.assert_allclose(after[:, 1:], 1 - before[:, 1:], atol=1e-3)
    assert (np.abs(after[:7, 0] - before[:7, 0]) > 0.01).all()
    assert np.isnan(after[:, 0]).tolist() == [False] * 7 + [True, False]  # the empty one is full
    saved = json.loads((run / "attention.json").read_text())
    assert saved["mean"] == pytest.approx(np.nanmean(after[:, 0])) != pytest.approx(mean)


def test_a_replaced_photo_is_scored_anew(runs, tmp_path):
    run = with_photos_of_its_own(runs[0], tmp_path)
    before = score_again(run)
    photo = tmp_path / "photos/images/class_3/1.png"
    Image.fromarray(255 - np.asarray(Image.open(photo))).save(photo)
    after = score_again(run)
    assert abs(after[1, 0] - before[1, 0]) > 1e-3 and after[1, 2] == before[1, 2]
    np.testing.assert_allclose(np.delete(after, 1, 0), np.delete(before, 1, 0), atol=1e-4)


@pytest.mark.parametrize("argument, value", [("image_size", 20), ("loss", "arcface")])
def test_scores_are_of_the_arguments_they_follow_from(runs, tmp_path, argument, value):
    """An untrained run that is tested again with others has the same weights in best.pt."""
    run = copy_of(runs[0], tmp_path / runs[0].name)
    before, saved = score_again(run), json.loads((run / "config.json").read_text())
    saved["args"][argument] = value
    (run / "config.json").write_text(json.dumps(saved))
    after = score_again(run)
    assert (np.abs(after[:7, 0] - before[:7, 0]) > 1e-4).all()  # with an empty mask it is 0


def test_unchanged_runs_are_not_scored_again(runs, monkeypatch):
    before = score_again(runs[0])

    def no_work(*args, **kwargs):
        raise AssertionError("scored again")

    monkeypatch.setattr(ea, "network_of", no_work)
    np.testing.assert_array_equal(score_again(runs[0]), before)


@pytest.mark.parametrize("damage", [b"{", b"", b"[1, 2]", b"\xff\xfe"])
def test_damaged_summary_is_mended(runs, damage):
    score_again(runs[0])
    whole = (runs[0] / "attention.json").read_bytes()
    (runs[0] / "attention.json").write_bytes(damage)
    assert "attention" not in bgbias.read_result(runs[0]).figures
    score_again(runs[0])
    assert (runs[0] / "attention.json").read_bytes() == whole
    assert bgbias.read_result(runs[0]).figures["attention"][0] == json.loads(whole)["mean"]


# --------------------------------------------------------------------------------------------------
# Table, figure, checks
# --------------------------------------------------------------------------------------------------


def test_compare():
    rng = np.random.default_rng(0)
    base, gain = rng.normal(size=200), rng.normal(0.2, 1, 200)
    before = {str(i): (b, 0, 0) for i, b in enumerate(base)}
    after = {str(i): (b + g, 0, 0) for i, (b, g) in enumerate(zip(base, gain))}
    before["full"] = after["full"] = (np.nan, 0, 1)
    mean, low, high, share = ea.compare(before, after)
    assert mean == pytest.approx(gain.mean())
    assert share == (gain > 0).sum() / 200
    known = scipy.stats.bootstrap((gain,), np.mean, method="percentile", rng=1)
    assert (low, high) == pytest.approx(tuple(known.confidence_interval), abs=0.02)


def test_summary():
    values = {"a": 0.25, "b": np.nan, "c": 0.5, "d": -1.0}
    found = ea.summary({image: (value, 0, 0) for image, value in values.items()})
    assert found == {"mean": pytest.approx(-0.25 / 3), "images": 4, "undefined": ["b"],
                     "std": pytest.approx(statistics.stdev([0.25, 0.5, -1.0]))}


def test_table_figure_and_checks_end_to_end(runs, capsys, tmp_path):
    (runs[0].parent / "report.md").touch()  # as RUNS/* has it
    flags = ["--figure", str(tmp_path / "a.png"), "--images", "2", "--sanity"]
    ea.main([*map(str, runs), str(runs[0].parent / "report.md"), "--device", "cpu", *flags])
    out = capsys.readouterr().out
    rows = [row_of(out, "± images", run) for run in runs]
    for run, row in zip(runs, rows):
        values = scores_of(run)[:8, 0]
        saved = json.loads((run / "attention.json").read_text())
        assert row["images"] == "9"
        assert row["attention"] == f"{values.mean():.2f}" == f"{saved['mean']:.2f}"
        assert row["± images"] == f"{values.std(ddof=1):.2f}" == f"{saved['std']:.2f}"
    base, other = (scores_of(run)[:8, 0] for run in runs)
    gain, improved = rows[1]["BGAugment - base [95 %]"], rows[1]["images improved"]
    assert gain.startswith(f"{(other - base).mean():+.3f} [")
    assert improved == f"{100 * (other > base).mean():.0f} %"
    assert "nan" not in out and "paper" not in out
    assert out.count("1 images left out") == 2 and "class_5/2.png" in out
    for run, values in zip(runs, (base, other)):
        checks = row_of(out, "mask as map", run)
        assert len(checks) == 9
        assert checks["score"] == f"{values.mean():.3f}"  # 200 images are all of these
        assert checks["mask as map"] == "1.000" and float(checks["its complement"]) < 0
    size = Image.open(tmp_path / "a.png").size
    assert size == (900, 2 * (221 + 5))  # 4 cells of 221 px, gaps of 5


def test_order_on_the_command_line_does_not_matter(runs, capsys, tmp_path):
    shown = []
    for order, name in ((runs, "a.png"), (runs[::-1], "b.png")):
        flags = ["--figure", str(tmp_path / name), "--images", "2", "--worst"]
        ea.main([*map(str, order), "--device", "cpu", *flags])
        out = capsys.readouterr().out
        assert out.endswith(f"picture: {tmp_path / name}\n")
        shown.append((out.replace(name, ""), (tmp_path / name).read_bytes()))
    assert shown[0] == shown[1]
    names = [line.split("|")[1].strip() for line in shown[0][0].splitlines()[2:4]]
    assert names == [run.name for run in runs]


def test_paper_numbers_stand_beside_ours(runs, tmp_path):
    run = ea.load_run(copy_of(runs[0], tmp_path / "cub200-triplet-base-s42"), "cpu")
    result = json.loads((run.folder / "result.json").read_text())
    result["args"] |= {"dataset": "cub200", "loss": "triplet", "epochs": 1}
    (run.folder / "result.json").write_text(json.dumps(result))
    scores = {"a": (0.25, 0, 0), "b": (0.5, 0, 0)}
    bgbias.write_json(run.folder / "attention.json", ea.summary(scores))
    row = row_of(ea.score_table(ea.pair_up([run]), {run.folder: scores}), "± images", run.folder)
    assert row == {"images": "2", "attention": "0.38", "± images": "0.18",
                   "paper: attention": "0.24 ± 0.08"}


def test_which_images_are_drawn(runs, tmp_path):
    """A figure's rows are, pixel by pixel, those of the images that it should show, by name."""
    pair, = ea.pair_up([ea.load_run(folder, "cpu") for folder in runs]).values()
    images, gaps = pair["base"].images, [0, 1, -9, 3, np.nan, 2, -4, 0, 0]
    scores = {runs[0]: {image: (0.0, 0, 0) for image in images},
              runs[1]: {image: (gap, 0, 0) for image, gap in zip(images, gaps)}}

    def drawn(*wanted, worst=False):
        ea.draw_attention(pair, scores, ",".join(wanted), tmp_path / "a.png", worst=worst)
        return np.asarray(Image.open(tmp_path / "a.png"))

    def names(rows):
        return ["/".join(Path(images[row]).parts[-2:]) for row in rows]

    height = 221 + 5
    alone = [drawn(name) for name in names(range(9))]
    assert len({picture.tobytes() for picture in alone}) == 9
    assert all(picture.shape == (height, 900, 3) for picture in alone)
    rows = drawn("3", worst=True), drawn("class_4/1.png", "class_3/0.png"), drawn("20"), drawn("3")
    shown = []
    for picture in rows:
        parts = picture.reshape(-1, height, 900, 3)
        shown.append([next(i for i in range(9) if (alone[i] == part).all()) for part in parts])
    assert shown[:2] == [[2, 6, 3], [4, 0]]
    assert sorted(shown[2]) == list(range(9)) and shown[2] != sorted(shown[2])
    assert shown[3] == shown[2][:3] and (drawn("3") == rows[3]).all()


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


def test_occlusion_moves_only_what_is_swapped(runs):
    run = ea.load_run(runs[0], "cpu")
    background, object_, p = ea.occlusion(run, ea.network_of(run), [6, 7, 8])
    assert p.tolist() == pytest.approx([p[0].item(), 0, 1])
    assert (background[:2] > 1e-3).all() and background[2] < 1e-6  # a full mask has no background
    assert (object_[[0, 2]] > 1e-3).all() and object_[1] < 1e-6  # an empty one no object


# --------------------------------------------------------------------------------------------------
# Neighbours
# --------------------------------------------------------------------------------------------------


def write_photo(root, name, backdrop, thing, corner):
    """A photo of a thing (12 x 12) in front of a backdrop (24 x 28), and its mask."""
    pixels, mask = backdrop.copy(), np.zeros(backdrop.shape[:2], np.uint8)
    top, left = corner
    pixels[top:top + 12, left:left + 12] = thing
    mask[top:top + 12, left:left + 12] = 255
    for kind, content in (("images", pixels), ("masks", mask)):
        (root / kind / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(content).save(root / kind / name)


@pytest.fixture(scope="module")
def sellers(tmp_path_factory):
    """Two runs, base and BGAugment, trained for two batches, of 22 classes x 4 photos, 44 of them
    test images (two batches of the test). A class is a coloured square before its own backdrop, but
    for a photo each, which has another class's."""
    root, rng = tmp_path_factory.mktemp("sellers"), np.random.default_rng(0)
    backdrops = rng.integers(0, 256, (22, 1, 1, 3)) + rng.integers(-20, 20, (22, 24, 28, 3))
    backdrops = backdrops.clip(0, 255).astype(np.uint8)
    for label in range(22):
        thing = rng.integers(0, 256, 3)
        for i in range(4):
            backdrop = backdrops[(label + (i == 3)) % 22]
            corner = rng.integers(2, 12, 2)
            write_photo(root / "shop", f"c{label:02d}/{i}.png", backdrop, thing, corner)
    for part in ("val", "test"):
        (root / "pool" / part).mkdir(parents=True)
        for i in range(6):
            pixels = rng.integers(0, 256, (1, 1, 3)) + rng.integers(-20, 20, (24, 24, 3))
            pixels = pixels.clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / f"pool/{part}/{i}.png")
    for flags in ([], ["--bgaugment"]):
        bgbias.main(["--dataset", str(root / "shop"), "--backgrounds", str(root / "pool"),
                     "--runs", str(root / "runs"), "--backbone", "smallconv", "--weights", "none",
                     "--epochs", "1", "--iterations", "2", "--batch-size", "8", "--lr", "1e-3",
                     "--image-size", str(SIZE), "--device", "cpu", *flags])
    return [root / f"runs/shop-contrastive-{kind}-s42" for kind in ("base", "bgaugment")]


def pixels_of(file, grey=False):
    """A photo or mask, resized and centre-cropped as the test protocol says: (C, S, S) float."""
    picture = Image.open(file).convert("L" if grey else "RGB")
    short = round(SIZE * 256 / 227)
    scale = short / min(picture.size)
    picture = picture.resize([int(n * scale) for n in picture.size], Image.BILINEAR)
    left, top = (int(round((n - SIZE) / 2)) for n in picture.size)
    picture = np.asarray(picture.crop((left, top, left + SIZE, top + SIZE)), np.float32)
    return torch.from_numpy(np.atleast_3d(picture).transpose(2, 0, 1).copy())


def two_views(run, count=44):
    """Test photos, and these in front of draw 0 of the test's five, (N, 3, S, S) in [0, 255]."""
    batches = bgbias.test_batches(run.split, run.args)
    backgrounds = torch.cat([batches[n][1][0] for n in range(batches.items_a_pass)]).float()
    photos = torch.stack([pixels_of(file) for file in run.split.images])
    masks = torch.stack([pixels_of(file, grey=True) for file in run.split.masks]) / 255
    assert len(photos) == count == len(backgrounds)
    return photos, photos * masks + backgrounds * (1 - masks)


def slow_embeddings(run, images):
    """Each image by itself through the weights in best.pt: (N, D) float64."""
    network = bgbias.Embedder("smallconv", "none", SIZE).eval()
    network.load_state_dict(torch.load(run.folder / "best.pt", weights_only=True)["network"])
    network.double()
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64)[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64)[:, None, None]
    with torch.no_grad():
        features = [network.backbone((image / 255 - mean)[None] / std)[0] for image in images]
        e = torch.stack([network.head(feature) for feature in features])
    return (e / (e ** 2).sum(dim=1, keepdim=True).sqrt()).numpy()


def slow_neighbours(queries, gallery, count=5):
    """For query i the `count` nearest of the gallery but i, by a plain double loop."""
    found = []
    for i, query in enumerate(queries):
        distances = [(float(((query - other) ** 2).sum()), j)
                     for j, other in enumerate(gallery) if j != i]
        found.append([j for _, j in sorted(distances)[:count]])
    return np.array(found)


@pytest.fixture(scope="module")
def slow(sellers):
    """{run folder: {"clean", "replaced": (44, 5) the nearest clean photos}}"""
    found = {}
    for folder in sellers:
        run = ea.load_run(folder, "cpu")
        clean, replaced = (slow_embeddings(run, images) for images in two_views(run))
        found[folder] = {"clean": slow_neighbours(clean, clean),
                         "replaced": slow_neighbours(replaced, clean)}
    return found


def test_nearest_is_a_double_loop_over_embeddings(sellers, slow):
    for folder in sellers:
        run = ea.load_run(folder, "cpu")
        found = ea.nearest(run, list(range(44)))
        for condition, expected in slow[folder].items():
            np.testing.assert_array_equal(found[condition].numpy(), expected)
            assert (found[condition] != torch.arange(44)[:, None]).all()  # never the query itself
        some = ea.nearest(run, [40, 3, 33])["replaced"]  # in the order that is asked for
        np.testing.assert_array_equal(some.numpy(), slow[folder]["replaced"][[40, 3, 33]])


def test_picture_and_table_tell_one_story(sellers, slow):
    for folder in sellers:
        run = ea.load_run(folder, "cpu")
        found = ea.nearest(run, list(range(44)))
        labels = np.array(run.split.labels)
        test = json.loads((folder / "result.json").read_text())["test"]
        expected = {"clean": test["clean"], "replaced": test["query"]["draws"][0]}
        for condition, metrics in expected.items():
            first = found[condition][:, 0].numpy()
            assert 0.02 < metrics["recall@1"] < 0.98
            assert (labels[first] == labels).mean() == pytest.approx(metrics["recall@1"], abs=1e-12)


def test_nearest_of_embeddings_that_lie_close_together(sellers, tmp_path):
    """Of a network that has all but collapsed, too: all embeddings within about 0.001."""
    copy = copy_of(sellers[0], tmp_path / sellers[0].name)
    state = torch.load(copy / "best.pt", weights_only=True)
    state["network"]["head.weight"] *= 1e-3 / state["network"]["head.weight"].norm()
    state["network"]["head.bias"][:] = torch.linspace(-1, 1, 128)
    torch.save(state, copy / "best.pt")
    run = ea.load_run(copy, "cpu")
    photos, replaced = two_views(run)
    clean, replaced = slow_embeddings(run, photos), slow_embeddings(run, replaced)
    assert 1e-4 < np.linalg.norm(clean - clean.mean(axis=0), axis=1).max() < 2e-3
    found = ea.nearest(run, list(range(44)))["replaced"].numpy()
    assert (found == slow_neighbours(replaced, clean)).mean() > 0.98  # float32 swaps a few


CELL = 108  # px, eight a row and gaps of 5


def neighbours_picture(file, *runs_and_flags):
    ea.main([*map(str, runs_and_flags), "--device", "cpu", "--neighbours", str(file)])
    return np.asarray(Image.open(file))


def rows_of(picture):
    """The rows of a picture of neighbours: (rows, 8, CELL, CELL, 3), without the captions."""
    assert picture.shape[1] == 900 and picture.shape[0] % (CELL + 5 + 32) == 0
    rows = picture.reshape(-1, CELL + 5 + 32, 900, 3)[:, :CELL]
    return np.stack([rows[:, :, k * (CELL + 5):][:, :, :CELL] for k in range(8)], axis=1)


def unlike(cell, pixels):
    """How far a cell is from a picture, its frame and its label apart: mean of |difference|."""
    picture = Image.fromarray(pixels.round().byte().permute(1, 2, 0).numpy().squeeze())
    expected = np.asarray(picture.convert("RGB").resize((CELL, CELL), Image.LANCZOS), float)
    return np.abs(cell - expected)[40:-5, 5:-5].mean()


def frames(row):
    """The colours of the frames around a row's five neighbours, as #rrggbb; one colour a frame."""
    colours = []
    for cell in row[3:]:
        frame = np.concatenate([cell[0], cell[-1], cell[:, 0], cell[:, -1], cell[4], cell[-5]])
        colour, = {tuple(pixel) for pixel in frame.tolist()}
        colours.append("#{:02x}{:02x}{:02x}".format(*colour))
    return colours


def test_neighbours_picture(sellers, slow, tmp_path):
    """By name: the query, its mask, the query on its new background, and per run its neighbours
    in their order, in frames that say whether their class is the query's."""
    names = ["c11/0.png", "c21/3.png", "c19/1.png"]
    picture = neighbours_picture(tmp_path / "a.png", *sellers, "--images", ",".join(names))
    rows = rows_of(picture)
    assert len(rows) == 6
    run = ea.load_run(sellers[0], "cpu")
    labels, (photos, replaced) = run.split.labels, two_views(run)
    colours = set()
    for n, query in enumerate([0, 43, 33]):
        assert run.images[query].endswith(names[n])
        top = rows[2 * n]
        assert unlike(top[0], photos[query]) < 1
        assert unlike(top[1], pixels_of(run.split.masks[query], grey=True)) < 1
        assert unlike(top[2], replaced[query]) < 1
        assert (rows[2 * n + 1][:3] == 255).all()  # the same query, shown once
        for folder, row in zip(sellers, rows[2 * n:2 * n + 2]):
            near = slow[folder]["replaced"][query]
            expected = ["#009e73" if labels[k] == labels[query] else "#d55e00" for k in near]
            assert frames(row) == expected
            colours |= set(expected)
            for cell, k in zip(row[3:], near):
                assert unlike(cell, photos[k]) < 1 < unlike(cell, photos[(k + 4) % 44])
    assert len(colours) == 2  # both occur above
    assert not list(tmp_path.glob("*.tmp*")) and not list(sellers[0].glob("attention*"))


def test_neighbours_of_one_run(sellers, tmp_path):
    """Either of the two; the rows are those that it has in the picture of both."""
    both = rows_of(neighbours_picture(tmp_path / "a.png", *sellers, "--images", "3"))
    for k, folder in enumerate(sellers):
        alone = rows_of(neighbours_picture(tmp_path / "b.png", folder, "--images", "3"))
        assert len(both) == 6 and len(alone) == 3
        np.testing.assert_array_equal(alone[:, :3], both[::2, :3])
        np.testing.assert_array_equal(alone[:, 3:], both[k::2, 3:])


def test_neighbours_take_no_gradients(sellers, tmp_path, monkeypatch):
    def refused(*args, **kwargs):
        raise AssertionError("a gradient")

    monkeypatch.setattr(torch.autograd, "grad", refused)
    monkeypatch.setattr(torch.Tensor, "backward", refused)
    monkeypatch.setattr(torch.autograd, "backward", refused)
    forward, tracked = bgbias.Embedder.forward, []

    def watched(self, x):
        e = forward(self, x)
        tracked.append(e.requires_grad)
        return e

    monkeypatch.setattr(bgbias.Embedder, "forward", watched)
    neighbours_picture(tmp_path / "a.png", sellers[0], "--images", "1", "--worst")
    assert tracked and not any(tracked)


def test_worst_neighbours_are_misled_by_the_new_background(sellers, slow, tmp_path):
    """--worst: the base run's nearest is right on the query's own background, wrong on the new."""
    run = ea.load_run(sellers[0], "cpu")
    labels, near = np.array(run.split.labels), slow[sellers[0]]
    right = {condition: labels[near[condition][:, 0]] == labels for condition in near}
    misled = np.flatnonzero(right["clean"] & ~right["replaced"])
    assert 2 < len(misled) < 40
    worst = neighbours_picture(tmp_path / "a.png", *sellers, "--images", "44", "--worst")
    assert len(rows_of(worst)) == 2 * len(misled)
    order = [row for row in ea.shuffled(run) if row in misled]
    names = ["/".join(Path(run.images[row]).parts[-2:]) for row in order]
    named = neighbours_picture(tmp_path / "b.png", *sellers, "--images", ",".join(names))
    np.testing.assert_array_equal(rows_of(worst), rows_of(named))
    captions = [picture.reshape(-1, CELL + 37, 900, 3)[:, CELL:] for picture in (worst, named)]
    assert (captions[0] != captions[1]).any(axis=(1, 2, 3)).tolist() == [True, False] * len(misled)
    two = neighbours_picture(tmp_path / "c.png", *sellers, "--images", "2", "--worst")
    np.testing.assert_array_equal(two, worst[:len(two)])
    assert len(rows_of(two)) == 4


def test_neighbours_of_a_tiny_gallery(sellers, tmp_path):
    """Four photos have three neighbours each."""
    run = ea.load_run(sellers[0], "cpu")
    four = bgbias.Split(run.split.images[:4], run.split.masks[:4], run.split.labels[:4])
    run = run._replace(split=four, images=run.images[:4])
    found = ea.nearest(run, [0, 3])["replaced"]
    assert [sorted(row) for row in found.tolist()] == [[1, 2, 3], [0, 1, 2]]
    ea.draw_neighbours({"base": run}, "2", tmp_path / "a.png", worst=False)
    rows = rows_of(np.asarray(Image.open(tmp_path / "a.png")))
    assert (rows[:, 6:] == 255).all() and (rows[:, 3:6] != 255).any(axis=(2, 3, 4)).all()


# --------------------------------------------------------------------------------------------------
# Errors
# --------------------------------------------------------------------------------------------------


def error_of(capsys, *argv):
    """The one line on stderr; checks the exit code."""
    with pytest.raises(SystemExit) as ended:
        bgbias.command("eval_attention.py", lambda: ea.main([*map(str, argv), "--device", "cpu"]))
    assert ended.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("eval_attention.py: error: ") and "Traceback" not in "".join(lines)
    return lines[-1]


def copy_of(folder, copy):
    copy.mkdir()
    for name in ("config.json", "best.pt", "result.json"):
        (copy / name).write_bytes((folder / name).read_bytes())
    return copy


def test_error_no_run(capsys, tmp_path):
    assert f"{tmp_path}: no finished run; give" in error_of(capsys, tmp_path)


@pytest.mark.parametrize("argument, value", [
    ("loss", ["triplet"]), ("seed", None), ("seed", "x"), ("seed", -1), ("image_size", "large")])
def test_error_argument_in_config(capsys, runs, tmp_path, argument, value):
    copy = copy_of(runs[0], tmp_path / runs[0].name)
    saved = json.loads((copy / "config.json").read_text())
    saved["args"][argument] = value
    (copy / "config.json").write_text(json.dumps(saved))
    line = error_of(capsys, copy)
    assert f"{copy / 'config.json'}: " in line and "not of this bgbias.py, train again" in line


def test_error_loss_without_a_distance(capsys, runs, monkeypatch):
    monkeypatch.delitem(ea.DISTANCES, "contrastive")
    line = error_of(capsys, runs[0])
    assert line.endswith(f"{runs[0]}: its loss contrastive has no entry in DISTANCES in eval_attention.py")


def test_another_distance_is_another_score(runs, monkeypatch):
    before = ea.load_run(runs[0], "cpu").checksum
    assert before == ea.load_run(runs[0], "cpu").checksum
    monkeypatch.setitem(ea.DISTANCES, "contrastive", ea.cosine)
    assert before != ea.load_run(runs[0], "cpu").checksum


@pytest.mark.parametrize("content", [
    "{", "[]", '{"args": {}}', "", "null", 10_000 * "[" + 10_000 * "]",
    '{"args": ' + 10_000 * '{"args": ' + "1" + 10_001 * "}"])
def test_error_config(capsys, runs, tmp_path, content):
    copy = copy_of(runs[0], tmp_path / runs[0].name)
    (copy / "config.json").write_text(content)
    line = error_of(capsys, copy)
    assert f"{copy / 'config.json'}: " in line and "not of this bgbias.py, train again" in line


def test_error_data_gone(capsys, runs, tmp_path):
    copy = copy_of(runs[0], tmp_path / runs[0].name)
    saved = json.loads((copy / "config.json").read_text())
    saved["args"]["dataset"] = str(tmp_path / "gone")
    (copy / "config.json").write_text(json.dumps(saved))
    line = error_of(capsys, copy)
    assert f"{copy}: --dataset {tmp_path / 'gone'}: " in line and "start where" in line


def test_error_checkpoint(capsys, runs, tmp_path):
    copy = copy_of(runs[0], tmp_path / runs[0].name)
    best = (copy / "best.pt").read_bytes()
    (copy / "best.pt").write_bytes(b"no checkpoint")
    line = error_of(capsys, copy)
    assert f"{copy / 'best.pt'}: " in line and line.endswith("; train again")
    weight = torch.load(runs[0] / "best.pt", weights_only=True)["network"]["head.weight"]
    place = best.index(weight.numpy().tobytes())  # flipped in there, torch.load notices nothing
    for flipped in (place, place + 4 * weight.numel() - 1):
        damaged = bytearray(best)
        damaged[flipped] ^= 0xFF
        (copy / "best.pt").write_bytes(damaged)
        line = error_of(capsys, copy)
        assert f"{copy / 'best.pt'}: " in line and "damaged" in line, flipped
    (copy / "best.pt").write_bytes(best[:-1000])
    assert error_of(capsys, copy).endswith("; train again")
    (copy / "best.pt").unlink()
    line = error_of(capsys, copy)
    assert f"{copy / 'best.pt'}: " in line and "No such file" in line
    assert not list(copy.glob("attention*"))


def test_error_unfinished(capsys, runs, tmp_path):
    """Its best epoch, and so its scores, may still change."""
    copy = copy_of(runs[0], tmp_path / runs[0].name)
    (copy / "result.json").unlink()
    assert f"{copy}: no finished run; give folders" in error_of(capsys, copy)
    ea.main([str(copy), str(runs[0]), "--device", "cpu"])
    out = capsys.readouterr().out
    assert out.startswith(f"{copy}: no finished run, left out\n")
    assert row_of(out, "attention", runs[0])["images"] == "9"


def test_error_device(capsys, runs):
    with pytest.raises(bgbias.UserError, match="^--device cuda:99: "):
        ea.load_run(runs[0], "cuda:99")


@pytest.mark.parametrize("damage", [
    lambda saved: saved | {"score": saved["score"].astype(str)},
    lambda saved: saved | {"a": saved["a"] + 1j},
    lambda saved: saved | {"p": saved["p"][:-1]},
    lambda saved: saved | {"image": saved["image"][:-1]},
    lambda saved: saved | {"score": np.array([{}] * 9)},
    lambda saved: {name: saved[name] for name in ("image", "score", "a", "p")}])
def test_error_scores_of_another_kind(capsys, runs, tmp_path, damage):
    copy = copy_of(runs[0], tmp_path / runs[0].name)
    score_again(copy)
    with np.load(copy / "attention.npz") as file:
        saved = dict(file)
    with (copy / "attention.npz").open("wb") as file:
        np.savez(file, **damage(saved))
    capsys.readouterr()
    line = error_of(capsys, copy)
    assert f"{copy / 'attention.npz'}: " in line and line.endswith("; delete it")
    (copy / "attention.npz").unlink()
    np.testing.assert_array_equal(score_again(copy)[:, 1], saved["a"])  # that was the remedy


def test_error_scores(capsys, runs, tmp_path):
    copy = copy_of(runs[0], tmp_path / runs[0].name)
    (copy / "attention.npz").write_bytes(b"PK no scores")
    line = error_of(capsys, copy)
    assert f"{copy / 'attention.npz'}: " in line and line.endswith("; delete it")


def test_error_same_run_twice(capsys, runs, tmp_path):
    copy = copy_of(runs[0], tmp_path / runs[0].name)
    line = error_of(capsys, runs[0], copy)
    assert "are no pair; give one base and one BGAugment run" in line


def test_error_figure(capsys, runs, tmp_path):
    line = error_of(capsys, runs[0], "--figure", tmp_path / "a.png")
    assert "one base and one BGAugment run" in line
    assert "name of a .png" in error_of(capsys, *runs, "--figure", tmp_path / "a.jpg")
    assert "name of a .png" in error_of(capsys, *runs, "--figure", tmp_path / "gone" / "a.png")
    wanted = ("--figure", tmp_path / "a.png", "--images", "nothing.jpg")
    assert "--images nothing.jpg: no test image" in error_of(capsys, *runs, *wanted)
    wanted = ("--figure", tmp_path / "a.png", "--images", "0")
    assert "--images 0: no test image" in error_of(capsys, *runs, *wanted)


@pytest.mark.parametrize("flag", ["--neighbours", "--figure"])
@pytest.mark.parametrize("name", ["a.jpg", "a", "gone/a.png", "photos.png/a.png"])
def test_error_name_of_a_picture_before_the_work(capsys, runs, tmp_path, monkeypatch, flag, name):
    def no_work(*args, **kwargs):
        raise AssertionError("worked in vain")

    monkeypatch.setattr(ea, "network_of", no_work)
    (tmp_path / "photos.png").touch()
    line = error_of(capsys, *runs, flag, tmp_path / name)
    assert f"{tmp_path / name}: give the name of a .png in a folder that exists" in line


def test_error_neighbours(capsys, runs, sellers, tmp_path):
    flags = ("--neighbours", tmp_path / "a.png", "--images")
    assert "--images nothing.jpg: no test image" in error_of(capsys, *runs, *flags, "nothing.jpg")
    assert "--images 0: no test image" in error_of(capsys, *runs, *flags, "0")
    assert "--images : no test image" in error_of(capsys, *runs, *flags, "")
    line = error_of(capsys, *runs, *flags, "class_4/1.png", "--worst")
    assert line.endswith("--worst: picks the images itself; give --images a number")
    assert "one base and one BGAugment run" in error_of(capsys, runs[0], sellers[1], *flags, "1")
    assert not (tmp_path / "a.png").exists()


def test_a_figure_and_neighbours_are_two_calls(capsys, tmp_path):
    with pytest.raises(SystemExit) as ended:
        ea.main(["run", "--figure", "a.png", "--neighbours", "b.png"])
    assert ended.value.code == 2 and "not allowed with" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0/2", "3/2", "2", "a/b"])
def test_error_shard(capsys, text):
    with pytest.raises(SystemExit) as ended:
        ea.main(["run", "--shard", text])
    assert ended.value.code == 2
    assert "--shard" in capsys.readouterr().err
