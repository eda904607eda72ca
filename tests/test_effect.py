"""The paper's effect on the toy set, through the command line: it must come from learning."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import bgbias
from conftest import ROOT

RUNS = {"base": [], "bgaugment": ["--bgaugment"], "untrained": ["--measure", "--embedding", "128"]}


@pytest.fixture(scope="module")
def results(tmp_path_factory, toy):
    """{run: {condition: MAP@R in %, one per draw; "fooled"; "report": its text}} of two shortened runs and the
    untrained network."""
    folder = tmp_path_factory.mktemp("effect")
    started = [subprocess.Popen([sys.executable, ROOT / "bgbias.py", "--epochs", "4", "--device", "cpu", "--data",
                                 toy.parent, "--runs", folder / name, *flags],
                                env={**os.environ, "OMP_NUM_THREADS": "1"}) for name, flags in RUNS.items()]
    assert [run.wait() for run in started] == [0, 0, 0]
    found = {}
    for name in RUNS:
        file, = folder.glob(f"{name}/*/result.json")
        result = json.loads(file.read_text())
        found[name] = {condition: [100 * draw["map@r"] for draw in draws]
                       for condition, draws in result["test"].items()}
        found[name]["fooled"] = [100 * share for share in result["fooled"]]
        found[name]["confused"] = [100 * share for share in result["confused"]]
        found[name]["report"] = bgbias.report(folder / name)
    return found


def test_base_relies_on_the_background(results):
    base = results["base"]
    assert np.mean(base["clean"]) - np.mean(base["replaced"]) > 20
    assert np.mean(base["clean"]) - np.mean(base["any_class"]) > 20  # also without any foreign background
    assert np.mean(base["background_only"]) > 30
    assert np.mean(base["fooled"]) > 5 + np.mean(base["confused"])  # by the query's own background


def test_bgaugment_reduces_the_bias(results):
    base, bgaugment = results["base"], results["bgaugment"]
    assert np.mean(bgaugment["replaced"]) - np.mean(base["replaced"]) > 10
    assert np.mean(bgaugment["query"]) - np.mean(base["query"]) > 10
    assert np.mean(bgaugment["any_class"]) - np.mean(base["any_class"]) > 10
    assert np.mean(bgaugment["background_only"]) < np.mean(base["background_only"])
    assert np.mean(bgaugment["fooled"]) < np.mean(base["fooled"])


def test_it_comes_from_learning(results):
    """An untrained network retrieves much worse on replaced backgrounds than either run."""
    assert np.mean(results["untrained"]["replaced"]) + 10 < np.mean(results["base"]["replaced"])


def test_draws_of_backgrounds_agree(results):
    for test in results.values():
        for condition in ("replaced", "any_class", "same_class"):
            assert len(test[condition]) == 5 and 0 < np.std(test[condition], ddof=1) < 3


def test_chance_is_that_of_random_rankings(results):
    """20,000 of them, with 19 right of 999 photos. Chance is the mean of 1,000 queries in five draws."""
    right = np.random.default_rng(0).permuted(np.tile(np.arange(999) < 19, (20_000, 1)), axis=1)[:, :19]
    scores = 100 * (right * right.cumsum(axis=1) / np.arange(1, 20)).mean(axis=1)
    chance = np.mean(results["base"]["chance"])
    assert abs(chance - scores.mean()) < 4 * scores.std() / 5000**0.5 < 0.25 * scores.mean()
    assert all(f"1,000 photos, chance {chance:.2g} %, data " in test["report"] for test in results.values())


def test_drop_is_a_number_if_the_network_has_learned(results):
    for test in (results["base"], results["bgaugment"]):
        assert f"| {100 * (1 - np.mean(test['replaced']) / test['clean'][0]):.2f} " in test["report"]
