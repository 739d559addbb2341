"""Scores for every edge of the computational graph, by gradients.

What all senders write, times the gradients at all receivers: one matrix product a layer. Gradients are taken at the
ordinary q, k and v hooks and carried back to the residual stream here, so that no pass has to hold a stream of its own
for each head's input, or each head's output.

Sources: Syed et al. 2023 (EAP, arXiv:2310.10348); Hanna et al. 2024 (EAP-IG, arXiv:2403.17806).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mi_utils import metrics, models
from mi_utils.gradients import differentiate, prompts_per_pass, record, stream_metric
from mi_utils.graph import (
    CHANNELS,
    Graph,
    check_decomposition,
    head_name,
    heads_first,
    mlp_name,
    normalise,
    prompts_at_once,
    reading_weights,
)
from mi_utils.prompts import PromptPairs
from mi_utils.results import NothingChanged, labelled, numpy

if TYPE_CHECKING:
    import xarray as xr

LEVELS = ("edge", "node")
RULES = ("midpoint", "left", "right")
VARIANTS = ("inputs", "activations")
POINTS_AT_ONCE = 8  # whose normalised streams are kept until their scores are computed


def eap(
    model: Any,
    pairs: PromptPairs,
    *,
    level: str = "edge",
    at: str = "clean",
    metric: str | Callable = "logit_diff",
    batch_size: int | None = None,
) -> xr.DataArray:
    """Edge attribution patching: for every edge, (clean - corrupted) of its sender times the receiver's gradient.

    Args:
        level: "edge", or "node" for what each sender brings along all its edges together.
        at: the run in which gradients are taken, "clean" (as published) or "corrupted".
        metric: a name in ``METRICS``, or a function of pairs that returns one of logits ``[prompt, 1, d_vocab]``.
        batch_size: prompts in one pass; by default about 500 tokens on a CPU, more on a GPU.

    Returns:
        Dims (prompt, edge) with coordinates ``sender`` and ``receiver``, or (prompt, node). In units of the metric:
        to first order, how much the metric gains by the clean activation on this edge where the corrupted one was.
        Positive helps the answer (the papers' sign is the other one). Coordinates ``clean`` and ``corrupted`` hold
        the metric of the two runs.

    What it does not show: gradients vanish where a softmax is saturated, and an edge that decides everything can get
    0. ``eap_ig`` is the cure. Neither is evidence yet: run the circuit, see ``Circuit.faithfulness``.

    Raises:
        ValueError: a wrong argument, or a metric without a gradient.
        NothingChanged: clean and corrupted run are the same.
        CannotDecompose: an architecture whose stream is not a plain sum (see ``Graph``).

    Source: Syed et al. 2023, "Attribution Patching Outperforms Automated Circuit Discovery" (arXiv:2310.10348).
    """
    if at not in ("clean", "corrupted"):
        raise ValueError(f"at={at!r}: take gradients in the 'clean' or in the 'corrupted' run.")
    points = (1.0 if at == "clean" else 0.0,)
    return _attribute(model, pairs, level, points, "inputs", metric, batch_size, method="eap", at=at)


def eap_ig(
    model: Any,
    pairs: PromptPairs,
    steps: int = 5,
    *,
    level: str = "edge",
    variant: str = "inputs",
    rule: str = "midpoint",
    metric: str | Callable = "logit_diff",
    batch_size: int | None = None,
) -> xr.DataArray:
    """EAP with the gradient averaged along a straight line from the corrupted to the clean run.

    Args:
        steps: points on the line; each costs a forward and a backward pass.
        variant: "inputs" moves the embeddings, and all else follows. "activations" moves one layer's heads or one MLP
            at a time in an otherwise clean run, and takes its edges' gradients there: ``2 * n_layers + 1`` times the
            passes. (The authors' code sums the gradients of all these runs for every edge; here an edge has its own
            sender's.)
        rule: where the points lie: in the middle of ``steps`` equal parts (the most accurate), or at their "left" end
            (0 is the corrupted run; the authors' code) or "right" end (their paper).
        level, metric, batch_size: as in ``eap``.

    Returns:
        As ``eap``. With "inputs" the edges out of "embed" sum to clean minus corrupted, but for the error of
        ``steps``: how far they are from it says whether the steps suffice.

    Raises:
        As ``eap``.

    Source: Hanna et al. 2024, "Have Faith in Faithfulness" (arXiv:2403.17806); the activations variant after Marks et
    al. 2024 (arXiv:2403.19647).
    """
    if variant not in VARIANTS:
        raise ValueError(f"Unknown variant {variant!r}: use {' or '.join(VARIANTS)}.")
    if rule not in RULES:
        raise ValueError(f"Unknown rule {rule!r}: use {', '.join(RULES)}.")
    if steps < 1:
        raise ValueError(f"steps={steps}: at least one point is needed.")
    shift = {"left": 0.0, "midpoint": 0.5, "right": 1.0}[rule]
    points = tuple((k + shift) / steps for k in range(steps))
    return _attribute(model, pairs, level, points, variant, metric, batch_size, method="eap_ig", rule=rule, steps=steps)


def _attribute(
    model: Any, pairs: PromptPairs, level: str, points: tuple[float, ...], variant: str, metric: str | Callable,
    batch_size: int | None, **attrs: Any,
) -> xr.DataArray:  # fmt: skip
    if level not in LEVELS:
        raise ValueError(f"Unknown level {level!r}: use {' or '.join(LEVELS)}.")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}.")
    pairs.check_model(model)
    factory, metric_name = metrics.resolve(metric)
    graph = Graph.of(model)
    check_decomposition(model, pairs.clean_tokens)
    scores, clean, corrupted = [], [], []
    changed, total = 0, 0.0
    for part in torch.arange(len(pairs)).split(batch_size or prompts_per_pass(pairs.clean_tokens)):
        batch = pairs[part.tolist()]
        here = _Attribution(model, graph, batch, stream_metric(model, factory(batch)))
        if variant == "inputs":
            found = here.along_inputs(points, level)
        else:
            found = here.along_activations(points, level)
        scores.append(found.float().cpu().numpy())
        clean.append(numpy(here.values[1.0]))
        corrupted.append(numpy(here.values[0.0]))
        for difference in here.differences().values():
            changed += int((difference != 0).sum())
            total += float(difference.abs().sum())
    if not changed:
        raise NothingChanged("Every sender writes the same on the clean and on the corrupted prompts.")
    if level == "node":
        coords: dict[str, Any] = {"node": list(graph.senders)}
    else:
        coords = {
            "edge": list(graph.edges),
            "sender": ("edge", [graph.senders[i] for i in graph.edge_sender]),
            "receiver": ("edge", [graph.receivers[i] for i in graph.edge_receiver]),
        }
    return labelled(
        np.concatenate(scores), ("prompt", level), model, pairs, coords, np.concatenate(clean),
        np.concatenate(corrupted), name="score", metric=metric_name, level=level, variant=variant,
        units="units of the metric",
        n_layers=graph.n_layers, n_heads=graph.n_heads, elements_changed=changed, mean_change=total / changed, **attrs,
    )  # fmt: skip


class _Attribution:
    """One batch: what senders write in both runs, and receivers' gradients at points between them."""

    def __init__(self, model: Any, graph: Graph, pairs: PromptPairs, value: Callable) -> None:
        self.model, self.graph, self.value = model, graph, value
        self.tokens = {1.0: pairs.clean_tokens, 0.0: pairs.corrupted_tokens}
        self.embeddings = {end: models.run(model, tokens, stop_at_layer=0) for end, tokens in self.tokens.items()}
        self.outputs: dict[float, dict] = {}  # of the corrupted (0.0) and the clean (1.0) run
        self.values: dict[float, Tensor] = {}
        layers = range(graph.n_layers)
        self.sender_places = {("embed", -1): ("resid_pre", 0)}
        self.sender_places |= {(site, layer): (site, layer) for layer in layers for site in ("z", "mlp_out")}
        reads = ("resid_pre", *CHANNELS, "resid_mid")
        self.receiver_places = {(site, layer): (site, layer) for layer in layers for site in reads}

    def differences(self) -> dict[tuple[str, int], Tensor]:
        """Clean minus corrupted, at the embeddings, at the heads' z and at the MLPs' outputs."""
        for end in (0.0, 1.0):
            if end not in self.outputs:
                self.outputs[end], stream = record(self.model, self.tokens[end], self.sender_places)
                self.values[end] = self.value(stream[:, -1])
        return {name: self.outputs[1.0][name] - self.outputs[0.0][name] for name in self.sender_places}

    def along_inputs(self, points: Sequence[float], level: str) -> Float[Tensor, "prompt _"]:
        start, end = self.embeddings[0.0], self.embeddings[1.0]
        places = self.sender_places | (self.receiver_places if level == "edge" else {})
        total = 0
        for first in range(0, len(points), POINTS_AT_ONCE):
            sums = _GradientSums(self.model, self.graph, level)
            for point in points[first : first + POINTS_AT_ONCE]:
                # At its ends the line is one of the two runs: its activations are those that would be recorded.
                embedding = self.embeddings[point] if point in (0.0, 1.0) else start + point * (end - start)
                activations, gradients, values = differentiate(
                    self.model, self.tokens[1.0], places, self.value, {("resid_pre", 0): embedding}
                )
                if point in (0.0, 1.0):
                    self.outputs[point] = {name: activations[name] for name in self.sender_places}
                    self.values[point] = values
                sums.add(activations, gradients)
            total = total + sums.scores(self.differences(), range(len(self.graph.senders)))
        return total / len(points)

    def along_activations(self, points: Sequence[float], level: str) -> Float[Tensor, "prompt _"]:
        differences, total = self.differences(), 0
        for name, where in self.sender_places.items():
            sums = _GradientSums(self.model, self.graph, level)
            for point in points:
                moved = self.outputs[0.0][name] + point * differences[name]
                places = {name: where} | (self.receiver_places if level == "edge" else {})
                sums.add(*differentiate(self.model, self.tokens[1.0], places, self.value, {where: moved})[:2])
            total = total + sums.scores(differences, self.graph.rows(*name))
        return total / len(points)


def _full(tensor: Tensor) -> Tensor:
    """In single precision at least: the products sum over many positions and features."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class _GradientSums:
    """Sums over points of the gradients at receivers' inputs, kept small.

    Let u be a head's gradient on a channel, mapped through W_Q, W_K or W_V and the norm's weight; then the gradient at
    its input is (u - mean u - n (n · u) / d_model) / s, with n the normalised stream and s its scale (no mean for
    RMSNorm). u / s is linear in the gradient at q, so that is what is summed, [prompt, pos, head, d_head]. And
    n · u is what the head's own q (without biases) has in common with its gradient: one number a position and head.
    """

    def __init__(self, model: Any, graph: Graph, level: str) -> None:
        self.model, self.graph, self.level = model, graph, level
        self.total: dict[Any, Tensor] = {}
        self.along_stream: dict[int, list[tuple[Tensor, list[Tensor]]]] = {layer: [] for layer in range(graph.n_layers)}

    def _sum(self, name: Any, gradient: Tensor) -> None:
        self.total[name] = self.total[name] + gradient if name in self.total else gradient

    def add(self, activations: Mapping, gradients: Mapping) -> None:
        """Count one point's gradients in."""
        if self.level == "node":
            for name, gradient in gradients.items():
                self._sum(name, gradient)
            return
        self._sum("logits", gradients["stream"])
        for layer in range(self.graph.n_layers):
            self._sum(("mlp", layer), gradients["resid_mid", layer])
            norm = models.attention_norm(self.model, layer)
            normal, scale = normalise(norm, activations["resid_pre", layer])
            shares = []
            for channel in CHANNELS:
                weight, bias = reading_weights(self.model, layer, channel)
                gradient = gradients[channel, layer] / scale[..., None]
                self._sum((channel, layer), gradient)
                if norm.bias.any():
                    bias = bias + torch.einsum("d,hdk->hk", norm.bias, weight)
                shares.append(((activations[channel, layer] - bias) * gradient).sum(-1))  # [prompt, pos, head]
            self.along_stream[layer].append((normal, shares))

    def scores(self, differences: Mapping[tuple[str, int], Tensor], senders: range) -> Float[Tensor, "prompt _"]:
        """Score of every edge out of these senders (0 for the others' edges), or of the nodes."""
        graph = self.graph
        n_prompts, n_pos, d_model = differences["embed", -1].shape
        if self.level == "node":
            found = differences["embed", -1].new_zeros(n_prompts, len(graph.senders))
            for name, difference in differences.items():
                rows = graph.rows(*name)
                if rows.start in senders:
                    products = (difference * self.total[name]).sum(-1).sum(1)  # over features and positions
                    found[:, rows.start : rows.stop] = products.reshape(n_prompts, -1)
            return found
        found = _full(differences["embed", -1]).new_zeros(n_prompts, len(graph.senders), len(graph.receivers))
        for part in torch.arange(n_prompts).split(prompts_at_once(graph, n_pos, d_model, found.device)):
            written = _written(self.model, graph, {name: each[part] for name, each in differences.items()}, senders)
            self._products(written, senders, part, found)
        sender, receiver = (torch.as_tensor(each) for each in (graph.edge_sender, graph.edge_receiver))
        return found[:, sender, receiver]

    def _products(self, written: Tensor, senders: range, part: Tensor, found: Tensor) -> None:
        """One matrix product for each layer's heads, and one for each MLP, over the senders before them."""
        column = 0
        for layer in range(self.graph.n_layers):
            upstream = self.graph.n_upstream(head_name(layer, 0))
            width = len(CHANNELS) * self.graph.n_heads
            if upstream > senders.start:
                _multiply(written, self._at_heads(layer, part), senders, upstream, found, part, column)
            column += width
            upstream = self.graph.n_upstream(mlp_name(layer))
            if upstream > senders.start:
                _multiply(written, self.total["mlp", layer][part][None], senders, upstream, found, part, column)
            column += 1
        _multiply(written, self.total["logits"][part][None], senders, len(self.graph.senders), found, part, column)

    def _at_heads(self, layer: int, part: Tensor) -> Float[Tensor, "receiver prompt pos d_model"]:
        """Gradients at the q, k and v inputs of a layer's heads, summed over points."""
        norm = models.attention_norm(self.model, layer)
        n_heads, (n_pos, d_model) = self.graph.n_heads, self.total["logits"].shape[1:]
        n_tokens = len(part) * n_pos
        at_inputs = _full(self.total["logits"]).new_empty(len(CHANNELS), n_heads, n_tokens, d_model)
        for number, channel in enumerate(CHANNELS):
            weight = _full(reading_weights(self.model, layer, channel)[0]) * _full(norm.weight)[:, None]
            if norm.centred:
                weight = weight - weight.mean(1, keepdim=True)
            gradient = heads_first(_full(self.total[channel, layer][part]))
            torch.bmm(gradient, weight.transpose(1, 2), out=at_inputs[number])
            for normal, shares in self.along_stream[layer]:
                share = _full(shares[number][part]).reshape(n_tokens, n_heads).T / d_model
                at_inputs[number].addcmul_(share[..., None], _full(normal[part]).reshape(n_tokens, d_model), value=-1)
        return at_inputs.view(-1, len(part), n_pos, d_model)


def _written(
    model: Any, graph: Graph, outputs: Mapping[tuple[str, int], Tensor], senders: range
) -> Float[Tensor, "sender prompt pos d_model"]:
    """What these senders add to the residual stream, from the heads' z and the rest as it is."""
    n_prompts, n_pos, d_model = outputs["embed", -1].shape
    written = _full(outputs["embed", -1]).new_empty(len(senders), n_prompts, n_pos, d_model)
    for (site, layer), output in outputs.items():
        rows = graph.rows(site, layer)
        if rows.start not in senders:
            continue
        there = written[rows.start - senders.start : rows.stop - senders.start]
        if site == "z":
            torch.bmm(
                heads_first(_full(output)),
                _full(models.W_O(model, layer)),
                out=there.view(graph.n_heads, -1, d_model),
            )
        else:
            there[0] = output
    return written


def _multiply(
    written: Tensor, gradients: Tensor, senders: range, upstream: int, found: Tensor, part: Tensor, column: int
) -> None:
    last = min(upstream, senders.stop)
    senders_first = written[: last - senders.start].flatten(2).transpose(0, 1)  # [prompt, sender, pos * d_model]
    receivers = _full(gradients).flatten(2).permute(1, 2, 0)
    found[part, senders.start : last, column : column + len(gradients)] = torch.bmm(senders_first, receivers)
