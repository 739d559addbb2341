"""Direct logit attribution, against the Hugging Face model and against weights we set ourselves."""

import handset
import numpy as np
import pytest
import torch

from mi_utils import attribution, models
from mi_utils.attribution import BY, direct_logit_attribution
from mi_utils.models import load_model
from mi_utils.prompts import PromptPairs


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
    np.testing.assert_allclose(parts.sum(parts.dims[1:]), expected, atol=1e-4)
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
        direct_logit_attribution(None, None, by="token")
    with pytest.raises(ValueError, match="neurons a layer"):
        direct_logit_attribution(None, None, by="head", top=3)


def test_positions_sum_to_heads_and_each_is_what_was_read_there(model, pairs, hf):
    heads = direct_logit_attribution(model, pairs, by="head")
    by_position = direct_logit_attribution(model, pairs, by="position", batch_size=2)
    assert by_position.dims == ("prompt", "component", "pos")
    np.testing.assert_allclose(by_position.sum("pos"), heads, atol=1e-5)
    others = by_position[:, by_position.kind != "head"]
    assert float(abs(others.isel(pos=slice(0, -1))).max()) == 0, "written at the last position, and standing there"

    cached = models.cache(model, pairs.clean_tokens, ["pattern", "v"])
    stream = models.cache(model, pairs.clean_tokens, ["resid_post"], layers=[2])["resid_post", 2][:, -1]
    scale = (stream.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    norm, w_u = models.final_norm(model), models.W_U(model)
    for position in (0, 3):
        moved = cached["pattern", 1][:, 2, -1, position, None] * cached["v", 1][:, position, 2]
        written = moved @ models.W_O(model, 1)[2]
        read = (written - written.mean(-1, keepdim=True)) / scale * norm.weight
        logits = read @ (w_u[:, pairs.correct_ids] - w_u[:, pairs.incorrect_ids])
        np.testing.assert_allclose(by_position.sel(component="L1H2", pos=position), logits.diagonal(), atol=1e-5)


def test_neurons_sum_to_their_mlp_and_the_rest_of_a_layer_is_one_part(model, pairs):
    component = direct_logit_attribution(model, pairs, by="component")
    neurons = direct_logit_attribution(model, pairs, by="neuron")
    few = direct_logit_attribution(model, pairs, by="neuron", top=3, batch_size=2)
    for layer in range(3):
        mlp = component.sel(component=f"mlp L{layer}")
        for parts in (neurons, few):
            of_layer = (parts.layer == layer) & (parts.kind != "attn")
            np.testing.assert_allclose(parts[:, of_layer].sum("component"), mlp, atol=1e-4)
        own = neurons[:, (neurons.layer == layer) & (neurons.kind == "neuron")]
        assert own.sizes["component"] == 128
        strongest = set(own.component.values[np.argsort(-abs(own).mean("prompt").values)[:3]])
        kept = few[:, (few.layer == layer) & (few.kind == "neuron")]
        assert set(kept.component.values) == strongest
        np.testing.assert_allclose(kept, neurons.sel(component=kept.component.values), atol=1e-6)


@pytest.mark.parametrize("by", BY)
def test_rotary_grouped_and_gated_models_add_up(by, architectures):
    for model in architectures.values():
        pairs = PromptPairs(
            model, ["Mary and John went to the store"], ["Mary and Mary went to the store"], [" Mary"], [" John"],
            check=False,
        )  # fmt: skip
        parts = direct_logit_attribution(model, pairs, by=by)
        np.testing.assert_allclose(parts.sum(parts.dims[1:]), pairs.clean_logit_diff, atol=1e-4)


def test_attribution_holds_little_beyond_the_cache(model, pairs):
    """Logical bytes: no tensor of [prompt, pos, head, d_head, d_model], and none of a layer's weights but one copy."""
    from torch.utils._python_dispatch import TorchDispatchMode

    cached = attribution.cache_for_attribution(model, pairs.clean_tokens, "head")
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    with Largest():
        attribution.attribute(model, cached, pairs.correct_ids, pairs.incorrect_ids, "head")
    shape = models.info(model).shape
    assert largest <= shape.d_model * max(shape.n_heads * shape.d_head, shape.d_vocab)
