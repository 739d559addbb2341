"""Activation patching: put activations of one run into another and see how much of the behaviour comes with them.

Three parts that know little of one another. The planner (``plan_sweep``) is arithmetic on a table of what differs
between the two runs: it drops the cells that cannot have an effect and cuts the rest into batches. The executor
(``_run_rows``) runs one batch. ``patch_sweep`` checks, asks both, and labels the result.

Source: Heimersheim and Nanda 2024, "How to use and interpret activation patching"; Wang et al. 2022 (IOI).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mi_utils import models
from mi_utils.metrics import METRICS
from mi_utils.prompts import PromptPairs

if TYPE_CHECKING:
    import xarray as xr

AXES = ("layer", "pos", "head")
SITES_WITH_HEADS = ("q", "k", "v", "z", "pattern")
# Unembed the last position only: on small models the unembedding is a good part of a forward pass.
LAST_POSITION = ("unembed.hook_in", lambda stream, hook: stream[:, -1:])


class NothingChanged(RuntimeError):
    """An intervention that left every activation as it was: its effect would be a number about nothing."""


# ---------------------------------------------------------------------------------------------------------- planner


@dataclass(frozen=True)
class SweepPlan:
    """Which cells of a sweep have to be run, and in which batches. Made by ``plan_sweep``."""

    over: tuple[str, ...]
    sizes: dict[str, int]
    rows: Int[np.ndarray, "row cell"]  # each row: the prompt, then the place on each axis of ``over``
    batch_size: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the result: prompts, then the axes of ``over``."""
        return tuple(self.sizes[axis] for axis in ("prompt", *self.over))

    @property
    def skipped(self) -> int:
        """Number of cells whose effect is known without running them."""
        return int(np.prod(self.shape)) - len(self.rows)

    def chunks(self) -> list[Int[np.ndarray, "row cell"]]:
        """The rows, in batches of at most ``batch_size``; one forward pass each."""
        return [self.rows[i : i + self.batch_size] for i in range(0, len(self.rows), self.batch_size)]

    def mask(self, rows: Int[np.ndarray, "row cell"]) -> Bool[np.ndarray, "row layer pos head"]:
        """What each row patches: one place on the axes of ``over``, everything on the others."""
        mask = np.ones((len(rows), *(self.sizes[axis] for axis in AXES)), dtype=bool)
        for column, axis in enumerate(self.over, start=1):
            place = np.arange(self.sizes[axis]) == rows[:, column, None]
            mask &= np.expand_dims(place, [1 + AXES.index(other) for other in AXES if other != axis])
        return mask


def plan_sweep(changed: Bool[np.ndarray, "prompt layer pos head"], over: Sequence[str], batch_size: int) -> SweepPlan:
    """Decide what a sweep has to run. Pure: it looks at no model.

    ``changed`` says where the two runs differ at the site. A cell in which nothing differs is an exact no-op and is
    left out. Rows are ordered by layer first, so that a batch touches few layers.
    """
    over = tuple(over)
    summed_out = tuple(1 + AXES.index(axis) for axis in AXES if axis not in over)
    active = changed.any(axis=summed_out)
    remaining = [axis for axis in AXES if axis in over]
    active = active.transpose(0, *(1 + remaining.index(axis) for axis in over))
    rows = np.argwhere(active)
    if "layer" in over:
        rows = rows[np.argsort(rows[:, 1 + over.index("layer")], kind="stable")]
    sizes = dict(zip(("prompt", *AXES), changed.shape, strict=True))
    return SweepPlan(over, sizes, rows, batch_size)


# --------------------------------------------------------------------------------------------------------- executor


@dataclass
class Receipt:
    """What the interventions did to the activations, counted while they happened."""

    elements_changed: int = 0
    total_change: float = 0.0

    def add(self, before: Tensor, after: Tensor) -> None:
        """Count one edit."""
        difference = (after.float() - before.float()).abs()
        self.elements_changed += int((difference > 0).sum())
        self.total_change += float(difference.sum())

    @property
    def mean_change(self) -> float:
        """Mean absolute change of the elements that changed."""
        return self.total_change / self.elements_changed if self.elements_changed else 0.0


def _by_head(site: str, activation: Tensor) -> Float[Tensor, "prompt pos head feature"]:
    """One layout for every site (a view): sites without heads get one, patterns go by query position."""
    if site == "pattern":
        return activation.transpose(1, 2)
    return activation if site in SITES_WITH_HEADS else activation.unsqueeze(2)


