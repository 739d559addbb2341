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
    for n, draw, mean in (
        (24, lambda size: rng.normal(0.6, 0.4, size), 0.6),
        (24, lambda size: rng.gamma(3.0, 0.2, size), 0.6),
        (40, lambda size: rng.exponential(2.0, size), 2.0),
    ):
        summary = stats.summarise(xr.DataArray(draw((n, 2000)), dims=("prompt", "try")))
        covered = ((summary["low"] <= mean) & (mean <= summary["high"])).mean().item()
        assert 0.93 <= covered <= 0.97, (n, mean, covered)


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


def test_clopper_pearson_covers_as_often_as_it_says():
    from scipy.stats import binom

    intervals = [stats.proportion_interval(k, 400) for k in range(401)]
    for share in np.linspace(0.05, 0.95, 19):  # the exact chance, from all outcomes there are
        covered = binom.pmf([k for k, e in enumerate(intervals) if e.low <= share <= e.high], 400, share).sum()
        assert 0.95 <= covered <= 0.97


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
    intervals = [stats.effect_size(rng.normal(0.8, 1.0, size=20)) for _ in range(1000)]
    assert 0.93 <= np.mean([e.low <= 0.8 <= e.high for e in intervals]) <= 0.97
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
    with pytest.raises(ValueError, match="at least 4"):
        stats.summarise(result[:1])
    with pytest.raises(ValueError, match="at least 4"):
        stats.bootstrap_interval([1.0, 2.0, 3.0])
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


def test_the_weighted_interval_covers_a_planted_ratio(monkeypatch):
    rng = np.random.default_rng(9)
    hits = 0
    monkeypatch.setattr(stats, "RESAMPLES", 1000)
    for _ in range(700):
        gap = rng.gamma(3.0, size=60)
        interval = stats.bootstrap_interval(0.6 + rng.normal(0, 0.3, size=60) / gap, weights=gap)
        hits += interval.low <= 0.6 <= interval.high
    assert 0.93 <= hits / 700 <= 0.97


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
        stats.bootstrap_interval([1.0, 2.0, 3.0, 4.0], confidence=95)


# ------------------------------------------------------------------------------------------------ many cells at once


def correlated_null(rng, n, cells):
    """No effect anywhere: cells of very different spread that share what is odd about a prompt; heavy tails."""
    shared = rng.standard_t(3, size=(n, 1))
    return shared * rng.normal(size=cells) + rng.standard_t(4, size=(n, cells)) * rng.uniform(0.1, 3, size=cells)


def test_the_smallest_corrected_p_of_a_null_sweep_is_uniform():
    from scipy.stats import kstest

    rng = np.random.default_rng(10)
    for n in (11, 24):  # all flips, and random ones
        nulls = [stats.max_statistic(correlated_null(rng, n, 40), seed=i) for i in range(220)]
        smallest = np.array([float(null["p_corrected"].min()) for null in nulls])
        assert kstest(smallest, "uniform").pvalue > 0.01
        assert np.mean(smallest <= 0.05) < 0.10
        alone = np.array([float(null["p_value"][0]) for null in nulls])
        assert kstest(alone, "uniform").pvalue > 0.01
        # Without correction most of these sweeps would "find" something.
        assert np.mean([float(null["p_value"].min()) <= 0.05 for null in nulls]) > 0.5


def test_the_correction_is_that_of_the_definition():
    values = np.random.default_rng(11).normal(0.3, 1.0, size=(8, 2, 3))
    ours = stats.max_statistic(values)
    flat = values.reshape(8, 6)

    def t(sample):
        return np.abs(sample.mean(0) / (sample.std(0, ddof=1) / np.sqrt(8)))

    signs = np.array(np.meshgrid(*[[1, -1]] * 8)).reshape(8, -1).T
    flipped = np.array([t(flat * sign[:, None]) for sign in signs])
    alone = (flipped >= t(flat) - 1e-9).mean(0)
    corrected = (flipped.max(1)[:, None] >= t(flat) - 1e-9).mean(0)
    np.testing.assert_allclose(ours["p_value"].values.ravel(), alone)
    np.testing.assert_allclose(ours["p_corrected"].values.ravel(), corrected)
    one = stats.sign_flip_test(values[:, 0, 0])
    assert float(ours["p_value"][0, 0]) == pytest.approx(one.p_value)
    assert (ours["p_corrected"] >= ours["p_value"]).all()


