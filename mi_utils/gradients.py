"""Attribution patching: what activation patching would find, to first order, from one backward pass.

Patching a site moves its activation by a known difference. The gradient of the metric says what a small move would
do; difference times gradient is the estimate, for every layer, position and head at once.

Source: Nanda 2023, "Attribution Patching: Activation Patching At Industrial Scale"; Syed et al. 2023
(arXiv:2310.10348); Kramár et al. 2024, "AtP*" (arXiv:2403.00745) on where it goes wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_utils import metrics, models
from mi_utils.engine import by_unit, check_axes
from mi_utils.metrics import Metric
from mi_utils.prompts import PromptPairs
from mi_utils.results import NothingChanged, check_gap, check_mode, labelled, numpy

if TYPE_CHECKING:
    import xarray as xr

AXES = ("layer", "pos", "head")

StreamMetric = Callable[[Float[Tensor, "prompt d_model"]], Float[Tensor, " prompt"]]


def attribution_patch(
    model: Any,
    pairs: PromptPairs,
    site: str,
    over: Sequence[str] = ("layer", "pos"),
    *,
    mode: str = "denoising",
    metric: str | Callable = "logit_diff",
    batch_size: int | None = None,
) -> xr.DataArray:
    """The effect that ``patch_sweep`` would measure, estimated by gradients: two forward passes and one backward.

    Args:
        site: as in ``patch_sweep``; ``pos`` on a pattern is the query's position.
        over: axes of "layer", "pos" and "head", with "layer" among them; along the others differences add up.
        mode: "denoising" takes the gradient in the corrupted run, "noising" in the clean run.
        metric: a name in ``METRICS``, or a function of pairs that returns one of logits ``[prompt, 1, d_vocab]``,
            which has to have a gradient (a rank has none).
        batch_size: prompts in one pass; by default about 500 tokens on a CPU, more on a GPU. The backward pass keeps
            everything the forward pass computed.

    Returns:
        As ``patch_sweep``: dims prompt, then ``over``; 0 is the corrupted run, 1 the clean one; coordinates
        ``clean``, ``corrupted`` and ``token``; the receipt (``elements_changed``, ``mean_change``) counts the
        differences that were multiplied. ``method`` is "attribution".

    What it does not show: the estimate is good where the metric is nearly linear between the two activations. It
    fails where a softmax is saturated, so on q, k and sharp patterns, where LayerNorm turns a large stream (resid_pre
    in early layers), and where a direct and an indirect effect cancel. Confirm what matters with ``patch_sweep``.

    Raises:
        ValueError: a wrong argument, or a metric without a gradient.
        NothingChanged: the two runs do not differ anywhere at this site.
    """
    over = (over,) if isinstance(over, str) else tuple(over)
    _check_arguments(site, over, mode, batch_size)
    pairs.check_model(model)
    factory, metric_name = metrics.resolve(metric)
    n_layers = models.info(model).shape.n_layers
    runs = (pairs.corrupted_tokens, pairs.clean_tokens)
    base_tokens, source_tokens = runs if mode == "denoising" else runs[::-1]

    places = {layer: (site, layer) for layer in range(n_layers)}
    # The bridge's resid_mid hook is the MLP's input alone. All that resid_mid reaches, attn_out reaches too.
    reach = {("reach", layer): ("attn_out" if site == "resid_mid" else site, layer) for layer in range(n_layers)}
    estimates, base_values, source_values = [], [], []
    changed, total = 0, 0.0
    for part in torch.arange(len(pairs)).split(batch_size or prompts_per_pass(base_tokens)):
        value = stream_metric(model, factory(pairs[part.tolist()]))
        source, stream = record(model, source_tokens[part], places)
        source_values.append(numpy(value(stream[:, -1])))
        base, gradients, values = differentiate(model, base_tokens[part], places | reach, value)
        base_values.append(numpy(values))
        layers = []
        for layer in range(n_layers):
            difference = source[layer] - base[layer]
            changed += int((difference != 0).sum())
            total += float(difference.abs().sum())
            products = by_unit(site, difference * gradients["reach", layer]).sum(-1)
            layers.append(products if "head" in over else products.sum(-1, keepdim=True))
        estimates.append(numpy(torch.stack(layers, dim=1)))  # [prompt, layer, pos, head]
    if changed == 0:
        raise NothingChanged(
            f"Clean and corrupted runs have the same activations at {site} everywhere: there is nothing to patch. "
            "Choose another site, or prompts that differ before the last token."
        )
    base_value, source_value = np.concatenate(base_values), np.concatenate(source_values)
    clean, corrupted = (source_value, base_value) if mode == "denoising" else (base_value, source_value)
    gap = check_gap(clean, corrupted, metric_name)

    estimate = np.concatenate(estimates)
    estimate = estimate.sum(axis=tuple(1 + i for i, axis in enumerate(AXES) if axis not in over))
    kept = [axis for axis in AXES if axis in over]
    estimate = estimate.transpose(0, *(1 + kept.index(axis) for axis in over))
    estimate = estimate / np.expand_dims(gap, tuple(range(1, estimate.ndim)))
    coords: dict[str, Any] = {axis: np.arange(size) for axis, size in zip(over, estimate.shape[1:], strict=True)}
    if "pos" in over:
        coords["token"] = ("pos", list(pairs.position_labels))
    return labelled(
        estimate if mode == "denoising" else 1 + estimate, ("prompt", *over), model, pairs, coords, clean, corrupted,
        name="effect", site=site, mode=mode, metric=metric_name, method="attribution",
        elements_changed=changed, mean_change=total / changed,
    )  # fmt: skip


# ------------------------------------------------------------------------------- runs, with and without gradients


def record(
    model: Any, tokens: Int[Tensor, "prompt pos"], places: Mapping[Hashable, tuple[str, int]]
) -> tuple[dict[Hashable, Tensor], Float[Tensor, "prompt pos d_model"]]:
    """Activations at (site, layer) under the names given, and the residual stream after the last block."""
    kept: dict[Hashable, Tensor] = {}

    def keep(name: Hashable) -> Callable:
        def hook(activation: Tensor, hook: Any) -> None:
            kept[name] = activation.detach()

        return hook

    hooks = [(models.hook_name(*place), keep(name)) for name, place in places.items()]
    with torch.no_grad():
        stream = models.run_with_hooks(model, tokens, hooks, stop_at_layer=models.info(model).shape.n_layers)
    return kept, stream


def differentiate(
    model: Any,
    tokens: Int[Tensor, "prompt pos"],
    places: Mapping[Hashable, tuple[str, int]],
    value: StreamMetric,
    replace: Mapping[tuple[str, int], Tensor] | None = None,
) -> tuple[dict[Hashable, Tensor], dict[Hashable, Tensor], Float[Tensor, " prompt"]]:
    """Activations at (site, layer), the gradient of each prompt's value there, and the values.

    Under the name "stream" also those of the residual stream after the last block. Only activations are
    differentiated, never parameters.

    Args:
        replace: activations that take the place of the run's own; of the embeddings (resid_pre of layer 0), say.

    Raises:
        ValueError: a value without a gradient.
    """
    kept: dict[Hashable, Tensor] = {}
    start = ("resid_pre", 0)
    replace = dict(replace or {})
    edits: dict[tuple[str, int], list[Hashable]] = {start: []} | {place: [] for place in replace}
    for name, place in places.items():
        edits.setdefault(place, []).append(name)

    def hook_at(place: tuple[str, int]) -> Callable:
        def hook(activation: Tensor, hook: Any) -> Tensor:
            activation = replace.get(place, activation)
            if not activation.requires_grad:  # the embeddings, and what was put in: here the graph begins
                activation = activation.detach().requires_grad_(True)
            activation = activation.view_as(activation)  # a node of its own: what else reads this tensor stays out
            kept.update(dict.fromkeys(edits[place], activation))
            return activation  # what came in may be a copy that leads nowhere

        return hook

    n_layers = models.info(model).shape.n_layers
    with torch.enable_grad():
        hooks = [(models.hook_name(*place), hook_at(place)) for place in edits]
        kept["stream"] = models.run_with_hooks(model, tokens, hooks, stop_at_layer=n_layers)
        values = value(kept["stream"][:, -1])
        if not values.requires_grad:
            raise ValueError("This metric has no gradient (a rank or a count has none): use logit_diff or log_prob.")
        found = torch.autograd.grad(values.sum(), list(kept.values()), allow_unused=True)
    gradients = {
        name: torch.zeros_like(activation) if gradient is None else gradient
        for (name, activation), gradient in zip(kept.items(), found, strict=True)
    }
    return {name: activation.detach() for name, activation in kept.items()}, gradients, values.detach()


def stream_metric(model: Any, metric: Metric) -> StreamMetric:
    """The metric as a function of the last position's residual stream after the last block.

    One that declares its columns, as ``LogitDiff`` does, asks for these of the unembedding, any other for all.
    """
    columns = getattr(metric, "columns", None)
    if columns is None:
        return lambda stream: metric(models.unembed(model, stream[:, None]))
    return lambda stream: metric.of_columns(models.unembed(model, stream, columns))


def prompts_per_pass(tokens: Int[Tensor, "prompt pos"]) -> int:
    """About 500 tokens a pass on a CPU, far more on a GPU: a backward pass keeps what the forward pass computed."""
    budget = 512 if tokens.device.type == "cpu" else 8192
    return max(1, budget // tokens.shape[1])


# ---------------------------------------------------------------------------------------------------------- details


def _check_arguments(site: str, over: tuple[str, ...], mode: str, batch_size: int | None) -> None:
    check_axes(site, over, AXES)
    if "layer" not in over:
        raise ValueError(
            f"over={over} would patch all layers at once, and their gradients count the same path several times: put "
            "'layer' into over, or use patch_sweep."
        )
    check_mode(mode)
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}.")
