"""The tables, from result files that are written by hand: means, standard deviations, which runs share
a row or a table, and the paper's results."""

import json
import math
import os
import re
import shlex
import statistics
import subprocess
import sys

import numpy as np
import pytest

import bgbias
from conftest import ROOT, result, write_image

TESTED = "shop: 100 test classes, 5,924 photos, chance 1.0 %, data 0123abcd"


def draw(map_at_r):
    """The metrics of one draw of backgrounds: each has another value."""
    return {"map@r": map_at_r, "r_precision": map_at_r + 0.02, "recall@1": map_at_r + 0.05, "recall@2": map_at_r + 0.06}


def make_run(root, flags, clean=0.2, replaced=(0.1,) * 5, *, pasted=0.19, chance=0.01, tested=TESTED, scores=None):
    """The files of a finished run. `scores` are the attention scores of its images."""
    args = bgbias.parse_args(shlex.split(f"--runs {root} {flags}"))
    values = {"clean": [clean], "replaced": replaced, "query": [0.15, 0.15, 0.15, 0.15, 0.20],
              "object_only": [0.18], "background_only": [0.03], "chance": [0, 2 * chance],
              "pasted": [pasted], "same_class": [0.17], "other_class": [0.12]}
    test = {condition: [*map(draw, draws)] for condition, draws in values.items()}
    run = bgbias.run_folder(args)
    run.mkdir(parents=True)
    (run / "result.json").write_text(json.dumps({"args": vars(args), "tested": tested, "test": test}))
    if scores:
        np.savez(run / "attention.npz", score=scores)
    return run


def read_tables(text, number=0):
    """{heading: rows {column: cell}} of the first table below each heading of a Markdown text, or of another."""
    tables = {}
    for section in text.split("\n## ")[1:]:
        heading, *blocks = section.split("\n\n")
        table = [block for block in blocks if block.startswith("|")][number]
        columns, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
        tables[heading] = [dict(zip(columns, row, strict=True)) for row in rows]
    return tables


def rows_of(root, tested=TESTED, number=0):
    """The rows of one table of the report: {name: {column: cell}}."""
    rows = read_tables("\n" + bgbias.report(root), number)[tested]
    assert len({row[""] for row in rows}) == len(rows)
    return {row[""]: row for row in rows}


# ---- The paper's results -------------------------------------------------------------------------

# MAP@R, MAP@R with replaced backgrounds, and attention score; of cars196, cub200 and sop; + with BGAugment.
PUBLISHED = """
arcface             | 16.25 | 13.63±0.08 | 0.49±0.10 | 20.66 | 12.87±0.16 | 0.25±0.08 | 40.50 | 6.98±0.05 | 0.13±0.14
arcface+            | 16.19 | 16.23±0.04 | 0.56±0.10 | 20.91 | 17.92±0.08 | 0.33±0.09 | 22.25 | 16.53±0.05 | 0.26±0.17
contrastive         | 15.22 | 13.31±0.15 | 0.50±0.09 | 20.27 | 12.47±0.08 | 0.25±0.08 | 37.98 | 4.17±0.05 | 0.07±0.16
contrastive+        | 16.43 | 16.31±0.03 | 0.53±0.10 | 19.39 | 15.46±0.08 | 0.32±0.10 | 31.52 | 24.09±0.04 | 0.31±0.20
multi_similarity    | 18.80 | 16.25±0.06 | 0.52±0.09 | 19.19 | 12.21±0.16 | 0.26±0.08 | 39.65 | 6.51±0.06 | 0.11±0.17
multi_similarity+   | 15.61 | 15.48±0.05 | 0.50±0.09 | 18.93 | 15.65±0.16 | 0.30±0.09 | 32.67 | 24.00±0.07 | 0.28±0.19
normalized_softmax  | 18.06 | 15.36±0.03 | 0.51±0.09 | 20.18 | 12.41±0.10 | 0.24±0.08 | 41.52 | 7.67±0.04 | 0.12±0.14
normalized_softmax+ | 18.15 | 18.12±0.05 | 0.56±0.09 | 20.60 | 17.39±0.10 | 0.30±0.08 | 32.16 | 24.60±0.03 | 0.28±0.20
triplet             | 15.33 | 13.40±0.04 | 0.50±0.09 | 18.29 | 10.94±0.05 | 0.24±0.08 | 36.71 | 6.05±0.06 | 0.08±0.17
triplet+            | 15.28 | 15.19±0.05 | 0.54±0.09 | 18.56 | 15.33±0.16 | 0.33±0.09 | 29.63 | 21.39±0.07 | 0.26±0.22
"""


