"""Whole runs through the command line: resuming bit for bit, killed processes, errors, what a run writes."""

import contextlib
import gc
import itertools
import json
import multiprocessing
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections import Counter, namedtuple
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import bgbias
from conftest import ROOT, write_image

TINY = ("--dataset shop --data data --backbone smallconv --weights none --image-size 16 --epochs 3 "
        "--iterations 4 --batch-size 8 --lr 1e-3 --device cpu")
RUN = "shop-contrastive-base-s42"
TEST_CLASSES = range(11, 22)


def write_shop(folder):
    """A shop of 22 classes x 4 photos: 8 classes for training, 3 for validation, 11 for testing."""
    rng = np.random.default_rng(0)
    for label, i in itertools.product(range(22), range(4)):
        write_image(folder / f"shop/images/c{label:02d}/p{i}.jpg", rng)
        write_image(folder / f"shop/masks/c{label:02d}/p{i}.png", rng, mode="L")
    for part, i in itertools.product(("val", "test"), range(3)):
        write_image(folder / f"data/unsplash_backgrounds/{part}/b{i}.jpg", rng, (50, 40))
    return folder


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """The current folder, with the shop in it."""
    monkeypatch.chdir(tmp_path)
    return write_shop(tmp_path)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Sums depend on the number of threads, and so small a network is quicker with one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def finish(flags):
    """The run in this process."""
    bgbias.main(shlex.split(flags))


def failure(flags, capsys):
    """The one line that the command ends with, with exit code 2 and no traceback."""
    with pytest.raises(SystemExit) as ended:
        bgbias.command("bgbias.py", lambda: finish(flags))
    assert ended.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert "error: " in lines[-1] and "Traceback" not in "".join(lines)
    return lines[-1]


@pytest.fixture
def end_workers():
    """Ends the workers that a failed run leaves behind. A command ends with its process; here they
    would wait for the garbage collector, which takes 5 s for each."""
    yield
    for thing in gc.get_objects():
        if type(thing).__name__ == "_MultiProcessingDataLoaderIter":
            thing._shutdown_workers()