def _edit_hooks(site: str, layer: int, edit: Callable[[Tensor], Tensor]) -> list[tuple[str, Callable]]:
    """Hooks that put ``edit(activation)`` in the place of the activation."""
    if site != "resid_mid":
        return [(models.hook_name(site, layer), lambda activation, hook: edit(activation))]

    # The bridge's resid_mid hook is the input of the MLP: an edit there misses the skip connection that goes round the
    # MLP. What is added to the stream before it reaches both, so edit that.
    before: list[Tensor] = []

    def remember(activation: Tensor, hook: Any) -> None:
        before[:] = [activation]

    def edit_sum(attn_out: Tensor, hook: Any) -> Tensor:
        return edit(before[0] + attn_out) - before[0]

    return [(models.hook_name("resid_pre", layer), remember), (models.hook_name("attn_out", layer), edit_sum)]


def _run_rows(
    model: Any,
    tokens: Int[Tensor, "row pos"],
    site: str,
    new: Callable[[int], Float[Tensor, "row pos head feature"]],
    mask: Bool[Tensor, "row layer pos head"],
    receipt: Receipt,
) -> Float[Tensor, "row 1 d_vocab"]:
    """One forward pass in which row r gets ``new(layer)[r]`` wherever ``mask[r]`` says so. Last position's logits."""
    hooks = []
    for layer in mask.any(dim=(0, 2, 3)).nonzero().flatten().tolist():
        here = mask[:, layer, :, :, None]

        def edit(activation: Tensor, layer: int = layer, here: Tensor = here) -> Tensor:
            edited = activation.clone()
            view = _by_head(site, edited)
            view.copy_(torch.where(here, new(layer), view))
            receipt.add(activation, edited)
            return edited

        hooks += _edit_hooks(site, layer, edit)
    return models.run_with_hooks(model, tokens, [*hooks, LAST_POSITION])


def _activations(
    model: Any, tokens: Int[Tensor, "prompt pos"], site: str, batch_size: int
) -> list[Float[Tensor, "prompt pos head feature"]]:
    """The activations at a site, one tensor a layer."""
    n_layers = models.info(model).shape.n_layers
    parts = [models.cache(model, batch, [site]) for batch in tokens.split(batch_size)]
    return [_by_head(site, torch.cat([part[site, layer] for part in parts])) for layer in range(n_layers)]


def _batch_size(tokens: Int[Tensor, "prompt pos"]) -> int:
    """About 1,000 tokens a pass on a CPU (more falls out of its caches), far more on a GPU (fewer launches)."""
    budget = 1024 if tokens.device.type == "cpu" else 32768
    return max(1, budget // tokens.shape[1])


# ---------------------------------------------------------------------------------------------------- saved sweeps


class _SavedChunks:
    """Finished chunks, a JSON line each under a header line; a line that was cut off by a kill is dropped.

    The header names the sweep. The two baselines stand there too and are compared with a tolerance: they tell apart
    metrics of the same name (two lambdas, say) without refusing a resumption for the sake of rounding.
    """

    def __init__(self, path: str | Path | None, fingerprint: str, clean: np.ndarray, corrupted: np.ndarray) -> None:
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
        self.done = {entry["chunk"]: entry for entry in map(json.loads, whole[1:])}
        header = {"patch_sweep": fingerprint, "clean": clean.tolist(), "corrupted": corrupted.tolist()}
        keep = "".join(whole) or json.dumps(header) + "\n"
        if keep != text:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            beside = self.path.with_name(self.path.name + ".tmp")
            beside.write_text(keep)
            beside.replace(self.path)

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
        self.done[entry["chunk"]] = entry
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(entry) + "\n")


def _fingerprint(model: Any, pairs: PromptPairs, plan: SweepPlan, *settings: str) -> str:
    """Hash of all that decides a sweep's numbers: weights (sampled), tokens, answers, plan and settings."""
    info = models.info(model)
    about = (info.name, info.processing, info.dtype, plan.over, plan.sizes, plan.batch_size, settings)
    digest = hashlib.sha256(repr(about).encode())
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, len(flat) // 64)].float().cpu().numpy()
        digest.update(name.encode() + sample.tobytes())
    for tensor in (pairs.clean_tokens, pairs.corrupted_tokens, pairs.correct_ids, pairs.incorrect_ids):
        digest.update(torch.as_tensor(tensor).cpu().numpy().tobytes())
    digest.update(plan.rows.tobytes())
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------- public calls


