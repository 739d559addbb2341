"""Attribution patching, against a plain loop of autograd and against patching itself where differences are small."""

import handset
import numpy as np
import pytest
import torch
from plain_circuits import hugging_face, save_llama

from mi_utils import engine, gradients, models
from mi_utils.gradients import attribution_patch
from mi_utils.metrics import LogitDiff
from mi_utils.models import load_model
from mi_utils.patching import patch_sweep
from mi_utils.prompts import PromptPairs
from mi_utils.results import NothingChanged

ALL_AXES = {
    site: ("layer", "pos", "head") if engine.UNITS.get(site) == "head" else ("layer", "pos") for site in models.SITES
}


@pytest.fixture(scope="module")
def model(directory):
    return load_model(directory)


@pytest.fixture(scope="module")
def pairs(model):
    return PromptPairs(model, **handset.induction_prompts(3, length=6), check=False)


@pytest.mark.parametrize("site", models.SITES)
def test_labelled_as_a_sweep(model, pairs, site):
    over = ALL_AXES[site]
    estimate, effect = (
        attribution_patch(model, pairs, site, over),
        patch_sweep(model, pairs, site, over, progress=False),
    )
    assert estimate.dims == effect.dims and estimate.shape == effect.shape and estimate.name == effect.name
    for name in ("clean", "corrupted", "token", "template"):
        if estimate[name].dtype.kind == "f":
            np.testing.assert_allclose(estimate[name], effect[name], atol=1e-4)
        else:
            assert estimate[name].values.tolist() == effect[name].values.tolist()
    assert estimate.attrs["method"] == "attribution" and estimate.attrs["elements_changed"] > 0
    same = np.all(effect.values == 0, axis=0)  # before the first difference nothing can have an effect
    assert np.abs(estimate.values[:, same]).max(initial=0) < 1e-5


def plain_estimates(hf, pairs, mode):
    """(clean - corrupted) times gradient at every block's input and MLP's output, by plain hooks on the HF model."""
    base, source = (pairs.corrupted_tokens, pairs.clean_tokens)[:: 1 if mode == "denoising" else -1]
    modules = {("resid_pre", layer): block for layer, block in enumerate(hf.transformer.h)}
    modules |= {("mlp_out", layer): block.mlp for layer, block in enumerate(hf.transformer.h)}

    def run(tokens):
        kept = {}

        def keep(name, value):
            value.requires_grad_(True) if value.is_leaf else value.retain_grad()
            kept[name] = value

        handles = []
        for name, module in modules.items():
            if name[0] == "resid_pre":
                handles.append(module.register_forward_pre_hook(lambda m, args, name=name: keep(name, args[0])))
            else:
                handles.append(module.register_forward_hook(lambda m, args, output, name=name: keep(name, output)))
        logits = hf(tokens, use_cache=False).logits[:, -1]
        for handle in handles:
            handle.remove()
        rows = torch.arange(len(pairs))
        (logits[rows, pairs.correct_ids] - logits[rows, pairs.incorrect_ids]).sum().backward()
        return kept

    there, here = run(source), run(base)
    return {name: ((there[name] - here[name]) * here[name].grad).sum(-1).detach().numpy() for name in modules}


@pytest.mark.parametrize("mode", ["denoising", "noising"])
def test_agrees_with_plain_autograd(model, pairs, directory, mode):
    expected = plain_estimates(hugging_face(directory), pairs, mode)
    for site in ("resid_pre", "mlp_out"):
        found = attribution_patch(model, pairs, site, mode=mode, batch_size=2)
        start = found.corrupted if mode == "denoising" else found.clean
        found = found * (found.clean - found.corrupted) + found.corrupted - start
        for layer in range(3):
            np.testing.assert_allclose(found[:, layer], expected[site, layer], atol=2e-4)


def save_closer(source, target, pairs, share):
    """The same model, but the tokens in which a pair differs get embeddings that differ by ``share`` as much."""
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(source)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    table = model.transformer.wte.weight.data
    for clean, corrupted in zip(pairs.clean_tokens[pairs.differs], pairs.corrupted_tokens[pairs.differs], strict=True):
        table[corrupted] = table[clean] + share * (table[corrupted] - table[clean])
    model.save_pretrained(target)
    handset.build_tokenizer().save_pretrained(target)
    return str(target)


