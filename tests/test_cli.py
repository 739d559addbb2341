"""The command line, as a reader types it."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
from test_course import write_notebook
from typer.testing import CliRunner

from mi_utils import __main__ as cli
from mi_utils import course


@pytest.fixture
def command_line(tmp_path, monkeypatch):
    """Run a command in a repository of its own with one notebook; returns exit status and output."""
    write_notebook(tmp_path / "notebooks", "03_implementation", "print(layer)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(course, "_package_hash", lambda: "frozen")
    monkeypatch.setattr(cli.console, "width", 200, raising=False)

    def call(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(cli.app, list(arguments))
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, " ".join(result.output.split())

    return call


def test_help_is_quick_and_names_every_command():
    # torch takes seconds to import; help must not
    code = "import sys, mi_utils.__main__ as cli; assert 'torch' not in sys.modules and 'papermill' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    output = CliRunner().invoke(cli.app, ["--help"]).output
    commands = ("run", "doctor", "evaluate", "features", "estimate", "new-project", "runs")
    assert all(command in output for command in commands)


def test_run_reports_and_writes_the_page(command_line, tmp_path):
    status, output = command_line("run", "03", "-p", "layer=9", "--seed", "4")
    assert status == 0, output
    assert "03_implementation" in output and "done" in output and "index.html" in output
    assert (tmp_path / "build" / "index.html").is_file()
    status, output = command_line("run", "03", "-p", "layer=9", "--seed", "4")
    assert status == 0 and "finished earlier" in output
    status, output = command_line("runs")
    assert status == 0 and "none, seed 4" in output and "1 of 1" in output


def test_a_failing_notebook_gives_a_failing_status(command_line, tmp_path):
    write_notebook(tmp_path / "notebooks", "04_analysis", "assert layer == 2, 'wrong layer'")
    status, output = command_line("run")
    assert status == 1 and "AssertionError: wrong layer" in output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "99"], ["'99'", "03_implementation"]),
        (["run", "03", "-p", "layr=9"], ["'layr'", "seed, output, layer"]),
        (["run", "03", "-p", "layer"], ["name=value"]),
        (["run", "03", "-p", "seed=2"], ["--seed"]),
        (["run", "--model", "smallworld"], ["'model'", "03_implementation"]),
    ],
)
def test_a_request_that_cannot_be_met_is_an_error_before_anything_runs(command_line, tmp_path, arguments, words):
    status, output = command_line(*arguments)
    assert status == 2
    assert all(word in output for word in words), output
    assert not (tmp_path / "build").exists()


def test_an_unknown_model_is_a_clear_error(command_line, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("mi_utils.models.embedded_names", lambda: ["smallworld"])
    write_notebook(tmp_path / "notebooks", "04_analysis", parameters='model = "smallworld"\noutput = "x"')
    status, output = command_line("run", "04", "--model", "no-such-model")
    assert status == 2 and "no-such-model" in output and "smallworld" in output and "Traceback" not in output


def test_runs_without_any_run_says_so(command_line):
    status, output = command_line("runs")
    assert status == 0 and "No course run" in output


def test_runs_lists_and_compares_studies(command_line, tmp_path, monkeypatch):
    from test_study import filled

    monkeypatch.setattr("mi_utils.study._environment", lambda: {"commit": "c0ffee"})
    filled().save(tmp_path / "build" / "study" / "one" / "study.json")
    filled(seeds=0.1).save(tmp_path / "build" / "study" / "two" / "study.json")
    status, output = command_line("runs")
    assert status == 0 and "study/one/study" in output and "not supported" in output and "p seeds" in output
    status, output = command_line("runs", "one", "two")
    assert status == 0 and "p seeds >= 0.5" in output and "holds" in output and "fails" in output
    status, output = command_line("runs", "one", "three")
    assert status == 2 and "study/two/study" in output


def test_estimate_prints_memory_and_tool(command_line):
    status, output = command_line("estimate", "gpt2-small", "--batch", "8")
    assert status == 0 and "124" in output and "iB" in output and "TransformerLens" in output


@pytest.mark.parametrize("option", [["--dtype", "float3"], ["--task", "dream"]])
def test_estimate_refuses_what_it_does_not_know(command_line, option):
    status, output = command_line("estimate", "gpt2-small", *option)
    assert status == 2 and option[1] in output


def test_doctor_is_green_here(command_line):
    status, output = command_line("doctor", "--device", "cpu")
    assert status == 0, output
    assert "transformer-lens" in output and "Canary smallworld" in output


def test_doctor_is_red_when_the_numbers_differ(command_line, monkeypatch):
    monkeypatch.setattr("mi_utils.models.embedded_names", lambda: ["smallworld"])
    monkeypatch.setattr("mi_utils.models.check_canary", lambda name, device, dtype: 0.5)
    status, output = command_line("doctor", "--device", "cpu")
    assert status == 1 and "wrong numbers" in output


def test_doctor_is_red_when_a_version_is_out_of_range(command_line, monkeypatch):
    monkeypatch.setattr("importlib.metadata.requires", lambda name: ["numpy>=999"])
    monkeypatch.setattr(cli, "_check_machine", lambda device, dtype: True)
    status, output = command_line("doctor")
    assert status == 1 and "numpy" in output and "wrong" in output


def test_evaluate_fails_below_a_bar(command_line, monkeypatch):
    asked = []
    behaviours = SimpleNamespace(main=lambda names: asked.append(list(names)))
    monkeypatch.setitem(sys.modules, "mi_utils.smallworld.evaluate", behaviours)
    monkeypatch.setattr("mi_utils.smallworld.evaluate", behaviours, raising=False)
    status, _ = command_line("evaluate", "smallworld-seed1")
    assert status == 1 and asked == [["smallworld-seed1"]]


def test_features_fails_below_its_bar_and_refuses_what_it_does_not_know(command_line, monkeypatch):
    asked = []
    monkeypatch.setattr("mi_utils.concepts.main", lambda model, saes: asked.append((model, list(saes))))
    status, _ = command_line("features", "--sae", "a", "--sae", "b")
    assert status == 1 and asked == [("smallworld", ["a", "b"])]

    def refuse(model, saes):
        raise ValueError(f"No dictionary ships for {model}.")

    monkeypatch.setattr("mi_utils.concepts.main", refuse)
    status, output = command_line("features", "--model", "smallworld-seed1")
    assert status == 2 and "No dictionary ships for smallworld-seed1." in output


def test_ctrl_c_says_how_to_go_on(command_line, monkeypatch):
    def interrupted(plan, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(course, "run_course", interrupted)
    status, output = command_line("run")
    assert status == 130 and "first unfinished" in output
