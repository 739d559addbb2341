"""Activation patching: put activations of one run into another and see how much of the behaviour comes with them.

``patch_sweep`` goes over places one at a time, ``ablate`` takes a set of components out at once. Both check, ask
``mi_utils.engine`` for the runs, and label the result.

Source: Heimersheim and Nanda 2024, "How to use and interpret activation patching"; Wang et al. 2022 (IOI).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mi_utils import engine, metrics, models
from mi_utils.compute import ModelShape
from mi_utils.engine import UNITS, Edits, Limits, Pass, PlainHooks, Run, SweepPlan, plan_cells
from mi_utils.prompts import PromptPairs
from mi_utils.results import NothingChanged, check_gap, check_mode, labelled, numpy

if TYPE_CHECKING:
    import xarray as xr

REPLACEMENTS = ("other", "mean", "resample", "zero")


# ---------------------------------------------------------------------------------------------------- saved sweeps


class _SavedPasses:
    """Finished passes, a JSON line each under a header line; a line that was cut off by a kill is dropped.

    The header names the sweep. The two baselines stand there too and are compared with a tolerance: they tell apart
    metrics of the same name (two lambdas, say) without refusing a resumption for the sake of rounding.
    """

    def __init__(
        self, path: str | Path | None, fingerprint: str, limits: Limits, clean: np.ndarray, corrupted: np.ndarray
    ) -> None:
        self.path = None if path is None else Path(path)
        self.done: dict[int, dict] = {}
        if self.path is None:
            return
        text = self.path.read_text() if self.path.exists() else ""
        whole = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
        if text and not self._same(whole[:1], fingerprint, clean, corrupted):
            raise ValueError(
                f"{self.path} holds another sweep (other model, prompts, site, axes, mode, metric or batch size) or no "
                "sweep at all. Give this sweep a path of its own, or delete the file."
            )
        self.done = {entry["pass"]: entry for entry in map(json.loads, whole[1:])}
        header = {
            "patch_sweep": fingerprint, "limits": asdict(limits), "clean": clean.tolist(),
            "corrupted": corrupted.tolist(),
        }  # fmt: skip
        keep = "".join(whole) or json.dumps(header) + "\n"
        if keep != text:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            beside = self.path.with_name(self.path.name + ".tmp")
            beside.write_text(keep)
            beside.replace(self.path)

    @staticmethod
    def limits(path: str | Path | None) -> Limits | None:
        """Those of the sweep that the file holds; None where it holds none."""
        if path is None or not Path(path).exists():
            return None
        try:
            with Path(path).open() as file:
                return Limits(**json.loads(file.readline())["limits"])
        except (ValueError, KeyError, TypeError):  # someone else's file: refused later
            return None

    @staticmethod
    def _same(first: list[str], fingerprint: str, clean: np.ndarray, corrupted: np.ndarray) -> bool:
        try:
            header = json.loads("".join(first))
        except ValueError:  # someone else's file
            return False
        return (
            isinstance(header, dict)
            and header.get("patch_sweep") == fingerprint
            and all(
                np.allclose(header[name], values, rtol=1e-3, atol=1e-3)
                for name, values in (("clean", clean), ("corrupted", corrupted))
            )
        )

    def add(self, entry: dict) -> None:
        self.done[entry["pass"]] = entry
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(entry) + "\n")


def _fingerprint(model: Any, pairs: PromptPairs, plan: SweepPlan, factory: Callable, *settings: str) -> str:
    """Hash of all that decides a sweep's numbers: weights (sampled), tokens, answers, plan, metric and settings."""
    info = models.info(model)
    about = (info.name, info.processing, info.dtype, plan.over, plan.sizes, settings)
    digest = hashlib.sha256(repr(about).encode())
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, len(flat) // 64)].float().cpu().numpy()
        digest.update(name.encode() + sample.tobytes())
    for tensor in (pairs.clean_tokens, pairs.corrupted_tokens, pairs.correct_ids, pairs.incorrect_ids):
        digest.update(torch.as_tensor(tensor).cpu().numpy().tobytes())
    for each in plan.passes:
        digest.update(np.int64(each.start).tobytes() + each.rows.tobytes())
    # Two functions may have one name: ask what the metric says of logits in which the answer is ever likelier.
    some, generator = pairs[: min(8, len(pairs))], torch.Generator().manual_seed(0)
    metric, rows = factory(some), torch.arange(min(8, len(pairs)))
    for lift in range(16):
        logits = torch.randn(len(rows), 1, info.shape.d_vocab, generator=generator)
        logits[rows, 0, some.correct_ids.cpu()] += lift
        digest.update(np.round(numpy(metric(logits.to(info.device))), 3).tobytes())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------- one sweep at work


