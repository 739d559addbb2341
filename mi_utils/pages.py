"""Executed notebooks and their index as HTML pages that ask nothing of any other host.

nbconvert's own page loads require.js, MathJax, mermaid and widgets from outside. Here plotly's script comes
from the installed package, formulas become MathML, which browsers draw themselves, widgets fall back to their
text, and images of other hosts (badges) to their alternative text.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

if TYPE_CHECKING:
    from nbformat import NotebookNode

    from mi_utils.course import RunState

_PAGE_TEMPLATE = """
{%- extends 'lab/index.html.j2' -%}
{%- block html_head_js -%}
{% if resources.plotly_js %}<script>{{ resources.plotly_js }}</script>{% endif %}
<style>nav.course { font-family: sans-serif; padding: 0.7em 1em; } nav.course a { margin-right: 1.5em; }
.jp-Notebook { max-width: 1100px; margin: 0 auto; }</style>
{%- endblock html_head_js -%}
{%- block jupyter_widgets -%}{%- endblock jupyter_widgets -%}
{%- block html_head_js_mathjax -%}{%- endblock html_head_js_mathjax -%}
{%- block html_head_js_mermaidjs -%}{%- endblock html_head_js_mermaidjs -%}
{%- block body_header -%}
{{ super() }}
<nav class="course"><a href="{{ resources.index_href }}">All notebooks</a></nav>
{%- endblock body_header -%}
"""

_PLOTLY_MIME = "application/vnd.plotly.v1+json"
_WIDGET_MIME = "application/vnd.jupyter.widget-view+json"
_OUTSIDE_IMAGE = re.compile(r'<img\b[^>]*\bsrc="(?:https?:)?//[^"]*"[^>]*>')


def write_page(executed: Path, *, title: str, source_folder: Path, index: Path) -> Path:
    """Render an executed notebook as one HTML file beside it.

    Args:
        executed: the executed notebook.
        title: the page's title.
        source_folder: folder of the notebook that was executed; its local images are embedded.
        index: the index page to link to.

    Returns:
        The page.
    """
    import nbformat
    from jinja2 import DictLoader

    nb = nbformat.read(executed, as_version=4)
    plotly_js = ""
    if _draw_figures(nb):
        from plotly.offline import get_plotlyjs

        plotly_js = get_plotlyjs()
    resources = {
        "metadata": {"name": title, "path": str(source_folder)},
        "plotly_js": plotly_js,
        "index_href": Path(os.path.relpath(index, executed.parent)).as_posix(),
    }
    exporter = _page_exporter()(
        extra_loaders=[DictLoader({"course.html.j2": _PAGE_TEMPLATE})],
        template_file="course.html.j2",
    )
    html, _ = exporter.from_notebook_node(nb, resources=resources)
    page = executed.with_suffix(".html")
    page.write_text(html, encoding="utf-8")
    return page


def _draw_figures(nb: NotebookNode) -> int:
    """Turn plotly figures into HTML and drop widgets' views, in place. Returns the number of figures."""
    from plotly.io import to_html

    count = 0
    for cell in nb.cells:
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            data.pop(_WIDGET_MIME, None)
            figure = data.pop(_PLOTLY_MIME, None)
            if figure is None:
                continue
            count += 1
            data["text/html"] = to_html(
                {"data": figure["data"], "layout": figure.get("layout", {})},
                config={"displaylogo": False, "responsive": True},
                include_plotlyjs=False,
                full_html=False,
                validate=False,
                div_id=f"figure-{count}",
            )
    return count


def _page_exporter() -> type:
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
            return f"<p>{mathml(text, 'block')}</p>"

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
            return re.sub(r'href="(?:\./)?([\w.-]+)\.ipynb(#[^"]*)?"', r'href="\1.html\2"', html)

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
