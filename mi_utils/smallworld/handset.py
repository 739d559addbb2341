"""A transformer whose weights are set by hand, so that the right answer is known before anything is run.

Two layers of five heads. Two of the ten heads do something, the other eight write exactly nothing:

* ``PREVIOUS`` (L0H2) looks at the position before and copies that token into the block "previous".
* ``INDUCTION`` (L1H3) looks for the positions whose "previous" is the current token, and copies the token it
  finds there into the block "next", which is all that the unembedding reads.

The residual stream has five blocks of 64: token, position, previous, next, balance. The first four are one-hot.

LayerNorm. It takes away the mean and divides by the standard deviation, so both have to be known beforehand:

* Mean. Whatever writes a 1 into some block also writes -1/64 into each of the 64 dimensions of "balance".
  Every vector in the stream then sums to zero, and there is no mean to take away.
* Standard deviation. After k such writes into k different one-hot blocks the squared length is k (the ones) plus
  64 * (k/64)**2 (the balance), whatever the token and the position. ``_scale(k)`` is the standard deviation that
  follows, with LayerNorm's epsilon. Taken as LayerNorm's weight it makes the normalisation the identity.
  k = 2 before layer 0 (token, position), k = 3 before layer 1 (and previous).
* The last LayerNorm sees k = 3 or 4, depending on whether the induction head found anything. It gets the scale
  for 4; where nothing was found the logits are all zero anyway.
"""

from __future__ import annotations

import atexit
import math
import random
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

BLOCK = 64
TOKEN, POSITION, PREVIOUS_BLOCK, NEXT, BALANCE = (slice(i * BLOCK, (i + 1) * BLOCK) for i in range(5))
N_HEADS, D_HEAD, D_MODEL, N_CTX = 5, BLOCK, 5 * BLOCK, BLOCK
EPSILON = 1e-5
SHARPNESS = 30.0  # attention score of a match; everything else together gets about 64 * exp(-30)
LOGIT = 12.0  # logit of the token that the induction head found

PREVIOUS = (0, 2)
INDUCTION = (1, 3)

BOS = "<|endoftext|>"
WORDS = [c + v for c in "bdfgklmnprst" for v in "aeiou"][:60]  # " ba", " be", …: one token each
VOCABULARY = [BOS, "<unk>", *("Ġ" + word for word in WORDS)]
FIRST = 4  # position of the first A in ``induction_prompts``
REST = BLOCK - 1  # a dimension of the head that no token uses (the vocabulary has 62 entries)


def _scale(k: int) -> float:
    return math.sqrt((k + k * k / BLOCK) / D_MODEL + EPSILON)


def _writer(block: slice) -> torch.Tensor:
    """[64, d_model]: one-hot i to a 1 in the block, balanced so that the mean stays zero."""
    matrix = torch.zeros(BLOCK, D_MODEL)
    matrix[:, block] = torch.eye(BLOCK)
    matrix[:, BALANCE] = -1 / BLOCK
    return matrix


def _reader(block: slice) -> torch.Tensor:
    """[d_model, 64]: the one-hot that stands in the block."""
    matrix = torch.zeros(D_MODEL, BLOCK)
    matrix[block] = torch.eye(BLOCK)
    return matrix


