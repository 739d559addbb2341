"""Figures say what they show: labels, units, a scale that means something, and a still picture of the same numbers."""

import json
import sys
import xml.etree.ElementTree as ET
from html import unescape
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import xarray as xr

from mi_utils import plots, stats, svg
from mi_utils.circuits import Circuit
from mi_utils.graph import Graph

TOKENS = ["0 <|endoftext|>", "1 Mary (IO)", "2 and", "3 John (S1)", "4 gave", "5 to", "6 to (END)"]
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def effect():
    values = np.random.default_rng(0).normal(0, 0.05, size=(12, 3, len(TOKENS)))
    values[:, 1, 3] += 0.8
    return xr.DataArray(
        values, dims=("prompt", "layer", "pos"), name="effect",
        coords={
            "layer": np.arange(3), "pos": np.arange(len(TOKENS)), "token": ("pos", TOKENS),
            "template": ("prompt", ["short", "long {A}"] * 6),
            "clean": ("prompt", np.full(12, 3.0)), "corrupted": ("prompt", np.full(12, -3.0)),
        },
        attrs={"model": "smallworld", "site": "resid_pre", "mode": "denoising"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def parts():
    values = np.random.default_rng(1).normal([3.0, -1.0, 0.2, 0.5], 0.3, size=(12, 4))
    names = ["L0H0", "L0H1", "mlp L0", "bias"]
    return xr.DataArray(values, dims=("prompt", "component"), coords={"component": names}, name="attribution")


@pytest.fixture(scope="module")
def patterns():
    n = len(TOKENS)
    values = np.tril(np.random.default_rng(2).random((4, 2, 3, n, n)))
    values /= values.sum(-1, keepdims=True)
    return xr.DataArray(
        values, dims=("prompt", "layer", "head", "query", "key"), name="attention",
        coords={"layer": [0, 1], "head": [0, 1, 2], "query_token": ("query", TOKENS), "key_token": ("key", TOKENS)},
    )  # fmt: skip


def induction():
    """Two heads and an MLP, with a score for each edge."""
    known = {"embed -> L0H2.v": 3.0, "L0H2 -> L1H3.k": 4.0, "L1H3 -> logits": 5.0, "mlp L0 -> logits": -1.0,
             "embed -> mlp L0": 0.5, "embed -> L1H3.q": 2.0}  # fmt: skip
    return Circuit(Graph(2, 4), tuple(known), known)


FAMILIES = {"topk": ([16, 4, 48], [0.9, 0.8, 0.95]), "L1 & more": (8.0, 0.4)}


@pytest.fixture(scope="module")
def every_kind(effect, parts, patterns):
    return {
        "heatmap": plots.heatmap(effect),
        "bars": plots.bars(parts),
        "distribution": plots.distribution(effect.sel(layer=1, pos=3), by="template"),
        "attention": plots.attention(patterns, heads=[(0, 0), (1, 2)]),
        "lines": plots.lines(effect.sel(pos=[3, 6])),
        "scatter": plots.scatter(effect, 2 * effect, x_label="exact", y_label="estimate"),
        "circuit": plots.circuit(induction()),
        "tradeoff": plots.tradeoff(FAMILIES, x_label="L0", y_label="variance explained"),
    }


KINDS = ["heatmap", "bars", "distribution", "attention", "lines", "scatter", "circuit", "tradeoff"]


def texts(figure):
    return [element.text for element in ET.fromstring(svg.draw(figure.to_dict())).iter(f"{SVG}text")]


# ------------------------------------------------------------------------------------------------ all figures


@pytest.mark.parametrize("kind", KINDS)
def test_axes_are_named_and_the_figure_is_small_and_plain(every_kind, kind):
    figure = every_kind[kind]
    raw = figure.to_plotly_json()
    titles = [raw["layout"][axis]["title"]["text"] for axis in ("xaxis", "yaxis")]
    assert all(titles) or kind == "attention"
    assert figure.layout.title.text and figure.layout.title.subtitle.text
    text = figure.to_json()
    assert len(text) < 30_000 and "bdata" not in text and "http" not in text  # plain lists: read by any plotly


def test_control_characters_of_byte_tokens_do_not_break_the_still_picture():
    coords = {"token": ("pos", ["0 \x05", "1 \x10a"])}
    data = xr.DataArray(np.eye(2), dims=("layer", "pos"), coords=coords, name="effect")
    ET.fromstring(svg.draw(plots.heatmap(data).to_plotly_json()))


@pytest.mark.parametrize("kind", KINDS)
def test_the_still_picture_is_of_plain_elements_and_holds_every_label(every_kind, kind):
    figure = every_kind[kind]
    root = ET.fromstring(svg.draw(figure.to_dict()))
    assert {element.tag.removeprefix(SVG) for element in root.iter()} <= {
        "svg", "title", "rect", "line", "text", "circle", "polyline", "polygon",
    }  # fmt: skip
    assert root.find(f"{SVG}title").text == figure.layout.title.text
    shown = texts(figure)
    for axis in (figure.layout.xaxis, figure.layout.yaxis):
        assert {unescape(label) for label in axis.ticktext or ()} <= set(shown)
    width, height = float(root.get("width")), float(root.get("height"))
    for box in root.iter(f"{SVG}rect"):
        assert -1 <= float(box.get("x", 0)) <= width and -1 <= float(box.get("y", 0)) <= height


def test_a_figure_drawn_elsewhere_has_no_still_picture():
    import plotly.graph_objects as go

    assert svg.draw(go.Figure(go.Bar(x=[1], y=[2])).to_dict()) is None


# ------------------------------------------------------------------------------------------------ heat maps


def test_a_map_shows_what_is_significant_by_itself_and_what_is_left_after_correction(effect):
    tested = stats.max_statistic(effect)
    tested["p_value"][0, 1], tested["p_corrected"][0, 1] = 0.03, 0.4  # by itself only
    figure = plots.heatmap(effect, significance=tested)
    _, alone, corrected = figure.data
    assert (1.36, 0.27) in zip(alone.x, alone.y, strict=True)
    assert list(zip(corrected.x, corrected.y, strict=True)) == [(3.36, 1.27)]
    assert f"{len(corrected.x)} of 21" in corrected.name and "corrected" in corrected.name
    shown = texts(figure)
    assert alone.name in shown and corrected.name in shown
    still = ET.fromstring(svg.draw(figure.to_dict()))
    assert len(list(still.iter(f"{SVG}circle"))) == len(alone.x) + 1  # and one in the legend
    diamonds = list(still.iter(f"{SVG}polygon"))
    assert len(diamonds) == 2 and diamonds[0].get("stroke") == "#ffffff", "seen on a dark cell, too"
    turned = plots.heatmap(effect, significance=tested.transpose("pos", "layer"))
    assert turned.data[2].x == corrected.x
    with pytest.raises(ValueError, match="other cells: 3 layer × 7 pos and 3 layer × 2 pos"):
        plots.heatmap(effect, significance=tested.isel(pos=slice(2)))
    with pytest.raises(ValueError, match="max_statistic"):
        plots.heatmap(effect, significance=stats.summarise(effect))


def test_an_effect_is_averaged_and_centred_on_zero(effect):
    figure = plots.heatmap(effect)
    (trace,) = figure.data
    np.testing.assert_allclose(np.array(trace.z, dtype=float), effect.mean("prompt"), rtol=1e-3)
    axis = figure.layout.coloraxis
    assert axis.cmin == -axis.cmax == -1.0
    assert dict(axis.colorscale)[0.5] == "#f7f7f7" and axis.colorbar.title.text == "patching effect"
    narrow = plots.heatmap(effect, limit=0.2).layout.coloraxis
    assert (narrow.cmin, narrow.cmax) == (-0.2, 0.2)
    assert "smallworld" in figure.layout.title.subtitle.text and "12 prompts" in figure.layout.title.subtitle.text


def test_the_first_layer_is_at_the_bottom_whatever_the_order_of_axes(effect):
    for result in (effect, effect.transpose("prompt", "pos", "layer")):
        figure = plots.heatmap(result)
        assert figure.layout.yaxis.title.text == "layer" and list(figure.layout.yaxis.range) == [-0.5, 2.5]
        assert np.argmax(np.array(figure.data[0].z)) == 1 * len(TOKENS) + 3


def test_tokens_stand_on_the_axis_each_for_itself(effect):
    repeated = effect.assign_coords(token=("pos", ["to"] * len(TOKENS)))
    axis = plots.heatmap(repeated).layout.xaxis
    assert list(axis.ticktext) == ["to"] * len(TOKENS) and list(axis.tickvals) == list(range(len(TOKENS)))
    marked = plots.heatmap(effect).layout.xaxis.ticktext
    assert marked[0] == "0 &lt;|endoftext|&gt;"  # or plotly would take it for markup
    assert "0 <|endoftext|>" in texts(plots.heatmap(effect))


def test_numbers_in_cells_come_from_the_values_themselves(effect):
    trace = plots.heatmap(effect).data[0]
    assert trace.text is None and trace.texttemplate == "%{z:.2f}"  # a rounded text could differ between machines
    tiny = xr.DataArray([[-0.001, -0.126]], dims=("layer", "head"), name="effect")
    assert {"0.00", "\u22120.13"} <= set(texts(plots.heatmap(tiny)))


def test_scores_and_probabilities_keep_one_colour(effect):
    scores = xr.Dataset({"prefix_matching": (("layer", "head"), np.full((2, 2), 0.25))})["prefix_matching"]
    axis = plots.heatmap(scores).layout.coloraxis
    assert (axis.cmin, axis.cmax) == (0.0, 1.0) and axis.colorscale[0][1] == plots.SEQUENTIAL[0]
    log_prob = xr.DataArray(np.array([[-3.0, -1.0]]), dims=("layer", "pos"), name="log_prob")
    axis = plots.heatmap(log_prob).layout.coloraxis
    assert (axis.cmin, axis.cmax) == (-3.0, 0.0)


def test_nothing_at_all_is_still_a_figure():
    zeros = xr.DataArray(np.zeros((2, 2)), dims=("layer", "head"), name="attribution")
    axis = plots.heatmap(zeros).layout.coloraxis
    assert axis.cmin < 0 < axis.cmax
    assert svg.draw(plots.heatmap(zeros).to_dict())
    holes = xr.DataArray([[np.nan, 0.5]], dims=("layer", "head"), name="effect")
    assert list(plots.heatmap(holes).data[0].z[0]) == [None, 0.5]
    assert svg.draw(plots.heatmap(holes).to_dict())


def test_the_still_picture_has_the_same_colours():
    values = xr.DataArray([[-1.0, 0.0, 1.0]], dims=("layer", "head"), name="effect")
    root = ET.fromstring(svg.draw(plots.heatmap(values).to_dict()))
    fills = [box.get("fill") for box in root.iter(f"{SVG}rect")]
    for colour in (plots.DIVERGING[0], "#f7f7f7", plots.DIVERGING[-1]):
        assert colour in fills
    assert svg.colour([[0, "#000000"], [1, "#ffffff"]], 0.5) in ("#7f7f7f", "#808080")


# ------------------------------------------------------------------------------------------------ bars and lines


def test_bars_carry_the_interval_of_the_statistics(parts):
    (trace,) = plots.bars(parts).data
    summary = stats.summarise(parts)
    np.testing.assert_allclose(trace.x, summary["mean"], rtol=1e-3)
    np.testing.assert_allclose(np.add(trace.x, trace.error_x.array), summary["high"], rtol=1e-2, atol=1e-3)
    np.testing.assert_allclose(np.subtract(trace.x, trace.error_x.arrayminus), summary["low"], rtol=1e-2, atol=1e-3)
    assert plots.bars(summary).data[0].to_plotly_json() == trace.to_plotly_json()
    assert plots.bars(parts.mean("prompt")).data[0].error_x.array is None


def test_the_largest_bars_come_first(parts):
    figure = plots.bars(parts, top=2)
    assert list(figure.layout.yaxis.ticktext) == ["L0H0", "L0H1"]
    assert list(figure.data[0].marker.color) == [plots.BLUE, plots.RED]
    assert "2 largest of 4" in figure.layout.title.subtitle.text
    low, high = figure.layout.yaxis.range
    assert low > high  # the first at the top


def test_lines_carry_the_dimension_only_where_the_entry_does_not_name_itself():
    lenses = xr.DataArray(np.eye(2), dims=("lens", "layer"), coords={"lens": ["logit lens", "tuned lens"]}, name="kl")
    assert [trace.name for trace in plots.lines(lenses).data] == ["logit lens", "tuned lens"]
    heads = xr.DataArray(np.eye(2), dims=("head", "layer"), name="kl")
    assert [trace.name for trace in plots.lines(heads).data] == ["head 0", "head 1"]


def test_lines_one_for_each_entry_and_steps_to_scale(effect):
    figure = plots.lines(effect.sel(pos=[3, 6]))
    assert [trace.name for trace in figure.data] == ["pos 3 John (S1)", "pos 6 to (END)"]
    assert figure.layout.showlegend and figure.data[0].error_y.array is not None
    steps = xr.Dataset({"score": ("step", [0.0, 0.1, 1.0])}, coords={"step": [0, 100, 3000]})
    figure = plots.lines(steps)
    assert list(figure.data[0].x) == [0, 100, 3000] and figure.layout.xaxis.title.text == "training step"


# ------------------------------------------------------------------------------------------------ points


def test_every_cell_is_a_point_beside_the_diagonal_and_the_largest_are_named(effect):
    figure = plots.scatter(effect, 2 * effect.transpose("pos", "layer", "prompt"), x_label="x", y_label="y", named=1)
    diagonal, points = figure.data
    mean = effect.mean("prompt").values.ravel()
    np.testing.assert_allclose(points.x, mean, rtol=1e-3)
    np.testing.assert_allclose(points.y, 2 * mean, rtol=1e-3)
    assert diagonal.x == diagonal.y == figure.layout.xaxis.range == figure.layout.yaxis.range
    assert [text for text in points.text if text] == ["L1, 3 John (S1)"] == [points.text[1 * len(TOKENS) + 3]]
    assert "L1, 3 John (S1)" in texts(figure)
    by_head = effect.isel(pos=[0, 1]).drop_vars(["pos", "token"]).rename(pos="head")
    assert plots.scatter(by_head, by_head, x_label="x", y_label="y").data[1].customdata[-1] == "L2H1"


def test_names_of_points_do_not_lie_on_one_another(effect):
    close = xr.DataArray([[0.5, 0.51, 0.5], [0.5, 0.1, -0.2]], dims=("layer", "head"), name="effect")
    figure = plots.scatter(close, close, x_label="x", y_label="y")
    sides = figure.data[1].textposition
    assert len({sides[i] for i in (0, 1, 2)}) == 3 and sides[5] == "middle right"
    anchors = {text.get("text-anchor") for text in ET.fromstring(svg.draw(figure.to_dict())).iter(f"{SVG}text")
               if text.text in ("L0H0", "L0H1", "L0H2")}  # fmt: skip
    assert len(anchors) > 1


def test_a_tradeoff_joins_the_settings_of_a_family_from_left_to_right():
    figure = plots.tradeoff(FAMILIES, x_label="L0", y_label="variance explained")
    topk, l1 = figure.data
    assert topk.x == (4, 16, 48) and topk.y == (0.8, 0.9, 0.95) and l1.x == (8,) and l1.y == (0.4,)
    assert figure.layout.xaxis.range[0] < 0 < 48 < figure.layout.xaxis.range[1]  # what is paid is seen from zero
    assert "5 settings" not in texts(figure) and "4 settings" in texts(figure) and "L1 & more" in texts(figure)


# ------------------------------------------------------------------------------------------------ distributions


def test_every_prompt_is_a_point_and_every_group_has_its_mean(effect):
    values = effect.sel(layer=1, pos=3)
    points, centre = plots.distribution(values, by="template").data
    assert len(points.x) == 12 and len(centre.x) == 2
    np.testing.assert_allclose(centre.x, [values[0::2].mean(), values[1::2].mean()], rtol=1e-3)
    interval = stats.bootstrap_interval(values[0::2])
    assert centre.x[0] + centre.error_x.array[0] == pytest.approx(interval.high, abs=2e-3)
    figure = plots.distribution({"trained": values, "random weights": np.zeros(5)})
    assert list(figure.layout.yaxis.ticktext) == ["trained (n = 12)", "random weights (n = 5)"]


def test_a_handful_of_prompts_gets_no_interval_and_the_axis_says_what_it_is(effect):
    values = effect.sel(layer=1, pos=3)
    figure = plots.distribution({"few": values[:4], "more": values}, label="size (logits)", point="a head")
    points, centre = figure.data
    assert centre.error_x.array[0] == centre.error_x.arrayminus[0] == 0 < centre.error_x.array[1]
    assert figure.layout.xaxis.title.text == "size (logits)" and points.name == "a head"


def test_a_subtitle_says_only_what_all_groups_share(effect):
    other = effect.assign_attrs(mode="noising")
    figure = plots.distribution({"a": effect.sel(layer=1, pos=3), "b": other.sel(layer=1, pos=3)})
    assert figure.layout.title.subtitle.text == "smallworld \u00b7 resid_pre \u00b7 12 prompts"


# ------------------------------------------------------------------------------------------------ attention


def test_chosen_queries_keep_all_that_they_look_at(patterns):
    places = {dim: np.arange(len(TOKENS)) for dim in ("query", "key")}
    last = plots.attention(patterns.assign_coords(places).isel(query=[-1]), heads=[(0, 0)])
    assert np.isfinite(np.array(last.data[0].z, dtype=float)).all()


def test_cells_are_drawn_against_their_like(effect):
    across = effect.isel(layer=[2, 1, 0])
    points = plots.scatter(effect, across, x_label="x", y_label="y").data[-1]
    assert points.x == points.y
    with pytest.raises(ValueError, match="other cells: layer"):
        plots.scatter(effect, effect.assign_coords(layer=[3, 4, 5]), x_label="x", y_label="y")


def test_a_missing_value_leaves_a_gap_and_equal_names_stay_apart(effect):
    holed = effect.mean("prompt").isel(pos=0, drop=True).copy()
    holed[1] = np.nan
    for draw in (plots.lines, plots.bars):
        assert svg.draw(draw(holed).to_dict()) is not None
    assert plots.lines(effect.where(effect.prompt != 0).isel(pos=0, drop=True)).data[0].y == (None, None, None)
    named = effect.assign_coords(token=("pos", ["the"] * effect.sizes["pos"]))
    assert len(plots.lines(named, x="layer").data) == effect.sizes["pos"]


def test_a_figure_that_was_changed_by_hand_has_no_still_picture(effect):
    for change in (
        lambda figure: figure.update_yaxes(type="log"),
        lambda figure: figure.add_hline(y=1),
        lambda figure: figure.update_layout(title="mine"),
    ):
        figure = plots.lines(effect.mean("prompt").isel(pos=0, drop=True))
        change(figure)
        assert svg.draw(figure.to_dict()) is None


def test_attention_has_a_facet_a_head_and_leaves_the_mask_blank(patterns):
    figure = plots.attention(patterns, heads=[(0, 0), (1, 2)], prompt=1)
    assert [note.text for note in figure.layout.annotations] == ["L0H0", "L1H2"]
    first = np.array(figure.data[1].z, dtype=float)
    np.testing.assert_allclose(first[2, :3], patterns[1, 1, 2, 2, :3], rtol=1e-3)
    assert np.isnan(first[np.triu_indices(len(TOKENS), 1)]).all()
    axis = figure.layout.coloraxis
    assert (axis.cmin, axis.cmax) == (0.0, 1.0) and axis.colorbar.title.text == "attention probability"
    assert len(plots.attention(patterns).data) == 6
    assert figure.layout.yaxis.range[0] > figure.layout.yaxis.range[1]  # the first token at the top


# ------------------------------------------------------------------------------------------------ circuits


def test_a_circuit_goes_upwards_and_shows_sign_and_size(every_kind):
    figure = every_kind["circuit"]
    *edges, nodes = figure.data
    at = dict(zip(nodes.text, zip(nodes.x, nodes.y, strict=True), strict=True))
    assert list(figure.layout.yaxis.ticktext) == ["embeddings", "heads L0", "mlp L0", "heads L1", "logits"]
    assert at["embed"][1] < at["L0H2"][1] < at["mlp L0"][1] < at["L1H3"][1] < at["logits"][1]
    by_name = {edge.name: edge for edge in edges}
    assert len(by_name) == 6
    for name, edge in by_name.items():
        sender, receiver = (end.partition(".")[0] for end in name.split(" -> "))
        assert (edge.x[0], edge.y[0]) == pytest.approx(at[sender]) and edge.y[-1] == at[receiver][1]
        assert edge.x[-1] == pytest.approx(at[receiver][0], abs=0.1)
    assert by_name["mlp L0 -> logits"].line.color == plots.RED
    assert by_name["L1H3 -> logits"].line.color == plots.BLUE
    widths = [by_name[name].line.width for name in ("L1H3 -> logits", "L0H2 -> L1H3.k", "embed -> mlp L0")]
    assert widths == sorted(widths, reverse=True) and widths[0] == 6
    assert by_name["embed -> L1H3.q"].x[-1] < by_name["L0H2 -> L1H3.k"].x[-1]  # q enters at the left
    assert set(nodes.text) <= set(texts(figure))


def test_only_the_strongest_edges_are_drawn_and_a_circuit_without_scores_is_grey():
    figure = plots.circuit(induction(), top=2)
    assert {trace.name for trace in figure.data[:-1]} == {"L1H3 -> logits", "L0H2 -> L1H3.k"}
    assert "the 2 strongest of 6 edges" in figure.layout.title.subtitle.text
    plain = plots.circuit(Circuit(Graph(2, 4), induction().edges))
    assert {trace.line.color for trace in plain.data[:-1]} == {plots.GREY}
    with pytest.raises(ValueError, match="no edges"):
        plots.circuit(Circuit(Graph(2, 4), ()))
    with pytest.raises(ValueError, match="top=0"):
        plots.circuit(induction(), top=0)


# ------------------------------------------------------------------------------------------------ refusals


def test_the_wrong_shape_is_refused_with_what_there_is(effect, parts, patterns):
    with pytest.raises(ValueError, match=r"this result has \(layer\)"):
        plots.heatmap(effect.isel(pos=0))
    with pytest.raises(ValueError, match="or use heatmap"):
        plots.bars(effect)
    with pytest.raises(ValueError, match="one value a prompt"):
        plots.distribution({"a": effect})
    with pytest.raises(ValueError, match="12 values but 2 labels"):
        plots.distribution(effect.sel(layer=1, pos=3), by=["a", "b"])
    with pytest.raises(ValueError, match="L7H7"):
        plots.attention(patterns, heads=[(7, 7)])
    with pytest.raises(ValueError, match="choose 1 to"):
        plots.attention(patterns, heads=[])
    with pytest.raises(ValueError, match="layer, head, query and key"):
        plots.attention(effect)
    with pytest.raises(ValueError, match="3 layer × 7 pos and 2 layer × 7 pos"):
        plots.scatter(effect, effect[:, :2], x_label="x", y_label="y")
    many = xr.DataArray(np.zeros((9, 2)), dims=("head", "step"))
    with pytest.raises(ValueError, match="9 lines"):
        plots.lines(many)
    with pytest.raises(ValueError, match="2 values along x and 3 along y"):
        plots.tradeoff({"topk": ([1, 2], [1, 2, 3])}, x_label="x", y_label="y")
    with pytest.raises(ValueError, match="0 families"):
        plots.tradeoff({}, x_label="x", y_label="y")


# ------------------------------------------------------------------------------------------------ notebooks


@pytest.fixture
def renderers(monkeypatch):
    import plotly.io as pio

    before = pio.renderers.default
    monkeypatch.delenv("PLOTLY_RENDERER", raising=False)
    yield pio.renderers
    pio.renderers.default = before


@pytest.mark.parametrize(
    ("colab", "default", "forms"),
    [
        (False, "mi_utils", {plots.MIME, "image/svg+xml"}),
        (True, "colab+mi_utils", {plots.MIME, "image/svg+xml", "text/html"}),
    ],
)
def test_a_stored_figure_has_a_form_for_every_reader(colab, default, forms, renderers, monkeypatch, effect):
    if colab:
        monkeypatch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))
    plots.setup()
    assert renderers.default == default
    bundle = renderers._build_mime_bundle(plots.heatmap(effect).to_dict())
    assert set(bundle) == forms and bundle["image/svg+xml"].startswith("<svg")
    json.dumps(bundle)  # as a notebook stores it


