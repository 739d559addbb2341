"""Executed notebooks, Markdown texts and the index of runs as HTML pages that ask nothing of any other host.

nbconvert's own page loads require.js, MathJax, mermaid and widgets from outside. Here plotly's script comes
from the installed package and lies once beside the pages, formulas become MathML, which browsers draw themselves,
widgets fall back to what they show at rest, and images of other hosts (badges) to their alternative text.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from mi_utils.figures import ASSETS, drawing_script, figure_html, plotly_script
from mi_utils.figures import STYLE as FIGURE_STYLE

if TYPE_CHECKING:
    from nbformat import NotebookNode

    from mi_utils.course import RunState

_PLOTLY_MIME = "application/vnd.plotly.v1+json"
_WIDGET_MIME = "application/vnd.jupyter.widget-view+json"
_OUTSIDE_IMAGE = re.compile(r'<img\b[^>]*\bsrc="(?:https?:)?//[^"]*"[^>]*>')

Link = Callable[[str], str]  # from a link as it is written to the link on the page


def write_page(executed: Path, *, title: str, source_folder: Path, index: Path) -> Path:
    """Render an executed notebook as an HTML file beside it.

    Args:
        executed: the executed notebook.
        title: the page's title.
        source_folder: folder of the notebook that was executed; its local images are embedded.
        index: the index page to link to; scripts and styles lie in ``assets/`` beside it.

    Returns:
        The page.
    """
    import nbformat

    nb = nbformat.read(executed, as_version=4)
    body = notebook_html(
        nb, folder=source_folder, link=lambda href: re.sub(r"^(?:\./)?([\w.-]+)\.ipynb", r"\1.html", href)
    )
    write_assets(index.parent)
    page = executed.with_suffix(".html")
    to_index = Path(os.path.relpath(index, executed.parent))
    navigation = f'<nav><a href="{to_index.as_posix()}">All notebooks</a></nav>'
    html = frame(title, body, assets=(to_index.parent / "assets").as_posix(), top=navigation)
    page.write_text(html, encoding="utf-8")
    return page


def frame(title: str, body: str, *, assets: str, top: str = "", bottom: str = "") -> str:
    """A whole page round a body.

    Args:
        assets: how to reach the folder that :func:`write_assets` filled.
        top, bottom: HTML before and behind the body.
    """
    scripts = ""
    if 'class="figure"' in body:
        scripts = f'<script src="{assets}/plotly.min.js"></script>\n<script src="{assets}/figures.js"></script>\n'
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><link rel="stylesheet" href="{assets}/pages.css">'
        f"<title>{escape(title)}</title></head>\n<body>\n{top}\n<main>\n{body}\n</main>\n{bottom}\n"
        f"{scripts}</body></html>\n"
    )


def write_assets(folder: Path) -> None:
    """Write what all pages share into ``assets/`` of a folder: the style sheet, plotly's script and ours."""
    from pygments.formatters import HtmlFormatter

    light, dark = (
        HtmlFormatter(style=style, nobackground=True).get_style_defs(".highlight")
        for style in ("default", "github-dark")
    )
    style = (ASSETS / "pages.css").read_text(encoding="utf-8") + FIGURE_STYLE
    files = {
        "pages.css": f"{style}{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n",
        "figures.js": drawing_script(),
        "plotly.min.js": plotly_script(),
    }
    (folder / "assets").mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / "assets" / name).write_text(text, encoding="utf-8")


def notebook_html(nb: NotebookNode, *, folder: Path, link: Link) -> str:
    """The cells of a notebook with their outputs, as the body of a page. The notebook's outputs are changed.

    Args:
        folder: where the notebook's local images are.
        link: where its links lead on the page.
    """
    _draw_outputs(nb)
    exporter = _page_exporter(link)(template_file="basic/index.html.j2", exclude_output_prompt=True)
    html, _ = exporter.from_notebook_node(nb, resources={"metadata": {"path": str(folder)}})
    return html


def markdown_html(text: str, *, folder: Path, link: Link) -> str:
    """A Markdown text as the body of a page; arguments as in :func:`notebook_html`."""
    from nbformat.v4 import new_markdown_cell, new_notebook

    return notebook_html(new_notebook(cells=[new_markdown_cell(text)]), folder=folder, link=link)


