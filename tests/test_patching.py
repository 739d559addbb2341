"""Patching, against plain PyTorch hooks on the Hugging Face model and against weights we set ourselves."""

import warnings
import weakref
from dataclasses import replace
from functools import partial

import conftest
import handset
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mi_utils import compute, engine, models, patching
from mi_utils.engine import Blocks, Limits, PlainHooks, SlowPath, plan_cells
from mi_utils.metrics import LogitDiff
from mi_utils.models import load_model
from mi_utils.patching import ablate, patch_sweep, plan_sweep
from mi_utils.prompts import PromptPairs, ioi_pairs
from mi_utils.results import NothingChanged

N_HEADS, D_HEAD, D_MODEL = 4, 8, 32  # of the random model
COLUMNS = [slice(head * D_HEAD, (head + 1) * D_HEAD) for head in range(N_HEADS)]


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


# ------------------------------------------------------------------------------------------- the planner, by itself

GPT2 = compute.known_shape("gpt2-small")
NO_OVERHEAD = Limits(tokens=1024, prompts=100, rows=None, overhead=0)


def small_plan(changed, over, site="z", limits=NO_OVERHEAD, **more):
    shape = replace(GPT2, n_layers=changed.shape[1], n_heads=changed.shape[3])
    return plan_cells(changed, over, site, shape, limits, **more)


def test_plan_leaves_out_what_does_not_differ():
    changed = np.zeros((2, 3, 4, 1), dtype=bool)  # prompt, layer, pos, unit
    changed[0, 1, 2] = changed[1, 0, 2] = changed[0, 2, 3] = True
    plan = small_plan(changed, ("layer", "pos"), "resid_pre")
    assert plan.shape == (2, 3, 4) and plan.n_rows == 3 and plan.skipped == 24 - 3
    first, second = plan.passes  # a pass for each position that rows begin at, by layer in it
    assert (first.start, first.rows.tolist(), first.layers.tolist()) == (2, [[1, 0, 2], [0, 1, 2]], [0, 1])
    assert (second.start, second.rows.tolist(), second.layers.tolist()) == (3, [[0, 2, 3]], [2])


def test_plan_follows_the_order_of_the_axes_and_starts_where_something_differs():
    changed = np.zeros((1, 3, 5, 4), dtype=bool)
    changed[0, 1, 2:, 3] = True
    plan = small_plan(changed, ("head", "layer"))
    assert plan.shape == (1, 4, 3)
    (only,) = plan.passes
    assert (only.start, only.rows.tolist(), only.layers.tolist()) == (2, [[0, 3, 1]], [1])
    (only,) = small_plan(changed, ("head",)).passes
    assert (only.start, only.rows.tolist(), only.layers.tolist()) == (2, [[0, 3]], [1])
    (only,) = small_plan(changed, ()).passes
    assert (only.start, only.rows.tolist(), only.layers.tolist()) == (2, [[0]], [1])


def test_plan_cuts_passes_to_size_and_blocks_of_prompts():
    changed = np.ones((5, 2, 4, 1), dtype=bool)
    sizes = [
        len(each.rows) for each in small_plan(changed, ("layer",), "resid_pre", replace(NO_OVERHEAD, rows=3)).passes
    ]
    assert sizes == [3, 3, 3, 1]
    sizes = [
        len(each.rows) for each in small_plan(changed, ("layer",), "resid_pre", replace(NO_OVERHEAD, tokens=8)).passes
    ]
    assert sizes == [2] * 5
    plan = small_plan(changed, ("layer",), "resid_pre", replace(NO_OVERHEAD, prompts=2))
    assert [sorted(set(each.rows[:, 0])) for each in plan.passes] == [[0, 1], [2, 3], [4]]


def test_positions_share_a_pass_where_that_is_cheaper():
    changed = np.ones((2, 3, 4, 1), dtype=bool)
    assert small_plan(changed, ("pos",), "resid_pre").n_passes == 4
    dear = small_plan(changed, ("pos",), "resid_pre", replace(NO_OVERHEAD, overhead=1e12))
    (only,) = dear.passes
    assert only.start == 0 and len(only.rows) == 8
    assert dear.flops > small_plan(changed, ("pos",), "resid_pre").flops


