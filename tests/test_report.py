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
from scipy.stats import bootstrap

import bgbias
from conftest import ROOT, result, write_image

TESTED = "shop: 100 test classes, 5,924 photos, chance 1.0 %, data 0123abcd"
PHOTOS = {"c1/a": ("c1", 30, 20, 10), "c1/b": ("c1", 10, 5, 5)}  # class, clean, any class and replaced in %


@pytest.fixture(autouse=True)
def without_data(tmp_path, monkeypatch):
    """No test reads the data of a run: relative paths lead to an empty folder."""
    monkeypatch.chdir(tmp_path)


def draw(map_at_r):
    """The metrics of one draw of backgrounds: each has another value."""
    return {"map@r": map_at_r, "r_precision": map_at_r + 0.02, "recall@1": map_at_r + 0.05, "recall@2": map_at_r + 0.06}


def make_run(root, flags, clean=0.2, replaced=(0.1,) * 5, *, any_class=(0.12,) * 5, pasted=0.19, chance=0.01,
             fooled=(0.4, 0.5, 0.6), confused=(0.3,) * 5, tested=TESTED, scores=None, photos=PHOTOS):
    """The files of a finished run, written by hand. `scores` are the attention scores of its images; beyond another
    mask they are half as large. Without a pool it has no `replaced`."""
    args = bgbias.parse_args(shlex.split(f"--runs {root} {flags}"))
    values = {"clean": [clean], "replaced": replaced, "any_class": any_class, "same_class": [0.17, 0.16, 0.18],
              "query": [0.15, 0.15, 0.15, 0.15, 0.20], "pasted": [pasted], "object_only": [0.18],
              "background_only": [0.03], "photo_and_object": [0.22], "chance": [0, 2 * chance]}
    if not args.backgrounds:
        del values["replaced"]
    test = {condition: [*map(draw, draws)] for condition, draws in values.items()}
    run = bgbias.run_folder(args)
    run.mkdir(parents=True)
    (run / "result.json").write_text(json.dumps({
        "format": 2, "args": vars(args), "tested": tested, "test": test, "fooled": fooled, "confused": confused,
        "data": tested[-8:]}))
    lines = ["photo,class,clean,any_class,replaced,drop,fooled,confused"]
    for photo, (label, before, on_any, on_pool) in photos.items():
        on_pool, drop = (on_pool, before - on_pool) if args.backgrounds else ("", before - on_any)
        lines.append(f"{photo},{label},{before},{on_any},{on_pool},{drop},,")
    (run / "photos.csv").write_text("\n".join(lines) + "\n")
    if scores:
        np.savez(run / "attention.npz", score=scores, beyond=np.array(scores) / 2, data=tested[-8:])
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
    """Of base and of BGAugment with the pool. The paper trains all of its networks, and none with own backgrounds."""
    for flags in ("", "--bgaugment", "--bgaugment own", "--measure"):
        make_run(tmp_path, f"--dataset cub200 --loss triplet {flags}")
    (tmp_path / "cub200/backgrounds").mkdir(parents=True)  # a folder of the user's that has the name of a dataset
    make_run(tmp_path, f"--dataset {tmp_path}/cub200 --loss arcface")
    make_run(tmp_path, "--loss arcface --seed 1", tested="toy")
    rows = read_tables("\n" + bgbias.report(tmp_path))
    assert [row[""] for row in rows["toy"]] == ["arcface"]
    names = [row[""] for row in rows[TESTED]]
    assert sorted(names) == ["arcface", "as it is", "paper", "paper", "triplet", "triplet + BGAugment",
                             "triplet + own backgrounds"]
    # 100 (18.29 - 10.94) / 18.29 = 40.19 and 100 (18.56 - 15.33) / 18.56 = 17.40
    for name, drop in (("triplet", "40.19"), ("triplet + BGAugment", "17.40")):
        below = rows[TESTED][names.index(name) + 1]
        assert (below[""], below["drop % (replaced)"]) == ("paper", drop)


# ---- Means and standard deviations ---------------------------------------------------------------


