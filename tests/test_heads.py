"""Head scores and patterns, against the transformer whose heads we set ourselves."""

import handset
import numpy as np
import pytest

from mi_utils.heads import attention_patterns, head_scores, repeated_random_tokens
from mi_utils.models import load_model
from mi_utils.prompts import PromptPairs


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(str(handset.save_handset(tmp_path_factory.mktemp("handset"))))


@pytest.fixture(scope="module")
def scores(model):
    return head_scores(model, seed=0, n=4)


@pytest.mark.parametrize(
    ("score", "expected"), [("previous_token", handset.PREVIOUS), ("prefix_matching", handset.INDUCTION)]
)
def test_each_kind_of_head_is_found_where_it_was_put(scores, score, expected):
    values = scores[score].values
    assert np.unravel_index(values.argmax(), values.shape) == expected
    assert values[expected] == pytest.approx(1, abs=1e-4)
    others = np.delete(values.ravel(), np.ravel_multi_index(expected, values.shape))
    assert others.max() < 0.2


def test_repeats_are_predicted_by_the_induction_head(scores):
    assert scores.attrs["induction_accuracy"] == 1.0


def test_idle_heads_attend_uniformly(scores):
    """All their weights are zero, so query q gives each of its q + 1 positions 1 / (q + 1)."""
    length = scores.attrs["length"]
    queries = np.arange(length + 1, 2 * length + 1)
    assert scores.duplicate_token.values[0, 0] == pytest.approx((1 / (queries + 1)).mean(), abs=1e-6)
    assert scores.previous_token.values[0, 0] == pytest.approx((1 / np.arange(2, 2 * length + 2)).mean(), abs=1e-6)


def test_scores_read_the_entries_of_the_pattern_that_they_name(tmp_path):
    """On random weights, entry by entry from the definition."""
    model = load_model(str(handset.save_random(tmp_path)))
    length, n = 6, 2
    scores = head_scores(model, seed=1, n=n, length=length)
    patterns = attention_patterns(model, repeated_random_tokens(model, seed=1, n=n, length=length)).mean("prompt")
    repeat = range(length + 1, 2 * length + 1)  # BOS is 0, the tokens 1 to length, the repeat after them
    pairs = {
        "previous_token": [(query, query - 1) for query in range(1, 2 * length + 1)],
        "duplicate_token": [(query, query - length) for query in repeat],
        "prefix_matching": [(query, query - length + 1) for query in repeat],
    }
    for name, entries in pairs.items():
        expected = sum(patterns.sel(query=query, key=key).values for query, key in entries) / len(entries)
        np.testing.assert_allclose(scores[name], expected, atol=1e-6)


def test_random_tokens_are_said_twice_without_special_tokens(model):
    tokens = repeated_random_tokens(model, seed=3, n=2, length=10)
    assert tokens.shape == (2, 21)
    assert (tokens[:, 0] == 0).all() and (tokens[:, 1:] > 1).all()
    assert (tokens[:, 1:11] == tokens[:, 11:]).all()
    assert all(len(set(row.tolist())) == 10 for row in tokens[:, 1:11])
    assert (tokens == repeated_random_tokens(model, seed=3, n=2, length=10)).all()


def test_too_long_for_the_context_is_refused(model):
    with pytest.raises(ValueError, match="from 3 to 31"):
        head_scores(model, length=32)


def test_patterns_show_the_induction_head_at_work(model):
    pairs = PromptPairs(model, **handset.induction_prompts(n=2))
    patterns = attention_patterns(model, pairs, layers=[1], heads=[handset.INDUCTION[1]])
    assert patterns.dims == ("prompt", "layer", "head", "query", "key")
    assert patterns["layer"].values.tolist() == [1] and patterns["head"].values.tolist() == [3]
    np.testing.assert_allclose(patterns.sum("key"), 1, atol=1e-5)
    # It looks from the last word at B, the word after the first A.
    np.testing.assert_allclose(patterns[:, 0, 0, -1, handset.FIRST + 1], 1, atol=1e-4)
    assert patterns.key_token.sizes["key"] == patterns.sizes["key"]


def test_heads_that_are_not_there_are_refused(model):
    with pytest.raises(ValueError, match="no head"):
        attention_patterns(model, repeated_random_tokens(model, seed=0, n=1, length=5), heads=[7])
