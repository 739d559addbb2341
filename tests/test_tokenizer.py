"""Any text can be encoded and comes back; what the experiments answer with is a single token."""

from itertools import islice

import pytest

from mi_utils.smallworld import lexicon
from mi_utils.smallworld.corpus import documents
from mi_utils.smallworld.tokenizer import BOS, build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.mark.parametrize("text", ["Straße, 東京 and 🙂!", "  two  spaces\n\ttab", "unheard-of: zyzzyva 1234567"])
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_word_of_the_world_is_one_token_after_a_space(tokenizer):
    assert [word for word in lexicon.words() if len(tokenizer.encode(" " + word)) != 1] == []


def test_years_split_into_century_and_year(tokenizer):
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode(" 1732")) == ["Ġ17", "32"]


def test_training_text_never_falls_back_to_bytes(tokenizer):
    texts = [document.text for document in islice(documents(seed=9), 500)]
    tokens = sum(len(tokenizer.encode(text)) for text in texts)
    pieces = sum(len(tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)) for text in texts)
    assert tokens <= 1.01 * pieces


def test_bos_is_one_token_and_not_added_unasked(tokenizer):
    assert tokenizer.encode(BOS) == [tokenizer.bos_token_id] == [tokenizer.eos_token_id]
    assert tokenizer.bos_token_id not in tokenizer.encode("The key")


def test_the_tokenizer_survives_saving(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for document in islice(documents(seed=5), 200):
        assert loaded.encode(document.text) == tokenizer.encode(document.text)
