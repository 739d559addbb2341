"""Circuits: scores for every edge of the computational graph, and circuits run exactly as they are drawn.

``eap`` and ``eap_ig`` estimate what each edge carries by gradients. ``Circuit`` holds a set of edges and runs the
model with all others cut: each reader's input is then the sum of what the circuit's edges bring it, and of what the
other edges bring in another run. The estimate finds a circuit; only the exact run says whether it does the work.

Sources: Syed et al. 2023 (EAP, arXiv:2310.10348); Hanna et al. 2024 (EAP-IG and exact evaluation, arXiv:2403.17806);
Wang et al. 2022 (faithfulness, completeness, minimality, arXiv:2211.00593); Mueller et al. 2025 (MIB: CPR and CMD,
arXiv:2504.13151).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mi_utils import metrics, models
from mi_utils.gradients import differentiate, labelled, numpy, prompts_per_pass, record, stream_metric
from mi_utils.graph import (
    CHANNELS,
    Graph,
    check_decomposition,
    head_name,
    mlp_name,
    normalise,
    owner,
    place,
    reading_weights,
)
from mi_utils.patching import NothingChanged
from mi_utils.prompts import PromptPairs

if TYPE_CHECKING:
    import xarray as xr

LEVELS = ("edge", "node")
RULES = ("midpoint", "left", "right")
VARIANTS = ("inputs", "activations")
ABLATIONS = ("corrupted", "mean")
# The sizes, as shares of all edges, at which MIB evaluates circuits.
MIB_FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


# ------------------------------------------------------------------------------------------------- attribution


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
        metric: a name in ``METRICS``, or a function of pairs that returns one of logits.
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
        sums = _GradientSums(self.model, self.graph, level)
        start, end = self.embeddings[0.0], self.embeddings[1.0]
        for point in points:
            # At its ends the line is one of the two runs: its activations are those that would be recorded.
            embedding = self.embeddings[point] if point in (0.0, 1.0) else start + point * (end - start)
            places = self.sender_places | (self.receiver_places if level == "edge" else {})
            activations, gradients, values = differentiate(
                self.model, self.tokens[1.0], places, self.value, {("resid_pre", 0): embedding}
            )
            if point in (0.0, 1.0):
                self.outputs[point] = {name: activations[name] for name in self.sender_places}
                self.values[point] = values
            sums.add(activations, gradients)
        return sums.scores(self.differences(), range(len(self.graph.senders))) / len(points)

    def along_activations(self, points: Sequence[float], level: str) -> Float[Tensor, "prompt _"]:
        differences, total = self.differences(), 0
        for name, where in self.sender_places.items():
            sums = _GradientSums(self.model, self.graph, level)
            for point in points:
                moved = self.outputs[0.0][name] + point * differences[name]
                places = {name: where} | (self.receiver_places if level == "edge" else {})
                sums.add(*differentiate(self.model, self.tokens[1.0], places, self.value, {where: moved})[:2])
            total = total + sums.scores(differences, _rows(self.graph, *name))
        return total / len(points)


def _rows(graph: Graph, site: str, layer: int) -> range:
    """The senders that write at a site: the embeddings, a layer's heads, or its MLP."""
    if site == "embed":
        return range(1)
    first = 1 + layer * (graph.n_heads + 1)
    after = first + graph.n_heads
    return range(first, after) if site == "z" else range(after, after + 1)


