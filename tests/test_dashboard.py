"""The dashboard says what the search found, in three forms, and asks no other host."""

import re
import xml.etree.ElementTree as ET

import pytest
import torch
from IPython.core.formatters import DisplayFormatter
from test_features import Rectified, drawn, stream

from mi_utils import plots
from mi_utils.dashboard import _cut, _histogram, feature_dashboard
from mi_utils.features import Example, examples, feature_search


@pytest.fixture(scope="module")
def sae():
    sae = Rectified(drawn(12, 32), 0.25)
    sae.directions[5] = 0
    return sae


@pytest.fixture(scope="module")
def search(tiny, sae):
    return feature_search(tiny, sae, stream(tiny), progress=False)


def test_all_three_forms_say_what_was_found(tiny, sae, search):
    shown = feature_dashboard(search, tiny, sae, 3, n=4)
    best = examples(search, tiny, 3, 4)
    for form in (shown.html, shown.picture, shown.text):
        assert "Feature 3" in form and f"active on {int(search['active'][3]):,} of" in form
        assert all(f"{example.activation:.2f}" in form for example in best)
    assert set(shown._repr_mimebundle_()) == {"text/html", "image/svg+xml", "text/plain"}
    assert DisplayFormatter().format(shown)[0] == shown._repr_mimebundle_()
    assert shown.html.count("<tr><td") == 8
    assert shown.html.count("border-bottom: 2px solid") == 8  # the token that the example is about


def test_it_stands_alone_and_leaves_the_page_its_colours(tiny, sae, search):
    shown = feature_dashboard(search, tiny, sae, 3)
    for form in (shown.html, shown.picture):
        assert re.findall(r"https?://[^\s\"']+", form.replace("http://www.w3.org/2000/svg", "")) == []
        assert "<script" not in form and "url(" not in form
    assert not re.search(r"(?<![-\w])color: (?!inherit)", shown.html) and "background: #" not in shown.html
    root = ET.fromstring(shown.picture)
    left = [float(part.get("x")) for part in root.iter("{http://www.w3.org/2000/svg}text")]
    assert min(left) >= 0 and max(left) < float(root.get("width"))


def test_shades_are_the_activations(tiny, sae, search):
    shown = feature_dashboard(search, tiny, sae, 3, n=1)
    first = examples(search, tiny, 3, 1)[0]
    alphas = [float(each) for each in re.findall(r"rgba\(33, 102, 172, ([\d.]+)\)", shown.html)]
    assert max(alphas) == 0.7  # the strongest of all
    assert first.activation == max(first.activations)


def test_what_the_text_holds_is_no_markup(tiny, sae, search):
    nasty = Example(("<b>", "&", "\n"), (0.1, 0.2, 0.3), 1, 0.2, 0.5, 0)
    from mi_utils import dashboard

    content = dashboard._Content("a < b", "facts", [], [("<i>", 1.0)], [], [("Strongest", [nasty])], 0.3)
    html, picture = dashboard._html(content), dashboard._picture(content)
    assert "<i>" not in html and "&lt;b&gt;" in html and "↵" in html
    ET.fromstring(picture)


def test_a_dead_feature_has_a_dashboard_too(tiny, sae, search):
    shown = feature_dashboard(search, tiny, sae, 5)
    assert "dead" in shown.text and "<table" not in shown.html
    ET.fromstring(shown.picture)


def test_the_histogram_counts_every_active_token(search):
    for feature in (0, 3, 9):
        one = search.sel(feature=feature)
        bars = _histogram(one)
        assert sum(count for _, _, count in bars) == pytest.approx(int(one["active"]), abs=len(bars) / 2)
        assert bars[0][0] == 0 and bars[-1][1] >= float(one["top_activation"][0])


def test_examples_are_cut_around_their_token():
    example = Example(tuple(f" w{i}" for i in range(9)), tuple(map(float, range(9))), 6, 6.0, 0.5, 0)
    cut = _cut(example, 12)
    assert cut.words[cut.at] == " w6" and sum(map(len, cut.words)) <= 12 and cut.activations[cut.at] == 6
    assert _cut(example, 100).words == example.words


def test_a_search_of_another_dictionary_is_refused(tiny, sae, search):
    with pytest.raises(ValueError, match="this dictionary has 13"):
        feature_dashboard(search, tiny, Rectified(torch.ones(13, 32)), 3)
    with pytest.raises(ValueError, match="The search is of another"):
        feature_dashboard(search.assign_attrs(model="another"), tiny, sae, 3)


def test_a_knob_turns_through_dashboards(tiny, sae, search):
    box = plots.knob(lambda feature: feature_dashboard(search, tiny, sae, feature, n=2), feature=(0, 4))
    slider, picture = box.children
    slider.value = 3
    assert "Feature 3" in picture.value