def bgbias_py(cwd, flags):
    """The finished process of `python bgbias.py FLAGS`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, ROOT / "bgbias.py", *shlex.split(flags)], cwd=cwd,
                          env=environment, capture_output=True, text=True)


def same(a, b):
    """Whether two checkpoints are equal, bit for bit, the clock apart."""
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
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def scores(run):
    """The test figures."""
    return json.loads((run / "result.json").read_text())["test"]


def assert_same_runs(a, b):
    for name in ("last.pt", "best.pt"):
        assert same(checkpoint(a, name), checkpoint(b, name)), name
    assert log(a) == log(b)
    assert scores(a) == scores(b)


# ---- Killed and started again --------------------------------------------------------------------


class Killed(BaseException):
    """What bgbias.py has no handler for, as kill -9 leaves it no time for one."""


def die_at(monkeypatch, owner, name, call, flags):
    """A run that dies in that call, from 1, of owner.name."""
    real, calls = getattr(owner, name), itertools.count(1)

    def dying(*args, **kwargs):
        if next(calls) == call:
            raise Killed
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dying)
        with pytest.raises(Killed):
            finish(flags)


@pytest.mark.parametrize("loss, flags", [
    ("contrastive", ""), ("normalized_softmax", "--bgaugment"),
    ("triplet", "--bgaugment --backbone squeezenet1_1 --image-size 32 --lr 1e-4")])  # it has dropout
def test_killed_in_any_epoch_and_resumed_is_uninterrupted(shop, monkeypatch, loss, flags):
    flags = f"{TINY} --loss {loss} {flags}"
    kind = "bgaugment" if "--bgaugment" in flags else "base"
    finish(f"{flags} --runs a")
    a, b = (shop / runs / f"shop-{loss}-{kind}-s42" for runs in "ab")
    assert len(log(a)) == 3 and log(a)[0]["clean"] != log(a)[2]["clean"]
    for step in (2, 6, 11):  # in the first epoch, in the second, in the last
        die_at(monkeypatch, torch.optim.RMSprop, "step", step, f"{flags} --runs b")
        assert (b / "last.pt").exists() == (step > 4) and not (b / "result.json").exists()
        finish(f"{flags} --runs b")
        assert_same_runs(a, b)
        shutil.rmtree(b)


def test_killed_before_any_file_is_renamed(shop, monkeypatch):
    """Between best.pt, log.jsonl and last.pt of an epoch, after the training, before result.json."""
    flags, renamed, replace = f"{TINY} --epochs 2", [], Path.replace
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *paths: renamed.append(paths[1].name) or replace(*paths))
        finish(f"{flags} --runs a")
    assert renamed[:4] == ["config.json", "best.pt", "log.jsonl", "last.pt"]
    assert renamed[-3:] == ["log.jsonl", "last.pt", "result.json"]
    for rename in range(1, len(renamed) + 1):
        die_at(monkeypatch, Path, "replace", rename, f"{flags} --runs b")
        finish(f"{flags} --runs b")
        assert_same_runs(shop / "a" / RUN, shop / "b" / RUN)
        shutil.rmtree("b")


def test_killed_twice(shop, monkeypatch):
    finish(f"{TINY} --runs a")
    for _ in range(2):
        die_at(monkeypatch, torch.optim.RMSprop, "step", 6, f"{TINY} --runs b")
    assert len(log(shop / "b" / RUN)) == 2  # each went one epoch further
    finish(f"{TINY} --runs b")
    assert_same_runs(shop / "a" / RUN, shop / "b" / RUN)


def test_going_on_needs_no_pretrained_weights(shop, monkeypatch):
    torch.save(bgbias.build_backbone("smallconv", "none").state_dict(), "mine.pth")
    flags = f"{TINY} --weights mine.pth"
    finish(f"{flags} --runs a")
    die_at(monkeypatch, torch.optim.RMSprop, "step", 6, f"{flags} --runs b")
    (shop / "mine.pth").unlink()
    finish(f"{flags} --runs b")
    assert_same_runs(shop / "a" / RUN, shop / "b" / RUN)


def test_interrupted_before_anything_is_learned_takes_other_arguments(shop, monkeypatch):
    die_at(monkeypatch, torch.optim.RMSprop, "step", 1, TINY)
    finish(f"{TINY} --epochs 1")
    config = json.loads((shop / "runs" / RUN / "config.json").read_text())
    assert config["args"]["epochs"] == 1


def rename(path, target):
    path.rename(path.with_name(target))


CHANGES = {  # of the shop, as its owner would make them
    "added": lambda shop: shutil.copy(shop / "images/c15/p0.jpg", shop / "images/c15/p9.jpg"),
    "removed": lambda shop: (shop / "images/c00/p3.jpg").unlink(),
    "renamed": lambda shop: rename(shop / "images/c09/p3.jpg", "p4.jpg"),
    "a class renamed": lambda shop: rename(shop / "images/c00", "c99"),
}


def test_photos_that_changed_since_the_run_was_begun_are_refused(shop, monkeypatch):
    """Between two halves of the training, and between training and test."""
    finish(f"{TINY} --runs a")
    die_at(monkeypatch, torch.optim.RMSprop, "step", 6, f"{TINY} --runs b")
    shutil.copytree("a", "c")
    (shop / "c" / RUN / "result.json").unlink()
    shutil.copytree("shop", "before")
    for change in CHANGES.values():
        change(shop / "shop")
        for path in shop.glob("shop/images/*/*.jpg"):  # the new ones have masks
            mask = bgbias.mask_path(shop / "shop", path)
            if not mask.exists():
                write_image(mask, np.random.default_rng(0), mode="L")
        for runs in ("b", "c"):
            with pytest.raises(bgbias.UserError) as refused:
                finish(f"{TINY} --runs {runs}")
            assert str(refused.value) == (
                f"{runs}/{RUN}/config.json: photos were added, removed or renamed since the run was begun; "
                f"delete {runs}/{RUN} to start over")
        shutil.rmtree("shop")
        shutil.copytree("before", "shop")
    for runs in ("b", "c"):
        finish(f"{TINY} --runs {runs}")
        assert_same_runs(shop / "a" / RUN, shop / runs / RUN)


def dead_process():
    """The number of a process that has ended."""
    ended = os.fork()
    if not ended:
        os._exit(0)
    os.waitpid(ended, 0)
    return ended


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="nobody says which processes live")
def test_what_killed_processes_left_half_written_is_removed(tmp_path):
    dead, alive = dead_process(), os.getppid()
    for pid in (dead, alive, "_backup", ""):
        (tmp_path / f"last.pt.tmp{pid}").write_text("half a fi")
        (tmp_path / f"toy.tmp{pid}/images/000").mkdir(parents=True)
    (tmp_path / f"best.pt.tmp{dead}").write_text("another's")
    bgbias.write(tmp_path / "last.pt", lambda draft: draft.write_text("whole"))
    assert (tmp_path / "last.pt").read_text() == "whole"
    assert bgbias.draft_of(tmp_path / "toy") == tmp_path / f"toy.tmp{os.getpid()}"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [f"best.pt.tmp{dead}", "last.pt", "last.pt.tmp", "last.pt.tmp_backup", f"last.pt.tmp{alive}",
         "toy.tmp", "toy.tmp_backup", f"toy.tmp{alive}"])
    bgbias.write(tmp_path / "best.pt", lambda draft: draft.write_text("whole"))
    assert not (tmp_path / f"best.pt.tmp{dead}").exists()


def test_half_written_files_that_another_process_removes_meanwhile(tmp_path, monkeypatch):
    gone = [tmp_path / f"a.json.tmp{dead_process()}"]  # listed, and then no longer there
    monkeypatch.setattr(Path, "glob", lambda *_: gone)
    bgbias.write_json(tmp_path / "a.json", [1])
    assert json.loads((tmp_path / "a.json").read_text()) == [1]


# ---- Real processes ------------------------------------------------------------------------------


class Forked:
    """Like subprocess.Popen, but a fork of this process, which spares it the imports."""

    def __init__(self, folder, flags):
        self.process = multiprocessing.get_context("fork").Process(target=self.run, args=(folder, flags))
        self.process.start()
        self.pid = self.process.pid

    @staticmethod
    def run(folder, flags):
        os.setsid()
        os.chdir(folder)
        bgbias.command("bgbias.py", lambda: finish(flags))

    def poll(self):
        return self.process.exitcode

    def wait(self, timeout=60):
        end = time.monotonic() + timeout
        while self.poll() is None and time.monotonic() < end:  # join() waits for its workers, too
            time.sleep(0.01)
        return self.poll()


@contextlib.contextmanager
def process(folder, flags, *, fork=False):
    """A run in the background after its first epoch, with its stderr in folder/stderr. It leads a
    process group with its workers, as in a terminal, of which nothing is left afterwards."""
    command = [sys.executable, ROOT / "bgbias.py", *shlex.split(flags)]
    with open(folder / "stderr", "w") as stderr:
        started = Forked(folder, flags) if fork else subprocess.Popen(
            command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=stderr,
            stdout=subprocess.DEVNULL, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    try:
        wait_for(lambda: list(folder.glob("*/*/last.pt")), started)
        yield started
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()


def wait_for(condition, process):
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder and flags of a run of some seconds that nothing disturbed, without workers."""
    folder = write_shop(tmp_path_factory.mktemp("undisturbed"))
    flags = f"{TINY} --epochs 8 --iterations 20"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        finish(f"{flags} --workers 0")
    return folder / "runs" / RUN, flags


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_killed_processes_go_on(shop, undisturbed, name):
    whole, flags = undisturbed
    delay = random.uniform(0, 0.2)
    print(f"{name} after {delay} s")  # which pytest shows if the test fails
    run = shop / "runs" / RUN
    with process(shop, f"{flags} --workers 1", fork=name != "SIGINT") as started:
        time.sleep(delay)
        if name == "SIGKILL":  # it alone, as the kernel does that is short of memory
            os.kill(started.pid, signal.SIGKILL)
        else:  # it and its workers, as a scheduler and a terminal do
            os.killpg(started.pid, getattr(signal, name))
        code = started.wait(timeout=60)
    if name == "SIGINT":
        error = (shop / "stderr").read_text()
        assert code == 130 and "Traceback" not in error
        assert error.endswith("bgbias.py: interrupted; the same command goes on\n")
        assert not list(shop.glob("runs/*/*.tmp*"))
    else:
        assert code == -getattr(signal, name)
    assert 1 <= len(log(run)) < 8 and not (run / "result.json").exists()
    finish(f"{flags} --workers 0")
    assert_same_runs(whole, run)


