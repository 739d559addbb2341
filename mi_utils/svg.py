"""Our figures as still pictures.

A stored notebook on GitHub, plain nbconvert and a Markdown report cannot run plotly's script. They show the SVG that
is drawn here from the very same figure. It knows what :mod:`mi_utils.plots` makes, no more: heat maps, horizontal
bars, points, labels and lines with error bars, on linear axes whose ticks are given.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape, unescape
from itertools import groupby
from typing import Any

WIDTH = 860
TITLE_LEFT = 12  # pixels before title and subtitle
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"
INK, GRID = "#24292f", "#e3e6ea"


def draw(figure: Mapping[str, Any]) -> str | None:
    """The figure (plotly's own dict) as SVG text, or None: not made by `mi_utils.plots`, or changed since."""
    traces, layout = figure["data"], figure["layout"]
    ours = "mi_utils" in (layout.get("meta") or {})
    if not ours or not all(trace["type"] in ("heatmap", "bar", "scatter") for trace in traces):
        return None
    if any(name[1:5] == "axis" and axis.get("type", "linear") != "linear" for name, axis in layout.items()):
        return None
    try:
        return "\n".join(_Picture(traces, layout).parts())
    except (KeyError, TypeError):  # something was added by hand
        return None


def nice_step(span: float, about: int = 6) -> float:
    """A step of 1, 2 or 5 times a power of ten that cuts ``span`` into about so many parts."""
    rough = span / about
    power = 10.0 ** math.floor(math.log10(rough))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= rough * 0.999)