def test_one_seed(tmp_path):
    """The standard deviation is that over the draws; of attention it is that over the images."""
    make_run(tmp_path, "--loss triplet", 0.20, (0.10, 0.11, 0.12, 0.13, 0.14),
             scores=[0.1, math.nan, 0.2, 0.6])  # nan: its score is undefined
    row = rows_of(tmp_path)["triplet"]
    assert row == {
        "": "triplet", "seeds": "1", "clean": "20.00", "any class": "12.00 ± 0.00", "replaced": "12.00 ± 1.58",
        "drop % (replaced)": "40.00 ± 7.91", "query": "16.00 ± 2.24", "object only": "18.00",
        "background only": "3.00", "photo + object": "22.00", "fooled % (confused)": "50.00 ± 10.00 (30.00 ± 0.00)",
        "R@1 clean": "25.00", "R@1 replaced": "17.00 ± 1.58", "attention": "0.30 ± 0.26 (3 photos)",
        "beyond another mask": "0.15 ± 0.13 (3 photos)"}
    assert [*row][2:6] == ["clean", "any class", "replaced", "drop % (replaced)"]


def test_three_seeds(tmp_path):
    """The standard deviation is that over the seeds, whatever the draws of each are."""
    make_run(tmp_path, "--seed 1", 0.17, (0.08, 0.10, 0.09, 0.09, 0.09), scores=[0.2, 0.4, math.nan])
    make_run(tmp_path, "--seed 2", 0.18, (0.01, 0.21, 0.11, 0.11, 0.11), scores=[0.4, 0.4, math.nan], fooled=[0.2])
    make_run(tmp_path, "--seed 3", 0.19, (0.13,) * 5, scores=[math.nan, 0.6, 0.4], any_class=[0.15, 0.17])
    row = rows_of(tmp_path)["contrastive"]
    drop = 100 * 8 / 17, 100 * 7 / 18, 100 * 6 / 19
    assert row == {
        "": "contrastive", "seeds": "3", "clean": "18.00 ± 1.00", "any class": "13.33 ± 2.31",
        "replaced": "11.00 ± 2.00", "drop % (replaced)": f"{statistics.mean(drop):.2f} ± {statistics.stdev(drop):.2f}",
        "query": "16.00 ± 0.00", "object only": "18.00 ± 0.00", "background only": "3.00 ± 0.00",
        "photo + object": "22.00 ± 0.00", "fooled % (confused)": "40.00 ± 17.32 (30.00 ± 0.00)",
        "R@1 clean": "23.00 ± 1.00", "R@1 replaced": "16.00 ± 2.00", "attention": "0.40 ± 0.10 (2 photos)",
        "beyond another mask": "0.20 ± 0.05 (2 photos)"}
    make_run(tmp_path, "--seed 4")  # without attention scores, so a mean would be that of three seeds
    row = rows_of(tmp_path)["contrastive"]
    assert row["seeds"] == "4" and not {"attention", "beyond another mask"} & row.keys()


def test_attention_scores_of_different_numbers_of_photos_have_no_mean(tmp_path):
    """Such as those of eval_attention.py --limit 2, and of all photos."""
    make_run(tmp_path, "--seed 1", scores=[0.2, 0.4])
    make_run(tmp_path, "--seed 2", scores=[0.2, 0.4, 0.6])
    make_run(tmp_path, "--loss triplet", scores=[0.2, 0.4, 0.6])
    rows = rows_of(tmp_path)
    assert rows["contrastive"]["attention"] == rows["contrastive"]["beyond another mask"] == ""
    assert rows["triplet"]["attention"] == "0.40 ± 0.20 (3 photos)"


def test_attention_scores_that_are_undefined_for_some_photos_have_a_mean(tmp_path):
    """Of the others. Each seed scored three photos."""
    make_run(tmp_path, "--seed 1", scores=[0.1, math.nan, 0.5])
    make_run(tmp_path, "--seed 2", scores=[0.4, 0.5, 0.6])
    row = rows_of(tmp_path)["contrastive"]
    assert (row["attention"], row["beyond another mask"]) == ("0.40 ± 0.14 (2 to 3 photos)", "0.20 ± 0.07 (2 to 3 photos)")


