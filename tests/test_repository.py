"""What the repository says about itself: slug, badges, links, pins, commands, no trace of anyone's machine."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import tomllib
from pathlib import Path
from runpy import run_path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SLUG = PROJECT["project"]["urls"]["Repository"].removeprefix("https://github.com/")
COLAB = re.compile(r"https://colab\.research\.google\.com/github/([\w.-]+/[\w.-]+)/blob/main/([\w./-]+\.ipynb)")
INSTALL = re.compile(r"git\+https://github\.com/([\w.-]+/[\w.-]+?)(?:\.git)?(?=[\s\"'@]|$)")


def repository_files() -> list[Path]:
    """Files that are tracked, or would be added: what git ignores is nobody's business."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


FILES = repository_files()
NOTEBOOKS = [path for path in FILES if path.suffix == ".ipynb"]
PAGES = [path for path in FILES if path.suffix == ".md"]


def notebook_text(path: Path) -> str:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells)


# ---------------------------------------------------------------- slug, badges, install cells


def test_the_slug_has_the_right_form():
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", SLUG)


def test_the_slug_stands_in_the_metadata_and_the_citation_beside_badges_and_install_cells():
    others = [path for path in FILES if path not in PAGES + NOTEBOOKS and path.suffix not in (".safetensors", ".pt")]
    naming = [path.relative_to(ROOT).as_posix() for path in others if SLUG.encode() in path.read_bytes()]
    assert sorted(naming) == ["CITATION.cff", "pyproject.toml"]


@pytest.mark.parametrize("path", PAGES + NOTEBOOKS, ids=lambda path: path.name)
def test_badges_and_install_cells_name_this_repository(path):
    text = notebook_text(path) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")
    for slug, target in COLAB.findall(text):
        assert slug == SLUG
        assert (ROOT / target).is_file(), f"badge to {target}, which does not exist"
        if path.suffix == ".ipynb":
            assert target == path.relative_to(ROOT).as_posix(), "badge of another notebook"
    for slug in INSTALL.findall(text):
        assert slug == SLUG


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_every_notebook_has_a_badge(path):
    assert COLAB.search(notebook_text(path))


def test_readme_has_a_badge_for_every_notebook():
    linked = {target for _, target in COLAB.findall((ROOT / "README.md").read_text())}
    assert linked == {path.relative_to(ROOT).as_posix() for path in NOTEBOOKS}


def test_the_checks_see_a_foreign_slug():
    assert COLAB.search(f"https://colab.research.google.com/github/{SLUG}/blob/main/notebooks/01_a.ipynb")[1] == SLUG
    assert INSTALL.search('!pip install "mi @ git+https://github.com/some/fork.git"')[1] == "some/fork"


# ---------------------------------------------------------------- pins and ranges


def pins() -> dict[str, str]:
    lines = (line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    return dict(line.split("==") for line in lines if line)


def ranges() -> dict[str, Requirement]:
    project = PROJECT["project"]
    lines = project["dependencies"] + [line for extra in project["optional-dependencies"].values() for line in extra]
    return {requirement.name: requirement for requirement in map(Requirement, lines)}


@pytest.mark.parametrize(("name", "version"), pins().items())
def test_every_pin_lies_in_its_range(name, version):
    assert ranges()[name].specifier.contains(version)


def test_every_range_is_pinned():
    assert set(ranges()) == set(pins())


# ---------------------------------------------------------------- the order of the modules


def imported_modules(code: str) -> set[str]:
    """Modules of the package that a module's code imports, also inside functions, but not for its annotations alone."""
    tree = ast.parse(code)
    annotations = (
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    )
    found, left_out = set(), {id(node) for node in annotations}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and id(node) not in left_out and node.module:
            package, _, module = node.module.partition(".")
            if package == "mi_utils":
                found |= {module.split(".")[0]} if module else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("mi_utils.")}
    return found


def test_a_module_imports_only_from_those_before_it():
    rules = " ".join((ROOT / "CLAUDE.md").read_text(encoding="utf-8").split())
    listed = re.search(r"imports only from those before it: ([\w,; ]+) and the command line\.", rules)
    order = re.split(r"[,;] ", listed[1])
    modules = {path.stem: path for path in (ROOT / "mi_utils").glob("*.py") if not path.stem.startswith("__")}
    assert sorted(order) == sorted(modules)
    for number, name in enumerate(order):
        later = imported_modules(modules[name].read_text(encoding="utf-8")) & set(order[number:])
        assert not later, f"{name} imports {later}"


def test_imports_are_seen():
    code = """
if TYPE_CHECKING:
    from mi_utils.study import Study
import mi_utils.plots
from mi_utils.stats import max_statistic
def late():
    from mi_utils import models
"""
    assert imported_modules(code) == {"plots", "stats", "models"}


