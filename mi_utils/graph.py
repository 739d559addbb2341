"""The computational graph that circuits are parts of: who writes to the residual stream, who reads from it.

Senders are the embeddings ("embed"), the heads ("L5H3") and the MLPs ("mlp L5"). Receivers are the three inputs of
each head ("L5H3.q", "L5H3.k", "L5H3.v"), the MLPs and the "logits". An edge leads from each sender to each receiver
that comes later, through the residual stream. A head's input need not be the same on its three channels.

Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; Syed et al. 2023 (arXiv:2310.10348);
Hanna et al. 2024 (arXiv:2403.17806), whose graph of GPT-2 small has the same 32,491 edges.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mi_utils import models
from mi_utils.models import Norm

CHANNELS = ("q", "k", "v")
ARROW = " -> "


class CannotDecompose(RuntimeError):
    """The residual stream of this architecture is not the plain sum that edges are about."""


@dataclass(frozen=True)
class Graph:
    """The graph of a transformer whose blocks are attention, then MLP, each reading the residual stream.

    Attributes:
        senders, receivers: names, in the order of computation.
        edges: "L0H2 -> L1H3.k", ordered by receiver, then by sender.
        edge_sender, edge_receiver: for each edge the numbers of its ends.
    """

    n_layers: int
    n_heads: int

    @cached_property
    def senders(self) -> tuple[str, ...]:
        names = ["embed"]
        for layer in range(self.n_layers):
            names += [*(head_name(layer, head) for head in range(self.n_heads)), mlp_name(layer)]
        return tuple(names)

    @cached_property
    def receivers(self) -> tuple[str, ...]:
        names = []
        for layer in range(self.n_layers):
            heads = [head_name(layer, head) for head in range(self.n_heads)]
            names += [*(f"{head}.{channel}" for channel in CHANNELS for head in heads), mlp_name(layer)]
        return (*names, "logits")

    @cached_property
    def nodes(self) -> tuple[str, ...]:
        """Senders, and the logits."""
        return (*self.senders, "logits")

    def n_upstream(self, receiver: str) -> int:
        """How many senders come before a receiver: the first so many of ``senders``."""
        layer, kind = place(receiver)
        if kind == "logits":
            return len(self.senders)
        return 1 + layer * (self.n_heads + 1) + (self.n_heads if kind == "mlp" else 0)

    @cached_property
    def upstream(self) -> Int[np.ndarray, " receiver"]:
        """``n_upstream`` of every receiver."""
        return np.array([self.n_upstream(receiver) for receiver in self.receivers])

    @cached_property
    def is_edge(self) -> Bool[np.ndarray, "sender receiver"]:
        return np.arange(len(self.senders))[:, None] < self.upstream

    @cached_property
    def edge_receiver(self) -> Int[np.ndarray, " edge"]:
        return np.argwhere(self.is_edge.T)[:, 0]

    @cached_property
    def edge_sender(self) -> Int[np.ndarray, " edge"]:
        return np.argwhere(self.is_edge.T)[:, 1]

    @cached_property
    def edges(self) -> tuple[str, ...]:
        ends = zip(self.edge_sender, self.edge_receiver, strict=True)
        return tuple(self.senders[sender] + ARROW + self.receivers[receiver] for sender, receiver in ends)

    @cached_property
    def number(self) -> dict[str, int]:
        """Edge to its place in ``edges``."""
        return {edge: i for i, edge in enumerate(self.edges)}

    def rows(self, site: str, layer: int) -> range:
        """The senders that write at a site: the embeddings ("embed"), a layer's heads ("z") or its MLP ("mlp_out")."""
        if site == "embed":
            return range(1)
        first = 1 + layer * (self.n_heads + 1)
        after = first + self.n_heads
        return range(first, after) if site == "z" else range(after, after + 1)

    @classmethod
    def of(cls, model: Any) -> Graph:
        """The graph of a model.

        Raises:
            CannotDecompose: an architecture with other edges than these.
        """
        shape = models.info(model).shape
        name = models.info(model).name
        if shape.n_kv_heads != shape.n_heads:
            raise CannotDecompose(
                f"{name} has grouped-query attention: {shape.n_heads} queries share {shape.n_kv_heads} keys and "
                "values, so a head has no k and v inputs of its own. patch_sweep and attribution_patch take it."
            )
        if models.hook_name("resid_mid", 0) not in model.mi_hook_points:
            raise CannotDecompose(
                f"{name} runs attention and MLP in parallel: its MLPs do not read the heads of their own layer. "
                "patch_sweep and attribution_patch take it."
            )
        return cls(shape.n_layers, shape.n_heads)


def head_name(layer: int, head: int) -> str:
    """ "L5H3"."""
    return f"L{layer}H{head}"


