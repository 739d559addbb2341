"""Run the course's notebooks with papermill, resume what was cut short, and render pages to look at.

What a run leaves below the output folder (``build/`` unless told otherwise)::

    index.html                            every run: notebooks, titles, durations, states, verdict
    study/<model>-seed<seed>/             one run, see `study_folder`
        course.json                       which notebook is finished, and under what conditions
        notebooks/01_….ipynb, 01_….html   executed notebooks and their pages
        study.json, report.html, …        what the notebooks themselves saved
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mi_utils.pages import write_index, write_page

if TYPE_CHECKING:
    from nbformat import NotebookNode

RESERVED = ("model", "device", "seed", "output")  # set by options of their own, not by -p
STATE_FILE = "course.json"


class CourseError(ValueError):
    """A request that cannot be carried out; raised before any notebook starts."""


# ---------------------------------------------------------------- where things are


def find_root(start: Path | None = None) -> Path | None:
    """The nearest folder from `start` (default: the working directory) upwards that holds ``notebooks/``."""
    start = (start or Path.cwd()).resolve()
    return next((folder for folder in (start, *start.parents) if (folder / "notebooks").is_dir()), None)


def study_folder(model: str, seed: int, output: str | os.PathLike[str] | None = None) -> Path:
    """Folder in which the notebooks of one study save their results, made if it is not there.

    Kernels start in ``notebooks/``, Colab in a folder of its own. A relative path therefore counts from the
    repository's root, found from the working directory upwards, and from the working directory where there
    is no repository.

    Args:
        model, seed: the notebook's parameters; they name the folder where `output` does not.
        output: the notebook's parameter, set by `plan_course`; None means ``build/study/<model>-seed<seed>``.
    """
    path = Path("build", "study", run_name(model, seed)) if output is None else Path(output).expanduser()
    if not path.is_absolute():
        path = (find_root() or Path.cwd()) / path
    path.mkdir(parents=True, exist_ok=True)
    return path


def run_name(model: str, seed: int) -> str:
    """Folder name of a run: ``<model>-seed<seed>`` with only letters, digits, dot, dash and underscore.

    Names that had to be altered (hub ids, paths, ``random:…``) get a short hash, so that two never collide.
    """
    safe = re.sub(r"[^A-Za-z0-9._-]+", "_", model).strip("._") or "model"
    if safe != model:
        safe = f"{safe}-{_digest(model)[:6]}"
    return f"{safe}-seed{seed}"


# ---------------------------------------------------------------- notebooks and their parameters


@dataclass(frozen=True)
class Notebook:
    """A notebook file, read once.

    Attributes:
        path: the file.
        title: its first heading, or its name.
        parameters: names and default values of the cell tagged ``parameters``.
        needs: leading numbers or names of the notebooks whose results it builds on
            (metadata ``{"mi_utils": {"needs": ["02"]}}``).
        source_hash: hash of everything that is executed.
    """

    path: Path
    title: str
    parameters: dict[str, Any]
    needs: tuple[str, ...]
    source_hash: str

    @property
    def name(self) -> str:
        return self.path.stem

    @classmethod
    def read(cls, path: Path) -> Notebook:
        import nbformat

        nb = nbformat.read(path, as_version=4)
        code = [cell.source for cell in nb.cells if cell.cell_type == "code"]
        text = "\n".join(cell.source for cell in nb.cells if cell.cell_type == "markdown")
        heading = re.search(r"^#\s+(.+)$", text, flags=re.MULTILINE)
        needs = nb.metadata.get("mi_utils", {}).get("needs", [])
        title = re.sub(r"[*`$]", "", heading[1]).strip() if heading else path.stem
        return cls(path, title, _parameters(nb, path.name), tuple(needs), _digest(json.dumps(code)))


def _parameters(nb: NotebookNode, name: str) -> dict[str, Any]:
    cells = [cell for cell in nb.cells if "parameters" in cell.metadata.get("tags", [])]
    found: dict[str, Any] = {}
    for statement in ast.parse(cells[0].source).body if cells else ():
        targets = getattr(statement, "targets", None) or [getattr(statement, "target", None)]
        target = targets[0]
        if not isinstance(target, ast.Name):
            continue
        try:
            found[target.id] = ast.literal_eval(statement.value)
        except ValueError as error:
            raise CourseError(
                f"{name}: parameter {target.id!r} needs a literal default (number, string, list, None), "
                "because the default is read without running the notebook."
            ) from error
    return found


def list_notebooks(folder: Path) -> list[Path]:
    """Notebooks of a folder in the order of their names."""
    return sorted(path for path in folder.glob("*.ipynb") if not path.name.startswith("."))


def find_notebook(name: str, folder: Path) -> Path:
    """A notebook by number ("03"), name ("03_implementation") or path.

    Raises:
        CourseError: nothing, or more than one notebook, fits; the message lists those that are there.
    """
    direct = Path(name)
    if direct.suffix == ".ipynb" and direct.is_file():
        return direct.resolve()
    stem = Path(name).name.removesuffix(".ipynb")
    there = list_notebooks(folder)
    fits = [path for path in there if path.stem == stem] or [
        path for path in there if path.stem.split("_")[0] == (stem.zfill(2) if stem.isdigit() else stem)
    ]
    if len(fits) == 1:
        return fits[0]
    listing = ", ".join(path.stem for path in (fits or there)) or "none"
    problem = "is ambiguous" if fits else "is not there"
    raise CourseError(f"Notebook {name!r} {problem}. Notebooks in {folder.name}/: {listing}.")


def select(names: Sequence[str], folder: Path) -> list[Notebook]:
    """The named notebooks (all where none is named) in the order in which they have to run."""
    paths = [find_notebook(name, folder) for name in names] or list_notebooks(folder)
    if not paths:
        raise CourseError(f"No notebooks in {folder}.")
    chosen = {path: Notebook.read(path) for path in paths}
    return [chosen[path] for path in sorted(chosen, key=lambda path: path.name)]


def predecessors(notebook: Notebook) -> list[Notebook]:
    """Every notebook that this one builds on, directly or through another, in the order of their names."""
    found: dict[Path, Notebook] = {}
    waiting = [notebook]
    while waiting:
        current = waiting.pop()
        for name in current.needs:
            path = find_notebook(name, current.path.parent)
            if path == notebook.path:
                raise CourseError(f"{current.path.name} needs {name!r}, which leads back to {notebook.path.name}.")
            if path not in found:
                found[path] = Notebook.read(path)
                waiting.append(found[path])
    return [found[path] for path in sorted(found, key=lambda path: path.name)]


def parse_parameters(items: Sequence[str]) -> dict[str, Any]:
    """``["layer=9", "names=['a', 'b']"]`` as a dictionary: Python literals, anything else a string."""
    parsed: dict[str, Any] = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals or not name.isidentifier():
            raise CourseError(f"-p {item!r}: write it as name=value, for example -p n_prompts=16.")
        if name in RESERVED:
            raise CourseError(f"-p {item!r}: use the option --{name} for this one.")
        if name in parsed:
            raise CourseError(f"-p {name} is given twice.")
        try:
            parsed[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            parsed[name] = {"true": True, "false": False, "null": None}.get(text, text)
    return parsed


def check_parameters(given: dict[str, Any], notebooks: Sequence[Notebook]) -> None:
    """Refuse a parameter that none of the notebooks knows, or whose value has another type than the default.

    papermill itself only warns, and runs with the default.
    """
    for name, value in given.items():
        knowing = [notebook for notebook in notebooks if name in notebook.parameters]
        if not knowing:
            known = "\n".join(
                f"  {notebook.name}: {', '.join(notebook.parameters) or 'no parameters'}" for notebook in notebooks
            )
            raise CourseError(f"Unknown parameter {name!r}. Parameters there are:\n{known}")
        for notebook in knowing:
            default = notebook.parameters[name]
            if default is None or value is None:
                continue
            if isinstance(value, type(default)) and isinstance(value, bool) == isinstance(default, bool):
                continue
            if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
                continue
            raise CourseError(
                f"Parameter {name!r} of {notebook.name} is {type(default).__name__} (default {default!r}); "
                f"{value!r} is {type(value).__name__}."
            )


def check_model(name: str) -> Path | None:
    """Refuse a model that cannot be loaded, before a kernel starts. Returns its folder if it is a local one.

    Raises:
        CourseError: `name` is neither embedded, nor a folder with a ``config.json``, nor in the local hub
            cache, nor known to the hub; or the hub cannot be asked.
    """
    from mi_utils import models

    plain, _ = models.split_random(name, 0)
    embedded = ", ".join(sorted(models.embedded_names())) or "none here yet, `make train` makes them"
    go_on = f"Embedded models need no network: {embedded}."
    try:
        path = models.resolve(plain)
    except (ValueError, RuntimeError, OSError) as error:
        raise CourseError(f"Model {name!r}: {error}\n{go_on}") from error
    if Path(path).is_dir():
        if not (Path(path) / "config.json").is_file():
            raise CourseError(f"Model {name!r}: the folder {path} has no config.json, so it holds no model. {go_on}")
        return Path(path)
    return _check_hub(name, str(path), go_on)


def _absolute(model: str) -> str:
    """A local folder's full path, because the kernel starts in another folder; other names unchanged."""
    from mi_utils import models

    plain, _ = models.split_random(model, 0)
    if plain in models.embedded_names() or not Path(plain).is_dir() or Path(models.resolve(plain)) != Path(plain):
        return model
    return model.replace(plain, str(Path(plain).resolve()), 1)


