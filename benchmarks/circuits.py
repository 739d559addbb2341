"""Attribution by gradients, beside a forward pass and beside the published algorithm of EAP-IG written plainly."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from common import Row, gpt2_small_shaped, hooked_transformer, interleaved, median_ratio, prompt_pairs, threads

from mi_utils.edges import eap, eap_ig
from mi_utils.gradients import attribution_patch
from mi_utils.graph import Graph

TITLE = "Attribution patching, EAP and EAP-IG"
N_PROMPTS, STEPS = 8, 5


class Published:
    """EAP and EAP-IG as their authors do it (Hanna et al. 2024): every head's result is an activation of its own,
    inputs are split into q, k and v for every head, and backward hooks multiply their gradients with all results
    upstream. Parameters have no gradients here, which the authors' code leaves on: this is the faster form."""

    def __init__(self, model: Any, graph: Graph, pairs: Any) -> None:
        self.model, self.graph, self.pairs = model, graph, pairs
        model.set_use_attn_result(True)
        model.set_use_split_qkv_input(True)
        model.set_use_hook_mlp_in(True)
        n_layers, n_heads = graph.n_layers, graph.n_heads
        self.outputs: dict[str, Any] = {"hook_embed": 0}
        self.inputs: dict[str, tuple[int, Any]] = {}
        column = 0
        for layer in range(n_layers):
            row = 1 + layer * (n_heads + 1)
            self.outputs[f"blocks.{layer}.attn.hook_result"] = slice(row, row + n_heads)
            self.outputs[f"blocks.{layer}.hook_mlp_out"] = row + n_heads
            for channel in "qkv":
                self.inputs[f"blocks.{layer}.hook_{channel}_input"] = row, slice(column, column + n_heads)
                column += n_heads
            self.inputs[f"blocks.{layer}.hook_mlp_in"] = row + n_heads, slice(column, column + 1)
            column += 1
        self.inputs[f"blocks.{n_layers - 1}.hook_resid_post"] = len(graph.senders), slice(column, column + 1)

    def metric(self, logits: torch.Tensor) -> torch.Tensor:
        last, rows = logits[:, -1], torch.arange(len(self.pairs))
        return (last[rows, self.pairs.correct_ids] - last[rows, self.pairs.incorrect_ids]).sum()

    def scores(self, steps: int | None) -> torch.Tensor:
        """[sender, receiver], summed over prompts; clean minus corrupted. ``steps=None`` is EAP."""
        pairs, cfg = self.pairs, self.model.cfg
        n_prompts, n_pos = pairs.clean_tokens.shape
        like = {"device": cfg.device, "dtype": cfg.dtype}
        difference = torch.zeros(n_prompts, n_pos, len(self.graph.senders), cfg.d_model, **like)
        scores = torch.zeros(len(self.graph.senders), len(self.graph.receivers), **like)

        def collect(index: Any, sign: int) -> Callable:
            def hook(activation: torch.Tensor, hook: Any) -> None:
                difference[:, :, index] += sign * activation.detach()

            return hook

        def multiply(upstream: int, columns: slice) -> Callable:
            def hook(gradient: torch.Tensor, hook: Any) -> None:
                gradient = gradient if gradient.ndim == 4 else gradient.unsqueeze(2)
                product = torch.einsum("bpfh,bpgh->fg", difference[:, :, :upstream], gradient)
                scores[:upstream, columns] += product

            return hook

        def fork(embedding: torch.Tensor | None) -> Callable:
            def hook(activation: torch.Tensor, hook: Any) -> torch.Tensor:
                start = activation if embedding is None else embedding
                return start.detach().requires_grad_(True)

            return hook

        add = [(name, collect(index, 1)) for name, index in self.outputs.items()]
        take = [(name, collect(index, -1)) for name, index in self.outputs.items()]
        back = [(name, multiply(*where)) for name, where in self.inputs.items()]
        with torch.no_grad():
            self.model.run_with_hooks(pairs.corrupted_tokens, fwd_hooks=take)
        if steps is None:
            with self.model.hooks(fwd_hooks=[("hook_embed", fork(None)), *add], bwd_hooks=back):
                self.metric(self.model(pairs.clean_tokens)).backward()
            return scores
        corrupted = -difference[:, :, 0].clone()
        with torch.no_grad():
            self.model.run_with_hooks(pairs.clean_tokens, fwd_hooks=add)
        for step in range(steps):
            point = corrupted + step / steps * difference[:, :, 0]
            with self.model.hooks(fwd_hooks=[("hook_embed", fork(point))], bwd_hooks=back):
                self.metric(self.model(pairs.clean_tokens)).backward()
        return scores / steps


