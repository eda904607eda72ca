"""The report over hand-made result files, complete, missing and odd, against expected text."""

import json
import os
import re
import subprocess
import sys
from collections import defaultdict

import pytest

import bgbias
from bgbias import BAR, PAPER, UserError
from conftest import ROOT


TESTED = "100 test classes, 5,924 photos"


def metrics(value, ks=(1, 2, 4, 8)):
    return {"map@r": value, "r_precision": value + 0.02,
            **{f"recall@{k}": value + 0.01 * min(k, 10) for k in ks}}


def drawn(value, std):
    return {"mean": metrics(value), "std": metrics(std), "draws": [metrics(value)] * 5}


def make_run(root, name, clean, replaced, std=0.001, flags="", tested=TESTED):
    """A finished run's files; its name is DATASET-LOSS-KIND-sSEED, DATASET may be a path."""
    dataset, loss, kind, seed = name.rsplit("-", 3)
    argv = ["--dataset", dataset, "--loss", loss, "--seed", seed[1:], *flags.split()]
    args = bgbias.parse_args([*argv, *["--bgaugment"] * (kind == "bgaugment")])
    test = {"clean": metrics(clean), "replaced": drawn(replaced, std),
            "query": drawn(0.12346, 0.0022), "object_only": metrics(0.2),
            "background_only": metrics(0.03)}
    result = {"args": vars(args), "epochs": 7, "best_epoch": 3, "seconds": 9.5, "test": test,
              "tested": tested}
    run = root / (name if "/" not in dataset else bgbias.run_folder(args, kind).name)
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"args": vars(args)}))
    (run / "result.json").write_text(json.dumps(result, indent=2))
    return run


def make_attention(run, mean, std):
    content = {"mean": mean, "std": std, "images": 5924, "undefined": ["a.jpg"]}
    (run / "attention.json").write_text(json.dumps(content))


def report(root, capsys):
    """What the report prints, and the Markdown that it writes."""
    bgbias.main(["--report", str(root)])
    output = capsys.readouterr()
    assert output.err == ""
    return output.out, (root / "report.md").read_text("utf-8")


def tables(text, dataset, tested=TESTED):
    """The Markdown tables below the heading of a dataset, as lists of lines."""
    section = f"\n{text}".split(f"\n## {dataset}: {tested}\n\n")[1].split("\n## ")[0]
    blocks = [block.splitlines() for block in section.split("\n\n")]
    return [lines for lines in blocks if lines[0].startswith("|")]


def cells_of(blocks):
    """{row's name: {heading: cell}} of tables that are parts of one; a bar keeps its blanks."""
    found = defaultdict(dict)
    for lines in blocks:
        assert len(set(map(len, lines))) == 1  # they are aligned
        headings, rule, *rows = [[cell[1:-1] for cell in line[1:-1].split("|")] for line in lines]
        assert rule == ["-" * len(heading) for heading in headings]
        for row in rows:
            for heading, cell in zip(headings[1:], row[1:], strict=True):
                heading = heading.strip()
                if cell.strip():
                    found[row[0].strip()][heading] = cell if heading == BAR else cell.strip()
    return dict(found)


def read_table(text, dataset, tested=TESTED):
    return cells_of(tables(text, dataset, tested))


def squeezed(text):
    return re.sub("--+", "---", re.sub(" +", " ", text))


# ---- The paper's ---------------------------------------------------------------------------------

