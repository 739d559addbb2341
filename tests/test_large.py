"""Large models through nnsight: the same numbers and labels as through TransformerLens, and errors that help."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import byte_level_tokenizer
from fake_ndif import serve

from mi_utils import attribution, large, lens, models, patching, probing
from mi_utils.large import OutOfMemory, RemoteFailed, load_large_model
from mi_utils.models import ModelNotFound, WrongNumbers, load_model
from mi_utils.prompts import PromptPairs
from mi_utils.results import NothingChanged

TOLERANCE = 1e-4
LONG = (
    ["When Mary and John went to the store, John gave a drink to"] * 2
    + ["When Anna and Peter went to the store, Peter gave a key to"],
    ["When Mary and John went to the store, Mary gave a drink to",
     "When John and Mary went to the store, John gave a drink to",
     "When Anna and Peter went to the store, Anna gave a key to"],
)  # fmt: skip
SHORT = (["Peter handed the key to Anna. Anna handed the"], ["Peter handed the key to Anna. Peter handed the"])


def pairs_of(model, clean, corrupted):
    n = len(clean)
    return PromptPairs(model, clean, corrupted, [" Mary"] * n, [" John"] * n, check=False)


@pytest.fixture(scope="module", params=["gpt2", "llama", "neox"])
def both(request, tiny_dir, architectures):
    """The same weights under nnsight and as an unprocessed TransformerLens model, and pairs of two lengths."""
    name = request.param
    path = str(tiny_dir) if name == "gpt2" else models.info(architectures[name]).path
    theirs, ours = load_model(path, processing="raw", device="cpu"), load_large_model(path, device="cpu")
    long, short = pairs_of(theirs, *LONG), pairs_of(theirs, *SHORT)
    assert long.clean_tokens.shape[1] > short.clean_tokens.shape[1] + 2
    return ours, theirs, long, short


def same(ours, theirs, tolerance=TOLERANCE):
    """Values, dimensions, coordinates and the names of the attributes."""
    assert ours.dims == theirs.dims and ours.sizes == theirs.sizes and set(ours.attrs) == set(theirs.attrs)
    assert set(ours.coords) == set(theirs.coords)
    for name, expected in theirs.coords.items():
        if expected.dtype.kind == "f":
            assert np.allclose(ours[name], expected, atol=tolerance), name
        else:
            assert ours[name].values.tolist() == expected.values.tolist(), name
    variables = ours.data_vars if hasattr(ours, "data_vars") else [None]
    for name in variables:
        mine, their = (each if name is None else each[name] for each in (ours, theirs))
        assert float(np.abs(mine - their).max()) <= tolerance, name


def split(result, n_first, n_short):
    """The two lengths of a padded result, each with its own positions."""
    first, second = result.isel(prompt=slice(0, n_first)), result.isel(prompt=slice(n_first, None))
    if "pos" in result.dims:
        assert result["pos"].values[-1] == -1
        assert np.isnan(second.isel(pos=slice(0, -n_short))).all()
        second = second.isel(pos=slice(-n_short, None))
    return first, second


def logits_apart(effect, expected):
    """Largest difference of two patching results in logits: the scale from 0 to 1 may be tiny on random weights."""
    gap = np.abs(expected.clean - expected.corrupted).values.reshape(-1, *[1] * (effect.ndim - 1))
    return float(np.abs((effect.values - expected.values) * gap).max())


# --------------------------------------------------------------------------------- the two libraries on one model


@pytest.mark.parametrize("on", ["clean", "corrupted"])
def test_the_logit_lens_is_that_of_transformer_lens_padded_or_not(both, on):
    ours, theirs, long, short = both
    expected = [lens.logit_lens(theirs, pairs, on=on) for pairs in (long, short)]
    assert float(np.ptp(expected[0]["logit_diff"].values)) > 0.01  # there is something to compare
    same(large.logit_lens(ours, long, on=on), expected[0])
    padded = large.logit_lens(ours, [long, short], on=on)
    for name in expected[0].data_vars:
        for found, wanted in zip(split(padded[name], len(long), short.clean_tokens.shape[1]), expected, strict=True):
            assert float(np.abs(found.values - wanted[name].values).max()) <= TOLERANCE, name


@pytest.mark.parametrize("mode", ["denoising", "noising"])
@pytest.mark.parametrize(
    ("site", "over"),
    [
        ("resid_pre", ("layer", "pos")),
        ("z", ("layer", "head")),
        ("z", ("head", "pos", "layer")),
        ("mlp_out", ("pos", "layer")),
        ("attn_out", ("layer",)),
        ("resid_post", ("pos",)),
    ],
)
def test_patching_is_that_of_transformer_lens_padded_or_not(both, site, over, mode):
    ours, theirs, long, short = both
    expected = [patching.patch_sweep(theirs, pairs, site, over, mode=mode) for pairs in (long, short)]
    found = large.patch_sweep(ours, long, site, over, mode=mode)
    assert logits_apart(found, expected[0]) <= TOLERANCE
    assert found.dims == expected[0].dims and set(found.attrs) == set(expected[0].attrs)
    assert set(found.coords) == set(expected[0].coords)
    if "layer" in over:  # else what later layers change is what the first change has left, rounding apart
        assert found["n_changed"].values.tolist() == expected[0]["n_changed"].values.tolist()
    padded = large.patch_sweep(ours, [long, short], site, over, mode=mode, batch_size=5)
    for part, wanted in zip(split(padded, len(long), short.clean_tokens.shape[1]), expected, strict=True):
        assert logits_apart(part, wanted) <= TOLERANCE
    if "layer" in over:
        assert padded["n_changed"].sum() == sum(each["n_changed"].sum() for each in expected)


@pytest.mark.parametrize("by", ["component", "head", "layer"])
def test_attribution_is_that_of_transformer_lens_padded_or_not(both, by):
    ours, theirs, long, short = both
    expected = [attribution.direct_logit_attribution(theirs, pairs, by) for pairs in (long, short)]
    same(large.direct_logit_attribution(ours, long, by), expected[0])
    padded = large.direct_logit_attribution(ours, [long, short], by)
    assert float(np.abs(padded.sum("component") - padded["logit_diff"]).max()) < TOLERANCE
    for part, wanted in zip(split(padded, len(long), 0), expected, strict=True):
        assert float(np.abs(part.values - wanted.values).max()) <= TOLERANCE


def test_steering_is_that_of_transformer_lens_padded_or_not(both):
    ours, theirs, long, short = both
    data = large.activations(ours, long, "resid_post")
    direction = probing.difference_in_means(data, 1, "clean", "corrupted")
    wanted = {"it": direction, "random": probing.random_direction(direction)}
    scales = [-2.0, 0.0, 1.0]
    expected = [probing.steer(theirs, pairs, wanted, scales) for pairs in (long, short)]
    same(large.steer(ours, long, wanted, scales), expected[0])
    padded = large.steer(ours, [long, short], wanted, scales)
    parts = padded.isel(prompt=slice(0, len(long))), padded.isel(prompt=slice(len(long), None))
    for part, want in zip(parts, expected, strict=True):
        assert float(np.abs(part.values - want.values).max()) <= TOLERANCE


def test_activations_are_those_of_transformer_lens(both):
    ours, theirs, long, _ = both
    for site in large.SITES:
        found = large.activations(ours, long, site, pos=-2)
        for which, tokens in (("clean", long.clean_tokens), ("corrupted", long.corrupted_tokens)):
            kept = models.cache(theirs, tokens, [site], positions=[-2])
            expected = np.stack([kept[site, layer].flatten(1).numpy() for layer in found["layer"].values])
            assert np.abs(found.values[:, found["label"] == which] - expected).max() <= TOLERANCE, site


def test_folded_weights_give_the_same_log_probabilities_and_effects(tiny_dir, tiny):
    """Folding moves activations and shifts logits by a constant, so compare what it leaves alone."""
    ours, pairs = load_large_model(str(tiny_dir), device="cpu"), pairs_of(tiny, *LONG)
    expected, found = lens.logit_lens(tiny, pairs), large.logit_lens(ours, pairs)
    assert (found.attrs["processing"], expected.attrs["processing"]) == ("raw", "folded")
    for name in ("log_prob", "logit_diff"):
        apart = np.abs(found[name].isel(layer=-1) - expected[name].isel(layer=-1))
        assert float(apart.max()) <= TOLERANCE
    sweeps = (
        large.patch_sweep(ours, pairs, "resid_pre", ("layer", "pos")),
        patching.patch_sweep(tiny, pairs, "resid_pre", ("layer", "pos")),
    )
    assert logits_apart(*sweeps) <= TOLERANCE


# --------------------------------------------------------------------------------------------------------- padding


def small(kind, **more):
    """A small random model of a published shape, built on the spot."""
    import transformers

    tokenizer = byte_level_tokenizer()
    bos = tokenizer.bos_token_id
    sizes = {
        "vocab_size": len(tokenizer), "bos_token_id": bos, "eos_token_id": bos, "pad_token_id": bos,
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 64, "initializer_range": 0.3,
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**sizes, **more)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config), tokenizer


GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
KINDS = {
    "GPTNeoX": {}, "Llama": GROUPED, "Mistral": GROUPED, "Gemma": GROUPED, "Gemma2": GROUPED, "Gemma3Text": GROUPED,
    "Qwen2": {"num_key_value_heads": 2}, "Qwen3": GROUPED, "Phi": {}, "Olmo": {}, "Falcon": {"alibi": False},
}  # fmt: skip


@pytest.fixture(scope="module", params=["GPT2", *KINDS])
def shape(request, tiny_dir):
    if request.param == "GPT2":
        return load_large_model(str(tiny_dir), device="cpu")
    hf_model, tokenizer = small(request.param, **KINDS[request.param])
    return load_large_model(hf_model, tokenizer=tokenizer)


def test_a_padded_prompt_gets_the_logits_it_gets_alone(shape):
    prompts = ["Mary and", LONG[0][0], SHORT[0][0]]
    together = shape.prompt_logits(prompts)
    alone = torch.cat([shape.prompt_logits([prompt]) for prompt in prompts])
    assert float((together - alone).abs().max()) <= TOLERANCE
    # and they are the model's own, without nnsight
    ids = models.to_tokens(shape, [prompts[0]])
    assert float((shape.nn._module(ids).logits[:, -1] - alone[:1]).abs().max()) <= TOLERANCE


def test_without_the_right_positions_a_padded_prompt_gets_others(tiny_dir):
    """The control: what the test above would see."""
    model = load_large_model(str(tiny_dir), device="cpu")
    rows = [models.to_tokens(model, [prompt])[0] for prompt in ("Mary and", LONG[0][0])]
    inputs = large.Padded.of(rows, model).inputs()
    alone = model.logits(rows[:1])
    for names in (["position_ids"], ["position_ids", "attention_mask"]):
        spoilt = {key: value for key, value in inputs.items() if key not in names}
        assert float((model.nn._module(**spoilt).logits[:1, -1] - alone).abs().max()) > 0.01, names


def test_every_shape_does_every_experiment(shape):
    pairs = [pairs_of(shape, *LONG), pairs_of(shape, *SHORT)]
    read = large.logit_lens(shape, pairs)
    assert float(read["kl"].isel(layer=-1, pos=-1).max()) < TOLERANCE and float(read["kl"].isel(layer=0).max()) > 0.01
    sweep = large.patch_sweep(shape, pairs, "resid_pre", ("layer", "pos"))
    whole = large.patch_sweep(shape, pairs, "resid_post", ("layer",))
    assert np.allclose(whole, 1, atol=1e-3) and not np.allclose(sweep, whole.mean(), atol=1e-3, equal_nan=True)
    heads = large.patch_sweep(shape, pairs, "z", ("layer", "head"))
    assert heads.sizes["head"] == 4 and int(heads["n_changed"].sum()) > 0
    for by in ("component", "head"):
        if shape.modules.softcap or (by == "head" and shape.modules.normed):
            continue  # refused: see below
        parts = large.direct_logit_attribution(shape, pairs, by)
        assert float(np.abs(parts.sum("component") - parts["logit_diff"]).max()) < TOLERANCE
        assert float(np.abs(parts).max()) > 0.01


@pytest.mark.parametrize(
    ("kind", "by", "words"), [("Gemma2", "component", "soft cap"), ("Gemma3Text", "head", "normal")]
)
def test_attribution_that_would_not_sum_is_refused(kind, by, words):
    hf_model, tokenizer = small(kind, **GROUPED, **({"final_logit_softcapping": 2.0} if kind == "Gemma2" else {}))
    model = load_large_model(hf_model, tokenizer=tokenizer)
    with pytest.raises(RuntimeError, match=words):
        large.direct_logit_attribution(model, pairs_of(model, *LONG), by)


# --------------------------------------------------------------------------------------------------------- loading


def test_a_model_whose_parts_are_not_where_they_seem_is_refused(tiny_dir, monkeypatch):
    import dataclasses

    find = large.Modules.find
    spoilt = {"mlp_out": "ln_2", "projection": "mlp.c_proj", "softcap": 1.0}
    for name, value in spoilt.items():
        monkeypatch.setattr(
            large.Modules, "find", lambda hf_model, n=name, v=value: dataclasses.replace(find(hf_model), **{n: v})
        )
        with pytest.raises(WrongNumbers, match="relative|order"):
            load_large_model(str(tiny_dir), device="cpu")


def test_an_architecture_of_another_build_is_refused_with_its_parts(tiny_dir):
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(vocab_size=346, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4)
    with pytest.raises(NotImplementedError, match="MLP.*fc1"):
        load_large_model(OPTForCausalLM(config), tokenizer=byte_level_tokenizer())


def test_half_precision_and_a_device_map(tiny_dir):
    whole = load_large_model(str(tiny_dir), device="cpu")
    spread = load_large_model(str(tiny_dir), device_map={"": "cpu"})
    half = load_large_model(str(tiny_dir), device="cpu", dtype="bfloat16")
    pairs = pairs_of(whole, *LONG)
    first, second, third = (large.logit_lens(each, pairs)["log_prob"].isel(pos=-1) for each in (whole, spread, half))
    assert float(np.abs(first - second).max()) < TOLERANCE
    assert half.mi.dtype == "bfloat16" and 0 < float(np.abs(first - third).max()) < 0.5


def test_random_weights_are_those_of_load_model(tiny_dir):
    name = f"random:{tiny_dir}:3"
    ours, theirs = load_large_model(name, device="cpu"), load_model(name, device="cpu", processing="raw")
    tokens = models.to_tokens(theirs, LONG[0])
    assert float((ours(tokens)[:, 0] - models.run(theirs, tokens)[:, -1]).abs().max()) < TOLERANCE
    assert ours.mi.random_weights and ours.mi.seed == 0


def test_a_tokenizer_without_bos_gets_its_end_of_text_token():
    hf_model, tokenizer = small("Qwen2", num_key_value_heads=2)
    tokenizer.bos_token = None
    model = load_large_model(hf_model, tokenizer=tokenizer)
    assert models.to_tokens(model, ["Mary and"])[0, 0] == tokenizer.eos_token_id


def test_prompt_pairs_check_the_task_on_a_large_model(model):
    ours = load_large_model("smallworld", device="cpu")
    from mi_utils.prompts import ioi_pairs

    found, expected = ioi_pairs(ours, n=6), ioi_pairs(model, n=6)
    assert found.clean == expected.clean
    assert float((found.clean_logit_diff - expected.clean_logit_diff).abs().max()) < 1e-3


def test_eight_bits_are_near_single_precision(model):
    pytest.importorskip("bitsandbytes", reason="8-bit weights need bitsandbytes, which is no dependency of the course")
    from mi_utils.prompts import ioi_pairs

    single, eight = (load_large_model("smallworld", device="cpu", dtype=dtype) for dtype in ("float32", "int8"))
    assert eight.nn._module.get_submodule("transformer.h.0.attn.c_attn").weight.dtype == torch.int8
    pairs = ioi_pairs(single, n=6)
    first, second = (large.logit_lens(each, pairs)["log_prob"].isel(layer=-1, pos=-1) for each in (single, eight))
    assert eight.mi.dtype == "int8" and 0 < float(np.abs(first - second).max()) < 0.5


# ---------------------------------------------------------------------------------------------------- away from here


@pytest.fixture(scope="module")
def here(tiny_dir):
    return load_large_model(str(tiny_dir), device="cpu")


@pytest.fixture(scope="module")
def server(here):
    """A server in NDIF's manner that holds the tiny model; the hub, which would say its full name, is not asked."""
    from nnsight.modeling.huggingface import _ID_CACHE

    _ID_CACHE[here.mi.path] = here.mi.path
    with serve(here) as (address, told):
        yield address, told


