"""A new project from the template: its files, its questions, its own tests and notebooks, and its updates."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pip_index
import pytest
import yaml
from test_repository import ROOT, SLUG, pins
from typer.testing import CliRunner

from mi_utils import __main__ as cli
from mi_utils import course, project, read_runs
from mi_utils.study import Study

FILES = {
    ".copier-answers.yml", ".gitignore", "CLAUDE.md", "Makefile", "README.md", "environment.yml", "requirements.txt",
    "notebooks/01_environment_setup.ipynb", "notebooks/02_experiment_design.ipynb",
    "notebooks/03_implementation.ipynb", "notebooks/04_analysis.ipynb", "notebooks/05_validation.ipynb",
    "notebooks/measure.py", "notebooks/prompts.py", "tests/test_project.py",
}  # fmt: skip
VARIANTS = {
    "small, json": {"model": "smallworld", "tracking": "json"},
    "small, wandb": {"model": "gpt2-small", "tracking": "wandb"},
    "large, json": {"model": "llama-3.1-8b", "tracking": "json"},
    "large, wandb, training": {"model": "pythia-12b", "tracking": "wandb", "train_sae": True},
}
OFFLINE = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "GIT_CONFIG_GLOBAL": os.devnull}


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files(folder)}


def run(*command: str, cwd: Path, path: Path = ROOT) -> str:
    """Run a command without a network; returns what it printed."""
    environment = os.environ | OFFLINE | {"PYTHONPATH": str(path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=A Researcher", "-c", "user.email=researcher@example.org")
    return run("git", *identity, *arguments, cwd=folder).strip()


def commit(folder: Path, message: str) -> str:
    git(folder, "init", "--quiet")
    git(folder, "add", "-A")
    git(folder, "commit", "--quiet", "-m", message)
    return git(folder, "rev-parse", "HEAD")


# ---------------------------------------------------------------- four variants


@pytest.fixture(scope="module", params=VARIANTS)
def baked(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("baked") / "my-project"
    answers = VARIANTS[request.param]
    made = project.new_project(folder, {"name": "My project", "question": "Who reads what?"} | answers)
    assert (set(made.written), made.kept) == (FILES, [])
    return folder, answers


def test_exactly_the_expected_files_appear_and_nothing_is_left_to_fill_in(baked):
    folder, _ = baked
    assert files(folder) == FILES
    for name, raw in contents(folder).items():
        text = raw.decode()
        assert "{%" not in text and "{{" not in text, name
        assert text.endswith("\n") and not text.endswith("\n\n"), name


def test_dependencies_go_by_model_size_and_are_the_tested_versions(baked):
    folder, answers = baked
    lines = [line.split("#")[0].strip() for line in (folder / "requirements.txt").read_text().splitlines()]
    pinned = dict(line.split("==") for line in lines if "==" in line)
    assert pinned == {name: pins()[name] for name in pinned}
    large = answers["model"] in ("llama-3.1-8b", "pythia-12b")
    assert ("nnsight" in pinned, "transformer-lens" in pinned) == (large, not large)
    assert ("sae-lens" in pinned) == answers.get("train_sae", False)
    assert any(line.startswith("wandb") for line in lines) == (answers["tracking"] == "wandb")
    (package,) = [line.removeprefix("-e ").strip('"') for line in lines if line.startswith("-e ")]
    assert (folder / package).resolve() == ROOT, "offline the package comes from this checkout"


def test_its_code_is_clean(baked):
    folder, _ = baked
    config = ("--config", str(ROOT / "pyproject.toml"))
    for command in (("check", "--ignore", "I001"), ("format", "--check")):  # there mi_utils is a package like any other
        run(sys.executable, "-m", "ruff", *command, *config, "--no-cache", "notebooks/measure.py", "tests", cwd=folder)


def test_its_metadata_is_readable_and_names_the_project(baked):
    folder, answers = baked
    assert yaml.safe_load((folder / "environment.yml").read_text())["name"] == "my-project"
    recorded = yaml.safe_load((folder / ".copier-answers.yml").read_text())
    assert recorded.items() >= {"question": "Who reads what?", **answers}.items()
    for page in ("README.md", "CLAUDE.md"):
        assert "> Who reads what?" in (folder / page).read_text()
    for path in course.list_notebooks(folder / "notebooks"):
        nb = nbformat.read(path, as_version=4)
        nbformat.validate(nb)
        parameters = course.Notebook.read(path).parameters
        assert parameters["model"] == answers["model"]
        assert parameters.get("tracking", answers["tracking"]) == answers["tracking"]


def test_its_own_tests_pass_and_with_them_its_notebooks_run(baked, tmp_path):
    folder, answers = baked
    if project.tool_for(answers["model"]) == "nnsight" and find_spec("mi_utils.large") is None:
        pytest.skip("mi_utils.large is not there yet")
    before = contents(folder)
    run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'base'}", cwd=folder)
    assert contents(folder) == before, "running the tests changed the project"
    (saved,) = (tmp_path / "base").rglob("study.json")
    study = Study.load(saved)
    verdict = study.verdict()
    assert (study.question, study.hash is not None) == ("Who reads what?", True)
    assert verdict.status == "incomplete" and {"held_out", "seeds"} <= set(verdict.missing)
    assert [each["name"] for each in read_runs(saved.parents[2] / "runs")] == ["discovery", "validation"]


def test_the_requirements_of_all_variants_fit_together(tmp_path):
    lines = set()
    for number, answers in enumerate(VARIANTS.values()):
        project.new_project(tmp_path / str(number), answers)
        lines |= set((tmp_path / str(number) / "requirements.txt").read_text().splitlines())
    wanted = tmp_path / "requirements.txt"
    wanted.write_text("\n".join("mi-workbench" if line.startswith("-e ") else line for line in lines))
    python, index = pip_index.make_python(tmp_path / "env", {}), pip_index.make_index(tmp_path)
    added = pip_index.would_install(python, index, "-r", str(wanted))
    assert {"mi-workbench", "torch", "transformer-lens", "nnsight", "wandb", "pytest", "jupyterlab"} <= set(added)


def test_the_tests_of_a_project_refuse_a_notebook_that_claims_nothing(tmp_path):
    folder = tmp_path / "p"
    project.new_project(folder, {})
    path = folder / "notebooks" / "04_analysis.ipynb"
    nb = nbformat.read(path, as_version=4)
    for cell in nb.cells:
        cell.source = cell.source.replace("assert ", "_ = ")
    nbformat.write(nb, path)
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "claims and 04")
    with pytest.raises(AssertionError, match="fewer than 3 asserted claims"):
        run(*command, cwd=folder)


@pytest.mark.parametrize(
    "question",
    ["Why does it say \"so\", and 'why'?", "Où est l'« é »? 中文 😀", "a {{ b }} {% c %} {# d #} <e> & f", "x" * 300],
    ids=["quotes", "unicode", "braces", "long"],
)
def test_any_question_arrives_in_the_plan_as_it_was_asked(question, tmp_path):
    project.new_project(tmp_path / "p", {"question": question})
    nb = nbformat.read(tmp_path / "p" / "notebooks" / "02_experiment_design.ipynb", as_version=4)
    (cell,) = [cell for cell in nb.cells if "study = Study(" in cell.source]
    (call,) = [node for node in ast.walk(ast.parse(cell.source)) if getattr(node, "keywords", None)]
    asked = {keyword.arg: keyword.value for keyword in call.keywords}["question"]
    assert ast.literal_eval(asked) == question
    assert f"> {question}" in nb.cells[0].source


# ---------------------------------------------------------------- what is there stays


def test_a_second_bake_harms_nothing_and_brings_back_what_is_missing(tmp_path):
    folder = tmp_path / "p"
    project.new_project(folder, {"name": "first", "tracking": "wandb"})
    (folder / "notebooks" / "prompts.py").write_text("mine = True\n")
    (folder / "notes.txt").write_text("mine, too\n")
    mine = contents(folder)
    (folder / "Makefile").unlink()
    made = project.new_project(folder, {})
    assert made.written == ["Makefile"] and set(made.kept) == FILES - {"Makefile"}
    assert contents(folder) == mine
    with pytest.raises(project.ProjectError, match="tracking = 'wandb', not 'json'"):
        project.new_project(folder, {"tracking": "json"})
    assert contents(folder) == mine


def test_files_that_were_there_before_the_project_stay(tmp_path):
    (tmp_path / "README.md").write_text("An older readme.\n")
    made = project.new_project(tmp_path, {"name": "late"})
    assert made.kept == ["README.md"] and (tmp_path / "README.md").read_text() == "An older readme.\n"
    assert files(tmp_path) == FILES


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ({"tracking": "csv"}, "json"),
        ({"model": "a model"}, "Letters"),
        ({"question": " "}, "one line"),
        ({"question": "a\\b"}, "backslashes"),
        ({"question": "a\nb"}, "one line"),
        ({"name": "../up"}, "Letters"),
        ({"colour": "red"}, "does not ask for colour"),
    ],
)
def test_an_answer_that_is_no_good_is_refused_before_anything_is_written(answers, words, tmp_path):
    with pytest.raises(project.ProjectError, match=words):
        project.new_project(tmp_path / "p", answers)
    assert files(tmp_path) == set()


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "p").write_text("")
    with pytest.raises(project.ProjectError, match="is a file"):
        project.new_project(tmp_path / "p", {})


# ---------------------------------------------------------------- command line


def test_the_command_asks_for_what_is_not_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli.app, ["new-project", "p", "--tracking", "wandb"], input="\ngpt2-xl\nHow?\n")
    assert result.exit_code == 0 and result.output.count("]:") == 3, result.output
    assert f"{len(FILES)} files written to p" in result.output and str(tmp_path) not in result.output
    recorded = yaml.safe_load((tmp_path / "p" / ".copier-answers.yml").read_text())
    wanted = {"name": "p", "model": "gpt2-xl", "question": "How?", "tracking": "wandb", "tool": "TransformerLens"}
    assert recorded.items() >= wanted.items()


def test_with_defaults_it_asks_nothing_and_errors_are_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    invoke = CliRunner().invoke
    result = invoke(cli.app, ["new-project", "p", "--defaults"])
    assert result.exit_code == 0 and files(tmp_path / "p") == FILES, result.output
    again = invoke(cli.app, ["new-project", "p", "--defaults"])
    assert again.exit_code == 0 and "0 files written" in again.output and "Left as they were: .copier" in again.output
    wrong = invoke(cli.app, ["new-project", "q", "--defaults", "--tool", "hammer"])
    assert wrong.exit_code == 2 and wrong.output.startswith("Error:") and not (tmp_path / "q").exists()


# ---------------------------------------------------------------- copier on the repository, and updates


@pytest.fixture
def checkout(tmp_path):
    """A git checkout of the template, as the repository has it."""
    folder = tmp_path / "workbench"
    shutil.copytree(project.TEMPLATE, folder / "mi_utils" / "template", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("copier.yml", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    return folder, commit(folder, "First version")


def test_copier_makes_the_same_project_from_the_repository_itself(checkout, tmp_path):
    folder, revision = checkout
    answers = {"name": "p", "question": "How?", "model": "gpt2-xl", "tool": "TransformerLens"}
    options = [part for name, value in answers.items() for part in ("-d", f"{name}={value}")]
    run(sys.executable, "-m", "copier", "copy", "--defaults", *options, str(folder), "by-copier", cwd=tmp_path)
    project.new_project(tmp_path / "by-us", answers)
    theirs, ours = contents(tmp_path / "by-copier"), contents(tmp_path / "by-us")
    assert f"_commit: {revision}" in theirs.pop(".copier-answers.yml").decode()
    assert f'-e "{folder}"\n' in theirs.pop("requirements.txt").decode()
    assert theirs == {name: raw for name, raw in ours.items() if name in theirs} and len(ours) == len(theirs) + 2


def test_an_update_brings_the_newer_template_and_keeps_what_was_written(checkout, tmp_path, monkeypatch):
    workbench, first = checkout
    monkeypatch.setattr(project, "TEMPLATE", workbench / "mi_utils" / "template")
    folder = tmp_path / "p"
    project.new_project(folder, {"name": "p", "question": "How?"})
    mine = (folder / "README.md").read_text() + "\nWhat I found: nothing yet.\n"
    (folder / "README.md").write_text(mine)
    (folder / "notebooks" / "prompts.py").write_text("mine = True\n")
    commit(folder, "My project")
    assert f"_commit: {first}" in (folder / ".copier-answers.yml").read_text()

    source = workbench / "mi_utils" / "template" / "project"
    (source / "Makefile").write_text((source / "Makefile").read_text() + "\nclean:\n\trm -rf build/study\n")
    (source / "README.md.jinja").write_text("NEWER\n\n" + (source / "README.md.jinja").read_text())
    second = commit(workbench, "Second version")
    run(sys.executable, "-m", "copier", "update", "--defaults", "--vcs-ref", "HEAD", cwd=folder)
    assert "clean:" in (folder / "Makefile").read_text()
    assert (folder / "README.md").read_text() == "NEWER\n\n" + mine
    assert (folder / "notebooks" / "prompts.py").read_text() == "mine = True\n"
    recorded = yaml.safe_load((folder / ".copier-answers.yml").read_text())
    assert (recorded["_commit"], recorded["question"], recorded["_src_path"]) == (second, "How?", "../workbench")
    assert files(folder) - FILES == {name for name in files(folder) if name.startswith(".git/")}


# ---------------------------------------------------------------- from an installed package


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder as pip leaves it: the package built as a wheel and unpacked, without the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignored = shutil.ignore_patterns("assets", "__pycache__")
    shutil.copytree(ROOT / "mi_utils", source / "mi_utils", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = "from setuptools import build_meta; import sys; build_meta.build_wheel(sys.argv[1])"
    run(sys.executable, "-c", build, str(folder), cwd=source)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site-packages")
    shutil.rmtree(source)
    return folder / "site-packages"


def test_an_installed_package_makes_projects_that_name_its_address(installed, tmp_path):
    command = (sys.executable, "-m", "mi_utils", "new-project")
    run(*command, "p", "--defaults", cwd=tmp_path, path=installed)
    assert files(tmp_path / "p") == FILES
    (about,) = installed.glob("*.dist-info")
    version = about.name.split("-")[1].removesuffix(".dist")
    wanted = f"mi-workbench @ git+https://github.com/{SLUG}@v{version}"
    assert wanted in (tmp_path / "p" / "requirements.txt").read_text().splitlines()
    told = {"url": f"https://github.com/{SLUG}", "vcs_info": {"vcs": "git", "commit_id": "a" * 40}}
    (about / "direct_url.json").write_text(json.dumps(told))
    run(*command, "q", "--defaults", cwd=tmp_path, path=installed)
    assert f"git+https://github.com/{SLUG}@{'a' * 40}" in (tmp_path / "q" / "requirements.txt").read_text()
    recorded = yaml.safe_load((tmp_path / "q" / ".copier-answers.yml").read_text())
    assert (recorded["_src_path"], recorded["_commit"]) == (told["url"], "a" * 40)
