"""run_all.sh: its commands, jobs that fail or are stopped, downloads from a local server, and real runs."""

import contextlib
import hashlib
import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

import bgbias
from conftest import ROOT, write_shop

TINY = "--backbone smallconv --weights none --image-size 16 --iterations 1 --batch-size 8 --device cpu"
LOSSES = ("contrastive", "triplet", "multi_similarity", "arcface", "normalized_softmax")
PAPERS = ("cars196", "cub200", "sop")


@pytest.fixture
def place(tmp_path):
    """A folder with copies of the scripts. Data, runs and caches stay in it."""
    for script in ("run_all.sh", "bgbias.py", "masks.py", "eval_attention.py"):
        shutil.copy(ROOT / script, tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models/u2net.onnx").touch()  # so it is not fetched
    return tmp_path


# Counting GPUs takes seconds, and here there are none.
FOR_DOWNLOADS = f'case "$*" in "-c import torch"*) exit ;; -c*) exec {sys.executable} "$@" ;; esac\n'


def fake_python(place, text):
    """Replaces python by a shell script."""
    (place / "bin").mkdir(exist_ok=True)
    (place / "bin/python").write_text(f"#!/bin/sh\n{text}")
    (place / "bin/python").chmod(0o755)


@pytest.fixture
def calls(place):
    """Replaces python by a program that appends its arguments to a file. It fails if they contain $BROKEN, or if its
    GPU is busy. Only for downloads it runs Python. Returns a function that reads the file."""
    fake_python(place, 'case "$*" in *"${BROKEN-nothing}"*) echo "cannot $*"; exit ${CODE-3} ;; esac\n' + FOR_DOWNLOADS
                + 'echo "$*" >>calls\nbusy=gpu-$CUDA_VISIBLE_DEVICES\nmkdir $busy && sleep 0.05 && rmdir $busy\n')
    return lambda: (place / "calls").read_text().splitlines()


def start(place, *words, preexec_fn=None, **variables):
    """The process of `bash run_all.sh WORDS`, started in `place` as from a terminal."""
    ours = ("SLURM_ARRAY_TASK_ID", "FLAGS", "LOSSES", "SEEDS", "VARIANTS", "DATA", "RUNS", "CUDA_VISIBLE_DEVICES")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    environment |= {"PATH": f"{place}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}", "GPUS": "none",
                    "OMP_NUM_THREADS": "1", "no_proxy": "127.0.0.1", "U2NET_HOME": f"{place}/models"}
    return subprocess.Popen(["bash", "run_all.sh", *words], cwd=place, env=environment | variables, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                            preexec_fn=preexec_fn)


def run_all(place, *words, **variables):
    """(exit code, stdout, stderr)"""
    process = start(place, *words, **variables)
    output, error = process.communicate(timeout=600)
    return process.returncode, output, error


def failures(place, *words, **variables):
    """{job: reason} as listed at the end of a pass with failures."""
    code, output, error = run_all(place, *words, **variables)
    assert code == 1, output + error
    _, *lines = error.splitlines()
    assert len(lines) == output.count("FAILED")
    return dict(line.strip().split(": ", 1) for line in lines)


def trainings(datasets, losses=LOSSES, seeds=(42,), flags=""):
    return [f"bgbias.py --dataset {dataset} --loss {loss} {augment}--seed {seed} --data data --runs runs{flags}"
            for dataset in datasets for seed in seeds for loss in losses for augment in ("", "--bgaugment ")]


def test_dry_run_prints_the_30_runs_of_the_paper_and_needs_no_torch(place, calls):
    code, output, error = run_all(place, "--dry-run", GPUS="", BROKEN="import torch")
    lines = output.splitlines()
    assert (code, error) == (0, "")
    assert lines[:6] == [f"fetch {what}" for what in (*PAPERS, "backgrounds", "weights", "u2net")]
    assert lines[6:9] == [f"python masks.py --dataset {dataset} --data data" for dataset in PAPERS]
    assert lines[9:39] == [f"python {command}" for command in trainings(PAPERS)]
    assert len({line for line in lines[39:69] if line.startswith("python eval_attention.py runs/")}) == 30
    assert lines[69:] == ["python bgbias.py --report runs"]
    assert not {"data", "runs", "calls"} & {path.name for path in place.iterdir()}
    code, output, error = run_all(place, "train", GPUS="", BROKEN="import torch")
    assert (code, output) == (2, "") and "requirements.txt" in error


def test_a_choice_and_toy_needs_neither_downloads_nor_masks(place, calls):
    words = {"SEEDS": "42 43", "LOSSES": "triplet arcface", "FLAGS": "--epochs 3"}
    assert run_all(place, "masks", "train", "cub200", "toy", **words)[0] == 0
    expected = trainings(("cub200", "toy"), ("triplet", "arcface"), (42, 43), " --epochs 3")
    assert calls() == ["masks.py --dataset cub200 --data data", *expected]
    assert run_all(place, "toy")[0] == 0
    assert calls()[len(expected) + 1:] == [*trainings(("toy",)), "bgbias.py --report runs"]


def test_own_backgrounds_are_a_third_variant(place):
    words, variables = ("train", "attention", "toy"), {"LOSSES": "triplet", "VARIANTS": "base bgaugment own"}
    *train, _, _, attention = run_all(place, "--dry-run", *words, **variables)[1].splitlines()
    expected = trainings(("toy",), ("triplet",))
    expected.append(expected[1].replace("--bgaugment", "--bgaugment own"))
    assert train == [f"python {command}" for command in expected]
    assert attention == "python eval_attention.py runs/toy-triplet-own-s42/ runs/toy-triplet-own-s42-*/"


@pytest.mark.parametrize("variables, gpus", [
    ({}, "012"),  # what torch counts
    ({"CUDA_VISIBLE_DEVICES": "4,7"}, "47"), ({"CUDA_VISIBLE_DEVICES": ""}, ["none"]),
    ({"CUDA_VISIBLE_DEVICES": "4,7", "GPUS": "1"}, "1"), ({"GPUS": "2 3"}, "23")])
def test_which_gpus(place, variables, gpus):
    (place / "torch.py").write_text("class cuda:\n    device_count = lambda: 3\n")
    (place / "masks.py").write_text("")  # does nothing
    code, output, _ = run_all(place, "masks", **{"GPUS": "", **variables})
    assert code == 0
    assert {*re.findall(r" on GPU (\w+),", output)} == {*gpus}


@pytest.mark.parametrize("task", [0, 1, 17, 29])
def test_a_slurm_task_gets_its_run(place, task):
    train, attention = run_all(place, "--dry-run", SLURM_ARRAY_TASK_ID=str(task))[1].splitlines()
    assert train == f"python {trainings(PAPERS)[task]}"
    dataset, loss, variant = train.split()[3], train.split()[5], "bgaugment" if "--bgaugment" in train else "base"
    assert attention.startswith(f"python eval_attention.py runs/{dataset}-{loss}-{variant}-s42")


@pytest.mark.parametrize("word", ["photos/", "./photos", "photos", "a.b/", "a:b|c", "link", "{place}/photos", "./cub200/"])
def test_attention_finds_every_run_of_a_folder_once(place, calls, monkeypatch, word):
    """bgbias.py names the runs. Seed 4 has none, and those of seed 421 do not belong to seed 42."""
    monkeypatch.chdir(place)
    for name in ("photos", "a.b", "a:b|c", "cub200"):
        (place / name / "images").mkdir(parents=True)
        (place / name / "backgrounds").mkdir()
    (place / "link").symlink_to("photos")
    word, runs = word.format(place=place), []
    for seed, flags in itertools.product((42, 421), ("", "--lr 0.5", "--bgaugment --lr 0.5")):
        args = bgbias.parse_args(f"--dataset {word} --loss triplet --seed {seed} {flags}".split())
        runs.append(bgbias.run_folder(args))
        bgbias.write_text(runs[-1] / "result.json", "{}")
    assert run_all(place, "attention", word, LOSSES="triplet", SEEDS="4 42 421")[0] == 0
    scored = [[Path(name) for name in call.split()[1:] if Path(name).is_dir()] for call in calls()]
    assert all(scored) and sorted(sum(scored, [])) == sorted(runs)


@pytest.mark.parametrize("words, variables, named", [
    (["nonsense"], {}, "nonsense"), (["a b"], {}, "a b"), ([], {"RUNS": "a b"}, "RUNS"), ([], {"DATA": "a b"}, "DATA"),
    ([], {"SLURM_ARRAY_TASK_ID": "30"}, "--array"), (["train", "report"], {"SLURM_ARRAY_TASK_ID": "0"}, "--array"),
    ([], {"VARIANTS": "base other"}, "VARIANTS: other")])
def test_wrong_words(place, words, variables, named):
    code, output, error = run_all(place, *words, **variables)
    line, = error.splitlines()
    assert (code, output) == (2, "") and named in line


def test_help_is_the_header(place):
    header = (ROOT / "run_all.sh").read_text().split("\nset -")[0].split("\n", 1)[1]  # without #!
    assert run_all(place, "--help")[1].split() == re.sub("^#", "", header, flags=re.M).split()


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is missing")
def test_shellcheck():
    assert subprocess.run(["shellcheck", ROOT / "run_all.sh"], capture_output=True, text=True).stdout == ""


def test_nothing_needs_a_newer_bash_or_tool_than_those_of_macos():
    """Its bash is 3.2 of 2006, which cannot expand an empty array under set -u. It has no md5sum."""
    newer = (r"wait -n|mapfile|readarray|coproc|declare|local -\w|\[@\]|\$\{\w+(?:,,|\^\^|@)|&>>|\|&|;&|EPOCH|BASHPID"
             r"|nproc|printf -v|(?:md5|sha256)sum|realpath|readlink|/dev/fd|<\(|grep -P|sed -i|\bseq\b|\stimeout\s")
    code = re.sub("#.*", "", (ROOT / "run_all.sh").read_text())
    assert re.findall(newer, code) == []


# Jobs that fail or are stopped


def test_a_failing_run_does_not_lose_the_others(place, calls):
    broken = "bgbias.py --dataset toy --loss triplet --bgaugment"
    failed = failures(place, "train", "report", "toy", GPUS="0 1", BROKEN=broken)
    assert [*failed] == ["toy-triplet-bgaugment-s42"]
    assert re.search(f"3, .*cannot {broken}", *failed.values())  # its exit code and the last line of its log
    assert "137 (killed" in failures(place, "train", "toy", BROKEN=broken, CODE="137")["toy-triplet-bgaugment-s42"]
    others = [command for command in trainings(("toy",)) if not command.startswith(broken)]
    assert sorted(calls()) == sorted([*others, *others, "bgbias.py --report runs"])


def test_failed_masks_leave_out_the_runs(place, calls):
    for name in ("photos", "my_photos"):
        (place / name / "images").mkdir(parents=True)
    failed = failures(place, "masks", "train", "photos", "my_photos", BROKEN="masks.py --dataset photos")
    assert [*failed] == ["masks-photos"]
    assert calls() == ["masks.py --dataset my_photos --data data", *trainings(("my_photos",))]


def wait_for(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def any_process(place):
    """Whether a process runs in the folder."""
    for link in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):  # it has just ended
            if os.readlink(link) == os.path.realpath(place):
                return True
    return False


def stop(process, place, name):
    """Sends a signal; SIGINT as Ctrl-C does, to the whole group. Soon no process may be left."""
    assert any_process(place)
    send = os.killpg if name == "SIGINT" else os.kill
    send(process.pid, getattr(signal, name))
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "")
    wait_for(lambda: not any_process(place))


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
@pytest.mark.parametrize("gpus", ["0 1", "0"])
def test_stopped(place, calls, name, gpus):
    """Each job has a child, which would live for ten minutes. With a single GPU, other jobs wait for it. SLURM sends
    SIGUSR1, and only then the job is requeued. The temporary folder goes."""
    fake_python(place, 'case "$*" in "-c"*) exit ;; esac\nsleep 600 &\ntouch "job-$CUDA_VISIBLE_DEVICES"\nwait\n')
    (place / "bin/scontrol").write_text('#!/bin/sh\necho "$*" >>requeued\n')
    (place / "bin/scontrol").chmod(0o755)
    (place / "temporary").mkdir()
    variables = {"LOSSES": "triplet", "SLURM_JOB_ID": "123", "TMPDIR": str(place / "temporary")}
    process = start(place, "train", "toy", GPUS=gpus, **variables)
    wait_for(lambda: len([*place.glob("job-*")]) == len(gpus.split()))
    stop(process, place, name)
    assert not [*place.glob("temporary/*")]
    if name == "SIGUSR1":
        assert (place / "requeued").read_text() == "requeue 123\n"
    else:
        assert not (place / "requeued").exists()