def test_planned_flops_are_those_of_the_rows_from_their_layer_and_position_on():
    changed = np.zeros((1, 3, 6, 1), dtype=bool)
    changed[0, 1, 4] = True
    shape = replace(GPT2, n_heads=1)
    token = compute.block_flops(shape, 6)
    last = 2 * (token - compute.block_flops(shape, 6, after="q")) + token  # of position 4 no more than q, k and v
    runs, ends = 3 * (3 + 2 * 3) * token, 3 * 2 * 768 * 2  # three positions in common; two runs and a row unembedded
    plan = small_plan(changed, ("layer", "pos"), "resid_pre", shared=3)
    assert plan.flops == pytest.approx(runs + 2 * token + last + ends)
    assert 0 < plan.flops - plan.flops_bound < 2 * token  # the bound wants keys and values only, of position 4 only
    after = small_plan(changed, ("layer", "pos"), "resid_post", shared=3)  # the patched layer is not run
    assert after.flops == pytest.approx(runs + last + ends)
    whole = small_plan(changed, ("layer", "pos"), "resid_pre", whole=True)
    assert whole.flops == pytest.approx(3 * 12 * token + 3 * 6 * token + ends)


@pytest.mark.parametrize(
    ("site", "over", "differ", "least"),
    [
        ("resid_pre", ("layer", "pos"), [10], 38),
        ("resid_pre", ("layer", "pos"), [3, 5, 10], 8),
        ("resid_pre", ("layer", "pos"), range(1, 15), 5),
        ("z", ("layer", "head"), [10], 8),
        ("z", ("layer", "head"), [3, 5, 10], 3),
        ("z", ("layer", "head", "pos"), [10], 34),
    ],
)
def test_a_sweep_of_gpt2_small_is_planned_with_a_fraction_of_the_arithmetic(site, over, differ, least):
    """Against one pass of the whole model, all positions unembedded, for each cell."""
    units, n_tokens = (12 if "head" in over else 1), 15
    changed = np.zeros((8, 12, n_tokens, units), dtype=bool)
    changed[:, :, min(differ) :] = True
    if site == "resid_pre":
        changed[:, 0] = np.isin(np.arange(n_tokens), list(differ))[:, None]
    plan = plan_cells(changed, over, site, GPT2, NO_OVERHEAD, shared=min(differ))
    one = 8 * n_tokens * (12 * compute.block_flops(GPT2, n_tokens) + 2 * 768 * 50257)
    assert np.prod(plan.shape[1:]) * one / plan.flops > least
    assert plan.flops_bound <= plan.flops


# ------------------------------------------------------------------------------------ every cell, the plain way


def place(hf, site, layer):
    """The module whose input (True) or output (False) holds the site, and the columns it takes there."""
    block = hf.transformer.h[layer]
    thirds = {name: slice(i * D_MODEL, (i + 1) * D_MODEL) for i, name in enumerate("qkv")}
    return {
        "resid_pre": (block, True), "resid_post": (block, False), "attn_out": (block.attn, False),
        "mlp_out": (block.mlp, False), "z": (block.attn.c_proj, True), "mlp_post": (block.mlp.c_proj, True),
    }.get(site, (block.attn.c_attn, False)), thirds.get(site, slice(None))  # fmt: skip


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


def in_logits(effect):
    return (effect * (effect.clean - effect.corrupted) + effect.corrupted).transpose(*effect.dims).values


def assert_patched(effect, expected):
    """Compare in logits: where clean and corrupted lie close together, the normalised effect magnifies rounding."""
    np.testing.assert_allclose(in_logits(effect), expected, atol=1e-4)


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


def test_neurons_one_by_one(model, hf, pairs):
    effect = patch_sweep(model, pairs, "mlp_post", ("layer", "neuron"), progress=False)
    assert effect.shape == (len(pairs), 3, 4 * D_MODEL)
    for layer, neuron in [(0, 0), (1, 17), (2, 127)]:
        (expected,) = plain_patched(hf, pairs, "mlp_post", layer, "denoising", [(slice(None), [neuron])])
        assert_patched(effect[:, layer, neuron], expected)
    at_last = patch_sweep(model, pairs[:1], "mlp_post", ("neuron", "pos"), progress=False)[:, :, -1]
    assert at_last.shape == (1, 4 * D_MODEL) and at_last.n_changed.max() == 3  # that neuron in three layers


