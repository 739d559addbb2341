"""Path patching: what one part tells another directly, with everything beside that path held still.

Activation patching of a head changes all that comes after it. Here only the receiver hears of the change, first
through the residual stream alone; what follows the receiver then runs freely.

Source: Wang et al. 2022 (arXiv:2211.00593), appendix B; Goldowsky-Dill et al. 2023, "Localizing Model Behavior with
Path Patching" (arXiv:2304.05969).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mi_utils import metrics, models
from mi_utils.gradients import record, stream_metric
from mi_utils.graph import CHANNELS, head_of, owner, place
from mi_utils.prompts import PromptPairs
from mi_utils.results import NothingChanged, check_gap, check_mode, labelled, numpy

if TYPE_CHECKING:
    import xarray as xr

Groups = Sequence[str] | Mapping[str, Sequence[str]]


def path_patch(
    model: Any,
    pairs: PromptPairs,
    senders: Groups,
    receivers: Groups = ("logits",),
    *,
    mlps: str = "frozen",
    mode: str = "denoising",
    metric: str | Callable = "logit_diff",
    batch_size: int | None = None,
) -> xr.DataArray:
    """Patch the direct path from each sender to each receiver; exact.

    Args:
        senders: heads ("L5H3"), MLPs ("mlp L5"), "embed"; or named sets of them that are patched together,
            {"name movers": ["L9H6", "L9H9"]}.
        receivers: inputs of heads ("L7H3.q", ".k", ".v"), MLPs ("mlp L8"), "logits"; or named sets.
        mlps: "frozen" holds the MLPs between sender and receiver at what they are, so that the path is the residual
            stream alone; "run" lets them answer, as in Wang et al. Heads between the two are always frozen.
        mode: "denoising" puts the sender's clean output into the corrupted run, "noising" (as published) its
            corrupted output into the clean run.
        metric: a name in ``METRICS``, or a function of pairs that returns one of logits ``[prompt, 1, d_vocab]``.
        batch_size: rows (sender and prompt) in one pass; by default about 1,000 tokens on a CPU, more on a GPU.

    Returns:
        Dims (prompt, sender, receiver); 0 is the corrupted run, 1 the clean run, in both modes. Where no receiver
        comes after the sender nothing can happen, and nothing is run (``skipped_cells``). The receipt counts the
        senders' elements that were exchanged.

    What it does not show: longer paths, through other heads. A set of receivers in several layers hears the sender
    and not one another.

    Raises:
        ValueError: a wrong argument, a part that the model has not, the logits together with other receivers.
        NothingChanged: the senders write the same in both runs, or nothing is downstream of them.
    """
    sets, targets = _groups(model, senders, "senders"), _groups(model, receivers, "receivers")
    if mlps not in ("frozen", "run"):
        raise ValueError(f"mlps={mlps!r}: 'frozen' or 'run'.")
    check_mode(mode)
    if mixed := [name for name, group in targets.items() if "logits" in group and len(group) > 1]:
        raise ValueError(
            f"The receivers {mixed[0]!r} hold the logits and others: what the others would tell the logits is "
            "overwritten there. Give the logits a set of their own."
        )
    pairs.check_model(model)
    factory, metric_name = metrics.resolve(metric)
    both = (pairs.corrupted_tokens, pairs.clean_tokens)
    base_tokens, source_tokens = both if mode == "denoising" else both[::-1]
    if batch_size is None:
        batch_size = (1024 if base_tokens.device.type == "cpu" else 32768) // base_tokens.shape[1]
    elif batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}.")
    reached = np.array([[_is_after(target, group) for target in targets.values()] for group in sets.values()])
    if not reached.any():
        raise NothingChanged("No receiver comes after any sender: there is no path to patch.")

    found = np.zeros((len(pairs), *reached.shape))
    base_values, source_values = np.zeros(len(pairs)), np.zeros(len(pairs))
    changed, total = 0, 0.0
    for part in np.split(np.arange(len(pairs)), range(max(1, batch_size), len(pairs), max(1, batch_size))):
        value = stream_metric(model, factory(pairs[part]))
        runs = _Runs(model, base_tokens[part], source_tokens[part], freeze_mlps=mlps == "frozen")
        base_values[part], source_values[part] = (numpy(value(stream[:, -1])) for stream in runs.streams)
        found[part] = base_values[part, None, None]
        at_once = max(1, batch_size // len(part))
        for first in range(0, len(sets), at_once):
            chosen = list(sets.values())[first : first + at_once]
            heard, streams = runs.send(chosen, [each for group in targets.values() for each in group])
            for group in chosen:
                count, size = runs.difference(group)
                changed, total = changed + count, total + size
            for column, target in enumerate(targets.values()):
                rows = [row for row in range(len(chosen)) if reached[first + row, column]]
                if not rows:
                    continue
                if target == ("logits",):
                    last = streams[rows, :, -1]
                else:
                    last = runs.receive(target, {each: heard[each][rows] for each in target})[:, :, -1]
                for row, stream in zip(rows, last, strict=True):
                    found[part, first + row, column] = numpy(value(stream))
    if changed == 0:
        raise NothingChanged("The senders write the same in the clean and in the corrupted run.")
    clean, corrupted = (source_values, base_values) if mode == "denoising" else (base_values, source_values)
    gap = check_gap(clean, corrupted, metric_name)
    return labelled(
        (found - corrupted[:, None, None]) / gap[:, None, None], ("prompt", "sender", "receiver"), model, pairs,
        {"sender": list(sets), "receiver": list(targets)}, clean, corrupted, name="effect", mode=mode, mlps=mlps,
        metric=metric_name, method="path", skipped_cells=int((~reached).sum()) * len(pairs),
        elements_changed=changed, mean_change=total / changed,
    )  # fmt: skip


class _Runs:
    """One batch of prompts: both runs' activations, and the two passes of a path patch."""

    def __init__(self, model: Any, base: Tensor, source: Tensor, *, freeze_mlps: bool) -> None:
        self.model, self.tokens, self.freeze_mlps = model, base, freeze_mlps
        self.n_layers = models.info(model).shape.n_layers
        places = {("resid_pre", 0): ("resid_pre", 0)}
        places |= {(site, layer): (site, layer) for site in ("z", "mlp_out") for layer in range(self.n_layers)}
        self.base, base_stream = record(model, base, places)
        self.source, source_stream = record(model, source, places)
        self.streams = (base_stream, source_stream)

    def difference(self, group: Sequence[str]) -> tuple[int, float]:
        """How many elements of these senders differ between the runs, and by how much in sum."""
        count, size = 0, 0.0
        for sender in group:
            place, head = _output(sender)
            apart = (self.source[place] - self.base[place])[..., head, :].abs()
            count, size = count + int((apart > 0).sum()), size + float(apart.sum())
        return count, size

    def send(self, groups: Sequence[Sequence[str]], receivers: Sequence[str]) -> tuple[dict[str, Tensor], Tensor]:
        """First pass, a row for each group of senders: theirs from the source, all other heads as in the base.

        Returns what each receiver would then read [group, prompt, pos, ...], and the streams after the last block.
        """
        n = len(groups)
        written: dict[tuple[str, int], Tensor] = {}

        def held(place: tuple[str, int]) -> Tensor:
            if place not in written:
                written[place] = self.base[place].repeat(n, *[1] * (self.base[place].ndim - 1))
            return written[place]

        for layer in range(self.n_layers):
            held(("z", layer))
            if self.freeze_mlps:
                held(("mlp_out", layer))
        edits: dict[tuple[str, int], Tensor] = {}  # rows in which an MLP that runs is a sender all the same
        for row, group in enumerate(groups):
            here = slice(row * len(self.tokens), (row + 1) * len(self.tokens))
            for sender in group:
                place, head = _output(sender)
                if place[0] == "mlp_out" and not self.freeze_mlps:
                    edits.setdefault(place, torch.zeros(n * len(self.tokens), dtype=torch.bool))[here] = True
                    continue
                held(place)[here][..., head, :] = self.source[place][..., head, :]

        hooks = [(models.hook_name(*place), _put(value)) for place, value in written.items()]
        hooks += [
            (models.hook_name(*place), _put_rows(self.source[place].repeat(n, 1, 1), rows))
            for place, rows in edits.items()
        ]
        heard: dict[str, Tensor] = {}
        by_hook: dict[tuple[str, int], list[str]] = {}
        for receiver in receivers:
            if receiver != "logits":
                by_hook.setdefault(_input(receiver), []).append(receiver)
        hooks += [(models.hook_name(*place), _listen(names, heard, n)) for place, names in by_hook.items()]
        with torch.no_grad():
            stream = models.run_with_hooks(self.model, self.tokens.repeat(n, 1), hooks, stop_at_layer=self.n_layers)
        return heard, stream.unflatten(0, (n, -1))

    def receive(self, receivers: Sequence[str], heard: Mapping[str, Tensor]) -> Tensor:
        """Second pass: the base run, but for what these receivers read. Streams [group, prompt, pos, d_model]."""
        n = len(heard[receivers[0]])
        by_hook: dict[tuple[str, int], list[str]] = {}
        for receiver in receivers:
            by_hook.setdefault(_input(receiver), []).append(receiver)

        def edit(names: Sequence[str]) -> Callable:
            def hook(activation: Tensor, hook: Any) -> Tensor:
                activation = activation.clone()
                for name in names:
                    index = slice(None) if place(name)[1] == "mlp" else head_of(name)
                    activation[..., index, :] = heard[name].flatten(0, 1)
                return activation

            return hook

        hooks = [(models.hook_name(*where), edit(names)) for where, names in by_hook.items()]
        with torch.no_grad():
            stream = models.run_with_hooks(self.model, self.tokens.repeat(n, 1), hooks, stop_at_layer=self.n_layers)
        return stream.unflatten(0, (n, -1))