# Test MAP@R, with replaced backgrounds, attention score; cars196, cub200, sop.
PUBLISHED = """
arcface | 16.25 | 13.63 +- 0.08 | 0.49 +- 0.10 | 20.66 | 12.87 +- 0.16 | 0.25 +- 0.08 \
| 40.50 | 6.98 +- 0.05 | 0.13 +- 0.14
arcface + BGAugment | 16.19 | 16.23 +- 0.04 | 0.56 +- 0.10 | 20.91 | 17.92 +- 0.08 | 0.33 +- 0.09 \
| 22.25 | 16.53 +- 0.05 | 0.26 +- 0.17
contrastive | 15.22 | 13.31 +- 0.15 | 0.50 +- 0.09 | 20.27 | 12.47 +- 0.08 | 0.25 +- 0.08 \
| 37.98 | 4.17 +- 0.05 | 0.07 +- 0.16
contrastive + BGAugment | 16.43 | 16.31 +- 0.03 | 0.53 +- 0.10 | 19.39 | 15.46 +- 0.08 | 0.32 +- 0.10 \
| 31.52 | 24.09 +- 0.04 | 0.31 +- 0.20
multi_similarity | 18.80 | 16.25 +- 0.06 | 0.52 +- 0.09 | 19.19 | 12.21 +- 0.16 | 0.26 +- 0.08 \
| 39.65 | 6.51 +- 0.06 | 0.11 +- 0.17
multi_similarity + BGAugment | 15.61 | 15.48 +- 0.05 | 0.50 +- 0.09 | 18.93 | 15.65 +- 0.16 | 0.30 +- 0.09 \
| 32.67 | 24.00 +- 0.07 | 0.28 +- 0.19
normalized_softmax | 18.06 | 15.36 +- 0.03 | 0.51 +- 0.09 | 20.18 | 12.41 +- 0.10 | 0.24 +- 0.08 \
| 41.52 | 7.67 +- 0.04 | 0.12 +- 0.14
normalized_softmax + BGAugment | 18.15 | 18.12 +- 0.05 | 0.56 +- 0.09 | 20.60 | 17.39 +- 0.10 | 0.30 +- 0.08 \
| 32.16 | 24.60 +- 0.03 | 0.28 +- 0.20
triplet | 15.33 | 13.40 +- 0.04 | 0.50 +- 0.09 | 18.29 | 10.94 +- 0.05 | 0.24 +- 0.08 \
| 36.71 | 6.05 +- 0.06 | 0.08 +- 0.17
triplet + BGAugment | 15.28 | 15.19 +- 0.05 | 0.54 +- 0.09 | 18.56 | 15.33 +- 0.16 | 0.33 +- 0.09 \
| 29.63 | 21.39 +- 0.07 | 0.26 +- 0.22
"""


def test_papers_figures():
    """The constants against the paper's table, typed in here again in its own order."""
    typed = {}
    for line in PUBLISHED.strip().splitlines():
        name, *cells = line.split(" | ")
        kind = "bgaugment" if name.endswith(" + BGAugment") else "base"
        for i, dataset in enumerate(("cars196", "cub200", "sop")):
            clean, replaced, attention = cells[3 * i:3 * i + 3]
            typed[dataset, name.split()[0], kind] = [
                float(number) for cell in (clean, replaced, attention) for number in cell.split(" +- ")]
    assert len(typed) == 30
    for (dataset, loss, kind), numbers in typed.items():
        published = PAPER[dataset][loss][kind]
        assert [published.clean, published.replaced, published.replaced_std, published.attention,
                published.attention_std] == numbers
    assert sum(len(kinds) for losses in PAPER.values() for kinds in losses.values()) == 30


# ---- Tables --------------------------------------------------------------------------------------

EXPECTED = """
| | seeds | clean | paper: clean | clean - paper \
| replaced | ± draws | paper: replaced | replaced - paper \
| query | object only | background only | R@1 clean | R@1 replaced | paper: attention | ○ replaced ━ clean ● |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
| triplet | 3 | 18.00 ± 1.00 | 18.29 | -0.29 \
| 11.00 ± 2.00 | 0.20 | 10.94 ± 0.05 | +0.06 \
| 12.35 ± 0.00 | 20.00 ± 0.00 | 3.00 ± 0.00 | 19.00 ± 1.00 | 12.00 ± 2.00 | 0.24 ± 0.08 | ○━━━━━━━● |
| triplet + BGAugment * | 1 | 18.57 | 18.56 | +0.01 \
| 15.00 | 0.10 | 15.33 ± 0.16 | -0.33 \
| 12.35 | 20.00 | 3.00 | 19.57 | 16.00 | 0.33 ± 0.09 | ○━━━● |
""".strip()


def make_triplets(root):
    make_run(root, "cub200-triplet-base-s42", 0.17, 0.09, 0.001)
    make_run(root, "cub200-triplet-base-s43", 0.18, 0.11, 0.002)
    make_run(root, "cub200-triplet-base-s44", 0.19, 0.13, 0.003)
    make_run(root, "cub200-triplet-bgaugment-s42", 0.1857, 0.15, 0.001, "--lr 1e-5")