def mlp_name(layer: int) -> str:
    """ "mlp L5"."""
    return f"mlp L{layer}"


def owner(receiver: str) -> str:
    """The node that a receiver is an input of: "L5H3" for "L5H3.q"."""
    return receiver.partition(".")[0]


def place(name: str) -> tuple[int, str]:
    """Layer and kind ("embed", "head", "mlp", "logits") of a sender or receiver; -1 for embed, 0 for logits.

    Raises:
        ValueError: no such name.
    """
    if name in ("embed", "logits"):
        return (-1 if name == "embed" else 0), name
    if found := re.fullmatch(r"L(\d+)H\d+(\.[qkv])?", name):
        return int(found[1]), "head"
    if found := re.fullmatch(r"mlp L(\d+)", name):
        return int(found[1]), "mlp"
    raise ValueError(f"{name!r} names no part of a model: write embed, L5H3 (L5H3.q for an input), mlp L5 or logits.")


def head_of(name: str) -> int:
    """3 for "L5H3" and "L5H3.q"."""
    return int(owner(name).partition("H")[2])


# ------------------------------------------------------------------------------- how a head reads the stream


def normalise(
    norm: Norm, stream: Float[Tensor, "... d_model"]
) -> tuple[Float[Tensor, "... d_model"], Float[Tensor, "... 1"]]:
    """The normalised stream before weight and bias, and what it was divided by."""
    centred = stream - stream.mean(-1, keepdim=True) if norm.centred else stream
    scale = (centred.pow(2).mean(-1, keepdim=True) + norm.epsilon).sqrt()
    return centred / scale, scale


def read(norm: Norm, stream: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
    """What comes out of a normalisation."""
    return normalise(norm, stream)[0] * norm.weight + norm.bias


def reading_weights(
    model: Any, layer: int, channel: str
) -> tuple[Float[Tensor, "head d_model d_head"], Float[Tensor, "head d_head"]]:
    """Weight and bias by which a layer's heads make their q, k or v of the normalised stream."""
    weight = {"q": models.W_Q, "k": models.W_K, "v": models.W_V}[channel](model, layer)
    return weight, models.attention_bias(model, layer, channel)


def heads_first(activation: Float[Tensor, "prompt pos head feature"]) -> Float[Tensor, "head token feature"]:
    """Heads first, all tokens in a row: the layout of a batched matrix product."""
    return activation.flatten(0, 1).transpose(0, 1)


def prompts_at_once(graph: Graph, n_pos: int, d_model: int, device: torch.device) -> int:
    """So many that what all senders write on them takes 32 MB on a CPU, 512 MB on a GPU."""
    budget = (2**23 if device.type == "cpu" else 2**27) // (len(graph.senders) * n_pos * d_model)
    return max(1, budget)


def check_decomposition(model: Any, tokens: Int[Tensor, "prompt pos"]) -> None:
    """Ask the model itself, on one prompt: is the stream the sum of its parts, and are q, k, v what edges assume?

    Asked once for a model: it takes half a forward pass, and is a matter of the architecture.

    Raises:
        CannotDecompose: they are not (a normalisation after a block, a multiplier, clipped queries …).
    """
    if model.__dict__.get("mi_decomposes"):
        return
    n_layers, name = models.info(model).shape.n_layers, models.info(model).name
    kept = models.cache(model, tokens[:1], ["resid_pre", "resid_mid", "z", "attn_out", "mlp_out", *CHANNELS])
    total = kept["resid_pre", 0]
    loose = 1e-3 if total.dtype in (torch.float32, torch.float64) else 0.1

    def differ(found: Tensor, expected: Tensor) -> bool:
        return not float((found - expected).abs().max()) <= loose * (1 + float(expected.abs().max()))

    for layer in range(n_layers):
        norm = models.attention_norm(model, layer)
        normed = read(norm, kept["resid_pre", layer])
        for channel in CHANNELS:
            weight, bias = reading_weights(model, layer, channel)
            if differ(torch.einsum("ptd,hdk->pthk", normed, weight) + bias, kept[channel, layer]):
                raise CannotDecompose(f"{name}: {channel} of layer {layer} is not weight times normalised stream.")
        heads = torch.einsum("pthk,hkd->ptd", kept["z", layer], models.W_O(model, layer))
        total = total + heads + models.b_O(model, layer)
        if differ(total, kept["resid_mid", layer]):
            raise CannotDecompose(f"{name}: the stream after the attention of layer {layer} is not a sum of heads.")
        total = total + kept["mlp_out", layer]
        if layer + 1 < n_layers and differ(total, kept["resid_pre", layer + 1]):
            raise CannotDecompose(f"{name}: the stream after layer {layer} is not the sum of attention and MLP.")
    model.__dict__["mi_decomposes"] = True