def build_handset():
    """The model (``GPT2LMHeadModel``), every weight that is not named here zero."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=len(VOCABULARY), n_positions=N_CTX, n_embd=D_MODEL, n_layer=2, n_head=N_HEADS, n_inner=D_MODEL,
        layer_norm_epsilon=EPSILON, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    state = {name: torch.zeros_like(value) for name, value in GPT2LMHeadModel(config).state_dict().items()}
    state["transformer.wte.weight"] = _writer(TOKEN)[: len(VOCABULARY)]
    state["transformer.wpe.weight"] = _writer(POSITION)
    for layer, k in ((0, 2), (1, 3)):
        state[f"transformer.h.{layer}.ln_1.weight"] = torch.full((D_MODEL,), _scale(k))
        state[f"transformer.h.{layer}.ln_2.weight"] = torch.full((D_MODEL,), 1.0)  # the MLPs read, and write zero
    state["transformer.ln_f.weight"] = torch.full((D_MODEL,), _scale(4))
    state["lm_head.weight"] = LOGIT * _reader(NEXT).T[: len(VOCABULARY)]

    def set_head(layer: int, head: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor) -> None:
        fused = state[f"transformer.h.{layer}.attn.c_attn.weight"]  # GPT-2 keeps q, k and v side by side: [in, out]
        for part, matrix in enumerate((q, k, v)):
            start = part * D_MODEL + head * D_HEAD
            fused[:, start : start + D_HEAD] = matrix
        state[f"transformer.h.{layer}.attn.c_proj.weight"][head * D_HEAD : (head + 1) * D_HEAD] = o

    # Scores are divided by sqrt(d_head); the queries carry that factor and the sharpness.
    gain = SHARPNESS * math.sqrt(D_HEAD)

    one_back = torch.zeros(BLOCK, BLOCK)
    one_back[torch.arange(1, BLOCK), torch.arange(BLOCK - 1)] = 1
    one_back[0, 0] = 1  # position 0 has nothing before it
    set_head(
        *PREVIOUS,
        q=gain * _reader(POSITION) @ one_back,
        k=_reader(POSITION),
        v=_reader(TOKEN),
        o=_writer(PREVIOUS_BLOCK),
    )

    # A token that has not been seen before matches nothing. Then the head rests on BOS: half a match on a dimension
    # of its own, offered by position 0 alone. BOS has no value there, so resting writes nothing.
    q = gain * _reader(TOKEN)
    q[TOKEN.start : TOKEN.start + len(VOCABULARY), REST] = gain / 2
    k = _reader(PREVIOUS_BLOCK)
    k[POSITION.start, REST] = 1
    v = _reader(TOKEN)
    v[TOKEN.start] = 0  # BOS is token 0
    set_head(*INDUCTION, q=q, k=k, v=v, o=_writer(NEXT))

    model = GPT2LMHeadModel(config)
    model.load_state_dict(state)
    return model.eval()


def build_tokenizer():
    """One token a word, with its leading space, as GPT-2 would have it; BOS is the only special token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, unk_token="<unk>")


def save_handset(directory: str | Path) -> Path:
    """Write the model and its tokenizer as an ordinary Hugging Face directory."""
    directory = Path(directory)
    build_handset().save_pretrained(directory)
    build_tokenizer().save_pretrained(directory)
    return directory


@cache
def directory() -> Path:
    """The model as a Hugging Face directory, which is gone when Python ends. ``load_model("handset")`` loads it."""
    kept = TemporaryDirectory(prefix="handset-")
    atexit.register(kept.cleanup)
    return save_handset(kept.name)


def induction_prompts(n: int = 6, length: int = 12, seed: int = 0) -> dict[str, list[str]]:
    """Keywords for ``PromptPairs``: "… A B … A", and the same prompt with another word for the first A.

    BOS is at position 0, A at ``FIRST``, B one later, A again at the end; no other word comes twice. The answer is B.
    In the corrupted prompt nothing has preceded B that is like the last word, so the model knows no answer. That
    takes both heads: the one that says at B "A was before me", and the one that looks for it.
    """
    rng = random.Random(seed)
    answers = rng.sample(WORDS, n)
    columns: dict[str, list[str]] = {"clean": [], "corrupted": [], "correct": [], "incorrect": []}
    for answer in answers:
        other, *body = rng.sample([word for word in WORDS if word != answer], length - 1)
        body = [*body[:FIRST], answer, *body[FIRST:], body[FIRST - 1]]
        columns["clean"].append(" " + " ".join(body))
        columns["corrupted"].append(" " + " ".join([*body[: FIRST - 1], other, *body[FIRST:]]))
        columns["correct"].append(" " + answer)
        columns["incorrect"].append(" " + other)
    return columns