@pytest.fixture
def key(monkeypatch):
    from nnsight import CONFIG

    monkeypatch.setattr(CONFIG.API, "APIKEY", "a-key")
    monkeypatch.setattr(CONFIG.APP, "REMOTE_LOGGING", False)


def experiments(model, pairs):
    direction = probing.difference_in_means(large.activations(model, pairs), 0, "clean", "corrupted")
    return {
        "lens": large.logit_lens(model, pairs)["log_prob"],
        "stream": large.patch_sweep(model, pairs, "resid_pre", ("layer", "pos")),
        "heads": large.patch_sweep(model, pairs, "z", ("layer", "head")),
        "attribution": large.direct_logit_attribution(model, pairs, "head"),
        "steering": large.steer(model, pairs, {"it": direction}, [1.0]),
    }


def test_the_rehearsal_of_a_remote_run_gives_what_a_run_here_gives(here, tiny_dir):
    pairs = [pairs_of(here, *LONG), pairs_of(here, *SHORT)]
    away = load_large_model(str(tiny_dir), device="cpu", remote="local")
    expected = experiments(here, pairs)
    for name, found in experiments(away, pairs).items():
        assert float(np.abs(found - expected[name]).max()) <= 1e-6, name


def test_a_server_runs_the_same_experiments(here, server, key):
    """The whole way: packed, sent, queued, unpacked, run on a model that is not loaded here, sent back."""
    address, told = server
    away = load_large_model(here.mi.path, remote=address)
    assert next(away.nn._module.parameters()).device.type == "meta"  # no weights here
    pairs = [pairs_of(here, *LONG), pairs_of(here, *SHORT)]
    expected = experiments(here, pairs)
    for name, found in experiments(away, pairs).items():
        assert float(np.abs(found - expected[name]).max()) <= 1e-6, name
    assert next(away.nn._module.parameters()).device.type == "meta"
    assert told[:3] == ["QUEUED", "RUNNING", "COMPLETED"] and "ERROR" not in told