@pytest.mark.parametrize("over", [("layer",), ("pos",), ("head",), ("pos", "head"), ()])
@pytest.mark.parametrize("site", ["z", "pattern"])
def test_other_axes_agree_with_whole_passes(model, pairs, site, over, monkeypatch):
    fast = patch_sweep(model, pairs, site, over, progress=False)
    monkeypatch.setattr(engine, "choose", lambda model, base, *_: PlainHooks(model, base))
    assert_patched(fast, in_logits(patch_sweep(model, pairs, site, over, progress=False)))


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
    assert_patched(raw, in_logits(folded))
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
    assert effect.n_changed.sum() == effect.attrs["elements_changed"] and effect.n_changed.max() == D_MODEL
    assert ((effect.n_changed > 0) == (effect.mean_change > 0)).all() and int((effect.n_changed > 0).sum()) == run
    for name in ("model", "site", "mode", "metric", "processing", "seed", "mean_clean", "mean_corrupted"):
        assert name in effect.attrs
    assert effect.token.sizes == {"pos": positions} and effect.template.sizes == {"prompt": len(pairs)}


def test_batches_do_not_matter(model, pairs, monkeypatch):
    def sweep(**more):
        return patch_sweep(model, pairs, "attn_out", ("layer", "pos"), progress=False, **more)

    large = sweep(batch_size=100)
    assert_patched(sweep(batch_size=1), in_logits(large))
    limits = engine.limits_for
    monkeypatch.setattr(engine, "limits_for", lambda *args: replace(limits(*args), prompts=2))  # little memory
    assert_patched(sweep(), in_logits(large))
    assert (sweep().clean == large.clean).all()


def test_the_plan_is_known_before_anything_runs(model, pairs, monkeypatch):
    for site, over in [("resid_pre", ("layer", "pos")), ("q", ("layer", "head")), ("mlp_out", ("pos",))]:
        effect = patch_sweep(model, pairs, site, over, progress=False)
        with monkeypatch.context() as patch:
            patch.setattr(models, "run", None)
            plan = plan_sweep(model, pairs, site, over)
        assert (plan.n_passes, plan.skipped) == (effect.attrs["n_passes"], effect.attrs["skipped_cells"])
        assert plan.flops_bound <= plan.flops and plan.nbytes > 0


def test_a_declared_metric_and_the_same_by_hand_agree(model, pairs):
    class ByHand:
        def __init__(self, some):
            self.metric = LogitDiff(some.correct_ids, some.incorrect_ids)

        def __call__(self, logits):
            assert logits.shape[1:] == (1, models.info(model).shape.d_vocab)
            return self.metric(logits)

    declared, by_hand = (
        patch_sweep(model, pairs, "z", ("layer", "head"), progress=False, metric=metric)
        for metric in ("logit_diff", ByHand)
    )
    assert_patched(declared, in_logits(by_hand))


