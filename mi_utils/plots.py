"""Figures of labelled results.

Every function takes a result as the techniques return it, takes the mean over prompts itself, names axes, units and
model from the result's labels, and returns a plotly figure. Effects get a diverging scale with zero in its middle:
blue towards the clean run, red away from it.

How a figure gets into a notebook is decided in one place, :func:`setup`, which runs when this module is imported in
a notebook.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mi_utils import stats
from mi_utils.figures import CONFIG
from mi_utils.svg import TITLE_LEFT, draw, nice_step, text_width, ticks

if TYPE_CHECKING:
    import ipywidgets
    import plotly.graph_objects as go
    import xarray as xr
    from numpy.typing import ArrayLike

    from mi_utils.circuits import Circuit

BLUE, RED, GREY, INK = "#2166ac", "#b2182b", "#8c959f", "#24292f"
# Okabe and Ito's colours, told apart by colour-blind readers as well.
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f7f7f", "#000000"]
# ColorBrewer's RdBu and Blues.
DIVERGING = ["#67001f", "#b2182b", "#d6604d", "#f4a582", "#fddbc7", "#f7f7f7",
             "#d1e5f0", "#92c5de", "#4393c3", "#2166ac", "#053061"]  # fmt: skip
SEQUENTIAL = ["#f7fbff", "#deebf7", "#c6dbef", "#9ecae1", "#6baed6", "#4292c6", "#2171b5", "#08519c", "#08306b"]

MOST_FACETS, MOST_LINES = 16, len(COLOURS)
LEAST_FOR_INTERVAL = 6  # with fewer prompts in a group an interval says more about the method than about the group
LEAST_HEIGHT = 180  # of a map in pixels, so that its colour bar can be read
MIME = "application/vnd.plotly.v1+json"


class Quantity(NamedTuple):
    """How a measured quantity is shown."""

    label: str  # on axes
    diverging: bool = False
    limit: float | None = None  # the least that the colour scale reaches to
    short: str | None = None  # beside a colour bar, where there is less room

    @property
    def name(self) -> str:
        """The label without units."""
        return self.label.split(" (")[0]


QUANTITIES = {
    "effect": Quantity("patching effect (0 = corrupted, 1 = clean)", True, 1.0, "patching effect"),
    "attribution": Quantity("direct effect on the logit difference (logits)", True, None, "direct effect (logits)"),
    "logit_diff": Quantity("logit difference (logits)", diverging=True),
    "log_prob": Quantity("log-probability (nats)"),
    "rank": Quantity("rank of the answer (0 = first)"),
    "kl": Quantity("KL divergence (nats)"),
    "bias": Quantity("bias (nats)"),
    "probability": Quantity("probability", limit=1.0),
    "necessity": Quantity("necessity (0 = nothing lost, 1 = the whole gap)", short="necessity"),
    "accuracy": Quantity("accuracy (share of test examples)", limit=1.0, short="accuracy"),
    "selectivity": Quantity("selectivity (difference of accuracies)"),
    "erasure": Quantity("logit difference after erasure (logits)", diverging=True),
    "steering": Quantity("logit difference under steering (logits)", diverging=True),
    "attention": Quantity("attention probability", limit=1.0),
    "previous_token": Quantity("previous-token score", limit=1.0),
    "duplicate_token": Quantity("duplicate-token score", limit=1.0),
    "prefix_matching": Quantity("prefix-matching score", limit=1.0),
    "copying": Quantity("copying score (1 = copies, \u22121 = anti-copies)", True, 1.0, "copying score"),
    "matching": Quantity("matching score (1 = seeks its own token)", True, 1.0, "matching score"),
    "OV circuit": Quantity("OV circuit (logits, unscaled)", True),
    "attention score": Quantity("attention score (nats)", True),
}


def setup() -> None:
    """Choose how plotly figures are shown in this notebook.

    Each figure is stored in two forms: plotly's own, which Jupyter, VS Code and our HTML pages make interactive, and
    a still SVG, which GitHub and plain nbconvert show. Neither asks another host for anything. Colab knows only its
    own form, which is stored beside them there. A renderer named in PLOTLY_RENDERER is left alone.
    """
    if os.environ.get("PLOTLY_RENDERER"):
        return
    import plotly.io as pio
    from plotly.io.base_renderers import MimetypeRenderer

    class StoredRenderer(MimetypeRenderer):
        def to_mimebundle(self, fig_dict: dict[str, Any]) -> dict[str, Any]:
            bundle: dict[str, Any] = {MIME: fig_dict | {"config": CONFIG}}
            picture = draw(fig_dict)
            return bundle if picture is None else bundle | {"image/svg+xml": picture}

    pio.renderers["mi_utils"] = StoredRenderer()
    pio.renderers.default = "colab+mi_utils" if "google.colab" in sys.modules else "mi_utils"


def heatmap(
    result: xr.DataArray,
    title: str | None = None,
    *,
    limit: float | None = None,
    words: xr.DataArray | None = None,
    significance: xr.Dataset | None = None,
    level: float = 0.05,
) -> go.Figure:
    """Two dimensions of a result as colours, after the mean over prompts.

    The first dimension goes up (layer 0 at the bottom, as the residual stream flows), the second to the right. The
    scale of a patching effect reaches at least from -1 to 1, so that a map of noise looks like one.

    Args:
        limit: how far the colour scale reaches instead; small effects show at 0.2.
        words: text over the same two dimensions to write into the cells, such as the likeliest token.
        significance: what ``stats.max_statistic`` made of the same result. A small circle marks a cell whose own
            p-value is at most ``level``; a diamond one that stands after the correction for all cells.
        level: of both marks.

    Raises:
        ValueError: not two dimensions beside ``prompt``, or words or significance over others.
    """
    data = _mean(result)
    if data.ndim != 2:
        raise ValueError(
            f"A heat map shows two dimensions beside prompt; this result has {_dims(data)}. "
            "Choose with .sel(...) or average with .mean(...)."
        )
    if words is not None and (set(words.dims) != set(data.dims) or words.sizes != data.sizes):
        raise ValueError(f"words go over {_dims(words)} and the result over {_dims(data)}: give one word a cell.")
    if data.dims[1] == "layer":
        data = data.transpose()
    quantity = _quantity(result)
    rows, columns = (_labels(data, dim) for dim in data.dims)
    values = np.asarray(data, dtype=float)
    written: dict[str, Any] = {}
    if values.shape[1] <= 16 and values.size <= 200:
        written = {"texttemplate": "%{z:.2f}"}  # from the number itself: no text that may round otherwise elsewhere
    if words is not None:
        room = max(3, int(640 / 7 / len(columns)))  # letters that fit into a cell at the width of a notebook
        texts = [
            [_shorten(word.strip() or repr(word), room) for word in line]
            for line in words.transpose(*data.dims).values.tolist()
        ]
        written = {"text": texts, "texttemplate": "%{text}"}
    layout = _layout(
        title or _upper(quantity.name), _subtitle(result), height=24 * len(rows),
        x=_tick_axis(data.dims[1], columns, turn=_crowded(columns)), y=_tick_axis(data.dims[0], rows),
        coloraxis=_colour_axis(values, quantity, limit, 24 * len(rows)),
        **({} if significance is None else {"top": 24, "showlegend": True}),
    )  # fmt: skip
    trace = _heat_trace(values, rows, columns, data.dims, quantity) | written
    return _figure([trace, *_significance_marks(significance, data, level)], layout)


def _significance_marks(significance: xr.Dataset | None, data: xr.DataArray, level: float) -> list[dict[str, Any]]:
    """Marks in the corner of the cells that pass, uncorrected and corrected."""
    if significance is None:
        return []
    if not {"p_value", "p_corrected"} <= set(significance.variables):
        raise ValueError("significance must hold p_value and p_corrected: give what stats.max_statistic returns.")
    alone, corrected = (
        stats.in_order_of(significance[name], data).values <= level for name in ("p_value", "p_corrected")
    )
    traces = []
    for name, passed, tone, symbol in (
        (f"p \u2264 {level:g} by itself", alone & ~corrected, GREY, "circle"),
        (f"p \u2264 {level:g} corrected for all cells", corrected, INK, "diamond"),
    ):
        up, right = np.nonzero(passed)
        traces.append({
            "type": "scatter", "mode": "markers", "showlegend": True, "hoverinfo": "skip",
            "name": f"{name}: {len(up)} of {passed.size}",
            "x": [round(place + 0.36, 2) for place in right.tolist()],
            "y": [round(place + 0.27, 2) for place in up.tolist()],
            "marker": {"color": tone, "size": 9, "symbol": symbol, "line": {"color": "#ffffff", "width": 1.5}},
        })  # fmt: skip
    return traces


def attention(
    patterns: xr.DataArray,
    title: str | None = None,
    *,
    heads: Sequence[tuple[int, int]] | None = None,
    prompt: int | None = None,
) -> go.Figure:
    """Attention patterns, a facet a head: rows look at columns. What the causal mask hides is left blank.

    Args:
        patterns: from ``attention_patterns``, dims (prompt, layer, head, query, key).
        heads: (layer, head) of those to show; by default all that are there, up to 16.
        prompt: which prompt; by default the mean over them.

    Raises:
        ValueError: other dimensions, more than 16 heads, or heads that are not there.
    """
    if not {"layer", "head", "query", "key"} <= set(patterns.dims):
        raise ValueError(f"Attention patterns go over layer, head, query and key; this result over {_dims(patterns)}.")
    there = [(int(layer), int(head)) for layer in patterns["layer"].values for head in patterns["head"].values]
    heads = there if heads is None else [(int(layer), int(head)) for layer, head in heads]
    if absent := [f"L{layer}H{head}" for layer, head in heads if (layer, head) not in there]:
        raise ValueError(f"The patterns do not hold {', '.join(absent)}.")
    if not 1 <= len(heads) <= MOST_FACETS:
        raise ValueError(f"{len(heads)} heads: choose 1 to {MOST_FACETS} of them, heads=[(layer, head), ...].")
    subtitle = _subtitle(patterns)
    if prompt is not None:
        patterns = patterns.isel(prompt=[prompt])
        subtitle = _subtitle(patterns.isel(prompt=0), f"prompt {prompt}")
    data = _mean(patterns)
    queries, keys = _labels(data, "query"), _labels(data, "key")
    columns = min(len(heads), 2 if len(heads) in (2, 4) else 3 if len(heads) <= 9 else 4)
    rows = math.ceil(len(heads) / columns)
    side = min(26 * len(queries), [0, 420, 330, 240, 190][columns])
    labels = side / len(queries) >= 14  # pixels a label needs

    gap_x, gap_y, height = 0.04, 34, rows * side + (rows - 1) * 34
    width = (1 - gap_x * (columns - 1)) / columns
    axes, traces, notes = {}, [], []
    quantity = _quantity(patterns)
    x_axis, y_axis = _tick_axis("key", keys, turn=True), _tick_axis("query", queries)
    if not labels:
        x_axis, y_axis = (_numbered_axis(dim, len(queries)) for dim in ("key", "query"))
    for i, (layer, head) in enumerate(heads):
        row, column = divmod(i, columns)
        name = "" if i == 0 else str(i + 1)
        left = column * (width + gap_x)
        top = 1 - row * (side + gap_y) / height
        low = max(0.0, top - side / height)
        lowest = i + columns >= len(heads)
        axes[f"xaxis{name}"] = x_axis | {
            "domain": [round(left, 6), round(left + width, 6)], "anchor": f"y{name}",
            "showticklabels": lowest, "title": {"text": "key (looked at)" if lowest else ""},
        }  # fmt: skip
        axes[f"yaxis{name}"] = y_axis | {
            "domain": [round(low, 6), round(top, 6)], "anchor": f"x{name}", "range": y_axis["range"][::-1],
            "showticklabels": column == 0, "title": {"text": "query (looking)" if column == 0 else ""},
        }  # fmt: skip
        notes.append({
            "x": round(left + width / 2, 6), "y": round(top, 6), "xref": "paper", "yref": "paper", "xanchor": "center",
            "yanchor": "bottom", "showarrow": False, "text": f"L{layer}H{head}", "font": {"size": 12},
        })  # fmt: skip
        pattern = np.asarray(data.sel(layer=layer, head=head).transpose("query", "key"), dtype=float)
        # A query looks at what stands before it; some may have been selected.
        at = {dim: data[dim].values if dim in data.coords else np.arange(data.sizes[dim]) for dim in ("query", "key")}
        masked = np.where(at["key"] <= at["query"][:, None], pattern, np.nan)
        traces.append(
            _heat_trace(masked, queries, keys, ("query", "key"), quantity) | {"xaxis": f"x{name}", "yaxis": f"y{name}"}
        )
    layout = _layout(
        title or "Attention patterns", subtitle, height=height, x=x_axis, y=y_axis, top=22,
        coloraxis=_colour_axis(np.asarray([0.0, 1.0]), quantity, None, height), annotations=notes,
    )  # fmt: skip
    return _figure(traces, layout | axes)


def bars(result: xr.DataArray | xr.Dataset, title: str | None = None, *, top: int | None = None) -> go.Figure:
    """One dimension of a result as horizontal bars; whiskers are 95 % bootstrap intervals over prompts.

    Args:
        result: with or without ``prompt``, or what ``stats.summarise`` made of it.
        top: only so many, those farthest from zero, largest first.

    Raises:
        ValueError: not one dimension beside ``prompt``.
    """
    summary = _ends(result)
    data = summary["mean"]
    if data.ndim != 1:
        raise ValueError(
            f"Bars show one dimension beside prompt; this result has {_dims(data)}. Choose with .sel(...), "
            "average with .mean(...), or use heatmap."
        )
    there = data.size
    if top is not None and top < there:
        order = np.argsort(-np.abs(np.asarray(data)), kind="stable")[:top]
        summary = {name: part.isel({data.dims[0]: order}) for name, part in summary.items()}
        data = summary["mean"]
    names = _labels(data, data.dims[0], most=44)
    values = np.asarray(data, dtype=float)
    trace: dict[str, Any] = {
        "type": "bar", "orientation": "h", "x": _rounded(values), "y": list(range(len(names))), "customdata": names,
        "marker": {"color": [BLUE if value >= 0 else RED for value in values.tolist()]},
        "hovertemplate": "%{customdata}: %{x:.3f}<extra></extra>", "showlegend": False,
    }  # fmt: skip
    reach = [values, [0.0]]
    if "low" in summary:
        low, high = np.asarray(summary["low"], dtype=float), np.asarray(summary["high"], dtype=float)
        trace["error_x"] = _error_bars(values, low, high)
        reach += [low, high]
    shown = f"the {len(names)} largest of {there}" if len(names) < there else ""
    quantity = _quantity(result)
    axis = _tick_axis(data.dims[0], names)
    layout = _layout(
        title or _upper(quantity.name), _subtitle(result, shown), height=22 * len(names),
        x=_value_axis(np.concatenate(reach), quantity.label), y=axis | {"range": axis["range"][::-1]},
        shapes=[_mark("x", 0.0)],
    )  # fmt: skip
    return _figure([trace], layout)


def distribution(
    values: xr.DataArray | Mapping[str, ArrayLike],
    by: str | Sequence[Any] | None = None,
    title: str | None = None,
    *,
    label: str | None = None,
    point: str = "a prompt",
) -> go.Figure:
    """One value a prompt as a point each; the diamond is the group's mean with its 95 % bootstrap interval.

    A group of fewer than 6 gets no interval.

    Args:
        values: over ``prompt``; or several such under their names.
        by: a coordinate of the prompts ("template"), or one label a prompt, to group them.
        label: title of the value axis, for values that do not name themselves.
        point: what a point is, where it is not a prompt.

    Raises:
        ValueError: more than one value a prompt, or labels that do not match the values.
    """
    quantity, subtitle = Quantity("value"), ""
    if isinstance(values, Mapping) and not hasattr(values, "data_vars"):
        groups = {str(name): np.asarray(part, dtype=float) for name, part in values.items()}
        labelled = [part for part in values.values() if hasattr(part, "dims")]
        if labelled:
            quantity, subtitle = _quantity(labelled[0]), _subtitle(_in_common(labelled))
    else:
        numbers = np.asarray(values, dtype=float)
        if hasattr(values, "dims"):
            quantity, subtitle = _quantity(values), _subtitle(values)
        labels = (
            np.asarray(values[by]) if isinstance(by, str) else np.asarray(["all"] * len(numbers) if by is None else by)
        )
        if len(labels) != len(numbers):
            raise ValueError(f"{len(numbers)} values but {len(labels)} labels in by: give one label a value.")
        groups = {str(name): numbers[labels == name] for name in dict.fromkeys(labels.tolist())}
    quantity = quantity if label is None else Quantity(label)
    if wrong := [name for name, part in groups.items() if part.ndim != 1 or not len(part)]:
        raise ValueError(f"{wrong[0]}: a distribution shows one value a prompt. Choose a cell with .sel(...) first.")

    names = list(groups)
    points = {
        "type": "scatter", "mode": "markers", "name": escape(point), "showlegend": True,
        "x": _rounded(np.concatenate(list(groups.values()))),
        # Points of a row lie apart by the golden ratio: spread evenly, and the same every time.
        "y": [round(row + 0.5 * ((i * 0.618034) % 1 - 0.5), 4) for row, part in enumerate(groups.values())
              for i in range(len(part))],
        "marker": {"color": COLOURS[4], "size": 7, "opacity": 0.55},
        "hovertemplate": "%{x:.3f}<extra></extra>",
    }  # fmt: skip
    estimates = [
        stats.bootstrap_interval(part) if len(part) >= LEAST_FOR_INTERVAL and set(part.tolist()) != {0.0, 1.0} else None
        for part in groups.values()
    ]
    means = np.array([part.mean() for part in groups.values()])
    low = np.array([m if e is None else e.low for e, m in zip(estimates, means, strict=True)])
    high = np.array([m if e is None else e.high for e, m in zip(estimates, means, strict=True)])
    centre = {
        "type": "scatter", "mode": "markers", "name": "mean, 95 % interval", "showlegend": True,
        "x": _rounded(means), "y": list(range(len(names))), "error_x": _error_bars(means, low, high),
        "marker": {"color": INK, "size": 12, "symbol": "diamond"}, "hovertemplate": "mean %{x:.3f}<extra></extra>",
    }  # fmt: skip
    span = np.concatenate([*groups.values(), low, high, [0.0]])
    marks = [0.0]
    if quantity.label == QUANTITIES["effect"].label:
        span, marks = np.append(span, 1.0), [0.0, 1.0]
    counted = [f"{name} (n = {len(part)})" for name, part in groups.items()]
    by_name = by if isinstance(by, str) else ""
    axis = _tick_axis(by_name, [_shorten(name, 44) for name in counted])
    layout = _layout(
        title or f"Distribution of the {quantity.name}", subtitle, height=48 * len(names),
        x=_value_axis(span, quantity.label), y=axis | {"range": axis["range"][::-1]},
        shapes=[_mark("x", mark) for mark in marks], top=24, showlegend=True,
    )  # fmt: skip
    return _figure([points, centre], layout)


def lines(
    result: xr.DataArray | xr.Dataset, title: str | None = None, *, x: str | None = None, label: str | None = None
) -> go.Figure:
    """A result along one dimension, a line for each entry of the other; whiskers are 95 % bootstrap intervals.

    Args:
        result: one or two dimensions beside ``prompt``; a dataset gives a line a variable.
        x: the dimension along the axis; by default step, layer or pos, whichever comes first.
        label: title of the value axis, where the variables' own names will not do.

    Raises:
        ValueError: other dimensions, or more than 8 lines.
    """
    series: dict[str, dict[str, xr.DataArray]] = {}
    if hasattr(result, "data_vars") and "mean" not in result:
        parts = {str(name).replace("_", " "): part for name, part in result.data_vars.items()}
    else:
        parts = {"": result}
    for name, part in parts.items():
        ends = _ends(part)
        dims = ends["mean"].dims
        along = x or next((dim for dim in ("step", "layer", "pos") if dim in dims), dims[0] if dims else "")
        others = [dim for dim in dims if dim != along]
        if along not in dims or len(others) > 1:
            raise ValueError(f"Lines show one or two dimensions beside prompt; this result has {_dims(ends['mean'])}.")
        if not others:
            series[name] = ends
            continue
        for i, entry in enumerate(_labels(ends["mean"], others[0])):
            # "layer 3" and "head 3", but "tuned lens" rather than "lens tuned lens"
            key = f"{name} {entry if entry[:1].isalpha() else f'{others[0]} {entry}'}".strip()
            key = f"{key} ({i})" if key in series else key
            series[key] = {end: values.isel({others[0]: i}) for end, values in ends.items()}
    if len(series) > MOST_LINES:
        raise ValueError(f"{len(series)} lines cannot be told apart: choose up to {MOST_LINES}, or use heatmap.")

    first = next(iter(series.values()))["mean"]
    named = _labels(first, along)
    spaced = first[along].values if along in first.coords else np.arange(first.size)
    numeric = along == "step" and np.issubdtype(spaced.dtype, np.number)
    places = spaced.tolist() if numeric else list(range(first.size))
    traces, span = [], []
    for i, (name, ends) in enumerate(series.items()):
        values = np.asarray(ends["mean"], dtype=float)
        span.append(values)
        trace = {
            "type": "scatter", "mode": "lines+markers", "x": places, "y": _rounded(values), "name": escape(name),
            "line": {"color": COLOURS[i], "width": 2}, "marker": {"color": COLOURS[i], "size": 7},
            "customdata": named, "hovertemplate": f"{along} %{{customdata}}: %{{y:.3f}}<extra>{escape(name)}</extra>",
        }  # fmt: skip
        if "low" in ends:
            low, high = np.asarray(ends["low"], dtype=float), np.asarray(ends["high"], dtype=float)
            trace["error_y"] = _error_bars(values, low, high) | {"color": COLOURS[i]}
            span += [low, high]
        traces.append(trace)
    quantity = _quantity(parts[next(iter(parts))])
    value_title = label or (quantity.label if len(parts) == 1 else "value")
    y_axis = _value_axis(np.concatenate(span), value_title)
    x_axis = (
        _value_axis(np.asarray(places, dtype=float), _dim_title(along))
        if numeric
        else _tick_axis(along, named, turn=_crowded(named))
    )
    zero = [_mark("y", 0.0)] if y_axis["range"][0] < 0 < y_axis["range"][1] else []
    layout = _layout(
        title or _upper(value_title.split(" (")[0]), _subtitle(result), height=300, x=x_axis, y=y_axis,
        shapes=zero, top=24 if len(series) > 1 else 0, showlegend=len(series) > 1,
    )  # fmt: skip
    return _figure(traces, layout)


def scatter(
    x: xr.DataArray, y: xr.DataArray, title: str | None = None, *, x_label: str, y_label: str, named: int = 6
) -> go.Figure:
    """Two measurements of the same cells against each other, a point a cell, after the mean over prompts.

    Both axes have one scale. On the dotted diagonal the two agree.

    Args:
        x, y: results over the same dimensions with the same entries, in any order.
        named: how many points carry their name: those farthest from zero.

    Raises:
        ValueError: the two are not over the same cells.
    """
    across = _mean(x)
    down = stats.in_order_of(_mean(y), across)
    names = _cell_names(across)
    a, b = (np.asarray(values, dtype=float).ravel() for values in (across, down))
    shown = np.argsort(-np.hypot(a, b), kind="stable")[:named].tolist()
    axis = _value_axis(np.concatenate([a, b, [0.0]]), x_label)
    ends = axis["range"]
    unit = np.array([780, 360]) / (ends[1] - ends[0])  # pixels, at the width of a notebook
    sides = _label_sides(np.stack([a, b], axis=1) * unit, names, shown)
    diagonal = {
        "type": "scatter", "mode": "lines", "x": ends, "y": ends, "showlegend": False, "hoverinfo": "skip",
        "line": {"color": GREY, "width": 1, "dash": "dot"}, "marker": {"color": GREY},
    }  # fmt: skip
    points = {
        "type": "scatter", "mode": "markers+text", "x": _rounded(a), "y": _rounded(b), "showlegend": False,
        "text": [names[i] if i in shown else "" for i in range(len(names))],
        "textposition": [sides.get(i, "middle right") for i in range(len(names))],
        "marker": {"color": COLOURS[0], "size": 8, "opacity": 0.7}, "customdata": names,
        "hovertemplate": "%{customdata}: %{x:.3f}, %{y:.3f}<extra></extra>",
    }  # fmt: skip
    layout = _layout(
        title or f"{_upper(y_label)} against {x_label}", _subtitle(x), height=360, x=axis,
        y=axis | {"title": {"text": y_label}}, shapes=[_mark("x", 0.0), _mark("y", 0.0)],
    )  # fmt: skip
    return _figure([diagonal, points], layout)


def tradeoff(
    families: Mapping[str, tuple[ArrayLike, ArrayLike]], title: str | None = None, *, x_label: str, y_label: str
) -> go.Figure:
    """What one quantity costs in another: a point a setting, and a line through the settings of a family.

    Args:
        families: name to (values along x, values along y), a pair of equal length for each setting; in any order.

    Raises:
        ValueError: no settings, values of different lengths, or more than 8 families.
    """
    if not families or len(families) > MOST_LINES:
        raise ValueError(f"{len(families)} families of settings: 1 to {MOST_LINES} can be told apart.")
    traces, reach = [], []
    for i, (name, pair) in enumerate(families.items()):
        across, down = (np.atleast_1d(np.asarray(values, dtype=float)) for values in pair)
        if across.shape != down.shape or across.ndim != 1 or not across.size:
            raise ValueError(f"{name}: {across.size} values along x and {down.size} along y; a setting needs both.")
        order = np.argsort(across, kind="stable")
        reach.append((across, down))
        traces.append({
            "type": "scatter", "mode": "lines+markers", "name": escape(str(name)), "showlegend": True,
            "x": _rounded(across[order]), "y": _rounded(down[order]),
            "line": {"color": COLOURS[i], "width": 2}, "marker": {"color": COLOURS[i], "size": 9},
            "hovertemplate": f"%{{x:.3f}}, %{{y:.3f}}<extra>{escape(str(name))}</extra>",
        })  # fmt: skip
    x, y = (np.concatenate(values) for values in zip(*reach, strict=True))
    layout = _layout(
        title or f"{_upper(y_label)} against {x_label}", f"{x.size} settings", height=300,
        x=_value_axis(np.append(x, 0.0), x_label), y=_value_axis(y, y_label), top=24, showlegend=True,
    )  # fmt: skip
    return _figure(traces, layout)


def circuit(circuit: Circuit, title: str | None = None, *, top: int = 60) -> go.Figure:
    """A circuit as a graph: computation goes upwards, every head, MLP and the two ends is a point.

    Edges are as wide as their score is large, blue where it helps the answer, red where it harms, grey where the
    circuit has no scores of edges. They enter a head at the left (q), in the middle (k) or at the right (v).

    Args:
        top: only so many edges, those with the largest scores.

    Raises:
        ValueError: a circuit without edges, or a ``top`` below 1.
    """
    if not len(circuit):
        raise ValueError("This circuit has no edges to draw.")
    if top < 1:
        raise ValueError(f"top={top}: draw at least one edge.")
    scores = circuit.scores
    strongest = sorted(circuit.edges, key=lambda edge: -abs(scores.get(edge, 0.0)))[:top]
    ends = [edge.split(" -> ") for edge in strongest]
    nodes = {end.partition(".")[0] for edge in ends for end in edge}
    rows: dict[str, list[str]] = {}
    for node in circuit.graph.nodes:
        if node in nodes:
            kind = {"embed": "embeddings"}.get(node, node)
            rows.setdefault(f"heads L{node[1:].partition('H')[0]}" if node.startswith("L") else kind, []).append(node)

    places: dict[str, tuple[float, float]] = {}
    for height, row in enumerate(rows.values()):
        senders = {node: [s for s, r in ends if r.partition(".")[0] == node and s in places] for node in row}
        # Each near the middle of what it reads from, so that fewer edges cross.
        middle = {node: np.mean([places[s][0] for s in senders[node]]) if senders[node] else 0.0 for node in row}
        for i, node in enumerate(sorted(row, key=middle.__getitem__)):
            places[node] = (i - (len(row) - 1) / 2 + (0.25 if height % 2 else -0.25), height)
    reach = max(abs(x) for x, _ in places.values()) + 0.75

    largest = max((abs(scores.get(edge, 0.0)) for edge in strongest), default=0.0) or 1.0
    traces: list[dict[str, Any]] = []
    for edge, (sender, receiver) in reversed(list(zip(strongest, ends, strict=True))):  # the strongest on top
        score = scores.get(edge)
        tone = GREY if score is None else BLUE if score >= 0 else RED
        (x0, y0), (x1, y1) = places[sender], places[receiver.partition(".")[0]]
        x1 += {"q": -0.05, "k": 0.0, "v": 0.05}.get(receiver.partition(".")[2], 0.0)
        bend = 0.18 * (y1 - y0 - 1) * (1 if x0 + x1 >= 0 else -1)  # round the rows in between
        share = np.linspace(0, 1, 9 if bend else 2)
        said = edge if score is None else f"{edge}: {score:.3g}"
        traces.append({
            "type": "scatter", "mode": "lines", "showlegend": False, "name": edge,
            "x": _rounded(x0 + (x1 - x0) * share + bend * 4 * share * (1 - share)),
            "y": _rounded(y0 + (y1 - y0) * share),
            "line": {"color": tone, "width": round(1 + 5 * abs(score or 0.0) / largest, 1)}, "marker": {"color": tone},
            "opacity": 0.75, "hovertemplate": escape(said) + "<extra></extra>",
        })  # fmt: skip
        reach = max(reach, abs(bend) + max(abs(x0), abs(x1)) + 0.3)
    names = list(places)
    traces.append({
        "type": "scatter", "mode": "markers+text", "showlegend": False, "name": "nodes", "text": names,
        "textposition": "middle right", "x": _rounded([places[name][0] for name in names]),
        "y": [places[name][1] for name in names], "marker": {"color": INK, "size": 9},
        "hovertemplate": "%{text}<extra></extra>",
    })  # fmt: skip
    shown = f"the {len(strongest)} strongest of {len(circuit)} edges" if top < len(circuit) else f"{len(circuit)} edges"
    signs = "blue helps the answer, red harms it, width by score" if any(e in scores for e in strongest) else ""
    x_axis = _tick_axis("into a head: q left, k middle, v right", []) | {"range": [round(-reach, 3), round(reach, 3)]}
    layout = _layout(
        title or "Circuit", " \u00b7 ".join(part for part in (shown, signs) if part), height=52 * len(rows),
        x=x_axis, y=_tick_axis("order of computation", list(rows)),
    )  # fmt: skip
    return _figure(traces, layout)


def knob(show: Callable[..., go.Figure | str], **ranges: tuple[float, float]) -> ipywidgets.VBox:
    """What a function draws or says, with a slider for each of its arguments, ``layer=(0, 3)`` both ends included.

    A figure of this module is shown as its still picture, a dashboard as its HTML, text as it is.
    ``ipywidgets.interact`` would show more, but captures output to do so, and nbclient, which executes notebooks, now
    and then waits for its whole timeout on such a cell.

    Args:
        ranges: whole numbers give a slider of whole numbers, others one of forty steps.

    Raises:
        ValueError: no slider.
    """
    import ipywidgets

    class Knob(ipywidgets.VBox):
        def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
            """The widget and, for pages without a kernel, what it shows as it stands."""
            if "google.colab" in sys.modules:  # which may prefer the still form, and stores widgets itself
                return super()._repr_mimebundle_(**kwargs)
            set_to = ", ".join(f"{name} = {slider.value:.3g}" for name, slider in sliders.items())
            still = f'<div class="knob"><p>Shown for {escape(set_to)}</p>{picture.value}</div>'
            forms = {"text/plain": f"Knob at {set_to}", "text/html": still}
            return super()._repr_mimebundle_(**kwargs) | forms

    if not ranges:
        raise ValueError("Nothing to turn: give a range for each argument, layer=(0, 3).")
    common = {"continuous_update": False}
    sliders = {
        name: ipywidgets.IntSlider(value=low, min=low, max=high, description=name, **common)
        if isinstance(low, int) and isinstance(high, int)
        else ipywidgets.FloatSlider(value=low, min=low, max=high, step=(high - low) / 40, description=name, **common)
        for name, (low, high) in ranges.items()
    }
    picture = ipywidgets.HTML()

    def redraw(change: Any = None) -> None:
        shown = show(**{name: slider.value for name, slider in sliders.items()})
        if hasattr(shown, "html"):
            picture.value = shown.html
        else:
            picture.value = f"<pre>{escape(shown)}</pre>" if isinstance(shown, str) else draw(shown.to_dict()) or ""

    for slider in sliders.values():
        slider.observe(redraw, "value")
    redraw()
    return Knob([*sliders.values(), picture])


# ------------------------------------------------------------------------------------------------ reading results


def _mean(result: xr.DataArray) -> xr.DataArray:
    return result.mean("prompt", keep_attrs=True, skipna=False) if "prompt" in result.dims else result


def _ends(result: xr.DataArray | xr.Dataset) -> dict[str, xr.DataArray]:
    """Mean, and low and high where the result has prompts or is a summary."""
    if hasattr(result, "data_vars"):
        if not {"mean", "low", "high"} <= set(result.data_vars):
            raise ValueError(f"Choose one variable of the dataset: {', '.join(map(str, result.data_vars))}.")
        return {name: result[name] for name in ("mean", "low", "high")}
    if result.sizes.get("prompt", 0) >= stats.LEAST and bool(result.notnull().all()):
        summary = stats.summarise(result)
        return {name: summary[name] for name in ("mean", "low", "high")}
    return {"mean": _mean(result)}


def _quantity(result: xr.DataArray | xr.Dataset) -> Quantity:
    name = result.attrs.get("quantity") if hasattr(result, "data_vars") else result.name
    if name in QUANTITIES:
        return QUANTITIES[name]
    units = result.attrs.get("units")
    label = str(name or "value").replace("_", " ") + (f" ({units})" if units else "")
    values = result["mean"] if hasattr(result, "data_vars") and "mean" in result else result
    return Quantity(label, diverging=not hasattr(values, "data_vars") and bool((values < 0).any()))


def _in_common(results: Sequence[xr.DataArray]) -> xr.DataArray:
    """The first result, with only those attributes that all have."""
    first, *others = results
    same = {k: v for k, v in first.attrs.items() if all(np.array_equal(other.attrs.get(k), v) for other in others)}
    return first.drop_attrs().assign_attrs(same)


def _labels(result: xr.DataArray, dim: str, most: int = 24) -> list[str]:
    """Labels along a dimension: the coordinate that names its entries (token, layer_label), or its own values."""
    for name, coord in result.coords.items():
        if name != dim and coord.dims == (dim,) and str(name).endswith(("token", "label")):
            return [_shorten(str(value), most) for value in coord.values]
    values = result[dim].values if dim in result.coords else np.arange(result.sizes[dim])
    return [_shorten(str(value), most) for value in values]


def _cell_names(result: xr.DataArray) -> list[str]:
    """A name for each cell, in the order of its values: "L1H2", "L1H2, 15 to (END)"."""
    labels = {str(dim): _labels(result, dim) for dim in result.dims}
    names = []
    for index in np.ndindex(result.shape):
        place = {dim: labels[dim][i] for dim, i in zip(labels, index, strict=True)}
        start = f"L{place.pop('layer')}" if "layer" in place else ""
        start += f"H{place.pop('head')}" if "head" in place else ""
        names.append(", ".join(filter(None, [start, *place.values()])))
    return names


def _shorten(text: str, most: int = 24) -> str:
    """One line, not too long, and no markup to plotly."""
    text = text.replace("\n", "↵").replace("\t", "⇥")
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)  # XML allows no control codes
    return escape(text if len(text) <= most else text[: most - 1] + "…", quote=False)


def _subtitle(result: Any, extra: str = "") -> str:
    attrs = result.attrs
    heads = attrs.get("heads")
    parts = [attrs.get("model"), attrs.get("site"), attrs.get("mode"), ", ".join(heads) if heads else None]
    if attrs.get("on"):
        parts.append(f"{attrs['on']} prompts")
    n = attrs.get("n") if hasattr(result, "data_vars") and "mean" in result else result.sizes.get("prompt")
    if n:
        each = result.sizes.get("prompt") and len(result.dims) == 1
        prompts = f"{n} prompt" if n == 1 else f"{n} prompts"
        parts.append(prompts if each or n == 1 else f"mean over {prompts}")
    return escape(" · ".join(str(part) for part in [*parts, extra] if part), quote=False)


def _dims(result: Any) -> str:
    return "(" + ", ".join(map(str, result.dims)) + ")"


def _dim_title(dim: str) -> str:
    return {"pos": "position", "step": "training step", "": ""}.get(dim, dim.replace("_", " "))


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


# ------------------------------------------------------------------------------------------------ parts of figures


def _rounded(values: Any) -> list[float | None]:
    """Plain floats of 4 significant digits: small notebooks, and the same text from one run to the next."""
    return [float(f"{value:.4g}") if math.isfinite(value) else None for value in np.asarray(values, float).tolist()]


def _heat_trace(values: np.ndarray, rows: list[str], columns: list[str], dims: Any, quantity: Quantity) -> dict:
    y, x = (_dim_title(str(dim)) for dim in dims)
    return {
        "type": "heatmap", "z": [_rounded(line) for line in values], "coloraxis": "coloraxis",
        "x": list(range(len(columns))), "y": list(range(len(rows))), "xgap": 1, "ygap": 1, "hoverongaps": False,
        "customdata": [[[row, column] for column in columns] for row in rows],
        "hovertemplate": f"{y} %{{customdata[0]}}<br>{x} %{{customdata[1]}}<br>%{{z:.3f}}<extra></extra>",
    }  # fmt: skip


def _colour_axis(values: np.ndarray, quantity: Quantity, limit: float | None, height: int) -> dict[str, Any]:
    finite = values[np.isfinite(values)]
    least = 0.0 if limit is not None else quantity.limit or 0.0
    if quantity.diverging:
        high = limit or max(least, float(np.abs(finite).max(initial=0))) or 1.0
        low = -high
    else:
        low = min(0.0, float(finite.min(initial=0)))
        high = limit or max(least, float(finite.max(initial=low)))
        high = high if high > low else low + 1.0
    colours = DIVERGING if quantity.diverging else SEQUENTIAL
    low, high = (float(f"{end:.4g}") for end in (low, high))
    tall = min(max(height, LEAST_HEIGHT), 260)
    return {
        "colorscale": [[i / (len(colours) - 1), tone] for i, tone in enumerate(colours)], "cmin": low, "cmax": high,
        "colorbar": {
            "title": {"text": quantity.short or quantity.label, "side": "right"},
            "dtick": nice_step(high - low, 5), "thickness": 14, "outlinewidth": 0,
            "len": tall, "lenmode": "pixels", "y": 1, "yanchor": "top", "ypad": 0,
        },
    }  # fmt: skip


def _crowded(labels: list[str]) -> bool:
    """Whether labels side by side would run into each other at the width of a notebook."""
    return max(map(text_width, labels), default=0) + 10 > 640 / max(len(labels), 1)


def _tick_axis(dim: Any, labels: list[str], *, turn: bool = False) -> dict[str, Any]:
    """An axis of places 0, 1, 2, ... with a label each. By place, not by name: a repeated token stays two."""
    return {
        "title": {"text": _dim_title(str(dim))}, "tickvals": list(range(len(labels))), "ticktext": labels,
        "range": [-0.5, len(labels) - 0.5], "tickangle": -90 if turn else 0, "showgrid": False,
    }  # fmt: skip


def _numbered_axis(dim: str, size: int) -> dict[str, Any]:
    return {
        "title": {"text": _dim_title(dim)}, "range": [-0.5, size - 0.5], "dtick": nice_step(size, 5), "showgrid": False,
    }  # fmt: skip


def _value_axis(values: np.ndarray, title: str) -> dict[str, Any]:
    there = values[np.isfinite(values)]
    low, high = (float(there.min()), float(there.max())) if there.size else (0.0, 1.0)
    room = 0.05 * (high - low) or 0.5
    ends = [float(f"{low - room:.4g}"), float(f"{high + room:.4g}")]
    return {"title": {"text": title}, "range": ends, "dtick": nice_step(ends[1] - ends[0]), "showgrid": True}


def _label_sides(places: np.ndarray, names: list[str], shown: list[int]) -> dict[int, str]:
    """The side of each named point on which its name covers no other point and no other name, right if none does.

    Args:
        places: (points, 2), in pixels, upwards.
        shown: the points to name, the most important first.
    """
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in places.tolist()]
    sides = {}
    for i in shown:
        (x, y), wide = places[i].tolist(), text_width(names[i])
        boxes = {
            "middle right": (x + 5, y - 6, x + 8 + wide, y + 6), "middle left": (x - 8 - wide, y - 6, x - 5, y + 6),
            "top center": (x - wide / 2, y + 7, x + wide / 2, y + 19),
            "bottom center": (x - wide / 2, y - 19, x + wide / 2, y - 7),
        }  # fmt: skip
        free = [side for side, box in boxes.items() if not any(_overlap(box, other) for other in taken)]
        sides[i] = free[0] if free else "middle right"
        taken.append(boxes[sides[i]])
    return sides


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _error_bars(values: np.ndarray, low: np.ndarray, high: np.ndarray) -> dict[str, Any]:
    return {
        "type": "data", "symmetric": False, "array": _rounded(np.maximum(high - values, 0)),
        "arrayminus": _rounded(np.maximum(values - low, 0)), "color": INK, "thickness": 1.5, "width": 3,
    }  # fmt: skip


def _mark(axis: str, place: float) -> dict[str, Any]:
    """A dotted line across the figure."""
    line = {"color": GREY, "width": 1, "dash": "dot"}
    if axis == "x":
        return {"type": "line", "x0": place, "x1": place, "y0": 0, "y1": 1, "yref": "y domain", "line": line}
    return {"type": "line", "y0": place, "y1": place, "x0": 0, "x1": 1, "xref": "x domain", "yref": "y", "line": line}


def _layout(
    title: str, subtitle: str, *, height: int, x: dict[str, Any], y: dict[str, Any], top: int = 0, **more: Any
) -> dict[str, Any]:
    """Layout with margins that fit the labels, and ``height`` pixels for the data."""

    def longest(axis: dict[str, Any]) -> float:
        return max((text_width(text) for text in ticks(axis)[1]), default=0.0)

    bottom = 50 + (int(longest(x)) if x.get("tickangle") else 0)
    margin = {"l": int(longest(y)) + 46, "r": 96 if "coloraxis" in more else 24, "t": 62 + top, "b": bottom, "pad": 0}
    axes = {"gridcolor": "#e3e6ea", "zeroline": False, "ticks": "", "title": {"standoff": 8}}
    height = max(height, LEAST_HEIGHT if "coloraxis" in more else 70)
    return {
        "meta": {"mi_utils": 1},
        "title": {
            "text": escape(title, quote=False), "subtitle": {"text": subtitle, "font": {"size": 12}}, "x": 0,
            "xref": "container", "xanchor": "left", "y": 1, "yref": "container", "yanchor": "top",
            "pad": {"t": 12, "l": TITLE_LEFT},
            "font": {"size": 16},
        },
        "height": height + margin["t"] + margin["b"], "margin": margin, "xaxis": x, "yaxis": y,
        "legend": {"orientation": "h", "x": 0, "y": 1, "xanchor": "left", "yanchor": "bottom"}, "showlegend": False,
        "template": {"layout": {
            "font": {"family": "system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif",
                     "size": 12, "color": INK},
            "paper_bgcolor": "#ffffff", "plot_bgcolor": "#ffffff",
            "xaxis": axes, "yaxis": axes,
        }},
    } | more  # fmt: skip


def _figure(traces: list[dict[str, Any]], layout: dict[str, Any]) -> go.Figure:
    import plotly.graph_objects as go

    return go.Figure(data=traces, layout=layout)


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and hasattr(shell, "kernel")


if _in_notebook():
    setup()