def test_papers_results():
    """Every row beside ours, against the paper's table, which is typed in here again."""
    typed = PUBLISHED.strip().splitlines()
    assert len(typed) == 10 and len(bgbias.PAPER) == 15
    for line in typed:
        name, *cells = line.replace("±", " ± ").split(" | ")
        flags = ["--loss", name.strip(" +"), *["--bgaugment"] * ("+" in name)]
        for i, dataset in enumerate(("cars196", "cub200", "sop")):
            row, = bgbias.paper_row(vars(bgbias.parse_args(["--dataset", dataset, *flags])))
            assert [row["clean"], row["replaced"], row["attention"]] == cells[3 * i:3 * i + 3]


def test_papers_row_is_below_ours(tmp_path):
    make_run(tmp_path, "--dataset cub200 --loss triplet")
    make_run(tmp_path, "--dataset cub200 --loss triplet --bgaugment")
    make_run(tmp_path, "--dataset cub200 --epochs 0")  # the paper trains all of its networks
    (tmp_path / "cub200/backgrounds").mkdir(parents=True)  # a folder of the user's that has the name of a dataset
    make_run(tmp_path, f"--dataset {tmp_path}/cub200 --loss arcface")
    make_run(tmp_path, "--loss arcface --seed 1", tested="toy")
    rows = read_tables("\n" + bgbias.report(tmp_path))
    assert [row[""] for row in rows["toy"]] == ["arcface"]
    names = [row[""] for row in rows[TESTED]]
    assert sorted(names) == ["arcface", "not trained", "paper", "paper", "triplet", "triplet + BGAugment"]
    # 100 (18.29 - 10.94) / 18.29 = 40.19 and 100 (18.56 - 15.33) / 18.56 = 17.40
    for name, lost in (("triplet", "40.19"), ("triplet + BGAugment", "17.40")):
        below = rows[TESTED][names.index(name) + 1]
        assert (below[""], below["lost %"]) == ("paper", lost)


# ---- Means and standard deviations ---------------------------------------------------------------


def test_one_seed(tmp_path):
    """The standard deviation is that over the draws; of attention it is that over the images."""
    make_run(tmp_path, "--loss triplet", 0.20, (0.10, 0.11, 0.12, 0.13, 0.14),
             scores=[0.1, math.nan, 0.2, 0.6])  # nan: its score is undefined
    assert rows_of(tmp_path)["triplet"] == {
        "": "triplet", "seeds": "1", "clean": "20.00", "replaced": "12.00 ± 1.58", "lost %": "40.00",
        "query": "16.00 ± 2.24", "object only": "18.00", "background only": "3.00",
        "R@1 clean": "25.00", "R@1 replaced": "17.00 ± 1.58",
        "attention": "0.30 ± 0.26"}


def test_three_seeds(tmp_path):
    """The standard deviation is that over the seeds, whatever the draws of each are."""
    make_run(tmp_path, "--seed 1", 0.17, (0.08, 0.10, 0.09, 0.09, 0.09), scores=[0.2, 0.4])
    make_run(tmp_path, "--seed 2", 0.18, (0.01, 0.21, 0.11, 0.11, 0.11), scores=[0.4, 0.4, math.nan])
    make_run(tmp_path, "--seed 3", 0.19, (0.13,) * 5, scores=[0.6, 0.4])
    row = rows_of(tmp_path)["contrastive"]
    lost = 100 * 8 / 17, 100 * 7 / 18, 100 * 6 / 19
    assert row == {
        "": "contrastive", "seeds": "3", "clean": "18.00 ± 1.00", "replaced": "11.00 ± 2.00",
        "lost %": f"{statistics.mean(lost):.2f} ± {statistics.stdev(lost):.2f}",
        "query": "16.00 ± 0.00", "object only": "18.00 ± 0.00", "background only": "3.00 ± 0.00",
        "R@1 clean": "23.00 ± 1.00", "R@1 replaced": "16.00 ± 2.00", "attention": "0.40 ± 0.10"}
    make_run(tmp_path, "--seed 4")  # without attention scores, so a mean would be that of three seeds
    row = rows_of(tmp_path)["contrastive"]
    assert row["seeds"] == "4" and "attention" not in row


