"""Whole runs through the command line: resuming bit for bit, SIGTERM, errors, what a run writes."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import bgbias
from conftest import ROOT

TINY = ("--dataset shop --data data --backbone smallconv --weights none --image-size 16 --epochs 3 "
        "--iterations 4 --batch-size 8 --device cpu")


def bgbias_py(cwd, flags, **kwargs):
    """The finished process of `python bgbias.py FLAGS`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, ROOT / "bgbias.py", *shlex.split(flags)], cwd=cwd,
                          env=environment, capture_output=True, text=True, **kwargs)


def same(a, b):
    """Whether two checkpoints are equal, bit for bit, the clock apart."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k != "seconds")
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def checkpoints(run):
    return [torch.load(run / name, weights_only=True) for name in ("last.pt", "best.pt")]


def log(run):
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


class Killed(Exception):
    pass


@pytest.fixture
def whole(shop, monkeypatch):
    """An uninterrupted run in this process: its checkpoints, log and test figures."""
    monkeypatch.chdir(shop)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return shop


def finish(flags):
    bgbias.main(shlex.split(flags))


@pytest.mark.parametrize("loss, flags", [
    ("contrastive", ""), ("normalized_softmax", "--bgaugment"),
    ("triplet", "--bgaugment --backbone squeezenet1_1 --image-size 32")])  # this one has dropout
def test_killed_anywhere_and_resumed_is_uninterrupted(whole, monkeypatch, loss, flags):
    flags = f"{TINY} --loss {loss} {flags}"
    kind = "bgaugment" if "--bgaugment" in flags else "base"
    finish(f"{flags} --runs a")
    a, b = whole / f"a/shop-{loss}-{kind}-s42", whole / f"b/shop-{loss}-{kind}-s42"
    step = bgbias.Trainer.train_step
    for kill in (2, 5, 11):  # in the first epoch, in the second, in the last, as kill -9 would
        seen = []

        def dying(self, *batch):
            seen.append(1)
            if len(seen) == kill:
                raise Killed
            return step(self, *batch)

        monkeypatch.setattr(bgbias.Trainer, "train_step", dying)
        with pytest.raises(Killed):
            finish(f"{flags} --runs b --fresh")
        assert not (b / "result.json").exists()
        monkeypatch.setattr(bgbias.Trainer, "train_step", step)
        finish(f"{flags} --runs b")
        assert all(map(same, checkpoints(a), checkpoints(b)))
        assert log(a) == log(b)
        results = [json.loads((run / "result.json").read_text()) for run in (a, b)]
        assert results[0]["test"] == results[1]["test"]


@pytest.mark.parametrize("stop", [1, 4, 6, 12])  # 4 and 12 end an epoch
def test_sigterm_after_any_batch_saves_the_state(whole, monkeypatch, stop):
    """The flag that SIGTERM sets, set after batch `stop`, stops the run there; the next one goes on."""
    flags = f"{TINY} --loss arcface"
    finish(f"{flags} --runs a")
    step, seen = bgbias.Trainer.train_step, []

    def flagged(self, *batch):
        seen.append(1)
        if len(seen) == stop:
            bgbias.STOP.append(True)
        return step(self, *batch)

    monkeypatch.setattr(bgbias.Trainer, "train_step", flagged)
    with pytest.raises(bgbias.Stopped):
        finish(f"{flags} --runs b")
    bgbias.STOP.clear()
    finish(f"{flags} --runs b")
    assert len(seen) == 12  # no batch was trained twice
    name = "shop-arcface-base-s42"
    assert all(map(same, checkpoints(whole / "a" / name), checkpoints(whole / "b" / name)))


def test_sigterm_to_the_process(shop):
    command = [sys.executable, ROOT / "bgbias.py", *shlex.split(TINY), "--epochs", "500", "--workers", "1"]
    process = subprocess.Popen(command, cwd=shop, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    run = shop / "runs/shop-contrastive-base-s42"
    while not (run / "best.pt").exists() and process.poll() is None:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)  # to the workers too, as a scheduler does
    _, error = process.communicate(timeout=120)
    assert process.returncode == 143
    assert error == "bgbias.py: SIGTERM, all is saved; the same command goes on\n"
    assert torch.load(run / "last.pt", weights_only=True)["progress"]["epoch"] > 1
    assert not [path for path in run.iterdir() if ".tmp" in path.name]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A base and a BGAugment run, finished, of a tiny shop."""
    from conftest import shop

    folder = shop.__wrapped__(tmp_path_factory.mktemp("finished"))
    first = bgbias_py(folder, TINY)
    assert (first.returncode, first.stderr) == (0, "")
    return folder, first, bgbias_py(folder, f"{TINY} --bgaugment --nmi")