@dataclass
class Receipt:
    """What an intervention did to the activations, row by row, counted while it happened."""

    elements: Int[Tensor, " row"]
    change: Float[Tensor, " row"]

    @classmethod
    def empty(cls, n_rows: int, device: torch.device | str) -> Receipt:
        """Of ``n_rows`` interventions that have not happened yet."""
        return cls(torch.zeros(n_rows, dtype=torch.long, device=device), torch.zeros(n_rows, device=device))

    def add(self, rows: Int[Tensor, " edited"], before: Tensor, after: Tensor) -> None:
        """Count one edit of these rows."""
        difference = (after.float() - before.float()).abs().flatten(1)
        self.elements[rows] += (difference > 0).sum(1)
        self.change[rows] += difference.sum(1)


@dataclass
class _Sweep:
    """The two runs of a sweep and what is put where."""

    engine: Any
    site: str
    over: tuple[str, ...]
    base_tokens: Int[Tensor, "prompt pos"]
    other_tokens: Int[Tensor, "prompt pos"]
    replace: str
    n_layers: int
    seed: int
    mean: dict[int, Tensor] | None = None  # over all prompts, when all have been seen

    def runs(self, block: slice) -> tuple[Run, Run]:
        """The unpatched runs of some prompts."""
        base, other = self.base_tokens[block], self.other_tokens[block]
        keep = [(self.site, layer) for layer in range(self.n_layers)]
        return self.engine.run_pair(base, other, keep, self.shared(block))

    def shared(self, block: slice) -> int:
        """How many positions at the beginning no patch can change."""
        if self.replace != "other" or isinstance(self.engine, PlainHooks):
            return 0
        return int((self.base_tokens[block] != self.other_tokens[block]).any(0).float().argmax())

    def source(self, base: Run, other: Run) -> list[Float[Tensor, "prompt pos unit feature"]]:
        """What is put in, a tensor a layer."""
        if self.replace == "other":
            return [other.activations[self.site, layer] for layer in range(self.n_layers)]
        there = [base.activations[self.site, layer] for layer in range(self.n_layers)]
        if self.replace == "zero":
            return [torch.zeros_like(each) for each in there]
        if self.replace == "mean":
            return [self.mean[layer].expand_as(each) for layer, each in enumerate(there)]
        another = _another(len(base.tokens), self.seed).to(base.tokens.device)
        return [each[another] for each in there]

    def changed(self, base: Run, other: Run, source: list[Tensor]) -> Bool[np.ndarray, "prompt layer pos unit"]:
        """Where what is put in differs from what is there. Before the first token that differs, it cannot (attention
        looks back only), whatever rounding in kernels of another batch shape may say."""
        by_unit = UNITS.get(self.site) in self.over
        tables = []
        for layer, new in enumerate(source):
            differs = (new != base.activations[self.site, layer]).any(-1)
            tables.append((differs if by_unit else differs.any(-1, keepdim=True)).cpu().numpy())
        table = np.stack(tables, axis=1)
        table = np.pad(table, [(0, 0), (0, 0), (base.start, 0), (0, 0)])
        if self.replace == "other":
            table &= _reached(base.tokens, other.tokens)[:, None, :, None]
        return table

    def edits(self, chunk: Pass, base: Run, source: list[Tensor], first: int, receipt: Receipt) -> Edits:
        """The edits of one pass. ``first`` is the number of the first prompt of ``base``."""
        device = base.tokens.device
        columns = {axis: torch.from_numpy(chunk.rows[:, 1 + i]).to(device) for i, axis in enumerate(self.over)}
        prompts = torch.from_numpy(chunk.rows[:, 0] - first).to(device)
        unit = UNITS.get(self.site, "unit")

        def edit(layer: int, rows: Tensor) -> Callable[[Tensor], None]:
            def place(begin: int) -> tuple:
                """Index of what is edited, in an activation whose positions begin with ``begin``."""
                pos = columns["pos"][rows] - begin if "pos" in columns else slice(chunk.start - begin, None)
                return (pos, columns[unit][rows]) if unit in columns else (pos,)

            def put(activation: Tensor) -> None:
                here = (rows, *place(chunk.start))
                before, after = activation[here], source[layer][prompts[rows], *place(base.start)]
                activation[here] = after
                receipt.add(rows, before, after)

            return put

        edits: Edits = {}
        for layer in range(int(chunk.layers[0]), self.n_layers):
            rows = chunk.layers == layer if "layer" in self.over else chunk.layers <= layer
            if rows.any():
                edits[self.site, layer] = edit(layer, torch.from_numpy(np.flatnonzero(rows)).to(device))
        return edits