def children(parent):
    """The ids of the processes that it started."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # those that ended meanwhile
            if int(file.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(file.parent.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="there is no /proc to find it in")
def test_a_worker_that_dies_ends_the_run(shop):
    with process(shop, f"{TINY} --epochs 1000 --patience 1000 --iterations 100 --workers 1") as started:
        time.sleep(random.uniform(0, 0.5))
        os.kill(random.choice(children(started.pid)), signal.SIGKILL)  # of training or of validation
        assert started.wait(timeout=60) == 2
    line, = [line for line in (shop / "stderr").read_text().splitlines() if line]
    assert line.startswith("bgbias.py: error: --workers: a process that prepares batches died")
    assert "The same command goes on" in line


def shell(folder, command):
    """The finished process of a line of bash, in which $RUN is python bgbias.py."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RUN": f"{sys.executable} {ROOT / 'bgbias.py'}"}
    environment.pop("PYTHONUNBUFFERED", None)
    return subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True)


def test_a_reader_that_goes_away_ends_the_run_quietly(shop):
    done = shell(shop, f"$RUN {TINY} | head -1; echo ${{PIPESTATUS[0]}}")
    assert done.stdout.startswith("shop · contrastive · seed 42 · smallconv, 16 px · cpu · runs/")
    assert done.stdout.endswith("\n1\n") and done.stdout.count("\n") == 2 and done.stderr == ""
    finish(TINY)
    assert len(log(shop / "runs" / RUN)) == 3


def test_without_stdout_and_stderr_a_run_goes_on(shop):
    assert shell(shop, f"$RUN {TINY} --epochs 1 >&- 2>&-").returncode == 0
    assert len(scores(shop / "runs" / RUN)) == 5


# ---- What a run writes ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a finished base and BGAugment run, and the process of the first."""
    folder = write_shop(tmp_path_factory.mktemp("finished"))
    base = bgbias_py(folder, TINY)
    assert (base.returncode, base.stderr) == (0, "")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        finish(f"{TINY} --bgaugment --nmi")
    return folder, base


def test_what_a_run_writes(finished):
    run = finished[0] / "runs" / RUN
    assert sorted(path.name for path in run.iterdir()) == [
        "best.pt", "config.json", "last.pt", "log.jsonl", "result.json"]
    config = json.loads((run / "config.json").read_text())
    result = json.loads((run / "result.json").read_text())
    assert {"git", "torch", "torchvision", "numpy", "python", "device"} <= config.keys()
    assert config["args"] == result["args"]
    assert config["args"]["loss"] == "contrastive" and config["args"]["select"] == "clean"
    assert config["args"]["unusual"] == [
        "--epochs 3", "--iterations 4", "--batch-size 8", "--lr 0.001", "--backbone smallconv",
        "--weights none", "--image-size 16"]
    assert result["tested"] == "11 test classes, 44 photos"
    assert [row["epoch"] for row in log(run)] == [1, 2, 3]
    assert result["epochs"] == 3 and result["seconds"] > 0
    last, best = checkpoint(run, "last.pt"), checkpoint(run, "best.pt")
    assert last.keys() == {"network", "class_weights", "optimiser", "history"}
    assert best.keys() == {"network", "class_weights", "history"}
    assert last["history"] == [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert best["history"] == last["history"][:result["best_epoch"]]


def test_what_a_run_prints(finished, monkeypatch, capsys):
    folder, base = finished
    lines = [line for line in base.stdout.splitlines() if line.startswith("epoch")]
    assert len(lines) == 3 and len({len(line) for line in lines}) == 1
    assert "| contrastive * |" in base.stdout and "contrastive + BGAugment" not in base.stdout
    assert base.stdout.endswith(f"all metrics: runs/{RUN}/result.json\n")
    monkeypatch.chdir(folder)
    finish(f"{TINY} --bgaugment --nmi")  # done: it prints the same again, and its sibling's results
    out = capsys.readouterr().out
    assert "\n| contrastive *  " in out and "\n| contrastive + BGAugment * |" in out
    for name, kind in (("contrastive", "base"), ("contrastive + BGAugment", "bgaugment")):
        test = scores(folder / f"runs/shop-contrastive-{kind}-s42")
        lost = 100 - 100 * test["replaced"]["mean"]["map@r"] / test["clean"]["map@r"]
        lost = f"{lost:.0f} %" if lost > 0 else "nothing"
        assert (f"\nWith other backgrounds {name} loses {lost} of its MAP@R; on backgrounds alone it "
                f"still reaches {100 * test['background_only']['map@r']:.1f} %.\n") in out


def test_test_figures_by_hand(finished):
    """Conditions of result.json against embeddings made here, photo by photo, with PIL and loops."""
    folder, _ = finished
    network = bgbias.Embedder("smallconv", "none", 16)
    network.load_state_dict(checkpoint(folder / "runs" / RUN, "best.pt")["network"])
    network.eval()
    mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    embeddings = {"clean": [], "object_only": [], "background_only": []}
    for label, i in itertools.product(TEST_CLASSES, range(4)):
        photo, mask = (Image.open(folder / f"shop/{kind}") for kind in
                       (f"images/c{label:02d}/p{i}.jpg", f"masks/c{label:02d}/p{i}.png"))
        box = (3, 1, 19, 17)  # 40 x 32 -> 22 x 18 -> the middle 16 x 16
        photo, mask = (np.asarray(x.resize((22, 18), Image.BILINEAR).crop(box), float) for x in (photo, mask))
        mask = mask[..., None] / 255
        for name, pixels in (("clean", photo), ("object_only", photo * mask + mean * (1 - mask)),
                             ("background_only", photo * (1 - mask) + mean * mask)):
            x = torch.tensor((pixels - mean) / std, dtype=torch.float32).permute(2, 0, 1)
            embeddings[name].append(network(x[None])[0].detach().numpy())
    test = scores(folder / "runs" / RUN)
    labels = np.repeat(TEST_CLASSES, 4)
    for name, e in embeddings.items():
        gaps = ((np.array(e)[:, None] - np.array(e)) ** 2).sum(-1) + np.diag([np.inf] * len(e))
        right = labels[np.argsort(gaps, axis=1)[:, :3]] == labels[:, None]
        precision = np.cumsum(right, axis=1) / [1, 2, 3]
        assert test[name]["map@r"] == pytest.approx((right * precision).sum(1).mean() / 3, abs=1e-6)
        assert test[name]["r_precision"] == pytest.approx(right.mean(), abs=1e-6)
        assert test[name]["recall@1"] == pytest.approx(right[:, 0].mean(), abs=1e-6)


def test_spread_of_the_draws(finished):
    test = scores(finished[0] / "runs/shop-contrastive-bgaugment-s42")
    for name in ("replaced", "query"):
        draws = [draw["map@r"] for draw in test[name]["draws"]]
        assert len(draws) == 5 and len(set(draws)) > 1
        assert test[name]["mean"]["map@r"] == pytest.approx(sum(draws) / 5)
        variance = sum((d - sum(draws) / 5) ** 2 for d in draws) / 4
        assert test[name]["std"]["map@r"] == pytest.approx(variance ** 0.5)
    assert 0 <= test["clean"]["nmi"] <= 1


def test_done_runs_are_not_repeated_and_can_be_tested_again(finished, monkeypatch, capsys):
    folder, _ = finished
    monkeypatch.chdir(folder)
    run = folder / "runs" / RUN
    trained, before = (run / "last.pt").stat().st_mtime_ns, scores(run)
    tested = (run / "result.json").stat().st_mtime_ns
    finish(TINY)
    assert f"{RUN} is done; to test it again delete its result.json" in capsys.readouterr().out
    assert (run / "result.json").stat().st_mtime_ns == tested
    (run / "result.json").unlink()
    finish(f"{TINY} --workers 2")
    assert scores(run) == before
    assert (run / "last.pt").stat().st_mtime_ns == trained


@pytest.mark.parametrize("flags", ["--nmi", "--backbone squeezenet1_1 --image-size 32 --lr 1e-4"])
@pytest.mark.filterwarnings("ignore:This DataLoader will create 4")
def test_workers_change_nothing(shop, flags):
    """Nor do they if the network has dropout, as the second has."""
    for workers in (0, 1, 4):
        finish(f"{TINY} --bgaugment {flags} --workers {workers} --runs {workers}")
        assert_same_runs(*(shop / runs / "shop-contrastive-bgaugment-s42" for runs in ("0", str(workers))))


def figures(test):
    """All figures of a result, those that are nested too."""
    if not isinstance(test, (dict, list)):
        return [test]
    values = test.values() if isinstance(test, dict) else test
    return [figure for value in values for figure in figures(value)]


def test_the_size_of_evaluation_batches_changes_nothing(shop, monkeypatch):
    """But the last digits, which a CPU rounds otherwise."""
    found = []
    for size in (7, 32):  # 12 photos for validation, 44 for the test
        monkeypatch.setattr(bgbias, "EVAL_BATCH", size)
        finish(f"{TINY} --bgaugment --runs {size}")
        run = shop / f"{size}/shop-contrastive-bgaugment-s42"
        found.append(figures(scores(run)) + figures(log(run)))
    assert found[0] == pytest.approx(found[1], abs=1e-6) and len(found[0]) > 100


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="nobody counts the open files")
def test_neither_open_files_nor_tensors_grow_with_the_epochs(shop, monkeypatch):
    """Counted when an epoch's last.pt is written, while two workers prepare the next batches."""
    save, counted = bgbias.State.save, {}

    def counting(state, path, *, optimiser):
        if optimiser and state.epochs in (2, 8):
            gc.collect()
            tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
            counted[state.epochs] = len(os.listdir("/proc/self/fd")), tensors
        save(state, path, optimiser=optimiser)

    monkeypatch.setattr(bgbias.State, "save", counting)
    finish(f"{TINY} --epochs 8 --patience 8 --bgaugment --workers 2")
    assert counted[8][0] <= counted[2][0] and counted[8][1] <= counted[2][1]


