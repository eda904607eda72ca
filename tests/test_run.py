"""Whole runs through the command line: resuming bit for bit, what a run writes, names, errors."""

import argparse
import itertools
import json
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


def folder_of(flags):
    return bgbias.run_folder(bgbias.parse_args(shlex.split(f"{TINY} {flags}")))


def finish(flags=""):
    """A tiny run in this process; later flags override those of TINY. Returns its folder."""
    bgbias.main(shlex.split(f"{TINY} {flags}"))
    return folder_of(flags)


def started(cwd, flags, **options):
    """The process `python bgbias.py FLAGS`."""
    return subprocess.Popen([sys.executable, ROOT / "bgbias.py", *shlex.split(f"{TINY} {flags}")], cwd=cwd,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, **options)


def same(a, b):
    """Whether two checkpoints are equal, bit for bit, except for the clock."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k != "seconds")
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def checkpoint(run, name):
    return torch.load(run / name, weights_only=True)


def log(run):
    """The rows of its complete epochs."""
    file = run / "log.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def assert_same_runs(a, b):
    for name in ("last.pt", "best.pt"):
        assert same(checkpoint(a, name), checkpoint(b, name)), name
    assert same(log(a), log(b))
    assert result(a)["test"] == result(b)["test"]


# ---- Killed and resumed --------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [
    "", "--loss normalized_softmax --bgaugment",
    "--loss triplet --bgaugment --backgrounds own --backbone squeezenet1_1 --image-size 32 --lr 1e-4"])  # with dropout
def test_killed_in_any_epoch_and_resumed_is_uninterrupted(shop, flags):
    a, b = finish(f"{flags} --runs a"), folder_of(f"{flags} --runs b")
    assert len(log(a)) == 3 and log(a)[0]["clean"] != log(a)[2]["clean"]
    # In the first epoch; from the start again, in the second; from there, in the third.
    for step, epochs in ((2, 0), (6, 1), (7, 2)):
        with die_at(torch.optim.RMSprop, "step", step):
            finish(f"{flags} --runs b")
        assert len(log(b)) == epochs and (b / "last.pt").exists() == (epochs > 0)
        assert not (b / "result.json").exists()
    finish(f"{flags} --runs b")
    assert_same_runs(a, b)


def test_killed_before_any_file_is_renamed(shop, monkeypatch):
    """Between best.pt, log.jsonl and last.pt of an epoch, after the training, before result.json."""
    renamed, replace = [], Path.replace
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *paths: renamed.append(paths[1].name) or replace(*paths))
        a = finish("--epochs 2 --iterations 2 --runs a")
    assert renamed[:4] == ["config.json", "best.pt", "log.jsonl", "last.pt"]
    assert renamed[-3:] == ["log.jsonl", "last.pt", "result.json"]
    for rename in range(1, len(renamed) + 1):
        with die_at(Path, "replace", rename):
            finish("--epochs 2 --iterations 2 --runs b")
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
    assert 1 <= len(log(run)) < 12 and not (run / "result.json").exists()
    finish(flags)
    assert_same_runs(finish(f"{flags} --runs undisturbed"), run)


def test_resuming_needs_no_pretrained_weights(shop):
    torch.save(bgbias.build_backbone("smallconv", "none").state_dict(), "mine.pth")
    a = finish("--weights mine.pth --runs a")
    with die_at(torch.optim.RMSprop, "step", 6):
        finish("--weights mine.pth --runs b")
    (shop / "mine.pth").unlink()
    assert_same_runs(a, finish("--weights mine.pth --runs b"))


@pytest.mark.parametrize("flags", ["--backgrounds own", "--backbone squeezenet1_1 --image-size 32 --lr 1e-4"])
def test_workers_change_nothing(shop, flags):
    a, b = (finish(f"{flags} --bgaugment --workers {workers} --runs {workers}") for workers in (0, 2))
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


CHANGES = {  # of the data, as its owner would make them
    "photo added": lambda shop: shutil.copy(shop / "images/c15/p0.png", shop / "images/c15/p9.png"),
    "photo removed": lambda shop: (shop / "images/c00/p3.png").unlink(),
    "class renamed": lambda shop: (shop / "images/c00").rename(shop / "images/c99"),
    "masks exchanged": lambda shop: exchange(shop / "masks/c20/p0.png", shop / "masks/c20/p1.png"),
    "background added": lambda shop: write_image(shop / "backgrounds/test/new.png", np.random.default_rng(1)),
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A folder with one run uninterrupted, killed in the second epoch, and killed before its test."""
    folder = write_shop(tmp_path_factory.mktemp("begun"), classes=22, suffix="png")
    for photo in ("c15/p9", "c99/p0", "c99/p1", "c99/p2", "c99/p3"):  # new photos have masks, too
        write_image(folder / f"shop/masks/{photo}.png", np.random.default_rng(0), mode="L")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        finish("--runs whole")
        with die_at(torch.optim.RMSprop, "step", 6):
            finish("--runs half")
        shutil.copytree("whole", "untested")
        (folder_of("--runs untested") / "result.json").unlink()
    return folder


