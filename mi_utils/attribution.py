"""Direct logit attribution: the logit difference, taken apart by who wrote it into the residual stream.

Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; Wang et al. 2022 (IOI).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_utils import models
from mi_utils.metrics import logit_difference
from mi_utils.prompts import PromptPairs

if TYPE_CHECKING:
    import xarray as xr

BY = ("component", "head", "layer", "neuron", "position")


def direct_logit_attribution(
    model: Any,
    pairs: PromptPairs,
    by: str = "component",
    *,
    on: str = "clean",
    top: int | None = None,
    batch_size: int = 64,
) -> xr.DataArray:
    """How much each part adds, directly, to the logit difference at the last position.

    The last LayerNorm divides by a number that depends on the whole stream. It is held at the value the model itself
    used ("frozen"), which makes everything from the stream to the logits linear.

    Args:
        by: "component" (embeddings, attention and MLP of each layer), "head" (attention taken apart into heads and
            the bias of their output), "layer" (attention and MLP of a layer together), "neuron" (each MLP taken apart
            into neurons and the bias of its output), or "position" (each head taken apart by the position that it
            read from; what a part other than a head writes, it writes at the last position, and stands there).
        on: "clean" or "corrupted" prompts.
        top: with "neuron", only so many a layer, those with the largest mean absolute contribution; the others of
            the layer are one part, "other neurons L3".

    Returns:
        Dims (prompt, component), with "position" (prompt, component, pos), in logits. Sums over ``component`` (and
        ``pos``) to the logit difference. ``bias`` is what the last LayerNorm's and the unembedding's biases add,
        whatever the prompt. Coordinates ``kind`` (embed, attn, head, mlp, neuron, layer, bias) and ``layer`` (-1 where
        there is none) on component, ``logit_diff`` on prompt, ``token`` on pos.

    What it does not show: indirect effects. A head that feeds another head has a direct effect near 0 and may still
    be needed; see ``patch_sweep``. What a head read from a position need not be about the token there: earlier layers
    have moved information.

    Raises:
        ValueError: unknown ``by`` or ``on``, or a ``top`` that does not fit.
        RuntimeError: the parts do not sum to the model's own logit difference (an architecture with a step between
            the stream and the logits that this does not know).
    """
    if by not in BY:
        raise ValueError(f"Unknown by={by!r}: use one of {', '.join(BY)}.")
    if on not in ("clean", "corrupted"):
        raise ValueError(f"on={on!r}: attribute on 'clean' or 'corrupted' prompts.")
    if top is not None and (by != "neuron" or top < 1):
        raise ValueError(f"top={top} with by={by!r}: top is a number of neurons a layer, 1 or more, for by='neuron'.")
    import xarray as xr

    pairs.check_model(model)
    tokens = pairs.clean_tokens if on == "clean" else pairs.corrupted_tokens
    answers = torch.as_tensor(pairs.correct_ids), torch.as_tensor(pairs.incorrect_ids)
    batches, totals = [], []
    for rows in torch.arange(len(pairs)).split(batch_size):
        batch, ids = tokens[rows], [column[rows].to(tokens.device) for column in answers]
        cached = cache_for_attribution(model, batch, by)
        totals.append(_logit_difference(model, cached, *ids))
        batches.append(attribute(model, cached, *ids, by))
    parts = {part: np.concatenate([batch[part] for batch in batches]) for part in batches[0]}
    total = np.concatenate(totals)
    _check_sum(model, sum(values.sum(tuple(range(1, values.ndim))) for values in parts.values()), total, parts)
    labels, values = _neurons(parts, top) if by == "neuron" else (list(parts), np.stack(list(parts.values()), 1))

    info = models.info(model)
    coords: dict[str, Any] = {
        "prompt": np.arange(len(pairs)),
        "template": ("prompt", list(pairs.template)),
        "logit_diff": ("prompt", total),
        "component": [name for name, _, _ in labels],
        "kind": ("component", [kind for _, kind, _ in labels]),
        "layer": ("component", [layer for _, _, layer in labels]),
    }
    if by == "position":
        coords |= {
            "pos": np.arange(tokens.shape[1]),
            "token": ("pos", list((pairs if on == "clean" else pairs.swap()).position_labels)),
        }
    return xr.DataArray(
        values,
        dims=("prompt", "component", "pos")[: values.ndim],
        coords=coords,
        attrs={
            "model": info.name, "processing": info.processing, "seed": info.seed, "on": on, "by": by,
            "metric": "logit_diff", "mean_logit_diff": float(total.mean()), "units": "logits",
        },
        name="attribution",
    )  # fmt: skip


Part = tuple[str, str, int]  # name, kind, layer (-1: none)
Cached = dict[tuple[str, int], Tensor]
EMBED, POS_EMBED, BIAS = ("embed", "embed", -1), ("pos_embed", "embed", -1), ("bias", "bias", -1)


def cache_for_attribution(model: Any, tokens: Int[Tensor, "prompt pos"], by: str) -> Cached:
    """The activations that :func:`attribute` reads: at the last position, except for the values that heads moved."""
    last = models.info(model).shape.n_layers - 1
    written = {"head": ["z", "mlp_out"], "neuron": ["attn_out", "mlp_post"], "position": ["pattern", "mlp_out"]}
    cached = models.cache(model, tokens, ["resid_pre", "resid_post", *written.get(by, ["attn_out", "mlp_out"])],
                          positions=[-1])  # fmt: skip
    kept = {place: values for place, values in cached.items() if not place[0].startswith("resid")}
    kept |= {("resid_pre", 0): cached["resid_pre", 0], ("resid_post", last): cached["resid_post", last]}
    if by == "position":
        kept |= models.cache(model, tokens, ["v"])
    position = models.position_embedding(model, tokens)
    if position is not None:
        kept["pos_embed", 0] = position[:, -1:].clone()
    return kept


def attribute(
    model: Any, cached: Cached, correct: Int[Tensor, " prompt"], incorrect: Int[Tensor, " prompt"], by: str
) -> dict[Part, np.ndarray]:
    """Contributions of every part, from activations that are there: no forward pass.

    Each is [prompt]; with "position" [prompt, pos]; the neurons of a layer are one entry, [prompt, neuron].
    A head's is z · (W_O d), with d the direction that the logit difference reads: one number, and no
    [prompt, pos, head, d_head, d_model] in between.
    """
    n_layers = models.info(model).shape.n_layers
    direction, constant = _direction(model, cached["resid_post", n_layers - 1][:, -1], correct, incorrect)
    n_positions = cached["v", 0].shape[1] if by == "position" else None

    start = cached["resid_pre", 0][:, -1]
    parts: dict[Part, Any] = {}  # a tensor is what a part writes at the last position [prompt, d_model]
    position = cached.get(("pos_embed", 0))
    if position is None or by == "layer":
        parts[EMBED] = start
    else:
        parts |= {EMBED: start.double() - position[:, -1].double(), POS_EMBED: position[:, -1]}
    single = direction.float()
    for layer in range(n_layers):
        if by in ("head", "position"):
            w_o = models.W_O(model, layer).float()
            reads = (single @ w_o.flatten(0, 1).T).unflatten(-1, w_o.shape[:2])  # [prompt, head, d_head]
            for head, values in enumerate(_heads(cached, layer, reads, by)):
                parts[f"L{layer}H{head}", "head", layer] = values
            parts[f"attn bias L{layer}", "bias", layer] = models.b_O(model, layer).expand_as(start)
            parts[f"mlp L{layer}", "mlp", layer] = cached["mlp_out", layer][:, -1]
        elif by == "neuron":
            parts[f"attn L{layer}", "attn", layer] = cached["attn_out", layer][:, -1]
            reads = single @ models.W_out(model, layer).float().T
            parts[f"neurons L{layer}", "neuron", layer] = (cached["mlp_post", layer][:, -1] * reads).cpu().numpy()
            parts[f"mlp bias L{layer}", "bias", layer] = models.b_out(model, layer).expand_as(start)
        else:
            attn, mlp = (cached[site, layer][:, -1] for site in ("attn_out", "mlp_out"))
            if by == "layer":
                parts[f"L{layer}", "layer", layer] = attn.double() + mlp.double()
            else:
                parts |= {(f"attn L{layer}", "attn", layer): attn, (f"mlp L{layer}", "mlp", layer): mlp}
    written = {part: values for part, values in parts.items() if isinstance(values, Tensor)}
    stacked = torch.stack([values.double() for values in written.values()])
    along = torch.einsum("cpm,pm->cp", stacked, direction).cpu().numpy()
    parts |= dict(zip((*written, BIAS), (*along, constant.cpu().numpy()), strict=True))
    if n_positions is not None:  # all of it at the last position
        last = ((0, 0), (n_positions - 1, 0))
        parts |= {part: np.pad(parts[part][:, None], last) for part in (*written, BIAS)}
    return parts


def _heads(cached: Cached, layer: int, reads: Float[Tensor, "prompt head d_head"], by: str) -> np.ndarray:
    """[head, prompt], or [head, prompt, pos] by the position that the head read from."""
    if by == "head":
        return (cached["z", layer][:, -1] * reads).sum(-1).T.double().cpu().numpy()
    values, pattern = cached["v", layer].float(), cached["pattern", layer][:, :, -1].float()
    shared = reads.shape[1] // values.shape[2]  # heads to one set of values (grouped-query attention)
    offered = torch.einsum("pskd,pkgd->pkgs", values, reads.unflatten(1, (-1, shared))).flatten(1, 2)
    return (pattern * offered).transpose(0, 1).double().cpu().numpy()


def _neurons(parts: dict[Part, np.ndarray], top: int | None) -> tuple[list[Part], np.ndarray]:
    """Each neuron as a part of its own, or the ``top`` of a layer and the rest of it together."""
    labels: list[Part] = []
    columns = []
    for (name, kind, layer), values in parts.items():
        if kind != "neuron":
            labels.append((name, kind, layer))
            columns.append(values[:, None])
            continue
        chosen = np.arange(values.shape[1])
        if top is not None and top < values.shape[1]:
            chosen = np.sort(np.argsort(-np.abs(values).mean(0), kind="stable")[:top])
        labels += [(f"L{layer}N{neuron}", "neuron", layer) for neuron in chosen]
        columns.append(values[:, chosen])
        if len(chosen) < values.shape[1]:
            labels.append((f"other neurons L{layer}", "mlp", layer))
            columns.append((values.sum(1) - values[:, chosen].sum(1))[:, None])
    return labels, np.concatenate(columns, 1)


def _logit_difference(model: Any, cached: Cached, correct: Tensor, incorrect: Tensor) -> np.ndarray:
    """As the model's own last steps give it."""
    stream = cached["resid_post", models.info(model).shape.n_layers - 1]
    return logit_difference(models.unembed(model, stream), correct, incorrect).cpu().double().numpy()