def test_both_spreads_differences_and_marks(tmp_path, capsys):
    make_triplets(tmp_path)
    text, markdown = report(tmp_path, capsys)
    assert f"\n## cub200: {TESTED}\n\n{EXPECTED}\n\n" in squeezed(markdown)
    # The largest figure, 18.57, is at 23: 11 at 13.6 and 18 at 22.3, 15 at 18.6.
    assert [cells[BAR] for cells in read_table(markdown, "cub200").values()] == [
        14 * " " + "○━━━━━━━● ", 19 * " " + "○━━━●"]
    for output in (text, markdown):
        assert output.endswith(f"\n\n- * {tmp_path}/cub200-triplet-bgaugment-s42: --lr 1e-05\n")
        assert "*: other settings than the paper's" in output


def test_only_what_was_run_has_a_row(tmp_path, capsys):
    make_triplets(tmp_path)
    for output in report(tmp_path, capsys):
        assert ("\ncub200, not run: contrastive, contrastive + BGAugment, multi_similarity, "
                "multi_similarity + BGAugment, arcface, arcface + BGAugment, normalized_softmax, "
                "normalized_softmax + BGAugment\n") in output
        assert "\nnot run at all: cars196, sop\n" in output
        assert list(read_table(output, "cub200")) == ["triplet", "triplet + BGAugment *"]
        assert output.count("\n## ") == 1


def headings(text):
    """The datasets that have a table."""
    return re.findall(f"\n## (.*): {TESTED}\n", text)


def test_everything_run_lacks_nothing(tmp_path, capsys):
    for dataset in PAPER:
        for loss in bgbias.LOSSES:
            for kind in bgbias.KINDS:
                make_run(tmp_path, f"{dataset}-{loss}-{kind}-s42", 0.2, 0.1)
    for output in report(tmp_path, capsys):
        assert "not run" not in output and " * " not in output and "left out" not in output
        assert headings(output) == ["cars196", "cub200", "sop"]
        for dataset in PAPER:
            assert len(read_table(output, dataset)) == 10


@pytest.mark.parametrize("columns", [40, 80, 120, 1000])
def test_the_terminal_shows_what_the_markdown_has(tmp_path, capsys, monkeypatch, columns):
    """Every cell of it, in blocks that fit."""
    make_triplets(tmp_path)
    make_attention(tmp_path / "cub200-triplet-bgaugment-s42", 0.4, 0.12)
    make_run(tmp_path, "cub200-multi_similarity-bgaugment-s42", 0.2, 0.3, flags="--lr 2")
    make_run(tmp_path, "photos-arcface-base-s42", 0.2, 0.3)
    monkeypatch.setenv("COLUMNS", str(columns))
    text, markdown = report(tmp_path, capsys)
    for dataset, first in (("cub200", "multi_similarity + BGAugment *"), ("photos", "arcface")):
        blocks, widest = tables(text, dataset), len(first) + 4 + 24 + 3  # the bar beside the names
        assert max(len(line) for lines in blocks for line in lines) <= max(columns, widest)
        assert (len(blocks) == 1) == (columns == 1000) and len(tables(markdown, dataset)) == 1
        shown = cells_of(blocks)
        assert shown == read_table(markdown, dataset)
        assert all("○" in cells[BAR] and "●" in cells[BAR] for cells in shown.values())


def test_columns_are_aligned_and_fit():
    rows = [{"": "first", "a": "1", "bc": "2.00", "long heading": "3"},
            {"": "x", "a": "10", "long heading": "4.00"}]
    whole = ("|       |  a |   bc | long heading |\n"
             "| ----- | -- | ---- | ------------ |\n"
             "| first |  1 | 2.00 |            3 |\n"
             "| x     | 10 |      |         4.00 |")
    assert bgbias.as_table(rows) == whole == bgbias.as_table(rows, room=36)
    blocks = ("|       |  a |   bc |\n"
              "| ----- | -- | ---- |\n"
              "| first |  1 | 2.00 |\n"
              "| x     | 10 |      |\n\n"
              "|       | long heading |\n"
              "| ----- | ------------ |\n"
              "| first |            3 |\n"
              "| x     |         4.00 |")
    assert bgbias.as_table(rows, room=35) == blocks
    assert bgbias.as_table(rows, room=21) == blocks  # too narrow for the last: it is shown all the same
    assert len(bgbias.as_table(rows, room=20).split("\n\n")) == 3