def test_attention_scores_of_other_data_are_not_in_the_table(tmp_path):
    """They were computed after the masks had changed. The heading is of the old ones."""
    run = make_run(tmp_path, "", scores=[0.1, 0.5])
    assert rows_of(tmp_path)["contrastive"]["attention"]
    with np.load(run / "attention.npz") as saved:
        np.savez(run / "attention.npz", **{**saved, "data": "89abcdef"})
    row = rows_of(tmp_path)["contrastive"]
    assert not {"attention", "beyond another mask"} & row.keys() and row["clean"]


def test_a_run_of_a_loss_that_is_gone(tmp_path):
    """As on another branch: its hyper-parameters are all shown, because nobody knows the defaults."""
    run = make_run(tmp_path, "--loss triplet")
    content = json.loads((run / "result.json").read_text())
    content["args"] |= {"loss": "mine", "hparams": {"margin": 0.5}}
    (run / "result.json").write_text(json.dumps(content))
    make_run(tmp_path, "")
    assert rows_of(tmp_path).keys() == {"mine, margin 0.5", "contrastive"}


def test_a_report_that_cannot_be_saved_is_printed(tmp_path, capsys):
    make_run(tmp_path, "")
    (tmp_path / "report.md").mkdir()
    with pytest.raises(OSError):
        bgbias.main(["--report", str(tmp_path)])
    assert "| contrastive |" in capsys.readouterr().out


def test_without_a_pool_the_drop_is_measured_on_backgrounds_of_other_photos(tmp_path):
    """They are the reference condition, which the columns name."""
    run = make_run(tmp_path, "--dataset photos --loss triplet", any_class=(0.14, 0.16, 0.18), fooled=[0.25],
                   confused=[0.125])
    row = rows_of(tmp_path)["triplet"]
    assert row == {
        "": "triplet", "seeds": "1", "clean": "20.00", "any class": "16.00 ± 2.00",
        "drop % (any class)": "20.00 ± 10.00", "query": "16.00 ± 2.24", "object only": "18.00", "background only": "3.00", "photo + object": "22.00",
        "fooled % (confused)": "25.00 (12.50)", "R@1 clean": "25.00", "R@1 any class": "21.00 ± 2.00"}
    chain = rows_of(tmp_path, number=1)["triplet"]
    assert [*chain] == ["", "seeds", "clean", "pasted", "same class", "any class", "object only"]
    assert "replaced" not in bgbias.report(tmp_path, only=run)


def test_a_run_without_impostors_has_no_fooled_share(tmp_path):
    """In a mean over seeds, none either."""
    make_run(tmp_path, "--loss triplet", fooled=[], confused=[])
    assert "fooled % (confused)" not in rows_of(tmp_path)["triplet"]
    make_run(tmp_path, "--loss triplet --seed 1")
    assert "fooled % (confused)" not in rows_of(tmp_path)["triplet"]


# ---- The way from clean to foreign backgrounds ---------------------------------------------------


def test_conditions_from_clean_to_replaced(tmp_path):
    """In the second table, with object only beside them."""
    make_run(tmp_path, "--seed 1", 0.20, (0.10, 0.11, 0.12, 0.13, 0.14))
    assert rows_of(tmp_path, number=1)["contrastive"] == {
        "": "contrastive", "seeds": "1", "clean": "20.00", "pasted": "19.00", "same class": "17.00 ± 1.00",
        "any class": "12.00 ± 0.00", "replaced": "12.00 ± 1.58", "object only": "18.00"}
    make_run(tmp_path, "--seed 2", pasted=0.15)
    make_run(tmp_path, "--bgaugment")
    rows = rows_of(tmp_path, number=1)
    assert rows["contrastive"]["pasted"] == "17.00 ± 2.83" and rows["contrastive + BGAugment"]["pasted"] == "19.00"


