"""Direct logit attribution per head, and copying scores of all heads, beside TransformerLens's own ways.

The attribution is timed on a cache that is there, without the forward pass, on both sides: from activations to
contributions [prompt, head]. TransformerLens's route is ``cache.stack_head_results`` at the last position, the last
LayerNorm applied to the stack, and the product with the logit-difference directions. The cache is emptied of head
results before each round, since TransformerLens keeps them there.

Copying scores are timed from the weights: TransformerLens's ``FactoredMatrix`` multiplies W_E W_V and W_O W_U for each
head and takes eigenvalues of their product in the small order.
"""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
import torch
from common import (
    N_TOKENS,
    Row,
    gpt2_small_shaped,
    hooked_transformer,
    interleaved,
    median_ratio,
    prompt_pairs,
    threads,
)

from mi_utils import models
from mi_utils.attribution import attribute, cache_for_attribution
from mi_utils.ov_qk import copying_scores

TITLE = "Attribution and head circuits"
N_PROMPTS = 8
PEER_LAYERS = (0, 6)  # whose heads the peer's copying scores are timed on; its work is the same in every layer


def _by_stack(peer: Any, cache: Any, pairs: Any) -> torch.Tensor:
    """Contributions [prompt, head] by way of ``stack_head_results``."""
    for name in [name for name in cache.cache_dict if name.endswith("hook_result")]:
        del cache.cache_dict[name]
    stack = cache.stack_head_results(layer=-1, pos_slice=-1)
    scaled = cache.apply_ln_to_stack(stack, layer=-1, pos_slice=-1)
    directions = (peer.W_U[:, pairs.correct_ids] - peer.W_U[:, pairs.incorrect_ids]).T
    return (scaled * directions).sum(-1).T


def _attribution(model: Any, peer: Any, rounds: int) -> Row:
    pairs = prompt_pairs(model, N_PROMPTS, differ=(5,))
    ids = pairs.correct_ids, pairs.incorrect_ids
    ours = cache_for_attribution(model, pairs.clean_tokens, "head")
    _, theirs = peer.run_with_cache(pairs.clean_tokens)
    seconds = interleaved(
        {"ours": lambda: attribute(model, ours, *ids, "head"), "theirs": lambda: _by_stack(peer, theirs, pairs)}, rounds
    )
    found = attribute(model, ours, *ids, "head")
    heads = np.stack([values for (_, kind, _), values in found.items() if kind == "head"], 1)
    reference = _by_stack(peer, theirs, pairs).double().numpy()
    return Row(
        work=f"direct logit attribution per head, from a cache, {N_PROMPTS} prompts of {N_TOKENS} tokens",
        peer="`cache.stack_head_results`", threads=torch.get_num_threads(),
        ours=statistics.median(seconds["ours"]), theirs=statistics.median(seconds["theirs"]),
        ratio=median_ratio(seconds["theirs"], seconds["ours"]), bar=200,
        difference=float(np.abs(heads - reference).max()),
        note="Attribution: both from a cache that is there, the forward pass not included.",
    )  # fmt: skip


def _by_factored_matrix(peer: Any, layer: int) -> np.ndarray:
    """Copying scores [head] of a layer."""
    from transformer_lens import FactoredMatrix

    scores = []
    for head in range(peer.cfg.n_heads):
        circuit = peer.W_E @ FactoredMatrix(peer.W_V[layer, head], peer.W_O[layer, head]) @ peer.W_U
        eigenvalues = circuit.eigenvalues
        scores.append(float(eigenvalues.sum().real / eigenvalues.abs().sum()))
    return np.array(scores)


def _copying(model: Any, peer: Any, rounds: int) -> Row:
    results: dict[str, Any] = {}

    def ours() -> None:
        results["ours"] = copying_scores(model)

    def theirs() -> None:
        results["theirs"] = np.stack([_by_factored_matrix(peer, layer) for layer in PEER_LAYERS])

    seconds = interleaved({"ours": ours, "theirs": theirs}, rounds)
    share = models.info(model).shape.n_layers / len(PEER_LAYERS)
    all_layers = [second * share for second in seconds["theirs"]]
    return Row(
        work="copying scores of all heads",
        peer="`FactoredMatrix` eigenvalues", threads=torch.get_num_threads(),
        ours=statistics.median(seconds["ours"]), theirs=statistics.median(all_layers),
        ratio=median_ratio(all_layers, seconds["ours"]), bar=15,
        difference=float(np.abs(results["ours"].values[list(PEER_LAYERS)] - results["theirs"]).max()),
        note=f"Copying scores: ours for all 144 heads; the peer's timed on layers {PEER_LAYERS[0]} and "
        f"{PEER_LAYERS[1]} and scaled to 12, since the work is the same in each.",
    )  # fmt: skip


def main(rounds: int = 3) -> list[Row]:
    """Both rows, on GPT-2 small's shapes, with one thread and with all."""
    every = torch.get_num_threads()
    model, hf_model = gpt2_small_shaped()
    peer = hooked_transformer(hf_model)
    rows = []
    for count in dict.fromkeys((1, every)):
        with threads(count), torch.inference_mode():
            rows += [_attribution(model, peer, rounds), _copying(model, peer, rounds)]
    return rows