def _check_hub(name: str, repo_id: str, go_on: str) -> None:
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        if isinstance(try_to_load_from_cache(repo_id, "config.json"), str):
            return
        if constants.HF_HUB_OFFLINE:
            raise CourseError(f"Model {name!r} is not in the local hub cache, and HF_HUB_OFFLINE=1 is set. {go_on}")
        HfApi().model_info(repo_id, timeout=5)
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise CourseError(
            f"There is no model {name!r}: it is not embedded, no folder has that name, and the Hugging Face "
            f"hub does not have it (or it is gated: log in with `hf auth login`). {go_on}"
        ) from error
    except CourseError:
        raise
    except Exception as error:  # the hub's client raises whatever its network library raises
        raise CourseError(
            f"Model {name!r} is neither embedded, nor a folder, nor in the hub cache, and the Hugging Face "
            f"hub cannot be reached ({type(error).__name__}: {error}). {go_on}"
        ) from error


# ---------------------------------------------------------------- state of a run


@dataclass
class Entry:
    """What is known about one notebook of a run. `status`: not run, running, done, failed or interrupted."""

    notebook: str
    title: str
    status: str
    key: str
    seconds: float = 0.0
    message: str = ""


@dataclass
class RunState:
    """The file ``course.json`` of a run.

    It is written whole and moved into place, so that a kill at any moment leaves it readable. A notebook
    killed without warning stays "running", which counts as unfinished.
    """

    folder: Path
    model: str
    seed: int
    updated: float = 0.0
    entries: dict[str, Entry] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, model: str, seed: int) -> RunState:
        path = folder / STATE_FILE
        return cls.read(path) if path.is_file() else cls(folder, model, seed)

    @classmethod
    def read(cls, path: Path) -> RunState:
        raw = json.loads(path.read_text(encoding="utf-8"))
        entries = {entry["notebook"]: Entry(**entry) for entry in raw["notebooks"]}
        return cls(path.parent, raw["model"], raw["seed"], raw["updated"], entries)

    def record(self, entry: Entry) -> None:
        self.entries[entry.notebook] = entry
        self.updated = time.time()
        self.folder.mkdir(parents=True, exist_ok=True)
        raw = {
            "model": self.model,
            "seed": self.seed,
            "updated": self.updated,
            "notebooks": [vars(self.entries[name]) for name in sorted(self.entries)],
        }
        partial = self.folder / f"{STATE_FILE}.partial"
        partial.write_text(json.dumps(raw, indent=1), encoding="utf-8")
        partial.replace(self.folder / STATE_FILE)

    def verdict(self) -> str | None:
        """What the run's saved study says, in words; None where no study was saved."""
        path = self.folder / "study.json"
        if not path.is_file():
            return None
        from mi_utils.study import Study

        try:
            return str(Study.load(path).verdict().status)
        except (ValueError, KeyError, RuntimeError) as error:
            return f"unreadable ({error})"

    def executed(self, notebook: str) -> Path:
        return self.folder / "notebooks" / f"{notebook}.ipynb"

    def is_done(self, notebook: str, key: str) -> bool:
        entry = self.entries.get(notebook)
        return bool(entry and entry.status == "done" and entry.key == key and self.executed(notebook).is_file())


