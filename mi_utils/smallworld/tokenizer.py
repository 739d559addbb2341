"""The tokenizer of the small world: byte-level BPE, so that any text can be encoded, with the world's words whole."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from typing import TYPE_CHECKING

from mi_utils.smallworld.corpus import documents
from mi_utils.smallworld.lexicon import NAMES, words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BOS = "<|endoftext|>"
# GPT-2's split, but digits in pairs (" 17" "32", as years need) and every punctuation mark by itself.
SPLIT = r" ?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]|\s+(?!\S)|\s+"


def build_tokenizer(n_documents: int = 20_000, merges: int = 256, seed: int = 0) -> PreTrainedTokenizerFast:
    """Train `merges` byte-pair merges for text from outside the world, then add the world's words as whole tokens.

    `ignore_merges` lets a whole word be found without the chain of partial merges that would otherwise fill a
    third of so small a vocabulary. BOS, EOS and UNK are one token, as in GPT-2. Vocabulary: about 1,700 tokens.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    texts = [document.text for document in islice(documents(seed), n_documents)]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = split
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=len(alphabet) + 1 + merges,
            special_tokens=[BOS],
            initial_alphabet=sorted(alphabet),
            show_progress=False,
        ),
    )
    learned = json.loads(trained.to_str())["model"]
    vocabulary: dict[str, int] = dict(learned["vocab"])

    seen = Counter(piece for text in texts for piece, _ in split.pre_tokenize_str(text))
    whole = [piece for piece, count in sorted(seen.items()) if count >= 20]
    whole += NAMES + ["Ġ" + word for word in words()] + [f"{space}{n:02d}" for space in ("Ġ", "") for n in range(100)]
    for piece in whole:
        vocabulary.setdefault(piece, len(vocabulary))

    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(merge) for merge in learned["merges"]], ignore_merges=True))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([BOS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=BOS,
        unk_token=BOS,
        model_max_length=128,
        clean_up_tokenization_spaces=False,
    )
