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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
REST, PLACE = BLOCK - 1, BLOCK - 2  # dimensions of a head that no token uses (the vocabulary has 62 entries)


@dataclass(frozen=True)
class Wiring:
    """Which heads do what. As it stands, the model above; other values plant another answer.

    Attributes:
        previous: heads of layer 0 that copy the token before, each with its share of the copy.
        induction: heads of layer 1 that copy what followed the current token's last occurrence, with their shares.
        n_heads: of each layer.
        rest: how much of a match resting on BOS is worth. A match that is weaker than this is not seen.
        only_at: the induction heads see a match at this position and at no other one (None: everywhere).
        noise: scale of the weights of all other heads, drawn at random. 0: they write exactly nothing.
        seed: of the noise.
    """

    previous: Mapping[int, float] = field(default_factory=lambda: {PREVIOUS[1]: 1.0})
    induction: Mapping[int, float] = field(default_factory=lambda: {INDUCTION[1]: 1.0})
    n_heads: int = N_HEADS
    rest: float = 0.5
    only_at: int | None = None
    noise: float = 0.0
    seed: int = 0

    @property
    def planted(self) -> list[tuple[int, int]]:
        """The heads that do something, as (layer, head)."""
        return [(0, head) for head in sorted(self.previous)] + [(1, head) for head in sorted(self.induction)]


def _scale(k: int, d_model: int) -> float:
    return math.sqrt((k + k * k / BLOCK) / d_model + EPSILON)


def _writer(block: slice, d_model: int) -> torch.Tensor:
    """[64, d_model]: one-hot i to a 1 in the block, balanced so that the mean stays zero."""
    matrix = torch.zeros(BLOCK, d_model)
    matrix[:, block] = torch.eye(BLOCK)
    matrix[:, BALANCE] = -1 / BLOCK
    return matrix


def _reader(block: slice, d_model: int) -> torch.Tensor:
    """[d_model, 64]: the one-hot that stands in the block."""
    matrix = torch.zeros(d_model, BLOCK)
    matrix[block] = torch.eye(BLOCK)
    return matrix