def _put(value: Tensor) -> Callable:
    return lambda activation, hook: value


def _put_rows(value: Tensor, rows: Tensor) -> Callable:
    rows = rows.to(value.device)[:, None, None]
    return lambda activation, hook: torch.where(rows, value, activation)


def _listen(names: Sequence[str], heard: dict[str, Tensor], n: int) -> Callable:
    def hook(activation: Tensor, hook: Any) -> None:
        for name in names:
            here = activation if place(name)[1] == "mlp" else activation[:, :, head_of(name)]
            heard[name] = here.detach().unflatten(0, (n, -1)).clone()

    return hook


# ------------------------------------------------------------------------------------------------------------- names


def _output(sender: str) -> tuple[tuple[str, int], int | slice]:
    """(site, layer) of what a sender writes, and which head of it."""
    layer, kind = place(sender)
    if kind == "head":
        return ("z", layer), head_of(sender)
    return (("resid_pre", 0) if kind == "embed" else ("mlp_out", layer)), slice(None)


def _input(receiver: str) -> tuple[str, int]:
    """(site, layer) of what a receiver reads."""
    layer, kind = place(receiver)
    return ("resid_mid" if kind == "mlp" else receiver[-1]), layer


def _time(name: str, n_layers: int = 10**6) -> tuple[int, int]:
    """When it is computed: layers count up, a layer's heads come before its MLP."""
    layer, kind = place(name)
    return (n_layers, 0) if kind == "logits" else (layer, 1 if kind == "mlp" else 0)