def _another(n: int, seed: int) -> Int[Tensor, " prompt"]:
    """For each prompt another one: a single cycle, so that none gets its own activations."""
    order = np.random.default_rng(seed).permutation(n)
    other = np.empty_like(order)
    other[order] = np.roll(order, 1)
    return torch.from_numpy(other)


def _reached(base: Int[Tensor, "prompt pos"], other: Int[Tensor, "prompt pos"]) -> Bool[np.ndarray, "prompt pos"]:
    """The positions from the first different token on."""
    return (base != other).cumsum(dim=1).bool().cpu().numpy()


# ----------------------------------------------------------------------------------------------------- public calls


def plan_sweep(
    model: Any,
    pairs: PromptPairs,
    site: str,
    over: Sequence[str],
    *,
    metric: str | Callable = "logit_diff",
    replace: str = "other",
    batch_size: int | None = None,
) -> SweepPlan:
    """What ``patch_sweep`` with the same arguments will run and cost, read off the tokens before anything runs.

    It takes for granted that every activation that can differ does. Where some do not (a head that writes nothing),
    the sweep itself runs less.

    Raises:
        ValueError: a wrong argument.
    """
    over = _axes(over)
    _check_arguments(site, over, None, replace, batch_size, len(pairs))
    shape = models.info(model).shape
    reached = np.ones(pairs.differs.shape, dtype=bool)
    if replace == "other":
        reached = _reached(*_both(pairs))
    n_units = {"k": shape.n_kv_heads, "v": shape.n_kv_heads, "mlp_post": shape.d_mlp}.get(site, shape.n_heads)
    changed = np.repeat(reached[:, None], shape.n_layers, axis=1)
    if replace == "other" and site in ("resid_pre", "q", "k", "v"):  # in layer 0 they have seen one token only
        changed[:, 0] = pairs.differs.cpu().numpy()
    changed = np.repeat(changed[..., None], n_units if UNITS.get(site) in over else 1, axis=3)
    return plan_cells(
        changed, over, site, shape, _model_limits(model, pairs, site, batch_size),
        shared=int(reached.any(0).argmax()), dtype=models.info(model).dtype,
        unembedded=_unembedded(metrics.resolve(metric)[0], pairs, shape),
    )  # fmt: skip


