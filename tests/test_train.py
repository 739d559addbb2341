"""The trainer: what is exported is what was trained, batches are what they say, and a killed run goes on."""

import numpy as np
import pytest
import torch

from mi_utils.smallworld.tokenizer import build_tokenizer
from mi_utils.smallworld.train import CorpusBatches, Recipe, Trainer, repeated_tokens, save

SMALL = Recipe(
    seed=5, n_layers=2, d_model=32, n_heads=2, steps=20, batch_tokens=512, induction_steps=3, corpus_documents=2000
)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(n_documents=2000)


def test_the_exported_model_is_the_trained_one(tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM

    model = Trainer(SMALL, tokenizer).model
    save(model, tokenizer, tmp_path)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = torch.randint(len(tokenizer), (3, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = model(tokens, torch.ones_like(tokens, dtype=torch.bool))
        theirs = exported(tokens).logits.flatten(0, 1)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_only_predictable_repeats_count():
    tokens, repeats = repeated_tokens(np.random.default_rng(0), 50, 32, 8, d_vocab=900, bos=0)
    for row, wanted in zip(tokens, repeats, strict=True):
        assert row[0] == 0 and (row[1:] != 0).all()
        period = next(p for p in range(2, 9) if (row[1 + p :] == row[1:-p]).all())
        assert wanted.argmax() <= 2 + 8 and not wanted[: 2 + period].any()


def test_corpus_batches_begin_with_bos_and_never_ask_for_it(tokenizer):
    batches = CorpusBatches(tokenizer, SMALL)
    rng = np.random.default_rng(0)
    for tokens, wanted in [batches.packed(rng) for _ in range(3)] + [batches.single(rng) for _ in range(20)]:
        assert (tokens[:, 0] == tokenizer.bos_token_id).all()
        assert tokens.shape[1] <= SMALL.n_ctx and wanted.shape == tokens.shape
        assert not wanted[tokens == tokenizer.bos_token_id].any() and wanted.any(axis=1).all()


def test_a_resumed_run_equals_an_unbroken_one(tokenizer, tmp_path):
    unbroken = Trainer(SMALL, tokenizer)
    losses = [unbroken.advance()[1] for _ in range(10)]
    first = Trainer(SMALL, tokenizer)
    for _ in range(4):
        first.advance()
    torch.save(first.state(), tmp_path / "state.pt")
    second = Trainer(SMALL, tokenizer)
    second.restore(torch.load(tmp_path / "state.pt", weights_only=False))
    assert [second.advance()[1] for _ in range(6)] == losses[4:]


def test_the_state_of_another_recipe_is_refused(tokenizer):
    other = Trainer(Recipe(seed=6, n_layers=1, d_model=32, n_heads=2), tokenizer)
    with pytest.raises(ValueError, match="another recipe"):
        Trainer(SMALL, tokenizer).restore(other.state())


def test_the_second_stage_begins_and_the_loss_falls(tokenizer):
    trainer = Trainer(SMALL, tokenizer)
    steps = [trainer.advance() for _ in range(SMALL.steps)]
    assert {kind for kind, *_ in steps[:3]} == {"induction"} and trainer.second_stage == 3
    corpus = [loss for kind, loss, _ in steps if kind == "corpus"]
    assert np.mean(corpus[-3:]) < np.mean(corpus[:3])
