"""Every notebook turns red when the library it stands on is broken. The table of faults and notebooks is printed."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import mutations
import nbformat
import nbval_figures  # noqa: F401  (how figures are compared)
import pytest
from nbval.plugin import IPyNbCell, coalesce_streams, get_sanitize_patterns, nocolors

from mi_utils import course
from mi_utils.guard import SKIPPING, SKIPPING_TAGS

TESTS = Path(__file__).parent
NOTEBOOKS = course.list_notebooks(TESTS.parent / "notebooks")
MIN_FAULTS = 3
# what nbval leaves out of a comparison
LEFT_OUT = ("metadata", "traceback", "prompt_number", "output_type", "name", "execution_count",
            "application/vnd.jupyter.widget-view+json", "image/png", "image/jpeg")  # fmt: skip
PATTERNS = dict(get_sanitize_patterns((TESTS / "nbval_sanitize.cfg").read_text()))


def differs_from_stored(cell: nbformat.NotebookNode, outputs: list[nbformat.NotebookNode]) -> str:
    """What nbval has to say of a cell's outputs; empty where they are those stored."""
    if SKIPPING.search(cell.source) or SKIPPING_TAGS & set(cell.metadata.get("tags", ())):
        return ""
    nbval = object.__new__(IPyNbCell)  # the comparison alone, without pytest's items around it
    nbval.parent = SimpleNamespace(skip_compare=LEFT_OUT, sanitize_patterns=PATTERNS)
    nbval.colors = nocolors
    nbval.format_output_compare = lambda key, ref, test: nbval.comparison_traceback.append(f"{key}: {ref!r}, {test!r}")
    same = nbval.compare_outputs(outputs, coalesce_streams(cell.outputs))
    return "" if same else "\n".join(nbval.comparison_traceback)


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    """A folder with the notebooks, and for each the results it finds there when its turn comes."""
    mutations.preload()
    folder = tmp_path_factory.mktemp("mutations")
    shutil.copytree(TESTS.parent / "notebooks", folder / "notebooks", ignore=shutil.ignore_patterns(".*"))
    (folder / "before").mkdir()
    return folder


def run(path: Path, studies: Path, fault: mutations.Fault | None) -> mutations.Outcome:
    """A notebook, after sound runs of those it needs."""
    notebook = course.Notebook.read(studies / "notebooks" / path.name)
    before = studies / "before" / path.stem
    if not before.exists():
        needed = course.predecessors(notebook)
        if needed:
            last = needed[-1].path
            assert not run(last, studies, None).red
            shutil.copytree(studies / "after" / last.stem, before)
        else:
            before.mkdir()
    build = studies / ("after" if fault is None else "work") / path.stem
    shutil.rmtree(build, ignore_errors=True)
    shutil.copytree(before, build)
    return mutations.run_notebook(notebook.path, build, fault, differs_from_stored)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_fault_turns_it_red(path, studies, record_property):
    sound = run(path, studies, None)
    assert not sound.red, f"nothing is planted, and cell {sound.cell} is red: {sound.red}: {sound.message}"
    outcomes = {name: run(path, studies, mutations.BY_NAME[name]) for name in sound.reached}
    outcomes = {name: outcome for name, outcome in outcomes.items() if outcome.red or outcome.acted}
    record_property("mutations", {name: outcome.red for name, outcome in outcomes.items()})
    told = "\n".join(
        f"{name}: {each.red or 'SURVIVES'} (cell {each.cell}) {each.message}" for name, each in outcomes.items()
    )
    print(told)
    assert [name for name, outcome in outcomes.items() if not outcome.red] == [], told
    assert [name for name, outcome in outcomes.items() if outcome.red in ("runner", "crash")] == [], told
    assert len(outcomes) >= MIN_FAULTS, told