def test_wanted_columns_in_the_order_of_the_wish():
    rows = [{"": "first", "a": "1"}, {"": "x", "b": "22"}]
    assert bgbias.as_table(rows, ["", "b", "c", "a"]) == (
        "|       |  b | a |\n| ----- | -- | - |\n| first |    | 1 |\n| x     | 22 |   |")


def test_bars():
    """0 is at the first of 24 characters, the largest figure of the table, 25, at the last."""
    rows = [{"replaced": "10.00", "clean": "25.00"},  # at 9.2, 23
            {"replaced": "20.00 ± 9.00", "clean": "15.00 ± 1.00"},  # at 18.4, 13.8
            {"replaced": "11.00", "clean": "11.00"},  # at 10.1: the disc hides the ring
            {"replaced": "0.00", "clean": "1.00"}]  # at 0, 0.9
    bgbias.add_bars(rows)
    assert [row[BAR] for row in rows] == [
        "         ○━━━━━━━━━━━━━●",
        "              ●━━━○     ",
        "          ●             ",
        "○●                      "]
    rows = [{"replaced": "0.00", "clean": "0.00"}]
    bgbias.add_bars(rows)
    assert rows[0][BAR] == "●                       "


def test_bars_are_in_the_printed_table(tmp_path, capsys):
    make_run(tmp_path, "toy-contrastive-base-s42", 0.25, 0.10)
    make_run(tmp_path, "toy-contrastive-bgaugment-s42", 0.15, 0.20)
    text, _ = report(tmp_path, capsys)
    assert [cells[BAR] for cells in read_table(text, "toy").values()] == [
        "         ○━━━━━━━━━━━━━●", "              ●━━━○     "]


def test_other_hyper_parameters_are_marked(tmp_path, capsys, monkeypatch):
    """A run made before HPARAMS was edited is neither silently averaged nor set beside another."""
    old = make_run(tmp_path, "toy-triplet-base-s42", 0.2, 0.1)
    monkeypatch.setitem(bgbias.HPARAMS["toy"], "triplet", {"margin": 0.5})
    new = make_run(tmp_path, "toy-triplet-base-s43", 0.2, 0.1)
    text, _ = report(tmp_path, capsys)
    assert list(read_table(text, "toy")) == ["triplet *"]
    assert f"- * {old}: HPARAMS {{'margin': 0.2}}" in text and str(new) not in text


def test_a_loss_that_went_is_named(tmp_path, capsys, monkeypatch):
    run = make_run(tmp_path, "toy-triplet-base-s42", 0.2, 0.1)
    make_run(tmp_path, "toy-arcface-base-s42", 0.2, 0.1)
    monkeypatch.setattr(bgbias, "LOSSES", {"arcface": bgbias.arcface})
    text, _ = report(tmp_path, capsys)
    assert f"- {run}: its loss triplet is not in LOSSES; not a result, left out" in text


# ---- What a run prints at its end ----------------------------------------------------------------


def end_of_run(root, flags, capsys):
    """What comes before, the cells of the table, and the lines below it."""
    bgbias.print_results(bgbias.parse_args(["--runs", str(root), *flags.split()]))
    before, table = capsys.readouterr().out.split("\ntest MAP@R, %: ")
    lines = table.splitlines()
    end = [line.startswith("|") for line in lines].index(False, 1)
    assert lines[0] == TESTED
    return before, cells_of([lines[1:end]]), lines[end:]


def sentence(name, lost, background="3.0"):
    return (f"With other backgrounds {name} loses {lost} of its MAP@R; on backgrounds alone it still "
            f"reaches {background} %.")


