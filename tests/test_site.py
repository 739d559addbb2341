"""The static site, built from the stored notebooks, and opened in a real browser where there is one."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import warnings
from functools import cache
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
from test_course import outside_requests

from mi_utils import course, site

ROOT = Path(__file__).parents[1]
SOURCES = site.sources(ROOT)
PLOTLY = "application/vnd.plotly.v1+json"
every_page = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.page.stem)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("site")
    site.build_site(ROOT, target)
    return target


class Links(HTMLParser):
    """Links, and the ids that they may lead to."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.steps: dict[str, str] = {}
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids.add(values.get("id", ""))
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
            self.steps[values.get("rel", "")] = values["href"]


@cache
def links_of(page: Path) -> Links:
    return Links(page)


@cache
def figures_stored(source: site.Source) -> int:
    if source.path.suffix != ".ipynb":
        return 0
    cells = nbformat.read(ROOT / source.path, as_version=4).cells
    return sum(PLOTLY in output.get("data", {}) for cell in cells for output in cell.get("outputs", ()))


# ---------------------------------------------------------------- the files


def test_every_notebook_and_text_has_a_page_and_the_script_is_there_once(built):
    pages = {path.relative_to(built).as_posix() for path in built.rglob("*.html")}
    wanted = {f"notebooks/{path.stem}.html" for path in course.list_notebooks(ROOT / "notebooks")}
    wanted |= {f"references/{path.stem}.html" for path in (ROOT / "references").glob("*.md")}
    assert pages == wanted | {"index.html", "benchmarks/RESULTS.html"}
    assert [path.name for path in built.rglob("plotly*.js")] == ["plotly.min.js"]
    assert sum(path.stat().st_size for path in built.rglob("*")) < 16e6
    assert all(path.stat().st_size < 1e6 for path in built.rglob("*.html"))


@every_page
def test_pages_ask_nothing_of_other_hosts_and_their_links_lead_somewhere(built, source):
    page = built / source.page
    assert outside_requests(page.read_text(encoding="utf-8")) == []
    repository = site.repository_address(ROOT)
    for href in links_of(page).links:
        place, _, anchor = href.partition("#")
        if place.startswith(f"{repository}/blob/main/"):
            assert (ROOT / place.removeprefix(f"{repository}/blob/main/")).exists(), href
        elif not re.match(r"[a-z]+:", place):
            aim = page.parent / place if place else page
            assert aim.is_file(), href
            assert not anchor or unescape(anchor) in links_of(aim.resolve()).ids, href


def test_next_leads_through_every_page_and_previous_back(built):
    def follow(page: Path, step: str) -> list[Path]:
        seen = [page]
        while step in (steps := links_of(seen[-1]).steps):
            seen.append((seen[-1].parent / steps[step]).resolve())
        return seen

    forward = follow(built.resolve() / "index.html", "next")
    assert [path.relative_to(built.resolve()) for path in forward] == [source.page for source in SOURCES]
    assert follow(forward[-1], "prev") == forward[::-1]


@every_page
def test_every_figure_and_widget_has_a_form_for_pages_without_script(built, source):
    page = (built / source.page).read_text(encoding="utf-8")
    assert page.count("<noscript><svg") == page.count('class="figure"') == figures_stored(source)
    assert "(children=(" not in page and "needs a running kernel.</i>" not in page


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("three years")
    with pytest.raises(ValueError, match="holds no site"):
        site.build_site(ROOT, tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_the_pages_of_a_course_run_are_no_site(tmp_path):
    site.write_assets(tmp_path)  # as beside the log of runs
    (tmp_path / "runs.jsonl").write_text("a week")
    with pytest.raises(ValueError, match="holds no site"):
        site.build_site(ROOT, tmp_path)
    assert (tmp_path / "runs.jsonl").exists()


def test_building_again_removes_pages_that_are_no_more(tmp_path):
    root = tmp_path / "project"
    (root / "notebooks").mkdir(parents=True)
    (root / "README.md").write_text("# Small\n\n[licence](LICENSE) [02](notebooks/02_b.ipynb)")
    (root / "pyproject.toml").write_text('[project]\nurls = { Repository = "https://example.org/small" }')
    for name in ("01_a", "02_b"):
        nbformat.write(nbformat.v4.new_notebook(), root / "notebooks" / f"{name}.ipynb")
    target = tmp_path / "site"
    assert [path.name for path in site.build_site(root, target)] == ["index.html", "01_a.html", "02_b.html"]
    index = (target / "index.html").read_text()
    assert 'href="https://example.org/small/blob/main/LICENSE"' in index and 'href="notebooks/02_b.html"' in index
    (root / "notebooks" / "01_a.ipynb").unlink()
    site.build_site(root, target)
    assert not (target / "notebooks" / "01_a.html").exists() and (target / "notebooks" / "02_b.html").exists()


# ---------------------------------------------------------------- in a browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --disable-dev-shm-usage --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync --disable-default-apps "
    "--host-resolver-rules=MAP&*&~NOTFOUND"
)
PHONE = 390
LOOK = """
const box = element => { const b = element.getBoundingClientRect(); return [b.width, b.height]; };
return [...document.querySelectorAll('.figure > .plot')].map(plot => ({
  id: plot.id,
  box: plot.querySelector('svg.main-svg') ? box(plot.querySelector('svg.main-svg')) : [0, 0],
  traces: plot.data ? plot.data.filter(trace => !trace.x || trace.x.length).length : -1,
  drawn: plot.querySelectorAll('.plot .trace, .hm').length,
  title: plot.querySelector('.gtitle') ? box(plot.querySelector('.gtitle'))[0] : 0,
  axes: [...plot.querySelectorAll('[class^=x][class$=title], [class^=y][class$=title]')].map(t => t.textContent),
  paper: plot._fullLayout ? plot._fullLayout.paper_bgcolor : '',
}));
"""


