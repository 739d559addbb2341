"""The technique notebooks on a hub model that has learned nothing: they say so, and nothing else goes wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mi_utils import course

ROOT = Path(__file__).parents[1]
TECHNIQUES = [path for path in course.list_notebooks(ROOT / "notebooks") if path.stem[:2] >= "06"]


@pytest.mark.parametrize("path", TECHNIQUES, ids=lambda path: path.stem)
def test_an_untrained_gpt2_by_its_hub_name_is_said_not_to_know_the_task(path, hub_cache, tmp_path):
    command = [sys.executable, "-m", "mi_utils", "run", path.stem, "--model", "gpt2-small", "--output", str(tmp_path)]
    environment = os.environ | {"HF_HOME": str(hub_cache), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    (state,) = course.list_runs(tmp_path)
    entry = state.entries[path.stem]
    assert done.returncode == 1 and entry.status == "failed", done.stdout[-2000:]
    assert "ModelDoesNotKnowTask" in entry.message