class Bytes(TorchDispatchMode):
    """Counts the bytes of all tensors made while it is on, and the most that there were at one time."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.alive = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in self.alive:
                self.alive.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.drop, storage._cdata, storage.nbytes())
        return made

    def drop(self, key, nbytes):
        self.alive.discard(key)
        self.now -= nbytes


@pytest.mark.parametrize(("site", "over"), [("resid_pre", ("layer", "pos")), ("z", ("layer", "head"))])
def test_peak_of_memory_is_the_planned_one(site, over):
    if "smallworld" not in models.embedded_names():
        pytest.skip("smallworld has not been trained yet: make train")
    model = load_model("smallworld")  # of the usual proportions: in a tinier one what is not counted weighs more
    pairs = ioi_pairs(model, 100, check=False)
    patch_sweep(model, pairs[:2], site, over, progress=False)  # the check of the fast path is over
    plan, counted = plan_sweep(model, pairs, site, over), Bytes()
    counted.alive = {p.untyped_storage()._cdata for p in torch.nn.Module.parameters(model)}
    with counted:
        patch_sweep(model, pairs, site, over, progress=False)
    assert counted.peak == pytest.approx(plan.nbytes, rel=0.25)


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


@pytest.mark.parametrize("replace", ["zero", "mean", "resample"])
def test_ablation_cell_by_cell(directory, hf, pairs, replace):
    raw = load_model(directory, processing="raw")
    effect = patch_sweep(raw, pairs, "z", ("layer", "head"), replace=replace, seed=3, progress=False)
    for layer, head in [(0, 1), (2, 3)]:
        alone = ablate(raw, pairs, [(layer, head)], replace, seed=3)
        assert_patched(effect[:, layer, head], alone.raw)

    def change(activation):
        activation[:, 5] = 0 if replace == "zero" else activation[:, 5].mean(0)

    if replace != "resample":
        effect = patch_sweep(raw, pairs, "mlp_out", ("layer", "pos"), replace=replace, progress=False)
        expected = difference(pairs, plain_run(hf, pairs.clean_tokens, "mlp_out", 1, change)[0])
        assert_patched(effect[:, 1, 5], expected)
        assert effect.attrs["mode"] == "ablation"
        # Only what the last layer writes at the last position is read by anyone.
        assert effect.attrs["skipped_cells"] == len(pairs) * (pairs.clean_tokens.shape[1] - 1)


def test_heads_and_mlps_are_ablated_together(directory, hf, pairs):
    raw = load_model(directory, processing="raw")
    left = ablate(raw, pairs, ["L0H2", (1, 3), "mlp L1", "attn L2"], "zero")
    block = hf.transformer.h

    def zero_head(head):
        return lambda module, args: (args[0].index_fill(-1, torch.arange(32)[COLUMNS[head]], 0.0),)

    handles = [
        block[0].attn.c_proj.register_forward_pre_hook(zero_head(2)),
        block[1].attn.c_proj.register_forward_pre_hook(zero_head(3)),
        block[1].mlp.register_forward_hook(lambda module, args, output: output * 0),
        block[2].attn.register_forward_hook(lambda module, args, output: (output[0] * 0, *output[1:])),
    ]
    with torch.no_grad():
        expected = difference(pairs, hf(pairs.clean_tokens).logits[:, -1])
    for handle in handles:
        handle.remove()
    np.testing.assert_allclose(left.raw, expected, atol=1e-4)
    assert left.attrs["heads"] == ["L0H2", "L1H3", "mlp L1", "attn L2"]


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
    size = (len(pairs), pairs.clean_tokens.shape[1], 1, 4)  # not by head, so heads are one
    tokens = patching._both(pairs)
    sweep = patching._Sweep(None, "z", ("layer",), *tokens, replace="other", n_layers=1, seed=0)
    base, other = (
        engine.Run(each, 0, each, {("z", 0): torch.full(size, value)})
        for each, value in zip(tokens, (0, 1e-7), strict=True)
    )
    changed = sweep.changed(base, other, sweep.source(base, other))
    assert not changed[:, :, : handset.FIRST].any() and changed[:, :, handset.FIRST :].all()


# --------------------------------------------------------------------------------------------- refusals


def test_an_intervention_that_touches_nothing_raises(known):
    model, pairs = known
    with pytest.raises(NothingChanged, match="mlp_out"):  # the MLPs write zero, clean or corrupted
        patch_sweep(model, pairs, "mlp_out", ("layer", "pos"), progress=False)
    with pytest.raises(NothingChanged, match="L0H0 changed no activation"):
        ablate(model, pairs, [(0, 0)], "zero")  # an idle head writes zero already


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"site": "resid_middle"}, "resid_mid"),
        ({"over": ("layer", "token")}, "axes are layer, pos, head"),
        ({"over": ("layer", "layer")}, "twice"),
        ({"over": ("layer", "head")}, "no heads"),
        ({"site": "z", "over": ("layer", "neuron")}, "no neurons"),
        ({"replace": "median"}, "resample"),
        ({"replace": "mean", "mode": "noising"}, "ablates the clean run"),
        ({"mode": "cleaning"}, "denoising"),
        ({"metric": "vibes"}, "logit_diff"),
        ({"batch_size": 0}, "at least 1"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(model, pairs, arguments, message, monkeypatch):
    monkeypatch.setattr(models, "run", None)
    monkeypatch.setattr(models, "run_block", None)
    with pytest.raises(ValueError, match=message):
        patch_sweep(model, pairs, **{"site": "resid_pre", "over": ("layer", "pos"), **arguments})


@pytest.mark.parametrize(
    ("heads", "kind", "message"),
    [
        ([], "zero", "No components"),
        ([(9, 0)], "zero", "has no heads"),
        (["mlp L3"], "zero", "has no heads"),
        (["mlp 1"], "zero", "mlp L5"),
        ([(0, 0)], "gentle", "Unknown kind"),
    ],
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
    """Killed five times: at random passes, and in the middle of writing a line."""

    def sweep(save=None, site="resid_pre", **more):
        return patch_sweep(model, pairs, site, ("layer", "pos"), batch_size=4, progress=False, save=save, **more)

    whole, save = sweep(), tmp_path / "sweeps" / "resid.jsonl"
    real, calls, rng = Blocks.patched, [], np.random.default_rng(0)

    def counted(*args):
        calls.append(1)
        if len(calls) == die_at:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(Blocks, "patched", counted)
    lost = 0
    for _ in range(5):
        die_at = len(calls) + int(rng.integers(1, 3))
        done = save.read_text().count("\n") if save.exists() else 1
        with pytest.raises(KeyboardInterrupt):
            sweep(save)
        text = save.read_text()
        if rng.integers(2) and text.count("\n") > 1:  # killed in the middle of a line
            save.write_text(text[:-9])
            lost += 1
        assert save.read_text().count("\n") >= done - 1  # what is finished stays
    die_at = None
    resumed = sweep(save)
    assert (resumed.values == whole.values).all() and resumed.attrs == whole.attrs
    assert (resumed.n_changed == whole.n_changed).all() and (resumed.mean_change == whole.mean_change).all()
    assert len(calls) == whole.attrs["n_passes"] + 5 + lost
    done = len(calls)
    assert (sweep(save).values == whole.values).all() and len(calls) == done  # nothing left to run

    with pytest.raises(ValueError, match="another sweep"):
        sweep(save, site="attn_out")
    with pytest.raises(ValueError, match="another sweep"):
        patch_sweep(model, pairs, "resid_pre", ("layer", "pos"), batch_size=5, progress=False, save=save)
    with pytest.raises(ValueError, match="another sweep"):
        patch_sweep(model, pairs[:2], "resid_pre", ("layer", "pos"), batch_size=4, progress=False, save=save)
    with pytest.raises(ValueError, match="another sweep"):  # a metric of the same name
        sweep(tmp_path / "own.jsonl", metric=lambda pairs: lambda logits: logits[:, -1, 3])
        sweep(tmp_path / "own.jsonl", metric=lambda pairs: lambda logits: logits[:, -1, 4])


def test_memory_that_has_changed_does_not_change_a_sweep_that_has_begun(model, pairs, tmp_path, monkeypatch):
    def sweep():
        return patch_sweep(model, pairs, "z", ("layer", "head"), progress=False, save=tmp_path / "z.jsonl")

    whole, limits = sweep(), engine.limits_for
    monkeypatch.setattr(engine, "limits_for", lambda *args: replace(limits(*args), prompts=2, tokens=8))
    monkeypatch.setattr(Blocks, "patched", None)  # everything is there
    assert (sweep().values == whole.values).all()


def test_a_metric_of_ones_own(model, pairs):
    own = patch_sweep(
        model, pairs, "resid_pre", ("layer", "pos"), progress=False,
        metric=lambda some: lambda logits: logits[torch.arange(len(some)), -1, some.correct_ids],
    )  # fmt: skip
    each = torch.arange(len(pairs))
    logits = models.run(model, pairs.clean_tokens)[:, -1]
    np.testing.assert_allclose(own.clean, logits[each, pairs.correct_ids], atol=1e-4)


def test_a_kept_sweep_is_not_handed_to_another_metric_of_the_same_name(model, pairs, tmp_path):
    ends = [
        models.run(model, tokens)[0, -1, pairs.correct_ids[0]]
        for tokens in (pairs.clean_tokens, pairs.corrupted_tokens)
    ]

    def bent(pairs, by):
        """The same on the clean and on the corrupted prompt, whatever ``by``."""

        def metric(logits):
            x = logits[:, -1, pairs.correct_ids[0]]
            return x + by * (x - ends[0]) * (x - ends[1])

        return metric

    def sweep(by):
        return patch_sweep(
            model, pairs[:1], "z", ("layer", "head"), metric=partial(bent, by=by), progress=False,
            save=tmp_path / "kept.jsonl",
        )  # fmt: skip

    assert sweep(1.0).identical(sweep(1.0)), "a partial has the name of its function"
    with pytest.raises(ValueError, match="another sweep"):
        sweep(0.0)


@pytest.mark.parametrize("wrong", [lambda logits: logits.mean(), lambda logits: logits[:1, -1, 0]])
def test_a_metric_gives_a_number_a_prompt(model, pairs, wrong):
    with pytest.raises(ValueError, match="one number a prompt"):
        patch_sweep(model, pairs, "z", ("layer", "head"), metric=lambda pairs: wrong, progress=False)


def test_hooks_of_the_caller_see_whole_prompts(model, pairs):
    def last(activation, hook):
        activation[:, pairs.clean_tokens.shape[1] - 1] += 1
        return activation

    patch_sweep(model, pairs, "z", ("layer", "head"), progress=False)  # the fast path is known to be right
    with model.hooks(fwd_hooks=[(models.hook_name("resid_pre", 1), last)]):
        with pytest.warns(SlowPath, match="hooks of its own"):
            found = patch_sweep(model, pairs, "z", ("layer", "head"), progress=False)
        logits = models.run(model, pairs.clean_tokens)
    np.testing.assert_allclose(found.clean, LogitDiff(pairs.correct_ids, pairs.incorrect_ids)(logits), atol=1e-4)


def test_a_component_named_twice_is_taken_out_once(model, pairs):
    once, twice = (ablate(model, pairs, names, kind="zero") for names in (["L1H1"], ["L1H1", (1, 1)]))
    assert (twice.values == once.values).all() and twice.attrs["elements_changed"] == once.attrs["elements_changed"]


@pytest.mark.parametrize("text", ["notes of mine", "notes of mine\n", '["a", "list"]\n'])
def test_a_file_that_holds_no_sweep_is_left_alone(model, pairs, tmp_path, text):
    notes = tmp_path / "notes.txt"
    notes.write_text(text)
    with pytest.raises(ValueError, match="no sweep at all"):
        patch_sweep(model, pairs, "resid_pre", ("layer", "pos"), progress=False, save=notes)
    assert notes.read_text() == text


# ------------------------------------------------------------------------------ other architectures, and the way back

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
ARCHITECTURES = {
    "Llama": {"num_key_value_heads": 2, "tie_word_embeddings": False},  # grouped attention, rotary, RMSNorm
    "GPTNeoX": {"use_parallel_residual": True},  # attention and MLP side by side, partly rotary
    "Qwen2": {"num_key_value_heads": 2},  # biases on q, k and v
    "Qwen3": {"num_key_value_heads": 2, "head_dim": 16},  # q and k normalised
    "Gemma2": {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 4},  # four norms, soft caps
    "Mistral": {"num_key_value_heads": 1, "sliding_window": 4},
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def other(request, tmp_path_factory):
    """A small random model of another architecture: ours, Hugging Face's, and pairs that differ in two tokens."""
    import transformers

    tokenizer = conftest.byte_level_tokenizer()
    bos = tokenizer.bos_token_id
    config = getattr(transformers, request.param + ("TextConfig" if request.param == "Gemma3" else "Config"))(
        vocab_size=len(tokenizer), bos_token_id=bos, eos_token_id=bos, pad_token_id=None,
        attn_implementation="eager", **SIZES, **ARCHITECTURES[request.param],
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
        for parameter in hf.parameters():
            if parameter.ndim == 1:  # norms and biases, which begin as ones and zeros
                parameter += 0.2 * torch.randn(parameter.shape)
    directory = tmp_path_factory.mktemp(request.param)
    hf.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    model = load_model(str(directory))
    pairs = PromptPairs(
        model,
        clean=[" Mary and John went to the store", " Anna and Peter were at the garden"],
        corrupted=[" Mary and Peter went to the garden", " Anna and Mary were at the store"],
        correct=[" Mary", " Anna"], incorrect=[" John", " Peter"], check=False,
    )  # fmt: skip
    return model, hf, pairs


def hf_place(hf, site, layer):
    """Module of a Llama-like (or NeoX) model, and whether the site is its input."""
    neox = hasattr(hf, "gpt_neox")
    block = (hf.gpt_neox if neox else hf.model).layers[layer]
    attention = block.attention if neox else block.self_attn
    after = getattr(block, "pre_feedforward_layernorm", None) is not None  # Gemma 2 normalises what is written
    return {
        "resid_pre": (block, True),
        "resid_post": (block, False),
        "z": (attention.dense if neox else attention.o_proj, True),
        "attn_out": (block.post_attention_layernorm if after else attention, False),
        "mlp_out": (block.post_feedforward_layernorm if after else block.mlp, False),
        "mlp_post": (block.mlp.dense_4h_to_h if neox else block.mlp.down_proj, True),
    }[site]


@pytest.mark.parametrize("site", ["resid_pre", "resid_post", "z", "attn_out", "mlp_out", "mlp_post"])
def test_other_architectures_against_their_own_code(other, site):
    model, hf, pairs = other
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowPath)
        effect = patch_sweep(model, pairs, site, ("layer", "pos"), progress=False)

    def run(tokens, layer, change=None):
        module, on_input = hf_place(hf, site, layer)
        seen = []

        def hook(module, args, output=None):
            value = args if on_input else output
            first = (value[0] if isinstance(value, tuple) else value).clone()
            if change is not None:
                change(first)
            seen.append(first)
            return (first, *value[1:]) if isinstance(value, tuple) else first

        handle = module.register_forward_pre_hook(hook) if on_input else module.register_forward_hook(hook)
        logits = hf(tokens, use_cache=False).logits[:, -1]
        handle.remove()
        return logits, seen[0]

    for layer in range(3):
        _, clean = run(pairs.clean_tokens, layer)
        for pos in range(1, pairs.clean_tokens.shape[1]):

            def change(activation, pos=pos, clean=clean):
                activation[:, pos] = clean[:, pos]

            expected = difference(pairs, run(pairs.corrupted_tokens, layer, change)[0])
            assert_patched(effect[:, layer, pos], expected)