def test_end_of_a_run_beside_its_sibling(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "130")
    run = make_run(tmp_path, "cub200-triplet-base-s42", 0.25, 0.10)
    make_run(tmp_path, "cub200-triplet-bgaugment-s42", 0.20, 0.15)
    make_run(tmp_path, "cub200-triplet-base-s43", 0.01, 0.01)
    before, table, lines = end_of_run(tmp_path, "--dataset cub200 --loss triplet", capsys)
    others = {"query": "12.35", "object only": "20.00", "background only": "3.00"}
    assert before == "" and table == {
        "triplet": {"clean": "25.00", "replaced": "10.00", **others, BAR: "         ○━━━━━━━━━━━━━●"},
        "triplet + BGAugment": {"clean": "20.00", "replaced": "15.00", **others,
                                BAR: "              ○━━━●     "}}
    assert lines == [sentence("triplet", "60 %"), sentence("triplet + BGAugment", "25 %"),
                     f"all metrics: {run}/result.json"]


def test_end_of_a_run_without_a_sibling(tmp_path, capsys):
    run = make_run(tmp_path, "toy-arcface-bgaugment-s7", 0.0, 0.0)
    before, table, lines = end_of_run(tmp_path, "--loss arcface --bgaugment --seed 7", capsys)
    assert before == "" and list(table) == ["arcface + BGAugment"]
    assert lines == [sentence("arcface + BGAugment", "nothing"),  # of nothing, no share is lost
                     f"all metrics: {run}/result.json"]


def test_end_of_a_run_that_loses_nothing(tmp_path, capsys):
    run = make_run(tmp_path, "toy-arcface-base-s42", 0.2, 0.3)
    _, table, lines = end_of_run(tmp_path, "--loss arcface", capsys)
    assert (table["arcface"]["clean"], table["arcface"]["replaced"]) == ("20.00", "30.00")
    assert lines == [sentence("arcface", "nothing"), f"all metrics: {run}/result.json"]


@pytest.mark.parametrize("flags, tested, what", [
    ("--lr 1", TESTED, f"{TESTED}, --lr 1.0"), ("", "9 test classes, 30 photos", "9 test classes, 30 photos, "
                                                "the defaults")])
def test_only_comparable_siblings_are_beside_a_run(tmp_path, capsys, flags, tested, what):
    run = make_run(tmp_path, "toy-arcface-base-s42", 0.2, 0.1)
    other = make_run(tmp_path, "toy-arcface-bgaugment-s42", 0.2, 0.1, flags=flags, tested=tested)
    before, table, lines = end_of_run(tmp_path, "--loss arcface", capsys)
    assert before == f"{other}: not comparable, {what}\n" and list(table) == ["arcface"]
    assert lines == [sentence("arcface", "50 %"), f"all metrics: {run}/result.json"]


def test_end_of_an_unusual_run(tmp_path, capsys):
    """Its flags stand under the table once, also if it stands beside another like it."""
    for kind in bgbias.KINDS:
        run = make_run(tmp_path, f"toy-arcface-{kind}-s42", 0.2, 0.1, flags="--lr 1")
    before, table, lines = end_of_run(tmp_path, "--loss arcface --bgaugment --lr 1", capsys)
    assert before == "" and list(table) == ["arcface *", "arcface + BGAugment *"]
    assert lines == ["* --lr 1.0", sentence("arcface", "50 %"), sentence("arcface + BGAugment", "50 %"),
                     f"all metrics: {run}/result.json"]


def test_a_damaged_sibling_is_left_out(tmp_path, capsys):
    run = make_run(tmp_path, "toy-arcface-base-s42", 0.2, 0.1)
    damage(make_run(tmp_path, "toy-arcface-bgaugment-s42", 0.2, 0.1), "cut")
    before, table, lines = end_of_run(tmp_path, "--loss arcface", capsys)
    assert before == "" and list(table) == ["arcface"] and lines[-1] == f"all metrics: {run}/result.json"


def test_end_of_a_test_of_the_untrained_network(tmp_path, capsys):
    make_run(tmp_path, "toy-contrastive-base-s42", 0.5, 0.4)  # has another row, of another run
    args = ["toy-arcface-base-s42", 0.2, 0.1]
    run = make_run(tmp_path, *args, flags="--epochs 0").rename(tmp_path / "toy-untrained-base-s42")
    before, table, lines = end_of_run(tmp_path, "--loss arcface --epochs 0", capsys)
    assert before == "" and list(table) == ["the network as it is *"]
    assert lines == ["* --epochs 0", sentence("the network as it is", "50 %"), f"all metrics: {run}/result.json"]
    assert list(read_table(report(tmp_path, capsys)[1], "toy")) == ["contrastive", "the network as it is *"]