def _check_sum(model: Any, found: np.ndarray, total: np.ndarray, parts: dict[Part, np.ndarray]) -> None:
    single = next(model.parameters()).dtype == torch.float32
    largest = max(float(np.abs(values).max()) for values in parts.values())
    apart = np.abs(found - total).max()
    if not apart <= (1e-3 if single else 0.05) * np.maximum(1.0, largest):  # so put, NaN does not pass
        raise RuntimeError(
            f"The parts sum to something {apart:.2g} away from the logit difference of {models.info(model).name}: its "
            "logits are not a linear function of the residual stream once the last LayerNorm is frozen (a soft cap, "
            "say), or a part is changed between where it is read and the stream."
        )


def _direction(
    model: Any, stream: Float[Tensor, "prompt d_model"], correct: Tensor, incorrect: Tensor
) -> tuple[Float[Tensor, "prompt d_model"], Float[Tensor, " prompt"]]:
    """Direction and constant with: logit difference = stream · direction + constant, the LayerNorm frozen.

    LayerNorm is w (x - mean x) / s + b. Taking away the mean is a symmetric projection, so it may as well be done to
    the direction. In double precision: it is small, and everything is multiplied with it.
    """
    w_u, b_u, norm, stream = models.W_U(model), models.b_U(model), models.final_norm(model), stream.double()
    answer = (w_u[:, correct].double() - w_u[:, incorrect].double()).T
    centred = stream - stream.mean(-1, keepdim=True) if norm.centred else stream
    scale = (centred.pow(2).mean(-1, keepdim=True) + norm.epsilon).sqrt()
    direction = answer * norm.weight.double() / scale
    if norm.centred:
        direction = direction - direction.mean(-1, keepdim=True)
    constant = answer @ norm.bias.double() + b_u[correct].double() - b_u[incorrect].double()
    return direction, constant