def patch_sweep(
    model: Any,
    pairs: PromptPairs,
    site: str,
    over: Sequence[str],
    *,
    mode: str | None = None,
    metric: str | Callable = "logit_diff",
    replace: str = "other",
    batch_size: int | None = None,
    progress: bool = True,
    save: str | Path | None = None,
    seed: int = 0,
) -> xr.DataArray:
    """Patch one place at a time, everywhere, and measure how far the answer moves.

    Exact: each cell is a run of the model with that one place changed. Only what the change cannot reach is taken
    from the unpatched run (the layers below, the positions before), many cells share a pass, and cells in which
    nothing differs are not run at all. Models for which that does not hold are run whole, with a ``SlowPath`` warning.

    Args:
        model: from ``load_model``.
        pairs: the clean and corrupted prompts.
        site: resid_pre, resid_mid, resid_post, attn_out, mlp_out, q, k, v, z, pattern or mlp_post. ``pos`` on a
            pattern is the query's position.
        over: which axes to step along, of "layer", "pos", "head" (where the site has heads) and "neuron" (mlp_post).
            On the others everything is patched at once.
        mode: "denoising", the default, puts clean activations into the corrupted run (what is enough to bring the
            answer back?), "noising" corrupted ones into the clean run (what is needed for it?).
        metric: a name in ``METRICS``, or a function that takes pairs and returns a function from logits
            ``[prompt, 1, d_vocab]``, those of the last position, to values ``[prompt]``. One that declares its columns,
            as ``LogitDiff`` does, is cheaper: the rest of the vocabulary is not computed.
        replace: what is put in. "other": the activation of the other run. Or an ablation of the clean run, without a
            ``mode``: "mean" of these prompts at the same position, "resample" (the activation on another of these
            prompts, drawn with ``seed``), "zero".
        batch_size: patched prompts in one pass; by default what the device runs best and its memory holds.
        save: a file for finished passes. A killed sweep, called again, goes on from there to the identical result.

    Returns:
        Dims prompt, then ``over`` in the order given. Per prompt (patched - corrupted) / (clean - corrupted): 0 is
        the corrupted run, 1 the clean run, in all modes. Coordinates ``clean`` and ``corrupted`` hold the metric of
        the two runs, ``token`` the labels of positions; ``n_changed`` and ``mean_change`` the receipt of each cell:
        how many elements the intervention changed, and by how much on average (0 where it was not run because
        nothing differs there). The attributes hold the sums ``elements_changed``, ``mean_change``, ``skipped_cells``
        and the number of passes.

    What it does not show: a cell near 0 may still matter when another part does the same work (backup heads), and
    an effect of 1 says that the information passes there, not that it is computed there.

    Raises:
        ValueError: a wrong argument, or a saved file that holds another sweep.
        NothingChanged: there is nothing to patch at this site, or patching left everything as it was.
    """
    over = _axes(over)
    _check_arguments(site, over, mode, replace, batch_size, len(pairs))
    pairs.check_model(model)
    factory, metric_name = metrics.resolve(metric)
    info = models.info(model)
    mode = (mode or "denoising") if replace == "other" else "ablation"
    clean_tokens, corrupted_tokens = _both(pairs)
    base_tokens, other_tokens = (
        (corrupted_tokens, clean_tokens) if mode == "denoising" else (clean_tokens, corrupted_tokens)
    )
    runner = engine.choose(model, base_tokens, other_tokens, [site])
    sweep = _Sweep(runner, site, over, base_tokens, other_tokens, replace, info.shape.n_layers, seed)
    limits = _model_limits(model, pairs, site, batch_size)
    begun = _SavedPasses.limits(save)
    if begun and begun.rows == limits.rows:
        limits = begun  # the memory that is free now must not change a sweep that has begun

    # First the unpatched runs, by blocks of prompts that memory holds: baselines, and what there is to patch.
    blocks = [slice(i, i + limits.prompts) for i in range(0, len(pairs), limits.prompts)]
    if replace == "mean":
        sweep.mean = _mean_over(sweep, blocks)
    baselines, tables, prepared = ([], []), [], None
    for block in blocks:
        base, other = sweep.runs(block)
        for values, run in zip(baselines, (base, other), strict=True):
            values.append(_measure(runner, factory, pairs[block], run.last))
        source = sweep.source(base, other)
        tables.append(sweep.changed(base, other, source))
        prepared = (block, base, source)
    base_values, other_values = (np.concatenate(values) for values in baselines)
    clean, corrupted = (other_values, base_values) if mode == "denoising" else (base_values, other_values)
    gap = check_gap(clean, corrupted, metric_name)

    plan = plan_cells(
        np.concatenate(tables), over, site, info.shape, limits, shared=base.start,
        whole=isinstance(runner, PlainHooks), dtype=info.dtype,
        unembedded=_unembedded(factory, pairs, info.shape),
    )  # fmt: skip
    if not plan.n_rows:
        raise NothingChanged(
            f"What is to be put in at {site} is what stands there already, everywhere: there is nothing to patch. "
            "Choose another site, or prompts that differ before the last token."
        )
    fingerprint = _fingerprint(model, pairs, plan, factory, site, mode, replace, str(seed), metric_name) if save else ""
    saved = _SavedPasses(save, fingerprint, limits, clean, corrupted)
    for number, chunk in _with_progress(plan, f"patching {site}", progress):
        if number in saved.done:
            continue
        block = next(each for each in blocks if each.start <= chunk.rows[0, 0] < each.stop)
        if block != prepared[0]:
            runs = sweep.runs(block)
            prepared = (block, runs[0], sweep.source(*runs))
        _, base, source = prepared
        receipt = Receipt.empty(len(chunk.rows), base_tokens.device)
        edits = sweep.edits(chunk, base, source, block.start, receipt)
        prompts = torch.from_numpy(chunk.rows[:, 0] - block.start).to(base_tokens.device)
        join = chunk.layers + (site == "resid_post")
        last = runner.patched(base, prompts, join, chunk.start, edits)
        values = _measure(runner, factory, pairs[chunk.rows[:, 0].tolist()], last)
        elements, change = (numpy(each).tolist() for each in (receipt.elements, receipt.change))
        saved.add({"pass": number, "values": values.tolist(), "elements": elements, "change": change})

    effect = np.broadcast_to(
        ((base_values - corrupted) / gap).reshape(-1, *[1] * len(over)), plan.shape
    ).copy()  # a cell that changes nothing leaves the base run as it is
    elements, change = np.zeros(plan.shape, dtype=int), np.zeros(plan.shape)
    for number, chunk in enumerate(plan.passes):
        entry, cells, prompts = saved.done[number], tuple(chunk.rows.T), chunk.rows[:, 0]
        effect[cells] = (np.asarray(entry["values"]) - corrupted[prompts]) / gap[prompts]
        elements[cells], change[cells] = entry["elements"], entry["change"]
    if not elements.any():
        raise NothingChanged(f"No patch at {site} changed any activation: the interventions never took place.")
    dims = ("prompt", *over)
    return _labelled(
        effect, model, pairs, clean, corrupted, over=over, site=site, mode=mode, replace=replace, metric=metric_name,
        skipped_cells=plan.skipped, n_passes=plan.n_passes,
        elements_changed=int(elements.sum()), mean_change=float(change.sum() / elements.sum()),
    ).assign_coords(
        n_changed=(dims, elements), mean_change=(dims, change / np.maximum(elements, 1))
    )  # fmt: skip