def _is_after(receivers: Sequence[str], senders: Sequence[str]) -> bool:
    return any(_time(receiver) > _time(sender) for receiver in receivers for sender in senders)


def _groups(model: Any, given: Groups, what: str) -> dict[str, tuple[str, ...]]:
    """Name of each set to its members, checked."""
    if isinstance(given, str):
        given = [given]
    groups = given if isinstance(given, Mapping) else {name: [name] for name in given}
    groups = {name: tuple([group] if isinstance(group, str) else group) for name, group in groups.items()}
    if not groups or not all(groups.values()):
        raise ValueError(f"No {what} given.")
    shape = models.info(model).shape
    for name in (name for group in groups.values() for name in group):
        layer, kind = place(name)
        heads = shape.n_kv_heads if name.endswith((".k", ".v")) else shape.n_heads
        if layer >= shape.n_layers or (kind == "head" and head_of(name) >= heads):
            raise ValueError(f"{models.info(model).name} has no {name}: {shape.n_layers} layers of {heads} heads.")
        if what == "senders" and (kind == "logits" or owner(name) != name):
            raise ValueError(f"{name} cannot send: senders are heads (L5H3), MLPs (mlp L5) and embed.")
        if what == "receivers" and (kind == "embed" or (kind == "head" and owner(name) == name)):
            channels = ", ".join(f"{owner(name)}.{channel}" for channel in CHANNELS)
            raise ValueError(f"{name} cannot receive: receivers are inputs of heads ({channels}), MLPs and logits.")
    return groups
