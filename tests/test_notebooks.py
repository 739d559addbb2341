"""Every notebook reproduces its stored outputs and is not hollow. For other seeds see `test_exercises.py`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from mi_utils import course, guard

ROOT = Path(__file__).parents[1]
TESTS = Path(__file__).parent
NOTEBOOKS = course.list_notebooks(ROOT / "notebooks")
CASE_STUDY = ["00", "01", "02", "03", "04", "05"]
CELL_TIMEOUT = 600

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_the_case_study_is_complete():
    assert [path.stem.split("_")[0] for path in NOTEBOOKS[: len(CASE_STUDY)]] == CASE_STUDY


# ---------------------------------------------------------------- stored outputs


def run_nbval(folder: Path, report: Path) -> tuple[dict[str, list[str]], set[str], str]:
    """Run a folder's notebooks in order under nbval.

    Returns:
        Failures of each notebook, the notebooks whose cells ran, and nbval's own account.
    """
    command = [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env", "-p", "nbval_figures"]
    command += ["--nbval-sanitize-with", str(TESTS / "nbval_sanitize.cfg")]
    command += ["--nbval-cell-timeout", str(CELL_TIMEOUT), "--nbval-kernel-startup-timeout", "120"]
    command += ["-q", "-p", "no:cacheprovider", f"--junitxml={report}", f"--rootdir={folder}", "-c", os.devnull]
    command += [str(path) for path in course.list_notebooks(folder)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(TESTS), str(ROOT)))}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    failures: dict[str, list[str]] = {}
    seen: set[str] = set()
    for case in ElementTree.parse(report).iter("testcase"):
        (name,) = re.findall(r"([^./]+)\.ipynb", case.get("classname"))
        seen.add(name)
        problems = [child for child in case if child.tag in ("failure", "error")]
        failures.setdefault(name, []).extend(f"{case.get('name')}: {child.text}" for child in problems)
    return failures, seen, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.fixture(scope="session")
def nbval_run(tmp_path_factory):
    """One nbval process for all notebooks, in a copy: they write results for one another below ``build/``."""
    folder = tmp_path_factory.mktemp("nbval")
    shutil.copytree(ROOT / "notebooks", folder / "notebooks", ignore=shutil.ignore_patterns(".*"))
    return run_nbval(folder / "notebooks", folder / "report.xml")


@every_notebook
def test_stored_outputs_are_reproduced(path, nbval_run):
    failures, seen, account = nbval_run
    assert path.stem in seen, f"nbval did not run {path.name}\n{account}"
    assert not failures[path.stem], "\n".join(failures[path.stem])


# ---------------------------------------------------------------- the guard against hollow notebooks

REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]


def hollow(nb: nbformat.NotebookNode) -> list[str]:
    return guard.hollow(nb, own_address=REPOSITORY)


@every_notebook
def test_it_is_not_hollow(path):
    assert hollow(nbformat.read(path, as_version=4)) == []


def sound_notebook() -> nbformat.NotebookNode:
    sources = ["import math", "x = math.sqrt(4)\nx", "assert x == 2", "assert x > 1\nassert abs(x) < 3"]
    cells = [new_code_cell(source, execution_count=count) for count, source in enumerate(sources, start=1)]
    cells[1].outputs = [new_output("execute_result", {"text/plain": "2.0"}, execution_count=2)]
    return new_notebook(cells=[new_markdown_cell("# Title"), *cells])


def test_the_guard_passes_a_sound_notebook():
    assert hollow(sound_notebook()) == []


def break_error(nb):
    nb.cells[1].outputs = [new_output("error", ename="ValueError", evalue="x", traceback=[])]


def break_null_count(nb):
    nb.cells[2].execution_count = None


def break_order(nb):
    nb.cells[2].execution_count, nb.cells[3].execution_count = 3, 2


def break_gap(nb):
    nb.cells[4].execution_count = 9


def break_claims(nb):
    nb.cells[4].source = "x"


def break_claims_by_constants(nb):
    nb.cells[4].source = "assert True\nassert (x > 1, 'always true')"


def break_claims_by_text(nb):
    nb.cells[4].source = "# assert x > 1\n'assert x < 3'"


def break_outputs(nb):
    nb.cells[2].outputs = []


def break_skips(nb):
    for cell in nb.cells[1:]:
        cell.source = "# NBVAL_IGNORE_OUTPUT\n" + cell.source


def break_skips_by_tags(nb):
    for cell in nb.cells[1:]:
        cell.metadata["tags"] = ["nbval-skip"]


def break_raises(nb):
    nb.cells[1].metadata["tags"] = ["raises-exception"]


def break_raises_by_comment(nb):
    nb.cells[1].source = "# NBVAL_RAISES_EXCEPTION\n" + nb.cells[1].source


def break_length(nb):
    nb.cells[1].source = "\n".join(["import math"] * (guard.MAX_LINES + 1))


def break_address(nb):
    nb.cells[1].source = "url = 'https://example.org/data.json'"


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (break_error, "stored error"),
        (break_null_count, "execution counts"),
        (break_order, "execution counts"),
        (break_gap, "execution counts"),
        (break_claims, "asserted claims"),
        (break_claims_by_constants, "asserted claims"),
        (break_claims_by_text, "asserted claims"),
        (break_outputs, "no stored output"),
        (break_skips, "skipped or ignored"),
        (break_skips_by_tags, "skipped or ignored"),
        (break_raises, "may raise"),
        (break_raises_by_comment, "may raise"),
        (break_length, "a cell of 41 lines"),
        (break_address, "names https://example.org/data.json"),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_the_guard_sees_a_hollow_notebook(spoil, expected):
    nb = sound_notebook()
    spoil(nb)
    (problem,) = hollow(nb)
    assert expected in problem


def test_sources_in_comments_and_the_own_repository_may_be_named():
    nb = sound_notebook()
    nb.cells[1].source = f"# after https://arxiv.org/abs/2211.00593\n%pip install git+{REPOSITORY}"
    assert hollow(nb) == []


# ---------------------------------------------------------------- nbval itself, as it is set up here


def test_nbval_sees_changed_words_and_lengths_but_not_digits_of_figures(tmp_path):
    def notebook(name: str, text: str, figure: dict) -> None:
        source = (
            "from IPython.display import display\nprint('answer 42')\n"
            "figure = {'data': [{'y': [0.5, 1.25]}], 'layout': {'a': 'x'}}\n"
            "display({'application/vnd.plotly.v1+json': figure}, raw=True)"
        )
        cell = new_code_cell(source, execution_count=1)
        cell.outputs = [
            new_output("stream", name="stdout", text=text),
            new_output("display_data", {"application/vnd.plotly.v1+json": figure}),
        ]
        nbformat.write(new_notebook(cells=[cell]), tmp_path / f"{name}.ipynb")

    def figure(values: list, word: str = "x") -> dict:
        return {"data": [{"y": values}], "layout": {"a": word}}

    notebook("same", "answer 42\n", figure([0.5, 1.25]))
    notebook("digits", "answer 42\n", figure([0.5000001, 1.25]))
    notebook("text", "answer 43\n", figure([0.5, 1.25]))
    notebook("length", "answer 42\n", figure([0.5]))
    notebook("word", "answer 42\n", figure([0.5, 1.25], word="y"))
    failures, seen, account = run_nbval(tmp_path, tmp_path / "report.xml")
    failed = {name for name in seen if failures[name]}
    assert seen == {"same", "digits", "text", "length", "word"}, account
    assert failed == {"text", "length", "word"}, account
