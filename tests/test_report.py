"""The report over hand-made result files, complete, missing and odd, against expected text."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import bgbias
from bgbias import PAPER, UserError
from conftest import ROOT


def metrics(value, ks=(1, 2, 4, 8)):
    return {"map@r": value, "r_precision": value + 0.02,
            **{f"recall@{k}": value + 0.01 * k for k in ks}}


def drawn(value, std):
    return {"mean": metrics(value), "std": metrics(std), "draws": [metrics(value)] * 5}


def make_run(root, name, clean, replaced, std=0.001, flags=""):
    """A finished run's files; its name is DATASET-LOSS-KIND-sSEED."""
    dataset, loss, kind, seed = name.split("-")
    argv = ["--dataset", dataset, "--loss", loss, "--seed", seed[1:], *flags.split()]
    args = vars(bgbias.parse_args([*argv, *["--bgaugment"] * (kind == "bgaugment")]))
    test = {"clean": metrics(clean), "replaced": drawn(replaced, std),
            "query": drawn(0.12345, 0.0022), "object_only": metrics(0.2),
            "background_only": metrics(0.03)}
    result = {"args": args, "epochs": 7, "best_epoch": 3, "val_best": 0.3, "seconds": 9.5,
              "test": test}
    run = root / name
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"args": args}))
    (run / "result.json").write_text(json.dumps(result, indent=2))
    return run


def make_attention(run, mean, std):
    content = {"mean": mean, "std": std, "images": 5924, "undefined": ["a.jpg"]}
    (run / "attention.json").write_text(json.dumps(content))


def tables(root, capsys):
    """{title: its lines}; Notes too."""
    bgbias.main(["--report", str(root)])
    output = capsys.readouterr()
    assert output.err == ""
    assert output.out == (root / "report.md").read_text()
    sections = output.out.split("\n## ")[1:]
    return {text.splitlines()[0]: text.splitlines()[1:] for text in sections}


def rows(lines, name):
    """The cells of the row called `name`, in each dataset's table that has it."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row[1:] for row in cells if row[0] == name]


def test_papers_figures():
    """The constants against a few cells of the paper's tables, typed in here again."""
    assert {dataset: set(losses) for dataset, losses in PAPER.items()} == {
        dataset: set(bgbias.LOSSES) for dataset in ("cars196", "cub200", "sop")}
    assert PAPER["cars196"]["arcface"][0] == (16.25, 13.63, 0.08, 0.49, 0.10)
    assert PAPER["cub200"]["triplet"] == ((18.29, 10.94, 0.05, 0.24, 0.08),
                                          (18.56, 15.33, 0.16, 0.33, 0.09))
    assert PAPER["sop"]["contrastive"][1][:3] == (31.52, 24.09, 0.04)
    clean = {dataset: round(sum(row[bg][0] for row in losses.values() for bg in (0, 1)), 2)
             for dataset, losses in PAPER.items()}
    assert clean == {"cars196": 165.32, "cub200": 196.98, "sop": 344.59}  # column sums
    assert round(sum(row[bg][1] for losses in PAPER.values() for row in losses.values()
                     for bg in (0, 1)), 2) == 437.92


EXPECTED = """
| cub200 | seeds | clean | ± seeds | paper | difference \
| replaced | ± draws | ± seeds | paper | difference |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
| contrastive | 0 | not run | - | 20.27 | - | not run | - | - | 12.47 ± 0.08 | - |
| contrastive + BGAugment | 0 | not run | - | 19.39 | - | not run | - | - | 15.46 ± 0.08 | - |
| triplet | 3 | 18.00 | 1.00 | 18.29 | -0.29 | 11.00 | 0.20 | 2.00 | 10.94 ± 0.05 | +0.06 |
| triplet + BGAugment \\* | 1 | 18.56 | - | 18.56 | +0.00 \
| 15.00 | 0.10 | - | 15.33 ± 0.16 | -0.33 |
""".strip().splitlines()


def test_both_spreads_differences_and_marks(tmp_path, capsys):
    make_run(tmp_path, "cub200-triplet-base-s42", 0.17, 0.09, 0.001)
    make_run(tmp_path, "cub200-triplet-base-s43", 0.18, 0.11, 0.002)
    make_run(tmp_path, "cub200-triplet-base-s44", 0.19, 0.13, 0.003)
    make_run(tmp_path, "cub200-triplet-bgaugment-s42", 0.18559, 0.15, 0.001, "--lr 1e-5")
    found = tables(tmp_path, capsys)
    table = found["Table 1: MAP@R, %"]
    assert [line for line in table if line][:7] == ["cars196: not run", *EXPECTED]
    assert table[-1] == "sop: not run"
    assert found["Notes"][-1] == f"- \\* {tmp_path}/cub200-triplet-bgaugment-s42: --lr 1e-05"
    assert len([line for line in found["Notes"] if line.startswith("- ")]) == 1


