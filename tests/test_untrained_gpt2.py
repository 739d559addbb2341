"""The technique notebooks on a hub model that has learned nothing: they say so, and nothing else goes wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import mutations
import pytest

from mi_utils import course

ROOT = Path(__file__).parents[1]
TECHNIQUES = [path for path in course.list_notebooks(ROOT / "notebooks") if path.stem[:2] >= "06"]


@pytest.fixture(scope="module")
def offline(hub_cache):
    return {"HF_HOME": str(hub_cache), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def runner(offline):
    with mutations.Runner(offline) as runner:
        yield runner


@pytest.mark.parametrize("path", TECHNIQUES, ids=lambda path: path.stem)
def test_an_untrained_gpt2_by_its_hub_name_is_said_not_to_know_the_task(path, runner, tmp_path):
    outcome = runner.run(path, tmp_path, model="gpt2-small")
    assert outcome.red == "ModelDoesNotKnowTask", f"{outcome.red} in cell {outcome.cell}: {outcome.message}"


def test_the_command_line_says_it_too(offline, tmp_path):
    command = [sys.executable, "-m", "mi_utils", "run", "08", "--model", "gpt2-small", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | offline, capture_output=True, text=True)
    (state,) = course.list_runs(tmp_path)
    (entry,) = state.entries.values()
    assert done.returncode == 1 and entry.status == "failed", done.stdout[-2000:]
    assert "ModelDoesNotKnowTask" in entry.message