def test_what_a_run_prints_and_writes(finished):
    folder, base, bgaugment = finished
    run = folder / "runs/shop-contrastive-base-s42"
    assert sorted(path.name for path in run.iterdir()) == [
        "best.pt", "config.json", "last.pt", "log.jsonl", "result.json"]
    lines = [line for line in base.stdout.splitlines() if line.startswith("epoch")]
    assert len(lines) == 3 and len({len(line) for line in lines}) == 1
    config = json.loads((run / "config.json").read_text())
    assert config["args"]["loss"] == "contrastive" and config["args"]["select"] == "clean"
    assert {"git", "torch", "torchvision", "numpy", "python", "device"} <= config.keys()
    assert [row["epoch"] for row in log(run)] == [1, 2, 3]
    assert "contrastive, base" in base.stdout and "contrastive, BGAugment" not in base.stdout
    assert "contrastive, base" in bgaugment.stdout and "contrastive, BGAugment" in bgaugment.stdout


def test_test_figures_by_hand(finished):
    """Conditions of result.json against embeddings made here, photo by photo, with PIL and loops."""
    folder, _, _ = finished
    run = folder / "runs/shop-contrastive-base-s42"
    model = bgbias.Embedder("smallconv", "none", 16)
    model.load_state_dict(torch.load(run / "best.pt", weights_only=True)["model"])
    model.eval()
    mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    embeddings = {"clean": [], "object_only": [], "background_only": []}
    for label in range(4, 9):
        for i in range(4):
            photo, mask = (Image.open(folder / f"shop/{kind}") for kind in
                           (f"images/c{label}/p{i}.jpg", f"masks/c{label}/p{i}.png"))
            box = (3, 1, 19, 17)  # 40 x 32 -> 22 x 18 -> the middle 16 x 16
            photo, mask = (np.asarray(x.resize((22, 18), Image.BILINEAR).crop(box), float) for x in (photo, mask))
            mask = mask[..., None] / 255
            for name, pixels in (("clean", photo), ("object_only", photo * mask + mean * (1 - mask)),
                                 ("background_only", photo * (1 - mask) + mean * mask)):
                x = torch.tensor((pixels - mean) / std, dtype=torch.float32).permute(2, 0, 1)
                embeddings[name].append(model(x[None])[0].detach().numpy())
    scores = json.loads((run / "result.json").read_text())["test"]
    labels = np.repeat(range(5), 4)
    for name, e in embeddings.items():
        gaps = ((np.array(e)[:, None] - np.array(e)) ** 2).sum(-1) + np.diag([np.inf] * 20)
        right = labels[np.argsort(gaps, axis=1)[:, :3]] == labels[:, None]
        precision = np.cumsum(right, axis=1) / [1, 2, 3]
        assert scores[name]["map@r"] == pytest.approx((right * precision).sum(1).mean() / 3, abs=1e-6)
        assert scores[name]["r_precision"] == pytest.approx(right.mean(), abs=1e-6)
        assert scores[name]["recall@1"] == pytest.approx(right[:, 0].mean(), abs=1e-6)


def test_spread_of_the_draws(finished):
    folder, _, _ = finished
    scores = json.loads((folder / "runs/shop-contrastive-bgaugment-s42/result.json").read_text())["test"]
    for name in ("replaced", "query"):
        draws = [draw["map@r"] for draw in scores[name]["draws"]]
        assert len(draws) == 5 and len(set(draws)) > 1
        assert scores[name]["mean"]["map@r"] == pytest.approx(sum(draws) / 5)
        variance = sum((d - sum(draws) / 5) ** 2 for d in draws) / 4
        assert scores[name]["std"]["map@r"] == pytest.approx(variance ** 0.5)
    assert 0 <= scores["clean"]["nmi"] <= 1


def test_done_runs_are_not_repeated_and_can_be_tested_again(finished, monkeypatch, capsys):
    folder, base, _ = finished
    monkeypatch.chdir(folder)
    run = folder / "runs/shop-contrastive-base-s42"
    before = (run / "last.pt").stat().st_mtime_ns
    finish(TINY)
    assert "is done" in capsys.readouterr().out
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").unlink()
    assert bgbias_py(folder, f"{TINY} --test-only --workers 2").returncode == 0
    assert json.loads((run / "result.json").read_text())["test"] == result["test"]
    assert (run / "last.pt").stat().st_mtime_ns == before


def test_untrained_network(whole):
    finish(f"{TINY} --epochs 0")
    result = json.loads((whole / "runs/shop-contrastive-base-s42/result.json").read_text())
    assert result["epochs"] == 0 and 0 <= result["test"]["clean"]["map@r"] <= 1


