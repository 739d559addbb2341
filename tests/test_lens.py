"""The logit lens, against the Hugging Face model's own output."""

import handset
import numpy as np
import pytest
import torch

from mi_utils import models
from mi_utils.lens import TunedLens, lens_quality, logit_lens, top_tokens, train_tuned_lens
from mi_utils.models import load_model
from mi_utils.prompts import PromptPairs
from mi_utils.tokens import token_rows


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


def test_positions_are_named_by_the_prompts_that_were_read(model):
    pair = PromptPairs(model, **handset.induction_prompts(1), check=False)
    names = logit_lens(model, pair, on="corrupted")["token"].values
    for place in (pair.clean_tokens != pair.corrupted_tokens)[0].nonzero().flatten().tolist():
        assert model.tokenizer.decode(pair.corrupted_tokens[0, place]).strip() in names[place]


def test_a_model_that_overflows_has_no_lens(model):
    pairs = PromptPairs(model, **handset.induction_prompts(2), check=False)
    with model.hooks(fwd_hooks=[(models.hook_name("mlp_out", 0), lambda activation, hook: activation * torch.nan)]):
        with pytest.raises(RuntimeError, match="away from the model's own output"):
            logit_lens(model, pairs)


# ---------------------------------------------------------------- the tuned lens


@pytest.fixture(scope="module")
def raw(directory):
    return load_model(directory, processing="raw")


@pytest.fixture(scope="module")
def rows(raw):
    return token_rows(raw, 3000, seed=1)  # the model's own samples


@pytest.fixture(scope="module")
def tuned(raw, rows):
    return train_tuned_lens(raw, rows[:-10], steps=150, learning_rate=1e-2, progress=False)


def test_training_lowers_kl_on_held_out_rows_and_shuffled_targets_do_not(raw, rows, tuned):
    plain, better = lens_quality(raw, rows[-10:]), lens_quality(raw, rows[-10:], tuned=tuned)
    assert (better.kl.mean("prompt")[:-1] < 0.9 * plain.kl.mean("prompt")[:-1]).all()
    shuffled = train_tuned_lens(raw, rows[:-10], steps=150, learning_rate=1e-2, shuffle_targets=True, progress=False)
    control = lens_quality(raw, rows[-10:], tuned=shuffled)
    ratio = control.kl.mean("prompt")[:-1] / better.kl.mean("prompt")[:-1]
    assert (ratio > 1.1).all() and (ratio[1:] > 2).all()  # the embeddings of random weights say little to begin with
    for quality in (plain, better, control):  # the last layer is the model
        last = quality.isel(layer=-1)
        np.testing.assert_allclose(last.kl, 0, atol=1e-5)
        np.testing.assert_allclose(last.agreement, 1)
        assert abs(float(last.bias)) < 1e-6


def test_quality_against_a_computation_of_its_own(directory, raw, rows):
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(directory)
    rows = [rows[0], rows[1][:7]]  # two lengths
    q, p = [], []
    with torch.no_grad():
        for row in rows:
            out = hf(row[None], output_hidden_states=True)
            q.append(hf.lm_head(hf.transformer.ln_f(out.hidden_states[1]))[0].softmax(-1))
            p.append(out.logits[0].softmax(-1))
    quality = lens_quality(raw, rows).isel(layer=1)
    expected = [float((b * (b / a).log()).sum(-1).mean()) for a, b in zip(q, p, strict=True)]
    np.testing.assert_allclose(quality.kl, expected, rtol=1e-3)
    agree = [float((a.argmax(-1) == b.argmax(-1)).float().mean()) for a, b in zip(q, p, strict=True)]
    np.testing.assert_allclose(quality.agreement, agree)
    a, b = torch.cat(q).mean(0), torch.cat(p).mean(0)
    np.testing.assert_allclose(float(quality.bias), float((b * (b / a).log()).sum()), rtol=1e-3)