def test_untrained_network(shop, monkeypatch, capsys):
    """Of a folder, all classes are tested then, and nothing is decoded but for the test. It needs no
    backgrounds and no classes for training."""
    shutil.rmtree(shop / "data/unsplash_backgrounds/val")
    for label in range(2, 22):
        shutil.rmtree(shop / f"shop/images/c{label:02d}")
    opened = opened_files(monkeypatch)
    finish(f"{TINY} --epochs 0")
    run = shop / "runs/shop-untrained-base-s42"
    result = json.loads((run / "result.json").read_text())
    assert (result["epochs"], result["best_epoch"]) == (0, 0)
    assert sorted(path.name for path in run.iterdir()) == ["best.pt", "config.json", "result.json"]
    torch.manual_seed(bgbias.seed_of(42, bgbias.INIT))
    untrained = bgbias.Embedder("smallconv", "none", 16).state_dict()
    assert same(checkpoint(run, "best.pt")["network"], dict(untrained))
    assert len(opened) == 2 * 8 + 3 and set(opened.values()) == {1}
    assert result["tested"] == "2 test classes, 8 photos"
    out = capsys.readouterr().out
    lost = 100 - 100 * result["test"]["replaced"]["mean"]["map@r"] / result["test"]["clean"]["map@r"]
    lost = f"{lost:.0f} %" if lost > 0 else "nothing"
    assert "\ntest MAP@R, %: 2 test classes, 8 photos\n" in out and "\n| the network as it is * |" in out
    assert f"\nWith other backgrounds the network as it is loses {lost} of its MAP@R; on " in out


def test_the_untrained_network_is_not_set_against_a_trained_one(shop, capsys):
    """They are tested on other photos of a folder."""
    finish(f"{TINY} --epochs 1")
    finish(f"{TINY} --epochs 0")
    assert "| contrastive" not in capsys.readouterr().out.split("test MAP@R, %: 22 test classes")[1]
    finish("--report runs")
    tables = capsys.readouterr().out.split("\n## ")[1:]
    assert [table.splitlines()[0] for table in tables] == [
        "shop: 11 test classes, 44 photos", "shop: 22 test classes, 88 photos"]
    assert "| contrastive *" in tables[0] and "| the network as it is *" in tables[1]
    assert "the network" not in tables[0] and "| contrastive" not in tables[1]


def test_selection_follows_the_flag(shop):
    best_epochs = []
    for flags, kind, key in (("", "base", "clean"), ("--bgaugment", "bgaugment", "replaced"),
                             ("--select replaced --runs ablation", "base", "replaced")):
        finish(f"{TINY} --epochs 4 {flags}")
        run = shop / ("ablation" if "ablation" in flags else "runs") / f"shop-contrastive-{kind}-s42"
        selected = [row[key]["map@r"] for row in log(run)]
        best = 1 + selected.index(max(selected))
        assert json.loads((run / "result.json").read_text())["best_epoch"] == best
        assert len(checkpoint(run, "best.pt")["history"]) == best
        best_epochs.append(best)
    assert best_epochs[0] != best_epochs[2]  # the flag makes a difference here


