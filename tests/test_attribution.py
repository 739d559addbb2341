"""Direct logit attribution, against the Hugging Face model and against weights we set ourselves."""

import handset
import numpy as np
import pytest
import torch

from mi_utils import models
from mi_utils.attribution import BY, direct_logit_attribution
from mi_utils.models import load_model
from mi_utils.prompts import PromptPairs


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return str(handset.save_random(tmp_path_factory.mktemp("random")))


@pytest.fixture(scope="module", params=["folded", "raw"])
def model(directory, request):
    return load_model(directory, processing=request.param)


@pytest.fixture(scope="module")
def pairs(model):
    return PromptPairs(model, **handset.induction_prompts(5), check=False)


@pytest.fixture(scope="module")
def hf(directory):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()


@pytest.mark.parametrize("on", ["clean", "corrupted"])
@pytest.mark.parametrize("by", BY)
def test_parts_sum_to_the_logit_difference(model, pairs, hf, by, on):
    tokens = pairs.clean_tokens if on == "clean" else pairs.corrupted_tokens
    with torch.no_grad():
        logits = hf(tokens).logits[:, -1]
    each = torch.arange(len(pairs))
    expected = (logits[each, pairs.correct_ids] - logits[each, pairs.incorrect_ids]).numpy()
    parts = direct_logit_attribution(model, pairs, by, on=on, batch_size=2)
    np.testing.assert_allclose(parts.sum("component"), expected, atol=1e-4)
    np.testing.assert_allclose(parts.logit_diff, expected, atol=1e-4)


def test_a_heads_part_is_what_it_writes_read_through_the_frozen_layernorm(directory, hf):
    """On raw weights, from the definition: the full vector a head writes, centred, scaled, unembedded."""
    model = load_model(directory, processing="raw")
    pairs = PromptPairs(model, **handset.induction_prompts(3), check=False)
    parts = direct_logit_attribution(model, pairs, by="head")

    caught = {}
    attention = hf.transformer.h[1].attn
    hooks = [
        attention.c_proj.register_forward_pre_hook(lambda module, args: caught.update(z=args[0][:, -1])),
        hf.transformer.ln_f.register_forward_pre_hook(lambda module, args: caught.update(stream=args[0][:, -1])),
    ]
    with torch.no_grad():
        hf(pairs.clean_tokens)
    for hook in hooks:
        hook.remove()
    scale = (caught["stream"].var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    for head in range(4):
        columns = slice(8 * head, 8 * head + 8)
        written = caught["z"][:, columns] @ attention.c_proj.weight[columns]
        read = (written - written.mean(-1, keepdim=True)) / scale * hf.transformer.ln_f.weight
        logits = (read @ hf.lm_head.weight.T).detach()
        each = torch.arange(3)
        expected = logits[each, pairs.correct_ids] - logits[each, pairs.incorrect_ids]
        np.testing.assert_allclose(parts.sel(component=f"L1H{head}"), expected, atol=1e-4)


def test_heads_layers_and_components_are_the_same_sums(model, pairs):
    component, head, layer = (direct_logit_attribution(model, pairs, by) for by in ("component", "head", "layer"))
    for index in range(3):
        in_layer = component.sel(component=[f"attn L{index}", f"mlp L{index}"]).sum("component")
        np.testing.assert_allclose(layer.sel(component=f"L{index}"), in_layer, atol=1e-5)
        of_heads = head[:, (head.layer == index) & (head.kind != "mlp")].sum("component")
        np.testing.assert_allclose(of_heads, component.sel(component=f"attn L{index}"), atol=1e-4)
    assert {"embed", "pos_embed", "bias"} <= set(component.component.values)


def test_only_the_induction_head_writes_the_answer(tmp_path):
    model = load_model(str(handset.save_handset(tmp_path)))
    pairs = PromptPairs(model, **handset.induction_prompts(4))
    parts = direct_logit_attribution(model, pairs, by="head")
    name = "L{}H{}".format(*handset.INDUCTION)
    np.testing.assert_allclose(parts.sel(component=name), handset.LOGIT, atol=1e-2)
    np.testing.assert_allclose(parts.drop_sel(component=name), 0, atol=1e-4)


def test_parts_that_do_not_sum_are_not_returned(model, pairs, monkeypatch):
    right = models.W_O
    monkeypatch.setattr(models, "W_O", lambda model, layer: 1.1 * right(model, layer))
    with pytest.raises(RuntimeError, match="away from the logit difference"):
        direct_logit_attribution(model, pairs, by="head")


def test_unknown_by_is_refused():
    with pytest.raises(ValueError, match="component, head, layer"):
        direct_logit_attribution(None, None, by="neuron")
