"""The logit lens, against the Hugging Face model's own output."""

import handset
import numpy as np
import pytest
import torch

from mi_utils import models
from mi_utils.lens import logit_lens
from mi_utils.models import load_model
from mi_utils.prompts import PromptPairs


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return str(handset.save_random(tmp_path_factory.mktemp("random")))


@pytest.fixture(scope="module", params=["folded", "raw"])
def model(directory, request):
    return load_model(directory, processing=request.param)


@pytest.mark.parametrize("on", ["clean", "corrupted"])
def test_last_layer_is_the_models_own_log_probabilities(directory, model, on):
    from transformers import AutoModelForCausalLM

    pairs = PromptPairs(model, **handset.induction_prompts(5), check=False)
    lens = logit_lens(model, pairs, on=on, batch_size=2)  # the last batch is not full
    assert dict(lens.sizes) == {"prompt": 5, "layer": 4, "pos": 13}

    tokens = pairs.clean_tokens if on == "clean" else pairs.corrupted_tokens
    with torch.no_grad():
        own = AutoModelForCausalLM.from_pretrained(directory)(tokens).logits.log_softmax(-1)
    each = torch.arange(5)
    right, wrong = own[each, :, pairs.correct_ids], own[each, :, pairs.incorrect_ids]
    last = lens.isel(layer=-1)
    np.testing.assert_allclose(last.log_prob, right, atol=1e-4)
    np.testing.assert_allclose(last.logit_diff, right - wrong, atol=1e-4)
    np.testing.assert_array_equal(last["rank"], (own > right[..., None]).sum(-1))
    np.testing.assert_allclose(last.kl, 0, atol=1e-5)
    assert (lens.kl >= -1e-6).all() and float(lens.kl.isel(layer=0).mean()) > 0.01


def test_first_layer_reads_the_embeddings(directory, model):
    from transformers import AutoModelForCausalLM

    pairs = PromptPairs(model, **handset.induction_prompts(3), check=False)
    hf = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        stream = hf.transformer.wte(pairs.clean_tokens) + hf.transformer.wpe.weight[: pairs.clean_tokens.shape[1]]
        own = hf.lm_head(hf.transformer.ln_f(stream)).log_softmax(-1)
        final = hf(pairs.clean_tokens).logits.log_softmax(-1)
    first = logit_lens(model, pairs).isel(layer=0)
    np.testing.assert_allclose(first.log_prob, own[torch.arange(3), :, pairs.correct_ids], atol=1e-4)
    kl = torch.nn.functional.kl_div(own, final, log_target=True, reduction="none").sum(-1)  # KL(final || lens)
    np.testing.assert_allclose(first.kl, kl, atol=1e-4)


def test_the_answer_appears_after_the_induction_head(tmp_path):
    model = load_model(str(handset.save_handset(tmp_path)))
    lens = logit_lens(model, PromptPairs(model, **handset.induction_prompts(3)))
    at_end = lens.isel(pos=-1)
    np.testing.assert_allclose(at_end.logit_diff[:, :-1], 0, atol=1e-4)
    np.testing.assert_allclose(at_end.logit_diff[:, -1], handset.LOGIT, atol=1e-2)
    np.testing.assert_allclose(at_end.log_prob[:, 0], -np.log(len(handset.VOCABULARY)), atol=1e-4)
    assert (at_end["rank"][:, -1] == 0).all()


def test_a_lens_that_misses_the_models_last_step_is_refused(model, monkeypatch):
    pairs = PromptPairs(model, **handset.induction_prompts(2), check=False)
    right = models.unembed
    monkeypatch.setattr(models, "unembed", lambda model, stream: 1.1 * right(model, stream))
    with pytest.raises(RuntimeError, match="away from the model's own output"):
        logit_lens(model, pairs)


def test_wrong_side_is_refused():
    with pytest.raises(ValueError, match="clean"):
        logit_lens(None, None, on="left")