def _full(tensor: Tensor) -> Tensor:
    """In single precision at least: the products sum over many positions and features."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _heads_first(activation: Float[Tensor, "prompt pos head feature"]) -> Float[Tensor, "head token feature"]:
    return activation.flatten(0, 1).transpose(0, 1)


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
            stream = activations["resid_pre", layer]
            centred = stream - stream.mean(-1, keepdim=True) if norm.centred else stream
            scale = (centred.pow(2).mean(-1, keepdim=True) + norm.epsilon).sqrt()
            shares = []
            for channel in CHANNELS:
                weight, bias = reading_weights(self.model, layer, channel)
                gradient = gradients[channel, layer] / scale[..., None]
                self._sum((channel, layer), gradient)
                if norm.bias.any():
                    bias = bias + torch.einsum("d,hdk->hk", norm.bias, weight)
                shares.append(((activations[channel, layer] - bias) * gradient).sum(-1))  # [prompt, pos, head]
            self.along_stream[layer].append((centred / scale, shares))

    def scores(self, differences: Mapping[tuple[str, int], Tensor], senders: range) -> Float[Tensor, "prompt _"]:
        """Score of every edge out of these senders (0 for the others' edges), or of the nodes."""
        graph = self.graph
        n_prompts, n_pos, d_model = differences["embed", -1].shape
        if self.level == "node":
            found = differences["embed", -1].new_zeros(n_prompts, len(graph.senders))
            for name, difference in differences.items():
                rows = _rows(graph, *name)
                if rows.start in senders:
                    products = (difference * self.total[name]).sum(-1).sum(1)  # over features and positions
                    found[:, rows.start : rows.stop] = products.reshape(n_prompts, -1)
            return found
        found = _full(differences["embed", -1]).new_zeros(n_prompts, len(graph.senders), len(graph.receivers))
        for part in torch.arange(n_prompts).split(_prompts_at_once(graph, n_pos, d_model, found.device)):
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
            gradient = _heads_first(_full(self.total[channel, layer][part]))
            torch.bmm(gradient, weight.transpose(1, 2), out=at_inputs[number])
            for normal, shares in self.along_stream[layer]:
                share = _full(shares[number][part]).reshape(n_tokens, n_heads).T / d_model
                at_inputs[number].addcmul_(share[..., None], _full(normal[part]).reshape(n_tokens, d_model), value=-1)
        return at_inputs.view(-1, len(part), n_pos, d_model)


def _prompts_at_once(graph: Graph, n_pos: int, d_model: int, device: torch.device) -> int:
    """So many that what all senders write on them takes 32 MB on a CPU, 512 MB on a GPU."""
    budget = (2**23 if device.type == "cpu" else 2**27) // (len(graph.senders) * n_pos * d_model)
    return max(1, budget)


def _written(
    model: Any, graph: Graph, outputs: Mapping[tuple[str, int], Tensor], senders: range
) -> Float[Tensor, "sender prompt pos d_model"]:
    """What these senders add to the residual stream, from the heads' z and the rest as it is."""
    n_prompts, n_pos, d_model = outputs["embed", -1].shape
    written = _full(outputs["embed", -1]).new_empty(len(senders), n_prompts, n_pos, d_model)
    for (site, layer), output in outputs.items():
        rows = _rows(graph, site, layer)
        if rows.start not in senders:
            continue
        there = written[rows.start - senders.start : rows.stop - senders.start]
        if site == "z":
            torch.bmm(
                _heads_first(_full(output)),
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


# ------------------------------------------------------------------------------------------- circuits as run


@dataclass(frozen=True)
class _Base:
    """The run that cut edges carry: activations by (site, layer), and the stream after the last block."""

    activations: Mapping[tuple[str, int], Tensor]
    stream: Tensor


def _record_base(model: Any, tokens: Tensor, n_layers: int) -> _Base:
    sites = ("resid_pre", "resid_mid", "z", "mlp_out")
    return _Base(*record(model, tokens, {(s, layer): (s, layer) for s in sites for layer in range(n_layers)}))


def _mean_base(model: Any, tokens: Tensor, n_layers: int, batch_size: int) -> _Base:
    """The mean over prompts of everything, by position; a sum of means is the mean of sums, so it is a run too."""
    total: _Base | None = None
    for batch in tokens.split(batch_size):
        base = _record_base(model, batch, n_layers)
        sums = _Base({name: each.sum(0, keepdim=True) for name, each in base.activations.items()},
                     base.stream.sum(0, keepdim=True))  # fmt: skip
        if total is not None:
            sums = _Base({name: each + total.activations[name] for name, each in sums.activations.items()},
                         sums.stream + total.stream)  # fmt: skip
        total = sums
    return _Base({name: each / len(tokens) for name, each in total.activations.items()}, total.stream / len(tokens))


def _run_edges(
    model: Any, graph: Graph, tokens: Int[Tensor, "prompt pos"], base: _Base, mask: Bool[np.ndarray, " edge"]
) -> Float[Tensor, "prompt d_model"]:
    """The last position's stream after the last block, in a run in which only these edges carry the run itself.

    Every input is the base's stream plus what the circuit's senders write here beyond what they write there.
    """
    n_prompts, n_pos = tokens.shape
    d_model = base.stream.shape[-1]
    wanted = np.zeros((len(graph.senders), len(graph.receivers)), dtype=bool)
    wanted[graph.edge_sender[mask], graph.edge_receiver[mask]] = True
    sends = wanted.any(1)
    beyond = base.stream.new_zeros(len(graph.senders), n_prompts, n_pos, d_model)
    width = len(CHANNELS) * graph.n_heads

    def inputs(
        edges: Bool[np.ndarray, "sender receiver"], start: Tensor
    ) -> Float[Tensor, "receiver prompt pos d_model"]:
        weights = torch.from_numpy(edges.T.copy()).to(beyond)
        brought = weights @ beyond[: len(edges)].flatten(1)
        return start + brought.view(-1, n_prompts, n_pos, d_model)

    def embed(stream: Tensor, hook: Any) -> None:
        if sends[0]:
            beyond[0] = stream - base.activations["resid_pre", 0]

    def heads_inputs(layer: int) -> list[tuple[str, Callable]]:
        first = layer * (width + 1)
        edges = wanted[: graph.n_upstream(head_name(layer, 0)), first : first + width]
        different, which = np.unique(edges, axis=1, return_inverse=True)  # receivers that read the same senders
        which = torch.from_numpy(which.reshape(len(CHANNELS), graph.n_heads)).to(tokens.device)
        norm, read = models.attention_norm(model, layer), []

        def edit(number: int) -> Callable:
            def hook(activation: Tensor, hook: Any) -> Tensor:
                if not read:
                    streams = inputs(different, base.activations["resid_pre", layer])
                    read.append(normalise(norm, streams) * norm.weight + norm.bias)
                weight, bias = reading_weights(model, layer, CHANNELS[number])
                streams = read[0][which[number]].flatten(1, 2)  # [head, prompt * pos, d_model]
                found = torch.baddbmm(bias[:, None], streams, weight)
                return found.view(graph.n_heads, n_prompts, n_pos, -1).permute(1, 2, 0, 3).to(activation)

            return hook

        return [(models.hook_name(channel, layer), edit(number)) for number, channel in enumerate(CHANNELS)]

    def heads_outputs(layer: int) -> tuple[str, Callable]:
        rows = _rows(graph, "z", layer)

        def hook(z: Tensor, hook: Any) -> None:
            difference = _heads_first(z - base.activations["z", layer])
            written = torch.bmm(difference, models.W_O(model, layer))
            beyond[rows.start : rows.stop] = written.view(-1, n_prompts, n_pos, d_model)

        return models.hook_name("z", layer), hook

    def mlp_input(layer: int) -> tuple[str, Callable]:
        column = layer * (width + 1) + width
        edges = wanted[: graph.n_upstream(mlp_name(layer)), column : column + 1]
        return models.hook_name("resid_mid", layer), lambda stream, hook: inputs(
            edges, base.activations["resid_mid", layer]
        )[0].to(stream)

    def mlp_output(layer: int) -> tuple[str, Callable]:
        row = _rows(graph, "mlp_out", layer).start

        def hook(output: Tensor, hook: Any) -> None:
            beyond[row] = output - base.activations["mlp_out", layer]

        return models.hook_name("mlp_out", layer), hook

    hooks = [(models.hook_name("resid_pre", 0), embed)]
    for layer in range(graph.n_layers):  # what sends nothing need not be computed
        rows = _rows(graph, "z", layer)
        if sends[rows.start : rows.stop].any():
            hooks += [*heads_inputs(layer), heads_outputs(layer)]
        if sends[_rows(graph, "mlp_out", layer).start]:
            hooks += [mlp_input(layer), mlp_output(layer)]
    with torch.no_grad():
        models.run_with_hooks(model, tokens, hooks, stop_at_layer=graph.n_layers)
        last = torch.from_numpy(wanted[:, -1]).to(beyond) @ beyond[:, :, -1].flatten(1)
        return base.stream[:, -1] + last.view(n_prompts, d_model)


def _measure(
    model: Any, pairs: PromptPairs, masks: Sequence[Bool[np.ndarray, " edge"]], ablation: str,
    metric: str | Callable, batch_size: int | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:  # fmt: skip
    """The metric of each circuit [circuit, prompt], of the whole model and of the empty circuit; and its name."""
    if ablation not in ABLATIONS:
        raise ValueError(f"Unknown ablation {ablation!r}: use {' or '.join(ABLATIONS)}.")
    if ablation == "mean" and len(pairs) < 2:
        raise ValueError("Mean ablation draws on other prompts, and there is only one. Give more, or use 'corrupted'.")
    pairs.check_model(model)
    factory, metric_name = metrics.resolve(metric)
    graph = Graph.of(model)
    check_decomposition(model, pairs.clean_tokens)
    n_pos, shape = pairs.clean_tokens.shape[1], models.info(model).shape
    batch_size = batch_size or _prompts_at_once(graph, n_pos, shape.d_model, pairs.clean_tokens.device)
    mean = _mean_base(model, pairs.clean_tokens, graph.n_layers, batch_size) if ablation == "mean" else None
    found, whole, empty = [], [], []
    for part in torch.arange(len(pairs)).split(batch_size):
        batch = pairs[part.tolist()]
        value = stream_metric(model, factory(batch))
        base = mean or _record_base(model, batch.corrupted_tokens, graph.n_layers)
        clean = models.run(model, batch.clean_tokens, stop_at_layer=graph.n_layers)
        whole.append(numpy(value(clean[:, -1])))
        empty.append(numpy(value(base.stream[:, -1].expand(len(batch), -1))))
        streams = [_run_edges(model, graph, batch.clean_tokens, base, mask) for mask in masks]
        found.append(np.stack([numpy(value(stream)) for stream in streams]))
    return np.concatenate(found, axis=1), np.concatenate(whole), np.concatenate(empty), metric_name


@dataclass(frozen=True)
class Circuit:
    """A set of edges of a model's graph. All methods that run it take any model of that shape.

    Attributes:
        graph: the graph it is part of.
        edges: names ("L0H2 -> L1H3.k"), in the graph's order.
        scores: edge or node to the score it was chosen by, where it was.
        selected: "edges" or "nodes", whichever it was given as.
    """

    graph: Graph
    edges: tuple[str, ...]
    scores: Mapping[str, float] = field(default_factory=dict, repr=False)
    selected: str = "edges"

    def __post_init__(self) -> None:
        if unknown := [edge for edge in self.edges if edge not in self.graph.number]:
            raise ValueError(
                f"The graph has no edge {unknown[0]!r}. Edges are written like {self.graph.edges[0]!r}, from a sender "
                "to a later receiver."
            )
        ordered = sorted(set(self.edges), key=self.graph.number.__getitem__)
        object.__setattr__(self, "edges", tuple(ordered))

    def __len__(self) -> int:
        return len(self.edges)

    # -- making one

    @classmethod
    def from_scores(cls, scores: xr.DataArray, n: int, *, by: str = "absolute", prune: bool = True) -> Circuit:
        """The ``n`` edges (or nodes, with all edges among them) of the highest mean score over prompts.

        Args:
            scores: from ``eap`` or ``eap_ig``, with or without ``prompt``.
            by: "absolute" takes what matters either way, "signed" what helps the answer.
            prune: drop what leads nowhere; then there may be fewer than ``n``.

        Raises:
            ValueError: not such scores, or an ``n`` that the graph has not.
        """
        if by not in ("absolute", "signed"):
            raise ValueError(f"by={by!r}: choose by 'absolute' or 'signed' score.")
        level = scores.attrs.get("level")
        if level not in LEVELS or level not in scores.dims:
            raise ValueError("These are no scores of edges or nodes: give a result of eap or eap_ig.")
        graph = Graph(int(scores.attrs["n_layers"]), int(scores.attrs["n_heads"]))
        mean = scores.mean("prompt") if "prompt" in scores.dims else scores
        names, values = mean[level].values.tolist(), np.asarray(mean, dtype=float)
        if not 0 <= n <= len(names):
            raise ValueError(f"n={n}: this graph has {len(names)} {level}s.")
        order = np.argsort(-(np.abs(values) if by == "absolute" else values), kind="stable")[:n]
        chosen = {names[i]: float(values[i]) for i in order}
        if level == "node":
            circuit = cls.from_nodes(graph, chosen, scores=chosen)
        else:
            circuit = cls(graph, tuple(chosen), chosen)
        return circuit.pruned() if prune else circuit

    @classmethod
    def from_nodes(cls, graph: Graph, nodes: Iterable[str], *, scores: Mapping[str, float] | None = None) -> Circuit:
        """All edges among these senders, and from them to the logits.

        Raises:
            ValueError: a node that the graph has not.
        """
        nodes = set(nodes) | {"logits"}
        if unknown := sorted(nodes - set(graph.nodes)):
            raise ValueError(f"The graph has no node {unknown[0]!r}: nodes are embed, L0H0 …, mlp L0 … and logits.")
        senders = np.array([name in nodes for name in graph.senders])
        receivers = np.array([owner(name) in nodes for name in graph.receivers])
        mask = senders[graph.edge_sender] & receivers[graph.edge_receiver]
        return cls(graph, tuple(np.array(graph.edges)[mask].tolist()), dict(scores or {}), "nodes")

    @classmethod
    def full(cls, graph: Graph) -> Circuit:
        """Every edge: the model itself."""
        return cls(graph, graph.edges)

    @property
    def mask(self) -> Bool[np.ndarray, " edge"]:
        """Which of the graph's edges are in it."""
        mask = np.zeros(len(self.graph.edges), dtype=bool)
        mask[[self.graph.number[edge] for edge in self.edges]] = True
        return mask

    @property
    def nodes(self) -> tuple[str, ...]:
        """Every node at an end of one of its edges, in the graph's order."""
        ends = {end for edge in self.edges for end in self._ends(edge)}
        return tuple(node for node in self.graph.nodes if node in ends)

    def _ends(self, edge: str) -> tuple[str, str]:
        """The nodes at the two ends."""
        number = self.graph.number[edge]
        receiver = self.graph.receivers[self.graph.edge_receiver[number]]
        return self.graph.senders[self.graph.edge_sender[number]], owner(receiver)

    def _only(self, edges: Iterable[str]) -> Circuit:
        return Circuit(self.graph, tuple(edges), self.scores, self.selected)

    def without(self, parts: str | Iterable[str]) -> Circuit:
        """The circuit with these edges, or all edges out of and into these nodes, taken out.

        Raises:
            ValueError: neither an edge nor a node of the graph.
        """
        parts = {parts} if isinstance(parts, str) else set(parts)
        if unknown := sorted(parts - set(self.graph.nodes) - set(self.graph.number)):
            raise ValueError(f"The graph has neither a node nor an edge {unknown[0]!r}.")
        return self._only(edge for edge in self.edges if edge not in parts and not parts.intersection(self._ends(edge)))

    def pruned(self) -> Circuit:
        """Without edges that lie on no path from the embeddings to the logits.

        A head without inputs in the circuit writes what it writes in the other run, and one without a way to the
        logits is not heard: with ablation "corrupted" the pruned circuit does exactly the same.
        """
        ends = {edge: self._ends(edge) for edge in self.edges}
        fed, heard = {"embed"}, {"logits"}
        for edge in self._by_sender():  # senders in the order of computation: one pass reaches everything
            sender, receiver = ends[edge]
            if sender in fed:
                fed.add(receiver)
        for edge in reversed(self._by_sender()):
            sender, receiver = ends[edge]
            if receiver in heard:
                heard.add(sender)
        return self._only(edge for edge, (sender, receiver) in ends.items() if sender in fed and receiver in heard)

    def _by_sender(self) -> list[str]:
        return sorted(self.edges, key=lambda edge: self.graph.edge_sender[self.graph.number[edge]])

    def random_twin(self, seed: int = 0) -> Circuit:
        """As many edges, drawn at random along paths from the embeddings to the logits: the control.

        Raises:
            ValueError: an empty circuit has no twin.
        """
        if not self.edges:
            raise ValueError("An empty circuit has no random twin.")
        rng = np.random.default_rng(seed)
        chosen: set[str] = set()
        misses = 0
        while len(chosen) < len(self):
            new = [edge for edge in self._random_path(rng) if edge not in chosen]
            if len(chosen) + len(new) <= len(self):
                chosen.update(new)
                continue
            misses += 1
            if misses % 50:
                continue
            # Hardly a path fits in any more: fill up with edges among the nodes that are there.
            nodes = {"embed", "logits"}.union(*map(self._ends, chosen))
            rest = [edge for edge in Circuit.from_nodes(self.graph, nodes).edges if edge not in chosen]
            if len(rest) >= len(self) - len(chosen):
                chosen.update(rng.choice(rest, size=len(self) - len(chosen), replace=False).tolist())
            else:
                chosen.clear()  # too few: begin again
        return Circuit(self.graph, tuple(chosen))

    def _random_path(self, rng: np.random.Generator) -> list[str]:
        """From the logits backwards, one sender after another, until the embeddings are reached."""
        path, receiver = [], "logits"
        while True:
            sender = self.graph.senders[rng.integers(self.graph.n_upstream(receiver))]
            path.append(f"{sender} -> {receiver}")
            if sender == "embed":
                return path
            receiver = f"{sender}.{rng.choice(CHANNELS)}" if place(sender)[1] == "head" else sender

    # -- running it

    def faithfulness(
        self,
        model: Any,
        pairs: PromptPairs,
        *,
        ablation: str = "corrupted",
        metric: str | Callable = "logit_diff",
        batch_size: int | None = None,
    ) -> xr.DataArray:
        """How much of the behaviour the circuit keeps when all other edges are cut; exact, one run of the circuit.

        Args:
            ablation: what the cut edges carry: "corrupted", their sender's output in the corrupted run, or "mean", its
                mean over these clean prompts, by position.

        Returns:
            Dims (prompt,): 0 is the empty circuit, 1 the whole model. Coordinates ``raw`` (the circuit's metric),
            ``clean`` (the whole model's) and ``corrupted`` (the empty circuit's). ``stats.pooled_effect`` is the
            published ratio of means; single prompts with a small gap are noisy.

        What it does not show: that the circuit is complete, minimal, or the only one that does it; nor anything about
        other prompts. Compare with ``random_twin``.

        Raises:
            ValueError: an unknown ablation, one prompt where the mean needs several, a model of another shape.
        """
        return faithfulness_curve(
            model, pairs, [self], ablation=ablation, metric=metric, batch_size=batch_size
        ).isel(circuit=0, drop=True)  # fmt: skip

    def completeness(
        self,
        model: Any,
        pairs: PromptPairs,
        subsets: Sequence[Sequence[str]] | None = None,
        *,
        seed: int = 0,
        n_random: int = 8,
        ablation: str = "corrupted",
        metric: str | Callable = "logit_diff",
        batch_size: int | None = None,
    ) -> xr.Dataset:
        """Do circuit and model still agree when the same nodes are taken out of both?

        Args:
            subsets: sets of nodes; by default each head and MLP of the circuit alone, and ``n_random`` random halves
                of them.

        Returns:
            Over (prompt, subset), on the scale of ``faithfulness``: ``circuit`` without the subset, ``model`` without
            it, and ``gap``, their difference. Far from 0 anywhere means that something outside the circuit does what
            the subset does.

        Raises:
            ValueError: nodes that are not in the circuit, or a circuit of embeddings and logits alone.
        """
        import xarray as xr

        inner = [node for node in self.nodes if node not in ("embed", "logits")]
        if subsets is None:
            if not inner:
                raise ValueError("This circuit has no head or MLP that could be taken out.")
            rng = np.random.default_rng(seed)
            halves = [rng.choice(inner, size=max(1, len(inner) // 2), replace=False).tolist() for _ in range(n_random)]
            subsets = [[node] for node in inner] + halves
        if absent := sorted({node for subset in subsets for node in subset} - set(self.nodes)):
            raise ValueError(f"{absent[0]} is not in the circuit: completeness takes out parts of it.")
        whole = Circuit.full(self.graph)
        runs = [circuit.without(subset).mask for circuit in (self, whole) for subset in subsets]
        effect, clean, empty, name = self._effects(model, pairs, runs, ablation, metric, batch_size)
        circuit, rest = effect[: len(subsets)].T, effect[len(subsets) :].T
        dims, coords = ("prompt", "subset"), {"subset": [" + ".join(subset) for subset in subsets]}
        arrays = {"circuit": circuit, "model": rest, "gap": rest - circuit}
        attrs = {"ablation": ablation, "metric": name, "n_edges": len(self)}
        return xr.Dataset({
            key: labelled(values, dims, model, pairs, coords, clean, empty, name=key, **attrs)
            for key, values in arrays.items()
        })  # fmt: skip

    def minimality(
        self,
        model: Any,
        pairs: PromptPairs,
        by: str = "node",
        contexts: Sequence[Sequence[str]] = ((),),
        *,
        ablation: str = "corrupted",
        metric: str | Callable = "logit_diff",
        batch_size: int | None = None,
    ) -> xr.DataArray:
        """How much faithfulness is lost when one part is taken out.

        Args:
            by: parts are each "node" or each "edge" of the circuit.
            contexts: sets of nodes that are out already; a part that a backup covers shows only without the backup.

        Returns:
            Dims (prompt, context, part). A part that is near 0 in every context is not needed.

        Raises:
            ValueError: an unknown ``by``, or a circuit without such parts.
        """
        if by not in LEVELS:
            raise ValueError(f"by={by!r}: take out each 'node' or each 'edge'.")
        parts = self.edges if by == "edge" else [node for node in self.nodes if node not in ("embed", "logits")]
        if not parts:
            raise ValueError(f"This circuit has no {by} that could be taken out.")
        before = [self.without(context) for context in contexts]
        runs = [each.mask for each in before] + [each.without(part).mask for each in before for part in parts]
        effect, clean, empty, name = self._effects(model, pairs, runs, ablation, metric, batch_size)
        kept, left = effect[: len(before)], effect[len(before) :].reshape(len(before), len(parts), -1)
        return labelled(
            (kept[:, None] - left).transpose(2, 0, 1), ("prompt", "context", "part"), model, pairs,
            {"context": ["without " + " + ".join(c) if c else "whole circuit" for c in contexts], "part": list(parts)},
            clean, empty, name="minimality", ablation=ablation, metric=name, n_edges=len(self),
        )  # fmt: skip

    def _effects(
        self, model: Any, pairs: PromptPairs, masks: list, ablation: str, metric: Any, batch_size: Any
    ) -> tuple:
        self._check_shape(model)
        found, clean, empty, name = _measure(model, pairs, masks, ablation, metric, batch_size)
        return _normalised(found, clean, empty, name), clean, empty, name

    def _check_shape(self, model: Any) -> None:
        if Graph.of(model) != self.graph:
            raise ValueError(
                f"This circuit is of a model with {self.graph.n_layers} layers of {self.graph.n_heads} heads; "
                f"{models.info(model).name} has another shape."
            )

    # -- keeping it

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "n_layers": self.graph.n_layers,
            "n_heads": self.graph.n_heads,
            "selected": self.selected,
            "edges": list(self.edges),
            "scores": dict(self.scores),
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Circuit:
        """From what ``to_dict`` gave.

        Raises:
            ValueError: it is no circuit.
        """
        if missing := {"n_layers", "n_heads", "edges"} - set(record):
            raise ValueError(f"This is no circuit: {', '.join(sorted(missing))} missing.")
        graph = Graph(int(record["n_layers"]), int(record["n_heads"]))
        return cls(graph, tuple(record["edges"]), dict(record.get("scores", {})), record.get("selected", "edges"))

    def save(self, path: str | Path) -> Path:
        """Write it as JSON."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Circuit:
        """Read what ``save`` wrote."""
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))


# ---------------------------------------------------------------------------------------------------- curves


def nested_circuits(
    scores: xr.DataArray, fractions: Sequence[float] = MIB_FRACTIONS, *, by: str = "absolute", prune: bool = True
) -> list[Circuit]:
    """The circuits of the best ``fraction`` of edges (or nodes), for each fraction, smallest first."""
    if wrong := [fraction for fraction in fractions if not 0 <= fraction <= 1]:
        raise ValueError(f"Fractions of the graph lie between 0 and 1, not {wrong}.")
    total = scores.sizes[scores.attrs["level"]]
    return [Circuit.from_scores(scores, int(fraction * total), by=by, prune=prune) for fraction in sorted(fractions)]


def faithfulness_curve(
    model: Any,
    pairs: PromptPairs,
    circuits: Sequence[Circuit],
    *,
    ablation: str = "corrupted",
    metric: str | Callable = "logit_diff",
    batch_size: int | None = None,
) -> xr.DataArray:
    """Faithfulness of several circuits of one model, with the areas by which MIB judges a way of finding them.

    Args:
        circuits: from ``nested_circuits``, or random twins of those as the control.

    Returns:
        Dims (prompt, circuit) with coordinates ``n_edges``, ``fraction`` (of all edges) and ``raw``, otherwise as
        ``Circuit.faithfulness``. Attributes, from ratios of means over prompts by the trapezoidal rule over
        ``fraction``: ``cpr`` (area under faithfulness; high where small circuits keep the behaviour, or overshoot it)
        and ``cmd`` (area between faithfulness and 1; low where circuits do what the model does).

    What it does not show: MIB reports areas over the fractions asked for, from 0.001 to 1, and here the circuits' own
    sizes after pruning are on the axis. Compare areas over the same sizes.

    Raises:
        ValueError: as ``Circuit.faithfulness``.
    """
    if not circuits:
        raise ValueError("No circuits given.")
    for circuit in circuits:
        circuit._check_shape(model)
    masks = [circuit.mask for circuit in circuits]
    raw, clean, empty, name = _measure(model, pairs, masks, ablation, metric, batch_size)
    effect = _normalised(raw, clean, empty, name)
    sizes = np.array([len(circuit) for circuit in circuits])
    fraction = sizes / len(circuits[0].graph.edges)
    gap = (clean - empty).mean()
    pooled = (raw - empty).mean(1) / gap if gap else np.full(len(circuits), np.nan)
    order = np.argsort(fraction, kind="stable")
    coords = {
        "circuit": np.arange(len(circuits)),
        "n_edges": ("circuit", sizes),
        "fraction": ("circuit", fraction),
        "raw": (("prompt", "circuit"), raw.T),
    }
    return labelled(
        effect.T, ("prompt", "circuit"), model, pairs, coords, clean, empty, name="faithfulness",
        ablation=ablation, metric=name,
        cpr=float(np.trapezoid(pooled[order], fraction[order])),
        cmd=float(np.trapezoid(np.abs(1 - pooled[order]), fraction[order])),
    )  # fmt: skip


def _normalised(found: np.ndarray, clean: np.ndarray, empty: np.ndarray, metric: str) -> np.ndarray:
    gap = clean - empty
    if len(flat := np.flatnonzero(gap == 0)):
        raise ValueError(
            f"{metric} is the same for the whole model and the empty circuit on prompts {flat.tolist()}: faithfulness "
            "has no scale there. Choose another metric, or drop these prompts."
        )
    return (found - empty) / gap
