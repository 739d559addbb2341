"""A figure on an HTML page: drawn by plotly's script where one runs, and as its still picture where none does.

The page names its colours in the custom properties ``--ink``, ``--paper`` and ``--line``; figures follow them on a dark
page. Nothing is asked of another host: plotly's script is the installed package's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mi_utils.svg import draw

ASSETS = Path(__file__).parent / "assets"
# No logo, no button that sends the figure to a host, and only as many buttons as leave room for a title.
CONFIG = {
    "displaylogo": False, "showSendToCloud": False,
    "modeBarButtonsToRemove": ["select2d", "lasso2d", "zoomIn2d", "zoomOut2d", "autoScale2d"],
}  # fmt: skip
STYLE = """
.figure { overflow-x: auto; margin: 1rem 0; } .figure .plot { min-width: 600px; }
.figure svg[role=img] { background: #ffffff; }
"""


def figure_html(figure: Mapping[str, Any], number: int) -> str:
    """One figure (plotly's own dict), to be drawn by :func:`drawing_script` at the end of the page.

    Args:
        number: from 1, the figure's own on its page; its element is called ``figure-<number>``.
    """
    from plotly.utils import PlotlyJSONEncoder

    shown = {"data": figure["data"], "layout": figure.get("layout", {})}
    data = json.dumps(shown | {"config": CONFIG}, cls=PlotlyJSONEncoder).replace("</", "<\\/")
    still = draw(shown)
    return (
        f'<div class="figure"><div class="plot" id="figure-{number}"></div>'
        f'<script type="application/json">{data}</script>'
        + (f"<noscript>{still}</noscript>" if still else "")
        + "</div>"
    )


def drawing_script() -> str:
    """The script that draws the page's figures; plotly's own has to come first."""
    return (ASSETS / "figures.js").read_text(encoding="utf-8")


def plotly_script() -> str:
    """Plotly's script (about 5 MB) from the installed package."""
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()