def test_patience(shop):
    finish(f"{TINY} --lr 0 --epochs 50 --patience 2")  # nothing is learned: equal scores are no better
    run = shop / "runs" / RUN
    result = json.loads((run / "result.json").read_text())
    assert (len(log(run)), result["epochs"], result["best_epoch"]) == (3, 3, 1)


def test_loss_that_is_not_finite_keeps_the_good_checkpoint(shop, monkeypatch):
    step, steps = torch.optim.RMSprop.step, itertools.count(1)

    def poisoned(self, *args):
        step(self, *args)
        if next(steps) == poison:
            self.param_groups[0]["params"][0].data.fill_(float("nan"))

    monkeypatch.setattr(torch.optim.RMSprop, "step", poisoned)
    for poison, runs, what in ((6, "a", "the loss is nan"), (8, "b", "the embeddings are not finite")):
        steps = itertools.count(1)
        with pytest.raises(bgbias.UserError, match=f"--lr 0.001: {what} in epoch 2; give a lower --lr"):
            finish(f"{TINY} --runs {runs}")  # in the midst of the second epoch, in its last step
        last = checkpoint(shop / runs / RUN, "last.pt")
        assert len(last["history"]) == 1
        assert all(value.isfinite().all() for value in last["network"].values())


def test_streaming_gives_the_same_run(shop, monkeypatch, capsys):
    finish(f"{TINY} --runs a --bgaugment")
    assert "memory is short" not in capsys.readouterr().out
    free = itertools.chain([0.9] * 20, itertools.repeat(0.05))
    monkeypatch.setattr(bgbias, "free_memory", lambda: next(free))
    finish(f"{TINY} --runs b --bgaugment")
    out = capsys.readouterr().out  # 3 backgrounds stayed, too
    assert "memory is short: 17 of 32 photos stay decoded" in out and "0 of 12 photos" in out
    name = "shop-contrastive-bgaugment-s42"
    assert_same_runs(shop / "a" / name, shop / "b" / name)


def opened_files(monkeypatch):
    """Counts every opening of a photo or a mask from now on."""
    opened = Counter()
    for name in ("open_rgb", "open_mask"):
        real = getattr(bgbias, name)
        monkeypatch.setattr(bgbias, name, lambda path, real=real: opened.update([path]) or real(path))
    return opened


def test_photos_are_decoded_once_a_run(shop, monkeypatch):
    opened = opened_files(monkeypatch)
    finish(f"{TINY} --bgaugment")
    assert len(opened) == 2 * 22 * 4 + 2 * 3  # photos, masks, backgrounds
    assert set(opened.values()) == {1}


def test_fewer_classes_than_a_batch_wants(shop):
    finish(f"{TINY} --loss normalized_softmax --batch-size 32")  # of 8 classes
    assert bgbias.images_per_class("normalized_softmax", 32, 8) == 4
    assert bgbias.images_per_class("normalized_softmax", 8, 3) == 4
    assert bgbias.images_per_class("normalized_softmax", 32, 32) == 1
    assert bgbias.images_per_class("triplet", 32, 100) == 4


@pytest.mark.parametrize("flags, unusual", [
    ("", []), ("--dataset cub200", []), ("--dataset cub200 --bgaugment --select replaced", []),
    ("--dataset cub200 --select replaced", ["--select replaced"]),
    ("--dataset sop --epochs 15 --image-size 227", ["--epochs 15"]),
    ("--epochs 15 --image-size 227", ["--image-size 227"]),
    ("--dataset cub200 --lr 1e-5 --backbone resnet50", ["--lr 1e-05", "--backbone resnet50"]),
    ("--dataset cub200 --weights fetched/bn_inception-52deb4733.pth", []),
    ("--dataset cub200 --seed 3 --data d --runs r --workers 3 --device cpu --nmi", [])])
def test_what_is_unlike_the_paper(flags, unusual):
    assert bgbias.parse_args(flags.split()).unusual == unusual


# ---- Backgrounds and folders of one's own --------------------------------------------------------


def pool(folder, val, test):
    """A pool of so many photos, which nobody opens."""
    for part, photos in (("val", val), ("test", test)):
        (folder / part).mkdir(parents=True)
        for i in range(photos):
            (folder / part / f"{i}.jpg").touch()


def unusual_backgrounds(*flags):
    args = bgbias.parse_args(["--data", "data", *flags])
    nothing = bgbias.Split([], [], np.arange(40))
    bgbias.check_data(args, dict.fromkeys(("train", "val", "test"), nothing))
    return args.unusual


def test_a_pool_of_ones_own_is_marked(tmp_path, monkeypatch):
    """However many photos it has, and wherever it lies."""
    monkeypatch.chdir(tmp_path)
    pool(tmp_path / "data/unsplash_backgrounds", 100, 100)
    pool(tmp_path / "data/toy/backgrounds", 100, 100)
    pool(tmp_path / "disk/unsplash_backgrounds", 100, 100)
    pool(tmp_path / "mine", 99, 1)
    for dataset in bgbias.SPLITS:
        assert unusual_backgrounds("--dataset", dataset) == []
        for folder in ("disk/unsplash_backgrounds", "mine"):
            marked = unusual_backgrounds("--dataset", dataset, "--backgrounds", folder)
            assert marked == [f"--backgrounds {folder}"]
    assert unusual_backgrounds("--dataset", "photos") == []
    assert unusual_backgrounds("--backgrounds", "data/unsplash_backgrounds") == [  # toy has its own
        "--backgrounds data/unsplash_backgrounds"]


@pytest.mark.parametrize("val, test", [(99, 100), (100, 101), (100, 0)])
def test_an_incomplete_pool_is_an_error(tmp_path, monkeypatch, val, test):
    """For the paper's datasets; one's own photos may have any."""
    monkeypatch.chdir(tmp_path)
    pool(tmp_path / "data/unsplash_backgrounds", val, test)
    name, photos = ("val", val) if val != 100 else ("test", test)
    message = (f"data/unsplash_backgrounds/{name}: {photos} photos, not 100; .* --backgrounds" if photos else
               "--backgrounds data/unsplash_backgrounds: no photos in data/unsplash_backgrounds/test")
    for dataset in bgbias.PAPER:
        with pytest.raises(bgbias.UserError, match=message):
            unusual_backgrounds("--dataset", dataset)
    if test == 100:  # without training, val is not needed
        assert unusual_backgrounds("--dataset", dataset, "--epochs", "0") == ["--epochs 0"]
    if test:
        assert unusual_backgrounds("--dataset", "photos") == []


