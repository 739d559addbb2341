"""The patching sweeps of ``patching.py`` on the embedded model: 100 IOI prompts, one thread.

The model is small, so that what counts is what a pass costs beside its matrix products.
"""

from __future__ import annotations

import torch
from common import Row, hooked_transformer, threads
from patching import GRID, HEADS, TRANSFORMER_LENS, Work, row

from mi_utils import ioi_pairs, load_model, models

TITLE = "Activation patching on the embedded model"


def main(cells: int = 4, rounds: int = 9) -> list[Row]:
    """Both sweeps, where the model has been trained."""
    if "smallworld" not in models.embedded_names():
        return []
    from transformers import AutoModelForCausalLM

    model = load_model("smallworld")
    hf_model = AutoModelForCausalLM.from_pretrained(models.resolve("smallworld"), attn_implementation="eager").eval()
    lens = hooked_transformer(hf_model)
    pairs = ioi_pairs(model, 100, check=False)
    with threads(1), torch.no_grad():
        return [
            row(f"smallworld: {work.name}", work, model, hf_model, lens, pairs, cells, rounds, 1)
            for site, over in (("resid_pre", GRID), ("z", HEADS))
            for work in [Work(site, over, "one token differs", 100, TRANSFORMER_LENS, 5)]
        ]