def ablate(
    model: Any,
    pairs: PromptPairs,
    components: Sequence[tuple[int, int] | str],
    kind: str = "mean",
    *,
    metric: str | Callable = "logit_diff",
    seed: int = 0,
) -> xr.DataArray:
    """Take a set of components out of the clean run, all at once, and measure what is left of the answer.

    Args:
        components: heads as (layer, head); or labels as ``direct_logit_attribution`` writes them, "L5H3", "attn L5"
            (all of a layer's attention) and "mlp L5".
        kind: what stands in for a component's activation (a head's z, what the others write), at every position:
            "zero"; "mean" over these prompts at the same position; "resample", the activation on another of these
            prompts, drawn with ``seed``; "corrupted", that on the corrupted prompt (noising of the whole set: only
            what distinguishes the two runs is taken away, so this is the kind that reaches 0 where the set carries
            all of it). Zero is far from anything the model has seen and tends to overstate; report mean or resample
            beside it. It is also not the same on folded weights, where the values' biases are no longer part of z.

    Returns:
        Dims (prompt,): 1 = as the clean run, 0 = as the corrupted run (below 0 is possible). Coordinates ``raw`` (the
        metric after ablation), ``clean`` and ``corrupted``; the receipt in the attributes.

    Raises:
        ValueError: no components, one that the model has not, an unknown kind, too few prompts for the kind.
        NothingChanged: they write the same with and without ablation (a dead head, identical prompts).
    """
    shape = models.info(model).shape
    places = _places(components, shape)
    if kind not in ("zero", "mean", "resample", "corrupted"):
        raise ValueError(f"Unknown kind of ablation {kind!r}: use 'zero', 'mean', 'resample' or 'corrupted'.")
    if kind in ("mean", "resample") and len(pairs) < 2:
        raise ValueError(f"{kind} ablation draws on other prompts, and there is only one. Give more, or use 'zero'.")
    pairs.check_model(model)
    factory, metric_name = metrics.resolve(metric)
    clean_tokens, corrupted_tokens = _both(pairs)
    runner = engine.choose(model, clean_tokens, corrupted_tokens, sorted({site for site, _ in places}))
    size = max(1, engine.TOKENS["cpu" if clean_tokens.device.type == "cpu" else "cuda"] // clean_tokens.shape[1])
    blocks = [slice(i, i + size) for i in range(0, len(pairs), size)]
    first = min(layer for _, layer in places)

    bases, there, clean, corrupted = [], {place: [] for place in places}, [], []
    for block in blocks:
        base, _ = runner.run_pair(clean_tokens[block], None, places)
        other, _ = runner.run_pair(corrupted_tokens[block], None, places)
        clean.append(_measure(runner, factory, pairs[block], base.last))
        corrupted.append(_measure(runner, factory, pairs[block], other.last))
        for place, parts in there.items():
            parts.append((other if kind == "corrupted" else base).activations[place])
        bases.append(Run(base.tokens, 0, base.last, stream={first: base.stream.get(first)}))
    clean, corrupted = np.concatenate(clean), np.concatenate(corrupted)
    gap = check_gap(clean, corrupted, metric_name)
    stand_in = {place: _stand_in(torch.cat(parts), kind, seed) for place, parts in there.items()}

    elements, change, raw = 0, 0.0, []
    for block, base in zip(blocks, bases, strict=True):
        rows = torch.arange(len(base.tokens), device=clean_tokens.device)
        receipt = Receipt.empty(len(rows), clean_tokens.device)

        def edit(place: tuple[str, int], block: slice = block, rows: Tensor = rows, receipt: Receipt = receipt) -> Any:
            units = places[place]

            def put(activation: Tensor) -> None:
                before = activation[:, :, units]
                activation[:, :, units] = stand_in[place][block][:, :, units]
                receipt.add(rows, before, activation[:, :, units])

            return put

        last = runner.patched(base, rows, [first] * len(rows), 0, {place: edit(place) for place in places})
        raw.append(_measure(runner, factory, pairs[block], last))
        elements += int(receipt.elements.sum())
        change += float(receipt.change.sum())
    labels = [each if isinstance(each, str) else f"L{each[0]}H{each[1]}" for each in components]
    if not elements:
        raise NothingChanged(f"{kind} ablation of {', '.join(labels)} changed no activation: they write that already.")
    raw = np.concatenate(raw)
    return _labelled(
        (raw - corrupted) / gap, model, pairs, clean, corrupted, over=(), site="z" if _all_heads(places) else "mixed",
        mode="ablation", kind=kind, metric=metric_name, heads=labels, ablation_seed=seed, elements_changed=elements,
        mean_change=change / elements,
    ).assign_coords(raw=("prompt", raw))  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- details


def _axes(over: Sequence[str] | str) -> tuple[str, ...]:
    return (over,) if isinstance(over, str) else tuple(over)


def _check_arguments(
    site: str, over: tuple[str, ...], mode: str | None, replace: str, batch_size: int | None, n_prompts: int
) -> None:
    engine.check_axes(site, over)
    if replace not in REPLACEMENTS:
        raise ValueError(f"Unknown replacement {replace!r}: use {', '.join(REPLACEMENTS)}.")
    if mode is not None:
        check_mode(mode)
    if mode and replace != "other":
        raise ValueError(f"replace={replace!r} ablates the clean run; mode={mode!r} is for replace='other'.")
    if replace in ("mean", "resample") and n_prompts < 2:
        raise ValueError(f"{replace} ablation draws on other prompts, and there is only one. Give more, or use 'zero'.")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}.")


