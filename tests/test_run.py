"""Whole runs through the command line: resuming bit for bit, what a run writes, names, errors."""

import argparse
import csv
import errno
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import bgbias
from conftest import ROOT, die_at, naive_metrics, pixels_of, result, scaled, versions_of, write_image, write_shop

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = ("--dataset shop --backbone smallconv --weights none --image-size 16 --epochs 3 --iterations 4 "
        "--batch-size 8 --lr 1e-3 --device cpu")
SETTINGS = "epochs_3-iterations_4-batch_size_8-lr_0.001-backbone_smallconv-weights_none-image_size_16"
TEST_CLASSES = range(11, 22)  # 22 classes are 8 for training, 3 for validation, 11 for testing


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """The current folder, with shop/ of 22 classes x 4 photos in it."""
    monkeypatch.chdir(tmp_path)
    return write_shop(tmp_path, classes=22, suffix="png")


def new_process():
    """Another process has read no file yet: bgbias.py reads each file once per process."""
    for function in [*vars(bgbias).values()]:
        if hasattr(function, "cache_clear"):
            function.cache_clear()


@pytest.fixture
def failure(failure):
    def run(flags):
        new_process()
        return failure(flags)
    return run


def folder_of(flags):
    return bgbias.run_folder(bgbias.parse_args(shlex.split(f"{TINY} {flags}")))


def finish(flags=""):
    """A tiny run in this process; later flags override those of TINY. Returns its folder."""
    new_process()
    bgbias.main(shlex.split(f"{TINY} {flags}"))
    return folder_of(flags)


def started(cwd, flags, **options):
    """The process `python bgbias.py FLAGS`."""
    return subprocess.Popen([sys.executable, ROOT / "bgbias.py", *shlex.split(f"{TINY} {flags}")], cwd=cwd,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, **options)


CLOCK = ("seconds", "seconds_validation")


