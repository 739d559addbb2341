"""Every notebook turns red when the library it stands on is broken. The table of faults and notebooks is printed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import mutations
import pytest

from mi_utils import course

TESTS = Path(__file__).parent
NOTEBOOKS = course.list_notebooks(TESTS.parent / "notebooks")
FIRST = [path for path in NOTEBOOKS if path.stem < "14"]  # the others: test_mutations_later.py, on the other worker
MIN_FAULTS = 3


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    """A folder with the notebooks, for each the results it finds there when its turn comes, and who runs them."""
    folder = tmp_path_factory.mktemp("mutations")
    shutil.copytree(TESTS.parent / "notebooks", folder / "notebooks", ignore=shutil.ignore_patterns(".*"))
    (folder / "before").mkdir()
    with mutations.Runner() as runner:
        yield SimpleNamespace(folder=folder, runner=runner)


def run(path: Path, studies: SimpleNamespace, fault: str | None) -> mutations.Outcome:
    """A notebook, after sound runs of those it needs."""
    notebook = course.Notebook.read(studies.folder / "notebooks" / path.name)
    before = studies.folder / "before" / path.stem
    if not before.exists():
        needed = course.predecessors(notebook)
        if needed:
            last = needed[-1].path
            assert not run(last, studies, None).red
            shutil.copytree(studies.folder / "after" / last.stem, before)
        else:
            before.mkdir()
    build = studies.folder / ("after" if fault is None else "work") / path.stem
    shutil.rmtree(build, ignore_errors=True)
    shutil.copytree(before, build)
    return studies.runner.run(notebook.path, build, fault)


def check(path: Path, studies: SimpleNamespace, record_property: Callable) -> None:
    """Every fault that applies to a notebook turns it red; the table's rows are recorded."""
    sound = run(path, studies, None)
    assert not sound.red, f"nothing is planted, and cell {sound.cell} is red: {sound.red}: {sound.message}"
    outcomes = {name: run(path, studies, name) for name in sound.reached}
    outcomes = {name: outcome for name, outcome in outcomes.items() if outcome.red or outcome.acted}
    record_property("mutations", {name: outcome.red for name, outcome in outcomes.items()})
    told = "\n".join(
        f"{name}: {each.red or 'SURVIVES'} (cell {each.cell}) {each.message}" for name, each in outcomes.items()
    )
    print(told)
    assert [name for name, outcome in outcomes.items() if not outcome.red] == [], told
    assert [name for name, outcome in outcomes.items() if outcome.red in ("runner", "crash")] == [], told
    assert len(outcomes) >= MIN_FAULTS, told


@pytest.mark.parametrize("path", FIRST, ids=lambda path: path.stem)
def test_every_fault_turns_it_red(path, studies, record_property):
    check(path, studies, record_property)