def test_a_step_has_as_many_draws_as_the_longer_of_its_conditions(tmp_path):
    """Its draw k is draw k mod n of each, n being the condition's number of draws."""
    run = make_run(tmp_path, "", 0.20, (0.10, 0.11, 0.12, 0.13, 0.14), any_class=(0.12, 0.10), pasted=0.21)
    columns = bgbias.read_result(run)["columns"]
    steps = {"cutting and pasting": [1], "another background of the class": [-4, -5, -3],
             "a background that no longer goes with the class": [-5, -6, -6],
             "a background foreign to the data": [-2, 1, 0, 3, 2]}
    assert {what: columns[what] for what in steps} == {what: pytest.approx(step) for what, step in steps.items()}


@pytest.mark.parametrize("flags, clean, pasted, path, steps, hint", [
    ("", 0.2, 0.19, "20.0 19.0 17.0 12.0 10.0", "-1.0 -2.0 -5.0 -2.0", False),
    ("--dataset photos", 0.2, 0.19, "20.0 19.0 17.0 12.0", "-1.0 -2.0 -5.0", False),  # it has no foreign backgrounds
    ("", 0.2, 0.181, "20.0 18.1 17.0 12.0 10.0", "-1.9 -1.1 -5.0 -2.0", False),
    ("", 0.2, 0.179, "20.0 17.9 17.0 12.0 10.0", "-2.1 -0.9 -5.0 -2.0", True),  # more than a tenth is lost
    ("", 0.1702, 0.1699, "17.0 17.0 17.0 12.0 10.0", "+0.0 +0.0 -5.0 -2.0", False),  # -0.03 is +0.0
    ("", 0.15, 0.16, "15.0 16.0 17.0 12.0 10.0", "+1.0 +1.0 -5.0 -2.0", False)])
def test_what_the_drop_of_a_run_is_made_of(tmp_path, flags, clean, pasted, path, steps, hint):
    """Below its table: the conditions, object only beside them, and the signed steps between them."""
    run = make_run(tmp_path, flags, clean, (0.08, 0.12), pasted=pasted)
    text = bgbias.report(tmp_path, only=run).split("\n\n")[-1]
    conditions, changes, *others = text.splitlines()
    assert re.findall(r"-?\d+\.\d", conditions) == [*path.split(), "18.0"] and "object only 18.0" in conditions
    assert re.findall(r"[-+]\d+\.\d", changes) == steps.split() and "order" in changes
    # The five draws of any class meet 17, 16, 18, 17, 16 % of same class.
    assert "no longer goes with the class -5.0 ± 0.8" in changes and "cutting and pasting " + steps[:4] + "," in changes
    assert ("check the masks" in text) == hint and "loss" not in text


def test_the_five_classes_that_drop_most(tmp_path):
    """Of those with at least five photos: both means, and the largest fall in points first."""
    photos, falls = {}, {"small": 90, "a": 2, "b": 30, "c": 10, "d": 40, "e": 5, "f": 3, "gains": -10}
    for name, fall in falls.items():
        for i in range(4 if name == "small" else 5 + (name == "b")):
            photos[f"{name}/{i}"] = (name, 80 + i, 70, 80 + i - fall)
    line, = worst_classes(make_run(tmp_path, "", photos=photos))
    assert "clean" in line and "replaced" in line
    assert re.findall(r"(\w+) \(?(\d+\.\d) → (\d+\.\d)", line) == [
        ("d", "82.0", "42.0"), ("b", "82.5", "52.5"), ("c", "82.0", "72.0"), ("e", "82.0", "77.0"),
        ("f", "82.0", "79.0")]
    # Without a pool, the reference is any class, which is 70 in all photos. So b with its sixth photo comes first.
    line, = worst_classes(make_run(tmp_path, "--dataset photos", photos=photos, tested="no pool"))
    assert "any class" in line and "replaced" not in line
    assert re.findall(r"(\w+) \(?(\d+\.\d) → (\d+\.\d)", line)[0] == ("b", "82.5", "70.0")
    gains = {photo: values for photo, values in photos.items() if values[0] in ("small", "gains")}
    assert worst_classes(make_run(tmp_path, "--loss triplet", photos=gains)) == []  # no class of five photos drops


def worst_classes(run):
    """The line below its table."""
    return [line for line in bgbias.report(run.parent, only=run).splitlines() if "drop most" in line]