# Downloads

URLS = {"cars": "https://www.kaggle.com/api/v1/datasets/download/rickyyyyyyy/torchvision-stanford-cars",
        "cub": "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
        "sop": "ftp://ftp.cs.stanford.edu/cs/cvgl/Stanford_Online_Products.zip",
        "photos": "https://github.com/LSX-UniWue/background-bias-in-dml/archive/HEAD.tar.gz"}
SUMS = {"cub": "97eceeb196236b17998738112f37df78", "sop": "7f73d41a2f44250d4779881525aea32e"}
ARCHIVES = {"cars": "stanford_cars.zip", "cub": "CUB_200_2011.tgz", "sop": "Stanford_Online_Products.zip",
            "photos": "unsplash_backgrounds.tar.gz"}
FILES = {"cars": "stanford_cars/cars_train/00001.jpg", "cub": "CUB_200_2011/images/001.A/a.jpg",
         "sop": "Stanford_Online_Products/Ebay_train.txt", "photos": "unsplash_backgrounds/val/a.jpg"}
ROOTS = {"cars196": "stanford_cars", "cub200": "CUB_200_2011", "sop": "Stanford_Online_Products"}
ONLY_DATASETS = "--backgrounds b --weights w.pth"  # FLAGS with which nothing else is fetched