def _places(components: Sequence[tuple[int, int] | str], shape: ModelShape) -> dict[tuple[str, int], list[int]]:
    """(site, layer) to the units that are taken out there: heads of z, or the whole of what is written."""
    if isinstance(components, str) or not len(components):
        raise ValueError("No components given: nothing to ablate.")
    places: dict[tuple[str, int], list[int]] = {}
    missing = []
    for each in components:
        if isinstance(each, str):
            found = re.fullmatch(r"L(\d+)H(\d+)|(attn|mlp) L(\d+)", each)
            if not found:
                raise ValueError(f"Unknown component {each!r}: write 'L5H3', 'attn L5' or 'mlp L5'.")
            layer, head, kind, whole = found.groups()
            place, unit = (("z", int(layer)), int(head)) if kind is None else ((f"{kind}_out", int(whole)), 0)
        else:
            place, unit = ("z", int(each[0])), int(each[1])
        if not (0 <= place[1] < shape.n_layers and 0 <= unit < (shape.n_heads if place[0] == "z" else 1)):
            missing.append(each)
        if unit not in places.setdefault(place, []):
            places[place].append(unit)
    if missing:
        raise ValueError(
            f"The model has no heads or layers {missing}: it has {shape.n_layers} layers of {shape.n_heads} heads, "
            "from 0."
        )
    return places


