"""Patching sweeps: ours, ``transformer_lens.patching``, and a loop of plain Hugging Face hooks.

The peers run one whole forward pass a cell, every cell costs them the same, and all of them would take hours: they run
a few cells, and their time is scaled to the whole grid. Those cells are also where the results are compared.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from common import (
    Row,
    gpt2_small_shaped,
    hooked_transformer,
    interleaved,
    matmul_rate,
    median_ratio,
    prompt_pairs,
    threads,
)

from mi_utils import models, patch_sweep
from mi_utils.compute import block_flops
from mi_utils.metrics import logit_difference
from mi_utils.patching import plan_sweep

TITLE = "Activation patching"
NOTE = (
    "Prompts have 15 tokens. One token differs: position 10, as S2 in IOI prompts; three names: 3, 5, 10; everywhere: "
    "all but BOS. The peers' times are those of a few cells, scaled to the grid. Largest difference: of the mean "
    "patched logit difference at those cells, in logits. The FLOP ratio counts one whole pass a cell, all positions "
    "unembedded, against the least that an exact sweep has to do."
)
DIFFER = {"one token differs": (10,), "three names differ": (3, 5, 10), "all differ": tuple(range(1, 15))}
TRANSFORMER_LENS, PLAIN_HOOKS = "transformer_lens.patching", "Hugging Face hooks, logits_to_keep=1"


@dataclass(frozen=True)
class Work:
    """A sweep, the peer it is measured against, and the ratio to reach."""

    site: str
    over: tuple[str, ...]
    differ: str
    n_prompts: int
    peer: str
    bar: float

    @property
    def name(self) -> str:
        """As it stands in the table."""
        return f"{self.site}, {' × '.join(self.over)}, {self.differ}, {self.n_prompts} prompts"


GRID, HEADS, HEADS_AT = ("layer", "pos"), ("layer", "head"), ("layer", "pos", "head")
WORKS = (
    Work("resid_pre", GRID, "one token differs", 8, TRANSFORMER_LENS, 30),
    Work("resid_pre", GRID, "one token differs", 8, PLAIN_HOOKS, 15),
    Work("resid_pre", GRID, "one token differs", 50, TRANSFORMER_LENS, 30),
    Work("resid_pre", GRID, "three names differ", 8, TRANSFORMER_LENS, 8),
    Work("resid_pre", GRID, "all differ", 8, TRANSFORMER_LENS, 4),
    Work("z", HEADS, "one token differs", 8, TRANSFORMER_LENS, 8),
    Work("z", HEADS, "three names differ", 8, TRANSFORMER_LENS, 3),
    Work("z", HEADS_AT, "one token differs", 8, TRANSFORMER_LENS, 30),
)


def main(works: Sequence[Work] = WORKS, cells: int = 4, rounds: int = 3) -> list[Row]:
    """Every sweep on one thread and on all."""
    rows = []
    for device, dtype in _devices():
        model, hf_model = gpt2_small_shaped(device, dtype)
        lens = hooked_transformer(hf_model)
        for count in sorted({1, os.cpu_count() or 1}) if device == "cpu" else [1]:
            with threads(count), torch.no_grad():
                for work in works:
                    pairs = prompt_pairs(model, work.n_prompts, DIFFER[work.differ])
                    where = "" if device == "cpu" else f" ({device}, {dtype})"
                    rows.append(row(work.name + where, work, model, hf_model, lens, pairs, cells, rounds, count))
    return rows


def _devices() -> list[tuple[str, str]]:
    return [("cpu", "float32"), *([("cuda", "float32"), ("cuda", "bfloat16")] if torch.cuda.is_available() else [])]


def row(
    name: str, work: Work, model: Any, hf_model: Any, lens: Any, pairs: Any, cells: int, rounds: int, n_threads: int
) -> Row:
    """Ours and the peer on one sweep; the peer on ``cells`` of its cells."""
    device, plan = models.info(model).device, plan_sweep(model, pairs, work.site, work.over)
    n_cells = int(np.prod(plan.shape[1:]))
    chosen = np.unravel_index(np.random.default_rng(0).permutation(n_cells)[:cells], plan.shape[1:])
    chosen = [tuple(map(int, cell)) for cell in zip(*chosen, strict=True)]
    if work.peer == TRANSFORMER_LENS:
        peer = _transformer_lens(lens, pairs, work, chosen)
    else:
        peer = _hugging_face(hf_model, pairs, chosen)
    ours = partial(patch_sweep, model, pairs, work.site, work.over, progress=False)

    effect, theirs = ours(), peer()  # warm both up, and compare
    patched = (effect * (effect.clean - effect.corrupted) + effect.corrupted).mean("prompt").values
    difference = max(abs(float(patched[cell]) - value) for cell, value in zip(chosen, theirs, strict=True))

    multiply = matmul_rate(device, next(model.parameters()).dtype)
    seconds = interleaved({"ours": ours, "theirs": peer, "multiply": multiply}, rounds, device)
    whole = [each * n_cells / cells for each in seconds["theirs"]]
    rates = [multiply.flops / each for each in seconds["multiply"]]
    shape, (n_prompts, n_tokens) = models.info(model).shape, pairs.clean_tokens.shape
    one = n_prompts * n_tokens * (
        shape.n_layers * block_flops(shape, n_tokens) + 2 * shape.d_model * shape.d_vocab
    )  # fmt: skip
    return Row(
        name, work.peer, n_threads,
        ours=statistics.median(seconds["ours"]), theirs=statistics.median(whole),
        ratio=median_ratio(whole, seconds["ours"]), bar=work.bar, difference=difference,
        bound=n_cells * one / plan.flops_bound,
        limit=statistics.median(
            plan.flops_bound / rate / each for rate, each in zip(rates, seconds["ours"], strict=True)
        ),
        note=NOTE,
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- peers


def _transformer_lens(lens: Any, pairs: Any, work: Work, cells: list[tuple[int, ...]]) -> Callable[[], list[float]]:
    """Their own functions, on these cells; the clean run's cache is made outside, and so is not counted."""
    from transformer_lens import patching

    setter = {
        GRID: patching.layer_pos_patch_setter,
        HEADS: patching.layer_head_vector_patch_setter,
        HEADS_AT: patching.layer_pos_head_vector_patch_setter,
    }[work.over]
    _, cache = lens.run_with_cache(pairs.clean_tokens, names_filter=lambda name: name.endswith(f"hook_{work.site}"))
    frame = pd.DataFrame(cells, columns=list(work.over))

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return logit_difference(logits, pairs.correct_ids, pairs.incorrect_ids).mean()

    def run() -> list[float]:
        found = patching.generic_activation_patch(
            lens, pairs.corrupted_tokens, cache, metric, setter, work.site, index_df=frame
        )
        return found.tolist()

    return run


def _hugging_face(hf_model: Any, pairs: Any, cells: list[tuple[int, ...]]) -> Callable[[], list[float]]:
    """The stream before a block, patched by a plain hook."""
    blocks, clean = hf_model.transformer.h, []
    handles = [block.register_forward_pre_hook(lambda module, args: clean.append(args[0])) for block in blocks]
    hf_model(pairs.clean_tokens, use_cache=False, logits_to_keep=1)
    for handle in handles:
        handle.remove()

    def run() -> list[float]:
        found = []
        for layer, pos in cells:

            def patch(module: Any, args: tuple, layer: int = layer, pos: int = pos) -> tuple:
                stream = args[0].clone()
                stream[:, pos] = clean[layer][:, pos]
                return (stream, *args[1:])

            handle = blocks[layer].register_forward_pre_hook(patch)
            logits = hf_model(pairs.corrupted_tokens, use_cache=False, logits_to_keep=1).logits
            handle.remove()
            found.append(float(logit_difference(logits, pairs.correct_ids, pairs.incorrect_ids).mean()))
        return found

    return run
