"""The hand-set model for tests, and beside it a small random one that speaks the same words."""

from __future__ import annotations

from pathlib import Path

import torch

from mi_utils.smallworld.handset import (  # noqa: F401
    BOS,
    D_HEAD,
    D_MODEL,
    FIRST,
    INDUCTION,
    LOGIT,
    N_CTX,
    N_HEADS,
    PREVIOUS,
    VOCABULARY,
    WORDS,
    build_handset,
    build_tokenizer,
    induction_prompts,
    save_handset,
)


def save_random(directory: str | Path, seed: int = 0) -> Path:
    """A small GPT-2 with every parameter drawn at random, biases and LayerNorms too: nothing in it is convenient."""
    from transformers import GPT2Config, GPT2LMHeadModel

    generator = torch.Generator().manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(VOCABULARY), n_positions=N_CTX, n_embd=32, n_layer=3, n_head=4,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise + 1 if "ln_" in name and name.endswith("weight") else noise)
    directory = Path(directory)
    model.save_pretrained(directory)
    build_tokenizer().save_pretrained(directory)
    return directory
