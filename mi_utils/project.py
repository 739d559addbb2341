"""A new project, made from the template that this package carries."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from mi_utils.compute import DISTRIBUTION, choose_tool, installed_from, known_shape

TEMPLATE = Path(__file__).parent / "template"
ANSWERS = ".copier-answers.yml"


class ProjectError(ValueError):
    """A project that cannot be made; nothing was written."""


@dataclass(frozen=True)
class NewProject:
    """What :func:`new_project` did: files written, and files that were there and were left as they were."""

    written: list[str]
    kept: list[str]


def new_project(directory: str | os.PathLike[str], answers: Mapping[str, Any]) -> NewProject:
    """Write a project from the template.

    No file that exists is changed. In a folder that already holds a project, missing files come back, with the answers
    recorded there.

    Args:
        directory: where to; made if it is not there.
        answers: to the template's questions (``template/copier.yml``); what is not given gets its default, ``tool``
            by the model's size.

    Raises:
        ProjectError: the directory is a file, an answer is unknown or not valid, or differs from the one recorded.
    """
    from copier import run_copy

    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise ProjectError(f"{directory} is a file, so no project can be made there. Name a folder.")
    given = {name: value for name, value in answers.items() if value is not None}
    if unknown := sorted(set(given) - set(questions())):
        raise ProjectError(f"The template does not ask for {', '.join(unknown)}. It asks for {', '.join(questions())}.")
    recorded = read_answers(directory)
    for name, value in given.items():
        if name in recorded and recorded[name] != value:
            raise ProjectError(
                f"{directory} holds a project made with {name} = {recorded[name]!r}, not {value!r}. To change that, "
                f"run `copier update --data {name}=…` in it."
            )
    given = {name: value for name, value in recorded.items() if name in questions()} | given
    if "model" in given and "tool" not in given:
        given["tool"] = tool_for(given["model"])
    before = _files(directory)
    try:
        run_copy(
            str(TEMPLATE), directory, data=given | _origin(directory), defaults=True, skip_if_exists=["*"], quiet=True
        )
    except ValueError as error:  # copier's own checks of the answers
        raise ProjectError(str(error)) from error
    after = _files(directory)
    return NewProject(sorted(after - before), sorted(before & _files_of_template(given)))


def questions() -> dict[str, Any]:
    """What the template asks: name to default. Defaults that depend on other answers are Jinja expressions."""
    import yaml

    asked = yaml.safe_load((TEMPLATE / "copier.yml").read_text(encoding="utf-8"))
    return {
        name: about["default"] for name, about in asked.items() if not name.startswith("_") and about.get("when", True)
    }


def read_answers(directory: Path) -> dict[str, Any]:
    """The answers that a project was made with; none where there is no project."""
    import yaml

    path = directory / ANSWERS
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}


def tool_for(model: str) -> str:
    """ "TransformerLens" or "nnsight", by the model's size; TransformerLens where the size is not known here."""
    shape = known_shape(model)
    return "nnsight" if shape and choose_tool(shape).tool != "TransformerLens" else "TransformerLens"


def _files(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


def _files_of_template(answers: Mapping[str, Any]) -> set[str]:
    names = {name.removesuffix(".jinja") for name in _files(TEMPLATE / "project")}
    return {ANSWERS if "answers_file" in name else name for name in names}


# ------------------------------------------------------------------------------------- where the package comes from


def _origin(directory: Path) -> dict[str, str]:
    """``source`` and ``commit`` for the template: whence pip installs this package, and `copier update` the template.

    A checkout is named by its path from the new project, because what runs here is what the project should get, also
    without a network. An installed package is named by its address and version.
    """
    checkout = TEMPLATE.parents[1]
    if (checkout / "pyproject.toml").is_file():
        return {"source": _path_from(directory, checkout), "commit": _git(checkout, "rev-parse", "HEAD")}
    version, installed = installed_from()
    commit = installed.get("vcs_info", {}).get("commit_id")
    if commit:
        return {"source": installed["url"], "commit": commit}
    addresses = metadata.metadata(DISTRIBUTION).get_all("Project-URL") or ()
    return {"source": dict(line.split(", ", 1) for line in addresses)["Repository"], "commit": f"v{version}"}


def _path_from(directory: Path, checkout: Path) -> str:
    try:
        return Path(os.path.relpath(checkout, directory.resolve())).as_posix()
    except ValueError:  # another drive (Windows)
        return checkout.as_posix()


def _git(checkout: Path, *arguments: str) -> str:
    """What git says; empty where this is no repository, as in an unpacked archive."""
    if not (checkout / ".git").exists():
        return ""
    command = ["git", "-C", str(checkout), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