def test_a_planted_cell_is_found_and_cells_without_effect_are_not():
    effect = np.random.default_rng(12).normal(0, 0.3, size=(24, 3, 5))
    effect[:, 1, 2] += 0.8
    effect[:, 0] = 0.0  # nothing differs there, on no prompt
    found = stats.max_statistic(patching_result(effect))
    passed = found["p_corrected"] <= 0.05
    assert bool(passed[1, 2]) and int(passed.sum()) == 1
    assert (found["p_value"][0] == 1).all() and (found["p_corrected"][0] == 1).all()
    assert found.attrs["cells"] == 10 and found.attrs["model"] == "planted" and "token" in found.coords
    np.testing.assert_allclose(found["mean"], effect.mean(0))
    noising = stats.max_statistic(1 - patching_result(effect), null=1.0)
    np.testing.assert_allclose(noising["p_corrected"], found["p_corrected"])


def test_the_sweep_test_refuses_what_it_cannot_test():
    for bad, words in (
        (np.zeros((8, 3)), "nothing was measured"),
        (np.ones((5, 3)), "at least 6"),
        (np.full((8, 3), np.nan), "missing"),
    ):
        with pytest.raises(ValueError, match=words):
            stats.max_statistic(bad)
    with pytest.raises(ValueError, match="it has layer"):
        stats.max_statistic(xr.DataArray(np.ones(8), dims="layer"))


def test_superiority_known_answers_and_coverage():
    from scipy.stats import norm

    ours = stats.superiority([1.0, 2.0, 3.0, 4.0, 5.0], [0.0, 2.0, 2.5, 3.5, 4.5])
    pairs = [(a > b) + 0.5 * (a == b) for a in (1.0, 2.0, 3.0, 4.0, 5.0) for b in (0.0, 2.0, 2.5, 3.5, 4.5)]
    assert ours.value == pytest.approx(np.mean(pairs)) and ours.low < ours.value < ours.high
    rng, hits = np.random.default_rng(13), 0
    truth = norm.cdf(0.8 / np.sqrt(2))
    for _ in range(1000):
        estimate = stats.superiority(rng.normal(0.8, 1, size=24), rng.normal(0, 1, size=20))
        hits += estimate.low <= truth <= estimate.high
    assert 0.93 <= hits / 1000 <= 0.97
    with pytest.raises(ValueError, match="do not overlap"):
        stats.superiority(np.arange(5.0) + 10, np.arange(5.0))
    with pytest.raises(ValueError, match="same number"):
        stats.superiority(np.ones(5), np.ones(5))


# ------------------------------------------------------------------------------------------------ splits


def labels(n, seed=0):
    rng = np.random.default_rng(seed)
    names = [f"name {i}" for i in range(12)]
    return {
        "template": [f"template {i}" for i in rng.integers(6, size=n)],
        "entity": [tuple(rng.choice(names, size=2, replace=False).tolist()) for _ in range(n)],
    }


def test_the_two_sides_of_a_split_share_no_template_and_no_entity():
    given = labels(120)
    split = stats.split_prompts(given)
    assert sorted(sum(split, [])) == list(range(120))
    assert min(len(split.discovery), len(split.confirmation)) >= 10
    for kind in given:
        sides = [
            {label for i in side for label in ([given[kind][i]] if kind == "template" else given[kind][i])}
            for side in (split.discovery, split.confirmation)
        ]
        assert not sides[0] & sides[1], kind
    assert stats.split_prompts(given) == split and stats.split_prompts(given, seed=1) != split
    by_template = stats.split_prompts(given, by=["template"])
    assert by_template.dropped == []


def test_a_split_reads_labels_off_results_and_pairs():
    from types import SimpleNamespace

    given = labels(60, seed=3)
    first, second = zip(*given["entity"], strict=True)
    pairs = SimpleNamespace(template=tuple(given["template"]), correct=first, incorrect=second)
    assert stats.split_prompts(pairs) == stats.split_prompts(given)
    result = xr.DataArray(np.zeros(60), dims="prompt", coords={"template": ("prompt", given["template"])})
    split = stats.split_prompts(result, by=["template"])
    parts = [set(result.isel(prompt=side)["template"].values) for side in (split.discovery, split.confirmation)]
    assert parts[0] and parts[1] and not parts[0] & parts[1]