def ticks(axis: Mapping[str, Any]) -> tuple[list[float], list[str]]:
    """Places and labels of an axis's ticks."""
    if axis.get("tickvals") is not None:
        return list(axis["tickvals"]), [str(text) for text in axis["ticktext"]]
    low, high = sorted(axis["range"])
    step = axis["dtick"]
    places = [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return places, [f"{place:.{digits}f}".replace("-", "\u2212") for place in places]


def colour(scale: Sequence[Sequence[Any]], share: float) -> str:
    """Colour of a scale of (share, "#rrggbb") steps at a share from 0 to 1."""
    share = min(1.0, max(0.0, share))
    for (a, first), (b, second) in zip(scale, scale[1:], strict=False):
        if share <= b:
            part = (share - a) / (b - a)
            mixed = [round(x + part * (y - x)) for x, y in zip(_rgb(first), _rgb(second), strict=True)]
            return "#" + "".join(f"{value:02x}" for value in mixed)
    return scale[-1][1]


def is_dark(hex_colour: str) -> bool:
    """Whether white text reads better on it than black."""
    red, green, blue = _rgb(hex_colour)
    return 0.299 * red + 0.587 * green + 0.114 * blue < 140


def _rgb(hex_colour: str) -> list[int]:
    return [int(hex_colour[i : i + 2], 16) for i in (1, 3, 5)]


class _Picture:
    def __init__(self, traces: Sequence[Mapping[str, Any]], layout: Mapping[str, Any]) -> None:
        self.traces, self.layout = traces, layout
        self.height = layout["height"]
        margin = layout["margin"]
        self.left, self.top = margin["l"], margin["t"]
        self.inner_width = WIDTH - margin["l"] - margin["r"]
        self.inner_height = self.height - margin["t"] - margin["b"]

    def parts(self) -> Iterator[str]:
        yield (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" width="{WIDTH}" '
            f'height="{self.height}" font-family="{escape(FONT)}" font-size="12" fill="{INK}" role="img" '
            'style="max-width: 100%; height: auto">'
        )
        yield f"<title>{_plain(self.layout['title']['text'])}</title>"
        yield f'<rect width="{WIDTH}" height="{self.height}" fill="#ffffff"/>'
        yield _text(TITLE_LEFT, 26, self.layout["title"]["text"], size=16)
        yield _text(TITLE_LEFT, 45, self.layout["title"]["subtitle"]["text"], fill="#57606a")
        frames = dict.fromkeys((trace.get("xaxis", "x"), trace.get("yaxis", "y")) for trace in self.traces)
        for x, y in frames:
            yield from self._grid(x, y)
        for trace in self.traces:
            yield from getattr(self, "_" + trace["type"])(trace)
        for x, y in frames:
            yield from self._axes(x, y)
        for note in self.layout.get("annotations", ()):
            yield _text(self._across(note["x"]), self._down(note["y"]) - 6, note["text"], anchor="middle")
        if self.layout.get("showlegend"):
            yield from self._legend()
        if "coloraxis" in self.layout:
            yield from self._colour_bar()
        yield "</svg>"

    # -- places

    def _across(self, share: float) -> float:
        return self.left + share * self.inner_width

    def _down(self, share: float) -> float:
        return self.top + (1 - share) * self.inner_height

    def _axis(self, name: str) -> Mapping[str, Any]:
        return self.layout[f"{name[0]}axis{name[1:]}"]

    def _place(self, name: str, value: float) -> float:
        axis = self._axis(name)
        low, high = axis["range"]
        start, end = axis.get("domain", (0, 1))
        share = start + (value - low) / (high - low) * (end - start)
        return self._across(share) if name[0] == "x" else self._down(share)

    def _frame(self, x: str, y: str) -> tuple[float, float, float, float]:
        across = [self._place(x, end) for end in self._axis(x)["range"]]
        down = [self._place(y, end) for end in self._axis(y)["range"]]
        return min(across), min(down), max(across), max(down)

    # -- axes

    def _grid(self, x: str, y: str) -> Iterator[str]:
        left, top, right, bottom = self._frame(x, y)
        for name in (x, y):
            axis = self._axis(name)
            if not axis.get("showgrid", True):
                continue
            for place in map(lambda v, name=name: self._place(name, v), ticks(axis)[0]):
                ends = (place, top, place, bottom) if name[0] == "x" else (left, place, right, place)
                yield _line(*ends, GRID)
        for shape in self.layout.get("shapes", ()):
            if "y domain" in shape["yref"]:
                place = self._place("x", shape["x0"])
                yield _line(place, top, place, bottom, shape["line"]["color"], dash=shape["line"].get("dash"))
            else:
                place = self._place("y", shape["y0"])
                yield _line(left, place, right, place, shape["line"]["color"], dash=shape["line"].get("dash"))

    def _axes(self, x: str, y: str) -> Iterator[str]:
        left, top, right, bottom = self._frame(x, y)
        lowest = 0.0
        if self._axis(x).get("showticklabels", True):
            places, labels = ticks(self._axis(x))
            for place, label in zip(places, labels, strict=True):
                at = self._place(x, place)
                if self._axis(x).get("tickangle"):
                    yield _text(at + 4, bottom + 10, label, anchor="end", turn=(-90, at, bottom + 10))
                    lowest = max(lowest, text_width(label))
                else:
                    yield _text(at, bottom + 16, label, anchor="middle")
                    lowest = 14
        if self._axis(y).get("showticklabels", True):
            places, labels = ticks(self._axis(y))
            for place, label in zip(places, labels, strict=True):
                yield _text(left - 7, self._place(y, place) + 4, label, anchor="end")
            title = self._axis(y)["title"]["text"]
            at = left - 20 - max((text_width(label) for label in labels), default=0)
            yield _text(at, (top + bottom) / 2, title, anchor="middle", turn=(-90, at, (top + bottom) / 2))
        yield _text((left + right) / 2, bottom + lowest + 22, self._axis(x)["title"]["text"], anchor="middle")

    def _legend(self) -> Iterator[str]:
        at = self.left
        for trace in self.traces:
            if not trace.get("showlegend", trace["type"] == "scatter"):
                continue
            tone = trace["marker"]["color"]
            yield _marker(trace["marker"], at + 5, self.top - 14, 5, tone)
            yield _text(at + 15, self.top - 10, trace["name"])
            at += 35 + text_width(trace["name"])

    def _colour_bar(self) -> Iterator[str]:
        axis = self.layout["coloraxis"]
        low, high = axis["cmin"], axis["cmax"]
        left, steps = WIDTH - self.layout["margin"]["r"] + 18, 60
        tall = axis["colorbar"]["len"]
        bottom = self.top + tall
        for i in range(steps):
            fill = colour(axis["colorscale"], (i + 0.5) / steps)
            place = bottom - (i + 1) / steps * tall
            yield f'<rect x="{left}" y="{place:.1f}" width="14" height="{tall / steps + 0.6:.1f}" fill="{fill}"/>'
        places, labels = ticks({"range": (low, high), "dtick": axis["colorbar"]["dtick"]})
        for place, label in zip(places, labels, strict=True):
            yield _text(left + 20, bottom - (place - low) / (high - low) * tall + 4, label)
        at = WIDTH - 12
        title = axis["colorbar"]["title"]["text"]
        yield _text(at, self.top + tall / 2, title, anchor="middle", turn=(-90, at, self.top + tall / 2))

    # -- traces

    def _heatmap(self, trace: Mapping[str, Any]) -> Iterator[str]:
        x, y = trace.get("xaxis", "x"), trace.get("yaxis", "y")
        axis = self.layout["coloraxis"]
        texts, template = trace.get("text"), trace.get("texttemplate")
        for row, (at_y, line) in enumerate(zip(trace["y"], trace["z"], strict=True)):
            for column, (at_x, value) in enumerate(zip(trace["x"], line, strict=True)):
                if value is None:
                    continue
                left, right = sorted((self._place(x, at_x - 0.5), self._place(x, at_x + 0.5)))
                top, bottom = sorted((self._place(y, at_y - 0.5), self._place(y, at_y + 0.5)))
                fill = colour(axis["colorscale"], (value - axis["cmin"]) / (axis["cmax"] - axis["cmin"]))
                # One unit less than the cell: the gap that plotly leaves, too.
                yield (
                    f'<rect x="{left:.1f}" y="{top:.1f}" width="{max(right - left - 1, 0.5):.1f}" '
                    f'height="{max(bottom - top - 1, 0.5):.1f}" fill="{fill}"/>'
                )
                if template:
                    # Adding 0 turns -0.00 into 0.00.
                    words = texts[row][column] if texts else f"{round(value, 2) + 0:.2f}".replace("-", "\u2212")
                    ink = "#ffffff" if is_dark(fill) else INK
                    middle = (left + right) / 2, (top + bottom) / 2 + 4
                    yield _text(*middle, words, anchor="middle", size=11, fill=ink)

    def _bar(self, trace: Mapping[str, Any]) -> Iterator[str]:
        for i, (value, at) in enumerate(zip(trace["x"], trace["y"], strict=True)):
            if value is None:
                continue
            left, right = sorted((self._place("x", 0), self._place("x", value)))
            top, bottom = sorted((self._place("y", at - 0.38), self._place("y", at + 0.38)))
            yield (
                f'<rect x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{bottom - top:.1f}" '
                f'fill="{trace["marker"]["color"][i]}"/>'
            )
            yield from self._error(trace, "error_x", i, value, at)

    def _scatter(self, trace: Mapping[str, Any]) -> Iterator[str]:
        tone = trace["marker"]["color"]
        places = [
            None if x is None or y is None else (self._place("x", x), self._place("y", y))
            for x, y in zip(trace["x"], trace["y"], strict=True)
        ]
        if "lines" in trace["mode"]:
            line = trace.get("line", {})
            dashes = ' stroke-dasharray="4 3"' if line.get("dash") else ""
            for missing, run in groupby(places, key=lambda place: place is None):
                if missing:  # the line has a gap
                    continue
                path = " ".join(f"{x:.1f},{y:.1f}" for x, y in run)
                yield (
                    f'<polyline points="{path}" fill="none" stroke="{line.get("color", tone)}" '
                    f'stroke-width="{line.get("width", 2)}" stroke-opacity="{trace.get("opacity", 1)}"{dashes}/>'
                )
        if "markers" not in trace["mode"]:
            return
        size = trace["marker"].get("size", 6) / 2
        opacity = trace["marker"].get("opacity", 1)
        for i, place in enumerate(places):
            if place is None:
                continue
            x, y = place
            for name in ("error_x", "error_y"):
                yield from self._error(trace, name, i, trace["x"][i], trace["y"][i])
            yield _marker(trace["marker"], x, y, size, tone, opacity)
            if "text" in trace["mode"] and trace["text"][i]:
                sides = trace["textposition"]
                yield _beside(x, y, size, trace["text"][i], sides if isinstance(sides, str) else sides[i])

    def _error(self, trace: Mapping[str, Any], name: str, i: int, x: float, y: float) -> Iterator[str]:
        error = trace.get(name)
        if not error:
            return
        up, down = error["array"][i], error["arrayminus"][i]
        if name == "error_x":
            ends = self._place("x", x - down), self._place("y", y), self._place("x", x + up), self._place("y", y)
        else:
            ends = self._place("x", x), self._place("y", y - down), self._place("x", x), self._place("y", y + up)
        yield _line(*ends, error["color"], width=error["thickness"])


def text_width(text: str) -> float:
    """About how many pixels wide a text is, in the figures' font."""
    return 6.8 * len(unescape(text))


def _marker(marker: Mapping[str, Any], x: float, y: float, size: float, tone: str, opacity: float = 1) -> str:
    edge = marker.get("line")  # of marks that lie on a coloured ground
    rim = f' stroke="{edge["color"]}" stroke-width="{edge["width"]}"' if edge else ""
    if marker.get("symbol") == "diamond":
        points = f"{x:.1f},{y - size:.1f} {x + size:.1f},{y:.1f} {x:.1f},{y + size:.1f} {x - size:.1f},{y:.1f}"
        return f'<polygon points="{points}" fill="{tone}"{rim}/>'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size}" fill="{tone}" fill-opacity="{opacity}"{rim}/>'


