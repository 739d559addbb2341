"""Feature search against a reference that stores everything; interventions on a feature that is planted by hand."""

import tracemalloc

import handset
import numpy as np
import pytest
import test_probing
import test_sae
import torch

from mi_utils import features, models
from mi_utils.features import (
    ablate_feature,
    against_controls,
    examples,
    feature_activations,
    feature_directions,
    feature_search,
    logit_effects,
    steer_feature,
)
from mi_utils.models import load_model
from mi_utils.prompts import PromptPairs
from mi_utils.results import NothingChanged
from mi_utils.tokens import token_batches


class Rectified:
    """A dictionary of given directions: a feature is as active as its direction is long in the activation, beyond a
    bias. ``step`` rounds activations down, so that many are the same."""

    def __init__(self, directions, bias=0.0, *, site="resid_pre", layer=0, step=None):
        self.directions, self.bias, self.site, self.layer, self.step = directions, bias, site, layer, step
        self.n_features, self.d_model = directions.shape
        self.calls = 0

    def encode(self, x):
        self.calls += 1
        active = (x @ self.directions.T - self.bias).relu()
        return active if self.step is None else (active / self.step).floor() * self.step


def drawn(n, d_model, seed=0):
    directions = torch.randn(n, d_model, generator=torch.Generator().manual_seed(seed))
    return directions / directions.norm(dim=-1, keepdim=True)


def stream(model, n_batches=6, rows=5, length=13, seed=0):
    """Random rows, BOS first; some have a second BOS, where another text begins, and some end in padding."""
    rng = np.random.default_rng(seed)
    bos = model.tokenizer.bos_token_id
    batches = []
    for _ in range(n_batches):
        batch = rng.integers(0, bos, (rows, length))
        batch[:, 0], batch[1, 6], batch[2, 9:] = bos, bos, bos
        batches.append(torch.from_numpy(batch))
    return batches


@pytest.fixture(scope="module")
def dictionary():
    sae = Rectified(drawn(48, 32), 0.25, step=0.125)
    sae.directions[7] = 0  # never active: the bias is subtracted from nothing
    return sae


def by_storing_everything(model, sae, batches, top, draws, window, seed=0):
    """What ``feature_search`` says, from all activations at once, feature by feature."""
    bos = model.tokenizer.bos_token_id
    acts = np.concatenate([feature_activations(model, sae, batch).flatten(0, 1).numpy() for batch in batches])
    tokens = np.concatenate([batch.flatten().numpy() for batch in batches])
    length = batches[0].shape[1]
    counted = tokens != bos
    acts[~counted] = 0
    lots = features.lots(np.arange(len(tokens)), seed)
    edges = np.append(features.bin_edges(), np.inf)
    found = {"histogram": [], "top": [], "sample": []}
    for feature in range(sae.n_features):
        values = acts[:, feature]
        active = np.flatnonzero(values > 0)
        found["histogram"].append(np.histogram(values[active], edges)[0])
        strongest = sorted(active, key=lambda t: (-values[t], t))
        luckiest = sorted(sorted(active, key=lambda t: lots[t])[:draws], key=lambda t: (-values[t], t))
        for name, kept in (("top", strongest[:top]), ("sample", luckiest)):
            entries = []
            for t in kept:
                row, pos = divmod(int(t), length)
                context, around = [], []
                end = 1 + max(i for i in range(length) if counted[row * length + i])
                for offset in range(-window[0], window[1] + 1):
                    inside = 0 <= pos + offset < end
                    context.append(tokens[row * length + pos + offset] if inside else -1)
                    around.append(values[row * length + pos + offset] if inside else 0)
                entries.append((int(t), values[t], context, around))
            found[name].append(entries)
    return found, int(counted.sum())