def test_steps_from_clean_to_replaced(tmp_path):
    """In the second table. Only the backgrounds of `replaced` are drawn several times."""
    make_run(tmp_path, "--seed 1", 0.20, (0.10, 0.11, 0.12, 0.13, 0.14))
    assert rows_of(tmp_path, number=1)["contrastive"] == {
        "": "contrastive", "seeds": "1", "clean": "20.00", "pasted": "19.00", "same class": "17.00",
        "other class": "12.00", "replaced": "12.00 ± 1.58", "R@1 pasted": "24.00", "R@1 same class": "22.00",
        "R@1 other class": "17.00", "R@1 replaced": "17.00 ± 1.58"}
    make_run(tmp_path, "--seed 2", pasted=0.15)
    make_run(tmp_path, "--bgaugment")
    rows = rows_of(tmp_path, number=1)
    assert rows["contrastive"]["pasted"] == "17.00 ± 2.83" and rows["contrastive + BGAugment"]["pasted"] == "19.00"


@pytest.mark.parametrize("flags, clean, pasted, path, costs, hint", [
    ("", 0.2, 0.19, "20.0 19.0 17.0 12.0 10.0", "20.0 1.0 2.0 5.0 2.0", False),
    ("--backgrounds own", 0.2, 0.19, "20.0 19.0 17.0 12.0", "20.0 1.0 2.0 5.0", False),  # these are no foreign ones
    ("", 0.2, 0.181, "20.0 18.1 17.0 12.0 10.0", "20.0 1.9 1.1 5.0 2.0", False),
    ("", 0.2, 0.179, "20.0 17.9 17.0 12.0 10.0", "20.0 2.1 0.9 5.0 2.0", True),  # more than a tenth is lost
    ("", 0.1699, 0.1702, "17.0 17.0 17.0 12.0 10.0", "17.0 0.0 0.0 5.0 2.0", False),  # -0.03 is 0.0
    ("", 0.15, 0.16, "15.0 16.0 17.0 12.0 10.0", "15.0 -1.0 -1.0 5.0 2.0", False)])
def test_what_the_loss_of_a_run_is_made_of(tmp_path, flags, clean, pasted, path, costs, hint):
    """Two lines below its table: the scores, and the differences between them."""
    run = make_run(tmp_path, flags, clean, (0.08, 0.12), pasted=pasted)
    text = bgbias.report(tmp_path, of=run).split("\n\n")[-1]
    assert [re.findall(r"-?\d+\.\d", line) for line in text.splitlines()] == [path.split(), costs.split()]
    assert ("masks" in text) == hint


AT_CHANCE = "hardly better than chance"


@pytest.mark.parametrize("clean, replaced, lost", [
    (0.2, 0.3, "-50.00"), (0.2, 0.0, "100.00"), (0.021, 0.014, "33.33"),
    (0.019, 0.014, AT_CHANCE), (0.0, 0.3, AT_CHANCE)])  # below twice chance
def test_lost(tmp_path, clean, replaced, lost):
    make_run(tmp_path, "--seed 1", clean, (replaced,) * 5)
    assert rows_of(tmp_path)["contrastive"]["lost %"] == lost
    make_run(tmp_path, "--seed 2", 0.1, (0.05,) * 5, chance=0.06)  # a mean with a seed at chance says nothing
    assert rows_of(tmp_path)["contrastive"]["lost %"] == AT_CHANCE


# ---- Which runs share a row ----------------------------------------------------------------------


def test_only_runs_that_differ_in_the_seed_are_averaged(tmp_path):
    make_run(tmp_path, "--seed 1", 0.10)
    make_run(tmp_path, "--seed 2 --workers 2 --device cuda --data elsewhere", 0.30)
    others = ["--epochs 1", "--lr 0.001", "--bgaugment", "--bgaugment --lr 0.001", "--select replaced",
              "--loss triplet", "--loss triplet --image-size 64 --lr 0.001", "--epochs 0",
              "--backbone resnet18", "--epochs 0 --backbone resnet18", "--bgaugment --backgrounds own --lr 0.001"]
    for k, flags in enumerate(others):
        make_run(tmp_path, flags, k / 100)
    rows = rows_of(tmp_path)
    assert (rows["contrastive"]["seeds"], rows["contrastive"]["clean"]) == ("2", "20.00 ± 14.14")
    assert rows["contrastive, epochs 1"]["clean"] == "0.00"
    assert rows["contrastive + BGAugment, lr 0.001"]["clean"] == "3.00"
    assert rows["contrastive + BGAugment, own backgrounds, lr 0.001"]["clean"] == "10.00"
    assert len(rows) == 1 + len(others)
    assert sum(row["seeds"] == "1" for row in rows.values()) == len(others)


