"""Running a model again and again with small changes, without computing again what does not change.

Two parts. The planner (``plan_cells``) is arithmetic on a table of what a sweep changes: it drops the cells that cannot
have an effect, puts those that begin at one position into one pass, and says what that costs. The executor runs a pass.

A patched run equals the unpatched one before the patched layer, and before the patched position too, because
attention looks back only. ``Blocks`` uses both: it calls the model's own blocks from the layer on, for the positions
from there on, with keys and values of the positions before taken from the unpatched run. ``PlainHooks`` runs the whole
model with hooks and is what ``Blocks`` is measured by: :func:`choose` compares the two on the prompts at hand before
``Blocks`` is trusted.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mi_utils import models
from mi_utils.compute import BYTES, ModelShape, available_memory, block_flops, estimate_memory

AXES = ("layer", "pos", "head", "neuron")
UNITS = {site: "head" for site in ("q", "k", "v", "z", "pattern")} | {"mlp_post": "neuron"}
Place = tuple[str, int]  # site, layer
# An edit changes, in place, an activation [row, pos, unit, feature] that holds all rows that have joined so far.
Edits = dict[Place, Callable[[Tensor], None]]


class SlowPath(UserWarning):
    """The fast path does not hold for this model and site; results are right, and take longer."""


def check_axes(site: str, over: tuple[str, ...], axes: Sequence[str] = AXES) -> None:
    """Raises ValueError for an unknown site, and for axes that are unknown, named twice, or not of this site."""
    models.hook_name(site, 0)  # names the sites there are
    if unknown := [axis for axis in over if axis not in axes]:
        raise ValueError(f"Cannot patch over {unknown}: the axes are {', '.join(axes)}.")
    if len(set(over)) < len(over):
        raise ValueError(f"An axis stands twice in over={over}.")
    for unit in ("head", "neuron"):
        if unit in over and UNITS.get(site) != unit:
            there = ", ".join(each for each, kind in UNITS.items() if kind == unit)
            raise ValueError(f"{site} has no {unit}s to go over; sites with {unit}s are {there}.")


def by_unit(site: str, activation: Tensor) -> Float[Tensor, "prompt pos unit feature"]:
    """One layout for every site (a view): units are heads or neurons, or one; patterns go by query position."""
    if site == "pattern":
        return activation.transpose(1, 2)
    if site == "mlp_post":
        return activation.unsqueeze(-1)
    return activation if site in UNITS else activation.unsqueeze(2)


# ---------------------------------------------------------------------------------------------------------- planner


@dataclass(frozen=True)
class Limits:
    """How much goes into one pass, and what a pass costs beside its arithmetic. See ``limits_for``."""

    tokens: int  # in one pass
    prompts: int  # whose unpatched runs are held at a time
    rows: int | None  # in one pass, where the caller said so
    overhead: float  # FLOPs that one more pass over one layer is worth


@dataclass(frozen=True)
class Pass:
    """Rows that run together, from position ``start`` on. Row r joins at ``layers[r]``, in ascending order."""

    start: int
    rows: Int[np.ndarray, "row cell"]  # the prompt, then the place on each axis of ``over``
    layers: Int[np.ndarray, " row"]  # the first layer that the row patches


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep runs. FLOPs count a multiply-add as two.

    ``flops`` is what the plan does, unpatched runs and unembedding included; ``flops_bound`` what nobody can do
    without: every row from its own layer, place in the block and position on. ``nbytes`` is the peak beside the
    weights.
    """

    over: tuple[str, ...]
    sizes: dict[str, int]
    passes: tuple[Pass, ...]
    flops: float
    flops_bound: float
    nbytes: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the result: prompts, then the axes of ``over``."""
        return tuple(self.sizes[axis] for axis in ("prompt", *self.over))

    @property
    def n_rows(self) -> int:
        """Number of patched runs."""
        return sum(len(each.rows) for each in self.passes)

    @property
    def n_passes(self) -> int:
        """Number of passes over the model that they are packed into; the unpatched runs come on top."""
        return len(self.passes)

    @property
    def skipped(self) -> int:
        """Number of cells whose effect is known without running them."""
        return int(np.prod(self.shape)) - self.n_rows


def plan_cells(
    changed: Bool[np.ndarray, "prompt layer pos unit"],
    over: Sequence[str],
    site: str,
    shape: ModelShape,
    limits: Limits,
    *,
    shared: int = 0,
    whole: bool = False,
    dtype: str = "float32",
    unembedded: int = 2,
) -> SweepPlan:
    """Decide what a sweep has to run. Pure: it looks at no model.

    Args:
        changed: where the patch differs from what is there. A cell in which nothing differs, or from which nothing
            reaches the last position, is an exact no-op and is left out; a row starts at its first layer and position
            that differ. Units are heads or neurons.
        shared: positions that the two unpatched runs have in common.
        whole: for plain hooks, which run the whole model every time.
        unembedded: columns of the unembedding that the metric needs.
    """
    over = tuple(over)
    axes = ("layer", "pos", UNITS.get(site, "unit"))
    if site not in ("resid_pre", "k", "v"):  # what stands elsewhere in the last layer never reaches the last position
        changed = changed.copy()
        changed[:, -1, :-1] = False
    sizes = dict(zip(("prompt", *axes), changed.shape, strict=True))
    n_layers, n_tokens = sizes["layer"], sizes["pos"]
    active = changed.any(axis=tuple(1 + i for i, axis in enumerate(axes) if axis not in over))
    stepped = [axis for axis in axes if axis in over]  # the axes that are left, in their own order
    rows = np.argwhere(active.transpose(0, *(1 + stepped.index(axis) for axis in over)))

    def first(axis: str) -> Int[np.ndarray, " row"]:
        if axis in over:
            return rows[:, 1 + over.index(axis)]
        others = tuple(1 + i for i, other in enumerate(axes) if other not in over and other != axis)
        at = [axis if each == axis else each for each in axes if each in over or each == axis].index(axis)
        index = (rows[:, 0], *(rows[:, 1 + over.index(each)] for each in stepped))
        return changed.any(axis=others).argmax(axis=1 + at)[index]

    layers, starts = first("layer"), first("pos")
    join = layers + (site == "resid_post")
    if whole:
        starts_run, join_run = np.zeros_like(starts), np.zeros_like(join)
    else:
        starts_run, join_run = starts, join

    token = block_flops(shape, n_tokens)
    qkv = token - block_flops(shape, n_tokens, after="q")
    passes, flops = [], 0.0
    for block in range(0, sizes["prompt"], limits.prompts):
        inside = np.flatnonzero((rows[:, 0] >= block) & (rows[:, 0] < block + limits.prompts))
        for start, members in _groups(inside, starts_run, n_layers - join_run, n_tokens, token, limits):
            members = members[np.argsort(layers[members], kind="stable")]
            size = _rows_a_pass(limits, n_tokens - start)
            for i in range(0, len(members), size):
                chunk = members[i : i + size]
                passes.append(Pass(int(start), rows[chunk], layers[chunk]))
                length, depth = n_tokens - start, n_layers - join_run[chunk]
                flops += float(depth.sum()) * length * token
                places = [(site, n_layers - 1)] if "layer" not in over or layers[chunk[-1]] == n_layers - 1 else []
                if length > 1 and not whole and ends_short(places, n_layers):
                    flops -= float((depth > 0).sum()) * (length * token - length * qkv - token)

    n_prompts = sizes["prompt"]
    ends = (2 * n_prompts + len(rows)) * 2.0 * shape.d_model * unembedded
    runs = n_prompts * n_layers * token * (shared + 2 * (n_tokens - shared))
    bound = float(_least_flops(shape, site, n_layers - layers, n_tokens - starts, n_tokens).sum())
    return SweepPlan(
        over, sizes, tuple(passes), runs + flops + ends, runs + bound + ends,
        _nbytes(shape, site, passes, min(n_prompts, limits.prompts), n_tokens, shared, dtype),
    )  # fmt: skip


def _nbytes(
    shape: ModelShape, site: str, passes: Sequence[Pass], n_prompts: int, n_tokens: int, shared: int, dtype: str
) -> int:
    """Peak: what is held of the unpatched runs (from position ``shared`` on, and of the positions before it keys and
    values), and the layer at work, of an unpatched run or of the largest pass."""
    position = 2 * shape.n_kv_heads * shape.d_head * BYTES[dtype]  # keys and values of one, in one layer
    held = estimate_memory(
        shape, batch=n_prompts, seq=n_tokens - shared, dtype=dtype, task="patching", site=site
    ).cache + n_prompts * shared * position * shape.n_layers  # fmt: skip

    def at_work(n_rows: int, start: int) -> int:
        layer = estimate_memory(shape, batch=n_rows, seq=n_tokens - start, dtype=dtype).activations
        return layer + (n_rows * n_tokens * position if start else 0)  # those before, joined with the rest

    return held + max(
        at_work(n, start) for n, start in [(n_prompts, shared), *((len(p.rows), p.start) for p in passes)]
    )


def _least_flops(
    shape: ModelShape, site: str, depth: Int[np.ndarray, " row"], length: Int[np.ndarray, " row"], n_tokens: int
) -> Float[np.ndarray, " row"]:
    """What a row cannot do without: the rest of its own layer, the layers above, and of the last one the keys and
    values of all positions but only the last position's output."""
    token, rest = block_flops(shape, n_tokens), block_flops(shape, n_tokens, after=site)
    keys_values = 4.0 * shape.d_model * shape.n_kv_heads * shape.d_head
    own_is_last = depth == 1
    last = (length - 1) * keys_values + (np.where(own_is_last, rest, token))
    return np.where(own_is_last, 0, length * rest) + np.maximum(depth - 2, 0) * length * token + last