class Handler(BaseHTTPRequestHandler):
    """Serves server.files. It may ignore ranges, or cut the connection half-way."""

    def do_GET(self):
        server, name, asked = self.server, self.path[1:], self.headers.get("Range")  # None or bytes=123-
        server.asked.append((name, asked))
        body = server.files.get(name, b"")
        begin = int(asked[len("bytes="):-1]) if asked and server.ranges else 0
        self.send_response(404 if not body else 206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - begin))
        self.end_headers()
        self.wfile.write(body[begin:len(body) // 2 if server.cut else None])


def pack(folder, archive):
    """The bytes of an archive that holds what is in the folder."""
    form = "zip" if archive.endswith("zip") else "gztar"
    return Path(shutil.make_archive(folder, form, folder)).read_bytes()


STUB = f"""
from pathlib import Path

class UserError(Exception):
    pass

def dataset_root(dataset, data):
    root = Path(data, {ROOTS}[dataset])
    if not [*root.glob("*")]:
        raise UserError("missing")
    return root
"""


@pytest.fixture
def web(place):
    """A server of small archives. The copy of run_all.sh has its addresses and their checksums. A stub replaces
    bgbias.py, because importing torch takes seconds."""
    fake_python(place, FOR_DOWNLOADS)
    (place / "bgbias.py").write_text(STUB)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.ranges, server.cut, server.asked, server.files = True, False, [], {}
    for name, file in FILES.items():
        github = "background-bias-in-dml-1a2b3c/" if name == "photos" else ""  # around all that is in the archive
        path = place / "served" / name / (github + file)
        path.parent.mkdir(parents=True)
        path.write_bytes(os.urandom(50_000))  # incompressible, so half of an archive is a real part of it
        (place / "served" / name / "about.txt").write_text("another file at the root, as CUB has one")
        server.files[name] = pack(place / "served" / name, ARCHIVES[name])
    changes = {url: f"http://127.0.0.1:{server.server_port}/{name}" for name, url in URLS.items()}
    changes |= {md5: hashlib.md5(server.files[name]).hexdigest() for name, md5 in SUMS.items()}
    script = (ROOT / "run_all.sh").read_text()
    for real, ours in changes.items():
        assert script.count(real) == 1
        script = script.replace(real, ours)
    (place / "run_all.sh").write_text(script)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def arrived(place):
    """The files in the folders of data/."""
    return {str(path.relative_to(place / "data")) for path in place.glob("data/*/**/*") if path.is_file()}


@pytest.mark.parametrize("by_hand", [False, True])
def test_everything_is_fetched_once(place, web, by_hand):
    (place / "data").mkdir()
    for name in ARCHIVES if by_hand else ():
        (place / "data" / ARCHIVES[name]).write_bytes(web.files[name])
    for _ in range(2):
        code, _, error = run_all(place, "data", *PAPERS, GPUS="0 1", FLAGS="--weights w.pth")
        assert (code, error, arrived(place)) == (0, "", {*FILES.values()})
        assert sorted(web.asked) == ([] if by_hand else [(name, None) for name in sorted(URLS)])
        assert not [*place.glob("data/.*")]
        if not by_hand:
            shutil.copy(ROOT / "bgbias.py", place)  # at the second start, the real one finds what was fetched


def test_cars196_in_another_layout_is_not_fetched(place, web):
    shutil.copy(ROOT / "bgbias.py", place)
    (place / "data/old/car_ims").mkdir(parents=True)
    assert run_all(place, "data", "cars196", FLAGS=ONLY_DATASETS)[0] == 0
    assert web.asked == [] and arrived(place) == set()


def test_a_failed_download_stops_only_its_dataset(place, web, calls):
    web.files["cub"] = web.files["photos"]  # a wrong checksum
    web.files["cars"] = b"<html>log in</html>"
    del web.files["sop"]
    failed = failures(place, "data", "train", *PAPERS, "toy", FLAGS=ONLY_DATASETS)
    named = {"data-cars196": ARCHIVES["cars"], "data-cub200": ARCHIVES["cub"], "data-sop": ARCHIVES["sop"]}
    assert failed.keys() == named.keys() and all(named[job] in failed[job] for job in named)
    assert calls() == trainings(("toy",), flags=f" {ONLY_DATASETS}") and arrived(place) == set()


@pytest.mark.parametrize("name, job, flags", [("cars", "cars196", "--backgrounds b --weights w"),
                                              ("photos", "backgrounds", "--weights w")])
@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_damaged_archive_of_unknown_md5_is_fetched_again(place, web, name, job, flags, damage):
    good = bytearray(web.files[name])
    half = len(good) // 2
    bad = good[:half] if damage == "cut" else good[:half] + bytes([good[half] ^ 255]) + good[half + 1:]
    archive = place / "data" / ARCHIVES[name]
    archive.parent.mkdir()
    archive.write_bytes(bad)
    if name == "photos":
        (place / "data/stanford_cars/cars_train").mkdir(parents=True)  # only the backgrounds are missing
    assert "it is deleted" in failures(place, "data", "cars196", FLAGS=flags)[f"data-{job}"]
    assert not archive.exists()
    assert run_all(place, "data", "cars196", FLAGS=flags)[0] == 0
    assert arrived(place) == {FILES[name]} and archive.read_bytes() == good


@pytest.mark.parametrize("name, job", [("cars", "cars196"), ("sop", "sop")])
def test_a_full_disk_is_not_the_archives_fault(place, web, name, job):
    """Files of more than 40 kB cannot be written. Later they can, and what an earlier start left is removed."""
    archive, hidden = (place / "data" / file for file in (ARCHIVES[name], f".unpacking-{FILES[name].split('/')[0]}"))
    archive.parent.mkdir()
    archive.write_bytes(web.files[name])
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
    reason = failures(place, "data", job, FLAGS=ONLY_DATASETS, preexec_fn=limit)[f"data-{job}"]
    assert "File too large" in reason and "delete" not in reason
    assert [path.name for path in place.glob("data/*")] == [archive.name] and arrived(place) == set()
    (hidden / "left").mkdir(parents=True)
    assert run_all(place, "data", job, FLAGS=ONLY_DATASETS)[0] == 0
    assert web.asked == [] and arrived(place) == {FILES[name]} and not hidden.exists()


def test_an_archive_without_its_folder(place, web):
    web.files["cars"] = web.files["sop"]
    reason = failures(place, "data", "cars196", FLAGS=ONLY_DATASETS)["data-cars196"]
    assert "it has no folder stanford_cars;" in reason and arrived(place) == set()


def test_an_incomplete_folder_is_not_replaced(place, web):
    (place / "data/stanford_cars").mkdir(parents=True)
    assert "stanford_cars: exists, but" in failures(place, "data", "cars196", FLAGS=ONLY_DATASETS)["data-cars196"]
    assert web.asked == []


def test_a_broken_bgbias_is_not_a_missing_dataset(place, web):
    (place / "bgbias.py").write_text("import nonsense")
    assert "nonsense" in failures(place, "data", "cars196", FLAGS=ONLY_DATASETS)["data-cars196"]
    assert web.asked == []


@pytest.mark.parametrize("ranges", [True, False])
def test_half_a_download_is_resumed(place, web, ranges):
    """A server without ranges works at the second try."""
    job, half = ("data", "cub200"), len(web.files["cub"]) // 2
    web.cut = True
    assert ARCHIVES["cub"] in failures(place, *job, FLAGS=ONLY_DATASETS)["data-cub200"]
    web.cut, web.ranges = False, ranges
    if not ranges:
        assert [*failures(place, *job, FLAGS=ONLY_DATASETS)] == ["data-cub200"]
    assert run_all(place, *job, FLAGS=ONLY_DATASETS)[0] == 0 and arrived(place) == {FILES["cub"]}
    assert [asked for _, asked in web.asked] == [None, f"bytes={half}-", *([] if ranges else [None])]


# Real runs


def test_two_settings_are_two_rows_with_their_seeds(place):
    """Under SLURM: tasks 0 and 2 are the base runs of the two seeds, and two tasks run at the same time."""
    write_shop(place)
    first, second = ({"LOSSES": "triplet", "SEEDS": "1 2", "FLAGS": f"--epochs {epochs} {TINY}"} for epochs in (1, 2))
    assert run_all(place, "train", "shop", SLURM_ARRAY_TASK_ID="0", **first)[0] == 0
    tasks = [start(place, "shop", SLURM_ARRAY_TASK_ID=task, **second) for task in ("0", "2")]
    assert [task.communicate()[1] for task in tasks] == ["", ""]
    assert len([*place.glob("runs/*/attention.npz")]) == 3
    _, output, _ = run_all(place, "report")
    report = (place / "runs/report.md").read_text()
    assert report in output
    rows = re.findall(r"^\| (triplet, epochs \d) +\| (\d) ", report, re.M)
    assert dict(rows[:2]) == {"triplet, epochs 1": "1", "triplet, epochs 2": "2"}


def learned(run):
    """All numbers of a finished run except the seconds."""
    saved = torch.load(run / "last.pt", weights_only=True)
    weights = {name: tensor.tolist() for name, tensor in saved["network"].items()}
    return ([{key: row[key] for key in row if "seconds" not in key} for row in saved["history"]], weights,
            json.loads((run / "result.json").read_text())["test"])


def test_stopped_and_resumed_equals_uninterrupted(place):
    """Task 1 is the BGAugment run."""
    write_shop(place)
    variables = {"LOSSES": "triplet", "SLURM_ARRAY_TASK_ID": "1", "FLAGS": f"--epochs 40 --patience 40 {TINY}"}
    assert run_all(place, "train", "shop", **variables, RUNS="whole")[0] == 0
    whole, = place.glob("whole/*-bgaugment-*/")
    run = place / "runs" / whole.name
    process = start(place, "train", "shop", **variables)
    wait_for((run / "last.pt").exists)
    stop(process, place, "SIGINT")
    *kept, _ = (run / "log.jsonl").read_text().splitlines()  # the last epoch may have been stopped before last.pt
    assert not (run / "result.json").exists()
    assert run_all(place, "train", "shop", **variables)[0] == 0
    assert learned(run) == learned(whole)
    assert (run / "log.jsonl").read_text().splitlines()[:len(kept)] == kept
