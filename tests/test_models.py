"""Loading, tokens, running with hooks and reading weights, against the Hugging Face model itself."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import test_large
import torch
from conftest import save_random_gpt2

from mi_utils import heads, models
from mi_utils import tokens as rows_of_tokens
from mi_utils.models import HookNeverFired, ModelNotFound, load_model

PROMPTS = [
    "When Mary and John went to the store, John gave a drink to",
    "When Anna and Mary went to the store, Anna gave a key to",
]


@pytest.fixture(scope="module")
def hf(tiny_dir):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_dir, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def tokens(tiny):
    return models.to_tokens(tiny, PROMPTS)


def largest(difference):
    return float(difference.detach().abs().max())


# ------------------------------------------------------------------------------------------------------------ loading


@pytest.mark.parametrize("processing", ["folded", "raw"])
def test_log_probabilities_are_the_hugging_face_models(tiny_dir, hf, tokens, processing):
    model = load_model(str(tiny_dir), processing=processing)
    assert largest(models.run(model, tokens).log_softmax(-1) - hf(tokens).logits.log_softmax(-1)) < 1e-4


def test_half_precision_is_near_single(tiny_dir, hf, tokens):
    model = load_model(str(tiny_dir), dtype="bfloat16")
    logits = models.run(model, tokens)
    assert logits.dtype == torch.bfloat16 and models.info(model).dtype == "bfloat16"
    likely = hf(tokens).logits.log_softmax(-1).topk(5)
    assert largest(logits.float().log_softmax(-1).gather(-1, likely.indices) - likely.values) < 0.5


def test_info_says_what_was_loaded(tiny_dir, tiny):
    info = models.info(tiny)
    assert (info.name, info.path, info.processing, info.random_weights) == (str(tiny_dir),) * 2 + ("folded", False)
    assert (info.device, info.dtype, info.seed) == (str(models.pick_device()), "float32", 0)
    shape = info.shape
    assert (shape.n_layers, shape.d_model, shape.n_heads, shape.d_head, shape.n_ctx) == (2, 32, 4, 8, 64)
    with pytest.raises(TypeError, match="load_model"):
        models.info(torch.nn.Linear(1, 1))


def test_nothing_is_trained_by_accident(tiny, tokens):
    assert not tiny.training
    assert not any(p.requires_grad for p in torch.nn.Module.parameters(tiny))
    assert not models.run(tiny, tokens).requires_grad


def test_random_weights_are_the_same_for_a_seed_and_only_for_it(tiny_dir, tiny, tokens):
    name = f"random:{tiny_dir}"
    first, again, other = (models.run(load_model(n), tokens) for n in (f"{name}:3", f"{name}:3", f"{name}:4"))
    assert largest(first - again) == 0
    assert largest(first - other) > 0.1 and largest(first - models.run(tiny, tokens)) > 0.1
    by_argument = load_model(name, seed=3)
    assert largest(models.run(by_argument, tokens) - first) == 0
    assert models.info(by_argument).random_weights and models.info(by_argument).seed == 3


def test_random_weights_leave_the_global_generator_alone(tiny_dir):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    load_model(f"random:{tiny_dir}:5")
    assert torch.rand(1) == expected


def test_names_are_resolved_without_loading(tiny_dir):
    assert models.resolve(str(tiny_dir)) == str(tiny_dir)
    assert models.resolve("gpt2-small") in ("gpt2", "openai-community/gpt2")
    assert models.resolve("pythia-70m") == "EleutherAI/pythia-70m"
    assert models.resolve("someone/something") == "someone/something"
    assert models.embedded_names() == sorted(models.EMBEDDED)
    for name, path in models.EMBEDDED.items():
        assert models.resolve(name) == str(path)


def test_the_hand_set_model_has_a_name():
    from mi_utils.smallworld import handset

    model = load_model("handset")
    assert models.info(model).name == "handset" and "handset" not in models.embedded_names()
    prompts = handset.induction_prompts(4)
    answers = models.run(model, models.to_tokens(model, prompts["clean"]))[:, -1].argmax(-1)
    assert models.token_strings(model, answers) == prompts["correct"]
    assert models.resolve("handset") == models.info(model).path, "written once"
    assert models.info(load_model("random:handset")).random_weights


@pytest.mark.parametrize("name", ["no-such-model", "nobody/no-such-model", "./no-such-directory"])
def test_a_model_that_is_nowhere_is_refused_at_once_with_a_way_on(name):
    start = time.monotonic()
    with pytest.raises(ModelNotFound, match="HF_HUB_OFFLINE") as caught:
        load_model(name)
    assert name in str(caught.value) and "config.json" in str(caught.value)
    assert time.monotonic() - start < 10


def test_a_directory_without_a_model_is_refused(tmp_path):
    with pytest.raises(ModelNotFound, match="config.json"):
        load_model(str(tmp_path))


def test_unknown_processing_is_refused(tiny_dir):
    with pytest.raises(ValueError, match="folded"):
        load_model(str(tiny_dir), processing="fold")


def test_a_bridge_that_computes_something_else_is_refused(tiny_dir, monkeypatch):
    from transformer_lens.model_bridge import TransformerBridge

    boot = TransformerBridge.boot_transformers

    def broken(*args, **kwargs):
        bridge = boot(*args, **kwargs)
        with torch.no_grad():
            bridge.blocks[1].mlp.out.weight[0, 0] += 5
        return bridge

    monkeypatch.setattr(TransformerBridge, "boot_transformers", broken)
    with pytest.raises(RuntimeError, match="log-prob"):
        load_model(str(tiny_dir), processing="raw")


def test_gpt2_small_loads_by_its_hub_name_offline(hub_cache):
    # In a process of its own: HF_HOME is read when the libraries are imported.
    code = """
