"""Direct logit attribution: the logit difference, taken apart by who wrote it into the residual stream.

Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; Wang et al. 2022 (IOI).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mi_utils import models
from mi_utils.metrics import logit_difference
from mi_utils.prompts import PromptPairs

if TYPE_CHECKING:
    import xarray as xr

BY = ("component", "head", "layer")


def direct_logit_attribution(
    model: Any, pairs: PromptPairs, by: str = "component", *, on: str = "clean", batch_size: int = 64
) -> xr.DataArray:
    """How much each part adds, directly, to the logit difference at the last position.

    The last LayerNorm divides by a number that depends on the whole stream. It is held at the value the model itself
    used ("frozen"), which makes everything from the stream to the logits linear.

    Args:
        by: "component" (embeddings, attention and MLP of each layer), "head" (attention taken apart into heads and
            the bias of their output), or "layer" (attention and MLP of a layer together).
        on: "clean" or "corrupted" prompts.

    Returns:
        Dims (prompt, component), in logits. Sums over ``component`` to the logit difference. ``bias`` is what the
        last LayerNorm's and the unembedding's biases add, whatever the prompt. Coordinates ``kind`` (embed, attn,
        head, mlp, layer, bias) and ``layer`` (-1 where there is none) on component, ``logit_diff`` on prompt.

    What it does not show: indirect effects. A head that feeds another head has a direct effect near 0 and may still
    be needed; see ``patch_sweep``.

    Raises:
        ValueError: unknown ``by`` or ``on``.
        RuntimeError: the parts do not sum to the model's own logit difference (an architecture with a step between
            the stream and the logits that this does not know).
    """
    if by not in BY:
        raise ValueError(f"Unknown by={by!r}: use one of {', '.join(BY)}.")
    if on not in ("clean", "corrupted"):
        raise ValueError(f"on={on!r}: attribute on 'clean' or 'corrupted' prompts.")
    import xarray as xr

    pairs.check_model(model)
    tokens = pairs.clean_tokens if on == "clean" else pairs.corrupted_tokens
    correct, incorrect = (torch.as_tensor(ids) for ids in (pairs.correct_ids, pairs.incorrect_ids))
    parts, totals = [], []
    for rows in torch.arange(len(pairs)).split(batch_size):
        answers = correct[rows].to(tokens.device), incorrect[rows].to(tokens.device)
        totals.append(logit_difference(models.run(model, tokens[rows]), *answers).cpu().double().numpy())
        parts.append(_attribute(model, tokens[rows], *answers, by))
    names = list(parts[0])
    values = np.concatenate([torch.stack(list(part.values()), 1).numpy() for part in parts])
    total = np.concatenate(totals)

    info = models.info(model)
    single = next(model.parameters()).dtype == torch.float32
    apart = np.abs(values.sum(1) - total).max()
    if apart > (1e-3 if single else 0.05) * max(1.0, np.abs(values).max()):
        raise RuntimeError(
            f"The parts sum to something {apart:.2g} away from the logit difference of {info.name}: its logits are "
            "not a linear function of the residual stream once the last LayerNorm is frozen (a soft cap, say)."
        )
    return xr.DataArray(
        values,
        dims=("prompt", "component"),
        coords={
            "prompt": np.arange(len(pairs)),
            "template": ("prompt", list(pairs.template)),
            "logit_diff": ("prompt", total),
            "component": [name for name, _, _ in names],
            "kind": ("component", [kind for _, kind, _ in names]),
            "layer": ("component", [layer for _, _, layer in names]),
        },
        attrs={
            "model": info.name, "processing": info.processing, "seed": info.seed, "on": on, "by": by,
            "metric": "logit_diff", "mean_logit_diff": float(total.mean()), "units": "logits",
        },
        name="attribution",
    )  # fmt: skip


Part = tuple[str, str, int]  # name, kind, layer (-1: none)


def _attribute(model: Any, tokens: Tensor, correct: Tensor, incorrect: Tensor, by: str) -> dict[Part, Tensor]:
    """Contributions [prompt] of every part; small enough to do on the CPU, in double precision."""
    n_layers = models.info(model).shape.n_layers
    cached = models.cache(model, tokens, ["resid_pre"], layers=[0], positions=[-1])
    cached |= models.cache(model, tokens, ["resid_post"], layers=[n_layers - 1], positions=[-1])
    cached |= models.cache(model, tokens, ["z" if by == "head" else "attn_out", "mlp_out"], positions=[-1])
    last = {place: activation[:, -1].cpu().double() for place, activation in cached.items()}

    direction, constant = _direction(model, last["resid_post", n_layers - 1], correct, incorrect)

    def along(written: Float[Tensor, "prompt d_model"]) -> Float[Tensor, " prompt"]:
        return (written * direction).sum(-1)

    start = last["resid_pre", 0]
    parts: dict[Part, Tensor] = {}
    position = models.position_embedding(model, tokens)
    if position is None or by == "layer":
        parts["embed", "embed", -1] = along(start)
    else:
        parts["embed", "embed", -1] = along(start - position[:, -1].cpu().double())
        parts["pos_embed", "embed", -1] = along(position[:, -1].cpu().double())
    for layer in range(n_layers):
        mlp = along(last["mlp_out", layer])
        if by == "head":
            # z · (W_O d): one number a head, and no [prompt, head, d_model] in between.
            reads = torch.einsum("hkm,pm->phk", models.W_O(model, layer).cpu().double(), direction)
            for head, value in enumerate((last["z", layer] * reads).sum(-1).T):
                parts[f"L{layer}H{head}", "head", layer] = value
            parts[f"attn bias L{layer}", "bias", layer] = along(models.b_O(model, layer).cpu().double())
            parts[f"mlp L{layer}", "mlp", layer] = mlp
        elif by == "component":
            parts[f"attn L{layer}", "attn", layer] = along(last["attn_out", layer])
            parts[f"mlp L{layer}", "mlp", layer] = mlp
        else:
            parts[f"L{layer}", "layer", layer] = along(last["attn_out", layer]) + mlp
    parts["bias", "bias", -1] = constant
    return parts


def _direction(
    model: Any, stream: Float[Tensor, "prompt d_model"], correct: Tensor, incorrect: Tensor
) -> tuple[Float[Tensor, "prompt d_model"], Float[Tensor, " prompt"]]:
    """Direction and constant with: logit difference = stream · direction + constant, the LayerNorm frozen.

    LayerNorm is w (x - mean x) / s + b. Taking away the mean is a symmetric projection, so it may as well be done to
    the direction.
    """
    w_u, b_u = models.W_U(model), models.b_U(model)
    answer = (w_u[:, correct].cpu().double() - w_u[:, incorrect].cpu().double()).T
    norm = models.final_norm(model)
    centred = stream - stream.mean(-1, keepdim=True) if norm.centred else stream
    scale = (centred.pow(2).mean(-1, keepdim=True) + norm.epsilon).sqrt()
    direction = answer * norm.weight.cpu().double() / scale
    if norm.centred:
        direction = direction - direction.mean(-1, keepdim=True)
    constant = answer @ norm.bias.cpu().double() + b_u[correct].cpu().double() - b_u[incorrect].cpu().double()
    return direction, constant