def test_missing_test_backgrounds_are_found_before_training(shop, capsys):
    shutil.rmtree(shop / "data/unsplash_backgrounds/test")
    assert "no photos in data/unsplash_backgrounds/test; it takes" in failure(TINY, capsys)
    assert not (shop / "runs").exists()


@pytest.mark.parametrize("name", bgbias.SPLITS)
def test_a_folder_is_never_called_like_a_dataset(shop, capsys, name):
    (shop / "shop").rename(shop / name)
    args = bgbias.parse_args(["--dataset", name])
    assert bgbias.run_folder(args, "base") == Path(f"runs/{name}-contrastive-base-s42")
    for dataset in (f"./{name}", f"{name}/", f"{shop}/{name}"):
        args = bgbias.parse_args(["--dataset", dataset])
        assert bgbias.run_folder(args, "base") == Path(f"runs/{name}-folder-contrastive-base-s42")
    finish(f"{TINY} --epochs 0 --dataset ./{name}")
    capsys.readouterr()
    finish("--report runs")
    lines = capsys.readouterr().out.splitlines()
    assert f"## {name}-folder: 22 test classes, 88 photos" in lines
    assert [line for line in lines if line.startswith("## ")] == [f"## {name}-folder: 22 test classes, 88 photos"]
    assert not any("paper: " in line for line in lines)
    assert "not run at all: cars196, cub200, sop" in lines


# ---- Errors --------------------------------------------------------------------------------------

ERRORS = {  # flags: what the one line says
    "--loss nonsense": "invalid choice: 'nonsense'",
    "--epochs -1": "-1 is not a number from 0 up",
    "--lr nan": "nan is not a number from 0 up",
    "--select corrupted": "invalid choice: 'corrupted'",
    "--dataset nowhere": "--dataset nowhere: neither cars196",
    "--dataset cub200": "--data data: no cub200, looked in it and one folder deeper for CUB_200_2011/images",
    "--backgrounds none": "--backgrounds none: no photos in none/val",
    "--backbone nonsense": "--backbone nonsense: not bninception",
    "--backbone vit_b_16": "--backbone vit_b_16, --image-size 16: Wrong image height! Expected 224 but got 16",
    "--weights imagenet": "--weights imagenet: smallconv has none",
    "--weights missing.pth": "--weights missing.pth:",
    "--weights shop/images/c00/p0.jpg": "--weights shop/images/c00/p0.jpg:",
    "--device meta": "--device meta: ",
    "--device cuda:99": "--device cuda:99: ",
    "--device nonsense": "--device nonsense: ",
    "--batch-size 1": "1 is not a number from 2 up",
    "--batch-size 2": "--batch-size 2: not 4 images or more of each of two",
    "--batch-size 3": "--batch-size 3: not 4 images or more of each of two",
    "--report ''": "--report '': no such folder",
    "--report nowhere": "--report 'nowhere': no such folder",
    "--report shop/images/c00/p0.jpg": "--report 'shop/images/c00/p0.jpg': no such folder",
}


