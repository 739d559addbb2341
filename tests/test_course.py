"""The course runner, on small notebooks made on the spot."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from mi_utils import course

PARAMETERS = "seed = 0\noutput = None\nlayer = 1"


def write_notebook(folder: Path, name: str, *cells: str, parameters: str = PARAMETERS, needs=()) -> Path:
    """A notebook with a title, a parameters cell and the given code cells."""
    folder.mkdir(parents=True, exist_ok=True)
    nb = new_notebook(cells=[new_markdown_cell(f"# Title of {name}")])
    if parameters:
        nb.cells.append(new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    nb.cells += [new_code_cell(source) for source in cells]
    nb.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nb.metadata["mi_utils"] = {"needs": list(needs)}
    path = folder / f"{name}.ipynb"
    nbformat.write(nb, path)
    return path


@pytest.fixture(autouse=True)
def frozen_code(monkeypatch):
    """Editing the package while its tests run must not make finished notebooks unfinished."""
    monkeypatch.setattr(course, "_package_hash", lambda: "frozen")


@pytest.fixture
def notebooks(tmp_path: Path) -> Path:
    return tmp_path / "notebooks"


def write_trace(name: str) -> str:
    """Code that appends a line to a file, so that a test sees which notebooks really ran."""
    return (
        "from mi_utils.course import study_folder\n"
        f"with open(study_folder('none', 0, output) / 'trace.txt', 'a') as file:\n    file.write('{name} ')"
    )


def traced(plan: course.Plan) -> list[str]:
    path = plan.state.folder / "trace.txt"
    return path.read_text().split() if path.is_file() else []


# ---------------------------------------------------------------- names, parameters, folders


def test_notebooks_are_found_by_number_name_and_path(notebooks):
    path = write_notebook(notebooks, "03_implementation")
    write_notebook(notebooks, "04_analysis")
    for name in ("03", "3", "03_implementation", "03_implementation.ipynb", str(path)):
        assert course.find_notebook(name, notebooks) == path


def test_an_unknown_notebook_lists_those_there_are(notebooks):
    write_notebook(notebooks, "03_implementation")
    with pytest.raises(course.CourseError, match="'99'.*03_implementation"):
        course.plan_course(["99"], folder=notebooks)


def test_an_unknown_parameter_names_the_notebooks_parameters(notebooks):
    write_notebook(notebooks, "03_implementation")
    with pytest.raises(course.CourseError, match="(?s)'layr'.*03_implementation: seed, output, layer"):
        course.plan_course(["03"], folder=notebooks, parameters={"layr": 9})


def test_a_parameter_of_the_wrong_type_is_refused(notebooks):
    write_notebook(notebooks, "03_implementation")
    with pytest.raises(course.CourseError, match="is int.*'nine' is str"):
        course.plan_course(["03"], folder=notebooks, parameters={"layer": "nine"})
    with pytest.raises(course.CourseError, match="is int.*True is bool"):
        course.plan_course(["03"], folder=notebooks, parameters={"layer": True})


def test_a_local_model_is_named_in_full_also_with_random_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "gpt2-small").mkdir()  # a folder of that name is not meant
    assert course._absolute("random:./mine:3") == f"random:{tmp_path / 'mine'}:3"
    assert course._absolute("./mine") == str(tmp_path / "mine")
    assert [course._absolute(name) for name in ("gpt2-small", "smallworld")] == ["gpt2-small", "smallworld"]


def test_a_default_that_cannot_be_read_is_refused(notebooks):
    write_notebook(notebooks, "03_implementation", parameters="layer = 1 + len('a')")
    with pytest.raises(course.CourseError, match="literal default"):
        course.plan_course(["03"], folder=notebooks)


@pytest.mark.parametrize(
    ("items", "parsed"),
    [
        (["layer=9"], {"layer": 9}),
        (["a=[1, 'x']", "b=text", "c=true", "d=x=y"], {"a": [1, "x"], "b": "text", "c": True, "d": "x=y"}),
    ],
)
def test_parameters_are_parsed(items, parsed):
    assert course.parse_parameters(items) == parsed


@pytest.mark.parametrize("items", [["layer"], ["9=layer"], ["seed=3"], ["layer=1", "layer=2"]])
def test_malformed_parameters_are_refused(items):
    with pytest.raises(course.CourseError):
        course.parse_parameters(items)


def test_run_names_are_safe_and_never_collide():
    names = ["smallworld", "a/b", "a:b", "a_b", "random:smallworld:3", "./a_b"]
    folders = [course.run_name(name, 0) for name in names]
    assert folders[0] == "smallworld-seed0"
    assert len(set(folders)) == len(names)
    assert all(re.fullmatch(r"[\w.-]+", folder) for folder in folders)


def test_relative_output_counts_from_the_repository(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    assert course.study_folder("none", 0, "build/here") == tmp_path / "build" / "here"
    monkeypatch.chdir(tmp_path)
    assert course.study_folder("none", 0, "build/here") == tmp_path / "build" / "here"
    assert course.study_folder("none", 0, tmp_path / "elsewhere") == tmp_path / "elsewhere"


def test_the_runner_and_a_notebook_run_alone_use_the_same_folder(notebooks, monkeypatch):
    write_notebook(notebooks, "01_first", parameters='model = "random:nobody/none:3"\nseed = 0\noutput = None')
    monkeypatch.setattr(course, "check_model", lambda name: None)
    plan = course.plan_course(folder=notebooks, seed=2)
    monkeypatch.chdir(notebooks)
    folder = course.study_folder("random:nobody/none:3", 2)
    assert folder == plan.state.folder == course.study_folder("x", 0, plan.steps[0].parameters["output"])
    assert folder.is_dir() and re.fullmatch(r"[\w.-]+", folder.name)


# ---------------------------------------------------------------- running and resuming


def test_a_course_runs_in_order_with_parameters_and_is_not_run_twice(notebooks):
    write_notebook(notebooks, "02_second", write_trace("02"), "assert layer == 7 and seed == 3", needs=["01"])
    write_notebook(notebooks, "01_first", write_trace("01"), parameters="output = None")
    plan = course.plan_course(folder=notebooks, seed=3, parameters={"layer": 7})
    cells = []
    results = course.run_course(plan, on_progress=lambda *progress: cells.append(progress))
    assert [(entry.notebook, entry.status) for entry in results] == [("01_first", "done"), ("02_second", "done")]
    assert traced(plan) == ["01", "02"]
    assert plan.state.folder == notebooks.parent / "build" / "study" / "none-seed3"
    assert cells[-1] == ("02_second", 5, 5)  # four cells and the injected parameters

    again = course.plan_course(folder=notebooks, seed=3, parameters={"layer": 7})
    assert all(step.finished for step in again.steps)
    other = course.plan_course(folder=notebooks, seed=3, parameters={"layer": 8})
    assert [step.finished for step in other.steps] == [True, False]
    fresh = course.plan_course(["02"], folder=notebooks, seed=3, parameters={"layer": 7}, fresh=True)
    assert [step.finished for step in fresh.steps] == [True, False]


def test_changed_package_code_makes_finished_notebooks_unfinished(notebooks, monkeypatch):
    write_notebook(notebooks, "01_first")
    course.run_course(course.plan_course(folder=notebooks))
    assert course.plan_course(folder=notebooks).steps[0].finished
    monkeypatch.setattr(course, "_package_hash", lambda: "other")
    assert not course.plan_course(folder=notebooks).steps[0].finished


def test_a_changed_module_beside_the_notebooks_makes_them_unfinished(notebooks):
    write_notebook(notebooks, "01_first", "import prompts\nassert prompts.N == 1")
    (notebooks / "prompts.py").write_text("N = 1\n")
    (result,) = course.run_course(course.plan_course(folder=notebooks))
    assert result.status == "done" and course.plan_course(folder=notebooks).steps[0].finished
    (notebooks / "prompts.py").write_text("N = 2\n")
    assert not course.plan_course(folder=notebooks).steps[0].finished


def test_missing_predecessors_run_first_and_a_changed_one_runs_again(notebooks):
    write_notebook(notebooks, "01_first", write_trace("01"))
    write_notebook(notebooks, "02_second", write_trace("02"), needs=["01"])
    write_notebook(notebooks, "03_third", write_trace("03"), needs=["02"])
    plan = course.plan_course(["03"], folder=notebooks)
    course.run_course(plan)
    assert traced(plan) == ["01", "02", "03"]
    write_notebook(notebooks, "02_second", write_trace("02b"), needs=["01"])
    course.run_course(course.plan_course(["03"], folder=notebooks))
    assert traced(plan) == ["01", "02", "03", "02b", "03"]


def test_circular_needs_are_refused(notebooks):
    write_notebook(notebooks, "01_first", needs=["02"])
    write_notebook(notebooks, "02_second", needs=["01"])
    with pytest.raises(course.CourseError, match="leads back"):
        course.plan_course(["01"], folder=notebooks)


def test_a_failing_notebook_stops_the_run_which_resumes_there(notebooks):
    write_notebook(notebooks, "01_first", write_trace("01"))
    write_notebook(notebooks, "02_second", "raise RuntimeError('no such head')")
    write_notebook(notebooks, "03_third", write_trace("03"))
    plan = course.plan_course(folder=notebooks)
    results = course.run_course(plan)
    assert [entry.status for entry in results] == ["done", "failed", "not run"]
    assert "RuntimeError: no such head" in results[1].message
    index = (plan.build / "index.html").read_text()
    assert "no such head" in index and "failed" in index and "Title of 03_third" in index
    assert "no such head" in plan.state.executed("02_second").with_suffix(".html").read_text()

    write_notebook(notebooks, "02_second", write_trace("02"))
    results = course.run_course(course.plan_course(folder=notebooks))
    assert [entry.status for entry in results] == ["done", "done", "done"]
    assert traced(plan) == ["01", "02", "03"]


def test_a_cell_that_takes_too_long_fails(notebooks):
    write_notebook(notebooks, "01_first", "import time\ntime.sleep(60)")
    (result,) = course.run_course(course.plan_course(folder=notebooks), timeout=1)
    assert result.status == "failed" and "Timeout" in result.message


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_killed_run_resumes_at_the_first_unfinished_notebook(notebooks, sent):
    write_notebook(notebooks, "01_first", write_trace("01"))
    slow = "import os, time\nif not os.path.exists('go'): open('started', 'w').close(); time.sleep(120)"
    write_notebook(notebooks, "02_second", slow, write_trace("02"))
    write_notebook(notebooks, "03_third", write_trace("03"))
    code = "from mi_utils import __main__, course; course._package_hash = lambda: 'frozen'; __main__.app(['run'])"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=notebooks.parent,
        env=os.environ | {"PYTHONPATH": str(Path(course.__file__).parents[1])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )
    deadline = time.monotonic() + 90
    while not (notebooks / "started").exists() and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(sent)
    status = process.wait(timeout=30)
    state = course.RunState.read(notebooks.parent / "build/study/none-seed0/course.json")
    if sent == signal.SIGKILL:
        assert state.entries["02_second"].status == "running"
    else:
        assert status == 130
        assert state.entries["02_second"].status == "interrupted"

    (notebooks / "go").touch()
    plan = course.plan_course(folder=notebooks)
    assert [step.finished for step in plan.steps] == [True, False, False]
    assert [entry.status for entry in course.run_course(plan)] == ["done", "done", "done"]
    assert traced(plan) == ["01", "02", "03"]


def test_a_fresh_course_clears_its_own_folder_only(notebooks):
    write_notebook(notebooks, "01_first", write_trace("01"))
    other = course.plan_course(folder=notebooks, seed=1)
    course.run_course(other)
    plan = course.plan_course(folder=notebooks)
    course.run_course(plan)
    (plan.state.folder / "stale.npz").touch()
    plan = course.plan_course(folder=notebooks, fresh=True)
    assert not plan.steps[0].finished
    course.run_course(plan)
    assert not (plan.state.folder / "stale.npz").exists()
    assert traced(plan) == ["01"] and traced(other) == ["01"]


# ---------------------------------------------------------------- models


def test_an_unknown_model_is_refused_before_a_kernel_starts(notebooks, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("mi_utils.models.embedded_names", lambda: ["smallworld"])
    write_notebook(notebooks, "03_implementation", parameters='model = "smallworld"\noutput = "x"')
    for name in ("no-such-model", "nobody/no-such-model", "random:no-such-model:1"):
        with pytest.raises(course.CourseError, match="(?s)no-such-model.*smallworld"):
            course.plan_course(["03"], folder=notebooks, model=name)
    assert not (notebooks.parent / "build").exists()


def test_a_folder_without_a_model_is_refused(notebooks, tmp_path):
    write_notebook(notebooks, "03_implementation", parameters='model = "smallworld"\noutput = "x"')
    with pytest.raises(course.CourseError, match="config.json"):
        course.plan_course(["03"], folder=notebooks, model=str(tmp_path))


# ---------------------------------------------------------------- pages


class Requests(HTMLParser):
    """Collects what a browser would fetch on opening a page (links to click on are not fetched)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.script = False

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.script = tag == "script"
        for name in ("src", "srcset", "data", "poster"):
            if tag != "a" and values.get(name):
                self.found.append(values[name])
        if tag == "link" and values.get("href"):
            self.found.append(values["href"])

    def handle_data(self, data):
        if self.script and len(data) < 500_000:  # plotly's own script names hosts of maps, which we do not draw
            self.found += re.findall(r"""(?:import|require|fetch)\W{1,4}(https?://[^"'\s]+)""", data)