# ---- Hardly better than chance -------------------------------------------------------------------

AT_CHANCE = "too close to chance"


@pytest.mark.parametrize("clean, chance, replaced, drop", [
    (0.2, 0.01, 0.3, "-50.00"), (0.2, 0.01, 0.0, "100.00"), (0.021, 0.01, 0.014, "33.33"),
    (0.019, 0.01, 0.014, AT_CHANCE), (0.0, 0.01, 0.3, AT_CHANCE),  # below twice chance
    (0.71, 0.6, 0.355, "50.00"), (0.69, 0.6, 0.345, AT_CHANCE)])  # two classes: a quarter of the way to 100 %
def test_drop(tmp_path, clean, chance, replaced, drop):
    """A run that is too close to chance has no drop, no steps and no fooled share, and says why."""
    run = make_run(tmp_path, "--seed 1", clean, (replaced,) * 5, chance=chance)
    row, text = rows_of(tmp_path)["contrastive"], bgbias.report(tmp_path, only=run)
    assert row["drop % (replaced)"].split(" ± ")[0] == drop
    assert ("fooled % (confused)" in row) == ("cutting and pasting" in text) == (drop != AT_CHANCE)
    assert ("step by step" in bgbias.report(tmp_path)) == (drop != AT_CHANCE)
    reasons = [line for line in text.splitlines() if AT_CHANCE in line and not line.startswith("|")]
    assert len(reasons) == (drop == AT_CHANCE)
    assert all(f"{100 * clean:.2f} %" in line and f"{100 * chance:.2f} %" in line for line in reasons)
    make_run(tmp_path, "--seed 2", 0.1, (0.05,) * 5, chance=0.06)  # a mean with a seed at chance says nothing
    row = rows_of(tmp_path)["contrastive"]
    assert row["drop % (replaced)"] == AT_CHANCE and "fooled % (confused)" not in row


# ---- Which runs share a row ----------------------------------------------------------------------


def test_only_runs_that_differ_in_the_seed_are_averaged(tmp_path):
    make_run(tmp_path, "--seed 1", 0.10)
    make_run(tmp_path, "--seed 2 --workers 2 --device cuda --data elsewhere", 0.30)
    others = ["--epochs 1", "--lr 0.001", "--bgaugment", "--bgaugment --lr 0.001", "--select replaced",
              "--loss triplet", "--loss triplet --image-size 64 --lr 0.001", "--measure",
              "--backbone resnet18", "--measure --backbone resnet18", "--bgaugment own --lr 0.001"]
    for k, flags in enumerate(others):
        make_run(tmp_path, flags, k / 100)
    rows = rows_of(tmp_path)
    assert (rows["contrastive"]["seeds"], rows["contrastive"]["clean"]) == ("2", "20.00 ± 14.14")
    assert rows["contrastive, epochs 1"]["clean"] == "0.00"
    assert rows["contrastive + BGAugment, lr 0.001"]["clean"] == "3.00"
    assert rows["as it is, backbone resnet18"]["clean"] == "9.00"
    assert rows["contrastive + own backgrounds, lr 0.001"]["clean"] == "10.00"
    assert len(rows) == 1 + len(others)
    assert sum(row["seeds"] == "1" for row in rows.values()) == len(others)


def test_what_belongs_to_a_training_does_not_count_for_a_measured_network(tmp_path):
    make_run(tmp_path, "--measure --loss triplet --lr 3 --seed 1")
    make_run(tmp_path, "--measure --loss arcface --bgaugment own --patience 3 --seed 2")
    assert {name: row["seeds"] for name, row in rows_of(tmp_path).items()} == {"as it is": "2"}