def list_runs(build: Path) -> list[RunState]:
    """The runs below an output folder, the latest first."""
    states = [RunState.read(path) for path in build.glob(f"study/*/{STATE_FILE}")]
    return sorted(states, key=lambda state: state.updated, reverse=True)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _package_hash() -> str:
    """Hash of this package's own code: results of an older version of it count as unfinished."""
    return _code_hash(Path(__file__).parent, "**/*.py")


def _code_hash(folder: Path, pattern: str) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob(pattern)):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _model_stamp(folder: Path | None) -> list[tuple[str, int, int]]:
    """Names, sizes and times of a local model's files: results of other weights count as unfinished."""
    if folder is None:
        return []
    files = (path for path in sorted(folder.iterdir()) if path.is_file())
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]


# ---------------------------------------------------------------- planning and running


@dataclass(frozen=True)
class Step:
    """One notebook of a plan: what it is given, the key under which it counts as finished, whether it is."""

    notebook: Notebook
    parameters: dict[str, Any]
    key: str
    finished: bool


@dataclass(frozen=True)
class Plan:
    """What a run will do. Making it starts no kernel and writes nothing."""

    steps: list[Step]
    state: RunState
    build: Path
    fresh_start: bool


def plan_course(
    names: Sequence[str] = (),
    *,
    model: str | None = None,
    device: str | None = None,
    seed: int | None = None,
    output: str | os.PathLike[str] = "build",
    parameters: dict[str, Any] | None = None,
    fresh: bool = False,
    folder: Path | None = None,
) -> Plan:
    """Check a request and decide what has to run.

    Args:
        names: notebooks by number, name or path; none means all of them.
        model, device, seed: handed to the notebooks that have such a parameter; None leaves their default.
        output: folder below which everything is written; relative to the repository's root.
        parameters: further notebook parameters. Each must be known to at least one notebook of the plan.
        fresh: run the chosen notebooks even if they are finished. Where no notebook is named, the whole
            folder of this run is cleared first.
        folder: where the notebooks are; default ``notebooks/`` of the repository.

    Raises:
        CourseError: unknown notebook, parameter or model, or a value of the wrong type.
    """
    root = find_root(folder) if folder else find_root() or find_root(Path(__file__).parent)
    if folder is None:
        if root is None:
            raise CourseError("No notebooks/ folder here or above. Change into the repository first.")
        folder = root / "notebooks"
    build = Path(output).expanduser()
    build = build if build.is_absolute() else (root or Path.cwd()) / build

    chosen = select(names, folder)
    everything = {notebook.path: notebook for first in chosen for notebook in (*predecessors(first), first)}
    notebooks = [everything[path] for path in sorted(everything, key=lambda path: path.name)]
    options = {"model": model, "device": device, "seed": seed}
    given = {name: value for name, value in options.items() if value is not None} | (parameters or {})
    check_parameters(given, notebooks)

    defaults = {name: value for notebook in reversed(notebooks) for name, value in notebook.parameters.items()}
    if "model" in given:
        given["model"] = _absolute(given["model"])
    used_model = str(given.get("model", defaults.get("model", "none")))
    used_seed = int(given.get("seed", defaults.get("seed", 0)))
    loads_model = any("model" in notebook.parameters for notebook in notebooks)
    stamp = _model_stamp(check_model(used_model)) if loads_model else []

    state = RunState.open(build / "study" / run_name(used_model, used_seed), used_model, used_seed)
    # relative where it can be: the value is printed in every executed notebook
    at_home = root is not None and all(find_root(path.parent) == root for path in everything)
    inside = at_home and state.folder.is_relative_to(root)
    given["output"] = state.folder.relative_to(root).as_posix() if inside else str(state.folder)
    fresh_start = fresh and not names
    code = _package_hash() + _code_hash(folder, "*.py")  # with the modules that notebooks import from beside them
    keys: dict[Path, str] = {}
    done: dict[Path, bool] = {}
    steps = []
    asked = {notebook.path for notebook in chosen}
    for notebook in notebooks:
        own = {name: value for name, value in given.items() if name in notebook.parameters}
        before = [earlier.path for earlier in predecessors(notebook)]
        condition = [
            own,
            used_model,
            used_seed,
            notebook.source_hash,
            code,
            stamp,
            [keys[path] for path in before],
        ]
        keys[notebook.path] = key = _digest(json.dumps(condition, sort_keys=True, default=str))
        again = fresh_start or (fresh and notebook.path in asked)
        # a notebook whose predecessor runs anew has to run anew, too
        done[notebook.path] = not again and all(done[path] for path in before) and state.is_done(notebook.name, key)
        steps.append(Step(notebook, own, key, done[notebook.path]))
    return Plan(steps, state, build, fresh_start)