# ---- What a table has, by dataset ----------------------------------------------------------------


def test_sop_has_its_own_k(tmp_path, capsys):
    run = make_run(tmp_path, "sop-triplet-base-s42", 0.3, 0.05)
    result = json.loads((run / "result.json").read_text())
    result["test"]["clean"] = metrics(0.3, (1, 10, 100, 1000))
    (run / "result.json").write_text(json.dumps(result))
    row = read_table(report(tmp_path, capsys)[1], "sop")["triplet"]
    assert (row["R@1 clean"], row["clean - paper"]) == ("31.00", "-6.71")


def test_toy_and_own_folders_have_no_paper(tmp_path, capsys):
    make_run(tmp_path, "toy-triplet-base-s42", 0.4, 0.3)
    make_run(tmp_path, "photos-triplet-base-s42", 0.5, 0.3)
    text, markdown = report(tmp_path, capsys)
    assert headings(markdown) == ["photos", "toy"]
    for dataset, clean in (("toy", "40.00"), ("photos", "50.00")):
        row = read_table(markdown, dataset)["triplet"]
        assert row["clean"] == clean and not any("paper" in heading for heading in row)
    assert " * " not in text  # toy's own defaults are no other settings
    assert "\nnot run at all: cars196, cub200, sop\n" in text


def test_a_folder_of_the_same_name_has_a_table_of_its_own(tmp_path, capsys):
    make_run(tmp_path, "cub200-triplet-base-s42", 0.2, 0.1)
    make_run(tmp_path, "./cub200-triplet-base-s42", 0.5, 0.4)
    make_run(tmp_path, "/elsewhere/sop-triplet-base-s42", 0.6, 0.4)
    _, markdown = report(tmp_path, capsys)
    assert sorted(headings(markdown)) == ["cub200", "cub200-folder", "sop-folder"]
    papers, own = (read_table(markdown, name)["triplet"] for name in ("cub200", "cub200-folder"))
    assert (papers["clean"], papers["seeds"], papers["paper: clean"]) == ("20.00", "1", "18.29")
    assert (own["clean"], own["seeds"]) == ("50.00", "1") and "paper: clean" not in own


def test_runs_over_other_photos_have_a_table_of_their_own(tmp_path, capsys):
    """As a folder of which all classes are tested if nothing is trained, or to which photos came."""
    few, all_of_it = "11 test classes, 44 photos", "22 test classes, 88 photos"
    make_run(tmp_path, "photos-triplet-base-s1", 0.2, 0.1, tested=few)
    make_run(tmp_path, "photos-triplet-base-s2", 0.3, 0.1, tested=few)
    make_run(tmp_path, "photos-triplet-base-s3", 0.7, 0.6, tested=all_of_it)
    make_run(tmp_path, "photos-triplet-bgaugment-s3", 0.7, 0.6, tested=all_of_it)
    for output in report(tmp_path, capsys):
        assert re.findall("\n## (.*)\n", output) == [f"photos: {few}", f"photos: {all_of_it}"]
        one, other = (read_table(output, "photos", tested) for tested in (few, all_of_it))
        assert one["triplet"]["clean"] == "25.00 ± 7.07" and one.keys() == {"triplet"}
        assert other["triplet"]["clean"] == "70.00"
        assert other.keys() == {"triplet", "triplet + BGAugment"}


