"""run_all.sh: the exact commands, fetching from a server that misbehaves, whole passes."""

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import bgbias
from conftest import ROOT

TINY = ("--backbone smallconv --weights none --image-size 16 --iterations 1 --batch-size 8 "
        "--device cpu")
LOSSES = ("contrastive", "triplet", "multi_similarity", "arcface", "normalized_softmax")
OURS = "--backgrounds b --weights w.pth"  # flags with which nothing shared is fetched
CODES = {"SIGINT": 130, "SIGTERM": 143}
URLS = {"cub": "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
        "sop": "ftp://ftp.cs.stanford.edu/cs/cvgl/Stanford_Online_Products.zip",
        "photos": "https://github.com/LSX-UniWue/background-bias-in-dml/archive/HEAD.tar.gz"}
SUMS = {"cub": "97eceeb196236b17998738112f37df78", "sop": "7f73d41a2f44250d4779881525aea32e"}


def environment(folder, **variables):
    """All that run_all.sh reads or writes lies in `folder`."""
    outside = ("SLURM_ARRAY_TASK_ID", "FLAGS", "LOSSES", "SEEDS", "CUDA_VISIBLE_DEVICES")
    kept = {name: value for name, value in os.environ.items() if name not in outside}
    return {**kept, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "DATA": f"{folder}/data", "RUNS": f"{folder}/runs", "TORCH_HOME": f"{folder}/hub",
            "OMP_NUM_THREADS": "1", "GPUS": "none", **variables}


def start(folder, *words, **variables):
    """The process of `bash run_all.sh WORDS`; of the fixture web's copy, if there is one."""
    script = folder / "run_all.sh"
    if script.exists():
        variables = {"FLAGS": "--weights w.pth", **variables}
    else:
        script = ROOT / "run_all.sh"
    return subprocess.Popen(["bash", script, *map(str, words)], cwd=ROOT, text=True,
                            env=environment(folder, **variables), stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def run_all(folder, *words, **variables):
    """The finished process."""
    process = start(folder, *words, **variables)
    output, error = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, output, error)