@pytest.fixture(scope="module")
def plain_shop(tmp_path_factory):
    """The shop for commands that write nothing."""
    return write_shop(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("flags", ERRORS)
def test_a_wrong_command_is_one_line_and_leaves_nothing(plain_shop, monkeypatch, capsys, flags):
    monkeypatch.chdir(plain_shop)
    assert ERRORS[flags] in failure(f"{TINY} {flags}", capsys)
    assert sorted(path.name for path in plain_shop.iterdir()) == ["data", "shop"]


def test_a_wrong_lr_is_one_line(shop, capsys):
    assert "--lr 1e+30: the loss is nan in epoch 1; give a lower" in failure(f"{TINY} --lr 1e30", capsys)


def test_errors_have_no_traceback(shop):
    failed = bgbias_py(shop, f"{TINY} --backgrounds none")
    assert (failed.returncode, failed.stdout) == (2, "") and not (shop / "runs").exists()
    assert failed.stderr == ("bgbias.py: error: --backgrounds none: no photos in none/val; it takes "
                             "the folders val/ and test/ with photos, see README, Data\n")


def test_output_that_nobody_reads(finished, monkeypatch, capsys):
    """Of a report all is written at the end, so that this is where it is noticed."""
    monkeypatch.chdir(finished[0])
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stdout, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        with pytest.raises(SystemExit) as ended:
            bgbias.command("bgbias.py", lambda: finish("--report runs"))
    assert ended.value.code == 1 and capsys.readouterr().err == ""


def test_an_error_without_stdout_and_stderr(plain_shop, monkeypatch):
    """They are None where the caller closed them."""
    monkeypatch.chdir(plain_shop)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    with pytest.raises(SystemExit) as ended:
        bgbias.command("bgbias.py", lambda: finish(f"{TINY} --backgrounds none"))
    assert ended.value.code == 2


@pytest.mark.parametrize("reason", [  # of a CPU and of a GPU
    "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: not enough memory: you tried to allocate",
    "CUDA out of memory. Tried to allocate 64.00 GiB."])
def test_too_little_memory_for_a_batch(shop, monkeypatch, capsys, reason):
    """As --loss triplet --batch-size 2048 needs."""
    def full(*_, **__):
        raise RuntimeError(reason)

    monkeypatch.setitem(bgbias.LOSSES, "triplet", full)
    assert failure(f"{TINY} --loss triplet", capsys) == (
        f"bgbias.py: error: {reason}; try a smaller --batch-size")


def test_weights_that_are_not_finite(shop, capsys):
    """An untrained network has no loss that would show it."""
    state = bgbias.build_backbone("smallconv", "none").state_dict()
    next(iter(state.values()))[0, 0] = float("nan")
    torch.save(state, "nan.pth")
    line = failure(f"{TINY} --epochs 0 --weights nan.pth", capsys)
    assert "gives nan or inf, are the --weights sound?" in line
    assert not (shop / "runs").exists()


def make_sop(root, names):
    """Stanford Online Products, two photos in each part, of which the lists give other names."""
    for file, first in (("Ebay_train.txt", 0), ("Ebay_test.txt", 4)):
        lines = ["image_id class_id super_class_id path"]
        for number in range(first, first + (4 if first == 0 else 2)):
            label = (1, 8490, 11319)[number // 2]
            name = f"chair_final/{number}.JPG"
            for place in (root / name, root / f"masks/chair_final/{number}.png"):
                place.parent.mkdir(parents=True, exist_ok=True)
                Image.new("L", (40, 32)).save(place, "PNG")
            lines.append(f"{number} {label} 1 {names.get(number, name)}")
        (root / file).write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("number", [1, 3, 5])  # of training, validation, test
@pytest.mark.parametrize("name", ["{outside}", "../outside.jpg", "chair_final/../../outside.jpg", "."])
def test_lists_that_lead_out_of_the_dataset_are_refused(tmp_path, monkeypatch, number, name):
    """Or its mask would be looked for, and written by masks.py, elsewhere."""
    monkeypatch.setitem(bgbias.COUNTS, "sop", (6, 2))
    root = tmp_path / "Stanford_Online_Products"
    make_sop(root, {})
    assert [len(split.images) for split in bgbias.load_splits("sop", tmp_path).values()] == [2, 2, 2]
    Image.new("RGB", (40, 32)).save(tmp_path / "outside.jpg")
    (root / "masks/outside.png").touch()
    make_sop(root, {number: name.format(outside=tmp_path / "outside.jpg")})
    for need_masks in (True, False):
        with pytest.raises(bgbias.UserError) as refused:
            bgbias.load_splits("sop", tmp_path, need_masks=need_masks)
        assert str(refused.value).startswith(f"{root}: a list of it names a file elsewhere: ")
        assert str(refused.value).endswith("; get that list again")


def test_bugs_keep_their_traceback():
    def buggy():
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        bgbias.command("bgbias.py", buggy)


def test_damaged_photos_are_named(shop, capsys, end_workers):
    (shop / "shop/images/c00/p0.jpg").write_bytes(b"no photo")
    line = failure(TINY, capsys)
    assert line.startswith("bgbias.py: error: shop/images/c00/p0.jpg: no readable image: ")
    Image.new("RGB", (40, 32)).save(shop / "shop/images/c00/p0.jpg")
    Image.new("L", (10, 10)).save(shop / "shop/masks/c21/p3.png")  # a test photo, read by a worker
    assert failure(f"{TINY} --workers 1", capsys) == (
        "bgbias.py: error: shop/masks/c21/p3.png: its size is (10, 10), the photo's is (40, 32); "
        "delete it and run masks.py")


@pytest.mark.parametrize("name, flags", [("c00/p0", ""), ("c09/p1", ""), ("c21/p3", ""),
                                         ("c21/p3", "--epochs 0")])
def test_what_is_no_mask_is_refused(shop, capsys, name, flags):
    """Values 0 and 1 would mix the photo's background in: of training, validation and test photos."""
    path = Path(f"shop/masks/{name}.png")
    mask = Image.open(path).point(lambda value: value // 128)
    mask.save(path)
    assert failure(f"{TINY} --epochs 1 {flags}", capsys) == (
        f"bgbias.py: error: {path}: no mask, its largest value is 1; delete it and run masks.py, or save "
        "8-bit greyscale, 255 = foreground")
    mask.point(lambda value: 255 * value).convert("1").save(path)  # as it should be
    Image.merge("RGB", [Image.open("shop/masks/c20/p0.png")] * 3).save("shop/masks/c20/p0.png")
    finish(f"{TINY} --epochs 1 {flags}")


needs_shm = pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="there is no /dev/shm")


@needs_shm
@pytest.mark.parametrize("workers", [8, 999])
def test_little_shared_memory_is_found_before_training(shop, monkeypatch, capsys, workers):
    usage = namedtuple("usage", "total used free")
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or usage(2**26, 2**26, 2**16))
    line = failure(f"{TINY} --workers {workers}", capsys)
    assert line.startswith(f"bgbias.py: error: --workers {workers}: they need ")
    assert "/dev/shm" in line and "--workers 0" in line and "--shm-size" in line
    assert not (shop / "runs").exists() and asked
    asked.clear()
    finish(f"{TINY} --epochs 0 --workers 0")
    assert not asked


@contextlib.contextmanager
def at_most(seconds):
    """What hangs fails."""
    def hangs(number, frame):
        raise AssertionError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("epochs", [3, 0])  # a worker of the training, one of the test
def test_workers_that_cannot_hand_over_end_the_run(shop, monkeypatch, capsys, end_workers, epochs):
    """As when /dev/shm runs full: a queue of multiprocessing drops what it cannot send, and waits."""
    def full(_):
        raise RuntimeError("unable to write to file </torch_1>: No space left on device (28)")

    monkeypatch.setitem(ForkingPickler._extra_reducers, torch.Tensor, full)
    monkeypatch.setattr(bgbias, "WORKER_TIMEOUT", 1)
    with at_most(60):
        line = failure(f"{TINY} --workers 1 --epochs {epochs}", capsys)
    assert line.startswith("bgbias.py: error: --workers: a process that prepares batches died or hangs (")
    assert "/dev/shm" in line and "--shm-size" in line and "The same command goes on; try fewer, or 0" in line


def test_workers_that_cannot_be_started(shop, monkeypatch, capsys):
    def no_fork():
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", no_fork)
    assert "--workers 2: [Errno 11] Resource temporarily unavailable; use fewer" in failure(
        f"{TINY} --workers 2", capsys)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="nobody counts the open files")
