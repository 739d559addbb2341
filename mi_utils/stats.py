"""Statistics over prompts: intervals, tests and sizes for what the techniques measured.

One prompt is one observation. Prompts that share a template or a name are alike, so read an interval as "over prompts
drawn the way these were drawn", and hold back templates and names to learn what lies beyond them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float

if TYPE_CHECKING:
    import xarray as xr
    from numpy.typing import ArrayLike

RESAMPLES = 4000
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
        ValueError: fewer than 2 values, values that are missing or not one a prompt, values of 0 and 1 (count them
            and use :func:`proportion_interval`), weights that sum to zero.

    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", section 12.5.
    """
    values = _vector(values, at_least=2)
    if set(np.unique(values)) == {0.0, 1.0}:
        raise ValueError(
            "These values are 0 or 1: a share of prompts. Use proportion_interval(k, n) with the number of ones."
        )
    weights = None if weights is None else _vector(weights, at_least=2, what="weights")
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
    if n <= EXACT_UP_TO:
        signs = 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    else:
        signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(RESAMPLES, n))
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
        ValueError: ``dim`` is not there or has fewer than 2 entries, or values are missing.
    """
    import xarray as xr

    if dim not in result.dims:
        raise ValueError(f"The result has no dimension {dim!r}: it has {', '.join(map(str, result.dims))}.")
    result = result.transpose(dim, ...)
    values = np.asarray(result, dtype=float)
    _check_values(values, at_least=2)
    rest = values.shape[1:]
    weights = None if weights is None else _vector(weights, at_least=2, what="weights")
    ends = _bootstrap_t(values.reshape(len(values), -1), weights, confidence, seed)
    template = result.isel({dim: 0}, drop=True).reset_coords(drop=True)
    # Coordinates that belonged to single prompts (template, clean, ...) say nothing about the mean.
    template = template.assign_coords(
        {name: c for name, c in result.coords.items() if dim not in c.dims and name not in template.coords}
    )
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
        ValueError: the coordinates are not there, or the gaps cancel.
    """
    if missing := {"clean", "corrupted"} - set(effect.coords):
        raise ValueError(
            f"The result has no coordinate {' or '.join(sorted(missing))} to weight the prompts by: "
            "give a result of patch_sweep or ablate."
        )
    gap = effect["clean"] - effect["corrupted"]
    _check_weights(np.asarray(gap, dtype=float))
    return ((effect * gap).sum("prompt") / gap.sum("prompt")).assign_attrs(effect.attrs).rename(effect.name)


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