def test_attention(tmp_path, capsys):
    make_attention(make_run(tmp_path, "cub200-triplet-base-s1", 0.2, 0.1), 0.3, 0.08)
    make_attention(make_run(tmp_path, "cub200-triplet-base-s2", 0.2, 0.1), 0.4, 0.12)
    make_run(tmp_path, "cub200-triplet-base-s3", 0.2, 0.1)  # its attention was not measured
    make_run(tmp_path, "cub200-arcface-base-s1", 0.2, 0.1)
    for loss, text in (("contrastive", "half a fi"), ("multi_similarity", "[" * 10_000)):
        run = make_run(tmp_path, f"cub200-{loss}-base-s1", 0.2, 0.1)
        (run / "attention.json").write_text(text)  # its other figures are there all the same
    _, markdown = report(tmp_path, capsys)
    table = read_table(markdown, "cub200")
    assert list(table) == ["contrastive", "triplet", "multi_similarity", "arcface"]
    names = ("seeds", "attention", "± images", "paper: attention", "attention - paper")
    assert [table["triplet"].get(name) for name in names] == [
        "3", "0.35 ± 0.07", "0.10", "0.24 ± 0.08", "+0.11"]
    for loss, paper in (("contrastive", 0.25), ("multi_similarity", 0.26), ("arcface", 0.25)):
        cells = [table[loss].get(name) for name in names]
        assert cells == ["1", None, None, f"{paper} ± 0.08", None]
    assert "left out" not in markdown


def test_undefined_attention_is_no_figure(tmp_path, capsys):
    make_attention(make_run(tmp_path, "toy-triplet-base-s42", 0.4, 0.3), float("nan"), float("nan"))
    row = read_table(report(tmp_path, capsys)[1], "toy")["triplet"]
    assert row["clean"] == "40.00" and "attention" not in row and "± images" not in row


def test_weights_fetched_by_hand_are_the_papers(tmp_path, capsys):
    flags = "--weights elsewhere/bn_inception-52deb4733.pth"
    make_run(tmp_path, "cub200-triplet-base-s42", 0.4, 0.3, flags=flags)
    assert list(read_table(report(tmp_path, capsys)[0], "cub200")) == ["triplet"]


def test_one_unusual_seed_marks_the_row(tmp_path, capsys):
    make_run(tmp_path, "cub200-triplet-base-s1", 0.4, 0.3)
    run = make_run(tmp_path, "cub200-triplet-base-s2", 0.4, 0.3, flags="--epochs 9 --select replaced")
    text, markdown = report(tmp_path, capsys)
    assert read_table(markdown, "cub200")["triplet *"]["seeds"] == "2"
    assert text.endswith(f"\n\n- * {run}: --epochs 9 --select replaced\n")


def test_older_results_without_a_condition(tmp_path, capsys):
    run = make_run(tmp_path, "cub200-arcface-base-s42", 0.3, 0.1)
    make_run(tmp_path, "cub200-arcface-bgaugment-s42", 0.3, 0.1)
    result = json.loads((run / "result.json").read_text())
    del result["test"]["query"]
    (run / "result.json").write_text(json.dumps(result))
    table = read_table(report(tmp_path, capsys)[1], "cub200")
    assert "query" not in table["arcface"] and table["arcface"]["object only"] == "20.00"
    assert table["arcface + BGAugment"]["query"] == "12.35"


# ---- Odd files -----------------------------------------------------------------------------------


def damage(run, kind):
    result = json.loads((run / "result.json").read_text())
    if kind == "no args":
        del result["args"]
    elif kind == "no unusual":
        del result["args"]["unusual"]
    elif kind == "no scores":
        result["test"] = {}
    elif kind == "text":
        result["test"]["clean"]["map@r"] = "high"
    elif kind == "no count":
        del result["tested"]
    elif kind == "a spread of text":
        result["test"]["replaced"]["std"]["map@r"] = "high"
    elif kind == "renamed":
        run = run.rename(run.with_name("cub200-arcface-base-s7"))
    elif kind == "unknown loss":
        result["args"]["loss"] = "magic"
    text = json.dumps([] if kind == "a list" else result)
    (run / "result.json").write_text(text[:-9] if kind == "cut" else text)
    if kind in ("empty", "binary"):
        (run / "result.json").write_bytes(b"\xff\x00" * (kind == "binary"))
    if kind == "deep":
        (run / "result.json").write_text("[" * 10_000 + "]" * 10_000)
    return run


@pytest.mark.parametrize("kind", ["cut", "empty", "binary", "a list", "no args", "no unusual", "no scores",
                                  "text", "renamed", "unknown loss", "no count",
                                  "a spread of text", "deep"])