def test_an_untrained_tuned_lens_is_the_logit_lens(raw):
    pairs = PromptPairs(raw, **handset.induction_prompts(3), check=False)
    plain, same = logit_lens(raw, pairs), logit_lens(raw, pairs, tuned=TunedLens.identity(raw))
    for name in plain.data_vars:
        np.testing.assert_array_equal(plain[name], same[name])
    assert (plain.attrs["lens"], same.attrs["lens"]) == ("logit lens", "tuned lens")


def test_a_translator_is_affine_and_the_last_layer_has_none(raw, tuned):
    stream = torch.randn(2, 32)
    by_hand = stream @ (torch.eye(32) + tuned.weight[1]) + tuned.bias[1]
    torch.testing.assert_close(tuned.translate(stream, 1), by_hand)
    assert tuned.translate(stream, 3) is stream
    with pytest.raises(ValueError, match="layers 0 to 3"):
        tuned.translate(stream, 4)


def test_training_repeats_with_its_seed_and_leaves_the_model_alone(raw, rows):
    before = models.W_U(raw).clone()
    one, two = (train_tuned_lens(raw, rows[:20], steps=3, seed=5, progress=False) for _ in range(2))
    other = train_tuned_lens(raw, rows[:20], steps=3, seed=6, progress=False)
    assert torch.equal(one.weight, two.weight) and not torch.equal(one.weight, other.weight)
    assert torch.equal(models.W_U(raw), before) and not models.W_U(raw).requires_grad


def test_a_saved_lens_comes_back_and_knows_its_model(raw, directory, tuned, tmp_path):
    path = tuned.save(tmp_path / "deeper" / "lens.safetensors")
    again = TunedLens.load(path, raw)
    assert torch.equal(again.weight, tuned.weight) and torch.equal(again.bias, tuned.bias)
    assert again.about == tuned.about and again.about["steps"] == 150
    with pytest.raises(ValueError, match="another model.*processing"):
        TunedLens.load(path, load_model(directory))
    pairs = PromptPairs(raw, **handset.induction_prompts(2), check=False)
    with pytest.raises(ValueError, match="another model"):
        logit_lens(load_model(f"random:{directory}", processing="raw"), pairs, tuned=tuned)


def test_a_file_without_a_lens_is_refused(raw, tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds no tuned lens"):
        TunedLens.load(tmp_path / "other.safetensors", raw)


def test_a_learning_rate_that_breaks_training_is_reported(raw, rows):
    with pytest.raises(RuntimeError, match="learning rate"):
        train_tuned_lens(raw, rows[:20], steps=20, learning_rate=1e3, progress=False)
    with pytest.raises(ValueError, match="above 0"):
        train_tuned_lens(raw, rows[:20], steps=0)
    with pytest.raises(ValueError, match="No rows"):
        train_tuned_lens(raw, [])
    with pytest.raises(ValueError, match="No rows"):
        lens_quality(raw, [])


def test_top_tokens_of_the_last_layer_are_the_models(directory, model):
    from transformers import AutoModelForCausalLM

    found = top_tokens(model, " ba be bi", k=3)
    assert dict(found.sizes) == {"layer": 4, "pos": 4, "rank": 3}
    ids = [model.tokenizer.bos_token_id, *model.tokenizer.encode(" ba be bi", add_special_tokens=False)]
    with torch.no_grad():
        top = AutoModelForCausalLM.from_pretrained(directory)(torch.tensor([ids])).logits[0].softmax(-1).topk(3)
    np.testing.assert_allclose(found.probability.isel(layer=-1), top.values, atol=1e-5)
    assert found.top_token.isel(layer=-1).values.tolist() == [
        [model.tokenizer.decode([token]) for token in line] for line in top.indices.tolist()
    ]
    assert found["token"].values.tolist() == ["0 BOS", "1 ba", "2 be", "3 bi"]
    with pytest.raises(ValueError, match="at least one"):
        top_tokens(model, " ba", k=0)