def test_a_job_that_fails_on_the_server_says_so_with_the_next_step(here, server, key, monkeypatch):
    away = load_large_model(here.mi.path, remote=server[0])
    pairs = pairs_of(here, *LONG)
    forward = here.nn._module.lm_head.forward

    def full(*args):
        raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(here.nn._module.lm_head, "forward", full)
    with pytest.raises(OutOfMemory, match="batch_size"):
        large.logit_lens(away, pairs)
    monkeypatch.setattr(here.nn._module.lm_head, "forward", lambda *args: forward(*args)[:, :, :1])
    with pytest.raises(RemoteFailed, match="remote='local'"):
        large.logit_lens(away, pairs)


def test_a_wrong_key_is_an_error_that_says_where_keys_come_from(here, server, key, monkeypatch):
    from nnsight import CONFIG

    monkeypatch.setattr(CONFIG.API, "APIKEY", "another")
    away = load_large_model(here.mi.path, remote=server[0])
    with pytest.raises(RemoteFailed, match="NDIF_API_KEY"):
        large.logit_lens(away, pairs_of(here, *LONG))


def test_a_server_that_cannot_be_reached_is_an_error_with_the_next_step(here, key, server):
    away = load_large_model(here.mi.path, remote="http://127.0.0.1:9")
    with pytest.raises(RemoteFailed, match="network.*remote='local'"):
        large.logit_lens(away, pairs_of(here, *LONG))