def test_what_the_paper_lacks(tmp_path, capsys):
    make_run(tmp_path, "cub200-arcface-base-s42", 0.21, 0.13)
    found = tables(tmp_path, capsys)
    row, = rows(found["Not in the paper: MAP@R, %"], "arcface")
    assert row == ["1", "12.35", "0.22", "-", "20.00", "-", "3.00", "-"]
    lines = found["Not in the paper: Recall@K, R-precision, %"]
    row, = rows(lines, "arcface")
    assert row == "1 22.00 14.00 23.00 15.00 25.00 17.00 29.00 21.00 23.00 15.00".split()
    assert rows(lines, "cub200")[0][-2:] == ["r_precision clean", "r_precision replaced"]
    row, = rows(lines, "triplet")
    assert row == ["0"] + ["not run"] * 10


def test_sop_has_its_own_k(tmp_path, capsys):
    run = make_run(tmp_path, "sop-triplet-base-s42", 0.3, 0.05)
    result = json.loads((run / "result.json").read_text())
    result["test"]["clean"] = metrics(0.3, (1, 10, 100, 1000))
    (run / "result.json").write_text(json.dumps(result))
    lines = tables(tmp_path, capsys)["Not in the paper: Recall@K, R-precision, %"]
    assert rows(lines, "sop")[0][1::2][:4] == [f"recall@{k} clean" for k in (1, 10, 100, 1000)]


def test_attention(tmp_path, capsys):
    make_attention(make_run(tmp_path, "cub200-triplet-base-s1", 0.2, 0.1), 0.3, 0.08)
    make_attention(make_run(tmp_path, "cub200-triplet-base-s2", 0.2, 0.1), 0.4, 0.12)
    make_run(tmp_path, "cub200-arcface-base-s1", 0.2, 0.1)
    run = make_run(tmp_path, "cub200-contrastive-base-s1", 0.2, 0.1)
    (run / "attention.json").write_text("half a fi")
    found = tables(tmp_path, capsys)
    table = found["Table 2: attention score"]
    assert rows(table, "triplet") == [["2", "0.35", "0.10", "0.07", "0.24 ± 0.08", "+0.11"]]
    assert rows(table, "arcface") == [["0", "not run", "-", "-", "0.25 ± 0.08", "-"]]
    assert rows(found["Table 1: MAP@R, %"], "arcface")[0][1] == "20.00"
    assert rows(table, "contrastive")[0][0] == "0"
    note, = [line for line in found["Notes"] if line.startswith("- ")]
    assert note.startswith(f"- {run}: left out, not a result (JSONDecodeError")


def test_weights_fetched_by_hand_are_the_papers(tmp_path, capsys):
    flags = "--weights elsewhere/bn_inception-52deb4733.pth"
    make_run(tmp_path, "cub200-triplet-base-s42", 0.4, 0.3, flags=flags)
    assert "Notes" not in tables(tmp_path, capsys)


def test_undefined_attention_is_no_figure(tmp_path, capsys):
    make_attention(make_run(tmp_path, "toy-triplet-base-s42", 0.4, 0.3), float("nan"), float("nan"))
    assert rows(tables(tmp_path, capsys)["Table 2: attention score"], "triplet")[-1] == [
        "0", "not run", "-", "-"]


def test_toy_and_own_folders_have_no_paper(tmp_path, capsys):
    make_run(tmp_path, "toy-triplet-base-s42", 0.4, 0.3)
    make_run(tmp_path, "photos-triplet-base-s42", 0.5, 0.3)
    found = tables(tmp_path, capsys)
    heads = [line for line in found["Table 1: MAP@R, %"] if "± seeds" in line]
    assert sorted(line.split(" | ")[0] for line in heads) == ["| photos", "| toy"]
    assert not any("paper" in line for line in heads)
    assert "Notes" not in found  # toy's own defaults are no other settings