@pytest.mark.parametrize("change", CHANGES)
def test_changed_data_is_refused(begun, tmp_path, monkeypatch, failure, change):
    monkeypatch.chdir(shutil.copytree(begun, tmp_path / "copy"))
    shutil.copytree("shop", "before")
    CHANGES[change](Path("shop"))
    for runs in ("whole", "half", "untested"):
        assert str(folder_of(f"--runs {runs}")) in failure(f"{TINY} --runs {runs}")
    shutil.rmtree("shop")
    shutil.copytree("before", "shop")
    assert_same_runs(folder_of("--runs whole"), finish("--runs half"))


@pytest.mark.parametrize("photo, flags", [
    ("images/c00/p0", ""), ("masks/c15/p2", ""), ("backgrounds/val/b0", "--workers 1"),
    ("images/c21/p3", "--workers 1"), ("backgrounds/test/b1", "")])  # the last two: after the training
def test_a_photo_that_is_damaged_later(begun, tmp_path, monkeypatch, failure, photo, flags):
    """Its header and its size stay. After the repair the run ends as if nothing had happened."""
    monkeypatch.chdir(shutil.copytree(begun, tmp_path / "copy"))
    path = Path(f"shop/{photo}.png")
    good = path.read_bytes()
    path.write_bytes(good[:60] + bytes(len(good) - 60))
    line = failure(f"{TINY} --runs half {flags}")
    assert str(path) in line and "resumes" in line
    path.write_bytes(good)
    assert_same_runs(folder_of("--runs whole"), finish("--runs half"))


def test_changed_hyper_parameters_are_refused(begun, monkeypatch, failure):
    monkeypatch.chdir(begun)
    monkeypatch.setitem(bgbias.HPARAMS["cars196"], "contrastive", dict(pos_margin=0.1, neg_margin=0.5))
    for runs in ("whole", "half", "untested"):
        assert str(folder_of(f"--runs {runs}")) in failure(f"{TINY} --runs {runs}")


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
        "best.pt", "config.json", "last.pt", "log.jsonl", "result.json"]
    config = json.loads((run / "config.json").read_text())
    assert {"torch", "torchvision", "numpy", "device", "fingerprint"} <= config.keys()
    assert config["args"]["loss"] == "contrastive" and config["args"]["select"] == "clean"
    assert config["args"]["hparams"] == bgbias.HPARAMS["cars196"]["contrastive"]
    assert config["args"]["settings"] == dict(
        epochs=3, iterations=4, batch_size=8, lr=0.001, backbone="smallconv", weights="none", image_size=16)
    finished_result = result(run)
    assert config.items() <= finished_result.items()
    assert finished_result["tested"].startswith("shop: 11 test classes, 44 photos")
    assert finished_result["epochs"] == 3 and finished_result["seconds"] > 0
    assert [row["epoch"] for row in log(run)] == [1, 2, 3]
    drawn = {name: len({draw["map@r"] for draw in draws}) for name, draws in result(bgaugment)["test"].items()}
    several = {condition: drawn.pop(condition) for condition in ("replaced", "query", "chance")}
    assert min(several.values()) > 1 and all(len(result(run)["test"][condition]) == 5 for condition in several)
    assert drawn == dict.fromkeys(("clean", "pasted", "same_class", "other_class", "object_only", "background_only"), 1)
    last, best = checkpoint(run, "last.pt"), checkpoint(run, "best.pt")
    assert last.keys() == {"network", "class_weights", "optimiser", "history"}
    assert best.keys() == {"network", "class_weights", "history"}
    assert last["history"] == log(run)
    assert best["history"] == log(run)[:finished_result["best_epoch"]]


def test_what_a_run_prints(finished, monkeypatch, capsys):
    folder, run, _, out = finished
    assert len([line for line in out.splitlines() if line.startswith("epoch")]) == 3
    first, = [line for line in out.splitlines() if line.startswith(f"{run.relative_to(folder)}: ")]
    assert "smallconv" in first and "128 features" in first and "cpu" in first
    # Four convolutions and the linear layer; the scaling is ImageNet's, times 255.
    parameters = sum(9 * a * b + b for a, b in ((3, 16), (16, 32), (32, 64), (64, 128))) + 128 * 128 + 128
    assert f"{parameters:,} trainable parameters" in first
    assert re.findall(r"\d+\.0\b", first.split("parameters")[1]) == ["124.0", "116.0", "104.0", "58.0", "57.0", "57.0"]
    monkeypatch.chdir(folder)
    finish("--bgaugment")  # it is finished, so the table is printed again, with the base run
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| contrastive")]
    clean = f"{100 * result(run)['test']['clean'][0]['map@r']:.2f}"
    assert len(rows) == 2 and "+ BGAugment" in rows[1] and clean in rows[0]