def test_a_renderer_that_was_asked_for_is_left_alone(renderers, monkeypatch):
    renderers.default = "json"
    monkeypatch.setenv("PLOTLY_RENDERER", "json")
    plots.setup()
    assert renderers.default == "json"


@pytest.mark.parametrize(("shell", "notebook"), [(None, False), (object(), False), (SimpleNamespace(kernel=1), True)])
def test_only_a_notebook_is_set_up(monkeypatch, shell, notebook):
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    assert plots._in_notebook() is notebook


def test_a_heat_map_can_show_words_instead_of_numbers(effect):
    words = xr.DataArray(np.full((3, len(TOKENS)), " <b>the", dtype=object), dims=("layer", "pos"))
    words[0, 0] = " a word that is far too long for its cell"
    figure = plots.heatmap(effect, words=words)
    texts = figure.data[0].text
    assert texts[1][1] == "&lt;b&gt;the" and texts[0][0].endswith("…")
    assert "the" in svg.draw(figure.to_dict())
    turned = plots.heatmap(effect, words=words.transpose("pos", "layer"))
    assert [list(line) for line in turned.data[0].text] == [list(line) for line in texts]
    with pytest.raises(ValueError, match="one word a cell"):
        plots.heatmap(effect, words=words.isel(pos=slice(2)))