@pytest.mark.filterwarnings("ignore:This DataLoader will create 40", "ignore:Exception ignored in")
def test_more_workers_than_files_may_be_open(shop, capsys):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 30, limits[1]))
    try:
        line = failure(f"{TINY} --workers 40", capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for started in multiprocessing.active_children():
            started.terminate()
            started.join()
    assert line == "bgbias.py: error: --workers 40: [Errno 24] Too many open files; use fewer, or 0"


def test_runs_that_cannot_be_written(shop, monkeypatch, capsys):
    remedy = "; make room or choose another folder, the same command goes on"
    line = failure(f"{TINY} --runs shop/images/c00/p0.jpg", capsys)  # a file
    assert f"p0.jpg/{RUN}/config.json: could not be written" in line and line.endswith(remedy)
    (shop / "runs" / RUN / "log.jsonl").mkdir(parents=True)  # a folder in the place of a file
    line = failure(TINY, capsys)
    assert f"runs/{RUN}/log.jsonl: could not be written" in line and line.endswith(remedy)
    shutil.rmtree(shop / "runs")

    def full(_, path):
        path.write_bytes(b"the first part")
        raise RuntimeError("[enforce fail at inline_container.cc:664] . No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        line = failure(TINY, capsys)
    assert f"runs/{RUN}/best.pt: could not be written: [enforce fail" in line and line.endswith(remedy)
    assert not list(shop.glob("runs/*/*.tmp*"))
    finish(TINY)  # the same command goes on


def test_other_arguments_are_refused(finished, monkeypatch):
    monkeypatch.chdir(finished[0])
    with pytest.raises(bgbias.UserError) as refused:
        finish(f"{TINY} --lr 0.5 --iterations 9 --nmi --workers 1")
    assert str(refused.value) == (
        f"runs/{RUN}: begun with --iterations 4 (now 9), --lr 0.001 (now 0.5); take the same, give "
        f"another --runs, or delete runs/{RUN} to start over")


def test_other_arguments_are_refused_in_the_midst_of_a_run(shop, monkeypatch):
    die_at(monkeypatch, torch.optim.RMSprop, "step", 6, TINY)
    with pytest.raises(bgbias.UserError, match=r"begun with --epochs 3 \(now 5\); take the same"):
        finish(f"{TINY} --epochs 5")


def test_finished_without_checkpoints_is_still_that_run(shop, capsys):
    finish(f"{TINY} --epochs 1")
    for name in ("last.pt", "best.pt"):
        (shop / "runs" / RUN / name).unlink()
    finish(f"{TINY} --epochs 1")
    assert "is done; " in capsys.readouterr().out
    with pytest.raises(bgbias.UserError, match="begun with --lr"):
        finish(f"{TINY} --epochs 1 --lr 0.5")


def test_a_renamed_run_is_refused(shop):
    finish(f"{TINY} --epochs 1")
    (shop / "runs" / RUN).rename(shop / "runs/shop-contrastive-base-s7")
    with pytest.raises(bgbias.UserError, match=r"begun with --seed 42 \(now 7\)"):
        finish(f"{TINY} --epochs 1 --seed 7")


@pytest.mark.parametrize("name", ["last.pt", "best.pt", "config.json"])
def test_damaged_run_files_are_named(shop, name):
    finish(f"{TINY} --epochs 1")
    run = shop / "runs" / RUN
    (run / "result.json").unlink()
    content = (run / name).read_bytes()
    odd = {"cut": content[:100], "empty": b"", "a list": b"[1]", "other args": b'{"args": 1}',
           "no photos": content.replace(b'"photos"', b'"phobos"'), "deep": b"[" * 10_000 + b"]" * 10_000}
    if name != "config.json":
        torch.save({"network": bgbias.Embedder("squeezenet1_1", "none", 32).state_dict()}, "other.pt")
        odd = {"cut": content[:100], "empty": b"", "text": b"hello", "other": Path("other.pt").read_bytes()}
    for damaged in odd.values():
        (run / name).write_bytes(damaged)
        with pytest.raises(bgbias.UserError, match=f"{RUN}/{name}: .*delete runs/{RUN} to start over"):
            finish(f"{TINY} --epochs 1")
    (run / name).unlink()
    if name != "last.pt":  # the last epoch must not pass for the best
        with pytest.raises(bgbias.UserError, match=f"{RUN}/{name}: .*No such file.*to start over"):
            finish(f"{TINY} --epochs 1")
    shutil.rmtree(run)  # as the message says
    finish(f"{TINY} --epochs 1")
    assert (run / "result.json").exists()


@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
def test_flipped_bytes_are_found(shop, name):
    """PyTorch does not look at the checksums, and would go on with other weights."""
    finish(f"{TINY} --epochs 1")
    run = shop / "runs" / RUN
    (run / "result.json").unlink()
    content = (run / name).read_bytes()
    tensors = 0
    for part in zipfile.ZipFile(run / name).infolist():
        start = content.index(part.filename.encode(), part.header_offset) + len(part.filename)
        start = content.index(zipfile.ZipFile(run / name).read(part), start)  # after the padding
        flipped = bytearray(content)
        flipped[start + part.file_size // 2] ^= 1
        (run / name).write_bytes(flipped)
        with pytest.raises(Exception):
            bgbias.read_checkpoint(run / name)
        if "/data/" in part.filename and part.file_size >= 1000:
            tensors += 1
            with pytest.raises(bgbias.UserError, match=f"{RUN}/{name}: .*; if it is damaged, delete runs/"):
                finish(f"{TINY} --epochs 1")
        (run / name).write_bytes(content)
    assert tensors >= 5
    finish(f"{TINY} --epochs 1")
    assert (run / "result.json").exists()


ROW = {"epoch": 1, "loss": 1.0, "clean": {"map@r": 0.5}, "replaced": {"map@r": 0.5}, "seconds": 1.0}


HISTORIES = [
    "epochs", None, 5, [5], ["epoch"], [{}], [{**ROW, "seconds": "long"}], [{**ROW, "clean": {}}],
    [ROW, {**ROW, "clean": {"map@r": "high"}}]]


@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
def test_a_history_that_is_none(shop, name):
    finish(f"{TINY} --epochs 1")
    run = shop / "runs" / RUN
    (run / "result.json").unlink()
    whole = checkpoint(run, name)
    for history in HISTORIES:
        torch.save({**whole, "history": history}, run / name)
        with pytest.raises(bgbias.UserError, match=f"runs/{RUN}/{name}: .*; if it is damaged, delete runs/{RUN}"):
            finish(f"{TINY} --epochs 1")


def test_a_damaged_result_is_named(shop, capsys):
    finish(f"{TINY} --epochs 1")
    for damaged in ("{", "[" * 10_000 + "]" * 10_000):
        (shop / "runs" / RUN / "result.json").write_text(damaged)
        capsys.readouterr()
        with pytest.raises(bgbias.UserError, match=f"runs/{RUN}: .*; not a result, left out"):
            finish(f"{TINY} --epochs 1")
        assert "to test it again delete its result.json" in capsys.readouterr().out


def test_siblings_with_other_flags_or_damaged(shop, capsys):
    finish(f"{TINY} --epochs 1")
    capsys.readouterr()
    finish(f"{TINY} --epochs 2 --bgaugment")
    out = capsys.readouterr().out
    assert "| contrastive *" not in out and "\n| contrastive + BGAugment * |" in out
    flags = "--iterations 4 --batch-size 8 --lr 0.001 --backbone smallconv --weights none --image-size 16"
    assert f"\nruns/{RUN}: not comparable, 11 test classes, 44 photos, --epochs 1 {flags}\n" in out
    assert f"|\n* --epochs 2 {flags}\n" in out
    (shop / "runs" / RUN / "result.json").write_text("{")
    finish(f"{TINY} --epochs 2 --bgaugment")
    out = capsys.readouterr().out
    assert "\n| contrastive + BGAugment * |" in out and f"runs/{RUN}" not in out