def test_the_error_falls_with_the_square_of_the_difference(directory, model, pairs, tmp_path):
    one = pairs[[0]]
    errors = {site: [] for site in models.SITES}
    for share in (0.1, 0.025):
        near = load_model(save_closer(directory, tmp_path / str(share), one, share))
        close = PromptPairs(near, one.clean, one.corrupted, one.correct, one.incorrect, check=False)
        for site, over in ALL_AXES.items():
            exact = patch_sweep(near, close, site, over, progress=False)
            estimate = attribution_patch(near, close, site, over)
            gap = float((exact.clean - exact.corrupted)[0])
            errors[site].append(
                (np.abs(exact - estimate).max().item() * abs(gap), np.abs(exact).max().item() * abs(gap))
            )
    for site, ((far, _), (near, size)) in errors.items():
        assert near < far / 8 + 2e-5, f"{site}: a quarter of the difference leaves {near / far:.2f} of the error"
        assert near < 0.1 * size + 2e-5, site


def test_rmsnorm_rotary_grouped_attention(tmp_path):
    model = load_model(save_llama(tmp_path, n_kv_heads=2))
    pairs = PromptPairs(model, **handset.induction_prompts(2, length=6), check=False)
    by_head = attribution_patch(model, pairs, "k", ("layer", "head"))
    assert by_head.sizes["head"] == 2
    streams = [attribution_patch(model, pairs, site, ("layer",)) for site in ("resid_mid", "attn_out", "resid_pre")]
    assert all(np.isfinite(each).all() for each in streams)
    # Before the MLP nothing but attention's output and the block's input is in the stream: the parts sum.
    np.testing.assert_allclose(
        streams[0], streams[1] + _skip(model, pairs), atol=1e-3 * float(np.abs(streams[0]).max())
    )


def _skip(model, pairs):
    """Effect of the block's input along the skip connection alone: its difference times resid_mid's gradient."""
    layers = range(models.info(model).shape.n_layers)
    value = gradients.stream_metric(model, LogitDiff(pairs.correct_ids, pairs.incorrect_ids))
    clean, _ = gradients.record(model, pairs.clean_tokens, {layer: ("resid_pre", layer) for layer in layers})
    corrupted, _ = gradients.record(model, pairs.corrupted_tokens, {layer: ("resid_pre", layer) for layer in layers})
    _, slopes, _ = gradients.differentiate(
        model, pairs.corrupted_tokens, {layer: ("attn_out", layer) for layer in layers}, value
    )
    gap = (pairs.clean_logit_diff - pairs.corrupted_logit_diff)[:, None]
    parts = torch.stack([((clean[l] - corrupted[l]) * slopes[l]).sum((1, 2)) for l in layers], 1)  # noqa: E741
    return (parts / gap).numpy()


def test_any_differentiable_metric(model, pairs):
    named = attribution_patch(model, pairs, "z", ("layer", "head"))

    def on_all_logits(pairs):
        rows = torch.arange(len(pairs))
        return lambda logits: logits[rows, -1, pairs.correct_ids] - logits[rows, -1, pairs.incorrect_ids]

    own = attribution_patch(model, pairs, "z", ("head", "layer"), metric=on_all_logits)
    assert own.dims == ("prompt", "head", "layer")
    np.testing.assert_allclose(own.transpose(*named.dims), named, atol=1e-4)
    assert np.isfinite(attribution_patch(model, pairs, "z", ("layer",), metric="log_prob")).all()


def test_works_where_gradients_are_switched_off(model, pairs):
    with torch.no_grad():
        inside = attribution_patch(model, pairs, "mlp_out")
    np.testing.assert_allclose(inside, attribution_patch(model, pairs, "mlp_out"), atol=1e-6)


@pytest.mark.parametrize(
    ("site", "over", "options", "message"),
    [
        ("nowhere", ("layer",), {}, "site"),
        ("z", ("layer", "token"), {}, "axes"),
        ("z", ("layer", "layer"), {}, "twice"),
        ("z", ("pos",), {}, "all layers at once"),
        ("mlp_out", ("layer", "head"), {}, "no heads"),
        ("z", ("layer",), {"mode": "both"}, "mode"),
        ("z", ("layer",), {"batch_size": 0}, "batch_size"),
        ("z", ("layer",), {"metric": "nonsense"}, "metric"),
        ("z", ("layer",), {"metric": lambda pairs: lambda logits: logits.argmax(-1)[:, -1].float()}, "no gradient"),
    ],
)
def test_wrong_arguments_are_refused(model, pairs, site, over, options, message):
    with pytest.raises(ValueError, match=message):
        attribution_patch(model, pairs, site, over, **options)
    assert not any(point.fwd_hooks for point in model.mi_hook_points.values())


def test_runs_that_do_not_differ_are_refused(model, pairs):
    same = pairs[[0, 1]]
    same.corrupted_tokens = same.clean_tokens
    with pytest.raises(NothingChanged):
        attribution_patch(model, same, "z")
