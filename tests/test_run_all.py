"""run_all.sh: the exact commands, fetching from a server that misbehaves, whole passes."""

import hashlib
import io
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
from PIL import Image

from conftest import ROOT, shop

TINY = ("--backbone smallconv --weights none --image-size 16 --epochs 1 --iterations 2 "
        "--batch-size 8 --device cpu")
LOSSES = ("contrastive", "triplet", "multi_similarity", "arcface", "normalized_softmax")
WEIGHTS = b"weights of a network"


def environment(folder, **variables):
    """All that run_all.sh reads or writes lies in `folder`; nothing is to be had from the web."""
    nowhere = {f"{name}_URL": f"file://{folder}/nowhere" for name in
               ("CUB", "SOP", "PHOTOS", "WEIGHTS")}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    kept = {k: v for k, v in os.environ.items() if k not in ("SLURM_ARRAY_TASK_ID", "FLAGS")}
    return {**kept, "PATH": path, "DATA": f"{folder}/data", "RUNS": f"{folder}/runs",
            "TORCH_HOME": f"{folder}/hub", "OMP_NUM_THREADS": "1", "GPUS": "none", **nowhere,
            **variables}


def run_all(folder, *words, **variables):
    """The finished process of `bash run_all.sh WORDS`."""
    return subprocess.run(["bash", "run_all.sh", *map(str, words)], cwd=ROOT, text=True,
                          capture_output=True, env=environment(folder, **variables))


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
    assert [line for line in lines if "bgbias.py --dataset" in line] == training_lines(
        ("cars196", "cub200", "sop"))
    assert len(set(lines)) == len(lines) == 4 + 3 + 30 + 30 + 1
    assert lines[4:7] == [f"python masks.py --dataset {dataset} --data data --shard 1/1"
                          for dataset in ("cars196", "cub200", "sop")]
    assert lines[37] == "python eval_attention.py runs/cars196-contrastive-base-s42"
    assert lines[-1] == "python bgbias.py --report runs"
    assert not (tmp_path / "data").exists() and not (tmp_path / "runs").exists()


def test_dry_run_of_a_choice(tmp_path):
    done = run_all(tmp_path, "--dry-run", "train", "cub200", "toy", SEEDS="42 43",
                   LOSSES="triplet arcface", DATA="d", RUNS="r", FLAGS="--epochs 3")
    expected = training_lines(("cub200", "toy"), ("triplet", "arcface"), (42, 43), "d", "r")
    assert done.stdout.splitlines() == [f"{line} --epochs 3" for line in expected]


def test_toy_needs_neither_downloads_nor_masks(tmp_path):
    lines = run_all(tmp_path, "--dry-run", "toy").stdout.splitlines()
    assert len(lines) == 10 + 10 + 1 and not any("curl" in x or "masks" in x for x in lines)


def test_masks_are_shared_between_gpus(tmp_path):
    lines = run_all(tmp_path, "--dry-run", "masks", "sop", GPUS="0,1,5").stdout.splitlines()
    assert [line[-3:] for line in lines] == ["1/3", "2/3", "3/3"]


@pytest.mark.parametrize("task", [0, 1, 17, 29])
def test_slurm_gives_a_task_its_run(tmp_path, task):
    done = run_all(tmp_path, "--dry-run", SLURM_ARRAY_TASK_ID=str(task), DATA="data", RUNS="runs")
    train, attention = done.stdout.splitlines()
    assert train == training_lines(("cars196", "cub200", "sop"))[task]
    dataset, loss = train.split()[3], train.split()[5]
    kind = "bgaugment" if "--bgaugment" in train else "base"
    assert attention == f"python eval_attention.py runs/{dataset}-{loss}-{kind}-s42"


@pytest.mark.parametrize("words, variables, message", [
    (("nonsense",), {}, "error: nonsense: no stage, dataset or folder with images/<class>/"),
    (("a b",), {}, "error: a b: a folder without spaces, please"),
    ((), {"SLURM_ARRAY_TASK_ID": "30"}, "there is no run of this number")])