def test_a_split_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="1 of kind 'template'"):
        stats.split_prompts({"template": ["one"] * 20}, by=["template"])
    with pytest.raises(ValueError, match="no labels of kind 'entity'; there are: template"):
        stats.split_prompts({"template": ["a", "b"]})
    with pytest.raises(ValueError, match="by is empty"):
        stats.split_prompts({"template": ["a", "b"]}, by=[])


# ------------------------------------------------------------------------------------------------ agreement


def test_agreement_of_sweeps_known_answers():
    base = np.array([[0.9, 0.1, 0.0], [0.4, -0.2, 0.05]])
    results = {"mean": base, "resample": 0.5 * base, "zero": -base}
    table = stats.agreement(results, top=2)
    assert table["correlation"].sel(a="mean", b="resample") == pytest.approx(1.0)
    assert table["correlation"].sel(a="mean", b="zero") == pytest.approx(-1.0)
    assert table["overlap"].sel(a="mean", b="resample") == 1 and table["overlap"].sel(a="mean", b="zero") == 0
    assert table["same_sign"].sel(a="mean", b="resample") == 1 and table["same_sign"].sel(a="mean", b="zero") == 0
    assert table["difference"].sel(a="mean", b="zero") == pytest.approx(1.8)


def test_networks_of_other_seeds_are_compared_head_by_rank_not_by_number():
    rng = np.random.default_rng(14)
    profile = np.array([0.9, 0.6, 0.5, *np.zeros(13)])
    seeds = {str(i): rng.permutation(profile).reshape(4, 4) for i in range(3)}
    by_rank = stats.agreement(seeds, cells="sorted")
    assert (by_rank["overlap"] > 0.999).all() and float(by_rank["difference"].max()) == 0
    assert float(stats.agreement(seeds)["difference"].max()) > 0.4


def test_cells_are_compared_by_their_labels():
    effect = patching_result(np.random.default_rng(15).normal(size=(10, 3, 4))).assign_coords(layer=[0, 1, 2])
    turned = effect.isel(layer=[2, 1, 0])
    assert float(stats.agreement({"a": effect, "b": turned})["difference"].max()) < 1e-12
    other = effect.assign_coords(layer=[3, 4, 5])
    with pytest.raises(ValueError, match="other cells: layer"):
        stats.agreement({"a": effect, "b": other})
    assert stats.agreement({"a": effect, "b": other}, cells="sorted") is not None
    with pytest.raises(ValueError, match="missing"):
        stats.agreement({"a": effect, "b": effect.where(effect.prompt != 3)})


def test_agreement_averages_prompts_and_matches_dimensions():
    effect = patching_result(np.random.default_rng(15).normal(size=(10, 2, 3)))
    table = stats.agreement({"a": effect, "b": effect.mean("prompt").transpose("pos", "layer")})
    assert float(table["difference"].max()) < 1e-12
    with pytest.raises(ValueError, match="different cells"):
        stats.agreement({"a": np.ones((2, 3)), "b": np.ones((3, 2))})
    with pytest.raises(ValueError, match="at least two"):
        stats.agreement({"a": np.ones((2, 3))})


def test_the_interval_between_networks_covers_the_mean_of_all_networks(monkeypatch):
    rng, hits = np.random.default_rng(16), 0
    monkeypatch.setattr(stats, "RESAMPLES", 20)  # of the intervals of single networks, which are not asked for here
    for _ in range(600):
        truths = rng.normal(0.7, 0.1, size=8)  # networks differ
        pooled = stats.between({f"seed {i}": rng.normal(truth, 0.2, size=24) for i, truth in enumerate(truths)}).pooled
        hits += pooled.low <= 0.7 <= pooled.high
    assert 0.93 <= hits / 600 <= 0.97


def test_between_tells_same_from_different_networks():
    rng = np.random.default_rng(17)
    same = stats.between({str(i): rng.normal(0.7, 0.3, size=40) for i in range(3)})
    different = stats.between({str(i): rng.normal(0.4 * i, 0.1, size=40) for i in range(3)})
    assert same.p_value > 0.01 > different.p_value and different.i_squared > 0.9 and not different.same_sign
    with pytest.raises(ValueError, match="at least two"):
        stats.between({"one": [0.1, 0.2, 0.4]})
    with pytest.raises(ValueError, match="no error"):
        stats.between({"a": [0.5] * 4, "b": [0.1, 0.2, 0.4, 0.4]})
