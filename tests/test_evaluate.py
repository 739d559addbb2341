"""The behaviour table can say no: a model that knows nothing reaches no bar, an oracle reaches them all."""

from types import SimpleNamespace

import pytest
import torch

from mi_utils.smallworld.evaluate import ASSETS, Evaluation
from mi_utils.smallworld.tokenizer import build_tokenizer
from mi_utils.smallworld.train import Recipe, TrainingModel


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def untrained(tokenizer):
    torch.manual_seed(0)
    model = TrainingModel(Recipe(n_layers=2, d_model=32, n_heads=2), len(tokenizer)).to_hugging_face(0)
    model.set_attn_implementation("eager")
    return Evaluation(model, tokenizer, n=60)


SHIPPED = sorted(path.parent.name for path in ASSETS.glob("*/config.json") if "-step" not in path.parent.name)


def test_three_seeds_are_shipped():
    assert SHIPPED == ["smallworld", "smallworld-seed1", "smallworld-seed2"]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_model_reaches_every_bar(name):
    missed = [m for m in Evaluation.load(ASSETS / name, n=200).all() if not m.reached]
    assert missed == []


def test_an_untrained_model_reaches_no_bar(untrained):
    assert [m for m in untrained.all() if m.reached] == []


def test_padding_does_not_change_the_answer(untrained):
    short, long = "Mary saw the", "When John and Mary went to the store, John gave a drink to"
    together = untrained.last_logits([short, long])
    torch.testing.assert_close(together[0], untrained.last_logits([short])[0], atol=1e-5, rtol=1e-5)


def test_a_year_oracle_reaches_the_bar(tokenizer):
    """A model that puts all its weight on 99 is right about every start year; one on 00 is wrong about every one."""

    class Says:
        def __init__(self, token):
            self.token = token

        def eval(self):
            return self

        def __call__(self, tokens, **_):
            logits = torch.full((*tokens.shape, len(tokenizer)), -20.0)
            logits[..., self.token] = 20.0
            return SimpleNamespace(logits=logits)

    values = [Evaluation(Says(tokenizer.encode(text)[0]), tokenizer, 50).greater_than()[0] for text in ("99", "00")]
    assert values[0].value == pytest.approx(1) and values[0].reached
    assert values[1].value == pytest.approx(-1) and not values[1].reached


def test_answers_of_several_tokens_are_refused(untrained):
    with pytest.raises(ValueError, match="must be one"):
        untrained.token(" unheard-of")