def test_wrong_words(tmp_path, words, variables, message):
    failed = run_all(tmp_path, *words, **variables)
    assert failed.returncode != 0 and failed.stdout == ""
    assert len(failed.stderr.splitlines()) == 1 and message in failed.stderr


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


@pytest.fixture
def web(tmp_path):
    """A server of small copies of all that is fetched, and the variables that name them. It may
    ignore ranges or cut the connection half-way."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.ranges, server.cut, server.slow, server.asked = True, False, False, []
    noise = os.urandom(50_000)  # so that half of an archive is something
    server.files = {
        "cub": tar({"attributes.txt": b"-", "CUB_200_2011/images/001.A/a.jpg": noise}),
        "sop": zipped({"Stanford_Online_Products/Ebay_train.txt": noise}),
        "photos": tar({"code-main/data/unsplash_backgrounds/val/a.jpg": noise,
                       "code-main/data/unsplash_backgrounds/test/b.jpg": b"b"}),
        "weights": WEIGHTS}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    server.variables = {f"{name.upper()}_URL": f"{url}/{name}" for name in server.files}
    for name in ("cub", "sop"):
        server.variables[f"{name.upper()}_MD5"] = hashlib.md5(server.files[name]).hexdigest()
    server.variables["WEIGHTS_SHA256"] = hashlib.sha256(WEIGHTS).hexdigest()[:9]
    yield server
    server.shutdown()
    server.server_close()


def arrived(folder):
    """The files below data/ and hub/, relative."""
    return sorted(str(path.relative_to(folder)) for kind in ("data", "hub")
                  for path in (folder / kind).rglob("*") if path.is_file())


SHARED = ["data/unsplash_backgrounds/test/b.jpg", "data/unsplash_backgrounds/val/a.jpg",
          "hub/hub/checkpoints/bn_inception-52deb4733.pth"]
CUB = "data/CUB_200_2011/images/001.A/a.jpg"


def one_line(failed, *parts):
    """`failed` ended with exit code 1 and one line for each failure, one of them with `parts`."""
    assert failed.returncode == 1, failed.stdout + failed.stderr
    title, *lines = failed.stderr.splitlines()
    assert title == "failed; the same command tries again:"
    assert len(lines) == failed.stdout.count(": FAILED, ")
    assert sum(all(part in line for part in parts) for line in lines) == 1, lines
    assert "Traceback" not in failed.stdout


def test_everything_is_fetched_once(tmp_path, web):
    done = run_all(tmp_path, "data", "cub200", "sop", **web.variables)
    assert (done.returncode, done.stderr) == (0, "")
    sop = "data/Stanford_Online_Products/Ebay_train.txt"
    assert arrived(tmp_path) == sorted([CUB, sop, *SHARED])
    assert (tmp_path / SHARED[2]).read_bytes() == WEIGHTS
    web.asked.clear()
    assert run_all(tmp_path, "data", "cub200", "sop", **web.variables).returncode == 0
    assert web.asked == []


def test_from_files(tmp_path, web):
    variables = dict(web.variables)
    for name, content in web.files.items():
        (tmp_path / name).write_bytes(content)
        variables[f"{name.upper()}_URL"] = f"file://{tmp_path / name}"
    assert run_all(tmp_path, "data", "cub200", **variables).returncode == 0
    assert arrived(tmp_path) == [CUB, *SHARED] and web.asked == []


@pytest.mark.parametrize("ranges", [True, False])
def test_half_a_download_goes_on(tmp_path, web, ranges):
    half = web.files["cub"][:20_000]
    (tmp_path / "data").mkdir()
    (tmp_path / "data/CUB_200_2011.part").write_bytes(half)
    web.ranges = ranges
    done = run_all(tmp_path, "data", "cub200", **web.variables)
    assert (done.returncode, done.stderr) == (0, "")
    assert arrived(tmp_path) == [CUB, *SHARED]
    asked = [what for name, what in web.asked if name == "cub"]
    assert asked == (["bytes=20000-"] if ranges else ["bytes=20000-", None])


def test_cut_connection(tmp_path, web):
    web.cut = True
    failed = run_all(tmp_path, "data", "cub200", **web.variables)
    one_line(failed, "data-cub200", web.variables["CUB_URL"], "(18)", "try again")
    part = tmp_path / "data/CUB_200_2011.part"
    assert part.read_bytes() == web.files["cub"][:len(web.files["cub"]) // 2]
    web.cut = False
    assert run_all(tmp_path, "data", "cub200", **web.variables).returncode == 0
    assert arrived(tmp_path) == [CUB, *SHARED]


def test_checksum(tmp_path, web):
    web.files["cub"] = tar({"CUB_200_2011/images/001.A/a.jpg": b"something else"})
    failed = run_all(tmp_path, "data", "cub200", **web.variables)
    one_line(failed, web.variables["CUB_URL"], web.variables["CUB_MD5"], "deleted")
    assert arrived(tmp_path) == SHARED
    shutil.rmtree(tmp_path / "hub")
    sha = web.variables | {"CUB_MD5": "", "WEIGHTS_SHA256": "123"}
    one_line(run_all(tmp_path, "data", "cub200", **sha), web.variables["WEIGHTS_URL"], "sha256")


def test_sigterm_while_fetching(tmp_path, web):
    """It does not wait for a slow server; what came so far is kept."""
    web.slow = True
    process = subprocess.Popen(["bash", "run_all.sh", "data", "cub200"], cwd=ROOT, text=True,
                               env=environment(tmp_path, **web.variables), stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    part = tmp_path / "data/CUB_200_2011.part"
    while not (part.exists() and part.stat().st_size) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=10)
    assert (process.returncode, error) == (143, "") and web.files["cub"].startswith(part.read_bytes())


def test_a_failed_download_stops_only_its_dataset(tmp_path, web):
    del web.files["sop"], web.files["photos"]
    failed = run_all(tmp_path, "data", "report", "sop", "toy", **web.variables)
    one_line(failed, "data-sop", "404")
    one_line(failed, "data-unsplash_backgrounds", "404")
    one_line(failed, "report: bgbias.py: error: --report", "no finished run")


def test_no_network(tmp_path, web):
    web.shutdown()
    web.server_close()
    failed = run_all(tmp_path, "data", "cub200", **web.variables)
    one_line(failed, web.variables["CUB_URL"], "(7)", "onnect", "try again")


def test_missing_on_the_server(tmp_path, web):
    del web.files["photos"]
    failed = run_all(tmp_path, "data", "cub200", **web.variables)
    one_line(failed, web.variables["PHOTOS_URL"], "404")
    assert arrived(tmp_path) == [CUB, SHARED[2]]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_no_space(tmp_path, web):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/CUB_200_2011.part").symlink_to("/dev/full")
    failed = run_all(tmp_path, "data", "cub200", **web.variables)
    one_line(failed, "data/CUB_200_2011.part: (23)", "writ", "mend that")


@pytest.mark.parametrize("name, content, message", [
    ("photos", tar({"../evil": b"x", "unsplash_backgrounds/val/a.jpg": b"a"}), "not unpacked"),
    ("photos", tar({"something/val/a.jpg": b"a"}), "has no folder unsplash_backgrounds"),
    ("photos", tar({"unsplash_backgrounds/val/a.jpg": os.urandom(9000)})[:4000], "not unpacked"),
    ("photos", b"<html>Please log in</html>", "not unpacked")])
def test_bad_archives(tmp_path, web, name, content, message):
    web.files[name] = content
    failed = run_all(tmp_path, "data", "cub200", **web.variables)
    one_line(failed, "data/unsplash_backgrounds.part", message, "delete it")
    assert not (tmp_path / "data/unsplash_backgrounds").exists()
    assert not (tmp_path / "evil").exists() and not (tmp_path / "data/evil").exists()


def test_zip_does_not_leave_its_folder(tmp_path, web):
    web.files["sop"] = zipped({"../evil": b"x", f"{tmp_path}/evil": b"x",
                               "Stanford_Online_Products/Ebay_train.txt": b"a"})
    variables = web.variables | {"SOP_MD5": ""}
    assert run_all(tmp_path, "data", "sop", **variables).returncode == 0
    assert arrived(tmp_path) == ["data/Stanford_Online_Products/Ebay_train.txt", *SHARED]
    assert not (tmp_path / "evil").exists()


def test_cars196_says_what_to_put_where(tmp_path, web):
    failed = run_all(tmp_path, "data", "cars196", **web.variables)
    one_line(failed, f"{tmp_path}/data/cars196", "car_ims/", "cars_annos.mat", "devkit/")
    (tmp_path / "data/cars196/car_ims").mkdir(parents=True)
    assert run_all(tmp_path, "data", "cars196", **web.variables).returncode == 0


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
    variables = dict(LOSSES="triplet", SEEDS="1 2", GPUS="none cpu", FLAGS=TINY)
    broken = shop / "runs/shop-triplet-base-s1"
    broken.mkdir(parents=True)
    (broken / "config.json").write_text('{"args": {"loss": "contrastive"}}')
    (broken / "last.pt").touch()
    words = ("cars196", shop / "shop")
    failed = run_all(shop, *words, **variables)
    assert failed.returncode == 1
    _, *lines = [line.strip() for line in failed.stderr.splitlines()]
    assert len(lines) == 2 and "nobody serves cars196" in lines[0]
    assert lines[1].startswith("shop-triplet-base-s1: bgbias.py: error: ")
    assert busy(failed.stdout) == {"none", "cpu"}
    done = {path.parent.name for path in (shop / "runs").glob("*/result.json")}
    assert done == {"shop-triplet-bgaugment-s1", "shop-triplet-base-s2",
                    "shop-triplet-bgaugment-s2"}
    assert {path.parent.name for path in (shop / "runs").glob("*/attention.npz")} == done
    assert (shop / "runs/report.md").read_text() in failed.stdout
    assert Image.open(shop / "runs/report.png").size == (800, 600)

    shutil.rmtree(broken)  # the remedy; the same command does the rest, and only that
    again = run_all(shop, "train", "report", shop / "shop", **variables | {"SEEDS": "1"})
    assert (again.returncode, again.stderr) == (0, "")
    assert again.stdout.count("bgbias.py on GPU") == 2
    log = (shop / "runs/shop-triplet-bgaugment-s1.log").read_text()
    assert "shop-triplet-bgaugment-s1 is done; " in log
    table = (shop / "runs/report.md").read_text().split("## ")[1]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| triplet")]
    assert [cells[1] for cells in rows] == ["2", "2"] and "not run" not in sum(rows, [])


def test_toy_interrupted_and_resumed(tmp_path, toy):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/toy").symlink_to(toy)
    variables = dict(LOSSES="triplet", FLAGS="--epochs 1 --iterations 2 --image-size 16",
                     EVERY="1")
    whole = environment(tmp_path, **variables)
    process = subprocess.Popen(["bash", "run_all.sh", "toy"], cwd=ROOT, env=whole, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    first, second = (tmp_path / f"runs/toy-triplet-{kind}-s42" for kind in ("base", "bgaugment"))
    while not (second / "config.json").exists() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, error = process.communicate(timeout=120)
    assert (process.returncode, error) == (143, "")
    assert (first / "result.json").exists() and not (second / "result.json").exists()
    assert "hours left, if a run takes" in output
    log = (tmp_path / "runs/toy-triplet-bgaugment-s42.log").read_text()
    assert "SIGTERM, all is saved" in log or "loss" not in log.split("}")[-1]  # or nothing to save

    stamp = (first / "result.json").stat().st_mtime_ns
    done = run_all(tmp_path, "toy", **variables)
    assert (done.returncode, done.stderr) == (0, "")
    assert (first / "result.json").stat().st_mtime_ns == stamp
    report = (tmp_path / "runs/report.md").read_text()
    rows = re.findall(r"^\| triplet.*", report, re.M)
    assert len(rows) == 4 * 2 and not any("not run" in row for row in rows)