def test_test_values_by_hand(finished):
    """Conditions of result.json against embeddings made here, photo by photo, with PIL and loops."""
    folder, run, _, _ = finished
    network = bgbias.Embedder("smallconv", "none", 16)
    network.load_state_dict(checkpoint(run, "best.pt")["network"])
    names = [f"c{label:02d}/p{i}" for label, i in itertools.product(TEST_CLASSES, range(4))]
    images, masks = (torch.stack([pixels_of(folder / f"shop/{kind}/{name}.{suffix}", 16) for name in names])
                     for kind, suffix in (("images", "jpg"), ("masks", "png")))
    for condition, photos in versions_of(images, masks / 255).items():
        embeddings = torch.cat([network.eval()(scaled(photo[None])).detach() for photo in photos])
        scores, = result(run)["test"][condition]
        assert scores == pytest.approx(naive_metrics(embeddings, np.repeat(TEST_CLASSES, 4), (1, 2, 4, 8)), abs=1e-6)


def test_finished_runs_are_not_repeated_and_can_be_tested_again(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(shutil.copytree(finished[0], tmp_path / "copy"))
    run, before = folder_of(""), result(finished[1])
    with monkeypatch.context() as patch:  # neither training nor a test
        patch.delattr(bgbias, "train")
        patch.delattr(bgbias, "run_test")
        finish()
    (run / "result.json").unlink()
    monkeypatch.delattr(bgbias, "train")
    finish("--workers 2")
    assert result(run)["test"] == before["test"]


def test_selection_follows_the_flag(shop):
    for flags, key in (("", "clean"), ("--bgaugment", "replaced"), ("--select replaced", "replaced")):
        run = finish(f"--epochs 4 --seed 2 {flags}")
        selected = [row[key]["map@r"] for row in log(run)]
        best = 1 + selected.index(max(selected))
        assert result(run)["best_epoch"] == best == len(checkpoint(run, "best.pt")["history"])
    history = [{"clean": {"map@r": a}, "replaced": {"map@r": b}} for a, b in ((0.3, 0.1), (0.2, 0.4), (0.3, 0.4))]
    for select, best in (("clean", 1), ("replaced", 2)):  # of equal epochs, the first
        state = argparse.Namespace(history=history, args=argparse.Namespace(select=select))
        assert bgbias.State.best_epoch.fget(state) == best


def test_patience(shop):
    run = finish("--lr 0 --epochs 50 --patience 2")  # an equal score is no improvement
    assert (len(log(run)), result(run)["epochs"], result(run)["best_epoch"]) == (3, 3, 1)


@pytest.mark.parametrize("poison", [6, 8])  # within the second epoch; in its last step, after the last loss
def test_loss_that_is_not_finite_keeps_the_good_checkpoint(shop, monkeypatch, failure, poison):
    step, steps = torch.optim.RMSprop.step, itertools.count(1)

    def poisoned(self, *args):
        step(self, *args)
        if next(steps) == poison:
            self.param_groups[0]["params"][0].data.fill_(float("nan"))

    monkeypatch.setattr(torch.optim.RMSprop, "step", poisoned)
    if poison == 6:
        assert "--lr 0.001" in failure(TINY)
    else:
        with pytest.raises(FloatingPointError):  # from the metrics of the validation
            finish()
    last = checkpoint(folder_of(""), "last.pt")
    assert len(last["history"]) == 1 and all(value.isfinite().all() for value in last["network"].values())


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
    # Test photos, masks and backgrounds are checked first; pool val is for training and validation.
    twice = {path for path, count in opened.items() if count != 1}
    once = {path for path in Path("shop").rglob("c*/*") if int(path.parent.name[1:]) < 11}  # 8 + 3 of 22 classes
    assert not twice & once and max(opened.values()) <= 2


# ---- Untrained networks --------------------------------------------------------------------------


def test_untrained_network(shop, monkeypatch, capsys):
    """All classes of a folder are tested, and nothing else is decoded. Backgrounds for validation
    and classes for training may be missing."""
    shutil.rmtree(shop / "shop/backgrounds/val")
    for label in range(2, 22):
        shutil.rmtree(shop / f"shop/images/c{label:02d}")
    opened = opened_files(monkeypatch)
    run = finish("--epochs 0")
    assert "hardly better than chance" in capsys.readouterr().out  # the pictures are random
    assert run.name.startswith("shop-untrained-base-s42")
    assert sorted(path.name for path in run.iterdir()) == ["best.pt", "config.json", "result.json"]
    assert (result(run)["epochs"], result(run)["best_epoch"]) == (0, 0)
    assert result(run)["tested"].startswith("shop: 2 test classes, 8 photos")
    torch.manual_seed(bgbias.seed_of(42, bgbias.INIT))
    untrained = bgbias.Embedder("smallconv", "none", 16).state_dict()
    assert same(checkpoint(run, "best.pt")["network"], dict(untrained))
    assert len(opened) == 2 * 8 + 3 and set(opened.values()) == {1}


def test_an_untrained_run_is_measured_again(shop):
    """Its network may have changed, so its attention scores go, too."""
    tests = []
    for seed in range(2):
        torch.manual_seed(seed)
        torch.save(bgbias.smallconv().state_dict(), "mine.pth")
        tests.append(result(run := finish("--epochs 0 --weights mine.pth"))["test"])
        assert not (run / "attention.npz").exists()
        np.savez(run / "attention.npz", score=np.zeros(1))
    assert tests[0] != tests[1]
    assert tests[1] == result(finish("--epochs 0 --weights mine.pth --runs other"))["test"]


def test_without_a_folder_of_backgrounds_they_come_from_other_photos(shop, monkeypatch, failure, capsys):
    """Unless it is named, or the paper's BGAugment needs it."""
    shutil.rmtree("shop/backgrounds")
    for flags, named in (("--bgaugment", "shop/backgrounds"), ("--backgrounds nowhere", "nowhere")):
        line = failure(f"{TINY} {flags}")
        assert f"--backgrounds {named}: " in line and "--backgrounds own" in line and not list(shop.glob("runs/*"))
    run = finish("--epochs 1")
    assert result(run)["args"]["backgrounds"] == "own" and "own backgrounds" in capsys.readouterr().out
    monkeypatch.delattr(bgbias, "train")  # it is not trained again
    assert finish("--epochs 1 --backgrounds own") == run


# ---- Names of runs -------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, name", [
    ("", "runs/toy-contrastive-base-s42"),
    ("--dataset cub200 --loss triplet --bgaugment --seed 7", "runs/cub200-triplet-bgaugment-s7"),
    ("--epochs 0", "runs/toy-untrained-base-s42"),
    ("--image-size 64 --lr 1e-3", "runs/toy-contrastive-base-s42-lr_0.001-image_size_64"),
    ("--epochs 15 --image-size 48 --weights none", "runs/toy-contrastive-base-s42"),  # toy's defaults
    ("--dataset sop --epochs 15 --image-size 227", "runs/sop-contrastive-base-s42-epochs_15"),
    ("--select replaced", "runs/toy-contrastive-base-s42-select_replaced"),
    ("--bgaugment --select replaced", "runs/toy-contrastive-bgaugment-s42"),
    ("--dataset cub200 --backgrounds data/unsplash_backgrounds", "runs/cub200-contrastive-base-s42"),
    ("--dataset photos --backgrounds photos/backgrounds", "runs/photos-contrastive-base-s42"),
    ("--backgrounds own", "runs/toy-contrastive-base-s42-backgrounds_own"),
    ("--dataset photos", "runs/photos-contrastive-base-s42-backgrounds_own"),  # it has no folder backgrounds/
    ("--dataset photos --bgaugment", "runs/photos-contrastive-bgaugment-s42"),
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
    for dataset in ("shop/", "./shop", f"{shop}/shop"):
        finish(f"--epochs 1 --dataset {dataset}")
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
    bgbias.command(lambda: bgbias.main(["--report", "runs"]))
    assert capsys.readouterr().out.count("11 test classes") == 2
    assert "11 test classes" in (shop / "runs/report.md").read_text()


# ---- Errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, named", [
    ("--dataset nowhere", ["--dataset nowhere"]),
    ("--dataset cub200 --data d", ["--data d", "CUB_200_2011/images"]),
    ("--backgrounds none", ["--backgrounds none", "val"]),
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
@pytest.mark.parametrize("flags", ["", "--epochs 0"])
def test_damaged_data_is_named_before_a_run_begins(shop, failure, flags, damaged, damage):
    damage(shop / "shop" / damaged)
    line = failure(f"{TINY} {flags}")
    assert f"shop/{damaged}" in line and not list(shop.glob("runs/*/result.json"))
    assert not list(shop.glob("runs")) or flags  # with --epochs 0, the test comes first
    assert ("python masks.py --dataset shop" in line) == (damage == Path.unlink)


def test_bugs_keep_their_traceback_and_interruptions_need_none(capsys):
    with pytest.raises(ZeroDivisionError):
        bgbias.command(lambda: 1 / 0)
    with pytest.raises(SystemExit) as ended:
        bgbias.command(lambda: signal.raise_signal(signal.SIGINT))
    assert ended.value.code == 130 and "Traceback" not in capsys.readouterr().err


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