def damage(run, kind):
    result = json.loads((run / "result.json").read_text())
    if kind == "no args":
        del result["args"]
    elif kind == "no scores":
        result["test"] = {}
    elif kind == "text":
        result["test"]["clean"]["map@r"] = "high"
    elif kind == "renamed":
        run = run.rename(run.with_name("cub200-arcface-base-s7"))
    elif kind == "unknown loss":
        result["args"]["loss"] = "magic"
    text = json.dumps([] if kind == "a list" else result)
    (run / "result.json").write_text(text[:-9] if kind == "cut" else text)
    return run


@pytest.mark.parametrize("kind", ["cut", "a list", "no args", "no scores", "text", "renamed",
                                  "unknown loss"])
def test_odd_files_are_named_and_left_out(tmp_path, capsys, kind):
    make_run(tmp_path, "cub200-arcface-bgaugment-s42", 0.2, 0.1)
    odd = damage(make_run(tmp_path, "cub200-arcface-base-s42", 0.3, 0.1), kind)
    found = tables(tmp_path, capsys)
    assert rows(found["Table 1: MAP@R, %"], "arcface")[0][:2] == ["0", "not run"]
    assert rows(found["Table 1: MAP@R, %"], "arcface + BGAugment")[0][1] == "20.00"
    note, = [line for line in found["Notes"] if line.startswith("- ")]
    assert note.startswith(f"- {odd}: left out, not a result (")


def test_older_results_without_a_condition(tmp_path, capsys):
    run = make_run(tmp_path, "cub200-arcface-base-s42", 0.3, 0.1)
    result = json.loads((run / "result.json").read_text())
    del result["test"]["query"]
    (run / "result.json").write_text(json.dumps(result))
    row, = rows(tables(tmp_path, capsys)["Not in the paper: MAP@R, %"], "arcface")
    assert row[1:4] == ["not run", "-", "-"] and row[4] == "20.00"


def test_unfinished_runs_are_named(tmp_path, capsys):
    make_run(tmp_path, "cub200-arcface-base-s42", 0.2, 0.1)
    run = make_run(tmp_path, "cub200-triplet-base-s42", 0.2, 0.1)
    (run / "result.json").unlink()
    (run / "log.jsonl").write_text('{"epoch": 1}\n{"epoch": 2}\n')
    (tmp_path / "logs").mkdir()  # no run at all
    found = tables(tmp_path, capsys)
    assert found["Notes"][-1] == f"- {run}: not finished, 2 epochs so far"


@pytest.mark.parametrize("content", [[], ["cub200-triplet-base-s42"]])
def test_nothing_to_report(tmp_path, content):
    for name in content:
        (make_run(tmp_path, name, 0.2, 0.1) / "result.json").unlink()
    with pytest.raises(UserError, match=f"--report {tmp_path}: no finished run; "):
        bgbias.report(tmp_path)
    assert not (tmp_path / "report.png").exists()


def test_command_line(tmp_path):
    command = [sys.executable, ROOT / "bgbias.py", "--report", tmp_path / "nowhere"]
    failed = subprocess.run(command, capture_output=True, text=True)
    assert failed.returncode == 2 and failed.stdout == ""
    assert failed.stderr.startswith("bgbias.py: error: --report ")
    assert len(failed.stderr.splitlines()) == 1


def span(image, colour, y):
    """First and last column of `colour` in the rows around y."""
    found = np.all(np.abs(image[y - 3:y + 4].astype(int) - colour) < 8, axis=2).any(axis=0)
    return np.flatnonzero(found)[[0, -1]]


def test_chart(tmp_path, capsys):
    """Ends of the bars of the first loss, measured in the picture: 0 is at 290 px, 30 at 770."""
    make_run(tmp_path, "cub200-contrastive-base-s42", 0.25, 0.10)
    make_run(tmp_path, "cub200-contrastive-bgaugment-s42", 0.20, 0.15)
    make_run(tmp_path, "toy-triplet-base-s42", 0.5, 0.3)
    tables(tmp_path, capsys)
    picture = Image.open(tmp_path / "report.png")
    assert picture.size == (2 * 800, 600)
    image = np.asarray(picture.convert("RGB"))[:, 280:790]
    base, bgaugment = span(image, (217, 95, 2), 85), span(image, (31, 120, 180), 120)
    assert base == pytest.approx([290 + 160 - 9 - 280, 290 + 400 + 9 - 280], abs=3)
    assert bgaugment == pytest.approx([290 + 240 - 9 - 280, 290 + 320 + 9 - 280], abs=3)
