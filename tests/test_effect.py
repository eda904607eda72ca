"""The paper's effect on the toy set, through the command line: it must come from learning."""

import json
import os
import subprocess
import sys

import pytest

from conftest import ROOT


@pytest.fixture(scope="module")
def results(tmp_path_factory, toy):
    """Test figures of a shortened base and BGAugment run, and of the untrained network."""
    folder = tmp_path_factory.mktemp("effect")
    found = {}
    for name, flags in {"base": [], "bgaugment": ["--bgaugment"],
                        "untrained": ["--epochs", "0"]}.items():
        flags = ["--epochs", "4", "--device", "cpu", "--data", toy.parent, *flags]
        subprocess.run([sys.executable, ROOT / "bgbias.py", *flags], cwd=folder, check=True,
                       env={**os.environ, "OMP_NUM_THREADS": "1"})  # busy cores make two threads crawl
        kind = "bgaugment" if name == "bgaugment" else "base"
        loss = "untrained" if name == "untrained" else "contrastive"
        found[name] = json.loads((folder / f"runs/toy-{loss}-{kind}-s42/result.json").read_text())["test"]
    return found


def percent(scores):
    return 100 * (scores["mean"] if "mean" in scores else scores)["map@r"]


def test_base_leans_on_the_background(results):
    base = results["base"]
    assert percent(base["clean"]) - percent(base["replaced"]) > 20
    assert percent(base["background_only"]) > 30


def test_bgaugment_heals_it(results):
    base, bgaugment = results["base"], results["bgaugment"]
    assert percent(bgaugment["replaced"]) - percent(base["replaced"]) > 10
    assert percent(bgaugment["query"]) - percent(base["query"]) > 10
    assert percent(bgaugment["background_only"]) < percent(base["background_only"])


def test_it_comes_from_learning(results):
    """An untrained network retrieves much worse with backgrounds replaced than either run."""
    untrained = percent(results["untrained"]["replaced"])
    assert untrained + 10 < percent(results["base"]["replaced"])


def test_draws_of_backgrounds_agree(results):
    for scores in results.values():
        assert 0 < scores["replaced"]["std"]["map@r"] < 0.03