def patch_sweep(
    model: Any,
    pairs: PromptPairs,
    site: str,
    over: Sequence[str],
    *,
    mode: str = "denoising",
    metric: str | Callable = "logit_diff",
    batch_size: int | None = None,
    progress: bool = True,
    save: str | Path | None = None,
) -> xr.DataArray:
    """Patch one place at a time, everywhere, and measure how far the answer moves.

    Args:
        model: from ``load_model``.
        pairs: the clean and corrupted prompts.
        site: resid_pre, resid_mid, resid_post, attn_out, mlp_out, q, k, v, z or pattern. ``pos`` on a pattern is the
            query's position.
        over: which axes to step along, of "layer", "pos" and "head". On the others everything is patched at once.
        mode: "denoising" puts clean activations into the corrupted run (what is enough to bring the answer back?),
            "noising" corrupted ones into the clean run (what is needed for it?).
        metric: a name in ``METRICS``, or a function that takes pairs and returns a function from logits
            ``[prompt, pos, d_vocab]`` to values ``[prompt]``.
        batch_size: patched prompts in one forward pass; by default about 1,000 tokens on a CPU, more on a GPU.
        save: a file for finished batches. A killed sweep, called again, goes on from there to the identical result.

    Returns:
        Dims prompt, then ``over`` in the order given. Per prompt (patched - corrupted) / (clean - corrupted): 0 is
        the corrupted run, 1 the clean run, in both modes. Coordinates ``clean`` and ``corrupted`` hold the metric of
        the two runs, ``token`` the labels of positions. The attributes hold the receipt: ``elements_changed``,
        ``mean_change`` (mean absolute change of those) and ``skipped_cells`` (cells where both runs hold the same
        activations, so that the effect is known).

    What it does not show: a cell near 0 may still matter when another part does the same work (backup heads), and
    an effect of 1 says that the information passes there, not that it is computed there.

    Raises:
        ValueError: a wrong argument, or a saved file that holds another sweep.
        NothingChanged: the two runs do not differ anywhere at this site.
    """
    over = (over,) if isinstance(over, str) else tuple(over)
    _check_arguments(site, over, mode, batch_size)
    pairs.check_model(model)
    factory, metric_name = _metric(metric)
    batch_size = batch_size or _batch_size(pairs.clean_tokens)

    clean, corrupted = (_baseline(model, pairs, tokens, factory, batch_size) for tokens in _both(pairs))
    gap = _gap(clean, corrupted, metric_name)

    activations = [_activations(model, tokens, site, batch_size) for tokens in _both(pairs)]
    plan = plan_sweep(_changed(*activations, pairs), over, batch_size)
    if not len(plan.rows):
        raise NothingChanged(
            f"Clean and corrupted runs have the same activations at {site} everywhere: there is nothing to patch. "
            "Choose another site, or prompts that differ before the last token."
        )
    denoising = mode == "denoising"
    base_tokens = pairs.corrupted_tokens if denoising else pairs.clean_tokens
    source = activations[0] if denoising else activations[1]
    del activations

    fingerprint = _fingerprint(model, pairs, plan, site, mode, metric_name) if save else ""
    saved = _SavedChunks(save, fingerprint, clean, corrupted)
    for number, rows in _with_progress(plan.chunks(), f"patching {site}", progress):
        if number in saved.done:
            continue
        receipt = Receipt()
        prompts = torch.from_numpy(rows[:, 0]).to(base_tokens.device)

        def new(layer: int, prompts: Tensor = prompts) -> Tensor:
            return source[layer][prompts]

        mask = torch.from_numpy(plan.mask(rows)).to(base_tokens.device)
        logits = _run_rows(model, base_tokens[prompts], site, new, mask, receipt)
        values = factory(pairs[rows[:, 0].tolist()])(logits)
        saved.add({"chunk": number, "values": _numpy(values).tolist(), **vars(receipt)})

    receipt = Receipt(
        sum(entry["elements_changed"] for entry in saved.done.values()),
        sum(saved.done[number]["total_change"] for number in sorted(saved.done)),
    )
    if receipt.elements_changed == 0:
        raise NothingChanged(f"No activation at {site} was changed by any patch: the hooks did not take effect.")
    effect = np.full(plan.shape, 0.0 if denoising else 1.0)
    for number, rows in enumerate(plan.chunks()):
        values = np.asarray(saved.done[number]["values"])
        effect[tuple(rows.T)] = (values - corrupted[rows[:, 0]]) / gap[rows[:, 0]]
    return _labelled(
        effect, model, pairs, clean, corrupted, over=over, site=site, mode=mode, metric=metric_name,
        skipped_cells=plan.skipped, batch_size=batch_size, **_receipt_attrs(receipt),
    )  # fmt: skip