import torch
from mi_utils.models import info, load_model, run, single_token, to_tokens
model = load_model("gpt2-small")
shape = info(model).shape
assert (shape.n_layers, shape.d_model, shape.n_heads, shape.d_vocab) == (12, 768, 12, 50257), shape
assert shape.n_parameters == 124_439_808, shape
tokens = to_tokens(model, ["When Mary and John went to the store, John gave a drink to"])
assert tokens[0, 0] == 50256 and (tokens[0, 1:] != 50256).all(), tokens
assert run(model, tokens).shape == (1, tokens.shape[1], 50257)
assert 0 < single_token(model, " Mary") < 50256
"""
    environment = os.environ | {"HF_HOME": str(hub_cache), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_canary_is_silent_here_and_sings_for_other_weights(tmp_path):
    directory = save_random_gpt2(tmp_path, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3)
    with pytest.raises((FileNotFoundError, ValueError), match="canary"):
        models.check_canary(str(directory), "cpu", torch.float32)
    models.write_canary(directory)
    assert models.check_canary(str(directory), "cpu", torch.float32) < 1e-3
    save_random_gpt2(tmp_path, seed=1, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3)
    assert models.check_canary(str(directory), "cpu", torch.float32) > 0.1


def test_embedded_canaries_are_silent():
    names = [name for name in models.embedded_names() if (models.EMBEDDED[name] / models.CANARY).is_file()]
    if not names:
        pytest.skip("no embedded model has a canary yet")
    assert models.check_canary(names[0], "cpu", torch.float32) < 1e-3


# ------------------------------------------------------------------------------------------------------------- tokens


def test_every_prompt_gets_one_bos(tiny, tokens):
    bos = tiny.tokenizer.bos_token_id
    assert (tokens[:, 0] == bos).all() and (tokens[:, 1:] != bos).all()
    assert models.token_strings(tiny, tokens[0])[1:4] == ["When", " Mary", " and"]


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        (["<|endoftext|>When Mary"], "BOS"),
        (["When Mary and", "When Mary"], "When Mary"),
        ([], "at least one"),
    ],
)
def test_prompts_that_would_move_the_answer_are_refused(tiny, prompts, words):
    with pytest.raises(ValueError, match=words):
        models.to_tokens(tiny, prompts)


def test_prompts_longer_than_the_context_are_refused(tiny):
    with pytest.raises(ValueError, match="64"):
        models.to_tokens(tiny, [" Mary" * 64])


@pytest.mark.parametrize(
    "make",
    [
        lambda model: models.to_tokens(model, PROMPTS),
        lambda model: models.to_tokens_and_characters(model, PROMPTS[0]),
        lambda model: rows_of_tokens.token_rows(model, texts=PROMPTS),
        lambda model: list(rows_of_tokens.cut_rows(model, [[5, 6]])),
        lambda model: heads.repeated_random_tokens(model, seed=0, n=1, length=4),
    ],
)
def test_a_tokenizer_without_bos_is_refused_by_all_that_make_tokens(tiny, monkeypatch, make):
    make(tiny)
    monkeypatch.setattr(tiny.tokenizer, "_special_tokens_map", dict(tiny.tokenizer._special_tokens_map, bos_token=None))
    assert tiny.tokenizer.bos_token_id is None
    with pytest.raises(ValueError, match="no BOS token"):
        make(tiny)


def test_every_token_knows_its_characters(tiny, monkeypatch):
    text = PROMPTS[0]
    ids, characters = models.to_tokens_and_characters(tiny, text)
    assert ids == models.to_tokens(tiny, [text])[0].tolist() and len(characters) == len(ids) - 1
    assert "".join(text[start:end] for start, end in characters) == text
    monkeypatch.setattr(type(tiny.tokenizer), "is_fast", False)
    with pytest.raises(ValueError, match="which characters"):
        models.to_tokens_and_characters(tiny, text)


def test_an_answer_of_several_tokens_is_shown_in_pieces(tiny):
    assert tiny.tokenizer.decode([models.single_token(tiny, " Mary")]) == " Mary"
    with pytest.raises(ValueError, match="Mary.*John"):
        models.single_token(tiny, " Mary John")


# ------------------------------------------------------------------------------------------------------------ running


def test_the_cache_holds_what_was_asked_for_and_nothing_else(tiny, tokens):
    n, length = tokens.shape
    cached = models.cache(tiny, tokens, ["z", "pattern"], layers=[1])
    assert {place: tuple(value.shape) for place, value in cached.items()} == {
        ("z", 1): (n, length, 4, 8),
        ("pattern", 1): (n, 4, length, length),
    }
    assert torch.allclose(cached["pattern", 1].sum(-1), torch.ones(n, 4, length))
    assert set(models.cache(tiny, tokens, ["resid_pre"])) == {("resid_pre", 0), ("resid_pre", 1)}


@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "q", "k", "v", "z"])
def test_chosen_positions_are_those_of_the_whole_and_keep_nothing_alive(tiny, tokens, site):
    whole = models.cache(tiny, tokens, [site], layers=[1])[site, 1]
    part = models.cache(tiny, tokens, [site], layers=[1], positions=[3, -1])[site, 1]
    assert torch.equal(part, whole[:, [3, -1]])
    assert part.untyped_storage().nbytes() == part.numel() * part.element_size()


def test_pattern_positions_are_queries(tiny, tokens):
    whole = models.cache(tiny, tokens, ["pattern"], layers=[0])["pattern", 0]
    assert torch.equal(
        models.cache(tiny, tokens, ["pattern"], layers=[0], positions=[-1])["pattern", 0], whole[:, :, [-1]]
    )


def test_residual_stream_is_the_sum_of_what_is_written(tiny, tokens):
    sites = ["resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"]
    cached = models.cache(tiny, tokens, sites)
    for layer in (0, 1):
        pre, attn, mid, mlp, post = (cached[site, layer] for site in sites)
        assert largest(pre + attn - mid) < 1e-5 and largest(mid + mlp - post) < 1e-5


def test_stopping_early_gives_the_stream_before_that_layer(tiny, tokens):
    stream = models.cache(tiny, tokens, ["resid_pre"], layers=[1])["resid_pre", 1]
    assert torch.equal(models.run(tiny, tokens, stop_at_layer=1), stream)
    assert models.run(tiny, tokens).shape[-1] == models.info(tiny).shape.d_vocab  # and the next run goes to the end


@pytest.mark.parametrize("site", ["resid_pre", "resid_post", "attn_out", "mlp_out", "q", "k", "v", "z", "pattern"])
def test_an_edit_at_every_site_changes_the_logits(tiny, tokens, site):
    def edit(activation, hook):
        return activation * torch.linspace(0, 1, activation.shape[-1])  # adding to every key would change nothing

    before = models.run(tiny, tokens)
    changed = models.run_with_hooks(tiny, tokens, [(models.hook_name(site, 0), edit)])
    assert largest(changed - before) > 1e-3
    assert torch.equal(models.run(tiny, tokens), before)


def test_an_edit_is_applied_once(tiny, tokens):
    def add_one(activation, hook):
        return activation + 1

    name = models.hook_name("resid_post", 0)
    seen = []
    models.run_with_hooks(
        tiny, tokens, [(name, add_one), (models.hook_name("resid_pre", 1), lambda x, hook: seen.append(x.clone()))]
    )
    assert largest(seen[0] - models.cache(tiny, tokens, ["resid_post"])["resid_post", 0] - 1) < 1e-5


def test_hooks_are_gone_after_an_exception(tiny, tokens):
    def fail(activation, hook):
        raise KeyError("in the hook")

    before = models.run(tiny, tokens)
    with pytest.raises(KeyError, match="in the hook"):
        models.run_with_hooks(tiny, tokens, [(models.hook_name("z", 1), fail)])
    assert torch.equal(models.run(tiny, tokens), before)


def test_a_hook_that_never_fires_is_an_error(tiny, tokens):
    # ablated by nobody: hook_result is computed only when the bridge is told to
    with pytest.raises((HookNeverFired, ValueError)):
        models.run_with_hooks(tiny, tokens, [("blocks.1.attn.hook_result", lambda x, hook: x * 0)])
    with pytest.raises((HookNeverFired, ValueError), match="no_such_hook"):
        models.run_with_hooks(tiny, tokens, [("blocks.1.no_such_hook", lambda x, hook: None)])


def test_unknown_sites_and_layers_are_refused(tiny, tokens):
    with pytest.raises(ValueError, match="resid_pre.*pattern"):
        models.hook_name("residual", 0)
    with pytest.raises(ValueError, match="2"):
        models.cache(tiny, tokens, ["z"], layers=[2])


# ------------------------------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize("processing", ["folded", "raw"])
def test_weights_write_what_the_heads_write(tiny_dir, tokens, processing):
    model = load_model(str(tiny_dir), processing=processing)
    cached = models.cache(model, tokens, ["z", "attn_out"])
    for layer in (0, 1):
        written = torch.einsum("pshk,hkm->psm", cached["z", layer], models.W_O(model, layer))
        assert largest(written + models.b_O(model, layer) - cached["attn_out", layer]) < 1e-4


@pytest.mark.parametrize("processing", ["folded", "raw"])
def test_the_end_of_the_model_by_its_parts(tiny_dir, tokens, processing):
    model = load_model(str(tiny_dir), processing=processing)
    stream = models.cache(model, tokens, ["resid_post"], layers=[1])["resid_post", 1]
    logits = models.run(model, tokens)
    assert largest(models.unembed(model, stream) - logits) < 1e-4
    norm = models.final_norm(model)
    assert norm.centred
    centred = stream - stream.mean(-1, keepdim=True)
    normed = centred / (centred.pow(2).mean(-1, keepdim=True) + norm.epsilon).sqrt() * norm.weight + norm.bias
    assert largest(normed @ models.W_U(model) + models.b_U(model) - logits) < 1e-4


def test_position_embedding_is_what_the_stream_begins_with(tiny_dir, hf, tokens):
    model = load_model(str(tiny_dir), processing="raw")
    expected = hf.transformer.wpe.weight[: tokens.shape[1]].expand(len(tokens), -1, -1)
    assert largest(models.position_embedding(model, tokens) - expected) < 1e-6


def test_activation_and_layer_norm_in_few_kernels_are_the_same_functions(tiny, tokens):
    from transformers.activations import NewGELUActivation

    x = torch.linspace(-12, 12, 4001, dtype=torch.float64, requires_grad=True)
    ours, theirs = models._gelu(x), NewGELUActivation()(x)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(each.sum(), x)[0] for each in (ours, theirs)))
    norm = tiny.blocks[0].ln1
    assert "forward" in vars(norm) and "forward" in vars(tiny.blocks[0].mlp.original_component.act)
    stream = models.run(tiny, tokens, stop_at_layer=0)
    fast = norm(stream)
    doubled = models.run_with_hooks(tiny, tokens, [("blocks.0.ln1.hook_scale", lambda scale, hook: 2 * scale)])
    assert not torch.allclose(doubled, models.run(tiny, tokens), atol=1e-2)  # a hook inside is still obeyed
    torch.testing.assert_close(fast, type(norm).forward(norm, stream), atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module", params=["OPT", "Gemma", "Gemma2"])
def of_another_kind(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    hf_model, tokenizer = test_large.small(request.param, **test_large.KINDS.get(request.param, {}))
    hf_model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return load_model(str(directory))


def test_embeddings_are_what_enters_the_stream(of_another_kind):
    """OPT keeps two rows for no position; Gemma multiplies by √d_model."""
    model = of_another_kind
    tokens = models.to_tokens(model, ["The cat sat on the"])
    stream = models.cache(model, tokens, ["resid_pre"], layers=[0])["resid_pre", 0]
    expected = models.W_E(model)[tokens]
    if models.W_pos(model) is not None:
        expected = expected + models.W_pos(model)[: tokens.shape[1]]
    torch.testing.assert_close(expected, stream, atol=1e-5, rtol=1e-4)


def test_an_mlp_by_its_weights_is_the_mlp_of_the_run(of_another_kind):
    model = of_another_kind
    tokens = models.to_tokens(model, ["The cat sat on the"])
    kept = models.cache(model, tokens, ["resid_mid", "mlp_out"], layers=[1])
    if type(model.blocks[0].original_component).__name__ != "GemmaDecoderLayer":
        with pytest.raises(NotImplementedError, match="mlp_out of a run"):
            models.mlp(model, 1, kept["resid_mid", 1])
    else:
        torch.testing.assert_close(models.mlp(model, 1, kept["resid_mid", 1]), kept["mlp_out", 1], atol=1e-5, rtol=1e-4)