def _all_heads(places: dict[tuple[str, int], list[int]]) -> bool:
    return all(site == "z" for site, _ in places)


def _stand_in(there: Float[Tensor, "prompt pos unit feature"], kind: str, seed: int) -> Tensor:
    if kind == "zero":
        return torch.zeros_like(there)
    if kind == "mean":
        return there.mean(dim=0, keepdim=True).expand_as(there)
    return there[_another(len(there), seed).to(there.device)] if kind == "resample" else there


def _mean_over(sweep: _Sweep, blocks: list[slice]) -> dict[int, Tensor]:
    """Mean activation of each layer over all prompts of the base run."""
    total: dict[int, Tensor] = {}
    for block in blocks:
        base, _ = sweep.runs(block)
        for (_, layer), activation in base.activations.items():
            wide = torch.promote_types(activation.dtype, torch.float32)  # sums overflow in half precision
            total[layer] = total.get(layer, 0) + activation.sum(dim=0, keepdim=True, dtype=wide)
            narrow = activation.dtype
    return {layer: (each / len(sweep.base_tokens)).to(narrow) for layer, each in total.items()}


def _unembedded(factory: Callable, pairs: PromptPairs, shape: ModelShape) -> int:
    """How many columns of the unembedding a metric needs."""
    columns = getattr(factory(pairs), "columns", None)
    return shape.d_vocab if columns is None else columns.shape[1]


def _measure(runner: Any, factory: Callable, pairs: PromptPairs, last: Tensor) -> Float[np.ndarray, " prompt"]:
    """The metric at the last position, from no more of the unembedding than it needs."""
    metric = factory(pairs)
    columns = getattr(metric, "columns", None)
    if columns is None:
        return numpy(metric(runner.logits(last)[:, None]))
    return numpy(metric.of_columns(runner.logits(last, columns)))


def _both(pairs: PromptPairs) -> tuple[Tensor, Tensor]:
    return pairs.clean_tokens, pairs.corrupted_tokens


def _model_limits(model: Any, pairs: PromptPairs, site: str, batch_size: int | None) -> Limits:
    tokens, info = pairs.clean_tokens, models.info(model)
    return engine.limits_for(info.shape, *tokens.shape, tokens.device, info.dtype, site, batch_size)


def _with_progress(plan: SweepPlan, title: str, progress: bool) -> Iterator[tuple[int, Pass]]:
    from tqdm import tqdm

    with tqdm(total=plan.n_rows, desc=title, unit="cell", disable=not progress, leave=False, delay=5) as bar:
        for number, chunk in enumerate(plan.passes):
            yield number, chunk
            bar.update(len(chunk.rows))


def _labelled(
    effect: np.ndarray, model: Any, pairs: PromptPairs, clean: np.ndarray, corrupted: np.ndarray,
    over: tuple[str, ...], **attrs: Any,
) -> xr.DataArray:  # fmt: skip
    coords: dict[str, Any] = {axis: np.arange(size) for axis, size in zip(over, effect.shape[1:], strict=True)}
    if "pos" in over:
        coords["token"] = ("pos", list(pairs.position_labels))
    return labelled(effect, ("prompt", *over), model, pairs, coords, clean, corrupted, name="effect", **attrs)