def ablate(
    model: Any,
    pairs: PromptPairs,
    heads: Sequence[tuple[int, int]],
    kind: str = "mean",
    *,
    metric: str | Callable = "logit_diff",
    seed: int = 0,
) -> xr.DataArray:
    """Take a set of heads out of the clean run, all at once, and measure what is left of the answer.

    Args:
        heads: (layer, head) of each.
        kind: what stands in for a head's output z, at every position: "zero"; "mean" over these prompts at the same
            position; "resample", the head's z on another of these prompts, drawn with ``seed``; "corrupted", its z on
            the corrupted prompt (noising of the whole set: only what distinguishes the two runs is taken away, so
            this is the kind that reaches 0 where the set carries all of it). Zero is far from
            anything the model has seen and tends to overstate; report mean or resample beside it. It is also not
            the same on folded weights, where the values' biases are no longer part of z.

    Returns:
        Dims (prompt,): 1 = as the clean run, 0 = as the corrupted run (below 0 is possible). Coordinates ``raw`` (the
        metric after ablation), ``clean`` and ``corrupted``; the receipt in the attributes.

    Raises:
        ValueError: no heads, a head that the model has not, an unknown kind, too few prompts for the kind.
        NothingChanged: the heads write the same with and without ablation (a dead head, identical prompts).
    """
    shape = models.info(model).shape
    heads = [(int(layer), int(head)) for layer, head in heads]
    _check_heads(heads, shape.n_layers, shape.n_heads)
    if kind not in ("zero", "mean", "resample", "corrupted"):
        raise ValueError(f"Unknown kind of ablation {kind!r}: use 'zero', 'mean', 'resample' or 'corrupted'.")
    if kind in ("mean", "resample") and len(pairs) < 2:
        raise ValueError(f"{kind} ablation draws on other prompts, and there is only one. Give more, or use 'zero'.")
    pairs.check_model(model)
    factory, metric_name = _metric(metric)
    tokens, batch_size = pairs.clean_tokens, _batch_size(pairs.clean_tokens)
    clean, corrupted = (_baseline(model, pairs, each, factory, batch_size) for each in _both(pairs))
    gap = _gap(clean, corrupted, metric_name)

    z = _activations(model, pairs.corrupted_tokens if kind == "corrupted" else tokens, "z", batch_size)
    stand_in: dict[int, Tensor] = {}
    order = np.random.default_rng(seed).permutation(len(pairs))
    other = np.empty_like(order)
    other[order] = np.roll(order, 1)  # a single cycle: no prompt gets its own activations
    for layer in {layer for layer, _ in heads}:
        if kind == "zero":
            stand_in[layer] = torch.zeros_like(z[layer])
        elif kind == "mean":
            stand_in[layer] = z[layer].mean(dim=0, keepdim=True).expand_as(z[layer])
        elif kind == "corrupted":
            stand_in[layer] = z[layer]
        else:
            stand_in[layer] = z[layer][torch.from_numpy(other).to(tokens.device)]

    mask = torch.zeros(1, shape.n_layers, 1, shape.n_heads, dtype=torch.bool, device=tokens.device)
    for layer, head in heads:
        mask[:, layer, :, head] = True
    receipt, values = Receipt(), []
    for part in torch.arange(len(pairs), device=tokens.device).split(batch_size):

        def new(layer: int, part: Tensor = part) -> Tensor:
            return stand_in[layer][part]

        logits = _run_rows(model, tokens[part], "z", new, mask, receipt)
        values.append(_numpy(factory(pairs[part.tolist()])(logits)))
    if receipt.elements_changed == 0:
        raise NothingChanged(f"{kind} ablation of {heads} changed no activation: these heads write that already.")
    raw = np.concatenate(values)
    return _labelled(
        (raw - corrupted) / gap, model, pairs, clean, corrupted, over=(), site="z", mode="ablation", kind=kind,
        metric=metric_name, heads=[f"L{layer}H{head}" for layer, head in heads], ablation_seed=seed,
        **_receipt_attrs(receipt),
    ).assign_coords(raw=("prompt", raw))  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- details


