"""Known answers: textbook formulas, planted effects, coverage, and p-values under a true null."""

import numpy as np
import pytest
import xarray as xr

from mi_utils import stats


def patching_result(effect, clean=None, corrupted=None):
    effect = np.asarray(effect, dtype=float)
    n = len(effect)
    coords = {
        "prompt": np.arange(n),
        "clean": ("prompt", np.full(n, 3.0) if clean is None else clean),
        "corrupted": ("prompt", np.full(n, -3.0) if corrupted is None else corrupted),
        "template": ("prompt", ["a"] * n),
    }
    dims = ("prompt", "layer", "pos")[: effect.ndim]
    if effect.ndim == 3:
        coords["token"] = ("pos", [f"{i} word" for i in range(effect.shape[2])])
    return xr.DataArray(effect, dims=dims, coords=coords, attrs={"model": "planted"}, name="effect")


def test_the_interval_covers_a_planted_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    samples = rng.exponential(2.0, size=(400, 40))  # skewed, mean 2
    summary = stats.summarise(xr.DataArray(samples.T, dims=("prompt", "try")))
    covered = ((summary["low"] <= 2.0) & (2.0 <= summary["high"])).mean().item()
    assert 0.90 <= covered <= 0.97


def test_the_interval_is_near_students_on_normal_values():
    from scipy.stats import t

    values = np.random.default_rng(1).normal(3.0, 2.0, size=60)
    half = t.ppf(0.975, 59) * values.std(ddof=1) / np.sqrt(60)
    ours = stats.bootstrap_interval(values)
    assert ours.value == pytest.approx(values.mean())
    assert abs(ours.low - (values.mean() - half)) < 0.15 * half
    assert abs(ours.high - (values.mean() + half)) < 0.15 * half


def test_a_seed_gives_one_interval_and_a_constant_has_no_width():
    values = np.random.default_rng(2).normal(size=20)
    assert stats.bootstrap_interval(values, seed=3) == stats.bootstrap_interval(values, seed=3)
    assert stats.bootstrap_interval(values, seed=3) != stats.bootstrap_interval(values, seed=4)
    constant = stats.bootstrap_interval([0.7] * 9)
    assert constant.low == pytest.approx(0.7) and constant.high == pytest.approx(0.7)


def test_shares_go_to_the_interval_for_shares():
    with pytest.raises(ValueError, match="proportion_interval"):
        stats.bootstrap_interval([1.0, 0.0, 1.0, 1.0])


@pytest.mark.parametrize(("k", "n"), [(0, 20), (19, 20), (20, 20), (137, 150)])
def test_clopper_pearson_against_the_textbook(k, n):
    from scipy.stats import beta

    ours = stats.proportion_interval(k, n)
    assert ours.value == k / n
    assert ours.low == pytest.approx(beta.ppf(0.025, k, n - k + 1) if k else 0.0, abs=1e-6)
    assert ours.high == pytest.approx(beta.ppf(0.975, k + 1, n - k) if k < n else 1.0, abs=1e-6)


def test_sign_flips_give_uniform_p_under_the_null():
    from scipy.stats import kstest

    rng = np.random.default_rng(5)
    exact = [stats.sign_flip_test(rng.normal(size=11)).p_value for _ in range(200)]
    sampled = [stats.sign_flip_test(rng.standard_t(3, size=20), seed=i).p_value for i in range(200)]
    for p in (exact, sampled):
        assert kstest(p, "uniform").pvalue > 0.01
        assert np.mean(np.array(p) <= 0.05) < 0.11