def test_selection_follows_the_flag(shop, monkeypatch):
    monkeypatch.chdir(shop)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    for flags, kind, key in (("", "base", "clean"), ("--bgaugment", "bgaugment", "corrupted"),
                             ("--select corrupted --runs ablation", "base", "corrupted")):
        finish(f"{TINY} --epochs 4 {flags}")
        run = shop / ("ablation" if "ablation" in flags else "runs") / f"shop-contrastive-{kind}-s42"
        scores = [row[key]["map@r"] for row in log(run)]
        best = torch.load(run / "best.pt", weights_only=True)["progress"]
        assert best["best"] == max(scores) and best["best_epoch"] == scores.index(max(scores)) + 1


def test_patience(whole):
    finish(f"{TINY} --lr 0 --epochs 50 --patience 2")  # nothing is learned, so the drawn crops decide
    run = whole / "runs/shop-contrastive-base-s42"
    assert len(log(run)) == 3 and log(run)[-1]["best_epoch"] == 1  # clean validation never changes


ERRORS = {  # flags or damage: what the one line says
    "--loss nonsense": "invalid choice: 'nonsense'",
    "--epochs -1": "-1 is not a number from 0 up",
    "--lr nan": "nan is not a number from 0 up",
    "--dataset nowhere": "--dataset nowhere: neither cars196",
    "--dataset cub200": "--data data: no cub200 in it, looked for CUB_200_2011/images",
    "--backgrounds none": "--backgrounds none: no photos in none/val",
    "--backbone nonsense": "--backbone nonsense: not bninception",
    "--backbone vit_b_16": "--image-size 16: not for vit_b_16",
    "--weights imagenet": "--weights imagenet: smallconv has none",
    "--weights missing.pth": "--weights missing.pth:",
    "--weights shop/images/c0/p0.jpg": "--weights shop/images/c0/p0.jpg:",
    "--device cuda:99": "--device cuda:99:",
    "--device nonsense": "--device nonsense:",
    "--batch-size 2": "--batch-size 2: not 4 images or more of each of two",
    "--lr 1e30": "--lr 1e+30: the loss is nan in epoch 1",
    "--test-only": "--test-only: no best.pt in runs/shop-contrastive-base-s42",
    "--runs shop/images/c0/p0.jpg": "p0.jpg",
}


@pytest.mark.parametrize("flags", ERRORS)
def test_errors_are_one_line_and_exit_2(whole, capsys, flags):
    with pytest.raises(SystemExit) as ended:
        bgbias.command("bgbias.py", lambda: finish(f"{TINY} {flags}"))
    assert ended.value.code == 2
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert ERRORS[flags] in line and "error: " in line


def test_errors_have_no_traceback(shop):
    failed = bgbias_py(shop, f"{TINY} --backgrounds none")
    assert (failed.returncode, failed.stdout) == (2, "") and not (shop / "runs").exists()
    assert failed.stderr == ("bgbias.py: error: --backgrounds none: no photos in none/val; "
                             "see README, Data\n")


def test_damaged_files_are_named(whole):
    (whole / "shop/images/c0/p0.jpg").write_bytes(b"no photo")
    with pytest.raises(OSError, match="shop/images/c0/p0.jpg"):  # which command() prints
        finish(TINY)
    Image.new("RGB", (40, 32)).save(whole / "shop/images/c0/p0.jpg")
    Image.new("L", (10, 10)).save(whole / "shop/masks/c8/p3.png")  # a test photo, read by a worker
    failed = bgbias_py(whole, f"{TINY} --fresh --workers 1")
    assert failed.returncode == 2
    assert failed.stderr == ("bgbias.py: error: shop/masks/c8/p3.png: its size is (10, 10), the photo's is "
                             "(40, 32); delete it and run masks.py\n")


def test_a_wrong_first_command_leaves_nothing(whole, capsys):
    for flags in ("--dataset nope", "--backbone nope", "--backgrounds nope"):
        with pytest.raises(bgbias.UserError):
            finish(f"{TINY} {flags}")
        assert not (whole / "runs").exists()


def test_a_wrong_fresh_start_deletes_nothing(whole):
    finish(f"{TINY} --epochs 1")
    run = whole / "runs/shop-contrastive-base-s42"
    for flags in ("--backgrounds nope", "--device cuda:99", "--backbone nope", "--weights nope"):
        with pytest.raises(bgbias.UserError):
            finish(f"{TINY} --fresh {flags}")
        assert (run / "result.json").exists()
    finish(f"{TINY} --epochs 2 --fresh")
    assert len(log(run)) == 2


def test_finished_without_checkpoints_is_still_that_run(whole, capsys):
    finish(f"{TINY} --epochs 1")
    for name in ("last.pt", "best.pt"):
        (whole / "runs/shop-contrastive-base-s42" / name).unlink()
    finish(f"{TINY} --epochs 1")
    assert "is done; " in capsys.readouterr().out
    with pytest.raises(bgbias.UserError, match="begun with --lr"):
        finish(f"{TINY} --epochs 1 --lr 0.5")


