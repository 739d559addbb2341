"""The first cell of every notebook, in an environment that imitates Colab's: its packages, its kernel, its Drive."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from runpy import run_path
from types import ModuleType

import nbformat
import pip_index
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from test_course import write_notebook
from test_repository import ROOT, SLUG, pins

from mi_utils import colab, course

NOTEBOOKS = course.list_notebooks(ROOT / "notebooks")
COLAB_HAS = dict(
    line.split("==") for line in (Path(__file__).parent / "colab_packages.txt").read_text().splitlines() if "==" in line
)
outputs = run_path(str(ROOT / "docs" / "outputs.py"))


def cell_of(path: Path) -> str:
    return outputs["colab_cell"](nbformat.read(path, as_version=4)).source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_first_code_cell_is_the_same_in_every_notebook_but_for_its_name(path):
    first = next(cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")
    assert first.metadata.get("tags") == ["colab"], "`python docs/outputs.py` writes the cell, `make outputs` does, too"
    assert first.source == cell_of(outputs["FIRST"]).replace(outputs["FIRST"].stem, path.stem)
    assert max(map(len, first.source.splitlines())) <= 120


# ---------------------------------------------------------------- what the cell does


class Shell:
    """As much of IPython as the cell uses; keeps the commands instead of running them."""

    def __init__(self, variables: dict):
        self.commands: list[str] = []
        self.variables = variables

    def system(self, command: str) -> None:
        self.commands.append(re.sub(r"\{(\w+)\}", lambda found: self.variables[found[1]], command))

    def run_line_magic(self, name: str, line: str) -> None:
        self.system(f"{name} {line}")


def run_cell(path: Path, **replaced: str) -> list[str]:
    """Run a notebook's first code cell; returns the commands that it would have given to the shell."""
    source = cell_of(path)
    for before, after in replaced.items():
        source = source.replace(f"{before} = False", f"{before} = {after}")
    variables: dict = {}
    shell = Shell(variables)
    variables["get_ipython"] = lambda: shell
    exec(TransformerManager().transform_cell(source), variables)
    return shell.commands


@pytest.fixture
def imitation(tmp_path, monkeypatch):
    """Colab's modules, and a checkout with three notebooks, each of which needs the one before."""
    module, drive = ModuleType("google.colab"), ModuleType("google.colab.drive")
    mounted: list[str] = []
    drive.mount, module.drive = mounted.append, drive
    monkeypatch.setitem(sys.modules, "google.colab", module)
    monkeypatch.setitem(sys.modules, "google.colab.drive", drive)
    home = tmp_path / "checkout"
    for number, name in enumerate(("01_first", "02_second", "03_third"), start=1):
        code = (
            f"from mi_utils.course import study_folder\nfolder = study_folder('none', seed, output)\n"
            f"(folder / '{name}').write_text('')\nassert {number} == 1 or any(folder.glob('0{number - 1}*'))"
        )
        needs = [f"{number - 1:02d}"] if number > 1 else []
        parameters = "seed = 0\noutput = None"
        write_notebook(home / "notebooks", name, code, parameters=parameters, needs=needs)
    monkeypatch.setattr(colab, "CHECKOUT", home)
    monkeypatch.setattr(colab, "DRIVE", tmp_path / "drive")
    monkeypatch.chdir(tmp_path)
    return home, tmp_path / "drive" / "MyDrive" / "mi-workbench", mounted