def test_sign_flips_known_answers():
    assert stats.sign_flip_test([1.0] * 6).p_value == 2 / 64
    assert stats.sign_flip_test([1.0, -1.0] * 3).p_value == 1.0
    assert 0 < stats.sign_flip_test(np.ones(100)).p_value < 1e-3
    assert stats.sign_flip_test([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).statistic == 3.5
    for hopeless in ([0.0] * 8, [1.0] * 5):
        with pytest.raises(ValueError):
            stats.sign_flip_test(hopeless)


def test_cohens_d_known_answer_and_coverage():
    values = [1.0, 2.0, 3.0, 4.0, 5.0]
    assert stats.effect_size(values).value == pytest.approx(3 / np.std(values, ddof=1))
    rng = np.random.default_rng(6)
    intervals = [stats.effect_size(rng.normal(0.8, 1.0, size=20)) for _ in range(200)]
    assert 0.89 <= np.mean([e.low <= 0.8 <= e.high for e in intervals]) <= 0.99
    with pytest.raises(ValueError, match="without spread"):
        stats.effect_size([0.5] * 6)
    with pytest.raises(ValueError, match="at least 5"):
        stats.effect_size([1.0, 2.0])


def test_summarise_keeps_labels_and_finds_the_planted_cell():
    effect = np.random.default_rng(7).normal(0, 0.1, size=(24, 3, 5))
    effect[:, 1, 2] += 0.8
    summary = stats.summarise(patching_result(effect))
    assert summary["mean"].dims == ("layer", "pos") and list(summary["token"].values)[2] == "2 word"
    np.testing.assert_allclose(summary["mean"], effect.mean(0))
    assert (summary["low"] <= summary["mean"]).all() and (summary["mean"] <= summary["high"]).all()
    assert summary["low"][1, 2] > 0.7 and summary.attrs["n"] == 24 and summary.attrs["model"] == "planted"
    one = stats.bootstrap_interval(effect[:, 1, 2])
    assert float(summary["low"][1, 2]) == pytest.approx(one.low)


def test_summarise_refuses_what_it_cannot_average():
    result = patching_result(np.zeros((4, 2, 2)))
    with pytest.raises(ValueError, match="it has layer, pos"):
        stats.summarise(result.mean("prompt"))
    with pytest.raises(ValueError, match="at least 2"):
        stats.summarise(result[:1])
    with pytest.raises(ValueError, match="1 of 16 values are missing"):
        stats.summarise(result.where((result.prompt > 0) | (result.layer > 0) | (result.pos > 0)))


def test_the_pooled_effect_is_the_ratio_of_means():
    rng = np.random.default_rng(8)
    clean, corrupted = rng.normal(3, 1, size=50), rng.normal(-3, 1, size=50)
    patched = rng.normal(1, 1, size=50)
    clean[0], corrupted[0] = 0.001, 0.0  # a prompt without a gap: its ratio is noise
    effect = patching_result((patched - corrupted) / (clean - corrupted), clean, corrupted)
    ratio = (patched.mean() - corrupted.mean()) / (clean.mean() - corrupted.mean())
    assert float(stats.pooled_effect(effect)) == pytest.approx(ratio)
    assert abs(float(effect.mean()) - ratio) > 0.5
    pooled = stats.bootstrap_interval(effect, weights=effect["clean"] - effect["corrupted"])
    assert pooled.value == pytest.approx(ratio)
    assert pooled.low < ratio < pooled.high and pooled.high - pooled.low < 0.3
    np.testing.assert_allclose(stats.pooled_effect(effect.expand_dims(layer=2, axis=1)), ratio)


def test_the_weighted_interval_covers_a_planted_ratio():
    rng = np.random.default_rng(9)
    hits = 0
    for _ in range(150):
        gap = rng.gamma(3.0, size=30)
        interval = stats.bootstrap_interval(0.6 + rng.normal(0, 0.3, size=30) / gap, weights=gap)
        hits += interval.low <= 0.6 <= interval.high
    assert 0.89 <= hits / 150 <= 0.99


def test_pooling_needs_baselines():
    with pytest.raises(ValueError, match="clean or corrupted"):
        stats.pooled_effect(xr.DataArray(np.ones(4), dims="prompt"))
    with pytest.raises(ValueError, match="no common gap"):
        stats.pooled_effect(patching_result(np.ones(4), np.ones(4), np.ones(4)))


@pytest.mark.parametrize("values", [[1.0], [[1.0, 2.0]], [1.0, float("nan")], []])
def test_bad_values_are_refused(values):
    for measure in (stats.bootstrap_interval, stats.sign_flip_test, stats.effect_size):
        with pytest.raises(ValueError):
            measure(values)


def test_bad_counts_and_confidence_are_refused():
    for k, n in ((3, 2), (-1, 2), (0, 0), (1.5, 3)):
        with pytest.raises(ValueError, match="no share"):
            stats.proportion_interval(k, n)
    with pytest.raises(ValueError, match="between 0 and 1"):
        stats.bootstrap_interval([1.0, 2.0], confidence=95)