# ---------------------------------------------------------------- links and commands


def link_targets(path: Path) -> list[str]:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    return re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_relative_links_lead_somewhere(path):
    for target in link_targets(path):
        if not re.match(r"[a-z]+:|#", target):
            assert (path.parent / target.split("#")[0]).exists(), target


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_commands_in_pages_exist(path):
    from mi_utils.__main__ import app

    code = "\n".join(re.findall(r"```.*?```|`[^`\n]+`", path.read_text(encoding="utf-8"), flags=re.DOTALL))
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for target in re.findall(r"\bmake ([a-z]+)", code):
        assert target in targets, f"make {target}"
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    for command in re.findall(r"python -m mi_utils ([a-z-]+)", code):
        assert command in commands, f"python -m mi_utils {command}"


def test_the_readme_shows_the_picture_that_the_notebook_stores():
    picture = run_path(str(ROOT / "docs" / "outputs.py"))
    assert picture["PICTURE"].read_text(encoding="utf-8").strip() == picture["stored_picture"]().strip()
    assert f"]({picture['PICTURE'].relative_to(ROOT).as_posix()})" in (ROOT / "README.md").read_text(encoding="utf-8")


# ---------------------------------------------------------------- time and memory

MEASURE = run_path(str(ROOT / "docs" / "measure.py"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_states_the_time_and_memory_that_were_measured(path):
    cost = MEASURE["measured"]().get(path.stem)
    assert cost, f"never measured: .venv/bin/python docs/measure.py {path.name[:2]}"
    try:
        seconds, gigabytes = MEASURE["stated"](notebook_text(path))
    except ValueError as error:
        pytest.fail(str(error))
    assert 0.5 <= seconds / cost["seconds"] <= 2, f"stated {seconds} s, measured {cost['seconds']} s"
    assert 0.5 <= gigabytes / cost["gigabytes"] <= 2, f"stated {gigabytes} GB, measured {cost['gigabytes']} GB"


def test_the_readme_has_the_measured_costs_of_every_notebook():
    readme, costs = (ROOT / "README.md").read_text(encoding="utf-8"), MEASURE["measured"]()
    assert set(costs) == {path.stem for path in NOTEBOOKS}
    assert MEASURE["with_costs"](readme, costs) == readme, "make outputs writes them"
    assert len(re.findall(r" \d+ s, \d+\.\d GB \|", readme)) == len(NOTEBOOKS)


def test_costs_go_into_rows_with_and_without_their_column():
    link = "[![Open In Colab](badge)](target)"
    old, new = (
        f"| [01 A](notebooks/01_a.ipynb) | What. | {link} |",
        f"| [01 A](notebooks/01_a.ipynb) | What. | 9 s | {link} |",
    )
    for row in (old, new):
        filled = MEASURE["with_costs"](row, {"01_a": {"seconds": 31, "gigabytes": 0.84}})
        assert filled == f"| [01 A](notebooks/01_a.ipynb) | What. | 31 s, 0.8 GB | {link} |"


def test_what_a_notebook_states_is_read_and_vagueness_refused():
    assert MEASURE["stated"]("x\n\n**Time.** 40 seconds and 0.9 GB of memory.\n\n7 seconds") == (40, 0.9)
    for text in ("**Time.** A minute.\n\n40 seconds and 1 GB", "40 seconds and 1 GB", "**Time.** 40 seconds."):
        with pytest.raises(ValueError, match="state it as"):
            MEASURE["stated"](text)


def test_the_promised_files_are_there():
    names = "README.md LICENSE CLAUDE.md Makefile pyproject.toml requirements.txt environment.yml .ci/run".split()
    names += "CONTRIBUTING.md CITATION.cff CHANGELOG.md copier.yml .github/workflows/test.yml".split()
    pages = "tools techniques sae-guide visualization pitfalls repo-maintenance vocabulary compute-awareness".split()
    for name in [*names, *(f"references/{page}.md" for page in pages)]:
        assert (ROOT / name).is_file(), name


# ---------------------------------------------------------------- nobody's machine

MACHINE_PATH = re.compile(rb"(?<![\w.:/~-])/(?:home|Users|root|work|tmp|mnt)/[\w.-]+|[A-Z]:\\+Users\\+\w+")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_file_names_a_path_of_someones_machine(path):
    found = MACHINE_PATH.findall(path.read_bytes()) if path.suffix != ".safetensors" else []
    assert not found


def test_the_path_check_sees_one():
    assert MACHINE_PATH.search(b'File "' + b"/" + b'home/someone/x.py"')
    assert not MACHINE_PATH.search(b"https://example.org/home/page and ~/work/x")


def test_assets_stay_small():
    assets = [path for path in FILES if "assets" in path.parts]
    assert sum(path.stat().st_size for path in assets) < 40e6