def test_elsewhere_the_cell_does_nothing(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert run_cell(NOTEBOOKS[0]) == []
    assert Path.cwd() == tmp_path and not any(tmp_path.iterdir())


def test_on_colab_the_cell_fetches_the_repository_and_installs_what_is_missing(imitation, monkeypatch):
    asked = []
    monkeypatch.setattr(colab, "prepare", lambda *arguments: asked.append(arguments))
    fetch, keep, install = run_cell(NOTEBOOKS[2])
    assert f"https://github.com/{SLUG} /content/mi-workbench" in fetch and fetch.startswith("test -d /content/")
    assert keep.startswith("pip list") and keep.endswith("> /content/mi-workbench/keep.txt")
    wanted = {name: pins()[name] for name in ("transformer-lens", "sae-lens", "nnsight", "circuitsvis")}
    assert dict(part.split("==") for part in install.split() if "==" in part) == wanted
    assert install.startswith("pip install -q -c /content/mi-workbench/keep.txt ")
    assert install.endswith(" /content/mi-workbench")
    assert not re.search(r"\s(-U|--upgrade|--force-reinstall|-e|torch|numpy|pandas)\b", install)
    assert asked == [(NOTEBOOKS[2].stem, False)]


def test_a_notebook_runs_alone_because_those_that_it_needs_run_first(imitation, capsys):
    home, _, mounted = imitation
    colab.prepare("03_third")
    assert Path.cwd() == home / "notebooks" and mounted == []
    folder = course.study_folder("none", 0)
    assert folder == home / "build" / "study" / "none-seed0"
    assert {"01_first", "02_second"} == {path.name for path in folder.glob("0*")}
    assert "First 01_first and 02_second" in capsys.readouterr().out
    colab.prepare("03_third")
    assert "First" not in capsys.readouterr().out, "what is finished is not run again"
    assert colab.RUNNING not in os.environ


def test_results_and_runs_go_to_the_drive_when_asked(imitation):
    _, drive, mounted = imitation
    colab.prepare("02_second", to_drive=True)
    assert mounted == [str(colab.DRIVE)] and Path.cwd() == drive
    folder = course.study_folder("none", 0)
    assert folder == drive / "build" / "study" / "none-seed0" and (folder / "01_first").is_file()
    from mi_utils import log_run

    assert log_run("a run", {}, {}).resolve() == drive / "build" / "runs" / "runs.jsonl"


def test_an_earlier_notebook_that_fails_is_named(imitation):
    home, _, _ = imitation
    write_notebook(home / "notebooks", "01_first", "raise ValueError('no luck')")
    with pytest.raises(RuntimeError, match="01_first failed: .*no luck"):
        colab.prepare("02_second")
    assert colab.RUNNING not in os.environ


@pytest.mark.parametrize(("there", "words"), [(True, "Runs on the GPU: Tesla T4"), (False, "Runs on the CPU")])
def test_a_gpu_is_picked_up(there, words, imitation, monkeypatch, capsys):
    from mi_utils import compute

    monkeypatch.setattr("torch.cuda.is_available", lambda: there)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda *which: "Tesla T4")
    colab.prepare("01_first")
    assert words in capsys.readouterr().out
    assert compute.pick_device().type == ("cuda" if there else "cpu"), "what notebooks with device = None run on"


# ---------------------------------------------------------------- what pip would change


@pytest.fixture(scope="module")
def colab_python(tmp_path_factory):
    """A Python with Colab's packages, and an index of what is installed here."""
    folder = tmp_path_factory.mktemp("colab")
    return pip_index.make_python(folder / "env", COLAB_HAS), pip_index.make_index(folder)


@pytest.fixture
def cell_install(imitation, monkeypatch, colab_python, tmp_path):
    """The arguments of the cell's pip install, with the constraints that its shell command writes."""
    monkeypatch.setattr(colab, "prepare", lambda *arguments: None)
    _, keep, install = run_cell(NOTEBOOKS[0])
    pattern = re.search(r'grep -E "([^"]+)"', keep)[1]
    listed = pip_index.pip(colab_python[0], "list", "--format=freeze").stdout.splitlines()
    constraints = tmp_path / "keep.txt"
    constraints.write_text("\n".join(line for line in listed if re.search(pattern, line)))
    parts = install.replace("/content/mi-workbench/keep.txt", str(constraints)).removeprefix("pip install -q ").split()
    return [part if part != "/content/mi-workbench" else pip_index.PROJECT["name"] for part in parts], constraints


def test_the_installation_changes_none_of_colabs_packages(colab_python, cell_install):
    arguments, constraints = cell_install
    kept = {line.split("==")[0] for line in constraints.read_text().splitlines()}
    assert kept == {"torch", "torchvision", "numpy", "pandas", "ipython", "ipykernel", "ipywidgets"}
    added = pip_index.would_install(*colab_python, *arguments)
    assert {"mi-workbench", "transformer-lens", "sae-lens", "nnsight", "copier"} <= set(added)
    assert set(added) & set(COLAB_HAS) == set()


def test_an_installation_that_would_change_torch_is_refused(colab_python, cell_install):
    arguments, _ = cell_install
    with pytest.raises(RuntimeError, match="torch"):
        pip_index.would_install(*colab_python, *arguments, f"torch=={pins()['torch']}")
