"""Every notebook runs on another seed of the embedded model, and its exercises tell right answers from wrong ones."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import NamedTuple

import nbformat
import pytest
from nbformat.v4 import new_code_cell

from mi_utils import course

TESTS = Path(__file__).parent
NOTEBOOKS = course.list_notebooks(TESTS.parent / "notebooks")
CELL_TIMEOUT = 600

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)

MIN_EXERCISES, MIN_WRONG = 2, 2
ANSWER_CELL = re.compile(r"^answer_(\d+) = None", flags=re.MULTILINE)
SOLUTION = re.compile(r"<details>.*?```python\n(.*?)```.*?</details>", flags=re.DOTALL)
RIGHT = """{code}
assert "right." in check_{number}(answer_{number}), "the solution of exercise {number} does not pass"
"""
WRONG = """{code}
try:
    told = check_{number}(answer_{number})
except (AssertionError, ValueError) as error:  # the library refuses with a ValueError
    assert str(error), "the check of exercise {number} does not say what is wrong"
else:
    raise RuntimeError(f"a wrong answer to exercise {number} is told: {{told}}")
"""


class Exercise(NamedTuple):
    """An exercise of a notebook: its number, the code of its solution, and code of plausible wrong answers."""

    number: int
    solution: str | None
    wrong: list[str]


def exercises(path: Path) -> list[Exercise]:
    """The exercises of a notebook. A solution stands in the first text cell behind the answer's cell."""
    file = TESTS / "wrong_answers" / f"{path.stem.split('_')[0]}.toml"
    wrong = tomllib.loads(file.read_text()) if file.exists() else {}
    cells, found = nbformat.read(path, as_version=4).cells, []
    for cell, following in zip(cells, cells[1:], strict=False):
        for number in ANSWER_CELL.findall(cell.source) if cell.cell_type == "code" else ():
            solution = SOLUTION.search(following.source)
            found.append(Exercise(int(number), solution[1] if solution else None, wrong.get(number, [])))
    return found


@every_notebook
def test_every_exercise_has_a_solution_and_wrong_answers(path):
    found = exercises(path)
    assert [exercise.number for exercise in found] == list(range(1, len(found) + 1)) and len(found) >= MIN_EXERCISES
    assert [exercise.number for exercise in found if exercise.solution is None] == []
    assert [exercise.number for exercise in found if len(exercise.wrong) < MIN_WRONG] == []


def with_answers(path: Path) -> nbformat.NotebookNode:
    """The notebook with cells at its end that try every solution and every wrong answer."""
    nb = nbformat.read(path, as_version=4)
    for exercise in exercises(path):
        nb.cells.append(new_code_cell(RIGHT.format(code=exercise.solution, number=exercise.number)))
        nb.cells += [new_code_cell(WRONG.format(code=code, number=exercise.number)) for code in exercise.wrong]
    return nb


# ---------------------------------------------------------------- another seed of the embedded model


@pytest.fixture(scope="session")
def other_seed_run(tmp_path_factory):
    """Every notebook on another model, and then its exercises with right and wrong answers, in the same kernel."""
    folder = tmp_path_factory.mktemp("papermill")
    (folder / "notebooks").mkdir()
    for path in NOTEBOOKS:
        nbformat.write(with_answers(path), folder / "notebooks" / path.name)
    plan = course.plan_course(model="smallworld-seed1", output=folder / "build", folder=folder / "notebooks")
    return {entry.notebook: entry for entry in course.run_course(plan, timeout=CELL_TIMEOUT)}


@every_notebook
def test_it_runs_on_another_seed_of_the_embedded_model_and_its_exercises_check_themselves(path, other_seed_run):
    entry = other_seed_run[path.stem]
    assert entry.status == "done", f"{entry.status}: {entry.message}"