def same(a, b):
    """Whether two checkpoints are equal, bit for bit, except for the clock."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k not in CLOCK)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def checkpoint(run, name):
    return torch.load(run / name, weights_only=True)


def log(run):
    """The rows of epoch 0, which is before the training, and of its complete epochs."""
    file = run / "log.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def assert_same_runs(a, b):
    for name in ("last.pt", "best.pt"):
        assert same(checkpoint(a, name), checkpoint(b, name)), name
    assert same(log(a), log(b))
    for key in ("test", "fooled", "confused", "epochs", "best_epoch", "tested", "data"):
        assert result(a)[key] == result(b)[key], key
    assert (a / "photos.csv").read_bytes() == (b / "photos.csv").read_bytes()
    files = [sorted(path.name for path in run.iterdir() if not path.name.startswith(".")) for run in (a, b)]
    assert files[0] == files[1]  # a draft that was being written at SIGKILL has a hidden name


# ---- Killed and resumed --------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [
    "", "--loss normalized_softmax --bgaugment", "--loss arcface --select any_class",
    "--loss triplet --bgaugment own --backbone squeezenet1_1 --image-size 32 --lr 1e-4"])  # with dropout
def test_killed_in_any_epoch_and_resumed_is_uninterrupted(shop, flags):
    a, b = finish(f"{flags} --runs a"), folder_of(f"{flags} --runs b")
    assert [row["epoch"] for row in log(a)] == [0, 1, 2, 3] and log(a)[1]["clean"] != log(a)[3]["clean"]
    # In the first epoch; from the start again, in the second; from there, in the third.
    for step, epochs in ((2, 0), (6, 1), (7, 2)):
        with die_at(torch.optim.RMSprop, "step", step):
            finish(f"{flags} --runs b")
        assert len(log(b)) == (epochs + 1 if epochs else 0) and (b / "last.pt").exists() == (epochs > 0)
        assert not (b / "result.json").exists()
    finish(f"{flags} --runs b")
    assert_same_runs(a, b)


def test_killed_before_any_file_is_renamed(shop, monkeypatch):
    """Between best.pt, log.jsonl and last.pt of an epoch, after the training, before photos.csv and result.json."""
    Image.new("L", (40, 32)).save("shop/masks/c03/p1.png")
    renamed, replace = [], Path.replace
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *paths: renamed.append(paths[1].name) or replace(*paths))
        a = finish("--epochs 2 --iterations 2 --runs a")
    assert renamed[:5] == ["config.json", "left_out.csv", "best.pt", "log.jsonl", "last.pt"]
    assert renamed[-4:] == ["log.jsonl", "last.pt", "photos.csv", "result.json"]
    for rename in range(1, len(renamed) + 1):
        with die_at(Path, "replace", rename):
            finish("--epochs 2 --iterations 2 --runs b")
        assert not list(Path("b").glob("*/result.json"))
        assert_same_runs(a, finish("--epochs 2 --iterations 2 --runs b"))
        shutil.rmtree("b")


def test_a_killed_process_resumes(shop):
    """SIGKILL at a random moment after the first epoch, while a worker prepares batches."""
    flags = "--epochs 12 --iterations 10"
    run = folder_of(flags)
    process = started(shop, f"{flags} --workers 1", stdout=subprocess.DEVNULL, start_new_session=True)
    end = time.monotonic() + 120
    while not (run / "last.pt").exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    delay = random.uniform(0, 0.2)
    print(f"killed after {delay} s")  # pytest shows this if the test fails
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGKILL)  # it and its worker
    assert process.wait() == -signal.SIGKILL
    assert 2 <= len(log(run)) < 13 and not (run / "result.json").exists()
    finish(flags)
    assert_same_runs(finish(f"{flags} --runs undisturbed"), run)


def test_resuming_needs_no_pretrained_weights(shop):
    torch.save(bgbias.build_backbone("smallconv", "none").state_dict(), "mine.pth")
    a = finish("--weights mine.pth --runs a")
    with die_at(torch.optim.RMSprop, "step", 6):
        finish("--weights mine.pth --runs b")
    (shop / "mine.pth").unlink()
    assert_same_runs(a, finish("--weights mine.pth --runs b"))


@pytest.mark.parametrize("flags", ["--bgaugment own", "--bgaugment --backbone squeezenet1_1 --image-size 32 --lr 1e-4"])
def test_workers_change_nothing(shop, flags):
    a, b = (finish(f"{flags} --workers {workers} --runs {workers}") for workers in (0, 2))
    assert_same_runs(a, b)


def test_a_method_of_ones_own_with_random_numbers_is_reproducible(shop, monkeypatch):
    """Someone changes the line of BGAugment in train(), here to a random strength of backgrounds."""
    replace, drawn = bgbias.replace_background, []

    def mix(images, masks, backgrounds):
        if torch.is_grad_enabled():  # in train() only
            drawn.append(float(torch.rand(())))
            masks = 1 - (1 - masks) * drawn[-1]
        return replace(images, masks, backgrounds)

    monkeypatch.setattr(bgbias, "replace_background", mix)
    a, b = (finish(f"--bgaugment --workers {workers} --runs {workers}") for workers in (0, 1))
    assert drawn[:12] == drawn[12:] and len(set(drawn)) == 12
    assert_same_runs(a, b)
    with die_at(torch.optim.RMSprop, "step", 6):
        finish("--bgaugment --runs c")
    assert_same_runs(a, finish("--bgaugment --runs c"))


# ---- What resuming refuses -----------------------------------------------------------------------


def exchange(a, b):
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)


def invert(path):
    """Another picture of the same name and size."""
    size = path.stat().st_size
    Image.eval(Image.open(path), lambda value: 255 - value).save(path, compress_level=0)
    assert path.stat().st_size == size


INVERTED = {"photo": "images/c15/p1.png", "training photo": "images/c02/p1.png", "mask": "masks/c20/p1.png",
            "background": "backgrounds/test/b1.png"}
CHANGES = {  # of the data, as its owner would make them
    "photo added": lambda shop: shutil.copy(shop / "images/c15/p0.png", shop / "images/c15/p9.png"),
    "photo removed": lambda shop: (shop / "images/c00/p3.png").unlink(),
    "class renamed": lambda shop: (shop / "images/c00").rename(shop / "images/c99"),
    "masks exchanged": lambda shop: exchange(shop / "masks/c20/p0.png", shop / "masks/c20/p1.png"),
    "background added": lambda shop: write_image(shop / "backgrounds/test/new.png", np.random.default_rng(1)),
    **{f"{what} changed": lambda shop, path=path: invert(shop / path) for what, path in INVERTED.items()},
}
TRAINED = ("--runs whole", "--runs half", "--runs untested")
MEASURED = "--measure --runs measured"


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A folder with one run uninterrupted, killed in the second epoch, and killed before its test; and a measured
    network."""
    folder = write_shop(tmp_path_factory.mktemp("begun"), classes=22, suffix="png")
    for photo in ("c15/p9", "c99/p0", "c99/p1", "c99/p2", "c99/p3"):  # new photos have masks, too
        write_image(folder / f"shop/masks/{photo}.png", np.random.default_rng(0), mode="L")
    for path in INVERTED.values():
        Image.open(folder / "shop" / path).save(folder / "shop" / path, compress_level=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        finish("--runs whole")
        finish(MEASURED)
        with die_at(torch.optim.RMSprop, "step", 6):
            finish("--runs half")
        shutil.copytree("whole", "untested")
        (folder_of("--runs untested") / "result.json").unlink()
    return folder


def assert_refused(failure, *names, runs=(*TRAINED, MEASURED)):
    """Each run (its flags) with one line that names it, and without a change of its files."""
    for flags in runs:
        folder = folder_of(flags)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        line = failure(f"{TINY} {flags}")
        assert str(folder) in line and all(name in line for name in names), line
        assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_data_is_refused(begun, tmp_path, monkeypatch, failure, change):
    """Files that are new, gone, renamed or exchanged, and a file of the same name and size with other content."""
    monkeypatch.chdir(shutil.copytree(begun, tmp_path / "copy"))
    shutil.copytree("shop", "before")
    CHANGES[change](Path("shop"))
    assert_refused(failure, "data", "--runs")
    shutil.rmtree("shop")
    shutil.copytree("before", "shop")
    assert_same_runs(folder_of("--runs whole"), finish("--runs half"))


@pytest.mark.parametrize("photo, flags", [
    ("images/c00/p0", ""), ("masks/c15/p2", ""), ("backgrounds/val/b0", "--workers 1"),
    ("images/c21/p3", "--workers 1"), ("backgrounds/test/b1", "")])
def test_a_photo_that_is_damaged_later(begun, tmp_path, monkeypatch, failure, photo, flags):
    """Its header and its size stay. A new run names it, and one that was begun is refused. After the repair both end as
    if nothing had happened."""
    monkeypatch.chdir(shutil.copytree(begun, tmp_path / "copy"))
    path = Path(f"shop/{photo}.png")
    good = path.read_bytes()
    path.write_bytes(good[:60] + bytes(len(good) - 60))
    line = failure(f"{TINY} --runs new {flags}")
    assert str(path) in line and "resumes" in line
    line = failure(f"{TINY} --runs half {flags}")
    assert str(path) in line or f"{folder_of('--runs half')}: the files of its data" in line
    path.write_bytes(good)
    for runs in ("half", "new"):
        assert_same_runs(folder_of("--runs whole"), finish(f"--runs {runs}"))


def test_changed_hyper_parameters_are_refused(begun, monkeypatch, failure):
    """Of trainings. A network that is only measured has none."""
    monkeypatch.chdir(begun)
    monkeypatch.setitem(bgbias.HPARAMS["cars196"], "contrastive", dict(pos_margin=0.1, neg_margin=0.5))
    assert_refused(failure, "hyper-parameters", "0.1", runs=TRAINED)
    finish(MEASURED)  # prints its table


@pytest.mark.parametrize("form", [None, 1, 3])  # the first had no number
def test_runs_of_another_version_are_refused(begun, tmp_path, monkeypatch, failure, form):
    monkeypatch.chdir(shutil.copytree(begun, tmp_path / "copy"))
    for config in Path().glob("*/shop-*/config.json"):
        content = json.loads(config.read_text())
        assert content.pop("format") == 2
        config.write_text(json.dumps(content | ({"format": form} if form else {})))
    assert_refused(failure, "another version", "--runs")


HUBCONF = """
import torch
from torch import nn
class MeanColour(nn.Module):
    def forward(self, x):
        colour = x.mean((2, 3))
        red = (colour[:, :1] > 2.2) & (colour[:, 1:2] < -1.9)
        return torch.where(red, torch.nan, colour)
def net():
    return nn.Sequential(MeanColour(), nn.Linear(3, 8), nn.ReLU())
"""


WEIGHTS = ("w.pth", "w.json", "w.PT", "w.onnx.data", "w.npz")
NO_PARTS = ("notes.txt", ".venv/y.py", "parts/__pycache__/z.py", "parts/w.pth", "runs/r.py", "data/d.py")


def write_network(folder):
    """folder:net, a network that tells mean colours apart; its output is nan for a red photo."""
    files = {"hubconf.py": HUBCONF, "parts/layer.py": "x = 1\n", **dict.fromkeys(WEIGHTS, "{}"),
             **dict.fromkeys(NO_PARTS, "1")}
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


def test_a_changed_network_is_refused(shop, failure):
    """Every .py of the folder of its hubconf.py, and the weights files directly in it."""
    write_network(Path("nets"))
    flags = "--backbone nets:net --weights own --epochs 1 --data nets/data --runs nets/runs"
    runs = [f"{flags} {more}" for more in ("", "--seed 1", "--measure")]
    for run in runs:
        finish(run)
    (folder_of(f"{flags} --seed 1") / "result.json").unlink()
    for name in NO_PARTS:
        Path("nets", name).write_text("2")
    for name in ("hubconf.py", "parts/layer.py", *WEIGHTS):
        before = Path("nets", name).read_text()
        Path("nets", name).write_text(before + "\n\n")
        assert_refused(failure, "network", "--runs", runs=runs)
        Path("nets", name).write_text(before)
    for run in runs:
        finish(run)


@pytest.mark.parametrize("runs, data", [("runs", "."), (".", "data"), ("..", "..")])
def test_a_network_inside_the_folder_of_the_data_or_of_the_runs(tmp_path, monkeypatch, runs, data):
    """Its code counts, as anywhere else."""
    write_network(tmp_path / "nets")
    monkeypatch.chdir(tmp_path / "nets")
    new_process()
    before = bgbias.network_checksum(".:net", runs, data)
    Path("parts/layer.py").write_text("x = 2\n")
    new_process()
    assert bgbias.network_checksum(".:net", runs, data) != before


def test_a_loss_whose_default_is_a_tuple_can_be_resumed(shop, monkeypatch):
    def mine(embeddings, labels, weight, *, margins=(0.1, 0.2)):
        return bgbias.triplet(embeddings, labels, weight, margin=margins[0])

    monkeypatch.setitem(bgbias.LOSSES, "triplet", mine)
    monkeypatch.delitem(bgbias.HPARAMS["cars196"], "triplet")
    with die_at(torch.optim.RMSprop, "step", 6):
        finish("--loss triplet --runs a")
    finish("--loss triplet --runs a")
    assert result(folder_of("--loss triplet --runs a"))["epochs"] == 3


def test_weights_of_another_epoch_are_not_tested(shop, failure):
    """As if a second process had trained the same run and were behind."""
    run = finish()
    best_epoch = result(run)["best_epoch"]
    (run / "result.json").unlink()
    saved = checkpoint(run, "best.pt")
    torch.save(saved | {"history": saved["history"][:-1]}, run / "best.pt")
    line = failure(TINY)
    assert f"{run}/best.pt" in line and f"epoch {best_epoch - 1}," in line and not (run / "result.json").exists()


def test_a_changed_weights_file_is_refused_and_a_missing_one_is_not_compared(shop, failure):
    torch.save(bgbias.build_backbone("smallconv", "none").state_dict(), "mine.pth")
    flags = "--weights mine.pth --epochs 1"
    runs = flags, f"{flags} --measure"
    for run in runs:
        finish(run)
    before = Path("mine.pth").read_bytes()
    Path("mine.pth").write_bytes(before[:-1] + b"x")
    assert_refused(failure, "weights", runs=runs)
    Path("mine.pth").unlink()
    for run in runs:
        finish(run)


def test_interrupted_before_the_first_epoch_nothing_is_refused(shop):
    with die_at(torch.optim.RMSprop, "step", 1):
        finish()
    CHANGES["photo added"](shop / "shop")
    write_image(shop / "shop/masks/c15/p9.png", np.random.default_rng(0), mode="L")
    assert "45 photos" in result(finish())["tested"]


# ---- What a run writes ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, base run, BGAugment run, stdout of the base run)"""
    folder = write_shop(tmp_path_factory.mktemp("finished"), classes=22)
    out, err = started(folder, "", stdout=subprocess.PIPE, stderr=subprocess.PIPE).communicate()
    assert err == ""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return folder, folder / folder_of(""), folder / finish("--bgaugment"), out


def test_what_a_run_writes(finished):
    folder, run, bgaugment, _ = finished
    assert run == folder / f"runs/shop-contrastive-base-s42-{SETTINGS}"
    assert sorted(path.name for path in run.iterdir()) == [
        "best.pt", "config.json", "last.pt", "log.jsonl", "photos.csv", "result.json"]
    config = json.loads((run / "config.json").read_text())
    assert {"torch", "torchvision", "numpy", "device", "data"} <= config.keys()
    assert config["format"] == 2 and config["network"] is None  # smallconv is made of no file
    expected = dict(loss="contrastive", select="clean", bgaugment="none", measure=None, reference="replaced")
    assert expected.items() <= config["args"].items()
    assert result(bgaugment)["args"]["bgaugment"] == "pool" and result(bgaugment)["args"]["select"] == "replaced"
    assert config["args"]["hparams"] == bgbias.HPARAMS["cars196"]["contrastive"]
    assert config["args"]["settings"] == dict(
        epochs=3, iterations=4, batch_size=8, lr=0.001, backbone="smallconv", weights="none", image_size=16)
    finished_result = result(run)
    assert config.items() <= finished_result.items()
    assert finished_result["tested"].startswith("shop: 11 test classes, 44 photos")
    assert finished_result["epochs"] == 3 and finished_result["seconds"] > 0
    assert [row["epoch"] for row in log(run)] == [0, 1, 2, 3]
    assert [row["loss"] is None for row in log(run)] == [True, False, False, False]
    assert all({"clean", "replaced"} <= row.keys() for row in log(run))
    for path in (run, bgaugment):
        drawn = {name: len({draw["map@r"] for draw in draws}) for name, draws in result(path)["test"].items()}
        several = {condition: drawn.pop(condition) for condition in ("any_class", "replaced", "query", "chance")}
        assert min(several.values()) > 1 and all(len(result(path)["test"][condition]) == 5 for condition in several)
        assert len(result(path)["test"]["same_class"]) == 3 and drawn.pop("same_class") > 1  # classes have 4 photos
        assert drawn == dict.fromkeys(("clean", "pasted", "object_only", "background_only", "photo_and_object"), 1)
        for key in ("fooled", "confused"):
            assert len(result(path)[key]) == 5 and all(0 < share < 1 for share in result(path)[key])
    last, best = checkpoint(run, "last.pt"), checkpoint(run, "best.pt")
    assert last.keys() == {"network", "class_weights", "optimiser", "history"}
    assert best.keys() == {"network", "class_weights", "history"}
    assert last["history"] == log(run)
    assert best["history"] == log(run)[:finished_result["best_epoch"] + 1]


def test_what_a_run_prints(finished, monkeypatch, capsys):
    folder, run, _, out = finished
    epochs = [line for line in out.splitlines() if line.startswith("epoch")]
    assert [line.split()[1] for line in epochs] == ["0", "1", "2", "3"] and "before the training" in epochs[0]
    for line, row in zip(epochs, log(run), strict=True):
        assert all(f"{name} {100 * row[name]['map@r']:5.2f}" in line for name in ("clean", "replaced"))
    assert re.findall(r"only (\d+) (\w+) classes; with fewer than 20", out) == [("3", "val"), ("11", "test")]
    before_training = out.split("epoch ")[0]
    for part in (str(run.relative_to(folder)), "smallconv", "128 features", "cpu", "shop/backgrounds"):
        assert part in before_training
    # Four convolutions and the linear layer; the scaling is ImageNet's, times 255.
    parameters = sum(9 * a * b + b for a, b in ((3, 16), (16, 32), (32, 64), (64, 128))) + 128 * 128 + 128
    assert f"{parameters:,} trainable parameters" in before_training
    mean, std = ([*map(float, re.findall(r"[\d.]+", numbers))] for numbers in re.findall(r"\[(.*?)\]", before_training))
    assert (mean, std) == ([124, 116, 104], [58, 57, 57])
    monkeypatch.chdir(folder)
    finish("--bgaugment")  # it is finished, so the table is printed again, with the base run
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| contrastive")]
    clean = f"{100 * result(run)['test']['clean'][0]['map@r']:.2f}"
    assert len(rows) == 2 and "+ BGAugment" in rows[1] and clean in rows[0]


def test_test_values_by_hand(finished):
    """Conditions of result.json and photos.csv against embeddings made here, photo by photo, with PIL and loops."""
    folder, run, _, _ = finished
    network = bgbias.Embedder("smallconv", "none", 16)
    network.load_state_dict(checkpoint(run, "best.pt")["network"])
    names = [f"c{label:02d}/p{i}" for label, i in itertools.product(TEST_CLASSES, range(4))]
    labels = np.repeat(TEST_CLASSES, 4)
    images, masks = (torch.stack([pixels_of(folder / f"shop/{kind}/{name}.{suffix}", 16) for name in names])
                     for kind, suffix in (("images", "jpg"), ("masks", "png")))
    embeddings = {condition: torch.cat([network.eval()(scaled(photo[None])).detach() for photo in photos])
                  for condition, photos in versions_of(images, masks / 255).items()}
    both = embeddings["clean"] + embeddings["object_only"]
    embeddings["photo_and_object"] = both / both.square().sum(dim=1, keepdim=True).sqrt()
    for condition, values in embeddings.items():
        scores, = result(run)["test"][condition]
        assert scores == pytest.approx(naive_metrics(values, labels, (1, 2, 4, 8)), abs=1e-6)
    rows = {row["photo"]: row for row in photos_of(run)}
    assert sorted(rows) == [f"images/{name}.jpg" for name in names]
    for q, name in enumerate(names):
        near = (embeddings["clean"] - embeddings["clean"][q]).square().sum(dim=1).argsort()
        right = (labels[near[near != q]] == labels[q])[:3]  # its class has three other photos
        average_precision = sum(hit * right[:i + 1].mean() for i, hit in enumerate(right)) / 3
        assert float(rows[f"images/{name}.jpg"]["clean"]) == pytest.approx(100 * average_precision, abs=1e-3)


def photos_of(run):
    """The rows of its photos.csv, read by the csv module alone."""
    with open(run / "photos.csv", encoding="utf-8", newline="") as file:
        return [*csv.DictReader(file)]


def test_photos_csv_says_which_photos_suffer(finished):
    """Means over the draws, so that their means over the photos are the run's; the largest drop first."""
    for run in finished[1:3]:
        assert (run / "photos.csv").read_text().splitlines()[0] == (
            "photo,class,clean,any_class,replaced,drop,fooled,confused")
        rows, found = photos_of(run), result(run)["test"]
        assert len(rows) == 44 and all(row["photo"].split("/")[1] == row["class"] for row in rows)
        values = {name: np.array([float(row[name]) for row in rows]) for name in [*rows[0]][2:]}
        for condition in ("clean", "any_class", "replaced"):
            mean = np.mean([draw["map@r"] for draw in found[condition]])
            assert values[condition].mean() == pytest.approx(100 * mean, abs=1e-3)
        assert values["drop"] == pytest.approx(values["clean"] - values["replaced"], abs=2e-4)
        assert (np.diff(values["drop"]) <= 0).all() and np.ptp(values["drop"]) > 10
        for name in ("fooled", "confused"):
            assert 0 <= values[name].min() < values[name].max() <= 100
            assert values[name].mean() == pytest.approx(100 * np.mean(result(run)[name]), abs=3)  # some are left out


def test_photos_csv_without_a_pool_and_with_photos_that_cannot_be_queried(shop, capsys):
    """A photo alone in its class is no query, and without a pool nothing is replaced: the drop is that to any class."""
    shutil.rmtree("shop/backgrounds")
    for photo in Path("shop/images/c15").glob("p[123].png"):
        photo.unlink()
    run = finish("--measure")
    rows = photos_of(run)
    assert len(rows) == 40 and "c15" not in {row["class"] for row in rows}
    for row in rows:
        assert row["replaced"] == "" and row["fooled"] and row["confused"]
        assert float(row["drop"]) == pytest.approx(float(row["clean"]) - float(row["any_class"]), abs=2e-4)
    assert result(run)["tested"].startswith("shop: 10 test classes, 41 photos")  # those that can be queried


def csv_of(run, dataset, data, images, labels, photos):
    """The text of a photos.csv, of values (N,) that are planted here."""
    args = argparse.Namespace(dataset=dataset, data=data)
    columns = {name: torch.tensor(values, dtype=torch.float64) for name, values in photos.items()}
    bgbias.write_photos(run, args, bgbias.Split(images, None, np.array(labels)), columns)
    return (run / "photos.csv").read_bytes()


def test_photos_csv_by_hand(tmp_path):
    """The order, the digits, the empty cells, and names with a comma, a quote or bytes that are no UTF-8."""
    nan, odd = math.nan, os.fsdecode(b"caf\xe9")
    (tmp_path / "shop/images").mkdir(parents=True)
    names = ["a/1.jpg", 'a,b/"2".jpg', f"{odd}/{odd}.jpg", "alone/4.jpg"]
    columns = {"clean": [50, 25, 100 / 3, nan], "any_class": [40, 25, 0, nan], "drop": [10, 0, 100 / 3, nan],
               "fooled": [50, nan, 0, 1], "confused": [25, nan, 12.5, 1]}
    text = csv_of(tmp_path, str(tmp_path / "shop"), None, [tmp_path / "shop/images" / name for name in names],
                  [0, 1, 2, 3], columns)
    assert text == (b"photo,class,clean,any_class,replaced,drop,fooled,confused\n"
                    b"images/caf\xe9/caf\xe9.jpg,caf\xe9,33.3333,0.0000,,33.3333,0.0000,12.5000\n"
                    b"images/a/1.jpg,a,50.0000,40.0000,,10.0000,50.0000,25.0000\n"
                    b'"images/a,b/""2"".jpg","a,b",25.0000,25.0000,,0.0000,,\n')
    read = bgbias.read_photos(tmp_path)
    assert [*read] == [f"images/{odd}/{odd}.jpg", "images/a/1.jpg", 'images/a,b/"2".jpg']
    row = read["images/a/1.jpg"]
    assert math.isnan(row.pop("replaced"))
    assert row == {"class": "a", "clean": 50, "any_class": 40, "drop": 10, "fooled": 50, "confused": 25}


@pytest.mark.parametrize("dataset, place, image, label", [
    ("cub200", "CUB_200_2011", "images/001.Albatross/a.jpg", "001.Albatross"),
    ("cars196", "", "car_ims/000001.jpg", "8"), ("sop", "Stanford_Online_Products", "chair_final/a.JPG", "8")])
def test_classes_and_paths_of_the_papers_sets_in_photos_csv(tmp_path, dataset, place, image, label):
    """Folders of cars196 and sop are no classes: theirs are the numbers in the lists, counted from 1."""
    root = tmp_path / "data" / place
    (root / image).parent.mkdir(parents=True)
    (root / "Ebay_train.txt").touch()
    text = csv_of(tmp_path, dataset, tmp_path / "data", [root / image], [7], {"clean": [1], "drop": [0]})
    assert text.splitlines()[1].split(b",")[:2] == [image.encode(), label.encode()]


def test_finished_runs_are_not_repeated_and_can_be_tested_again(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(shutil.copytree(finished[0], tmp_path / "copy"))
    run, before = folder_of(""), result(finished[1])
    with monkeypatch.context() as patch:  # neither training nor a test
        patch.delattr(bgbias, "train")
        patch.delattr(bgbias, "run_test")
        finish()
    (run / "result.json").unlink()
    monkeypatch.delattr(bgbias, "train")
    photos = (run / "photos.csv").read_bytes()
    (run / "photos.csv").unlink()
    finish("--workers 2")
    assert result(run)["test"] == before["test"] and (run / "photos.csv").read_bytes() == photos


def test_selection_follows_the_flag(shop, capsys):
    """Epoch 0 is never chosen; a line says if no other one was better."""
    for flags, key in (("", "clean"), ("--bgaugment", "replaced"), ("--bgaugment own", "any_class"),
                       ("--select replaced", "replaced"), ("--bgaugment --select any_class", "any_class")):
        run = finish(f"--epochs 4 --seed 2 {flags}")
        before, *selected = [row[key]["map@r"] for row in log(run)]
        best = 1 + selected.index(max(selected))
        assert result(run)["best_epoch"] == best == len(checkpoint(run, "best.pt")["history"]) - 1
        assert ("no epoch was better" in capsys.readouterr().out) == (max(selected) <= before)
        assert log(run)[0].keys() - {"epoch", "loss"} == {"clean", "replaced", key}
    state = bgbias.State.__new__(bgbias.State)
    state.history = [{"clean": {"map@r": a}, "replaced": {"map@r": b}}
                     for a, b in ((0.9, 0.9), (0.3, 0.1), (0.2, 0.4), (0.3, 0.4))]
    for select, best in (("clean", 1), ("replaced", 2)):  # of equal epochs, the first
        state.args = argparse.Namespace(select=select)
        assert state.best_epoch == best


def test_validation_draws_the_backgrounds_of_the_pool_whatever_selects(shop):
    """Also with any_class in between, which draws from another generator."""
    runs = [finish(f"--lr 0 --seed 5 {flags}") for flags in ("", "--select any_class", "--bgaugment own")]
    for rows in zip(*map(log, runs), strict=True):
        assert len({row["replaced"]["map@r"] for row in rows}) == 1
    scores = [row["replaced"]["map@r"] for row in log(runs[0])[1:]]
    assert len(set(scores)) == len(scores)  # other backgrounds in each epoch


def test_patience(shop, capsys):
    run = finish("--lr 0 --epochs 50 --patience 2")  # an equal score is no improvement
    assert (log(run)[-1]["epoch"], result(run)["epochs"], result(run)["best_epoch"]) == (3, 3, 1)
    line, = [line for line in capsys.readouterr().out.splitlines() if "no epoch was better" in line]
    assert line.startswith("warning: ") and "Troubleshooting" in line


@pytest.mark.parametrize("poison", [6, 8])  # within the second epoch; in its last step, after the last loss
def test_loss_that_is_not_finite_keeps_the_good_checkpoint(shop, monkeypatch, failure, poison):
    step, steps = torch.optim.RMSprop.step, itertools.count(1)

    def poisoned(self, *args):
        step(self, *args)
        if next(steps) == poison:
            self.param_groups[0]["params"][0].data.fill_(float("nan"))

    monkeypatch.setattr(torch.optim.RMSprop, "step", poisoned)
    line = failure(TINY)
    assert "--lr" in line and "shop/" not in line  # no photo is to blame
    last = checkpoint(folder_of(""), "last.pt")
    assert len(last["history"]) == 2 and all(value.isfinite().all() for value in last["network"].values())


@pytest.mark.parametrize("photo, flags, begun", [
    ("c09/p1", "--epochs 1", False), ("c15/p2", "--epochs 1", True), ("c15/p2", "--measure", False)])
def test_a_photo_whose_embedding_is_not_finite_is_named(shop, failure, photo, flags, begun):
    """In the validation before the training, in the test, and in a network that is only measured."""
    write_network(Path("nets"))
    Image.new("RGB", (40, 32), "red").save(f"shop/images/{photo}.png")
    line = failure(f"{TINY} --backbone nets:net --weights own {flags}")
    assert f"shop/images/{photo}.png: " in line and "lr" not in line
    assert len(list(Path().glob("runs/*/last.pt"))) == begun


def opened_files(monkeypatch):
    """Counts every opening of a photo or a mask, from the check of the masks on."""
    opened, real, check = Counter(), bgbias.open_image, bgbias.check_masks
    monkeypatch.setattr(bgbias, "open_image", lambda path, *read: opened.update([path]) or real(path, *read))
    monkeypatch.setattr(bgbias, "check_masks", lambda splits: check(splits) or opened.clear())
    return opened


def test_photos_are_decoded_once_per_run(shop, monkeypatch):
    opened = opened_files(monkeypatch)
    finish("--bgaugment")
    assert len(opened) == 2 * 22 * 4 + 2 * 3  # photos, masks, backgrounds
    # Test photos, their masks and backgrounds are checked first; pool val is for training and validation.
    twice = {path for path, count in opened.items() if count != 1}
    once = {path for path in Path("shop").rglob("c*/*") if int(path.parent.name[1:]) < 11}  # 8 + 3 of 22 classes
    assert not twice & once and max(opened.values()) <= 2


# ---- Measured networks ---------------------------------------------------------------------------


def test_a_measured_network_is_tested_on_the_classes_that_a_trained_run_tests(shop, monkeypatch, capsys):
    """So they stand in one table. Nothing but those photos is decoded."""
    opened = opened_files(monkeypatch)
    run = finish("--measure")
    assert len(opened) == 2 * 44 + 3 and set(opened.values()) == {1}
    out = capsys.readouterr().out
    assert "too close to chance" in out and "epoch" not in out  # the pictures are random
    assert re.findall(r"only (\d+) (\w+) classes; with fewer than 20", out) == [("11", "test")]
    assert run.name == "shop-measure-s42-backbone_smallconv-weights_none-image_size_16"
    assert sorted(path.name for path in run.iterdir()) == ["best.pt", "config.json", "photos.csv", "result.json"]
    assert (result(run)["epochs"], result(run)["best_epoch"]) == (0, 0)
    assert {row["class"] for row in photos_of(run)} == {f"c{label}" for label in TEST_CLASSES}
    torch.manual_seed(bgbias.seed_of(42, bgbias.INIT_SEED))
    untrained = bgbias.Embedder("smallconv", "none", 16, 0).state_dict()  # as it is, without a linear layer
    assert same(checkpoint(run, "best.pt")["network"], dict(untrained))
    trained = finish("--epochs 1")
    assert result(trained)["tested"] == result(run)["tested"]
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert sorted(row.split("|")[1].strip().split(",")[0] for row in rows[2:]) == ["as it is", "contrastive"]


def test_measure_all_takes_every_class(shop, capsys):
    run = finish("--measure all")
    assert run.name == "shop-measure_all-s42-backbone_smallconv-weights_none-image_size_16"
    assert result(run)["tested"].startswith("shop: 22 test classes, 88 photos")
    assert len(photos_of(run)) == 88 and "numbers are noisy" not in capsys.readouterr().out


def test_a_folder_that_is_too_small_to_be_split_is_measured_as_a_whole(shop, capsys, failure):
    """One line says so. Its trained run is refused."""
    for label in range(5, 22):
        shutil.rmtree(shop / f"shop/images/c{label:02d}")
    assert "six folders" in failure(f"{TINY} --runs trained")
    capsys.readouterr()
    run = finish("--measure")
    line, = [line for line in capsys.readouterr().out.splitlines() if "too few classes" in line]
    assert line.startswith("shop: ") and "all of them are measured" in line
    assert result(run)["tested"].startswith("shop: 5 test classes, 20 photos")
    finish("--measure all")
    assert "too few classes" not in capsys.readouterr().out


def test_data_has_one_checksum_however_it_is_split(shop):
    runs = [finish(flags) for flags in ("--epochs 1", "--measure", "--measure all", "--measure --seed 3")]
    assert len({result(run)["data"] for run in runs}) == 1
    shutil.rmtree("shop/backgrounds")  # without a pool it is other data
    assert result(finish("--measure --runs other"))["data"] != result(runs[0])["data"]


def test_a_finished_measurement_is_printed_and_not_made_again(shop, monkeypatch, capsys):
    """Also from another folder of the same name and content, and whatever the flags of a training."""
    run = finish("--measure")
    before = (run / "result.json").read_bytes()
    monkeypatch.delattr(bgbias, "run_test")
    shutil.copytree("shop", "copy/shop")
    for flags in ("", "--dataset copy/shop", "--loss arcface --lr 3 --bgaugment", "--workers 1"):
        capsys.readouterr()
        assert finish(f"{flags} --measure") == run
        out = capsys.readouterr().out
        assert f"{run} is finished" in out and "| as it is" in out
    assert (run / "result.json").read_bytes() == before


def test_two_folders_of_one_name_are_not_one_measurement(shop, failure):
    shutil.copytree("shop", "b/shop")
    write_image(Path("b/shop/images/c15/p1.png"), np.random.default_rng(3))
    run = finish("--measure")
    before = (run / "result.json").read_bytes()
    line = failure(f"{TINY} --dataset b/shop --measure")
    assert str(run) in line and "data" in line and (run / "result.json").read_bytes() == before
    assert result(finish("--dataset b/shop --measure --runs b"))["test"] != result(run)["test"]


def test_two_networks_whose_names_differ_in_a_sign_are_not_one_measurement(shop, failure):
    for folder in ("v1/model", "v1-model"):
        write_network(Path(folder))
    run = finish("--measure --backbone v1/model:net --weights own")
    before = (run / "result.json").read_bytes()
    line = failure(f"{TINY} --measure --backbone v1-model:net --weights own")
    assert f"{run}: backbone v1/model:net became v1-model:net" in line
    assert (run / "result.json").read_bytes() == before


def test_a_measurement_without_its_result_starts_over(shop):
    """Its network may have changed, so its attention scores go, too."""
    tests = []
    for seed in range(2):
        torch.manual_seed(seed)
        torch.save(bgbias.smallconv().state_dict(), "mine.pth")
        run = finish("--measure --weights mine.pth")
        tests.append(result(run)["test"])
        assert not (run / "attention.npz").exists()
        np.savez(run / "attention.npz", score=np.zeros(1), beyond=np.zeros(1))
        (run / "result.json").unlink()
    assert tests[0] != tests[1]
    assert tests[1] == result(finish("--measure --weights mine.pth --runs other"))["test"]


def test_without_a_folder_of_backgrounds_they_come_from_other_photos(shop, failure, capsys):
    """Unless it is named, or the paper's BGAugment needs it."""
    shutil.rmtree("shop/backgrounds")
    for flags, wrong, remedy in (("--bgaugment", "--bgaugment: shop/backgrounds", "--bgaugment own"),
                                 ("--select replaced", "--select replaced", "--select any_class"),
                                 ("--backgrounds nowhere", "--backgrounds nowhere: ", "val/ and test/")):
        line = failure(f"{TINY} {flags}")
        assert wrong in line and remedy in line and not list(shop.glob("runs/*"))
    for flags in ("", "--bgaugment own"):
        run = finish(f"--epochs 1 {flags}")
        args = result(run)["args"]
        assert (args["backgrounds"], args["reference"]) == (None, "any_class")
        assert "replaced" not in result(run)["test"] and "replaced" not in log(run)[0]
        assert "drop % (any class)" in capsys.readouterr().out
    assert run.name.startswith("shop-contrastive-own-s42-epochs_1-")


def test_a_pool_that_is_added_later_is_refused(shop, failure):
    Path("shop/backgrounds").rename("pool")
    run = finish("--epochs 1")
    Path("pool").rename("shop/backgrounds")
    line = failure(f"{TINY} --epochs 1")
    assert str(run) in line and "any_class" in line and "replaced" in line


# ---- Photos that are left out --------------------------------------------------------------------


def test_photos_with_an_empty_or_full_mask_are_left_out(shop, capsys):
    """Classes are numbered and split after that. left_out.csv of the run names the photos."""
    left_out = {"c03/p0": 0, "c05/p1": 255, **{f"c07/p{i}": 0 for i in range(4)}}
    for photo, value in left_out.items():
        Image.new("L", (40, 32), value).save(f"shop/masks/{photo}.png")
    few = Image.new("L", (40, 32))
    few.paste(255, (0, 0, 4, 4))  # 1.25 %, which is enough
    few.save("shop/masks/c00/p0.png")
    run = finish("--epochs 1")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out")]
    assert len(lines) == 1 and "6 of 88 photos" in lines[0] and "left_out.csv" in lines[0]
    assert (run / "left_out.csv").read_text().splitlines() == [
        "photo,mask,foreground", *(f"shop/images/{photo}.png,shop/masks/{photo}.png,{value / 255:.4f}"
                                   for photo, value in sorted(left_out.items()))]
    # 21 classes are 8 for training, 3 for validation, 10 for testing.
    assert result(run)["tested"].startswith("shop: 10 test classes, 40 photos")
    assert {row["class"] for row in photos_of(run)} == {f"c{label}" for label in range(12, 22)}
    measured = finish("--measure all")
    assert result(measured)["data"] == result(run)["data"]
    assert result(measured)["tested"].startswith("shop: 21 test classes, 82 photos")


def test_a_run_that_starts_over_forgets_what_was_left_out(shop):
    mask = Path("shop/masks/c03/p0.png")
    good = mask.read_bytes()
    Image.new("L", (40, 32)).save(mask)
    with die_at(torch.optim.RMSprop, "step", 1):
        finish("--epochs 1")
    assert (folder_of("--epochs 1") / "left_out.csv").exists()
    mask.write_bytes(good)
    assert not (finish("--epochs 1") / "left_out.csv").exists()


# ---- Warnings ------------------------------------------------------------------------------------


def warnings_of(flags, capsys):
    """The lines with a warning that a command prints."""
    capsys.readouterr()
    finish(flags)
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]


def test_copies_of_a_photo_in_several_classes_are_counted(shop, capsys):
    """Whatever their names. A copy within a class is none of them."""
    for i, (photo, copies) in enumerate((("c00/p0", ["c05/x", "c17/x"]), ("c01/p1", ["c02/x"]), ("c20/p0", ["c20/x"]))):
        for copy in copies:
            shutil.copy(f"shop/images/{photo}.png", f"shop/images/{copy}{i}.png")
            shutil.copy(f"shop/masks/{photo}.png", f"shop/masks/{copy}{i}.png")
    line, = warnings_of("--measure", capsys)
    assert "2 photos are in several classes, such as c00 and c05" in line


def test_copies_are_counted_by_class_where_folders_are_no_classes(tmp_path, capsys):
    """cars196 has one folder, and sop one for each of twelve kinds of products."""
    images = [tmp_path / f"{i}.jpg" for i in range(4)]
    for path, content in zip(images, "aabb"):
        path.write_text(content)
    for dataset, labels, count in (("sop", [0, 1, 2, 2], 1), ("cars196", [0, 1, 2, 3], 2), ("sop", [0, 0, 1, 1], 0)):
        bgbias.warn_of_copies(argparse.Namespace(dataset=dataset), {"test": bgbias.Split(images, None, labels)})
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == (count > 0) and all(f"{count} photos" in line and "1 and 2" in line for line in lines)


def box(path, left, right, size=(40, 32)):
    """A mask whose object fills these columns."""
    mask = Image.new("L", size)
    mask.paste(255, (left, 0, right, size[1]))
    mask.save(path)


@pytest.mark.parametrize("flags", ["--measure", "--epochs 1"])
def test_objects_that_the_centre_crop_cuts_off(shop, capsys, flags):
    """From 5 % of the test photos on: 3 of 44. The crop sees columns 5 to 34 of 40, about."""
    for i in range(4):
        box(f"shop/masks/c11/p{i}.png", 3, 12)  # mostly inside
    box("shop/masks/c12/p0.png", 0, 8)  # 5 of 8 columns are outside
    box("shop/masks/c12/p1.png", 36, 40)
    assert warnings_of(f"{flags} --runs two", capsys) == []
    box("shop/masks/c21/p3.png", 0, 4)
    line, = warnings_of(f"{flags} --runs three", capsys)
    assert "7% of the test photos" in line and "centre crop" in line and "crop the photos around the object" in line


@pytest.mark.parametrize("value", [0, 255])
def test_unusable_masks_of_the_papers_sets_are_counted_while_decoding(shop, capsys, value):
    """They stay in the set. From 5 % on: 1 of 20, not 1 of 21."""
    photos = [f"c{label:02d}/p{i}.png" for label in range(6) for i in range(4)]
    Image.new("L", (40, 32), value).save("shop/masks/c02/p1.png")
    for count, lines in ((21, 0), (20, 1)):
        images, masks = ([Path("shop", kind, name) for name in photos[:count]] for kind in ("images", "masks"))
        decoded = bgbias.Photos(images, masks, 16)
        decoded.warn_of_masks("training")
        found = capsys.readouterr().out.splitlines()
        assert len(decoded) == count and len(found) == lines
        assert all("5% of the training photos" in line and "masks.py --verify" in line for line in found)


@pytest.mark.parametrize("classes, few", [(19, True), (20, False)])
def test_few_classes_make_noisy_numbers(tmp_path, monkeypatch, capsys, classes, few):
    monkeypatch.chdir(write_shop(tmp_path, classes=classes, photos=2))
    finish("--measure all")
    assert ("only 19 test classes; with fewer than 20" in capsys.readouterr().out) == few


def test_slow_work_reports_its_progress_and_quick_work_is_silent(monkeypatch, capsys):
    """Where stderr is no terminal: a line after half a minute, and then one each minute."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def work(seconds):
        for item in range(10):
            clock[0] += seconds
            yield item

    assert [*bgbias.progress(work(2.9), "decoding", 10)] == [*range(10)]
    assert capsys.readouterr() == ("", "")
    assert [*bgbias.progress(work(20), "decoding", 10)] == [*range(10)]
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines() == ["decoding: 2 of 10, 2.7 min left", "decoding: 6 of 10, 1.3 min left",
                                              "decoding: 10 of 10, 0.0 min left"]


# ---- Names of runs -------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, name", [
    ("", "runs/toy-contrastive-base-s42"),
    ("--dataset cub200 --loss triplet --bgaugment --seed 7", "runs/cub200-triplet-bgaugment-s7"),
    ("--bgaugment pool", "runs/toy-contrastive-bgaugment-s42"),
    ("--bgaugment none", "runs/toy-contrastive-base-s42"),
    ("--bgaugment own", "runs/toy-contrastive-own-s42"),
    ("--measure", "runs/toy-measure-s42"),
    ("--measure test --seed 7", "runs/toy-measure-s7"),
    ("--measure all", "runs/toy-measure_all-s42"),
    # What belongs to a training does not matter to a network that is only measured.
    ("--measure --loss triplet --bgaugment --epochs 5 --iterations 2 --patience 3 --batch-size 8 --lr 1 --select clean",
     "runs/toy-measure-s42"),
    ("--dataset cub200 --measure --backbone resnet50 --embedding 0 --image-size 64 --lr 1",  # without a linear layer
     "runs/cub200-measure-s42-backbone_resnet50-image_size_64"),
    ("--measure --embedding 128", "runs/toy-measure-s42-embedding_128"),
    ("--image-size 64 --lr 1e-3", "runs/toy-contrastive-base-s42-lr_0.001-image_size_64"),
    ("--epochs 15 --image-size 48 --weights none", "runs/toy-contrastive-base-s42"),  # toy's defaults
    ("--dataset sop --epochs 15 --image-size 227", "runs/sop-contrastive-base-s42-epochs_15"),
    ("--select replaced", "runs/toy-contrastive-base-s42-select_replaced"),
    ("--bgaugment --select replaced", "runs/toy-contrastive-bgaugment-s42"),
    ("--bgaugment own --select any_class", "runs/toy-contrastive-own-s42"),
    ("--bgaugment --select any_class", "runs/toy-contrastive-bgaugment-s42-select_any_class"),
    ("--dataset cub200 --backgrounds data/unsplash_backgrounds", "runs/cub200-contrastive-base-s42"),
    ("--dataset photos --backgrounds pool", "runs/photos-contrastive-base-s42-backgrounds_pool"),
    ("--dataset photos", "runs/photos-contrastive-base-s42"),  # it has no folder backgrounds/
    ("--dataset photos --bgaugment own", "runs/photos-contrastive-own-s42"),
    ("--data d --runs r --workers 3 --device cpu", "r/toy-contrastive-base-s42"),
    ("--backbone './my nets:a*b?'", "runs/toy-contrastive-base-s42-backbone_.-my-nets-a-b-"),
    ("--backgrounds 'C:\\a|b'", "runs/toy-contrastive-base-s42-backgrounds_C--a-b"),
])
def test_another_setting_is_another_folder(flags, name):
    assert bgbias.run_folder(bgbias.parse_args(shlex.split(flags))) == Path(name)


def test_long_names_end_in_a_checksum(shop):
    runs = []
    for letter in "ab":
        weights = Path(f"{'é' * 60}/{'x' * 100}/{letter}.pth")
        weights.parent.mkdir(parents=True, exist_ok=True)
        torch.save(bgbias.smallconv().state_dict(), weights)
        runs.append(finish(f"--epochs 1 --weights {weights}"))
    for run in runs:
        assert (run / "result.json").exists() and re.fullmatch(r"shop-contrastive-.*-[0-9a-f]{8}", run.name)
    assert runs[0] != runs[1]


def test_one_folder_of_photos_is_one_run(shop, monkeypatch):
    finish("--epochs 1 --dataset shop")
    monkeypatch.delattr(bgbias, "train")  # none is trained again
    for flags in ("--dataset shop/", "--dataset ./shop", f"--dataset {shop}/shop", "--backgrounds shop/backgrounds/"):
        finish(f"--epochs 1 {flags}")
    assert len(list(shop.glob("runs/*"))) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="other systems allow no such names")
@pytest.mark.parametrize("renamed", [
    "shop/images/c15 shop/masks/c15", "shop/images/c16/p0.png shop/masks/c16/p0.png", "shop"])
def test_names_that_are_not_utf8(shop, capsys, renamed):
    odd = os.fsdecode(b"caf\xe9")
    for path in map(Path, renamed.split()):
        path.rename(path.with_name(odd + path.suffix))
    dataset = odd if renamed == "shop" else "shop"
    bgbias.command(lambda: finish(f"--epochs 1 --dataset {shlex.quote(dataset)}"))
    run, = Path("runs").iterdir()
    assert all((Path(dataset) / photo).is_file() for photo in bgbias.read_photos(run))
    bgbias.command(lambda: bgbias.main(["--report", "runs"]))
    headings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("## ")]
    assert len(headings) == 2 and all("11 test classes" in heading for heading in headings)
    assert "11 test classes" in (shop / "runs/report.md").read_text()


# ---- Errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, named", [
    ("--dataset nowhere", ["--dataset nowhere"]),
    ("--dataset cub200 --data d", ["--data d", "CUB_200_2011/images"]),
    ("--backgrounds none", ["--backgrounds none", "val"]),
    ("--backgrounds own", ["--backgrounds own", "--bgaugment own"]),
    ("--epochs 0", ["--epochs 0", "--measure"]),
    ("--iterations 0", ["--iterations 0", "1 or more"]),
    ("--patience 0", ["--patience 0", "1 or more"]),
    ("--image-size 0", ["--image-size 0", "1 or more"]),
    ("--embedding -1", ["--embedding -1", "0 or more"]),
    ("--seed -1", ["--seed -1", "0 or more"]),
    ("--batch-size 2", ["--batch-size 2"]),
    ("--backbone nonsense", ["--backbone nonsense"]),
    ("--weights imagenet", ["--backbone smallconv", "imagenet"]),
    ("--report nowhere", ["--report nowhere"]),
])
def test_a_wrong_flag_is_named_before_any_training(begun, monkeypatch, failure, flags, named):
    monkeypatch.chdir(begun)
    line = failure(f"{TINY} {flags}")
    assert all(name in line for name in named) and not list(begun.glob("runs/*/*.pt"))


@pytest.mark.parametrize("damaged, damage", [
    ("images/c19/p1.png", lambda path: path.write_bytes(b"no photo")),
    ("masks/c07/p2.png", Path.unlink),
    ("masks/c21/p3.png", lambda path: Image.new("L", (40, 32), 1).save(path)),  # of values 0 and 1
    ("backgrounds", lambda path: shutil.rmtree(path / "test"))])
@pytest.mark.parametrize("flags", ["", "--measure"])
def test_damaged_data_is_named_before_a_run_begins(shop, failure, flags, damaged, damage):
    damage(shop / "shop" / damaged)
    line = failure(f"{TINY} {flags}")
    assert f"shop/{damaged}" in line and not list(shop.glob("runs/*/result.json"))
    assert not list(shop.glob("runs")) or flags  # with --measure, the test comes first
    assert ("python masks.py --dataset shop" in line) == (damage == Path.unlink)


def test_bugs_keep_their_traceback_and_interruptions_need_none(capsys):
    with pytest.raises(ZeroDivisionError):
        bgbias.command(lambda: 1 / 0)
    with pytest.raises(SystemExit) as ended:
        bgbias.command(lambda: signal.raise_signal(signal.SIGINT))
    assert ended.value.code == 130 and "Traceback" not in capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has a device that is always full")
def test_a_full_disk_is_named(tmp_path, capsys):
    def save(draft):
        with open("/dev/full", "wb", buffering=0) as full:
            full.write(b"x")

    with pytest.raises(SystemExit) as ended:
        bgbias.command(lambda: bgbias.write(tmp_path / "last.pt", save))
    line = capsys.readouterr().err
    assert ended.value.code == 2 and str(tmp_path / "last.pt") in line and os.strerror(errno.ENOSPC) in line
    assert not [*tmp_path.iterdir()]


def test_a_photo_that_nobody_may_read(shop, monkeypatch, failure):
    """Root may read everything, so the system's answer is planted."""
    def refuse(path, read=Path.read_bytes):
        if path.name == "p2.png" and path.parent.name == "c20":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    line = failure(TINY)
    assert "c20/p2.png" in line and "permissions" in line and "--runs" not in line


# ---- The toy set ---------------------------------------------------------------------------------


def test_two_processes_draw_toy_at_the_same_time(tmp_path, monkeypatch):
    """Both draw all of it before either renames it into place."""
    fork = multiprocessing.get_context("fork")
    barrier, draw, toy = fork.Barrier(2, timeout=60), bgbias.draw_toy, tmp_path / "toy"
    monkeypatch.setitem(bgbias.SPLITS, "toy", {"test": range(0, 3)})
    monkeypatch.setattr(bgbias, "POOL_SIZE", 2)
    monkeypatch.setattr(bgbias, "draw_toy", lambda *args: (draw(*args), barrier.wait()))
    processes = [fork.Process(target=bgbias.make_toy, args=(toy,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]  # no drafts
    monkeypatch.setattr(bgbias, "draw_toy", draw)
    alone = bgbias.make_toy(tmp_path / "alone")
    files = sorted(path.relative_to(alone) for path in alone.rglob("*.png"))
    assert len(files) == 3 * 20 * 2 + 2 * 2
    assert files == sorted(path.relative_to(toy) for path in toy.rglob("*.png"))
    assert all((toy / file).read_bytes() == (alone / file).read_bytes() for file in files)