def test_interrupted_before_anything_is_learned_takes_other_arguments(whole, monkeypatch):
    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(bgbias.Trainer, "train_step", killed)
        with pytest.raises(Killed):
            finish(TINY)
    finish(f"{TINY} --epochs 1")
    config = json.loads((whole / "runs/shop-contrastive-base-s42/config.json").read_text())
    assert config["args"]["epochs"] == 1


def test_missing_test_backgrounds_are_found_before_training(whole):
    for file in (whole / "data/unsplash_backgrounds/test").iterdir():
        file.unlink()
    with pytest.raises(bgbias.UserError, match="no photos in .*test"):
        finish(TINY)
    assert not (whole / "runs").exists()


@pytest.mark.parametrize("name", ["last.pt", "best.pt", "config.json"])
def test_damaged_run_files_are_named(whole, name):
    finish(f"{TINY} --epochs 1")
    run = whole / "runs/shop-contrastive-base-s42"
    (run / "result.json").unlink()
    (run / name).write_bytes((run / name).read_bytes()[:100])
    with pytest.raises(bgbias.UserError, match=f"{run.name}/{name}: .*--fresh"):
        finish(f"{TINY} --epochs 1")
    (run / name).unlink()
    if name == "best.pt":  # the last epoch must not pass for the best
        with pytest.raises(bgbias.UserError, match="best.pt: .*No such file"):
            finish(f"{TINY} --epochs 1")


def test_siblings_with_other_flags_or_damaged(whole, capsys):
    finish(f"{TINY} --epochs 1")
    finish(f"{TINY} --epochs 2 --bgaugment")
    out = capsys.readouterr().out
    assert "contrastive, base" in out and "contrastive, BGAugment" in out
    line, = [line for line in out.splitlines() if line.startswith("not to be compared")]
    assert "--epochs 1" in line and "--epochs 2" in line
    (whole / "runs/shop-contrastive-base-s42/result.json").write_text("{")
    finish(f"{TINY} --epochs 2 --bgaugment")
    out = capsys.readouterr().out
    assert "shop-contrastive-base-s42: left out" in out and "contrastive, BGAugment" in out


def test_other_arguments_are_refused(finished, monkeypatch):
    monkeypatch.chdir(finished[0])
    with pytest.raises(bgbias.UserError, match=r"--iterations 4 \(now 9\), --lr 1e-06 \(now 0.5\)"):
        finish(f"{TINY} --lr 0.5 --iterations 9")


def test_loss_that_is_not_finite_keeps_the_good_checkpoint(whole, monkeypatch):
    step = bgbias.Trainer.train_step

    def poisoned(self, photos, backgrounds, labels):
        if self.progress["epoch"] == 2:
            next(self.model.parameters()).data.fill_(float("nan"))
        return step(self, photos, backgrounds, labels)

    monkeypatch.setattr(bgbias.Trainer, "train_step", poisoned)
    with pytest.raises(bgbias.UserError, match="the loss is nan in epoch 2"):
        finish(TINY)
    state = torch.load(whole / "runs/shop-contrastive-base-s42/last.pt", weights_only=True)
    assert state["progress"]["epoch"] == 2
    assert all(value.isfinite().all() for value in state["model"].values())


def test_streaming_gives_the_same_run(whole, monkeypatch, capsys):
    finish(f"{TINY} --runs a --bgaugment")
    monkeypatch.setattr(bgbias, "free_memory", lambda: 1000)
    finish(f"{TINY} --runs b --bgaugment")
    assert "do not fit in the 0.0 GiB free: decoding at every use" in capsys.readouterr().out
    name = "shop-contrastive-bgaugment-s42"
    assert all(map(same, checkpoints(whole / "a" / name), checkpoints(whole / "b" / name)))


def test_photos_are_decoded_once_a_run(whole, monkeypatch):
    opened = []
    real = bgbias.open_rgb
    monkeypatch.setattr(bgbias, "open_rgb", lambda path: opened.append(path) or real(path))
    finish(f"{TINY} --bgaugment")
    assert len(opened) == len(set(opened)) == 2 * 36 + 6  # photos, masks, backgrounds


def test_fewer_classes_than_a_batch_wants(whole):
    finish(f"{TINY} --loss normalized_softmax")  # 3 training classes for a batch of 8: 2 x 4
    assert bgbias.images_per_class("normalized_softmax", 8, 3) == 4
    assert bgbias.images_per_class("normalized_softmax", 32, 32) == 1
    assert bgbias.images_per_class("triplet", 32, 100) == 4