@pytest.mark.parametrize("length", [1, 4, 13])
def test_search_is_what_storing_everything_gives(tiny, dictionary, length):
    batches = stream(tiny, length=max(length, 10))
    window = (length - 1, 2)
    search = feature_search(tiny, dictionary, batches, top=5, draws=7, window=window, progress=False)
    expected, counted = by_storing_everything(tiny, dictionary, batches, 5, 7, window)
    assert search.attrs["n_tokens"] == counted
    assert np.array_equal(search["histogram"], expected["histogram"])
    assert np.array_equal(search["active"], np.sum(expected["histogram"], 1))
    ties = 0
    for name in ("top", "sample"):
        for feature, entries in enumerate(expected[name]):
            one = search.sel(feature=feature)
            n = len(entries)
            assert one[f"{name}_token"].values[:n].tolist() == [entry[0] for entry in entries]
            assert (one[f"{name}_token"].values[n:] == -1).all() and np.isnan(
                one[f"{name}_activation"].values[n:]
            ).all()
            for part, column in (("activation", 1), ("context", 2), ("around", 3)):
                assert (
                    np.array_equal(one[f"{name}_{part}"].values[:n], [entry[column] for entry in entries] or [*[]])
                    or not n
                )
            ties += len({entry[1] for entry in entries}) < n
    assert ties > 10  # the rule was put to the test


def test_a_dead_feature_has_no_examples(tiny, dictionary):
    search = feature_search(tiny, dictionary, stream(tiny, 2), top=3, draws=3, progress=False)
    assert search["active"][7] == 0 and search["density"][7] == 0
    assert examples(search, tiny, 7) == [] and examples(search, tiny, 7, which="quantiles") == []


def test_how_the_stream_is_cut_does_not_matter(tiny, dictionary):
    """The activations at the first block's input do not depend on what else is in the batch."""
    batches = stream(tiny)
    whole = torch.cat(batches)
    first = feature_search(tiny, dictionary, batches, top=4, draws=6, progress=False)
    second = feature_search(tiny, dictionary, [whole[:7], whole[7:8], whole[8:]], top=4, draws=6, progress=False)
    assert first.identical(second)
    assert first.sizes == feature_search(tiny, dictionary, (batch for batch in batches), top=4, draws=6).sizes


def test_another_seed_draws_other_examples(tiny, dictionary):
    first, second = (
        feature_search(tiny, dictionary, stream(tiny), top=4, draws=4, seed=seed, progress=False) for seed in (0, 1)
    )
    assert (first["sample_token"] != second["sample_token"]).mean() > 0.5
    assert (first["top_token"] == second["top_token"]).all()


def test_lots_are_all_different_and_even():
    drawn = features.lots(np.arange(20_000), 3)
    assert len(set(drawn.tolist())) == 20_000
    share = (drawn.astype(float) - np.iinfo(np.int64).min) / 2.0**64
    assert abs(share.mean() - 0.5) < 0.01 and abs(np.corrcoef(share[1:], share[:-1])[0, 1]) < 0.03


def test_bins_hold_what_their_edges_say():
    edges = features.bin_edges()
    values = np.concatenate([edges[1:], np.nextafter(edges[1:].astype(np.float32), np.float32(0)), [1e-30, 1e30]])
    values = values.astype(np.float32)
    assert np.array_equal(features._bins(values), np.searchsorted(edges, values, side="right") - 1)
    assert len(edges) == features.N_BINS


