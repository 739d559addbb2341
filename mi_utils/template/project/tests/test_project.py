"""What must hold of this project: every notebook claims something that could fail, and all run from top to bottom."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest

from mi_utils import course, guard

# smallworld needs no network; name your own model here once your prompts no longer suit this one
TEST_MODEL = os.environ.get("TEST_MODEL", "smallworld")
NOTEBOOKS = course.list_notebooks(Path(__file__).parents[1] / "notebooks")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_claims_something(path):
    assert guard.hollow(nbformat.read(path, as_version=4), stored=False) == []


def test_all_run_from_top_to_bottom(tmp_path):
    output = tmp_path / "build" / "study" / "test"
    guard.run_in_one_kernel(NOTEBOOKS, model=TEST_MODEL, output=str(output))
    assert (output / "report.html").is_file()