def _rows_a_pass(limits: Limits, length: int) -> int:
    return limits.rows or max(1, limits.tokens // length)


def _groups(
    inside: Int[np.ndarray, " row"],
    starts: Int[np.ndarray, " row"],
    depth: Int[np.ndarray, " row"],
    n_tokens: int,
    token: float,
    limits: Limits,
) -> list[tuple[int, Int[np.ndarray, " row"]]]:
    """Rows by start position. Neighbouring positions share passes, from the earlier one on, where the tokens that
    this adds cost less than the passes it saves."""

    def passes(n_rows: int, start: int) -> int:
        return -(-n_rows // _rows_a_pass(limits, n_tokens - start))

    groups: list[tuple[int, np.ndarray]] = []
    for start in np.unique(starts[inside]):
        members = inside[starts[inside] == start]
        if groups:
            before, others = groups[-1]
            added = depth[members].sum() * (start - before) * token
            together = passes(len(others) + len(members), before)
            saved = passes(len(others), before) + passes(len(members), start) - together
            if added <= saved * depth[members].max() * limits.overhead:
                groups[-1] = (before, np.concatenate([others, members]))
                continue
        groups.append((int(start), members))
    return groups


# FLOPs that the fixed cost of one more pass over one layer is worth: launching its kernels, reading its weights.
OVERHEAD = {"cpu": 3e7, "cuda": 3e10}
# On a CPU more tokens fall out of its caches; on a GPU fuller passes mean fewer launches.
TOKENS = {"cpu": 1024, "cuda": 32768}


def limits_for(
    shape: ModelShape, n_prompts: int, n_tokens: int, device: torch.device, dtype: str, site: str, rows: int | None
) -> Limits:
    """What fits in half of the memory that is free: the unpatched runs in one part of it, a pass in the other."""
    free = available_memory(device) // 2
    held = estimate_memory(shape, batch=1, seq=n_tokens, dtype=dtype, task="patching", site=site).cache
    working = estimate_memory(shape, batch=1, seq=n_tokens, dtype=dtype).activations
    kind = "cpu" if device.type == "cpu" else "cuda"
    prompts = max(2, int(free * 0.6 / (held + working)))
    tokens = max(n_tokens, min(TOKENS[kind], int(free * 0.4 / working) * n_tokens))
    return Limits(tokens, min(prompts, n_prompts), rows, OVERHEAD[kind])


# --------------------------------------------------------------------------------------------------------- executors


@dataclass
class Run:
    """An unpatched run: what patched ones take from it. Tensors begin with position ``start``."""

    tokens: Int[Tensor, "prompt pos"]
    start: int
    last: Tensor  # of the last position, for ``logits``: [prompt, d_model], or [prompt, d_vocab] from ``PlainHooks``
    activations: dict[Place, Float[Tensor, "prompt pos unit feature"]] = field(default_factory=dict)
    stream: dict[int, Float[Tensor, "prompt pos d_model"]] = field(default_factory=dict)  # before block l
    past: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # keys, values [prompt, head, pos, d_head]

    @property
    def nbytes(self) -> int:
        """Bytes that the run holds."""
        pairs = (tensor for pair in self.past.values() for tensor in pair)
        held = [self.last, *self.activations.values(), *self.stream.values(), *pairs]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}.values())