def test_settings_that_all_rows_share_stand_once_above_them(tmp_path):
    """A row is named by what differs. A measured network shares no settings of a training."""
    for flags in ("--lr 0.1 --image-size 64", "--lr 0.2 --image-size 64", "--lr 0.2 --image-size 64 --bgaugment"):
        make_run(tmp_path, flags)
    text = bgbias.report(tmp_path)
    assert sorted(rows_of(tmp_path)) == ["contrastive + BGAugment, lr 0.2", "contrastive, lr 0.1", "contrastive, lr 0.2"]
    assert text.count("image size 64") == 1 and "image size 64" in text.split("|")[0]
    make_run(tmp_path, "--measure --image-size 64")
    assert "as it is" in rows_of(tmp_path) and bgbias.report(tmp_path).count("image size 64") == 1
    make_run(tmp_path, "--lr 0.1")
    rows = rows_of(tmp_path)
    assert len(rows) == 5 and {"contrastive, lr 0.1", "contrastive, lr 0.1, image size 64"} <= rows.keys()


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


# ---- What a variant gains -----------------------------------------------------------------------


def planted(classes, seed, gain=0):
    """{photo: (class, clean, any class, replaced)}: 3 to 6 photos in each class, whose gains differ between classes."""
    rng, photos = np.random.default_rng(0), {}
    drawn = np.random.default_rng([1, seed])
    for label in range(classes):
        of_class = rng.normal(gain, 4 if gain else 0, 3)
        for i in range(rng.integers(3, 7)):
            values = rng.uniform(20, 80, 3) + of_class + drawn.normal(0, 1, 3)
            photos[f"c{label}/{i}"] = (f"c{label}", *values.round(4))
    return photos


def gains_of(report):
    """{"second row minus first row": its line} of a report."""
    return {line.split(":")[0]: line for line in report.splitlines() if " minus " in line}


def numbers_of(line):
    """(gain, low, high) of clean and of the reference condition."""
    numbers = [*map(float, re.findall(r"[-+]\d+\.\d", line))]
    assert len(numbers) == 6
    return numbers[:3], numbers[3:]


@pytest.mark.parametrize("flags, reference", [("", 2), ("--dataset photos", 1)])
def test_variants_are_compared_by_photo_and_resampled_by_class(tmp_path, flags, reference):
    """Over the photos and seeds that both have: the mean over seeds first, then over photos; the interval is SciPy's,
    from a bootstrap over the classes."""
    base = {seed: planted(25, seed) for seed in (1, 2, 3)}
    own = {seed: planted(25, seed, gain=10 * seed) for seed in (2, 3, 4)}
    del base[2]["c0/0"], base[3]["c0/0"], own[2]["c7/1"], own[3]["c7/1"]
    for variant, runs in (("", base), ("--bgaugment own", own)):
        for seed, photos in runs.items():
            make_run(tmp_path, f"{flags} {variant} --seed {seed}", photos=photos)
    both = sorted(base[2].keys() & own[2].keys())
    differences = {photo: np.mean([np.subtract(own[seed][photo][1:], base[seed][photo][1:]) for seed in (2, 3)], axis=0)
                   for photo in both}
    names = [f"c{label}" for label in range(25)]
    sums, sizes = (np.array([sum(value(photo) for photo in both if base[2][photo][0] == name) for name in names])
                   for value in (differences.get, lambda photo: 1))
    line = gains_of(bgbias.report(tmp_path))["contrastive + own backgrounds minus contrastive"]
    assert f"({len(both)} photos, 25 classes, seeds 2, 3)" in line
    for (gain, low, high), column in zip(numbers_of(line), (0, reference)):
        assert gain == pytest.approx(sums[:, column].sum() / len(both), abs=0.06)
        found = bootstrap((sums[:, column], sizes), lambda a, n, axis: a.sum(axis=axis) / n.sum(axis=axis), paired=True,
                          vectorized=True, method="percentile", n_resamples=9999, random_state=0)
        assert (low, high) == pytest.approx(tuple(found.confidence_interval), abs=0.06 + 0.25 * found.standard_error)
        assert 0.5 < found.standard_error < 1.5


