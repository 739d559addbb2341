"""Patching, against plain PyTorch hooks on the Hugging Face model and against weights we set ourselves."""

import handset
import numpy as np
import pytest
import torch

from mi_utils import models, patching
from mi_utils.models import load_model
from mi_utils.patching import NothingChanged, ablate, patch_sweep, plan_sweep
from mi_utils.prompts import PromptPairs

N_HEADS, D_HEAD, D_MODEL = 4, 8, 32  # of the random model
COLUMNS = [slice(head * D_HEAD, (head + 1) * D_HEAD) for head in range(N_HEADS)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return str(handset.save_random(tmp_path_factory.mktemp("random")))


@pytest.fixture(scope="module")
def model(directory):
    return load_model(directory)


@pytest.fixture(scope="module")
def pairs(model):
    return PromptPairs(model, **handset.induction_prompts(3, length=7), check=False)


@pytest.fixture(scope="module")
def hf(directory):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """The model set by hand, and prompts that need both its heads."""
    model = load_model(str(handset.save_handset(tmp_path_factory.mktemp("handset"))))
    return model, PromptPairs(model, **handset.induction_prompts(6))


# ------------------------------------------------------------------------------------------- the planner, by itself


def test_plan_leaves_out_what_does_not_differ():
    changed = np.zeros((2, 3, 4, 1), dtype=bool)  # prompt, layer, pos, head
    changed[0, 1, 2] = changed[1, 0, 3] = changed[0, 2, 3] = True
    plan = plan_sweep(changed, ("layer", "pos"), batch_size=2)
    assert plan.shape == (2, 3, 4)
    assert plan.rows.tolist() == [[1, 0, 3], [0, 1, 2], [0, 2, 3]]  # by layer
    assert [len(chunk) for chunk in plan.chunks()] == [2, 1]
    assert plan.skipped == 24 - 3


def test_plan_follows_the_order_of_the_axes():
    changed = np.zeros((1, 2, 3, 4), dtype=bool)
    changed[0, 1, 2, 3] = True
    plan = plan_sweep(changed, ("head", "layer"), batch_size=8)
    assert plan.shape == (1, 4, 2) and plan.rows.tolist() == [[0, 3, 1]]
    mask = plan.mask(plan.rows)
    assert mask.shape == (1, 2, 3, 4)
    assert mask[0, 1, :, 3].all() and mask.sum() == 3  # that head of that layer, at every position


def test_plan_over_nothing_patches_everything_at_once():
    changed = np.ones((2, 2, 3, 1), dtype=bool)
    plan = plan_sweep(changed, (), batch_size=8)
    assert plan.shape == (2,) and plan.mask(plan.rows).all()


# ------------------------------------------------------------------------------------ every cell, the plain way


def place(hf, site, layer):
    """The module whose input (True) or output (False) holds the site, and the columns it takes there."""
    block = hf.transformer.h[layer]
    thirds = {name: slice(i * D_MODEL, (i + 1) * D_MODEL) for i, name in enumerate("qkv")}
    return {
        "resid_pre": (block, True), "resid_post": (block, False), "attn_out": (block.attn, False),
        "mlp_out": (block.mlp, False), "z": (block.attn.c_proj, True),
    }.get(site, (block.attn.c_attn, False)), thirds.get(site, slice(0, D_MODEL))  # fmt: skip


def plain_run(hf, tokens, site, layer, change=None):
    """Last logits and the site's activation [batch, pos, d_model]; ``change`` edits that activation in place."""
    (module, on_input), columns = place(hf, site, layer)
    seen = []

    def hook(module, args, output=None):
        value = args if on_input else output
        first = (value[0] if isinstance(value, tuple) else value).clone()
        if change is not None:
            change(first[..., columns])
        seen.append(first[..., columns].clone())
        return (first, *value[1:]) if isinstance(value, tuple) else first

    handle = module.register_forward_pre_hook(hook) if on_input else module.register_forward_hook(hook)
    with torch.no_grad():
        logits = hf(tokens, use_cache=False).logits[:, -1]
    handle.remove()
    return logits, seen[0]


def difference(pairs, logits):
    each = torch.arange(len(pairs))
    return (logits[each, pairs.correct_ids] - logits[each, pairs.incorrect_ids]).double().numpy()


def runs(pairs, mode):
    """Tokens of the run that is patched, and of the run that the activations come from."""
    both = pairs.corrupted_tokens, pairs.clean_tokens
    return both if mode == "denoising" else both[::-1]


def plain_patched(hf, pairs, site, layer, mode, places):
    """The logit difference [prompt] after patching each place (positions, columns) by itself."""
    base, source = runs(pairs, mode)
    wanted = plain_run(hf, source, site, layer)[1]
    for positions, columns in places:

        def change(activation, positions=positions, columns=columns):
            activation[:, positions, columns] = wanted[:, positions, columns]

        yield difference(pairs, plain_run(hf, base, site, layer, change)[0])


def assert_patched(effect, expected):
    """Compare in logits: where clean and corrupted lie close together, the normalised effect magnifies rounding."""
    patched = effect * (effect.clean - effect.corrupted) + effect.corrupted
    np.testing.assert_allclose(patched, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("site", "mode"),
    [*((s, "denoising") for s in ("resid_pre", "resid_post", "attn_out", "mlp_out")), ("attn_out", "noising")],
)
def test_every_cell_over_layer_and_position(model, hf, pairs, site, mode):
    effect = patch_sweep(model, pairs, site, ("layer", "pos"), mode=mode, batch_size=5, progress=False)
    assert effect.dims == ("prompt", "layer", "pos")
    places = [(pos, slice(None)) for pos in effect.pos.values]
    for layer in range(3):
        for pos, expected in enumerate(plain_patched(hf, pairs, site, layer, mode, places)):
            assert_patched(effect[:, layer, pos], expected)


@pytest.mark.parametrize(("site", "mode"), [*((s, "denoising") for s in "qkvz"), ("z", "noising")])
def test_every_cell_over_layer_and_head(model, hf, pairs, site, mode):
    effect = patch_sweep(model, pairs, site, ("layer", "head"), mode=mode, progress=False)
    places = [(slice(None), COLUMNS[head]) for head in range(N_HEADS)]
    for layer in range(3):
        for head, expected in enumerate(plain_patched(hf, pairs, site, layer, mode, places)):
            assert_patched(effect[:, layer, head], expected)


def test_head_at_one_position(model, hf, pairs):
    effect = patch_sweep(model, pairs, "z", ("head", "pos", "layer"), progress=False)
    assert effect.dims == ("prompt", "head", "pos", "layer")
    for head, pos, layer in [(0, 5, 0), (3, 7, 1), (2, 6, 2), (1, 7, 2)]:
        (expected,) = plain_patched(hf, pairs, "z", layer, "denoising", [(pos, COLUMNS[head])])
        assert_patched(effect[:, head, pos, layer], expected)


@pytest.mark.parametrize("mode", ["denoising", "noising"])
def test_resid_mid_reaches_the_mlp_and_what_goes_round_it(model, hf, pairs, mode):
    """The stream between attention and MLP, written out: what leaves the block is mid + mlp(ln_2(mid))."""
    effect = patch_sweep(model, pairs, "resid_mid", ("layer", "pos"), mode=mode, progress=False)
    base, source = runs(pairs, mode)
    for layer, block in enumerate(hf.transformer.h):
        mid = []
        handle = block.ln_2.register_forward_pre_hook(lambda module, args, mid=mid: mid.append(args[0]))
        with torch.no_grad():
            hf(base), hf(source)
        handle.remove()
        for pos in effect.pos.values:
            patched = mid[0].clone()
            patched[:, pos] = mid[1][:, pos]
            with torch.no_grad():
                leaves = patched + block.mlp(block.ln_2(patched))
            logits = plain_run(hf, base, "resid_post", layer, lambda stream, leaves=leaves: stream.copy_(leaves))[0]
            assert_patched(effect[:, layer, pos], difference(pairs, logits))


def test_pattern_patching_moves_values_by_the_other_runs_attention(model, hf, pairs):
    """z is pattern · v, so a patched pattern is a patched z, and z has an ordinary hook."""
    effect = patch_sweep(model, pairs, "pattern", ("layer", "head"), progress=False)
    with torch.no_grad():
        patterns = hf(pairs.clean_tokens, output_attentions=True).attentions
    for layer in range(3):
        v = plain_run(hf, pairs.corrupted_tokens, "v", layer)[1]
        for head, columns in enumerate(COLUMNS):
            z = patterns[layer][:, head] @ v[..., columns]

            def change(activation, z=z, columns=columns):
                activation[..., columns] = z

            logits = plain_run(hf, pairs.corrupted_tokens, "z", layer, change)[0]
            assert_patched(effect[:, layer, head], difference(pairs, logits))


def test_raw_weights_give_the_same_effects(directory, model, pairs):
    raw = patch_sweep(load_model(directory, processing="raw"), pairs, "z", ("layer", "head"), progress=False)
    folded = patch_sweep(model, pairs, "z", ("layer", "head"), progress=False)
    assert_patched(raw, folded * (folded.clean - folded.corrupted) + folded.corrupted)
    assert raw.attrs["processing"] == "raw"


# ------------------------------------------------------------------------------------------- what theory says of it


def test_patching_everything_gives_one_and_the_past_gives_exactly_zero(model, pairs):
    """Only the token at ``FIRST`` differs, and what is written before it cannot know."""
    effect = patch_sweep(model, pairs, "resid_pre", ("layer", "pos"), progress=False)
    assert (effect[:, :, : handset.FIRST] == 0).all()
    np.testing.assert_allclose(effect.sel(layer=0, pos=handset.FIRST), 1, atol=1e-4)
    np.testing.assert_allclose(patch_sweep(model, pairs, "resid_pre", (), progress=False), 1, atol=1e-4)
    noised = patch_sweep(model, pairs, "resid_pre", (), mode="noising", progress=False)
    np.testing.assert_allclose(noised, 0, atol=1e-4)
    noising = patch_sweep(model, pairs, "resid_pre", ("layer", "pos"), mode="noising", progress=False)
    assert (noising[:, :, : handset.FIRST] == 1).all()


def test_receipt_counts_what_was_done(model, pairs):
    effect = patch_sweep(model, pairs, "resid_pre", ("layer", "pos"), progress=False)
    positions = pairs.clean_tokens.shape[1]
    # Layer 0: the embedding differs at one position. Later layers: from there on.
    run = len(pairs) * (1 + 2 * (positions - handset.FIRST))
    assert effect.attrs["skipped_cells"] == effect.size - run
    assert effect.attrs["elements_changed"] == pytest.approx(run * D_MODEL, rel=0.01)
    assert effect.attrs["mean_change"] > 0
    for name in ("model", "site", "mode", "metric", "processing", "seed", "mean_clean", "mean_corrupted"):
        assert name in effect.attrs
    assert effect.token.sizes == {"pos": positions} and effect.template.sizes == {"prompt": len(pairs)}


def test_batches_do_not_matter(model, pairs):
    small, large = (
        patch_sweep(model, pairs, "attn_out", ("layer", "pos"), batch_size=size, progress=False) for size in (1, 100)
    )
    gap = np.abs(small.clean - small.corrupted)
    assert float((np.abs(small - large) * gap).max()) < 1e-4


# ------------------------------------------------------------------------------------- a circuit that we know


def test_known_heads_are_recovered(known):
    model, pairs = known
    effect = patch_sweep(model, pairs, "z", ("layer", "head"), progress=False)
    expected = np.zeros((2, 5))
    expected[handset.PREVIOUS] = expected[handset.INDUCTION] = 1
    np.testing.assert_allclose(effect.mean("prompt"), expected, atol=1e-3)
    noising = patch_sweep(model, pairs, "z", ("layer", "head"), mode="noising", progress=False)
    np.testing.assert_allclose(noising.mean("prompt"), 1 - expected, atol=1e-3)


def test_known_path_through_the_positions(known):
    """The first A, then (after the previous-token head) B, then (after the induction head) the last word."""
    model, pairs = known
    path = patch_sweep(model, pairs, "resid_post", ("layer", "pos"), progress=False).mean("prompt")
    expected = np.zeros(path.shape)
    expected[0, handset.FIRST + 1] = expected[1, -1] = 1
    np.testing.assert_allclose(path, expected, atol=1e-3)


def test_ablating_the_known_heads_takes_the_answer_away(known):
    model, pairs = known
    for head in (handset.PREVIOUS, handset.INDUCTION):
        left = ablate(model, pairs, [head], "zero")
        np.testing.assert_allclose(left, 0, atol=1e-3)
        np.testing.assert_allclose(left.raw, 0, atol=1e-2)
    # Another prompt's word is as wrong as the wrong answer.
    np.testing.assert_allclose(ablate(model, pairs, [handset.INDUCTION], "resample"), 0, atol=1e-3)
    assert (ablate(model, pairs, [handset.INDUCTION], "mean") < 0.5).all()
    both = ablate(model, pairs, [handset.PREVIOUS, handset.INDUCTION], "zero")
    assert both.dims == ("prompt",) and both.attrs["heads"] == ["L0H2", "L1H3"]


@pytest.mark.parametrize("kind", ["zero", "mean"])
def test_ablation_is_what_plain_hooks_give(directory, hf, pairs, kind):
    raw = load_model(directory, processing="raw")  # folding moves the values' bias out of z, and so moves zero
    head = (1, 2)
    columns = slice(head[1] * D_HEAD, (head[1] + 1) * D_HEAD)

    def change(z):
        z[..., columns] = z[..., columns].mean(0) if kind == "mean" else 0

    expected = difference(pairs, plain_run(hf, pairs.clean_tokens, "z", head[0], change)[0])
    np.testing.assert_allclose(ablate(raw, pairs, [head], kind).raw, expected, atol=2e-4)


def test_before_the_first_difference_nothing_counts_as_changed(pairs):
    """Kernels may round otherwise in a batch of another shape; attention still cannot look ahead."""
    size = (len(pairs), pairs.clean_tokens.shape[1], 1, 4)
    changed = patching._changed([torch.zeros(size)], [torch.full(size, 1e-7)], pairs)
    assert not changed[:, :, : handset.FIRST].any() and changed[:, :, handset.FIRST :].all()


# --------------------------------------------------------------------------------------------- refusals


def test_an_intervention_that_touches_nothing_raises(known):
    model, pairs = known
    with pytest.raises(NothingChanged, match="mlp_out"):  # the MLPs write zero, clean or corrupted
        patch_sweep(model, pairs, "mlp_out", ("layer", "pos"), progress=False)
    with pytest.raises(NothingChanged, match="changed no activation"):
        ablate(model, pairs, [(0, 0)], "zero")  # an idle head writes zero already


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"site": "resid_middle"}, "resid_mid"),
        ({"over": ("layer", "token")}, "axes are layer, pos, head"),
        ({"over": ("layer", "layer")}, "twice"),
        ({"over": ("layer", "head")}, "no heads"),
        ({"mode": "cleaning"}, "denoising"),
        ({"metric": "vibes"}, "logit_diff"),
        ({"batch_size": 0}, "at least 1"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(model, pairs, arguments, message, monkeypatch):
    monkeypatch.setattr(models, "run_with_hooks", None)
    monkeypatch.setattr(models, "cache", None)
    with pytest.raises(ValueError, match=message):
        patch_sweep(model, pairs, **{"site": "resid_pre", "over": ("layer", "pos"), **arguments})


@pytest.mark.parametrize(
    ("heads", "kind", "message"),
    [([], "zero", "No heads"), ([(9, 0)], "zero", "has no heads"), ([(0, 0)], "gentle", "Unknown kind")],
)
def test_wrong_ablations_are_refused(model, pairs, heads, kind, message):
    with pytest.raises(ValueError, match=message):
        ablate(model, pairs, heads, kind)


def test_hooks_are_gone_after_an_exception(model, pairs, monkeypatch):
    def count():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    before, hooks = models.run(model, pairs.clean_tokens), count()

    def fail(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(patching.Receipt, "add", fail)  # called inside the hook
        with pytest.raises(KeyboardInterrupt):
            patch_sweep(model, pairs, "z", ("layer", "head"), progress=False)
    assert count() == hooks
    assert torch.equal(models.run(model, pairs.clean_tokens), before)


# ------------------------------------------------------------------------------------- killed and resumed


def test_killed_sweep_resumes_to_the_identical_result(model, pairs, tmp_path, monkeypatch):
    def sweep(save=None, site="resid_pre", **more):
        return patch_sweep(model, pairs, site, ("layer", "pos"), batch_size=4, progress=False, save=save, **more)

    whole, save = sweep(), tmp_path / "sweeps" / "resid.jsonl"
    real, calls = patching._run_rows, []

    def counted(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(patching, "_run_rows", counted)
    with pytest.raises(KeyboardInterrupt):
        sweep(save)
    text = save.read_text()
    assert text.count("\n") == 4  # header and three batches
    save.write_text(text[:-9])  # killed in the middle of a line

    resumed = sweep(save)
    assert (resumed.values == whole.values).all() and resumed.attrs == whole.attrs
    passes = -(-(whole.size - whole.attrs["skipped_cells"]) // 4)
    assert len(calls) == 4 + passes - 2
    assert (sweep(save).values == whole.values).all() and len(calls) == 4 + passes - 2  # nothing left to run

    with pytest.raises(ValueError, match="another sweep"):
        sweep(save, site="attn_out")
    with pytest.raises(ValueError, match="another sweep"):
        patch_sweep(model, pairs[:2], "resid_pre", ("layer", "pos"), batch_size=4, progress=False, save=save)
    with pytest.raises(ValueError, match="another sweep"):  # a metric of the same name
        sweep(tmp_path / "own.jsonl", metric=lambda pairs: lambda logits: logits[:, -1, 3])
        sweep(tmp_path / "own.jsonl", metric=lambda pairs: lambda logits: logits[:, -1, 4])


def test_a_metric_of_ones_own(model, pairs):
    own = patch_sweep(
        model, pairs, "resid_pre", ("layer", "pos"), progress=False,
        metric=lambda some: lambda logits: logits[torch.arange(len(some)), -1, some.correct_ids],
    )  # fmt: skip
    each = torch.arange(len(pairs))
    logits = models.run(model, pairs.clean_tokens)[:, -1]
    np.testing.assert_allclose(own.clean, logits[each, pairs.correct_ids], atol=1e-4)


@pytest.mark.parametrize("text", ["notes of mine", "notes of mine\n", '["a", "list"]\n'])
def test_a_file_that_holds_no_sweep_is_left_alone(model, pairs, tmp_path, text):
    notes = tmp_path / "notes.txt"
    notes.write_text(text)
    with pytest.raises(ValueError, match="no sweep at all"):
        patch_sweep(model, pairs, "resid_pre", ("layer", "pos"), progress=False, save=notes)
    assert notes.read_text() == text