@pytest.fixture(scope="module")
def browser():
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver = shutil.which("chromedriver")
    if not program or not driver:
        missing = "chromedriver" if program else "chromium"
        message = (
            f"NOBODY LOOKED AT THE SITE: {missing} is not installed, so its pages were not opened in a browser. "
            "On Debian and Ubuntu: apt-get install chromium chromium-driver."
        )
        if os.environ.get("REQUIRE_BROWSER"):
            pytest.fail(message)
        warnings.warn(message, stacklevel=1)
        pytest.skip(message)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in ARGUMENTS.split():
        options.add_argument(argument.replace("&", " "))
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield opened
    opened.quit()


def resize(browser, width: int) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width == PHONE},
    )


def requests(browser) -> list[str]:
    messages = (json.loads(entry["message"])["message"] for entry in browser.get_log("performance"))
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


def console_errors(browser) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def undrawn(looks: list[dict]) -> list[str]:
    """Which figures have no size, fewer marks than traces, an axis or a title without words, or too long a title."""
    return [
        f"{look['id']}: {look}"
        for look in looks
        if min(look["box"]) < 50 or look["traces"] < 1 or look["drawn"] < look["traces"]
        or not look["axes"] or not 0 < look["title"] < look["box"][0]
    ]  # fmt: skip


def settled_looks(browser, n: int, patience: float = 20) -> list[dict]:
    """The figures once all ``n`` are there and drawn; as they are when patience is at its end, on a busy machine."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        looks = browser.execute_script(LOOK)
        if len(looks) == n and not undrawn(looks):
            break
        time.sleep(0.5)
    return looks


@every_page
def test_in_a_browser_every_figure_is_drawn_and_nothing_comes_from_outside(built, browser, source):
    resize(browser, 1280)
    browser.get((built / source.page).as_uri())
    looks = settled_looks(browser, figures_stored(source))
    assert len(looks) == figures_stored(source)
    assert undrawn(looks) == []
    resize(browser, PHONE)
    wide = browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert wide == [PHONE, PHONE], "wider than a phone"
    assert console_errors(browser) == []
    assert [url for url in requests(browser) if not url.startswith(("file:", "data:", "blob:"))] == []


def test_figures_follow_the_page_into_the_dark(built, browser):
    most = max(SOURCES, key=figures_stored)
    resize(browser, 1280)
    papers = []
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        browser.get((built / most.page).as_uri())
        papers.append({look["paper"] for look in browser.execute_script(LOOK)})
        page = browser.execute_script("return getComputedStyle(document.documentElement).getPropertyValue('--paper')")
        assert papers[-1] == {page.strip()}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert papers[0] != papers[1] and console_errors(browser) == []


def test_the_browser_sees_what_is_wrong(browser, built, tmp_path):
    """A figure without its script, a request to elsewhere, a page too wide: each is noticed."""
    page = tmp_path / "wrong.html"
    page.write_text(
        '<meta name="viewport" content="width=device-width"><div style="width: 900px">x</div>'
        '<div class="figure"><div class="plot" id="figure-1"></div></div>'
        '<img src="https://outside.example/x.png"><script>undefined_name()</script>'
    )
    resize(browser, PHONE)
    browser.get(page.as_uri())
    assert len(undrawn(browser.execute_script(LOOK))) == 1
    assert browser.execute_script("return document.documentElement.scrollWidth") > PHONE
    assert any("undefined_name" in message for message in console_errors(browser))
    assert "https://outside.example/x.png" in requests(browser)