def test_without_a_key_nothing_is_sent(monkeypatch):
    from nnsight import CONFIG

    monkeypatch.setattr(CONFIG.API, "APIKEY", None)
    monkeypatch.delenv("NDIF_API_KEY", raising=False)
    with pytest.raises(RemoteFailed, match="NDIF_API_KEY.*remote='local'"):
        load_large_model("gpt2-small", remote=True)


def test_ndif_does_not_have_what_lies_here(key, tiny_dir, here):
    for model in (str(tiny_dir), f"random:{tiny_dir}", here.nn._module):
        with pytest.raises(ValueError, match="remote='local'"):
            load_large_model(model, remote=True)


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("name", ["no-such-model", "nobody/no-such-model", "./no-such-folder"])
def test_a_model_that_is_nowhere_is_refused_with_a_way_on(key, name, remote):
    with pytest.raises(ModelNotFound, match="HF_HUB_OFFLINE") as caught:
        load_large_model(name, remote=remote)
    assert name in str(caught.value)


# ----------------------------------------------------------------------------------------------------------- errors


def test_weights_larger_than_the_memory_are_refused_before_they_are_read(monkeypatch, tiny_dir):
    with pytest.raises(OutOfMemory, match="(?s)TiB|GiB.*bfloat16.*device_map.*estimate"):
        monkeypatch.setattr(large, "available_memory", lambda device: 8 * 2**30)
        load_large_model("meta-llama/Llama-3.1-8B", device="cpu")
    monkeypatch.setattr(large, "available_memory", lambda device: 1000)
    with pytest.raises(OutOfMemory, match="1000 B"):
        load_large_model(str(tiny_dir), device="cpu")


