"""Logit lens: what would the model answer if it stopped after this layer?

Source: nostalgebraist 2020, "interpreting GPT: the logit lens".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mi_utils import models
from mi_utils.prompts import PromptPairs

if TYPE_CHECKING:
    import xarray as xr


def logit_lens(model: Any, pairs: PromptPairs, *, on: str = "clean", batch_size: int = 32) -> xr.Dataset:
    """Read the residual stream after every layer with the model's own final LayerNorm and unembedding.

    Args:
        on: "clean" or "corrupted" prompts.
        batch_size: prompts at a time; one layer's logits ``[prompt, pos, d_vocab]`` are held in memory.

    Returns:
        Variables over (prompt, layer, pos); layer 0 is the embeddings, layer l the stream after l blocks, so the
        last is the model's own output. ``log_prob`` of the correct answer (nats), ``logit_diff`` between the two
        answers, ``rank`` of the correct answer (0 = first), ``kl`` from the model's output to the lens (nats).

    What it does not show: early layers need not write in the basis that the unembedding reads. A lens that sees
    nothing does not prove that nothing is there.

    Raises:
        ValueError: ``on`` is neither "clean" nor "corrupted".
        RuntimeError: the last layer of the lens is not the model's own output (an architecture whose last step
            this lens does not know).
    """
    if on not in ("clean", "corrupted"):
        raise ValueError(f"on={on!r}: read the lens on 'clean' or 'corrupted' prompts.")
    import xarray as xr

    pairs.check_model(model)
    tokens = pairs.clean_tokens if on == "clean" else pairs.corrupted_tokens
    n_layers = models.info(model).shape.n_layers
    size = (len(pairs), n_layers + 1, tokens.shape[1])
    values = {name: np.empty(size) for name in ("log_prob", "logit_diff", "rank", "kl")}

    correct, incorrect = (torch.as_tensor(ids) for ids in (pairs.correct_ids, pairs.incorrect_ids))
    for rows in torch.arange(len(pairs)).split(batch_size):
        batch = tokens[rows]
        stream = models.cache(model, batch, ["resid_pre"])
        stream["resid_post", n_layers - 1] = models.cache(model, batch, ["resid_post"], layers=[n_layers - 1])[
            "resid_post", n_layers - 1
        ]
        final = models.run(model, batch).float().log_softmax(-1)
        index = {
            "correct": correct[rows].to(final.device)[:, None, None].expand(*final.shape[:2], 1),
            "incorrect": incorrect[rows].to(final.device)[:, None, None].expand(*final.shape[:2], 1),
        }
        for layer in range(n_layers + 1):
            place = ("resid_pre", layer) if layer < n_layers else ("resid_post", n_layers - 1)
            logits = models.unembed(model, stream[place]).float()
            log_probs = logits.log_softmax(-1)
            right = logits.gather(-1, index["correct"])
            here = {
                "log_prob": log_probs.gather(-1, index["correct"])[..., 0],
                "logit_diff": (right - logits.gather(-1, index["incorrect"]))[..., 0],
                "rank": (logits > right).sum(-1),
                "kl": (final.exp() * (final - log_probs)).sum(-1),
            }
            for name, value in here.items():
                values[name][rows.numpy(), layer] = value.cpu().double().numpy()
        if (apart := float((log_probs - final).abs().max())) > _tolerance(stream[place]):
            raise RuntimeError(
                f"The last layer of the lens is {apart:.2g} nats away from the model's own output. "
                f"{models.info(model).name} does something after its last block that the lens leaves out."
            )

    info = models.info(model)
    labels = [*(f"before L{layer}" if layer else "embeddings" for layer in range(n_layers)), "output"]
    return xr.Dataset(
        {name: (("prompt", "layer", "pos"), value) for name, value in values.items()},
        coords={
            "prompt": np.arange(len(pairs)),
            "template": ("prompt", list(pairs.template)),
            "layer": np.arange(n_layers + 1),
            "layer_label": ("layer", labels),
            "pos": np.arange(tokens.shape[1]),
            "token": ("pos", list(pairs.position_labels)),
        },
        attrs={"model": info.name, "processing": info.processing, "seed": info.seed, "on": on},
    )


def _tolerance(activation: torch.Tensor) -> float:
    return 1e-3 if activation.dtype == torch.float32 else 0.2