def test_the_loss_of_an_untrained_run_does_not_count(tmp_path):
    make_run(tmp_path, "--epochs 0 --loss triplet --seed 1")
    make_run(tmp_path, "--epochs 0 --loss arcface --seed 2")
    assert [row["seeds"] for row in rows_of(tmp_path).values()] == ["2"]


def test_edited_hyper_parameters_are_another_row(tmp_path, monkeypatch):
    make_run(tmp_path, "--loss triplet --seed 1", 0.1)
    monkeypatch.setitem(bgbias.HPARAMS["toy"], "triplet", {"margin": 0.5})
    make_run(tmp_path, "--loss triplet --seed 2", 0.2)
    rows = rows_of(tmp_path)
    assert {name: row["clean"] for name, row in rows.items()} == {"triplet": "20.00", "triplet, margin 0.2": "10.00"}


def test_a_copy_of_a_run_is_not_another_seed(tmp_path):
    run = make_run(tmp_path, "--seed 1", 0.1)
    make_run(tmp_path, "--seed 2", 0.3)
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy/result.json").write_bytes((run / "result.json").read_bytes())
    row = rows_of(tmp_path)["contrastive"]
    assert (row["seeds"], row["clean"]) == ("2", "20.00 ± 14.14")


# ---- Which runs share a table --------------------------------------------------------------------


@pytest.mark.parametrize("changed", [
    "images/c3/p1.jpg", "masks/c3/p1.png", "images/c3/new.jpg masks/c3/new.png",
    "backgrounds/test/b2.jpg", "backgrounds/test/new.jpg"])
def test_other_photos_or_backgrounds_are_another_table(shop, capsys, changed):
    """A finished run prints the table of its own data only. --report has them all."""
    make_run(shop / "runs", "--seed 1", tested="toy")
    flags = shlex.split(f"--dataset {shop}/shop --runs {shop}/runs --backbone smallconv --weights none "
                        "--image-size 16 --epochs 0 --device cpu")
    rng, printed = np.random.default_rng(1), []
    for seed, seeds in ((1, "1"), (2, "2"), (3, "1")):
        if seed == 3:
            for name in changed.split():
                write_image(shop / "shop" / name, rng, mode="L" if "masks" in name else "RGB")
        bgbias.main([*flags, "--seed", str(seed)])
        (heading, (row,)), = read_tables(capsys.readouterr().out).items()
        assert row["seeds"] == seeds
        printed.append(heading)
    run, = shop.glob("runs/shop-untrained-base-s3-*")
    values = [100 * metrics["map@r"] for metrics in result(run)["test"]["replaced"]]
    assert row["replaced"] == f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
    assert printed[0] == printed[1] != printed[2]
    bgbias.main(["--report", str(shop / "runs")])
    tables = read_tables(capsys.readouterr().out)
    assert {heading: [row["seeds"] for row in rows] for heading, rows in tables.items()} == {
        "toy": ["1"], printed[0]: ["2"], printed[2]: ["1"]}


# ---- The command ---------------------------------------------------------------------------------


def test_columns_are_aligned():
    rows = [{"": "first", "a": "1 ± 2", "long heading": "3"}, {"": "x", "a": "10", "b": "4.00"}]
    assert bgbias.as_table(rows) == ("|       | a     | long heading | b    |\n"
                                     "| ----- | ----- | ------------ | ---- |\n"
                                     "| first | 1 ± 2 | 3            |      |\n"
                                     "| x     | 10    |              | 4.00 |")


def test_report_is_printed_and_written(tmp_path):
    """Also where the terminal has no ±. report.md is UTF-8, whatever the locale."""
    make_run(tmp_path, "--dataset cub200 --seed 1", 0.1)
    make_run(tmp_path, "--dataset cub200 --seed 2", 0.3)
    ascii_only = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    shown = subprocess.run([sys.executable, ROOT / "bgbias.py", "--report", tmp_path], check=True,
                           capture_output=True, env={**os.environ, **ascii_only})
    written = (tmp_path / "report.md").read_text("utf-8")
    assert shown.stderr == b"" and re.search(r"\| contrastive +\| 2 +\| 20.00 ± 14.14 +\|", written)
    assert shown.stdout.decode("ascii").strip() == written.strip().replace("±", r"\xb1")
    assert list(read_tables(written)) == [TESTED]


def test_nothing_to_report(tmp_path, failure):
    (make_run(tmp_path, "") / "result.json").unlink()  # an unfinished run
    assert f"--report {tmp_path}" in failure(["--report", tmp_path])
    assert not (tmp_path / "report.md").exists()