def test_only_so_many_tokens(tiny, dictionary):
    def endless():
        while True:
            yield from stream(tiny, 1)

    search = feature_search(tiny, dictionary, endless(), n_tokens=100, progress=False)
    per_batch = feature_search(tiny, dictionary, stream(tiny, 1), progress=False).attrs["n_tokens"]
    assert search.attrs["n_tokens"] == -(-100 // per_batch) * per_batch


class Killed(Exception):
    pass


def killed_after(batches, n):
    yield from batches[:n]
    raise Killed


def test_killed_and_resumed_it_gives_the_same(tiny, dictionary, tmp_path):
    batches, path = stream(tiny, 8), tmp_path / "search.npz"
    arguments = {"top": 4, "draws": 5, "window": (3, 2), "progress": False}
    whole = feature_search(tiny, dictionary, batches, **arguments)
    for n in (1, 4, 4, 7):
        with pytest.raises(Killed):
            feature_search(tiny, dictionary, killed_after(batches, n), save=path, save_every=0, **arguments)
    dictionary.calls = 0
    resumed = feature_search(tiny, dictionary, batches, save=path, **arguments)
    assert dictionary.calls == 1  # seven of eight batches were not run again
    assert resumed.identical(whole)
    dictionary.calls = 0
    assert feature_search(tiny, dictionary, batches, save=path, **arguments).identical(whole) and not dictionary.calls
    assert [file.name for file in tmp_path.iterdir()] == ["search.npz"]


def test_a_kept_search_is_not_mixed_with_another(tiny, dictionary, tmp_path):
    path = tmp_path / "search.npz"
    feature_search(tiny, dictionary, stream(tiny, 3), top=4, save=path, progress=False)
    with pytest.raises(ValueError, match="another stream"):
        feature_search(tiny, dictionary, stream(tiny, 3, seed=1), top=4, save=path, progress=False)
    with pytest.raises(ValueError, match="another search"):
        feature_search(tiny, dictionary, stream(tiny, 3), top=5, save=path, progress=False)
    with pytest.raises(ValueError, match="another search"):
        other = Rectified(drawn(48, 32, seed=1), 0.25)
        feature_search(tiny, other, stream(tiny, 3), top=4, save=path, progress=False)
    trained = test_sae.by_hand(drawn(8, 32), torch.zeros(32), tiny)
    kept = tmp_path / "trained.npz"
    feature_search(tiny, trained, stream(tiny, 3), save=kept, progress=False)
    with pytest.raises(ValueError, match="another search"), torch.no_grad():
        trained.inner.b_enc += 1  # the same directions, and other thresholds
        feature_search(tiny, trained, stream(tiny, 3), save=kept, progress=False)
    with pytest.raises(ValueError, match="longer stream"):
        feature_search(tiny, dictionary, stream(tiny, 2), top=4, save=path, progress=False)
    with pytest.raises(ValueError, match="more than n_tokens"):
        feature_search(tiny, dictionary, stream(tiny, 3), top=4, save=path, n_tokens=60, progress=False)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="holds no feature search"):
        feature_search(tiny, dictionary, stream(tiny, 3), top=4, save=path, progress=False)


def test_memory_does_not_grow_with_the_stream(tiny, dictionary):
    def peak(n):
        batches = (stream(tiny, 1, rows=20, seed=i)[0] for i in range(n))
        tracemalloc.start()
        feature_search(tiny, dictionary, batches, top=4, draws=4, progress=False)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(2)
    assert peak(24) < 1.2 * peak(4)


def test_wrong_input_is_refused(tiny, dictionary, monkeypatch):
    batches = stream(tiny, 1)
    for other, words in (
        (Rectified(drawn(8, 16)), "16 wide"),
        (Rectified(drawn(8, 32), layer=5), "layer 5"),
        (Rectified(drawn(8, 32), site="resid"), "Unknown site"),
        (Rectified(drawn(8, 32) * torch.nan), "no numbers"),
    ):
        with pytest.raises(ValueError, match=words):
            feature_search(tiny, other, batches, progress=False)
    with pytest.raises(ValueError, match="at least one example"):
        feature_search(tiny, dictionary, batches, top=0)
    seen, cache = [], models.cache

    def overflowing(*arguments, **options):
        kept = cache(*arguments, **options)
        seen.append(kept)
        return (
            kept
            if len(seen) < 2
            else {key: value.index_fill(1, torch.tensor([2]), torch.inf) for key, value in kept.items()}
        )

    monkeypatch.setattr(models, "cache", overflowing)
    with pytest.raises(ValueError, match="overflows"):
        feature_search(tiny, dictionary, stream(tiny, 3), progress=False)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"\[row, pos\]"):
        feature_search(tiny, dictionary, batches[0], progress=False)
    with pytest.raises(ValueError, match="does not begin with BOS"):
        feature_search(tiny, dictionary, [batches[0][:, 1:]], progress=False)
    with pytest.raises(ValueError, match="no token that counts"):
        bos = tiny.tokenizer.bos_token_id
        feature_search(tiny, dictionary, [torch.full((2, 4), bos)], progress=False)


# ---------------------------------------------------------------- a planted feature