def _plain(text: str) -> str:
    """Text as SVG holds it; plotly's own entities (&lt;) stay what they are."""
    return escape(unescape(text), quote=False)


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", size: int = 12, fill: str = INK,
    turn: tuple[float, float, float] | None = None,
) -> str:  # fmt: skip
    rotate = f' transform="rotate({turn[0]} {turn[1]:.1f} {turn[2]:.1f})"' if turn else ""
    # Attributes, not CSS: GitHub drops style sheets.
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{fill}" '
        f'xml:space="preserve"{rotate}>{_plain(text)}</text>'
    )


def _beside(x: float, y: float, size: float, text: str, side: str) -> str:
    """The name of a point, at the side where plotly would put it."""
    if side == "middle left":
        return _text(x - size - 4, y + 4, text, anchor="end")
    if side == "middle right":
        return _text(x + size + 4, y + 4, text)
    return _text(x, y - size - 4 if side == "top center" else y + size + 13, text, anchor="middle")


def _line(x0: float, y0: float, x1: float, y1: float, tone: str, *, width: float = 1, dash: str | None = None) -> str:
    dashes = ' stroke-dasharray="4 3"' if dash else ""
    return (
        f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" stroke="{tone}" '
        f'stroke-width="{width}"{dashes}/>'
    )
