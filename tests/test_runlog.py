"""The log of runs: what goes in comes out, a kill costs one line at most, wandb only when asked."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from mi_utils import compute, runlog, stats


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setattr(compute, "environment", lambda: {"python": "3.11", "commit": None})


def test_runs_come_back_in_order(tmp_path):
    assert runlog.read_runs(tmp_path) == []
    path = runlog.log_run("first", {"model": "smallworld", "layers": [0, 1]}, {"effect": 0.5}, directory=tmp_path / "a")
    assert runlog.log_run("second", {}, {}, directory=tmp_path / "a") == path
    first, second = runlog.read_runs(tmp_path / "a")
    assert (first["name"], second["name"]) == ("first", "second")
    assert first["parameters"] == {"model": "smallworld", "layers": [0, 1]} and first["results"] == {"effect": 0.5}
    assert first["environment"]["python"] == "3.11" and first["at"].endswith("+00:00")


def test_numbers_of_other_libraries_and_estimates_become_plain(tmp_path):
    import torch

    results = {
        "numpy": np.float32(0.5), "torch": torch.tensor(2), "nan": float("nan"), "path": tmp_path,
        "estimate": stats.bootstrap_interval([1.0, 2.0, 2.0, 3.0]),
    }  # fmt: skip
    path = runlog.log_run("run", {}, results, directory=tmp_path)
    (run,) = runlog.read_runs(tmp_path)
    assert run["results"]["numpy"] == 0.5 and run["results"]["torch"] == 2 and run["results"]["nan"] is None
    assert run["results"]["estimate"]["value"] == 2.0 and run["results"]["estimate"]["n"] == 4
    assert "NaN" not in path.read_text()


def test_what_is_no_result_is_refused_and_named(tmp_path):
    with pytest.raises(ValueError, match=r"results\['cache'\]\['resid'\] is a ndarray"):
        runlog.log_run("run", {}, {"cache": {"resid": np.ones(3)}}, directory=tmp_path)
    with pytest.raises(ValueError, match="'json' or 'wandb'"):
        runlog.log_run("run", {}, {}, directory=tmp_path, tracking="wandbb")
    assert runlog.read_runs(tmp_path) == []


@pytest.mark.parametrize("half", ['{"name": "kil', '{"name": "\u00e9'])
def test_a_killed_write_costs_its_own_line_only(tmp_path, half):
    path = runlog.log_run("before", {}, {"text": "a\u2028b"}, directory=tmp_path)
    with path.open("ab") as file:
        file.write(half.encode()[:-1])
    runlog.log_run("after", {}, {}, directory=tmp_path)
    assert [run["name"] for run in runlog.read_runs(tmp_path)] == ["before", "after"]


def test_wandb_gets_the_same_record_when_asked(tmp_path, monkeypatch):
    seen = {}
    run = SimpleNamespace(log=lambda results: seen.update(results=results), finish=lambda: seen.update(done=True))
    fake = SimpleNamespace(init=lambda **given: seen.update(given) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    path = runlog.log_run(
        "run", {"seed": 1}, {"effect": 0.5}, directory=tmp_path, tracking="wandb", project="my-project"
    )
    assert (seen["project"], seen["name"]) == ("my-project", "run")
    assert seen["config"] == {"seed": 1} and seen["results"] == {"effect": 0.5} and seen["done"]
    assert json.loads(path.read_text())["results"] == seen["results"]


def test_wandb_that_is_not_there_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(RuntimeError, match="pip install wandb"):
        runlog.log_run("run", {}, {}, directory=tmp_path, tracking="wandb")
    assert runlog.read_runs(tmp_path) == []
