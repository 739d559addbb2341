"""Circuits, run exactly as they are drawn.

``Circuit`` holds a set of edges and runs the model with all others cut: each reader's input is then the sum of what
the circuit's edges bring it, and of what the other edges bring in another run. Scores (``eap``, ``eap_ig``) find a
circuit; only the exact run says whether it does the work.

Sources: Wang et al. 2022 (faithfulness, completeness, minimality, arXiv:2211.00593); Hanna et al. 2024 (evaluation by
edges, arXiv:2403.17806); Mueller et al. 2025 (MIB: CPR and CMD, arXiv:2504.13151).
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
from mi_utils.edges import LEVELS
from mi_utils.gradients import record, stream_metric
from mi_utils.graph import (
    ARROW,
    CHANNELS,
    Graph,
    check_decomposition,
    head_name,
    heads_first,
    mlp_name,
    owner,
    place,
    prompts_at_once,
    read,
    reading_weights,
)
from mi_utils.prompts import PromptPairs
from mi_utils.results import labelled, numpy

if TYPE_CHECKING:
    import xarray as xr

ABLATIONS = ("corrupted", "mean")
# The sizes, as shares of all edges, at which MIB evaluates circuits.
MIB_FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


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

    def summed(values: Tensor) -> Tensor:  # sums overflow in half precision
        return values.sum(0, keepdim=True, dtype=torch.promote_types(values.dtype, torch.float32))

    total: _Base | None = None
    for batch in tokens.split(batch_size):
        base = _record_base(model, batch, n_layers)
        sums = _Base({name: summed(each) for name, each in base.activations.items()}, summed(base.stream))
        if total is not None:
            sums = _Base({name: each + total.activations[name] for name, each in sums.activations.items()},
                         sums.stream + total.stream)  # fmt: skip
        total = sums
    dtype = base.stream.dtype
    mean = {name: (each / len(tokens)).to(dtype) for name, each in total.activations.items()}
    return _Base(mean, (total.stream / len(tokens)).to(dtype))


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
        norm, normed = models.attention_norm(model, layer), []

        def edit(number: int) -> Callable:
            def hook(activation: Tensor, hook: Any) -> Tensor:
                if not normed:
                    normed.append(read(norm, inputs(different, base.activations["resid_pre", layer])))
                weight, bias = reading_weights(model, layer, CHANNELS[number])
                streams = normed[0][which[number]].flatten(1, 2)  # [head, prompt * pos, d_model]
                found = torch.baddbmm(bias[:, None], streams, weight)
                return found.view(graph.n_heads, n_prompts, n_pos, -1).permute(1, 2, 0, 3).to(activation)

            return hook

        return [(models.hook_name(channel, layer), edit(number)) for number, channel in enumerate(CHANNELS)]

    def heads_outputs(layer: int) -> tuple[str, Callable]:
        rows = graph.rows("z", layer)

        def hook(z: Tensor, hook: Any) -> None:
            difference = heads_first(z - base.activations["z", layer])
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
        row = graph.rows("mlp_out", layer).start

        def hook(output: Tensor, hook: Any) -> None:
            beyond[row] = output - base.activations["mlp_out", layer]

        return models.hook_name("mlp_out", layer), hook

    hooks = [(models.hook_name("resid_pre", 0), embed)]
    for layer in range(graph.n_layers):  # what sends nothing need not be computed
        rows = graph.rows("z", layer)
        if sends[rows.start : rows.stop].any():
            hooks += [*heads_inputs(layer), heads_outputs(layer)]
        if sends[graph.rows("mlp_out", layer).start]:
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
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}.")
    if ablation == "mean" and len(pairs) < 2:
        raise ValueError("Mean ablation draws on other prompts, and there is only one. Give more, or use 'corrupted'.")
    pairs.check_model(model)
    factory, metric_name = metrics.resolve(metric)
    graph = Graph.of(model)
    check_decomposition(model, pairs.clean_tokens)
    n_pos, shape = pairs.clean_tokens.shape[1], models.info(model).shape
    batch_size = batch_size or prompts_at_once(graph, n_pos, shape.d_model, pairs.clean_tokens.device)
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
        level = _level(scores)
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

    def jaccard(self, other: Circuit) -> float:
        """Edges that both have, as a share of those that either has.

        Raises:
            ValueError: circuits of models of different shapes, or two empty ones.
        """
        if other.graph != self.graph:
            raise ValueError("These circuits are of models of different shapes: their edges cannot be compared.")
        mine, others = set(self.edges), set(other.edges)
        if not mine | others:
            raise ValueError("Two empty circuits have nothing to compare.")
        return len(mine & others) / len(mine | others)

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
            path.append(sender + ARROW + receiver)
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
        if not len(subsets):
            raise ValueError("No subsets given: nothing to take out.")
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
        if not len(contexts):
            raise ValueError("No contexts given: the whole circuit is the context ().")
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
    """The circuits of the best ``fraction`` of edges (or nodes), for each fraction, smallest first.

    Raises:
        ValueError: as ``Circuit.from_scores``, or a fraction beyond 0 and 1.
    """
    if wrong := [fraction for fraction in fractions if not 0 <= fraction <= 1]:
        raise ValueError(f"Fractions of the graph lie between 0 and 1, not {wrong}.")
    total = scores.sizes[_level(scores)]
    return [Circuit.from_scores(scores, int(fraction * total), by=by, prune=prune) for fraction in sorted(fractions)]


def smallest_circuit(
    model: Any,
    pairs: PromptPairs,
    scores: xr.DataArray,
    sizes: Sequence[int],
    *,
    tolerance: float = 0.05,
    by: str = "absolute",
    ablation: str = "corrupted",
    metric: str | Callable = "logit_diff",
    batch_size: int | None = None,
) -> Circuit:
    """The smallest of the best ``n`` edges, ``n`` from ``sizes``, whose faithfulness is within ``tolerance`` of 1.

    Faithfulness is the ratio of means over these pairs. They are used up by the choice: measure the circuit on others.

    Args:
        pairs: other prompts than those of the ``scores``, or a size that fits those by chance is chosen.
        by, ablation, metric, batch_size: as in ``Circuit.from_scores`` and ``Circuit.faithfulness``.

    Raises:
        ValueError: no size reaches it; the message has what was reached. And as ``Circuit.from_scores``.
    """
    circuits = [Circuit.from_scores(scores, n, by=by) for n in sorted(set(sizes))]
    curve = faithfulness_curve(model, pairs, circuits, ablation=ablation, metric=metric, batch_size=batch_size)
    gap = curve["clean"] - curve["corrupted"]
    kept = ((curve * gap).sum("prompt") / gap.sum()).values
    for circuit, value in zip(circuits, kept, strict=True):
        if abs(value - 1) <= tolerance:
            return circuit
    nearest = int(np.abs(kept - 1).argmin())
    raise ValueError(
        f"No size keeps the behaviour within {tolerance} of 1: the nearest is {len(circuits[nearest])} edges with "
        f"{kept[nearest]:.2f}. Give larger sizes, more prompts or more steps to the scores, or a wider tolerance."
    )


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
        and ``cmd`` (area between faithfulness and 1; low where circuits do what the model does). NaN where all
        circuits are of one size.

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
    none = 0.0 if np.ptp(fraction) else np.nan  # of one size: no area
    coords = {
        "circuit": np.arange(len(circuits)),
        "n_edges": ("circuit", sizes),
        "fraction": ("circuit", fraction),
        "raw": (("prompt", "circuit"), raw.T),
    }
    return labelled(
        effect.T, ("prompt", "circuit"), model, pairs, coords, clean, empty, name="faithfulness",
        ablation=ablation, metric=name,
        cpr=none + float(np.trapezoid(pooled[order], fraction[order])),
        cmd=none + float(np.trapezoid(np.abs(1 - pooled[order]), fraction[order])),
    )  # fmt: skip


def _level(scores: xr.DataArray) -> str:
    """Whether these are scores of edges or of nodes."""
    level = scores.attrs.get("level")
    if level not in LEVELS or level not in scores.dims:
        raise ValueError("These are no scores of edges or nodes: give a result of eap or eap_ig.")
    return level


def _normalised(found: np.ndarray, clean: np.ndarray, empty: np.ndarray, metric: str) -> np.ndarray:
    gap = clean - empty
    if len(flat := np.flatnonzero((gap == 0) | ~np.isfinite(gap))):
        raise ValueError(
            f"{metric} is the same, or no number, for the whole model and the empty circuit on prompts "
            f"{flat.tolist()}: faithfulness has no scale there. Choose another metric, or drop these prompts."
        )
    return (found - empty) / gap