def _draw_outputs(nb: NotebookNode) -> None:
    """Turn plotly figures into HTML and widgets into what they show at rest, in place."""
    count = 0
    for cell in nb.cells:
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if data.pop(_WIDGET_MIME, None) is not None and "text/html" not in data:
                data["text/html"] = "<p><i>A widget, which needs a running kernel.</i></p>"
            figure = data.pop(_PLOTLY_MIME, None)
            if figure is not None:
                count += 1
                data["text/html"] = figure_html(figure, count)


def _page_exporter(link: Link) -> type:
    from jinja2 import pass_context
    from latex2mathml.converter import convert
    from nbconvert import HTMLExporter
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

    def mathml(tex: str, display: str) -> str:
        try:
            return convert(tex, display=display)
        except Exception:  # a formula the converter does not know stays readable as TeX
            return f"<code>{escape(tex)}</code>"

    class Renderer(IPythonRenderer):
        def inline_math(self, text: str) -> str:
            return mathml(text, "inline")

        def block_math(self, text: str) -> str:
            return f'<p class="formula">{mathml(text, "block")}</p>'

        def latex_environment(self, name: str, body: str) -> str:
            return self.block_math(rf"\begin{{{name}}}{body}\end{{{name}}}")

    class PageExporter(HTMLExporter):
        @pass_context
        def markdown2html(self, context: Any, source: str) -> str:
            folder = context.get("resources", {}).get("metadata", {}).get("path", "")
            renderer = Renderer(
                escape=False,
                attachments=context.get("cell", {}).get("attachments", {}),
                embed_images=True,
                path=folder,
                anchor_link_text=self.anchor_link_text,
            )
            html = _OUTSIDE_IMAGE.sub(_alternative_text, MarkdownWithMath(renderer=renderer).render(source))
            return re.sub(r'(<a\b[^>]*?\bhref=")([^"]*)"', lambda found: f'{found[1]}{link(found[2])}"', html)

    return PageExporter


def _alternative_text(image: re.Match[str]) -> str:
    found = re.search(r'\balt="([^"]*)"', image[0])
    return found[1] if found else ""


_INDEX_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; margin: 0.6rem 0 2rem; }
th, td { text-align: left; padding: 0.4rem 0.7rem; border-bottom: 1px solid #8885; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.done { color: #1a7f37; } .failed { color: #cf222e; } .interrupted, .running { color: #9a6700; }
.verdict { border-left: 4px solid #8888; padding: 0.3rem 0.9rem; }
.message { font-size: 0.88em; overflow-wrap: anywhere; }
"""


def write_index(build: Path, runs: Sequence[RunState]) -> Path:
    """Write ``index.html`` into `build`: one table a run, in the order given."""
    sections = "\n".join(_section(run, build) for run in runs)
    page = build / "index.html"
    build.mkdir(parents=True, exist_ok=True)
    page.write_text(
        "<!DOCTYPE html>\n"
        '<html lang="en"><head><meta charset="utf-8"><title>Course results</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_INDEX_STYLE}</style></head>\n<body>\n<h1>Course results</h1>\n"
        f"{sections or '<p>Nothing was run yet.</p>'}\n</body></html>\n",
        encoding="utf-8",
    )
    return page


def _section(state: RunState, build: Path) -> str:
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(state.updated))
    parts = [f"<h2>{escape(state.model)}, seed {state.seed}</h2>", f"<p>Last change {when}.</p>"]
    status = state.verdict()
    report = state.folder / "report.html"
    if status is not None:
        parts.append(f'<p class="verdict">Verdict of the study: <strong>{escape(status)}</strong>')
        parts.append(f' · <a href="{_href(report, build)}">report</a></p>' if report.is_file() else "</p>")
    elif report.is_file():
        parts.append(f'<p class="verdict"><a href="{_href(report, build)}">Report of the study</a></p>')
    parts.append("<table><tr><th>Notebook</th><th>Title</th><th>State</th><th>Seconds</th></tr>")
    for name in sorted(state.entries):
        entry = state.entries[name]
        page = state.executed(name).with_suffix(".html")
        label = f'<a href="{_href(page, build)}">{escape(name)}</a>' if page.is_file() else escape(name)
        message = f'<div class="message">{escape(entry.message)}</div>' if entry.message else ""
        parts.append(
            f"<tr><td>{label}</td><td>{escape(entry.title)}{message}</td>"
            f'<td class="{entry.status}">{entry.status}</td><td class="number">{entry.seconds:.1f}</td></tr>'
        )
    return "\n".join((*parts, "</table>"))


def _href(path: Path, build: Path) -> str:
    return quote(path.relative_to(build).as_posix())