def build_handset(wiring: Wiring | None = None):
    """The model (``GPT2LMHeadModel``), every weight that is not named here zero."""
    from transformers import GPT2Config, GPT2LMHeadModel

    wiring = wiring or Wiring()
    width = wiring.n_heads * D_HEAD
    config = GPT2Config(
        vocab_size=len(VOCABULARY), n_positions=N_CTX, n_embd=width, n_layer=2, n_head=wiring.n_heads, n_inner=width,
        layer_norm_epsilon=EPSILON, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    state = {name: torch.zeros_like(value) for name, value in GPT2LMHeadModel(config).state_dict().items()}
    state["transformer.wte.weight"] = _writer(TOKEN, width)[: len(VOCABULARY)]
    state["transformer.wpe.weight"] = _writer(POSITION, width)
    for layer, k in ((0, 2), (1, 3)):
        state[f"transformer.h.{layer}.ln_1.weight"] = torch.full((width,), _scale(k, width))
        state[f"transformer.h.{layer}.ln_2.weight"] = torch.full((width,), 1.0)  # the MLPs read, and write zero
    state["transformer.ln_f.weight"] = torch.full((width,), _scale(4, width))
    state["lm_head.weight"] = LOGIT * _reader(NEXT, width).T[: len(VOCABULARY)]

    def set_head(layer: int, head: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor) -> None:
        fused = state[f"transformer.h.{layer}.attn.c_attn.weight"]  # GPT-2 keeps q, k and v side by side: [in, out]
        for part, matrix in enumerate((q, k, v)):
            start = part * width + head * D_HEAD
            fused[:, start : start + D_HEAD] = matrix
        state[f"transformer.h.{layer}.attn.c_proj.weight"][head * D_HEAD : (head + 1) * D_HEAD] = o

    _set_previous(wiring, width, set_head)
    _set_induction(wiring, width, set_head)
    _set_noise(wiring, width, set_head)
    model = GPT2LMHeadModel(config)
    model.load_state_dict(state)
    return model.eval()


# Scores are divided by sqrt(d_head); the queries carry that factor and the sharpness.
_GAIN = SHARPNESS * math.sqrt(D_HEAD)


def _set_previous(wiring: Wiring, width: int, set_head: Callable[..., None]) -> None:
    one_back = torch.zeros(BLOCK, BLOCK)
    one_back[torch.arange(1, BLOCK), torch.arange(BLOCK - 1)] = 1
    one_back[0, 0] = 1  # position 0 has nothing before it
    for head, share in wiring.previous.items():
        set_head(
            0,
            head,
            q=_GAIN * _reader(POSITION, width) @ one_back,
            k=_reader(POSITION, width),
            v=_reader(TOKEN, width),
            o=share * _writer(PREVIOUS_BLOCK, width),
        )


def _set_induction(wiring: Wiring, width: int, set_head: Callable[..., None]) -> None:
    # A token that has not been seen before matches nothing. Then the head rests on BOS: half a match on a dimension
    # of its own, offered by position 0 alone. BOS has no value there, so resting writes nothing.
    words = slice(TOKEN.start, TOKEN.start + len(VOCABULARY))
    q = _GAIN * _reader(TOKEN, width)
    q[words, REST] = _GAIN * wiring.rest
    k = _reader(PREVIOUS_BLOCK, width)
    k[POSITION.start, REST] = 1
    if wiring.only_at is not None:
        # Neither the match nor the place is enough alone: each counts 0.6 of a match, and resting 0.9.
        q[words] = 0.6 * _GAIN * _reader(TOKEN, width)[words]
        q[words, PLACE] = 0.6 * _GAIN
        q[words, REST] = 0.9 * _GAIN
        k[POSITION.start + wiring.only_at, PLACE] = 1
    v = _reader(TOKEN, width)
    v[TOKEN.start] = 0  # BOS is token 0
    for head, share in wiring.induction.items():
        set_head(1, head, q=q, k=k, v=v, o=share * _writer(NEXT, width))


def _set_noise(wiring: Wiring, width: int, set_head: Callable[..., None]) -> None:
    generator = torch.Generator().manual_seed(wiring.seed)
    for layer, busy in ((0, wiring.previous), (1, wiring.induction)):
        for head in range(wiring.n_heads):
            if head in busy or not wiring.noise:
                continue
            q, k, v = (torch.randn(width, D_HEAD, generator=generator) for _ in range(3))
            o = torch.randn(D_HEAD, width, generator=generator) / math.sqrt(D_HEAD)
            o[:, 5 * BLOCK :] = 0  # dimensions that stand for nothing
            o -= o.mean(dim=1, keepdim=True)  # what is written has no mean, as everywhere here
            set_head(layer, head, q=q, k=k, v=v, o=wiring.noise * o)


def build_tokenizer():
    """One token a word, with its leading space, as GPT-2 would have it; BOS is the only special token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, unk_token="<unk>")


def save_handset(directory: str | Path, wiring: Wiring | None = None) -> Path:
    """Write the model and its tokenizer as an ordinary Hugging Face directory."""
    from transformers.utils import logging

    directory, shown = Path(directory), logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # it would flash by for a file of a few MB
    try:
        build_handset(wiring).save_pretrained(directory)
        build_tokenizer().save_pretrained(directory)
    finally:
        if shown:
            logging.enable_progress_bar()
    return directory


@cache
def directory() -> Path:
    """The model as a Hugging Face directory, which is gone when Python ends. ``load_model("handset")`` loads it."""
    kept = TemporaryDirectory(prefix="handset-")
    atexit.register(kept.cleanup)
    return save_handset(kept.name)


CHANGES = ("first", "next", "last")
# What each change travels along; together the edges that carry something about the words of a prompt. Not among them
# are those that carry positions alone, which are the same in every prompt.
PLANTED = {
    "first": ("embed -> L0H2.v", "L0H2 -> L1H3.k", "L1H3 -> logits"),
    "next": ("embed -> L1H3.v", "L1H3 -> logits"),
    "last": ("embed -> L1H3.q", "L1H3 -> logits"),
}


def induction_prompts(
    n: int = 6, length: int = 12, seed: int = 0, changed: str = "first", first: int = FIRST
) -> dict[str, list[str]]:
    """Keywords for ``PromptPairs``: "… A B … C D … A", and the same prompt with one word changed.

    BOS is at position 0, A at ``first``, B one later, A again at the end; no other word comes twice. The answer is B.

    Args:
        changed: what the corrupted prompt has changed. "first": the first A is another word; nothing has preceded B
            that is like the last word, so the model knows no answer. That takes both heads: the one that says at B "A
            was before me", and the one that looks for it. "next": B is another word, which is then the answer. "last":
            the last word is C, and D is the answer (C and D stand right behind B, so there must be room).
    """
    if changed not in CHANGES:
        raise ValueError(f"changed={changed!r}: {', '.join(CHANGES)}.")
    if changed == "last" and length < first + 4:
        raise ValueError(f"length={length}: C and D need {first + 4} words at least.")
    rng = random.Random(seed)
    answers = rng.sample(WORDS, n)
    columns: dict[str, list[str]] = {"clean": [], "corrupted": [], "correct": [], "incorrect": []}
    for answer in answers:
        other, *body = rng.sample([word for word in WORDS if word != answer], length - 1)
        body = [*body[:first], answer, *body[first:], body[first - 1]]
        incorrect = other
        if changed == "last":
            other, incorrect = body[first + 1 : first + 3]
        place = {"first": first - 1, "next": first, "last": len(body) - 1}[changed]
        columns["clean"].append(" " + " ".join(body))
        columns["corrupted"].append(" " + " ".join([*body[:place], other, *body[place + 1 :]]))
        columns["correct"].append(" " + answer)
        columns["incorrect"].append(" " + incorrect)
    return columns


def induction_pairs(model, n: int = 24, seed: int = 0, split: str = "train", check: bool = True):
    """``PromptPairs`` of :func:`induction_prompts`, called as ``ioi_pairs`` is.

    Split "train": 12 words, A at position 4. "held_out_templates": 16 words, A at position 9. The templates have no
    position of A or B in common.

    Raises:
        ValueError: an unknown split.
        ModelDoesNotKnowTask: with ``check``, when the model does not do induction.
    """
    from mi_utils.prompts import PromptPairs

    templates = {"train": (12, FIRST), "held_out_templates": (16, 9)}
    if split not in templates:
        raise ValueError(f"Unknown split {split!r}: use {' or '.join(templates)}.")
    length, first = templates[split]
    label = [f"A at {first} of {length}"] * n
    return PromptPairs(model, **induction_prompts(n, length, seed, first=first), check=check, template=label)