class _Enough(Exception):
    """Ends a block whose keys and values were all that is wanted of it."""


class _Past:
    """Stands where a block expects its cache: puts stored keys and values before those it has computed.

    Raises ``_Enough`` as soon as it has the keys and values of layer ``end``.
    """

    def __init__(
        self,
        stored: dict[int, tuple[Tensor, Tensor]],
        until: int,
        record: dict | None = None,
        end: int | None = None,
    ) -> None:
        self.stored, self.until, self.record, self.end = stored, until, record, end
        self.prompts: Int[Tensor, " row"] | None = None  # whose keys and values the rows take; else each row its own

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if self.until:
            pairs = zip(self.stored[layer], (keys, values), strict=True)
            keys, values = (self._joined(stored, new) for stored, new in pairs)
        if self.record is not None:
            self.record[layer] = (keys.contiguous(), values.contiguous())
        if layer == self.end:
            raise _Enough
        return keys, values

    def _joined(self, stored: Tensor, new: Tensor) -> Tensor:
        if stored.shape[2] == self.until:
            return torch.cat([stored, new], dim=2)
        # Whole rows, of which the end is written over: faster than cutting them to length and joining two parts.
        whole = stored.clone() if self.prompts is None else stored.index_select(0, self.prompts)
        whole[:, :, self.until :] = new
        return whole

    def get_seq_length(self, layer: int = 0) -> int:
        return self.until