YES, NO, SIGN, THINGS = test_probing.YES, test_probing.NO, test_probing.SIGN, test_probing.THINGS


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A model whose things carry a feature, which is all that the unembedding reads."""
    return load_model(test_probing.save_planted(tmp_path_factory.mktemp("planted")))


@pytest.fixture(scope="module")
def found():
    """A dictionary whose feature 3 is the planted direction; the others are drawn."""
    directions = drawn(40, test_probing.D_MODEL, seed=8)
    directions[3] = test_probing.planted_direction()
    directions[4] *= 3
    return Rectified(directions, 1.0, site="resid_post", layer=1)


def pairs(model, sign=1):
    ours, others = ([thing for thing in THINGS if SIGN[thing] == s] for s in (sign, -sign))
    return PromptPairs(
        model,
        clean=[f" {test_probing.FRAMES[0]} {thing}" for thing in ours],
        corrupted=[f" {test_probing.FRAMES[0]} {thing}" for thing in others],
        correct=[" " + (YES if sign > 0 else NO)] * len(ours),
        incorrect=[" " + (NO if sign > 0 else YES)] * len(ours),
        check=False,
    )


def test_examples_show_the_planted_things(planted, found):
    rows = planted.tokenizer([f" {frame} {thing}" for thing in THINGS for frame in test_probing.FRAMES[:3]])[
        "input_ids"
    ]
    bos = planted.tokenizer.bos_token_id
    search = feature_search(planted, found, list(token_batches([[bos, *row] for row in rows], bos)), progress=False)
    assert search["active"][3] == 3 * sum(sign > 0 for sign in SIGN.values())
    for which in ("top", "quantiles"):
        shown = examples(search, planted, 3, 8, which=which)
        assert len(shown) == 8
        for example in shown:
            word = example.words[example.at].strip()
            assert SIGN[word] == 1 and example.words[0] == handset.BOS
            assert example.activations[example.at] == pytest.approx(example.activation)
            assert all(a == 0 for i, a in enumerate(example.activations) if i != example.at)
        assert [e.activation for e in shown] == sorted((e.activation for e in shown), reverse=True)
    spread = [e.share for e in examples(search, planted, 3, 4, which="quantiles")]
    assert spread == pytest.approx([0.875, 0.625, 0.375, 0.125], abs=0.03)
    with pytest.raises(ValueError, match="which="):
        examples(search, planted, 3, which="worst")
    with pytest.raises(ValueError, match="No feature 40"):
        examples(search, planted, 40)


def test_logit_effects_are_the_change_of_logits_under_a_linear_norm(tiny):
    sae = Rectified(drawn(30, 32, seed=2), layer=1)
    norm, unembedding = models.final_norm(tiny), models.W_U(tiny)
    x = sae.directions - sae.directions.mean(-1, keepdim=True)
    expected = (x * norm.weight) @ unembedding
    expected = (expected - expected.mean(-1, keepdim=True)).numpy()
    words = [tiny.tokenizer.decode([i]) for i in (60, 70, 300)]
    ids = [models.single_token(tiny, word) for word in words]
    some = logit_effects(tiny, sae, [4, 9], tokens=words)
    assert np.allclose(some, expected[[4, 9]][:, ids], atol=1e-5) and some.dims == ("feature", "token")
    best = logit_effects(tiny, sae, top=3)
    assert np.allclose(best["promoted_effect"], -np.sort(-expected, 1)[:, :3], atol=1e-5)
    assert np.allclose(best["suppressed_effect"], np.sort(expected, 1)[:, :3], atol=1e-5)
    top = expected.argmax(1)
    assert best["promoted"].values[:, 0].tolist() == models.token_strings(tiny, torch.from_numpy(top))
    with pytest.raises(ValueError, match="No features"):
        logit_effects(tiny, sae, [30])
    with pytest.raises(ValueError, match="not one"):
        logit_effects(tiny, sae, tokens=["this is more"])


def test_logit_effects_of_the_planted_feature(planted, found):
    best = logit_effects(planted, found, [3], top=1)
    assert best["promoted"].item() == " " + YES and best["suppressed"].item() == " " + NO


def test_controls_have_the_features_length(found):
    directions = feature_directions(found, 3, random=5, random_features=6, seed=1)
    assert [d.kind for d in directions.values()] == ["feature", "negated", *["random"] * 5, *["random feature"] * 6]
    for direction in directions.values():
        assert float(direction.vector.norm()) == pytest.approx(float(found.directions[3].norm()), rel=1e-5)
    assert torch.equal(directions["negated"].vector, -directions["feature 3"].vector)
    assert len({tuple(d.vector.tolist()) for d in directions.values()}) == len(directions)
    among = feature_directions(found, 3, random=0, random_features=2, among=[3, 4, 5])
    assert set(among) == {"feature 3", "negated", "feature 4", "feature 5"}
    with pytest.raises(ValueError, match="there are 2"):
        feature_directions(found, 3, random_features=3, among=[3, 4, 5])
    with pytest.raises(ValueError, match="No feature 40"):
        feature_directions(found, 40)
    with pytest.raises(ValueError, match="without length"):
        feature_directions(Rectified(torch.zeros(3, 8)), 0, random_features=0)


def test_steering_the_planted_feature(planted, found):
    prompts = pairs(planted, sign=-1)  # things without the feature: NO is right
    result = steer_feature(planted, found, prompts, 3, [-2, 0, 2, 4], seed=2)
    assert result.dims == ("direction", "scale", "prompt") and result.attrs["feature"] == 3
    assert (result["activation"] == 0).all()
    assert np.array_equal(result.sel(direction="feature 3", scale=0), result["clean"])
    assert result.attrs["elements_changed"] > 0
    judged = against_controls(result, sign=-1)  # towards YES the difference NO - YES falls
    assert judged["scale"].values.tolist() == [-2, 2, 4]
    assert (judged["as_predicted"] == 1).all() and (judged["ratio"].sel(scale=[2, 4]) > 4).all()
    assert (judged["change"].sel(scale=4) < judged["change"].sel(scale=2)).all()
    negated = result.sel(direction="negated") - result["clean"]
    assert (negated.sel(scale=2) > 0).all()
    assert (against_controls(result, sign=1)["as_predicted"] == 0).all()
    with pytest.raises(ValueError, match="No random directions"):
        against_controls(steer_feature(planted, found, prompts, 3, [1], random=0))
    with pytest.raises(ValueError, match="predict a rise"):
        against_controls(result, sign=0)


def test_ablating_the_planted_feature(planted, found):
    prompts = pairs(planted)
    result = ablate_feature(planted, found, prompts, 3)
    assert result.dims == ("direction", "prompt") and (result["activation"] > 0).all()
    judged = against_controls(result, sign=-1)
    assert judged["as_predicted"] == 1 and judged["ratio"] > 3  # the final norm makes much of little
    # What is left is the bias of the dictionary along the direction: 1 of about 2.
    assert (result.sel(direction="feature 3") < 0.75 * result["clean"]).all()
    assert (result.sel(direction="negated") > result["clean"]).all()


def test_an_ablation_by_hand_gives_the_same(planted, found):
    prompts = pairs(planted)
    result = ablate_feature(planted, found, prompts, 3, random=0, random_features=0, pos=-1)

    def take(x, hook):
        x = x.clone()
        x[:, -1] -= found.encode(x[:, -1])[:, 3:4] * found.directions[3]
        return x

    logits = models.run_with_hooks(planted, prompts.clean_tokens, [(models.hook_name("resid_post", 1), take)])
    yes, no = (models.single_token(planted, " " + word) for word in (YES, NO))
    assert np.allclose(result.sel(direction="feature 3"), logits[:, -1, yes] - logits[:, -1, no], atol=1e-5)


def test_an_intervention_that_changes_nothing_is_refused(planted, found):
    silent = pairs(planted, sign=-1)
    with pytest.raises(NothingChanged, match="feature 3"):
        ablate_feature(planted, found, silent, 3)
    with pytest.raises(NothingChanged):
        steer_feature(planted, found, silent, 3, [0])
    before = models.run(planted, silent.clean_tokens)
    with pytest.raises(ValueError, match="positions"):
        ablate_feature(planted, found, silent, 3, pos=99)
    assert torch.equal(models.run(planted, silent.clean_tokens), before)  # no hook is left
