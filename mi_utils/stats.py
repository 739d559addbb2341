"""Statistics over prompts: intervals, tests and sizes for what the techniques measured.

One prompt is one observation. Prompts that share a template or a name are alike, so read an interval as "over prompts
drawn the way these were drawn", and hold back templates and names to learn what lies beyond them
(:func:`split_prompts`). Where many cells are looked at, chance finds some: :func:`max_statistic` says which remain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float

if TYPE_CHECKING:
    import xarray as xr
    from numpy.typing import ArrayLike

RESAMPLES = 4000
LEAST = 4  # values for a bootstrap-t interval: with fewer it covers much less often than it says
EXACT_UP_TO = 12  # values; 2**12 sign patterns are fewer than RESAMPLES asks for


class Estimate(NamedTuple):
    """A measured value with its interval."""

    value: float
    low: float
    high: float
    n: int
    confidence: float
    method: str

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


class TestResult(NamedTuple):
    """Outcome of a significance test. ``statistic`` is the mean of the values."""

    __test__ = False  # pytest would take it for a test class

    statistic: float
    p_value: float
    n: int
    method: str


def bootstrap_interval(
    values: ArrayLike | xr.DataArray,
    confidence: float = 0.95,
    seed: int = 0,
    *,
    weights: ArrayLike | xr.DataArray | None = None,
) -> Estimate:
    """Mean over prompts with a bootstrap-t interval.

    The bootstrap-t (studentised) interval keeps its coverage at ten or twenty skewed values, where percentile and BCa
    intervals are too narrow. Resamples without spread of their own are divided by the sample's standard error.

    Args:
        values: one number a prompt.
        weights: one a prompt, for a weighted mean. With the gap ``clean - corrupted`` as weights the mean of a
            patching effect becomes the ratio of means; see :func:`pooled_effect`.

    Returns:
        The estimate, in the units of ``values``. Values that are all the same give an interval of no width.

    Raises:
        ValueError: fewer than 4 values (of 3 it would cover 84 %, of 2 half), values that are missing or not one a
            prompt, values of 0 and 1 (count them and use :func:`proportion_interval`), weights that sum to zero.

    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", section 12.5.
    """
    values = _vector(values, at_least=LEAST)
    if set(np.unique(values)) == {0.0, 1.0}:
        raise ValueError(
            "These values are 0 or 1: a share of prompts. Use proportion_interval(k, n) with the number of ones."
        )
    weights = None if weights is None else _vector(weights, at_least=LEAST, what="weights")
    if weights is not None and len(weights) != len(values):
        raise ValueError(f"{len(values)} values but {len(weights)} weights: give one weight a value.")
    mean, low, high = _bootstrap_t(values[:, None], weights, confidence, seed)
    return Estimate(float(mean[0]), float(low[0]), float(high[0]), len(values), confidence, "bootstrap-t")


def proportion_interval(k: int, n: int, confidence: float = 0.95) -> Estimate:
    """Share k / n with the exact Clopper-Pearson interval, which covers at least as often as it says.

    Raises:
        ValueError: not 0 <= k <= n, or n is 0.

    Source: Clopper and Pearson 1934.
    """
    from scipy.stats import binomtest

    if int(k) != k or int(n) != n or not 0 <= k <= n or n < 1:
        raise ValueError(f"k={k} of n={n} is no share: k and n are counts with 0 <= k <= n and n >= 1.")
    _check_confidence(confidence)
    interval = binomtest(int(k), int(n)).proportion_ci(confidence, method="exact")
    low, high = float(interval.low), float(interval.high)
    return Estimate(k / n, low, high, int(n), confidence, "Clopper-Pearson")


def sign_flip_test(values: ArrayLike | xr.DataArray, seed: int = 0) -> TestResult:
    """Test whether the values lie around zero, two-sided, by flipping their signs.

    Under the null every value might as well have had the other sign. The p-value is the share of sign patterns whose
    mean is at least as far from zero as the one measured. Up to 12 values all patterns are counted; beyond, 4,000 are
    drawn and the measured one is added to them, so that p is never 0.

    What it does not show: how large the effect is. Give an interval beside it.

    Raises:
        ValueError: fewer than 6 values (p could not fall below 0.05), missing values, or all values zero.

    Source: Fisher 1935, "The Design of Experiments"; Phipson and Smyth 2010 for the added one.
    """
    values = _vector(values, at_least=6)
    if not values.any():
        raise ValueError("All values are exactly 0: nothing was measured, so there is nothing to test.")
    n = len(values)
    signs = _signs(n, seed)
    # Sums that are equal on paper differ in the last bits.
    reached = np.abs(signs @ values) >= abs(values.sum()) - 1e-9 * np.abs(values).sum()
    if n <= EXACT_UP_TO:
        return TestResult(float(values.mean()), float(reached.mean()), n, "exact sign flips")
    p_value = float((reached.sum() + 1) / (RESAMPLES + 1))
    return TestResult(float(values.mean()), p_value, n, f"{RESAMPLES} random sign flips")


def effect_size(values: ArrayLike | xr.DataArray, confidence: float = 0.95) -> Estimate:
    """Cohen's d of one sample: mean over standard deviation, with the interval of the noncentral t distribution.

    It says how far a typical prompt lies from zero in units of the spread between prompts. The interval takes the
    values for normally distributed; with few, very skewed values prefer :func:`bootstrap_interval` on the mean.

    Raises:
        ValueError: fewer than 5 values, missing values, or no spread between prompts (d is then not defined).

    Source: Cohen 1988; Cumming and Finch 2001 for the interval.
    """
    from scipy.optimize import brentq
    from scipy.stats import nct

    _check_confidence(confidence)
    values = _vector(values, at_least=5)
    n, spread = len(values), values.std(ddof=1)
    if spread <= 1e-12 * max(1.0, np.abs(values).max()):
        raise ValueError(
            f"All {n} values are {values[0]:.4g}: without spread Cohen's d is not defined. Report the mean itself."
        )
    d = float(values.mean() / spread)
    t = d * np.sqrt(n)
    tail = (1 - confidence) / 2
    step = float(np.sqrt(1 + t**2 / (2 * (n - 1))))  # about one standard error of t

    def end(share: float, step: float) -> float:
        """The noncentrality under which a share of all t lie below the one measured."""

        def excess(shift: float) -> float:
            return float(nct.cdf(t, n - 1, shift)) - share

        # Walk to the first bracket that holds it: far out in the tails scipy's distribution is nan.
        inner = outer = t
        while excess(outer) * np.sign(step) > 0:
            inner, outer = outer, outer + step
        return brentq(excess, inner, outer) / np.sqrt(n) if inner != outer else outer / np.sqrt(n)

    return Estimate(d, end(1 - tail, -step), end(tail, step), n, confidence, "noncentral t")


def max_statistic(
    result: xr.DataArray | ArrayLike, dim: str = "prompt", seed: int = 0, *, null: float = 0.0
) -> xr.Dataset:
    """Test every cell of a sweep, two-sided, and correct for having looked at all of them.

    Signs are flipped prompt by prompt, the same way in all cells, so that cells that go together stay together. Each
    cell's statistic is its sum over prompts divided by the root of its sum of squares: Student's t, up to a monotone
    map that no flip changes. A cell's ``p_value`` compares it with its own flips; its ``p_corrected`` with the largest
    statistic of *any* cell in each flip. The chance that a sweep without any effect has even one ``p_corrected`` at or
    below 0.05 is 0.05, however many cells it has and however they hang together.

    Args:
        result: over ``dim`` and any others. A plain array has its prompts along the first axis.
        null: the value without effect. 0 for a denoising sweep or an attribution, 1 for a noising sweep or an
            ablation, where 1 means that nothing happened.

    Returns:
        ``mean`` (in the units of the result), ``p_value`` and ``p_corrected`` over the remaining dimensions. Cells that
        are exactly ``null`` on every prompt have p-values of 1.

    What it does not show: how large an effect is, or that it would be there with other prompts than such as these.
    It takes for granted that without effect a prompt's values might as well have the opposite sign, all of them.

    Raises:
        ValueError: fewer than 6 prompts, missing values, ``dim`` not there, or every value exactly ``null``.

    Source: Westfall and Young 1993, "Resampling-Based Multiple Testing"; Nichols and Holmes 2002 for images.
    """
    import xarray as xr

    if not isinstance(result, xr.DataArray):
        array = np.asarray(result, dtype=float)
        result = xr.DataArray(array, dims=[dim, *(f"dim_{i}" for i in range(1, array.ndim))][: array.ndim])
    if dim not in result.dims:
        raise ValueError(f"The result has no dimension {dim!r}: it has {', '.join(map(str, result.dims))}.")
    result = result.transpose(dim, ...)
    values = np.asarray(result, dtype=float)
    _check_values(values, at_least=6)
    rest, n = values.shape[1:], len(values)
    centred = values.reshape(n, -1) - null
    length = np.sqrt((centred**2).sum(axis=0))
    if not length.any():
        raise ValueError(f"All values are exactly {null:g}: nothing was measured, so there is nothing to test.")
    unit = centred / np.where(length > 0, length, 1.0)
    measured = np.abs(unit.sum(axis=0)) - 1e-9  # sums that are equal on paper differ in the last bits
    alone, anywhere, count = np.zeros(unit.shape[1]), np.zeros(unit.shape[1]), 0
    signs = _signs(n, seed)
    for part in np.array_split(signs, max(1, len(signs) * unit.shape[1] // 4_000_000)):  # a few dozen MB at a time
        flipped = np.abs(part @ unit)
        alone += (flipped >= measured).sum(axis=0)
        largest = np.sort(flipped.max(axis=1))
        anywhere += len(part) - np.searchsorted(largest, measured)
        count += len(part)
    added = 0 if n <= EXACT_UP_TO else 1  # of all flips the one measured is one
    p_values = {
        "p_value": (alone + added) / (count + added),
        "p_corrected": np.where(length > 0, (anywhere + added) / (count + added), 1.0),
    }
    template = _without(result, dim)
    data = {"mean": template.copy(data=values.mean(axis=0))}
    data |= {name: template.copy(data=p.reshape(rest)).rename(name) for name, p in p_values.items()}
    attrs = dict(result.attrs) | {
        "quantity": result.name, "n": n, "null": null, "cells": int((length > 0).sum()),
        "method": "exact sign flips" if n <= EXACT_UP_TO else f"{RESAMPLES} random sign flips",
    }  # fmt: skip
    return xr.Dataset(data, attrs=attrs)


def superiority(
    values: ArrayLike | xr.DataArray, others: ArrayLike | xr.DataArray, confidence: float = 0.95
) -> Estimate:
    """Chance that a random one of ``values`` is larger than a random one of ``others`` (a tie counts one half).

    An effect size for two groups that takes no scale for granted: 0.5 where they are alike, 1 where each of the values
    is larger than all others. Also called the probability of superiority, or the area under the ROC curve.

    Raises:
        ValueError: fewer than 5 values in a group, missing values, or groups without any spread and overlap (the
            interval is then not defined: report that the groups do not overlap).

    Source: Brunner and Munzel 2000, as in statsmodels' ``rank_compare_2indep``.
    """
    from statsmodels.stats.nonparametric import rank_compare_2indep

    _check_confidence(confidence)
    values, others = _vector(values, at_least=5), _vector(others, at_least=5, what="others")
    if values.min() > others.max() or values.max() < others.min():
        side = "larger" if values.min() > others.max() else "smaller"
        raise ValueError(
            f"All {len(values)} values are {side} than all {len(others)} others: the chance is at its end, and an "
            "interval from ranks is not defined. Report that the groups do not overlap, and the difference of means."
        )
    if not (np.ptp(values) or np.ptp(others)):
        raise ValueError("All values and all others are the same number: there is nothing to compare.")
    compared = rank_compare_2indep(values, others)
    low, high = (min(1.0, max(0.0, float(end))) for end in compared.conf_int(alpha=1 - confidence))
    return Estimate(float(compared.prob1), low, high, len(values) + len(others), confidence, "Brunner-Munzel")


class Split(NamedTuple):
    """Numbers of the prompts in two parts that share no label, and of those that had to be left out."""

    discovery: list[int]
    confirmation: list[int]
    dropped: list[int]


def split_prompts(
    prompts: Any, by: Sequence[str] = ("template", "entity"), seed: int = 0, *, tries: int = 300
) -> Split:
    """Part prompts into those to find something on and those to confirm it on, with no template or entity in both.

    Each label goes to one side as a whole. A prompt is kept where all its labels are on one side; with two kinds of
    labels that are crossed many prompts fall between the two and are dropped, so make four to eight times as many
    as you need. Of ``tries`` random divisions the one is taken whose smaller side is largest. It looks at labels
    only, never at results.

    Args:
        prompts: ``PromptPairs`` (entities are the two answers), a labelled result with the coordinates over
            ``prompt``, or a mapping from kind to one label a prompt, ``{"template": [...], "entity": [("Mary",
            "John"), ...]}``. A tuple, list or set is several labels.
        by: kinds of labels that must not be shared.

    Returns:
        Numbers that ``pairs[split.discovery]`` and ``result.isel(prompt=split.discovery)`` take.

    Raises:
        ValueError: a kind of label that is not there, or labels that leave one side empty, such as a single template.
    """
    labels = [_labels_of(prompts, kind) for kind in by]
    if not labels:
        raise ValueError("by is empty: name at least one kind of label, such as 'template'.")
    if len({len(each) for each in labels}) > 1:
        raise ValueError(f"Different numbers of labels: {dict(zip(by, map(len, labels), strict=True))}.")
    n, rng = len(labels[0]), np.random.default_rng(seed)
    kinds = [sorted({label for own in each for label in own}) for each in labels]
    # [prompt, label] of each kind: does the prompt carry the label?
    carries = [
        np.array([[label in own for label in names] for own in each]) for names, each in zip(kinds, labels, strict=True)
    ]
    best: np.ndarray | None = None
    most = 0
    for _ in range(tries):
        first, second = np.ones(n, dtype=bool), np.ones(n, dtype=bool)
        for table in carries:
            side = rng.permutation(table.shape[1]) < rng.integers(1, max(2, table.shape[1]))
            first &= ~(table & ~side).any(axis=1)
            second &= ~(table & side).any(axis=1)
        if (smaller := min(first.sum(), second.sum())) > most:
            best, most = np.where(first, 0, np.where(second, 1, 2)), smaller
    if best is None:
        counts = ", ".join(f"{len(names)} of kind {kind!r}" for kind, names in zip(by, kinds, strict=True))
        raise ValueError(
            f"No division of these {n} prompts leaves two sides without a common label ({counts}): use more prompts, "
            "more templates and names, or fewer kinds of labels."
        )
    return Split(*(np.flatnonzero(best == side).tolist() for side in (0, 1, 2)))


def agreement(
    results: Mapping[str, xr.DataArray | ArrayLike], *, top: int = 3, cells: str = "same", dim: str = "prompt"
) -> xr.Dataset:
    """How well sweeps agree, two by two: of several ablation types, prompt seeds, metrics, or networks.

    Args:
        results: under their names; over the same cells, with or without prompts (the mean over them is taken).
        top: how many of the largest cells to compare.
        cells: "same" compares cell with cell and belongs to one network. "sorted" compares the sorted values, for
            networks trained from different seeds, whose heads of the same number have nothing to do with each other.

    Returns:
        Over ``a`` and ``b``: ``correlation`` (Spearman's, of the cells' means), ``overlap`` (share of the ``top``
        largest cells that both have; for "sorted" of their sum that is common to both), ``difference`` (largest
        absolute one), ``same_sign`` (share of the cells that are not zero in both).

    Raises:
        ValueError: fewer than two results, results over other cells, too few cells, or an unknown ``cells``.
    """
    import xarray as xr
    from scipy.stats import spearmanr

    if cells not in ("same", "sorted"):
        raise ValueError(f"Unknown cells {cells!r}: use 'same' (one network) or 'sorted' (networks of other seeds).")
    if len(results) < 2:
        raise ValueError("Agreement needs at least two results.")
    means = {}
    for name, result in results.items():
        _check_values(np.asarray(result, dtype=float), at_least=1)
        if isinstance(result, xr.DataArray):
            result = result.mean(dim) if dim in result.dims else result
            first = next((m for m in means.values() if isinstance(m, xr.DataArray)), None)
            if first is not None and cells == "same":
                result = in_order_of(result, first)
        means[str(name)] = result
    arrays = {name: np.asarray(mean, dtype=float) for name, mean in means.items()}
    if len({array.shape for array in arrays.values()}) > 1:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise ValueError(f"The results are over different cells: {shapes}.")
    flat = {name: array.ravel() for name, array in arrays.items()}
    size = len(next(iter(flat.values())))
    if not 1 <= top <= size or size < 3:
        raise ValueError(f"{size} cells, top={top}: at least 3 cells are needed, and top lies between 1 and that.")
    for array in flat.values():
        _check_values(array, at_least=3, what="cells")
    if cells == "sorted":
        flat = {name: np.sort(array)[::-1] for name, array in flat.items()}
    names = list(flat)
    table = {key: np.eye(len(names)) for key in ("correlation", "overlap", "same_sign")}
    table["difference"] = np.zeros((len(names), len(names)))
    for i, a in enumerate(names):
        for j, b in enumerate(names[:i]):
            x, y = flat[a], flat[b]
            same = float(spearmanr(x, y).statistic) if np.ptp(x) and np.ptp(y) else np.nan
            either = (x != 0) | (y != 0)
            if cells == "same":
                leading = [set(np.argsort(-values, kind="stable")[:top].tolist()) for values in (x, y)]
                shared = len(leading[0] & leading[1]) / top
            else:
                x_top, y_top = np.maximum(x[:top], 0), np.maximum(y[:top], 0)
                shared = float(np.minimum(x_top, y_top).sum() / max(np.maximum(x_top, y_top).sum(), 1e-12))
            pair = {
                "correlation": same, "overlap": shared, "difference": float(np.abs(x - y).max()),
                "same_sign": float((np.sign(x) == np.sign(y))[either].mean()) if either.any() else 1.0,
            }  # fmt: skip
            for key, value in pair.items():
                table[key][i, j] = table[key][j, i] = value
    coords = {"a": names, "b": names}
    data = {key: (("a", "b"), values) for key, values in table.items()}
    return xr.Dataset(data, coords=coords, attrs={"cells": cells, "top": top})


class Between(NamedTuple):
    """One measurement made in several networks, or in several ways.

    Attributes:
        estimates: of each, under its name.
        pooled: mean over them, with an interval for the mean of all networks from which these were drawn. Another
            single one may well lie outside. Needs no common true value.
        smallest, largest: names of the two ends.
        i_squared: share of the spread between them that sampling of prompts does not explain, 0 … 1.
        p_value: of Cochran's Q, that they have a common true value.
        same_sign: whether all intervals lie on one side of zero.
    """

    estimates: dict[str, Estimate]
    pooled: Estimate
    smallest: str
    largest: str
    i_squared: float
    p_value: float
    same_sign: bool


def between(values: Mapping[str, ArrayLike | xr.DataArray], confidence: float = 0.95, seed: int = 0) -> Between:
    """One measurement over training seeds, ablation types or prompt sets: what they share, and whether they differ.

    The prompts of one network are no sample of networks. The pooled interval therefore counts each network once, by a
    random-effects model with the Hartung-Knapp interval; with three networks it is wide, and rightly so.

    Args:
        values: one number a prompt for each network, or each kind.

    Raises:
        ValueError: fewer than two, or what :func:`bootstrap_interval` refuses.

    Source: DerSimonian and Laird 1986, Hartung and Knapp 2001, as in statsmodels' ``combine_effects``.
    """
    from statsmodels.stats.meta_analysis import combine_effects

    if len(values) < 2:
        raise ValueError("One network says nothing about others: give at least two.")
    estimates = {str(name): bootstrap_interval(each, confidence, seed) for name, each in values.items()}
    means = np.array([estimate.value for estimate in estimates.values()])
    errors = np.array([np.var(np.asarray(each, dtype=float), ddof=1) / len(each) for each in values.values()])
    if not errors.all():
        flat = [name for name, error in zip(estimates, errors, strict=True) if not error]
        raise ValueError(f"All values of {', '.join(flat)} are the same: their mean has no error to weigh it by.")
    combined = combine_effects(means, errors, method_re="dl", alpha=1 - confidence)
    q = combined.test_homogeneity()
    # rows of conf_int: fixed and random effects, each by the model and by Hartung and Knapp
    low, high = combined.conf_int(alpha=1 - confidence, use_t=True)[3]
    pooled = Estimate(
        float(combined.mean_effect_re), float(low), float(high), len(means), confidence, "random effects, Hartung-Knapp"
    )
    names = list(estimates)
    signs = {np.sign(e.low) if np.sign(e.low) == np.sign(e.high) else 0.0 for e in estimates.values()}
    return Between(
        estimates, pooled, names[int(means.argmin())], names[int(means.argmax())], max(0.0, float(combined.i2)),
        float(q.pvalue), len(signs) == 1 and 0.0 not in signs,
    )  # fmt: skip


def summarise(
    result: xr.DataArray,
    dim: str = "prompt",
    confidence: float = 0.95,
    seed: int = 0,
    *,
    weights: ArrayLike | xr.DataArray | None = None,
) -> xr.Dataset:
    """Mean over one dimension of a labelled result, with a bootstrap-t interval in every cell.

    Intervals hold cell by cell. Of a hundred cells without effect, about five exclude zero all the same.

    Args:
        weights: as in :func:`bootstrap_interval`.

    Returns:
        ``mean``, ``low`` and ``high`` over the remaining dimensions, with their coordinates and the result's
        attributes, ``n`` and ``confidence``.

    Raises:
        ValueError: ``dim`` is not there or has fewer than 4 entries, or values are missing.
    """
    import xarray as xr

    if dim not in result.dims:
        raise ValueError(f"The result has no dimension {dim!r}: it has {', '.join(map(str, result.dims))}.")
    result = result.transpose(dim, ...)
    values = np.asarray(result, dtype=float)
    _check_values(values, at_least=LEAST)
    rest = values.shape[1:]
    weights = None if weights is None else _vector(weights, at_least=LEAST, what="weights")
    ends = _bootstrap_t(values.reshape(len(values), -1), weights, confidence, seed)
    template = _without(result, dim)
    names = ("mean", "low", "high")
    data = {n: template.copy(data=e.reshape(rest)).rename(n) for n, e in zip(names, ends, strict=True)}
    attrs = dict(result.attrs) | {"quantity": result.name, "n": len(values), "confidence": confidence}
    return xr.Dataset(data, attrs=attrs)


def pooled_effect(effect: xr.DataArray) -> xr.DataArray:
    """Patching effect over all prompts together: the ratio of means, (patched - corrupted) / (clean - corrupted).

    The plain mean of per-prompt effects is at the mercy of prompts whose two runs hardly differ, because those are
    divided by next to nothing. Weighted by the gap, they count for as little as they say. For its interval give the
    same gap as ``weights`` to :func:`bootstrap_interval` or :func:`summarise`.

    Args:
        effect: from ``patch_sweep`` or ``ablate``, with coordinates ``clean`` and ``corrupted`` over ``prompt``.

    Returns:
        The effect without the dimension ``prompt``.

    Raises:
        ValueError: the coordinates are not there, effects are missing, or the gaps cancel.
    """
    if missing := {"clean", "corrupted"} - set(effect.coords):
        raise ValueError(
            f"The result has no coordinate {' or '.join(sorted(missing))} to weight the prompts by: "
            "give a result of patch_sweep or ablate."
        )
    _check_values(np.asarray(effect, dtype=float), at_least=1, what="effects")
    gap = effect["clean"] - effect["corrupted"]
    _check_weights(np.asarray(gap, dtype=float))
    return ((effect * gap).sum("prompt") / gap.sum("prompt")).assign_attrs(effect.attrs).rename(effect.name)


def in_order_of(result: xr.DataArray, first: xr.DataArray) -> xr.DataArray:
    """``result`` with its dimensions and their entries in the order of ``first``.

    Raises:
        ValueError: the two are not over the same cells.
    """
    if set(result.dims) != set(first.dims) or dict(result.sizes) != dict(first.sizes):
        raise ValueError(f"The results are over other cells: {_cells(first)} and {_cells(result)}.")
    for dim in set(first.dims) & set(first.coords) & set(result.coords):
        entries, others = first[dim].values, result[dim].values
        if sorted(map(str, entries)) != sorted(map(str, others)):
            raise ValueError(f"The results are over other cells: {dim} {list(entries)} and {list(others)}.")
        if list(entries) != list(others):
            result = result.sel({dim: entries})
    return result.transpose(*first.dims)


def _cells(result: xr.DataArray) -> str:
    return " × ".join(f"{size} {dim}" for dim, size in result.sizes.items()) or "a single cell"


def _without(result: xr.DataArray, dim: str) -> xr.DataArray:
    """One cell of a dimension as a template for results over the others."""
    template = result.isel({dim: 0}, drop=True).reset_coords(drop=True)
    # Coordinates that belonged to single prompts (template, clean, ...) say nothing about the mean.
    return template.assign_coords(
        {name: c for name, c in result.coords.items() if dim not in c.dims and name not in template.coords}
    )


def _signs(n: int, seed: int) -> Float[np.ndarray, "flip n"]:
    """All patterns of signs where they are few, otherwise so many random ones."""
    if n <= EXACT_UP_TO:
        return 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    return np.random.default_rng(seed).choice([-1.0, 1.0], size=(RESAMPLES, n))


def _labels_of(prompts: Any, kind: str) -> list[frozenset]:
    """The labels of a kind that each prompt carries."""
    if isinstance(prompts, Mapping) and kind in prompts:
        found = prompts[kind]
    elif hasattr(prompts, "coords") and kind in prompts.coords:
        found = prompts.coords[kind].values.tolist()
    elif kind == "entity" and hasattr(prompts, "correct"):
        found = list(zip(prompts.correct, prompts.incorrect, strict=True))
    elif kind != "entity" and isinstance(getattr(prompts, kind, None), tuple):
        found = getattr(prompts, kind)
    else:
        there = prompts if isinstance(prompts, Mapping) else getattr(prompts, "coords", ())
        known = ", ".join(map(str, there)) or "of PromptPairs template and entity"
        raise ValueError(f"These prompts have no labels of kind {kind!r}; there are: {known}.")
    return [frozenset(own if isinstance(own, tuple | list | set | frozenset) else [own]) for own in found]


def _bootstrap_t(
    values: Float[np.ndarray, "n cell"], weights: Float[np.ndarray, " n"] | None, confidence: float, seed: int
) -> tuple[Float[np.ndarray, " cell"], Float[np.ndarray, " cell"], Float[np.ndarray, " cell"]]:
    """(Weighted) mean, low and high end of every column. All columns see the same resamples of rows."""
    _check_confidence(confidence)
    n = len(values)
    weights = np.ones(n) if weights is None else weights
    if len(weights) != n:
        raise ValueError(f"{n} prompts but {len(weights)} weights: give one weight a prompt.")
    _check_weights(weights)
    weights = weights / weights.mean()
    mean = weights @ values / n
    centred = values - mean
    # A weighted mean is a ratio; to first order its error is the mean of w (v - mean).
    error = np.sqrt((weights**2 @ centred**2) / (n * (n - 1)))
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES).astype(float)
    total = counts @ weights
    with np.errstate(divide="ignore", invalid="ignore"):  # cells without spread; set to no width below
        shift = (counts * weights) @ centred / total[:, None]
        # sum of c w^2 (v - shift)^2, multiplied out so that no [resample, n, cell] is ever held
        squares = counts * weights**2
        spread = squares @ centred**2 - 2 * shift * (squares @ centred) + shift**2 * squares.sum(1)[:, None]
        own = np.sqrt(np.maximum(spread, 0) / (n * (n - 1))) * n / np.abs(total)[:, None]
        t = shift / np.where(own > 1e-6 * error, own, error)
    tail = (1 - confidence) / 2
    low_t, high_t = np.zeros_like(mean), np.zeros_like(mean)
    moving = error > 1e-12 * np.maximum(1.0, np.abs(values).max(0))
    if moving.any():
        low_t[moving], high_t[moving] = np.quantile(t[:, moving], [tail, 1 - tail], axis=0)
    error = np.where(moving, error, 0.0)
    return mean, mean - high_t * error, mean - low_t * error


def _vector(values: Any, *, at_least: int, what: str = "values") -> Float[np.ndarray, " n"]:
    array = np.asarray(values, dtype=float)
    if array.ndim != 1:
        shape = getattr(values, "dims", array.shape)
        raise ValueError(
            f"{what} must be one number a prompt, not an array over {tuple(shape)}. Choose a cell first, with "
            ".sel(layer=..., head=...), or use summarise() for all cells."
        )
    _check_values(array, at_least=at_least, what=what)
    return array


def _check_values(array: np.ndarray, *, at_least: int, what: str = "values") -> None:
    if len(array) < at_least:
        raise ValueError(f"{len(array)} {what}: at least {at_least} are needed.")
    if bad := int((~np.isfinite(array)).sum()):
        raise ValueError(f"{bad} of {array.size} {what} are missing or infinite: find out why before averaging.")


def _check_weights(weights: np.ndarray) -> None:
    if abs(weights.sum()) <= 1e-9 * np.abs(weights).sum():
        raise ValueError("The weights (clean - corrupted) sum to zero: there is no common gap to normalise by.")


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: give a share between 0 and 1, such as 0.95.")