def _check_arguments(site: str, over: tuple[str, ...], mode: str, batch_size: int | None) -> None:
    models.hook_name(site, 0)  # raises for an unknown site, naming those there are
    if unknown := [axis for axis in over if axis not in AXES]:
        raise ValueError(f"Cannot patch over {unknown}: the axes are {', '.join(AXES)}.")
    if len(set(over)) < len(over):
        raise ValueError(f"An axis stands twice in over={over}.")
    if "head" in over and site not in SITES_WITH_HEADS:
        raise ValueError(f"{site} has no heads to go over; sites with heads are {', '.join(SITES_WITH_HEADS)}.")
    if mode not in ("denoising", "noising"):
        raise ValueError(
            f"Unknown mode {mode!r}: use 'denoising' (clean into corrupted) or 'noising' (corrupted into clean)."
        )
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}.")


def _check_heads(heads: list[tuple[int, int]], n_layers: int, n_heads: int) -> None:
    if not heads:
        raise ValueError("No heads given: nothing to ablate.")
    if missing := [head for head in heads if not (0 <= head[0] < n_layers and 0 <= head[1] < n_heads)]:
        raise ValueError(f"The model has no heads {missing}: it has {n_layers} layers of {n_heads} heads, from 0.")


def _metric(metric: str | Callable) -> tuple[Callable, str]:
    if callable(metric):
        return metric, f"{metric.__module__}.{getattr(metric, '__qualname__', repr(metric))}"
    if metric not in METRICS:
        raise ValueError(f"Unknown metric {metric!r}: there are {', '.join(METRICS)}; or pass a function.")
    return METRICS[metric], metric


def _both(pairs: PromptPairs) -> tuple[Tensor, Tensor]:
    return pairs.clean_tokens, pairs.corrupted_tokens


def _numpy(values: Tensor) -> np.ndarray:
    return values.detach().float().cpu().double().numpy()


def _baseline(model: Any, pairs: PromptPairs, tokens: Tensor, factory: Callable, batch_size: int) -> np.ndarray:
    """The metric of each prompt without any intervention, read as in the patched runs: at the last position."""
    values = []
    for part in torch.arange(len(pairs)).split(batch_size):
        logits = models.run_with_hooks(model, tokens[part], [LAST_POSITION])
        values.append(_numpy(factory(pairs[part.tolist()])(logits)))
    return np.concatenate(values)


def _gap(clean: np.ndarray, corrupted: np.ndarray, metric: str) -> np.ndarray:
    gap = clean - corrupted
    if len(flat := np.flatnonzero(gap == 0)):
        raise ValueError(
            f"{metric} is the same on the clean and the corrupted prompt for prompts {flat.tolist()}: "
            "an effect cannot be put on the scale from 0 to 1. Choose another metric, or drop these prompts."
        )
    return gap


def _changed(
    clean: list[Tensor], corrupted: list[Tensor], pairs: PromptPairs
) -> Bool[np.ndarray, "prompt layer pos head"]:
    """Where the two runs differ. Before the first differing token they cannot (attention is causal), whatever
    rounding in kernels of another batch shape may say."""
    changed = torch.stack([(a != b).any(-1) for a, b in zip(clean, corrupted, strict=True)], dim=1).cpu().numpy()
    differs = pairs.clean_tokens != pairs.corrupted_tokens
    reached = differs.cumsum(dim=1).bool().cpu().numpy()
    return changed & reached[:, None, :, None]


def _with_progress(chunks: list, title: str, progress: bool) -> Iterator[tuple[int, np.ndarray]]:
    from tqdm import tqdm

    return enumerate(tqdm(chunks, desc=title, unit="batch", disable=not progress, leave=False, delay=5))


def _receipt_attrs(receipt: Receipt) -> dict[str, Any]:
    return {"elements_changed": receipt.elements_changed, "mean_change": receipt.mean_change}


def _labelled(
    effect: np.ndarray, model: Any, pairs: PromptPairs, clean: np.ndarray, corrupted: np.ndarray,
    over: tuple[str, ...], **attrs: Any,
) -> xr.DataArray:  # fmt: skip
    import xarray as xr

    info = models.info(model)
    coords: dict[str, Any] = {axis: np.arange(size) for axis, size in zip(over, effect.shape[1:], strict=True)}
    coords |= {
        "prompt": np.arange(len(pairs)),
        "template": ("prompt", list(pairs.template)),
        "clean": ("prompt", clean),
        "corrupted": ("prompt", corrupted),
    }
    if "pos" in over:
        coords["token"] = ("pos", list(pairs.position_labels))
    attrs |= {
        "model": info.name, "processing": info.processing, "seed": info.seed,
        "mean_clean": float(clean.mean()), "mean_corrupted": float(corrupted.mean()),
    }  # fmt: skip
    return xr.DataArray(effect, dims=("prompt", *over), coords=coords, attrs=attrs, name="effect")
