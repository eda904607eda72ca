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
    flags = {"contrastive-base": [], "contrastive-bgaugment": ["--bgaugment"],
             "untrained-base": ["--epochs", "0"]}
    started = [subprocess.Popen([sys.executable, ROOT / "bgbias.py", "--epochs", "4", "--device", "cpu", "--data",
                                 toy.parent, *more], cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"})
               for more in flags.values()]
    assert [run.wait() for run in started] == [0, 0, 0]
    base, bgaugment, untrained = (
        json.loads((folder / f"runs/toy-{name}-s42/result.json").read_text())["test"] for name in flags)
    return {"base": base, "bgaugment": bgaugment, "untrained": untrained}


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