@pytest.mark.parametrize("site", ["q", "k", "v", "pattern", "resid_mid"])
def test_other_architectures_against_whole_passes(other, site, monkeypatch):
    model, _, pairs = other
    over = ("layer", "pos") if site == "resid_mid" else ("layer", "head")
    if site == "resid_mid" and "neox" in str(type(model.original_model)).lower():
        with pytest.raises(ValueError, match="hook_resid_mid"):  # there is no such place in a parallel block
            patch_sweep(model, pairs, site, over, progress=False)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowPath)
        fast = patch_sweep(model, pairs, site, over, progress=False)
    monkeypatch.setattr(engine, "choose", lambda model, base, *_: PlainHooks(model, base))
    assert_patched(fast, in_logits(patch_sweep(model, pairs, site, over, progress=False)))


@pytest.mark.parametrize("broken", ["numbers", "call"])
def test_a_model_whose_blocks_do_not_stand_alone_is_run_whole_with_a_notice(directory, pairs, broken, monkeypatch):
    model = load_model(directory)
    expected = patch_sweep(model, pairs, "z", ("layer", "head"), progress=False)
    real = models.run_block

    def other_block(*args, **more):
        if broken == "call":
            raise TypeError("needs more than that")
        return real(*args, **more) + torch.linspace(0, 1, D_MODEL)

    monkeypatch.setattr(models, "run_block", other_block)
    model.__dict__.pop("mi_fast_paths")  # as if it had just been loaded
    with pytest.warns(SlowPath, match="plain hooks") as notices:
        slow = patch_sweep(model, pairs, "z", ("layer", "head"), progress=False)
        again = patch_sweep(model, pairs, "z", ("layer", "head"), progress=False)
    assert len([each for each in notices if each.category is SlowPath]) == 1 and "\n" not in str(notices[0].message)
    assert_patched(slow, in_logits(expected))
    assert (again.values == slow.values).all()
    np.testing.assert_allclose(ablate(model, pairs, [(1, 2)]).raw, ablate_raw(directory, pairs, monkeypatch), atol=1e-4)


def ablate_raw(directory, pairs, monkeypatch):
    monkeypatch.undo()
    return ablate(load_model(directory), pairs, [(1, 2)]).raw