def test_odd_files_are_named_and_left_out(tmp_path, capsys, kind):
    make_run(tmp_path, "cub200-arcface-bgaugment-s42", 0.2, 0.1)
    odd = damage(make_run(tmp_path, "cub200-arcface-base-s42", 0.3, 0.1), kind)
    text, markdown = report(tmp_path, capsys)
    table = read_table(markdown, "cub200")
    assert list(table) == ["arcface + BGAugment"]
    assert table["arcface + BGAugment"]["clean"] == "20.00"
    for output in (text, markdown):
        assert "cub200, not run: contrastive, " in output and ", arcface, normalized_softmax" in output
        assert output.splitlines()[-1].startswith(f"- {odd}: ")
        assert output.endswith("; not a result, left out\n")


def test_unfinished_runs_are_named(tmp_path, capsys):
    make_run(tmp_path, "cub200-arcface-base-s42", 0.2, 0.1)
    for name, rows in (("cub200-triplet-base-s42", '{"epoch": 1}\n{"epoch": 2}\n'),
                       ("cub200-contrastive-base-s42", None)):
        run = make_run(tmp_path, name, 0.2, 0.1)
        (run / "result.json").unlink()
        if rows:
            (run / "log.jsonl").write_text(rows)
    (tmp_path / "logs").mkdir()  # no run at all
    text, _ = report(tmp_path, capsys)
    assert text.endswith(f"\n\n- {tmp_path}/cub200-contrastive-base-s42: not finished\n"
                         f"- {tmp_path}/cub200-triplet-base-s42: not finished\n")


@pytest.mark.parametrize("names, reason", [([], "train one"), (["cub200-triplet-base-s42"], "not finished")])
def test_nothing_to_report(tmp_path, names, reason):
    for name in names:
        (make_run(tmp_path, name, 0.2, 0.1) / "result.json").unlink()
    with pytest.raises(UserError, match=f"--report {tmp_path}: no finished run; .*{reason}"):
        bgbias.report(tmp_path)
    assert not (tmp_path / "report.md").exists()


def test_a_report_that_cannot_be_written(tmp_path):
    make_run(tmp_path, "cub200-triplet-base-s42", 0.2, 0.1)
    (tmp_path / "report.md").mkdir()
    with pytest.raises(UserError, match="report.md: could not be written: .*; make room or choose"):
        bgbias.report(tmp_path)


# ---- The command ---------------------------------------------------------------------------------


def test_command_line_on_a_terminal_without_utf8(tmp_path):
    """It shows ? for what it has not; the report is UTF-8 whatever the locale."""
    make_triplets(tmp_path)
    ascii_only = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    shown = subprocess.run([sys.executable, ROOT / "bgbias.py", "--report", tmp_path], capture_output=True,
                           env={**os.environ, **ascii_only, "COLUMNS": "80"})
    assert (shown.returncode, shown.stderr) == (0, b"")
    text = shown.stdout.decode("ascii")
    assert "18.00 ? 1.00" in text and "? replaced ? clean ?" in text
    assert EXPECTED in squeezed((tmp_path / "report.md").read_text("utf-8"))


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-5", "1e300"])
@pytest.mark.parametrize("where", ['"clean": {', '"std": {'])
def test_impossible_figures_are_left_out(tmp_path, capsys, value, where):
    make_run(tmp_path, "toy-triplet-base-s42", 0.4, 0.3)
    odd = make_run(tmp_path, "toy-triplet-base-s43", 0.4, 0.3) / "result.json"
    pattern = rf'({re.escape(where)}\s*"map@r": )[\d.]+'
    odd.write_text(re.sub(pattern, rf"\g<1>{value}", odd.read_text(), count=1))
    text, _ = report(tmp_path, capsys)
    figure = "its clean is " if "clean" in where else "its replaced is "
    assert f"{odd.parent}: {figure}" in text and text.endswith("; not a result, left out\n")
    assert read_table(text, "toy")["triplet"]["seeds"] == "1"


def test_a_folder_in_the_place_of_a_result_is_left_out(tmp_path, capsys):
    make_run(tmp_path, "toy-triplet-base-s42", 0.4, 0.3)
    result = make_run(tmp_path, "toy-triplet-base-s44", 0.4, 0.3) / "result.json"
    result.unlink()
    result.mkdir()
    text, _ = report(tmp_path, capsys)
    assert f"{result.parent}: [Errno 21] Is a directory" in text and "not a result, left out" in text