def ends_short(places: Iterable[Place], n_layers: int) -> bool:
    """Whether the last block may run for the last position alone: not where an edit inside or after it needs more."""
    return not any(layer == n_layers - 1 and site != "resid_pre" for site, layer in places)


class Blocks:
    """The fast path, on prompts of one length."""

    def __init__(self, model: Any, tokens: Int[Tensor, "prompt pos"]) -> None:
        self.model, self.n_tokens = model, tokens.shape[1]
        self.n_layers = models.info(model).shape.n_layers
        self.arguments = models.block_arguments(model, tokens)

    @torch.no_grad()
    def run_pair(
        self,
        base: Int[Tensor, "prompt pos"],
        source: Int[Tensor, "prompt pos"] | None,
        keep: Iterable[Place],
        start: int = 0,
    ) -> tuple[Run, Run | None]:
        """Both unpatched runs, with the activations at ``keep``. Before ``start`` the tokens are the same, so those
        positions are computed once; the rest in batches of one shape, so that what is equal comes out equal."""
        keep, prefix = list(keep), {}
        if start:
            past = _Past({}, 0, record=prefix, end=self.n_layers - 1)
            with suppress(_Enough):
                self._through(self._embed(base)[:, :start], slice(0, start), past)
        return (
            self._run(base, keep, start, prefix, whole=True),
            None if source is None else self._run(source, keep, start, prefix, whole=False),
        )

    def _run(self, tokens: Tensor, keep: list[Place], start: int, prefix: dict, whole: bool) -> Run:
        run = Run(tokens, start, last=tokens)
        past = _Past(prefix, start, record=run.past if whole else None)
        streams = {_boundary(place) for place in keep} if not whole else range(self.n_layers + 1)

        def enter(layer: int, stream: Tensor) -> Tensor:
            if layer in streams:
                run.stream[layer] = stream
            return stream

        def hooks(layer: int, stream: Tensor) -> list:
            return [_keeping(run, place) for place in keep if place[1] == layer and _boundary(place) is None]

        positions = slice(start, self.n_tokens)
        last = self._through(self._embed(tokens)[:, start:], positions, past, enter, hooks)
        run.last = last[:, -1].clone()
        for place in keep:
            if (boundary := _boundary(place)) is not None:
                run.activations[place] = by_unit(place[0], run.stream[boundary])
        return run

    @torch.no_grad()
    def patched(
        self, base: Run, prompts: Int[Tensor, " row"], join: Sequence[int], start: int, edits: Edits
    ) -> Float[Tensor, "row d_model"]:
        """The last position of the stream after the last block, of runs with edits, all in one pass.

        Row r is a run on ``base``'s prompt ``prompts[r]``; until layer ``join[r]`` (ascending) and position ``start``
        it is the unpatched one.
        """
        past = _Past(base.past, start)
        joined = torch.as_tensor(join)
        own = {_boundary(place): edit for place, edit in edits.items() if _boundary(place) is not None}

        def enter(layer: int, stream: Tensor | None) -> Tensor:
            before = 0 if stream is None else len(stream)
            until = int((joined <= layer).sum())
            if until > before:
                new = base.stream[layer][:, start - base.start :][prompts[before:until]]
                stream = new if stream is None else torch.cat([stream, new])
                past.prompts = prompts[:until]
            if layer in own:
                own[layer](stream.unsqueeze(2))
            return stream

        def hooks(layer: int, stream: Tensor) -> list:
            here = [place for place in edits if place[1] == layer and _boundary(place) is None]
            return [_edit_hook(place, edits[place], stream) for place in here]

        short = start < self.n_tokens - 1 and ends_short(edits, self.n_layers)
        positions = slice(start, self.n_tokens)
        return self._through(None, positions, past, enter, hooks, first=int(joined[0]), short=short)[:, -1]

    def logits(self, last: Tensor, columns: Int[Tensor, "row column"] | None = None) -> Tensor:
        """[row, d_vocab]; of these columns only, [row, column], where they are given."""
        with torch.no_grad():
            return models.unembed(self.model, last, columns)

    def _embed(self, tokens: Tensor) -> Tensor:
        return models.run(self.model, tokens, stop_at_layer=0)

    def _through(
        self,
        stream: Tensor | None,
        positions: slice,
        past: _Past,
        enter: Callable = lambda layer, stream: stream,
        hooks: Callable = lambda layer, stream: (),
        first: int = 0,
        short: bool = False,
    ) -> Tensor:
        for layer in range(first, self.n_layers):
            stream = enter(layer, stream)
            if short and layer == self.n_layers - 1:
                stream, positions, past = self._all_but_last(stream, positions, past)
            here = hooks(layer, stream)
            stream = models.run_block(self.model, layer, stream, self.arguments[layer], positions, past, here)
        return enter(self.n_layers, stream)

    def _all_but_last(self, stream: Tensor, positions: slice, past: _Past) -> tuple[Tensor, slice, _Past]:
        """Of the positions before the last one, the last block gives their keys and values to the past, no more."""
        layer, last = self.n_layers - 1, self.n_tokens - 1
        record: dict = {}
        peek = _Past(past.stored, past.until, record, end=layer)
        peek.prompts = past.prompts
        with suppress(_Enough):
            models.run_block(self.model, layer, stream, self.arguments[layer], positions, peek)
        return stream[:, -1:], slice(last, last + 1), _Past(record, last)