@pytest.mark.parametrize(
    "error",
    [torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
     RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes")],
)  # fmt: skip
def test_memory_that_runs_out_in_a_pass_names_the_next_step_and_leaves_no_hook(here, monkeypatch, error):
    pairs = pairs_of(here, *LONG)
    expected = here(pairs.clean_tokens)

    def full(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(here.nn._module.transformer.h[1].mlp, "forward", full)
        with pytest.raises(OutOfMemory, match="batch_size.*remote=True"):
            large.patch_sweep(here, pairs, "resid_pre", ("layer", "pos"))
    assert torch.equal(here(pairs.clean_tokens), expected)
    assert torch.equal(here.nn._module(pairs.clean_tokens).logits[:, -1:], expected)


def test_eight_bits_without_bitsandbytes_say_what_to_do(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install bitsandbytes.*bfloat16"):
        load_large_model("smallworld", dtype="int8")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dtype": "float7"}, "bfloat16"),
        ({"device": "cpu", "device_map": "auto"}, "one of them"),
        ({"device": "no-such-device"}, "cpu"),
    ],
)
def test_wrong_settings_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        load_large_model("smallworld", **settings)


def test_what_is_no_model_is_refused(here):
    with pytest.raises(ValueError, match="neither a name nor"):
        load_large_model(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="tokenizer"):
        load_large_model(here.nn._module)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m, p: large.patch_sweep(m, p, "q", ("layer",)), "resid_pre"),
        (lambda m, p: large.patch_sweep(m, p, "resid_pre", ("head",)), "z has"),
        (lambda m, p: large.patch_sweep(m, p, "z", ("layer", "layer")), "twice"),
        (lambda m, p: large.patch_sweep(m, p, "z", ("token",)), "axes"),
        (lambda m, p: large.patch_sweep(m, p, "z", ("layer",), metric="kl"), "logit_diff"),
        (lambda m, p: large.patch_sweep(m, p, "z", ("layer",), mode="both"), "noising"),
        (lambda m, p: large.patch_sweep(m, p, "z", ("layer",), batch_size=0), "batch_size"),
        (lambda m, p: large.patch_sweep(m, [], "z", ("layer",)), "PromptPairs"),
        (lambda m, p: large.logit_lens(m, p, on="both"), "clean"),
        (lambda m, p: large.direct_logit_attribution(m, p, "neuron"), "component"),
        (lambda m, p: large.activations(m, p, pos=3), "-1"),
        (lambda m, p: large.steer(m, p, {}, [1]), "No directions"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(here, monkeypatch, call, words):
    pairs = pairs_of(here, *LONG)
    monkeypatch.setattr(here.nn._module.transformer, "forward", None)
    with pytest.raises(ValueError, match=words):
        call(here, pairs)


def test_an_intervention_that_changes_nothing_raises(here):
    pairs = pairs_of(here, *LONG)
    direction = probing.difference_in_means(large.activations(here, pairs), 0, "clean", "corrupted")
    with pytest.raises(NothingChanged, match="scale"):
        large.steer(here, pairs, {"it": direction}, [0.0])
    import dataclasses

    tiny = dataclasses.replace(direction, vector=direction.vector * 1e-20)
    with pytest.raises(NothingChanged, match="too small"):
        large.steer(here, pairs, {"it": tiny}, [1.0])


def test_patching_heads_that_write_nothing_raises(tiny_dir):
    model = load_large_model(str(tiny_dir), device="cpu")
    for block in model.nn._module.transformer.h:
        block.attn.c_attn.weight.data[:, -32:] = 0  # values
        block.attn.c_attn.bias.data[-32:] = 0
    pairs = pairs_of(model, ["Mary and John", "Anna and John"], ["Mary and Peter", "Anna and Peter"])
    with pytest.raises(NothingChanged, match="never took place"):
        large.patch_sweep(model, pairs, "z", ("layer", "head"))


def test_nothing_else_knows_nnsight():
    from pathlib import Path

    package = Path(large.__file__).parent
    knowing = [path.name for path in package.rglob("*.py") if "import nnsight" in path.read_text()
               or "from nnsight" in path.read_text()]  # fmt: skip
    assert knowing == ["large.py"]