def test_a_gain_with_equal_classes_has_no_spread(tmp_path):
    """By hand: 20 classes of two photos that gain 1 and 3 points in clean, and lose 4 and 6 on other backgrounds."""
    for flags, gains in (("", [(0, 0), (0, 0)]), ("--bgaugment", [(1, -4), (3, -6)])):
        make_run(tmp_path, flags, photos={f"c{label}/{i}": (f"c{label}", 50 + clean, 1, 40 + other)
                                          for label in range(20) for i, (clean, other) in enumerate(gains)})
    (name, line), = gains_of(bgbias.report(tmp_path)).items()
    assert name == "contrastive + BGAugment minus contrastive" and "(40 photos, 20 classes, seeds 42)" in line
    assert numbers_of(line) == ([2, 2, 2], [-5, -5, -5])
    assert "replaced -5.0" in line


def test_only_rows_that_differ_in_nothing_but_the_variant_are_compared(tmp_path):
    """All pairs of them, from 20 classes on."""
    def lines_of(folder, *runs, classes=20):
        for flags in runs:
            make_run(tmp_path / folder, flags, photos=planted(classes, 1))
        return sorted(gains_of(bgbias.report(tmp_path / folder)))

    assert lines_of("three", "", "--bgaugment", "--bgaugment own") == [
        "contrastive + BGAugment minus contrastive", "contrastive + own backgrounds minus contrastive",
        "contrastive + own backgrounds minus contrastive + BGAugment"]
    assert lines_of("settings", "--lr 0.1", "--lr 0.1 --bgaugment", "--bgaugment", "--measure", "--loss triplet") == [
        "contrastive + BGAugment, lr 0.1 minus contrastive, lr 0.1"]
    assert lines_of("few", "", "--bgaugment", classes=19) == []
    assert lines_of("seeds", "--seed 1", "--seed 2 --bgaugment") == []


# ---- Which runs share a table --------------------------------------------------------------------


@pytest.mark.parametrize("changed", [
    "images/c3/p1.jpg", "masks/c3/p1.png", "images/c3/new.jpg masks/c3/new.png",
    "backgrounds/test/b2.jpg", "backgrounds/test/new.jpg"])
def test_other_photos_or_backgrounds_are_another_table(shop, capsys, changed):
    """A finished run prints the table of its own data only. --report has them all."""
    make_run(shop / "runs", "--seed 1", tested="toy")
    flags = shlex.split(f"--dataset {shop}/shop --runs {shop}/runs --backbone smallconv --weights none "
                        "--image-size 16 --measure --device cpu")
    rng, printed = np.random.default_rng(1), []
    for seed, seeds in ((1, "1"), (2, "2"), (3, "1")):
        if seed == 3:
            for name in changed.split():
                write_image(shop / "shop" / name, rng, mode="L" if "masks" in name else "RGB")
            bgbias.file_checksum.cache_clear()  # another process
        bgbias.main([*flags, "--seed", str(seed)])
        (heading, (row,)), = read_tables(capsys.readouterr().out).items()
        assert row["seeds"] == seeds
        printed.append(heading)
    run, = shop.glob("runs/shop-measure-s3-*")
    values = [100 * metrics["map@r"] for metrics in result(run)["test"]["replaced"]]
    assert row["replaced"] == f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
    assert printed[0] == printed[1] != printed[2]
    bgbias.main(["--report", str(shop / "runs")])
    tables = read_tables(capsys.readouterr().out)
    assert {heading: [row["seeds"] for row in rows] for heading, rows in tables.items()} == {
        "toy": ["1"], printed[0]: ["2"], printed[2]: ["1"]}


def test_runs_of_another_version_are_left_out_with_one_line(tmp_path, capsys, failure):
    """The first format had no number."""
    make_run(tmp_path, "--seed 1", 0.1)
    for k, old in enumerate(({"test": {}}, {"format": 1}, {"format": 3, "args": {}})):
        (tmp_path / f"old{k}").mkdir()
        (tmp_path / f"old{k}/result.json").write_text(json.dumps(old))
    bgbias.main(["--report", str(tmp_path)])
    first, *rest = capsys.readouterr().out.splitlines()
    assert str(tmp_path) in first and "another version" in first and "(3)" in first
    assert [row["clean"] for row in read_tables("\n".join(rest))[TESTED]] == ["10.00"]
    for file in tmp_path.glob("toy*/result.json"):
        file.unlink()
    assert f"--report {tmp_path}" in failure(["--report", tmp_path])


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