class PlainHooks:
    """The reference: whole forward passes with hooks."""

    def __init__(self, model: Any, tokens: Int[Tensor, "prompt pos"]) -> None:
        self.model = model

    @torch.no_grad()
    def run_pair(
        self, base: Tensor, source: Tensor | None, keep: Iterable[Place], start: int = 0
    ) -> tuple[Run, Run | None]:
        """As in ``Blocks``."""
        keep = list(keep)
        return self._run(base, keep), None if source is None else self._run(source, keep)

    def _run(self, tokens: Tensor, keep: list[Place]) -> Run:
        run = Run(tokens, 0, last=tokens)
        hooks = [_keeping(run, place) for place in keep]
        run.last = models.run_with_hooks(self.model, tokens, [*hooks, LAST_POSITION])[:, -1]
        return run

    @torch.no_grad()
    def patched(self, base: Run, prompts: Tensor, join: Sequence[int], start: int, edits: Edits) -> Tensor:
        """The last position's logits [row, d_vocab]; edits see all positions, so ``start`` has to be 0."""
        before: list[Tensor] = [prompts]  # the stream before the block, which resid_mid needs

        def remember(activation: Tensor, hook: Any) -> None:
            before[0] = activation

        hooks: list = []
        for place, edit in edits.items():
            if place[0] == "resid_mid":
                hooks.append((models.hook_name("resid_pre", place[1]), remember))
            hooks.append(_edit_hook(place, edit, before))
        return models.run_with_hooks(self.model, base.tokens[prompts], [*hooks, LAST_POSITION])[:, -1]

    def logits(self, last: Tensor, columns: Tensor | None = None) -> Tensor:
        """As in ``Blocks``."""
        return last if columns is None else last.gather(-1, columns)


# Unembed the last position only: on small models the unembedding is a good part of a forward pass.
LAST_POSITION = ("unembed.hook_in", lambda stream, hook: stream[:, -1:])