def run_course(
    plan: Plan, *, timeout: float | None = None, on_progress: Callable[[str, int, int], None] | None = None
) -> list[Entry]:
    """Execute a plan's unfinished notebooks in order, stopping at the first that fails.

    Args:
        plan: from `plan_course`.
        timeout: seconds a single cell may take; None for no limit.
        on_progress: called with (notebook name, finished cells, cells) after every cell.

    Returns:
        One entry a notebook of the plan. Those that were not reached have the status "not run".

    Raises:
        KeyboardInterrupt: after the state was saved and the page written; SIGTERM counts as an interrupt.
    """
    state = plan.state
    if plan.fresh_start and (state.folder / STATE_FILE).is_file():
        shutil.rmtree(state.folder)
        state.entries.clear()
    for step in plan.steps:
        if not step.finished:
            state.record(Entry(step.notebook.name, step.notebook.title, "not run", step.key))
    results: list[Entry] = []
    try:
        with _terminate_as_interrupt():
            for step in plan.steps:
                if step.finished:
                    results.append(state.entries[step.notebook.name])
                elif any(entry.status == "failed" for entry in results):
                    results.append(state.entries[step.notebook.name])
                else:
                    results.append(_run_step(step, state, timeout, on_progress))
    finally:
        write_index(plan.build, list_runs(plan.build))
    return results