def test_turning_a_knob_draws_the_figure_anew(patterns):
    def show(layer, head):
        return plots.attention(patterns, title=f"head {layer}.{head}", heads=[(layer, head)])

    box = plots.knob(show, layer=(0, 1), head=(0, 2))
    layer, head, picture = box.children
    assert (layer.min, layer.max, head.max) == (0, 1, 2) and "head 0.0" in picture.value
    head.value = 2
    assert "head 0.2" in picture.value and "L0H2" in picture.value
    with pytest.raises(ValueError, match="range"):
        plots.knob(show)


def test_a_page_without_a_kernel_shows_what_the_knob_shows(patterns):
    box = plots.knob(lambda layer: plots.attention(patterns, heads=[(layer, 1)]), layer=(0, 1))
    still = box._repr_mimebundle_()["text/html"]
    assert "layer = 0" in still and box.children[-1].value in still and "<svg" in still
    box.children[0].value = 1
    assert "layer = 1" in box._repr_mimebundle_()["text/html"]


def test_a_knob_shows_text_and_takes_fractions():
    box = plots.knob(lambda scale: f"<{scale:.1f}>", scale=(-1.0, 1.0))
    slider, text = box.children
    assert text.value == "<pre>&lt;-1.0&gt;</pre>"
    slider.value = 0.5
    assert text.value == "<pre>&lt;0.5&gt;</pre>"