def processes(folder):
    """The command lines that name `folder`."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            if str(folder).encode() in file.read_bytes():
                yield file


def stop(process, folder, signal_number):
    """Sends the signal; (exit code, stderr). Nobody waits for what is slow, and soon after no
    process is left."""
    process.send_signal(signal_number)
    _, error = process.communicate(timeout=30)
    deadline = time.monotonic() + 15
    while any(processes(folder)):
        assert time.monotonic() < deadline, list(processes(folder))
        time.sleep(0.05)
    return process.returncode, error


def training_lines(datasets, losses=LOSSES, seeds=(42,), data="data", runs="runs"):
    return [f"python bgbias.py --dataset {dataset} --loss {loss} {augment}--seed {seed} "
            f"--data {data} --runs {runs}"
            for dataset in datasets for seed in seeds for loss in losses
            for augment in ("", "--bgaugment ")]


# The commands


def test_dry_run_is_the_30_runs_of_the_paper(tmp_path):
    done = run_all(tmp_path, "--dry-run", DATA="data", RUNS="runs")
    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, "")
    assert lines[:5] == [f"fetch {what}" for what in
                         ("cars196", "cub200", "sop", "backgrounds", "weights")]
    assert lines[5:8] == [f"python masks.py --dataset {dataset} --data data"
                          for dataset in ("cars196", "cub200", "sop")]
    assert lines[8:38] == training_lines(("cars196", "cub200", "sop"))
    assert lines[38] == "python eval_attention.py runs/cars196-contrastive-base-s42"
    assert lines[68:] == ["python bgbias.py --report runs"]
    assert len(set(lines)) == len(lines)
    assert not (tmp_path / "data").exists() and not (tmp_path / "runs").exists()


def test_dry_run_of_a_choice(tmp_path):
    done = run_all(tmp_path, "--dry-run", "train", "cub200", "toy", SEEDS="42 43",
                   LOSSES="triplet arcface", DATA="d", RUNS="r", FLAGS="--epochs 3")
    expected = training_lines(("cub200", "toy"), ("triplet", "arcface"), (42, 43), "d", "r")
    assert done.stdout.splitlines() == [f"{line} --epochs 3" for line in expected]


def test_toy_needs_neither_downloads_nor_masks(tmp_path):
    done = run_all(tmp_path, "--dry-run", "toy", DATA="data", RUNS="runs")
    lines = done.stdout.splitlines()
    assert len(lines) == 10 + 10 + 1 and lines[:10] == training_lines(("toy",))
    silent = run_all(tmp_path, "data", "masks", "toy")
    assert (silent.returncode, silent.stdout, silent.stderr) == (0, "", "")


@pytest.mark.parametrize("variables, gpus", [
    ({}, "012"),  # what torch counts
    ({"CUDA_VISIBLE_DEVICES": "4,7"}, "47"), ({"CUDA_VISIBLE_DEVICES": ""}, ["none"]),
    ({"CUDA_VISIBLE_DEVICES": "4,7", "GPUS": "1"}, "1")])
def test_which_gpus(tmp_path, variables, gpus):
    (tmp_path / "torch.py").write_text("class cuda:\n    device_count = lambda: 3\n")
    (tmp_path / "data/car_ims").mkdir(parents=True)
    for folder in ("CUB_200_2011", "Stanford_Online_Products"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    variables = {"GPUS": "", "PYTHONPATH": str(tmp_path), "FLAGS": OURS, **variables}
    done = run_all(tmp_path, "data", **variables)
    assert done.returncode == 0 and busy(done.stdout) == set(gpus)


def test_stopped_while_torch_is_asked(tmp_path):
    (tmp_path / "torch.py").write_text("import time\nprint('x', file=open('%s', 'w'))\n"
                                       "time.sleep(0.5)\nclass cuda:\n    device_count = int\n"
                                       % (tmp_path / "asked"))
    for name, code in CODES.items():
        process = start(tmp_path, "train", GPUS="", PYTHONPATH=str(tmp_path))
        while not (tmp_path / "asked").exists() and process.poll() is None:
            time.sleep(0.01)
        assert stop(process, tmp_path, getattr(signal, name)) == (code, "")
        (tmp_path / "asked").unlink()
        assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("task", [0, 1, 17, 29])
def test_slurm_gives_a_task_its_run(tmp_path, task):
    done = run_all(tmp_path, "--dry-run", SLURM_ARRAY_TASK_ID=str(task), DATA="data", RUNS="runs")
    train, attention = done.stdout.splitlines()
    assert train == training_lines(("cars196", "cub200", "sop"))[task]
    dataset, loss = train.split()[3], train.split()[5]
    kind = "bgaugment" if "--bgaugment" in train else "base"
    assert attention == f"python eval_attention.py runs/{dataset}-{loss}-{kind}-s42"


@pytest.mark.parametrize("name", ["photos", "a.b/", "link", "cub200"])
def test_a_folder_is_called_as_bgbias_calls_its_runs(tmp_path, name):
    (tmp_path / "there/images").mkdir(parents=True)
    if name == "link":
        (tmp_path / name).symlink_to("there")
    else:
        (tmp_path / name / "images").mkdir(parents=True)
    done = run_all(tmp_path, "--dry-run", "attention", f"{tmp_path}/{name}", LOSSES="triplet")
    run = f"{bgbias.dataset_name(f'{tmp_path}/{name}')}-triplet-base-s42"
    assert done.stdout.splitlines()[0] == f"python eval_attention.py {tmp_path}/runs/{run}"


@pytest.mark.parametrize("words, variables, message", [
    (("nonsense",), {}, "error: nonsense: no stage, dataset or folder with images/<class>/"),
    (("a b",), {}, "error: a b: a folder without spaces, please"),
    ((), {"RUNS": "a b"}, "error: DATA and RUNS: folders without spaces, please"),
    ((), {"SLURM_ARRAY_TASK_ID": "30"}, "there is no run of number 30")])
def test_wrong_words(tmp_path, words, variables, message):
    failed = run_all(tmp_path, *words, **variables)
    assert failed.returncode == 2 and failed.stdout == ""
    assert len(failed.stderr.splitlines()) == 1 and message in failed.stderr


def test_help_is_the_header(tmp_path):
    lines = run_all(tmp_path, "--help").stdout.splitlines()
    assert lines[0].startswith("All 30 runs") and lines[-1].endswith("flags for bgbias.py.")
    assert not any(line.startswith(("#", "set")) for line in lines)


def test_shellcheck():
    if not shutil.which("shellcheck"):
        pytest.skip("no shellcheck here")
    done = subprocess.run(["shellcheck", ROOT / "run_all.sh"], capture_output=True, text=True)
    assert done.stdout == ""


# Fetching


def tar(files):
    """A .tar.gz as bytes; files {name: content}."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def zipped(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        body, asked = server.files.get(self.path[1:]), self.headers.get("Range")
        server.asked.append((self.path[1:], asked))
        start = 0
        if asked and server.ranges:
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
        if body is None or start >= len(body):
            return self.send_error(404 if body is None else 416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start:len(body) // 2 if server.cut or server.slow else None])
        self.close_connection = True
        if server.slow:
            self.wfile.flush()
            time.sleep(15)

    def log_message(self, *_):
        pass


def point_at(server):
    """Writes run_all.sh with the server's addresses and checksums for the real ones."""
    text = (ROOT / "run_all.sh").read_text()
    for name, url in URLS.items():
        assert text.count(url) == 1
        text = text.replace(url, f"{server.url}/{name}")
    for name, real in SUMS.items():
        assert text.count(f" {real} ") == 1
        text = text.replace(f" {real} ", f" {hashlib.md5(server.files[name]).hexdigest()} ")
    server.script.write_text(text)


@pytest.fixture
def web(tmp_path):
    """A server of small copies of all that is fetched, which may ignore ranges, cut the connection
    half-way or stall there, and a copy of run_all.sh that asks it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url, server.script = f"http://127.0.0.1:{server.server_port}", tmp_path / "run_all.sh"
    server.ranges, server.cut, server.slow, server.asked = True, False, False, []
    noise = os.urandom(50_000)  # so that half of an archive is something
    server.files = {
        "cub": tar({"attributes.txt": b"-", "CUB_200_2011/images/001.A/a.jpg": noise}),
        "sop": zipped({"Stanford_Online_Products/Ebay_train.txt": noise}),
        "photos": tar({"code-main/data/unsplash_backgrounds/val/a.jpg": noise,
                       "code-main/data/unsplash_backgrounds/test/b.jpg": b"b"})}
    point_at(server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def arrived(folder):
    """The files below data/, relative, but for the archives."""
    archives = [folder / archive for archive in ARCHIVES.values()]
    return sorted(str(path.relative_to(folder)) for path in (folder / "data").rglob("*")
                  if path.is_file() and path not in archives)


ARCHIVES = {"cub": "data/CUB_200_2011.tgz", "sop": "data/Stanford_Online_Products.zip",
            "photos": "data/unsplash_backgrounds.tar.gz"}
SHARED = ["data/unsplash_backgrounds/test/b.jpg", "data/unsplash_backgrounds/val/a.jpg"]
CUB = "data/CUB_200_2011/images/001.A/a.jpg"
SOP = "data/Stanford_Online_Products/Ebay_train.txt"


def one_line(failed, *parts):
    """`failed` ended with exit code 1 and one line for each failure, one of them with `parts`."""
    assert failed.returncode == 1, failed.stdout + failed.stderr
    title, *lines = failed.stderr.splitlines()
    assert title == "failed; the same command tries again:"
    assert len(lines) == failed.stdout.count(": FAILED, ")
    assert sum(all(part in line for part in parts) for line in lines) == 1, lines
    assert "Traceback" not in failed.stdout


def test_everything_is_fetched_once(tmp_path, web):
    done = run_all(tmp_path, "data", "cub200", "sop", GPUS="0 1")
    assert (done.returncode, done.stderr) == (0, "")
    assert arrived(tmp_path) == sorted([CUB, SOP, *SHARED])
    assert sorted(web.asked) == sorted((name, None) for name in web.files)
    assert run_all(tmp_path, "data", "cub200", "sop").returncode == 0
    assert len(web.asked) == 3


@pytest.mark.parametrize("served, reason", [(None, "404"), (b"<html>Please log in", "hash")])
def test_weights_are_fetched_by_bgbias(tmp_path, web, served, reason):
    url = bgbias.BNINCEPTION_URL
    web.files = {url[1:]: served} if served else {}  # a proxy is asked for the whole address
    failed = run_all(tmp_path, "data", "cub200", FLAGS="--backgrounds b", http_proxy=web.url)
    one_line(failed, "data-weights: ", reason, f"fetch {url} elsewhere", "--weights FILE")
    assert (url[1:], None) in web.asked


def test_archives_put_there_by_hand(tmp_path, web):
    """They are taken, and nobody deletes them."""
    for name, place in ARCHIVES.items():
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_bytes(web.files[name])
    done = run_all(tmp_path, "data", "cub200", "sop")
    assert (done.returncode, done.stderr, web.asked) == (0, "", [])
    assert arrived(tmp_path) == sorted([CUB, SOP, *SHARED])
    assert all((tmp_path / place).exists() for place in ARCHIVES.values())


def test_a_wrong_archive_put_there_by_hand(tmp_path, web):
    archive = tmp_path / "data/CUB_200_2011.tgz"
    archive.parent.mkdir()
    archive.write_bytes(web.files["photos"])
    one_line(run_all(tmp_path, "data", "cub200"), f"{archive}: its md5 does not begin with ")
    assert archive.read_bytes() == web.files["photos"]


def test_folders_that_are_there_and_flags_that_need_nothing(tmp_path, web):
    for folder in ("cub200/CUB_200_2011", "Stanford_Online_Products"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    done = run_all(tmp_path, "data", "cub200", "sop", FLAGS=OURS)
    assert (done.returncode, done.stderr, web.asked) == (0, "", [])


@pytest.mark.parametrize("ranges", [True, False])
def test_half_a_download_goes_on(tmp_path, web, ranges):
    half = web.files["cub"][:20_000]
    (tmp_path / "data").mkdir()
    (tmp_path / "data/CUB_200_2011.tgz.part").write_bytes(half)
    web.ranges = ranges
    done = run_all(tmp_path, "data", "cub200")
    assert (done.returncode, done.stderr) == (0, "")
    assert arrived(tmp_path) == [CUB, *SHARED]
    asked = [what for name, what in web.asked if name == "cub"]
    assert asked == (["bytes=20000-"] if ranges else ["bytes=20000-", None])


def test_cut_connection(tmp_path, web):
    web.cut = True
    failed = run_all(tmp_path, "data", "cub200")
    archive = tmp_path / "data/CUB_200_2011.tgz"
    one_line(failed, "data-cub200", f"{web.url}/cub: (18)", f"put that file at {archive}")
    half = web.files["cub"][:len(web.files["cub"]) // 2]
    assert archive.with_name("CUB_200_2011.tgz.part").read_bytes() == half
    web.cut = False
    assert run_all(tmp_path, "data", "cub200").returncode == 0
    assert arrived(tmp_path) == [CUB, *SHARED]


def test_checksum(tmp_path, web):
    web.files["cub"] = tar({"CUB_200_2011/images/001.A/a.jpg": b"something else"})
    failed = run_all(tmp_path, "data", "cub200")
    one_line(failed, "data/CUB_200_2011.tgz: its md5 does not begin with ", "delete it")
    assert arrived(tmp_path) == SHARED


@pytest.mark.parametrize("name, code", CODES.items())
def test_stopped_while_fetching(tmp_path, web, name, code):
    """It does not wait for a slow server; what came so far is kept."""
    web.slow = True
    process = start(tmp_path, "data", "cub200", "sop", GPUS="0 1")
    part = tmp_path / "data/CUB_200_2011.tgz.part"
    while not (part.exists() and part.stat().st_size) and process.poll() is None:
        time.sleep(0.05)
    assert stop(process, tmp_path, getattr(signal, name)) == (code, "")
    assert web.files["cub"].startswith(part.read_bytes())


def test_killed_while_fetching(tmp_path, web):
    """Nobody can tidy up then, so the next start does, and nothing lies anywhere else."""
    (tmp_path / "tmp").mkdir()
    (tmp_path / "data/CUB_200_2011.new/half").mkdir(parents=True)  # killed while it was unpacked
    web.slow = True
    process = start(tmp_path, "data", "cub200", FLAGS=OURS, TMPDIR=str(tmp_path / "tmp"))
    part = tmp_path / "data/CUB_200_2011.tgz.part"
    while not (part.exists() and part.stat().st_size) and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    process.wait()
    for file in processes(tmp_path):  # those that it has started live on
        os.kill(int(file.parent.name), signal.SIGKILL)
    process.communicate(timeout=30)
    web.slow = False
    done = run_all(tmp_path, "data", "cub200", FLAGS=OURS, TMPDIR=str(tmp_path / "tmp"))
    assert (done.returncode, done.stderr) == (0, "")
    assert arrived(tmp_path) == [CUB] and not list((tmp_path / "data").glob("*.new"))
    assert not list((tmp_path / "tmp").iterdir())


def test_killed_just_after_unpacking(tmp_path, web):
    (tmp_path / "data/CUB_200_2011.new").mkdir(parents=True)
    (tmp_path / "data/CUB_200_2011").mkdir()
    assert run_all(tmp_path, "data", "cub200", FLAGS=OURS).returncode == 0
    assert not (tmp_path / "data/CUB_200_2011.new").exists() and not web.asked


def test_a_failed_download_stops_only_its_dataset(tmp_path, web):
    del web.files["sop"], web.files["photos"]
    failed = run_all(tmp_path, "data", "report", "sop", "toy")
    one_line(failed, "data-sop", "404")
    one_line(failed, "data-backgrounds", "404")
    one_line(failed, "report: exit code 2, bgbias.py: error: --report", "no finished run")


def test_no_network(tmp_path, web):
    web.shutdown()
    web.server_close()
    failed = run_all(tmp_path, "data", "cub200")
    one_line(failed, f"{web.url}/cub: (7)", "onnect", "try again")


def test_missing_on_the_server(tmp_path, web):
    del web.files["photos"]
    failed = run_all(tmp_path, "data", "cub200")
    one_line(failed, f"{web.url}/photos: ", "404", "data/unsplash_backgrounds.tar.gz")
    assert arrived(tmp_path) == [CUB]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_no_space(tmp_path, web):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/CUB_200_2011.tgz.part").symlink_to("/dev/full")
    failed = run_all(tmp_path, "data", "cub200")
    one_line(failed, f"{web.url}/cub: (23)", "writ", f"{tmp_path}/data/CUB_200_2011.tgz")


@pytest.mark.parametrize("content, message", [
    (tar({"../evil": b"x", "unsplash_backgrounds/val/a.jpg": b"a"}), "not unpacked, "),
    (tar({"something/val/a.jpg": b"a"}), "has no folder unsplash_backgrounds"),
    (tar({"unsplash_backgrounds/val/a.jpg": os.urandom(9000)})[:4000], "not unpacked, "),
    (b"<html>Please log in</html>", "not unpacked, ")])
def test_bad_archives(tmp_path, web, content, message):
    web.files["photos"] = content
    failed = run_all(tmp_path, "data", "cub200")
    one_line(failed, "data/unsplash_backgrounds.tar.gz", message, "delete it")
    assert not (tmp_path / "data/unsplash_backgrounds").exists()
    assert not (tmp_path / "evil").exists() and not (tmp_path / "data/evil").exists()


def test_zip_does_not_leave_its_folder(tmp_path, web):
    web.files["sop"] = zipped({"../evil": b"x", f"{tmp_path}/evil": b"x",
                               "Stanford_Online_Products/Ebay_train.txt": b"a"})
    point_at(web)
    assert run_all(tmp_path, "data", "sop").returncode == 0
    assert arrived(tmp_path) == [SOP, *SHARED]
    assert not (tmp_path / "evil").exists()


def test_cars196_says_what_to_put_where(tmp_path, web):
    failed = run_all(tmp_path, "data", "train", "cars196")
    one_line(failed, f"{tmp_path}/data/cars196", "car_ims/", "cars_annos.mat", "devkit/")
    assert "bgbias.py" not in failed.stdout  # its runs are left out
    (tmp_path / "data/cars196/car_ims").mkdir(parents=True)
    assert run_all(tmp_path, "data", "cars196").returncode == 0


# Whole passes


def busy(output):
    """Whether no GPU had two commands at a time, and which GPUs there were."""
    owner, gpus = {}, set()
    for line in output.splitlines():
        if found := re.match(r"\S+ (\S+): \S+ on GPU (\w+),", line):
            name, gpu = found.groups()
            assert gpu not in owner.values()
            owner[name] = gpu
            gpus.add(gpu)
        elif found := re.match(r"\S+ (\S+): (\S+ is done|FAILED)", line):
            owner.pop(found[1], None)
    return gpus


def test_a_failing_run_does_not_lose_the_others(shop):
    broken = shop / "runs/shop-triplet-base-s1"
    broken.mkdir(parents=True)
    (broken / "config.json").write_text('{"args": {"loss": "contrastive"}}')
    (broken / "last.pt").touch()
    failed = run_all(shop, "data", "train", "attention", "report", "cars196", shop / "shop",
                     LOSSES="triplet", SEEDS="1", GPUS="none cpu", FLAGS=f"{TINY} --epochs 1")
    one_line(failed, "data-cars196", "nobody serves it")
    one_line(failed, f"shop-triplet-base-s1: exit code 2, bgbias.py: error: {broken}/config.json: ")
    assert len(failed.stderr.splitlines()) == 3
    assert busy(failed.stdout) == {"none", "cpu"}
    done = shop / "runs/shop-triplet-bgaugment-s1"
    for file in ("result.json", "attention.json"):
        assert list((shop / "runs").glob(f"*/{file}")) == [done / file]
    assert failed.stdout.endswith((shop / "runs/report.log").read_text())
    assert "triplet + BGAugment" in (shop / "runs/report.log").read_text()


def test_failed_masks_leave_out_the_runs(tmp_path):
    (tmp_path / "empty/images").mkdir(parents=True)
    failed = run_all(tmp_path, "masks", "train", tmp_path / "empty", FLAGS=TINY)
    one_line(failed, "masks-empty: exit code ")
    assert "empty-contrastive" not in failed.stdout


def test_a_log_that_cannot_be_written(tmp_path):
    (tmp_path / "runs/data-cars196.log").mkdir(parents=True)
    failed = run_all(tmp_path, "data", "cars196", FLAGS=OURS)
    assert failed.returncode == 1 and "  data-cars196: exit code 1" in failed.stderr
    assert "data-weights: data is done" in failed.stdout


def test_interrupted_and_resumed(shop):
    words = ("train", shop / "shop")
    variables = dict(LOSSES="triplet", FLAGS=f"{TINY} --epochs 20 --patience 20")
    process = start(shop, *words, **variables)
    first, second = (shop / f"runs/shop-triplet-{kind}-s42" for kind in ("base", "bgaugment"))
    while not (second / "last.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    assert stop(process, shop, signal.SIGTERM) == (143, "")
    assert (first / "result.json").exists() and not (second / "result.json").exists()
    before = (second / "log.jsonl").read_text().splitlines()
    stamp = (first / "result.json").stat().st_mtime_ns

    done = run_all(shop, *words, **variables)
    assert (done.returncode, done.stderr) == (0, "")
    assert (first / "result.json").stat().st_mtime_ns == stamp
    after = (second / "log.jsonl").read_text().splitlines()
    *kept, last = before  # an epoch that was stopped between the log and last.pt is done again
    assert after[:len(kept)] == kept and len(after) == 20
    again, last = (json.loads(line) for line in (after[len(kept)], last))
    assert {**again, "seconds": 0} == {**last, "seconds": 0}
    assert json.loads((second / "result.json").read_text())["epochs"] == 20