def main() -> list[Row]:
    """The rows."""
    model, hf_model = gpt2_small_shaped()
    peer = hooked_transformer(hf_model)
    pairs = prompt_pairs(model, N_PROMPTS, differ=(10,))
    graph = Graph.of(model)
    published = Published(hooked_transformer(hf_model), graph, pairs)

    @torch.no_grad()
    def forward() -> None:
        peer(pairs.clean_tokens)

    calls: dict[str, Callable] = {
        "forward": forward,
        "attribution": lambda: attribution_patch(model, pairs, "resid_pre", ("layer", "pos")),
        "eap": lambda: eap(model, pairs),
        "published eap": lambda: published.scores(None),
        "eap_ig": lambda: eap_ig(model, pairs, steps=STEPS, rule="left"),
        "published eap_ig": lambda: published.scores(STEPS),
    }
    one, what = (
        "one forward pass of transformer_lens (ours: {:.1f})",
        f"all {len(graph.edges):,} edges, {N_PROMPTS} prompts",
    )
    ig, plain = f"EAP-IG, {STEPS} steps, {what}", "published algorithm"
    comparisons = (
        ("attribution patching, resid_pre, layer × position", one, "attribution", "forward", 0.4),
        (f"EAP, {what}", plain, "eap", "published eap", 5),
        (f"EAP, {what}", one, "eap", "forward", 0.167),
        (ig, plain, "eap_ig", "published eap_ig", 8),
        (ig, one, "eap_ig", "forward", 0.05),
    )
    counts = sorted({1, torch.get_num_threads()})
    timed = {}
    for count in counts:
        with threads(count):
            for name in ("forward", "attribution", "eap"):  # the others run the same code, for longer
                calls[name]()
            timed[count] = interleaved(calls, rounds=3)

    # The same scores? Single precision is too coarse to tell: these random weights magnify rounding. So in double.
    rough = apart(calls["eap"](), published.scores(None), graph)
    model.double()
    published.model.double().cfg.dtype = torch.float64
    difference = {
        "published eap": apart(eap(model, pairs), published.scores(None), graph),
        "published eap_ig": apart(eap_ig(model, pairs, steps=2, rule="left"), published.scores(2), graph),
    }
    note = (
        "Beside one forward pass the ratio is below 1: 0.4× is 2.5 passes' time, 0.167× is 6, 0.05× is 20; the peer's "
        "column says how many it was. The "
        "difference between two sets of scores is a share of the largest score, in double precision (EAP-IG with 2 "
        f"steps); in single precision both round, and EAP's differ by {rough:.1g}. Ours asks each model once whether "
        "its stream is a plain sum (half a forward pass); that is in the warm-up."
    )
    rows = []
    for count in counts:
        seconds = timed[count]
        median = {name: statistics.median(each) for name, each in seconds.items()}
        rows += [
            Row(
                work, beside.format(median_ratio(seconds[ours], seconds[theirs])), count, median[ours], median[theirs],
                median_ratio(seconds[theirs], seconds[ours]), bar, difference.get(theirs), note=note,
            )
            for work, beside, ours, theirs, bar in comparisons
        ]  # fmt: skip
    return rows


def apart(ours: Any, theirs: torch.Tensor, graph: Graph) -> float:
    """Largest difference between the sums over prompts, as a share of the largest score."""
    found = torch.as_tensor(ours.sum("prompt").values)
    expected = theirs[torch.as_tensor(graph.edge_sender), torch.as_tensor(graph.edge_receiver)].cpu()
    return float((found - expected).abs().max() / expected.abs().max())
