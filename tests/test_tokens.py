"""Rows of tokens: BOS first, none twice, the same for a seed; nothing is lost on the way to batches and activations."""

from __future__ import annotations

import json

import handset
import numpy as np
import pytest
import torch

from mi_utils import models
from mi_utils.models import load_model
from mi_utils.tokens import ActivationBuffer, TokenSource, row_activations, token_batches, token_rows

SITE, LAYER = "resid_post", 0
TEXTS = ["Mary and John went to the store.", "The cat sat on the mat because it was warm, and John left the house."]


@pytest.fixture(scope="module")
def raw(directory):
    return load_model(directory, processing="raw")


@pytest.fixture(scope="module")
def rows(tiny):
    """Random tokens behind BOS, of several lengths."""
    rng = np.random.default_rng(0)
    bos = tiny.tokenizer.bos_token_id
    return [[bos, *rng.integers(0, bos, size=rng.integers(5, 30)).tolist()] for _ in range(50)]


# ---------------------------------------------------------------- sources


def test_rows_are_different_texts_with_one_bos_and_the_same_for_a_seed(raw):
    rows = token_rows(raw, 3000, seed=1)  # the model's own samples
    bos = raw.tokenizer.bos_token_id
    kept = [tuple(row.tolist()) for row in rows]
    assert sum(map(len, kept)) >= 3000 and len(set(kept)) == len(kept)
    assert all(row[0] == bos and bos not in row[1:] for row in kept)
    again = token_rows(raw, 3000, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(rows, again, strict=True))
    assert [row.tolist() for row in token_rows(raw, 500, seed=2)] != [row.tolist() for row in rows]


def test_rows_of_given_texts(raw):
    rows = token_rows(raw, texts=[" ba be bi", " ba be", " ba be"])
    assert sorted(map(len, rows)) == [3, 4]
    with pytest.raises(ValueError, match="1 different rows"):
        token_rows(raw, texts=[" ba", " ba"])


def test_texts_that_cannot_be_rows_are_refused(tiny, raw):
    with pytest.raises(ValueError, match="BOS would stand twice"):
        token_rows(raw, texts=[raw.tokenizer.bos_token + " ba", " be"])
    with pytest.raises(ValueError, match="from_dict"):
        TokenSource(tiny, ["The cat sat."])


def test_padding_with_bos_counts_for_nothing(tiny):
    bos = tiny.tokenizer.bos_token_id
    source = TokenSource(tiny, [[bos, 5, 6, 7, *[bos] * 20]] * 40)
    with pytest.raises(ValueError, match="holds 120 tokens"):
        ActivationBuffer(tiny, source, SITE, LAYER, batch_size=256, buffer_tokens=256, seed=0).fill()


def test_an_embedded_model_gets_its_own_corpus(directory, monkeypatch):
    from mi_utils.smallworld.corpus import documents

    model = load_model(directory)
    monkeypatch.setitem(models.EMBEDDED, "random", models.Path(models.info(model).path))
    rows = token_rows(model, 200)
    first = next(documents(10_000)).text
    expected = [model.tokenizer.bos_token_id, *model.tokenizer.encode(first, add_special_tokens=False)]
    assert expected[: handset.N_CTX] in [row.tolist() for row in rows]


def test_rows_come_from_datasets_and_folders_alike(tiny, tmp_path):
    from datasets import Dataset, DatasetDict

    bos, encode = tiny.tokenizer.bos_token_id, lambda text: tiny.tokenizer.encode(text, add_special_tokens=False)
    expected = [[bos, *encode(text)] for text in TEXTS]
    as_text = Dataset.from_dict({"text": TEXTS})
    as_ids = Dataset.from_dict({"input_ids": [[bos, *encode(TEXTS[0])], encode(TEXTS[1])]})
    as_text.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    sources = (as_text, as_ids, DatasetDict(train=as_text), tmp_path / "saved", tmp_path / "lines", expected)
    for tokens in sources:
        source = TokenSource(tiny, tokens)
        assert [row for _, row in source.rows()] == expected
        assert [row for _, row in source.rows(1)] == expected[1:]
    assert [row[0] for _, row in zip(range(3), (r for _, r in TokenSource(tiny, None).rows()), strict=False)] == [
        bos
    ] * 3
    with pytest.raises(ValueError, match="no local folder"):
        TokenSource(tiny, "some/dataset")
    with pytest.raises(ValueError, match="input_ids, tokens or text"):
        list(TokenSource(tiny, Dataset.from_dict({"words": TEXTS})).rows())


def test_long_texts_go_on_in_rows_with_a_bos_of_their_own(tiny):
    ids = list(range(1, 150))
    found = [row for _, row in TokenSource(tiny, [ids]).rows()]
    bos = tiny.tokenizer.bos_token_id
    assert [row[0] for row in found] == [bos] * 3 and max(map(len, found)) == 64
    assert [token for row in found for token in row[1:]] == ids


# ---------------------------------------------------------------- batches and activations


def test_rows_of_any_length_become_batches():
    rows = [[9, 1], [9, 1, 2, 3], [9], [9, 4, 5]]
    batches = list(token_batches(rows, bos=9, batch_tokens=8))
    assert [batch.tolist() for batch in batches] == [[[9, 1, 9, 9], [9, 1, 2, 3]], [[9, 9, 9], [9, 4, 5]]]


def test_activations_are_those_of_the_cache_without_bos(tiny, rows):
    found = row_activations(tiny, rows[:7], "z", 1)
    expected = [models.cache(tiny, torch.tensor([row]), ["z"], [1])["z", 1][0, 1:].flatten(1) for row in rows[:7]]
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-5, rtol=1e-4)


def test_a_buffer_deals_every_activation_out_once_a_pass(tiny, rows):
    source = TokenSource(tiny, rows[:50])
    n = sum(len(row) - 1 for row in rows[:50])
    buffer = ActivationBuffer(tiny, source, SITE, LAYER, batch_size=1, buffer_tokens=200, seed=0, passes=2)
    first_rows = buffer.fill().clone()
    dealt = torch.cat([next(buffer) for _ in range(2 * n)])
    for half in (dealt[: len(first_rows)], dealt[len(first_rows) : 2 * len(first_rows)]):
        order = [int((half == row).all(1).nonzero()[0]) for row in first_rows]
        assert sorted(order) == list(range(len(first_rows))) != order
    everything = row_activations(tiny, rows[:50], SITE, LAYER)
    torch.testing.assert_close(dealt.sum(0), 2 * everything.sum(0), atol=1e-2, rtol=1e-3)
    assert buffer.epoch == 0
    next(buffer)
    assert buffer.epoch == 1  # the source is read again