def _run_step(
    step: Step, state: RunState, timeout: float | None, on_progress: Callable[[str, int, int], None] | None
) -> Entry:
    notebook = step.notebook
    target = state.executed(notebook.name)
    target.parent.mkdir(parents=True, exist_ok=True)
    for stale in (target, target.with_suffix(".html")):
        stale.unlink(missing_ok=True)
    entry = Entry(notebook.name, notebook.title, "running", step.key)
    state.record(entry)
    started = time.perf_counter()
    try:
        _execute(notebook.path, target, step.parameters, timeout, on_progress)
        _render(step, state)
        entry.status = "done"
    except KeyboardInterrupt:
        entry.status, entry.message = "interrupted", "stopped before it was finished"
        raise
    except Exception as error:  # whatever a notebook raises is that notebook's result, not ours
        entry.status, entry.message = "failed", _short(error)
        if target.is_file():
            _render(step, state)
    finally:
        entry.seconds = round(time.perf_counter() - started, 1)
        state.record(entry)
    return entry


def _render(step: Step, state: RunState) -> None:
    index = state.folder.parent.parent / "index.html"
    executed = state.executed(step.notebook.name)
    write_page(executed, title=step.notebook.title, source_folder=step.notebook.path.parent, index=index)


def _short(error: Exception) -> str:
    """The one line that says what went wrong in a notebook."""
    name = getattr(error, "ename", type(error).__name__)
    value = str(getattr(error, "evalue", error)).strip() or "no message"
    cell = getattr(error, "exec_count", None)
    place = f"cell [{cell}]: " if cell else ""
    return f"{place}{name}: {value.splitlines()[0]}"


@contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """Let SIGTERM end a run as Ctrl-C does: kernel stopped, state saved, page written."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _execute(
    source: Path,
    target: Path,
    parameters: dict[str, Any],
    timeout: float | None,
    on_progress: Callable[[str, int, int], None] | None,
) -> None:
    import papermill
    from papermill.engines import NBClientEngine, papermill_engines

    class ReportingEngine(NBClientEngine):
        """papermill's own engine, telling us about every finished cell."""

        @classmethod
        def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **kwargs: Any) -> Any:
            complete = nb_man.cell_complete

            def cell_complete(cell: Any, cell_index: int, **more: Any) -> None:
                complete(cell, cell_index=cell_index, **more)
                if on_progress:
                    on_progress(source.stem, cell_index + 1, len(nb_man.nb.cells))

            nb_man.cell_complete = cell_complete
            return super().execute_managed_notebook(nb_man, kernel_name, **kwargs)

    papermill_engines.register("mi_utils", ReportingEngine)
    papermill.execute_notebook(
        str(source),
        str(target),
        parameters=parameters,
        engine_name="mi_utils",
        kernel_name="python3",  # the one of this environment, whatever name was stored in the file
        cwd=str(source.parent),
        progress_bar=False,
        extra_arguments=["--IPKernelApp.log_level=40"],  # errors only: its warnings would tear the progress bar
        execution_timeout=timeout,
    )