def outside_requests(page: str) -> list[str]:
    parser = Requests()
    parser.feed(page)
    styles = re.findall(r"(?:@import|url\()\s*[\"']?((?:https?:)?//[^\"')\s]+)", page)
    return [url for url in parser.found + styles if re.match(r"(?:https?:)?//", url)]


def test_the_check_for_outside_requests_sees_them():
    from nbconvert import HTMLExporter

    plain, _ = HTMLExporter().from_notebook_node(new_notebook())
    assert len(outside_requests(plain)) >= 2
    assert outside_requests("<style>@import 'https://a.b/c.css'</style><a href='https://a.b'>x</a>")


def test_pages_stand_alone_and_show_figures_and_formulas(notebooks):
    figure = (
        "import plotly.graph_objects as go\nfrom IPython.display import display\n"
        "figure = go.Figure(go.Bar(x=['L0H1', 'L1H2'], y=[1, 2]))\n"
        "display({'application/vnd.plotly.v1+json': figure.to_plotly_json(), 'text/plain': 'figure'}, raw=True)"
    )
    widget = "from ipywidgets import IntSlider\nIntSlider()"
    path = write_notebook(notebooks, "01_first", figure, widget, write_trace("01"))
    nb = nbformat.read(path, as_version=4)
    nb.cells.insert(
        1,
        new_markdown_cell(
            "[![Open in Colab](https://colab.example/badge.svg)](https://colab.example/x) and $a_i^2$, "
            "[next](02_second.ipynb)\n\n$$\\frac{1}{n}\\sum_i x_i$$\n\n$\\nosuchmacro{$"
        ),
    )
    nbformat.write(nb, path)
    plan = course.plan_course(folder=notebooks)
    (result,) = course.run_course(plan)
    assert result.status == "done", result.message
    page = plan.state.executed("01_first").with_suffix(".html").read_text()
    assert outside_requests(page) == []
    assert 'id="figure-1"' in page and "L0H1" in page and 'src="../../../assets/plotly.min.js"' in page
    assert page.count("<math") >= 2 and "<mfrac>" in page
    assert ">Open in Colab</a>" in page and 'href="02_second.html"' in page
    assert 'href="../../../index.html"' in page

    index = (plan.build / "index.html").read_text()
    assert outside_requests(index) == []
    assert "Title of 01_first" in index
    for link in re.findall(r'href="([^"]+)"', index):
        assert (plan.build / link).is_file(), link


def test_the_index_shows_the_verdict_and_escapes_what_it_shows(notebooks, monkeypatch):
    write_notebook(notebooks, "01_first", "raise ValueError('<b>bold</b>')")
    plan = course.plan_course(folder=notebooks)
    plan.state.folder.mkdir(parents=True)
    (plan.state.folder / "report.html").write_text("report")
    monkeypatch.setattr(course.RunState, "verdict", lambda state: "not supported")
    course.run_course(plan)
    index = (plan.build / "index.html").read_text()
    assert "not supported" in index and 'href="study/none-seed0/report.html"' in index
    assert "<b>bold" not in index and "&lt;b&gt;bold" in index


def test_the_state_file_is_plain_json(notebooks):
    write_notebook(notebooks, "01_first")
    plan = course.plan_course(folder=notebooks)
    course.run_course(plan)
    raw = json.loads((plan.state.folder / "course.json").read_text())
    assert [entry["status"] for entry in raw["notebooks"]] == ["done"]