def _boundary(place: Place) -> int | None:
    """Before which block the stream holds the site; None where the site lies inside a block."""
    site, layer = place
    return {"resid_pre": layer, "resid_post": layer + 1}.get(site)


def _keeping(run: Run, place: Place) -> tuple[str, Callable]:
    def keep(activation: Tensor, hook: Any) -> None:
        run.activations[place] = by_unit(place[0], activation.detach().clone())

    return models.hook_name(*place), keep


def _edit_hook(place: Place, edit: Callable, before: Tensor | list[Tensor]) -> tuple[str, Callable]:
    """A hook that edits a copy of the activation. ``before``: the stream before the block, or a list that gets it."""
    site, layer = place

    def plain(activation: Tensor, hook: Any) -> Tensor:
        edited = activation.clone()
        edit(by_unit(site, edited))
        return edited

    def mid(attn_out: Tensor, hook: Any) -> Tensor:
        stream = before[0] if isinstance(before, list) else before
        edited = stream + attn_out
        edit(by_unit(site, edited))
        return edited - stream

    # The bridge's resid_mid hook is the input of the MLP: an edit there misses the skip connection that goes round the
    # MLP. What is added to the stream before it reaches both, so edit that.
    if site == "resid_mid":
        return models.hook_name("attn_out", layer), mid
    return models.hook_name(site, layer), plain


# ------------------------------------------------------------------------------------------------ which of the two


def choose(
    model: Any, base: Int[Tensor, "prompt pos"], source: Int[Tensor, "prompt pos"], sites: Sequence[str]
) -> Blocks | PlainHooks:
    """The fast path where it gives what plain hooks give, on the first pair of these prompts and at these sites.

    Asked once for a model, a site and a length of prompts. Otherwise plain hooks, with a :class:`SlowPath` warning.
    """
    if any(point.has_hooks() for point in model.mi_hook_points.values()):
        warnings.warn(
            f"{models.info(model).name} has hooks of its own; running whole passes with plain hooks, so that they see "
            "whole prompts.",
            SlowPath,
            stacklevel=3,
        )
        return PlainHooks(model, base)
    known = model.__dict__.setdefault("mi_fast_paths", {})
    for site in sites:
        key = (site, base.shape[1])
        if key not in known:
            known[key] = _why_not(model, base[:1], source[:1], site)
            if known[key]:
                warnings.warn(
                    f"{models.info(model).name}, {site}: {known[key]}; running whole passes with plain hooks, which is "
                    "exact and slower.",
                    SlowPath,
                    stacklevel=3,
                )
    fast = not any(known[site, base.shape[1]] for site in sites)
    return (Blocks if fast else PlainHooks)(model, base)


def _why_not(model: Any, base: Tensor, source: Tensor, site: str) -> str:
    """Why the fast path does not hold; empty where it does. Two edits: at the first layer, and halfway up."""
    plain = PlainHooks(model, base)
    shape = models.info(model).shape
    layers = [0, shape.n_layers // 2]
    keep = [(site, layer) for layer in layers]
    base, source = base.expand(2, -1), source.expand(2, -1)
    start = int((base != source).any(0).float().argmax())
    expected_base, other = plain.run_pair(base, source, keep)

    def edits(first: int) -> Edits:
        def edit(row: int, place: Place) -> Callable:
            def put(activation: Tensor) -> None:
                activation[row, start - first :] = other.activations[place][row, start:]

            return put

        return {place: edit(row, place) for row, place in enumerate(keep)}

    rows = torch.arange(2, device=base.device)
    expected = [expected_base.last, plain.patched(expected_base, rows, layers, 0, edits(0))]
    try:
        blocks = Blocks(model, base)
        run, _ = blocks.run_pair(base, source, keep, start)
        found = [run.last, blocks.patched(run, rows, layers, start, edits(start))]
        apart = max(
            float((blocks.logits(mine).float() - theirs.float()).abs().max())
            for mine, theirs in zip(found, expected, strict=True)
        )
    except Exception as error:  # whatever a block of unknown make raises when it is called on its own
        return f"its blocks cannot be called on their own ({type(error).__name__}: {str(error).splitlines()[0]})"
    scale = max(1.0, float(expected_base.last.abs().max()))
    allowed = scale * (1e-4 if models.info(model).dtype == "float32" else 0.05)
    return "" if apart <= allowed else f"called by themselves its blocks give logits {apart:.1g} away from the model's"
