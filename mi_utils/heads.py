"""What attention heads look at: patterns, and scores on random text that tell the well-known kinds apart.

Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; Olsson et al. 2022, "In-context
Learning and Induction Heads".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from mi_utils import models
from mi_utils.prompts import PromptPairs

if TYPE_CHECKING:
    import xarray as xr


def attention_patterns(
    model: Any,
    prompts: PromptPairs | Int[Tensor, "prompt pos"],
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
) -> xr.DataArray:
    """Attention probabilities.

    Args:
        prompts: pairs (their clean prompts are read) or tokens.
        layers, heads: which to keep; all by default.

    Returns:
        Dims (prompt, layer, head, query, key); each row over ``key`` sums to 1. With pairs, ``query_token`` and
        ``key_token`` carry the position labels; with tokens they do when there is one prompt.

    What it does not show: a head may look at a position and copy nothing from it.

    Raises:
        ValueError: a layer or head that the model has not.
    """
    import xarray as xr

    info = models.info(model)
    layers = _choose("layer", layers, info.shape.n_layers)
    heads = _choose("head", heads, info.shape.n_heads)
    tokens, labels = prompts, None
    if isinstance(prompts, PromptPairs):
        prompts.check_model(model)
        tokens, labels = prompts.clean_tokens, list(prompts.position_labels)
    elif len(prompts) == 1:
        labels = [f"{i} {token}" for i, token in enumerate(models.token_strings(model, prompts[0]))]

    cached = models.cache(model, tokens, ["pattern"], layers=layers)
    patterns = torch.stack([cached["pattern", layer][:, heads] for layer in layers], dim=1).float().cpu().numpy()
    positions = np.arange(patterns.shape[-1])
    coords: dict[str, Any] = {
        "prompt": np.arange(len(patterns)), "layer": layers, "head": heads, "query": positions, "key": positions,
    }  # fmt: skip
    if labels is not None:
        coords |= {"query_token": ("query", labels), "key_token": ("key", labels)}
    return xr.DataArray(
        patterns, dims=("prompt", "layer", "head", "query", "key"), coords=coords, name="attention",
        attrs={"model": info.name, "processing": info.processing, "seed": info.seed},
    )  # fmt: skip


def head_scores(model: Any, *, seed: int = 0, n: int = 16, length: int | None = None) -> xr.Dataset:
    """Score every head on random tokens said twice: BOS, ``length`` different tokens, the same tokens again.

    Args:
        seed: draws the tokens.
        n: number of sequences.
        length: of one half; by default 50, or what fits into the model's context.

    Returns:
        Over (layer, head), each a mean attention probability between 0 and 1: ``previous_token`` (to the position
        before), ``duplicate_token`` (from the repeat to the same token's first time) and ``prefix_matching`` (from
        the repeat to the token after the first time: induction). The attribute ``induction_accuracy`` is the share
        of the repeat, from its second token on, that the model predicts right.

    What it does not show: these are patterns. Whether the head also copies what it sees takes an intervention.

    Raises:
        ValueError: sequences too long for the context or for the vocabulary.
    """
    import xarray as xr

    info = models.info(model)
    length = min(50, (info.shape.n_ctx - 1) // 2) if length is None else length
    tokens = repeated_random_tokens(model, seed=seed, n=n, length=length)
    n_layers = info.shape.n_layers
    totals = {name: np.zeros((n_layers, info.shape.n_heads)) for name in _OFFSETS}
    right = 0
    for batch in tokens.split(8):
        cached = models.cache(model, batch, ["pattern"])
        for layer in range(n_layers):
            pattern = cached["pattern", layer].cpu().double()
            for name, offset in _OFFSETS.items():
                back = offset(length)
                # On the diagonal that lies ``back`` below the main one, entry i is the query i + back.
                diagonal = pattern.diagonal(-back, dim1=-2, dim2=-1)
                first_query = 1 if name == "previous_token" else length + 1
                totals[name][layer] += diagonal[..., first_query - back :].mean(-1).sum(0).numpy()
        predicted = models.run(model, batch)[:, length + 1 : -1].argmax(-1)
        right += int((predicted == batch[:, length + 2 :]).sum())
    return xr.Dataset(
        {name: (("layer", "head"), total / n) for name, total in totals.items()},
        coords={"layer": np.arange(n_layers), "head": np.arange(info.shape.n_heads)},
        attrs={
            "model": info.name, "processing": info.processing, "seed": seed, "n": n, "length": length,
            "induction_accuracy": right / (n * (length - 1)),
        },
    )  # fmt: skip


# How far back each kind of head looks in the repeat.
_OFFSETS = {
    "previous_token": lambda length: 1,
    "duplicate_token": lambda length: length,
    "prefix_matching": lambda length: length - 1,
}


def repeated_random_tokens(model: Any, *, seed: int, n: int, length: int) -> Int[Tensor, "n twice_length_and_bos"]:
    """BOS, ``length`` different ordinary tokens drawn at random, and the same again.

    Raises:
        ValueError: sequences too long for the context or for the vocabulary, or too short to score.
    """
    shape = models.info(model).shape
    special = set(model.tokenizer.all_special_ids)
    ordinary = torch.tensor([token for token in range(len(model.tokenizer)) if token not in special])
    longest = min((shape.n_ctx - 1) // 2, len(ordinary))
    if not 3 <= length <= longest:
        raise ValueError(f"length={length}: with this context and vocabulary it must be from 3 to {longest}.")
    generator = torch.Generator().manual_seed(seed)
    draws = [ordinary[torch.randperm(len(ordinary), generator=generator)[:length]] for _ in range(n)]
    once = torch.stack(draws)
    bos = torch.full((n, 1), models.bos(model))
    return torch.cat([bos, once, once], dim=1).to(models.info(model).device)


def _choose(what: str, wanted: Sequence[int] | None, there: int) -> list[int]:
    chosen = list(range(there)) if wanted is None else [int(index) for index in wanted]
    if missing := [index for index in chosen if not 0 <= index < there]:
        raise ValueError(f"The model has no {what} {missing}: it has {there}, counted from 0.")
    return chosen
