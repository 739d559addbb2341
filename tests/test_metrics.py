"""Metrics, against numbers worked out by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from mi_utils import metrics

# Two prompts, two positions, four tokens; the first position must not matter.
LOGITS = torch.tensor(
    [
        [[9.0, 9.0, 9.0, 9.0], [0.0, 3.0, 1.0, 2.0]],
        [[0.0, 9.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]],
    ]
)
CORRECT, INCORRECT = torch.tensor([1, 2]), torch.tensor([3, 0])


def test_logit_difference_at_the_last_position():
    assert metrics.logit_difference(LOGITS, CORRECT, INCORRECT).tolist() == [1.0, -1.0]


def test_log_probability_and_rank():
    log_prob = metrics.answer_log_prob(LOGITS, CORRECT)
    assert log_prob[0].item() == pytest.approx(3 - math.log(1 + math.e**3 + math.e + math.e**2))
    assert log_prob[1].item() == pytest.approx(-math.log(3 + math.e))
    assert metrics.answer_rank(LOGITS, CORRECT).tolist() == [0, 1]
    assert metrics.answer_rank(LOGITS, INCORRECT).tolist() == [1, 0]


def test_log_probability_does_not_see_a_shift_of_the_logits():
    # folding centres the unembedding, which shifts all logits of a position by a constant
    assert torch.allclose(metrics.answer_log_prob(LOGITS + 5, CORRECT), metrics.answer_log_prob(LOGITS, CORRECT))


def test_accuracy_counts_a_tie_as_wrong():
    assert metrics.accuracy(LOGITS, CORRECT, INCORRECT) == 0.5
    assert metrics.accuracy(torch.zeros_like(LOGITS), CORRECT, INCORRECT) == 0.0


def test_kl_divergence_in_nats():
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
    expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    found = metrics.kl_divergence(p.log()[None, None], q.log()[None, None])
    assert found.tolist() == pytest.approx([expected])
    assert metrics.kl_divergence(LOGITS, LOGITS).abs().max() < 1e-6
    assert metrics.kl_divergence(LOGITS, LOGITS + 3).abs().max() < 1e-5


def test_half_precision_is_measured_in_single():
    assert metrics.logit_difference(LOGITS.half(), CORRECT, INCORRECT).dtype == torch.float32


@pytest.mark.parametrize("name", metrics.METRICS)
def test_named_metrics_give_one_number_a_prompt(name):
    pairs = SimpleNamespace(correct_ids=CORRECT, incorrect_ids=INCORRECT)
    metric = metrics.METRICS[name](pairs)
    assert metric(LOGITS).shape == (2,)
    assert torch.equal(metric(LOGITS), metric(LOGITS[:, -1:]))


def test_the_declared_logit_difference_names_its_columns():
    metric = metrics.METRICS["logit_diff"](SimpleNamespace(correct_ids=CORRECT, incorrect_ids=INCORRECT))
    assert isinstance(metric, metrics.LogitDiff)
    assert metric.correct.tolist() == [1, 2] and metric.incorrect.tolist() == [3, 0]
    assert metric(LOGITS).tolist() == [1.0, -1.0]
